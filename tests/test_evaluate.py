"""evaluate.py: metrics against hand-computed cases, tasks on tiny models, wrong use.

SPDX-License-Identifier: MIT
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate as ev  # noqa: E402
from data import Manifest  # noqa: E402
from model import ClinicalCLIP  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
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
            "labels": labels, "split": ("train", "val", "test")[i // 2 % 3],
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
    return write(folder, [study(i, [FINDINGS[k] for k in subsets[(i * 5 + i // 8) % 8]]) for i in range(n)])


class Seer:
    """A model that truly sees: image thirds and report words become the same axes."""

    image_size = 48

    def transform(self, image):
        return torch.from_numpy(np.array(image))

    def encode_image(self, pixels):
        thirds = pixels.float().unfold(2, 16, 16).mean((1, 3))  # (B, 3)
        return F.normalize(torch.cat([(thirds > 90).float() - 0.5, torch.full((len(pixels), 1), 0.1)], 1), dim=1)

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


def bench(path, model=None, split="all", **options):
    return ev.Bench(model or Seer(), Manifest(path, split=split), resamples=50, **options)


def value(result, name):
    return result["metrics"][name]["value"]


# ---- metrics


def test_auroc_of_hand_computed_cases_counts_ties_half():
    assert ev.auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert ev.auroc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    assert ev.auroc([1, 2, 2, 3], [0, 0, 1, 1]) == 0.875
    assert ev.auroc([3, 2, 1], [0, 0, 1]) == 0.0


def test_average_precision_of_hand_computed_cases_shares_thresholds_between_ties():
    assert ev.average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    assert ev.average_precision([1, 1, 1, 1], [0, 1, 0, 0]) == 0.25  # any order would do, so the base rate
    assert ev.average_precision([2, 2, 1], [1, 0, 1]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_one_class_is_nan_and_unknown_truth_is_left_out():
    assert np.isnan(ev.auroc([1, 2], [1, 1])) and np.isnan(ev.average_precision([1, 2], [0, 0]))
    assert np.isnan(ev.average_precision([1, 2], [1, 1]))
    assert ev.auroc([1, 9, 2], [0, np.nan, 1]) == 1.0 == ev.auroc([1, 9, 2], [0, -1, 1])


def test_metrics_match_scikit_learn_with_ties_and_weights():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10**6):
        scores, truth = rng.integers(0, levels, 200) / levels, rng.integers(0, 2, 200)
        weights = rng.integers(0, 4, (200, 3)).astype(np.float32)
        assert ev.auroc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth, scores))
        assert ev.average_precision(scores, truth) == pytest.approx(metrics.average_precision_score(truth, scores))
        both = (metrics.roc_auc_score, metrics.average_precision_score)
        for ours, theirs in zip(ev.ranking(scores, truth, weights), both, strict=True):
            expected = [theirs(truth, scores, sample_weight=weights[:, r]) for r in range(3)]
            assert ours == pytest.approx(expected, rel=1e-5)
    predicted, real = rng.integers(0, 2, (50, 14)), rng.integers(0, 2, (50, 14))
    ours = ev.label_f1(predicted, real)(np.ones((50, 1), np.float32))
    for kind in ("micro", "macro"):
        theirs = metrics.precision_recall_fscore_support(real, predicted, average=kind)
        assert [ours[f"{kind} {name}"][0] for name in ("precision", "recall", "F1")] == pytest.approx(theirs[:3], rel=1e-5)


def test_retrieval_ranks_ties_before_ones_own_text():
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.2, 0.9]])
    ranks, first = ev.retrieve(images, texts, torch.tensor([0, 1, 1]))
    assert ranks.tolist() == [1, 2, 2] and first.tolist() == [0, 0, 2]


def test_retrieval_in_chunks_equals_retrieval_in_one_piece():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (50, 30))
    own = torch.arange(50) % 30
    whole, parts = ev.retrieve(images, texts, own), ev.retrieve(images, texts, own, cells=70)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_label_f1_of_a_hand_computed_case():
    predicted, truth = np.array([[1, 0], [1, 0], [0, 0]]), np.array([[1, 0], [0, 1], [1, 0]])
    result = ev.label_f1(predicted, truth)(np.ones((3, 1), np.float32))
    assert result["micro precision"] == 1 / 2 and result["micro recall"] == pytest.approx(1 / 3)
    assert result["macro F1"] == 0.25 and result["macro recall"] == 0.25 and result["micro F1"] == pytest.approx(2 / 5)


def test_weighted_median_is_the_lower_middle():
    assert ev.median(np.array([5, 1, 3, 9]), np.ones((4, 1)))[0] == 3
    assert ev.median(np.array([5, 1, 3]), np.array([[1.0], [0], [0]]))[0] == 5


def test_bootstrap_draws_patients_and_not_images():
    patients = np.repeat(np.arange(20), 10)
    values = np.repeat(np.random.default_rng(0).random(20), 10).astype(np.float32)  # a patient's images agree
    width = {}
    for name, groups in (("patient", patients), ("image", np.arange(200))):
        low, high = ev.bootstrap(lambda w: {"mean": ev.means(values[None], w)[0]}, groups)["mean"]["interval"]
        width[name] = high - low
    assert width["patient"] > 2 * width["image"]  # the negative control is the naive interval
    for weights in ev.resample(patients, 7, 0):
        assert (weights.reshape(20, 10, -1).std(1) == 0).all() and (weights.sum(0) == 200).all()


def test_bootstrap_interval_covers_a_known_mean_and_is_fixed_by_its_seed():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(60):
        values = rng.random(100).astype(np.float32)
        first = ev.bootstrap(lambda w, v=values: {"m": ev.means(v[None], w)[0]}, np.arange(100), 200)
        low, high = first["m"]["interval"]
        inside += low <= 0.5 <= high
    assert 50 <= inside <= 60
    assert first == ev.bootstrap(lambda w: {"m": ev.means(values[None], w)[0]}, np.arange(100), 200)


def test_bootstrap_of_ten_thousand_images_takes_under_five_seconds():
    rng = np.random.default_rng(0)
    scores, truth = rng.random((10_000, 1)), (rng.random((10_000, 1)) < 0.1).astype(np.float32)
    start = time.process_time()
    result = ev.bootstrap(ev.classification(scores, truth, ["Edema"]), rng.integers(0, 5000, 10_000))
    assert time.process_time() - start < 5
    low, high = result["macro AUROC"]["interval"]
    assert low < result["macro AUROC"]["value"] < high


# ---- tasks


def test_a_model_that_sees_solves_every_task_and_a_blind_one_none(tmp_path):
    path = toy(tmp_path)
    sees, blind = bench(path), bench(path, Blind())
    assert value(ev.zero_shot(sees), "macro AUROC") == 1
    assert value(ev.zero_shot(blind), "macro AUROC") == 0.5
    for task, metric in ((ev.cxr_align, "A"), (ev.cxr_align, "B"), (ev.adversarial, "both"), (ev.normal_case, "accuracy")):
        assert value(task(sees), metric) == 1, metric
        assert value(task(blind), metric) == 0, metric  # ties are wrong
    result = ev.retrieval(sees)
    assert value(result, "micro F1") == 1 and result["candidates"] < result["n"]
    result = ev.retrieval(blind)
    assert value(result, "@10") == 0 and value(result, "mean rank") == result["candidates"]
