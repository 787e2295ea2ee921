"""Every data set of the paper from its official files, batches, the phantom (Sec. 5.1, App. B.1).

    python data.py SET ROOT --out X.jsonl     official download -> manifest, a frontal image a line
    python data.py check X.jsonl              validates lines and images; Tab. 1 for any corpus
    python data.py cache X.jsonl --out DIR    resized copies and a manifest that points to them

To add a data set, write its builder: a generator that yields a `study(...)` for each image, or a
few words that say why it leaves one out. Then name it in BUILDERS, above the flags. PadChest's
could be:

    import ast

    def build_padchest(official):
        "PadChest: its table and unpacked images; frontal views. Reports are Spanish"
        columns = "ImageID", "StudyID", "PatientID", "Projection", "Report", "Labels"
        for where, row in official.table("PADCHEST_*.csv", *columns):  # or .csv.gz
            if row["Projection"] not in ("PA", "AP", "AP_horizontal"):
                yield "view not frontal"
            elif not row["Labels"] or not row["Report"]:
                yield "no labels or no report"
            else:
                expect(row["Labels"].startswith("["), where, "Labels as a list")  # FILE:LINE
                found = [name.strip() for name in ast.literal_eval(row["Labels"])]
                targets = {"Mass": int("mass" in found), "No Finding": int("normal" in found)}
                yield study(row["StudyID"], official.image(row["ImageID"]), row["PatientID"],
                            split_of(row["PatientID"]), report=row["Report"], targets=targets)

An image that is known and unwanted is left out by yielding why; a value that nobody knows should
fail, by `expect`, since the file is not what the builder was written for. Keyword arguments of a
builder, whose defaults are numbers or texts, are its flags; its docstring is its `--help`.
`split_of` wants hundreds of patients: give a smaller set its own splits. Where a patient id is
missing, pass the study's. Targets name every class of the set, 0 or 1; "No Finding" among them is
needed for normal case detection.

In this order: what all scripts share, record and manifest, images, batches, builders, the phantom,
check and cache, flags; each table stands beside its user. Symbols: B rows of one rank's batch,
N = world x B, S the image side in pixels.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import csv
import difflib
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from gcn import GraphError, collate_graphs, read_radgraph

# CheXbert's order. A new one goes before Support Devices; it needs rows in PHRASES and DRAWINGS
# below (in ABSENT if reports deny it) and what negations.py says above its tables. Checked then by
# test_every_condition_changes_the_picture_and_the_seed_decides and by
# test_the_labeler_agrees_with_the_phantoms_truth. Tables of official labels know the 14 alone.
CONDITIONS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices", "No Finding")
SPLITS = ("train", "val", "test")
CPUS = os.cpu_count() or 1

# ---------------------------------------------------------------- what all scripts share


class UserError(ValueError):
    """A bad file, row or flag: one line that names file and line and what was expected there."""


def expect(condition, where, what):
    """UserError("WHERE: expected WHAT") unless the condition holds."""
    if not condition:
        raise UserError(f"{where}: expected {what}")


def run_main(main):
    """Run a script's main: a UserError is one line and exit status 2, a bug of ours a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def minimum(bound, kind=int, below=math.inf):
    """An argparse type: a number of at least `bound`, finite and below `below`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if bound <= value < below:
                return value
        whole = " whole" if kind is int else ""
        end = f" and below {below}" if below < math.inf else ""
        raise argparse.ArgumentTypeError(
            f"expected a{whole} number of at least {bound}{end}, got {text}")
    return parse


def open_file(path):
    """A regular file that the user named, to read bytes; UserError if it is not there or none."""
    # opening a pipe would wait for a writer
    expect(os.path.isfile(path), path, "a regular file that exists")
    return open(path, "rb")


@contextlib.contextmanager
def open_atomic(path, mode="w", sweep=True):
    """Open a temporary file beside path, renamed at the end: path is never half written.

    Folders are made and a link is followed. sweep: first look through the folder for what a kill
    left there. UserError if path is a device, a pipe or a folder, or if it cannot be written.
    """
    path = Path(path).resolve()
    expect(path.is_file() or not path.exists(), path, "a regular file, or none, to write to")
    encoding = None if "b" in mode else "utf-8"
    temporary = f"{path.parent}/.{path.name}.{os.getpid()}.tmp"
    try:
        os.makedirs(path.parent, exist_ok=True)
        if sweep:
            remove_leftovers(path)
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, temporary, str(path.parent)):  # of the with block
            raise
        raise UserError(f"{path}: was not written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):  # none there, or a folder that is read-only
            os.unlink(temporary)


def remove_leftovers(path):
    """Removes the temporary files of this one that are older than a day."""
    with contextlib.suppress(OSError):  # another process may do the same
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if time.time() - os.path.getmtime(old) > 24 * 60 * 60:
                os.unlink(old)


def numbered_lines(file):
    """Yield (line number, offset, bytes) of an open file's lines that are not blank."""
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, offset, line
        offset += len(line)


def parse_line(where, line):
    """One line of JSON Lines, bytes, as a dict; else UserError("WHERE: ...")."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():  # an escaped half of a pair cannot be written or tokenised
            json.dumps(record, ensure_ascii=False).encode()
    except ValueError:  # whose message may show the report
        record = None
    expect(isinstance(record, dict) and b"\\u0000" not in line, where,
           "one JSON object in UTF-8, without null characters")
    return record


def read_jsonl(path):
    """Yield (line number, dict) of JSON Lines, but blank ones; UserError names file and line."""
    with open_file(path) as file:
        for number, _, line in numbered_lines(file):
            yield number, parse_line(f"{path}:{number}", line)


def read_json(path, kind=object):
    """One JSON document that is a list, a dict, ...; UserError if the file is not there or none."""
    with open_file(path) as file:
        try:
            document = json.load(file)
        except ValueError:
            raise UserError(f"{path}:1: expected one JSON document in UTF-8") from None
    expect(isinstance(document, kind), path, f"a JSON document of kind {kind.__name__}")
    return document


def parallel(function, jobs, workers):
    """function over jobs, in order, in so many processes; below 2: in this one."""
    if workers < 2:
        yield from map(function, jobs)
        return
    jobs = iter(jobs)
    with ProcessPoolExecutor(workers) as pool:
        try:
            while batch := list(itertools.islice(jobs, 256 * workers)):  # memory stays flat
                yield from pool.map(function, batch, chunksize=16)
        except BrokenExecutor:
            raise UserError("a reading process was killed; if memory is short, lower --workers"
                            ) from None


def print_counts(counts):
    """A number and its name a line."""
    for name, count in counts.items():
        print(f"{count:>11,}  {name}")


def lines(text):
    """The lines of a table below, without the blank around them."""
    return [line.strip() for line in text.strip().splitlines()]


def groups(text):
    """A table below: lines that end with a colon, each with the list of the lines under it."""
    table = {}
    for line in lines(text):
        if line.endswith(":"):
            members = table[line[:-1]] = []
        else:
            members.append(line)
    return table


# ---------------------------------------------------------------- the record and the manifest

TYPES = {  # of the fields of a record or of its hard negatives
    str: "root image split original_report report condition",
    dict: "labels targets graph",
    list: "hard_negatives adversarial"}
VALUES = {"labels": (1, 0, -1), "targets": (1, 0)}
TRAINED = ("id", "patient", "report", "labels", "hard_negatives", "graph")  # images aside


def label_vector(labels, uncertain="positive"):
    """Labels by name -> C: (14,) float32 in CheXbert's order; -1 is 1 if uncertain="positive"."""
    # ASSUMPTION: C holds the positives, No Finding its own dimension; uncertain counts as positive.
    ones = (1, -1) if uncertain == "positive" else (1,)
    return np.array([labels.get(name) in ones for name in CONDITIONS], np.float32)  # (14,)


def patient_of(record):
    """The record's patient id; where it is absent, null or empty, each study is a patient."""
    patient = record.get("patient")
    return record["id"] if patient in (None, "") else patient


def text_hash(text):
    """A text, or a patient id, as a signed 64-bit number, the same on every machine."""
    digest = hashlib.sha256(str(text).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def split_of(patient):
    """train, val or test (80/10/10) by the patient's hash: a subset keeps its assignment."""
    # ASSUMPTION: sets without an official split get one by a hash of the patient id.
    share = text_hash(patient) % 1000
    if share < 800:
        return "train"
    return "val" if share < 900 else "test"


def check_texts(where, record, *names):
    """UserError("WHERE: expected ...") unless this is an object of JSON with these texts."""
    expect(isinstance(record, dict) and all(isinstance(record.get(name), str) for name in names),
           where, f"an object with {', '.join(names)} as texts")


def check_record(where, record, needed=("id", "image")):
    """UserError("WHERE: expected ...") at the first field of a manifest's record that is wrong."""
    check_texts(where, record, *needed)
    for kind, names in TYPES.items():
        for name in names.split():
            expect(isinstance(record.get(name, kind()), kind), where, f"{name} as {kind.__name__}")
    for field, values in VALUES.items():
        for value in record.get(field, {}).values():
            expect(value in values and not isinstance(value, bool), where,
                   f"{field} out of {values}")
    conditions = {record.get("condition", CONDITIONS[0]), *record.get("labels", {})}
    expect(conditions <= set(CONDITIONS), where, f"conditions among {', '.join(CONDITIONS)}")
    expect(record.get("split", "train") in SPLITS, where, "split train, val or test")
    expect(type(record.get("patient")) in (str, int, type(None)), where,
           "patient as a text or a whole number")  # no NaN, no bool
    check_graph(where, record.get("graph", {}))
    for negative in record.get("hard_negatives", []):
        check_record(where, negative, ("condition", "report", "omitted"))


def check_graph(where, record):
    """gcn.py's GraphError as a UserError of this line."""
    try:
        read_radgraph(record)
    except GraphError as error:
        raise UserError(f"{where}: {error}") from None


class Manifest:
    """Lazy rows of a manifest; a sidecar PATH.index.npz keeps the `summary` of each line.

    path: JSON Lines; the sidecar is rebuilt when the manifest's size or time changes, and kept in
    memory if the folder is not writable. split: train, val, test or all. image_root replaces every
    record's "root". An entry a row: .patients int64 hash, .positives (n, 14) bool, .negatives how
    many hard negatives, .labelled and .with_graphs bool. UserError names file and line.
    """

    def __init__(self, path, split="all", image_root=None):
        self.path = str(path)
        self.split = split
        self.image_root = image_root
        self.file = open_file(self.path)
        columns = load_columns(self.path, self.file)
        if split != "all":
            rows = columns["split"] == split
            columns = {name: column[rows] for name, column in columns.items()}
        self.columns = columns
        self.patients = columns["patients"]
        self.positives = columns["positives"]
        self.negatives = columns["negatives"]
        self.labelled = columns["labelled"]
        self.with_graphs = columns["with_graphs"]

    def __reduce__(self):  # a process that is not forked opens the file itself
        return Manifest, (self.path, self.split, self.image_root)

    def __len__(self):
        return len(self.patients)

    def __getitem__(self, i):
        # pread brings its own offset: forked processes share the file's position.
        length = self.columns["length"][i]
        line = os.pread(self.file.fileno(), length, self.columns["offset"][i])
        return parse_line(self.where(i), line)

    def where(self, i):
        """FILE:LINE of row i, for messages."""
        return f"{self.path}:{self.columns['line'][i]}"

    def image_path(self, i, record=None):
        """Image of row i (whose record may be at hand) as a path; UserError if out of its root."""
        return image_path(self.where(i), record or self[i], self.path, self.image_root)

    def digest(self):
        """A hash of what training reads of the rows, in order; images and their root left out."""
        return hashlib.sha256(self.columns["digest"].tobytes()).hexdigest()


def image_path(where, record, manifest, image_root=None):
    """The record's image as a path; UserError if it would leave the image root, links aside."""
    root = os.path.abspath(image_root or record.get("root") or os.path.dirname(manifest))
    path = Path(os.path.abspath(os.path.join(root, record["image"])))
    expect(path.is_relative_to(root), where, "its image inside its root")
    return path


def load_columns(path, file):
    """`summary` of all lines by column, from the sidecar if its stamp is of this file and code."""
    sidecar = f"{path}.index.npz"
    status = os.fstat(file.fileno())
    stamp = (f"{status.st_size} {status.st_mtime_ns} {CONDITIONS} {TRAINED} "
             f"{inspect.getsource(summary)}")
    columns = {}
    # Damaged bytes are zipfile's and numpy's errors, of many kinds; each array has a checksum.
    with contextlib.suppress(Exception), np.load(sidecar) as saved:
        columns = dict(saved)
    if str(columns.pop("stamp", "")) == stamp:
        return columns
    rows = []
    for number, offset, line in numbered_lines(file):
        record = parse_line(f"{path}:{number}", line)
        check_record(f"{path}:{number}", record)  # once, so that later readers can trust it
        rows.append(summary(record, number, offset, len(line)))
    expect(rows, path, "at least one line")
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    with contextlib.suppress(UserError):  # a folder that is not writable
        with open_atomic(sidecar, "wb") as saved:
            np.savez(saved, stamp=stamp, **columns)
    return columns


def summary(record, number, offset, length):
    """What the sidecar keeps of a line and its record."""
    labels = record.get("labels", {})
    negatives = record.get("hard_negatives", [])
    sides = [record, *negatives]
    trained = json.dumps([record.get(name) for name in TRAINED], sort_keys=True)
    return {
        "line": number, "offset": offset, "length": length,
        "split": record.get("split", ""),
        "patients": text_hash(patient_of(record)),
        "reports": text_hash(record.get("report", "").strip()),
        "positives": [labels.get(name) == 1 for name in CONDITIONS],               # (14,)
        "negatives": len(negatives),
        "labelled": all({"report", "labels"} <= side.keys() for side in sides),
        "with_graphs": all("graph" in side for side in sides),
        "digest": text_hash(trained),
    }


# ---------------------------------------------------------------- images (App. B.1)

DICOM = (".dcm", ".dicom")


def read_image(path, at_least=None):
    """One radiograph as a grey 8-bit PIL image; UserError names the file.

    path: PNG or JPEG of 8 or 16 bits, turned as its EXIF says, or DICOM (needs pydicom). at_least:
    side in pixels that suffices; a JPEG is decoded at 1/2, 1/4 or 1/8 if both sides stay above it.
    """
    # ASSUMPTION: App. B.1's preprocessing cannot be had; an image keeps its borders.
    if str(path).lower().endswith(DICOM):
        return read_dicom(path)
    with open_file(path) as file:
        try:
            image = Image.open(file, formats=("PNG", "JPEG"))
            if at_least is not None:
                image.draft("L", (at_least, at_least))
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # Pillow's, of many kinds for damaged bytes
            raise UserError(f"{path}: expected an intact PNG or JPEG image, or DICOM named .dcm "
                            f"({type(error).__name__})") from None
    if image.mode.startswith("I"):  # which convert() would clip
        return to_grey(np.asarray(image))
    return image.convert("L")


def read_dicom(path):
    """A grey image of one frame in DICOM, as its look-up tables and window show it."""
    # ASSUMPTION: a DICOM image is what its first look-up table or window shows, scaled as any.
    with open_file(path) as file:
        try:
            from pydicom import dcmread
            from pydicom.pixels import apply_modality_lut, apply_voi_lut
            header = dcmread(file)
            values = apply_modality_lut(header.pixel_array, header)
            values = apply_voi_lut(values, header).astype(np.float32)
        except ImportError:
            raise UserError(f"{path}: reading DICOM needs pydicom 3 (pip install pydicom)"
                            ) from None
        except Exception as error:  # pydicom's, of many kinds for damaged bytes
            if "missing dependencies" in str(error):  # names the packages, nothing of the file
                raise UserError(f"{path}: {' '.join(str(error).split())}") from None
            raise UserError(f"{path}: expected an intact DICOM image ({type(error).__name__})"
                            ) from None
    kind = header.PhotometricInterpretation
    expect(kind.startswith("MONOCHROME") and values.ndim == 2 and np.isfinite(values).all(),
           path, "a grey image of one frame, without NaN")
    if kind == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        values = -values
    return to_grey(values)


def to_grey(values):
    """More than 8 bits -> an 8-bit image, the darkest value 0 and the brightest 255 (flat: 0)."""
    # ASSUMPTION: images of more than 8 bits are scaled by their own minimum and maximum.
    values = values.astype(np.float32)
    values -= values.min()
    values *= 255 / max(float(values.max()), 1e-6)
    return Image.fromarray(np.round(values).astype(np.uint8))


def pixels(image, size, rng=None):
    """PIL image -> (1, S, S) uint8: all of it, or with rng a random crop, resized in one step."""
    box = None
    if rng is not None:
        width, height = image.size
        # ASSUMPTION: crops keep 80-100 % of the area and 10 % of the aspect; sides are not flipped.
        u = rng.random(4).tolist()  # in [0, 1)
        area = 0.8 + 0.2 * u[0]
        aspect = math.exp(0.2 * u[1] - 0.1)
        w = width * min(1, (area * aspect) ** 0.5)
        h = height * min(1, (area / aspect) ** 0.5)
        x = u[2] * (width - w)
        y = u[3] * (height - h)
        box = (x, y, x + w, y + h)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)[None]  # (1, S, S)


# ---------------------------------------------------------------- batches

MAX_TRIES = 20  # images drawn in place of one that cannot be read


class Studies:
    """What training reads, indexed by (epoch, i); a sample is a pure function of (seed, epoch, i).

    manifest: rows of one split, with labels. image_size: S. tokenize: list of str -> dict of
    tensors. negatives: draw one stored hard negative anew each epoch; a study with none gets a
    report of this split with exactly one positive, its labels and graph (Sec. 4.1). graphs: add the
    RadGraph graphs. uncertain: see label_vector. An unreadable image is replaced by another study
    drawn from the same seed, so batches keep their size; "bad" counts them. UserError, before any
    step, if there are studies without a negative and no two different reports to draw from.
    """

    def __init__(self, manifest, *, image_size, tokenize, negatives, graphs, uncertain="positive",
                 seed=0):
        self.manifest = manifest
        self.image_size = image_size
        self.tokenize = tokenize
        self.negatives = negatives
        self.graphs = graphs
        self.uncertain = uncertain
        self.seed = seed
        self.single = np.flatnonzero(manifest.positives[:, :-1].sum(1) == 1)  # No Finding aside
        self.reports = manifest.columns["reports"]  # as hashes
        if negatives and not manifest.negatives.all():
            expect(manifest.negatives.any() and len(set(self.reports[self.single])) > 1,
                   manifest.path, "hard_negatives to train with, and for studies without them two "
                   "different reports of one positive label; run negations.py on it first")

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        epoch, i = map(int, key)
        rng = np.random.default_rng((self.seed, epoch, i))
        bad = 0
        record, image = self._read(i)
        while image is None:
            bad += 1
            expect(bad < MAX_TRIES, self.manifest.where(i), f"images, {MAX_TRIES} in a row "
                   "could not be read (is --image-root right? see: python data.py check)")
            i = int(rng.integers(len(self.manifest)))
            record, image = self._read(i)
        sample = {"index": i, "bad": bad, "pixels": pixels(image, self.image_size, rng),
                  "record": record}
        if self.negatives:
            sample["negative"] = self._negative(i, record, rng)
        return sample

    def _read(self, i):
        """The record of row i and its image, or None if that cannot be read."""
        record = self.manifest[i]
        try:
            path = self.manifest.image_path(i, record)
            return record, read_image(path, at_least=self.image_size * 5 // 4)
        except UserError:
            return record, None

    def _negative(self, i, record, rng):
        stored = record.get("hard_negatives")
        if stored:
            # ASSUMPTION: each epoch draws one of a study's stored hard negatives anew.
            return stored[rng.integers(len(stored))]
        # ASSUMPTION: not normal studies alone, but all without a stored negative draw a report.
        # ASSUMPTION: "a single positive entity" is one 1; uncertain findings may stand beside it.
        other = i
        while self.reports[other] == self.reports[i]:  # never a copy of the report itself
            other = self.single[rng.integers(len(self.single))]
        return self.manifest[other]

    def collate(self, samples):
        """Samples -> one batch; tokens and graphs are made here, that is in the worker."""
        images = np.stack([sample["pixels"] for sample in samples])
        batch = {"pixels": torch.from_numpy(images),                                 # (B, 1, S, S)
                 "index": torch.tensor([sample["index"] for sample in samples]),     # (B,)
                 "bad": sum(sample["bad"] for sample in samples)}
        batch |= self._collate_texts([sample["record"] for sample in samples], "")
        if self.negatives:
            batch |= self._collate_texts([sample["negative"] for sample in samples], "hard_")
        return batch

    def _collate_texts(self, records, prefix):
        vectors = [label_vector(record.get("labels", {}), self.uncertain) for record in records]
        batch = {f"{prefix}labels": torch.from_numpy(np.stack(vectors)),             # (B, 14)
                 f"{prefix}text": self.tokenize([record.get("report", "") for record in records])}
        if self.graphs:
            graphs = [record.get("graph", {}) for record in records]
            batch[f"{prefix}graph"] = collate_graphs(graphs)
        return batch


def global_batches(num_studies, batch_size, seed, epoch, rank=0, world=1, start=0):
    """Lists of (epoch, i) to sample by: step s has rows [s N, (s + 1) N) of an epoch's permutation.

    batch_size is N, a multiple of world, of which each rank takes its B; the last incomplete batch
    is dropped, so all ranks take equal steps. start: the first step, to resume inside an epoch.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_studies).tolist()
    share = batch_size // world  # B
    batches = []
    for first in range(start * batch_size + rank * share,
                       num_studies // batch_size * batch_size, batch_size):
        batches.append([(epoch, i) for i in order[first:first + share]])
    return batches


# ---------------------------------------------------------------- builders: what they share


def study(name, image, patient, split, **fields):
    """One image, a path below the root, of the study `name`; fields that are None are left out."""
    fields = {key: value for key, value in fields.items() if value is not None}
    return {"study": name, "image": image, "patient": patient, "split": split} | fields


CLASS_NAMES = {name.lower(): name for name in CONDITIONS} | {
    "effusion": "Pleural Effusion",
    "other diseases": "Other disease"}  # so in VinDr's train table


class Download:
    """A set's official files below root, by relative path or by name; no image is opened."""

    def __init__(self, root):
        self.root = root
        self.images = {}  # number of folders in a name -> paths by name, once one is looked for

    def file(self, names, required=True):
        """The first of the files "A|B" (* and ? allowed), or .gz, in root or a folder, or None."""
        for name in names.split("|"):
            for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
                paths = sorted(self.root.glob(pattern))
                if paths:
                    return paths[0]
        expect(not required, self.root, f"the file {names} (or .gz)")

    def table(self, names, *columns):
        """Rows of a CSV that has these columns, as ("FILE:LINE", dict), stripped."""
        path = self.file(names)
        where = f"{path}:1"
        open_file(path).close()
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)  # an unclosed quote swallows patients
            try:
                header = [name.strip() for name in next(rows, [])]
                expect(set(columns) <= set(header) and len(set(header)) == len(header), where,
                       f"a CSV header with {', '.join(columns)}, each name once")
                for cells in filter(None, rows):  # no blank line
                    where = f"{path}:{rows.line_num}"
                    expect(len(cells) == len(header), where, f"{len(header)} fields")
                    yield where, dict(zip(header, map(str.strip, cells), strict=True))
            except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{where}: expected a complete CSV file in UTF-8 after this line "
                                f"({type(error).__name__})") from None

    def image(self, path, folders=0):
        """The image at this path, else of this name anywhere, in any format; else the path itself.

        folders: how many of the path's folders belong to the name; a table whose exact paths must
        be there needs no such search: take its paths as they are. A PNG or JPEG is taken for the
        converted copy of a DICOM of its name; UserError if two others have one name, since one may
        be a mask or of another size.
        """
        if os.path.isfile(self.root / path) and not path.lower().endswith(DICOM):
            return path
        images = self.images.setdefault(folders, {})
        if not images:
            for file in glob.iglob("**/*.*", root_dir=self.root, recursive=True):
                if file.lower().endswith((".png", ".jpg", ".jpeg", *DICOM)):
                    images.setdefault(name_of(file, folders), []).append(file)
        files = images.get(name_of(path, folders), [path])
        converted = [file for file in files if not file.lower().endswith(DICOM)]
        first, *others = converted or files
        expect(not others, self.root / first, f"one image of its name, {others} there too")
        return first


def name_of(path, folders):
    """The last so many folders of a path, and its stem."""
    return (*path.split("/")[-1 - folders:-1], stem(path))


def stem(path):
    """File name without endings; OpenI's CXR2_IM-1.png and 2_IM-1.dcm.png are one image."""
    name = re.sub(r"(?i)(\.(dcm|dicom|png|jpe?g))+$", "", os.path.basename(path))
    return re.sub(r"^CXR(\d+_)?(?=\d+_IM)", "", name)


def label(where, value):
    """1, 0, -1, or None if blank."""
    text = str(value).lower().removesuffix(".0")
    if text in ("", "none", "nan"):
        return None
    expect(text in ("1", "0", "-1"), where, "a label 1, 0, -1 or blank")
    return int(text)


def conditions_of(where, row):
    """CheXpert's 14 columns -> labels by name, blanks left out."""
    labels = {}
    for name in CONDITIONS:
        value = label(where, row.get(name))
        if value is not None:
            labels[name] = value
    return labels


def class_name(name):
    """A set's class by its CheXpert name where one exists, else its own with spaces."""
    name = " ".join(name.replace("_", " ").split())
    return CLASS_NAMES.get(name.lower(), name)


def join_text(*sections):
    """Sections, some of which may be None, as one line."""
    return " ".join(" ".join(text or "" for text in sections).split())


def set_apart(items, share):
    """scikit-learn's train_test_split(items, test_size=share, random_state=0): rest, share."""
    order = np.random.RandomState(0).permutation(len(items))  # noqa: NPY002 (published splits)
    items = [items[k] for k in order]
    count = math.ceil(len(items) * share)
    return items[count:], items[:count]


def glorias_split(names):
    """GLoRIA's 70/15/15 split: the split of each name."""
    train, rest = set_apart(names, 0.3)
    test, val = set_apart(rest, 0.5)
    return dict.fromkeys(train, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")


def write_manifest(name, root, out, keep_missing=False, **settings):
    """Writes what the builder of that name yields, with its settings -> the counts to print."""
    root = Path(root).resolve()
    expect(str(out).endswith(".jsonl") or not os.path.isfile(out), out,
           "a new file, or a manifest (.jsonl), to write over")
    records = BUILDERS[name](Download(root), **settings)
    seen = set()
    counts = Counter(studies=0)
    with open_atomic(out) as file:
        for record in tqdm(records, name, disable=None):
            if isinstance(record, str):
                counts[f"skipped: {record}"] += 1
                continue
            if not os.path.isfile(root / record["image"]):
                counts["image not there"] += 1
                if not keep_missing:
                    continue
            number = record.pop("study")
            identity = f"{name}/{number}"
            if number in seen:
                identity += f"/{stem(record['image'])}"
            seen.add(number)
            counts["studies"] += 1
            counts[record["split"]] += 1
            if not record.keys() & {"labels", "targets"}:
                counts["neither labels nor targets"] += 1
            line = {"id": identity, "root": str(root), **record}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        expect(counts["studies"], root, f"studies of {name} and their images here "
               f"(--keep-missing keeps those without image), got {dict(counts)}")
    return counts


# ---------------------------------------------------------------- builders, one a set (Sec. 5.1)

MESH = groups("""
    Atelectasis:
        Pulmonary Atelectasis
    Cardiomegaly:
        Cardiomegaly
    Mass:
        Mass
    Pleural Effusion:
        Pleural Effusion
    Infiltration:
        Infiltrate
    Nodule:
        Nodule
    Pneumonia:
        Pneumonia
    Pneumothorax:
        Pneumothorax
    Consolidation:
        Consolidation
    Edema:
        Pulmonary Edema
    Emphysema:
        Emphysema
        Pulmonary Emphysema
        Bullous Emphysema
    Fibrosis:
        Pulmonary Fibrosis
        Fibrosis
    Pleural Thickening:
        Thickening/pleura
    Hernia:
        Hernia, Hiatal
    No Finding:
        normal""")


def build_openi(official):
    """OpenI: Kaggle's two tables, else the official XML; targets from the human MeSH indexing.

    ROOT has Kaggle's indiana_reports.csv, indiana_projections.csv and images (all frontal ones are
    taken), or the *.xml of NLMCXR_reports.tgz and the PNGs of NLMCXR_png.tgz, unpacked (the first
    image of each report is taken, since no view is given: some are lateral, so that the tables are
    to be preferred). A report is findings and impression. Studies that nobody indexed have no
    targets. Split by patient, who is the study: 80/10/10.
    """
    kaggle = official.file("indiana_reports.csv", required=False)
    for number, images, report, mesh in openi_tables(official) if kaggle else openi_xml(official):
        if not images:
            yield "no frontal image listed"
        elif not report:
            yield "neither findings nor impression"
        else:
            for image in images:
                yield study(number, official.image(image), number, split_of(number),
                            report=report, targets=mesh_targets(mesh))


def mesh_targets(terms):
    """MeSH terms ("Pulmonary Atelectasis/base/left") -> targets; None if nobody indexed them."""
    if "No Indexing" in terms:
        return None
    heads = set()
    for term in terms:
        words = term.strip().split("/")
        heads |= {words[0], "/".join(words[:2])}
    return {name: int(not heads.isdisjoint(known)) for name, known in MESH.items()}


def openi_tables(official):
    frontal = {}
    for _, row in official.table("indiana_projections.csv", "uid", "filename", "projection"):
        if row["projection"] == "Frontal":
            frontal.setdefault(row["uid"], []).append(f"images/{row['filename']}")
    for _, row in official.table("indiana_reports.csv", "uid", "MeSH", "findings", "impression"):
        report = join_text(row["findings"], row["impression"])
        yield row["uid"], frontal.get(row["uid"], []), report, row["MeSH"].split(";")


def openi_xml(official):
    for path in sorted(official.root.rglob("*.xml")):
        try:
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise UserError(f"{path}: expected well-formed XML ({error})") from None
        text = {node.get("Label"): "".join(node.itertext()) for node in tree.iter("AbstractText")}
        images = [f"{node.get('id')}.png" for node in tree.iter("parentImage")]
        yield (path.stem, images[:1],  # the first: no view is given
               join_text(text.get("FINDINGS"), text.get("IMPRESSION")),
               ["".join(node.itertext()) for node in tree.iterfind("MeSH/major")])


def build_mimic(official):
    """MIMIC-CXR-JPG with MIMIC-CXR's reports (files/pNN/PATIENT/STUDY.txt); frontal views.

    ROOT has MIMIC-CXR-JPG's folder files and its tables mimic-cxr-2.*-metadata.csv, -split.csv and
    -chexpert.csv (or .gz), and the reports of mimic-cxr-reports.zip, there or in a folder. Each PA
    or AP image is a row, with its study's report and labels; studies without a row in -chexpert.csv
    have none. A report is its findings and impression, the last of each that is not empty; where
    it has neither, what follows the first paragraph of its last section. Official split.
    """
    splits = {row["dicom_id"]: row["split"].replace("validate", "val")
              for _, row in official.table("mimic-cxr-2.*-split.csv", "dicom_id", "split")}
    table = official.table("mimic-cxr-2.*-chexpert.csv", "study_id", *CONDITIONS)
    labels = {row["study_id"]: conditions_of(where, row) for where, row in table}
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    for where, row in official.table("mimic-cxr-2.*-metadata.csv", *columns):
        image, patient, number, view = (row[column] for column in columns)
        if view not in ("PA", "AP"):
            yield "view not PA or AP"
            continue
        expect(splits.get(image) in SPLITS, where, "its dicom_id in mimic-cxr-2.*-split.csv, "
               "with split train, validate or test")
        path = f"files/p{patient[:2]}/p{patient}/s{number}"
        text = official.file(glob.escape(f"{path}.txt"), required=False)
        if not text:
            yield "no report file files/pNN/PATIENT/STUDY.txt here or in mimic-cxr-reports"
            continue
        report = mimic_report(text)
        if report:
            yield study(image, official.image(f"{path}/{image}.jpg"), patient, splits[image],
                        report=report, labels=labels.get(number), study_id=number)
        else:
            yield "neither findings nor impression"


# Capitals, or up to four words: prose may hold a colon too.
HEADING = r"(?m)^[ \t]*([A-Z][A-Z0-9_ ()/,&-]*|[A-Z]\w*(?:[ ,/]+\w+){0,3} ?):(?=\s)"
# The first row with a word of a heading, misspelt or not, says which section begins there.
HEADINGS = groups("""
    impression:
        impression
        conclusion
    findings:
        findings
    context:
        addendum
        comparison
        history
        indication
        reason
        clinical
        technique
        notification
        recommendation
        comment
        attestation
        read
        wetread
        pfi
        report
    view:
        view
        chest
        portable
        frontal
        lateral
        lat
        ap
        pa
        upright
        supine
        radiograph
        film
        ribs
        window
    examination:
        examination
        exam
        procedure
        study
        date
        dose""")


def mimic_report(path):
    """Findings and impression of a MIMIC-CXR report, else the paragraphs of its last section.

    As by the official parser (github.com/MIT-LCP/mimic-cxr): the last section of a name that is not
    empty counts, since an addendum stands before its report, and a heading that names the view
    begins findings. Here headings may also be indented otherwise, have small letters or follow an
    empty section at once, and unknown ones inside findings (LUNGS:) stay there as text.
    """
    text = path.read_text("utf-8", errors="replace")
    first, *pieces = re.split(HEADING, text)  # heading, body, heading, body, ...
    sections = [["preamble", first]]
    while pieces:
        heading, body, *pieces = pieces
        before, text_before = sections[-1]
        capitals = heading.isupper()
        name = section_of(heading)
        if name == "view":  # begins findings, or is a part of a section
            name = "findings"
            if before == "findings" and text_before.strip():
                name = None
            elif before == "impression" and not capitals:
                name = None
        elif name in ("context", "examination") and " " in heading and not capitals:
            name = None  # prose: "Compared to prior study:"
        if name is None and (before in ("findings", "impression") or not capitals):
            sections[-1][1] += f" {heading}:{body}"
        else:
            sections.append([name, body])
    bodies = {name: body for name, body in sections if body.strip()}
    # ASSUMPTION: a report is findings and impression; which of them the paper takes is not said.
    report = join_text(bodies.get("findings"), bodies.get("impression"))
    others = [body for name, body in sections if name not in ("findings", "impression")]
    return report or join_text(*re.split(r"\n\s*\n", others[-1].rstrip())[1:])


@lru_cache(None)
def section_of(heading):
    """The row of HEADINGS that a heading belongs to, or None."""
    words = re.findall("[a-z]+", heading.lower())
    for name, known in HEADINGS.items():
        for word in words:
            if difflib.get_close_matches(word, known, 1, 0.8):
                return name


def build_chexpert_plus(official):
    """CheXpert Plus: its CSV and CheXbert labels; frontal views.

    ROOT has df_chexpert_plus_*.csv, the folder PNG (or JPEGs, DICOMs) and, in any folder near,
    findings_fixed.json and impression_fixed.json: labels of both sections are joined, and rows of
    which neither file knows the image have none. The published graphs are not read. The official
    valid is val; there is no test.
    """
    labels = {}
    for part in ("findings", "impression"):
        file = official.file(f"{part}_fixed.json|*/*/{part}_fixed.json", required=False)
        if file:
            add_labels(labels, file)
    columns = ("path_to_image", "frontal_lateral", "deid_patient_id", "split",
               "section_findings", "section_impression")
    for _, row in official.table("df_chexpert_plus_*.csv", *columns):
        image, view, patient, split, *sections = (row[column] for column in columns)
        report = join_text(*sections)
        if view != "Frontal":
            yield "not frontal"
        elif not report:
            yield "neither findings nor impression"
        else:
            number = "/".join(image.split("/")[-3:-1])
            yield study(number, official.image(image, folders=2), patient,
                        split.replace("valid", "val"), report=report, labels=labels.get(image))


def add_labels(labels, file):
    """CheXbert's labels of a section, added to those of its image: 1 beats -1, which beats 0."""
    for line, row in read_jsonl(file):
        check_texts(f"{file}:{line}", row, "path_to_image")
        known = labels.setdefault(row["path_to_image"], {})
        for name, value in conditions_of(f"{file}:{line}", row).items():
            known[name] = max(known.get(name, 0), value, key=(0, -1, 1).index)
        if any(known.get(name) for name in CONDITIONS[:-2]):  # support devices aside
            known.pop("No Finding", None)


def build_chexpert5x200(official):
    """CheXpert 5x200: GLoRIA's chexpert_5x200.csv beside CheXpert's images.

    The draw had no seed, so the list itself is needed. Five classes, one of them positive a row;
    all is test. Leave these patients out of CheXpert's training rows yourself.
    """
    names = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    for where, row in official.table("chexpert_?x200.csv", "Path", *names):
        patient, number = row["Path"].split("/")[-3:-1]
        yield study(f"{patient}/{number}", official.image(row["Path"], folders=2), patient, "test",
                    targets={name: int(label(where, row[name]) == 1) for name in names},
                    report=join_text(row.get("Report Impression")) or None)


def build_rsna(official):
    """RSNA pneumonia: stage 2 labels, GLoRIA's split.

    ROOT has stage_2_train_labels.csv and stage_2_train_images (DICOM, or converted copies of the
    same names). 70/15/15 as GLoRIA draws it from the sorted patients: 18,678, 4,003 and 4,003.
    """
    table = official.table("stage_2_train_labels.csv", "patientId", "Target")
    marks = [(row["patientId"], label(where, row["Target"])) for where, row in table]
    yield from glorias_studies(official, "stage_2_train_images", "Pneumonia", marks)


def build_rsna_ab(official):
    """RSNA pneumonia without class Normal (RSNA-ab), in the split of the whole.

    ROOT is as for rsna, with stage_2_detailed_class_info.csv.
    """
    table = official.table("stage_2_detailed_class_info.csv", "patientId", "class")
    normal = {row["patientId"] for _, row in table if row["class"] == "Normal"}
    for record in build_rsna(official):
        if record["study"] in normal:
            yield "class Normal"
        else:
            yield record


def build_siim(official):
    """SIIM pneumothorax: masks to labels, one line an image, GLoRIA's shares.

    ROOT has train-rle.csv or stage_2_train.csv, and dicom-images-train. An image is positive if one
    of its rows holds a mask. GLoRIA's own split is by row, so its numbers are not comparable.
    """
    table = "train-rle.csv|stage_2_train.csv|*train-rle.csv"
    marks = []
    for where, row in official.table(table, "ImageId", "EncodedPixels"):
        runs = row["EncodedPixels"]
        expect(re.fullmatch(r"-1|(\d+ \d+ ?)*", runs), where, "EncodedPixels of -1, blank or runs")
        marks.append((row["ImageId"], runs not in ("", "-1")))
    # DIFFERS from Sec. 5.1: SIIM is split by image, not by row, so that none leaks into test.
    yield from glorias_studies(official, "dicom-images-train", "Pneumothorax", marks)


def glorias_studies(official, folder, target, marks):
    """A study for each image, of one target, 1 if any of its rows says so; GLoRIA's split."""
    positives = {name for name, mark in marks if mark == 1}
    names = sorted(dict(marks))
    splits = glorias_split(names)
    for name in names:
        yield study(name, official.image(f"{folder}/{name}.dcm"), name, splits[name],
                    targets={target: int(name in positives)})


def build_vindr(official):
    """VinDr-CXR 1.0.0: the consensus for test, any of the three readers for train.

    ROOT has annotations/image_labels_train.csv and image_labels_test.csv, and the folders train and
    test (DICOM, or converted copies of the same names). No patients are known: each image is one.
    """
    for part in ("train", "test"):
        marks = {}  # image -> class -> 1 if a reader marked it
        for where, row in official.table(f"image_labels_{part}.csv", "image_id", "No finding"):
            classes = marks.setdefault(row["image_id"], {})
            for column, value in row.items():
                if column not in ("image_id", "rad_ID", "No finding"):
                    name = class_name(column)
                    classes[name] = max(classes.get(name, 0), label(where, value) or 0)
        # ASSUMPTION: VinDr's val is CXR-CLIP's 20 % of the train images, drawn from the sorted ids.
        val = set()
        if part == "train":
            val = set(set_apart(sorted(marks), 0.2)[1])
        for name in sorted(marks):
            targets = marks[name] | {"No Finding": int(not any(marks[name].values()))}
            yield study(name, official.image(f"{part}/{name}.dicom"), name,
                        "val" if name in val else part, targets=targets)


CXR14 = lines("""
    Atelectasis
    Cardiomegaly
    Effusion
    Infiltration
    Mass
    Nodule
    Pneumonia
    Pneumothorax
    Consolidation
    Edema
    Emphysema
    Fibrosis
    Pleural_Thickening
    Hernia
    No Finding""")


def build_cxr14(official, probmed=""):
    """ChestX-ray14: Data_Entry_2017 with the official test list, else split by patient.

    ROOT has Data_Entry_2017*.csv, the images below any folders and, for the official split,
    test_list.txt; a tenth of the other patients is val. --probmed is ProbMed's test.json: its
    images alone are kept, each with pairs of a present and an absent class, for adversarial.
    """
    pairs = probmed_pairs(probmed) if probmed else {}
    tested = official.file("test_list.txt", required=False)
    if tested:
        test = set(map(stem, tested.read_text("utf-8").split()))
    else:
        print("no test_list.txt: split by patient, not the official split")
    table = "Data_Entry_2017_v2020.csv|Data_Entry_2017*.csv"
    for where, row in official.table(table, "Image Index", "Finding Labels", "Patient ID"):
        name = stem(row["Image Index"])
        patient = row["Patient ID"]
        classes = row["Finding Labels"].split("|")
        expect(set(classes) <= set(CXR14), where, f"Finding Labels out of {', '.join(CXR14)}")
        split = split_of(patient)
        if tested:
            if name in test:
                split = "test"
            elif split == "test":
                split = "train"
        if probmed and name not in pairs:
            yield "not among ProbMed's images"
            continue
        yield study(name, official.image(f"images/{row['Image Index']}"), patient, split,
                    targets={class_name(known): int(known in classes) for known in CXR14},
                    adversarial=pairs.get(name))


def probmed_pairs(path):
    """ProbMed's test.json -> image -> [[present class, absent class], ...]."""
    asked = {}
    for k, entry in enumerate(read_json(path, list)):
        check_texts(f"{path}: entry {k}", entry, "image", "qa_type", "question")
        classes = asked.setdefault(stem(entry["image"]), {})
        classes[entry["qa_type"]] = asked_class(entry["question"])
    pairs = {}
    for image, classes in asked.items():
        pairs[image] = []
        for kind, present in classes.items():
            absent = classes.get(kind.replace("gt", "hallu"))
            if kind.startswith("entity_gt") and present and absent:
                pairs[image].append([present, absent])
    return pairs


def asked_class(question):
    """The class of ChestX-ray14 that a question asks for, or None."""
    text = question.lower().replace("_", " ")
    for name in CXR14:
        if name.lower().replace("_", " ") in text:
            return class_name(name)


def build_cxr_align(official):
    """CXR-Align's cxr-align.json (Sec. 3) beside its images.

    An image is found by its name wherever it lies below ROOT, in MIMIC-CXR-JPG's folders too, which
    tell the patient. Rows have no labels: r, r^r and r^n of the chosen condition; all is test.
    """
    file = official.file("cxr-align.json")
    for source, entries in read_json(file, dict).items():
        for k, (name, entry) in enumerate(entries.items()):
            where = f"{file}: {source}, entry {k}"
            check_texts(where, entry, "chosen", "report", "omitted", "negation")
            condition = class_name(entry["chosen"])
            expect(condition in CONDITIONS, where, "chosen out of CheXpert's conditions, got "
                   f"{condition}")
            image = official.image(f"images/{name}.jpg")  # found by its name wherever it lies
            patient = re.search(r"/p(\d{8})/", image)  # in MIMIC-CXR-JPG's folders
            negative = {"condition": condition, "omitted": entry["omitted"],
                        "report": entry["negation"], "position": entry.get("location")}
            yield study(name, image, patient[1] if patient else name, "test",
                        report=entry["report"], hard_negatives=[negative])


# ---------------------------------------------------------------- the phantom: reports

NORMALS = {  # Tab. 1
    "No acute cardiopulmonary process.": 15829,
    "No acute intrathoracic process.": 4643,
    "No acute cardiopulmonary abnormality.": 4488,
    "No evidence of pneumonia.": 1014,
    "No evidence of acute cardiopulmonary process.": 1255,
}
# DIFFERS from Sec. 5.5: a hospital's 130,000 normal studies become drawn ones, --duplicates.
DUPLICATE = "No active lung lesion."  # Tab. 3: their one sentence
SEVERITY = {  # amount of a finding
    "minimal": 0.3,
    "mild": 0.4,
    "slight": 0.4,
    "moderate": 0.6,
    "severe": 0.8,
    "marked": 0.8,
    "extensive": 0.9,
}
SIDES = {"right": -1, "left": 1}  # the patient's: the sign of x
ZONES = {"upper": -0.38, "mid": -0.02, "lower": 0.30}  # of a lung: y
# The points of a line, x and y.
DEVICES = groups("""
    left chest pacemaker:
        0.62 -0.62
        0.48 -0.62
        0.48 -0.48
        0.62 -0.48
        0.62 -0.62
        0.20 -0.42
        0.02 -0.10
        0.00 0.30
        0.22 0.50
    right internal jugular catheter:
        -0.22 -0.98
        -0.15 -0.60
        -0.10 -0.20
        -0.08 0.10
    endotracheal tube:
        0.01 -1
        0.00 -0.60
        0.02 -0.28
    nasogastric tube:
        0.02 -1
        0.03 0.20
        0.10 0.62
        0.30 0.72""")
# By condition, but No Finding: what a report may say of it. A new condition needs a row here.
PHRASES = groups("""
    Enlarged Cardiomediastinum:
        {severity} widening of the mediastinum
        {severity} mediastinal widening
    Cardiomegaly:
        {severity} cardiomegaly
        {severity} enlargement of the heart
        {severity} cardiac enlargement
    Lung Opacity:
        {severity} hazy opacity in the {side} {zone} lung
        ill-defined {side} {zone} lung opacity
    Lung Lesion:
        {severity} {side} {zone} lung nodule
        {severity} rounded nodule in the {side} {zone} lung
        {side} {zone} lung mass
    Edema:
        {severity} pulmonary edema
        {severity} interstitial edema
    Consolidation:
        {severity} consolidation in the {side} {zone} lung
        {severity} focal {side} {zone} lobe consolidation
    Pneumonia:
        {side} {zone} lobe pneumonia
        {severity} pneumonia in the {side} {zone} lung
    Atelectasis:
        {severity} {side} basilar atelectasis
        {severity} atelectasis at the {side} base
        {side} atelectasis
    Pneumothorax:
        {severity} {side} pneumothorax
        {side} pneumothorax
    Pleural Effusion:
        {severity} {side} pleural effusion
        {severity} effusion on the {side}
    Pleural Other:
        {severity} {side} pleural thickening
        {side} lateral pleural thickening
    Fracture:
        {side} rib fracture
        {severity} displaced {side} rib fracture
        fracture of several {side} ribs
    Support Devices:
        {device}
        {device} in place
        {device} in standard position""")
FRAMES = lines("""
    there is {}.
    {}.
    {} is present.
    {} is noted.
    {} is seen.
    findings show {}.
    stable {}.
    {}, unchanged from the prior study.
    compared to the prior study, there is {}.
    unchanged {}.
    {} is again seen.
    no significant change in {}.
    new {} since the prior radiograph.""")
# By the conditions that a sentence denies, in the words of negations.py's denials.
ABSENT = groups("""
    Cardiomegaly:
        the heart is normal in size.
        heart size is normal.
        the heart is not enlarged.
        no cardiac enlargement.
    Enlarged Cardiomediastinum:
        normal mediastinal contours.
        the mediastinum is not widened.
    Pleural Effusion:
        no pleural effusion.
        no pleural fluid.
        there is no pleural effusion on either side.
    Pneumothorax:
        no pneumothorax.
        there is no evidence of pneumothorax.
        no pneumothorax seen.
    Consolidation:
        no focal consolidation.
        there is no consolidation.
    Edema:
        no pulmonary edema.
        no edema in the lungs.
        there is no evidence of edema.
    Fracture:
        no fracture.
        no bony fracture.
        no osseous fracture.
    Pneumonia:
        no evidence of pneumonia.
        no pneumonia.
    Atelectasis:
        no atelectasis.
    Lung Lesion:
        no nodule or mass.
        no nodules or masses.
        no lung nodule or mass.
    Lung Opacity:
        no pulmonary opacity.
        no airspace opacity.
        no lung infiltrate.
    Pleural Other:
        no pleural thickening.
    Support Devices:
        no catheter, tube or device.
        no line, tube or device.
    Pleural Effusion, Pneumothorax:
        no pleural effusion or pneumothorax.
    Consolidation, Edema, Pleural Effusion:
        no focal consolidation, pulmonary edema or pleural effusion.
    Atelectasis, Pneumonia, Pneumothorax:
        no atelectasis, pneumonia or pneumothorax.""")


def make_phantom(folder, **settings):
    """Draws the phantom into a folder -> path of its raw phantom.jsonl; reused if it is there.

    settings: of `build_phantom`.
    """
    folder = Path(folder).resolve()
    manifest = folder / "phantom.jsonl"
    note = folder / "phantom.json"
    text = f"{folder} {settings} {text_hash(Path(__file__).read_text())}"
    if not manifest.exists() or not note.exists() or note.read_text() != text:
        note.unlink(missing_ok=True)  # until all images are drawn anew
        write_manifest("phantom", folder, manifest, **settings)
        note.write_text(text)
    return manifest


def build_phantom(official, studies=3000, size=64, seed=0, normal_fraction=0.45, duplicates=0):
    """Drawn chests with matching reports: the embedded default, no patient's data.

    --normal-fraction of the --studies have one of Tab. 1's templates at that table's frequencies;
    --duplicates are more normal training studies with one identical sentence (Tab. 3); --size is
    the side in pixels, and another --seed another data set. ROOT is the folder to draw into.
    """
    for name in CONDITIONS[:-1]:
        expect(name in PHRASES.keys() & DRAWINGS, __file__, f"rows for {name} in PHRASES, DRAWINGS")
    os.makedirs(official.root / "images", exist_ok=True)
    share = np.array(list(NORMALS.values())) / sum(NORMALS.values())
    for i in range(studies + duplicates):
        rng = np.random.default_rng((seed, i))
        findings = {}
        patient = f"P{i * 2 // 3}"  # every second patient has two
        split = split_of(f"{seed}/{patient}")
        if i >= studies:
            report = DUPLICATE
            patient = f"D{i}"
            split = "train"
        elif rng.random() < normal_fraction:
            report = str(rng.choice(list(NORMALS), p=share))
        else:
            findings = _draw_findings(rng)
            report = _write_report(findings, rng)
        image = f"images/{i:06d}.png"
        _draw_chest(findings, size, rng).save(official.root / image, compress_level=0)
        targets = {name: int(name in findings) for name in CONDITIONS[:-1]}
        targets["No Finding"] = int(not findings.keys() - {"Support Devices"})
        yield study(f"{i:06d}", image, patient, split, report=report, targets=targets)


def _draw_findings(rng):
    """One to three conditions by name, each with its severity, amount, side, zone and device."""
    findings = {}
    for name in rng.choice(CONDITIONS[:-1], rng.choice([1, 1, 2, 3]), replace=False).tolist():
        severity = _pick(SEVERITY, rng)
        findings[name] = SimpleNamespace(
            severity=severity, amount=SEVERITY[severity] + rng.uniform(-0.1, 0.1),
            side=_pick(SIDES, rng), zone=_pick(ZONES, rng), device=_pick(DEVICES, rng))
    return findings


def _write_report(findings, rng):
    """A sentence for each finding and up to three for absent ones, in any order."""
    sentences = []
    for name, finding in findings.items():
        phrase = _pick(PHRASES[name], rng).format(**vars(finding))
        sentences.append(_pick(FRAMES, rng).format(phrase))
    absent = [names for names in ABSENT if findings.keys().isdisjoint(names.split(", "))]
    for names in rng.permutation(absent)[:rng.integers(4)]:
        sentences.append(_pick(ABSENT[names], rng))
    return " ".join(text[0].upper() + text[1:] for text in rng.permutation(sentences))


def _pick(options, rng):
    return str(rng.choice(list(options)))


# ---------------------------------------------------------------- the phantom: drawings


def _draw_chest(findings, size, rng):
    """A frontal chest with these findings, its right on the left, as a PIL image of that size."""
    chest = Chest(size, rng)
    for name, finding in findings.items():
        lung = chest.lungs * (chest.x * SIDES[finding.side] > 0)
        DRAWINGS[name](chest, lung, finding)
    image = _unit(chest.image) ** rng.uniform(0.85, 1.2) * rng.uniform(0.88, 1.08)
    image += rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    return Image.fromarray((_unit(image) * 255).astype(np.uint8))


class Chest:
    """A normal chest: x in -1..1, y from -1 (neck) to 1, u = |x|, lungs and image 0..1: (S, S)."""

    def __init__(self, size, rng):
        self.rng = rng
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        zoom = rng.normal(1, 0.04)
        self.x, self.y = np.meshgrid(zoom * axis + rng.normal(0, 0.04),
                                     zoom * axis + rng.normal(0, 0.04))
        self.u = np.abs(self.x)
        small = Image.fromarray(rng.standard_normal((16, 16), dtype=np.float32))
        self.texture = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
        self.wall = rng.uniform(0.76, 0.83) * np.sqrt(_unit(1 - ((self.y - 0.3) / 1.16) ** 2))
        dome = rng.uniform(0.54, 0.64) + 0.03 * np.sign(self.x)
        self.lungs = _step(self.wall - self.u) * _step(self.u - 0.1) * _step(dome - self.y)
        self.image = 0.05 + 0.5 * _step(self.wall + 0.15 - self.u)
        self.blend(self.lungs, 0.25 + 0.06 * self.texture)
        ribs = np.cos(rng.uniform(27, 31) * (self.y - 0.42 * self.u) + rng.uniform(0, 6))
        self.image += 0.11 * _unit(ribs) * _step(self.wall + 0.06 - self.u)
        for name in ("Cardiomegaly", "Enlarged Cardiomediastinum"):
            DRAWINGS[name](self, self.lungs, SimpleNamespace(amount=0))

    def blend(self, mask, value):
        """Draw with that brightness where mask is 1."""
        self.image += (value - self.image) * mask


def _unit(values):
    return np.clip(values, 0, 1)


def _step(distance, softness=0.06):
    """0 outside, 1 inside, a ramp of that width around distance 0."""
    return _unit(distance / softness + 0.5)


def _ellipse(x, y, x0, y0, rx, ry):
    """1 at the centre, 0 on the border, negative outside."""
    return 1 - np.sqrt(((x - x0) / rx) ** 2 + ((y - y0) / ry) ** 2)


def _draw_line(chest, points, value):
    """A polyline, a pixel or two wide."""
    size = len(chest.x)
    picture = Image.new("L", (size, size))
    places = size / 2 * (1 + np.ravel(points))
    ImageDraw.Draw(picture).line(places.tolist(), 255, max(1, size // 50))
    chest.blend(np.asarray(picture) / np.float32(255), value)


def _draw_organ(x, y, rx, ry, growth, chest, lung, finding):
    """The heart or the mediastinum, wider by a share of growth where a finding says so."""
    rx = rx * chest.rng.uniform(0.9, 1.1) + growth * finding.amount
    chest.blend(_unit(6 * _ellipse(chest.x, chest.y, x, y, rx, ry)), 0.66)


def _draw_patches(number, radius, softness, chest, lung, finding):
    """Bright patches in one zone of the lung: one or many, large or small, hazy or sharp."""
    radius *= 0.5 + 0.5 * finding.amount
    centre = (0.42, ZONES[finding.zone])
    for x, y in chest.rng.normal(centre, 0.04 + 0.015 * number, (number, 2)):
        patch = _ellipse(chest.u, chest.y, x, y, radius, radius) + 0.1 * chest.texture
        chest.blend(lung * (0.4 + 0.4 * finding.amount) * _unit(patch / softness), 0.64)


def _draw_rim(growth, value, chest, lung, finding):
    """A dark or bright rim along the chest wall."""
    rim = 0.04 + growth * finding.amount + 0.03 * chest.texture
    chest.blend(lung * _step(chest.u - chest.wall + rim), value)


def _draw_edema(chest, lung, finding):
    """A butterfly's haze in both lungs."""
    haze = _ellipse(chest.u, chest.y, 0.25, 0.05, 0.5, 0.7) + 0.1 * chest.texture
    chest.blend(chest.lungs * finding.amount * _unit(haze), 0.64)


def _draw_atelectasis(chest, lung, finding):
    """Bands above the diaphragm."""
    side = SIDES[finding.side]
    for y in (0.3, 0.2, 0.1)[:1 + int(3 * finding.amount)]:
        inner, outer = chest.rng.uniform(y - 0.05, y + 0.05, 2)
        _draw_line(chest, [(0.2 * side, inner), (0.6 * side, outer)], 0.7)


def _draw_effusion(chest, lung, finding):
    """A meniscus, highest at the chest wall."""
    level = 0.66 - 0.52 * finding.amount - 0.5 * _unit(chest.u - 0.42)
    chest.blend(lung * _step(chest.y - level, 0.14), 0.66)


def _draw_fracture(chest, lung, finding):
    """A bright edge across the ribs."""
    x, y = chest.rng.uniform((0.50, -0.25), (0.62, 0.10))
    side = SIDES[finding.side]
    _draw_line(chest, [(side * x, y), (side * x, y + 0.1 + 0.3 * finding.amount)], 0.7)


def _draw_device(chest, lung, finding):
    points = np.array([point.split() for point in DEVICES[finding.device]], float)
    _draw_line(chest, chest.rng.normal(points, 0.02), 1)


# By condition: what it adds to the picture. A new condition needs a row here.
DRAWINGS = {
    "Enlarged Cardiomediastinum": partial(_draw_organ, 0, -0.25, 0.18, 1.1, 0.20),
    "Cardiomegaly": partial(_draw_organ, 0.14, 0.40, 0.30, 0.30, 0.24),
    "Lung Opacity": partial(_draw_patches, 1, 0.50, 1.0),  # number, radius, softness
    "Lung Lesion": partial(_draw_patches, 1, 0.15, 0.3),
    "Edema": _draw_edema,
    "Consolidation": partial(_draw_patches, 1, 0.38, 0.2),
    "Pneumonia": partial(_draw_patches, 7, 0.18, 0.8),
    "Atelectasis": _draw_atelectasis,
    "Pneumothorax": partial(_draw_rim, 0.25, 0.09),
    "Pleural Effusion": _draw_effusion,
    "Pleural Other": partial(_draw_rim, 0.09, 0.62),
    "Fracture": _draw_fracture,
    "Support Devices": _draw_device,
}


# ---------------------------------------------------------------- check and cache


def why_unreadable(path):
    """Why an image cannot be read, without its name, which may hold a patient's number; or None."""
    try:
        read_image(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")


def run_jobs(function, jobs, workers):
    """function over jobs, in order, in so many processes, with a progress bar."""
    yield from tqdm(parallel(function, jobs, workers), total=len(jobs), disable=None)


def check_images(manifest, workers=0):
    """UserError with the line of the first image that cannot be read."""
    paths = [manifest.image_path(i) for i in range(len(manifest))]
    for i, why in enumerate(run_jobs(why_unreadable, paths, workers)):
        if why:
            raise UserError(f"{manifest.where(i)}: {why}; python data.py check lists all such "
                            "lines")


def check(path, image_root="", workers=CPUS):
    """Validates all lines and images, prints counts and labels; exits with 1 if some are wrong.

    --image-root replaces every record's root; --workers are processes that read images, 0 for none.
    """
    wrong = []
    images = {}  # of the lines that are right
    ids = set()
    patients = set()  # each with its splits
    reports = Counter()
    counts = Counter()
    with open_file(path) as file:
        for number, _, line in numbered_lines(file):
            where = f"{path}:{number}"
            try:
                record = parse_line(where, line)
                check_record(where, record)
                images[where] = image_path(where, record, path, image_root)
            except UserError as error:
                wrong.append(str(error))
                continue
            split = record.get("split", "no split")
            counts[f"split: {split}"] += 1
            patients.add((text_hash(patient_of(record)), split))
            ids.add(record["id"])
            if record.get("report"):
                reports[record["report"]] += 1
            for field in VALUES:
                for name, value in record.get(field, {}).items():
                    counts[f"{field}: {name} = {value}"] += 1
    reasons = run_jobs(why_unreadable, list(images.values()), workers)
    wrong += [f"{where}: {why}" for where, why in zip(images, reasons, strict=True) if why]
    people = len({patient for patient, _ in patients})
    repeated = {"patients are in two splits": len(patients) - people,
                "lines repeat an id": len(images) - len(ids),
                "lines repeat an image": len(images) - len(set(images.values()))}
    wrong += [f"{path}: {count} {what}" for what, count in repeated.items() if count]
    print_counts({"studies": len(images), "patients": people, "distinct reports": len(reports)})
    print_counts(dict(sorted(counts.items())))
    for text, count in reports.most_common(5):
        if count >= 10:  # a template, and nobody's own report
            print(f"{count:>11,} x {text[:80]}")  # Tab. 1
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    if wrong:
        sys.exit(1)


def cache(path, out, size=256, workers=CPUS, image_root=""):
    """Copies of all images, made smaller once, and a manifest of them; resumes.

    --size is the shorter side in pixels; --image-root replaces every record's root; --workers are
    processes that read images, 0 for none.
    """
    manifest = Manifest(path, image_root=image_root)
    folder = Path(out).resolve() / "images"
    target = folder.parent / Path(path).name
    expect(target != Path(path).resolve(), out, "another folder than the manifest's")
    jobs = [(manifest.image_path(i), folder, size) for i in range(len(manifest))]
    unreadable = 0
    with open_atomic(target) as file:
        for i, (copy, why) in enumerate(run_jobs(shrink, jobs, workers)):
            if why:
                print(f"wrong: {manifest.where(i)}: {why}", file=sys.stderr)
                unreadable += 1
                continue
            record = manifest[i] | {"root": str(folder), "image": copy.name}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        expect(unreadable < len(jobs), path, "images that can be read (is --image-root right?)")
    print(target)
    print_counts({"studies": len(jobs) - unreadable, "left out, unreadable": unreadable})


def shrink(job):
    """Writes the smaller copy of an image, unless it is there -> its path and, if not, why."""
    image, folder, size = job
    if not image.is_file():
        return image, "expected a regular file"
    key = str([str(image), size, image.stat().st_mtime_ns])  # a changed image has another name
    copy = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jpg"
    if copy.exists():
        return copy, None
    try:
        large = read_image(image, at_least=2 * size)
    except UserError as error:
        return copy, str(error).removeprefix(f"{image}: ")
    if min(large.size) > size:
        large = ImageOps.cover(large, (size, size), Image.Resampling.LANCZOS)
    with open_atomic(copy, "wb", sweep=False) as file:  # the folder may hold 400,000 others
        large.save(file, "JPEG", quality=95)
    return copy, None


# ---------------------------------------------------------------- flags and main

BUILDERS = {
    "openi": build_openi,
    "mimic": build_mimic,
    "chexpert-plus": build_chexpert_plus,
    "chexpert5x200": build_chexpert5x200,
    "rsna": build_rsna,
    "rsna-ab": build_rsna_ab,
    "siim": build_siim,
    "vindr": build_vindr,
    "cxr14": build_cxr14,
    "cxr-align": build_cxr_align,
    "phantom": build_phantom,
}
COMMANDS = {"check": check, "cache": cache}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (BUILDERS | COMMANDS).items():
        about = run.__doc__.replace("%", "%%")
        add = commands.add_parser(name, help=about.splitlines()[0], description=run.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter
                                  ).add_argument
        if name in BUILDERS:
            add("path", metavar="ROOT", help="folder of the official download; phantom: any")
            add("--out", required=True, metavar="X.jsonl", help="the manifest to write")
            add("--keep-missing", action="store_true", help="keep studies whose image is not there")
        else:
            add("path", metavar="X.jsonl", help="the manifest")
        if name == "cache":
            add("--out", required=True, metavar="DIR", help="the folder to write")
        for flag, parameter in inspect.signature(run).parameters.items():
            kind = type(parameter.default)
            if parameter.default is not parameter.empty:
                add(f"--{flag.replace('_', '-')}", type=minimum(0) if kind is int else kind,
                    default=parameter.default, help="see above")
    return parser.parse_args(argv)


def main(argv=None):
    options = vars(parse_args(argv))
    name = options.pop("command")
    if name in BUILDERS:
        counts = write_manifest(name, options.pop("path"), **options)
        print(options["out"])
        print_counts(counts)
    else:
        COMMANDS[name](**options)


if __name__ == "__main__":
    run_main(main)
