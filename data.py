"""Every data set of the paper from its official files, batches, the phantom (Sec. 5.1, App. B.1).

    python data.py SET ROOT --out X.jsonl     official download -> manifest, a frontal image a line
    python data.py check X.jsonl              validates lines and images; Tab. 1 for any corpus
    python data.py cache X.jsonl --out DIR    resized copies and a manifest that points to them

In this order: images, manifest, batches, builders (one per data set), phantom, check and cache.
Symbols: B rows of one rank's batch, N = world x B, S the image side in pixels.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import json
import math
import os
import re
import struct
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from xml.etree.ElementTree import XML, ParseError, TreeBuilder, XMLParser

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from tqdm import tqdm

from gcn import collate_graphs, read_radgraph
from negations import (
    CONDITIONS,
    label_report,
    minimum,
    open_atomic,
    parse_line,
    read_jsonl,
    run_main,
    stream,
)

SPLITS = ("train", "val", "test")
MAX_PIXELS = 50_000_000      # checked before decoding: three times the largest published radiograph
MAX_XML_BYTES = 1_000_000    # OpenI's longest report is 12 kB
MAX_TRIES = 20               # replacements tried for one unreadable image
DICOM = (".dcm", ".dicom")
BROKEN = (OSError, SyntaxError, EOFError, ValueError, IndexError, TypeError, AttributeError,
          RuntimeError, struct.error, zlib.error)  # what Pillow and pydicom raise for a bad file


def expect(right, where, what):
    """ValueError("WHERE: expected WHAT") unless right."""
    if not right:
        raise ValueError(f"{where}: expected {what}")


# ---------------------------------------------------------------- images (App. B.1)


def read_image(path, at_least=None):
    """One radiograph as a grey 8-bit PIL image.

    path: PNG or JPEG of 8 or 16 bits, or DICOM (needs pydicom; MONOCHROME1 is inverted). at_least:
    side in pixels that suffices; a JPEG is decoded at 1/2, 1/4 or 1/8 if both sides stay above it.
    Raises OSError or ValueError naming the file; the size is checked before anything is decoded.
    """
    try:
        if str(path).lower().endswith(DICOM):
            return _read_dicom(path)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if at_least is not None:
                image.draft("L", (at_least, at_least))
            if image.mode.startswith("I") or image.mode == "F":
                return to_grey(np.asarray(image))
            return image.convert("L")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: expected at most {MAX_PIXELS} pixels") from None
    except ImportError:
        raise ValueError(f"{path}: reading DICOM needs pydicom (pip install pydicom)") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected an image, found no such file") from None
    except BROKEN as error:
        raise OSError(f"{path}: expected an intact PNG, JPEG or grey DICOM image "
                      f"({type(error).__name__})") from None


def _read_dicom(path):
    import pydicom
    try:
        header = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError:
        raise SyntaxError from None
    if int(header.Rows) * int(header.Columns) > MAX_PIXELS:
        raise Image.DecompressionBombError
    values = np.asarray(header.pixel_array, dtype=np.float32)
    if values.ndim != 2:  # colour, or several frames
        raise SyntaxError
    return to_grey(-values if header.get("PhotometricInterpretation") == "MONOCHROME1" else values)


def to_grey(values):
    """More than 8 bits -> an 8-bit image, the darkest value 0 and the brightest 255 (flat: 0)."""
    # ASSUMPTION: images of more than 8 bits are scaled by their own minimum and maximum.
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / max(high - low, 1e-6))
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def pixels(image, size, rng=None):
    """PIL image -> (1, S, S) uint8: all of it, or with rng a random crop, resized in one step."""
    width, height = image.size
    box = (0, 0, width, height)
    if rng is not None:
        # ASSUMPTION: crops keep 80-100 % of the area and 10 % of the aspect; sides are not flipped.
        u = rng.random(4).tolist()  # in [0, 1)
        area, aspect = 0.8 + 0.2 * u[0], math.exp(0.2 * u[1] - 0.1)
        w, h = width * min(1, (area * aspect) ** 0.5), height * min(1, (area / aspect) ** 0.5)
        x, y = u[2] * (width - w), u[3] * (height - h)
        box = (x, y, x + w, y + h)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)[None]  # (1, S, S)


def crop_borders(image):
    """Cuts black padding away: rows and columns in which hardly any pixel is not black."""
    # DIFFERS from App. B.1: only with cache --crop-borders, and by brightness, not by contours.
    bright = np.asarray(image) > 10
    rows, columns = (np.flatnonzero(bright.mean(axis) > 0.02) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return image
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


# ---------------------------------------------------------------- the manifest and its index


def patient_hash(patient):
    """A patient id as a signed 64-bit number, the same on every machine."""
    digest = hashlib.sha256(str(patient).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def split_of(patient):
    """train, val or test (80/10/10) by the patient's hash: a subset keeps its assignment."""
    # ASSUMPTION: sets without an official split get one by a hash of the patient id.
    share = patient_hash(patient) % 1000
    return "train" if share < 800 else "val" if share < 900 else "test"


def label_vector(labels, uncertain="positive"):
    """Labels by name -> C: (14,) float32 in CheXbert's order; -1 is 1 if uncertain="positive"."""
    # ASSUMPTION: C holds the positives, No Finding its own dimension; uncertain counts as positive.
    if uncertain not in ("positive", "negative"):
        raise ValueError(f"expected uncertain to be positive or negative, got {uncertain!r}")
    ones = (1, -1) if uncertain == "positive" else (1,)
    return np.array([labels.get(name) in ones for name in CONDITIONS], dtype=np.float32)  # (14,)


INDEX = np.dtype([("offset", "<i8"), ("patient", "<i8"), ("line", "<i4"), ("bits", "<u2"),
                  ("split", "u1"), ("negatives", "u1")])
LABELLED, WITH_GRAPH = 1 << 14, 1 << 15  # in "bits", above the 14 positives
NO_SPLIT, HEADER = 254, 255  # in "split"
TYPES = {"id": str, "root": str, "image": str, "split": str, "report": str, "labels": dict,
         "targets": dict, "graph": dict, "original_report": str, "omitted": str,
         "hard_negatives": list}


class Manifest:
    """Lazy rows of a manifest; a memory-mapped sidecar holds 24 bytes a line.

    path: JSON Lines; PATH.index.npy beside it is rebuilt when the manifest's size or time changes,
    and kept in memory if the folder is not writable. split: train, val, test or all. image_root
    replaces every record's "root". Columns, an entry a row: .patients int64 hash, .bits uint16 (bit
    k: CONDITIONS[k] is 1; LABELLED and WITH_GRAPH: the report and each hard negative have these),
    .hard_negatives uint8 (how many). ValueError names file and line.
    """

    def __init__(self, path, split="all", image_root=None):
        expect(split in (*SPLITS, "all"), path, f"split train, val, test or all, got {split!r}")
        self.path, self.split, self.image_root = str(path), split, image_root
        self.index = _load_index(self.path)
        codes = (SPLITS.index(split),) if split != "all" else (0, 1, 2, NO_SPLIT)
        self.rows = np.flatnonzero(np.isin(self.index["split"], codes)).astype(np.int32)
        self.patients, self.bits, self.hard_negatives = (
            self.index[name][self.rows] for name in ("patient", "bits", "negatives"))
        self.file = open(self.path, "rb", buffering=0)

    def __reduce__(self):  # a worker opens the sidecar itself
        return Manifest, (self.path, self.split, self.image_root)

    def __len__(self):
        return len(self.rows)

    def line(self, i):
        """Line number in the file of row i."""
        return int(self.index["line"][self.rows[i]])

    def __getitem__(self, i):
        row, offsets = int(self.rows[i]), self.index["offset"]
        start, end = int(offsets[row]), int(offsets[(row + 1) % len(offsets)])  # header: file size
        raw = os.pread(self.file.fileno(), end - start, start)
        return _parse(f"{self.path}:{self.line(i)}", raw)

    def image_path(self, i, record=None):
        """Image of row i (whose record may be at hand) as a path; ValueError if out of its root."""
        where = f"{self.path}:{self.line(i)}"
        return image_path(where, record or self[i], self.path, self.image_root)


_real = functools.lru_cache(4096)(os.path.realpath)  # resolving a whole path costs 0.1 ms


def image_path(where, record, manifest, image_root=None):
    """The record's image as a path; ValueError if it would leave the image root."""
    root = _real(image_root or record.get("root") or os.path.dirname(manifest))
    path = os.path.normpath(os.path.join(root, record["image"]))
    folder, name = os.path.split(path)
    path = os.path.realpath(path) if os.path.islink(path) else os.path.join(_real(folder), name)
    inside = path.startswith(os.path.join(root, ""))
    expect(inside, where, "its image inside its root; where links lead to images, name their "
           "own folder by --image-root")
    return Path(path)


def _parse(where, raw):
    record = parse_line(where, raw)
    expect({"id", "image"} <= record.keys(), where, "a JSON object with id and image")
    _check_types(where, record)
    expect(record.get("split", "train") in SPLITS, where, "split train, val or test")
    return record


def _check_types(where, side):
    expect(isinstance(side, dict), where, "hard_negatives of objects")
    for name, kind in TYPES.items():
        expect(isinstance(side.get(name, kind()), kind), where, f"{name} as {kind.__name__}")


def _validate(where, record):
    """What _parse leaves open; ValueError names the line and what was expected."""
    try:
        for k, side in enumerate([record, *record.get("hard_negatives", ())]):
            _check_types(where, side)
            labels = side.get("labels", {})
            expect(set(labels) <= set(CONDITIONS) and set(labels.values()) <= {1, 0, -1}, where,
                   "labels of CheXpert's 14 conditions as 1, 0 or -1")
            whole = {"report", "omitted"} <= set(side) and side.get("condition") in CONDITIONS
            expect(k == 0 or whole, where, "condition, report and omitted in each hard negative")
            read_radgraph(side.get("graph", {}))
        expect(set(record.get("targets", {}).values()) <= {0, 1}, where, "targets as 0 or 1")
        pairs = record.get("adversarial", [])
        right = isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs)
        expect(right, where, "adversarial as a list of [present, absent]")
    except TypeError:  # a list among the values
        raise ValueError(f"{where}: expected labels and targets to be numbers") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


def _load_index(path):
    """Row 0 is a header of the manifest's size and time; row k describes its k-th record."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: expected a manifest, found no such file")
    stat, sidecar = os.stat(path), f"{path}.index.npy"
    stamp = (stat.st_size, stat.st_mtime_ns)
    try:
        index = np.load(sidecar, mmap_mode="r")
        if index.dtype == INDEX and (index["offset"][0], index["patient"][0]) == stamp:
            return index
    except (OSError, ValueError, EOFError, IndexError):
        pass  # absent or damaged: built anew
    index = np.fromiter(_index_rows(path, stamp), INDEX)
    with contextlib.suppress(OSError):  # a folder that is not writable
        with open_atomic(sidecar, "wb") as file:
            np.save(file, index)
        return np.load(sidecar, mmap_mode="r")
    return index


def _index_rows(path, stamp):
    yield *stamp, 0, 0, HEADER, 0
    offset = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                record = _parse(f"{path}:{line}", raw)
                _validate(f"{path}:{line}", record)  # once, so that later readers can trust it
                labels, split = record.get("labels", {}), record.get("split")
                bits = sum(1 << k for k, name in enumerate(CONDITIONS) if labels.get(name) == 1)
                sides = [record, *record.get("hard_negatives", ())]
                bits |= LABELLED * all({"report", "labels"} <= side.keys() for side in sides)
                bits |= WITH_GRAPH * all("graph" in side for side in sides)
                yield (offset, patient_hash(record.get("patient", record["id"])), line, bits,
                       SPLITS.index(split) if split else NO_SPLIT,
                       min(255, len(record.get("hard_negatives", ()))))
            offset += len(raw)


# ---------------------------------------------------------------- batches


class Studies(Dataset):
    """What training reads, indexed by (epoch, i); a sample is a pure function of (seed, epoch, i).

    manifest: rows of one split, with labels. image_size: S. tokenize: list of str -> dict of
    tensors. negatives: draw one stored hard negative anew each epoch; a study with none gets a
    report of this split with exactly one positive, its labels and graph (Sec. 4.1). graphs: add the
    RadGraph graphs. uncertain: see label_vector. An unreadable image is
    replaced by another study drawn from the same seed, so batches keep their size; "bad" lists it.
    """

    def __init__(self, manifest, *, image_size, tokenize, negatives, graphs, uncertain="positive",
                 seed=0):
        self.manifest, self.image_size, self.tokenize = manifest, image_size, tokenize
        self.negatives, self.graphs, self.uncertain = negatives, graphs, uncertain
        self.seed = seed
        bits = manifest.bits & ((1 << len(CONDITIONS) - 1) - 1)  # the 13 besides No Finding
        self.single = np.flatnonzero((bits > 0) & (bits & (bits - 1) == 0)).astype(np.int32)
        stored = manifest.hard_negatives > 0
        expect(not negatives or stored.all() or stored.any() and len(self.single), manifest.path,
               "hard_negatives to train with, and for studies without them reports of one positive "
               "label; run negations.py on it first")

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        epoch, i = (int(part) for part in key)
        rng, bad = np.random.default_rng((self.seed, epoch, i)), []
        while len(bad) < MAX_TRIES:
            record = self.manifest[i]
            try:
                path = self.manifest.image_path(i, record)
                image = read_image(path, at_least=self.image_size * 5 // 4)
                break
            except (OSError, ValueError):
                bad.append(i)
                i = int(rng.integers(len(self.manifest)))
        else:
            where = f"{self.manifest.path}:{self.manifest.line(bad[0])}"
            raise ValueError(f"{where}: expected images, {MAX_TRIES} in a row could not be read "
                             "(is --image-root right? see: python data.py check)")
        sample = {"index": i, "bad": bad, "pixels": pixels(image, self.image_size, rng)}
        sample |= self._text(record)
        if self.negatives:
            sample["hard"] = self._text(self._negative(record, rng))
        return sample

    def _text(self, record):
        return {"report": record.get("report", ""), "graph": record.get("graph", {}),
                "labels": label_vector(record.get("labels", {}), self.uncertain)}

    def _negative(self, record, rng):
        stored = record.get("hard_negatives")
        if stored:
            # ASSUMPTION: each epoch draws one of a study's stored hard negatives anew.
            return stored[rng.integers(len(stored))]
        # ASSUMPTION: not normal studies alone, but all without a stored negative draw a report.
        # ASSUMPTION: "a single positive entity" is one 1; uncertain findings may stand beside it.
        for _ in range(MAX_TRIES):
            other = self.manifest[self.single[rng.integers(len(self.single))]]
            if other.get("report") != record.get("report"):  # never a copy of the report itself
                break
        return other

    def collate(self, samples):
        """Samples -> one batch; tokens and graphs are made here, that is in the worker."""
        bad, images = sorted({i for s in samples for i in s["bad"]}), [s["pixels"] for s in samples]
        batch = {"pixels": torch.from_numpy(np.stack(images)),          # (B, 1, S, S)
                 "index": torch.tensor([s["index"] for s in samples]),  # (B,)
                 "bad": torch.tensor(bad, dtype=torch.int64)}
        for prefix, side in (("", samples), ("hard_", [s["hard"] for s in samples if "hard" in s])):
            if side:
                labels = np.stack([s["labels"] for s in side])
                batch[f"{prefix}labels"] = torch.from_numpy(labels)  # (B, 14)
                batch[f"{prefix}text"] = self.tokenize([s["report"] for s in side])
            if side and self.graphs:
                batch[f"{prefix}graph"] = collate_graphs([s["graph"] for s in side])
        return batch


class GlobalBatches:
    """Batch sampler: step s takes rows [s N, (s + 1) N) of one permutation an epoch, a rank its B.

    batch_size is N, a multiple of world; the last incomplete batch is dropped, so all ranks take
    equal steps; start is the first step (to resume inside an epoch). Yields lists of (epoch, i).
    """

    def __init__(self, num_studies, batch_size, seed, epoch, rank=0, world=1, start=0):
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"expected a batch size divisible by {world} ranks, got {batch_size}")
        if num_studies < batch_size:
            raise ValueError(f"expected at least {batch_size} studies (a batch), got {num_studies}")
        self.num_studies, self.seed, self.epoch = num_studies, seed, epoch
        self.share = batch_size // world  # B
        self.firsts = [step * batch_size + rank * self.share
                       for step in range(start, num_studies // batch_size)]

    def __len__(self):
        return len(self.firsts)

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_studies)
        for first in self.firsts:
            yield [(self.epoch, int(i)) for i in order[first:first + self.share]]


# ---------------------------------------------------------------- builders: what they share


class Download:
    """A set's official files, found by relative path or by name; no image is ever opened."""

    SUFFIXES = (".png", ".jpg", ".jpeg", *DICOM)

    def __init__(self, root):
        self.root, self.stems = Path(root), None

    def file(self, *names, required=True):
        """The first of these files, plain or .gz, in root or one folder below; else ValueError."""
        for name in names:
            for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
                for hit in sorted(self.root.glob(pattern)):
                    return hit
        expect(not required, self.root, f"the file {' or '.join(names)} (or .gz)")

    def table(self, names, *columns):
        """Rows of a CSV ("A|B": the first that is there) as ("FILE:LINE", dict), stripped."""
        path, line = self.file(*names.split("|")), 1
        csv.field_size_limit(1 << 27)
        try:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file)
                header = [name.strip() for name in next(rows, [])]
                right = set(columns) <= set(header)
                expect(right, f"{path}:1", f"the columns {', '.join(columns)}")
                for row in filter(None, rows):
                    line = rows.line_num
                    right = len(row) >= len(header) and not any(row[len(header):])
                    expect(right, f"{path}:{line}", f"{len(header)} fields")
                    yield f"{path}:{line}", dict(zip(header, map(str.strip, row), strict=False))
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{line}: expected UTF-8 after this line") from None
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{line}: expected a complete CSV file ({error})") from None

    def path(self, *candidates):
        """The first of these relative paths that is there, in any format, else None."""
        for path in map(Path, candidates):
            for suffix in (path.suffix, *self.SUFFIXES):
                if (self.root / path.with_suffix(suffix)).is_file():
                    return path.with_suffix(suffix).as_posix()
        return None

    def by_name(self, name):
        """The relative path of the file of this name, in any format (DICOM last), or None."""
        if self.stems is None:
            files = (Path(folder, f) for folder, _, files in os.walk(self.root, followlinks=True)
                     for f in files)
            files = [path for path in files if path.suffix.lower() in self.SUFFIXES]
            files.sort(key=lambda path: (path.suffix.lower() in DICOM, path), reverse=True)
            self.stems = {stem(path): path.relative_to(self.root).as_posix() for path in files}
        return self.stems.get(stem(name))


def stem(path):
    """File name without endings; OpenI's CXR2_IM-1.png and 2_IM-1.dcm.png are one image."""
    name = re.sub(r"(\.(dcm|dicom|png|jpe?g))+$", "", os.path.basename(path), flags=re.IGNORECASE)
    return re.sub(r"^CXR(\d+_)?(?=\d+_IM)", "", name)


def study(name, official, image, patient, split, **fields):
    """A record with "study" in place of "id"; image is None if the official one is not there."""
    fields = {key: value for key, value in fields.items() if value is not None}
    return {"study": name, "image": image or official, "there": image is not None,
            "patient": patient, "split": split} | fields


def read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError:
        raise ValueError(f"{path}:1: expected one JSON document in UTF-8") from None


VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": None, "none": None,
          "nan": None}
CLASS_NAMES = ({name.lower(): name for name in CONDITIONS}
               | {"effusion": "Pleural Effusion", "normal": "No Finding"})


def label(where, value):
    """1, 0, -1, or None if blank."""
    value = str(value).strip().lower()
    expect(value in VALUES, where, "a label 1, 0, -1 or blank")
    return VALUES[value]


def conditions_of(where, row):
    """CheXpert's 14 columns -> labels by name, blanks left out."""
    values = {name: label(where, row.get(name, "")) for name in CONDITIONS}
    return {name: value for name, value in values.items() if value is not None}


def class_name(name):
    """A set's class by its CheXpert name where one exists, else its own with spaces."""
    name = name.replace("_", " ").strip()
    return CLASS_NAMES.get(name.lower(), name)


def join_text(*sections):
    return " ".join(" ".join(text or "" for text in sections).split())


def permuted(items, share):
    """scikit-learn's train_test_split(items, test_size=share, random_state=0) -> rest, first."""
    order = np.random.RandomState(0).permutation(len(items))  # noqa: NPY002 (published splits)
    first = math.ceil(len(items) * share)
    return [items[k] for k in order[first:]], [items[k] for k in order[:first]]


def glorias_split(items):
    """GLoRIA's 70/15/15 split of each item, in order (the first half of the rest is test)."""
    train, rest = permuted(range(len(items)), 0.3)
    test, val = permuted(rest, 0.5)
    part = dict.fromkeys(train, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    return [part[k] for k in range(len(items))]


def write_manifest(name, records, root, out, keep_missing=False):
    """Writes the records that have an image (or all) -> the summary; a str says what is skipped."""
    root, seen, patients = Path(root).resolve(), set(), {}
    counts, skipped = Counter(), Counter()
    missing = f"image not there ({'kept' if keep_missing else 'left out'})"
    with open_atomic(out) as file:
        for record in tqdm(records, name, unit=" studies", disable=None):
            if isinstance(record, str):
                skipped[f"skipped: {record}"] += 1
                continue
            key = record.pop("study")
            identity = f"{name}/{key}/{stem(record['image'])}" if key in seen else f"{name}/{key}"
            seen.add(key)
            there = record.pop("there", True)
            counts[missing] += not there
            if there or keep_missing:
                counts.update(("studies", record["split"]))
                patients.setdefault(record["patient"], set()).add(record["split"])
                line = {"id": identity, "root": str(root), **record}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        expect(counts["studies"] or counts[missing], root, f"studies of {name} here, none is left "
               f"{dict(skipped) or ''}")
        expect(counts["studies"], root, f"the images of {name} here, {counts[missing]} are missing "
               f"(--keep-missing keeps such studies) {dict(skipped) or ''}")
    shared = sum(len(splits) > 1 for splits in patients.values())
    return aligned({key: counts[key] for key in ("studies", *SPLITS, missing)}
                   | {"patients": len(patients), "patients in two splits": shared} | skipped)


def aligned(rows):
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {n:>9,}" for name, n in rows.items())


# ---------------------------------------------------------------- builders, one a set (Sec. 5.1)

MESH = {"Pulmonary Atelectasis": "Atelectasis", "Cardiomegaly": "Cardiomegaly", "Mass": "Mass",
        "Pleural Effusion": "Pleural Effusion", "Infiltrate": "Infiltration", "Nodule": "Nodule",
        "Pneumonia": "Pneumonia", "Pneumothorax": "Pneumothorax", "Consolidation": "Consolidation",
        "Pulmonary Edema": "Edema", "Emphysema": "Emphysema", "Pulmonary Emphysema": "Emphysema",
        "Bullous Emphysema": "Emphysema", "Pulmonary Fibrosis": "Fibrosis", "Fibrosis": "Fibrosis",
        "Thickening/pleura": "Pleural Thickening", "Hernia, Hiatal": "Hernia",
        "normal": "No Finding"}


def build_openi(official, args):
    """OpenI: Kaggle's two tables, else the official XML; targets from the human MeSH indexing"""
    kaggle = official.file("indiana_reports.csv", required=False)
    for uid, names, report, mesh in (_openi_kaggle if kaggle else _openi_xml)(official):
        if not names or not report:
            yield "neither findings nor impression" if names else "no frontal image listed"
            continue
        parts = [tag.strip().split("/") for tag in mesh]
        found = {MESH.get("/".join(part[:k])) for part in parts for k in (1, 2)}
        indexed = ["No Indexing"] not in parts  # else nobody looked for findings
        targets = {name: int(name in found) for name in MESH.values()} if indexed else None
        for name in names:
            yield study(uid, name, official.by_name(name), uid, split_of(uid), report=report,
                        targets=targets)


def _openi_kaggle(official):
    frontal = {}
    for where, row in official.table("indiana_projections.csv", "uid", "filename", "projection"):
        expect(row["projection"] in ("Frontal", "Lateral"), where, "projection Frontal or Lateral")
        if row["projection"] == "Frontal":
            frontal.setdefault(row["uid"], []).append(f"images/{row['filename']}")
    for _, row in official.table("indiana_reports.csv", "uid", "MeSH", "findings", "impression"):
        report = join_text(row["findings"], row["impression"])
        yield row["uid"], frontal.get(row["uid"], []), report, row["MeSH"].split(";")


def _openi_xml(official):
    for name, data in _openi_files(official):
        tree = parse_xml(name, data)
        text = {node.get("Label"): node.text for node in tree.iter("AbstractText")}
        names = [f"{node.get('id')}.png" for node in tree.iter("parentImage")]
        uid = tree.find("uId[@id]")
        expect(uid is not None, name, "a uId with an id")
        yield (uid.get("id").removeprefix("CXR"), names[:1],  # the view is unknown: the first image
               join_text(text.get("FINDINGS"), text.get("IMPRESSION")),
               [node.text or "" for node in tree.iterfind("MeSH/major")])


def _openi_files(official):
    files = [*official.root.glob("ecgen-radiology/*.xml")] or [*official.root.glob("*.xml")]
    for path in sorted(files, key=lambda path: (len(path.stem), path.stem)):
        with open(path, "rb") as file:
            yield str(path), file.read(MAX_XML_BYTES + 1)
    if files:
        return
    archive = official.file("NLMCXR_reports.tgz")
    try:
        with tarfile.open(archive) as tar:
            for member in (m for m in tar if m.isfile() and m.name.endswith(".xml")):
                data = tar.extractfile(member).read(MAX_XML_BYTES + 1)
                yield f"{archive}:{member.name}", data
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: expected a complete archive ({error})") from None


class NoDoctype(TreeBuilder):
    """Entities, which may grow without bound or name local files, need a DOCTYPE."""

    def doctype(self, *_):
        raise ParseError("DOCTYPE")


def parse_xml(name, data):
    """XML bytes -> root; a DOCTYPE, more than MAX_XML_BYTES and broken XML are a ValueError."""
    expect(len(data) <= MAX_XML_BYTES, name, f"at most {MAX_XML_BYTES} bytes of XML")
    try:
        return XML(data, XMLParser(target=NoDoctype()))
    except (ParseError, LookupError, ValueError) as error:  # the last two: unknown encodings
        raise ValueError(f"{name}: expected well-formed XML without DOCTYPE ({error})") from None


HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ()/,-]+):(?=\s)", re.MULTILINE)  # of a MIMIC-CXR report


def parse_report(text):
    """The findings and the impression of a MIMIC-CXR report, "" where there is no such section."""
    parts = HEADING.split(text)[1:]
    sections = list(zip(parts[::2], parts[1::2], strict=True))
    return [join_text(*(body for heading, body in sections if heading.startswith(names)))
            for names in (("FINDING",), ("IMPRESSION", "CONCLUSION"))]


def build_mimic(official, args):
    """MIMIC-CXR-JPG with MIMIC-CXR's reports (files/pNN/PATIENT/STUDY.txt); frontal views"""
    splits = {row["dicom_id"]: row["split"].replace("validate", "val")
              for _, row in official.table("mimic-cxr-2.*-split.csv", "dicom_id", "split")}
    tables = official.table("mimic-cxr-2.*-chexpert.csv", "study_id", *CONDITIONS)
    labels = {row["study_id"]: conditions_of(where, row) for where, row in tables}
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    for where, row in official.table("mimic-cxr-2.*-metadata.csv", *columns):
        name, subject, number, view = (row[column] for column in columns)
        folder = f"files/p{subject[:2]}/p{subject}/s{number}"
        if view not in ("PA", "AP"):
            yield "view not PA or AP"
            continue
        expect(splits.get(name) in SPLITS, where, "its dicom_id in mimic-cxr-2.*-split.csv, "
               "with split train, validate or test")
        texts = (official.root / base / f"{folder}.txt" for base in ("", "mimic-cxr-reports"))
        text = next(filter(Path.is_file, texts), None)
        try:
            report = text and join_text(*parse_report(text.read_text("utf-8", "replace")))
        except OSError as error:  # whose message names the patient
            raise OSError(f"{where}: expected to read its report ({error.strerror})") from None
        if not report:
            yield ("neither findings nor impression" if report is not None else
                   "no report file files/pNN/PATIENT/STUDY.txt here or in mimic-cxr-reports")
            continue
        image = f"{folder}/{name}.jpg"
        yield study(name, image, official.path(image), subject, splits[name], report=report,
                    labels=labels.get(number, {}), study_id=number)


def build_chexpert_plus(official, args):
    """CheXpert Plus: its CSV, CheXbert labels and RadGraph-XL graphs; frontal views"""
    files = (official.file(f"chexbert_labels/{part}_fixed.json", required=False)
             for part in ("findings", "impression"))
    labels = [{row["path_to_image"]: conditions_of(f"{file}:{line}", row)
               for line, row in read_jsonl(file)} for file in files if file]
    columns = ("path_to_image", "frontal_lateral", "deid_patient_id", "split")
    parts = ("section_findings", "section_impression")
    files = {part: official.file(f"radgraph-XL-annotations/{part}.json", required=False)
             for part in parts}
    graphs = {part: iter(read_json(file)) for part, file in files.items() if file}
    for where, row in official.table("df_chexpert_plus_*.csv", *columns, *parts):
        own = [next(graphs[part], None) for part in graphs  # only sections of two words have one
               if len(row[part].split()) >= 2]
        expect(None not in own, where, "a graph for each section, the list ends before")
        path, view, patient, split = (row[column] for column in columns)
        report = join_text(*(row[part] for part in parts))
        if view != "Frontal" or not report:
            yield "neither findings nor impression" if view == "Frontal" else "not frontal"
            continue
        found = merge_labels(*(table.get(path, {}) for table in labels)) if labels else None
        yield study("/".join(path.split("/")[-3:-1]), path, official.path(path, f"PNG/{path}"),
                    patient, split.replace("valid", "val"), report=report, labels=found,
                    graph=merge_graphs(where, own) if own else None)
    for part in graphs:
        expect(next(graphs[part], None) is None, files[part], "one graph a section, got more")


def merge_labels(*sections):
    """Labels of a report from those of its sections: positive over uncertain over negative."""
    order, both = (0, -1, 1), {}
    for name, value in (item for labels in sections for item in labels.items()):
        both[name] = max(both.get(name, 0), value, key=order.index)
    if any(both.get(name) in (1, -1) for name in CONDITIONS[:-2]):  # support devices aside
        both.pop("No Finding", None)
    return both


def merge_graphs(where, records):
    """RadGraph records of consecutive sections -> one record."""
    words, entities = [], {}
    for record in (record.get("0", record) for record in records):
        right = isinstance(record.get("entities"), dict) and isinstance(record.get("text"), str)
        expect(right, where, "RadGraph records with text and entities")
        shift, start = len(entities), len(words)
        for key, entity in record["entities"].items():
            entities[str(int(key) + shift)] = entity | {
                "start_ix": entity["start_ix"] + start, "end_ix": entity["end_ix"] + start,
                "relations": [[kind, str(int(to) + shift)] for kind, to in entity["relations"]]}
        words += record["text"].split(" ")
    return {"text": " ".join(words), "entities": entities}


def build_chexpert5x200(official, args):
    """CheXpert 5x200: GLoRIA's chexpert_5x200.csv (it has no seed) beside CheXpert's images"""
    names = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    tables = "chexpert_5x200.csv|chexpert_8x200.csv"
    for where, row in official.table(tables, "Path", *names):
        path, short = row["Path"], row["Path"].split("/", 1)[-1]
        expect(path.count("/") > 2, where, "Path as CheXpert-v1.0/train/PATIENT/STUDY/IMAGE")
        patient, number = path.split("/")[-3:-1]
        there = official.path(path, short, f"CheXpert-v1.0/{short}", f"CheXpert-v1.0-small/{short}")
        yield study(f"{patient}/{number}", path, there, patient, "test",
                    targets={name: int(label(where, row[name]) == 1) for name in names},
                    report=join_text(row.get("Report Impression")) or None)


def build_rsna(official, args):
    """RSNA pneumonia: stage 2 labels, GLoRIA's split; rsna-ab is without class Normal"""
    found, classes = Counter(), {}
    for where, row in official.table("stage_2_train_labels.csv", "patientId", "Target"):
        found[row["patientId"]] |= label(where, row["Target"]) == 1
    if args.command == "rsna-ab":
        known = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
        for where, row in official.table("stage_2_detailed_class_info.csv", "patientId", "class"):
            expect(row["class"] in known, where, f"class {', '.join(known)}")
            classes[row["patientId"]] = row["class"]
    names = sorted(found)
    for name, split in zip(names, glorias_split(names), strict=True):
        yield "class Normal" if classes.get(name) == "Normal" else study(
            name, f"stage_2_train_images/{name}.dcm", official.by_name(name), name, split,
            targets={"Pneumonia": found[name]})


def build_siim(official, args):
    """SIIM pneumothorax: masks to labels, one line an image, GLoRIA's shares"""
    rows, found = [], Counter()
    tables = "train-rle.csv|stage_2_train.csv|*train-rle.csv"
    for _, row in official.table(tables, "ImageId", "EncodedPixels"):
        rows.append(row["ImageId"])
        found[row["ImageId"]] |= row["EncodedPixels"] not in ("", "-1")
    # DIFFERS from Sec. 5.1: SIIM is split by image, not by row, so that none leaks into test.
    names = rows if args.glorias_rows else sorted(found)
    for k, (name, split) in enumerate(zip(names, glorias_split(names), strict=True)):
        yield study(f"{name}/{k}" if args.glorias_rows else name, f"dicom-images-train/{name}.dcm",
                    official.by_name(name), name, split, targets={"Pneumothorax": found[name]})


def build_vindr(official, args):
    """VinDr-CXR: consensus for test, any reader for train; Kaggle's train.csv is split by hash"""
    kaggle = not official.file("image_labels_test.csv", required=False)
    mark = "class_name" if kaggle else "No finding"
    for part in ("train",) if kaggle else ("train", "test"):
        file = "train.csv" if kaggle else f"image_labels_{part}.csv"
        found = _vindr_labels(official.table(file, "image_id", mark), kaggle)
        names = sorted(found)
        # ASSUMPTION: VinDr's val is CXR-CLIP's 20 % of the train images, drawn from the sorted ids.
        val = set(permuted(names, 0.2)[1]) if part == "train" else ()
        for name in names:
            targets = found[name] | {"No Finding": int(not any(found[name].values()))}
            split = split_of(name) if kaggle else "val" if name in val else part
            yield study(name, f"{part}/{name}.dicom", official.by_name(name), name, split,
                        targets=targets)


def _vindr_labels(rows, kaggle):
    """image id -> 0 or 1 of every finding: 1 if any reader marked it."""
    found, classes = {}, {}
    for where, row in rows:
        own = found.setdefault(row.pop("image_id"), set())
        marks = {row["class_name"]: 1} if kaggle else row
        marks = {class_name(name): label(where, value) for name, value in marks.items()
                 if name.lower() != "rad_id"}
        own |= {name for name, value in marks.items() if value == 1}
        classes |= marks
    return {image: {name: int(name in own) for name in classes if name != "No Finding"}
            for image, own in found.items()}


CXR14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
         "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
         "Hernia", "No Finding")


def build_cxr14(official, args):
    """ChestX-ray14: Data_Entry_2017 with the official lists, else split by patient"""
    pairs = probmed_pairs(args.probmed) if args.probmed else None
    lists = [official.file(f"{name}_list.txt", required=False) for name in ("train_val", "test")]
    known, test = (set(map(stem, f.read_text().split())) if f else set() for f in lists)
    if not all(lists):
        print("no train_val_list.txt and test_list.txt: split by patient, not the official split")
    tables = "Data_Entry_2017_v2020.csv|Data_Entry_2017*.csv"
    for where, row in official.table(tables, "Image Index", "Finding Labels", "Patient ID"):
        own, patient = row["Finding Labels"].split("|"), row["Patient ID"]
        name = stem(row["Image Index"])
        expect(set(own) <= set(CXR14), where, f"Finding Labels out of {', '.join(CXR14)}")
        right = name in known or name in test or not all(lists)
        expect(right, where, "its image in one of the official lists")
        if pairs is not None and name not in pairs:
            yield "not among ProbMed's images"
            continue
        split = split_of(patient)
        if all(lists):
            split = "test" if name in test else "val" if split == "val" else "train"
        yield study(name, f"images/{row['Image Index']}", official.by_name(name), patient, split,
                    targets={class_name(c): int(c in own) for c in CXR14},
                    **(pairs or {}).get(name, {}))


def probmed_pairs(path):
    """ProbMed's test.json -> per image its question pairs and the classes of its entity pairs."""
    def asked_class(question):
        text = question.lower().replace("_", " ")
        hits = [name for name in CXR14 if name.lower().replace("_", " ") in text]
        return class_name(max(hits, key=len)) if hits else None

    asked, out = {}, {}
    for k, item in enumerate(read_json(path)):
        right = isinstance(item, dict) and {"image", "qa_type", "question"} <= item.keys()
        expect(right, path, f"image, qa_type and question in entry {k}")
        asked.setdefault(stem(item["image"]), {})[item["qa_type"]] = item["question"]
    for image, own in asked.items():
        pairs = {kind: (question, own[kind.replace("_gt", "_hallu")])
                 for kind, question in own.items()
                 if "_gt" in kind and kind.replace("_gt", "_hallu") in own}
        classes = [[*map(asked_class, pairs[kind])] for kind in pairs if kind.startswith("entity")]
        out[image] = {"questions": pairs, "adversarial": [pair for pair in classes if all(pair)]}
    return out


def build_cxr_align(official, args):
    """CXR-Align's cxr-align.json (Sec. 3) beside its images"""
    file = official.file("cxr-align.json")
    sources = read_json(file)
    right = isinstance(sources, dict) and all(isinstance(x, dict) for x in sources.values())
    expect(right, file, "an object of sources, each an object of entries by image")
    for source, items in sources.items():
        for k, (name, item) in enumerate(items.items()):
            expect(isinstance(item, dict), file, f"an object in {source}, entry {k}")
            texts = [item.get(key) for key in ("report", "negation", "omitted")]
            condition = CLASS_NAMES.get(str(item.get("chosen")).lower())
            expect(condition and all(isinstance(text, str) for text in texts), file,
                   f"chosen, report, negation and omitted in {source}, entry {k}")
            path = official.by_name(name)
            patient = re.search(r"/p(\d{8})/", path or "")  # in MIMIC-CXR-JPG's folders
            negative = {"condition": condition, "omitted": texts[2], "report": texts[1],
                        "position": item.get("location")}
            yield study(name, f"images/{name}.jpg", path, patient[1] if patient else name, "test",
                        report=texts[0], labels=label_report(texts[0]), hard_negatives=[negative])


# ---------------------------------------------------------------- the phantom: drawings and reports

NORMALS = {  # Tab. 1
    "No acute cardiopulmonary process.": 15829, "No acute intrathoracic process.": 4643,
    "No acute cardiopulmonary abnormality.": 4488, "No evidence of pneumonia.": 1014,
    "No evidence of acute cardiopulmonary process.": 1255}
DUPLICATE = "No active lung lesion."  # Tab. 3: the one sentence of all added normal studies

# condition: (weight, what often comes along, noun phrases); * severity, < side, ^ zone
PHANTOM = {
    "Enlarged Cardiomediastinum": (0.6, (), "* widening of the mediastinum|* mediastinal widening"),
    "Cardiomegaly": (1.2, (), "* cardiomegaly|* enlargement of the heart|* cardiac enlargement"),
    "Lung Opacity": (1.0, (), "* hazy opacity in the < ^ lung|ill-defined < ^ lung opacity"),
    "Lung Lesion": (0.9, (), "* < ^ lung nodule|* rounded nodule in the < ^ lung|< ^ lung mass"),
    "Edema": (0.8, ("Cardiomegaly", "Pleural Effusion"), "* pulmonary edema|* interstitial edema"),
    "Consolidation": (0.9, (), "* consolidation in the < ^ lung|* focal < ^ lobe consolidation"),
    "Pneumonia": (1.0, ("Lung Opacity",), "< ^ lobe pneumonia|* pneumonia in the < ^ lung"),
    "Atelectasis": (1.0, (), "* < basilar atelectasis|* atelectasis at the < base|< atelectasis"),
    "Pneumothorax": (0.9, ("Support Devices", "Fracture"), "* < pneumothorax|< pneumothorax"),
    "Pleural Effusion": (1.3, ("Atelectasis",), "* < pleural effusion|* effusion on the <"),
    "Pleural Other": (0.5, (), "* < pleural thickening|< lateral pleural thickening"),
    "Fracture": (0.6, (), "< rib fracture|* displaced < rib fracture|fracture of several < ribs"),
    "Support Devices": (0.8, (), "#|# in place|# in standard position")}
SEVERITY = (("mild", "slight", "minimal"), ("moderate",), ("severe", "marked", "extensive"))
FRAMES = ("there is {}.|{}.|{} is present.|{} is noted.|{} is seen.|findings show {}.|stable {}.|"
          "{}, unchanged from the prior study.|compared to the prior study, there is {}.|"
          "unchanged {}.|{} is again seen.|no significant change in {}.|"
          "{} has increased since the previous examination.|new {} since the prior radiograph.")
ABSENT = {
    "Cardiomegaly": "the heart is normal in size.|heart size is normal.|no cardiomegaly.",
    "Enlarged Cardiomediastinum": "normal mediastinal contours.|the mediastinum is not widened.",
    "Pleural Effusion": "no pleural effusion.|there is no effusion on either side.",
    "Pneumothorax": "no pneumothorax.|there is no evidence of pneumothorax.|no pneumothorax seen.",
    "Consolidation": "no focal consolidation.|there is no consolidation.",
    "Edema": "no pulmonary edema.|there is no evidence of edema.", "Fracture": "no rib fracture.",
    "Pneumonia": "no evidence of pneumonia.|no pneumonia.", "Atelectasis": "no atelectasis.",
    "Lung Lesion": "no nodule or mass."}
REMARKS = ("frontal view of the chest.|comparison is made to the prior study.|"
           "the patient is rotated.|single portable view of the chest.")
DEVICES = {  # path on the image; the pacemaker has its box too
    "left chest pacemaker": [(0.5, -0.5), (0.2, -0.42), (0.02, -0.1), (0.0, 0.3), (0.22, 0.5)],
    "right internal jugular catheter": [(-0.22, -0.98), (-0.15, -0.6), (-0.1, -0.2), (-0.08, 0.1)],
    "endotracheal tube": [(0.01, -1), (0.0, -0.6), (0.02, -0.28)],
    "nasogastric tube": [(0.02, -1), (0.03, 0.2), (0.10, 0.62), (0.3, 0.72)]}


def build_phantom(official, args):
    """Drawn chests with matching reports: the embedded default, no patient's data"""
    studies, size, normal, more = args.studies, args.size, args.normal_fraction, args.duplicates
    if not 0 <= normal <= 1 or studies < 1 or more < 0 or not 32 <= size <= 2048:
        raise ValueError("expected at least 1 study of 32 to 2048 pixels, no negative number of "
                         "duplicates and a normal fraction of 0 to 1")
    (official.root / "images").mkdir(parents=True, exist_ok=True)
    share = np.array(list(NORMALS.values())) / sum(NORMALS.values())
    for i in range(studies + more):
        rng, extra = np.random.default_rng((args.seed, i)), i >= studies
        found = {} if extra or rng.random() < normal else _draw_findings(rng)
        report = _write_report(found, rng) if found else str(rng.choice(list(NORMALS), p=share))
        patient = f"D{i}" if extra else f"P{i * 2 // 3}"  # every second patient has two
        image = f"images/{i:06d}.png"
        _draw_chest(found, size, rng).save(official.root / image, compress_level=0)
        targets = {name: int(name in found) for name in CONDITIONS[:-1]}
        targets["No Finding"] = int(not set(found) - {"Support Devices"})
        yield {"study": f"{i:06d}", "image": image, "patient": patient,
               "split": "train" if extra else split_of(f"{args.seed}/{patient}"),
               "report": DUPLICATE if extra else report, "targets": targets,
               "severity": {name: round(finding.amount, 2) for name, finding in found.items()}}


def _draw_findings(rng):
    share = np.array([weight for weight, _, _ in PHANTOM.values()])
    count = rng.choice([1, 2, 3], p=[0.55, 0.30, 0.15])
    names = set(rng.choice(list(PHANTOM), count, replace=False, p=share / share.sum()).tolist())
    names |= {other for name in sorted(names) for other in PHANTOM[name][1] if rng.random() < 0.3}
    return {name: SimpleNamespace(amount=float(rng.uniform(0.25, 1.0)), zone=int(rng.integers(3)),
                                  side=int(rng.choice((-1, 1))),  # -1: the patient's right
                                  device=str(rng.choice(list(DEVICES))))
            for name in PHANTOM if name in names}


def _write_report(found, rng):
    def pick(options):
        return options[rng.integers(len(options))]

    sentences = []
    for name, finding in found.items():
        words = {"*": pick(SEVERITY[min(2, int((finding.amount - 0.25) * 4))]), "#": finding.device,
                 "<": "right" if finding.side < 0 else "left",
                 "^": ("upper", "mid", "lower")[finding.zone]}
        phrase = pick(PHANTOM[name][2].split("|"))
        for sign, word in words.items():
            phrase = phrase.replace(sign, word)
        frames = FRAMES.split("|")[:-2 if name == "Support Devices" else None]
        sentences.append(pick(frames).format(phrase))
    absent = rng.permutation([name for name in ABSENT if name not in found])[:rng.integers(4)]
    single = {"Cardiomegaly", "Enlarged Cardiomediastinum", "Lung Lesion"}  # odd in a list
    if len(absent) == 3 and not single & set(absent):
        sentences.append("no {}, {} or {}.".format(*map(str.lower, absent)))
    else:
        sentences += [pick(ABSENT[name].split("|")) for name in absent]
    sentences += [pick(REMARKS.split("|"))] if rng.random() < 0.3 else []
    order = rng.permutation(len(sentences))
    return " ".join(sentences[k][0].upper() + sentences[k][1:] for k in order)


def _step(distance, softness=0.04):
    """0 outside, 1 inside, a ramp of that width around distance 0."""
    return np.clip(distance / softness + 0.5, 0, 1)


def _blend(image, mask, value):
    image += (value - image) * mask


def _line(x, y, points, width):
    """A polyline of that half width, at least half a pixel."""
    width, best = max(width, 1.2 / len(x)), np.full_like(x, 9)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        best = np.minimum(best, (x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2)
    return _step(width - np.sqrt(best), width)


def _ellipse(x, y, x0, y0, rx, ry):
    """1 at the centre, 0 on the border, negative outside."""
    return 1 - np.sqrt(((x - x0) / rx) ** 2 + ((y - y0) / ry) ** 2)


def _noise(size, rng, cells):
    small = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _draw_chest(found, size, rng):
    """A frontal chest, its right on the left: x in -1..1, y from -1 (neck) to 1 (abdomen)."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    turn, dx, dy, zoom = rng.normal((0, 0, 0, 1), (0.04, 0.03, 0.03, 0.04)).tolist()
    across, down = zoom * (axis[None] - dx), zoom * (axis[:, None] - dy)
    x, y = across + turn * down, down - turn * across  # (S, S)
    u, texture = np.abs(x), _noise(size, rng, 16) + 0.6 * _noise(size, rng, 6)
    body = _step(0.28 + 0.66 * _step(y + 0.86, 0.30) ** 0.6 - u + 0.04 * np.cos(2 * y))
    image = 0.05 + body * (0.47 + 0.06 * np.clip(u, 0, 1))
    chest = SimpleNamespace(x=x, y=y, u=u, texture=texture, body=body, image=image, rng=rng)
    _blend(image, 0.8 * body * _step(y - 0.5, 0.5), 0.68)  # abdomen
    chest.lungs = {side: _draw_lung(chest, found.get("Atelectasis"), side) for side in (-1, 1)}
    big, wide = (found[name].amount if name in found else 0
                 for name in ("Cardiomegaly", "Enlarged Cardiomediastinum"))
    half = rng.uniform(0.13, 0.17) + 0.20 * wide * np.exp(-((y + 0.3) / 0.32) ** 2)
    _blend(image, _step(half - u, 0.10), 0.66)  # mediastinum
    _blend(image, 0.5 * _step(0.05 - u) * _step(-0.4 - y), 0.42)  # trachea
    rx, ry = rng.uniform(0.27, 0.33) + 0.24 * big, rng.uniform(0.27, 0.33) + 0.08 * big
    heart = _ellipse(x + 0.25 * (y - 0.4), y, 0.12 + 0.07 * big, 0.40, rx, ry)
    _blend(image, 0.95 * _step(heart, 0.16), 0.66 + 0.03 * texture)
    _blend(image, 0.8 * _step(_ellipse(x, y, 0.14, -0.38, 0.11, 0.11), 0.3), 0.66)  # aortic knob
    bubble = _ellipse(x, y, 0.42, 0.80, 0.16, 0.08) + 0.1 * texture  # in the stomach
    _blend(image, 0.8 * _step(bubble, 0.5), 0.40)
    for name, finding in found.items():
        _draw_finding(chest, name, finding)
    _draw_bones(chest, found.get("Fracture"))
    if "Support Devices" in found:
        device = found["Support Devices"].device
        _blend(image, _line(x, y, DEVICES[device], 0.025 if "endo" in device else 0.012), 1.0)
        box = 0.10 - np.maximum(np.abs(x - 0.55), 1.2 * np.abs(y + 0.55))
        _blend(image, _step(box, 0.03) * ("pacemaker" in device), 1.0)
    image = np.clip(image, 0, 1) ** rng.uniform(0.85, 1.2) * rng.uniform(0.88, 1.08)
    image += rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    return Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))


def _draw_lung(chest, atelectasis, side):
    """One lung; s is the outward coordinate, so that both sides share one geometry."""
    rng, y, s = chest.rng, chest.y, side * chest.x
    outer = rng.uniform(0.76, 0.83) * np.sqrt(np.clip(1 - ((y - 0.3) / 1.16) ** 2, 0, 1))
    raised = 0.14 * atelectasis.amount if atelectasis and atelectasis.side == side else 0
    dome = rng.uniform(0.50, 0.58) + 0.03 * side - raised + 0.24 * ((s - 0.38) / 0.42) ** 2
    mask = _step(outer - s, 0.06) * _step(s - 0.10, 0.06) * _step(dome - y)
    angle = np.arctan2(y - 0.02, s - 0.16) * int(rng.integers(9, 13)) + rng.uniform(0, 6)
    vessels = 0.06 * np.clip(np.cos(angle + 0.8 * chest.texture), 0, 1) ** 2 * _step(0.6 - s, 0.7)
    hilum = 0.14 * np.exp(-((s - 0.24) / 0.14) ** 2 - ((y - 0.02) / 0.30) ** 2)
    _blend(chest.image, mask, 0.20 + 0.035 * chest.texture + vessels + hilum)
    return SimpleNamespace(s=s, outer=outer, mask=mask)


def _draw_finding(chest, name, finding):
    """The look of one condition; a in 0.25..1 is its severity."""
    rng, y, u, texture, image = chest.rng, chest.y, chest.u, chest.texture, chest.image
    lung, a = chest.lungs[finding.side], finding.amount
    s, mask, outer = lung.s, lung.mask, lung.outer
    cx, cy = rng.uniform(0.32, 0.52), rng.uniform(-0.06, 0.06) + (-0.38, -0.02, 0.30)[finding.zone]
    if name == "Lung Opacity":  # hazy, no edge
        patch = _step(_ellipse(s, y, cx, cy, 0.42, 0.36) + 0.1 * texture - 0.5, 1.0)
        _blend(image, mask * (0.3 + 0.35 * a) * patch, 0.62)
    elif name == "Lung Lesion":  # round, sharp
        radius = 0.05 + 0.08 * a
        _blend(image, mask * 0.85 * _step(_ellipse(s, y, cx, cy, radius, radius), 0.4), 0.64)
    elif name == "Edema":  # both lungs: butterfly haze and septal lines
        haze = np.exp(-((u - 0.30) / 0.30) ** 2 - ((y - 0.05) / 0.42) ** 2)
        lines = np.clip(np.sin(50 * y + 4 * texture), 0, 1) * _step(u - 0.5, 0.3)
        both = chest.lungs[-1].mask + chest.lungs[1].mask
        _blend(image, both * a * (0.75 * haze + 0.2 * lines), 0.62)
    elif name == "Consolidation":  # dense, with dark bronchi
        ellipse = _ellipse(s, y, cx, cy, 0.20 + 0.16 * a, 0.12 + 0.10 * a)
        bronchi = _line(s, y, [(0.15, cy - 0.1), (cx, cy), (cx + 0.3, cy + 0.12)], 0.02)
        _blend(image, mask * _step(ellipse + 0.1 * texture, 0.3) * (0.9 - 0.4 * bronchi), 0.64)
    elif name == "Pneumonia":  # several soft patches
        spots = np.stack([rng.normal(cx, 0.12, 6), rng.normal(cy, 0.11, 6)], 1)
        patches = sum(_step(_ellipse(s, y, *spot, 0.15, 0.13) + 0.1 * texture - 0.35, 1.2)
                      for spot in spots.tolist())
        _blend(image, mask * np.clip((0.4 + 0.5 * a) * patches, 0, 0.9), 0.62)
    elif name == "Atelectasis":  # bands above a raised diaphragm
        for k in range(1 + int(3 * a)):
            ends = rng.uniform(((0.15, 0.27), (0.55, 0.27)), ((0.30, 0.37), (0.72, 0.37)))
            band = _line(s, y + 0.1 * k, ends.tolist(), 0.012 + 0.012 * a)
            _blend(image, mask * band * np.clip(0.6 + 0.15 * texture, 0, 1), 0.64)
    elif name == "Pneumothorax":  # a dark rim without vessels, inside it the pleural line
        gap = (0.04 + 0.18 * a) * _step(0.35 - y, 0.9) + 0.10 * a * _step(-0.45 - y, 0.3)
        depth = outer - s - gap
        _blend(image, mask * _step(-depth), 0.09)
        _blend(image, mask * 0.6 * _step(0.014 - np.abs(depth), 0.03) * _step(0.3 - y, 0.1), 0.55)
    elif name == "Pleural Effusion":  # a meniscus, highest at the chest wall
        level = 0.66 - 0.52 * a - 0.50 * np.clip(s - 0.42, 0, 1) + 0.01 * texture
        inside = _step(outer - s, 0.06) * _step(s - 0.08) * chest.body
        _blend(image, 0.95 * inside * _step(y - level, 0.14), 0.66)
    elif name == "Pleural Other":  # an irregular bright rim
        rim = 0.04 + 0.09 * a + 0.03 * np.sin(9 * y + 20 * cx)
        side = _step(s - outer + rim, 0.06) * _step(0.45 - np.abs(y + 0.05), 0.3)
        _blend(image, 0.85 * mask * side, 0.62)


def _draw_bones(chest, fracture):
    rng, y, u, image = chest.rng, chest.y, chest.u, chest.image
    slope = y - 0.42 * u + 1.1 * np.clip(u - 0.55, 0, 1) ** 2
    phase = slope * rng.uniform(4.3, 4.9) + rng.random()
    wall = 0.86 * np.sqrt(np.clip(1 - ((y - 0.3) / 1.22) ** 2, 0, 1))
    cage = _step(wall - u, 0.08) * _step(0.62 - y, 0.2) * _step(u - 0.1, 0.2)
    if fracture:  # the outer parts of some ribs are displaced, with a bright edge
        s, cy, cx = fracture.side * chest.x, rng.uniform(-0.25, 0.20), rng.uniform(0.50, 0.62)
        near = _step(0.14 + 0.14 * fracture.amount - np.abs(y - cy), 0.06)
        phase = phase + (0.35 + 0.15 * fracture.amount) * near * _step(s - cx, 0.03)
        edge = near * _step(0.03 - np.abs(s - cx), 0.03)
        _blend(image, (0.25 + 0.25 * fracture.amount) * edge, 0.85)
    image += 0.11 * cage * np.clip(np.cos(2 * np.pi * phase), 0, 1) ** 1.5
    for side in (-1, 1):
        collar = _line(side * chest.x, y, [(0.08, -0.62), (0.42, -0.70), (0.80, -0.82)], 0.03)
        _blend(image, 0.4 * collar, 0.78)
    image += 0.05 * _step(0.06 - u) * np.cos(28 * y) * chest.body  # spine


def make_phantom(folder, studies=3000, size=64, seed=0, normal_fraction=0.45, duplicates=0):
    """Draws the phantom into a folder -> path of its raw phantom.jsonl; reused if it is there.

    studies: normal_fraction of them have one of Tab. 1's templates at that table's frequencies;
    duplicates: more normal training studies with one identical sentence (Tab. 3); size in pixels.
    """
    folder = Path(folder).resolve()
    arguments = dict(folder=str(folder), studies=studies, size=size, seed=seed,
                     normal_fraction=normal_fraction, duplicates=duplicates)
    manifest, note = folder / "phantom.jsonl", folder / "phantom.json"
    text = json.dumps(arguments | {"version": 7})
    if not (manifest.exists() and note.exists() and note.read_text() == text):
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        records = build_phantom(Download(folder), SimpleNamespace(**arguments))
        write_manifest("phantom", records, folder, manifest)
        with open_atomic(note) as file:
            file.write(text)
    return manifest


BUILDERS = {"openi": build_openi, "mimic": build_mimic, "chexpert-plus": build_chexpert_plus,
            "chexpert5x200": build_chexpert5x200, "rsna": build_rsna, "rsna-ab": build_rsna,
            "siim": build_siim, "vindr": build_vindr, "cxr14": build_cxr14,
            "cxr-align": build_cxr_align, "phantom": build_phantom}

# ---------------------------------------------------------------- check, cache, sheet


def run_jobs(function, jobs, workers, title):
    """function over jobs, in order, in so many processes, with a progress bar."""
    yield from tqdm(stream(function, jobs, workers), title, len(jobs), disable=None)


def _shrink(job):
    """Reads an image and writes its cached copy, if a target is given -> why it failed, or None."""
    source, target, size, crop = job
    if target and target.exists():
        return None
    try:
        image = read_image(source, at_least=2 * size if target and not crop else None)
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{source}: ")  # a file's name may hold a patient's number
    if target:
        image = crop_borders(image) if crop else image
        scale = min(1.0, size / min(image.size))
        shape = [max(1, round(side * scale)) for side in image.size]
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(target, "wb") as file:
            image.resize(shape, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)


def check_images(manifest, workers=0):
    """ValueError with the line of the first image that cannot be read."""
    jobs = [(manifest.image_path(i), None, 0, False) for i in range(len(manifest))]
    for i, why in enumerate(run_jobs(_shrink, jobs, workers, "images")):
        if why:
            raise ValueError(f"{manifest.path}:{manifest.line(i)}: {why}; python data.py check "
                             "lists all such lines")


def cache(path, out, size=256, crop=False, workers=0, image_root=None):
    """Copies of all images, made smaller once, and a manifest of them; resumes"""
    manifest, target = Manifest(path, image_root=image_root), Path(out) / Path(path).name
    folder = (Path(out) / f"{size}px{'-cropped' * crop}").resolve()
    expect(target.resolve() != Path(path).resolve(), out, "another folder than the manifest's")
    names, jobs = [], []
    for i in range(len(manifest)):
        source = manifest.image_path(i)
        digest = hashlib.sha256(str(source).encode()).hexdigest()[:24]
        names.append(f"{digest[:2]}/{digest}.jpg")
        jobs.append((source, folder / names[i], size, crop))
    reasons = list(run_jobs(_shrink, jobs, workers, "cache"))
    expect(None in reasons, path, f"images that can be read (is --image-root right?); the first: "
           f"{next(iter(reasons), 'there is none')}")
    with open_atomic(target) as file:
        for i, name in enumerate(names):
            if reasons[i] is None:
                record = manifest[i] | {"root": str(folder), "image": name}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    wrong = [f"{path}:{manifest.line(i)}: {why}" for i, why in enumerate(reasons) if why]
    print(target, aligned({"studies": len(names) - len(wrong), "left out, unreadable": len(wrong)}),
          sep="\n")
    return wrong


def check(path, image_root=None, workers=0):
    """Validates all lines and images, prints counts and labels; exits with 1 if some are wrong"""
    wrong, jobs, lines, patients = [], [], [], {}
    ids, reports, splits, classes = Counter(), Counter(), Counter(), Counter()
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                record = _parse(f"{path}:{line}", raw)
                _validate(f"{path}:{line}", record)
                where = f"{path}:{line}"
                jobs.append((image_path(where, record, path, image_root), None, 0, False))
            except ValueError as error:
                wrong.append(f"{path}:{line}: {str(error).split(': ', 1)[-1]}")
                continue
            lines.append(line)
            split = record.get("split", "no split")
            ids[record["id"]] += 1
            splits[split] += 1
            reports[record.get("report", "")] += 1
            patients.setdefault(str(record.get("patient", record["id"])), set()).add(split)
            classes.update((field, name, value) for field in ("labels", "targets")
                           for name, value in (record.get(field) or {}).items())
    reasons = run_jobs(_shrink, jobs, workers, "images")
    wrong += [f"{path}:{line}: {why}" for line, why in zip(lines, reasons, strict=True) if why]
    shared = sum(len(own) > 1 for own in patients.values())
    twice = sum(n > 1 for n in ids.values())
    wrong += [f"{path}: {shared} patients are in two splits"] if shared else []
    wrong += [f"{path}: {twice} ids are there more than once"] if twice else []
    print(aligned({"studies": len(lines), **splits, "patients": len(patients),
                   "patients in two splits": shared, "distinct reports": len(reports),
                   "studies that share their report": sum(n for n in reports.values() if n > 1)}))
    for field, name in dict.fromkeys((field, name) for field, name, _ in classes):
        one, zero, unsure = (classes[field, name, value] for value in (1, 0, -1))
        print(f"  {field:<8} {name:<28} 1: {one:>7,}  0: {zero:>7,}  -1: {unsure:>7,}  "
              f"absent: {len(lines) - one - zero - unsure:>7,}")
    for text, n in reports.most_common(5):
        if n > 1 and text:
            print(f"  {n:>9,} x {text[:80]}")  # Tab. 1
    return wrong


def draw_sheet(path, out, image_root=None, side=256):
    """Twelve images of a manifest, evenly spread, with the names of their positive classes."""
    manifest = Manifest(path, image_root=image_root)
    sheet, count, black = Image.new("L", (4 * side, 3 * side)), min(12, len(manifest)), 0
    for k in range(count):
        row = k * len(manifest) // count
        record = manifest[row]
        try:
            image = read_image(manifest.image_path(row, record))
        except (OSError, ValueError):
            black += 1
            continue
        tile = image.resize((side, side), Image.Resampling.BICUBIC)
        classes = record.get("targets") or record.get("labels") or {}
        text = "\n".join(name for name, value in classes.items() if value == 1)
        ImageDraw.Draw(tile).text((4, 4), text, fill=255)
        sheet.paste(tile, (k % 4 * side, k // 4 * side))
    sheet.save(out, "PNG")
    print(f"{out}: {count - black} images, {black} left black because they could not be read")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SET|check|cache")
    for name, build in BUILDERS.items():
        add = commands.add_parser(name, help=build.__doc__, description=build.__doc__,
                                  formatter_class=style).add_argument
        add("root", help="folder of the official download (phantom: to draw into)")
        add("--out", required=True, help="manifest to write (JSON Lines)")
        add("--keep-missing", action="store_true", help="keep studies whose image is not there")
        if name == "siim":
            add("--glorias-rows", action="store_true",
                help="split rows as GLoRIA did: images leak into test")
        if name == "cxr14":
            add("--probmed", metavar="test.json", help="its images and pairs only")
        if name == "phantom":
            add("--studies", type=int, default=3000, help="number of studies")
            add("--size", type=int, default=64, help="side in pixels")
            add("--seed", type=int, default=0, help="another seed is another data set")
            add("--normal-fraction", type=float, default=0.45,
                help="share of normal studies, with one of Tab. 1's templates")
            add("--duplicates", type=int, default=0,
                help="normal training studies to add, all with one sentence (Tab. 3)")
    for name, run in (("check", check), ("cache", cache)):
        add = commands.add_parser(name, help=run.__doc__, description=run.__doc__,
                                  formatter_class=style).add_argument
        add("manifest", help="JSON Lines of any of the sets")
        add("--image-root", help="replaces every record's root")
        add("--workers", type=minimum(0), default=os.cpu_count() or 1,
            help="processes that read images; 0 for none")
        if name == "cache":
            add("--out", required=True, help="folder to write into; resumes")
            add("--size", type=minimum(1), default=256, help="shorter side in pixels")
            add("--crop-borders", action="store_true", help="cut black borders away (App. B.1)")
    for sub in commands.choices.values():
        sub.add_argument("--sheet", metavar="F.png", help="also draw twelve of the images")
    return parser.parse_args(argv)


def main(argv=None):
    args, wrong = parse_args(argv), []
    manifest = args.manifest if "manifest" in args else args.out
    if args.command == "check":
        wrong = check(manifest, args.image_root, args.workers)
    elif args.command == "cache":
        size, crop = args.size, args.crop_borders
        wrong = cache(manifest, args.out, size, crop, args.workers, args.image_root)
    else:
        right = args.command == "phantom" or Path(args.root).is_dir()
        expect(right, args.root, "the folder of the official download")
        records = BUILDERS[args.command](Download(args.root), args)
        summary = write_manifest(args.command, records, args.root, manifest, args.keep_missing)
        print(manifest, summary, sep="\n")
    for line in wrong[:20] + [f"{len(wrong)} in all"] * (len(wrong) > 20):
        print(f"wrong: {line}", file=sys.stderr)
    if args.sheet:
        draw_sheet(manifest, args.sheet, getattr(args, "image_root", None))
    if wrong and args.command == "check":
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
