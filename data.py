"""Every data set of the paper from its official files, batches, the phantom (Sec. 5.1, App. B.1).

    python data.py SET ROOT --out X.jsonl     official download -> manifest, a frontal image a line
    python data.py check X.jsonl              validates lines and images; Tab. 1 for any corpus
    python data.py cache X.jsonl --out DIR    resized copies and a manifest that points to them

To add a data set, write its builder: a generator that yields a `study(...)` for each image, or a
few words that say why it leaves one out. Then name it in BUILDERS near the end of this file.
PadChest's could be:

    def build_padchest(official, args):
        "PadChest: its table and unpacked images; frontal views"
        columns = "ImageID", "StudyID", "PatientID", "Projection", "Report", "Labels"
        for where, row in official.table("PADCHEST_*.csv", *columns):  # or .csv.gz
            if row["Projection"] not in ("PA", "AP"):
                yield "view not PA or AP"
                continue
            expect(row["Labels"].startswith("["), where, "Labels as a list")  # FILE:LINE
            targets = {name: int(name.lower() in row["Labels"]) for name in ("Mass", "Pneumonia")}
            yield study(row["StudyID"], official.image(row["ImageID"]), row["PatientID"],
                        split_of(row["PatientID"]), report=row["Report"], targets=targets)

In this order: record and manifest, batches, builders, images, the phantom, check and cache, what
all scripts share, tables, flags. Symbols: B rows of one rank's batch, N = world x B, S the image
side in pixels.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import zipfile
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from tqdm import tqdm

from gcn import GraphError, collate_graphs, read_radgraph

CONDITIONS = (  # CheXbert's order
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices", "No Finding")
SPLITS = ("train", "val", "test")
TYPES = {  # of a record's fields, each of which but id and image may be absent
    "id": str, "root": str, "image": str, "split": str, "report": str, "original_report": str,
    "omitted": str, "labels": dict, "targets": dict, "graph": dict, "hard_negatives": list,
    "adversarial": list}
TRAINED = ("id", "patient", "report", "labels", "hard_negatives", "graph")  # images aside
MAX_TRIES = 20  # images drawn in place of one that cannot be read


# ---------------------------------------------------------------- the record and the manifest


def label_vector(labels, uncertain="positive"):
    """Labels by name -> C: (14,) float32 in CheXbert's order; -1 is 1 if uncertain="positive"."""
    # ASSUMPTION: C holds the positives, No Finding its own dimension; uncertain counts as positive.
    if uncertain not in ("positive", "negative"):
        raise ValueError(f"expected uncertain to be positive or negative, got {uncertain!r}")
    ones = [1, -1] if uncertain == "positive" else [1]
    return np.array([labels.get(name) in ones for name in CONDITIONS], np.float32)  # (14,)


def patient_of(record):
    """The record's patient id; where it is absent, null or empty, each study is a patient."""
    patient = record.get("patient")
    return record["id"] if patient in (None, "") else patient


def patient_hash(patient):
    """A patient id, or any text, as a signed 64-bit number, the same on every machine."""
    digest = hashlib.sha256(str(patient).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def split_of(patient):
    """train, val or test (80/10/10) by the patient's hash: a subset keeps its assignment."""
    # ASSUMPTION: sets without an official split get one by a hash of the patient id.
    share = patient_hash(patient) % 1000
    if share < 800:
        return "train"
    return "val" if share < 900 else "test"


def check_record(where, record):
    """UserError("WHERE: expected ...") at the first field of a manifest's record that is wrong."""
    check_side(where, record, ("id", "image"))
    expect(record.get("split", "train") in SPLITS, where, "split train, val or test")
    expect("\0" not in record["image"], where, "image without null characters")
    patient = patient_of(record)
    number = type(patient) in (int, float) and abs(patient) < math.inf  # not true, not NaN
    expect(number or isinstance(patient, str), where, "patient as a string or a number")
    for negative in record.get("hard_negatives", []):
        check_side(where, negative, ("condition", "report", "omitted"))
        expect(negative["condition"] in CONDITIONS, where, "a condition of each hard negative")
    for value in record.get("targets", {}).values():
        expect(value in (0, 1), where, "targets as 0 or 1")
    for pair in record.get("adversarial", []):
        names = isinstance(pair, list) and len(pair) == 2 and are_texts(*pair)
        expect(names, where, "adversarial as a list of [present, absent]")


def check_side(where, side, needed):
    """What a record and a hard negative have in common."""
    expect(isinstance(side, dict) and side.keys() >= set(needed), where,
           f"an object with {', '.join(needed)}")
    for name, kind in TYPES.items():
        expect(isinstance(side.get(name, kind()), kind), where, f"{name} as {kind.__name__}")
    for name, value in side.get("labels", {}).items():
        expect(name in CONDITIONS and value in (1, 0, -1), where,
               "labels of CheXpert's 14 conditions as 1, 0 or -1")
    check_graph(where, side.get("graph", {}))


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
        expect(split in (*SPLITS, "all"), path, f"split train, val, test or all, got {split!r}")
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
        length = int(self.columns["length"][i])
        offset = int(self.columns["offset"][i])
        return parse_line(self.where(i), os.pread(self.file.fileno(), length, offset))

    def line(self, i):
        """Line number in the file of row i."""
        return int(self.columns["line"][i])

    def where(self, i):
        """FILE:LINE of row i, for messages."""
        return f"{self.path}:{self.line(i)}"

    def image_path(self, i, record=None):
        """Image of row i (whose record may be at hand) as a path; UserError if out of its root."""
        return image_path(self.where(i), record or self[i], self.path, self.image_root)

    def digest(self):
        """A hash of what training reads of the rows, in order; images and their root left out."""
        return hashlib.sha256(self.columns["digest"].tobytes()).hexdigest()


def image_path(where, record, manifest, image_root=None):
    """The record's image as a path, links followed; UserError if it would leave the image root."""
    root = os.path.realpath(image_root or record.get("root") or os.path.dirname(manifest))
    path = os.path.realpath(os.path.join(root, record["image"]))
    expect(path.startswith(os.path.join(root, "")), where, "its image inside its root; where links "
           "lead to images, name their own folder by --image-root")
    return Path(path)


def load_columns(path, file):
    """`summary` of all lines by column, from the sidecar if that is of the file's size and time."""
    sidecar = f"{path}.index.npz"
    status = os.fstat(file.fileno())
    stamp = [status.st_size, status.st_mtime_ns]
    columns = read_sidecar(sidecar)
    names = summary({"id": ""}, 0, 0, 0).keys()
    if list(columns.pop("stamp", [])) == stamp and columns.keys() == names:
        return columns
    rows = {}
    for number, offset, line in numbered_lines(file):
        record = parse_line(f"{path}:{number}", line)
        check_record(f"{path}:{number}", record)  # once, so that later readers can trust it
        for name, value in summary(record, number, offset, len(line)).items():
            rows.setdefault(name, []).append(value)
    expect(rows, path, "at least one line")
    columns = {name: np.array(values) for name, values in rows.items()}
    with contextlib.suppress(UserError):  # a folder that is not writable
        with open_atomic(sidecar, "wb") as saved:
            np.savez(saved, stamp=stamp, **columns)
    return columns


def read_sidecar(path):
    """Its arrays by name; none if it is absent or damaged."""
    if not os.path.isfile(path):
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            intact = archive.testzip() is None  # numpy does not read, nor check, all bytes
        with np.load(path) as saved:
            return dict(saved) if intact else {}
    except Exception:  # zipfile's and numpy's, of many kinds for damaged bytes
        return {}


def summary(record, number, offset, length):
    """What the sidecar keeps of a line and its record."""
    labels = record.get("labels", {})
    negatives = record.get("hard_negatives", [])
    sides = [record, *negatives]
    trained = json.dumps([record.get(name) for name in TRAINED], sort_keys=True)
    return {
        "line": number, "offset": offset, "length": length,
        "split": record.get("split", ""),
        "patients": patient_hash(patient_of(record)),
        "reports": patient_hash(record.get("report", "")),
        "positives": [labels.get(name) == 1 for name in CONDITIONS],               # (14,)
        "negatives": len(negatives),
        "labelled": all({"report", "labels"} <= side.keys() for side in sides),
        "with_graphs": all("graph" in side for side in sides),
        "digest": patient_hash(trained),
    }


# ---------------------------------------------------------------- batches


class Studies(Dataset):
    """What training reads, indexed by (epoch, i); a sample is a pure function of (seed, epoch, i).

    manifest: rows of one split, with labels. image_size: S. tokenize: list of str -> dict of
    tensors. negatives: draw one stored hard negative anew each epoch; a study with none gets a
    report of this split with exactly one positive, its labels and graph (Sec. 4.1). graphs: add the
    RadGraph graphs. uncertain: see label_vector. An unreadable image is replaced by another study
    drawn from the same seed, so batches keep their size; "bad" lists it. UserError, before any
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
        stored = manifest.negatives > 0
        if negatives and not stored.all():
            expect(stored.any() and len(self.single), manifest.path, "hard_negatives to train "
                   "with, and for studies without them reports of one positive label; run "
                   "negations.py on it first")
            expect(len(set(self.reports[self.single])) > 1, manifest.path, "two different reports "
                   "of one positive label, since some studies have no hard_negatives")

    def __len__(self):
        return len(self.manifest)

    def __getitem__(self, key):
        epoch, i = map(int, key)
        rng = np.random.default_rng((self.seed, epoch, i))
        bad = []
        record, image = self._read(i)
        while image is None:
            bad.append(i)
            expect(len(bad) < MAX_TRIES, self.manifest.where(bad[0]), f"images, {MAX_TRIES} in a "
                   "row could not be read (is --image-root right? see: python data.py check)")
            i = int(rng.integers(len(self.manifest)))
            record, image = self._read(i)
        sample = {"index": i, "bad": bad, "pixels": pixels(image, self.image_size, rng)}
        sample |= self._text(record)
        if self.negatives:
            sample["hard"] = self._text(self._negative(i, record, rng))
        return sample

    def _read(self, i):
        """The record of row i and its image, or None if that cannot be read."""
        record = self.manifest[i]
        try:
            path = self.manifest.image_path(i, record)
            return record, read_image(path, at_least=self.image_size * 5 // 4)
        except UserError:
            return record, None

    def _text(self, record):
        return {"report": record.get("report", ""), "graph": record.get("graph", {}),
                "labels": label_vector(record.get("labels", {}), self.uncertain)}

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
        bad = {i for sample in samples for i in sample["bad"]}
        images = np.stack([sample["pixels"] for sample in samples])
        batch = {"pixels": torch.from_numpy(images),                                 # (B, 1, S, S)
                 "index": torch.tensor([sample["index"] for sample in samples]),     # (B,)
                 "bad": torch.tensor(sorted(bad), dtype=torch.int64)}
        batch |= self._collate_side(samples, "")
        if self.negatives:
            batch |= self._collate_side([sample["hard"] for sample in samples], "hard_")
        return batch

    def _collate_side(self, sides, prefix):
        labels = np.stack([side["labels"] for side in sides])
        batch = {f"{prefix}labels": torch.from_numpy(labels),                        # (B, 14)
                 f"{prefix}text": self.tokenize([side["report"] for side in sides])}
        if self.graphs:
            batch[f"{prefix}graph"] = collate_graphs([side["graph"] for side in sides])
        return batch


class GlobalBatches:
    """Batch sampler: step s takes rows [s N, (s + 1) N) of one permutation an epoch, a rank its B.

    batch_size is N, a multiple of world; the last incomplete batch is dropped, so all ranks take
    equal steps; start is the first step (to resume inside an epoch). Yields lists of (epoch, i).
    """

    def __init__(self, num_studies, batch_size, seed, epoch, rank=0, world=1, start=0):
        if batch_size < 1 or batch_size % world:
            raise UserError(f"expected a batch size divisible by {world} ranks, got {batch_size}")
        if num_studies < batch_size:
            raise UserError(f"expected at least {batch_size} studies (a batch), got {num_studies}")
        self.num_studies = num_studies
        self.seed = seed
        self.epoch = epoch
        self.share = batch_size // world  # B
        self.firsts = [step * batch_size + rank * self.share
                       for step in range(start, num_studies // batch_size)]

    def __len__(self):
        return len(self.firsts)

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_studies)
        for first in self.firsts:
            yield [(self.epoch, int(i)) for i in order[first:first + self.share]]


# ---------------------------------------------------------------- builders, one a set (Sec. 5.1)


def build_openi(official, args):
    """OpenI: Kaggle's two tables, else the official XML; targets from the human MeSH indexing"""
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
    names = dict(line.split(": ") for line in lines(MESH))
    classes = set()
    for term in terms:
        words = term.strip().split("/")
        classes |= {names.get(words[0]), names.get("/".join(words[:2]))}
    return {name: int(name in classes) for name in names.values()}


def openi_tables(official):
    frontal = {}
    for where, row in official.table("indiana_projections.csv", "uid", "filename", "projection"):
        expect(row["projection"] in ("Frontal", "Lateral"), where, "projection Frontal or Lateral")
        if row["projection"] == "Frontal":
            frontal.setdefault(row["uid"], []).append(f"images/{row['filename']}")
    for _, row in official.table("indiana_reports.csv", "uid", "MeSH", "findings", "impression"):
        report = join_text(row["findings"], row["impression"])
        yield row["uid"], frontal.get(row["uid"], []), report, row["MeSH"].split(";")


def openi_xml(official):
    files = [*official.root.glob("ecgen-radiology/*.xml")] or [*official.root.glob("*.xml")]
    expect(files, official.root, "indiana_reports.csv or the XML files, unpacked")
    for path in sorted(files, key=lambda path: (len(path.stem), path.stem)):
        tree = parse_xml(path)
        number = tree.find("uId[@id]")
        expect(number is not None, path, "a uId with an id")
        text = {node.get("Label"): node.text for node in tree.iter("AbstractText")}
        images = [f"{node.get('id')}.png" for node in tree.iter("parentImage")]
        yield (number.get("id").removeprefix("CXR"), images[:1],  # the first: no view is given
               join_text(text.get("FINDINGS"), text.get("IMPRESSION")),
               [node.text or "" for node in tree.iterfind("MeSH/major")])


def parse_xml(path):
    """A small XML file -> its root. Entities, which can grow without bound, need a DOCTYPE."""
    with open_file(path) as file:
        raw = file.read(MAX_XML_BYTES + 1)
    small = len(raw) <= MAX_XML_BYTES and b"<!DOCTYPE" not in raw
    expect(small, path, f"at most {MAX_XML_BYTES} bytes of XML without DOCTYPE")
    try:
        return ElementTree.fromstring(raw.decode("utf-8"))
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: expected well-formed XML in UTF-8 ({error})") from None


def build_mimic(official, args):
    """MIMIC-CXR-JPG with MIMIC-CXR's reports (files/pNN/PATIENT/STUDY.txt); frontal views"""
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
        text = official.file(f"{path}.txt", required=False)
        report = mimic_report(where, text) if text else None
        if report:
            yield study(image, official.image(f"{path}/{image}.jpg"), patient, splits[image],
                        report=report, labels=labels.get(number, {}), study_id=number)
        elif text:
            yield "neither findings nor impression"
        else:
            yield "no report file files/pNN/PATIENT/STUDY.txt here or in mimic-cxr-reports"


def mimic_report(where, path):
    """Findings and impression of a MIMIC-CXR report."""
    try:
        with open_text(path, errors="replace") as file:
            text = file.read()
    except UserError:  # which names the patient
        raise UserError(f"{where}: expected to read its report") from None
    return join_text(section(text, "FINDING"), section(text, "IMPRESSION", "CONCLUSION"))


def section(text, *names):
    """The body of a report's sections whose heading starts with one of these names."""
    pieces = re.split(r"^[ \t]*([A-Z][A-Z ()/,-]+):(?=\s)", text, flags=re.MULTILINE)[1:]
    bodies = zip(pieces[::2], pieces[1::2], strict=True)  # heading, body, heading, body, ...
    return join_text(*(body for heading, body in bodies if heading.startswith(names)))


def build_chexpert_plus(official, args):
    """CheXpert Plus: its CSV, CheXbert labels and RadGraph-XL graphs; frontal views"""
    labels = []
    graphs = {}
    for part in ("findings", "impression"):
        file = official.file(f"chexbert_labels/{part}_fixed.json", required=False)
        if file:
            labels.append(chexbert_labels(file))
        file = official.file(f"radgraph-XL-annotations/section_{part}.json", required=False)
        if file:
            records = read_json(file)
            expect(isinstance(records, list), file, "a list of graphs")
            graphs[f"section_{part}"] = records[::-1]  # to take them from the end
    sections = ("section_findings", "section_impression")
    columns = ("path_to_image", "frontal_lateral", "deid_patient_id", "split")
    for where, row in official.table("df_chexpert_plus_*.csv", *columns, *sections):
        image, view, patient, split = (row[column] for column in columns)
        records = []
        for name, rest in graphs.items():
            if len(row[name].split()) >= 2:  # only such sections have one
                expect(rest, where, "a graph for each section, the list ends before")
                records.append(rest.pop())
        report = join_text(*(row[name] for name in sections))
        if view != "Frontal":
            yield "not frontal"
        elif not report:
            yield "neither findings nor impression"
        else:
            number = "/".join(image.split("/")[-3:-1])
            yield study(number, official.image(image, folders=2), patient,
                        split.replace("valid", "val"), report=report,
                        labels=merge_labels([table.get(image, {}) for table in labels]),
                        graph=merge_graphs(where, records))
    for name, rest in graphs.items():
        expect(not rest, official.root, f"one graph a {name}, got more")


def chexbert_labels(file):
    """CheXbert's labels of one section, by image."""
    labels = {}
    for line, row in read_jsonl(file):
        where = f"{file}:{line}"
        image = row.get("path_to_image")
        expect(are_texts(image), where, "path_to_image as text")
        labels[image] = conditions_of(where, row)
    return labels


def merge_labels(tables):
    """Labels of a report from those of its sections: positive over uncertain over negative."""
    labels = {}
    order = (0, -1, 1)
    for table in tables:
        for name, value in table.items():
            labels[name] = max(labels.get(name, 0), value, key=order.index)
    if any(labels.get(name) in (1, -1) for name in CONDITIONS[:-2]):  # support devices aside
        labels.pop("No Finding", None)
    return labels if tables else None


def merge_graphs(where, records):
    """RadGraph records of consecutive sections -> one record; None if there are none."""
    words = []
    entities = {}
    for record in records:
        expect(isinstance(record, dict), where, "a RadGraph record for each section")
        check_graph(where, record)
        record = record.get("0", record)
        expect({"text", "entities"} <= record.keys(), where, "text and entities in each graph")
        text = str(record["text"]).split(" ")
        first = len(entities) + 1
        keys = {key: str(k) for k, key in enumerate(record["entities"], first)}
        for key, entity in record["entities"].items():
            places = [entity.get("start_ix"), entity.get("end_ix")]
            expect(all(place in range(len(text)) for place in places), where,
                   "start_ix and end_ix of each entity as places in the text")
            start, end = (int(place) + len(words) for place in places)
            relations = [[kind, keys[to]] for kind, to in entity.get("relations") or []]
            entities[keys[key]] = entity | {"start_ix": start, "end_ix": end,
                                            "relations": relations}
        words += text
    return {"text": " ".join(words), "entities": entities} if records else None


def build_chexpert5x200(official, args):
    """CheXpert 5x200: GLoRIA's chexpert_5x200.csv (it has no seed) beside CheXpert's images"""
    names = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    for where, row in official.table("chexpert_?x200.csv", "Path", *names):
        expect(row["Path"].count("/") > 2, where, "Path as CheXpert-v1.0/train/PATIENT/STUDY/IMAGE")
        patient, number = row["Path"].split("/")[-3:-1]
        yield study(f"{patient}/{number}", official.image(row["Path"], folders=2), patient, "test",
                    targets={name: int(label(where, row[name]) == 1) for name in names},
                    report=join_text(row.get("Report Impression")) or None)


def build_rsna(official, args):
    """RSNA pneumonia: stage 2 labels, GLoRIA's split; rsna-ab is without class Normal"""
    patients = set()
    positive = set()
    normal = set()
    for where, row in official.table("stage_2_train_labels.csv", "patientId", "Target"):
        patients.add(row["patientId"])
        if label(where, row["Target"]) == 1:
            positive.add(row["patientId"])
    if args.command == "rsna-ab":
        for where, row in official.table("stage_2_detailed_class_info.csv", "patientId", "class"):
            expect(row["class"] in RSNA_CLASSES, where, f"class {', '.join(RSNA_CLASSES)}")
            if row["class"] == "Normal":
                normal.add(row["patientId"])
    yield from glorias_studies(official, "stage_2_train_images", patients, "Pneumonia", positive,
                               normal)


def build_siim(official, args):
    """SIIM pneumothorax: masks to labels, one line an image, GLoRIA's shares"""
    images = set()
    positive = set()
    file = official.file("train-rle.csv", "stage_2_train.csv", "*train-rle.csv")
    for _, row in official.table(file, "ImageId", "EncodedPixels"):
        images.add(row["ImageId"])
        if row["EncodedPixels"] not in ("", "-1"):
            positive.add(row["ImageId"])
    # DIFFERS from Sec. 5.1: SIIM is split by image, not by row, so that none leaks into test.
    yield from glorias_studies(official, "dicom-images-train", images, "Pneumothorax", positive)


def glorias_studies(official, folder, images, target, positive, normal=()):
    """A study for each image, of one 0 or 1 target, in GLoRIA's split."""
    splits = glorias_split(sorted(images))
    for name in sorted(images):
        if name in normal:
            yield "class Normal"
        else:
            yield study(name, official.image(f"{folder}/{name}.dcm"), name, splits[name],
                        targets={target: int(name in positive)})


def build_vindr(official, args):
    """VinDr-CXR 1.0.0: the consensus for test, any of the three readers for train"""
    for part in ("train", "test"):
        marks = {}  # image -> class -> 1 if a reader marked it
        for where, row in official.table(f"image_labels_{part}.csv", "image_id", "No finding"):
            classes = marks.setdefault(row["image_id"], {})
            for column, value in row.items():
                name = class_name(column)
                if name != "No Finding" and column.lower() not in ("image_id", "rad_id"):
                    classes[name] = max(classes.get(name, 0), int(label(where, value) == 1))
        # ASSUMPTION: VinDr's val is CXR-CLIP's 20 % of the train images, drawn from the sorted ids.
        val = set()
        if part == "train":
            val = set(set_apart(sorted(marks), 0.2)[1])
        for name in sorted(marks):
            targets = marks[name] | {"No Finding": int(not any(marks[name].values()))}
            yield study(name, official.image(f"{part}/{name}.dicom"), name,
                        "val" if name in val else part, targets=targets)


def build_cxr14(official, args):
    """ChestX-ray14: Data_Entry_2017 with the official lists, else split by patient"""
    pairs = probmed_pairs(args.probmed) if args.probmed else {}
    lists = {}
    for part in ("train_val", "test"):
        path = official.file(f"{part}_list.txt", required=False)
        if path:
            with open_text(path, errors="replace") as file:
                lists |= {stem(line.strip()): part for line in file}
    if not lists:
        print("no train_val_list.txt and test_list.txt: split by patient, not the official split")
    table = official.file("Data_Entry_2017_v2020.csv", "Data_Entry_2017*.csv")
    for where, row in official.table(table, "Image Index", "Finding Labels", "Patient ID"):
        name = stem(row["Image Index"])
        patient = row["Patient ID"]
        classes = row["Finding Labels"].split("|")
        split = split_of(patient)
        expect(set(classes) <= set(CXR14), where, f"Finding Labels out of {', '.join(CXR14)}")
        if lists:
            expect(name in lists, where, "its image in one of the official lists")
            if lists[name] == "test":
                split = "test"
            elif split == "test":
                split = "train"
        if args.probmed and name not in pairs:
            yield "not among ProbMed's images"
            continue
        yield study(name, official.image(f"images/{row['Image Index']}"), patient, split,
                    targets={class_name(known): int(known in classes) for known in CXR14},
                    adversarial=pairs.get(name))


def probmed_pairs(path):
    """ProbMed's test.json -> image -> [[present class, absent class], ...]."""
    entries = read_json(path)
    questions = {}
    pairs = {}
    expect(isinstance(entries, list), path, "a list of entries")
    for k, entry in enumerate(entries):
        expect(isinstance(entry, dict), path, f"an object as entry {k}")
        image, kind, question = (entry.get(key) for key in ("image", "qa_type", "question"))
        expect(are_texts(image, kind, question), path,
               f"image, qa_type and question as texts in entry {k}")
        questions[stem(image), kind] = question
        pairs[stem(image)] = []
    for (name, kind), question in questions.items():
        if kind.startswith("entity_gt"):
            other = questions.get((name, kind.replace("gt", "hallu")), "")
            classes = [asked_class(question), asked_class(other)]
            if None not in classes:
                pairs[name].append(classes)
    return pairs


def asked_class(question):
    """The class of ChestX-ray14 that a question asks for, the longest name first, or None."""
    text = question.lower().replace("_", " ")
    for name in sorted(CXR14, key=len, reverse=True):
        if name.lower().replace("_", " ") in text:
            return class_name(name)
    return None


def build_cxr_align(official, args):
    """CXR-Align's cxr-align.json (Sec. 3) beside its images"""
    file = official.file("cxr-align.json")
    sources = read_json(file)
    expect(isinstance(sources, dict), file, "an object of sources")
    for source, entries in sources.items():
        expect(isinstance(entries, dict), file, "an object of sources, each an object of entries")
        for k, (name, entry) in enumerate(entries.items()):
            where = f"{file}: {source}, entry {k}"
            expect(isinstance(entry, dict), where, "an object")
            texts = [entry.get(key) for key in ("report", "omitted", "negation")]
            condition = CLASS_NAMES.get(str(entry.get("chosen")).lower())
            expect(condition and are_texts(*texts), where, "chosen, report, negation and omitted")
            image = official.image(f"images/{name}.jpg")
            patient = re.search(r"/p(\d{8})/", image)  # in MIMIC-CXR-JPG's folders
            negative = {"condition": condition, "omitted": texts[1], "report": texts[2],
                        "position": entry.get("location")}
            yield study(name, image, patient[1] if patient else name, "test", report=texts[0],
                        hard_negatives=[negative])


# ---------------------------------------------------------------- builders: what they share


class Download:
    """A set's official files below root, by relative path or by name; no image is opened."""

    def __init__(self, root):
        self.root = Path(root)
        self.images = {}

    def file(self, *names, required=True):
        """The first of these files (* and ? allowed), plain or .gz, in root or one folder below."""
        for name in names:
            for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
                paths = sorted(self.root.glob(pattern))
                if paths:
                    return paths[0]
        expect(not required, self.root, f"the file {' or '.join(names)} (or .gz)")
        return None

    def table(self, name, *columns):
        """Rows of a CSV that has these columns, as ("FILE:LINE", dict), stripped."""
        path = self.file(name) if isinstance(name, str) else name
        csv.field_size_limit(1 << 27)
        with open_text(path) as file:
            rows = csv.DictReader(file)
            try:
                header = {name.strip() for name in rows.fieldnames or ()}
                expect(header >= set(columns), f"{path}:1", f"columns {', '.join(columns)}")
                for row in rows:
                    where = f"{path}:{rows.line_num}"
                    whole = None not in row and None not in row.values()  # no cell more or less
                    expect(whole, where, f"{len(rows.fieldnames)} fields")
                    yield where, {name.strip(): cell.strip() for name, cell in row.items()}
            except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{path}:{max(1, rows.line_num)}: expected a complete CSV file in "
                                f"UTF-8 after this line ({type(error).__name__})") from None

    def image(self, path, folders=0):
        """The image at this path, else of this name anywhere, in any format; else the path itself.

        folders: how many of the path's folders belong to the name. A PNG or JPEG is taken for the
        converted copy of a DICOM of its name; UserError if two others have one name, since one may
        be a mask or of another size.
        """
        if os.path.isfile(self.root / path) and not path.endswith(DICOM):
            return path
        if folders not in self.images:
            self.images[folders] = self._images_by_name(folders)
        files = self.images[folders].get(name_of(path, folders), [path])
        converted = [file for file in files if not file.lower().endswith(DICOM)]
        first, *others = converted or files
        for other in others:
            same = os.path.samefile(self.root / first, self.root / other)  # a link to it
            expect(same, self.root / first, f"one image of its name, {other} is there too")
        return first

    def _images_by_name(self, folders):
        images = {}
        for folder, _, files in os.walk(self.root, followlinks=True):
            below = os.path.relpath(folder, self.root)
            for file in files:
                if file.lower().endswith(SUFFIXES):
                    path = os.path.normpath(os.path.join(below, file))
                    images.setdefault(name_of(path, folders), []).append(path)
        return images


def name_of(path, folders):
    """The last so many folders of a path, and its stem."""
    return (*path.split("/")[-1 - folders:-1], stem(path))


def stem(path):
    """File name without endings; OpenI's CXR2_IM-1.png and 2_IM-1.dcm.png are one image."""
    name = re.sub(r"(\.(dcm|dicom|png|jpe?g))+$", "", os.path.basename(path), flags=re.IGNORECASE)
    return re.sub(r"^CXR(\d+_)?(?=\d+_IM)", "", name)


def study(name, image, patient, split, **fields):
    """One image, a path below the root, of the study `name`; fields that are None are left out."""
    fields = {key: value for key, value in fields.items() if value is not None}
    return {"study": name, "image": image, "patient": patient, "split": split} | fields


def label(where, value):
    """1, 0, -1, or None if blank."""
    text = str(value).strip().lower().removesuffix(".0")
    if text in ("", "none", "nan"):
        return None
    expect(text in ("1", "0", "-1"), where, "a label 1, 0, -1 or blank")
    return int(text)


def conditions_of(where, row):
    """CheXpert's 14 columns -> labels by name, blanks left out."""
    values = {name: label(where, row.get(name, "")) for name in CONDITIONS}
    return {name: value for name, value in values.items() if value is not None}


def class_name(name):
    """A set's class by its CheXpert name where one exists, else its own with spaces."""
    name = name.replace("_", " ").strip()
    return CLASS_NAMES.get(name.lower(), name)


def join_text(*sections):
    """Sections, some of which may be None, as one line."""
    return " ".join(" ".join(text or "" for text in sections).split())


def set_apart(items, share):
    """scikit-learn's train_test_split(items, test_size=share, random_state=0): rest, share."""
    order = np.random.RandomState(0).permutation(len(items))  # noqa: NPY002 (published splits)
    count = math.ceil(len(items) * share)
    return [items[k] for k in order[count:]], [items[k] for k in order[:count]]


def glorias_split(names):
    """GLoRIA's 70/15/15 split: the split of each name."""
    train, rest = set_apart(names, 0.3)
    test, val = set_apart(rest, 0.5)
    return dict.fromkeys(train, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")


def write_manifest(name, records, root, out, keep_missing=False):
    """Writes what a builder yields, images that are not there left out -> the counts to print."""
    root = Path(root).resolve()
    seen = set()
    patients = {}
    counts = dict.fromkeys(("studies", *SPLITS), 0)
    skipped = Counter()
    missing = 0
    with open_atomic(out) as file:
        for record in tqdm(records, name, unit=" studies", disable=None):
            if isinstance(record, str):
                skipped[f"skipped: {record}"] += 1
                continue
            number = record.pop("study")
            identity = f"{name}/{number}"
            if number in seen:
                identity += f"/{stem(record['image'])}"
            seen.add(number)
            if not os.path.isfile(root / record["image"]):
                missing += 1
                if not keep_missing:
                    continue
            counts["studies"] += 1
            counts[record["split"]] += 1
            patients.setdefault(record["patient"], set()).add(record["split"])
            line = {"id": identity, "root": str(root), **record}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        expect(counts["studies"], root, f"studies of {name} and their images here; {missing} "
               f"images are missing (--keep-missing keeps such studies) {dict(skipped) or ''}")
    counts[f"image not there ({'kept' if keep_missing else 'left out'})"] = missing
    counts["patients"] = len(patients)
    counts["patients in two splits"] = sum(len(splits) > 1 for splits in patients.values())
    return aligned(counts | skipped)


def aligned(counts):
    """Counts by name as lines of a table."""
    width = max(map(len, counts))
    return "\n".join(f"  {name:<{width}}  {count:>9,}" for name, count in counts.items())


# ---------------------------------------------------------------- images (App. B.1)


def read_image(path, at_least=None):
    """One radiograph as a grey 8-bit PIL image.

    path: PNG or JPEG of 8 or 16 bits, or DICOM (needs pydicom; MONOCHROME1 is inverted). at_least:
    side in pixels that suffices; a JPEG is decoded at 1/2, 1/4 or 1/8 if both sides stay above it.
    UserError names the file; the size is checked before anything is decoded.
    """
    if str(path).lower().endswith(DICOM):
        return read_dicom(path)
    with open_file(path) as file:
        try:
            image = Image.open(file, formats=("PNG", "JPEG"))
            count = image.width * image.height
            if count <= MAX_PIXELS:
                if at_least is not None:
                    image.draft("L", (at_least, at_least))
                image.load()
        except Exception as error:  # Pillow's, of many kinds for damaged bytes
            raise broken_image(path, error) from None
    expect(count <= MAX_PIXELS, path, f"at most {MAX_PIXELS} pixels")
    if image.mode.startswith("I") or image.mode == "F":  # which convert() would clip
        return to_grey(np.asarray(image))
    return image.convert("L")


def read_dicom(path):
    """A grey image of one frame in DICOM, by pydicom where it is installed."""
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: reading DICOM needs pydicom (pip install pydicom)") from None
    with open_file(path) as file:
        try:
            header = pydicom.dcmread(file)
            count = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
            inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"
            values = header.pixel_array if count <= MAX_PIXELS else None
        except Exception as error:  # pydicom's, of many kinds for damaged bytes
            raise broken_image(path, error) from None
    expect(values is not None, path, f"at most {MAX_PIXELS} pixels")
    expect(values.ndim == 2 and values.size, path, "a grey image of one frame")
    values = values.astype(np.float32)
    return to_grey(-values if inverted else values)


def broken_image(path, error):
    kind = type(error).__name__  # its message may hold what the file holds
    return UserError(f"{path}: expected an intact PNG, JPEG or grey DICOM image ({kind})")


def to_grey(values):
    """More than 8 bits -> an 8-bit image, the darkest value 0 and the brightest 255 (flat: 0)."""
    # ASSUMPTION: images of more than 8 bits are scaled by their own minimum and maximum.
    values = values.astype(np.float32)
    low = float(values.min())
    high = float(values.max())
    scaled = (values - low) * (255 / max(high - low, 1e-6))
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def pixels(image, size, rng=None):
    """PIL image -> (1, S, S) uint8: all of it, or with rng a random crop, resized in one step."""
    width, height = image.size
    box = (0, 0, width, height)
    if rng is not None:
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


def crop_borders(image):
    """Cuts black padding away: rows and columns in which hardly any pixel is not black."""
    # DIFFERS from App. B.1: only with cache --crop-borders, and by brightness, not by contours.
    bright = np.asarray(image) > 10
    rows = np.flatnonzero(bright.mean(1) > 0.02)
    columns = np.flatnonzero(bright.mean(0) > 0.02)
    if not len(rows) or not len(columns):
        return image
    return image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


# ---------------------------------------------------------------- the phantom: reports


def make_phantom(folder, studies=3000, size=64, seed=0, normal_fraction=0.45, duplicates=0):
    """Draws the phantom into a folder -> path of its raw phantom.jsonl; reused if it is there.

    studies: normal_fraction of them have one of Tab. 1's templates at that table's frequencies;
    duplicates: more normal training studies with one identical sentence (Tab. 3); size in pixels.
    """
    folder = Path(folder).resolve()
    manifest = folder / "phantom.jsonl"
    note = folder / "phantom.json"
    settings = dict(studies=studies, size=size, seed=seed, normal_fraction=normal_fraction,
                    duplicates=duplicates)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    text = json.dumps([settings, str(folder), code])
    if not manifest.exists() or not note.exists() or note.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)  # until all images are drawn anew
        records = build_phantom(Download(folder), SimpleNamespace(**settings))
        write_manifest("phantom", records, folder, manifest)
        note.write_text(text)
    return manifest


def build_phantom(official, args):
    """Drawn chests with matching reports: the embedded default, no patient's data"""
    right = args.studies >= 1 and 32 <= args.size <= 2048 and 0 <= args.normal_fraction <= 1
    expect(right, "phantom", "at least 1 study, 32 to 2048 pixels, a normal fraction of 0 to 1")
    (official.root / "images").mkdir(parents=True, exist_ok=True)
    share = np.array(list(NORMALS.values())) / sum(NORMALS.values())
    for i in range(args.studies + args.duplicates):
        rng = np.random.default_rng((args.seed, i))
        findings = {}
        if i < args.studies and rng.random() >= args.normal_fraction:
            findings = _draw_findings(rng)
        if findings:
            report = _write_report(findings, rng)
        else:
            report = str(rng.choice(list(NORMALS), p=share))
        patient = f"P{i * 2 // 3}"  # every second patient has two
        split = split_of(f"{args.seed}/{patient}")
        if i >= args.studies:
            report = DUPLICATE
            patient = f"D{i}"
            split = "train"
        image = f"images/{i:06d}.png"
        _draw_chest(findings, args.size, rng).save(official.root / image, compress_level=0)
        targets = {name: int(name in findings) for name in CONDITIONS[:-1]}
        targets["No Finding"] = int(not findings.keys() - {"Support Devices"})
        severity = {name: round(finding.amount, 2) for name, finding in findings.items()}
        yield study(f"{i:06d}", image, patient, split, report=report, targets=targets,
                    severity=severity)


def _draw_findings(rng):
    """One to three conditions, and what comes along: amount (0.25..1), zone, side and device."""
    weights = np.array(list(WEIGHTS.values()))
    count = rng.choice([1, 2, 3], p=[0.55, 0.30, 0.15])
    names = rng.choice(list(WEIGHTS), count, replace=False, p=weights / weights.sum()).tolist()
    companions = [other for name in sorted(names) for other in COMPANIONS.get(name, ())]
    names += [name for name in companions if rng.random() < 0.3]
    findings = {}
    for name in WEIGHTS:
        if name in names:
            findings[name] = SimpleNamespace(
                amount=float(rng.uniform(0.25, 1.0)), zone=int(rng.integers(3)),
                side=int(rng.choice((-1, 1))),  # -1: the patient's right
                device=str(rng.choice(list(DEVICES))))
    return findings


def _write_report(findings, rng):
    """A sentence for each finding, up to three absent ones, sometimes a remark, in any order."""
    sentences = [_describe(name, finding, rng) for name, finding in findings.items()]
    absent = rng.permutation([name for name in ABSENT if name not in findings])[:rng.integers(4)]
    alone = {"Cardiomegaly", "Enlarged Cardiomediastinum", "Lung Lesion"}  # odd in a list
    if len(absent) == 3 and not alone & set(absent):
        first, second, third = (name.lower() for name in absent)
        sentences.append(f"no {first}, {second} or {third}.")
    else:
        sentences += [_pick(lines(ABSENT[name]), rng) for name in absent]
    if rng.random() < 0.3:
        sentences.append(_pick(lines(REMARKS), rng))
    order = rng.permutation(len(sentences))
    return " ".join(sentences[k][0].upper() + sentences[k][1:] for k in order)


def _describe(name, finding, rng):
    grade = min(2, int((finding.amount - 0.25) * 4))
    severity = _pick(SEVERITY[grade], rng)
    phrase = _pick(lines(PHRASES[name]), rng).format(
        severity=severity, device=finding.device, side="right" if finding.side < 0 else "left",
        zone=("upper", "mid", "lower")[finding.zone])
    frames = lines(FRAMES)
    if name != "Support Devices":
        frames += lines(CHANGED)
    return _pick(frames, rng).format(phrase)


def _pick(options, rng):
    return options[rng.integers(len(options))]


# ---------------------------------------------------------------- the phantom: drawings


def _draw_chest(findings, size, rng):
    """A frontal chest with these findings, its right on the left, as a PIL image of that size."""
    chest = Chest(size, rng)
    for side in (-1, 1):
        chest.lungs[side] = _draw_lung(chest, findings.get("Atelectasis"), side)
    amounts = {name: finding.amount for name, finding in findings.items()}
    _draw_heart(chest, amounts.get("Cardiomegaly", 0), amounts.get("Enlarged Cardiomediastinum", 0))
    for name, finding in findings.items():
        x = rng.uniform(0.32, 0.52)
        y = rng.uniform(-0.06, 0.06)
        centre = x, y + (-0.38, -0.02, 0.30)[finding.zone]
        if name in DRAWINGS:
            DRAWINGS[name](chest, chest.lungs[finding.side], finding.amount, centre)
    _draw_bones(chest, findings.get("Fracture"))
    if "Support Devices" in findings:
        _draw_device(chest, findings["Support Devices"].device)
    image = _unit(chest.image) ** rng.uniform(0.85, 1.2) * rng.uniform(0.88, 1.08)
    image += rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    return Image.fromarray((_unit(image) * 255).astype(np.uint8))


class Chest:
    """x in -1..1, y from -1 (neck) to 1 (abdomen), u = |x|, each (S, S); the image in 0..1."""

    def __init__(self, size, rng):
        self.rng = rng
        self.lungs = {}
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        turn, dx, dy, zoom = rng.normal((0, 0, 0, 1), (0.04, 0.03, 0.03, 0.04)).tolist()
        across = zoom * (axis[None] - dx)
        down = zoom * (axis[:, None] - dy)
        self.x = across + turn * down
        self.y = down - turn * across
        self.u = np.abs(self.x)
        self.texture = _noise(size, rng, 16) + 0.6 * _noise(size, rng, 6)
        waist = _step(self.y + 0.86, 0.30) ** 0.6
        self.body = _step(0.28 + 0.66 * waist - self.u + 0.04 * np.cos(2 * self.y))
        self.image = 0.05 + self.body * (0.47 + 0.06 * _unit(self.u))
        self.blend(0.8 * self.body * _step(self.y - 0.5, 0.5), 0.68)  # abdomen

    def blend(self, mask, value):
        self.image += (value - self.image) * mask


def _unit(values):
    return np.clip(values, 0, 1)


def _step(distance, softness=0.04):
    """0 outside, 1 inside, a ramp of that width around distance 0."""
    return _unit(distance / softness + 0.5)


def _line(x, y, points, width):
    """A polyline of that half width, at least half a pixel."""
    width = max(width, 1.2 / len(x))
    best = np.full_like(x, 9)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        dx = x1 - x0
        dy = y1 - y0
        t = _unit(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy))
        best = np.minimum(best, (x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2)
    return _step(width - np.sqrt(best), width)


def _ellipse(x, y, x0, y0, rx, ry):
    """1 at the centre, 0 on the border, negative outside."""
    return 1 - np.sqrt(((x - x0) / rx) ** 2 + ((y - y0) / ry) ** 2)


def _noise(size, rng, cells):
    small = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def _draw_lung(chest, atelectasis, side):
    """One lung; s is the outward coordinate, so that both sides share one geometry."""
    rng = chest.rng
    y = chest.y
    s = side * chest.x
    outer = rng.uniform(0.76, 0.83) * np.sqrt(_unit(1 - ((y - 0.3) / 1.16) ** 2))
    raised = 0
    if atelectasis and atelectasis.side == side:
        raised = 0.14 * atelectasis.amount
    dome = rng.uniform(0.50, 0.58) + 0.03 * side - raised + 0.24 * ((s - 0.38) / 0.42) ** 2
    mask = _step(outer - s, 0.06) * _step(s - 0.10, 0.06) * _step(dome - y)
    angle = np.arctan2(y - 0.02, s - 0.16) * int(rng.integers(9, 13)) + rng.uniform(0, 6)
    vessels = 0.06 * _unit(np.cos(angle + 0.8 * chest.texture)) ** 2 * _step(0.6 - s, 0.7)
    hilum = 0.14 * np.exp(-((s - 0.24) / 0.14) ** 2 - ((y - 0.02) / 0.30) ** 2)
    chest.blend(mask, 0.20 + 0.035 * chest.texture + vessels + hilum)
    return SimpleNamespace(s=s, outer=outer, mask=mask)


def _draw_heart(chest, enlarged, widened):
    """Mediastinum, trachea, heart, aortic knob and the stomach's bubble."""
    rng = chest.rng
    x = chest.x
    y = chest.y
    u = chest.u
    half = rng.uniform(0.13, 0.17) + 0.20 * widened * np.exp(-((y + 0.3) / 0.32) ** 2)
    chest.blend(_step(half - u, 0.10), 0.66)
    chest.blend(0.5 * _step(0.05 - u) * _step(-0.4 - y), 0.42)  # trachea
    rx = rng.uniform(0.27, 0.33) + 0.24 * enlarged
    ry = rng.uniform(0.27, 0.33) + 0.08 * enlarged
    heart = _ellipse(x + 0.25 * (y - 0.4), y, 0.12 + 0.07 * enlarged, 0.40, rx, ry)
    chest.blend(0.95 * _step(heart, 0.16), 0.66 + 0.03 * chest.texture)
    chest.blend(0.8 * _step(_ellipse(x, y, 0.14, -0.38, 0.11, 0.11), 0.3), 0.66)  # aortic knob
    bubble = _ellipse(x, y, 0.42, 0.80, 0.16, 0.08) + 0.1 * chest.texture
    chest.blend(0.8 * _step(bubble, 0.5), 0.40)


def _draw_opacity(chest, lung, amount, centre):
    """Hazy, without an edge."""
    patch = _ellipse(lung.s, chest.y, *centre, 0.42, 0.36) + 0.1 * chest.texture - 0.5
    chest.blend(lung.mask * (0.3 + 0.35 * amount) * _step(patch, 1.0), 0.62)


def _draw_lesion(chest, lung, amount, centre):
    """Round and sharp."""
    radius = 0.05 + 0.08 * amount
    nodule = _ellipse(lung.s, chest.y, *centre, radius, radius)
    chest.blend(lung.mask * 0.85 * _step(nodule, 0.4), 0.64)


def _draw_edema(chest, lung, amount, centre):
    """In both lungs a butterfly's haze and septal lines."""
    haze = np.exp(-((chest.u - 0.30) / 0.30) ** 2 - ((chest.y - 0.05) / 0.42) ** 2)
    septa = _unit(np.sin(50 * chest.y + 4 * chest.texture)) * _step(chest.u - 0.5, 0.3)
    both = chest.lungs[-1].mask + chest.lungs[1].mask
    chest.blend(both * amount * (0.75 * haze + 0.2 * septa), 0.62)


def _draw_consolidation(chest, lung, amount, centre):
    """Dense, with dark bronchi."""
    x, y = centre
    dense = _ellipse(lung.s, chest.y, x, y, 0.20 + 0.16 * amount, 0.12 + 0.10 * amount)
    bronchi = _line(lung.s, chest.y, [(0.15, y - 0.1), (x, y), (x + 0.3, y + 0.12)], 0.02)
    mask = lung.mask * _step(dense + 0.1 * chest.texture, 0.3)
    chest.blend(mask * (0.9 - 0.4 * bronchi), 0.64)


def _draw_pneumonia(chest, lung, amount, centre):
    """Several soft patches."""
    x, y = centre
    spots = np.stack([chest.rng.normal(x, 0.12, 6), chest.rng.normal(y, 0.11, 6)], 1)
    patches = 0
    for spot in spots.tolist():
        patch = _ellipse(lung.s, chest.y, *spot, 0.15, 0.13) + 0.1 * chest.texture - 0.35
        patches = patches + _step(patch, 1.2)
    chest.blend(lung.mask * np.clip((0.4 + 0.5 * amount) * patches, 0, 0.9), 0.62)


def _draw_atelectasis(chest, lung, amount, centre):
    """Bands above a diaphragm that is raised."""
    for k in range(1 + int(3 * amount)):
        ends = chest.rng.uniform(((0.15, 0.27), (0.55, 0.27)), ((0.30, 0.37), (0.72, 0.37)))
        band = _line(lung.s, chest.y + 0.1 * k, ends.tolist(), 0.012 + 0.012 * amount)
        chest.blend(lung.mask * band * _unit(0.6 + 0.15 * chest.texture), 0.64)


def _draw_pneumothorax(chest, lung, amount, centre):
    """A dark rim without vessels, inside it the pleural line."""
    y = chest.y
    gap = (0.04 + 0.18 * amount) * _step(0.35 - y, 0.9) + 0.10 * amount * _step(-0.45 - y, 0.3)
    depth = lung.outer - lung.s - gap
    chest.blend(lung.mask * _step(-depth), 0.09)
    pleura = _step(0.014 - np.abs(depth), 0.03)
    chest.blend(lung.mask * 0.6 * pleura * _step(0.3 - y, 0.1), 0.55)


def _draw_effusion(chest, lung, amount, centre):
    """A meniscus, highest at the chest wall."""
    rise = 0.50 * _unit(lung.s - 0.42)
    level = 0.66 - 0.52 * amount - rise + 0.01 * chest.texture
    inside = _step(lung.outer - lung.s, 0.06) * _step(lung.s - 0.08) * chest.body
    chest.blend(0.95 * inside * _step(chest.y - level, 0.14), 0.66)


def _draw_thickening(chest, lung, amount, centre):
    """An irregular bright rim."""
    rim = 0.04 + 0.09 * amount + 0.03 * np.sin(9 * chest.y + 20 * centre[0])
    side = _step(lung.s - lung.outer + rim, 0.06) * _step(0.45 - np.abs(chest.y + 0.05), 0.3)
    chest.blend(0.85 * lung.mask * side, 0.62)


def _draw_bones(chest, fracture):
    """Ribs, of which a fracture displaces the outer parts, collar bones and spine."""
    rng = chest.rng
    y = chest.y
    u = chest.u
    slope = y - 0.42 * u + 1.1 * _unit(u - 0.55) ** 2
    phase = slope * rng.uniform(4.3, 4.9) + rng.random()
    wall = 0.86 * np.sqrt(_unit(1 - ((y - 0.3) / 1.22) ** 2))
    cage = _step(wall - u, 0.08) * _step(0.62 - y, 0.2) * _step(u - 0.1, 0.2)
    if fracture:
        s = fracture.side * chest.x
        cy = rng.uniform(-0.25, 0.20)
        cx = rng.uniform(0.50, 0.62)
        near = _step(0.14 + 0.14 * fracture.amount - np.abs(y - cy), 0.06)
        phase = phase + (0.35 + 0.15 * fracture.amount) * near * _step(s - cx, 0.03)
        edge = near * _step(0.03 - np.abs(s - cx), 0.03)
        chest.blend((0.25 + 0.25 * fracture.amount) * edge, 0.85)
    chest.image += 0.11 * cage * _unit(np.cos(2 * np.pi * phase)) ** 1.5
    for side in (-1, 1):
        collar = _line(side * chest.x, y, [(0.08, -0.62), (0.42, -0.70), (0.80, -0.82)], 0.03)
        chest.blend(0.4 * collar, 0.78)
    chest.image += 0.05 * _step(0.06 - u) * np.cos(28 * y) * chest.body  # spine


def _draw_device(chest, device):
    points = [[float(number) for number in line.split()] for line in lines(DEVICES[device])]
    width = 0.025 if device == "endotracheal tube" else 0.012
    chest.blend(_line(chest.x, chest.y, points, width), 1.0)
    if device == "left chest pacemaker":
        box = 0.10 - np.maximum(np.abs(chest.x - 0.55), 1.2 * np.abs(chest.y + 0.55))
        chest.blend(_step(box, 0.03), 1.0)


# ---------------------------------------------------------------- check, cache, sheet


def run_jobs(function, jobs, workers, title):
    """function over jobs, in order, in so many processes, with a progress bar."""
    yield from tqdm(parallel(function, jobs, workers), title, len(jobs), disable=None)


def why_unreadable(path):
    """Why an image cannot be read, without its name, which may hold a patient's number; or None."""
    try:
        read_image(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def check_images(manifest, workers=0):
    """UserError with the line of the first image that cannot be read."""
    paths = [manifest.image_path(i) for i in range(len(manifest))]
    for i, why in enumerate(run_jobs(why_unreadable, paths, workers, "images")):
        if why:
            raise UserError(f"{manifest.where(i)}: {why}; python data.py check lists all such "
                            "lines")


def check(path, image_root=None, workers=0):
    """Validates all lines and images, prints counts and labels; exits with 1 if some are wrong"""
    wrong = []
    images = {}
    patients = {}
    ids = Counter()
    reports = Counter()
    splits = Counter()
    classes = Counter()
    for where, record, image in checked_lines(path, image_root, wrong):
        images[where] = image
        split = record.get("split", "no split")
        ids[record["id"]] += 1
        reports[record.get("report", "")] += 1
        splits[split] += 1
        patients.setdefault(str(patient_of(record)), set()).add(split)
        for field in ("labels", "targets"):
            for name, value in record.get(field, {}).items():
                classes[field, name, value] += 1
    reasons = run_jobs(why_unreadable, list(images.values()), workers, "images")
    wrong += [f"{where}: {why}" for where, why in zip(images, reasons, strict=True) if why]
    shared = sum(len(names) > 1 for names in patients.values())
    if shared:
        wrong.append(f"{path}: {shared} patients are in two splits")
    if len(ids) < len(images):
        wrong.append(f"{path}: {sum(n > 1 for n in ids.values())} ids are there more than once")
    print(aligned({"studies": len(images), **splits, "patients": len(patients),
                   "patients in two splits": shared, "distinct reports": len(reports),
                   "studies that share their report": sum(n for n in reports.values() if n > 1)}))
    show_classes(classes, len(images))
    for text, count in reports.most_common(5):
        if text and count > 1:
            print(f"  {count:>9,} x {text[:80]}")  # Tab. 1
    return wrong


def checked_lines(path, image_root, wrong):
    """Yields FILE:LINE, record and image of the lines that are right; notes what is wrong."""
    with open_file(path) as file:
        for number, _, line in numbered_lines(file):
            where = f"{path}:{number}"
            try:
                record = parse_line(where, line)
                check_record(where, record)
                image = image_path(where, record, path, image_root)
            except UserError as error:
                wrong.append(str(error))
            else:
                yield where, record, image


def show_classes(classes, studies):
    """A line for each class of labels and targets: how often it has each value."""
    for field, name in dict.fromkeys(key[:2] for key in classes):
        one, zero, unsure = (classes[field, name, value] for value in (1, 0, -1))
        print(f"  {field:<8} {name:<28} 1: {one:>7,}  0: {zero:>7,}  -1: {unsure:>7,}  "
              f"absent: {studies - one - zero - unsure:>7,}")


def cache(path, out, size=256, crop=False, workers=0, image_root=None):
    """Copies of all images, made smaller once, and a manifest of them; resumes"""
    manifest = Manifest(path, image_root=image_root)
    target = Path(out) / Path(path).name
    expect(target.resolve() != Path(path).resolve(), out, "another folder than the manifest's")
    folder = (Path(out) / (f"{size}px-cropped" if crop else f"{size}px")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = [manifest.image_path(i) for i in range(len(manifest))]
    names = [copy_name(image) for image in images]
    jobs = [(image, folder / name, size, crop) for image, name in zip(images, names, strict=True)]
    wrong = []
    with open_atomic(target) as file:
        for i, why in enumerate(run_jobs(shrink, jobs, workers, "cache")):
            if why:
                wrong.append(f"{manifest.where(i)}: {why}")
            else:
                record = manifest[i] | {"root": str(folder), "image": names[i]}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        expect(len(wrong) < len(jobs), path, "images that can be read (is --image-root right?); "
               f"the first: {next(iter(wrong), 'none')}")
    print(target)
    print(aligned({"studies": len(jobs) - len(wrong), "left out, unreadable": len(wrong)}))
    return wrong


def copy_name(image):
    """The name of an image's copy, which changes with the image's path, size and time."""
    key = str(image)
    if os.path.exists(image):
        status = image.stat()
        key += f"\0{status.st_size}\0{status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return f"{digest[:2]}/{digest}.jpg"


def shrink(job):
    """Writes the smaller copy of an image, unless a whole one is there -> why not, or None."""
    image, target, size, crop = job
    if target.exists() and why_unreadable(target) is None:
        return None
    try:
        large = read_image(image, at_least=None if crop else 2 * size)
    except UserError as error:
        return str(error).removeprefix(f"{image}: ")
    if crop:
        large = crop_borders(large)
    scale = min(1.0, size / min(large.size))
    shape = [max(1, round(side * scale)) for side in large.size]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(target, "wb") as file:
        large.resize(shape, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
    return None


def draw_sheet(path, out, image_root=None, side=256):
    """Twelve images of a manifest, evenly spread, with the names of their positive classes."""
    manifest = Manifest(path, image_root=image_root)
    sheet = Image.new("L", (4 * side, 3 * side))
    count = min(12, len(manifest))
    black = 0
    for k in range(count):
        row = k * len(manifest) // count
        record = manifest[row]
        try:
            image = read_image(manifest.image_path(row, record))
        except UserError:
            black += 1
            continue
        tile = image.resize((side, side), Image.Resampling.BICUBIC)
        classes = record.get("targets") or record.get("labels") or {}
        text = "\n".join(name for name, value in classes.items() if value == 1)
        ImageDraw.Draw(tile).text((4, 4), text, fill=255)
        sheet.paste(tile, (k % 4 * side, k // 4 * side))
    with open_atomic(out, "wb") as file:
        sheet.save(file, "PNG")
    print(f"{out}: {count - black} images, {black} left black because they could not be read")


# ---------------------------------------------------------------- what all scripts share


class UserError(ValueError):
    """A bad file, row or flag: one line that names file and line and what was expected there."""


def expect(condition, where, what):
    """UserError("WHERE: expected WHAT") unless the condition holds."""
    if not condition:
        raise UserError(f"{where}: expected {what}")


def are_texts(*values):
    return all(isinstance(value, str) for value in values)


def run_main(main):
    """Run a script's main: a UserError is one line and exit status 2, a bug of ours a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


def minimum(bound, kind=int):
    """An argparse type: a finite number of at least `bound`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if bound <= value < float("inf"):
                return value
        whole = " whole" if kind is int else ""
        raise argparse.ArgumentTypeError(
            f"expected a{whole} number of at least {bound}, got {text}")
    return parse


def open_file(path, mode="rb", **options):
    """open() of a regular file that the user named; UserError if it is not there or none."""
    if not os.path.exists(path):
        raise UserError(f"{path}: expected a file, found no such file")
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise UserError(f"{path}: expected a regular file")
    try:
        return open(path, mode, **options)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Open a temporary file beside path, renamed at the end: path is never half written.

    A link is followed. UserError if path is a device, a pipe or a folder, has no folder, or if the
    disk fails.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a regular file, or none, to write to")
    if not path.parent.is_dir():
        raise UserError(f"{path}: expected a folder {path.parent} to write to")
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = f"{path.parent}/.{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, temporary):  # another file's, inside the with block
            raise
        raise UserError(f"{path}: was not written ({error.strerror})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def open_text(path, errors="strict"):
    """A text file in UTF-8 that the user named, plain or gzipped, to read."""
    open_file(path).close()
    opener = gzip.open if Path(path).suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors=errors, newline="")


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
    except (ValueError, RecursionError):  # whose message may show the report
        raise UserError(f"{where}: expected one JSON object in UTF-8") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def read_jsonl(path):
    """Yield (line number, dict) of JSON Lines, but blank ones; UserError names file and line."""
    with open_file(path) as file:
        for number, _, line in numbered_lines(file):
            yield number, parse_line(f"{path}:{number}", line)


def read_json(path):
    """One JSON document; UserError if the file is not there or is none."""
    with open_file(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError):
            raise UserError(f"{path}:1: expected one JSON document in UTF-8") from None


def parallel(function, jobs, workers):
    """function over jobs, in order, in so many processes; below 2: in this one."""
    if workers < 2:
        yield from map(function, jobs)
        return
    jobs = iter(jobs)
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            while batch := list(itertools.islice(jobs, 256 * workers)):  # memory stays flat
                yield from pool.map(function, batch, chunksize=16)
        except BrokenExecutor:
            raise UserError("a reading process was killed; if memory is short, lower --workers"
                            ) from None


def start_worker():
    """In a process of `parallel`: leave Ctrl-C to the main process, end when that was killed."""
    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def lines(text):
    """The lines of a table below, without the blank around them."""
    return [line.strip() for line in text.strip().splitlines()]


# ---------------------------------------------------------------- tables

BUILDERS = {
    "openi": build_openi,
    "mimic": build_mimic,
    "chexpert-plus": build_chexpert_plus,
    "chexpert5x200": build_chexpert5x200,
    "rsna": build_rsna,
    "rsna-ab": build_rsna,
    "siim": build_siim,
    "vindr": build_vindr,
    "cxr14": build_cxr14,
    "cxr-align": build_cxr_align,
    "phantom": build_phantom,
}
DICOM = (".dcm", ".dicom")
SUFFIXES = (".png", ".jpg", ".jpeg", *DICOM)
MAX_PIXELS = 50_000_000    # checked before decoding: three times the largest published radiograph
MAX_XML_BYTES = 1_000_000  # OpenI's longest report is 12 kB

CLASS_NAMES = {name.lower(): name for name in CONDITIONS} | {
    "effusion": "Pleural Effusion", "normal": "No Finding"}
MESH = """
    Pulmonary Atelectasis: Atelectasis
    Cardiomegaly: Cardiomegaly
    Mass: Mass
    Pleural Effusion: Pleural Effusion
    Infiltrate: Infiltration
    Nodule: Nodule
    Pneumonia: Pneumonia
    Pneumothorax: Pneumothorax
    Consolidation: Consolidation
    Pulmonary Edema: Edema
    Emphysema: Emphysema
    Pulmonary Emphysema: Emphysema
    Bullous Emphysema: Emphysema
    Pulmonary Fibrosis: Fibrosis
    Fibrosis: Fibrosis
    Thickening/pleura: Pleural Thickening
    Hernia, Hiatal: Hernia
    normal: No Finding"""
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
RSNA_CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")

NORMALS = {  # Tab. 1
    "No acute cardiopulmonary process.": 15829,
    "No acute intrathoracic process.": 4643,
    "No acute cardiopulmonary abnormality.": 4488,
    "No evidence of pneumonia.": 1014,
    "No evidence of acute cardiopulmonary process.": 1255,
}
DUPLICATE = "No active lung lesion."  # Tab. 3: the one sentence of all added normal studies
WEIGHTS = {  # how often the phantom has a finding
    "Enlarged Cardiomediastinum": 0.6,
    "Cardiomegaly": 1.2,
    "Lung Opacity": 1.0,
    "Lung Lesion": 0.9,
    "Edema": 0.8,
    "Consolidation": 0.9,
    "Pneumonia": 1.0,
    "Atelectasis": 1.0,
    "Pneumothorax": 0.9,
    "Pleural Effusion": 1.3,
    "Pleural Other": 0.5,
    "Fracture": 0.6,
    "Support Devices": 0.8,
}
COMPANIONS = {  # what may come along
    "Edema": ("Cardiomegaly", "Pleural Effusion"),
    "Pneumonia": ("Lung Opacity",),
    "Pneumothorax": ("Support Devices", "Fracture"),
    "Pleural Effusion": ("Atelectasis",),
}
DRAWINGS = {  # the others are drawn with the heart, the bones or the devices
    "Lung Opacity": _draw_opacity,
    "Lung Lesion": _draw_lesion,
    "Edema": _draw_edema,
    "Consolidation": _draw_consolidation,
    "Pneumonia": _draw_pneumonia,
    "Atelectasis": _draw_atelectasis,
    "Pneumothorax": _draw_pneumothorax,
    "Pleural Effusion": _draw_effusion,
    "Pleural Other": _draw_thickening,
}
PHRASES = {
    "Enlarged Cardiomediastinum": """
        {severity} widening of the mediastinum
        {severity} mediastinal widening""",
    "Cardiomegaly": """
        {severity} cardiomegaly
        {severity} enlargement of the heart
        {severity} cardiac enlargement""",
    "Lung Opacity": """
        {severity} hazy opacity in the {side} {zone} lung
        ill-defined {side} {zone} lung opacity""",
    "Lung Lesion": """
        {severity} {side} {zone} lung nodule
        {severity} rounded nodule in the {side} {zone} lung
        {side} {zone} lung mass""",
    "Edema": """
        {severity} pulmonary edema
        {severity} interstitial edema""",
    "Consolidation": """
        {severity} consolidation in the {side} {zone} lung
        {severity} focal {side} {zone} lobe consolidation""",
    "Pneumonia": """
        {side} {zone} lobe pneumonia
        {severity} pneumonia in the {side} {zone} lung""",
    "Atelectasis": """
        {severity} {side} basilar atelectasis
        {severity} atelectasis at the {side} base
        {side} atelectasis""",
    "Pneumothorax": """
        {severity} {side} pneumothorax
        {side} pneumothorax""",
    "Pleural Effusion": """
        {severity} {side} pleural effusion
        {severity} effusion on the {side}""",
    "Pleural Other": """
        {severity} {side} pleural thickening
        {side} lateral pleural thickening""",
    "Fracture": """
        {side} rib fracture
        {severity} displaced {side} rib fracture
        fracture of several {side} ribs""",
    "Support Devices": """
        {device}
        {device} in place
        {device} in standard position""",
}
SEVERITY = (
    ("mild", "slight", "minimal"),
    ("moderate",),
    ("severe", "marked", "extensive"),
)
FRAMES = """
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
    no significant change in {}."""
CHANGED = """
    {} has increased since the previous examination.
    new {} since the prior radiograph."""
ABSENT = {
    "Cardiomegaly": """
        the heart is normal in size.
        heart size is normal.
        no cardiomegaly.""",
    "Enlarged Cardiomediastinum": """
        normal mediastinal contours.
        the mediastinum is not widened.""",
    "Pleural Effusion": """
        no pleural effusion.
        there is no effusion on either side.""",
    "Pneumothorax": """
        no pneumothorax.
        there is no evidence of pneumothorax.
        no pneumothorax seen.""",
    "Consolidation": """
        no focal consolidation.
        there is no consolidation.""",
    "Edema": """
        no pulmonary edema.
        there is no evidence of edema.""",
    "Fracture": "no rib fracture.",
    "Pneumonia": """
        no evidence of pneumonia.
        no pneumonia.""",
    "Atelectasis": "no atelectasis.",
    "Lung Lesion": "no nodule or mass.",
}
REMARKS = """
    frontal view of the chest.
    comparison is made to the prior study.
    the patient is rotated.
    single portable view of the chest."""
DEVICES = {  # the points of a line, x and y; the pacemaker has its box too
    "left chest pacemaker": """
        0.5 -0.5
        0.2 -0.42
        0.02 -0.1
        0.0 0.3
        0.22 0.5""",
    "right internal jugular catheter": """
        -0.22 -0.98
        -0.15 -0.6
        -0.1 -0.2
        -0.08 0.1""",
    "endotracheal tube": """
        0.01 -1
        0.0 -0.6
        0.02 -0.28""",
    "nasogastric tube": """
        0.02 -1
        0.03 0.2
        0.1 0.62
        0.3 0.72""",
}


# ---------------------------------------------------------------- flags and main


def parse_args(argv=None):
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="SET|check|cache")
    for name, run in (BUILDERS | {"check": check, "cache": cache}).items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__,
                                      formatter_class=style)
        add = command.add_argument
        add("--sheet", metavar="F.png", help="also draw twelve of the images")
        if name in BUILDERS:
            add("root", help="folder of the official download (phantom: to draw into)")
            add("--out", required=True, help="manifest to write (JSON Lines)")
            add("--keep-missing", action="store_true", help="keep studies whose image is not there")
        else:
            add("manifest", help="JSON Lines of any of the sets")
            add("--image-root", help="replaces every record's root")
            add("--workers", type=minimum(0), default=os.cpu_count() or 1,
                help="processes that read images; 0 for none")
        if name == "cxr14":
            add("--probmed", metavar="test.json", help="its images and pairs only")
        if name == "phantom":
            add("--studies", type=int, default=3000, help="number of studies")
            add("--size", type=int, default=64, help="side in pixels")
            add("--seed", type=minimum(0), default=0, help="another seed is another data set")
            add("--normal-fraction", type=float, default=0.45,
                help="share of normal studies, with one of Tab. 1's templates")
            add("--duplicates", type=minimum(0), default=0,
                help="normal training studies to add, all with one sentence (Tab. 3)")
        if name == "cache":
            add("--out", required=True, help="folder to write into; resumes")
            add("--size", type=minimum(1), default=256, help="shorter side in pixels")
            add("--crop-borders", action="store_true", help="cut black borders away (App. B.1)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    wrong = []
    image_root = None
    if args.command in BUILDERS:
        manifest = args.out
        present = args.command == "phantom" or Path(args.root).is_dir()
        expect(present, args.root, "the folder of the official download")
        records = BUILDERS[args.command](Download(args.root), args)
        print(manifest)
        print(write_manifest(args.command, records, args.root, manifest, args.keep_missing))
    else:
        manifest = args.manifest
        image_root = args.image_root
        if args.command == "check":
            wrong = check(manifest, image_root, args.workers)
        else:
            wrong = cache(manifest, args.out, args.size, args.crop_borders, args.workers,
                          image_root)
    for line in wrong[:20]:
        print(f"wrong: {line}", file=sys.stderr)
    if len(wrong) > 20:
        print(f"wrong: {len(wrong)} in all", file=sys.stderr)
    if args.sheet:
        draw_sheet(manifest, args.sheet, image_root)
    if wrong and args.command == "check":
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
