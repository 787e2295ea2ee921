"""The encoders of Sec. 5.2 joined into one CLIP: Swin-Tiny, BioClinicalBERT and the graph stream.

    image  (B, 1|3, H, W) -> Swin-Tiny, mean over the feature map  -> Linear -> v, unit rows (B, D)
    text   B reports      -> BERT, last hidden state of [CLS]      -> Linear -> T, unit rows (B, D)
    graph  B records      -> GCN over entity phrases (gcn.py)                -> G, unit rows (B, D)

`ClinicalCLIP.forward` embeds a whole batch, hard negatives included, so that one call is all that
DistributedDataParallel wraps. `load_model` reads a run folder, a checkpoint, an exported folder or
somebody else's Hugging Face CLIP. "tiny" encoders are small networks with random weights, for the
phantom and for tests.

Symbols: B batch, D width, L tokens, H hidden width, V graph nodes, P phrases.

SPDX-License-Identifier: MIT
"""

import contextlib
import copy
import json
import math
import re
import sys
import zipfile
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gcn import GCN, NODE_LABELS, collate_graphs

MAX_TOKENS = 256                   # CXR-CLIP's; BERT itself ends at 512
# ASSUMPTION: pixels in [0, 1] are normalised to [-1, 1], for pretrained weights too.
MEAN = STD = 0.5
TEMPERATURES = {"softmax": 0.07, "sigmoid": 0.1}  # initial ones: CLIP's and SigLIP's
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's clamp
GRAPH_HIDDEN = 256
TEXT_STEP = 64                     # reports of 1-64, 65-128, ... tokens are encoded together
PHRASE_ROWS, PHRASE_TOKENS = 16, 32  # the one shape in which phrases are encoded
MODELS = "a run folder, its checkpoint, or a folder or hub id of a Hugging Face CLIP"


class ModelError(ValueError):
    """An encoder, checkpoint or folder that is not what it should be; the message names it."""


class ClinicalCLIP(nn.Module):
    """The three encoders, their projections and the temperature (Sec. 5.2).

    image_encoder: "tiny", "swin-t" (random weights) or a file of torchvision's Swin-T weights.
    text_encoder: "tiny", a folder or hub id of a BERT-family model, or a saved `config["bert"]`.
    width: D of every embedding. image_size: side of `transform`'s pixels. graph: build the stream.
    tokenizer: for a saved text encoder. framework: "softmax" or "sigmoid", whose loss also takes
    the learned `logit_bias`.
    `tokenize` turns B reports into "input_ids" and "attention_mask", (B, L) int64, and "lengths", a
    list of the B numbers of tokens. Raises ModelError for encoders that are not there.
    """

    def __init__(self, image_encoder="swin-t", text_encoder="emilyalsentzer/Bio_ClinicalBERT",
                 width=512, image_size=224, graph=True, tokenizer=None, framework="softmax"):
        super().__init__()
        self.image_size = image_size
        self.image_encoder = build_image_encoder(image_encoder)
        self.text_encoder, self.tokenize = build_text_encoder(text_encoder, tokenizer)
        self.image_projection = nn.Linear(self.image_encoder.width, width, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURES[framework])))
        if framework == "sigmoid":  # under softmax it would have no gradient
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP's; train.py fits it to y
        if graph:
            # ASSUMPTION: node features come from a frozen copy of the initial text encoder.
            self.phrase_encoder = copy.deepcopy(self.text_encoder).requires_grad_(False)
            features = self.text_encoder.width + len(NODE_LABELS)
            # ASSUMPTION: a report without entities is one learned empty node.
            self.empty_node = nn.Parameter(torch.randn(features) * 0.02)
            self.gcn = GCN(features, GRAPH_HIDDEN, width)
        # Sec. 4.3's node embeddings: a plain dictionary, so that no checkpoint holds report text.
        self.phrase_vectors = {None: torch.zeros(self.text_encoder.width)}  # None: the empty node
        self.config = {  # what load_model needs to build the same network without the sources
            "image_encoder": "tiny" if image_encoder == "tiny" else "swin-t",
            "bert": self.text_encoder.config, "width": width, "image_size": image_size,
            "graph": graph, "framework": framework,
        }

    def encode_image(self, pixels):
        """pixels: (B, 1 or 3, H, W), uint8 or already normalised float -> unit rows (B, D)."""
        if pixels.dtype == torch.uint8:
            pixels = (pixels / 255 - MEAN) / STD
        pixels = pixels.expand(-1, 3, -1, -1)                                 # (B, 3, H, W)
        # ASSUMPTION: the image embedding is the mean of Swin's last feature map.
        return F.normalize(self.image_projection(self.image_encoder(pixels)).float(), dim=-1)

    def encode_text(self, text):
        """text: a list of B reports, or what `tokenize` made of them -> unit rows (B, D)."""
        tokens = text if isinstance(text, dict) else self.tokenize(text)
        ids, mask = self.move(tokens["input_ids"]), self.move(tokens["attention_mask"])  # (B, L)
        groups = {}  # rows by their length, so that short reports are not padded to the longest
        for row, length in enumerate(tokens["lengths"]):
            groups.setdefault(math.ceil(length / TEXT_STEP) * TEXT_STEP, []).append(row)
        cls, order = [], []
        for length, rows in groups.items():
            index = self.move(torch.tensor(rows))                             # (b,)
            hidden = self.text_encoder(ids[index, :length], mask[index, :length])  # (b, L, H)
            # ASSUMPTION: the text embedding is the last hidden state of [CLS], at most 256 tokens.
            cls.append(hidden[:, 0])                                          # (b, H)
            order += rows
        cls = torch.cat(cls)[self.move(torch.tensor(order).argsort())]        # (B, H)
        return F.normalize(self.text_projection(cls).float(), dim=-1)

    def encode_graph(self, graph):
        """graph: a list of B RadGraph records, or `collate_graphs` of them -> unit rows (B, D)."""
        graph = graph if isinstance(graph, dict) else collate_graphs(graph)
        # the last phrase stands where node is -1, until the empty node takes its place
        vectors = self.embed_phrases([*graph["phrases"], None])               # (P + 1, H)
        graph = {name: self.move(x) for name, x in graph.items() if name != "phrases"}
        node, one_hot = graph["node"], torch.eye(len(NODE_LABELS), device=vectors.device)
        # ASSUMPTION: a node is its phrase's mean hidden state and its RadGraph label's one-hot.
        x = torch.cat([vectors[node], one_hot[graph["label"]]], dim=1)        # (V, H + 4)
        x = torch.where(node[:, None] < 0, self.empty_node, x)                # (V, H + 4)
        # ASSUMPTION: graph embeddings are normalised like those of images and texts.
        return F.normalize(self.gcn(x, graph).float(), dim=-1)                # (B, D)

    def forward(self, batch):
        """Fig. 3's encoders: the arguments of the framework's loss in loss.py, but the labels.

        batch: "pixels", "text" and, where the system has them, "hard_text", "graph", "hard_graph".
        Returns image, text, ... (B, D), logit_scale, the scalar 1/temperature, and under sigmoid
        logit_bias, a scalar.
        """
        out = {"image": self.encode_image(batch["pixels"]), "logit_scale": self.logit_scale.exp()}
        for name in ("text", "hard_text"):
            if name in batch:
                out[name] = self.encode_text(batch[name])
        for name in ("graph", "hard_graph"):
            if name in batch:
                out[name] = self.encode_graph(batch[name])
        if self.config["framework"] == "sigmoid":
            out["logit_bias"] = self.logit_bias
        return out

    @torch.no_grad()
    def clamp_temperature(self):
        """Keep 1/temperature in CLIP's bounds; call it after each optimiser step."""
        # ASSUMPTION: the temperature of Eq. 1, Eq. 2 is learned; its inverse stays in [1, 100].
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def transform(self, image):
        """An 8-bit PIL image, as data.py's `read_image` gives -> uint8 pixels (1, side, side)."""
        from torchvision.transforms.v2.functional import pil_to_tensor
        check_depth(image)
        # ASSUMPTION: an image is squashed to the square, so that neither lung's edge is cut off.
        side = (self.image_size, self.image_size)
        return pil_to_tensor(image.convert("L").resize(side, resample=2))  # 2 is bilinear

    def save_tokenizer(self, folder):
        """Write the tokenizer's files into `folder`; "tiny" has none."""
        if self.config["bert"]:
            self.tokenize.tokenizer.save_pretrained(folder)

    def move(self, x):
        return x.to(self.logit_scale.device, non_blocking=True)

    @torch.no_grad()
    def embed_phrases(self, phrases):
        """The mean hidden state of each phrase's words in the frozen encoder: (P, H).

        Each phrase is encoded once. Its vector must have the same bits in any company, or a resumed
        run and a run on other ranks would differ. So the encoder meets one shape alone, 16 phrases
        of 32 tokens: the last phrase fills the group, longer ones are cut. A phrase without words
        gets zeros.
        """
        new = [phrase for phrase in phrases if phrase not in self.phrase_vectors]
        for start in range(0, len(new), PHRASE_ROWS):
            group = new[start:start + PHRASE_ROWS]
            tokens = self.tokenize(group + group[-1:] * (PHRASE_ROWS - len(group)))
            missing = (0, PHRASE_TOKENS - tokens["input_ids"].shape[1])  # below 0 F.pad cuts
            ids = self.move(F.pad(tokens["input_ids"], missing))              # (16, 32)
            mask = self.move(F.pad(tokens["attention_mask"], missing))        # (16, 32)
            with torch.autocast(ids.device.type, enabled=False):
                hidden = self.phrase_encoder.eval()(ids, mask)                # (16, 32, H)
            # A mask of k ones is k tokens: [CLS], words, and in BERT [SEP]. Without its first ones
            # for these it has a one for each word, the first of which stands behind [CLS].
            words = mask[:, 1 + self.tokenize.closing:, None]                 # (16, W, 1)
            hidden = hidden[:, 1:1 + words.shape[1]]                          # (16, W, H)
            means = (hidden * words).sum(1) / words.sum(1).clamp(min=1)       # (16, H)
            self.phrase_vectors |= zip(group, means, strict=False)
        return torch.stack([self.move(self.phrase_vectors[phrase]) for phrase in phrases])


class TinyImageEncoder(nn.Sequential):
    """Four strided 3x3 convolutions and a mean: (B, 3, H, W) -> (B, 256). Random weights."""

    width = 256

    def __init__(self):
        layers, channels = [], 3
        for out in (32, 64, 128, self.width):
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.GroupNorm(8, out), nn.GELU()]
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TinyTextEncoder(nn.Module):
    """A two-layer transformer over hashed words: tokens (B, L) -> hidden states (B, L, 128).

    [CLS] starts as a zero vector, so that at random weights it is the average of the words it
    attends to: otherwise all reports start nearly parallel and every soft label is uniform.
    """

    width = 128
    config = None

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(TinyTokenizer.buckets, self.width)
        self.places = nn.Parameter(torch.randn(MAX_TOKENS, self.width) * 0.02)
        layer = nn.TransformerEncoderLayer(self.width, 4, 2 * self.width, dropout=0.0,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(self.width),
                                            enable_nested_tensor=False)
        for parameter in self.layers.parameters():  # clones of one layer: draw each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        with torch.no_grad():
            self.words.weight[TinyTokenizer.cls] = 0
            self.places[0] = 0

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places[:input_ids.shape[1]]          # (B, L, H)
        return self.layers(x, src_key_padding_mask=attention_mask == 0)       # (B, L, H)


class TinyTokenizer:
    """Hashes lower-cased words into buckets: no vocabulary, so no patient's text, is stored."""

    buckets = 8192
    pad, cls = 0, 1  # pad_sequence's is 0
    closing = 0  # tokens after the words

    def __call__(self, texts):
        rows = []
        for text in texts:
            words = re.findall(r"\w+|[.,;:]", text.lower())[:MAX_TOKENS - 1]
            buckets = [2 + zlib.crc32(word.encode()) % (self.buckets - 2) for word in words]
            rows.append(torch.tensor([self.cls, *buckets]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)               # (B, L)
        return {"input_ids": ids, "attention_mask": (ids != self.pad).long(),
                "lengths": [len(row) for row in rows]}


class BertTextEncoder(nn.Module):
    """Any BERT-family network: tokens (B, L) -> last hidden states (B, L, H)."""

    def __init__(self, bert):
        super().__init__()
        bert.pooler = None  # unused parameters would stop DistributedDataParallel
        self.bert = bert
        self.width = bert.config.hidden_size
        self.config = bert.config.to_dict()
        self.config.pop("_name_or_path", None)

    def forward(self, input_ids, attention_mask):
        if self.bert.config._attn_implementation == "sdpa":
            # Of a (B, L) mask the library asks whether it hides anything, and waits for the device.
            attention_mask = attention_mask[:, None, None].bool()             # (B, 1, 1, L)
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class TextTokenizer:
    """A Hugging Face tokenizer bound to 256 tokens and to the longest text of the batch."""

    closing = 1  # [SEP]

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts):
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS,
                                return_tensors="pt", return_token_type_ids=False)
        return {**tokens, "lengths": tokens["attention_mask"].sum(1).tolist()}


class HuggingFaceCLIP(nn.Module):
    """Somebody else's CLIPModel with its own processor, behind ClinicalCLIP's evaluation calls."""

    def __init__(self, name):
        super().__init__()
        library = quiet_transformers()
        self.clip = pretrained(library.CLIPModel, name, MODELS)
        with loading(name, MODELS):
            self.processor = library.AutoProcessor.from_pretrained(name)
        self.image_size = self.clip.config.vision_config.image_size

    def transform(self, image):
        """An 8-bit PIL image as float pixels (3, H, W), by the model's own processor."""
        check_depth(image)
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def encode_image(self, pixels):
        return self._unit(self.clip.get_image_features(pixel_values=pixels))

    def encode_text(self, text):
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = self.processor(text=list(text), padding=True, truncation=True, max_length=limit,
                                return_tensors="pt")
        return self._unit(self.clip.get_text_features(**tokens.to(self.clip.device)))

    @staticmethod
    def _unit(features):
        return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)  # (B, D)


def build_image_encoder(name):
    """"tiny", or torchvision's Swin-Tiny without head: (B, 3, H, W) -> (B, 768), the map's mean."""
    if name == "tiny":
        return TinyImageEncoder()
    from torchvision.models import swin_t
    swin = swin_t(weights=None)
    if name != "swin-t":
        with loading(name, "tiny, swin-t or an intact file of torchvision's Swin-T weights"):
            swin.load_state_dict(torch.load(name, map_location="cpu", weights_only=True))
    swin.head, swin.width = nn.Identity(), 768
    return swin


def build_text_encoder(source, tokenizer=None):
    """A text encoder and its tokenizer from "tiny", a folder, a hub id or a saved config."""
    if source == "tiny":
        return TinyTextEncoder(), TinyTokenizer()
    library = quiet_transformers()
    if isinstance(source, dict):
        config = library.AutoConfig.for_model(**source)
        bert = library.AutoModel.from_config(config, dtype=torch.float32)
        return BertTextEncoder(bert), tokenizer
    bert = pretrained(library.AutoModel, source, "tiny, a Hugging Face folder with config.json or "
                                                 "a hub id, of a BERT-family model")
    tokenizer = load_tokenizer(source)
    words, rows = len(tokenizer.tokenizer), bert.config.vocab_size
    if words < 0.9 * rows:  # embeddings may be padded
        raise ModelError(f"{source}: vocab.txt or tokenizer.json has {words} of {rows} words")
    return BertTextEncoder(bert), tokenizer


def pretrained(kind, name, expected):
    """A network of transformers with all of its weights: the library draws missing ones."""
    with loading(name, expected):
        network, keys = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True,
                                             ignore_mismatched_sizes=True)
    wrong = [key for key in keys["missing_keys"] if "pooler" not in key]  # it is not used
    wrong += [key for key, *_ in keys["mismatched_keys"]]
    if wrong:
        raise ModelError(f"{name}: {len(wrong)} weights are missing or of another shape, the first "
                         f"{min(wrong)}")
    return network


def load_tokenizer(name):
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    # ASSUMPTION: a folder's tokenizer config rules; without one, text stays cased.
    with loading(name, "a tokenizer's files"):
        cased = {} if get_tokenizer_config(name) else {"do_lower_case": False}
        return TextTokenizer(AutoTokenizer.from_pretrained(name, **cased))


def quiet_transformers():
    """The library, which takes seconds to import, without its warnings and bars."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def loading(name, expected):
    """Around what other people's files raise in a library, of any kind: it becomes a ModelError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason.split(" This file can")[0]  # be loaded unsafely, as torch advises
        raise ModelError(f"{name}: expected {expected} ({reason[:300]})") from None


def check_depth(image):
    if image.mode.startswith(("I", "F")):
        raise ModelError(f"expected an 8-bit image, got mode {image.mode}, of which convert() "
                         "would make white; read it with data.py's read_image")


def load_model(path, device="cpu"):
    """Load a model for evaluation.

    path: a run folder (best.pt, else last.pt), a checkpoint file, a folder of `export_model`, or a
        Hugging Face CLIP folder or hub id.
    Returns a ClinicalCLIP, or for the last an object with the same encode_image, encode_text,
    transform and image_size; in eval mode on `device`.
    Raises ModelError naming the path when it is none of these or is damaged.
    """
    path = Path(path)
    for candidate in (path / "best.pt", path / "last.pt", path):
        if candidate.is_file():
            saved = load_checkpoint(candidate)
            return rebuild(saved["model_config"], saved["model"], candidate).to(device).eval()
    if not path.is_dir():
        if path.parent != Path(".") and path.parent.exists():  # no hub id
            raise ModelError(f"{path}: expected {MODELS}")
        print(f"no folder {path}; asking the hub", file=sys.stderr)
    with loading(path, MODELS):
        config, _ = quiet_transformers().PretrainedConfig.get_config_dict(str(path))
    kind = config.pop("model_type", None)
    if kind == "clip":
        return HuggingFaceCLIP(str(path)).to(device).eval()
    if kind != "clinical-clip":
        raise ModelError(f"{path}: expected {MODELS}, got model_type {kind}")
    from safetensors.torch import load_file
    weights = path / "model.safetensors"
    with loading(weights, "an intact file of tensors"):
        state = load_file(weights)
    return rebuild(config, state, weights).to(device).eval()


def rebuild(config, state, path):
    """The ClinicalCLIP of a saved `config` with the weights `state`; `path` is where they lay."""
    bert, tokenizer = config.pop("bert"), None
    if bert:
        tokenizer = load_tokenizer(path.absolute().with_name("tokenizer"))
    model = ClinicalCLIP(text_encoder=bert or "tiny", tokenizer=tokenizer, **config)
    with loading(path, "weights that fit"):
        model.load_state_dict(state)
    return model


def load_checkpoint(path):
    """A checkpoint of train.py, plain tensors on the CPU; ModelError if it is damaged or another.

    torch.load does not compare the archive's checksums, so a flipped bit would become a weight.
    """
    with loading(path, "an intact checkpoint of train.py"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile("a checksum differs")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not {"model", "model_config"} <= saved.keys():
            raise KeyError("model")
    return saved


def export_model(model, folder):
    """Write model.safetensors, config.json and the tokenizer: all that `load_model` needs."""
    from safetensors.torch import save
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file: its files are for their owner alone.
    (folder / "model.safetensors").write_bytes(save(model.state_dict()))
    model.save_tokenizer(folder / "tokenizer")
    config = {"model_type": "clinical-clip", **model.config}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")  # the last
