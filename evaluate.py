"""Evaluation: every table of the paper, for one model of ours or anyone's (Sec. 5.3-5.7, Tab. 2-6).

    python evaluate.py RUN --task all --data studies.jsonl    measure; print tables and write JSON
    python evaluate.py --compare A.json B.json ...            tables of many result files

RUN is what load_model takes (a run folder, a checkpoint, a Hugging Face CLIP folder) or a Python
file that defines load(). What is scored is a study's `targets`, else its `labels`; -1 is left out.

In this order: the six tasks, each a table of the paper, and what they ask for; prompts and scores;
metrics; fine-tuning; embeddings; pictures; output; the command line. A task takes a Bench (one
model on one split) and returns its metrics with 95 % intervals, resampled by patient, and those
that go into the table.
Symbols: n items (mostly images), m texts, K classes, D width. Metrics are fractions.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
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
from gcn import read_radgraph
from loss import soft_labels
from negations import label_report, split_sentences

TIE = 1e-6  # closer cosines are a tie, as float32 cannot tell them apart
CHUNK = 256  # images compared at once with all texts: 400,000 texts then take 0.4 GB
# ASSUMPTION: Tab. 2 has AUC for RSNA and SIIM, accuracy for these; sets of others have AUC too.
ACCURACY_SETS = ("chexpert5x200", "vindr", "cxr14")
FRACTIONS = (0.1, 1.0)  # Tab. 2: FT10 and FT100, shares of the training patients


class Unmeasurable(UserError):
    """What a task needs is not in the manifest; the message says how to make it."""


# ---------------------------------------------------------------- the six tasks: Bench -> result
# A Bench is a model and the rows it is asked about: their images and reports, embedded once, their
# classes and truth. Each task ends with bench.measure(rows, metrics, cells={column of the paper's
# table: our metric}, ...), where metrics(drawn) are those of some of the rows: for the intervals,
# of rows drawn again and again. The first lines of its docstring stand under its table.


def zero_shot(bench):
    """Tab. 2 ZS (Sec. 5.3): score of a class = cos(image, positive) - cos(image, negative prompts).

    Metrics: AUROC and accuracy at score > 0 of each class and their means; CheXpert 5x200's five
    classes are one choice instead, the class whose positive prompts are nearest.
    """
    classes = bench.classes
    both = with_both_labels(classes, bench.truth)
    if not both:
        raise Unmeasurable(f"{bench.where}: no class has both positive and negative images; give "
                           '"targets" of 0 and 1, or label the reports with `python negations.py`')
    positive, negative = class_scores(bench, classes)                          # (n, K) each
    # ASSUMPTION: Tab. 2's accuracy is the mean over classes, and five-way for CheXpert 5x200.
    rows = np.arange(len(bench.truth))
    if bench.set == "chexpert5x200":
        return bench.measure(
            rows,
            partial(averages, {"5-way accuracy": bench.truth[rows, positive.argmax(1)]}),
            cells={"ZS ACC, one of 5 classes": "5-way accuracy"},
            chance={"5-way accuracy": 0.2})
    cells = {f"ZS AUC, {len(both)} classes": "macro AUROC"}
    if bench.set in ACCURACY_SETS:
        cells = {f"ZS ACC, {len(both)} classes": "macro accuracy"}
    return measure_classes(bench, classes, {"": positive - negative}, cells)


def fine_tune(bench):
    """Tab. 2 FT10, FT100 (Sec. 5.3): train rows train, val rows choose, test rows are scored."""
    train, val, test = (bench.of_split(split) for split in SPLITS)
    chosen = [rows_of_share(train.manifest.patients, share, bench.seed) for share in FRACTIONS]
    names = with_both_labels(train.classes, train.truth[chosen[0]])
    if not names:
        raise Unmeasurable(f"{train.where}: fine-tune finds no class with positives and negatives "
                           f'in {len(chosen[0])} rows, a tenth; give more studies "targets"')
    sizes = {}
    scores = {}
    cells = {}
    for share, rows in zip(FRACTIONS, chosen, strict=True):
        task = f"FT{100 * share:g}"
        sizes[str(share)] = len(rows)
        scores[f"{task} "] = probe_scores(train, val, test, rows, names)       # (n, K)
        cells[f"{task} AUC, {len(names)} classes"] = f"{task} macro AUROC"
    return measure_classes(test, names, scores, cells) | {"train": sizes}


def measure_classes(bench, names, scores, cells):
    """The result of scores {prefix of metrics: (n, K)} of some classes."""
    truth = bench.columns(names)                                               # (n, K)
    both = with_both_labels(names, truth)
    known = np.flatnonzero(~np.isnan(truth).all(1))  # rows with a known class

    def metrics(drawn):
        rows = known[drawn]
        result = {}
        for prefix, columns in scores.items():
            for name, value in classification(truth[rows], columns[rows], names, both).items():
                result[prefix + name] = value
        return result

    return bench.measure(
        known,
        metrics,
        cells=cells,
        chance={},
        classes=names)


def normal_case(bench):
    """Tab. 3 NCD (Sec. 5.5): a normal image's own report ranks before all abnormal ones."""
    # ASSUMPTION: the normal report is the study's own, the abnormal ones all that there are.
    truth = bench.columns(["No Finding"])[:, 0]                                # (n,)
    rows = np.flatnonzero((truth == 1) & (bench.reports != ""))
    normal = bench.reports[rows]
    pool = sorted({*bench.reports[truth == 0]} - {*normal, ""})
    if not len(rows) or len(pool) < max(1, bench.pool):
        raise Unmeasurable(f'{bench.where}: normal-case needs "No Finding" in "targets", 1 for a '
                           "normal study and 0 for --pool abnormal ones, and their reports; found "
                           f"{len(rows)} and {len(pool)}")
    np.random.default_rng(bench.seed).shuffle(pool)
    pool = pool[:bench.pool or None]
    nearer, _ = retrieve(bench.images[rows], bench.texts(normal), bench.texts(pool))
    return bench.measure(
        rows,
        partial(averages, {"accuracy": nearer == 0}),
        cells={f"NCD ACC, pool {len(pool)}": "accuracy"},
        chance={"accuracy": 1 / (len(pool) + 1)},
        pool=len(pool))


def adversarial(bench):
    """Tab. 4 (Sec. 5.4) ACC, "both": a present and an absent class of an image decided correctly,
    often below chance since all findings of an image score high or low together; "centred": the
    same after each image's scores have lost their mean.

    Centring needs no label; its chance is that of the image's scores dealt at random.
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
    both = decided(scores, pair)                                               # (n,)
    scores, dealt = centre(scores, ~np.isnan(bench.columns(names)[rows]))      # (n, K), (n,)
    centred = decided(scores, pair)                                            # (n,)
    known = ~np.isnan(centred)
    return bench.measure(
        rows,
        partial(averages, {"both": both, "centred": centred}),
        # ASSUMPTION: Tab. 4's ACC takes scores as they are; nobody can know if 34.4 was centred.
        cells={
            f"ACC, {len(names)} classes": "both",
            f"centred, {len(names)} classes": "centred"},
        chance={
            "both": 0.25,
            "centred": ratio(dealt[known].sum(), known.sum())},
        n_centred=int(known.sum()),
        pairs="of ProbMed" if bench.pairs else "drawn by the seed")


def retrieval(bench):
    """Tab. 5 (Sec. 5.7): image to report among the distinct reports of the split."""
    # ASSUMPTION: a report that repeats is one candidate, and right for each of its images.
    rows = np.flatnonzero(bench.reports != "")
    # the distinct reports (m,), the first row with each (m,), and which of them each row has (n,)
    candidates, first, target = np.unique(
        bench.reports[rows], return_index=True, return_inverse=True)
    if len(candidates) < 2:
        raise Unmeasurable(f'{bench.where}: retrieval needs at least two different "report" texts')
    texts = bench.texts(candidates)                                            # (m, D)
    ranks, best = retrieve(bench.images[rows], texts[target], texts)
    own = bench.labels[rows]                                                   # (n, 14)
    retrieved = bench.labels[rows[first[best]]]                                # (n, 14)
    known = ~np.isnan(own + retrieved)                                         # (n, 14)
    truth = known & (own == 1)                                                 # (n, 14)
    predicted = known & (retrieved == 1)                                       # (n, 14)

    def metrics(drawn):
        result = precision_recall_f1(truth[drawn], predicted[drawn])
        result["@5"] = average(ranks[drawn] <= 5)
        return result

    # ASSUMPTION: Tab. 5 does not name its average over labels; the row is micro.
    return bench.measure(
        rows,
        metrics,
        cells={
            "@5": "@5",
            "F1": "micro F1",
            "Recall": "micro recall",
            "Precision": "micro precision"},
        chance={"@5": min(1, 5 / len(candidates))},
        candidates=len(candidates))


def cxr_align(bench):
    """Tab. 6 (Sec. 5.6) A: an image is nearer to its report r than to the negation r^n; swapped A:
    an image without the finding is nearer to r^n; B: nearer to r than to r^r, the finding left out.
    A model that only avoids negations, as Sec. 5.6 suspects, has a high A and a low swapped A.

    Equal scores count one half. The other image is drawn by the seed.
    """
    rows = np.flatnonzero(bench.manifest.negatives)
    if not len(rows):
        raise Unmeasurable(f'{bench.where}: no "hard_negatives"; make them with '
                           "`python negations.py IN.jsonl --out OUT.jsonl`")
    negatives = [bench.manifest[row]["hard_negatives"][0] for row in rows]  # CXR-Align's choice
    omitted = [negative["omitted"] for negative in negatives]
    r = bench.texts(bench.reports[rows])                                       # (n, D)
    r_n = bench.texts([negative["report"] for negative in negatives])          # (n, D)
    r_r = bench.texts(omitted)                                                 # (n, D)
    images = bench.images[rows]                                                # (n, D)
    others = images_without(bench, rows, [negative["condition"] for negative in negatives])
    columns = {
        "A": prefers(images, r, r_n),
        "swapped A": prefers(others, r_n, r),
        "B": prefers(images, r, r_r)}
    columns["B"][[not text.strip() for text in omitted]] = np.nan  # CXR-Align has empty ones
    return bench.measure(
        rows,
        partial(averages, columns),
        cells={name: name for name in columns},
        chance=dict.fromkeys(columns, 0.5),
        **{f"n_{name}": int((~np.isnan(values)).sum()) for name, values in columns.items()})


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


def decided(scores, pair):
    """Where scores (n, K) are above 0 for the first class of a pair (n, 2), below for the other."""
    first, second = np.take_along_axis(scores, pair, 1).T                      # (n,) each
    right = (first > TIE) & (second < -TIE)
    return np.where(np.isnan(first + second), np.nan, right)


def centre(scores, scored):
    """Scores (n, K) less their mean over an image's scored findings; NaN where there are under 3.

    Also the chance (n,) of a right decision for two findings when the image's scores are shuffled:
    that the first gets one of those above 0, and the second one of those below.
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
    chosen = torch.full_like(bench.images[rows], torch.nan)
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
        to_own = (image * text).sum(1, keepdim=True)                           # (c, 1)
        nearer.append((similarity >= to_own - TIE).sum(1))
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
        positive, negative = zip(*map(prompts, CONDITIONS[:-1]), strict=True)
        return sum(negative, []), sum(positive, [])
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
        # ASSUMPTION: an ensemble is the mean of its normalised embeddings, normalised again.
        means = [bench.texts(bench.prompts_of(name)[side]).mean(0) for name in classes]
        ensembles = F.normalize(torch.stack(means), dim=1)                     # (K, D)
        scores.append((bench.images @ ensembles.T).double().numpy())           # (n, K)
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


def average(values):
    """The mean of values (n,), NaN entries left out."""
    return ratio(np.nansum(values), (~np.isnan(values)).sum())


def averages(columns, rows):
    """The means of {name: (n,)} over some rows."""
    return {name: average(values[rows]) for name, values in columns.items()}


def accuracy(truth, predicted):
    """The share of right predictions (n,), 1 or 0, where the truth (n,) is known."""
    return average(np.where(np.isnan(truth), np.nan, predicted == truth))


def classification(truth, scores, classes, averaged):
    """AUROC, and accuracy at score > 0, of K classes, and the mean over those in `averaged`.

    truth, scores: (n, K), NaN where the truth is not known.
    """
    result = {}
    for k, name in enumerate(classes):
        result[f"AUROC {name}"] = auroc(truth[:, k], scores[:, k])
        result[f"accuracy {name}"] = accuracy(truth[:, k], scores[:, k] > TIE)
    for metric in ("AUROC", "accuracy"):
        result[f"macro {metric}"] = average([result[f"{metric} {name}"] for name in averaged])
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


def bootstrap(metrics, patients, resamples=1000, seed=0):
    """Values of some metrics and their 95 % percentile intervals, resampled by patient.

    metrics: a function of row numbers that returns {name: value}. patients: (n,) ids, drawn with
    replacement, each with all its rows. Returns {name: {"value": float, "interval": [low, high]}},
    NaN where nothing can be said.
    """
    names, patient = np.unique(patients, return_inverse=True)                  # (p,), (n,)
    rng = np.random.default_rng(seed)
    rows = np.arange(len(patient))
    draws = []
    for _ in bar(range(resamples), "resamples"):
        drawn = rng.integers(0, len(names), len(names))                        # (p,)
        times = np.bincount(drawn, minlength=len(names))                       # (p,)
        draws.append(metrics(np.repeat(rows, times[patient])))
    result = {}
    for name, value in metrics(rows).items():
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
    least = torch.inf
    for l2 in L2_GRID:  # each starts from the last solution
        solve(probe, x, y, l2)
        loss = known_loss(probe(x_val), y_val).item()
        if loss < least:
            least = loss
            logits = probe(x_test).detach().double().numpy()                   # (n, K)
    return logits


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


def bar(items, title):
    """A progress bar on a terminal, gone when it is done."""
    return tqdm(items, title, leave=False, disable=None)


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
    .asked the prompts that were used.
    """

    model: object
    manifest: Manifest
    batch_size: int = 64
    workers: int = 0
    resamples: int = 1000
    seed: int = 0
    prompts: dict = field(default_factory=dict)
    pool: int = 0

    def __post_init__(self):
        self.where = f"{self.manifest.path} (split {self.manifest.split})"
        self.embedded = {}
        self.asked = {}
        if not len(self.manifest):
            raise Unmeasurable(f"{self.where}: no studies; choose another --split, or write "
                               '"split": "train", "val" or "test" into each line')
        self.device = torch.device("cpu")
        if isinstance(self.model, nn.Module):
            self.model.eval()
            self.device = next(self.model.parameters()).device
        self.ids = []
        self.pairs = []
        self.scored = []
        reports = []
        labels = []
        official = set()
        for row in bar(range(len(self.manifest)), "studies"):
            record = self.manifest[row]
            report = record.get("report", "")
            given = record.get("labels") or label_report(report)  # as of CXR-Align
            vector = label_vector(given)  # uncertain is 1, as in CheXbert's F1
            if not given:
                vector[:] = np.nan
            self.ids.append(record["id"])
            reports.append(report)
            self.pairs += [(row, *pair) for pair in record.get("adversarial", [])]
            self.scored.append(truth_of(record))
            labels.append(vector)
            official.update(record.get("targets", {}))
        self.reports = np.array(reports, object)                               # (n,)
        self.labels = np.stack(labels)                                         # (n, 14)
        self.set = set_name(self.ids, self.manifest.path)
        names = official or {name for truth in self.scored for name in truth}
        others = sorted(names - {*CONDITIONS})
        known = [*CONDITIONS, *others]
        self.classes = [name for name in known if name in names]
        self.truth = self.columns(self.classes)                                # (n, K)
        for name in self.prompts:
            expect(name in known, f"--prompts, {name}", f"a class out of {', '.join(known)}")

    def columns(self, names):
        """Truth of some classes (n, K): 1, 0, NaN for unknown."""
        truth = [[scored.get(name, -1) for name in names] for scored in self.scored]
        truth = np.array(truth, np.float32)
        truth[truth < 0] = np.nan
        return truth

    def prompts_of(self, name):
        """Positive and negative prompts of a class: those of --prompts, else ours."""
        self.asked[name] = self.prompts.get(name) or prompts(name)
        return self.asked[name]

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
        side = np.max(getattr(self.model, "image_size", 10_000))
        try:
            image = read_image(self.manifest.image_path(row), side * 5 // 4)  # as in training
        except UserError as error:
            reason = str(error).split(": ")[-1]  # without the path, which may name the patient
            raise UserError(f"{self.manifest.where(row)}: {reason}; `python data.py check` lists "
                            "all such rows") from None
        return self.model.transform(image)

    @cached_property
    @torch.no_grad()
    def images(self):
        """Image embeddings (n, D)."""
        rows = range(len(self.manifest))
        parts = []
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for start in bar(rows[::self.batch_size], "images"):
                batch = pool.map(self.read, rows[start:start + self.batch_size])
                pixels = torch.stack(list(batch)).to(self.device)              # (B, C, H, W)
                parts.append(unit_rows(self.model.encode_image(pixels)))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts):
        """Text embeddings (m, D); equal texts are encoded once."""
        new = sorted(sorted(set(texts) - self.embedded.keys()), key=len)
        starts = range(0, len(new), self.batch_size)  # of like lengths: less padding
        for start in bar(starts, "texts"):
            batch = new[start:start + self.batch_size]
            rows = unit_rows(self.model.encode_text(batch))
            self.embedded |= zip(batch, rows, strict=True)
        return torch.stack([self.embedded[text] for text in texts])

    def measure(self, rows, metrics, *, cells, chance, **more):
        """A task's result: metrics with intervals, and which of them the paper's table has.

        metrics: as of bootstrap; cells: {column: metric}, where set, split and n are added, so that
        nothing is compared with its unlike; chance: {metric: value}, 0.5 for AUROCs.
        """
        patients = self.manifest.patients[rows]
        measured = bootstrap(metrics, patients, self.resamples, self.seed)
        for name, metric in measured.items():
            metric["chance"] = 0.5 if "AUROC" in name else chance.get(name)
        heads = {}
        for column, metric in cells.items():
            n = more.get(f"n_{metric}", len(rows))
            heads[f"{self.set} {self.manifest.split} {column} (n={n})"] = metric
        return {
            "cells": heads,
            "metrics": measured,
            "n": len(rows),
            "patients": len(np.unique(patients)),
            **more}


def set_name(ids, path):
    """SET of ids SET/STUDY, if they are all of one known set; else the file's name."""
    prefixes = {name.split("/")[0] for name in ids}
    for name in BUILDERS:
        if prefixes == {name}:
            return name
    return Path(path).stem  # such ids may name patients


def truth_of(record):
    """What is scored of a record: {class: 1, 0 or -1}; its targets, else its labels."""
    if record.get("targets"):
        return record["targets"]
    if not record.get("labels"):  # its text tells of none
        return {}
    # ASSUMPTION: where labels are the truth, a finding that is not mentioned is absent.
    return dict.fromkeys(CONDITIONS, 0) | record["labels"]


# ---------------------------------------------------------------- pictures

CURVES = {  # numbers of log.jsonl
    "loss": "loss",
    "auroc": "zero-shot AUROC of validation rows",
    "retrieval@5": "retrieval@5 of validation rows",
    "positives_text": "effective positives by text",
    "positives_clinical": "effective positives by labels",
    "positives_graph": "effective positives by graph"}


HEIGHTS = {"curves": 8, "method": 9, "soft-labels": 5}  # of pictures, in inches; others 12


def draw_figures(bench, tasks, run, args):
    """Write the pictures that the model, the tasks and the flags allow into --figures."""
    from matplotlib.figure import Figure  # which needs no window
    drawings = {"images": draw_images}
    if "zero-shot" in tasks:
        drawings["roc"] = draw_roc
    if args.show_reports and "retrieval" in tasks:
        drawings["retrieval"] = draw_retrieval
    if (run / "log.jsonl").is_file():  # a run of ours
        drawings |= {"curves": draw_curves, "soft-labels": draw_soft_labels}
        if args.show_reports and bench.manifest.negatives.any():
            drawings["method"] = draw_method
    for name, draw in drawings.items():
        figure = Figure((14, HEIGHTS.get(name, 12)), layout="constrained")
        draw(figure, bench, run)
        figure.savefig(f"{args.figures}/{name}.png")
    print(f"wrote {', '.join(drawings)} into {args.figures}")


def draw_images(figure, bench, run):
    """The first twelve images with their positive classes."""
    for row, ax in zip(range(len(bench.ids)), figure.subplots(3, 4).flat, strict=False):
        show_image(ax, bench, row)


def show_image(ax, bench, row):
    ax.imshow(read_image(bench.manifest.image_path(row)), "gray")
    ax.set_title(findings(bench.scored[row]))
    ax.set_axis_off()


def findings(labels):
    """The positive classes of {class: 1, 0 or -1} as a caption."""
    positive = [name for name, value in labels.items() if value == 1]
    return textwrap.fill(", ".join(positive) or "none", 34)


def draw_curves(figure, bench, run):
    """A run's numbers against steps, with a running mean; a step's last record counts."""
    log = [record | record.get("val", {}) for _, record in read_jsonl(run / "log.jsonl")]
    for ax, (name, words) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        points = {record["step"]: record[name] for record in log if record.get(name) is not None}
        ax.set(title=words, xlabel="step")
        if points:
            steps, values = np.array(list(points.items())).T
            window = 1 + len(steps) // 20
            running = np.convolve(values, np.full(window, 1 / window), "valid")
            ax.plot(steps, values, ".", alpha=0.3)
            ax.plot(steps[window - 1:], running)


@torch.no_grad()
def draw_soft_labels(figure, bench, run):
    """y_hat (Eq. 4, 5, 9) of the first twelve studies; uncertain labels are positive."""
    flags = read_json(run / "config.json")["flags"]
    names = [findings(scored) for scored in bench.scored[:12]]
    streams = {
        "text": bench.texts(bench.reports[:12]),                               # (m, D)
        "clinical": F.normalize(torch.tensor(bench.labels[:12]).nan_to_num())}  # (m, 14)
    if hasattr(bench.model, "gcn"):
        graphs = [bench.manifest[row].get("graph", {}) for row in range(len(names))]
        streams["graph"] = bench.model.encode_graph(graphs).cpu()              # (m, D)
    axes = figure.subplots(1, len(streams), sharex=True, sharey=True)
    for ax, (name, x) in zip(axes, streams.items(), strict=True):
        tau = flags[f"tau_{name}"]
        y_hat = soft_labels(x @ x.T, tau).numpy()                              # (m, m)
        shares = ax.imshow(y_hat, "Greys", vmin=0, vmax=1)
        ax.set_title(f"soft labels, {name} stream, tau {tau}")
    ax.set(xticks=[], yticks=range(len(names)), yticklabels=names)
    figure.colorbar(shares, ax=axes, shrink=0.5, label="share of a row's target: black all, "
                    "white none")


def draw_roc(figure, bench, run):
    """Zero-shot ROC curves of the classes with both labels."""
    classes = with_both_labels(bench.classes, bench.truth)
    positive, negative = class_scores(bench, classes)                          # (n, K) each
    truths = bench.columns(classes).T                                          # (K, n)
    columns = (positive - negative).T                                          # (K, n)
    ax = figure.subplots()
    for name, truth, scores in zip(classes, truths, columns, strict=True):
        ordered = truth[np.argsort(-scores)]  # the highest score first
        true = np.cumsum([0, *(ordered == 1)])                                 # (n + 1,)
        false = np.cumsum([0, *(ordered == 0)])                                # (n + 1,)
        style = "-" if len(ax.lines) < 10 else "--"  # there are ten colours
        ax.plot(false / false[-1], true / true[-1], style,
                label=f"{name} {auroc(truth, scores):.3f}")
    ax.plot([0, 1], [0, 1], "k:", label="chance 0.500")
    ax.set(title="Zero-shot ROC and AUROC", xlabel="1 - specificity", ylabel="sensitivity")
    ax.legend()


def draw_retrieval(figure, bench, run):
    """Three images with a finding, their reports and the five that the model ranks first."""
    texts = sorted({*bench.reports} - {""})
    embedded = bench.texts(texts)                                              # (m, D)
    abnormal = np.flatnonzero((bench.labels[:, :-1] == 1).any(1))
    axes = figure.subplots(3, 2, width_ratios=(1, 3))
    for row, (left, right) in zip(abnormal, axes, strict=False):
        show_image(left, bench, row)
        best = (embedded @ bench.images[row]).argsort(descending=True)[:5]
        own = bench.reports[row]
        right.set_title("0: its own report, green; 1-5: what the model ranks first", loc="left")
        for place, text in enumerate([own, *(texts[j] for j in best)]):
            color = "tab:green" if text == own else "black"
            write(right, place / 6, f"{place}. {text}", 115, 3, color)


def write(ax, place, text, width, lines, color="black"):
    """A text so far below an axes' upper edge, in at most so many lines."""
    filled = textwrap.fill(text, width, max_lines=lines, placeholder=" ...")
    ax.text(0, 1 - place, filled, color=color, va="top", size=11)
    ax.set_axis_off()


def draw_method(figure, bench, run):
    """One study through Fig. 2 and Fig. 3: r, r^r and r^n, their graphs, then the soft labels."""
    row = np.flatnonzero(bench.manifest.negatives)[0]
    study = bench.manifest[row]
    negative = study["hard_negatives"][0]
    top, bottom = figure.subfigures(2, 1)
    image, words, graph, negated = top.subplots(1, 4, width_ratios=(2, 3, 3, 3))
    show_image(image, bench, row)
    r_r = negative["omitted"]
    write(words, 0, f"r, with a [finding]: {mark(r_r, study['report'])}", 44, 9)
    write(words, 1 / 3, f"r^r, without it: {r_r}", 44, 9)
    write(words, 2 / 3, f"r^n, with its [denial]: {mark(r_r, negative['report'])}", 44, 9)
    draw_graph(graph, "graph of r (absent: red)", study.get("graph", {}))
    draw_graph(negated, "graph of r^n", negative.get("graph", {}))
    bottom.suptitle("Soft labels of the first twelve studies")
    draw_soft_labels(bottom, bench, run)


def mark(before, text):
    """A text with the sentences in [brackets] that are not in the one before."""
    sentences = []
    for sentence in split_sentences(text):
        if sentence not in before:
            sentence = f"[{sentence}]"
        sentences.append(sentence)
    return " ".join(sentences)


def draw_graph(ax, title, record):
    """A RadGraph record as nodes on a circle and edges, absent observations in red."""
    phrases, labels, edges = read_radgraph(record)
    places = np.exp(2j * np.pi * np.arange(len(phrases)) / len(phrases))       # (V,)
    ends = places[np.array(edges, int).reshape(-1, 2)].T                       # (2, E)
    ax.plot(ends.real, ends.imag, "0.7")
    ax.plot(places.real, places.imag, ".", color="0.7")
    for place, phrase, label in zip(places, phrases, labels, strict=True):
        color = "tab:red" if label == "OBS-DA" else "black"
        ax.text(1.6 * place.real, 1.2 * place.imag, phrase, ha="center", va="center", color=color)
    ax.set(title=title, xlim=(-2.2, 2.2), ylim=(-1.5, 1.5))
    ax.set_axis_off()


# ---------------------------------------------------------------- output


def provenance():
    """The commit (where git is there) and the versions that a result or a run was made with."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    git = subprocess.getoutput(f"git -C {here} describe --always --dirty 2>/dev/null")
    versions = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "transformers", "numpy", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a peer's environment
            versions[name] = importlib.metadata.version(name)
    return {"git": git or None, "versions": versions}


def print_table(task, results):
    """One task in the paper's layout, in percent: a row for each model that has it, and of chance.

    Of one model alone there are rows for its classes too, where these are at most 15. Chance is
    the first model's; that of "centred" scores depends on the model a little.
    """
    results = [result for result in results if task in result["tasks"]]
    if not results:
        return
    chances = {}  # by column
    for result in results:
        entry = result["tasks"][task]
        for column, metric in entry["cells"].items():
            chances.setdefault(column, entry["metrics"][metric]["chance"])
    meaning = TASKS[task].__doc__.split("\n\n")[0]
    print(f"{' '.join(meaning.split())}\n")
    print_row(task, chances)
    print_row("---", ["---"] * len(chances))
    for result in results:
        entry = result["tasks"][task]
        names = [entry["cells"].get(column) for column in chances]
        print_row(result["model"], [cell(entry, name) for name in names])
    print_row("chance", map(percent, chances.values()))
    classes = entry.get("classes", [])
    if len(results) == 1 and len(classes) <= 15:
        for name in classes:
            single = [f"{metric} {name}".replace("macro ", "") for metric in names]
            print_row(name, [cell(entry, metric) for metric in single])
    print(flush=True)


def print_row(title, cells):
    print(f"| {title} | {' | '.join(cells)} |")


def cell(entry, name):
    """A metric with its interval, as "85.0 [83.1, 86.9]"; "-" where there is none."""
    metric = entry["metrics"].get(name)
    if metric is None or metric["value"] is None:
        return "-"
    low, high = map(percent, metric["interval"])
    return f"{percent(metric['value'])} [{low}, {high}]"


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def read_result(path):
    """A result file; UserError if it is none."""
    result = read_json(path)
    expect(isinstance(result, dict) and "tasks" in result, path, "a result file of evaluate.py")
    return result


# ---------------------------------------------------------------- the command line


def load_any(path):
    """A model from what load_model takes, or from a Python file that defines load().

    load() returns an object with encode_image(pixels (B, ...)) and encode_text(list of str), both
    -> (B, D), and transform(grey PIL image) -> tensor. Raises UserError for what is no model; a
    mistake inside the Python file keeps its traceback.
    """
    if not path.endswith(".py"):
        from model import ModelError, load_model  # a peer's environment may lack what it imports
        try:
            return load_model(path, "cuda" if torch.cuda.is_available() else "cpu")
        except ModelError as error:
            raise UserError(str(error)) from None
    expect(Path(path).is_file(), path, "a Python file that defines load()")
    sys.path.insert(0, str(Path(path).resolve().parent))  # what lies beside it is importable
    names = runpy.run_path(path)
    expect("load" in names, path, "a function load()")
    return names["load"]()


def parse_args(argv=None):
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
    add("--prompts", metavar="FILE.json", help="class -> [positive texts, negative "
        "texts]; classes that are not in it, No Finding too, keep ours")
    add("--compare", nargs="+", help="print the tables of these result files")
    add("--out",
        help="result file; None: results-TASK-MANIFEST-SPLIT(-PROMPTS).json in a run folder RUN")
    add("--figures", metavar="DIR",
        help="draw images, ROC, a run's curves and soft labels there; needs matplotlib")
    add("--show-reports", action="store_true",
        help="with --figures: retrieval and method too, which show reports")
    add("--batch-size", type=minimum(1), default=64,
        help="items at once; lower it if memory runs out")
    add("--workers", type=minimum(0), default=2,
        help="threads that read images; free cores at most")
    add("--seed", type=minimum(0), default=0, help="of resamples, pools, pairs and fractions")
    add("--resamples", type=minimum(1, below=100_001), default=1000,
        help="bootstrap resamples for the intervals")
    return parser.parse_args(argv)


def run_tasks(bench, task, model):
    """Results by task, printed as soon as measured, and why others of "all" were skipped."""
    results = {}
    skipped = {}  # reason: tasks
    for name, function in TASKS.items():
        if task not in (name, "all"):
            continue
        try:
            entry = function(bench)
        except UserError as error:  # also an image of fine-tune's rows: other tasks' numbers stand
            skipped.setdefault(str(error), []).append(name)
            continue
        entry = json.loads(json.dumps(entry), parse_constant=lambda _: None)  # JSON has no NaN
        results[name] = entry
        print_table(name, [{"model": model, "tasks": results}])
    notes = [f"skipped {', '.join(names)}: {reason}" for reason, names in skipped.items()]
    if not results:
        raise Unmeasurable("; ".join(notes))
    return results, notes


def main(argv=None):
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun rank 0 evaluates alone
        return
    args = parse_args(argv)
    if args.compare:
        results = [read_result(path) for path in args.compare]
        for task in TASKS:
            print_table(task, results)
        return
    expect(args.run and args.data, "command line", "RUN and --data X.jsonl, or --compare JSON ...")
    run = Path(args.run).resolve()
    if run.suffix == ".pt":
        run = run.parent
    prompts = {}
    suffix = ""
    if args.prompts:
        prompts = read_prompts(args.prompts)
        suffix = f"-{Path(args.prompts).stem}"
    out = args.out
    if not out and any(Path(args.run).glob("*.pt")):  # a run folder of ours
        out = f"{args.run}/results-{args.task}-{Path(args.data).stem}-{args.split}{suffix}.json"
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)  # before any work
    if args.figures:
        Path(args.figures).mkdir(parents=True, exist_ok=True)
        expect(importlib.util.find_spec("matplotlib"), "--figures", "matplotlib to be installed")
    bench = Bench(
        load_any(args.run),
        Manifest(args.data, args.split, args.image_root),
        batch_size=args.batch_size,
        workers=args.workers,
        resamples=args.resamples,
        seed=args.seed,
        prompts=prompts,
        pool=args.pool)
    model = f"{run.name}{suffix}"
    tasks, notes = run_tasks(bench, args.task, model)
    for note in notes:
        print(note)
    result = vars(args) | provenance() | {
        "model": model,
        "command": shlex.join(["python", "evaluate.py", *(argv or sys.argv[1:])]),
        "set": bench.set,
        "prompts": bench.asked,
        "tasks": tasks,
        "notes": notes}
    if out:
        with open_atomic(out) as file:
            json.dump(result, file, indent=1)
        print(f"wrote {out}")
    else:
        print("not saved; give --out")
    if args.figures:
        draw_figures(bench, tasks, run, args)


if __name__ == "__main__":
    run_main(main)
