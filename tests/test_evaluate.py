"""evaluate.py: metrics against hand-computed cases, tasks on tiny models, wrong use.

SPDX-License-Identifier: MIT
"""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import make_hugging_face_clip
from torch.nn import functional as F

import evaluate as ev
from data import Manifest, UserError, run_main
from model import ClinicalCLIP

NORMAL_REPORT = "The lungs are clear."
FINDINGS = ("Cardiomegaly", "Edema", "Pneumothorax")


def study(i, findings, **extra):
    """A manifest row whose image and report both say `findings`; one patient has two studies."""
    report = " ".join(f"There is {name.lower()}." for name in findings) or NORMAL_REPORT
    report = report if not findings else f"{report} Study number {i}."
    labels = {name: int(name in findings) for name in FINDINGS} | {"No Finding": int(not findings)}
    negatives = [{"condition": name, "report": report.replace("There is", "There is no"),
                  "omitted": f"Study number {i}.", "labels": {}, "position": "end"}
                 for name in findings]
    return {"id": f"toy/{i}", "image": f"{i}.png", "patient": str(i // 2), "report": report,
            "labels": labels, "targets": labels, "split": ("train", "val", "test")[i // 2 % 3],
            "hard_negatives": negatives} | extra


def write(folder, rows, size=16):
    """Images whose left, middle and right third are bright where a finding is there."""
    path, rng = folder / "toy.jsonl", np.random.default_rng(0)
    for row in rows:
        pixels = rng.integers(0, 60, (size, 3 * size)).astype(np.uint8)
        for k, name in enumerate(FINDINGS):
            pixels[:, k * size:(k + 1) * size] += 150 * (row.get("labels", {}).get(name) == 1)
        Image.fromarray(pixels).save(folder / row["image"])
    path.write_text("".join(json.dumps({"root": str(folder)} | row) + "\n" for row in rows))
    return path


def toy(folder, n=36):
    subsets = [[], [0], [1], [2], [0, 1], [], [1, 2], [0, 2]]
    return write(folder, [study(i, [FINDINGS[k] for k in subsets[(i * 5 + i // 8) % 8]])
                          for i in range(n)])


class Seer:
    """A model that truly sees: image thirds and report words become the same axes."""

    image_size = 48

    def transform(self, image):
        return torch.from_numpy(np.array(image))

    def encode_image(self, pixels):
        thirds = pixels.float().unfold(2, 16, 16).mean((1, 3))  # (B, 3)
        seen = (thirds > 90).float() - 0.5
        return F.normalize(torch.cat([seen, torch.full((len(pixels), 1), 0.1)], 1), dim=1)

    def encode_text(self, texts):
        says = [[(f"{name.lower()}" in t.lower()) * (-1 if " no " in t or "not" in t.lower() else 1)
                 for name in FINDINGS] for t in texts]
        rows = torch.tensor(says, dtype=torch.float32)
        normal = (rows == 0).all(1, keepdim=True) & torch.tensor(
            [["ormal" in t and "bnormal" not in t or t == NORMAL_REPORT] for t in texts])
        rows = torch.where(normal, -torch.ones_like(rows), rows)
        return F.normalize(torch.cat([rows, 0.1 * torch.ones(len(texts), 1)], 1), dim=1)


class Blind(Seer):
    """Every image and every text is the same point: all scores tie."""

    def encode_image(self, pixels):
        return torch.ones(len(pixels), 4) / 2

    def encode_text(self, texts):
        return torch.ones(len(texts), 4) / 2


class AvoidsNegations(Blind):
    """All it knows is that "no" is in few true reports."""

    def encode_text(self, texts):
        return torch.tensor([[1.0, 1, 1, " no " not in f" {text.lower()} "] for text in texts])


def bench(path, model=None, split="all", **options):
    return ev.Bench(model or Seer(), Manifest(path, split=split), resamples=50, **options)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def value(result, name):
    return result["metrics"][name]["value"]


# ---- metrics


def pairwise(truth, scores):
    """AUROC by its definition: the share of (positive, negative) pairs in order, a tie half."""
    wins = [float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j])
            for i in np.flatnonzero(truth == 1) for j in np.flatnonzero(truth == 0)]
    return np.mean(wins)


def test_auroc_equals_its_definition_with_ties_and_repeated_rows():
    for scores, truth, area in (([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),
                                ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
                                ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
                                ([3, 2, 1], [0, 0, 1], 0),
                                ([1, 9, 2], [0, np.nan, 1], 1)):  # unknown truth is left out
        assert ev.auroc(np.array(truth), np.array(scores)) == area
    for truth in ([1, 1], [0, 0], [np.nan, np.nan]):
        assert np.isnan(ev.auroc(np.array(truth), np.array([1, 2])))
    for levels in (3, 10, 10**6):
        rng = np.random.default_rng(levels)
        scores, truth = rng.integers(0, levels, 80) / levels, rng.integers(0, 2, 80)
        rows = np.repeat(np.arange(80), rng.integers(0, 4, 80))
        for drawn in (np.arange(80), rows):
            area = ev.auroc(truth[drawn], scores[drawn])
            assert area == pytest.approx(pairwise(truth[drawn], scores[drawn]), abs=1e-12)


def test_metrics_match_scikit_learn_with_its_order_of_arguments():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10**6):
        scores, truth = rng.integers(0, levels, 200) / levels, rng.integers(0, 2, 200)
        assert ev.auroc(truth, scores) == pytest.approx(metrics.roc_auc_score(truth, scores))
        assert ev.accuracy(truth, scores > 0.5) == metrics.accuracy_score(truth, scores > 0.5)
    predicted, real = rng.integers(0, 2, (50, 14)), rng.integers(0, 2, (50, 14))
    ours = ev.precision_recall_f1(real, predicted)
    theirs = metrics.precision_recall_fscore_support(real, predicted, average="micro")[:3]
    assert [ours[f"micro {name}"] for name in ("precision", "recall", "F1")] == (
        pytest.approx(theirs))


def test_retrieval_ranks_ties_before_ones_own_text(monkeypatch):
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.2, 0.9]])
    ranks, nearest = ev.retrieve(images, texts[[0, 1, 1]], texts)
    assert ranks.tolist() == [1, 2, 2] and nearest.tolist() == [0, 0, 2]
    nearer, _ = ev.retrieve(images, texts[[0, 1, 1]], texts[2:])  # its own is not among them
    assert nearer.tolist() == [0, 0, 1]
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (50, 30))
    own = texts[torch.arange(50) % 30]
    whole = ev.retrieve(images, own, texts)
    monkeypatch.setattr(ev, "CHUNK", 7)
    for a, b in zip(whole, ev.retrieve(images, own, texts), strict=True):
        assert np.array_equal(a, b)


def test_averages_of_hand_computed_cases():
    predicted, truth = np.array([[1, 0], [1, 0], [0, 0]]), np.array([[1, 0], [0, 1], [1, 0]])
    assert ev.precision_recall_f1(truth, predicted) == pytest.approx(
        {"micro F1": 2 / 5, "micro recall": 1 / 3, "micro precision": 1 / 2})
    assert set(ev.precision_recall_f1(truth * 0, predicted * 0).values()) == {0}
    truth = np.array([[1, 0, np.nan], [0, 0, 1], [1, 0, 0]])
    scores = np.array([[1, -1, 1], [-1, 1, 1], [-1, -1, -1]])
    result = ev.classification(truth, scores, "abc", "ac")
    assert np.isnan(result.pop("AUROC b"))
    assert result == pytest.approx({"macro AUROC": 0.875, "AUROC a": 0.75, "AUROC c": 1,
                                    "macro accuracy": 5 / 6, "accuracy a": 2 / 3,
                                    "accuracy b": 2 / 3, "accuracy c": 1})


def bootstrap_mean(values, patients, *options):
    return ev.bootstrap(lambda rows: {"mean": values[rows].mean()}, patients, *options)


def test_bootstrap_draws_patients_and_not_images():
    patients = np.repeat(np.arange(20), 10)
    values = np.repeat(np.random.default_rng(0).random(20), 10)  # a patient's images agree
    width = {name: -np.subtract(*bootstrap_mean(values, groups)["mean"]["interval"])
             for name, groups in (("patient", patients), ("image", np.arange(200)))}
    assert width["patient"] > 2 * width["image"]  # the negative control is the naive interval
    drawn = []
    ev.bootstrap(lambda rows: drawn.append(rows) or {}, patients, 7)
    for rows in drawn[:7]:
        times = np.bincount(rows, minlength=200).reshape(20, 10)
        assert (times.std(1) == 0).all() and len(rows) == 200


def test_bootstrap_interval_covers_a_known_mean_and_is_fixed_by_its_seed():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(60):
        values = rng.random(100)
        first = bootstrap_mean(values, np.arange(100), 200)
        low, high = first["mean"]["interval"]
        inside += low <= 0.5 <= high
    assert 50 <= inside <= 60
    assert first == bootstrap_mean(values, np.arange(100), 200)
    assert first != bootstrap_mean(values, np.arange(100), 200, 1)


def test_a_thousand_resamples_of_25000_images_and_15_classes_take_seconds():
    rng, names = np.random.default_rng(0), "abcdefghijklmno"
    scores, truth = rng.random((25_000, 15)), (rng.random((25_000, 15)) < 0.1).astype(np.float32)
    patients, seconds = rng.integers(0, 12_000, 25_000), []
    for _ in range(3):  # the least counts: a busy machine costs every process time
        start = time.process_time()
        result = ev.bootstrap(lambda rows: ev.classification(truth[rows], scores[rows], names,
                                                             names), patients, resamples=20)
        seconds.append(time.process_time() - start)
    assert min(seconds) * 1000 / 20 < 25
    low, high = result["macro AUROC"]["interval"]
    assert low < result["macro AUROC"]["value"] < high


# ---- tasks


def test_a_model_that_sees_solves_every_task_and_a_blind_one_none(tmp_path):
    path = toy(tmp_path)
    sees, blind = bench(path), bench(path, Blind())
    for task, metric, tied in ((ev.zero_shot, "macro AUROC", 0.5), (ev.cxr_align, "A", 0.5),
                               (ev.cxr_align, "B", 0.5), (ev.adversarial, "both", 0),
                               (ev.normal_case, "accuracy", 0)):
        assert value(task(sees), metric) == 1, metric
        assert value(task(blind), metric) == tied, metric  # of two texts a tie counts one half
    result = ev.retrieval(sees)
    assert value(result, "micro F1") == 1 and result["candidates"] < result["n"]
    assert value(ev.retrieval(blind), "@5") == 0


def test_the_swapped_task_tells_reading_images_from_avoiding_negations(tmp_path):
    path = write(tmp_path, [study(i, ["Edema"] if i < 6 else []) for i in range(12)])
    for model, a, swapped in ((Seer(), 1, 1), (AvoidsNegations(), 1, 0), (Blind(), 0.5, 0.5)):
        result = ev.cxr_align(bench(path, model))
        assert value(result, "A") == a and value(result, "swapped A") == swapped
        assert result["metrics"]["swapped A"]["chance"] == 0.5


class Listening(Seer):
    """Remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def encode_text(self, texts):
        self.asked += texts
        return super().encode_text(texts)


def test_equal_reports_are_one_candidate_and_one_encoding(tmp_path):
    rows = [study(i, ["Edema"], report="One and the same.") for i in range(5)]
    rows += [study(9, ["Edema"], report="Another."), study(10, [], report="")]
    model = Listening()
    result = ev.retrieval(bench(write(tmp_path, rows), model))
    assert result["candidates"] == 2 and result["n"] == 6  # a study without a report takes no part
    assert model.asked == ["Another.", "One and the same."]


def test_embeddings_keep_the_order_of_what_was_asked(tmp_path):
    path = toy(tmp_path, 11)
    texts = ["b", "aaaa", "b", "There is edema.", ""]
    embedded = bench(path, batch_size=2).texts(texts)
    alone = torch.cat([Seer().encode_text([text]) for text in texts])
    assert torch.allclose(embedded, alone) and not torch.allclose(embedded, alone.flip(0))
    images = bench(path, batch_size=4, workers=1).images
    alone = [Seer().transform(Image.open(tmp_path / f"{i}.png"))[None] for i in range(11)]
    assert torch.allclose(images, torch.cat([Seer().encode_image(one) for one in alone]))
    model = Listening()  # is asked in one order, whatever the hash of a text
    bench(path, model).texts(["bbb", "aaa", "cc", "dd", "aaaa", "abc", "cba", "bca"])
    assert model.asked == ["cc", "dd", "aaa", "abc", "bbb", "bca", "cba", "aaaa"]


def test_labels_are_the_truth_where_there_are_no_targets(tmp_path):
    rows = [study(i, ["Edema"] * (i % 2)) for i in range(6)]
    for row in rows:
        del row["targets"]
    rows[0]["labels"] = {"Edema": -1}                  # uncertain: left out
    rows[2]["labels"] = {"Cardiomegaly": 1}            # Edema not mentioned: absent
    truth = bench(write(tmp_path, rows[:4])).columns(["Edema", "Cardiomegaly"])
    assert np.array_equal(truth, [[np.nan, 0], [1, 0], [0, 1], [1, 0]], equal_nan=True)
    rows[4] |= {"targets": {"Edema": 1}}               # targets win over labels
    mixed = bench(write(tmp_path, rows))
    assert mixed.classes == ["Edema"] and mixed.truth[4, 0] == 1


def test_rows_without_labels_are_unknown_and_never_all_absent(tmp_path):
    rows = [study(i, [FINDINGS[i % 3]] * (i % 4 > 0)) for i in range(24)]
    for i, row in enumerate(rows):
        del row["targets"]
        if i < 8:
            row |= {"labels": {}, "report": "Derrame pleural."}
        if i < 4:
            del row["labels"]
    graded = bench(write(tmp_path, rows))
    for known in (graded.truth, graded.labels):
        assert np.isnan(known[:8]).all() and not np.isnan(known[8:]).any()
    assert ev.zero_shot(graded)["n"] == 16
    others = ev.images_without(graded, [9], ["Edema"])
    assert not any(torch.equal(others[0], image) for image in graded.images[:8])
    rows = rows_of(toy(tmp_path, 120))
    tested = [row for row in rows if row["split"] == "test"]
    for row in tested[::4]:
        del row["labels"], row["targets"]
    graded = bench(write(tmp_path, rows), split="test")
    for task, metric in ((ev.zero_shot, "macro AUROC"), (ev.fine_tune, "FT100 macro AUROC")):
        result = task(graded)
        assert result["n"] == len(tested) - len(tested[::4]) and value(result, metric) > 0.95


def test_a_class_with_one_label_is_nan_and_out_of_the_mean(tmp_path):
    rows = [study(i, ["Edema"] * (i % 2)) for i in range(8)]
    result = ev.zero_shot(bench(write(tmp_path, rows)))
    assert np.isnan(value(result, "AUROC Cardiomegaly")) and value(result, "macro AUROC") == 1
    assert list(result["cells"]) == ["toy all ZS AUC, 2 classes (n=8)"]  # Edema, No Finding
    with pytest.raises(ValueError, match="no class has both positive and negative"):
        ev.zero_shot(bench(write(tmp_path, rows[1::2])))


def test_five_exclusive_classes_are_scored_as_one_choice(tmp_path):
    five = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    rows = [study(i, [five[i % 5]], targets={name: int(name == five[i % 5]) for name in five},
                  id=f"chexpert5x200/{i}") for i in range(20)]

    class Chooser(Blind):
        def encode_text(self, texts):  # only knows Edema, and likes it for every image
            return torch.tensor([[1.0, 1, 1, "edema" in text] for text in texts])

    result = ev.zero_shot(bench(write(tmp_path, rows), Chooser()))
    assert value(result, "5-way accuracy") == pytest.approx(0.2)
    head = "chexpert5x200 all ZS ACC, one of 5 classes (n=20)"
    assert result["cells"] == {head: "5-way accuracy"}


def test_every_class_name_gets_both_prompts():
    for name in (*ev.CONDITIONS, "Nodule/Mass", "Rib fracture", "Pleural_Thing"):
        positive, negative = ev.prompts(name)
        assert len(positive) > 1 and len(negative) > 1 and not set(positive) & set(negative)
        for text in positive + negative:
            assert text[0].isupper() and text[-1] == "." and "_" not in text and "{" not in text
    assert ev.prompts("Edema") == (
        ["Pulmonary edema.", "There is pulmonary edema.", "Pulmonary edema is seen."],
        ["No pulmonary edema.", "There is no pulmonary edema.", "No pulmonary edema is seen.",
         "No acute cardiopulmonary process.", "No acute intrathoracic process.",
         "No acute cardiopulmonary abnormality."])
    positive, negative = ev.prompts("No Finding")  # the mirror image of all findings
    for side, mirrored in ((0, negative), (1, positive)):
        assert mirrored == [text for name in ev.CONDITIONS[:-1] for text in ev.prompts(name)[side]]
    assert 2 * sum(text in ev.NORMAL for text in positive) == len(positive)  # as in a class


def test_an_ensemble_is_the_mean_of_its_unit_rows(tmp_path):
    graded = bench(toy(tmp_path), prompts={"Edema": [["There is edema.", "a", "a"], ["b"]]})
    positive, negative = ev.class_scores(graded, ["Edema"])
    rows = graded.texts(["There is edema.", "a"])
    mean = F.normalize((rows[0] + 2 * rows[1]) / 3, dim=0)
    assert np.allclose(positive[:, 0], graded.images @ mean, atol=1e-6)
    assert np.allclose(negative[:, 0], graded.images @ graded.texts(["b"])[0], atol=1e-6)


def test_prompts_of_a_file_take_the_place_of_ours_and_stand_in_the_result(tmp_path, capsys):
    run, path, file = save_run(tmp_path / "run"), toy(tmp_path), tmp_path / "peer.json"
    theirs = {"Edema": [["Edema"], ["No Edema", "Clear"]]}
    file.write_text(json.dumps(theirs))
    flags = [str(run), "--split", "all", "--resamples", "5", "--task", "zero-shot", "--data"]
    values = {}
    for more in ([], ["--prompts", str(file)]):
        ev.main([*flags, str(path), *more])
        name, = {file.name for file in run.glob("results-*")} - values.keys()
        result = json.loads((run / name).read_text())
        values[name] = {name: metric["value"] for name, metric in
                        result["tasks"]["zero-shot"]["metrics"].items()}
    assert list(values) == ["results-zero-shot-toy-all.json", "results-zero-shot-toy-all-peer.json"]
    assert result["prompts"]["Edema"] == theirs["Edema"] and result["model"] == "run-peer"
    for name in ("Cardiomegaly", "No Finding"):
        assert result["prompts"][name] == list(ev.prompts(name))
    ours, theirs = values.values()
    assert {name for name in ours if ours[name] != theirs[name] and "macro" not in name} <= {
        "AUROC Edema", "accuracy Edema"}
    assert capsys.readouterr().out.count("\nwrote ") == 2


def test_centred_scores_see_what_a_shift_of_the_whole_image_hides(tmp_path):
    class Shifted(Seer):
        """Scores every finding of every image as present, the present ones more."""

        def encode_image(self, pixels):
            return F.normalize(super().encode_image(pixels) + torch.tensor([0.6, 0.6, 0.6, 0]))

        def encode_text(self, texts):
            return super().encode_text(texts) * torch.tensor([1, 1, 1, 0])

    path = toy(tmp_path)
    result = ev.adversarial(bench(path, Shifted(), prompts={
        name: [[f"There is {name.lower()}."], ["Nothing."]] for name in FINDINGS}))
    assert list(result["cells"].values()) == ["both", "centred"]
    assert value(result, "both") == 0 and value(result, "centred") == 1
    blind = ev.adversarial(bench(path, Blind()))
    assert value(blind, "centred") == 0 == blind["metrics"]["centred"]["chance"]  # all are ties


def test_the_chance_of_centred_is_that_of_shuffled_scores():
    rng = np.random.default_rng(0)
    scores, scored = rng.normal(size=(4, 6)), rng.random((4, 6)) < 0.8
    scored[:, :3] = True
    scored[3, 2:] = False  # two findings: not reported
    centred, chance = ev.centre(scores, scored)
    assert np.isnan(centred[3]).all() and np.allclose(np.nansum(centred[:3], 1), 0)
    for i in range(3):
        known, wins = centred[i][scored[i]], 0
        for _ in range(20_000):
            first, second = rng.permutation(known)[:2]
            wins += (first > 0) and (second < 0)
        assert wins / 20_000 == pytest.approx(chance[i], abs=0.02)


def test_adversarial_takes_given_pairs_and_draws_the_same_for_a_subset(tmp_path):
    rows = rows_of(toy(tmp_path))
    drawn = []
    for subset in (rows, rows[::3]):
        graded = bench(write(tmp_path, subset))
        assert value(ev.adversarial(graded), "both") == 1
        drawn.append({graded.ids[row]: pair for row, *pair in ev.draw_pairs(graded)})
    assert len(drawn[0]) > len(drawn[1]) > 5 and drawn[1].items() <= drawn[0].items()
    rows[3]["adversarial"] = [["Pneumothorax", "Edema"], ["Edema", "Pneumothorax"]]
    rows[4]["adversarial"] = [["Edema", "Cardiomegaly"]]
    result = ev.adversarial(bench(write(tmp_path, rows)))
    assert result["n"] == 3 and result["pairs"] == "of ProbMed"
    assert result["metrics"]["both"]["chance"] == 0.25
    for row in rows:
        row["targets"] = {"Edema": 1, "Cardiomegaly": 0}
        row.pop("adversarial", None)
    result = ev.adversarial(bench(write(tmp_path, rows)))  # under three findings
    assert np.isnan(value(result, "centred")) and result["n_centred"] == 0


def test_normal_case_hides_a_report_among_a_pool_of_abnormal_ones(tmp_path):
    path = toy(tmp_path)
    result = ev.normal_case(bench(path, pool=7))
    assert result["pool"] == 7 and result["metrics"]["accuracy"]["chance"] == 1 / 8
    assert list(result["cells"]) == ["toy all NCD ACC, pool 7 (n=8)"]
    rows = [study(0, []), study(1, ["Edema"]), study(2, ["Edema"], report=NORMAL_REPORT)]
    assert ev.normal_case(bench(write(tmp_path, rows)))["pool"] == 1  # a normal text is no decoy
    for some, options, found in ((rows, {"pool": 1000}, "1 and 1"), (rows[1:], {}, "0 and 2"),
                                 ([row | {"targets": {"Edema": 1}} for row in rows], {}, "0 and")):
        with pytest.raises(ValueError, match=f'"No Finding" in "targets", .* found {found}'):
            ev.normal_case(bench(write(tmp_path, some), **options))


def test_cxr_align_reads_the_first_negative_and_leaves_out_empty_remainders(tmp_path):
    rows = [study(i, ["Edema", "Cardiomegaly"][: 1 + i % 2]) for i in range(4)]
    rows[0]["hard_negatives"][0]["omitted"] = " "
    rows[1]["hard_negatives"][0]["report"] = rows[1]["report"]  # a negation that changes nothing
    result = ev.cxr_align(bench(write(tmp_path, rows)))
    assert (result["n"], result["n_B"]) == (4, 3)
    assert value(result, "A") == 0.875  # a tie counts one half
    assert list(result["cells"]) == ["toy all A (n=4)", "toy all swapped A (n=0)",
                                     "toy all B (n=3)"]
    for row in rows:
        del row["hard_negatives"]
    with pytest.raises(ValueError, match="negations.py IN.jsonl --out"):
        ev.cxr_align(bench(write(tmp_path, rows)))


# ---- fine-tuning


def test_a_linear_probe_learns_what_the_embedding_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "FRACTIONS", (0.2, 1.0))
    path = toy(tmp_path, 120)
    result, again = (ev.fine_tune(bench(path, split="test")) for _ in range(2))
    np.testing.assert_equal(result, again)
    assert value(result, "FT100 macro AUROC") == 1
    assert list(result["cells"].values()) == ["FT20 macro AUROC", "FT100 macro AUROC"]
    assert result["train"]["0.2"] < result["train"]["1.0"]
    blind = ev.fine_tune(bench(path, Blind(), split="test"))
    assert value(blind, "FT100 macro AUROC") == 0.5  # the negative control
    assert list(blind["cells"]) == ["toy test FT20 AUC, 3 classes (n=40)",
                                    "toy test FT100 AUC, 3 classes (n=40)"]


def test_fractions_of_patients_are_nested():
    patients = np.repeat(np.arange(60), 2)
    few, more, whole = (set(ev.rows_of_share(patients, share, 0)) for share in (0.3, 0.6, 1))
    assert few < more < whole == set(range(120)) and len(few) == 36
    assert all(row ^ 1 in few for row in few)  # whole patients


def test_fine_tuning_says_which_split_is_missing(tmp_path):
    rows = rows_of(toy(tmp_path, 60))
    for row in rows:
        row["split"] = row["split"].replace("val", "train")
    with pytest.raises(ValueError, match="split val.: no studies"):
        ev.fine_tune(bench(write(tmp_path, rows), split="test"))
    for row in rows:
        if row["id"] in ("toy/2", "toy/3"):
            row["split"] = "val"
            del row["labels"], row["targets"]
    with pytest.raises(ValueError, match="split val.: fine-tune needs rows whose classes"):
        ev.fine_tune(bench(write(tmp_path, rows), split="test"))



# ---- models, ranks, files


def test_a_hugging_face_clip_folder_is_measured_by_the_same_code(tmp_path, capsys):
    folder, out = make_hugging_face_clip(tmp_path / "clip"), tmp_path / "out.json"
    words = [str(folder), "--data", str(toy(tmp_path)), "--split", "all", "--workers", "0"]
    ev.main([*words, "--resamples", "20", "--out", str(out)])
    result = json.loads(out.read_text())
    assert set(result["tasks"]) == set(ev.TASKS) and result["model"] == "clip"
    ev.main([*words, "--resamples", "1", "--task", "retrieval"])
    assert capsys.readouterr().out.endswith("not saved; give --out\n")
    assert not list(folder.glob("results*"))  # somebody else's folder is left alone


PEERS_ENVIRONMENT = """\
import importlib.metadata
import sys

ABSENT = ("transformers", "torchvision", "safetensors")
sys.modules.update(dict.fromkeys(ABSENT))  # an import of None fails
real = importlib.metadata.version
importlib.metadata.version = lambda name: real("no such" if name in ABSENT else name)
import evaluate

evaluate.run_main(evaluate.main)
"""
ADAPTER = """\
import torch
from peers_code import WIDTH

class Model:
    image_size = (16, 48)
    transform = staticmethod(lambda image: torch.tensor(image.size))
    encode_image = encode_text = staticmethod(lambda batch: torch.ones(len(batch), WIDTH))

def load():
    return Model()
"""


def test_a_python_file_with_load_is_a_model_in_its_own_environment(tmp_path):
    out, adapter = tmp_path / "out.json", tmp_path / "peer" / "adapter.py"
    adapter.parent.mkdir()
    adapter.with_name("peers_code.py").write_text("WIDTH = 4\n")
    adapter.write_text(ADAPTER)
    command = [sys.executable, "-c", PEERS_ENVIRONMENT, str(adapter), "--data",
               str(toy(tmp_path)), "--split", "all", "--resamples", "5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert value(result["tasks"]["zero-shot"], "macro AUROC") == 0.5
    assert result["model"] == "adapter.py" and set(result["tasks"]) >= {"retrieval", "cxr-align"}
    assert set(result["versions"]) == {"python", "torch", "numpy", "pillow"}


def save_run(folder):
    torch.manual_seed(0)
    model = ClinicalCLIP("tiny", "tiny", width=16, image_size=32)
    folder.mkdir()
    torch.save({"model": model.state_dict(), "model_config": model.config}, folder / "best.pt")
    return folder


def test_under_torchrun_rank_0_evaluates_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    ev.main(["no run", "--data", "no file"])  # nothing is looked at, and nothing fails


def test_a_result_says_how_it_was_made_and_tells_no_report(tmp_path, capsys):
    run, path = save_run(tmp_path / "run"), toy(tmp_path)
    ev.main([str(run), "--data", str(path), "--split", "all", "--resamples", "20", "--workers", "0",
             "--seed", "3"])
    text = (run / "results-all-toy-all.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads(text, parse_constant=refuse)
    assert {"command", "versions", "git", "seed", "resamples", "split", "notes", "run", "model",
            "set"} <= set(result)
    assert result["seed"] == 3 and "Edema" in result["prompts"]
    for entry in result["tasks"].values():
        assert entry["n"] > 0 and entry["patients"] > 0 and entry["cells"]
        assert all(set(metric) == {"value", "interval", "chance"}
                   for metric in entry["metrics"].values())
    printed = capsys.readouterr().out
    for secret in ("Study number", NORMAL_REPORT, "toy/1", "1.png"):
        assert secret not in text and secret not in printed
    assert "| cxr-align | toy all A (n=" in printed and "\n| Edema | " in printed
    for task in result["tasks"]:  # a line says what its columns are
        assert printed.count(f"| {task} |") == 1 and ev.TASKS[task].__doc__[:60] in printed


def test_compare_prints_one_table_of_many_models(tmp_path, capsys):
    for name, number, n in (("first", 0.5, 40), ("second", 0.75, 40), ("third", None, 41)):
        metrics = {"A": {"value": number, "interval": [0.4, 0.8], "chance": 0.5},
                   "B": {"value": 0.25, "interval": [0.2, None], "chance": None}}
        cells = {f"toy A (n={n})": "A", "toy B": "B"}
        tasks = {"cxr-align": {"cells": cells, "metrics": metrics, "classes": ["Edema"]}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"model": name, "tasks": tasks}))
    paths = [str(tmp_path / f"{name}.json") for name in ("first", "second", "third")]
    ev.main(["--compare", *paths])
    assert capsys.readouterr().out.splitlines()[2:-1] == [
        "| cxr-align | toy A (n=40) | toy B | toy A (n=41) |",
        "| --- | --- | --- | --- |",
        "| first | 50.0 [40.0, 80.0] | 25.0 [20.0, -] | - |",
        "| second | 75.0 [40.0, 80.0] | 25.0 [20.0, -] | - |",
        "| third | - | 25.0 [20.0, -] | - |",
        "| chance | 50.0 | - | 50.0 |"]


def test_figures_are_drawn_and_show_reports_only_when_asked(tmp_path):
    pytest.importorskip("matplotlib")
    run, path, figures = save_run(tmp_path / "run"), toy(tmp_path), tmp_path / "figures"
    flags = [str(run), "--data", str(path), "--split", "all", "--resamples", "20", "--workers", "0",
             "--figures", str(figures)]
    log = [{"argv": ["train.py"]}, {"step": 1, "loss": 9.0, "positives_text": 2.0},
           {"step": 2, "loss": None, "positives_text": 3.0},
           {"step": 2, "val": {"auroc": 0.6, "retrieval@5": None}}]
    taus = {"tau_text": 0.9, "tau_clinical": 0.5, "tau_graph": 0.9}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (run / "config.json").write_text(json.dumps({"flags": taus}))
    ev.main([*flags, "--task", "zero-shot"])
    assert {file.stem for file in figures.iterdir()} == {"images", "roc", "soft-labels", "curves"}
    ev.main([*flags, "--task", "retrieval", "--show-reports"])
    drawn = {file.stem for file in figures.iterdir()}
    assert drawn == {"images", "roc", "soft-labels", "curves", "retrieval", "method"}
    for name in drawn:
        pixels = np.array(Image.open(figures / f"{name}.png").convert("RGB"))
        assert pixels.shape[0] > 200 and 0.005 < (pixels.min(2) < 250).mean() < 0.9


def test_changed_sentences_are_marked():
    assert ev.mark("Clear lungs. No edema.", "No edema. There is no mass. Clear lungs.") == (
        "No edema. [There is no mass.] Clear lungs.")


def test_pictures_without_matplotlib_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--figures: expected matplotlib to be installed"):
        ev.main(["no run", "--data", "no file", "--figures", str(tmp_path / "figures")])


def test_bars_are_there_from_the_first_study_and_tables_as_soon_as_measured(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    ev.run_tasks(bench(toy(tmp_path)), "all", "seer")
    seen = screen.getvalue()
    places = [seen.index(text) for text in (
        "studies:   0%", "images:   0%", "resamples:   0%", "| zero-shot |", "| retrieval |")]
    assert places == sorted(places) and seen.rindex("texts:") > places[3]


def test_validate_gives_numbers_or_none(tmp_path):
    path = toy(tmp_path)
    assert ev.validate(Seer(), Manifest(path))["auroc"] == 1
    rows = [study(i, ["Edema"], report="") for i in range(3)]
    assert set(ev.validate(Seer(), Manifest(write(tmp_path, rows))).values()) == {None}


# ---- wrong use


def test_wrong_use_is_one_line_that_says_what_is_missing(tmp_path):
    path = toy(tmp_path, 8)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"toy.jsonl:2: .*check` lists all such rows") as error:
        bench(path, workers=1).images  # noqa: B018
    assert "\n" not in str(error.value) and "1.png" not in str(error.value)
    with pytest.raises(ValueError, match="skipped [^;]*: .*toy.jsonl:2"):  # one reason for all
        ev.main([str(save_run(tmp_path / "run")), "--data", str(path), "--split", "all"])
    with pytest.raises(ValueError, match="toy.jsonl:2"):
        ev.validate(Seer(), Manifest(path))
    rows = [study(i, ["Edema"]) | {"split": "train"} for i in range(3)]
    with pytest.raises(ValueError, match="no studies; choose another --split"):
        bench(write(tmp_path, rows), split="test")
    with pytest.raises(ValueError, match="two different"):
        ev.retrieval(bench(write(tmp_path, [study(1, [])])))

    class Broken(Seer):
        def encode_image(self, pixels):
            return torch.full((len(pixels), 4), float("nan"))

    with pytest.raises(ValueError, match="NaN or infinite"):
        bench(write(tmp_path, rows), Broken()).images  # noqa: B018


def test_the_command_ends_with_status_2_and_one_line(tmp_path, capsys):
    rows = [study(i, ["Edema"], hard_negatives=[]) for i in range(4)]
    words = [str(save_run(tmp_path / "run")), "--data", str(write(tmp_path, rows)), "--task",
             "cxr-align", "--split", "all"]
    for extra, said in (([], "hard_negatives"), (["--resamples", "1000000"], "below 100001")):
        with pytest.raises(SystemExit) as status:
            run_main(lambda words=words + extra: ev.main(words))
        error = capsys.readouterr().err.splitlines()
        assert status.value.code == 2 and said in error[-1] and (extra or len(error) == 1)


def test_intervals_are_over_patients_and_ids_that_may_name_them_name_no_set(tmp_path):
    rows = [study(i, ["Edema"] * (i % 2)) for i in range(12)]
    assert ev.zero_shot(bench(write(tmp_path, rows)))["patients"] == 6
    for row in rows:
        del row["patient"]  # then each study is a patient
    assert ev.zero_shot(bench(write(tmp_path, rows)))["patients"] == 12
    for ids, name in (("rsna/{}", "rsna"), ("7734000{}", "toy"), ("7734000{}/1", "toy"),
                      ("77340001/{}", "toy")):
        rows = [study(i, [], id=ids.format(i)) for i in range(2)]
        assert bench(write(tmp_path, rows)).set == name


def test_reports_without_labels_are_read_by_rule_for_swapped_a_and_f1(tmp_path):
    path = write(tmp_path, [study(i, ["Edema"] if i < 4 else []) for i in range(8)])
    labelled, rows = bench(path), rows_of(path)
    wanted = value(ev.cxr_align(labelled), "swapped A"), value(ev.retrieval(labelled), "micro F1")
    for row in rows:  # as of CXR-Align
        del row["labels"], row["targets"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks, notes = ev.run_tasks(bench(path), "all", "seer")
    assert set(tasks) == {"retrieval", "cxr-align"} and wanted[0] == 1
    assert (value(tasks["cxr-align"], "swapped A"), value(tasks["retrieval"], "micro F1")) == wanted
    assert len(notes) == 4 and notes[0].startswith("skipped zero-shot: ")


def test_a_wrong_file_is_one_line_and_a_bug_of_a_python_model_is_none(tmp_path):
    run, damaged = save_run(tmp_path / "run"), save_run(tmp_path / "damaged")
    (damaged / "best.pt").write_bytes(b"no checkpoint")
    file, data = tmp_path / "peer.py", ["--data", str(toy(tmp_path, 8)), "--split", "all"]
    for words, said, contents in (
            ([str(damaged), *data], "best.pt", [""]),
            ([str(tmp_path / "none.py"), *data], "none.py: expected a Python file", [""]),
            ([str(file), *data], "peer.py: expected a function load", ["name = 'no model'"]),
            (["--compare", str(file)], "peer.py.*: expected", ["", "[]", "{", "{}"]),
            ([str(run), *data, "--prompts", str(file)], "peer.py.*: expected|Gout: expected a", [
                "[]", "{", '{"Edema": "x"}', '{"Edema": [["x"]]}', '{"Edema": [["x"], []]}',
                '{"Edema": [["x"], "y"]}', '{"Edema": [["x"], [3]]}', '{"Gout": [["x"], ["y"]]}'])):
        for content in contents:
            file.write_text(content)
            with pytest.raises(UserError, match=said) as caught:
                ev.main(words)
            assert "\n" not in str(caught.value)
    for bug, error, said in (("{}['no such key']", KeyError, "no such key"),
                             ("'no model'", AttributeError, "encode_text")):
        file.write_text(f"def load():\n    return {bug}")
        with pytest.raises(error, match=said):
            ev.main([str(file), *data])
