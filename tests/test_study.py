"""The study: its arithmetic, its splits, its page, and that its parts work in a row.

SPDX-License-Identifier: MIT
"""

import json
import re
import statistics
from collections import Counter

import pytest
import study

import train
from data import Manifest, UserError, read_json
from evaluate import read_prompts


def score(value, n=100, chance=None, half=2.0):
    return {"value": value, "interval": [value - half, value + half], "n": n, "chance": chance}


def record(scores, result="test", data="phantom"):
    """study.json of {(row, seed): {metric: value}}."""
    runs = {}
    for (row, seed), values in scores.items():
        metrics = {metric: score(value) for metric, value in values.items()}
        results = {result: {"commit": "abc", "command": "-", "metrics": metrics}}
        runs[f"{data}-{row}-{seed}"] = {"set": data, "row": row, "seed": seed, "commit": "abc",
                                        "command": "-", "positives": {}, "results": results}
    return {"runs": runs}


def scores_of(rows, metric="A"):
    """Scores on the phantom of {row: the metric's values, one a seed}."""
    return study.Scores(record({(row, seed): {metric: value} for row, values in rows.items()
                                for seed, value in enumerate(values)}), "phantom")


def full_record():
    """Every planned run of both sets with made-up scores, in which each system is one point up."""
    whole = record({})
    for data in study.SETS:
        scores = {}
        for run in study.planned_runs([data]):
            level = 50 + list(study.NAMES).index(run.row.split("+")[0]) + 3 * run.seed
            noise = 0.1 if (run.seed + len(run.row)) % 2 else -0.1
            scores[run.row, run.seed] = dict.fromkeys(study.METRICS, level + noise)
        whole["runs"] |= record(scores, data=data)["runs"]
    return whole


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """runs/study, study.json and STUDY.md somewhere else."""
    monkeypatch.setattr(study, "STUDY", tmp_path)
    for name, path in {"RECORD": "study.json", "PAGE": "STUDY.md", "FIGURE": "t.png"}.items():
        monkeypatch.setattr(study, name, tmp_path / path)
    study.RECORD.write_text(study.record_text({"runs": {}}), encoding="utf-8")
    return tmp_path


# ---------------------------------------------------------------- arithmetic


def test_a_difference_leaves_the_seeds_own_level_out():
    scores = scores_of({"clip": [50 + 1, 70 - 1], "clip-n": [60 - 1, 80 + 1]})
    difference = scores.difference("A", {"clip-n": 1, "clip": -1})
    assert difference.value == pytest.approx(10) and difference.seeds == 2
    # residuals of 1 point, 4 of them with (2 - 1)(2 - 1) degrees of freedom: s = 2; 2 sums of 2
    assert difference.error == pytest.approx(2.0)
    assert scores.difference("A", {"clip-dt": 1, "clip": -1}) is None  # was never run
    assert scores.difference("B", {"clip-n": 1, "clip": -1}) is None   # was not measured


def test_sigmoid_rows_have_seeds_and_noise_of_their_own():
    scores = scores_of({"clip": [0, 10, 20], "clip-n": [0, 10, 20],
                        "clip+sigmoid": [1, 9], "clip-dtc+sigmoid": [-1, 11]})
    softmax = scores.difference("A", {"clip-n": 1, "clip": -1})
    sigmoid = scores.difference("A", {"clip-dtc+sigmoid": 1, "clip+sigmoid": -1})
    assert (softmax.seeds, softmax.value, softmax.error) == (3, 0, 0)
    assert (sigmoid.seeds, sigmoid.value) == (2, 0) and sigmoid.error == pytest.approx(2.0)


def test_the_noise_of_softclip_is_no_other_systems():
    scores = scores_of({"clip": [50, 60, 70], "clip-n": [50, 60, 70], "softclip": [20, 60, 10]})
    assert scores.difference("A", {"clip-n": 1, "clip": -1}).error == 0
    softclip = scores.difference("A", {"softclip": 1, "clip": -1})
    paired = [20 - 50, 60 - 60, 10 - 70]  # its own differences alone
    assert softclip.error == pytest.approx(statistics.stdev(paired) / 3**0.5)
    assert (softclip.value, softclip.freedom) == (pytest.approx(-30), 2)


def test_as_many_seeds_as_promised_decide():
    # 12 seeds instead of 3 halve the error, so that 1 is two of it
    assert study.Difference(value=1.0, error=1.0, seeds=3, freedom=4).seeds_to_decide() == 12
    assert study.Difference(0.0, 1.0, 3, 2).seeds_to_decide() == float("inf")


@pytest.mark.parametrize("ratio,freedom,expected", [  # from tables of Student's t
    (12.706, 1, 0.05), (2.447, 6, 0.05), (2.064, 24, 0.05), (3.707, 6, 0.01), (1.960, 1e6, 0.05)])
def test_chance_is_students(ratio, freedom, expected):
    assert study.chance_beyond(ratio, freedom) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value,sign,expected", [
    (5, 1, "holds"), (1, 1, "undecided"), (-5, 1, "does not"), (-5, -1, "holds"),
    (5, -1, "does not"), (-1, 0, "holds"), (1, 0, "undecided"), (5, 0, "does not")])
def test_a_difference_counts_beyond_two_standard_errors(value, sign, expected):
    assert study.verdict(value, 1.0, sign) == expected


@pytest.mark.parametrize("verdicts,expected", [
    (["holds", "does not"], "in part"), (["holds", "undecided"], "undecided"),
    (["does not", "undecided"], "does not"), (["holds"], "holds"), ([], "not run")])
def test_a_claim_of_several_differences(verdicts, expected):
    assert study.claim_verdict(verdicts) == expected


def test_the_interval_of_a_row_is_that_of_independent_seeds():
    value, low, high, n = study.pooled([score(60, 300, half=3), score(70, 200, half=4)])
    assert (value, n) == (65, 500)
    assert (high - value, value - low) == (2.5, 2.5)  # sqrt(9 + 16) / 2


# ---------------------------------------------------------------- names


def test_claims_tables_and_plan_name_what_exists():
    assert set(study.NAMES) == set(train.SYSTEMS)
    planned = {run.row for run in study.planned_runs(study.SETS)}
    for claim in study.CLAIMS.values():
        for _, metric, sign, weights in claim:
            assert metric in study.METRICS and sign in (-1, 0, 1)
            assert set(weights) <= planned and sum(weights.values()) == 0
            assert len({row.endswith("+sigmoid") for row in weights}) == 1  # one group of seeds
    for _, metrics, _, rows in study.TABLES:
        assert set(metrics) <= set(study.METRICS) and set(rows) <= planned


def test_the_first_seeds_of_everything_come_before_the_last():
    runs = study.planned_runs(["phantom", "openi"])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len({run.name for run in runs}) == len(runs)
    seeds = Counter((run.set, run.row) for run in runs)
    assert seeds["phantom", "clip"] == 6 and seeds["openi", "clip"] == 5
    assert seeds["phantom", "clip+sigmoid"] == 3 and seeds["openi", "clip+sigmoid"] == 3
    again = study.planned_runs(["phantom", "openi"], seeds=4)
    assert {run.seed for run in again} == {0, 1, 2, 3}


def test_a_sweep_moves_one_value_and_has_its_base_once():
    runs = study.planned_runs(["phantom-sweep", "openi-sweep"])
    flags = {run.name: run.flags for run in runs}
    assert len(flags) == len(runs) and {"phantom-sweep-base", "openi-sweep-base"} < flags.keys()
    moved = flags["openi-sweep-tau-text-0.9"]
    assert moved[-4:] == ("--tau-text", "0.9", "--tau-clinical", "0.5")


# ---------------------------------------------------------------- the page


def test_the_committed_page_is_what_the_committed_record_says():
    assert study.page(read_json(study.RECORD)) == study.PAGE.read_text(encoding="utf-8")


def test_a_full_record_gives_every_table_and_verdict():
    whole = full_record()
    text = study.record_text(whole)
    assert json.loads(text) == whole and len(text.splitlines()) > len(whole["runs"])  # a line each
    page = study.page(whole)
    assert "**not run**" not in page
    # systems are one point apart in the order of NAMES, noise is 0.1: all differences count
    assert "| C10 SoftCLIP falls below CLIP | SoftCLIP +1.0 ± 0.0 | **does not** |" in page
    assert "zero-shot AUC | D_t +2.0 ± 0.1; D_t+c +3.0 ± 0.1 | **holds** |" in page
    # six seeds of 50, 53, ... 65 with intervals of 2 points: 57.5 with 2 / sqrt(6)
    assert "| CLIP | 57.5 [56.7, 58.3] |" in page
    assert "| 600 |" in page and "| 81.2, 88.3, 89.1 |" in page
    assert "differences are compared. If there were none at all," in page


def test_an_undecided_claim_says_how_many_seeds_would_decide_it():
    scores = scores_of({"clip": [50, 59, 68], study.FULL: [69, 60, 51]}, "F1")
    claim = study.CLAIMS["C7 the full method raises retrieval F1"]
    text, outcome, _ = study.judge(scores, claim)
    assert outcome == "undecided" and "seeds)" in text


def test_plain_prompts_stand_beside_ours_on_the_same_seeds():
    whole = full_record()
    for run in whole["runs"].values():
        if run["seed"] < 2:  # others were not scored with both
            run["results"][study.PLAIN] = run["results"]["test"]
    text = study.plain_table(whole)
    assert study.page(whole).count("| C1 soft labels") == 2 and text in study.page(whole)
    cells = next(line for line in text.splitlines() if "C1 " in line).split(" | ")[1:]
    assert len(cells) == 4 and cells[0] == cells[1].removesuffix(" |") != ""
    assert "C4" not in text and "A, N over" not in text  # ask no prompt
    scores = study.Scores(whole, "phantom", "test", study.PLAIN)
    assert len(scores.rows["clip"]) == 2


def test_plain_prompts_are_ours_without_the_normal_sentences(folder):
    for data, classes in (("phantom", 14), ("openi", 21)):
        run = study.Run(f"{data}-clip-0", data, "clip", 0, ())
        (folder / run.name).mkdir()
        sides = read_prompts(study.plain_prompts(run))
        assert len(sides) == classes
        assert sides["Edema"] == [
            ["Pulmonary edema.", "There is pulmonary edema.", "Pulmonary edema is seen."],
            ["No pulmonary edema.", "There is no pulmonary edema.", "No pulmonary edema is seen."]]
        assert "No acute" not in json.dumps(sides)


def test_thresholds_are_a_table_and_a_figure(tmp_path):
    whole = record({})
    for run in study.planned_runs(["phantom-sweep", "openi-sweep"]):
        swept = record({(run.row, 0): dict.fromkeys(study.METRICS, 60.0)}, "val", run.set)
        entry, = swept["runs"].values()
        entry["positives"] = {"text": 25.6, "clinical": 51.2, "graph": 2.56}
        whole["runs"][run.name] = entry
    page = study.page(whole)
    assert "| phantom | --tau-text | 0.98 | 60.0 |" in page and "| 10.0 |" in page
    assert study.PICTURE in page
    pytest.importorskip("matplotlib")
    study.draw_thresholds(whole, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000


# ---------------------------------------------------------------- data and runs


def test_no_patient_of_openis_test_rows_trains_and_validation_stays(folder):
    lines = []
    for i in range(600):
        report, normal = ("No acute disease.", 1) if i % 2 == 0 else ("The heart is enlarged.", 0)
        line = {"id": f"openi/{i}", "root": str(folder), "image": f"{i}.png",
                "patient": str(i // 2), "report": report, "labels": {"No Finding": normal}}
        if i % 3:
            line["targets"] = line["labels"]
        lines.append(json.dumps(line))
    (folder / "openi_neg.jsonl").write_text("\n".join(lines), encoding="utf-8")
    patients = {}
    for seed in range(len(study.TENTHS)):
        runs = [study.Run("-", "openi", row, seed, ()) for row in ("clip", "clip+normals")]
        for run in runs:
            study.make_data(run, None)
        (plain, test), (more, same) = map(study.data_files, runs)
        assert test == same
        for split in ("train", "val", "test"):
            patients[seed, split] = set(Manifest(test, split).patients.tolist())
        assert not patients[seed, "test"] & (patients[seed, "train"] | patients[seed, "val"])
        assert patients[seed, "test"] and patients[seed, "val"] == patients[0, "val"]
        added = Manifest(more, "train")
        assert len(added) == 2 * len(Manifest(plain, "train"))  # half is normal, there thrice
        assert set(added.patients.tolist()) == patients[seed, "train"]
    tested = [patients[seed, "test"] for seed in range(len(study.TENTHS))]
    assert len(set.union(*tested)) == sum(map(len, tested))  # no patient in two


def test_a_tiny_study_trains_evaluates_and_reports(folder, monkeypatch, capsys):
    small = ("--max-steps", "2", "--batch-size", "8", "--image-size", "32", "--width", "32")
    monkeypatch.setattr(study, "PLAN", (("phantom", "", ("clip",), 1, small),))
    monkeypatch.setattr(study, "TRAIN_STUDIES", 60)
    monkeypatch.setattr(study, "TEST_STUDIES", 60)
    words = ["--sets", "phantom", "--parallel", "1"]
    study.main(["report"])  # of nothing
    assert "## Verdicts" not in study.PAGE.read_text(encoding="utf-8")
    assert "0 runs" in capsys.readouterr().out
    with pytest.raises(UserError, match="phantom-clip-0: not trained yet"):
        study.main(["evaluate", *words])
    study.main(["train", *words])
    weights = folder / "phantom-clip-0/last.pt"
    before = weights.stat().st_mtime_ns
    study.main(["train", *words])  # is done
    assert weights.stat().st_mtime_ns == before
    study.main(["evaluate", "--split", "test", *words])
    study.main(["evaluate", "--split", "test", "--plain-prompts", *words])
    study.main(["report"])
    run = read_json(study.RECORD)["runs"]["phantom-clip-0"]
    assert "train.py --train" in run["command"] and "--max-steps 2" in run["command"]
    assert run["commit"] and run["positives"]["text"] > 0
    result = run["results"]["test"]
    assert "--prompts" in run["results"][study.PLAIN]["command"]
    assert "evaluate.py" in result["command"] and result["commit"]
    auroc = result["metrics"]["ZS AUC"]
    assert 0 < auroc["interval"][0] <= auroc["value"] <= auroc["interval"][1] < 100
    assert auroc["n"] == len(Manifest(folder / "phantom-test-0.jsonl", "test"))
    page = study.PAGE.read_text(encoding="utf-8")
    assert f"| phantom | CLIP | 1 | 1 | {run['commit']} |" in page
    assert page == study.page(read_json(study.RECORD))
    trained = folder / "results/phantom-clip-0/trained.json"
    trained.unlink()
    study.main(["train", "--missing", *words])  # study.json has it
    assert not trained.exists()


def test_wrong_use_and_failed_runs_are_one_line(folder):
    broken = study.Run("broken", "phantom", "clip", 0, ("--no-such-flag",))
    with pytest.raises(UserError, match="broken: training failed, see .*output.txt"):
        study.do_all(study.train, [broken], 1, "train")
    assert "--no-such-flag" in (folder / "results/broken/output.txt").read_text()
    with pytest.raises(UserError, match="expected --openi FOLDER"):
        study.main(["train"])
    with pytest.raises(UserError, match="data.py openi .*nowhere.*failed"):
        study.main(["train", "--sets", "openi", "--openi", str(folder / "nowhere")])
    for words in (["evaluate", "--split", "test", "--sets", "phantom-sweep"],
                  ["train", "--seeds", "10"]):
        with pytest.raises(SystemExit):
            study.parse_args(words)


def test_the_readme_has_verdicts_of_today():
    table = study.summary(read_json(study.RECORD)).splitlines()
    readme = (study.ROOT / "README.md").read_text(encoding="utf-8")
    shown = [line for line in readme.splitlines() if re.match(r"\| C\d+ ", line)]
    assert len(shown) == 4 and set(shown) <= set(table)
    for place, name in ((2, "the phantom"), (3, "OpenI")):
        holds = sum("**holds**" in row.split("|")[place] for row in table)
        assert re.search(rf"{holds}\s(hold\s)?on\s{name}", readme)
