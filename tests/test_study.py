"""The study's arithmetic, its splits, and that what it names exists.

SPDX-License-Identifier: MIT
"""

import json

import pytest
import study

from data import Manifest

FINISHED = {"zero-shot": "macro AUROC", "cxr-align": "A"}


def write_score(folder, value):
    folder.mkdir()
    tasks = {task: {"metrics": {metric: {"value": value}}} for task, metric in FINISHED.items()}
    (folder / "test.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STUDY", tmp_path)
    return tmp_path


def test_a_contrast_leaves_the_seeds_own_level_out(folder):
    noise = {("clip", 0): 0.01, ("clip", 1): -0.01, ("clip-n", 0): -0.01, ("clip-n", 1): 0.01}
    for system, level in (("clip", 0.5), ("clip-n", 0.6)):
        for seed in (0, 1):
            value = level + 0.2 * seed + noise[system, seed]
            write_score(folder / f"phantom-{system}-{seed}", value)
    results = study.Results("phantom")
    value, error = results.contrast("ZS AUC", {"clip-n": 1, "clip": -1})
    assert value == pytest.approx(10)
    # residuals of 1 point, 4 of them with (2 - 1)(2 - 1) degrees of freedom: s = 2; 2 sums of 2
    assert error == pytest.approx(2.0)
    assert results.contrast("ZS AUC", {"clip-dt": 1, "clip": -1}) is None  # was never run
    assert results.cell("clip", "A") == "60.0 ± 12.7"
    assert results.cell("clip-dt", "A") == "-"


@pytest.mark.parametrize("value,sign,expected", [
    (5, 1, "holds"), (1, 1, "undecided"), (-5, 1, "does not"), (-5, -1, "holds"),
    (5, -1, "does not"), (-1, 0, "holds"), (1, 0, "undecided"), (5, 0, "does not")])
def test_a_claim_holds_beyond_two_standard_errors(value, sign, expected):
    assert study.verdict(value, 1.0, sign) == expected


def test_no_patient_of_openis_test_rows_trains_and_validation_stays(folder):
    lines = []
    for i in range(600):
        report = "The heart is enlarged." if i % 2 else "No acute disease."
        lines.append({"id": f"openi/{i}", "root": str(folder), "image": f"{i}.png",
                      "patient": str(i // 2), "report": report}
                     | ({"targets": {"No Finding": i % 2}} if i % 3 else {}))
    (folder / "openi.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    seen = {}
    for seed in study.SEEDS:
        (train, test), (more, _) = study.openi(None, seed).values()
        for split in ("train", "val", "test"):
            seen[seed, split] = set(Manifest(test, split).patients.tolist())
        assert not seen[seed, "test"] & (seen[seed, "train"] | seen[seed, "val"])
        assert seen[seed, "test"] and seen[seed, "val"] == seen[0, "val"]
        added = Manifest(more, "train")
        assert len(added) > len(Manifest(train, "train"))
        assert set(added.patients.tolist()) == seen[seed, "train"]
    assert not seen[0, "test"] & seen[1, "test"]


def test_a_failed_run_is_named_and_a_wrong_folder_is_one_line(folder):
    job = ("broken", folder / "none.jsonl", folder / "none.jsonl", "test", [])
    with pytest.raises(ValueError, match="broken: failed, see .*output.txt"):
        study.run_all([job], 1)
    with pytest.raises((ValueError, OSError), match=str(folder / "nowhere")):
        study.main(["openi", "--openi", str(folder / "nowhere")])


def test_claims_and_tables_name_systems_and_metrics_that_exist():
    systems = {*study.SYSTEMS, *(f"{name}+" for name in study.SYSTEMS)}
    for contrasts in study.CLAIMS.values():
        for _, metric, sign, weights in contrasts:
            assert metric in study.METRICS and sign in (-1, 0, 1)
            assert set(weights) <= systems and sum(weights.values()) == 0
    for _, metrics, _, rows in study.TABLES:
        assert set(metrics) <= set(study.METRICS) and set(rows) <= systems


def test_the_report_of_an_empty_folder_says_that_nothing_was_run(folder, capsys):
    study.main(["report"])
    out = capsys.readouterr().out
    assert "not run" in out and "holds" not in out
