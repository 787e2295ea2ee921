"""The README says what is true: its assumptions, names, commands and example.

SPDX-License-Identifier: MIT
"""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import study
import torch
from torch.nn import functional as F

import data
import evaluate
import negations
import train
from loss import DynamicSoftContrastiveLoss

ROOT = Path(train.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TAG = re.compile(r"# (ASSUMPTION|DIFFERS from [^:]+): (.+)")


def commands():
    """Every command of the README that starts one of our scripts, as words after the script."""
    for line in README.replace("\\\n", "").splitlines():
        for part in line.split("&&") if line.startswith("    ") else ():
            words = shlex.split(part, comments=True)
            script = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
            if words and words[0] in ("python", "torchrun") and script is not None:
                yield words[script], words[script + 1:]


def test_assumptions_and_differences_are_the_same_in_code_and_readme():
    code = {(path.name, kind, text.strip()) for path in ROOT.glob("*.py")
            for kind, text in TAG.findall(path.read_text(encoding="utf-8"))}
    table = {tuple(cell.strip().strip("`") for cell in row.split("|")[1:4])
             for row in README.splitlines() if re.match(r"\| `\w+.py` \| (ASSUM|DIFFERS)", row)}
    assert len(code) > 20
    assert table == code


def test_the_map_names_code_and_tests_that_exist():
    rows = re.findall(r"^\| [^|]+ \| `(\w+\.py)`: (.+?) \| (.+?) \|$", README, re.M)
    assert len(rows) > 12
    for file, names, tests in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b|^{name} = ", source, re.M), (file, name)
        every = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py"))
        for name in re.findall(r"`(test_\w+)`", tests):
            assert f"def {name}(" in every, name


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
    assert header in README


def block(first):
    """The indented block of the README that starts with this line."""
    after = README[README.index(f"    {first}"):].split("\n\n")[0]
    return textwrap.dedent(after)


def test_the_loops_that_take_the_loss_run():
    g = torch.Generator().manual_seed(0)
    pixels, tokens = (torch.randn(4, 6, generator=g) for _ in range(2))
    labels, layer = torch.eye(4), torch.nn.Linear(6, 8)
    names = {"torch": torch, "F": F, "criterion": DynamicSoftContrastiveLoss(),
             "loader": [(pixels, tokens, labels, -tokens, 1 - labels)] * 2,
             "encode_image": layer, "encode_text": torch.nn.Linear(6, 8),
             "logit_scale": torch.nn.Parameter(torch.tensor(2.0)),
             "optimizer": torch.optim.SGD(layer.parameters(), lr=0.1)}
    before = layer.weight.clone()
    exec(block("for pixels, tokens"), names)
    assert not torch.equal(before, layer.weight) and names["logit_scale"].grad is not None

    def open_clips_model(images, texts):  # returns unit rows by name
        return {"image_features": F.normalize(layer(images), dim=-1),
                "text_features": F.normalize(names["encode_text"](texts), dim=-1),
                "logit_scale": names["logit_scale"].exp()}

    names |= {"model": open_clips_model, "images": pixels, "texts": tokens, "hard_texts": -tokens,
              "labels": labels, "hard_labels": 1 - labels}
    exec(block("out = model(images"), names)
    assert names["total_loss"].requires_grad and names["total_loss"].item() > 0


def test_the_top_level_is_what_the_readme_lists():
    listed = {"README.md", "requirements.txt", "tests"} | set(re.findall(r"`(\w+\.py)`", README))
    listed -= {path.name for path in (ROOT / "tests").glob("*.py")}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))
             and p.name != "runs" and p.suffix not in (".jsonl", ".npy")}
    assert found == listed
