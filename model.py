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
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
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
    temperature: the initial one of Eq. 1-2; None: the framework's. tokenizer: for a saved text
    encoder. framework: "softmax" or "sigmoid", whose loss also takes the learned `logit_bias`.
    `tokenize` turns B reports into "input_ids" and "attention_mask", (B, L) int64, and "lengths", a
    list of the B numbers of tokens. Raises ModelError for encoders that are not there.
    """

    def __init__(self, image_encoder="swin-t", text_encoder="emilyalsentzer/Bio_ClinicalBERT",
                 width=512, image_size=224, graph=True, temperature=None, tokenizer=None,
                 framework="softmax"):
        super().__init__()
        self.image_size = image_size
        self.image_encoder = build_image_encoder(image_encoder)
        self.text_encoder, self.tokenize = build_text_encoder(text_encoder, tokenizer)
        self.image_projection = nn.Linear(self.image_encoder.width, width, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, width, bias=False)
        if temperature is None:
            temperature = TEMPERATURES[framework]
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        if framework == "sigmoid":  # under softmax it would have no gradient
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP's; train.py fits it to y
        if graph:
            # ASSUMPTION: node features come from a frozen copy of the initial text encoder.
            self.phrase_encoder = copy.deepcopy(self.text_encoder).requires_grad_(False)
            features = self.text_encoder.width + len(NODE_LABELS)
            # ASSUMPTION: a report without entities is one learned empty node.
            self.empty_node = nn.Parameter(torch.randn(features) * 0.02)
            self.gcn = GCN(features, GRAPH_HIDDEN, width)
        # Sec. 4.3's node embeddings, a row a phrase. Report text: a plain tensor, so that no
        # checkpoint holds it.
        self.phrase_row = {None: 0}  # the empty node's, whose index is -1
        self.phrase_table = torch.zeros(1, self.text_encoder.width)           # (rows, H)
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
        row = self.phrase_rows(graph["phrases"])                              # (P + 1,)
        graph = {name: self.move(x) for name, x in graph.items() if name != "phrases"}
        node, one_hot = graph["node"], torch.eye(len(NODE_LABELS), device=row.device)
        # ASSUMPTION: a node is its phrase's mean hidden state and its RadGraph label's one-hot.
        x = torch.cat([self.phrase_table[row[node]], one_hot[graph["label"]]], dim=1)  # (V, H+4)
        x = torch.where(node[:, None] < 0, self.empty_node, x)                # (V, H+4)
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
        """A PIL image as uint8 pixels (1, image_size, image_size); encode_image normalises them."""
        from torchvision.transforms.v2.functional import pil_to_tensor
        # ASSUMPTION: an image is squashed to the square, so that neither lung's edge is cut off.
        side = (self.image_size, self.image_size)
        return pil_to_tensor(image.convert("L").resize(side, resample=2))  # 2 is bilinear

    def save_tokenizer(self, folder):
        """Write the tokenizer's files into `folder`; "tiny" has none."""
        if self.config["bert"]:
            self.tokenize.tokenizer.save_pretrained(folder)

    def move(self, x):
        return x.to(self.logit_scale.device, non_blocking=True)

    def phrase_rows(self, phrases):
        """The row of each phrase in the table, and then the empty node's. New phrases get a row."""
        self.phrase_table = self.phrase_table.to(self.logit_scale.device)  # the module may move
        new = [phrase for phrase in phrases if phrase not in self.phrase_row]
        if new:
            self.phrase_table = torch.cat([self.phrase_table, self.encode_phrases(new)])
        for phrase in new:
            self.phrase_row[phrase] = len(self.phrase_row)
        return self.move(torch.tensor([self.phrase_row[phrase] for phrase in [*phrases, None]]))

    @torch.no_grad()
    def encode_phrases(self, phrases):
        """The mean hidden state of each phrase's words in the frozen encoder: (P, H).

        A phrase's vector must have the same bits in any company, or a resumed run and a run on
        other ranks would differ. So the encoder meets one shape alone, 16 phrases of 32 tokens: the
        last phrase fills the group, longer ones are cut. A phrase without words gets zeros.
        """
        spare = -len(phrases) % PHRASE_ROWS  # what the last group lacks
        tokens = self.tokenize(phrases + phrases[-1:] * spare)
        missing = (0, PHRASE_TOKENS - tokens["input_ids"].shape[1])  # F.pad cuts where it is < 0
        ids = self.move(F.pad(tokens["input_ids"], missing))                  # (P, L)
        mask = self.move(F.pad(tokens["attention_mask"], missing))            # (P, L)
        with torch.autocast(ids.device.type, enabled=False):
            groups = zip(ids.split(PHRASE_ROWS), mask.split(PHRASE_ROWS), strict=True)
            hidden = torch.cat([self.phrase_encoder.eval()(*group) for group in groups])
        last = PHRASE_TOKENS - self.tokenize.closing
        # Words start behind [CLS]. The mask less its special tokens has a one for each of them.
        words = mask[:, 1 + self.tokenize.closing:, None]                     # (P, last - 1, 1)
        means = (hidden[:, 1:last] * words).sum(1) / words.sum(1).clamp(min=1)
        return means[:len(phrases)]                                           # (P, H)


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
        if hasattr(bert, "pooler"):
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
        with loading(name, MODELS):
            library = quiet_transformers()
            self.clip = library.CLIPModel.from_pretrained(name, dtype=torch.float32)
            self.processor = library.AutoProcessor.from_pretrained(name)
        self.image_size = self.clip.config.vision_config.image_size

    def transform(self, image):
        """A PIL image as float pixels (3, H, W), by the model's own processor."""
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
    swin.head, swin.width = nn.Identity(), 768
    if name != "swin-t":
        state = read_tensors(name, "tiny, swin-t or an intact file of torchvision's Swin-T weights")
        for head in ("head.weight", "head.bias"):
            state.pop(head, None)
        load_state(swin, state, name)
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
    with loading(f"text encoder {source}", "tiny, a Hugging Face folder with config.json or a hub "
                                           "id, of a BERT-family model"):
        bert = library.AutoModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = load_tokenizer(source)
        words, rows = len(tokenizer.tokenizer), bert.config.vocab_size
        if words < 0.9 * rows:  # embeddings may be padded
            raise ValueError(f"vocab.txt or tokenizer.json has {words} of {rows} words")
    return BertTextEncoder(bert), tokenizer


def load_tokenizer(name):
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    # ASSUMPTION: a folder's tokenizer config rules; without one, text stays cased.
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
    """Around what transformers and safetensors read: their complaints become a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
            SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{name}: expected {expected} ({reason})") from None


def load_model(path, device="cpu"):
    """Load a model for evaluation.

    path: a run folder (best.pt, else last.pt, else previous.pt), a checkpoint file, a folder of
        `export_model`, or a Hugging Face CLIP folder or hub id.
    Returns a ClinicalCLIP, or for the last an object with the same encode_image, encode_text,
    transform and image_size; in eval mode on `device`.
    Raises ModelError naming the path when it is none of these or is damaged.
    """
    path = Path(path)
    for candidate in (path / "best.pt", path / "last.pt", path / "previous.pt", path):
        if candidate.is_file():
            saved = load_checkpoint(candidate)
            return rebuild(saved["model_config"], saved["model"], candidate).to(device).eval()
    kind, description = "clip", path / "config.json"
    if description.is_file():
        with loading(description, "a JSON object with model_type, or a .pt beside it"):
            config = json.loads(description.read_text(encoding="utf-8"))
            kind = config.pop("model_type")
    elif path.parent != Path(".") and path.parent.exists():  # no hub id: nothing to ask the hub for
        raise ModelError(f"{path}: expected {MODELS}")
    if kind == "clinical-clip":
        from safetensors.torch import load_file
        weights = path / "model.safetensors"
        with loading(weights, "an intact file of tensors"):
            state = load_file(weights)
        return rebuild(config, state, weights).to(device).eval()
    if kind != "clip":
        raise ModelError(f"{description}: expected model_type clip, got {kind}")
    return HuggingFaceCLIP(str(path)).to(device).eval()


def rebuild(config, state, path):
    """The ClinicalCLIP of a saved `config` with the weights `state`; `path` is where they lay."""
    config, tokenizer = dict(config), None
    bert = config.pop("bert")
    if bert:
        folder = path.absolute().with_name("tokenizer")
        with loading(folder, f"the run's tokenizer beside {path.name}"):
            tokenizer = load_tokenizer(folder)
    model = ClinicalCLIP(text_encoder=bert or "tiny", tokenizer=tokenizer, **config)
    load_state(model, state, path)
    return model


def load_state(module, state, path):
    """Strictly: each weight must be there and fit, and no other."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(f"{path}: weights do not fit: {reason[:200]}") from None


def load_checkpoint(path):
    """A checkpoint of train.py, every tensor on the CPU; ModelError if it is damaged or another."""
    expected = "an intact checkpoint of train.py"
    saved = read_tensors(path, expected, check=True)
    if not {"model", "model_config"} <= saved.keys():
        raise ModelError(f"{path}: expected {expected}")
    return saved


def read_tensors(path, expected, check=False):
    """The dictionary that torch.save wrote, plain tensors only; ModelError if it is not `expected`.

    check: compare the archive's checksums first. torch.load does not, so a flipped bit would become
    a weight. Weights of other people may be in torch's older format, which has none.
    """
    try:
        if check:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError
        return saved
    except Exception as error:  # of any kind for a damaged file; its text advises an unsafe load
        raise ModelError(f"{path}: expected {expected} ({type(error).__name__})") from None


def export_model(model, folder):
    """Write model.safetensors, config.json and the tokenizer: all that `load_model` needs."""
    from safetensors.torch import save
    folder.mkdir(parents=True, exist_ok=True)
    # Not save_file: its files are for their owner alone.
    (folder / "model.safetensors").write_bytes(save(model.state_dict()))
    model.save_tokenizer(folder / "tokenizer")
    config = {"model_type": "clinical-clip", **model.config}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")  # the last
