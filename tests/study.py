"""Does it hold? The paper's claims, tested again.

    python tests/study.py sweep                       thresholds and weights, on validation rows
    python tests/study.py phantom                     Tab. 2's systems and SoftCLIP, 3 seeds; Tab. 3
    python tests/study.py openi --openi FOLDER        real reports; test patients of a seed's own
    python tests/study.py openi-sweep --openi FOLDER  thresholds on OpenI's validation rows
    python tests/study.py cost                        time and memory of a step of every system
    python tests/study.py report                      tables, claims, figure of what has been run

Every run is `train.py` with its own folder below runs/study, two at once with a thread each, and
is taken up again where it was stopped. All are judged by the weights of their last step, so that
no system is stopped at a luckier one. Nothing is chosen on the rows that are reported: sweeps read
validation rows, the other parts test rows.

SPDX-License-Identifier: MIT
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
from data import DUPLICATE, make_phantom, patient_hash  # noqa: E402
from data import main as write_manifest  # noqa: E402
from evaluate import canvas  # noqa: E402
from negations import annotate, open_atomic, read_jsonl, run_main  # noqa: E402
from train import SYSTEMS  # noqa: E402

SEEDS = (0, 1, 2)
STUDY = Path("runs/study")
NAMES = {"clip": "CLIP", "clip-dt": "CLIP-D_t", "clip-dtc": "CLIP-D_t+c", "clip-n": "CLIP^N",
         "clip-n-dtc": "CLIP^N-D_t+c", "clip-g": "CLIP^G", "clip-g-dtcg": "CLIP^G-D_t+c+g",
         "clip-ng-dtcg": "CLIP^N,G-D_t+c+g", "softclip": "SoftCLIP"}
METRICS = {"ZS AUC": ("zero-shot", "macro AUROC"), "FT10": ("fine-tune", "FT10 macro AUROC"),
           "FT100": ("fine-tune", "FT100 macro AUROC"), "@5": ("retrieval", "@5"),
           "F1": ("retrieval", "micro F1"), "A": ("cxr-align", "A"),
           "swapped A": ("cxr-align", "swapped A"), "B": ("cxr-align", "B"),
           "ADV": ("adversarial", "both"), "NCD": ("normal-case", "accuracy")}


# ---------------------------------------------------------------- data


def annotated(raw, path):
    """Annotate a manifest record by record, once."""
    if not path.exists():
        with open_atomic(path) as file:
            for _, record in tqdm(list(read_jsonl(raw)), desc=path.name):
                file.write(json.dumps(annotate(record), ensure_ascii=False) + "\n")
    return path


def phantoms():
    """Training rows of the default phantom; many more validation and test rows of another one.

    Tab. 3's set adds as many normal studies again as there are studies, with one sentence.
    """
    train = annotated(make_phantom(STUDY / "phantom", studies=2000), STUDY / "phantom.jsonl")
    more = annotated(make_phantom(STUDY / "phantom+", studies=2000, duplicates=2000),
                     STUDY / "phantom+.jsonl")
    other = annotated(make_phantom(STUDY / "others", studies=5000, seed=1), STUDY / "others.jsonl")
    return {"phantom": (train, other), "phantom+": (more, other)}


def openi(folder, seed):
    """OpenI with the tenth `seed` of its patients for test, always the same tenth for validation.

    Tab. 3's set repeats each normal training study twice, with one sentence for a report.
    """
    raw = STUDY / "openi.jsonl"
    if not raw.exists():
        write_manifest(["openi", str(folder), "--out", str(raw)])
    whole = annotated(raw, STUDY / "openi_neg.jsonl")
    plain, more = STUDY / f"openi-{seed}.jsonl", STUDY / f"openi+-{seed}.jsonl"
    if not more.exists():
        with open_atomic(plain) as plain_file, open_atomic(more) as more_file:
            for _, record in read_jsonl(whole):
                tenth = patient_hash(record["patient"]) % 1000 // 100
                record["split"] = ("val" if tenth == 8 else "test" if tenth == (9, 0, 1)[seed]
                                   else "train")
                truth = record.get("targets") or record["labels"]
                lines = [json.dumps(record) + "\n"]
                plain_file.writelines(lines)
                if record["split"] == "train" and truth.get("No Finding") == 1:
                    for copy in (1, 2):
                        again = {k: record[k] for k in ("root", "image", "patient", "split")}
                        again |= {"id": f"{record['id']}+{copy}", "report": DUPLICATE}
                        lines.append(json.dumps(annotate(again)) + "\n")
                more_file.writelines(lines)
    return {"openi": (plain, plain), "openi+": (more, plain)}


# ---------------------------------------------------------------- runs


def run(job):
    """Train and evaluate one run unless its result is there. Returns its name and error, if any."""
    name, train, test, split, flags = job
    folder, result = STUDY / name, STUDY / name / f"{split}.json"
    if result.exists():
        return None
    commands = [[HERE / "train.py", "--train", train, "--out", folder, "--resume", "latest",
                 "--workers", "0", *flags],
                [HERE / "evaluate.py", folder / "last.pt", "--data", test, "--split", split,
                 "--workers", "0", "--out", result]]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a", encoding="utf-8") as log:
        for command in commands:
            done = subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                return f"{name}: failed, see {folder / 'output.txt'}"


def run_all(jobs, parallel):
    """Do all jobs; ValueError at the end if any failed, the others stay done."""
    with ThreadPoolExecutor(parallel) as pool:
        errors = list(filter(None, tqdm(pool.map(run, jobs), total=len(jobs), desc="runs")))
    if errors:
        raise ValueError("; ".join(errors))


def phantom_jobs():
    sets = phantoms()
    for seed in SEEDS:
        for system in SYSTEMS:
            yield (f"phantom-{system}-{seed}", *sets["phantom"], "test",
                   ["--system", system, "--seed", str(seed)])
        for system in ("clip", "clip-dt", "clip-dtc"):
            yield (f"phantom+-{system}-{seed}", *sets["phantom+"], "test",
                   ["--system", system, "--seed", str(seed), "--epochs", "7"])


def openi_jobs(folder, seeds):
    for seed in seeds:
        sets = openi(folder, seed)
        for system in ("clip", "clip-dtc", "clip-n", "clip-n-dtc", "clip-ng-dtcg", "softclip"):
            yield (f"openi-{system}-{seed}", *sets["openi"], "test",
                   ["--system", system, "--seed", str(seed), *OPENI_RUN, "--epochs", "10"])
        for system in ("clip", "clip-dtc"):
            yield (f"openi+-{system}-{seed}", *sets["openi+"], "test",
                   ["--system", system, "--seed", str(seed), *OPENI_RUN, "--epochs", "6"])


def sweep_jobs():
    """Every threshold and weight on its own, the others as in SWEPT_FROM."""
    data = phantoms()["phantom"]
    for flag, values in SWEEP.items():
        for value in values:
            flags = (SWEPT_FROM | {flag: value}).items()
            yield (f"sweep-{flag}-{value}", *data, "val",
                   [word for name, v in flags for word in (f"--{name}", str(v))])


def openi_sweep_jobs(folder):
    data = openi(folder, 0)["openi"]
    for tau_t, tau_c in sorted({p for points in OPENI_SWEEP.values() for p in points.values()}):
        yield (f"openi-sweep-{tau_t}-{tau_c}", *data, "val",
               ["--system", "clip-n-dtc", "--epochs", "10", "--tau-text", str(tau_t),
                "--tau-clinical", str(tau_c)])


def cost():
    """Median seconds a step and peak memory of every system relative to CLIP, run in turns."""
    data, rows = phantoms()["phantom"][0], {}
    for system in SYSTEMS:
        folder = STUDY / f"cost-{system}"
        if not (folder / "log.jsonl").exists():
            subprocess.run([sys.executable, HERE / "train.py", "--train", data, "--out", folder,
                            "--system", system, "--max-steps", "36"], check=True,
                           capture_output=True)
        steps = [r for r in records(folder) if "loss" in r]
        rows[system] = (statistics.median(128 / r["images_per_s"] for r in steps[12:]),
                        steps[-1]["memory_mb"])
    print("| | time of a step | peak memory |\n|---|---|---|")
    for system, (seconds, memory) in rows.items():
        print(f"| {NAMES[system]} | {seconds / rows['clip'][0]:.2f} | "
              f"{memory / rows['clip'][1]:.2f} |")


# ---------------------------------------------------------------- what came out


def records(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def scores(name, split="test"):
    """METRICS of a run in percent, or None if it has not been run."""
    path = STUDY / name / f"{split}.json"
    if not path.exists():
        return None
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return {name: 100 * tasks[task]["metrics"][metric]["value"]
            for name, (task, metric) in METRICS.items()
            if metric in tasks.get(task, {"metrics": ()})["metrics"]}


class Results:
    """Test scores of a data set's systems by seed: x[system][seed][metric], in percent.

    A score is taken as system + seed + noise. The noise's standard deviation is pooled over all
    systems, since two or three seeds of one system tell little.
    """

    def __init__(self, data):
        self.x = {}
        for system in SYSTEMS:
            for key, folder in ((system, data), (f"{system}+", f"{data}+")):
                runs = [scores(f"{folder}-{system}-{seed}") for seed in SEEDS]
                if all(runs[:2]):
                    self.x[key] = [run for run in runs if run]
        self.seeds = min((len(runs) for runs in self.x.values()), default=0)

    def values(self, system, metric):
        return [run[metric] for run in self.x[system][:self.seeds]]

    def cell(self, system, metric):
        """Mean and standard deviation over the seeds."""
        if system not in self.x:
            return "-"
        values = self.values(system, metric)
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    def noise(self, metric, weights):
        """Standard deviation of a score's noise; SoftCLIP's, which collapses, counts for itself."""
        table = [self.values(system, metric) for system in self.x
                 if system != "softclip" or system in weights]
        columns = [statistics.mean(column) for column in zip(*table, strict=True)]
        whole = statistics.mean(columns)
        squares = sum((value - statistics.mean(row) - columns[k] + whole) ** 2
                      for row in table for k, value in enumerate(row))
        return (squares / ((len(table) - 1) * (self.seeds - 1))) ** 0.5

    def contrast(self, metric, weights):
        """A difference of systems' means and its standard error; None if a system is missing."""
        if not set(weights) <= set(self.x):
            return None
        value = sum(w * statistics.mean(self.values(system, metric))
                    for system, w in weights.items())
        share = sum(w * w for w in weights.values()) / self.seeds
        return value, self.noise(metric, weights) * share ** 0.5


def verdict(value, error, sign):
    """A difference of two standard errors counts; "not above" (sign 0) holds from zero down."""
    if sign == 0:
        return "holds" if value <= 0 else "does not" if value > 2 * error else "undecided"
    value *= sign
    return "holds" if value > 2 * error else "does not" if value < -2 * error else "undecided"


def judge(results, contrasts):
    """A claim's differences as text, and what becomes of it."""
    parts, verdicts = [], []
    for what, metric, sign, weights in contrasts:
        if (known := results.contrast(metric, weights)):
            verdicts.append(verdict(*known, sign))
            parts.append(f"{what} {known[0]:+.1f} ± {known[1]:.1f}")
    mixed = "in part" if {"does not", "holds"} <= set(verdicts) else None
    first = (v for v in ("does not", "undecided", "holds") if v in verdicts)
    return "; ".join(parts) or "-", mixed or next(first, "not run")


def claims(both):
    print("| claim; points ± standard error | phantom | | OpenI | |\n|---|---|---|---|---|")
    for title, contrasts in CLAIMS.items():
        cells = [cell for results in both.values() for cell in judge(results, contrasts)]
        print(f"| {title} | {cells[0]} | **{cells[1]}** | {cells[2]} | **{cells[3]}** |")


def tables():
    both = {data: Results(data) for data in ("phantom", "openi")}
    print(f"mean ± standard deviation over {both['phantom'].seeds} seeds of the phantom and "
          f"{both['openi'].seeds} of OpenI")
    for title, metrics, reported, rows in TABLES:
        heads = [*(f"{data} {m}" for data in both for m in metrics), f"the paper: {reported}"]
        print(f"\n| {title} | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
        for system, paper in rows.items():
            name = NAMES[system.rstrip("+")] + (" with normals" if "+" in system else "")
            cells = [both[data].cell(system, m) for data in both for m in metrics]
            print(f"| {name} | {' | '.join([*cells, paper])} |")
    print()
    claims(both)


def swept(name, stream):
    """Validation scores of a sweep's run and its effective positives in % of the 256 texts."""
    if (run := scores(name, "val")) is None:
        return None
    steps = [r for r in records(STUDY / name) if "loss" in r]
    share = statistics.mean(r[f"positives_{stream}"] for r in steps[-24:]) / 2.56
    return run | {"positives %": share}


def sweep_rows():
    """title -> [(value, scores)] of every sweep that has been run."""
    rows = {}
    for flag, values in SWEEP.items():
        stream = flag.split("-")[1]
        rows[f"phantom --{flag}"] = [(v, swept(f"sweep-{flag}-{v}", stream)) for v in values]
    for flag, points in OPENI_SWEEP.items():
        rows[f"OpenI --{flag}"] = [
            (value, swept(f"openi-sweep-{tau_t}-{tau_c}", flag.split("-")[1]))
            for value, (tau_t, tau_c) in points.items()]
    rows = {title: [(v, run) for v, run in points if run] for title, points in rows.items()}
    return {title: points for title, points in rows.items() if points}


def sweeps():
    shown = ("ZS AUC", "FT10", "@5", "F1", "A", "B", "ADV", "positives %")
    print(f"\n| validation rows | | {' | '.join(shown)} |\n{'|---' * 10}|")
    for title, points in sweep_rows().items():
        for value, run in points:
            print(f"| {title} | {value} | {' | '.join(f'{run[k]:.1f}' for k in shown)} |")


def figure(path):
    """Zero-shot AUROC, retrieval @5, A and effective positives against each threshold."""
    colors = {"ZS AUC": "#3b6fb6", "@5": "#e08a2e", "A": "#4c9a5b", "positives %": "#777777"}
    rows = {title: points for title, points in sweep_rows().items() if "tau" in title}
    image, draw, write = canvas(30 + 270 * len(rows), 420, "Thresholds on validation rows, percent")
    for place, (title, points) in enumerate(rows.items()):
        left = 60 + 270 * place
        for k in range(0, 101, 20):
            draw.line((left, 340 - 2.7 * k, left + 200, 340 - 2.7 * k), "#dddddd")
            write(left - 8, 340 - 2.7 * k, k, "rm", 13)
        write(left + 100, 382, title, "mm")
        xs = [left + 20 + 160 * k / max(1, len(points) - 1) for k in range(len(points))]
        for x, (value, _) in zip(xs, points, strict=True):
            write(x, 358, value, "mm", 13)
        for name, color in colors.items():
            line = [(x, 340 - 2.7 * run[name]) for x, (_, run) in zip(xs, points, strict=True)]
            draw.line(line, color, 3)
            for x, y in line:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), color)
    for k, (name, text) in enumerate((
            ("ZS AUC", "zero-shot AUROC"), ("@5", "retrieval @5"), ("A", "CXR-Align A"),
            ("positives %", "effective positives, % of 256 texts"))):
        draw.rectangle((60 + 190 * k, 404, 76 + 190 * k, 412), colors[name])
        write(82 + 190 * k, 408, text)
    image.save(path)


SWEEP = {"tau-text": (0.5, 0.8, 0.9, 0.95, 0.98), "tau-clinical": (0.3, 0.5, 0.7, 0.9),
         "tau-graph": (0.5, 0.9, 0.98), "w-text": (0.5, 2.0), "w-clinical": (0.5, 2.0),
         "w-graph": (0.5, 2.0)}
OPENI_RUN = ("--batch-size", "64")
SWEPT_FROM = {"tau-text": 0.98, "tau-clinical": 0.9, "tau-graph": 0.98}
OPENI_SWEEP = {  # flag: {value: (tau_t, tau_c)}
    "tau-text": {0.9: (0.9, 0.5), 0.95: (0.95, 0.5), 0.98: (0.98, 0.5)},
    "tau-clinical": {value: (0.98, value) for value in (0.3, 0.5, 0.7, 0.9)}}
FULL = "clip-ng-dtcg"
CLAIMS = {
    "C1 soft labels raise zero-shot AUC": (
        ("D_t", "ZS AUC", 1, {"clip-dt": 1, "clip": -1}),
        ("D_t+c", "ZS AUC", 1, {"clip-dtc": 1, "clip": -1})),
    "C2 negatives alone do not": (("N", "ZS AUC", 0, {"clip-n": 1, "clip": -1}),),
    "C3 negatives with soft labels beat either": (
        ("over N", "ZS AUC", 1, {"clip-n-dtc": 1, "clip-n": -1}),
        ("over D_t+c", "ZS AUC", 1, {"clip-n-dtc": 1, "clip-dtc": -1})),
    "C4 negatives lift CXR-Align A": (("N", "A", 1, {"clip-n": 1, "clip": -1}),),
    "C5 negatives alone lower CXR-Align B, the full method raises it": (
        ("N", "B", -1, {"clip-n": 1, "clip": -1}), ("full", "B", 1, {FULL: 1, "clip": -1})),
    "C6 the graph stream with soft labels helps fine-tuning": (
        ("FT10, without N", "FT10", 1, {"clip-g-dtcg": 1, "clip-dtc": -1}),
        ("FT10, with N", "FT10", 1, {FULL: 1, "clip-n-dtc": -1}),
        ("FT100, with N", "FT100", 1, {FULL: 1, "clip-n-dtc": -1})),
    "C7 the full method raises retrieval F1": (("full", "F1", 1, {FULL: 1, "clip": -1}),),
    "C8 the full method raises adversarial accuracy": (
        ("full", "ADV", 1, {FULL: 1, "clip": -1}),),
    "C9 added normal reports hurt CLIP more than D_t+c, and lift normal case detection": (
        ("ZS AUC, D_t+c's change less CLIP's", "ZS AUC", 1,
         {"clip-dtc+": 1, "clip-dtc": -1, "clip+": -1, "clip": 1}),
        ("NCD, CLIP", "NCD", 1, {"clip+": 1, "clip": -1}),
        ("NCD, D_t+c", "NCD", 1, {"clip-dtc+": 1, "clip-dtc": -1})),
    "C10 SoftCLIP falls below CLIP": (("SoftCLIP", "ZS AUC", -1, {"softclip": 1, "clip": -1}),),
}
TABLES = (  # title, metrics, what the paper reports beside them, rows with the paper's numbers
    ("Tab. 2", ("ZS AUC", "FT10", "FT100"), "RSNA ZS, FT10, FT100", {
        "clip": "81.2, 88.3, 89.1", "softclip": "76.6, 79.1, 81.1", "clip-dt": "81.6, 88.5, 89.5",
        "clip-dtc": "84.4, 89.2, 90.0", "clip-n": "82.0, 88.2, 89.0",
        "clip-n-dtc": "86.4, 90.7, 91.2", "clip-g": "81.8, 88.6, 89.2",
        "clip-g-dtcg": "85.1, 89.9, 90.5", FULL: "86.6, 90.7, 91.1"}),
    ("Tab. 3", ("ZS AUC", "FT10", "NCD"), "RSNA ZS, FT10; NCD", {
        "clip": "81.2, 88.3; -", "clip+": "77.2, 87.6; 84.3", "clip-dt": "81.6, 88.5; -",
        "clip-dt+": "78.8, 88.5; 81.4", "clip-dtc": "84.4, 89.2; -",
        "clip-dtc+": "82.1, 89.4; 86.8"}),
    ("Tab. 4, 5", ("ADV", "@5", "F1"), "ADV on CXR14; OpenI @5, F1", {
        "clip": "-; 6.4, 28.7", "softclip": "-", "clip-dt": "-", "clip-dtc": "-", "clip-n": "-",
        "clip-n-dtc": "-; 6.2, 28.8", "clip-g": "-", "clip-g-dtcg": "-",
        FULL: "34.4; 7.8, 29.0"}),
    ("Tab. 6", ("A", "swapped A", "B"), "OpenI A, B", {
        "clip": "62.7, 62.6", "softclip": "-", "clip-dt": "-", "clip-dtc": "-",
        "clip-n": "96.7, 62.3", "clip-n-dtc": "-", "clip-g": "-", "clip-g-dtcg": "-",
        FULL: "96.4, 73.8"}),
)


PARTS = {"sweep": lambda args: sweep_jobs(), "phantom": lambda args: phantom_jobs(),
         "openi": lambda args: openi_jobs(args.openi, SEEDS[:args.seeds]),
         "openi-sweep": lambda args: openi_sweep_jobs(args.openi)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "cost", "report"), help="what to run; report "
                        "prints what has been run below runs/study")
    parser.add_argument("--openi", metavar="FOLDER", help="OpenI's download, for the openi parts")
    parser.add_argument("--seeds", type=int, default=3, choices=(2, 3), help="for openi")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, a thread each")
    args = parser.parse_args(argv)
    if args.part.startswith("openi") and not (args.openi or (STUDY / "openi.jsonl").exists()):
        parser.error("expected --openi, the folder of OpenI's download")
    return args


def main(argv=None):
    args = parse_args(argv)
    STUDY.mkdir(parents=True, exist_ok=True)
    if args.part == "cost":
        cost()
    elif args.part == "report":
        tables()
        sweeps()
        figure(STUDY / "thresholds.png")
    else:
        run_all(list(PARTS[args.part](args)), args.parallel)


if __name__ == "__main__":
    run_main(main)
