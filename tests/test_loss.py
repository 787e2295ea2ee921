"""loss.py against literal evaluations of Eq. 1-10, on one rank and on several.

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
from loss import DynamicSoftContrastiveLoss, SoftCLIPLoss, soft_labels

BOTH = list(itertools.product([True, False], repeat=2))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
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


def literal_loss(batch, scale, w_text, w_clinical, w_graph, tau_text, tau_clinical, tau_graph,
                 soft=True):
    """Eq. 1-10 written out entry by entry, in float64."""
    rows = {k: v.double() for k, v in batch.items()}
    B = len(rows["image"])
    joined = {"image": rows["image"], "text": rows["text"], "labels": rows["labels"],
              "graph": rows.get("graph")}
    for name in ("text", "labels", "graph"):
        if f"hard_{name}" in rows:
            joined[name] = torch.cat([rows[name], rows[f"hard_{name}"]])
    C = torch.stack([c / c.norm() if c.norm() > 0 else c for c in joined["labels"]])
    streams = [(w_text, tau_text, joined["text"]), (w_clinical, tau_clinical, C)]
    modalities = {k: joined[k] for k in ("image", "text", "graph") if joined[k] is not None}
    if "graph" in modalities:
        streams.append((w_graph, tau_graph, joined["graph"]))
    total = 0.0
    for a, b in itertools.permutations(modalities, 2):
        A = modalities[a][:B] if b == "image" else modalities[a]
        Z = modalities[b][:B] if a != "image" and b == "image" else modalities[b]
        p = [[sum(A[i] * Z[j]) * scale for j in range(len(Z))] for i in range(len(A))]
        log_p = [torch.stack(row).log_softmax(0) for row in p]
        for w, tau, X in streams if soft else [(1.0, None, None)]:
            kl = 0.0
            for i in range(len(A)):
                y = []
                for j in range(len(Z)):
                    s = float((X[i] * X[j]).sum().detach()) if soft else 0.0
                    value = (s - tau) / (1 - tau) if soft and s > tau else 0.0
                    y.append(1.0 if i == j else value)
                norm = sum(y)
                for j in range(len(Z)):
                    if y[j] > 0:
                        kl = kl + y[j] / norm * (math.log(y[j] / norm) - log_p[i][j])
            total = total + w * kl / len(A)
    return total


def value_and_gradients(criterion, batch, scale):
    leaves = [v for v in batch.values() if v.requires_grad] + [scale]
    text = {k: v for k, v in batch.items() if k.startswith("hard") or "graph" in k}
    out = criterion(batch["image"], batch["text"], batch["labels"], scale, **text)
    return out, torch.autograd.grad(out["loss"], leaves)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("negatives,graphs", BOTH)
@pytest.mark.parametrize("B", [1, 5])
def test_loss_and_gradients_equal_the_literal_equations(B, negatives, graphs, soft):
    batch = make_batch(B, negatives, graphs)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    expected = literal_loss(batch, scale, **SETTINGS, soft=soft)
    leaves = [v for v in batch.values() if v.requires_grad] + [scale]
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True)
    for dtype, tolerance in TOLERANCE.items():
        cast = {k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in batch.items()}
        s = scale.detach().to(dtype).requires_grad_()
        out, grads = value_and_gradients(DynamicSoftContrastiveLoss(**SETTINGS, soft=soft), cast, s)
        assert out["loss"].dtype == dtype
        assert out["loss"].item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            wanted = torch.zeros_like(grad) if wanted is None else wanted
            assert relative(grad, wanted) < 10 * tolerance


@pytest.mark.parametrize("change", [
    {"w_text": 0.0}, {"w_clinical": 0.0}, {"w_graph": 0.0}, {"w_text": 3.5},
    {"w_text": 0.0, "w_clinical": 0.0, "w_graph": 0.0},
    {"tau_text": 0.0, "tau_clinical": 0.0, "tau_graph": 0.0},
    {"tau_text": 0.98, "tau_clinical": 0.98, "tau_graph": 0.98},
])
def test_any_weight_and_threshold_equals_the_literal_equations(change):
    batch, settings = make_batch(16, seed=1), SETTINGS | change
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    out, grads = value_and_gradients(DynamicSoftContrastiveLoss(**settings), batch, scale)
    expected = literal_loss(batch, scale, **settings)
    leaves = [v for v in batch.values() if v.requires_grad] + [scale]
    assert out["loss"].item() == pytest.approx(float(expected.detach()), rel=1e-10, abs=1e-12)
    if any(settings[w] for w in ("w_text", "w_clinical", "w_graph")):
        for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
            assert relative(grad, wanted) < 1e-9


def test_one_hot_targets_reduce_to_clip():
    batch = make_batch(16, negatives=False, graphs=False)
    scale = torch.tensor(10.0, dtype=torch.float64)
    out = DynamicSoftContrastiveLoss(soft=False)(batch["image"], batch["text"], batch["labels"],
                                                scale)
    logits, own = scale * batch["image"] @ batch["text"].T, torch.arange(16)
    info_nce = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    assert out["loss"].item() == pytest.approx(info_nce.item(), rel=1e-12)
    # The same limit from the soft side: distinct rows and a threshold above every similarity.
    distinct = DynamicSoftContrastiveLoss(1.0, 0.0, 0.0, tau_text=0.9999)
    batch = make_batch(4, negatives=False, graphs=False)
    soft = distinct(batch["image"], batch["text"], batch["labels"], scale)
    logits, own = scale * batch["image"] @ batch["text"].T, torch.arange(4)
    info_nce = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    assert soft["loss"].item() == pytest.approx(info_nce.item(), rel=1e-12)
    assert float(soft["positives_text"]) == pytest.approx(1.0)


def test_equation_4_by_hand():
    s = torch.tensor([[1.0, 0.9, 0.7], [0.9, 1.0, 0.8], [0.7, 0.8, 1.0]])
    # tau = 0.8: 0.9 becomes 0.5, 0.8 is not above the threshold; then rows are divided by sums.
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 0], [0, 0, 1.0]])
    assert torch.allclose(soft_labels(s, 0.8), expected, atol=1e-6)
    assert torch.allclose(soft_labels(s, 0.0).sum(1), torch.ones(3))


def test_soft_labels_keep_the_diagonal_for_rows_without_labels_and_take_no_gradient():
    c = torch.zeros(3, 14, requires_grad=True)
    y = soft_labels(c @ c.T, 0.5)
    assert torch.equal(y, torch.eye(3)) and not y.requires_grad
    with pytest.raises(ValueError, match=r"similarity: expected \(n, n\), got \(2, 3\)"):
        soft_labels(torch.zeros(2, 3), 0.5)


def test_terms_add_up_to_the_loss_and_positives_are_effective_numbers():
    batch = make_batch(16)
    with torch.no_grad():
        batch["text"][:] = batch["hard_text"][:] = batch["text"][0]  # all reports the same
    out, _ = value_and_gradients(DynamicSoftContrastiveLoss(**SETTINGS), batch,
                                 torch.tensor(2.0, dtype=torch.float64, requires_grad=True))
    pairs = [f"{a}_{b}" for a, b in itertools.permutations(("image", "text", "graph"), 2)]
    assert float(sum(out[p] for p in pairs)) == pytest.approx(out["loss"].item())
    assert set(out) == {"loss", *pairs, "positives_text", "positives_clinical", "positives_graph"}
    assert float(out["positives_text"]) == pytest.approx(32)
    assert not any(v.requires_grad for k, v in out.items() if k != "loss")


@pytest.mark.parametrize("row_chunk", [1, 3, 7, 16, 32, 100])
@pytest.mark.parametrize("negatives,graphs", BOTH)
def test_row_chunk_changes_neither_values_nor_gradients(row_chunk, negatives, graphs):
    batch = make_batch(16, negatives, graphs)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    plain, plain_grads = value_and_gradients(DynamicSoftContrastiveLoss(**SETTINGS), batch, scale)
    chunked = DynamicSoftContrastiveLoss(**SETTINGS, row_chunk=row_chunk)
    out, grads = value_and_gradients(chunked, batch, scale)
    assert plain.keys() == out.keys()
    for name in plain:
        assert float(out[name]) == pytest.approx(float(plain[name]), rel=1e-11), name
    for grad, wanted in zip(grads, plain_grads, strict=True):
        assert relative(grad, wanted) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_compared_in_float32(dtype):
    batch = make_batch(16, dtype=torch.float32, D=64)
    half = {k: v.detach().to(dtype) for k, v in batch.items()}
    keys = ("hard_text", "hard_labels", "graph", "hard_graph")
    criterion = DynamicSoftContrastiveLoss(**SETTINGS)
    full = criterion(batch["image"], batch["text"], batch["labels"], 14.0,
                     **{k: batch[k] for k in keys})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = criterion(half["image"], half["text"], half["labels"], 14.0,
                        **{k: half[k] for k in keys})
    assert out["loss"].dtype == torch.float32 and math.isfinite(out["loss"])
    assert out["loss"].item() == pytest.approx(float(full["loss"]), rel=1e-2)


@pytest.mark.parametrize("criterion", [DynamicSoftContrastiveLoss(), SoftCLIPLoss()])
def test_identical_and_opposite_unit_rows_never_give_nan(criterion):
    row = F.normalize(torch.ones(1, 8), dim=1)
    for sign in (1.0, -1.0):
        x = torch.cat([row, row, sign * row, row])
        x.requires_grad_()
        out = criterion(x, x, torch.zeros(4, 14), 100.0, hard_text=-x,
                        hard_labels=torch.ones(4, 14), graph=x, hard_graph=x)
        assert math.isfinite(out["loss"])
        assert torch.autograd.grad(out["loss"], x)[0].isfinite().all()


def test_rows_normalised_in_half_precision_still_share_labels_with_their_duplicates():
    text = F.normalize(torch.randn(64, 512).repeat(2, 1).bfloat16(), dim=1)  # 64 reports, twice
    assert float((text.float().norm(dim=1) - 1).abs().max()) > 1e-4  # what would tilt Eq. 4
    out = DynamicSoftContrastiveLoss()(text, text, torch.zeros(128, 14), 10.0)
    assert out["positives_text"].item() == pytest.approx(2, abs=1e-5)


def test_a_nan_row_gives_a_nan_loss_and_no_error():
    x = F.normalize(torch.randn(4, 8), dim=1)
    out = DynamicSoftContrastiveLoss()(x * torch.tensor(float("nan")), x, torch.zeros(4, 14), 10.0)
    assert out["loss"].isnan()


def test_softclip_targets_are_the_softmax_of_text_similarities():
    batch, scale = make_batch(5, negatives=False, graphs=False), 4.0
    out = SoftCLIPLoss()(batch["image"], batch["text"], batch["labels"], scale)
    y = (scale * batch["text"] @ batch["text"].T).softmax(1)
    logits = scale * batch["image"] @ batch["text"].T
    expected = sum(F.kl_div(z.log_softmax(1), y, reduction="batchmean")
                   for z in (logits, logits.T))
    assert out["loss"].item() == pytest.approx(float(expected.detach()), rel=1e-10)


@pytest.mark.parametrize("change,message", [
    ({"text": torch.zeros(4, 7)}, r"text: expected shape \(4, 8\), got \(4, 7\)"),
    ({"labels": torch.zeros(3, 14)}, r"labels: expected shape \(4, 14\), got \(3, 14\)"),
    ({"image": torch.full((4, 8), 0.5)}, r"image: expected unit rows in \(4, 8\); use F.normalize"),
    ({"labels": -torch.ones(4, 14)}, "labels: expected non-negative"),
    ({"labels": torch.full((4, 14), float("nan"))}, "labels: expected non-negative, finite"),
    ({"hard_graph": None}, r"hard_graph: expected shape \(4, 8\)"),
    ({"labels": None}, r"labels: expected a tensor \(B, K\) with rows, got None"),
    ({"labels": torch.ones(4)}, r"labels: expected a tensor \(B, K\) with rows, got \(4,\)"),
    ({"image": None}, r"image: expected a tensor \(B, D\) with rows, got None"),
    ({"text": [0.0]}, r"text: expected shape \(4, 8\), got list"),
    ({"hard_labels": None}, r"hard_labels: expected shape \(4, 14\), got None beside .*hard_text"),
    ({"hard_text": None}, r"hard_text: expected shape \(4, 8\), got None beside .*hard_labels"),
    ({"hard_text": None, "hard_labels": None}, r"hard_text: expected shape \(4, 8\)"),
])
def test_wrong_arguments_are_named_with_their_shape(change, message):
    batch = {k: v.detach().float() for k, v in make_batch(4).items()} | change
    criterion = DynamicSoftContrastiveLoss()
    with pytest.raises(ValueError, match=message):
        criterion(batch.pop("image"), batch.pop("text"), batch.pop("labels"), 10.0, **batch)


@pytest.mark.parametrize("settings,message", [
    ({"tau_text": 1.0}, "thresholds"), ({"w_graph": -1.0}, "weights"),
    ({"w_text": float("nan")}, "weights"),
    ({"row_chunk": 0}, "row_chunk"),
])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicSoftContrastiveLoss(**settings)


class Encoders(torch.nn.Module):
    """One linear map per modality and a temperature, so that DDP has parameters to average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        names = ("image", "text", "graph")
        self.maps = torch.nn.ModuleDict({k: torch.nn.Linear(6, 8) for k in names})
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.double()

    def forward(self, batch):
        out = {k: F.normalize(self.maps[k.removeprefix("hard_")](x), dim=1)
               for k, x in batch.items() if not k.endswith("labels")}
        return out | {"logit_scale": self.logit_scale.exp()}


class NoGradGather:
    """The negative control: a gather that stops gradients."""

    @staticmethod
    def apply(x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        parts[dist.get_rank()] = x
        return torch.cat(parts)


def train_once(rank, world, folder, row_chunk, negatives, graphs, gather=None):
    """Loss and gradients of one global batch of 6, this rank having 6 / world of its rows."""
    warnings.simplefilter("error", FutureWarning)
    g = torch.Generator().manual_seed(3)
    names = ["image", "text"] + ["hard_text"] * negatives + ["graph"] * graphs
    names += ["hard_graph"] * (negatives and graphs)
    whole = {k: torch.randn(6, 6, generator=g, dtype=torch.float64) for k in names}
    whole["labels"] = (torch.rand(6, 14, generator=g) < 0.3).double()
    if negatives:
        whole["hard_labels"] = whole["labels"].roll(1, 1)
    batch = {k: v.chunk(world)[rank] for k, v in whole.items()}
    model = Encoders()
    if not graphs:
        del model.maps["graph"]
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
        model = torch.nn.parallel.DistributedDataParallel(model)
        loss_module.AllGather = gather or loss_module.AllGather
    criterion = DynamicSoftContrastiveLoss(**SETTINGS, row_chunk=row_chunk)
    embedded = model(batch)
    labels = {k: v for k, v in batch.items() if k == "hard_labels"}
    out = criterion(embedded.pop("image"), embedded.pop("text"), batch["labels"],
                    embedded.pop("logit_scale"), **embedded, **labels)
    out["loss"].backward()
    result = {k: v.detach() for k, v in out.items()}
    result |= {k.removeprefix("module."): p.grad for k, p in model.named_parameters()}
    torch.save(result, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def compare_ranks(tmp_path, world, row_chunk=None, negatives=True, graphs=True, gather=None):
    train_once(0, 1, tmp_path, row_chunk, negatives, graphs)
    mp.spawn(train_once, (world, tmp_path, row_chunk, negatives, graphs, gather), nprocs=world)
    one = torch.load(tmp_path / "1-0.pt")
    for rank in range(world):
        many = torch.load(tmp_path / f"{world}-{rank}.pt")
        assert many.keys() == one.keys()
        yield from ((name, relative(many[name], one[name])) for name in one)


@pytest.mark.parametrize("world,row_chunk,negatives,graphs", [
    (2, None, True, True), (3, None, True, True), (2, 1, True, True), (2, None, False, False),
    (2, None, True, False), (3, None, False, True)])
def test_ranks_share_one_loss_and_one_gradient(tmp_path, world, row_chunk, negatives, graphs):
    for name, difference in compare_ranks(tmp_path, world, row_chunk, negatives, graphs):
        assert difference < 1e-10, name


def test_a_gather_that_stops_gradients_would_be_noticed(tmp_path):
    worst = max(difference for _, difference in compare_ranks(tmp_path, 2, gather=NoGradGather))
    assert worst > 1e-2


def uneven_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x = F.normalize(torch.ones(2 + rank, 8), dim=1)
    with pytest.raises(ValueError, match=r"same .* shapes on every rank, got .* \[\[2.*\], \[3"):
        DynamicSoftContrastiveLoss()(x, x, torch.zeros(2 + rank, 14), 10.0)
    hard = {"hard_text": x[:2], "hard_labels": torch.zeros(2, 14)} if rank else {}
    with pytest.raises(ValueError, match="same arguments"):
        DynamicSoftContrastiveLoss()(x[:2], x[:2], torch.zeros(2, 14), 10.0, **hard)
    dist.destroy_process_group()


def test_unequal_arguments_across_ranks_are_refused_on_every_rank(tmp_path):
    mp.spawn(uneven_rank, (tmp_path,), nprocs=2)


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
