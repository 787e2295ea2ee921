"""Every data set of the paper from its official files, image reading, batches and the phantom (Sec. 5.1, App. B.1).

    python data.py SET ROOT --out X.jsonl        official download -> manifest (one frontal image a line)
    python data.py check X.jsonl                 validates every line and image; Tab. 1 for any corpus
    python data.py cache X.jsonl --out DIR       resized copies and a manifest that points to them

A manifest is JSON Lines; its fields are in the README. File order: reading images, the manifest and its
batches, the phantom, the builders (one per data set), check / cache / sheet, the command line.
Symbols: B rows of one rank's batch, N = world x B, S the image side in pixels.

SPDX-License-Identifier: MIT
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from tqdm import tqdm

from gcn import collate_graphs
from negations import CONDITIONS, open_atomic, positives, read_jsonl, run_main

SPLITS = ("train", "val", "test")
MAX_PIXELS = 50_000_000      # checked before decoding: three times the largest published radiograph
MAX_XML_BYTES = 1_000_000    # OpenI's largest report is 12 kB
MAX_TRIES = 20               # replacements tried for one unreadable image

# ---------------------------------------------------------------- images (App. B.1)


def read_image(path, at_least=None):
    """One radiograph as a grey 8-bit PIL image.

    path      PNG or JPEG, 8 or 16 bits, or DICOM (needs pydicom; MONOCHROME1 is inverted).
    at_least  side in pixels that suffices: JPEG is then decoded at 1/2, 1/4 or 1/8 if both sides stay above it.
    Raises OSError or ValueError naming the file; the size is checked before anything is decoded.
    """
    if str(path).lower().endswith((".dcm", ".dicom")):
        return _read_dicom(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                _check_size(path, *image.size)
                if at_least is not None:
                    image.draft("L", (at_least, at_least))
                if image.mode.startswith("I") or image.mode == "F":
                    return to_grey(np.asarray(image))
                return image.convert("L")
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: expected at most {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{path}: expected an intact PNG or JPEG ({type(error).__name__})") from None


def _check_size(path, width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path}: expected at most {MAX_PIXELS} pixels, got {width} x {height}")


def to_grey(values):
    """More than 8 bits -> an 8-bit image, the darkest value 0 and the brightest 255 (a flat image is 0)."""
    # ASSUMPTION: images of more than 8 bits are scaled by their own minimum and maximum, 8-bit ones left alone.
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.round((values - low) * scale).astype(np.uint8))


def _read_dicom(path):
    try:
        import pydicom
    except ImportError:
        raise ValueError(f"{path}: reading DICOM needs pydicom (pip install pydicom)") from None
    try:
        dataset = pydicom.dcmread(path)
        _check_size(path, int(dataset.Columns), int(dataset.Rows))
        values = np.asarray(dataset.pixel_array, dtype=np.float32)
    except (pydicom.errors.InvalidDicomError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"{path}: expected a readable DICOM image ({type(error).__name__})") from None
    if values.ndim != 2:
        raise OSError(f"{path}: expected one grey frame, got shape {values.shape}")
    inverted = dataset.get("PhotometricInterpretation", "") == "MONOCHROME1"
    return to_grey(-values if inverted else values)


def pixels(image, size, rng=None):
    """PIL image -> (1, S, S) uint8: the whole image, or with rng a random crop, resized in the same step."""
    # ASSUMPTION: the whole image is squashed to a square, so that neither lung's edge is ever cut off.
    width, height = image.size
    box = (0, 0, width, height)
    if rng is not None:
        # ASSUMPTION: crops keep 80-100 % of the area, the aspect varies by 10 %; no flips, since sides have names.
        area, aspect = rng.uniform(0.8, 1.0), np.exp(rng.uniform(-0.1, 0.1))
        w, h = width * min(1.0, (area * aspect) ** 0.5), height * min(1.0, (area / aspect) ** 0.5)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (x, y, x + w, y + h)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)[None]  # (1, S, S)


# ---------------------------------------------------------------- the manifest and its index


def patient_hash(patient):
    """A patient id as a signed 64-bit number, the same on every machine."""
    return int.from_bytes(hashlib.sha256(str(patient).encode()).digest()[:8], "little", signed=True)


def split_of(patient):
    """train, val or test (80/10/10) by the hash of the patient id, so that a subset keeps its assignment."""
    share = patient_hash(patient) % 1000
    return "train" if share < 800 else "val" if share < 900 else "test"


def label_vector(labels, uncertain="positive"):
    """Labels by name -> C: (14,) float32 in CheXbert's order; 1, or -1 if uncertain="positive", becomes 1."""
    # ASSUMPTION: C holds the positives, No Finding a dimension of its own; uncertain counts as positive.
    if uncertain not in ("positive", "negative"):
        raise ValueError(f"expected uncertain to be positive or negative, got {uncertain!r}")
    ones = (1, -1) if uncertain == "positive" else (1,)
    return np.array([labels.get(name) in ones for name in CONDITIONS], dtype=np.float32)  # (14,)


INDEX = np.dtype([("offset", "<i8"), ("patient", "<i8"), ("line", "<i4"), ("positives", "<u2"),
                  ("split", "u1"), ("negatives", "u1")])


class Manifest:
    """Lazy rows of a manifest: a memory-mapped sidecar of 24 bytes a line, each record parsed when asked for.

    path        JSON Lines file; PATH.index.npy beside it is rebuilt when its size or time changes, and kept
                in memory if the folder is not writable
    split       train, val, test or all
    image_root  replaces every record's "root"
    Columns (numpy, one entry a row): .patients int64 hash, .positives uint16 (bit k: CONDITIONS[k] is 1),
    .negatives uint8 (stored hard negatives). Raises ValueError naming file and line.
    """

    def __init__(self, path, split="all", image_root=None):
        if split not in (*SPLITS, "all"):
            raise ValueError(f"{path}: expected split train, val, test or all, got {split!r}")
        self.path, self.split, self.image_root = str(path), split, image_root
        self._open()

    def _open(self):
        index = _load_index(self.path)
        code = SPLITS.index(self.split) if self.split in SPLITS else None
        rows = np.arange(1, len(index)) if code is None else np.flatnonzero(index["split"] == code)
        self.index, self.rows = index, rows.astype(np.int32)
        self.file, self.roots = open(self.path, "rb", buffering=0), {}

    def __getstate__(self):
        return {"path": self.path, "split": self.split, "image_root": self.image_root}

    def __setstate__(self, state):
        self.__init__(**state)

    def __len__(self):
        return len(self.rows)

    @property
    def patients(self):
        return self.index["patient"][self.rows]

    @property
    def positives(self):
        return self.index["positives"][self.rows]

    @property
    def negatives(self):
        return self.index["negatives"][self.rows]

    def line(self, i):
        """Line number in the file of row i."""
        return int(self.index["line"][self.rows[i]])

    def __getitem__(self, i):
        row = int(self.rows[i])
        start = int(self.index["offset"][row])
        after = row + 1 < len(self.index)
        end = int(self.index["offset"][row + 1 if after else 0])  # row 0 holds the file's size
        return _parse(self.path, self.line(i), os.pread(self.file.fileno(), end - start, start))

    def image_path(self, record):
        """The record's image as a path; ValueError if it would leave the image root."""
        root = self.image_root or record.get("root") or os.path.dirname(self.path) or "."
        if root not in self.roots:
            self.roots[root] = Path(root).resolve()
        path = self.roots[root] / record["image"]
        if not path.resolve().is_relative_to(self.roots[root]):
            raise ValueError(f"{self.path}: expected images inside the image root (--image-root), got one outside")
        return path


def _parse(path, line, raw):
    try:
        record = json.loads(raw)
    except ValueError:
        raise ValueError(f"{path}:{line}: expected one JSON object in UTF-8") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in ("id", "image")):
        raise ValueError(f"{path}:{line}: expected a JSON object with the texts id and image")
    return record


def _load_index(path):
    """Row 0 holds the manifest's size and time; row k its k-th record."""
    stat, sidecar = os.stat(path), f"{path}.index.npy"
    stamp = (stat.st_size, stat.st_mtime_ns)
    try:
        index = np.load(sidecar, mmap_mode="r")
        if index.dtype == INDEX and len(index) and (index["offset"][0], index["patient"][0]) == stamp:
            return index
    except (OSError, ValueError, EOFError):
        pass  # absent or damaged: built anew
    index = _build_index(path, stamp)
    try:
        with open_atomic(sidecar, "wb") as file:
            np.save(file, index)
        return np.load(sidecar, mmap_mode="r")
    except OSError:
        return index


def _build_index(path, stamp):
    rows, offset = [np.array([(*stamp, 0, 0, 255, 0)], INDEX)], 0
    chunk = []
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                chunk.append(_index_row(path, line, raw, offset))
            offset += len(raw)
            if len(chunk) == 10_000:
                rows.append(np.array(chunk, INDEX))
                chunk = []
    return np.concatenate([*rows, np.array(chunk, INDEX)])


def _index_row(path, line, raw, offset):
    record = _parse(path, line, raw)
    split, labels = record.get("split"), record.get("labels") or {}
    if split is not None and split not in SPLITS:
        raise ValueError(f"{path}:{line}: expected split train, val or test, got {split!r}")
    bits = sum(1 << k for k, name in enumerate(CONDITIONS) if labels.get(name) == 1)
    code = SPLITS.index(split) if split else 255
    negatives = min(255, len(record.get("hard_negatives") or ()))
    return offset, patient_hash(record.get("patient", record["id"])), line, bits, code, negatives


# ---------------------------------------------------------------- batches


class Studies(Dataset):
    """What training reads, indexed by (epoch, i): every sample is a pure function of (seed, epoch, i).

    manifest    rows of one split, with labels; image_size S; tokenize: list of str -> dict of tensors
    negatives   draw one stored hard negative anew each epoch; a study with none gets a report of this split
                with exactly one positive, with that report's labels and graph (Sec. 4.1)
    graphs      add RadGraph graphs; uncertain: see label_vector; augment: random crops
    An unreadable image is replaced by another study drawn from the same seed, so batches keep their size.
    """

    def __init__(self, manifest, *, image_size, tokenize, negatives, graphs, uncertain="positive", seed=0,
                 augment=True):
        self.manifest, self.image_size, self.tokenize = manifest, image_size, tokenize
        self.negatives, self.graphs, self.uncertain = negatives, graphs, uncertain
        self.seed, self.augment = seed, augment
        if not negatives:
            return
        bits = manifest.positives & ((1 << len(CONDITIONS) - 1) - 1)  # the 13 besides No Finding
        self.single = np.flatnonzero((bits > 0) & (bits & (bits - 1) == 0)).astype(np.int32)
        if not len(self.single) and len(manifest) and not manifest.negatives.all():
            raise ValueError(f"{manifest.path}: expected hard_negatives, or reports with exactly one positive label, "
                             "for training with negations; run negations.py on it first")

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        epoch, i = (int(part) for part in key)
        rng = np.random.default_rng((self.seed, epoch, i))
        bad = []
        while True:
            record = self.manifest[i]
            try:
                image = read_image(self.manifest.image_path(record), at_least=self.image_size * 5 // 4)
                break
            except (OSError, ValueError):
                bad.append(i)
            if len(bad) == MAX_TRIES:
                raise ValueError(f"{self.manifest.path}:{self.manifest.line(bad[0])}: {MAX_TRIES} images in a row "
                                 "could not be read; is --image-root right? (python data.py check)")
            i = int(rng.integers(len(self.manifest)))
        sample = {"index": i, "bad": bad, "pixels": pixels(image, self.image_size, rng if self.augment else None)}
        sample.update(self._text(record))
        if self.negatives:
            sample["hard"] = self._text(self._negative(record, rng))
        return sample

    def _text(self, record):
        return {"report": record.get("report", ""), "graph": record.get("graph") or {},
                "labels": label_vector(record.get("labels") or {}, self.uncertain)}

    def _negative(self, record, rng):
        stored = record.get("hard_negatives")
        if stored:
            return stored[rng.integers(len(stored))]
        for _ in range(MAX_TRIES):
            other = self.manifest[self.single[rng.integers(len(self.single))]]
            if other["report"] != record.get("report"):  # never a copy of the report itself
                break
        return other

    def collate(self, samples):
        """Samples -> one batch; tokens and graphs are built here, that is in the worker."""
        batch = {"pixels": torch.from_numpy(np.stack([s["pixels"] for s in samples])),  # (B, 1, S, S)
                 "index": torch.tensor([s["index"] for s in samples]),                  # (B,)
                 "bad": torch.tensor(sorted({i for s in samples for i in s["bad"]}), dtype=torch.int64)}
        sides = [("", samples)] + ([("hard_", [s["hard"] for s in samples])] if self.negatives else [])
        for prefix, side in sides:
            batch[f"{prefix}text"] = self.tokenize([s["report"] for s in side])
            batch[f"{prefix}labels"] = torch.from_numpy(np.stack([s["labels"] for s in side]))  # (B, 14)
            if self.graphs:
                batch[f"{prefix}graph"] = collate_graphs([s["graph"] for s in side])
        return batch


class GlobalBatches:
    """Batch sampler: step s of an epoch takes rows [s N, (s + 1) N) of one permutation, rank r its B of them.

    batch_size is N, a multiple of world; the last incomplete batch is dropped, so all ranks take equal steps;
    start is the first step (to resume inside an epoch). Yields lists of (epoch, i), whatever the workers do.
    """

    def __init__(self, num_studies, batch_size, seed, epoch, rank=0, world=1, start=0):
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"expected a global batch size divisible by {world} ranks, got {batch_size}")
        if num_studies < batch_size:
            raise ValueError(f"expected at least one global batch of {batch_size} studies, got {num_studies} studies")
        self.num_studies, self.batch_size, self.seed, self.epoch = num_studies, batch_size, seed, epoch
        self.rank, self.world, self.start = rank, world, start

    def __len__(self):
        return max(0, self.num_studies // self.batch_size - self.start)

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_studies)
        share = self.batch_size // self.world  # B
        for step in range(self.start, self.num_studies // self.batch_size):
            first = step * self.batch_size + self.rank * share
            yield [(self.epoch, int(i)) for i in order[first:first + share]]


# ---------------------------------------------------------------- the phantom (drawn chests with matching reports)

TEMPLATES = {"No acute cardiopulmonary process.": 15829, "No acute intrathoracic process.": 4643,  # Tab. 1
             "No acute cardiopulmonary abnormality.": 4488, "No evidence of acute cardiopulmonary process.": 1255,
             "No evidence of pneumonia.": 1014}
DUPLICATE = "No active lung lesion."  # Sec. 5.1: the sentence of all 130,000 added normal studies

# condition: (weight, conditions that often come along, noun phrases; {sev}erity, {side} and {zone} are filled in)
FINDINGS = {
    "Enlarged Cardiomediastinum": (0.6, (), ("{sev} widening of the mediastinum", "{sev} mediastinal widening",
                                             "{sev} enlargement of the cardiomediastinal silhouette")),
    "Cardiomegaly": (1.2, (), ("{sev} cardiomegaly", "{sev} enlargement of the heart", "{sev} cardiac enlargement")),
    "Lung Opacity": (1.0, (), ("{sev} hazy opacity in the {side} {zone} lung", "ill-defined {sev} {side} {zone} lung opacity",
                               "{sev} airspace opacity in the {side} {zone} lung")),
    "Lung Lesion": (0.9, (), ("{sev} {side} {zone} lung nodule", "{sev} rounded nodule in the {side} {zone} lung",
                              "{sev} mass in the {side} {zone} lung")),
    "Edema": (0.8, ("Cardiomegaly", "Pleural Effusion"), ("{sev} pulmonary edema", "{sev} interstitial edema",
                                                          "{sev} pulmonary vascular congestion with edema")),
    "Consolidation": (0.9, (), ("{sev} consolidation in the {side} {zone} lung", "{sev} {side} {zone} lobe consolidation",
                                "{sev} focal consolidation of the {side} {zone} lobe")),
    "Pneumonia": (1.0, ("Lung Opacity",), ("{sev} {side} {zone} lobe pneumonia", "{sev} pneumonia in the {side} {zone} lung",
                                           "{sev} {side} bronchopneumonia")),
    "Atelectasis": (1.0, (), ("{sev} {side} basilar atelectasis", "{sev} atelectasis at the {side} base",
                              "{sev} linear atelectasis in the {side} lower lung")),
    "Pneumothorax": (0.9, ("Support Devices", "Fracture"), ("{sev} {side} pneumothorax", "{sev} {side} apical pneumothorax",
                                                            "{sev} pneumothorax on the {side}")),
    "Pleural Effusion": (1.3, ("Atelectasis",), ("{sev} {side} pleural effusion", "{sev} effusion on the {side}",
                                                 "{sev} {side} pleural fluid collection")),
    "Pleural Other": (0.5, (), ("{sev} {side} pleural thickening", "{sev} thickening of the {side} lateral pleura",
                                "{sev} {side} pleural scarring")),
    "Fracture": (0.6, (), ("{sev} {side} rib fracture", "{sev} fracture of the {side} ribs",
                           "{sev} displaced {side} rib fractures")),
    "Support Devices": (0.8, (), ("{device} in place",)),
}
DEVICES = ("left chest pacemaker", "right internal jugular catheter", "endotracheal tube", "enteric tube",
           "sternotomy wires")
FRAMES = ("there is {x}.", "{x}.", "{x} is present.", "{x} is noted.", "{x} is seen.", "findings show {x}.",
          "unchanged {x}.", "{x}, unchanged from the prior study.", "compared to the prior study, there is {x}.",
          "stable {x}.", "{x} is again seen.", "{x} has increased since the previous examination.",
          "new {x} since the prior radiograph.")
ABSENT = {"Cardiomegaly": ("the heart is normal in size.", "heart size is normal.", "no cardiomegaly."),
          "Enlarged Cardiomediastinum": ("mediastinal contours are normal.", "the mediastinum is not widened."),
          "Pleural Effusion": ("no pleural effusion.", "there is no effusion on either side."),
          "Pneumothorax": ("no pneumothorax.", "there is no evidence of pneumothorax.", "no pneumothorax is seen."),
          "Consolidation": ("no focal consolidation.", "there is no consolidation."),
          "Edema": ("no pulmonary edema.", "there is no evidence of edema."),
          "Pneumonia": ("no evidence of pneumonia.", "no pneumonia."), "Fracture": ("no rib fracture.",),
          "Lung Lesion": ("no lung nodule or mass.",), "Atelectasis": ("no atelectasis.",)}
EXTRA = ("pa and lateral views of the chest.", "single portable view of the chest.", "the patient is slightly rotated.",
         "comparison is made to the prior study.")
SEVERITY = (("mild", "small", "subtle"), ("moderate",), ("severe", "large", "extensive"))


def phantom_records(folder, studies, size, seed, normal_fraction, duplicates):
    """Draws the images into folder/images and yields their manifest records; a pure function of the arguments."""
    if not 0 <= normal_fraction <= 1 or studies < 1 or duplicates < 0 or size < 32:
        raise ValueError("expected --studies >= 1, --size >= 32, --duplicates >= 0 and --normal-fraction in 0..1")
    (Path(folder) / "images").mkdir(parents=True, exist_ok=True)
    templates, counts = list(TEMPLATES), np.array(list(TEMPLATES.values()))
    for i in range(studies + duplicates):
        rng = np.random.default_rng((seed, i))
        normal = i >= studies or rng.random() < normal_fraction
        found = {} if normal else _draw_findings(rng)
        report = DUPLICATE if i >= studies else (
            templates[rng.choice(len(counts), p=counts / counts.sum())] if normal else _write_report(found, rng))
        image = f"images/{i:06d}.png"
        _draw_chest(found, size, rng).save(Path(folder) / image, compress_level=1)
        patient = f"D{i}" if i >= studies else f"P{i * 2 // 3}"
        targets = {name: int(name in found) for name in CONDITIONS[:-1]}
        targets["No Finding"] = int(not set(found) - {"Support Devices"})
        yield {"study": f"{i:06d}", "image": image, "patient": patient, "report": report, "targets": targets,
               "split": "train" if i >= studies else split_of(f"{seed}/{patient}"),
               "severity": {name: round(f["amount"], 2) for name, f in found.items()}}


def _draw_findings(rng):
    names = list(FINDINGS)
    weights = np.array([FINDINGS[name][0] for name in names])
    chosen = set(rng.choice(names, size=rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]), replace=False,
                            p=weights / weights.sum()).tolist())
    for name in sorted(chosen):
        chosen |= {other for other in FINDINGS[name][1] if rng.random() < 0.3}
    return {name: {"amount": float(rng.uniform(0.3, 1.0)), "side": int(rng.choice([-1, 1])),  # -1: the patient's right
                   "zone": int(rng.integers(3)), "device": int(rng.integers(len(DEVICES)))}
            for name in names if name in chosen}


def _write_report(found, rng):
    def pick(options):
        return options[rng.integers(len(options))]

    sentences = []
    for name, finding in found.items():
        level = min(2, int((finding["amount"] - 0.3) / 0.7 * 3))
        phrase = pick(FINDINGS[name][2]).format(
            sev=pick(SEVERITY[level]), side="right" if finding["side"] < 0 else "left",
            zone=("upper", "mid", "lower")[finding["zone"]], device=DEVICES[finding["device"]])
        sentences.append(pick(FRAMES).format(x=phrase))
    absent = [name for name in ABSENT if name not in found]
    for name in rng.permutation(absent)[:rng.integers(0, 4)]:
        sentences.append(pick(ABSENT[name]))
    if rng.random() < 0.3:
        sentences.append(pick(EXTRA))
    return " ".join(s[0].upper() + s[1:] for s in (sentences[k] for k in rng.permutation(len(sentences))))


def _step(distance, softness=0.04):
    return np.clip(distance / softness + 0.5, 0, 1)


def _line(x, y, points, width):
    """Brightness of a polyline of that width; points as (x, y)."""
    best = np.full_like(x, 9.0)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        best = np.minimum(best, (x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2)
    return _step(width - np.sqrt(best), width)


def _blend(image, mask, value):
    image += (value - image) * mask


def _draw_chest(found, size, rng):
    """One frontal chest, the patient's right on the left: x in -1..1, y from -1 (neck) to 1 (abdomen)."""
    amount = {name: finding["amount"] for name, finding in found.items()}
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    turn, zoom = rng.normal(0, 0.035), rng.uniform(0.95, 1.08)
    x0, y0 = axis[None] - rng.normal(0, 0.03), axis[:, None] - rng.normal(0, 0.03)
    x, y = zoom * (np.cos(turn) * x0 + np.sin(turn) * y0), zoom * (np.cos(turn) * y0 - np.sin(turn) * x0)
    u = np.abs(x)
    texture = _noise(size, rng, 16) + 0.6 * _noise(size, rng, 6)
    body = _step(0.30 + 0.64 * _step(y + 0.84, 0.22) - u)
    image = 0.05 + 0.50 * body
    chest = {"x": x, "y": y, "u": u, "texture": texture, "body": body, "image": image, "rng": rng, "lungs": 0}
    for side in (-1, 1):
        chest[side] = _draw_lung(chest, found, side)
    _blend(image, 0.8 * body * _step(y - 0.5, 0.5), 0.66)  # abdomen
    for side in (-1, 1):
        _blend(image, chest[side]["mask"], 0.20 + 0.05 * texture + chest[side]["vessels"])
    wide = rng.uniform(0.14, 0.18) + 0.20 * amount.get("Enlarged Cardiomediastinum", 0) * np.exp(-((y + 0.3) / 0.32) ** 2)
    _blend(image, _step(wide - u, 0.06), 0.70)
    _blend(image, 0.5 * _step(0.05 - u) * _step(-0.4 - y), 0.45)  # trachea
    big = amount.get("Cardiomegaly", 0)
    rx, ry = rng.uniform(0.28, 0.34) + 0.24 * big, rng.uniform(0.26, 0.31) + 0.10 * big
    heart = 1 - np.sqrt(((x - 0.12 - 0.06 * big) / rx) ** 2 + ((y - 0.40) / ry) ** 2)
    _blend(image, 0.95 * _step(heart, 0.14), 0.68)
    _blend(image, 0.8 * _step(1 - np.sqrt(((x - 0.15) / 0.11) ** 2 + ((y + 0.38) / 0.10) ** 2), 0.25), 0.68)  # aortic knob
    for name, finding in found.items():
        _draw_finding(chest, name, finding)
    _draw_bones(chest, found)
    if "Support Devices" in found:
        _draw_device(chest, found["Support Devices"]["device"])
    image = np.clip(image, 0, 1) ** rng.uniform(0.85, 1.2) * rng.uniform(0.88, 1.05) + rng.normal(0, 0.02, image.shape)
    return Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))


def _noise(size, rng, cells):
    """Smooth noise of about that many blobs across."""
    small = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _draw_lung(chest, found, side):
    """One lung's mask and borders in its own outward coordinate s = side * x."""
    rng, y, s = chest["rng"], chest["y"], side * chest["x"]
    outer = rng.uniform(0.78, 0.84) * np.sqrt(np.clip(1 - ((y - 0.3) / 1.16) ** 2, 0, 1))
    raised = sum(0.14 * f["amount"] for n, f in found.items() if n == "Atelectasis" and f["side"] == side)
    dome = rng.uniform(0.50, 0.58) + 0.03 * side - raised + 0.24 * ((s - 0.38) / 0.42) ** 2
    mask = _step(outer - s) * _step(s - 0.10) * _step(dome - y)
    vessels = 0.12 * np.exp(-(((s - 0.24) / 0.14) ** 2 + ((y - 0.02) / 0.30) ** 2))  # hilum
    angle = np.arctan2(y - 0.02, s - 0.16)
    vessels = vessels + 0.06 * np.clip(np.cos(angle * rng.integers(9, 13) + rng.uniform(0, 6)), 0, 1) ** 3 * _step(0.75 - s, 0.7)
    return {"s": s, "outer": outer, "dome": dome, "mask": mask, "vessels": vessels}


def _draw_finding(chest, name, finding):
    """The look of one condition; a in 0.3..1 is its severity."""
    rng, y, texture, image = chest["rng"], chest["y"], chest["texture"], chest["image"]
    lung, a = chest[finding["side"]], finding["amount"]
    s, mask, outer = lung["s"], lung["mask"], lung["outer"]
    cy = (-0.38, -0.02, 0.30)[finding["zone"]] + rng.uniform(-0.06, 0.06)
    cx = rng.uniform(0.32, 0.52)

    def blob(x0, y0, rx, ry):
        return np.sqrt(((s - x0) / rx) ** 2 + ((y - y0) / ry) ** 2)

    if name == "Lung Opacity":  # hazy, no edge
        _blend(image, mask * 0.65 * (0.5 + 0.5 * a) * np.exp(-blob(cx, cy, 0.30, 0.26) ** 2), 0.62)
    elif name == "Lung Lesion":  # round, sharp
        radius = 0.05 + 0.08 * a
        _blend(image, mask * 0.85 * _step(1 - blob(cx, cy, radius, radius), 0.3), 0.66)
    elif name == "Edema":  # both lungs: butterfly haze and septal lines
        for other in (chest[-1], chest[1]):
            haze = np.exp(-(((other["s"] - 0.30) / 0.30) ** 2 + ((y - 0.05) / 0.42) ** 2))
            lines = 0.25 * np.clip(np.sin(y * 60 + 3 * texture), 0, 1) * _step(other["s"] - 0.45, 0.2)
            _blend(image, other["mask"] * a * (0.75 * haze + lines), 0.64)
    elif name == "Consolidation":  # dense, sharp, with dark bronchi
        patch = mask * _step(1 - blob(cx, cy, 0.20 + 0.16 * a, 0.12 + 0.10 * a) + 0.06 * texture, 0.15)
        bronchi = _line(s, y, [(0.15, cy - 0.1), (cx, cy), (cx + 0.3, cy + 0.12)], 0.025)
        _blend(image, patch * (0.92 - 0.45 * bronchi), 0.68)
    elif name == "Pneumonia":  # several patches
        patches = sum(np.exp(-blob(cx + rng.normal(0, 0.12), cy + rng.normal(0, 0.11), 0.09, 0.08) ** 2) for _ in range(6))
        _blend(image, mask * np.clip((0.45 + 0.5 * a) * patches, 0, 0.9), 0.66)
    elif name == "Atelectasis":  # bands above a raised diaphragm
        for k in range(1 + int(3 * a)):
            y1 = 0.34 - 0.10 * k + rng.uniform(-0.02, 0.02)
            _blend(image, 0.8 * mask * _line(s, y, [(0.22, y1), (0.68, y1 + rng.uniform(-0.08, 0.03))], 0.02 + 0.012 * a), 0.70)
    elif name == "Pneumothorax":  # dark rim without vessels, inside it the pleural line
        depth = outer - s - (0.05 + 0.18 * a) * _step(0.35 - y, 0.9) - 0.10 * a * _step(-0.45 - y, 0.3)
        _blend(image, mask * _step(-depth), 0.07)
        _blend(image, mask * 0.7 * _step(0.02 - np.abs(depth), 0.03) * _step(0.3 - y, 0.1), 0.62)
    elif name == "Pleural Effusion":  # meniscus: highest at the chest wall
        level = 0.66 - 0.52 * a - 0.55 * np.clip(s - 0.42, 0, 1) + 0.05 * texture * 0.2
        thorax = _step(outer - s) * _step(s - 0.08) * chest["body"]
        _blend(image, 0.95 * thorax * _step(y - level, 0.10), 0.70)
    elif name == "Pleural Other":  # irregular bright rim
        rim = 0.05 + 0.09 * a + 0.03 * np.sin(9 * y + cx * 20)
        _blend(image, 0.9 * mask * _step(s - outer + rim, 0.05) * _step(0.45 - np.abs(y + 0.05), 0.2), 0.66)


def _draw_bones(chest, found):
    rng, x, y, u, image = (chest[k] for k in ("rng", "x", "y", "u", "image"))
    slope = y - 0.42 * u + 0.55 * np.clip(u - 0.55, 0, 1) ** 2 * 2
    phase = slope * rng.uniform(4.3, 4.9) + rng.uniform(0, 1)
    cage = _step(0.86 * np.sqrt(np.clip(1 - ((y - 0.3) / 1.22) ** 2, 0, 1)) - u, 0.08) * _step(0.62 - y, 0.2) * _step(u - 0.1, 0.2)
    if "Fracture" in found:  # the outer part of some ribs is displaced, with a bright edge
        finding = found["Fracture"]
        s, a = finding["side"] * x, finding["amount"]
        cy, cx = rng.uniform(-0.25, 0.20), rng.uniform(0.50, 0.62)
        near = _step(0.14 + 0.14 * a - np.abs(y - cy), 0.06)
        phase = phase + (0.35 + 0.15 * a) * near * _step(s - cx, 0.03)
        _blend(image, 0.5 * (0.5 + 0.5 * a) * near * _step(0.035 - np.abs(s - cx), 0.03), 0.85)
    image += 0.11 * cage * np.clip(np.cos(2 * np.pi * phase), 0, 1) ** 1.5
    for side in (-1, 1):  # collar bones
        _blend(image, 0.45 * _line(side * x, y, [(0.08, -0.62), (0.42, -0.70), (0.80, -0.82)], 0.035), 0.80)
    image += 0.05 * _step(0.06 - u) * np.cos(y * 28) * chest["body"]  # spine


def _draw_device(chest, kind):
    x, y, image = chest["x"], chest["y"], chest["image"]
    if kind == 0:
        _blend(image, _step(0.10 - np.maximum(np.abs(x - 0.55), np.abs(y + 0.55) * 1.2), 0.03), 1.0)
        _blend(image, _line(x, y, [(0.5, -0.5), (0.2, -0.42), (0.02, -0.1), (0.0, 0.3), (0.22, 0.5)], 0.022), 1.0)
    elif kind == 1:
        _blend(image, _line(x, y, [(-0.22, -0.98), (-0.15, -0.6), (-0.10, -0.2), (-0.08, 0.12)], 0.024), 1.0)
    elif kind == 2:
        _blend(image, _line(x, y, [(0.01, -1), (0.0, -0.6), (0.02, -0.28)], 0.034), 0.97)
    elif kind == 3:
        _blend(image, _line(x, y, [(0.02, -1), (0.03, 0.2), (0.10, 0.62), (0.3, 0.72)], 0.024), 0.95)
    else:
        for k in range(6):
            _blend(image, _step(1 - np.sqrt((x / 0.06) ** 2 + ((y + 0.45 - 0.17 * k) / 0.035) ** 2), 0.4), 1.0)


def make_phantom(folder, studies=3000, size=64, seed=0, normal_fraction=0.45, duplicates=0):
    """Draws the phantom into a folder -> path of its raw phantom.jsonl; reused if the same one is there already.

    studies, and duplicates more normal training studies with one identical sentence (Tab. 3's imbalance);
    size in pixels; normal_fraction of the studies have a Tab. 1 template at that table's frequencies.
    """
    folder = Path(folder)
    settings = dict(studies=studies, size=size, seed=seed, normal_fraction=normal_fraction, duplicates=duplicates)
    settings["generator"] = PHANTOM_VERSION
    manifest, note = folder / "phantom.jsonl", folder / "phantom.json"
    if manifest.exists() and note.exists() and json.loads(note.read_text()) == settings:
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    write_manifest("phantom", phantom_records(folder, studies, size, seed, normal_fraction, duplicates), folder, manifest)
    with open_atomic(note) as file:
        json.dump(settings, file)
    return manifest


PHANTOM_VERSION = 1

# ---------------------------------------------------------------- builders: shared parts


class Images:
    """Image files below a root, found by relative path or by name; nothing is ever opened."""

    SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")

    def __init__(self, root):
        self.root, self.stems = Path(root), None

    def path(self, *candidates):
        """The first of these relative paths that is there (in any image format), else None."""
        for candidate in candidates:
            for suffix in (Path(candidate).suffix, *self.SUFFIXES):
                path = Path(candidate).with_suffix(suffix)
                if (self.root / path).is_file():
                    return path.as_posix()
        return None

    def name(self, name):
        """The relative path of the file with this name, whatever its folder and format, else None."""
        if self.stems is None:
            self.stems = {}
            for folder, folders, files in os.walk(self.root):
                folders.sort()
                for file in sorted(files, key=lambda f: f.lower().endswith(".dcm")):
                    if file.lower().endswith(self.SUFFIXES):
                        self.stems.setdefault(stem(file), os.path.relpath(os.path.join(folder, file), self.root))
        return self.stems.get(stem(name))


def stem(name):
    """File name without folder and endings; OpenI's two namings (CXR2_IM-1.png, 2_IM-1.dcm.png) become one."""
    name = re.sub(r"(\.(dcm|dicom|png|jpe?g))+$", "", os.path.basename(name), flags=re.IGNORECASE)
    return re.sub(r"^CXR(\d+_)?(?=\d+_IM)", "", name)


def find_file(root, *names, required=True):
    """The first of these files (glob patterns, plain or .gz) in root or one folder below; ValueError lists them."""
    for name in names:
        for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
            hits = sorted(Path(root).glob(pattern))
            if hits:
                return hits[0]
    if required:
        raise ValueError(f"{root}: expected the file {' or '.join(names)} (or .gz)")
    return None


def open_text(path):
    opened = gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")


def read_table(path, *columns):
    """Rows of a CSV as ("FILE:LINE", dict), names and values stripped; ValueError if a column is not there."""
    csv.field_size_limit(1 << 27)
    line = 1
    try:
        with open_text(path) as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            absent = [name for name in columns if name not in header]
            if absent:
                raise ValueError(f"expected the columns {', '.join(columns)}; {', '.join(absent)} not there")
            for row in rows:
                line = rows.line_num
                if not row:
                    continue
                values = [value.strip() for value in row]
                if len(values) < len(header) or any(values[len(header):]):
                    raise ValueError(f"expected {len(header)} fields, got {len(values)}")
                yield f"{path}:{line}", dict(zip(header, values, strict=False))
    except UnicodeDecodeError:
        raise ValueError(f"{path}:{line}: expected UTF-8 text after this line") from None
    except (csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{line}: expected a complete CSV file ({error})") from None


def join_sections(findings, impression):
    return " ".join(f"{findings or ''} {impression or ''}".split())


CLASS_NAMES = {name.lower(): name for name in CONDITIONS} | {"effusion": "Pleural Effusion", "normal": "No Finding"}


def class_name(name):
    """A set's class by its CheXpert name where one exists, else its own with spaces."""
    name = name.replace("_", " ").strip()
    return CLASS_NAMES.get(name.lower(), name)


def write_manifest(name, records, root, out, keep_missing=True, skipped=None, images=None):
    """Writes records (with "study" in place of "id"), leaves out missing images, prints the aligned summary."""
    skipped = Counter() if skipped is None else skipped
    root, seen, counts, patients = Path(root).resolve(), set(), Counter(), {}
    missing = 0
    with open_atomic(out) as file:
        for record in records:
            study = record.pop("study")
            key = f"{name}/{study}/{stem(record['image'])}" if study in seen else f"{name}/{study}"
            seen.add(study)
            there = record.pop("there", True)
            missing += not there
            if not there and not keep_missing:
                continue
            counts[record["split"]] += 1
            patients.setdefault(record["patient"], set()).add(record["split"])
            file.write(json.dumps({"id": key, "root": str(root), **record}, ensure_ascii=False) + "\n")
        if not counts:
            raise ValueError(f"{root}: expected the images of {name} in this folder; none of {missing} is there "
                             "(--keep-missing keeps studies without images)")
    shared = sum(len(splits) > 1 for splits in patients.values())
    rows = [("studies", sum(counts.values())), *((s, counts[s]) for s in SPLITS), ("patients", len(patients)),
            ("patients in two splits", shared), (f"image not there ({'kept' if keep_missing else 'left out'})", missing),
            *((f"skipped: {why}", n) for why, n in skipped.items())]
    width = max(len(label) for label, _ in rows)
    print(f"{name} -> {out}")
    for label, number in rows:
        print(f"  {label:<{width}}  {number:>9,}")


# ---------------------------------------------------------------- builders: one per data set (Sec. 5.1)

MESH = {"Pulmonary Atelectasis": "Atelectasis", "Cardiomegaly": "Cardiomegaly", "Pleural Effusion": "Pleural Effusion",
        "Infiltrate": "Infiltration", "Mass": "Mass", "Nodule": "Nodule", "Pneumonia": "Pneumonia",
        "Pneumothorax": "Pneumothorax", "Consolidation": "Consolidation", "Pulmonary Edema": "Edema",
        "Emphysema": "Emphysema", "Pulmonary Emphysema": "Emphysema", "Pulmonary Fibrosis": "Fibrosis",
        "Thickening": "Pleural Thickening", "Hernia, Hiatal": "Hernia", "normal": "No Finding"}


def build_openi(root, args, skipped):
    """OpenI: Kaggle's two tables, else the official XML; targets from the human MeSH indexing."""
    images = Images(root)
    kaggle = find_file(root, "indiana_reports.csv", required=False)
    studies = _openi_kaggle(kaggle, root) if kaggle else _openi_xml(root)
    for uid, names, sections, mesh in studies:
        report = join_sections(*sections)
        if not names or not report:
            skipped["no frontal image listed" if not names else "neither findings nor impression"] += 1
            continue
        tags = {tag.split("/")[0].strip() for tag in mesh}
        fields = {"patient": uid, "split": split_of(uid), "report": report}
        if "No Indexing" not in tags:
            found = {MESH.get(tag) for tag in tags}
            fields["targets"] = {name: int(name in found) for name in dict.fromkeys(MESH.values())}
        for name in names:
            path = images.name(name)
            yield {"study": uid, "image": path or name, "there": path is not None, **fields}


def _openi_kaggle(reports, root):
    frontal = {}
    for where, row in read_table(find_file(root, "indiana_projections.csv"), "uid", "filename", "projection"):
        if row["projection"] not in ("Frontal", "Lateral"):
            raise ValueError(f"{where}: expected projection Frontal or Lateral")
        if row["projection"] == "Frontal":
            frontal.setdefault(row["uid"], []).append(f"images/{row['filename']}")
    for _, row in read_table(reports, "uid", "MeSH", "findings", "impression"):
        yield row["uid"], frontal.get(row["uid"], []), (row["findings"], row["impression"]), row["MeSH"].split(";")


def _openi_xml(root):
    for name, data in _openi_files(root):
        tree = parse_xml(name, data)
        sections = {node.get("Label"): node.text for node in tree.iter("AbstractText")}
        uid = (tree.find(".//uId").get("id") if tree.find(".//uId") is not None else Path(name).stem).removeprefix("CXR")
        names = [f"{node.get('id')}.png" for node in tree.iter("parentImage")][:1]  # the view is unknown: the first one
        mesh = [node.text or "" for node in tree.iterfind(".//MeSH/major")]
        yield uid, names, (sections.get("FINDINGS"), sections.get("IMPRESSION")), mesh


def _openi_files(root):
    folder = next((f for f in (Path(root) / "ecgen-radiology", Path(root)) if any(f.glob("*.xml"))), None)
    if folder is not None:
        for path in sorted(folder.glob("*.xml"), key=lambda p: (len(p.stem), p.stem)):
            with open(path, "rb") as file:
                yield str(path), file.read(MAX_XML_BYTES + 1)
        return
    archive = find_file(root, "NLMCXR_reports.tgz")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".xml"):
                yield f"{archive}:{member.name}", tar.extractfile(member).read(MAX_XML_BYTES + 1)


def parse_xml(name, data):
    """XML bytes -> root element; a DOCTYPE, a size over MAX_XML_BYTES and broken XML are refused."""
    def refuse(*_):
        raise ValueError(f"{name}: expected XML without a DOCTYPE")

    if len(data) > MAX_XML_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_XML_BYTES} bytes of XML")
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"{name}:{error.lineno}: expected well-formed XML") from None
    return builder.close()


def build_phantom(root, args, skipped):
    """The embedded default: drawn chests and their reports."""
    return phantom_records(root, args.studies, args.size, args.seed, args.normal_fraction, args.duplicates)


BUILDERS = {"openi": build_openi, "phantom": build_phantom}

# ---------------------------------------------------------------- check, cache, sheet


def check(path, image_root=None, workers=0):
    """Reads every line and image, prints counts -> number of things that are wrong."""
    manifest = Manifest(path, image_root=image_root)
    splits, labels, targets, reports, ids = Counter(), {}, {}, Counter(), Counter()
    patients, wrong = {}, []
    for i in tqdm(range(len(manifest)), desc="check", disable=None):
        record = manifest[i]
        ids[record["id"]] += 1
        splits[record.get("split")] += 1
        patients.setdefault(record.get("patient", record["id"]), set()).add(record.get("split"))
        for field, table in (("labels", labels), ("targets", targets)):
            for name, value in (record.get(field) or {}).items():
                table.setdefault(name, Counter())[value] += 1
        reports[record.get("report", "")] += 1
        try:
            read_image(manifest.image_path(record))
        except (OSError, ValueError) as error:
            wrong.append(f"{path}:{manifest.line(i)}: {type(error).__name__}")
    shared = sum(len(s) > 1 for s in patients.values())
    print(f"{len(manifest)} studies", dict(splits), f"{len(patients)} patients, {shared} in two splits")
    for line in wrong[:10]:
        print(line)
    return len(wrong) + shared + sum(n > 1 for n in ids.values())


def draw_sheet(path, out, image_root=None, side=256):
    """Twelve images of a manifest, evenly spread, on one sheet."""
    manifest = Manifest(path, image_root=image_root)
    sheet = Image.new("L", (4 * side, 3 * side))
    for k in range(min(12, len(manifest))):
        record = manifest[k * len(manifest) // min(12, len(manifest))]
        tile = read_image(manifest.image_path(record)).resize((side, side), Image.Resampling.BICUBIC)
        names = [n for n, v in (record.get("targets") or record.get("labels") or {}).items() if v == 1]
        ImageDraw.Draw(tile).text((4, 4), "\n".join(names), fill=255)
        sheet.paste(tile, (k % 4 * side, k // 4 * side))
    sheet.save(out)
    print(f"{out}: {min(12, len(manifest))} images")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SET|check|cache")
    for name, build in BUILDERS.items():
        sub = commands.add_parser(name, help=build.__doc__, formatter_class=parser.formatter_class)
        sub.add_argument("root", help="folder of the official download")
        sub.add_argument("--out", required=True, help="manifest to write (JSON Lines)")
        sub.add_argument("--keep-missing", action="store_true", help="keep studies whose image is not there")
        sub.add_argument("--sheet", help="also draw twelve of its images into this PNG")
        if name == "phantom":
            sub.add_argument("--studies", type=int, default=3000, help="number of studies")
            sub.add_argument("--size", type=int, default=64, help="side in pixels")
            sub.add_argument("--seed", type=int, default=0, help="another seed is another data set")
            sub.add_argument("--normal-fraction", type=float, default=0.45, help="share of normal studies (Tab. 1)")
            sub.add_argument("--duplicates", type=int, default=0, help="extra normals with one sentence (Tab. 3)")
    sub = commands.add_parser("check", help="validate a manifest", formatter_class=parser.formatter_class)
    sub.add_argument("manifest")
    sub.add_argument("--image-root", help="replaces the manifest's root")
    sub.add_argument("--sheet", help="also draw twelve of its images into this PNG")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.command == "check":
        wrong = check(args.manifest, args.image_root)
        if args.sheet:
            draw_sheet(args.manifest, args.sheet, args.image_root)
        return int(wrong > 0)
    if args.command != "phantom" and not Path(args.root).is_dir():
        raise ValueError(f"{args.root}: expected the folder of the official download")
    skipped = Counter()
    records = BUILDERS[args.command](args.root, args, skipped)
    write_manifest(args.command, records, args.root, args.out, args.keep_missing, skipped)
    if args.sheet:
        draw_sheet(args.out, args.sheet)
    return 0


if __name__ == "__main__":
    run_main(main)
