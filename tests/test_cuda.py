"""On one GPU, in a few minutes; skipped where there is none.

SPDX-License-Identifier: MIT
"""

import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
from test_train import (
    Ranks,
    clean_up,  # noqa: F401, a fixture
    criterion,
    difference,
    gradients,
    make_step,
    read_log,
    run,
    start,
    state,
    step,
    steps_done,
    wait_for,
    weights,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import evaluate
import train
from data import Manifest
from loss import DynamicSoftContrastiveLoss, SigmoidSoftContrastiveLoss
from model import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def restore_cuda():
    """A test may stop in the middle of what it switched on."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def read_batch(studies):
    """A batch of eight as reading gives it: pinned, on the CPU."""
    args = train.parse_args(["--batch-size", "8", "--workers", "1"])
    return next(train.read_batches(studies, args, 0, 0, 1))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("kind", [DynamicSoftContrastiveLoss, SigmoidSoftContrastiveLoss])
@pytest.mark.parametrize("row_chunk", [None, 3])
def test_the_loss_and_its_gradients_equal_the_cpus(kind, dtype, tolerance, row_chunk):
    def evaluate_on(device):
        g = torch.Generator().manual_seed(0)
        rows = {}
        for name in ("image", "text", "hard_text", "graph", "hard_graph"):
            x = F.normalize(torch.randn(16, 8, generator=g, dtype=dtype), dim=1)
            rows[name] = x.to(device).requires_grad_()
        for name in ("labels", "hard_labels"):
            rows[name] = (torch.rand(16, 14, generator=g) < 0.3).to(device, dtype)
        scalars = {"logit_scale": torch.tensor(10.0, dtype=dtype, device=device)}
        if kind is SigmoidSoftContrastiveLoss:
            scalars["logit_bias"] = torch.tensor(-2.0, dtype=dtype, device=device)
        out = kind(tau_text=0.1, tau_graph=0.1, row_chunk=row_chunk)(**rows, **scalars)
        out["loss"].backward()
        return ({name: x.detach().cpu() for name, x in out.items()},
                {name: x.grad.cpu() for name, x in rows.items() if x.grad is not None})

    for ours, theirs in zip(evaluate_on(CUDA), evaluate_on("cpu"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("framework", ["softmax", "sigmoid"])
def test_three_steps_in_fp32_have_the_cpus_losses(phantom, tmp_path, framework, monkeypatch):
    flags = ["--max-steps", "3", "--framework", framework]
    gpu = run(phantom, tmp_path / "gpu", *flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = run(phantom, tmp_path / "cpu", *flags)
    for number in (1, 2, 3):
        assert gpu[number]["loss"] == pytest.approx(cpu[number]["loss"], rel=1e-2)
    assert gpu[3]["memory_mb"] > 0 and gpu[3]["skipped"] == 0


def test_bf16_trains_with_finite_numbers_and_keeps_fp32_weights(phantom, tmp_path):
    log = run(phantom, tmp_path / "run", "--max-steps", "3", "--precision", "bf16")
    assert log[3]["skipped"] == 0 and log[3]["loss"] > 0
    assert next(iter(weights(tmp_path / "run").values())).dtype == torch.float32


def test_gradient_caching_gives_the_gradient_of_the_whole_batch(phantom):
    clip, studies, keys = make_step(phantom)
    clip.to(CUDA)
    results = []
    for micro in (1, 2):
        batches = [train.to_device(studies.collate([studies[k] for k in part.tolist()]), CUDA)
                   for part in torch.tensor(keys).chunk(micro)]
        clip.zero_grad()
        step(clip, batches, (0, 0, 0))
        results.append(gradients(clip))
    assert difference(*results) < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_are_pinned_and_a_warm_step_waits_for_the_device_only_to_read_its_numbers(
        phantom, precision):
    clip, studies, _ = make_step(phantom)
    clip.to(CUDA)
    batch = read_batch(studies)
    for pinned in (batch["pixels"], batch["labels"], batch["text"]["input_ids"],
                   batch["graph"]["node"]):
        assert pinned.is_pinned()
    batch.pop("bad")
    loss = criterion()
    optimizer = torch.optim.AdamW(train.parameter_groups(clip, 1e-4), lr=1e-3, fused=True)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)  # "error": whatever waits raises RuntimeError
        moved = train.to_device(batch, CUDA)
        optimizer.zero_grad()
        out = train.plain_step(clip, loss, moved, autocast, (0, 0, 0))
        out["grad_norm"] = torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        torch.cuda.set_sync_debug_mode("default")
        values = dict(zip(out, torch.stack(list(out.values())).tolist(), strict=True))
        torch.cuda.set_sync_debug_mode(mode)
        optimizer.step()
        clip.clamp_temperature()
        torch.cuda.set_sync_debug_mode("default")
        assert values["loss"] > 0
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):  # the check can fail
        out["loss"].item()


# ---------------------------------------------------------------- ranks


def one_nccl_rank(phantom):
    clip, studies, _ = make_step(phantom)
    clip.to(CUDA)
    batch = train.to_device(read_batch(studies), CUDA)
    alone = step(clip, [batch], (0, 0, 0))["loss"].item()
    expected = gradients(clip)
    clip.zero_grad()
    dist.init_process_group("nccl")
    model = DistributedDataParallel(clip)
    loss = step(model, [batch], (0, 0, 0))["loss"].item()
    assert loss == pytest.approx(alone, rel=1e-5)
    assert difference(gradients(clip), expected) < 1e-3
    train.WORLD = 2  # so that the group is used
    assert train.on_rank_0(dict, {"rows": [3]}) == {"rows": [3]}
    del model
    train.leave_ranks()


def test_one_rank_of_nccl_has_the_gradient_of_no_group(phantom, tmp_path):
    ranks = Ranks(tmp_path / "logs", 1, one_nccl_rank, phantom)
    assert ranks.wait(120) == [0], ranks.read("err")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus_share_one_loss_curve(phantom, tmp_path):
    for ranks in (1, 2):
        started = start(phantom, tmp_path / str(ranks), "--max-steps", "4", ranks=ranks)
        assert set(started.wait(180)) == {0}, started.read("err")
    one, two = (read_log(tmp_path / str(ranks)) for ranks in (1, 2))
    for number in one:
        assert one[number]["loss"] == pytest.approx(two[number]["loss"], rel=1e-3)


# ---------------------------------------------------------------- resume, signals, memory


def test_a_killed_run_resumes_with_the_same_losses(phantom, tmp_path):
    """Not bit by bit, since some of CUDA's sums have no fixed order; for three steps to 1e-5."""
    out, flags = tmp_path / "run", ["--epochs", "500", "--checkpoint-every", "3"]
    started = start(phantom, out, *flags)
    wait_for(lambda: steps_done(out) >= 7)
    started.kill()
    train.restore_newest(out)
    saved = state(out)["step"]
    flags += ["--max-steps", str(saved + 3)]
    expected = run(phantom, tmp_path / "whole", *flags)
    log = run(phantom, out, *flags, "--resume", "latest")
    for number in range(saved + 1, saved + 4):
        assert log[number]["loss"] == pytest.approx(expected[number]["loss"], rel=1e-5), number


def test_a_signal_saves_and_leaves(phantom, tmp_path):
    out = tmp_path / "run"
    started = start(phantom, out, "--epochs", "500")
    wait_for(lambda: steps_done(out) >= 2)
    os.kill(started.pids[0], signal.SIGTERM)
    assert started.wait() == [0] and "a signal came: saved after step" in started.read("err")
    assert not json.loads(started.read("out").splitlines()[-1])["finished"]


def scarce_memory():
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / total)


def test_too_little_memory_is_one_line_that_names_the_flags(phantom, tmp_path):
    started = start(phantom, tmp_path / "run", "--batch-size", "64", "--image-size", "512",
                    fault=scarce_memory)
    assert started.wait(120) == [2]
    assert "error: the GPU's memory is full; raise --accumulate" in started.read("err")


# ---------------------------------------------------------------- evaluation


def test_evaluation_agrees_with_the_cpus_and_a_python_files_model_may_stay_there(
        phantom, tmp_path):
    run(phantom, tmp_path / "run", "--max-steps", "3")
    rows = Manifest(phantom, "train")
    gpu, cpu = (evaluate.validate(load_model(tmp_path / "run", device), rows, 32)
                for device in ("cuda", "cpu"))
    assert gpu == pytest.approx(cpu, abs=0.02)
    (tmp_path / "other.py").write_text(
        "from model import load_model\n"
        f"def load():\n    return load_model({str(tmp_path / 'run')!r})\n")
    evaluate.main([str(tmp_path / "other.py"), "--task", "retrieval", "--data", str(phantom),
                   "--split", "train", "--resamples", "10", "--workers", "0",
                   "--out", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["tasks"]["retrieval"]
