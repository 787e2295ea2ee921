"""Damaged inputs against the functions that read them, in this process; run by hand, not in CI.

    python tests/fuzz.py --count 200 --seed 0
    python tests/fuzz.py --seed 0 --kind images --case 17     one case again, with its traceback

A case survives if its result is right or if it ends with an error that is meant for users. All else
(another exception, a wrong result, 20 seconds) is a finding, printed by kind and case, since
(seed, kind, case) makes it again. Messages are not printed: they may quote a report.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import gcn  # noqa: E402
import model  # noqa: E402
import negations  # noqa: E402
import train  # noqa: E402

MEANT_FOR_USERS = {"UserError", "GraphError", "ModelError"}  # one a ground file; the others import
SECONDS = 20
STUDIES = 24
NASTY = (  # in place of a value of JSON
    None, True, 0, -1, 2, 10**12, 1e308, float("nan"), "", " ", "\0", "\ud800", "x" * 5000,
    "../../etc/passwd", "/etc/passwd", [], {}, [[]], [None], {"0": []}, {"": {}}, "0", "NaN")
NASTY_CELLS = ("", " ", "nan", "-1", "2", "1e9", '"', ",", "\0", "../x.png", "é" * 9, "x" * 200_000)


class Wrong(Exception):
    """A result that is not right; its text says what, without a word of the input."""


# ---------------------------------------------------------------- damage


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def damage_bytes(rng, raw):
    """Some bytes changed, cut out, repeated, zeroed, or the end cut off."""
    raw = bytearray(raw)
    start = int(rng.integers(len(raw)))
    stop = min(len(raw), start + int(2 ** rng.uniform(0, 12)))
    kind = pick(rng, ("change", "cut", "repeat", "zero", "end"))
    if kind == "change":
        for place in rng.integers(len(raw), size=int(rng.integers(1, 5))):
            raw[place] ^= int(rng.integers(1, 256))
    elif kind == "cut":
        del raw[start:stop]
    elif kind == "repeat":
        raw[start:start] = raw[start:stop]
    elif kind == "zero":
        raw[start:stop] = bytes(stop - start)
    else:
        del raw[start:]
    return bytes(raw)


def any_place(rng, tree):
    """A (container, key) somewhere in a JSON tree that is not empty; deep ones are not likelier."""
    while True:
        key = pick(rng, list(tree) if isinstance(tree, dict) else range(len(tree)))
        child = tree[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.3:
            return tree, key
        tree = child


def damage_json(rng, tree):
    """A copy with a value or two replaced, removed, renamed, wrapped or taken from elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, 3))):
        if not tree:
            return tree
        container, key = any_place(rng, tree)
        kind = pick(rng, ("replace", "replace", "replace", "remove", "rename", "wrap", "other"))
        if kind == "replace":
            container[key] = copy.deepcopy(pick(rng, NASTY))
        elif kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[str(pick(rng, NASTY))[:50]] = container.pop(key)
        elif kind == "wrap":
            container[key] = [container[key]]
        else:
            other, name = any_place(rng, tree)
            container[key] = copy.deepcopy(other[name])
    return tree


def damage_table(rng, path):
    """A CSV file with some cells, a column or a row spoiled, or with damaged bytes."""
    if rng.random() < 0.3:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    kind = pick(rng, ("cell", "cell", "header", "short", "long", "repeat", "empty"))
    row, column = int(rng.integers(1, len(rows))), int(rng.integers(len(rows[0])))
    if kind == "cell":
        rows[row][column] = pick(rng, NASTY_CELLS)
    elif kind == "header":
        rows[0][column] = pick(rng, (*NASTY_CELLS, rows[0][column - 1]))
    elif kind == "short":
        rows[row].pop()
    elif kind == "long":
        rows[row].append("more")
    elif kind == "repeat":
        rows.append(rows[row])
    else:
        rows = rows[:1]
    with open(path, "w", encoding=pick(rng, ("utf-8", "utf-8", "utf-16", "latin-1")),
              errors="replace", newline="") as file:
        csv.writer(file, escapechar="\\").writerows(rows)


# ---------------------------------------------------------------- what is tried


class Base:
    """Whole inputs, made once: a phantom, its manifest, a checkpoint, small downloads, images."""

    def __init__(self, folder):
        self.folder = folder
        raw = data.make_phantom(folder / "phantom", studies=STUDIES, size=32)
        self.raw = [record for _, record in data.read_jsonl(raw)]
        self.records = [negations.annotate(record) for record in self.raw]
        for record in self.records:
            record["split"] = "train"
        self.manifest = folder / "manifest.jsonl"
        self.manifest.write_text(json_lines(self.records), encoding="utf-8")
        manifest = data.Manifest(self.manifest)
        self.columns = columns(manifest)
        self.sidecar = Path(f"{self.manifest}.index.npz").read_bytes()
        train.main(["--train", str(self.manifest), "--out", str(folder / "run"), "--max-steps", "1",
                    "--batch-size", "8", "--image-size", "32", "--width", "16", "--workers", "0"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py's handlers would outlive it here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.checkpoint = (folder / "run/last.pt").read_bytes()
        self.saved = model.load_checkpoint(folder / "run/last.pt")
        self.images = self.make_images(Path(self.raw[0]["root"]) / self.raw[0]["image"])
        self.download = folder / "download"
        self.make_downloads()

    def make_images(self, path):
        """name -> bytes of one picture as PNG of 8 and 16 bits, JPEG and, with pydicom, DICOM."""
        picture, images = Image.open(path).convert("L"), {}
        deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        for name, image in {"a.png": picture, "b.png": deep, "c.jpg": picture}.items():
            image.save(self.folder / name)
            images[name] = (self.folder / name).read_bytes()
        with contextlib.suppress(ImportError):
            images["d.dcm"] = dicom(np.asarray(picture))
        return images

    def make_downloads(self):
        """Kaggle's OpenI, RSNA and ChestX-ray14 in miniature."""
        reports, projections, entries, labels = [], [], [], []
        for k, record in enumerate(self.raw):
            for path in (f"openi/images/{k}.png", f"cxr14/images/{k}.png",
                         f"rsna/stage_2_train_images/r{k}.png"):
                file = self.download / path
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(record["root"]) / record["image"], file)
            reports.append({"uid": k, "MeSH": "normal" if k % 2 else "Cardiomegaly/mild",
                            "findings": record["report"], "impression": ""})
            projections.append({"uid": k, "filename": f"{k}.png", "projection": "Frontal"})
            entries.append({"Image Index": f"{k}.png", "Patient ID": k // 2,
                            "Finding Labels": "No Finding" if k % 2 else "Mass|Nodule"})
            labels.append({"patientId": f"r{k}", "x": "", "Target": k % 2})
        for name, rows in {"openi/indiana_reports": reports, "rsna/stage_2_train_labels": labels,
                           "openi/indiana_projections": projections,
                           "cxr14/Data_Entry_2017_v2020": entries}.items():
            with open(self.download / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def columns(manifest):
    """What a manifest says of its rows, to compare."""
    rows = range(len(manifest))
    return [[manifest[i] for i in rows], [manifest.where(i) for i in rows],
            *(np.asarray(getattr(manifest, name)).tolist() for name in (
                "patients", "positives", "negatives", "labelled", "with_graphs"))]


def dicom(values):
    """The bytes of an uncompressed 8-bit DICOM file. Needs pydicom."""
    import pydicom
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header = pydicom.dataset.Dataset()
    header.file_meta = meta
    header.Rows, header.Columns = values.shape
    header.BitsAllocated = header.BitsStored = 8
    header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = 7, 0, 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PixelData = values.astype(np.uint8).tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, header, enforce_file_format=True)
    return file.getvalue()


def no_tokens(texts):
    ids = torch.ones(len(texts), 4, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "lengths": [4] * len(texts)}


def try_manifests(rng, base, folder):
    """A manifest, read as training, evaluation and negations.py read it."""
    lines = [json.dumps(record) for record in base.records]
    place = int(rng.integers(len(lines)))
    lines[place] = json.dumps(damage_json(rng, base.records[place]))
    raw = ("\n".join(lines) + "\n").encode()
    if rng.random() < 0.2:
        raw = damage_bytes(rng, raw)
    path = folder / "damaged.jsonl"
    path.write_bytes(raw)
    manifest = data.Manifest(path)
    whole = [line for line in raw.split(b"\n") if line.strip()]
    for i in range(len(manifest)):
        if repr(manifest[i]) != repr(json.loads(whole[i])):  # repr: NaN equals itself
            raise Wrong("a row is not its line")
        manifest.image_path(i)
    studies = data.Studies(manifest, image_size=32, tokenize=no_tokens, negatives=True, graphs=True)
    studies.collate([studies[0, i] for i in range(len(studies))])
    evaluate.Bench(None, manifest)
    negations.main([str(path), "--out", str(folder / "again.jsonl"), "--workers", "1"])
    data.Manifest(folder / "again.jsonl")


def try_graphs(rng, base, folder):
    """A RadGraph record of ours, bare or in a mapping, as a graph and in a batch."""
    record = pick(rng, [record["graph"] for record in base.records])
    if rng.random() < 0.3:
        record = {"0": record}
    record = damage_json(rng, record)
    phrases, labels, edges = gcn.read_radgraph(record)
    ends = {end for edge in edges for end in edge}
    if len(phrases) != len(labels) or not ends <= set(range(len(phrases))):
        raise Wrong("labels or edges of other nodes")
    if not set(labels) <= set(gcn.NODE_LABELS) or not all(isinstance(p, str) for p in phrases):
        raise Wrong("a node that is none")
    batch = gcn.collate_graphs([record, base.records[0]["graph"]])
    if int(batch["graph_index"].max()) != 1:
        raise Wrong("a graph is missing in the batch")


def try_tables(rng, base, folder):
    """An official table, read by its builder."""
    name, table = pick(rng, (("openi", "indiana_reports"), ("openi", "indiana_projections"),
                             ("rsna", "stage_2_train_labels"), ("cxr14", "Data_Entry_2017_v2020")))
    root = folder / "damaged"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base.download / name, root)
    damage_table(rng, root / f"{table}.csv")
    out = folder / "built.jsonl"
    out.unlink(missing_ok=True)
    data.main([name, str(root), "--out", str(out)])
    manifest = data.Manifest(out)
    if not 0 < len(manifest) <= 2 * STUDIES:
        raise Wrong("another number of studies")


def try_images(rng, base, folder):
    """A PNG, JPEG or DICOM file."""
    name = pick(rng, sorted(base.images))
    path = folder / name
    path.write_bytes(damage_bytes(rng, base.images[name]))
    image = data.read_image(path, at_least=pick(rng, (None, 16)))
    if image.mode != "L" or data.pixels(image, 32).shape != (1, 32, 32):
        raise Wrong("no grey image")


def try_checkpoints(rng, base, folder):
    """A checkpoint of train.py: read as it was written, or not at all."""
    path = folder / "damaged.pt"
    path.write_bytes(damage_bytes(rng, base.checkpoint))
    if not equal(model.load_checkpoint(path), base.saved):
        raise Wrong("other numbers than were saved")


def equal(a, b):
    """Whether two trees of plain values and tensors are the same."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def try_sidecars(rng, base, folder):
    """The index of a manifest that has not changed: believed only where it is whole."""
    Path(f"{base.manifest}.index.npz").write_bytes(damage_bytes(rng, base.sidecar))
    if columns(data.Manifest(base.manifest)) != base.columns:
        raise Wrong("another manifest than was written")


KINDS = {"manifests": try_manifests, "graphs": try_graphs, "tables": try_tables,
         "images": try_images, "checkpoints": try_checkpoints, "sidecars": try_sidecars}


# ---------------------------------------------------------------- the report


def give_up(*_):
    raise TimeoutError


def attempt(kind, case, seed, base, folder):
    """"right", "refused" with an error for users, or the error that is a finding."""
    rng = np.random.default_rng((seed, zlib.crc32(kind.encode()), case))
    quiet = io.StringIO()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            KINDS[kind](rng, base, folder)
    except (Exception, SystemExit) as error:
        names = {ancestor.__name__ for ancestor in type(error).__mro__}
        return "refused" if names & MEANT_FOR_USERS else error
    finally:
        signal.alarm(0)
    return "right"


def place_of(error):
    """What was raised and where in our files, without its message."""
    if isinstance(error, Wrong):
        return f"wrong result: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if Path(frame.filename).parent == ROOT]
    where = f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "no file of ours"
    return f"{type(error).__name__} in {where}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other damage")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--case", type=int, help="this one alone, with its traceback")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = range(args.count) if args.case is None else [args.case]
    findings = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            base = Base(folder)
        for kind in args.kind:
            outcomes = Counter()
            for case in cases:
                outcome = attempt(kind, case, args.seed, base, folder)
                if isinstance(outcome, str):
                    outcomes[outcome] += 1
                    continue
                findings.setdefault((kind, place_of(outcome)), []).append(case)
                if args.case is not None:
                    traceback.print_tb(outcome.__traceback__)
            print(f"{kind:<12} tried {len(cases):>6}   survived {outcomes.total():>6}   (right "
                  f"{outcomes['right']}, refused {outcomes['refused']})", flush=True)
    for (kind, place), known in findings.items():
        print(f"finding: {kind}, seed {args.seed}: {place}: {len(known)} cases, "
              f"{', '.join(map(str, known[:8]))}{' ...' if len(known) > 8 else ''}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
