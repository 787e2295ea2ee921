"""Evaluation: every table of the paper, for one model of ours or anyone's (Sec. 5.3-5.7, Tab. 2-6).

    python evaluate.py RUN --task all --data studies.jsonl    measure; print rows and write JSON
    python evaluate.py --compare A.json B.json ...            one table of many result files

RUN is what load_model takes (a run folder, a checkpoint, a Hugging Face CLIP folder) or a Python
file that defines load(). What is scored is a study's `targets`, else its `labels`; -1 is left out.
Symbols: n images, m texts, K classes, D width, R bootstrap resamples. Metrics are fractions.

SPDX-License-Identifier: MIT
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import zlib
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import SPLITS, Manifest, label_vector, read_image
from loss import DynamicSoftContrastiveLoss, soft_labels
from model import load_model
from negations import CONDITIONS, minimum, open_atomic, run_main

TIE = 1e-6  # closer cosines are a tie, and a tie is wrong: float32 cannot tell them apart
CELLS = 20_000_000  # similarities held at once
L2_GRID = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # of the linear probe, from strong to weak
FULL_EPOCHS = 10
OPTIONS = {"batch_size": 64, "workers": 0, "seed": 0, "resamples": 1000, "pool": 0,
           "fraction": [0.1, 1.0], "full": False, "conditions": None, "progress": False}
FIVE = {"Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"}  # of 5x200
ACCURACY_SETS = ("chexpert5x200", "vindr", "cxr14")  # Tab. 2: accuracy; AUC for other sets
TABLE = {"zero-shot": "Tab. 2", "fine-tune": "Tab. 2", "normal-case": "Tab. 3",
         "adversarial": "Tab. 4", "retrieval": "Tab. 5", "cxr-align": "Tab. 6"}

# ASSUMPTION: prompts are our own; every phrase of a class goes into every template.
POSITIVE = ("There is {}.", "{} is seen on this chest radiograph.", "The image shows {}.")
NEGATIVE = ("There is no {}.", "No {} is seen on this chest radiograph.", "The image shows no {}.")
NORMAL = ["Normal chest radiograph.", "The heart, lungs and pleura look normal."]
ABNORMAL = ["Abnormal chest radiograph.", "The heart, lungs or pleura look abnormal."]
PHRASES = {  # phrase; phrase | sentence of absence. A class that is not here is called by its name
    "Enlarged Cardiomediastinum": "widened mediastinum | The mediastinum is of normal width.",
    "Cardiomegaly": "cardiomegaly; enlarged heart | The heart is of normal size.",
    "Lung Opacity": "lung opacity; hazy density in the lung | Both lungs are clear.",
    "Lung Lesion": "lung lesion; nodule or mass in the lung | No mass in either lung.",
    "Edema": "pulmonary edema; interstitial edema | Pulmonary vessels look normal.",
    "Consolidation": "consolidation; airspace consolidation | No airspace disease.",
    "Pneumonia": "pneumonia; infectious infiltrate | The lungs are free of infection.",
    "Atelectasis": "atelectasis; partial lung collapse | The lungs are fully expanded.",
    "Pneumothorax": "pneumothorax; air in the pleural space | Both lungs reach the chest wall.",
    "Pleural Effusion": "pleural effusion; pleural fluid | The costophrenic angles are sharp.",
    "Pleural Other": "pleural thickening; pleural scarring | The pleura looks normal.",
    "Fracture": "fracture; broken rib | The bones are intact.",
    "Support Devices": "support device; tube, line or pacemaker | No foreign object is present.",
    "Mass": "lung mass", "Nodule": "lung nodule", "Nodule/Mass": "lung nodule or mass",
    "Infiltration": "lung infiltrate", "Hernia": "hiatal hernia", "Fibrosis": "lung fibrosis",
    "ILD": "interstitial lung disease", "Enlarged PA": "enlarged pulmonary artery"}


# ---- metrics: pure numpy, for R bootstrap resamples at once (weights: how often each is drawn)


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def ranking(scores, truth, weights):
    """AUROC (a tie counts half) and average precision (tied scores share one threshold).

    scores: (n,); truth: (n,), 1, 0, anything else is left out; weights: (n, R) whole numbers.
    Returns two (R,), NaN where only one class is there.
    """
    scores, truth, sides = np.asarray(scores, np.float64), np.asarray(truth), []
    for value in (0, 1):
        rows = np.flatnonzero(truth == value)
        rows = rows[np.argsort(scores[rows])]
        total = np.zeros((len(rows) + 1, weights.shape[1]), np.float32)  # exact up to 2^24
        np.cumsum(weights[rows], axis=0, out=total[1:])
        sides.append((scores[rows], total))
    (low, below), (high, above) = sides  # negatives and positives from the lowest score up
    drawn, count = np.diff(above, axis=0), above[-1].astype(np.float64)        # (P, R), (R,)
    left, right = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    wins = (drawn * (below[left] + below[right])).sum(0, dtype=np.float64) / 2
    hits = above[-1] - above[np.searchsorted(high, high, "left")]              # (P, R)
    precision = np.nan_to_num(_ratio(hits, hits + below[-1] - below[left]))
    found = (drawn * precision).sum(0, dtype=np.float64)
    return _ratio(wins, count * below[-1]), _ratio(found, count * (below[-1] > 0))


def auroc(scores, truth) -> float:
    """Area under the ROC curve of (n,) scores; a tie counts half; NaN where one class only."""
    return float(ranking(scores, truth, np.ones((len(scores), 1), np.float32))[0][0])


def means(columns, weights):
    """Means of columns (k, n) under weights (n, R) -> (k, R); NaN entries are left out."""
    known = ~np.isnan(columns)
    return _ratio(np.where(known, columns, 0) @ weights, known.astype(np.float32) @ weights)


def median(values, weights):
    """Lower median of values (n,) under weights (n, R) -> (R,)."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order], axis=0)                                  # (n, R)
    return np.asarray(values, np.float64)[order][(2 * total >= total[-1]).argmax(0)]


def resample(patients, resamples, seed):
    """Yield weights (n, r): patients (n,) drawn with replacement, some resamples at a time."""
    inverse = np.unique(patients, return_inverse=True)[1]
    count, rng = inverse.max() + 1, np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, 4_000_000 // len(inverse))):
        r = min(step, resamples - start)
        drawn = rng.integers(0, count, (r, count)) + count * np.arange(r)[:, None]
        drawn = np.bincount(drawn.ravel(), minlength=r * count).reshape(r, count)
        yield drawn.T[inverse].astype(np.float32)                              # (n, r)


def bootstrap(statistic, patients, resamples=1000, seed=0):
    """Values and 95 % percentile intervals, resampled by patient.

    statistic: function of weights (n, R) that returns {name: (R,)}; patients: (n,) ids.
    Returns {name: {"value": float, "interval": [low, high]}}, NaN where nothing can be said.
    """
    point = statistic(np.ones((len(patients), 1), np.float32))
    drawn = [statistic(weights) for weights in resample(patients, resamples, seed)]
    result = {}
    for name, value in point.items():
        values = np.concatenate([part[name] for part in drawn] or [[np.nan]])
        values = values[~np.isnan(values) & ~np.isnan(value[0])]
        interval = np.quantile(values, (0.025, 0.975)) if len(values) else np.full(2, np.nan)
        result[name] = {"value": float(value[0]), "interval": interval.tolist()}
    return result


def classification(scores, truth, classes):
    """Statistic: AUROC, AP, accuracy at score > 0 per class; macro over those with both labels.

    scores, truth: (n, K), NaN where the truth is not known.
    """
    right = np.where(np.isnan(truth), np.nan, (scores > TIE) == (truth == 1)).T  # (K, n)
    both = [{0, 1} <= set(column) for column in truth.T]

    def statistic(weights):
        ranked = [ranking(*columns, weights) for columns in zip(scores.T, truth.T, strict=True)]
        macro, single = {}, {}
        for name, rows in zip(("AUROC", "AP", "accuracy"),
                              (*zip(*ranked, strict=True), means(right, weights)), strict=True):
            single |= {f"{name} {label}": row for label, row in zip(classes, rows, strict=True)}
            rows = np.array(rows)[both]                                        # (K, R)
            macro[f"macro {name}"] = _ratio(np.nansum(rows, 0), (~np.isnan(rows)).sum(0))
        return macro | single

    return statistic


def label_f1(predicted, truth):
    """Statistic: CheXbert-style precision, recall, F1 of (n, K) booleans, micro and macro."""
    counts = [part.T.astype(np.float32) for part in (predicted & truth, predicted, truth)]

    def statistic(weights):
        result, every = {}, np.stack([part @ weights for part in counts])      # (3, K, R)
        for kind, (hit, said, real) in (("micro", every.sum(1, keepdims=True)), ("macro", every)):
            for name, part, whole in (("F1", 2 * hit, said + real), ("recall", hit, real),
                                      ("precision", hit, said)):
                result[f"{kind} {name}"] = np.nan_to_num(_ratio(part, whole)).mean(0)
        return result

    return statistic


def retrieve(images, texts, own, cells=CELLS):
    """Rank of each image's own text and the text ranked first; equal scores go before one's own.

    images: (n, D); texts: (m, D), unit rows; own: (n,) index into texts. `cells` similarities are
    held at once, so that 400,000 reports fit. Returns ranks (n,) from 1 and indices (n,).
    """
    ranks, first = [], []
    for start in range(0, len(images), step := max(1, cells // len(texts))):
        mine = own[start:start + step, None]                                   # (c, 1)
        similarity = images[start:start + step] @ texts.T                      # (c, m)
        bar = similarity.gather(1, mine) - TIE
        ranks.append((similarity >= bar).sum(1))
        first.append(similarity.scatter(1, mine, bar).argmax(1))
    return torch.cat(ranks), torch.cat(first)


# ---- embeddings


class Images(Dataset):
    """Rows of a manifest as pixels; an unreadable image becomes the error's message, one line."""

    def __init__(self, manifest, rows, model):
        self.manifest, self.rows, self.transform = manifest, rows, model.transform
        # As in training: a JPEG is decoded no larger than needed.
        self.at_least = getattr(model, "image_size", 0) * 5 // 4 or None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = int(self.rows[i])
        try:
            path = self.manifest.image_path(row)
            return self.transform(read_image(path, self.at_least))
        except (OSError, ValueError) as error:  # without the path, which may name the patient
            return f"{self.manifest.path}:{self.manifest.line(row)}: {str(error).split(': ')[-1]}"

    def batches(self, opt):
        """Yield (B, C, H, W); ValueError with file and line for an image that cannot be read."""
        for items in tqdm(DataLoader(self, opt.batch_size, num_workers=opt.workers,
                                     collate_fn=list), "images", leave=False,
                          disable=None if opt.progress else True):
            if broken := [item for item in items if isinstance(item, str)]:
                raise ValueError(f"{broken[0]}; `python data.py check` lists all such rows")
            yield torch.stack(items)


def _device(model):
    parameters = model.parameters() if hasattr(model, "parameters") else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _encode(encode, batches, count, device):
    """encode(batch) of this rank's rows, gathered over ranks -> (count, D) float32 unit rows, CPU.

    batches(rows) yields what `encode` takes. Every rank takes equally many rows, the last one
    being repeated, and what is too many is dropped, so that each item counts once.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    size = -(-count // world)
    rows = [min(row, count - 1) for row in range(rank * size, (rank + 1) * size)]
    with torch.inference_mode():
        parts = [torch.as_tensor(encode(batch)) for batch in batches(rows)]
        part = F.normalize(torch.cat(parts).to(device).float(), dim=-1).contiguous()  # (size, D)
        parts = [torch.empty_like(part) for _ in range(world)] if world > 1 else [part]
        if world > 1:
            dist.all_gather(parts, part)
    result = torch.cat(parts)[:count].cpu().clone()                            # (count, D)
    if not torch.isfinite(result).all():
        raise ValueError("this model's embeddings are NaN or infinite: did its training diverge?")
    return result


def embed_images(model, manifest, batch_size=64, workers=0, progress=False):
    """Every image of a manifest -> (n, D) float32 unit rows on the CPU; ranks share the work."""
    opt = SimpleNamespace(batch_size=batch_size, workers=workers, progress=progress)
    device = _device(model)
    return _encode(lambda pixels: model.encode_image(pixels.to(device, non_blocking=True)),
                   lambda rows: Images(manifest, rows, model).batches(opt), len(manifest), device)


def embed_texts(model, texts, batch_size=64, progress=False):
    """Texts -> (m, D) float32 unit rows on the CPU; equal texts are encoded once; ranks share."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # like lengths: less padding
    place = {text: i for i, text in enumerate(distinct)}

    def batches(rows):
        for start in tqdm(range(0, len(rows), batch_size), "texts", leave=False,
                          disable=None if progress else True):
            yield [distinct[row] for row in rows[start:start + batch_size]]

    embedded = _encode(model.encode_text, batches, len(distinct), _device(model))
    return embedded[[place[text] for text in texts]]


class Unmeasurable(ValueError):
    """What a task needs is not in the manifest; the message says how to make it."""


class Bench:
    """One model on one split; every embedding is computed once and shared by the tasks.

    options: see OPTIONS. Raises ValueError for an empty split or an unknown condition.
    """

    def __init__(self, model, manifest, **options):
        self.model, self.manifest, self.opt = model, manifest, SimpleNamespace(**OPTIONS | options)
        if hasattr(model, "eval"):
            model.eval()
        self.where, self.notes, self.known = f"{manifest.path} (split {manifest.split})", [], {}
        if not len(manifest):
            raise Unmeasurable(f"{self.where}: no studies; choose another --split, or write "
                             '"split": "train", "val" or "test" into each line')
        self.reports, self.triples, self.pairs, share = [], [], {}, {}
        rows, official, sets, self.keys = [], set(), set(), []
        self.labels = np.full((len(manifest), len(CONDITIONS)), -1, np.int8)  # -1: not labelled
        for i in range(len(manifest)):
            record = manifest[i]
            labels, targets = record.get("labels"), record.get("targets") or {}
            sets.add(record["id"].split("/")[0])
            self.keys.append(zlib.crc32(record["id"].encode()))
            report = record.get("report") or ""
            self.reports.append(share.setdefault(report, report))  # equal reports share memory
            if labels is not None:  # positive or uncertain counts, as in CheXbert's F1
                self.labels[i] = label_vector(labels)
            # ASSUMPTION: where labels are the truth, a finding that is not mentioned is absent.
            rows.append(targets or (dict.fromkeys(CONDITIONS, 0) | labels if labels is not None
                                    else {}))
            official |= targets.keys()
            for negative in (record.get("hard_negatives") or ())[:1]:  # CXR-Align's choice
                self.triples.append(
                    (i, negative["condition"], negative["report"], negative["omitted"]))
            if record.get("adversarial"):
                self.pairs[i] = record["adversarial"]
        names, self.set = official or {name for row in rows for name in row}, "+".join(sorted(sets))
        classes = [name for name in CONDITIONS if name in names] + sorted(names - {*CONDITIONS})
        if unknown := {*(self.opt.conditions or ())} - {*classes, *CONDITIONS}:
            raise ValueError(f"{self.where}: unknown condition {min(unknown)!r}; expected one of "
                             f"{', '.join(classes)}")
        self.normal = np.array([row.get("No Finding", -1) for row in rows])    # (n,) 1, 0, -1
        self.classes = [name for name in classes if name in (self.opt.conditions or classes)]
        self.truth = np.array([[row.get(name, -1) for name in self.classes] for row in rows])
        self.truth = np.where(self.truth < 0, np.nan, self.truth).astype(np.float32)  # (n, K)

    def columns(self, names):
        """Truth of some classes (n, K): 1, 0, NaN for unknown."""
        return torch.from_numpy(self.truth[:, [self.classes.index(name) for name in names]])

    def embed(self, model):
        """Image embeddings (n, D) of any model."""
        return self.images if model is self.model else embed_images(
            model, self.manifest, self.opt.batch_size, self.opt.workers, self.opt.progress)

    @cached_property
    def images(self):
        """Image embeddings (n, D)."""
        return embed_images(self.model, self.manifest, self.opt.batch_size, self.opt.workers,
                            self.opt.progress)

    def texts(self, texts):
        """Text embeddings (m, D); a text met before is not encoded again."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            rows = embed_texts(self.model, new, self.opt.batch_size, self.opt.progress)
            self.known.update(zip(new, rows, strict=True))
        return torch.stack([self.known[text] for text in texts])

    def measure(self, columns, extra=None, rows=slice(None), *, row, chance, **more):
        """A result: means of columns {name: (n,)} and the statistic `extra`, with intervals.

        row: {column of the paper's table: metric}; chance: {word of a metric's name: value}.
        """
        values = np.array(list(columns.values()), np.float32)                  # (k, n)

        def statistic(weights):
            plain = dict(zip(columns, means(values, weights), strict=True)) if columns else {}
            return plain | (extra(weights) if extra else {})

        patients = self.manifest.patients[rows]
        metrics = bootstrap(statistic, patients, self.opt.resamples, self.opt.seed)
        for name, metric in metrics.items():
            words = re.findall(r"[\w@-]+", name)
            metric["chance"] = next((v for k, v in chance.items() if k in words), None)
        return {"metrics": metrics, "row": row, "n": len(patients),
                "patients": len(np.unique(patients)), **more}


# ---- tasks: a Bench -> a result


def prompts(name):
    """Positive and negative prompts of a class; the first of each is the single pair."""
    if name == "No Finding":
        return NORMAL, ABNORMAL
    phrases, _, absence = PHRASES.get(name, name.lower().replace("_", " ")).partition(" | ")
    yes, no = ([form.format(phrase) for phrase in phrases.split("; ") for form in forms]
               for forms in (POSITIVE, NEGATIVE))
    return [text[0].upper() + text[1:] for text in yes], no + [absence] * bool(absence)


def class_scores(bench, classes, single=False):
    """cos(image, positive prompts), cos(image, negative prompts) -> two (n, K) arrays."""
    sides = []
    for side in (0, 1):
        texts = [prompts(name)[side][:1 if single else None] for name in classes]
        embedded = bench.texts(sum(texts, [])).split([len(part) for part in texts])
        # ASSUMPTION: an ensemble is the mean of its normalised embeddings, normalised again.
        ensembles = F.normalize(torch.stack([part.mean(0) for part in embedded]), dim=1)  # (K, D)
        sides.append((bench.images @ ensembles.T).double().numpy())            # (n, K)
    return sides


def zero_shot(bench):
    """Sec. 5.3, Tab. 2: score = s_positive - s_negative; CheXpert 5x200 as a five-way choice."""
    truth, classes = bench.truth, bench.classes
    single = [name for k, name in enumerate(classes) if not {0, 1} <= set(truth[:, k])]
    if len(single) == len(classes):
        raise Unmeasurable(f"{bench.where}: no class has both positive and negative images; give "
                           '"targets" of 0 and 1, or label the reports with `python negations.py`')
    if single:
        bench.notes.append(f"one class only, so AUROC and AP are NaN and macro averages leave it "
                           f"out: {', '.join(single)}")
    positive, negative = class_scores(bench, classes)
    bench.curves = scores, *_ = positive - negative, truth, classes  # for the figure
    pair = classification(np.subtract(*class_scores(bench, classes, True)), truth, classes)
    every = classification(scores, truth, classes)
    # ASSUMPTION: Tab. 2's accuracy is the mean over classes, and five-way for CheXpert 5x200.
    columns, headline = {}, "macro accuracy" if bench.set in ACCURACY_SETS else "macro AUROC"
    if {*classes} - {"No Finding"} == FIVE:
        five = np.array([k for k, name in enumerate(classes) if name in FIVE])
        if (np.nansum(truth[:, five], 1) == 1).all():
            best, headline = five[positive[:, five].argmax(1)], "5-way accuracy"  # (n,)
            columns = {headline: truth[np.arange(len(best)), best]}

    def statistic(weights):
        return every(weights) | {f"{name}, one prompt pair": value for name, value in
                                 pair(weights).items() if name.startswith("macro")}

    return bench.measure(
        columns, statistic, row={f"ZS {'ACC' if 'acc' in headline else 'AUC'}": headline},
        chance={"5-way": 0.2, "AUROC": 0.5},
        prompts={name: prompts(name) for name in classes},
        positive_negative={name: [int((truth[:, k] == value).sum()) for value in (1, 0)]
                           for k, name in enumerate(classes)})


def fit(train, val, rows, names):
    """A linear head on train's embeddings, or with --full on its encoder too -> (model, head).

    train, val: Bench; rows: training rows; names: classes; unknown truth is left out. val's loss
    chooses the L2 weight, then the epoch. head: embeddings (n, D) -> logits (n, K) in numpy.
    """
    # ASSUMPTION: FT is a linear probe of standardised, projected embeddings; --full is AdamW 5e-5.
    opt, model, device, best = train.opt, train.model, _device(train.model), (float("inf"),)
    x, y = train.images[rows].to(device), train.columns(names)[rows].to(device)  # (n, D), (n, K)
    y_val, mean, std = val.columns(names).to(device), x.mean(0), x.std(0, correction=0) + 1e-6
    head = torch.nn.Linear(x.shape[1], len(names), device=device)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)

    def loss_of(x, y, l2=0.0):
        logits, known = head((x - mean) / std), ~torch.isnan(y)
        loss = F.binary_cross_entropy_with_logits(logits[known], y[known])
        return loss + l2 * head.weight.square().sum(1).mean()

    def better():
        with torch.no_grad():
            loss = float(loss_of(val.embed(model).to(device), y_val))
        if loss >= best[0]:
            return best
        return loss, model if model is train.model else copy.deepcopy(model), copy.deepcopy(head)

    for l2 in L2_GRID:
        solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(solver=solver, l2=l2):
            solver.zero_grad()
            loss = loss_of(x, y, l2)
            loss.backward()
            return loss

        solver.step(closure)
        best = better()
    if opt.full:
        head, model = copy.deepcopy(best[2]), copy.deepcopy(model)
        solver = torch.optim.AdamW([*model.parameters(), *head.parameters()], 5e-5)
    for epoch in range(FULL_EPOCHS if opt.full else 0):
        order = np.random.default_rng((opt.seed, epoch)).permutation(len(rows))
        for pixels, truth in zip(Images(train.manifest, rows[order], model).batches(opt),
                                 y[order].split(opt.batch_size), strict=True):
            solver.zero_grad()
            loss_of(model.encode_image(pixels.to(device)), truth).backward()
            solver.step()
        best = better()
    return best[1], lambda x: best[2]((x.to(device) - mean) / std).detach().cpu().double().numpy()


def fine_tune(bench):
    """Sec. 5.3, Tab. 2, FT10 and FT100: train rows train, val rows choose, test rows are scored."""
    opt, path = bench.opt, bench.manifest.path
    if opt.full and (dist.is_initialized() or not hasattr(bench.model, "parameters")):
        raise ValueError("--full needs a torch model in one process: no torchrun")
    train, val, test = (bench if bench.manifest.split == name else Bench(
        bench.model, Manifest(path, name, bench.manifest.image_root), **vars(opt))
        for name in SPLITS)
    known = np.concatenate([train.manifest.patients, val.manifest.patients])
    if shared := int(np.isin(test.manifest.patients, known).sum()):
        bench.notes.append(f"fine-tune: {shared} test studies are of train or val patients")
    # ASSUMPTION: FT10 is 10 % of the training patients, with all their studies.
    patients = np.random.default_rng(opt.seed).permutation(np.unique(train.manifest.patients))
    chosen = {share: np.flatnonzero(np.isin(train.manifest.patients, patients[:max(1, round(
        share * len(patients)))])) for share in sorted(opt.fraction)}  # nested: 10 % is in 100 %
    least = train.truth[chosen[min(chosen)]]
    names = [name for k, name in enumerate(train.classes) if {0, 1} <= set(least[:, k])
             and name in val.classes and name in test.classes]
    if not names:
        raise Unmeasurable(f"{path}: fine-tune finds no class with positives and negatives among "
                           f'{len(least)} train rows; raise --fraction, or give them "targets"')
    statistics, truth = {}, test.columns(names).numpy()
    for share, rows in chosen.items():
        model, head = fit(train, val, rows, names)
        label = f"FT{100 * share:g}{' full' * opt.full}"
        statistics[label] = classification(head(test.embed(model)), truth, names)
    return test.measure(
        {}, lambda weights: {f"{label} {name}": value for label, part in statistics.items()
                             for name, value in part(weights).items()},
        row={f"{label} AUC": f"{label} macro AUROC" for label in statistics},
        chance={"AUROC": 0.5}, classes=names,
        train={str(share): len(rows) for share, rows in chosen.items()})


def retrieval(bench):
    """Sec. 5.7, Tab. 5: image to report among the distinct reports of the split."""
    # ASSUMPTION: a report that repeats is one candidate, and right for each of its images.
    rows = np.array([i for i, report in enumerate(bench.reports) if report], int)
    place = {}
    own = torch.tensor([place.setdefault(bench.reports[i], len(place)) for i in rows])  # (n,)
    if len(place) < 2:
        raise Unmeasurable(f'{bench.where}: retrieval needs at least two different "report" texts')
    inputs = bench.images[rows], bench.texts(list(place)), own
    found = retrieve(*(x.to(_device(bench.model)) for x in inputs))
    ranks, first = (x.cpu().numpy() for x in found)                            # (n,) each
    source = rows[np.unique(own.numpy(), return_index=True)[1]]  # a study that has each text
    row, f1 = {"@5": "@5"}, lambda weights: {}
    if bench.labels[rows].min() >= 0:
        f1 = label_f1(bench.labels[source[first]] == 1, bench.labels[rows] == 1)
        # ASSUMPTION: Tab. 5 does not name its average over labels; the row is micro.
        row |= {"F1": "micro F1", "Recall": "micro recall", "Precision": "micro precision"}
    else:
        bench.notes.append('F1 needs "labels" in every line: run `python negations.py` on it')
    columns = {f"@{k}": ranks <= k for k in (1, 5, 10)} | {"mean rank": ranks}
    return bench.measure(
        columns, lambda weights: {"median rank": median(ranks, weights)} | f1(weights), rows,
        row=row, chance={f"@{k}": min(1, k / len(place)) for k in (1, 5, 10)},
        candidates=len(place))


def cxr_align(bench):
    """Sec. 5.6, Tab. 6: A, the report r over its negation r^n; B, r over r^r (finding left out).

    "swapped A" turns A round: an image without the finding, drawn by the seed, must prefer r^n.
    Whoever only avoids negations, as Sec. 5.6 suspects, is right in A and wrong here.
    """
    triples = [entry for entry in bench.triples if entry[1] in (bench.opt.conditions or entry)]
    if not triples:
        raise Unmeasurable(f'{bench.where}: no "hard_negatives" of the conditions asked for; make '
                           "them with `python negations.py IN.jsonl --out OUT.jsonl`")
    rows, names, negated, omitted = zip(*triples, strict=True)
    rows, names, images = np.array(rows), np.array(names), bench.images[np.array(rows)]
    texts = [bench.texts(side) for side in ([bench.reports[i] for i in rows], negated, omitted)]
    own, *others = ((images * side).sum(1).numpy() for side in texts)          # (n,) each
    wins = {task: (own - other > TIE).astype(np.float32)
            for task, other in zip("AB", others, strict=True)}
    wins["B"][[not text.strip() for text in omitted]] = np.nan  # CXR-Align has empty ones
    swapped = np.full(len(rows), np.nan, np.float32)
    for k, name in enumerate(names):
        without = np.flatnonzero(bench.labels[:, CONDITIONS.index(name)] == 0)
        if len(without):
            rng = np.random.default_rng((bench.opt.seed, bench.keys[rows[k]]))
            image = bench.images[without[rng.integers(len(without))]]          # (D,)
            swapped[k] = image @ texts[1][k] - image @ texts[0][k] > TIE
    parts = {f"{task} {name}": np.where(names == name, wins[task], np.nan)
             for name in CONDITIONS if name in names for task in wins}
    return bench.measure(wins | {"swapped A": swapped} | parts, None, rows,
                         row={task: task for task in ("A", "swapped A", "B")},
                         chance={"A": 0.5, "B": 0.5},
                         n_B=int((~np.isnan(wins["B"])).sum()),
                         conditions={name: int((names == name).sum()) for name in sorted({*names})})


def adversarial(bench):
    """Sec. 5.4, Tab. 4: a present and an absent class of an image, both decided right."""
    # ASSUMPTION: without ProbMed's "adversarial" pairs, one pair an image is drawn by the seed.
    names, pairs = np.array(bench.classes), []
    findings = names != "No Finding"
    for i, row in enumerate(bench.truth):
        present, absent = (names[findings & (row == value)] for value in (1, 0))
        if bench.pairs:
            pairs += [(i, *pair) for pair in bench.pairs.get(i, ())]
        elif len(present) and len(absent):
            rng = np.random.default_rng((bench.opt.seed, bench.keys[i]))  # a subset keeps its pairs
            draw = rng.integers((len(present), len(absent)))
            pairs.append((i, present[draw[0]], absent[draw[1]]))
    if not pairs:
        raise Unmeasurable(f"{bench.where}: no image has both a present and an absent class; give "
                           '"targets" of 0 and 1 for two or more classes')
    rows, yes, no = (np.array(part) for part in zip(*pairs, strict=True))
    names = np.unique([yes, no])
    scores = np.subtract(*class_scores(bench, names.tolist()))                 # (n, K)
    yes = scores[rows, np.searchsorted(names, yes)] > TIE
    no = scores[rows, np.searchsorted(names, no)] < -TIE
    return bench.measure({"both": yes & no, "present": yes, "absent": no}, None, rows,
                         row={"ACC": "both"}, chance={"both": 0.25, "present": 0.5, "absent": 0.5},
                         pairs="of ProbMed" if bench.pairs else "drawn by the seed",
                         prompts={name: prompts(name) for name in names.tolist()})


def normal_case(bench):
    """Sec. 5.5, Tab. 3: a normal image's own report must rank before N abnormal reports."""
    rows = np.array([i for i in np.flatnonzero(bench.normal == 1) if bench.reports[i]], int)
    # ASSUMPTION: the normal report is the study's own, the abnormal ones all that there are.
    own, least = [bench.reports[i] for i in rows], max(1, bench.opt.pool)
    pool = sorted({bench.reports[i] for i in np.flatnonzero(bench.normal == 0)} - {*own, ""})
    if not own or len(pool) < least:
        raise Unmeasurable(f'{bench.where}: normal-case needs a normal study ("No Finding": 1) and '
                           f"{least} abnormal reports, and has {len(own)} and {len(pool)}: run "
                           "`python negations.py` on it, lower --pool or take --split all")
    order = np.random.default_rng(bench.opt.seed).permutation(len(pool))[:bench.opt.pool or None]
    texts, images = bench.texts([pool[i] for i in order]), bench.images[rows]  # (m, D), (n, D)
    parts = images.split(max(1, CELLS // len(texts)))
    best = torch.cat([(part @ texts.T).amax(1) for part in parts])             # (n,)
    right = (images * bench.texts(own)).sum(1) - best > TIE
    return bench.measure({"accuracy": right.numpy()}, None, rows, row={"NCD ACC": "accuracy"},
                         chance={"accuracy": 1 / (len(texts) + 1)}, pool=len(texts))


TASKS = {"zero-shot": zero_shot, "fine-tune": fine_tune, "retrieval": retrieval,
         "cxr-align": cxr_align, "adversarial": adversarial, "normal-case": normal_case}


def validate(model, manifest, batch_size=64, workers=0):
    """For training: macro zero-shot "auroc" and "retrieval@5", NaN where they cannot be told."""
    bench = Bench(model, manifest, batch_size=batch_size, workers=workers, resamples=0)
    result = {"auroc": float("nan"), "retrieval@5": float("nan")}
    for name, task, metric in (("auroc", zero_shot, "macro AUROC"),
                               ("retrieval@5", retrieval, "@5")):
        try:
            result[name] = task(bench)["metrics"][metric]["value"]
        except Unmeasurable:
            continue  # NaN says so
    return result


# ---- results


def provenance():
    """The commit (where git is there) and the versions that a result or a run was made with."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    git = subprocess.getoutput(f"git -C {here} describe --always --dirty 2>/dev/null")
    versions = {name: importlib.metadata.version(name)
                for name in ("torch", "torchvision", "transformers", "numpy", "pillow")}
    return {"git": git or None, "versions": {"python": platform.python_version(), **versions}}


def table(results):
    """The paper's tables in Markdown: a row for each model, the best value of a column in bold.

    results: contents of result files. A column names set, n, split, pool and classes, so that only
    like meets like.
    """
    tables, names, lines = {}, {result["run"]: result["model"] for result in results}, []
    for result in results:
        for task, entry in result["tasks"].items():
            for column, metric in entry["row"].items():
                # What makes two numbers unlike stands in the head, so that they never share one.
                more = [f"n={entry['n']}"]
                if "pool" in entry:
                    more.append(f"pool {entry['pool']}")
                if "prompts" in entry:
                    more.append(f"{len(entry['prompts'])} classes")
                if result["split"] != "test":
                    more.append(result["split"])
                head = f"{result['set']} {column} ({', '.join(more)})"
                cells = tables.setdefault(TABLE[task], {}).setdefault(head, {})
                cells[result["run"]] = entry["metrics"][metric]["value"]
    for title, columns in sorted(tables.items()):
        lines += ["", f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for run in (run for run in names if any(run in cells for cells in columns.values())):
            line = f"| {names[run]} |"
            for cells in columns.values():
                known = [value for value in cells.values() if value is not None and value == value]
                text = f"{100 * cells[run]:.1f}" if cells.get(run) in known else "-"
                best = len(cells) > 1 and text != "-" and cells[run] == max(known)
                line += f" **{text}** |" if best else f" {text} |"
            lines.append(line)
    return "\n".join(lines[1:])


def details(result, hidden=()):
    """Metrics in percent (ranks aside), 95 % interval, chance; not those whose name ends so."""
    lines = []
    for task, entry in result["tasks"].items():
        more = [f", {key} {entry[key]}" for key in ("candidates", "pool", "pairs") if key in entry]
        lines.append(f"{task}: {entry['n']} items of {entry['patients']} patients{''.join(more)}")
        for name, metric in entry["metrics"].items():
            if name.endswith(hidden):
                continue
            scale = 1 if "rank" in name else 100
            value, low, high = (scale * x for x in (metric["value"], *metric["interval"]))
            chance = "" if metric["chance"] is None else f"  chance {100 * metric['chance']:.3g}"
            lines.append(f"  {name:<42}{value:8.1f}  [{low:.1f}, {high:.1f}]{chance}")
    return "\n".join(lines)


# ---- pictures, drawn by Pillow


def canvas(width, height, title):
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def write(x, y, text, anchor="lm", size=15, fill="black"):
        draw.text((x, y), str(text), fill, ImageFont.load_default(size), anchor)

    write(width // 2, 22, title, "mm", 18)
    return image, draw, write


def draw_roc(scores, truth, classes):
    """ROC curves of (n, K) scores: a panel for each class with both labels, the best first."""
    area = {k: auroc(scores[:, k], truth[:, k]) for k in range(len(classes))}
    shown = sorted((k for k in area if area[k] == area[k]), key=lambda k: -area[k])
    image, draw, write = canvas(890, 60 + 235 * -(-len(shown) // 4), "Zero-shot ROC: sensitivity "
                                "over 1 - specificity, both from 0 to 1")
    for place, k in enumerate(shown):
        left, bottom = 30 + 215 * (place % 4), 255 + 235 * (place // 4)
        draw.rectangle((left, bottom - 180, left + 180, bottom), outline="#999999")
        draw.line((left, bottom, left + 180, bottom - 180), "#cccccc")
        s, t = scores[:, k], truth[:, k]
        cuts = np.concatenate([[np.inf], np.unique(s)[::-1]])  # tied scores share one point
        tpr, fpr = (1 - np.searchsorted(np.sort(s[t == v]), cuts) / (t == v).sum() for v in (1, 0))
        points = [(left + 180 * x, bottom - 180 * y) for x, y in zip(fpr, tpr, strict=True)]
        draw.line(points, "#3b6fb6", 2)
        write(left + 90, bottom - 192, classes[k], "mm", 13)
        write(left + 174, bottom - 14, f"{area[k]:.3f}, {int((t == 1).sum())} positive", "rm", 13)
    return image


def draw_align(result):
    """CXR-Align accuracies, overall and by condition, with 95 % intervals, n and chance."""
    rows = [("all", "", result["n"])]
    rows += [(name, f" {name}", n) for name, n in result["conditions"].items()]
    bottom = 60 + 50 * len(rows)
    image, draw, write = canvas(860, bottom + 50, "CXR-Align accuracy, percent")
    for k in range(0, 101, 25):
        draw.line((310 + 4.5 * k, 50, 310 + 4.5 * k, bottom), "black" if k == 50 else "#dddddd")
        write(310 + 4.5 * k, bottom + 14, k, "mm")
    write(430, bottom + 36, "blue A: r over r^n; orange B: r over r^r; grey: A with an image "
          "without the finding; line: chance", "mm", 14)
    for place, (name, suffix, n) in enumerate(rows):
        write(300, 78 + 50 * place, f"{name} (n {n})", "rm")
        bars = (("A", "#3b6fb6"), ("B", "#e08a2e"), ("swapped A", "#999999"))
        for k, (task, color) in enumerate(bars[:2 if suffix else 3]):
            metric, y = result["metrics"][task + suffix], 58 + 50 * place + 15 * k
            value, low, high = (310 + 450 * x for x in (metric["value"], *metric["interval"]))
            if value == value:
                draw.rectangle((310, y, value, y + 12), color)
                draw.line((low, y + 6, high, y + 6), "black", 2)
                write(high + 8, y + 6, f"{100 * metric['value']:.1f}", size=13)
    return image


def draw_soft_labels(bench, thresholds, count=12):
    """y_hat of t, c and g (Fig. 3) of the first studies: reports, then their hard negatives."""
    records = [bench.manifest[i] for i in range(min(count, len(bench.manifest)))]
    sides = records + [r["hard_negatives"][0] for r in records if r.get("hard_negatives")]
    streams = {"text": bench.texts([side.get("report") or "" for side in sides]),
               "clinical": torch.tensor(np.stack([label_vector(side.get("labels") or {})
                                                  for side in sides]))}        # (m, D), (m, 14)
    if hasattr(bench.model, "gcn") and all("graph" in side for side in sides):
        with torch.inference_mode():
            streams["graph"] = bench.model.encode_graph([side["graph"] for side in sides]).cpu()
    image, draw, write = canvas(60 + 400 * len(streams), 490, f"Soft labels of {len(records)} "
                                 "studies and, from the red lines on, of their hard negatives")
    for place, (name, x) in enumerate(streams.items()):
        x, left = F.normalize(x, dim=1), 40 + 400 * place
        y = soft_labels(x @ x.T, thresholds[name])                             # (m, m)
        shade = Image.fromarray((255 * (1 - y.sqrt())).to(torch.uint8).numpy())
        image.paste(shade.resize((360, 360), Image.Resampling.NEAREST), (left, 70))
        draw.rectangle((left, 70, left + 360, 430), outline="black")
        cut = 360 * len(records) / len(sides)
        draw.line((left, 70 + cut, left + 360, 70 + cut), "red")
        draw.line((left + cut, 70, left + cut, 430), "red")
        positives = float(torch.special.entr(y).sum(1).exp().mean())
        write(left, 55, f"y_{name[0]}: {name}, tau {thresholds[name]:g}")
        write(left, 448, f"{positives:.1f} effective positives a row")
    write(40, 472, "white 0, black 1; the square root of y is drawn, so that small shares show")
    return image


def draw_retrieval(bench, count=4):
    """Images with their report and the five reports ranked first: it shows report text."""
    image, _, write = canvas(1100, 50 + 280 * count, "Retrieval: own report, then the top five")
    texts = [text for text in dict.fromkeys(bench.reports) if text]
    embedded = bench.texts(texts)                                              # (m, D)
    for place, i in enumerate(np.random.default_rng(0).permutation(len(bench.reports))[:count]):
        top, own = 50 + 280 * place, bench.reports[i]
        picture = read_image(bench.manifest.image_path(i))
        image.paste(picture.resize((250, 250)), (15, top))
        best = (embedded @ bench.images[i]).topk(min(5, len(texts))).indices
        for k, text in enumerate([own, *(texts[j] for j in best)]):
            for line, part in enumerate(textwrap.wrap(f"{k or 'own'}: {text}", 125, max_lines=2)):
                write(285, top + 12 + 42 * k + 19 * line, part, "lm", 13,
                      "green" if text == own else "black")
    return image


def draw_figures(bench, tasks, run, show_reports):
    """Pictures by name of what the tasks measured and left behind."""
    pictures, config = {}, Path(run) / "config.json"
    flags = json.loads(config.read_bytes()).get("flags", {}) if config.is_file() else {}
    taus = DynamicSoftContrastiveLoss().thresholds.items()  # the defaults, for other models
    pictures["soft-labels"] = draw_soft_labels(
        bench, {name: flags.get(f"tau_{name}", tau) for name, tau in taus})
    if "zero-shot" in tasks:
        pictures["roc"] = draw_roc(*bench.curves)
    if "cxr-align" in tasks:
        pictures["cxr-align"] = draw_align(tasks["cxr-align"])
    if show_reports and "retrieval" in tasks:
        pictures["retrieval"] = draw_retrieval(bench)
    return pictures


# ---- the command line


def load_any(path, device):
    """A model from what load_model takes, or from a Python file that defines load().

    load() returns an object with encode_image(pixels (B, ...)) and encode_text(list of str), both
    -> (B, D), and transform(grey PIL image) -> tensor. Raises ValueError naming what is missing.
    """
    if not path.endswith(".py"):
        return load_model(path, device)
    spec = importlib.util.spec_from_file_location("evaluated_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load() if hasattr(module, "load") else None
    for name in ("encode_image", "encode_text", "transform"):
        if not hasattr(model, name):
            raise ValueError(f"{path}: expected load() to return an object with {name}")
    return model


def parse_args(words):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="?",
                        help="run folder, checkpoint, Hugging Face CLIP, or .py file with load()")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="X.jsonl", help="manifest; cxr-align needs one with hard negatives")
    add("--split", default="test", choices=(*SPLITS, "all"),
        help="rows to score, in the paper test; fine-tune uses all three whatever this says")
    add("--image-root", metavar="DIR", help="where the images are, if not where X.jsonl says")
    add("--conditions", nargs="+", metavar="NAME", help="only these classes; None means all")
    add = parser.add_argument_group("task").add_argument
    add("--task", default="all", choices=(*TASKS, "all"), help="all: whatever X.jsonl allows")
    add("--pool", type=minimum(0), default=0,
        help="normal-case: abnormal reports, 0 for all; paper 2999")
    add("--fraction", type=float, nargs="+", default=OPTIONS["fraction"],
        help="fine-tune: shares of the training patients; the paper's are 0.1 and 1")
    add("--full", action="store_true",
        help="fine-tune: train the image encoder, not just a linear probe; wants a GPU")
    add = parser.add_argument_group("run").add_argument
    add("--compare", nargs="+", metavar="JSON", help="print the tables of these result files")
    add("--out", metavar="JSON",
        help="result file; None: results-TASK-SET-SPLIT.json in RUN, where that is a run folder")
    add("--figures", metavar="DIR", help="draw ROC curves, CXR-Align bars and soft labels there")
    add("--show-reports", action="store_true",
        help="with --figures: a retrieval sheet too, which shows images and report text")
    add("--batch-size", type=minimum(1), default=64,
        help="items at once; lower it if memory runs out")
    add("--workers", type=minimum(0), default=2,
        help="processes that read images; free cores at most")
    add("--seed", type=minimum(0), default=0, help="of resamples, pools, pairs and fractions")
    add("--resamples", type=minimum(1), default=1000, help="bootstrap resamples for the intervals")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(words)
    if not args.compare and not (args.run and args.data):
        parser.error("expected RUN and --data X.jsonl, or --compare A.json B.json ...")
    if not all(0 < share <= 1 for share in args.fraction):
        parser.error("--fraction: expected shares above 0, up to 1")
    devices = ["cpu", *["cuda"] * torch.cuda.is_available(),
               *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    if args.device not in devices:
        parser.error(f"--device: expected one of {', '.join(devices)}, got {args.device!r}")
    if args.out and not Path(args.out).parent.is_dir():  # before hours of work, not after
        parser.error(f"--out {args.out}: expected a folder that exists")
    return args


def load_results(path):
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: result[key] for key in ("model", "set", "tasks")} | {
            "run": str(path), "split": result.get("split", "test")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected a result file of evaluate.py") from None


def main(argv=None):
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(words)
    if args.compare:
        return print(table([load_results(path) for path in args.compare]))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = args.device.startswith("cuda")
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        # A model of a .py file may be on the CPU although there is a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    args.progress = not dist.is_initialized() or dist.get_rank() == 0
    manifest = Manifest(args.data, args.split, args.image_root)
    bench = Bench(load_any(args.run, args.device), manifest,
                  **{name: getattr(args, name) for name in OPTIONS})
    path = Path(args.run).resolve()
    model = path.parent.name if path.suffix == ".pt" else path.name  # of best.pt, its run's name
    result = {"model": model, "run": args.run, "set": bench.set,
              "split": args.split, "command": shlex.join(["python", "evaluate.py", *words]),
              "seed": args.seed, "resamples": args.resamples, **provenance(), "tasks": {}}
    for task in TASKS if args.task == "all" else [args.task]:
        try:
            result["tasks"][task] = TASKS[task](bench)
        except ValueError as error:  # also an unreadable image: the other tasks' numbers stand
            if args.task != "all":
                raise
            bench.notes.append(f"skipped {task}: {error}")
    if not result["tasks"]:
        raise Unmeasurable("; ".join(bench.notes))
    result["notes"] = bench.notes
    pictures = {}
    if args.figures:  # by all ranks, since embedding is their common work
        pictures = draw_figures(bench, result["tasks"], args.run, args.show_reports)
    if args.progress:  # rank 0
        finish(bench, result, pictures, args)
    if dist.is_initialized() and argv is None:
        dist.destroy_process_group()


def finish(bench, result, pictures, args):
    """Print and write a result."""
    notes, classes = [f"note: {note}" for note in bench.notes], {*CONDITIONS, *bench.classes}
    short = args.task == "all"
    notes += ["note: values by class are in the result file, and printed by each task"] * short
    print(details(result, tuple(f" {name}" for name in classes) if short else ()), *notes, "",
          table([result]), sep="\n")
    run, out = Path(args.run), args.out
    if not out and any((run / name).is_file() for name in ("best.pt", "last.pt")):
        out = run / f"results-{args.task}-{bench.set}-{args.split}.json"
    if out:
        with open_atomic(out) as file:  # JSON has no NaN: null
            json.dump(json.loads(json.dumps(result), parse_constant=lambda _: None), file, indent=1)
        print(f"wrote {out}")
    for name, picture in pictures.items():
        Path(args.figures).mkdir(parents=True, exist_ok=True)
        picture.save(Path(args.figures) / f"{name}.png")
        print(f"wrote {Path(args.figures) / name}.png")


if __name__ == "__main__":
    run_main(main)
