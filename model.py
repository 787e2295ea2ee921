"""The encoders of Sec. 5.2 joined into one CLIP: Swin-Tiny, BioClinicalBERT and the graph stream.

    image  (B, 1|3, H, W) -> Swin-Tiny, mean over the feature map  -> Linear -> v, unit rows (B, D)
    text   B reports      -> BERT, last hidden state of [CLS]      -> Linear -> T, unit rows (B, D)
    graph  B records      -> GCN over entity phrases (gcn.py)      -> Linear -> G, unit rows (B, D)

`ClinicalCLIP.forward` embeds a whole batch, hard negatives included, so that one call is all that
DistributedDataParallel wraps. `load_model` reads a run folder, a checkpoint, an exported folder or
somebody else's Hugging Face CLIP. "tiny" encoders are small networks with random weights, for the
phantom and for tests.

Symbols: B batch, D width, L tokens, H hidden width, V graph nodes.

SPDX-License-Identifier: MIT
"""

import copy
import json
import math
import pickle
import re
import struct
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
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's clamp
GRAPH_HIDDEN = 256
LENGTH_STEP = 64                   # reports of 1-64, 65-128, ... tokens are encoded together


class TinyImageEncoder(nn.Sequential):
    """Four strided 3x3 convolutions and a mean: (B, 3, H, W) -> (B, 256). Random weights."""

    width = 256

    def __init__(self):
        layers, channels = [], 3
        for out in (32, 64, 128, self.width):
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.GroupNorm(8, out), nn.GELU()]
            channels = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TinyTokenizer:
    """Hashes lower-cased words into buckets: no vocabulary, so no patient's text, is stored."""

    buckets = 8192
    pad, cls = 0, 1

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        rows = [[self.cls] + [2 + zlib.crc32(word.encode()) % (self.buckets - 2)
                              for word in re.findall(r"\w+|[.,;:]", text.lower())][:MAX_TOKENS - 1]
                for text in texts]
        longest = max(map(len, rows), default=1)
        padded = [row + [self.pad] * (longest - len(row)) for row in rows]
        ids = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)  # (B, L)
        return {"input_ids": ids, "attention_mask": (ids != self.pad).long()}


class TextTokenizer:
    """A Hugging Face tokenizer bound to 256 tokens and to the longest text of the batch."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt",
                                   max_length=MAX_TOKENS, return_token_type_ids=False))


class TinyTextEncoder(nn.Module):
    """A two-layer transformer over hashed words: tokens (B, L) -> hidden states (B, L, 128).

    [CLS] starts as a zero vector, so that at random weights it is the average of the words it
    attends to: otherwise all reports start nearly parallel and every soft label is uniform.
    """

    width = 128

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


class BertTextEncoder(nn.Module):
    """Any BERT-family network: tokens (B, L) -> last hidden states (B, L, H)."""

    def __init__(self, bert):
        super().__init__()
        if getattr(bert, "pooler", None) is not None:
            bert.pooler = None  # unused parameters would stop DistributedDataParallel
        self.bert = bert
        self.width = bert.config.hidden_size

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _image_encoder(name: str) -> nn.Module:
    """"tiny", or torchvision's Swin-Tiny without head: (B, 3, H, W) -> (B, 768), the map's mean."""
    if name == "tiny":
        return TinyImageEncoder()
    if name != "swin-t" and not Path(name).is_file():
        raise ValueError(f"--image-encoder {name}: expected tiny, swin-t or a file of "
                         "torchvision's Swin-T weights")
    from torchvision.models import swin_t
    swin = swin_t(weights=None)
    swin.head, swin.width = nn.Identity(), 768
    if name != "swin-t":
        state = _torch_load(Path(name))
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
        _load_state(swin, state, Path(name))
    return swin


def _transformers():
    """The library, which takes seconds to import, without its warnings and bars."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _text_encoder(name: str) -> tuple[nn.Module, object]:
    """A text encoder with its tokenizer, from "tiny", a Hugging Face folder or a hub id."""
    if name == "tiny":
        return TinyTextEncoder(), TinyTokenizer()
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"--text-encoder {name}: expected a Hugging Face folder with config.json")
    try:
        bert = _transformers().AutoModel.from_pretrained(name, dtype=torch.float32)
        tokenizer = _tokenizer(name)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"--text-encoder {name}: expected tiny, a folder or a hub id of a "
                         f"BERT-family model ({_reason(error)})") from None
    words = len(tokenizer.tokenizer)
    if words < 0.9 * bert.config.vocab_size:  # embeddings may be padded
        raise ValueError(f"--text-encoder {name}: expected a vocabulary (vocab.txt or "
                         f"tokenizer.json) of {bert.config.vocab_size} words, got {words}")
    return BertTextEncoder(bert), tokenizer


def _tokenizer(name) -> TextTokenizer:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    # ASSUMPTION: a folder's tokenizer config rules; without one, text stays cased.
    cased = {} if get_tokenizer_config(name) else {"do_lower_case": False}
    return TextTokenizer(AutoTokenizer.from_pretrained(name, **cased))


def _reason(error) -> str:
    return str(error).strip().split("\n")[0]


class ClinicalCLIP(nn.Module):
    """The three encoders, their projections and the temperature (Sec. 5.2).

    image_encoder: "tiny", "swin-t" (random weights) or a file of torchvision's Swin-T weights.
    text_encoder: "tiny", a folder or hub id of a BERT-family model, or a saved `config["bert"]`.
    width: D of every embedding. image_size: side of `transform`'s pixels. graph: build the stream.
    temperature: the initial value of the softmax temperature of Eq. 1-2.
    Raises ValueError for encoders that are not there.
    """

    def __init__(self, image_encoder="swin-t", text_encoder="emilyalsentzer/Bio_ClinicalBERT",
                 width=512, image_size=224, graph=True, temperature=0.07, tokenizer=None):
        super().__init__()
        self.image_size = image_size
        self.image_encoder = _image_encoder(image_encoder)
        if isinstance(text_encoder, dict):
            from transformers import AutoConfig, AutoModel
            bert = AutoModel.from_config(AutoConfig.for_model(**text_encoder), dtype=torch.float32)
            self.text_encoder, self.tokenize = BertTextEncoder(bert), tokenizer
        else:
            self.text_encoder, self.tokenize = _text_encoder(text_encoder)
        self.image_projection = nn.Linear(self.image_encoder.width, width, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        if graph:
            # ASSUMPTION: node features come from a frozen copy of the initial text encoder.
            self.phrase_encoder = copy.deepcopy(self.text_encoder).requires_grad_(False).eval()
            features = self.text_encoder.width + len(NODE_LABELS)
            # ASSUMPTION: a report without entities is one learned empty node.
            self.empty_node = nn.Parameter(torch.randn(features) * 0.02)
            self.gcn = GCN(features, GRAPH_HIDDEN, GRAPH_HIDDEN)
            self.graph_projection = nn.Linear(GRAPH_HIDDEN, width, bias=False)
        self._phrases: dict[str, torch.Tensor] = {}  # a cache: reports' words, so never saved
        bert_config = None
        if isinstance(self.text_encoder, BertTextEncoder):
            bert_config = self.text_encoder.bert.config.to_dict()
            bert_config.pop("_name_or_path", None)
        self.config = {  # what load_model needs to build the same network without the sources
            "image_encoder": "tiny" if image_encoder == "tiny" else "swin-t", "bert": bert_config,
            "width": width, "image_size": image_size, "graph": graph,
        }

    def train(self, mode=True):
        super().train(mode)
        if hasattr(self, "phrase_encoder"):
            self.phrase_encoder.eval()
        return self

    def _apply(self, fn, recurse=True):
        self._phrases.clear()  # cached rows stay on the old device
        return super()._apply(fn, recurse)

    def transform(self, image) -> torch.Tensor:
        """A PIL image as uint8 pixels (1, image_size, image_size); encode_image normalises them."""
        from torchvision.transforms.v2.functional import pil_to_tensor
        # ASSUMPTION: an image is squashed to the square, so that neither lung's edge is cut off.
        side = (self.image_size, self.image_size)
        return pil_to_tensor(image.convert("L").resize(side, resample=2))  # 2 is bilinear

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: (B, 1 or 3, H, W), uint8 or already normalised float -> unit rows (B, D)."""
        if pixels.dtype == torch.uint8:
            pixels = (pixels / 255 - MEAN) / STD
        pixels = pixels.expand(-1, 3, -1, -1)                                 # (B, 3, H, W)
        # ASSUMPTION: the image embedding is the mean of Swin's last feature map.
        return F.normalize(self.image_projection(self.image_encoder(pixels)).float(), dim=-1)

    def encode_text(self, text) -> torch.Tensor:
        """text: a list of B reports, or what `tokenize` made of them -> unit rows (B, D)."""
        tokens = text if isinstance(text, dict) else self.tokenize(text)
        device = self.logit_scale.device
        tokens = {k: v.to(device, non_blocking=True) for k, v in tokens.items()}  # (B, L)
        steps = tokens["attention_mask"].sum(1).div(LENGTH_STEP).ceil().long()  # (B,)
        cls, rows = [], []
        for step in steps.unique().tolist():
            rows.append((steps == step).nonzero()[:, 0])                      # (b,)
            part = {k: v[rows[-1], :step * LENGTH_STEP] for k, v in tokens.items()}
            # ASSUMPTION: the text embedding is the last hidden state of [CLS], at most 256 tokens.
            cls.append(self.text_encoder(**part)[:, 0])                       # (b, H)
        cls = torch.cat(cls)[torch.cat(rows).argsort()]                       # (B, H)
        return F.normalize(self.text_projection(cls).float(), dim=-1)

    def encode_graph(self, graph) -> torch.Tensor:
        """graph: a list of B RadGraph records, or `collate_graphs` of them -> unit rows (B, D)."""
        if not hasattr(self, "gcn"):
            raise ValueError("this model was built without the graph stream")
        graph = graph if isinstance(graph, dict) else collate_graphs(graph)
        device, count = self.logit_scale.device, graph["num_graphs"]
        node, label, edge_index, graph_index = (
            graph[k].to(device) for k in ("node", "label", "edge_index", "graph_index"))
        phrases = [self._phrase(phrase) for phrase in graph["phrases"]]
        phrases.append(torch.zeros(self.text_encoder.width, device=device))  # so that stack has one
        # ASSUMPTION: a node is its phrase's mean hidden state and its RadGraph label's one-hot.
        x = torch.cat([torch.stack(phrases)[node],
                       F.one_hot(label, len(NODE_LABELS))], dim=1)            # (V, H+4)
        empty = (torch.bincount(graph_index, minlength=count) == 0).nonzero()[:, 0]
        x = torch.cat([x, self.empty_node.expand(len(empty), -1)])
        graph_index = torch.cat([graph_index, empty])                         # (V,)
        g = self.gcn(x, edge_index, graph_index, count)                       # (B, hidden)
        return F.normalize(self.graph_projection(g).float(), dim=-1)

    @torch.no_grad()
    def _phrase(self, phrase: str) -> torch.Tensor:
        """Sec. 4.3: the mean of a phrase's hidden states, (H,), frozen encoder, computed once.

        One phrase at a time: its vector must not depend on the company of a batch, or a resumed
        run and a run on other ranks would differ in the last bits.
        """
        if phrase not in self._phrases:
            device = self.logit_scale.device
            tokens = {k: v.to(device) for k, v in self.tokenize([phrase]).items()}  # (1, L)
            with torch.autocast(device.type, enabled=False):
                hidden = self.phrase_encoder(**tokens)[0]                     # (L, H)
            inner = hidden[1:] if isinstance(self.tokenize, TinyTokenizer) else hidden[1:-1]
            self._phrases[phrase] = (inner if len(inner) else hidden).mean(0)
        return self._phrases[phrase]

    def forward(self, batch: dict) -> dict:
        """Fig. 3's encoders: the arguments of loss.DynamicSoftContrastiveLoss but the labels.

        batch: "pixels", "text" and, where the system has them, "hard_text", "graph", "hard_graph".
        Returns image, text, ... (B, D) and logit_scale, the scalar 1/temperature.
        """
        out = {"image": self.encode_image(batch["pixels"]), "text": self.encode_text(batch["text"])}
        if "hard_text" in batch:
            out["hard_text"] = self.encode_text(batch["hard_text"])
        for name in ("graph", "hard_graph"):
            if name in batch:
                out[name] = self.encode_graph(batch[name])
        return out | {"logit_scale": self.logit_scale.exp()}

    @torch.no_grad()
    def clamp_temperature(self):
        """Keep 1/temperature in CLIP's bounds; call it after each optimiser step."""
        # ASSUMPTION: the temperature of Eq. 1, Eq. 2 is learned; its inverse stays in [1, 100].
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def save_tokenizer(self, folder: Path):
        """Write the tokenizer's files into `folder`; "tiny" has none."""
        if isinstance(self.tokenize, TextTokenizer):
            self.tokenize.tokenizer.save_pretrained(folder)


class HuggingFaceCLIP(nn.Module):
    """Somebody else's CLIPModel with its own processor, behind ClinicalCLIP's evaluation calls."""

    def __init__(self, name: str):
        super().__init__()
        library = _transformers()
        self.clip = library.CLIPModel.from_pretrained(name, dtype=torch.float32)
        self.processor = library.AutoProcessor.from_pretrained(name)
        self.logit_scale = self.clip.logit_scale
        self.image_size = self.clip.config.vision_config.image_size
        self.config = {"model_type": "clip", "name": name}

    def transform(self, image) -> torch.Tensor:
        """A PIL image as float pixels (3, H, W), by the model's own processor."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def encode_image(self, pixels):
        return self._unit(self.clip.get_image_features(pixel_values=pixels))

    def encode_text(self, text):
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = self.processor(text=list(text), padding=True, truncation=True, max_length=limit,
                                return_tensors="pt")
        return self._unit(self.clip.get_text_features(**tokens.to(self.logit_scale.device)))

    @staticmethod
    def _unit(features):
        return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)  # (B, D)


def _torch_load(path: Path) -> dict:
    """torch.load of plain tensors only; a damaged file or foreign objects are a ValueError."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint or weights")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, IndexError,
            TypeError, AssertionError, AttributeError, struct.error):
        # torch's own message advises to load it unsafely
        raise ValueError(f"{path}: not an intact file of plain tensors") from None
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{path}: expected tensors by name")
    return saved


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py, every tensor on the CPU. ValueError if it is damaged or another."""
    saved = _torch_load(path)
    if not {"model", "model_config"} <= saved.keys():
        raise ValueError(f"{path}: expected a checkpoint of train.py")
    return saved


def _load_state(module: nn.Module, state: dict, path: Path):
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[1].strip()}") from None
    if missing or unexpected:
        raise ValueError(f"{path}: weights do not fit: missing {missing[:3]}, unexpected "
                         f"{unexpected[:3]} ({len(missing)} and {len(unexpected)} in all)")


def _build(config: dict, state: dict, path: Path) -> ClinicalCLIP:
    folder = path.parent / "tokenizer"
    if config["bert"] and not folder.is_dir():
        raise ValueError(f"{folder}: expected the run's tokenizer beside {path.name}")
    tokenizer = _tokenizer(str(folder)) if config["bert"] else None
    model = ClinicalCLIP(config["image_encoder"], config["bert"] or "tiny", config["width"],
                         config["image_size"], config["graph"], tokenizer=tokenizer)
    _load_state(model, state, path)
    return model


def export_model(model: ClinicalCLIP, folder: Path):
    """Write model.safetensors, config.json and the tokenizer: all that `load_model` needs."""
    from safetensors.torch import save
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights))  # save_file's are for the owner alone
    model.save_tokenizer(folder / "tokenizer")
    config = {"model_type": "clinical-clip", **model.config}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")  # the last


def load_model(path, device="cpu"):
    """Load a model for evaluation.

    path: a run folder (best.pt, else last.pt), a checkpoint file, a folder of `export_model`, or a
        Hugging Face CLIP folder or hub id.
    Returns a ClinicalCLIP, or for the last an object with the same encode_image, encode_text,
    transform and image_size; in eval mode on `device`.
    Raises ValueError naming the path when it is none of these or is damaged.
    """
    path, name = Path(path), str(path)
    for candidate in (path / "best.pt", path / "last.pt", path):
        if candidate.is_file():
            saved = load_checkpoint(candidate)
            return _build(saved["model_config"], saved["model"], candidate).to(device).eval()
    if (path / "config.json").is_file():
        try:
            config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{path / 'config.json'}: expected a JSON object") from None
        kind = config.pop("model_type", None)
        if kind == "clinical-clip":
            from safetensors.torch import load_file
            weights = path / "model.safetensors"
            try:
                return _build(config, load_file(weights), weights).to(device).eval()
            except SafetensorError as error:
                raise ValueError(f"{weights}: not an intact file ({_reason(error)})") from None
        if kind != "clip":
            raise ValueError(f"{path / 'config.json'}: expected model_type clip, got {kind}")
    elif path.exists() or path.parent != Path(".") and path.parent.exists():
        raise ValueError(f"{path}: expected a run folder with best.pt or last.pt, or a CLIP folder")
    try:
        return HuggingFaceCLIP(name).to(device).eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name}: no run folder or checkpoint, nor a Hugging Face CLIP that could "
                         f"be loaded ({_reason(error)})") from None
