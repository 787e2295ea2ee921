"""Does it hold? The paper's claims, tested again with small networks on data that anyone can run.

    python tests/study.py train --openi FOLDER     all runs of PLAN: hours, resumable
    python tests/study.py evaluate --split val     their last weights, on the rows to choose by
    python tests/study.py evaluate --split test    when all is chosen, on the rows to report
    python tests/study.py evaluate --split test --plain-prompts    once more, with fewer prompts
    python tests/study.py cost                     time and memory of a step of every system
    python tests/study.py labels                   the rules' labels against OpenI's human ones
    python tests/study.py report                   tests/study.json, and STUDY.md from it alone

Everything is done by the command lines of the scripts. A run has its folder in runs/study/, what is
known of it lies in runs/study/results/, and what is there is not done again: to start anew, delete
it. To add seeds to those of tests/study.json on another machine, use --missing. All systems take
the same steps and are judged by their last weights, so that none is stopped at a luckier one. In
this order: claims, what counts as a difference, the page, its record, runs, data; last the paper's
numbers and the page's prose.

SPDX-License-Identifier: MIT
"""

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import (  # noqa: E402
    CONDITIONS,
    DUPLICATE,
    UserError,
    make_phantom,
    mesh_targets,
    minimum,
    open_atomic,
    read_json,
    read_jsonl,
    run_main,
    text_hash,
)
from evaluate import NORMAL, prompts, provenance  # noqa: E402
from negations import annotate  # noqa: E402

STUDY = Path("runs/study")
RECORD = ROOT / "tests/study.json"
PAGE = ROOT / "tests/STUDY.md"
FIGURE = ROOT / ".images/thresholds.png"
TRAIN_STUDIES, TEST_STUDIES = 2000, 5000  # of a phantom, before it is split

# ---------------------------------------------------------------- the paper's claims

NAMES = {
    "clip": "CLIP", "softclip": "SoftCLIP", "clip-dt": "CLIP-D_t", "clip-dtc": "CLIP-D_t+c",
    "clip-n": "CLIP^N", "clip-n-dtc": "CLIP^N-D_t+c", "clip-g": "CLIP^G",
    "clip-g-dtcg": "CLIP^G-D_t+c+g", "clip-ng-dtcg": "CLIP^N,G-D_t+c+g"}
ADDED = {"": "", "normals": " with normals", "sigmoid": ", sigmoid"}  # rows: clip, clip+normals
FULL = "clip-ng-dtcg"
METRICS = {  # our column: evaluate.py's task and metric
    "ZS AUC": ("zero-shot", "macro AUROC"),
    "FT10": ("fine-tune", "FT10 macro AUROC"), "FT100": ("fine-tune", "FT100 macro AUROC"),
    "NCD": ("normal-case", "accuracy"),
    "ADV": ("adversarial", "both"), "ADV centred": ("adversarial", "centred"),
    "@5": ("retrieval", "@5"), "F1": ("retrieval", "micro F1"),
    "A": ("cxr-align", "A"), "swapped A": ("cxr-align", "swapped A"), "B": ("cxr-align", "B")}
PROMPTED = ("ZS AUC", "ADV", "ADV centred")  # the others ask no prompt
PLAIN = "test-plain"  # the result on test rows with plain prompts

# claim: differences (what, metric, sign, weights of the rows). Sign 1: it should be above zero,
# -1: below zero, 0: not above zero.
CLAIMS = {
    "C1 soft labels raise zero-shot AUC": (
        ("D_t", "ZS AUC", 1, {"clip-dt": 1, "clip": -1}),
        ("D_t+c", "ZS AUC", 1, {"clip-dtc": 1, "clip": -1})),
    "C2 negatives alone do not": (
        ("N", "ZS AUC", 0, {"clip-n": 1, "clip": -1}),),
    "C3 negatives with soft labels beat either": (
        ("over N", "ZS AUC", 1, {"clip-n-dtc": 1, "clip-n": -1}),
        ("over D_t+c", "ZS AUC", 1, {"clip-n-dtc": 1, "clip-dtc": -1})),
    "C4 negatives lift CXR-Align A": (
        ("N", "A", 1, {"clip-n": 1, "clip": -1}),),
    "C5 negatives alone lower CXR-Align B, the full method raises it": (
        ("N", "B", -1, {"clip-n": 1, "clip": -1}),
        ("full", "B", 1, {FULL: 1, "clip": -1})),
    "C6 the graph stream with soft labels helps fine-tuning": (
        ("FT10, without N", "FT10", 1, {"clip-g-dtcg": 1, "clip-dtc": -1}),
        ("FT10, with N", "FT10", 1, {FULL: 1, "clip-n-dtc": -1}),
        ("FT100, with N", "FT100", 1, {FULL: 1, "clip-n-dtc": -1})),
    "C7 the full method raises retrieval F1": (
        ("full", "F1", 1, {FULL: 1, "clip": -1}),),
    "C8 the full method raises adversarial accuracy": (
        ("full", "ADV", 1, {FULL: 1, "clip": -1}),
        ("full, centred", "ADV centred", 1, {FULL: 1, "clip": -1})),
    "C9 added normal reports hurt CLIP more than D_t+c, and lift normal case detection": (
        ("ZS AUC, D_t+c's change less CLIP's", "ZS AUC", 1,
         {"clip-dtc+normals": 1, "clip-dtc": -1, "clip+normals": -1, "clip": 1}),
        ("NCD, CLIP", "NCD", 1, {"clip+normals": 1, "clip": -1}),
        ("NCD, D_t+c", "NCD", 1, {"clip-dtc+normals": 1, "clip-dtc": -1})),
    "C10 SoftCLIP falls below CLIP": (
        ("SoftCLIP", "ZS AUC", -1, {"softclip": 1, "clip": -1}),),
    "C11 under the sigmoid loss soft labels and negatives help there as they do under softmax": (
        ("ZS AUC, D_t+c", "ZS AUC", 1, {"clip-dtc+sigmoid": 1, "clip+sigmoid": -1}),
        ("ZS AUC, N over D_t+c", "ZS AUC", 1, {"clip-n-dtc+sigmoid": 1, "clip-dtc+sigmoid": -1}),
        ("A, N over D_t+c", "A", 1, {"clip-n-dtc+sigmoid": 1, "clip-dtc+sigmoid": -1})),
}
SETS = {"phantom": "phantom", "openi": "OpenI"}

# set, what is added to the systems, systems, seeds, flags of train.py
SIGMOID = ("clip", "clip-dtc", "clip-n-dtc", FULL)
PLAN = (
    ("phantom", "", tuple(NAMES), 6, ()),
    ("phantom", "normals", ("clip", "clip-dt", "clip-dtc"), 6, ("--epochs", "7")),
    ("phantom", "sigmoid", SIGMOID, 3, ("--framework", "sigmoid")),
    ("openi", "", ("clip", "clip-dtc", "clip-n", "clip-n-dtc", FULL, "softclip"), 5,
     ("--batch-size", "64", "--epochs", "10")),
    ("openi", "normals", ("clip", "clip-dtc"), 5, ("--batch-size", "64", "--epochs", "6")),
    ("openi", "sigmoid", SIGMOID, 3,
     ("--batch-size", "64", "--epochs", "10", "--framework", "sigmoid")),
)
# Each value on its own, the other flags as in `base`; validation rows, one seed.
SWEEPS = {
    "phantom-sweep": {
        "flags": (),
        "base": {"tau-text": 0.98, "tau-clinical": 0.5, "tau-graph": 0.98,
                 "w-text": 1.0, "w-clinical": 1.0, "w-graph": 1.0},
        "values": {"tau-text": (0.5, 0.8, 0.9, 0.95, 0.98), "tau-clinical": (0.3, 0.5, 0.7, 0.9),
                   "tau-graph": (0.5, 0.9, 0.98), "w-text": (0.5, 1.0, 2.0),
                   "w-clinical": (0.5, 1.0, 2.0), "w-graph": (0.5, 1.0, 2.0)}},
    "openi-sweep": {
        "flags": ("--system", "clip-n-dtc", "--epochs", "10"),
        "base": {"tau-text": 0.98, "tau-clinical": 0.5},
        "values": {"tau-text": (0.9, 0.95, 0.98), "tau-clinical": (0.3, 0.5, 0.7, 0.9)}},
}
SWEPT_TEXTS = 256  # of a batch of the sweeps: 128 reports and their hard negatives

# ---------------------------------------------------------------- what counts as a difference


def residuals(rows):
    """What remains of rows of numbers when each row's and each column's mean is taken out."""
    columns = [statistics.mean(column) for column in zip(*rows, strict=True)]
    whole = statistics.mean(columns)
    remainders = []
    for row in rows:
        level = statistics.mean(row) - whole
        remainders += [x - level - column for x, column in zip(row, columns, strict=True)]
    return remainders


def chance_beyond(ratio, freedom):
    """How often chance alone goes beyond so many standard errors: two tails of Student's t."""
    x = np.linspace(0, ratio, 10_001)
    log_ratio = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    peak = math.exp(log_ratio) / math.sqrt(freedom * math.pi)
    density = peak * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    return 1 - 2 * float(np.trapezoid(density, x))


class Difference(NamedTuple):
    """A weighted sum of rows' means over seeds, in points."""

    value: float
    error: float  # its standard error
    seeds: int
    freedom: int  # degrees of freedom that the error is from

    def seeds_to_decide(self):
        """Seeds at which it would exceed two standard errors, if it stays what it is."""
        if self.value == 0:
            return math.inf
        return math.ceil(self.seeds * (2 * self.error / self.value) ** 2)


class Scores:
    """Scores of a set: rows[row][seed][metric] is {"value", "interval", "n", "chance"}, in percent.

    A score is taken as row + seed + noise: each seed has test patients of its own, whose level all
    rows share. The noise's standard deviation is pooled over rows, since a few seeds of one system
    tell little. Softmax and sigmoid rows differ in seeds and in noise, so they are two groups, and
    SoftCLIP, whose noise is many times the others', is compared by its own differences alone.
    """

    def __init__(self, study, data, result="test", beside="test"):
        """Of the runs of which both results are known."""
        self.rows = {}
        for run in study["runs"].values():
            if run["set"] == data and {result, beside} <= run["results"].keys():
                seeds = self.rows.setdefault(run["row"], {})
                seeds[run["seed"]] = run["results"][result]["metrics"]

    def table(self, metric, sigmoid):
        """row -> values, one a seed that all rows of the framework with two or more seeds have."""
        rows = {row: seeds for row, seeds in self.rows.items()
                if row.endswith("+sigmoid") == sigmoid and len(seeds) > 1}
        if not rows:
            return {}
        shared = sorted(set.intersection(*map(set, rows.values())))
        table = {}
        for row, seeds in rows.items():
            values = [seeds[seed][metric]["value"] for seed in shared if metric in seeds[seed]]
            if len(values) == len(shared) > 1:
                table[row] = values
        return table

    def difference(self, metric, weights):
        """sum of weight x row's mean as a Difference; None if a row has not been run."""
        table = self.table(metric, all(row.endswith("+sigmoid") for row in weights))
        if not set(weights) <= set(table):
            return None
        if "softclip" in weights:
            table = {row: table[row] for row in weights}
        else:
            table.pop("softclip", None)
        rows = list(table.values())
        seeds = len(rows[0])
        freedom = (len(rows) - 1) * (seeds - 1)
        value = sum(w * statistics.mean(table[row]) for row, w in weights.items())
        squares = sum(x * x for x in residuals(rows))
        noise = math.sqrt(squares / freedom)
        error = noise * math.sqrt(sum(w * w for w in weights.values()) / seeds)
        return Difference(value, error, seeds, freedom)


def verdict(value, error, sign):
    """A difference of two standard errors counts; "not above" (sign 0) holds from zero down."""
    if sign == 0:
        if value <= 0:
            return "holds"
        return "does not" if value > 2 * error else "undecided"
    if abs(value) <= 2 * error:
        return "undecided"
    return "holds" if value * sign > 0 else "does not"


def claim_verdict(verdicts):
    """What becomes of a claim of several differences."""
    if "holds" in verdicts and "does not" in verdicts:
        return "in part"
    for outcome in ("does not", "undecided", "holds"):
        if outcome in verdicts:
            return outcome
    return "not run"


def judge(scores, claim):
    """A claim's differences as text, what becomes of it, and the list of its Differences."""
    texts, verdicts, differences = [], [], []
    for what, metric, sign, weights in claim:
        difference = scores.difference(metric, weights)
        if difference is None:
            continue
        outcome = verdict(difference.value, difference.error, sign)
        text = f"{what} {difference.value:+.1f} ± {difference.error:.1f}"
        if outcome == "undecided":
            seeds = difference.seeds_to_decide()
            text += f" (decided by {seeds} seeds)" if seeds <= 100 else " (by over 100 seeds)"
        texts.append(text)
        verdicts.append(outcome)
        differences.append(difference)
    return "; ".join(texts) or "-", claim_verdict(verdicts), differences


def pooled(entries):
    """Seeds' values of a metric -> their mean, its interval, the sum of n.

    A seed's interval comes from resampling its patients; seeds have different ones, so the
    half-widths of the mean add as squares.
    """
    value = statistics.mean(entry["value"] for entry in entries)
    low, high = (math.sqrt(sum((entry["interval"][side] - entry["value"]) ** 2
                               for entry in entries)) / len(entries) for side in (0, 1))
    return value, value - low, value + high, sum(entry["n"] for entry in entries)


# ---------------------------------------------------------------- the page


def markdown(head, rows):
    """A Markdown table of cells, joined by lines."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def row_name(row):
    system, _, added = row.partition("+")
    return NAMES[system] + ADDED[added]


def has_verdicts(study):
    """Whether both sets have been run with enough seeds to say something."""
    return all(Scores(study, data).table("ZS AUC", sigmoid=False) for data in SETS)


def runs_section(study):
    """Which runs the numbers are from."""
    rows = []
    for data, added, systems, planned, _ in PLAN:
        scores = Scores(study, data)
        names = [f"{system}+{added}" if added else system for system in systems]
        done = sorted({len(scores.rows.get(name, ())) for name in names})
        commits = {run["commit"] for run in study["runs"].values()
                   if run["set"] == data and run["row"] in names and "test" in run["results"]}
        rows.append([SETS[data] + ADDED[added], ", ".join(NAMES[s] for s in systems), planned,
                     " to ".join(map(str, sorted({done[0], done[-1]}))),
                     ", ".join(sorted(commits)) or "-"])
    head = ["set", "systems", "seeds planned", "seeds run", "commit"]
    return f"## How it was run\n\n{SETUP}\n\n{markdown(head, rows)}"


def claims_table(study):
    """The table of verdicts, and every difference behind it as (claim, set, Difference)."""
    rows, differences = [], []
    for title, claim in CLAIMS.items():
        cells = [title]
        for data, name in SETS.items():
            text, outcome, behind = judge(Scores(study, data), claim)
            cells += [text, f"**{outcome}**"]
            differences += [(title.split()[0], name, difference) for difference in behind]
        rows.append(cells)
    head = ["claim; points ± standard error", "phantom", "", "OpenI", ""]
    return markdown(head, rows), differences


def summary(study):
    """The README's table: each claim's verdicts, and the differences behind them."""
    rows = []
    for title, claim in CLAIMS.items():
        cells = [title]
        for data in SETS:
            cells.append(verdict_cell(Scores(study, data), claim))
        rows.append(cells)
    return markdown(["claim; points ± standard error", *SETS.values()], rows)


def verdict_cell(scores, claim):
    """What becomes of a claim and the differences behind it, without the seeds that decide."""
    text, outcome, _ = judge(scores, claim)
    text = re.sub(r" \([^)]*seeds\)", "", text)
    return f"**{outcome}**: {text}"


def plain_table(study):
    """Claims of metrics that depend on prompts: ours beside plain ones, on the same weights."""
    columns = {}
    for data, name in SETS.items():
        for result, other in (("test", PLAIN), (PLAIN, "test")):
            scores = Scores(study, data, result, other)
            seeds = max(map(len, scores.rows.values()), default=0)
            scheme = "plain" if result == PLAIN else "default"
            columns[f"{name}, {scheme} ({seeds} seeds)"] = scores
    rows = []
    for title, claim in CLAIMS.items():
        prompted = [part for part in claim if part[1] in PROMPTED]
        cells = [verdict_cell(scores, prompted) for scores in columns.values()]
        if set(cells) != {"**not run**: -"}:
            rows.append([title, *cells])
    return markdown(["claim, by what depends on prompts", *columns], rows)


def comparisons(differences):
    """How far chance alone goes among so many differences, in words."""
    count = len(differences)
    expected = 0
    sure = {}
    for claim, data, difference in differences:
        expected += chance_beyond(2, difference.freedom)
        ratio = abs(difference.value) / max(difference.error, 1e-9)
        if count * chance_beyond(ratio, difference.freedom) < 0.05:
            sure[f"{claim} on {data}"] = None
    return (f"{count} differences are compared. If there were none at all, {expected:.1f} of them "
            "would still exceed two standard errors, by Student's t. Sure for all of them together "
            "(Bonferroni, 5 %) are differences "
            f"of {', '.join(sure) or 'no claim'}.")


def verdicts_section(study):
    text, differences = claims_table(study)
    parts = ["## Verdicts", VERDICTS, text, comparisons(differences)]
    if any(PLAIN in run["results"] for run in study["runs"].values()):
        parts += [PLAIN_PROMPTS, plain_table(study)]
    return "\n\n".join(parts)


def score_cells(scores, row, metrics):
    """A row's cells, one a metric, and its n."""
    cells, counts = [], {}
    for metric in metrics:
        seeds = scores.rows.get(row, {}).values()
        entries = [seed[metric] for seed in seeds if metric in seed]
        if not entries:
            cells.append("-")
            continue
        value, low, high, n = pooled(entries)
        cells.append(f"{value:.1f} [{low:.1f}, {high:.1f}]")
        counts[n] = None
    return [*cells, "; ".join(f"{n:,}" for n in counts) or "-"]


def chance_cells(scores, metrics):
    """The mean chance of each metric over all runs, where it is known."""
    cells = []
    for metric in metrics:
        known = [seed[metric]["chance"] for seeds in scores.rows.values()
                 for seed in seeds.values() if metric in seed]
        known = [chance for chance in known if chance is not None]
        cells.append(f"{statistics.mean(known):.1f}" if known else "-")
    return [*cells, "-"]


def tables_section(study):
    """Tab. 2 to 6: each row the mean of its seeds with interval, beside the paper's number."""
    both = [Scores(study, data) for data in SETS]
    parts = ["## Tables", TABLES_NOTE]
    for title, metrics, reported, paper in TABLES:
        head = [title]
        for name in SETS.values():
            head += [*(f"{name} {metric}" for metric in metrics), "n"]
        rows = []
        for row, number in paper.items():
            cells = [row_name(row)]
            for scores in both:
                cells += score_cells(scores, row, metrics)
            rows.append([*cells, number])
        chance = ["chance"]
        for scores in both:
            chance += chance_cells(scores, metrics)
        parts.append(markdown([*head, f"the paper: {reported}"], [*rows, [*chance, "-"]]))
    return "\n\n".join(parts)


def sweep_points(study):
    """(set, flag) -> [(value, its run)] of every sweep that has been run."""
    points = {}
    for data, sweep in SWEEPS.items():
        for flag, values in sweep["values"].items():
            for value in values:
                run = study["runs"].get(sweep_name(data, flag, value))
                if run and "val" in run["results"]:
                    points.setdefault((data, flag), []).append((value, run))
    return points


def positives_percent(flag, run):
    """Effective positives of the flag's stream in percent of the batch's texts."""
    return 100 * run["positives"][flag.split("-")[1]] / SWEPT_TEXTS


def thresholds_section(study):
    metrics = ("ZS AUC", "FT10", "@5", "F1", "A", "B", "ADV", "ADV centred")
    rows = []
    for (data, flag), points in sweep_points(study).items():
        for value, run in points:
            scores = run["results"]["val"]["metrics"]
            cells = [f"{scores[m]['value']:.1f}" if m in scores else "-" for m in metrics]
            rows.append([SETS[data.removesuffix("-sweep")], f"--{flag}", value, *cells,
                         f"{positives_percent(flag, run):.1f}"])
    head = ["validation rows", "flag", "", *metrics, "effective positives, % of texts"]
    swept = [run for points in sweep_points(study).values() for _, run in points]
    commits = ", ".join(sorted({run["commit"] for run in swept}))
    text = f"{THRESHOLDS} These runs are of commit {commits}, its rules and its phantom."
    return f"## Thresholds and weights\n\n{text}\n\n{markdown(head, rows)}\n\n{PICTURE}"


def cost_section(study):
    cost = study["cost"]
    seconds, memory = cost["rows"]["clip"]
    rows = [[NAMES[system], f"{row[0] / seconds:.2f}", f"{row[1] / memory:.2f}"]
            for system, row in cost["rows"].items()]
    return (f"## Cost\n\n`{cost['command']}` at commit {cost['commit']}; relative to CLIP, noise "
            f"some 10 %.\n\n{markdown(['', 'time of a step', 'peak memory'], rows)}")


def labels_section(study):
    """What tests/test_negations.py printed: a table, then lines of text."""
    labels = study["labels"]
    table = [line for line in labels["lines"] if line.startswith("|")]
    rest = [f"    {line}" for line in labels["lines"] if line and not line.startswith("|")]
    return "\n\n".join(["## The rules' labels", f"`{labels['command']}` at commit "
                        f"{labels['commit']}; {LABELS}", "\n".join(table), "\n".join(rest)])


def page(study):
    """tests/STUDY.md, a function of tests/study.json and of the prose below."""
    parts = ["# Does it hold?"]
    if has_verdicts(study):
        parts += [ANSWER, GLOSSARY, READING, verdicts_section(study), tables_section(study)]
    if sweep_points(study):
        parts.append(thresholds_section(study))
    if "cost" in study:
        parts.append(cost_section(study))
    if "labels" in study:
        parts.append(labels_section(study))
    return "\n\n".join([*parts, ASIDE, MIMIC, runs_section(study)]) + "\n"


def draw_thresholds(study, path):
    """Zero-shot AUROC, retrieval @5, A and effective positives against each threshold."""
    try:
        import matplotlib
    except ImportError:
        print(f"note: {path} was not drawn: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot
    shown = {"ZS AUC": ("zero-shot AUROC", "#3b6fb6"), "@5": ("retrieval @5", "#e08a2e"),
             "A": ("CXR-Align A", "#4c9a5b")}
    panels = {title: points for title, points in sweep_points(study).items() if "tau" in title[1]}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2.7 * len(panels), 3.6), sharey=True,
                                   squeeze=False, layout="constrained")
    for axis, ((data, flag), points) in zip(axes[0], panels.items(), strict=True):
        places = range(len(points))
        for metric, (name, color) in shown.items():
            values = [run["results"]["val"]["metrics"][metric]["value"] for _, run in points]
            axis.plot(places, values, "o-", color=color, label=name)
        axis.plot(places, [positives_percent(flag, run) for _, run in points], "o-",
                  color="#777777", label=f"effective positives, % of {SWEPT_TEXTS} texts")
        axis.set_xticks(places, [str(value) for value, _ in points])
        axis.set_xlabel(f"{SETS[data.removesuffix('-sweep')]} --{flag}")
        axis.set_ylim(0, 100)
        axis.grid(axis="y", color="#dddddd")
    axes[0, 0].set_ylabel("percent, validation rows")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# ---------------------------------------------------------------- the record, study.json


def read_scores(result):
    """A result file of evaluate.py -> its commit, command and METRICS in percent."""
    metrics = {}
    for name, (task, metric) in METRICS.items():
        entry = result["tasks"].get(task, {})
        score = entry.get("metrics", {}).get(metric)
        if score is None or score["value"] is None:  # not measured, or it cannot be told
            continue
        n = entry.get("n_B", entry["n"]) if name == "B" else entry["n"]
        chance = score.get("chance")
        metrics[name] = {
            "value": round(100 * score["value"], 3),
            "interval": [round(100 * bound, 3) for bound in score["interval"]],
            "n": n, "chance": None if chance is None else round(100 * chance, 3)}
    return {"commit": result["git"] or "unknown", "command": result["command"], "metrics": metrics}


def collect(study):
    """Take what lies in runs/study into the record."""
    for trained in sorted(STUDY.glob("results/*/trained.json")):
        results = {path.stem: read_scores(read_json(path))
                   for path in sorted(trained.parent.glob("*.json")) if path != trained}
        study["runs"][trained.parent.name] = read_json(trained) | {"results": results}
    for name in ("cost", "labels"):
        path = STUDY / f"{name}.json"
        if path.exists():
            study[name] = read_json(path)


def record_text(study):
    """study.json with one run a line, so that a diff shows which runs changed."""
    runs = [f"{json.dumps(name)}: {json.dumps(run, ensure_ascii=False)}"
            for name, run in sorted(study["runs"].items())]
    parts = ['"runs": {\n' + ",\n".join(runs) + "\n}"]
    for name, content in study.items():
        if name != "runs":
            parts.append(f'"{name}": {json.dumps(content, ensure_ascii=False, indent=1)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def report():
    study = read_json(RECORD)
    collect(study)
    with open_atomic(RECORD) as file:
        file.write(record_text(study))
    with open_atomic(PAGE) as file:
        file.write(page(study))
    if sweep_points(study):
        draw_thresholds(study, FIGURE)
    print(f"wrote {RECORD} and {PAGE}: {len(study['runs'])} runs; the README's table:")
    print(summary(study))


# ---------------------------------------------------------------- runs


class Run(NamedTuple):
    """One training; `name` is its folder."""

    name: str
    set: str
    row: str
    seed: int
    flags: tuple


def sweep_name(data, flag, value):
    if SWEEPS[data]["base"][flag] == value:
        return f"{data}-base"
    return f"{data}-{flag}-{value}"


def planned_runs(sets, seeds=None):
    """The runs of PLAN and SWEEPS on these sets, seed 0 of everything first."""
    runs = []
    for data, added, systems, count, flags in PLAN:
        for seed in range(seeds or count):
            for system in systems:
                row = f"{system}+{added}" if added else system
                runs.append(Run(f"{data}-{row}-{seed}", data, row, seed,
                                ("--system", system, "--seed", str(seed), *flags)))
    for data, sweep in SWEEPS.items():
        swept = {}
        for flag, values in sweep["values"].items():
            for value in values:
                words = list(sweep["flags"])
                for name, setting in (sweep["base"] | {flag: value}).items():
                    words += [f"--{name}", str(setting)]
                name = sweep_name(data, flag, value)
                swept[name] = Run(name, data, name.removeprefix(f"{data}-"), 0, tuple(words))
        runs += swept.values()
    return sorted((run for run in runs if run.set in sets), key=lambda run: run.seed)


def result_file(run, name):
    return STUDY / "results" / run.name / f"{name}.json"


def call(words, output):
    """Run a script of ours with one thread; its error output is added to a file.

    words: the script and its arguments. Returns its exit status and what it printed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], stderr=file,
                              stdout=subprocess.PIPE, encoding="utf-8",
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout


def command_line(words):
    return shlex.join(["python", *map(str, words)])


def write_json(path, content):
    with open_atomic(path) as file:
        json.dump(content, file, indent=1)


def train(run):
    """Train a run unless that is done. Returns what went wrong, if anything."""
    done, folder = result_file(run, "trained"), STUDY / run.name
    if done.exists():
        return None
    words = ["train.py", "--train", data_files(run)[0], "--out", folder, "--resume", "latest",
             "--workers", "0", *run.flags]
    output = done.with_name("output.txt")
    status, printed = call(words, output)
    if status != 0:
        return f"{run.name}: training failed, see {output}"
    if not json.loads(printed.splitlines()[-1])["finished"]:
        return f"{run.name}: training was stopped; the same command goes on with it"
    write_json(done, {"set": run.set, "row": run.row, "seed": run.seed,
                      "commit": read_json(folder / "config.json")["git"] or "unknown",
                      "command": command_line(words), "positives": positives(folder)})
    return None


def log_steps(folder):
    """The records of a run's log that are of a step."""
    return [record for _, record in read_jsonl(folder / "log.jsonl") if "loss" in record]


def positives(folder):
    """Effective positives of a row of soft labels, by stream, over the last 24 steps of a run."""
    steps = log_steps(folder)[-24:]
    names = [name for name in steps[-1] if name.startswith("positives_")]
    return {name.removeprefix("positives_"): round(statistics.mean(s[name] for s in steps), 3)
            for name in names}


def evaluate(run, split, plain):
    """Evaluate a run's last weights unless that is done. Returns what went wrong, if anything."""
    trained = result_file(run, "trained")
    result = result_file(run, f"{split}-plain" if plain else split)
    if not trained.exists():
        return f"{run.name}: not trained yet"
    if result.exists():
        return None
    words = ["evaluate.py", STUDY / run.name / "last.pt", "--data", data_files(run)[1], "--split",
             split, "--workers", "0", "--out", result]
    if plain:
        words += ["--prompts", plain_prompts(run)]
    output = result.with_name("output.txt")
    status, _ = call(words, output)
    return f"{run.name}: evaluation failed, see {output}" if status else None


def do_all(function, runs, at_once, title):
    """function(run) of all runs, so many at once; what failed is a UserError at the end."""
    pool, errors = ThreadPoolExecutor(at_once), []
    try:
        for error in tqdm(pool.map(function, runs), title, total=len(runs), unit=" runs"):
            if error:
                errors.append(error)
    finally:  # Ctrl-C reaches the scripts too; what has not begun does not begin
        pool.shutdown(cancel_futures=True)
    if errors:
        raise UserError(f"{len(errors)} of {len(runs)} runs are not done: {'; '.join(errors[:5])}")


def cost():
    """Median seconds of a step and peak memory of every system, one after the other."""
    run = Run("cost", "phantom", "clip", 0, ())
    make_data(run, None)
    rows = {}
    for system in NAMES:
        folder = STUDY / f"cost-{system}"
        words = ["train.py", "--train", data_files(run)[0], "--system", system, "--max-steps", "36",
                 "--workers", "0", "--out", folder, "--resume", "latest"]
        status, _ = call(words, STUDY / "cost.txt")
        if status != 0:
            raise UserError(f"{folder}: training failed, see {STUDY / 'cost.txt'}")
        steps = log_steps(folder)[12:]
        rows[system] = [statistics.median(1 / step["images_per_s"] for step in steps),
                        steps[-1]["memory_mb"]]
    commit = read_json(folder / "config.json")["git"] or "unknown"
    write_json(STUDY / "cost.json", {"command": "python tests/study.py cost", "rows": rows,
                                     "commit": commit})


def labels():
    """What tests/test_negations.py prints of the rules' labels on OpenI."""
    words = ["tests/test_negations.py"]
    status, printed = call(words, STUDY / "labels.txt")
    if status != 0:
        raise UserError(f"{words[0]} failed, see {STUDY / 'labels.txt'}")
    write_json(STUDY / "labels.json", {"command": command_line(words),
                                       "commit": provenance()["git"] or "unknown",
                                       "lines": printed.splitlines()})


# ---------------------------------------------------------------- data

TENTHS = (9, 0, 1, 2, 3, 4, 5, 6, 7)  # of OpenI's patients, the test rows of seed 0, 1, ...
VAL_TENTH = 8


def data_files(run):
    """The manifests that a run trains on and is evaluated on."""
    added = "+normals" if run.row.endswith("+normals") else ""
    if run.set.startswith("phantom"):
        return STUDY / f"phantom{added}.jsonl", STUDY / f"phantom-test-{run.seed}.jsonl"
    return STUDY / f"openi{added}-{run.seed}.jsonl", STUDY / f"openi-{run.seed}.jsonl"


def plain_prompts(run):
    """A file of our prompts without Tab. 1's normal sentences, for the classes of the run's set."""
    classes = set(CONDITIONS)
    if run.set.startswith("openi"):
        classes |= mesh_targets([]).keys()
    sides = {}
    for name in sorted(classes):
        sides[name] = [[text for text in side if text not in NORMAL] for side in prompts(name)]
    path = STUDY / run.name / "plain-prompts.json"  # of its own, since runs go side by side
    write_json(path, sides)
    return path


def make_data(run, folder):
    """Make the manifests of a run that are not there; folder: OpenI's download."""
    training, testing = data_files(run)
    if run.set.startswith("phantom"):
        # Tab. 3's set adds as many normal studies as there are studies, with one sentence.
        duplicates = TRAIN_STUDIES if run.row.endswith("+normals") else 0
        draw_phantom(training, studies=TRAIN_STUDIES, duplicates=duplicates)
        draw_phantom(testing, studies=TEST_STUDIES, seed=run.seed + 1)
    elif not training.exists():
        split_openi(read_openi(folder), run.seed)


def draw_phantom(path, **options):
    """A phantom, its reports annotated."""
    if path.exists():
        return
    raw = make_phantom(path.with_suffix(""), **options)
    with open_atomic(path) as file:
        for _, record in tqdm(read_jsonl(raw), path.name, total=options["studies"]):
            file.write(json.dumps(annotate(record), ensure_ascii=False) + "\n")


def read_openi(folder):
    """OpenI's manifest, annotated."""
    raw, path = STUDY / "openi.jsonl", STUDY / "openi_neg.jsonl"
    steps = {raw: ["data.py", "openi", folder, "--out", raw],
             path: ["negations.py", raw, "--out", path]}
    for file, words in steps.items():
        if path.exists() or file.exists():
            continue
        status, _ = call(words, STUDY / "openi.txt")
        if status != 0:
            raise UserError(f"{command_line(words)}: failed, see {STUDY / 'openi.txt'}")
    return path


def split_openi(whole, seed):
    """OpenI with a tenth of the patients for test, another for each seed, and one for validation.

    Writes openi-SEED.jsonl and, as Tab. 3's set, openi+normals-SEED.jsonl, in which each normal
    training study is there twice more, with one sentence for a report.
    """
    plain, more = STUDY / f"openi-{seed}.jsonl", STUDY / f"openi+normals-{seed}.jsonl"
    with open_atomic(plain) as plain_file, open_atomic(more) as more_file:
        for _, record in read_jsonl(whole):
            tenth = text_hash(record["patient"]) % 1000 // 100
            splits = {VAL_TENTH: "val", TENTHS[seed]: "test"}
            record["split"] = splits.get(tenth, "train")
            line = json.dumps(record, ensure_ascii=False) + "\n"
            plain_file.write(line)
            more_file.write(line)
            truth = record.get("targets") or record["labels"]
            if record["split"] == "train" and truth.get("No Finding") == 1:
                for copy in (1, 2):
                    again = {key: record[key] for key in ("root", "image", "patient", "split")}
                    again |= {"id": f"{record['id']}+{copy}", "report": DUPLICATE}
                    more_file.write(json.dumps(annotate(again), ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- the paper's numbers

TABLES = (  # title, metrics, what the paper reports beside them, rows with the paper's numbers
    ("Tab. 2", ("ZS AUC", "FT10", "FT100"), "RSNA ZS, FT10, FT100", {
        "clip": "81.2, 88.3, 89.1", "softclip": "76.6, 79.1, 81.1", "clip-dt": "81.6, 88.5, 89.5",
        "clip-dtc": "84.4, 89.2, 90.0", "clip-n": "82.0, 88.2, 89.0",
        "clip-n-dtc": "86.4, 90.7, 91.2", "clip-g": "81.8, 88.6, 89.2",
        "clip-g-dtcg": "85.1, 89.9, 90.5", FULL: "86.6, 90.7, 91.1",
        "clip+sigmoid": "-", "clip-dtc+sigmoid": "-", "clip-n-dtc+sigmoid": "-",
        f"{FULL}+sigmoid": "-"}),
    ("Tab. 3", ("ZS AUC", "FT10", "NCD"), "RSNA ZS, FT10; NCD", {
        "clip": "81.2, 88.3; -", "clip+normals": "77.2, 87.6; 84.3", "clip-dt": "81.6, 88.5; -",
        "clip-dt+normals": "78.8, 88.5; 81.4", "clip-dtc": "84.4, 89.2; -",
        "clip-dtc+normals": "82.1, 89.4; 86.8", "clip-n": "82.0, 88.2; -",
        "clip-n-dtc": "86.4, 90.7; -", FULL: "86.6, 90.7; 3.1", "clip+sigmoid": "-",
        "clip-dtc+sigmoid": "-", "clip-n-dtc+sigmoid": "-", f"{FULL}+sigmoid": "-"}),
    ("Tab. 4, 5", ("ADV", "ADV centred", "@5", "F1"), "ADV on CXR14; OpenI @5, F1", {
        "clip": "-; 6.4, 28.7", "softclip": "-", "clip-dt": "-", "clip-dtc": "-", "clip-n": "-",
        "clip-n-dtc": "-; 6.2, 28.8", "clip-g": "-", "clip-g-dtcg": "-",
        FULL: "34.4; 7.8, 29.0", "clip+sigmoid": "-", "clip-dtc+sigmoid": "-",
        "clip-n-dtc+sigmoid": "-", f"{FULL}+sigmoid": "-"}),
    ("Tab. 6", ("A", "swapped A", "B"), "OpenI A, B", {
        "clip": "62.7, 62.6", "softclip": "-", "clip-dt": "-", "clip-dtc": "-",
        "clip-n": "96.7, 62.3", "clip-n-dtc": "-", "clip-g": "-", "clip-g-dtcg": "-",
        FULL: "96.4, 73.8", "clip+sigmoid": "-", "clip-dtc+sigmoid": "-",
        "clip-n-dtc+sigmoid": "-", f"{FULL}+sigmoid": "-"}),
)

# ---------------------------------------------------------------- prose of the page

ANSWER = """\
Small networks, trained from random weights (`tiny` encoders, 64 pixels) on a drawn set, the
phantom, and on a small real one, OpenI. What the paper trained on MIMIC-CXR was not run; its
numbers stand in columns of their own and are not comparable with these.

1. Hard negatives do on both sets what the paper says they do: a report is preferred to its
   negation far more often.
2. Most of that is a dislike of denials, since asked of an image without the finding, where the
   negation is right, the same networks fall by as much on OpenI and by twice as much on the
   phantom; soft labels undo part of it.
3. Soft labels of texts and clinical labels together raise zero-shot AUC on the phantom with the
   default prompts, those of texts alone do not, and on OpenI they are shown to help only where
   there are hard negatives.
4. Graphs help fine-tuning and retrieval on the phantom, where they are made from the very
   sentences that the images are drawn from; on OpenI that is not shown.
5. Nothing is shown to beat plain CLIP in zero-shot AUC on OpenI, and with a sigmoid loss soft
   labels lower it on the phantom."""

GLOSSARY = """\
## Words and letters

| | |
|---|---|
| CLIP, CLIP^N, CLIP^G | one-hot targets; with hard negatives (N); with the graph stream (G) |
| D_t, D_t+c, D_t+c+g | dynamic soft labels from texts, and clinical labels, and graphs |
| full method | CLIP^N,G-D_t+c+g, train.py's default |
| r, r^r, r^n | a report; without a finding's sentences; with a denial of the finding besides |
| A, B | Tab. 6: how often an image prefers r to r^n, and r to r^r |
| swapped A | how often an image without the finding prefers r^n to r |
| ZS AUC | zero-shot: mean AUROC over the findings, scored by prompts |
| FT10, FT100 | AUROC of a linear probe trained on 10 and on 100 % of the training patients |
| NCD | Tab. 3: a normal image's own report ranks before all abnormal ones |
| ADV | Tab. 4: a present and an absent finding of an image both decided rightly |
| ADV centred | the same after the image's mean score over its findings is taken away |
| @5, F1 | Tab. 5: the own report among the first five; labels of the first report |
| effective positives | exp(entropy) of a row of soft labels: how many texts count as positive |"""

SETUP = """\
This page is written by `python tests/study.py report` from tests/study.json, which holds each
run's values, n, commit and command, and from prose in that script; a test keeps them equal.

    python tests/study.py train --openi DOWNLOAD     # hours, two runs at once; stop and go on
    python tests/study.py evaluate --split val       # prompts are chosen here
    python tests/study.py evaluate --split test
    python tests/study.py evaluate --split test --plain-prompts
    python tests/study.py train --sets phantom-sweep openi-sweep
    python tests/study.py evaluate --split val --sets phantom-sweep openi-sweep
    python tests/study.py cost
    python tests/study.py labels
    python tests/study.py report

The phantom has 1,600 drawn training studies (180 steps of 128; 196 with 2,000 normal studies
added), and each seed is scored on some 500 test studies of a drawing of its own. OpenI has some
2,500 real training studies (390 steps of 64; 408 with its normal studies repeated), and each seed
is scored on a tenth of the patients of its own, some 300 images and 95 hard negatives. Another
seed is another initialisation and another order of the batches; on OpenI the training patients
change with the test patients too. All systems take these same steps and are judged by their last
weights; with normal studies added the original ones are therefore seen less often, 7 times instead
of 15 on the phantom, 6 instead of 10 on OpenI. All seeds were planned before the first run, and
nothing was chosen by these runs: prompts, thresholds and weights are those of earlier ones."""

VERDICTS = """\
Each difference is one of means over seeds, in points, with its standard error. It counts when it
exceeds two of them; C2, which says that something does not rise, holds at zero and below. A claim
holds if all of its differences do, in part if some do and others are reversed; it does not if some
are reversed and none holds; else it is undecided. In brackets: how many seeds in all would decide
a difference that stays what it is.

A score is taken as system + seed + noise. Each seed's own level is taken out; the noise is pooled
over the systems of a framework. SoftCLIP collapses, with a noise of its own, so C10 is judged by
its two systems alone. The fewer seeds and systems, the more often chance alone exceeds two standard
errors: once in twenty times on the phantom, once in eleven under sigmoid, more for C10."""

PLAIN_PROMPTS = """\
Prompts are half of a zero-shot score. The same weights once more without Tab. 1's three normal
sentences among the negatives, on those seeds alone that were scored with both; a claim that holds
in one of two columns only may be one of its prompts:"""

TABLES_NOTE = """\
In percent: the mean of the seeds' values with its 95 % interval, from resampling the patients
within each seed; n is the sum over the seeds. The interval is about other test patients, not
about other trainings, so do not compare rows by it: the verdicts do, and are about both. Where
columns of a table have different n, they stand in the order of the columns. A, swapped A and B
are asked of our own r^r and r^n (negations.py), whose denials training has met too, not of the
published CXR-Align; swapped A asks an image without the finding, where r^n is right."""

READING = """\
## Reading

- **Hard negatives** lift A (C4) and lower swapped A. The mean of the two is 75.8 for CLIP and 69.2
  for CLIP^N on the phantom, 55.6 and 56.2 on OpenI. With soft labels CLIP^N-D_t+c has 72.8 and
  56.7, the full method 73.8 and 55.5: nearly even on OpenI, below CLIP on the phantom. B rises with
  them on the phantom and, without graphs, falls on OpenI.
- **Negatives that are true.** In the runs before these a fifth of the hard negatives were
  mislabelled, and CLIP^N-D_t+c fell below chance in A on OpenI (C11's sigmoid rows too). It does no
  more.
- **Graphs without a tell.** In those runs the graphs of hard negatives could be told by a phrase or
  a lone node. Before and now, in points over the comparison, on the phantom: C6 FT10 without N
  +2.3 and +1.9, FT10 with N +2.7 and +2.0, FT100 with N +1.0 and +0.7; C7 +12.6 and +12.9; C8 +5.5
  and +0.3, centred +8.5 and +9.1. On OpenI: C6 -1.2 and -0.9, FT100 -1.9 and -1.8; C7 +2.9 and
  +1.6; C8 -2.0 and -2.3, centred +1.8 and +6.9. So C8's rise in scores as they are is gone, and a
  quarter of what graphs gave to fine-tuning beside negatives; the rest did not come from the tell.
  The phantom's reports changed too, so not all of a change is the tell's.
- **Soft labels.** CLIP-D_t+c is above CLIP on the phantom in zero-shot AUC, CLIP-D_t is not: the
  clinical labels do it. On OpenI CLIP^N gains by them (C3, over N).
- **Graphs.** CLIP^G does in fine-tuning what CLIP^G-D_t+c+g does, but soft labels add to its
  retrieval F1. CLIP^G-D_t+c+g, without hard negatives, has the highest zero-shot AUC of all on the
  phantom. On OpenI the full method does not gain in fine-tuning over CLIP^N-D_t+c, but its A, B and
  adversarial scores are higher, the latter two about CLIP's.
- **Adversarial prediction** stays below chance for every system on both sets, as for the paper's
  baselines (11.5 to 23.3); centred scores are above chance for softmax systems, most of all with
  graphs.
- **Added normal reports** do not lower CLIP's zero-shot AUC, so D_t+c has nothing to mend (C9); on
  the phantom they lower D_t+c's. Normal cases are found more often by them only with D_t+c on
  OpenI; hard negatives on the phantom, and soft labels under sigmoid on both sets, do far more.
- **SoftCLIP** is here its targets from text alone, without a threshold. Nothing keeps them from
  turning uniform, and they do: that shows what a threshold is for, and says nothing of SoftCLIP
  with its region features.
- **Sigmoid.** Soft labels lower zero-shot AUC and adversarial accuracy on the phantom and raise
  retrieval @5 there, F1 on OpenI and normal case detection on both. Their seeds are fewer, so
  compare them with each other.
- **Prompts.** Without the normal sentences CLIP^N falls eight points below CLIP on the phantom (C2
  holds there), the rise of D_t+c there is no longer sure, and C8 turns round: it does not hold on
  the phantom and holds on OpenI. C9 and C11 become undecided on the phantom. What is said of
  zero-shot and adversarial scores is therefore in part a matter of the prompts.
- **With a few thousand reports of your own**: nothing is shown to beat CLIP in zero-shot AUC on
  OpenI. The full method under softmax, the default, has the highest mean retrieval @5 on the
  phantom, on OpenI CLIP itself has; in A it comes second to CLIP^N on both sets, and swapped A is
  what that costs."""

THRESHOLDS = """\
One seed each: the full method on the phantom, CLIP^N-D_t+c on OpenI in batches of 128, one flag
moved from its default at a time. Effective positives are those of the flag's own stream. The
phantom hardly minds, but for adversarial prediction, which rises with tau_c. On OpenI a lower tau_t
leaves zero-shot AUC no lower while up to half of the texts come to count as positive and A falls
below chance: zero-shot AUC alone could choose a broken model. No weight helps in every column. The
defaults 0.98, 0.5, 0.98 and weights of 1, chosen in an earlier sweep, were kept; a tau_c of 0.7
looks as good or better, by one seed."""

PICTURE = "![Thresholds on validation rows](../.images/thresholds.png)"

LABELS = """\
OpenI studies of which we have both human MeSH indexing and the public CheXpert labeler's column
(findings and impression; 1 or -1 counts as positive). Shares of r^r and r^n are judged by the
same rules that edit them."""

ASIDE = """\
## Tried beside the study

Trials, most of one or two seeds, not repeated; those of commit 4d453a0 used its prompts and its
drawing of the phantom.

- **Prompts.** Those of commit 4d453a0 used words that a model trained from scratch has never
  read. On the same weights, prompts in the words of the reports gave CLIP, CLIP-D_t+c, CLIP^N,
  CLIP^N-D_t+c and the full method a zero-shot AUC of 76.9, 82.1, 81.6, 82.8, 84.1 on the phantom
  instead of 76.5, 80.5, 62.8, 80.0, 76.3. Nearly all of it comes from the normal sentences among
  the negatives, which on the phantom are literally its normal reports; among abnormal images
  alone a gain remains (62.6 to 66.5, on OpenI 68.9 to 72.9). Before any test table was made, the
  scheme was chosen on validation rows, all systems, 20 runs on the phantom and 12 on OpenI: mean
  zero-shot AUC 78.2 and 76.2; without the normal sentences 74.8 and 73.9; one of them instead of
  three 77.6 and 75.4; one prompt a side and one normal sentence 77.7 and 74.9; "Findings
  suggesting" and "No evidence of" with it 76.9 and 63.4; two more templates a side 78.2 and 75.9.
  None is better on both sets, so the first stayed.
- **Adversarial prediction (Tab. 4).** At commit 4d453a0 all systems scored 10 to 23, below chance
  (25), since all findings of an image rise and fall together: a threshold for each class, chosen
  on validation rows, reached 26 to 30 on the phantom and not above chance on OpenI. "Centred" takes
  each image's mean over its findings away, without any label. Nobody can know which of the two
  the paper's 34.4 is.
- **Task A's shortcut.** Whoever only dislikes negations wins A and loses swapped A. Repairs of
  the hard negatives were tried at that commit, judged by the mean of A and swapped A. A mirror
  image, that is a false affirmation in half of the draws, is worse (CLIP^N 69.5 to 65.0: it
  rejects edited text, whatever the image shows). A true denial put into r itself in half of the
  draws lifts CLIP^N to 75.3 and the full method from 75.8 to 77.3, but not CLIP^N-D_t+c (80.3 to
  77.9), which was the best of all and is the paper's own answer.
- **Thresholds belong to an encoder.** On 1,024 OpenI reports the [CLS] of a frozen pretrained
  MiniLM has 123.7, 101.2, 12.8, 1.7 effective positives of 128 at tau_t 0.7, 0.8, 0.9, 0.95:
  there the default 0.98 is one-hot, and no tau_t suits two encoders. Trained on OpenI (CLIP-D_t+c,
  MiniLM frozen but its last layer, 40 tokens, batches of 64, 5 epochs at 3e-4, one seed,
  validation rows), 0.8, which gave 9.2 positives of 64 in the first batch, against 0.98, which
  gave 1.0: zero-shot AUC 76.5 against 73.6, FT100 79.2 against 81.0, @5 4.7 against 5.8, F1 28.3
  against 27.3. These differ by less than the noise of a seed. At 0.8 the positives rose to 63
  within 30 steps before they fell to 34, and CLIP-D_t, without the clinical stream, collapsed at
  0.9 within 60 steps: the choice before step 1 is a start, and log.jsonl has to be watched."""

MIMIC = """\
## What would have to be run on MIMIC-CXR

Everything above is small. What would decide the claims at the paper's scale, none of which was
run:

- The nine systems of Tab. 2 with three seeds or more, from the paper's pretrained encoders: 27
  runs of 25,000 steps. Thresholds first: on validation rows, one run for each of three values of
  each tau, since the defaults come from small networks.

      torchrun --nproc-per-node 8 train.py --train runs/mimic_256/mimic_neg.jsonl \\
          --system SYSTEM --seed SEED --image-encoder swin_t-704ceda3.pth \\
          --text-encoder Bio_ClinicalBERT --image-size 224 --precision bf16 --workers 4 \\
          --out runs/mimic-SYSTEM-SEED --resume latest

- Tab. 2 on RSNA, SIIM, VinDr-CXR, ChestX-ray14 and CheXpert 5x200; Tab. 4 on ProbMed's pairs;
  Tab. 5 on OpenI and MIMIC's test rows; Tab. 6 with the published CXR-Align, where swapped A
  needs MIMIC's images without the finding.
- Labels by CheXbert and graphs by RadGraph for C6 and the clinical stream: ours are by rule.
- C9 wants a hospital's own normal studies, 130,000 in the paper, with the one sentence "No active
  lung lesion".
- C11 with both frameworks on the same seeds, at a batch of 1,024 and more, where a sigmoid loss
  is at home."""

# ---------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("part", choices=("train", "evaluate", "cost", "labels", "report"), help="what to do")
    add("--sets", nargs="+", choices=(*SETS, *SWEEPS), default=list(SETS),
        help="whose runs; the sweeps choose thresholds and weights on validation rows")
    add("--seeds", type=minimum(1), help="seeds of every row on both sets; none: 6 on the phantom, "
        "5 on OpenI, 3 of each under sigmoid")
    add("--missing", action="store_true", help="only runs that tests/study.json has no results of")
    add("--openi", metavar="FOLDER", help="OpenI's download; needed the first time")
    add("--split", choices=("val", "test"), default="val", help="rows to evaluate")
    add("--plain-prompts", action="store_true", help="evaluate without Tab. 1's normal sentences")
    add("--parallel", type=minimum(1), default=2, help="runs at once, a thread each")
    args = parser.parse_args(argv)
    if "openi" in args.sets and (args.seeds or 0) > len(TENTHS):
        parser.error(f"--seeds: expected at most {len(TENTHS)} on OpenI")
    if args.split == "test" and set(args.sets) & set(SWEEPS):
        parser.error("--split test: expected no sweep among --sets; they choose, on val rows")
    return args


def main(argv=None):
    args = parse_args(argv)
    STUDY.mkdir(parents=True, exist_ok=True)
    runs = planned_runs(args.sets, args.seeds)
    if args.missing:
        known = read_json(RECORD)["runs"]
        runs = [run for run in runs if run.name not in known]
    if args.part == "train":
        wants_openi = any(name.startswith("openi") for name in args.sets)
        if wants_openi and not args.openi and not (STUDY / "openi_neg.jsonl").exists():
            raise UserError("expected --openi FOLDER, OpenI's download, or --sets phantom")
        for run in runs:
            make_data(run, args.openi)
        do_all(train, runs, args.parallel, "train")
    elif args.part == "evaluate":
        do_all(lambda run: evaluate(run, args.split, args.plain_prompts), runs, args.parallel,
               "evaluate")
    elif args.part == "cost":
        cost()
    elif args.part == "labels":
        labels()
    else:
        report()


if __name__ == "__main__":
    run_main(main)
