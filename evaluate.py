"""Evaluation: every table of the paper, for one model of ours or anyone's (Sec. 5.3-5.7, Tab. 2-6).

    python evaluate.py RUN --task all --data studies.jsonl    measure; print tables and write JSON
    python evaluate.py --compare A.json B.json ...            tables of many result files

RUN is what load_model takes (a run folder, a checkpoint, a Hugging Face CLIP folder) or a Python
file that defines load(). What is scored is a study's `targets`, else its `labels`; -1 is left out.

In this order: the six tasks, each a table of the paper; prompts and scores; metrics; fine-tuning;
embeddings; pictures; output; the command line. A task takes a Bench (one model on one split) and
returns its metrics with 95 % intervals, resampled by patient, and those that go into the table.
Symbols: n items (mostly images), m texts, K classes, D width. Metrics are fractions.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import runpy
import shlex
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from data import (
    BUILDERS,
    CONDITIONS,
    SPLITS,
    Manifest,
    UserError,
    expect,
    label_vector,
    minimum,
    open_atomic,
    read_image,
    read_json,
    read_jsonl,
    run_main,
)
from loss import DynamicSoftContrastiveLoss, soft_labels
from model import ModelError, load_model
from negations import label_report

TIE = 1e-6  # closer cosines are a tie, as float32 cannot tell them apart
CHUNK = 256  # images compared at once with all texts: 400,000 texts then take 0.4 GB
ACCURACY_SETS = ("chexpert5x200", "vindr", "cxr14")  # Tab. 2: accuracy; AUC for other sets


class Unmeasurable(UserError):
    """What a task needs is not in the manifest; the message says how to make it."""


# ---------------------------------------------------------------- the six tasks: Bench -> result
# A Bench is a model and the rows it is asked about: their images and reports, embedded once, their
# classes and truth. Each task ends with bench.result(table, metrics, rows, cells={column of the
# paper's table: our metric}, ...), of metrics that the Bench has resampled.


def zero_shot(bench):
    """Tab. 2 ZS (Sec. 5.3): score of a class = cos(image, positive) - cos(image, negative prompts).

    Metrics: AUROC and accuracy at score > 0 of each class and their means; CheXpert 5x200's five
    classes also as one choice.
    """
    classes = bench.classes
    both = with_both_labels(classes, bench.truth)
    if not both:
        raise Unmeasurable(f"{bench.where}: no class has both positive and negative images; give "
                           '"targets" of 0 and 1, or label the reports with `python negations.py`')
    if len(both) < len(classes):
        bench.notes.append("one label only, so AUROC cannot be told and means leave it out: "
                           + ", ".join(sorted({*classes} - {*both})))
    rows = with_truth(bench.truth)
    positive, negative = class_scores(bench, classes)                          # (all, K) each
    metrics = bench.classify(rows, classes, (positive - negative)[rows])
    # ASSUMPTION: Tab. 2's accuracy is the mean over classes, and five-way for CheXpert 5x200.
    cells = {"ZS AUC": "macro AUROC"}
    if bench.set in ACCURACY_SETS:
        cells = {"ZS ACC": "macro accuracy"}
    if bench.set == "chexpert5x200":
        cells = {"ZS ACC": "5-way accuracy"}
        correct = bench.truth[rows, positive[rows].argmax(1)]                  # (n,)
        metrics |= bench.means(rows, {"5-way accuracy": correct})
    return bench.result(
        "Tab. 2",
        metrics,
        rows,
        cells=cells,
        chance={"5-way accuracy": 0.2},
        classes=classes,
        prompts={name: bench.prompts_of(name) for name in classes})


def fine_tune(bench):
    """Tab. 2 FT10, FT100 (Sec. 5.3): train rows train, val rows choose, test rows are scored."""
    train, val, test = (bench.of_split(split) for split in SPLITS)
    chosen = {share: rows_of_share(train.manifest.patients, share, bench.seed)
              for share in sorted(bench.fraction)}
    fewest = min(chosen.values(), key=len)
    names = with_both_labels(train.classes, train.truth[fewest])
    if not names:
        raise Unmeasurable(f"{train.where}: fine-tune finds no class with positives and negatives "
                           f'among {len(fewest)} rows; raise --fraction, or give them "targets"')
    known = with_truth(test.columns(names))
    metrics = {}
    cells = {}
    for share, rows in chosen.items():
        label = f"FT{100 * share:g}"
        scores = probe_scores(train, val, test, rows, names)[known]            # (n, K)
        for name, metric in test.classify(known, names, scores).items():
            metrics[f"{label} {name}"] = metric
        cells[f"{label} AUC"] = f"{label} macro AUROC"
    return test.result(
        "Tab. 2",
        metrics,
        known,
        cells=cells,
        classes=names,
        train={str(share): len(rows) for share, rows in chosen.items()})


def normal_case(bench):
    """Tab. 3 NCD (Sec. 5.5): a normal image's own report must rank before all abnormal ones."""
    # ASSUMPTION: the normal report is the study's own, the abnormal ones all that there are.
    truth = bench.columns(["No Finding"])[:, 0]                                # (n,)
    rows = [i for i in np.flatnonzero(truth == 1) if bench.reports[i]]
    normal = [bench.reports[i] for i in rows]
    pool = {bench.reports[i] for i in np.flatnonzero(truth == 0)}
    pool = sorted(pool - {*normal, ""})
    if not normal or len(pool) < max(1, bench.pool):
        raise Unmeasurable(f'{bench.where}: normal-case needs a normal study ("No Finding": 1) and '
                           f"--pool abnormal reports, and has {len(normal)} and {len(pool)}: run "
                           "negations.py on it, lower --pool or take --split all")
    np.random.default_rng(bench.seed).shuffle(pool)
    pool = pool[:bench.pool or None]
    nearer, _ = retrieve(bench.images[rows], bench.texts(normal), bench.texts(pool))
    return bench.result(
        "Tab. 3",
        bench.means(rows, {"accuracy": nearer == 0}),
        rows,
        cells={"NCD ACC": "accuracy"},
        chance={"accuracy": 1 / (len(pool) + 1)},
        pool=len(pool))


def adversarial(bench):
    """Tab. 4 (Sec. 5.4): a present and an absent class of an image, both decided correctly.

    All findings of an image score high or low together. "centred" takes each image's scores less
    their mean, and needs no label for it; its chance is that of its scores dealt at random.
    """
    pairs = bench.pairs or draw_pairs(bench)  # (row, present class, absent class)
    if not pairs:
        raise Unmeasurable(f"{bench.where}: no image has both a present and an absent class; give "
                           '"targets" of 0 and 1 for two or more classes')
    rows, present, absent = (list(column) for column in zip(*pairs, strict=True))
    names = sorted(({*bench.classes} - {"No Finding"}) | {*present, *absent})
    positive, negative = class_scores(bench, names)
    scores = (positive - negative)[rows]                                       # (n, K)
    pair = np.searchsorted(names, [present, absent]).T                         # (n, 2)
    sign = (1, -1)  # above 0 where present, below where absent
    correct = np.take_along_axis(scores, pair, 1) * sign > TIE                 # (n, 2)
    columns = {"both": correct.all(1), "present": correct[:, 0], "absent": correct[:, 1]}
    chance = {"both": 0.25, "present": 0.5, "absent": 0.5}
    scores, dealt = centre(scores, ~np.isnan(bench.columns(names)[rows]))      # (n, K), (n,)
    centred = np.take_along_axis(scores, pair, 1) * sign                       # (n, 2)
    reported = ~np.isnan(centred).any(1)                                       # (n,)
    columns["centred"] = np.where(reported, (centred > TIE).all(1), np.nan)
    chance["centred"] = float(averages(np.where(reported, dealt, np.nan)))
    return bench.result(
        "Tab. 4",
        bench.means(rows, columns),
        rows,
        # ASSUMPTION: Tab. 4's ACC takes scores as they are; nobody can know if 34.4 was centred.
        cells={"ACC": "both", "centred": "centred"},
        chance=chance,
        n_centred=int(reported.sum()),
        pairs="of ProbMed" if bench.pairs else "drawn by the seed",
        classes=names,
        prompts={name: bench.prompts_of(name) for name in names})


def retrieval(bench):
    """Tab. 5 (Sec. 5.7): image to report among the distinct reports of the split."""
    # ASSUMPTION: a report that repeats is one candidate, and right for each of its images.
    rows = np.array([i for i, report in enumerate(bench.reports) if report], int)
    reports = [bench.reports[i] for i in rows]
    candidates = {report: k for k, report in enumerate(dict.fromkeys(reports))}
    if len(candidates) < 2:
        raise Unmeasurable(f'{bench.where}: retrieval needs at least two different "report" texts')
    target = [candidates[report] for report in reports]                        # (n,)
    texts = bench.texts(candidates)                                            # (m, D)
    ranks, best = retrieve(bench.images[rows], texts[target], texts)
    metrics = bench.means(rows, {f"@{k}": ranks <= k for k in (1, 5, 10)})
    study = rows[np.unique(target, return_index=True)[1]]  # the first with each report
    retrieved = bench.labels[study[best]] == 1                                 # (n, 14)
    own = bench.labels[rows] == 1                                              # (n, 14)
    known = ~np.isnan(bench.labels).any(1)
    known = (known[rows] & known[study[best]])[:, None]                        # (n, 1)
    metrics |= bench.bootstrap(rows, precision_recall_f1, own & known, retrieved & known)
    # ASSUMPTION: Tab. 5 does not name its average over labels; the row is micro.
    cells = {"@5": "@5", "F1": "micro F1", "Recall": "micro recall", "Precision": "micro precision"}
    return bench.result(
        "Tab. 5",
        metrics,
        rows,
        cells=cells,
        chance={f"@{k}": min(1, k / len(candidates)) for k in (1, 5, 10)},
        candidates=len(candidates))


def cxr_align(bench):
    """Tab. 6 (Sec. 5.6): A, the report r over its negation r^n; B, r over r^r (finding left out).

    Equal scores count one half. "swapped A" turns A round: an image without the finding, drawn by
    the seed, must prefer r^n.
    Whoever only avoids negations, as Sec. 5.6 suspects, is right in A and wrong here.
    """
    rows = np.flatnonzero(bench.manifest.negatives)
    if not len(rows):
        raise Unmeasurable(f'{bench.where}: no "hard_negatives"; make them with '
                           "`python negations.py IN.jsonl --out OUT.jsonl`")
    negatives = [bench.manifest[row]["hard_negatives"][0] for row in rows]  # CXR-Align's choice
    condition = [negative["condition"] for negative in negatives]
    omitted = [negative["omitted"] for negative in negatives]
    r = bench.texts([bench.reports[i] for i in rows])                          # (n, D)
    r_n = bench.texts([negative["report"] for negative in negatives])          # (n, D)
    r_r = bench.texts(omitted)                                                 # (n, D)
    images = bench.images[rows]                                                # (n, D)
    others = images_without(bench, rows, condition)                            # (n, D)
    columns = {
        "A": prefers(images, r, r_n),
        "swapped A": prefers(others, r_n, r),
        "B": prefers(images, r, r_r)}
    columns["B"][[not text.strip() for text in omitted]] = np.nan  # CXR-Align has empty ones
    known = {f"n_{name}": int((~np.isnan(columns[name])).sum()) for name in ("swapped A", "B")}
    ties = {f"ties {name}": float(np.mean(values == 0.5)) for name, values in columns.items()}
    known |= {name: share for name, share in ties.items() if share > 0}
    return bench.result(
        "Tab. 6",
        bench.means(rows, columns),
        rows,
        cells={name: name for name in columns},
        chance=dict.fromkeys(columns, 0.5),
        **known)


TASKS = {
    "zero-shot": zero_shot,
    "fine-tune": fine_tune,
    "normal-case": normal_case,
    "adversarial": adversarial,
    "retrieval": retrieval,
    "cxr-align": cxr_align}


def validate(model, manifest, batch_size=64, workers=0):
    """For training: macro zero-shot "auroc" and "retrieval@5", None where they cannot be told."""
    bench = Bench(model, manifest, batch_size=batch_size, workers=workers, resamples=0)
    result = {}
    for name, task, metric in (
            ("auroc", zero_shot, "macro AUROC"),
            ("retrieval@5", retrieval, "@5")):
        result[name] = None
        with contextlib.suppress(Unmeasurable):
            result[name] = round(task(bench)["metrics"][metric]["value"], 4)
    return result


# ---------------------------------------------------------------- what the tasks ask for


def with_both_labels(classes, truth):
    """Those of K classes that truth (n, K) has positives and negatives of."""
    return [name for k, name in enumerate(classes) if {0, 1} <= set(truth[:, k])]


def with_truth(truth):
    """Rows of truth (n, K) that something is known of."""
    return np.flatnonzero(~np.isnan(truth).all(1))


def rows_of_share(patients, share, seed):
    """Training rows of a share of the patients; those of 10 % are among those of 100 %."""
    # ASSUMPTION: FT10 is 10 % of the training patients, with all their studies.
    order = np.random.default_rng(seed).permutation(np.unique(patients))
    few = order[:max(1, round(share * len(order)))]
    return np.flatnonzero(np.isin(patients, few))


def draw_pairs(bench):
    """A present and an absent class of each image that has both: (row, present, absent)."""
    # ASSUMPTION: without ProbMed's "adversarial" pairs, one pair an image is drawn by the seed.
    names = np.array(bench.classes)
    pairs = []
    for row, truth in enumerate(np.where(names == "No Finding", np.nan, bench.truth)):
        present = names[truth == 1]
        absent = names[truth == 0]
        if len(present) and len(absent):
            rng = bench.rng(row)  # a subset keeps its pairs
            pairs.append((row, rng.choice(present), rng.choice(absent)))
    return pairs


def centre(scores, scored):
    """Scores (n, K) less their mean over an image's scored findings; NaN where there are under 3.

    Also the chance (n,) that scores, shuffled over an image's findings, put one above 0 on a given
    finding and one below 0 on another.
    """
    count = scored.sum(1)                                                      # (n,)
    mean = ratio(np.where(scored, scores, 0).sum(1), count)                    # (n,)
    known = scored & (count[:, None] > 2)                                      # (n, K)
    scores = np.where(known, scores - mean[:, None], np.nan)
    above = (scores > TIE).sum(1)                                              # (n,)
    below = (scores < -TIE).sum(1)                                             # (n,)
    return scores, ratio(above * below, count * (count - 1))


def images_without(bench, rows, condition):
    """Embeddings of images that are without each row's condition (n,): (n, D), NaN for none."""
    chosen = torch.full((len(rows), bench.images.shape[1]), torch.nan)
    for k, row in enumerate(rows):
        without = np.flatnonzero(bench.labels[:, CONDITIONS.index(condition[k])] == 0)
        if len(without):
            chosen[k] = bench.images[bench.rng(row).choice(without)]
    return chosen


def prefers(images, text, other):
    """1 where images (n, D) are nearer to text (n, D) than to other, 1/2 for ties: (n,)."""
    margin = (images * (text - other)).sum(1).numpy()
    right = np.where(np.abs(margin) <= TIE, 0.5, margin > TIE)
    return np.where(np.isnan(margin), np.nan, right)


def retrieve(images, own, texts):
    """How many texts are as near to each image as its own text or nearer, and which is nearest.

    images, own: (n, D); texts: (m, D); all unit rows. Where a text of its own is among texts, the
    first number is its rank from 1, behind its equals. Returns two arrays (n,).
    """
    nearer = []
    nearest = []
    for image, text in zip(images.split(CHUNK), own.split(CHUNK), strict=True):
        similarity = image @ texts.T                                           # (c, m)
        bar = (image * text).sum(1, keepdim=True) - TIE                        # (c, 1)
        nearer.append((similarity >= bar).sum(1))
        nearest.append(similarity.argmax(1))
    return torch.cat(nearer).numpy(), torch.cat(nearest).numpy()


# ---------------------------------------------------------------- prompts and scores

# ASSUMPTION: prompts are our own: one noun a class, denied by Tab. 1's normal reports too.
POSITIVE = ("{}.", "There is {}.", "{} is seen.")
NEGATIVE = ("No {}.", "There is no {}.", "No {} is seen.")
NORMAL = ["No acute cardiopulmonary process.", "No acute intrathoracic process.",
          "No acute cardiopulmonary abnormality."]  # as many as NEGATIVE has: of the same weight
PROMPT_NOUNS = {  # a class that is not here is called by its name
    "Enlarged Cardiomediastinum": "mediastinal widening",
    "Lung Lesion": "lung nodule",
    "Edema": "pulmonary edema",
    "Pleural Other": "pleural thickening",
    "Support Devices": "support device",
    "Mass": "lung mass",
    "Nodule": "lung nodule",
    "Nodule/Mass": "lung nodule or mass",
    "Infiltration": "lung infiltrate",
    "Hernia": "hiatal hernia",
    "Fibrosis": "lung fibrosis",
    "ILD": "interstitial lung disease",
    "Enlarged PA": "enlarged pulmonary artery"}


def prompts(name):
    """Our positive and negative prompts of a class, two lists."""
    if name == "No Finding":  # the mirror image: the findings' negatives against their positives
        present = []
        absent = []
        for finding in CONDITIONS[:-1]:
            positive, negative = prompts(finding)
            present += positive
            absent += negative
        return absent, present
    noun = PROMPT_NOUNS.get(name, name.lower().replace("_", " "))
    positive = [template.format(noun).capitalize() for template in POSITIVE]
    negative = [template.format(noun) for template in NEGATIVE]
    return positive, negative + NORMAL


def read_prompts(path):
    """--prompts FILE.json: class -> [positive texts, negative texts]; UserError if it is not."""
    what = "an object: class -> [positive texts, negative texts]"
    sides = read_json(path, dict)
    for pair in sides.values():
        expect(isinstance(pair, list) and len(pair) == 2, path, what)
        for texts in pair:
            whole = isinstance(texts, list) and {type(text) for text in texts} == {str}
            expect(whole, path, what)
    return sides


def class_scores(bench, classes):
    """cos(image, positive prompts), cos(image, negative prompts) -> two (n, K) arrays.

    A sigmoid model's bias is left out: it would move both alike.
    """
    scores = []
    for side in (0, 1):
        ensembles = []
        for name in classes:
            # ASSUMPTION: an ensemble is the mean of its normalised embeddings, normalised again.
            texts = bench.prompts_of(name)[side]
            mean = bench.texts(texts).mean(0)                                  # (D,)
            ensembles.append(F.normalize(mean, dim=0))
        cosines = bench.images @ torch.stack(ensembles).T                      # (n, K)
        scores.append(cosines.double().numpy())
    return scores


# ---------------------------------------------------------------- metrics
# Functions of truth and scores or predictions, in scikit-learn's order; NaN where nothing can be
# said. For its intervals a metric is called anew on the rows of each resample.


def ratio(part, whole):
    """part / whole, NaN where both are 0."""
    with np.errstate(invalid="ignore"):
        return np.true_divide(part, whole)


def auroc(truth, scores):
    """How often a positive scores above a negative, a tie counting half; NaN for one label only.

    truth: (n,), 1 or 0, NaN is left out; scores: (n,).
    """
    positive = np.sort(scores[truth == 1])                                     # (p,)
    negative = np.sort(scores[truth == 0])                                     # (q,)
    below = np.searchsorted(negative, positive, "left")                        # (p,)
    not_above = np.searchsorted(negative, positive, "right")                   # (p,)
    return ratio((below + not_above).sum(), 2 * len(positive) * len(negative))


def accuracy(truth, predicted):
    """The share of right predictions (n,), 1 or 0, where the truth (n,) is known."""
    return ratio((predicted == truth).sum(), (~np.isnan(truth)).sum())


def averages(values):
    """Means of the columns of values (n, k), NaN entries left out: (k,)."""
    return ratio(np.nansum(values, 0), (~np.isnan(values)).sum(0))


def classification(classes, both, truth, scores):
    """AUROC, and accuracy at score > 0, of K classes; macro over those in the mask both (K,).

    truth, scores: (n, K), NaN where the truth is not known.
    """
    result = {}
    for metric, function, guesses in (
            ("AUROC", auroc, scores),
            ("accuracy", accuracy, scores > TIE)):
        values = np.array([function(*pair) for pair in zip(truth.T, guesses.T, strict=True)])
        result[f"macro {metric}"] = averages(values[both])
        for name, value in zip(classes, values, strict=True):
            result[f"{metric} {name}"] = value
    return result


def precision_recall_f1(truth, predicted):
    """CheXbert-style micro averages of (n, K) booleans, 0 where nothing is predicted or true."""
    both = (truth & predicted).sum()
    real = truth.sum()
    said = predicted.sum()
    return {
        "micro F1": 2 * both / max(1, said + real),
        "micro recall": both / max(1, real),
        "micro precision": both / max(1, said)}


def bootstrap(metrics, arrays, patients, resamples=1000, seed=0):
    """Values of some metrics and their 95 % percentile intervals, resampled by patient.

    metrics: a function of arrays, of n rows each, that returns {name: value}. patients: (n,) ids,
    drawn with replacement, each with all its rows. Returns {name: {"value": float, "interval":
    [low, high]}}, NaN where nothing can be said.
    """
    names, patient = np.unique(patients, return_inverse=True)                  # (p,), (n,)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in tqdm(range(resamples), "resamples", leave=False, delay=1, disable=None):
        drawn = rng.integers(0, len(names), len(names))                        # (p,)
        times = np.bincount(drawn, minlength=len(names))                       # (p,)
        rows = np.repeat(np.arange(len(patient)), times[patient])
        draws.append(metrics(*(array[rows] for array in arrays)))
    result = {}
    for name, value in metrics(*arrays).items():
        values = [draw[name] for draw in draws if not np.isnan(draw[name])]
        interval = np.quantile(values or [np.nan], (0.025, 0.975))
        result[name] = {"value": float(value), "interval": interval.tolist()}
    return result


# ---------------------------------------------------------------- fine-tuning

L2_GRID = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # from strong to weak


def probe_scores(train, val, test, rows, names):
    """Logits (n, K) of test's images, of a probe on train's rows; loss on val chooses its L2."""
    # ASSUMPTION: FT is a linear probe of standardised, projected embeddings.
    images = train.images[rows]
    mean = images.mean(0)                                                      # (D,)
    std = images.std(0, correction=0) + 1e-6                                   # (D,)
    x, x_val, x_test = ((part - mean) / std for part in (images, val.images, test.images))
    y = torch.tensor(train.columns(names)[rows])                               # (n, K)
    y_val = torch.tensor(val.columns(names))
    if y_val.isnan().all():
        raise Unmeasurable(f"{val.where}: fine-tune needs rows whose classes are known")
    probe = nn.Linear(x.shape[1], len(names))
    for parameter in probe.parameters():
        nn.init.zeros_(parameter)
    best = probe
    lowest = math.inf
    for l2 in L2_GRID:  # each starts from the last solution
        solve(probe, x, y, l2)
        loss = known_loss(probe(x_val), y_val).item()
        if loss < lowest:
            best = copy.deepcopy(probe)
            lowest = loss
    return best(x_test).detach().double().numpy()


def solve(probe, x, y, l2):
    """Minimise the probe's loss and a penalty on its weights."""
    solver = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        penalty = probe.weight.square().sum(1).mean()
        loss = known_loss(probe(x), y) + l2 * penalty
        loss.backward()
        return loss

    solver.step(closure)


def known_loss(logits, y):
    """Binary cross-entropy where the truth y (n, K) is known."""
    known = ~torch.isnan(y)
    return F.binary_cross_entropy_with_logits(logits[known], y[known])


# ---------------------------------------------------------------- embeddings


def unit_rows(rows):
    """A batch of embeddings (B, D) as float32 unit rows on the CPU."""
    rows = torch.as_tensor(rows).float().cpu()
    if not torch.isfinite(rows).all():
        raise UserError("this model's embeddings are NaN or infinite: did its training diverge?")
    return F.normalize(rows, dim=1)


@dataclass
class Bench:
    """One model on one split; every embedding is computed once and shared by the tasks.

    Keywords are as the flags of the same name, but prompts: what read_prompts returns. Raises
    UserError for an empty split or an unknown class.
    Of each row: .reports; .ids; .labels (n, 14), 0 or 1, by rule where the row has none, NaN where
    nothing is known; .truth (n, K) of .classes, what is scored: 1, 0, NaN; .images (n, D),
    embedded. Of some rows: .pairs (row, present class, absent class). .set is the data set's name,
    .notes what readers of the results must know.
    """

    model: object
    manifest: Manifest
    batch_size: int = 64
    workers: int = 0
    resamples: int = 1000
    seed: int = 0
    prompts: dict = field(default_factory=dict)
    pool: int = 0
    fraction: tuple = (0.1, 1.0)

    def __post_init__(self):
        self.where = f"{self.manifest.path} (split {self.manifest.split})"
        self.notes = []
        self.embedded = {}
        if not len(self.manifest):
            raise Unmeasurable(f"{self.where}: no studies; choose another --split, or write "
                               '"split": "train", "val" or "test" into each line')
        self.device = torch.device("cpu")
        if isinstance(self.model, nn.Module):
            self.model.eval()
            self.device = next(self.model.parameters(), torch.empty(0)).device
        self.reports = []
        self.ids = []
        self.pairs = []
        self.scored = []
        labels = []
        official = set()
        for row in range(len(self.manifest)):
            record = self.manifest[row]
            self.ids.append(record["id"])
            self.reports.append(record.get("report", ""))
            given = record.get("labels") or label_report(self.reports[row])  # as of CXR-Align
            vector = label_vector(given)  # uncertain is 1, as in CheXbert's F1
            labels.append(vector if given else np.full_like(vector, np.nan))
            self.pairs += [(row, *pair) for pair in record.get("adversarial", [])]
            self.scored.append(truth_of(record))
            official.update(record.get("targets", {}))
        self.labels = np.stack(labels)                                         # (n, 14)
        self.set = set_name(self.ids, self.manifest.path)
        names = official or {name for truth in self.scored for name in truth}
        self.classes = [name for name in CONDITIONS if name in names]
        self.classes += sorted(names - {*CONDITIONS})
        self.truth = self.columns(self.classes)                                # (n, K)
        known = [*self.classes, *CONDITIONS]
        for name in self.prompts:
            expect(name in known, f"--prompts, {name}", f"a class out of {', '.join(known)}")

    def columns(self, names):
        """Truth of some classes (n, K): 1, 0, NaN for unknown."""
        truth = [[scored.get(name, -1) for name in names] for scored in self.scored]
        return np.where(np.less(truth, 0), np.nan, truth).astype(np.float32)

    def prompts_of(self, name):
        """Positive and negative prompts of a class: those of --prompts, else ours."""
        return self.prompts.get(name) or prompts(name)

    def rng(self, row):
        """Random numbers that depend on the seed and the study, not on the other rows."""
        key = zlib.crc32(self.ids[row].encode())
        return np.random.default_rng((self.seed, key))

    def of_split(self, split):
        """The same model on another split of the same file."""
        if split == self.manifest.split:
            return self
        return replace(self, manifest=Manifest(self.manifest.path, split, self.manifest.image_root))

    def read(self, row):
        """One image through the model's transform; UserError with file and line if it cannot be."""
        at_least = getattr(self.model, "image_size", 10_000) * 5 // 4  # JPEGs as in training
        try:
            image = read_image(self.manifest.image_path(row), at_least)
        except UserError as error:
            reason = str(error).split(": ")[-1]  # without the path, which may name the patient
            raise UserError(f"{self.manifest.where(row)}: {reason}; `python data.py check` lists "
                            "all such rows") from None
        return self.model.transform(image)

    @cached_property
    @torch.no_grad()
    def images(self):
        """Image embeddings (n, D); threads read one batch ahead."""
        rows = range(len(self.manifest))
        size = self.batch_size
        parts = []
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            ahead = pool.map(self.read, rows[:size])
            for start in tqdm(rows[::size], "images", leave=False, delay=1, disable=None):
                pixels = torch.stack(list(ahead)).to(self.device)              # (B, C, H, W)
                ahead = pool.map(self.read, rows[start + size:start + 2 * size])
                parts.append(unit_rows(self.model.encode_image(pixels)))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts):
        """Text embeddings (m, D); equal texts are encoded once."""
        new = sorted(set(texts) - self.embedded.keys(), key=lambda text: (len(text), text))
        starts = range(0, len(new), self.batch_size)  # of like lengths: less padding
        for start in tqdm(starts, "texts", leave=False, delay=1, disable=None):
            batch = new[start:start + self.batch_size]
            rows = unit_rows(self.model.encode_text(batch))
            self.embedded |= zip(batch, rows, strict=True)
        return torch.stack([self.embedded[text] for text in texts])

    def bootstrap(self, rows, metrics, *arrays):
        """Resampled metrics of arrays that have an entry for each of some rows."""
        return bootstrap(metrics, arrays, self.manifest.patients[rows], self.resamples, self.seed)

    def means(self, rows, columns):
        """Resampled means of {name: (n,)}, NaN entries left out."""
        values = np.stack(list(columns.values()), 1).astype(np.float64)        # (n, k)
        return self.bootstrap(
            rows, lambda drawn: dict(zip(columns, averages(drawn), strict=True)), values)

    def classify(self, rows, classes, scores):
        """Resampled classification by scores (n, K) of some rows."""
        truth = self.columns(classes)[rows]                                    # (n, K)
        both = np.isin(classes, with_both_labels(classes, truth))              # (K,)
        return self.bootstrap(rows, partial(classification, classes, both), truth, scores)

    def result(self, table, metrics, rows, *, cells, chance=None, **more):
        """What a task returns: its metrics, and cells with all that makes two numbers unlike.

        table: of the paper; cells: {its column: metric}; chance: {metric: value}, 0.5 for AUROCs.
        """
        for name, metric in metrics.items():
            metric["chance"] = 0.5 if "AUROC" in name else (chance or {}).get(name)
        n = len(rows)
        suffix = ""
        if "pool" in more:
            suffix += f", pool {more['pool']}"
        if "classes" in more:
            suffix += f", {len(more['classes'])} classes"
        if self.manifest.split != "test":
            suffix += f", {self.manifest.split}"
        heads = {}
        for column, metric in cells.items():
            heads[f"{self.set} {column} (n={more.get(f'n_{metric}', n)}{suffix})"] = metric
        return {
            "table": table,
            "cells": heads,
            "metrics": metrics,
            "n": n,
            "patients": len(np.unique(self.manifest.patients[rows])),
            **more}


def set_name(ids, path):
    """SET of ids SET/STUDY, if they are all of one known set; else the file's name."""
    names = {name.split("/")[0] for name in ids}
    if len(names) == 1 and names <= BUILDERS.keys():
        return names.pop()
    return Path(path).stem  # such ids may name patients


def truth_of(record):
    """What is scored of a record: {class: 1, 0 or -1}; its targets, else its labels."""
    if record.get("targets"):
        return record["targets"]
    if not record.get("labels"):  # nothing of its text was understood
        return {}
    # ASSUMPTION: where labels are the truth, a finding that is not mentioned is absent.
    return dict.fromkeys(CONDITIONS, 0) | record["labels"]


# ---------------------------------------------------------------- pictures


def draw_figures(bench, tasks, run, args):
    """Write pictures of the split, of what was measured and of a run's log into --figures."""
    figures = {"images": draw_images(bench), "soft-labels": draw_soft_labels(bench, run)}
    if (run / "log.jsonl").is_file():
        figures["curves"] = draw_curves(run / "log.jsonl")
    if "zero-shot" in tasks:
        figures["roc"] = draw_roc(bench, tasks["zero-shot"]["metrics"])
    if "retrieval" in tasks and args.show_reports:
        figures["retrieval"] = draw_retrieval(bench)
    for name, figure in figures.items():
        figure.savefig(Path(args.figures) / f"{name}.png", bbox_inches="tight")
    print(f"wrote {', '.join(figures)} into {args.figures}")


def panels(count, side):
    """A picture of matplotlib that needs no window, and its panels, side by side."""
    from matplotlib.figure import Figure
    figure = Figure((side * count, side), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def show_image(ax, bench, row, title):
    """The image of a row under some text."""
    ax.imshow(read_image(bench.manifest.image_path(row)), "gray")
    ax.set_axis_off()
    ax.set_title(title, loc="left", size=8)


def draw_images(bench):
    """Twelve images, evenly spread over the split, with the names of their positive classes."""
    from matplotlib.figure import Figure
    figure = Figure((12, 10), layout="constrained")
    rows = np.unique(np.linspace(0, len(bench.ids) - 1, 12, dtype=int))
    for row, ax in zip(rows, figure.subplots(3, 4).flat, strict=False):
        ax.set_axis_off()
        show_image(ax, bench, row, caption(bench.scored[row]))
    return figure


def caption(labels):
    """The positive classes of {class: 1, 0 or -1}."""
    return textwrap.fill(", ".join(name for name, value in labels.items() if value == 1), 40)


def draw_roc(bench, metrics):
    """Zero-shot ROC curves of all classes."""
    positive, negative = class_scores(bench, bench.classes)
    order = np.argsort(negative - positive, axis=0)  # the highest score first
    truth = np.take_along_axis(bench.truth, order, 0)                          # (n, K)
    true = np.cumsum(truth == 1, 0)                                            # (n, K)
    false = np.cumsum(truth == 0, 0)                                           # (n, K)
    figure, (ax,) = panels(1, side=7)
    for k, name in enumerate(bench.classes):
        area = metrics[f"AUROC {name}"]["value"]
        if area is None:
            continue
        ax.plot(false[:, k] / false[-1, k], true[:, k] / true[-1, k], linewidth=1 + k // 10,
                label=f"{name} {area:.3f}")
    ax.set(title="Zero-shot ROC and AUROC", xlabel="1 - specificity", ylabel="sensitivity")
    ax.legend()
    return figure


@torch.no_grad()
def draw_soft_labels(bench, run):
    """y_hat of t, c and g (Fig. 3) of twelve studies: reports, then their hard negatives."""
    thresholds = DynamicSoftContrastiveLoss().thresholds
    flags = {}
    if (run / "config.json").is_file():
        flags = read_json(run / "config.json").get("flags", {})
    count = min(12, len(bench.reports))
    sides = [bench.manifest[row] for row in range(count)]
    for study in sides[:count]:
        sides += study.get("hard_negatives", [])[:1]
    labels = np.stack([label_vector(side.get("labels", {})) for side in sides])  # (m, 14)
    streams = {
        "text": bench.texts([side.get("report", "") for side in sides]),       # (m, D)
        "clinical": F.normalize(torch.from_numpy(labels), dim=1)}
    if hasattr(bench.model, "gcn"):
        graphs = [side.get("graph", {}) for side in sides]
        streams["graph"] = bench.model.encode_graph(graphs).cpu()              # (m, D)
    figure, axes = panels(len(streams), side=4)
    for ax, (name, x) in zip(axes, streams.items(), strict=True):
        tau = flags.get(f"tau_{name}", thresholds[name])  # the run's own
        y = soft_labels(x @ x.T, tau)                                          # (m, m)
        ax.imshow(y.sqrt().numpy(), "Greys")  # the root, so that small shares show
        ax.set(title=f"y_{name[0]}: {name}, tau {tau}",
               xlabel=f"{count} studies, then their hard negatives, if any")
    return figure


def draw_curves(path):
    """A run's loss, validation metrics and effective positives against steps."""
    names = ("loss", "auroc", "retrieval@5", "positives_text", "positives_clinical",
             "positives_graph")
    log = [record | record.get("val", {}) for _, record in read_jsonl(path)]
    figure, axes = panels(len(names), side=3)
    for ax, name in zip(axes, names, strict=True):
        points = [(record["step"], record[name]) for record in log if record.get(name) is not None]
        ax.plot(*zip(*points, strict=True))
        ax.set(title=name, xlabel="step")
    return figure


def draw_retrieval(bench):
    """Three images with a finding, their reports and the five that the model ranks first."""
    texts = [text for text in dict.fromkeys(bench.reports) if text]
    embedded = bench.texts(texts)                                              # (m, D)
    abnormal = np.flatnonzero((bench.labels[:, :-1] == 1).any(1))
    figure, axes = panels(3, side=5)
    for row, ax in zip(abnormal, axes, strict=False):
        best = (embedded @ bench.images[row]).argsort(descending=True)[:5]
        lines = [f"its report: {bench.reports[row]}"]
        for place, j in enumerate(best, 1):
            its_own = " (its own)" if texts[j] == bench.reports[row] else ""
            lines.append(f"{place}{its_own}: {texts[j]}")
        show_image(ax, bench, row, "\n".join(textwrap.fill(line, 66) for line in lines))
    return figure


# ---------------------------------------------------------------- output


def provenance():
    """The commit (where git is there) and the versions that a result or a run was made with."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    git = subprocess.getoutput(f"git -C {here} describe --always --dirty 2>/dev/null")
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "transformers", "numpy", "pillow"):
        versions[name] = importlib.metadata.version(name)
    return {"git": git or None, "versions": versions}


def print_table(task, results):
    """One task in the paper's layout, in percent: a row for each model that has it, and of chance.

    Of one model alone there are rows for its classes too, where these are at most 15.
    """
    results = [result for result in results if task in result["tasks"]]
    entries = [result["tasks"][task] for result in results]
    if not results:
        return
    columns = {}  # head: the metric of each model, None where it has none
    for entry in entries:
        for head in entry["cells"]:
            columns[head] = [other["metrics"].get(other["cells"].get(head)) for other in entries]
    print_row(f"{entries[0]['table']}, {task}", columns)
    print_row("---", ["---"] * len(columns))
    for k, result in enumerate(results):
        print_row(result["model"], [cell(metrics[k]) for metrics in columns.values()])
    print_row("chance", [chance(metrics) for metrics in columns.values()])
    entry = entries[0]
    classes = entry.get("classes", [])
    if len(results) == 1 and len(classes) <= 15:
        for name in classes:
            metrics = [entry["metrics"].get(f"{macro.replace('macro ', '')} {name}")
                       for macro in entry["cells"].values()]
            if any(metrics):
                print_row(name, map(cell, metrics))


def print_row(title, cells):
    print(f"| {title} | {' | '.join(cells)} |")


def cell(metric):
    """A metric with its interval, as "85.0 [83.1, 86.9]"; "-" where there is none."""
    if metric is None or metric["value"] is None:
        return "-"
    low, high = map(percent, metric["interval"])
    return f"{percent(metric['value'])} [{low}, {high}]"


def chance(metrics):
    """Chance in the same column of some models: one number, but for "centred"."""
    chances = {percent(metric["chance"]) for metric in metrics if metric}
    return " / ".join(sorted(chances))


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def read_result(path):
    """A result file; UserError if it is none."""
    result = read_json(path)
    expect(isinstance(result, dict) and "tasks" in result, path, "a result file of evaluate.py")
    return result


def make_folder(path):
    """A folder to write into; UserError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: expected a folder to write into ({error.strerror})") from None


def write_result(result, args):
    """Write the result to --out, or into a run folder of ours."""
    out = args.out
    if not out and any(Path(args.run).glob("*.pt")):
        names = [args.task, Path(args.data).stem, args.split]
        if args.prompts:
            names.append(args.prompts_name)
        out = f"{args.run}/results-{'-'.join(names)}.json"
    if not out:
        print("not saved; give --out")
        return
    done = "replaced" if Path(out).exists() else "wrote"
    with open_atomic(out) as file:
        json.dump(result, file, indent=1)
    print(f"{done} {out}")


# ---------------------------------------------------------------- the command line


def load_any(path, device):
    """A model from what load_model takes, or from a Python file that defines load().

    load() returns an object with encode_image(pixels (B, ...)) and encode_text(list of str), both
    -> (B, D), and transform(grey PIL image) -> tensor. Raises UserError for what is no model; a
    mistake inside the Python file keeps its traceback.
    """
    if not path.endswith(".py"):
        try:
            return load_model(path, device)
        except ModelError as error:
            raise UserError(str(error)) from None
    expect(Path(path).is_file(), path, "a Python file that defines load()")
    names = runpy.run_path(path)
    expect("load" in names, path, "a function load()")
    return names["load"]()


def parse_args(words):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("run", nargs="?",
        help="run folder, checkpoint, Hugging Face CLIP, or .py file with load()")
    add("--data", metavar="X.jsonl", help="manifest; cxr-align needs one with hard negatives")
    add("--split", default="test", choices=(*SPLITS, "all"),
        help="rows to score, in the paper test; fine-tune uses all three whatever this says")
    add("--image-root", help="where the images are, if not where X.jsonl says")
    add("--task", default="all", choices=(*TASKS, "all"), help="all: whatever X.jsonl allows")
    add("--pool", type=minimum(0), default=0,
        help="normal-case: abnormal reports, 0 for all; paper 2999")
    add("--fraction", type=minimum(0, float), nargs="+", default=[0.1, 1.0],
        help="fine-tune: shares of the training patients; the paper's are 0.1 and 1")
    add("--prompts", metavar="FILE.json", default={}, help="class -> [positive texts, negative "
        "texts]; classes that are not in it, No Finding too, keep ours")
    add("--compare", nargs="+", help="print the tables of these result files")
    add("--out",
        help="result file; None: results-TASK-MANIFEST-SPLIT(-PROMPTS).json in a run folder RUN")
    add("--figures",
        help="draw images, soft labels, ROC, the run's curves there; needs matplotlib")
    add("--show-reports", action="store_true",
        help="with --figures: what is retrieved for three images too, which shows report text")
    add("--batch-size", type=minimum(1), default=64,
        help="items at once; lower it if memory runs out")
    add("--workers", type=minimum(0), default=2,
        help="threads that read images; free cores at most")
    add("--seed", type=minimum(0), default=0, help="of resamples, pools, pairs and fractions")
    add("--resamples", type=minimum(1, below=100_001), default=1000,
        help="bootstrap resamples for the intervals")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", default=devices[0], choices=devices,
        help="where the model runs; a .py file chooses itself")
    return parser.parse_args(words)


def run_tasks(bench, task, model):
    """Results by task, printed as soon as measured; of "all" those that the manifest allows."""
    results = {}
    skipped = {}
    chosen = [*TASKS] if task == "all" else [task]
    for name in chosen:
        try:
            entry = TASKS[name](bench)
        except UserError as error:  # also an unreadable image: the other tasks' numbers stand
            skipped.setdefault(str(error), []).append(name)
            continue
        entry = json.loads(json.dumps(entry), parse_constant=lambda _: None)  # JSON has no NaN
        results[name] = entry
        print(f"\n{name}: {entry['n']} items of {entry['patients']} patients\n")
        print_table(name, [{"model": model, "tasks": results}])
    reasons = [f"skipped {', '.join(names)}: {reason}" for reason, names in skipped.items()]
    if not results:
        raise Unmeasurable("; ".join(reasons))
    bench.notes += reasons
    return results


def main(argv=None):
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun rank 0 evaluates alone
        return
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(words)
    if args.compare:
        results = [read_result(path) for path in args.compare]
        for task in TASKS:
            print_table(task, results)
        return
    expect(args.run and args.data, "command line", "RUN and --data X.jsonl, or --compare JSON ...")
    if args.out:  # asked before any work
        make_folder(Path(args.out).parent)
    if args.figures:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--figures needs matplotlib: pip install matplotlib")
        make_folder(args.figures)
    run = Path(args.run).resolve()
    if run.suffix == ".pt":
        run = run.parent
    name = run.name
    if args.prompts:
        args.prompts_name = Path(args.prompts).stem
        name += f", {args.prompts_name}"
        args.prompts = read_prompts(args.prompts)
    bench = Bench(
        load_any(args.run, args.device),
        Manifest(args.data, args.split, args.image_root),
        batch_size=args.batch_size,
        workers=args.workers,
        resamples=args.resamples,
        seed=args.seed,
        prompts=args.prompts,
        pool=args.pool,
        fraction=args.fraction)
    tasks = run_tasks(bench, args.task, name)
    print()
    for note in bench.notes:
        print(f"note: {note}")
    result = vars(args) | provenance() | {
        "model": name,
        "command": shlex.join(["python", "evaluate.py", *words]),
        "set": bench.set,
        "tasks": tasks,
        "notes": bench.notes}
    write_result(result, args)
    if args.figures:
        draw_figures(bench, tasks, run, args)


if __name__ == "__main__":
    run_main(main)
