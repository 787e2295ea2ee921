"""loss.py against literal evaluations, softmax (Eq. 1-10) and sigmoid, on one rank and on several.

SPDX-License-Identifier: MIT
"""

import itertools
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

import loss as loss_module
from loss import (
    DynamicSoftContrastiveLoss,
    SigmoidSoftContrastiveLoss,
    SoftCLIPLoss,
    soft_labels,
)

mp.get_context("forkserver").set_forkserver_preload(["torch._dynamo"])  # as DDP imports it
BOTH = list(itertools.product([True, False], repeat=2))
SETTINGS = {"w_text": 1.0, "w_clinical": 0.7, "w_graph": 1.3,
            "tau_text": 0.3, "tau_clinical": 0.5, "tau_graph": 0.2}


def unit(B, D, generator, dtype=torch.float64):
    return F.normalize(torch.randn(B, D, generator=generator, dtype=dtype), dim=1)


def make_batch(B, negatives=True, graphs=True, dtype=torch.float64, seed=0, D=8):
    """Random unit rows with a duplicated report and, from B = 5, rows without labels."""
    g = torch.Generator().manual_seed(seed)
    batch = {"image": unit(B, D, g), "text": unit(B, D, g),
             "labels": (torch.rand(B, 14, generator=g, dtype=torch.float64) < 0.2).double()}
    if negatives:
        batch |= {"hard_text": unit(B, D, g), "hard_labels": batch["labels"].roll(1, 1).clone()}
    if graphs:
        batch["graph"] = unit(B, D, g)
        if negatives:
            batch["hard_graph"] = unit(B, D, g)
    if B >= 5:
        batch["text"][3] = batch["text"][1]
        batch["labels"][:2] = 0
    # Away from the threshold's kink, as similarities of real reports are.
    batch["text"] = F.normalize(batch["text"] + 0.5 * batch["text"].mean(0), dim=1)
    return {k: v.to(dtype).requires_grad_(not k.endswith("labels")) for k, v in batch.items()}


def literal_inputs(batch, weights, thresholds, soft):
    """v, T = [T1; T2], G = [G1; G2] by name, and (w_k, tau_k, rows) of each stream, in float64."""
    x = {}
    for name in ("image", "text", "labels", "graph"):
        if name in batch:
            x[name] = batch[name].double()
        if f"hard_{name}" in batch:
            x[name] = torch.cat([x[name], batch[f"hard_{name}"].double()])
    C = torch.stack([c / c.norm() if c.norm() > 0 else c for c in x.pop("labels")])
    streams = list(zip(weights, thresholds, (x["text"], C, x.get("graph")), strict=True))
    if "graph" not in x:
        streams.pop()
    if not soft:
        streams = [(1.0, 2.0, x["text"])]  # no similarity is above 2: one-hot
    return x, streams


def literal_loss(batch, scale, w_text, w_clinical, w_graph, tau_text, tau_clinical, tau_graph,
                 soft=True):
    """Eq. 1-10 written out entry by entry, in float64."""
    modalities, streams = literal_inputs(batch, (w_text, w_clinical, w_graph),
                                         (tau_text, tau_clinical, tau_graph), soft)
    B = len(batch["image"])
    total = 0.0
    for a, b in itertools.permutations(modalities, 2):
        A, Z = modalities[a], modalities[b]
        if b == "image":
            A = A[:B]  # "we use T1 and G1 instead of T and G when compared with I"
        for w, tau, X in streams:
            L = 0.0
            for i in range(len(A)):
                logits = torch.stack([scale * sum(A[i] * z) for z in Z])
                log_p = logits.log_softmax(0)                               # Eq. 1, Eq. 2
                y = []
                for j in range(len(Z)):
                    S = float(sum(X[i] * X[j]).detach())                    # Eq. 3, Eq. 8
                    value = 0.0
                    if S > tau:
                        value = (S - tau) / (1 - tau)                       # Eq. 4, Eq. 5, Eq. 9
                    if i == j:
                        value = 1.0                                         # ASSUMPTION
                    y.append(value)
                for j in range(len(Z)):
                    y_hat = y[j] / sum(y)  # rows sum to 1
                    if y_hat > 0:
                        L = L + y_hat * (math.log(y_hat) - log_p[j])        # Eq. 6, Eq. 7
            total = total + w * L / len(A)                                  # Eq. 10
    return total


def literal_sigmoid_loss(batch, scale, bias, w_text, w_clinical, w_graph, tau_text, tau_clinical,
                         tau_graph, soft=True):
    """The sigmoid loss entry by entry, in float64."""
    x, streams = literal_inputs(batch, (w_text, w_clinical, w_graph),
                                (tau_text, tau_clinical, tau_graph), soft)
    total = 0.0
    for a, b in itertools.combinations(x, 2):  # image_text, image_graph, text_graph
        for i, j in itertools.product(range(len(x[a])), range(len(x[b]))):
            logit = scale * sum(x[a][i] * x[b][j]) + bias
            for w, tau, X in streams:
                S = float(sum(X[i] * X[j]).detach())                        # Eq. 3, Eq. 8
                y = 0.0
                if S > tau:
                    y = min((S - tau) / (1 - tau), 1.0)                     # Eq. 4, Eq. 5, Eq. 9
                if i == j:
                    y = 1.0
                L = sum(p * math.log(p) for p in (y, 1 - y) if p > 0)
                L = L - y * F.logsigmoid(logit) - (1 - y) * F.logsigmoid(-logit)
                total = total + w * L / len(x[a])
    return total


FRAMEWORKS = {  # the loss, its literal form, logit_scale and for sigmoid logit_bias
    "softmax": (DynamicSoftContrastiveLoss, literal_loss, (7.0,)),
    "sigmoid": (SigmoidSoftContrastiveLoss, literal_sigmoid_loss, (5.0, -2.0)),
}


def leaf(x, dtype=torch.float64):
    return torch.as_tensor(x, dtype=dtype).detach().clone().requires_grad_()


def value_and_gradients(criterion, batch, *scalars):
    leaves = [v for v in batch.values() if v.requires_grad] + list(scalars)
    others = {k: v for k, v in batch.items() if k.startswith("hard") or "graph" in k}
    out = criterion(batch["image"], batch["text"], batch["labels"], *scalars, **others)
    return out, torch.autograd.grad(out["loss"], leaves)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("negatives,graphs", BOTH)
@pytest.mark.parametrize("B", [1, 5])
def test_loss_and_gradients_equal_the_literal_equations(B, negatives, graphs, soft, framework):
    """Also by chunks of rows, term by term, and in single precision."""
    kind, literal, numbers = FRAMEWORKS[framework]
    batch, scalars = make_batch(B, negatives, graphs), [leaf(x) for x in numbers]
    leaves = [v for v in batch.values() if v.requires_grad] + scalars
    expected = literal(batch, *scalars, **SETTINGS, soft=soft)
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
    plain = {}
    for dtype, row_chunk in ((torch.float64, None), (torch.float64, 1), (torch.float64, 3),
                             (torch.float64, 5), (torch.float64, 100), (torch.float32, None)):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        cast = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in batch.items()}
        criterion = kind(**SETTINGS, soft=soft, row_chunk=row_chunk)
        out, grads = value_and_gradients(criterion, cast, *(leaf(x, dtype) for x in scalars))
        assert out["loss"].dtype == dtype
        assert out["loss"].item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
        values = {name: x.item() for name, x in out.items()}
        plain = plain or values
        assert values == pytest.approx(plain, rel=tolerance, abs=tolerance)
        for grad, literal_grad in zip(grads, wanted, strict=True):
            if literal_grad is None:
                literal_grad = torch.zeros_like(grad)
            assert relative(grad, literal_grad) < 10 * tolerance


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("change", [
    {"w_text": 0.0}, {"w_clinical": 0.0}, {"w_graph": 0.0}, {"w_text": 3.5}, {"w_clinical": 3.5},
    {"tau_text": 0.98}, {"tau_text": 0.0, "tau_clinical": 0.0, "tau_graph": 0.0},
    {"tau_text": 0.98, "tau_clinical": 0.98, "tau_graph": 0.98},
])
def test_any_weight_and_threshold_equals_the_literal_equations(change, framework):
    kind, literal, _ = FRAMEWORKS[framework]
    batch, scalars = make_batch(7, seed=1), [leaf(3.0)]
    if framework == "sigmoid":
        scalars.append(leaf(0.5))
    out, grads = value_and_gradients(kind(**SETTINGS | change), batch, *scalars)
    expected = literal(batch, *scalars, **SETTINGS | change)
    leaves = [v for v in batch.values() if v.requires_grad] + scalars
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        assert relative(grad, wanted) < 1e-9


def test_streams_without_weight_leave_nothing_but_their_positives():
    batch = {k: x.detach() for k, x in make_batch(5).items()}
    softmax = DynamicSoftContrastiveLoss(0.0, 0.0, 0.0)(**batch, logit_scale=3.0)
    sigmoid = SigmoidSoftContrastiveLoss(0.0, 0.0, 0.0)(**batch, logit_scale=3.0, logit_bias=0.5)
    for out in (softmax, sigmoid):
        assert out["loss"].item() == 0 and out["positives_text"] > 1


def test_one_hot_targets_reduce_to_clip_and_siglip():
    # The same limit from the soft side: distinct rows and a threshold above every similarity.
    distinct = DynamicSoftContrastiveLoss(1.0, 0.0, 0.0, tau_text=0.9999)
    for criterion, B in ((DynamicSoftContrastiveLoss(soft=False), 16), (distinct, 4)):
        batch, own = make_batch(B, negatives=False, graphs=False), torch.arange(B)
        out = criterion(**batch, logit_scale=10.0)
        logits = 10.0 * batch["image"] @ batch["text"].T
        info_nce = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        assert out["loss"].item() == pytest.approx(info_nce.item(), rel=1e-12)
        assert float(out["positives_text"]) == pytest.approx(1.0)
    out = SigmoidSoftContrastiveLoss(soft=False)(**batch, logit_scale=5.0, logit_bias=-2.0)
    z = 5.0 * batch["image"] @ batch["text"].T - 2.0
    siglip = -F.logsigmoid((2 * torch.eye(B) - 1) * z).sum() / B
    assert out["loss"].item() == pytest.approx(siglip.item(), rel=1e-12)


def test_equation_4_by_hand():
    s = torch.tensor([[1.0, 0.9, 0.7], [0.9, 1.0, 0.8], [0.7, 0.8, 1.0]])
    # tau = 0.8: 0.9 becomes 0.5, 0.8 is not above the threshold; then rows are divided by sums.
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 0], [0, 0, 1.0]])
    assert torch.allclose(soft_labels(s, 0.8), expected, atol=1e-6)
    assert torch.allclose(soft_labels(s, 0.0).sum(1), torch.ones(3))
    some = soft_labels(s[1:], 0.8, torch.tensor([1, 2]))  # rows of the whole
    assert torch.equal(some, soft_labels(s, 0.8)[1:])
    c = torch.zeros(3, 14, requires_grad=True)  # rows without labels keep their diagonal
    y = soft_labels(c @ c.T, 0.5)
    assert torch.equal(y, torch.eye(3)) and not y.requires_grad
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\), got 1.0"):
        soft_labels(torch.eye(3), 1.0)


@pytest.mark.parametrize("framework,pairs", [
    ("softmax", {f"{a}_{b}" for a, b in itertools.permutations(("image", "text", "graph"), 2)}),
    ("sigmoid", {"image_text", "image_graph", "text_graph"}),
])
def test_terms_add_up_to_the_loss_and_positives_are_effective_numbers(framework, pairs):
    kind, _, numbers = FRAMEWORKS[framework]
    batch = make_batch(16)
    with torch.no_grad():
        batch["text"][:] = batch["hard_text"][:] = batch["text"][0]  # all reports the same
    out, _ = value_and_gradients(kind(**SETTINGS), batch, *map(leaf, numbers))
    streams = {"positives_text", "positives_clinical", "positives_graph"}
    assert set(out) == {"loss", *pairs, *streams}
    assert sum(out[p].item() for p in pairs) == pytest.approx(out["loss"].item())
    assert float(out["positives_text"]) == pytest.approx(32)
    assert not any(v.requires_grad for k, v in out.items() if k != "loss")
    hard, _ = value_and_gradients(kind(soft=False), batch, *map(leaf, numbers))
    assert {float(hard[k]) for k in streams} == {1.0}


@pytest.mark.parametrize("row_chunk", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_compared_in_float32(dtype, row_chunk):
    batch, scale = make_batch(16, dtype=torch.float32, D=64), leaf(14.0, torch.float32)
    half = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in batch.items()}
    criterion = DynamicSoftContrastiveLoss(**SETTINGS, row_chunk=row_chunk)
    full, wanted = value_and_gradients(criterion, batch, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = value_and_gradients(criterion, half, scale)
    assert out["loss"].dtype == torch.float32
    assert out["loss"].item() == pytest.approx(full["loss"].item(), rel=1e-2)
    assert all(relative(a, b) < 0.1 for a, b in zip(grads, wanted, strict=True))


def test_the_loss_works_where_torch_has_no_distributed_package(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    for name in ("is_initialized", "get_rank", "get_world_size", "all_gather", "all_reduce"):
        monkeypatch.delattr(dist, name)
    x = torch.eye(4)
    assert DynamicSoftContrastiveLoss()(x, x, x, 10.0)["loss"].isfinite()
    assert SigmoidSoftContrastiveLoss()(x, x, x, 10.0, -2.0)["loss"].isfinite()


@pytest.mark.parametrize("criterion", [DynamicSoftContrastiveLoss(), SoftCLIPLoss()])
def test_identical_and_opposite_unit_rows_never_give_nan(criterion):
    row = F.normalize(torch.ones(1, 8), dim=1)
    for sign in (1.0, -1.0):
        x = torch.cat([row, row, sign * row, row]).requires_grad_()
        out = criterion(x, x, torch.zeros(4, 14), 100.0, hard_text=-x,
                        hard_labels=torch.ones(4, 14), graph=x, hard_graph=x)
        assert out["loss"].isfinite()
        assert torch.autograd.grad(out["loss"], x)[0].isfinite().all()


def test_rows_normalised_in_half_precision_still_share_labels_with_their_duplicates():
    text = F.normalize(torch.randn(64, 512).repeat(2, 1).bfloat16(), dim=1)  # 64 reports, twice
    assert float((text.float().norm(dim=1) - 1).abs().max()) > 1e-4  # what would tilt Eq. 4
    out = DynamicSoftContrastiveLoss()(text, text, torch.zeros(128, 14), 10.0)
    assert out["positives_text"].item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["image", "text", "graph"])
@pytest.mark.parametrize("soft", [True, False])
def test_rows_that_overflow_give_a_loss_that_is_not_finite_and_no_error(name, value, soft):
    rows = {k: torch.randn(4, 8) for k in ("image", "text", "graph")}
    rows[name][2] = value  # 1e30 is finite, its length is not: F.normalize makes zeros of it
    rows = {k: F.normalize(x, dim=1) for k, x in rows.items()}
    criterion = DynamicSoftContrastiveLoss(soft=soft)
    assert not criterion(**rows, labels=torch.zeros(4, 14), logit_scale=10.0)["loss"].isfinite()
    rows["image"][1] = float("inf")
    assert not criterion(**rows, labels=torch.zeros(4, 14), logit_scale=10.0)["loss"].isfinite()


def test_softclip_targets_are_the_softmax_of_text_similarities():
    batch, scale = make_batch(5, negatives=False, graphs=False), 4.0
    out = SoftCLIPLoss()(batch["image"], batch["text"], batch["labels"], scale)
    y = (scale * batch["text"] @ batch["text"].T).softmax(1)
    logits = scale * batch["image"] @ batch["text"].T
    expected = sum(F.kl_div(z.log_softmax(1), y, reduction="batchmean")
                   for z in (logits, logits.T))
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_sigmoid_loss_is_0_where_the_streams_agree_and_are_met():
    text = torch.eye(6, 8, dtype=torch.float64)[[0, 0, 1, 2, 3, 3]]  # y is 1 or 0 in each stream
    out = SigmoidSoftContrastiveLoss()(text, text, text, 80.0, -40.0, graph=text)
    assert out["loss"].item() == pytest.approx(0, abs=1e-12)
    assert float(out["positives_text"]) == pytest.approx((4 * 2 + 2) / 6)  # not normalised
    assert SigmoidSoftContrastiveLoss()(text, text, text, 80.0, 40.0)["loss"].item() > 100


def test_the_initial_bias_is_the_logit_of_the_mean_target_within_bounds():
    batch = {k: v.detach() for k, v in make_batch(7).items()}
    image, criterion = batch.pop("image"), SigmoidSoftContrastiveLoss(**SETTINGS)
    text = torch.cat([batch["text"], batch["hard_text"]])
    C = F.normalize(torch.cat([batch["labels"], batch["hard_labels"]]), dim=1)
    graph = torch.cat([batch["graph"], batch["hard_graph"]])
    mean = 0.0
    for x, w, tau in ((text, 1.0, 0.3), (C, 0.7, 0.5), (graph, 1.3, 0.2)):
        y = ((x @ x.T - tau) / (1 - tau)).clamp(0, 1).fill_diagonal_(1)
        mean += w / 3.0 * float(y[:len(image)].mean())
    assert criterion.initial_bias(**batch) == pytest.approx(math.log(mean / (1 - mean)), rel=1e-9)
    x = torch.ones(4, 1)
    assert criterion.initial_bias(x, x) == -1  # all the same: log(1 / 0)
    assert SigmoidSoftContrastiveLoss(0.0, 0.0, 0.0).initial_bias(x, x) == -10


@pytest.mark.parametrize("change,message", [
    ({"text": torch.zeros(4, 7)}, r"text: expected shape \(4, 8\), got \(4, 7\)"),
    ({"labels": torch.zeros(3, 14)}, r"labels: expected shape \(4, 14\), got \(3, 14\)"),
    ({"labels": torch.ones(4)}, r"labels: expected shape \(4, 4\), got \(4,\)"),
    ({"image": torch.full((4, 8), 0.5)}, r"image: expected unit rows; use F.normalize.*\(4, 8\)"),
    ({"labels": -torch.ones(4, 14)}, "labels: expected non-negative"),
    ({"labels": torch.full((4, 14), float("nan"))}, "labels: expected non-negative, finite"),
    ({"labels": None}, "expected .*labels.*, got graph, hard_graph, hard_labels, hard_text, image"),
    ({"image": None}, "expected .*image, labels, text, got graph, .*hard_text, labels, text"),
    ({"hard_graph": None}, "expected graph, hard_graph, .*, got graph, hard_labels"),
    ({"graph": None}, "expected hard_labels, hard_text, image, .*, got hard_graph"),
    ({"hard_labels": None}, "expected .*hard_labels.*, got graph, hard_graph, hard_text"),
    ({"hard_text": None}, "expected .*hard_text.*, got graph, hard_graph, hard_labels, image"),
    ({"hard_text": None, "hard_labels": None}, "expected .*hard_text.*, got graph, hard_graph, im"),
])
def test_wrong_arguments_are_named_with_their_shape(change, message):
    batch = {k: v.detach().float() for k, v in make_batch(4).items()} | change
    with pytest.raises(ValueError, match=message):
        DynamicSoftContrastiveLoss()(**batch, logit_scale=10.0)
    with pytest.raises(ValueError, match=message):
        SigmoidSoftContrastiveLoss()(**batch, logit_scale=10.0, logit_bias=-2.0)


def test_settings_out_of_range_are_refused():
    for settings, message in (({"tau_text": 1.0}, "thresholds"), ({"w_graph": -1.0}, "weights"),
                              ({"w_text": float("nan")}, "weights")):
        with pytest.raises(ValueError, match=message):
            DynamicSoftContrastiveLoss(**settings)


class Encoders(torch.nn.Module):
    """One linear map per modality and a temperature, so that DDP has parameters to average."""

    def __init__(self, sigmoid):
        super().__init__()
        torch.manual_seed(0)
        names = ("image", "text", "graph")
        self.maps = torch.nn.ModuleDict({k: torch.nn.Linear(6, 8) for k in names})
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        if sigmoid:
            self.logit_bias = torch.nn.Parameter(torch.tensor(-2.0))
        self.double()

    def forward(self, batch):
        out = {k: F.normalize(self.maps[k.removeprefix("hard_")](x), dim=1)
               for k, x in batch.items() if not k.endswith("labels")}
        out["logit_scale"] = self.logit_scale.exp()
        if hasattr(self, "logit_bias"):
            out["logit_bias"] = self.logit_bias
        return out


class NoGradGather:
    """The negative control: a gather that stops gradients."""

    @staticmethod
    def apply(x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        parts[dist.get_rank()] = x
        return torch.cat(parts)


CASES = {  # of criterion, row_chunk, negatives, graphs
    "all": (DynamicSoftContrastiveLoss, None, True, True),
    "chunks": (DynamicSoftContrastiveLoss, 1, True, True),
    "text alone": (DynamicSoftContrastiveLoss, None, False, False),
    "negatives": (DynamicSoftContrastiveLoss, None, True, False),
    "graphs": (DynamicSoftContrastiveLoss, 2, False, True),
    "sigmoid": (SigmoidSoftContrastiveLoss, None, True, True),
    "sigmoid, chunks": (SigmoidSoftContrastiveLoss, 1, True, True),
    "sigmoid, text alone": (SigmoidSoftContrastiveLoss, None, False, False),
}


def train_once(rank, world, criterion, row_chunk, negatives, graphs):
    """Loss and gradients of one global batch of 6, this rank having 6 / world of its rows."""
    g = torch.Generator().manual_seed(3)
    names = ["image", "text"] + ["hard_text"] * negatives + ["graph"] * graphs
    names += ["hard_graph"] * (negatives and graphs)
    whole = {k: torch.randn(6, 6, generator=g, dtype=torch.float64) for k in names}
    whole["labels"] = (torch.rand(6, 14, generator=g) < 0.3).double()
    if negatives:
        whole["hard_labels"] = whole["labels"].roll(1, 1)
    batch = {k: v.chunk(world)[rank] for k, v in whole.items()}
    model = Encoders(criterion is SigmoidSoftContrastiveLoss)
    if not graphs:
        del model.maps["graph"]
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    labels = {k: v for k, v in batch.items() if k.endswith("labels")}
    criterion, embedded = criterion(**SETTINGS, row_chunk=row_chunk), model(batch)
    out = criterion(**embedded, **labels)
    out["loss"].backward()
    result = {k: v.detach() for k, v in out.items()}
    if "logit_bias" in embedded:
        rows = {k: v for k, v in embedded.items() if k != "image" and "logit" not in k}
        result["initial bias"] = torch.tensor(criterion.initial_bias(**rows, **labels))
    return result | {k.removeprefix("module."): p.grad for k, p in model.named_parameters()}


def join_ranks(rank, world, folder):
    """A process group whose threads end with it.

    DistributedDataParallel imports functions that have the group of that moment as a default
    argument. Imported after the group was made, they keep it beyond destroy_process_group, and a
    thread of it that is still busy when the interpreter ends aborts the rank.
    """
    import torch.distributed.nn.functional  # noqa: F401
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)


def leave_ranks():
    dist.barrier()
    dist.destroy_process_group()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads


def refuse_uneven_arguments(rank):
    x, labels = F.normalize(torch.ones(2 + rank, 8), dim=1), torch.zeros(2 + rank, 14)
    with pytest.raises(ValueError, match=r"same .* on every rank, got \[\[3.*, 2.*\], \[3.*, 3"):
        DynamicSoftContrastiveLoss()(x, x, labels, 10.0)
    x, labels = x[:2], labels[:2]
    hard = {"hard_text": x, "hard_labels": labels} if rank else {}
    with pytest.raises(ValueError, match="same number of arguments"):
        DynamicSoftContrastiveLoss()(x, x, labels, 10.0, **hard)


def run_rank(rank, world, folder):
    """Every case on this rank, saved as RANK.pt, and as control-RANK.pt without gradients."""
    warnings.simplefilter("error", FutureWarning)
    join_ranks(rank, world, folder)
    refuse_uneven_arguments(rank)
    for file in (f"{rank}.pt", f"control-{rank}.pt"):
        results = {name: train_once(rank, world, *case) for name, case in CASES.items()}
        torch.save(results, folder / file)
        loss_module.AllGather = NoGradGather
    leave_ranks()


def difference(of_ranks, case):
    """The largest difference of any rank's numbers from those of one rank alone."""
    one = train_once(0, 1, *CASES[case])
    assert all(many[case].keys() == one.keys() for many in of_ranks)
    return max(relative(many[case][name], one[name]) for many in of_ranks for name in one)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_one_loss_and_one_gradient_and_refuse_uneven_arguments(tmp_path, world):
    mp.start_processes(run_rank, (world, tmp_path), world, start_method="forkserver")
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    control = [torch.load(tmp_path / f"control-{rank}.pt") for rank in range(world)]
    for case in CASES:
        assert difference(of_ranks, case) < 1e-10, case
        assert difference(control, case) > 1e-2, case  # a gather that stops gradients is noticed


def test_the_example_in_the_header_runs_on_a_copy_of_the_file_alone(tmp_path):
    source = Path(loss_module.__file__)
    shutil.copy(source, tmp_path / "loss.py")
    example = source.read_text(encoding="utf-8").split("\n\n")[1].splitlines()
    script = ["import torch", "from torch.nn.functional import normalize",
              "from loss import DynamicSoftContrastiveLoss",
              "image, text, hard_text = (normalize(torch.randn(4, 8, requires_grad=True), dim=1)"
              " for _ in range(3))",
              "labels = hard_labels = torch.ones(4, 14); temperature = 0.07",
              *(line[4:] for line in example)]
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "positives_text" in done.stdout
