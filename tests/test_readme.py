"""The README says what is true: its names, commands and example.

SPDX-License-Identifier: MIT
"""

import csv
import importlib.util
import json
import re
import shlex
import shutil
import signal
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import study
import torch
from PIL import Image
from torch.nn import functional as F

import data
import evaluate
import negations
import train
from loss import DynamicSoftContrastiveLoss
from model import ClinicalCLIP, export_model

ROOT = Path(train.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    """Every command of the README that starts one of our scripts, as words after the script."""
    for block in re.findall(r"```sh\n(.+?)```", README, re.S):
        for part in re.split(r"&&|\n", block.replace("\\\n", "")):
            words = shlex.split(part, comments=True)
            script = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
            if words and words[0] in ("python", "torchrun") and script is not None:
                yield words[script], words[script + 1:]


def test_the_map_names_code_that_exists():
    named = [pair for row in re.findall(r"^\| [^`|]+ \| (`\w+\.py`: .+?) \|$", README, re.M)
             for pair in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", row)]
    assert len(named) > 8
    for file, names in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b|^{name} = ", source, re.M), (file, name)


def test_the_page_is_short_and_says_how_long_each_file_is():
    assert len(README.split()) <= 1600 and len(README.splitlines()) <= 200
    files = re.findall(r"^\| `(\w+\.py)` \| [^|]+ \| (\d+) \|$", README, re.M)
    assert len(files) == 7
    for file, lines in files:
        count = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(count - int(lines)) <= 0.08 * count, (file, count)


@pytest.mark.parametrize("script,words", list(commands()), ids=lambda part: " ".join(part)[:60]
                         if isinstance(part, list) else part)
def test_every_command_is_one_its_script_understands(script, words):
    parsers = {"train.py": train.parse_args, "evaluate.py": evaluate.parse_args,
               "data.py": data.parse_args, "negations.py": negations.parse_args,
               "tests/study.py": study.parse_args}
    if script == "tests/benchmark.py":
        return
    parsers[script](words)


def test_the_headers_example_is_the_readmes():
    header = (ROOT / "loss.py").read_text(encoding="utf-8").split("\n\n")[1]
    assert textwrap.dedent(header) in README


def block(first):
    """The Python of the README that starts with this line."""
    return README[README.index(f"```python\n{first}"):].split("```")[1].removeprefix("python")


def test_the_loop_that_takes_the_loss_runs():
    g = torch.Generator().manual_seed(0)
    pixels, tokens = (torch.randn(4, 6, generator=g) for _ in range(2))
    images, texts = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)

    def open_clips_model(pixels, tokens):  # returns unit rows by name
        return {"image_features": F.normalize(images(pixels), dim=-1),
                "text_features": F.normalize(texts(tokens), dim=-1),
                "logit_scale": torch.tensor(7.0)}

    names = {"torch": torch, "criterion": DynamicSoftContrastiveLoss(), "model": open_clips_model,
             "images": pixels, "texts": tokens, "hard_texts": -tokens, "labels": torch.eye(4),
             "hard_labels": 1 - torch.eye(4)}
    exec(block("out = model(images"), names)
    names["total_loss"].backward()
    assert names["total_loss"].item() > 0 and images.weight.grad.abs().sum() > 0


def test_the_lines_that_use_a_trained_model_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ClinicalCLIP("tiny", "tiny", 16, 32)
    export_model(model, Path("runs/run-001"))
    deep = np.linspace(0, 40_000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Path("runs/phantom/images").mkdir(parents=True)
    Image.fromarray(deep).save("runs/phantom/images/000000.png")
    exec(block("import torch\nfrom data"), {})
    printed = re.fullmatch(r"edema (0\.\d\d)   pneumothorax (0\.\d\d)\n", capsys.readouterr().out)
    assert printed, "two probabilities"


def test_the_top_level_is_what_the_readme_lists():
    listed = {"README.md", "requirements.txt", "tests"} | set(re.findall(r"`(\w+\.py)`", README))
    listed -= {path.name for path in (ROOT / "tests").glob("*.py")}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))
             and p.name != "runs" and p.suffix not in (".jsonl", ".npy")}
    assert found == listed


SMALL = {"train.py": "--max-steps 2 --batch-size 8 --image-size 32 --width 32 --workers 0 "
         "--image-encoder tiny --text-encoder tiny", "data.py": "", "negations.py": "--workers 1",
         "evaluate.py": "--resamples 10 --workers 0"}


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def downloads(phantom, tmp_path):
    """What the README's commands read, from the phantom's studies, in the official layouts."""
    raw = phantom.with_name("phantom.jsonl")
    studies = [record for _, record in negations.read_jsonl(raw)]
    openi, mimic, rsna = {"reports": [], "projections": []}, {"metadata": [], "split": []}, []
    align, chexpert, graphs = {}, [], {}
    for k, record in enumerate(studies):
        image, split = Image.open(Path(record["root"]) / record["image"]), ("train", "test")[k % 2]
        subject, study, folder = f"1{k:07}", f"5{k:07}", tmp_path / "MIMIC/files/p10"
        folder = tmp_path / f"MIMIC/files/p{subject[:2]}/p{subject}/s{study}"
        for path in (tmp_path / f"OPENI/images/{k}_IM-1.png", folder / f"d{k}.jpg",
                     tmp_path / f"RSNA/PNG/r{k}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        openi["reports"].append({"uid": k, "MeSH": "normal" if k % 2 else "Cardiomegaly",
                                 "findings": record["report"], "impression": ""})
        openi["projections"].append(
            {"uid": k, "filename": f"{k}_IM-1.png", "projection": "Frontal"})
        rsna.append({"patientId": f"r{k}", "x": "", "y": "", "width": "", "height": "",
                     "Target": k % 2})
        ids = {"dicom_id": f"d{k}", "subject_id": subject, "study_id": study}
        mimic["metadata"].append(ids | {"ViewPosition": "AP"})
        mimic["split"].append(ids | {"split": split if k % 5 else "validate"})
        chexpert.append({"study_id": study} | dict.fromkeys(negations.CONDITIONS, ""))
        text = tmp_path / f"MIMIC/mimic-cxr-reports/{folder.relative_to(tmp_path / 'MIMIC')}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f" FINDINGS: {record['report']}\n", encoding="utf-8")
        graphs[f"p{subject[:2]}/p{subject}/s{study}.txt"] = negations.rule_graph(
            negations.split_sentences(record["report"]))
        align[f"d{k}"] = {"chosen": "edema", "report": record["report"], "omitted": "Clear.",
                          "negation": "No edema.", "location": "end"}
    for name, rows in openi.items():
        write_table(tmp_path / f"OPENI/indiana_{name}.csv", rows)
    for name, rows in (*mimic.items(), ("chexpert", chexpert)):
        write_table(tmp_path / f"MIMIC/mimic-cxr-2.0.0-{name}.csv", rows)
    write_table(tmp_path / "RSNA/stage_2_train_labels.csv", rsna)
    (tmp_path / "DOWNLOAD").symlink_to(tmp_path / "OPENI")
    (tmp_path / "MIMIC-CXR_graphs.json").write_text(json.dumps(graphs), encoding="utf-8")
    (tmp_path / "MIMIC/cxr-align.json").write_text(json.dumps({"mimic": align}), encoding="utf-8")
    return tmp_path


def test_the_readmes_commands_run_in_their_order(downloads, monkeypatch):
    """All but those that need the network, days, or a peer's package; encoders are tiny ones.

    Without matplotlib they run all the same, but for --figures.
    """
    monkeypatch.chdir(downloads)
    no_figures = importlib.util.find_spec("matplotlib") is None
    monkeypatch.setattr(train, "PHANTOM_STUDIES", 120)
    scripts, ran = {f"{m.__name__}.py": m for m in (train, evaluate, data, negations)}, Counter()
    for script, words in commands():
        if script not in scripts or words[:1] == ["biovil_t.py"]:
            continue
        if no_figures and "--figures" in words:
            folder = words.index("--figures") + 1
            words = words[:folder - 1] + words[folder + 1:]
        small = SMALL[script].split()
        if "--compare" in words:
            small = []
            for name in words[1:]:
                Path(name).parent.mkdir(parents=True)
                shutil.copy("runs/openi/results-all-openi_neg-test.json", name)
        scripts[script].main(words + small)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py's handlers would outlive it here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ran[script] += 1
    assert min(ran.values()) >= 2 and set(ran) == set(scripts), ran
    if no_figures:
        pytest.skip("could not import 'matplotlib': all ran, but without --figures")
