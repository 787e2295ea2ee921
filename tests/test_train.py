"""train.py: every system, exact resume, several ranks, and what happens when things break.

SPDX-License-Identifier: MIT
"""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import train
from data import GlobalBatches, Manifest, Studies
from model import ClinicalCLIP, load_checkpoint, load_model

SCRIPT = str(Path(train.__file__))
FP32 = torch.autocast("cpu", enabled=False)
SMALL = ["--width", "32", "--batch-size", "12", "--image-size", "32", "--epochs", "2",
         "--workers", "0"]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def run(phantom, out, *flags):
    """A run in this process; its log records by step."""
    train.main(["--train", str(phantom), "--out", str(out), *SMALL, *flags])
    return read_log(out)


def start(phantom, out, *flags, ranks=1, **options):
    """A run in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else ()), SCRIPT, "--train", str(phantom),
               "--out", str(out), *SMALL, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def read_log(out):
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if "loss" in r}


def weights(out, name="last.pt"):
    return load_checkpoint(Path(out) / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "the run did not get there in time"
        time.sleep(0.002)


def steps_done(out):
    try:
        return max(read_log(out), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def ranks_of(process):
    """Process ids of a torchrun's ranks: its children that run train.py."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if SCRIPT.encode() in
            Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


def kill_all(process):
    """SIGKILL to a launcher and its ranks, as a power cut would."""
    pids = [process.pid, *ranks_of(process)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}/cwd").is_dir() and SCRIPT.encode() in
                             Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids[1:]))


# ---------------------------------------------------------------- systems and the record


@pytest.mark.parametrize("system", train.SYSTEMS)
def test_every_system_of_table_2_trains_and_logs_its_own_streams(system, phantom, tmp_path):
    log = run(phantom, tmp_path / "run", "--system", system, "--max-steps", "2")
    negatives, graphs, streams = train.SYSTEMS[system]
    pairs = itertools.permutations(("image", "text", "graph"), 2)
    terms = {f"{a}_{b}" for a, b in pairs} & log[2].keys()
    assert ("image_graph" in terms) == graphs and "image_text" in terms
    assert ("gcn.layer1.weight" in weights(tmp_path / "run")) == graphs
    assert (log[1]["positives_text"] == 1) == (streams == "")
    assert log[2]["loss"] == pytest.approx(sum(log[2][k] for k in terms), rel=1e-5)
    assert negatives == ("n" in system.removeprefix("clip").split("-d")[0])


def test_streams_outside_a_system_have_no_weight():
    args = train.parse_args(["--system", "clip-dt", "--w-clinical", "5"])
    assert train.build_loss(args).weights == {"text": 1.0, "clinical": 0.0, "graph": 0.0}


def test_a_run_folder_explains_itself_and_ends_with_one_json_line(phantom, tmp_path, capsys):
    run(phantom, tmp_path / "run", "--max-steps", "3", "--export", str(tmp_path / "export"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["finished"] and result["step"] == 3 and 0 <= result["best"]["auroc"] <= 1
    folder = tmp_path / "run"
    assert {"config.json", "log.jsonl", "last.pt", "best.pt"} <= {p.name for p in folder.iterdir()}
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert "argv" in first
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["batch_size"] == 12 and "torch" in config["versions"]
    assert {"lr", "temperature", "grad_norm", "images_per_s", "data_wait", "memory_mb",
            "positives_text", "skipped"} <= read_log(folder)[3].keys()
    texts = ["No pleural effusion."]
    assert torch.equal(load_model(tmp_path / "export").encode_text(texts),
                       load_model(folder).encode_text(texts))


def test_no_report_text_is_left_in_a_run_folder(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "2", "--export", str(out / "export"))
    record = json.loads(phantom.read_text().splitlines()[0])
    secrets = [b"pneumothorax", b"effusion", record["id"].encode()]
    assert all(secret in phantom.read_bytes() for secret in secrets)
    for path in out.rglob("*"):
        if path.is_file():
            assert not [s for s in secrets if s in path.read_bytes()], path.name


def test_weight_decay_spares_norms_biases_and_the_temperature(bert_folder):
    clip = ClinicalCLIP("swin-t", str(bert_folder), width=16)
    decayed, spared = train.parameter_groups(clip, 0.1)
    names = {id(p): n for n, p in clip.named_parameters()}
    decayed_names, spared_names = ([names[id(p)] for p in g["params"]] for g in (decayed, spared))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert "logit_scale" in spared_names and "empty_node" in spared_names
    assert not [n for n in decayed_names if "bias" in n or "norm" in n.lower()]
    assert [n for n in spared_names if "relative_position_bias_table" in n]
    assert not [n for n in decayed_names + spared_names if "phrase_encoder" in n]
    trained = [n for n, p in clip.named_parameters() if p.requires_grad]
    assert sorted(decayed_names + spared_names) == sorted(trained)


def test_the_learning_rate_warms_up_and_falls_to_zero_as_a_function_of_the_step():
    args = train.parse_args(["--epochs", "4", "--lr", "1.0"])
    rates = [train.learning_rate(step, args, 10) for step in range(40)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == 1.0 and rates[25] == pytest.approx(0.5) and rates[39] < 0.01
    assert train.learning_rate(40, args, 10) == pytest.approx(0)
    args.warmup_epochs = 0.01  # of a step
    assert train.learning_rate(0, args, 10) == 1.0


# ---------------------------------------------------------------- one gradient


def make_step(phantom, text_encoder="tiny", size=8):
    torch.manual_seed(0)
    clip = ClinicalCLIP("tiny", text_encoder, 16, 32)
    studies = Studies(Manifest(phantom, "train"), image_size=32, tokenize=clip.tokenize,
                      negatives=True, graphs=True)
    return clip.train(), studies, [(0, i) for i in range(size)]


def gradients(clip):
    return {n: p.grad.clone() for n, p in clip.named_parameters() if p.grad is not None}


def difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-6)) for k in a)


def criterion():
    return train.build_loss(train.parse_args([]))


def test_accumulation_gives_the_gradient_of_the_whole_batch(phantom):
    clip, studies, keys = make_step(phantom)
    results = []
    for micro in (1, 2, 4):
        batches = [studies.collate([studies[k] for k in part.tolist()])
                   for part in torch.tensor(keys).chunk(micro)]
        clip.zero_grad()
        out = train.forward_backward(clip, criterion(), batches, FP32, lambda micro: None)
        results.append((out["loss"].item(), gradients(clip)))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert difference(grads, results[0][1]) < 1e-4


@pytest.mark.parametrize("replayed", [True, False])
def test_accumulation_replays_dropout_with_the_same_random_state(phantom, bert_folder, replayed):
    clip, studies, keys = make_step(phantom, str(bert_folder))
    batches = [studies.collate([studies[k] for k in part.tolist()])
               for part in torch.tensor(keys).chunk(2)]
    parts = []
    for micro, batch in enumerate(batches):  # all activations kept: the plain gradient
        train.seed_step(0, 0, 0, micro)
        parts.append(clip(batch))
    rows = {k: torch.cat([p[k] for p in parts]) for k in parts[0] if k != "logit_scale"}
    labels = {k: torch.cat([b[k] for b in batches]) for k in ("labels", "hard_labels")}
    criterion()(**rows, **labels, logit_scale=parts[0]["logit_scale"])["loss"].backward()
    expected = gradients(clip)
    clip.zero_grad()
    calls = []

    def seed(micro):
        calls.append(micro)
        train.seed_step(0, 0, 0, micro if replayed else 100 + len(calls))

    train.forward_backward(clip, criterion(), batches, FP32, seed)
    assert (difference(gradients(clip), expected) < 1e-4) == replayed


def sgd_rank(rank, world, accumulate, phantom, folder):
    """20 SGD steps on one data order; rank 0 saves the weights."""
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    clip, studies, _ = make_step(phantom)
    model = clip
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store{world}{accumulate}", rank=rank,
                                world_size=world)
        model = torch.nn.parallel.DistributedDataParallel(clip)
    args = train.parse_args(["--batch-size", "12", "--accumulate", str(accumulate),
                             "--workers", "0"])
    optimizer = torch.optim.SGD(clip.parameters(), lr=0.01)
    epoch_steps = len(GlobalBatches(len(studies), 12, 0, 0))
    batches = train.read_batches(studies, args, 0, epoch_steps, rank, world)
    for _ in range(20):
        optimizer.zero_grad()
        micro = [next(batches) for _ in range(accumulate)]
        train.forward_backward(model, criterion(), micro, FP32, lambda micro: None)
        optimizer.step()
    if rank == 0:
        torch.save(clip.state_dict(), f"{folder}/{world}-{accumulate}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def sgd_weights(phantom, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sgd")
    sgd_rank(0, 1, 1, phantom, folder)
    return folder


@pytest.mark.parametrize("world,accumulate", [(2, 1), (3, 1), (2, 2)])
def test_ranks_and_accumulation_end_with_the_weights_of_one_rank(phantom, sgd_weights, world,
                                                                 accumulate):
    mp.spawn(sgd_rank, (world, accumulate, phantom, sgd_weights), nprocs=world)
    one = torch.load(sgd_weights / "1-1.pt")
    many = torch.load(sgd_weights / f"{world}-{accumulate}.pt")
    start_weights = make_step(phantom)[0].state_dict()
    moved = max((one[k] - start_weights[k]).abs().max() for k in one)
    assert moved > 1e-3
    assert max((one[k] - many[k]).abs().max() for k in one) < 1e-5


# ---------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def uninterrupted(phantom, tmp_path_factory):
    """Runs of 16 steps that nothing disturbs, on one rank and on two."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    processes = [start(phantom, folder / str(n), "--max-steps", "16", ranks=n) for n in (1, 2)]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["step"] == 16
    return folder


def test_ranks_share_one_loss_curve(uninterrupted):
    one, two = (read_log(uninterrupted / str(n)) for n in (1, 2))
    assert one.keys() == two.keys() == set(range(1, 17))
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-5), step


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_resumes_bit_by_bit(phantom, uninterrupted, tmp_path, ranks):
    out = tmp_path / "run"
    process = start(phantom, out, "--max-steps", "16", "--checkpoint-every", "3", ranks=ranks)
    wait_for(lambda: steps_done(out) >= 7)
    kill_all(process)
    assert steps_done(out) < 16
    resumed = start(phantom, out, "--max-steps", "16", "--checkpoint-every", "3", "--resume",
                    "latest", ranks=ranks)
    _, err = resumed.communicate()
    assert resumed.returncode == 0, err
    whole, again = read_log(uninterrupted / str(ranks)), read_log(out)
    assert {s: r["loss"] for s, r in again.items()} == {s: r["loss"] for s, r in whole.items()}
    assert same(weights(out), weights(uninterrupted / str(ranks)))


def test_a_kill_during_a_save_leaves_a_checkpoint_that_loads(phantom, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--max-steps", "16", "--checkpoint-every", "1")
    wait_for(lambda: steps_done(out) >= 3 and list(out.glob(".last.pt.*")))
    kill_all(process)
    run(phantom, out, "--max-steps", "16", "--checkpoint-every", "1", "--resume", "latest")
    assert same(weights(out), weights(uninterrupted / "1"))
    assert not list(out.glob(".last.pt.*"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(phantom, uninterrupted, tmp_path, capsys):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "6", "--checkpoint-every", "2")
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[:len(whole) // 2])
    run(phantom, out, "--max-steps", "16", "--resume", "latest")
    assert "using previous.pt" in capsys.readouterr().err
    assert same(weights(out), weights(uninterrupted / "1"))
    (out / "last.pt").write_bytes(b"")
    (out / "previous.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="not an intact file.*remove the folder to start afresh"):
        run(phantom, out, "--max-steps", "16", "--resume", "latest")


def test_a_finished_run_is_left_as_it_is(phantom, tmp_path, capsys):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "2")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    run(phantom, out, "--max-steps", "2", "--resume", "latest")
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"]


def test_a_finished_run_needs_its_images_no_more(phantom, tmp_path):
    path, _ = copy_phantom(phantom, tmp_path / "data")
    run(path, tmp_path / "run", "--max-steps", "1")
    shutil.rmtree(tmp_path / "data/images")
    run(path, tmp_path / "run", "--max-steps", "1", "--resume", "latest")


def test_resume_latest_of_nothing_starts_afresh(phantom, tmp_path):
    assert set(run(phantom, tmp_path / "run", "--max-steps", "1", "--resume", "latest")) == {1}


def test_resuming_with_other_flags_is_refused_by_name(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    with pytest.raises(ValueError, match="--tau-text was 0.98, is now 0.5; --seed was 0, is now 3"):
        run(phantom, out, "--max-steps", "2", "--resume", "latest", "--tau-text", "0.5",
            "--seed", "3")


def test_resuming_with_other_data_is_refused(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    fewer = tmp_path / "fewer.jsonl"
    lines = phantom.read_text(encoding="utf-8").splitlines(keepends=True)
    fewer.write_text("".join(lines[:-30]), encoding="utf-8")
    with pytest.raises(ValueError, match="with other data: --train had"):
        run(fewer, out, "--max-steps", "2", "--resume", "latest")
    assert not (out / "log.jsonl").read_text(encoding="utf-8").count("argv") > 1


def test_another_world_size_resumes_and_says_that_it_is_not_bit_exact(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    process = start(phantom, out, "--max-steps", "2", "--resume", "latest", ranks=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "had 1 ranks and has 2 now; it goes on, but not bit by bit" in err


# ---------------------------------------------------------------- faults


def test_a_signal_to_one_rank_makes_all_ranks_save_and_leave(phantom, uninterrupted, tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", "16", "--workers", "1"]
    process = start(phantom, out, *flags, ranks=2)
    wait_for(lambda: steps_done(out) >= 5)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    stdout, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "a signal came: saved after step" in err
    result = json.loads(stdout.splitlines()[-1])
    assert not result["finished"] and load_checkpoint(out / "last.pt")["state"]["step"] \
        == result["step"] < 16
    process = start(phantom, out, *flags, "--resume", "latest", ranks=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert same(weights(out), weights(uninterrupted / "2"))


def test_a_signal_during_validation_is_heeded_at_the_next_step(phantom, uninterrupted, tmp_path,
                                                               monkeypatch, capsys):
    out, validate = tmp_path / "run", train.validate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return validate(*args)

    monkeypatch.setattr(train, "validate", signalled)
    run(phantom, out, "--max-steps", "16")
    assert "a signal came: saved after step 11" in capsys.readouterr().err  # epochs have 10 steps
    monkeypatch.setattr(train, "validate", validate)
    run(phantom, out, "--max-steps", "16", "--resume", "latest")
    assert same(weights(out), weights(uninterrupted / "1"))


def test_the_death_of_one_rank_ends_the_run_without_a_hang(phantom, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--epochs", "500", ranks=2)
    wait_for(lambda: steps_done(out) >= 2)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in err


def test_bf16_trains_with_finite_numbers(phantom, tmp_path):
    log = run(phantom, tmp_path / "run", "--max-steps", "3", "--precision", "bf16")
    assert log[3]["skipped"] == 0 and log[3]["loss"] > 0
    assert next(iter(weights(tmp_path / "run").values())).dtype == torch.float32


class OneBadRow(Studies):
    """Studies whose pixels are not finite numbers for the rows in `bad_rows`, as a fault would."""

    bad_rows = range(0)

    def collate(self, samples):
        batch = super().collate(samples)
        batch["pixels"] = batch["pixels"].float() / 255
        for place, row in enumerate(batch["index"].tolist()):
            if row in self.bad_rows:
                batch["pixels"][place] = float("nan")
        return batch


def nan_rank(rank, phantom, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29611", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    keys = list(GlobalBatches(len(Manifest(phantom, "train")), 12, 0, 0, rank=1, world=2))[1]
    OneBadRow.bad_rows = {keys[0][1]}  # read by rank 1 in the second step
    train.Studies = OneBadRow
    run(phantom, out, "--max-steps", "4")


def test_a_bad_number_on_one_rank_skips_that_step_on_all(phantom, tmp_path):
    out = tmp_path / "run"
    mp.spawn(nan_rank, (phantom, out), nprocs=2)
    log = read_log(out)
    assert [log[s]["skipped"] for s in (1, 2, 3, 4)] == [0, 1, 1, 1]
    assert all(w.isfinite().all() for w in weights(out).values())


def test_ten_steps_of_bad_numbers_stop_the_run_and_name_step_term_and_rows(phantom, tmp_path,
                                                                           monkeypatch):
    monkeypatch.setattr(train, "Studies", OneBadRow)
    monkeypatch.setattr(OneBadRow, "bad_rows", range(10_000))
    with pytest.raises(ValueError, match=r"step 10: 10 steps in a row without finite numbers, the "
                                         r"last in loss, image_text.*training rows there: "
                                         r"\[\d+.*lines \[\d+"):
        run(phantom, tmp_path / "run", "--epochs", "20")


def copy_phantom(phantom, folder):
    """The phantom again, under images of its own that a test may spoil."""
    records = [json.loads(line) for line in phantom.read_text().splitlines()]
    for record in records:
        source, target = Path(record["root"]) / record["image"], folder / record["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    path = folder / "copy.jsonl"
    path.write_text("".join(json.dumps(r | {"root": str(folder)}) + "\n" for r in records))
    return path, [folder / r["image"] for r in records if r["split"] == "train"]


def test_unreadable_images_are_replaced_and_reported_by_row(phantom, tmp_path, capsys):
    path, images = copy_phantom(phantom, tmp_path / "data")
    images[3].write_bytes(images[3].read_bytes()[:100])
    images[5].unlink()
    run(path, tmp_path / "run")
    err = capsys.readouterr().err
    assert "epoch 0: 2 unreadable images were replaced; training rows [3, 5], lines" in err


def test_an_unreadable_validation_image_stops_the_run_before_it_begins(phantom, tmp_path):
    path, _ = copy_phantom(phantom, tmp_path / "data")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    line, image = next((n, r["image"]) for n, r in enumerate(records, 1) if r["split"] == "val")
    (tmp_path / "data" / image).write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=f"copy.jsonl:{line}: expected an intact") as caught:
        run(path, tmp_path / "run")
    assert image not in str(caught.value)  # a file's name may hold a patient's number
    assert not (tmp_path / "run").exists()


def test_too_many_unreadable_images_stop_the_run(phantom, tmp_path):
    path, images = copy_phantom(phantom, tmp_path / "data")
    for image in images[::4]:
        image.write_bytes(b"")
    with pytest.raises(ValueError, match="images of epoch 0 could not be read, more than 5%"):
        run(path, tmp_path / "run")


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(phantom, uninterrupted, tmp_path,
                                                             monkeypatch, capsys):
    out, save, calls = tmp_path / "run", torch.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, file):
        calls.append(1)
        if len(calls) > 2:  # no file may grow beyond 20 kB from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    try:
        run(phantom, out, "--max-steps", "7", "--checkpoint-every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt was not written (File too large)" in capsys.readouterr().err
    assert load_checkpoint(out / "last.pt")["state"]["step"] == 4
    assert not list(out.glob(".*.pt.*"))
    monkeypatch.setattr(torch, "save", save)
    run(phantom, out, "--max-steps", "16", "--resume", "latest")
    assert same(weights(out), weights(uninterrupted / "1"))


def test_the_reading_processes_of_a_killed_run_leave_its_folder(phantom, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--epochs", "500", "--workers", "4", "--checkpoint-every", "1")
    wait_for(lambda: steps_done(out) >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 4
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10)


def test_a_wrong_image_root_is_one_line_and_no_folder(phantom, tmp_path):
    lines = [json.loads(line) for line in phantom.read_text().splitlines()]
    (tmp_path / "t.jsonl").write_text("".join(
        json.dumps(r) + "\n" for r in lines if r["split"] == "train"))
    with pytest.raises(ValueError, match="expected images, 20 in a row could not be read"):
        run(tmp_path / "t.jsonl", tmp_path / "run", "--image-root", str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused(phantom, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--epochs", "500")
    wait_for(lambda: steps_done(out) >= 1)
    with pytest.raises(ValueError, match="run: in use by another process"):
        run(phantom, out, "--epochs", "500", "--resume", "latest")
    kill_all(process)


def test_collapsed_soft_labels_warn_once_an_epoch(phantom, tmp_path, capsys):
    run(phantom, tmp_path / "run", "--tau-text", "0", "--tau-clinical", "0", "--tau-graph", "0",
        "--max-steps", "4", "--system", "clip-dtc", "--uncertain", "negative")
    assert capsys.readouterr().err.count("warning: positives_text is") == 1


# ---------------------------------------------------------------- a user's mistakes


def test_one_validation_study_gives_no_number_and_no_end(phantom, tmp_path):
    lines = [json.loads(line) for line in phantom.read_text().splitlines()]
    val = [r for r in lines if r["split"] == "val"]
    kept = [r for r in lines if r["split"] == "train"] + val[:1]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert len(run(tmp_path / "one.jsonl", tmp_path / "run")) > 12  # two validations


def test_fewer_steps_than_were_made_end_the_run_at_once(phantom, tmp_path, capsys):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "3")
    saved = load_checkpoint(out / "last.pt")
    saved["state"]["validated"] = 0  # as a kill between a checkpoint and the validation leaves it
    torch.save(saved, out / "last.pt")
    capsys.readouterr()
    run(phantom, out, "--max-steps", "2", "--resume", "latest")
    assert json.loads(capsys.readouterr().out)["finished"]


def test_an_export_does_not_stand_in_the_way_of_the_same_command(phantom, tmp_path):
    for _ in range(2):
        run(phantom, tmp_path / "run", "--max-steps", "1", "--resume", "latest", "--export",
            str(tmp_path / "exported"))
    assert (tmp_path / "exported/model.safetensors").exists()


def test_an_existing_run_folder_is_never_overwritten(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    before = weights(out)
    with pytest.raises(ValueError, match="run: exists; continue it with --resume latest or choose"):
        run(phantom, out, "--max-steps", "2")
    assert same(before, weights(out))


@pytest.mark.parametrize("flags,message", [
    (["--train", "nothing.jsonl"], "nothing.jsonl"),
    (["--train", "bad.jsonl"], "bad.jsonl:2: expected"),
    (["--train", "raw.jsonl", "--batch-size", "2"], "raw.jsonl:1: expected report, labels"),
    (["--train", "half.jsonl", "--batch-size", "2", "--system", "clip"],
     "half.jsonl:3: expected report, labels, also of each hard negative, for --system clip"),
    (["--train", "mute.jsonl", "--batch-size", "2", "--system", "clip-n"],
     "mute.jsonl: expected hard_negatives to train with"),
    (["--train", "raw.jsonl"], "raw.jsonl: expected at least --batch-size 128 rows of split train"),
    (["--tau-text", "1", "--batch-size", "12"], "thresholds: expected numbers in [0, 1)"),
    (["--system", "clip-x"], "invalid choice: 'clip-x'"),
    (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got 0"),
    (["--resume", "latest"], "--resume latest: expected --out"),
    (["--max-steps", "0"], "--max-steps: expected a whole number of at least 1, got 0"),
    (["--lr", "nan"], "--lr: expected a number of at least 0, got nan"),
    (["--export", "."], "--export .: exists"),
    (["--text-encoder", ".", "--batch-size", "12"], "a Hugging Face folder with config.json"),
    (["--batch-size", "9", "--accumulate", "2"], "--batch-size 9: expected a multiple of"),
    (["--batch-size", "12", "--resume", "x.pt"], "x.pt"),
])
def test_a_mistake_is_one_clear_line_and_exit_status_2(flags, message, phantom, tmp_path, capsys,
                                                       monkeypatch):
    from negations import run_main
    raw = '{"id": "a/%d", "image": "a.png", "split": "train", "report": "Clear."}\n'
    (tmp_path / "raw.jsonl").write_text("".join(raw % k for k in range(4)))
    labelled = raw[:-2] + ', "labels": {"Edema": 1}}\n'
    (tmp_path / "mute.jsonl").write_text("".join(labelled % k for k in range(4)))
    (tmp_path / "half.jsonl").write_text((labelled % 0) * 2 + (raw % 1) * 2)
    (tmp_path / "bad.jsonl").write_text('{"id": "a/1", "image": "a.png"}\n{"id": \n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--train", str(phantom), *flags])
    with pytest.raises(SystemExit) as left:
        run_main(train.main)
    err = capsys.readouterr().err
    assert left.value.code == 2 and message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/run-*"))


def test_help_is_grouped_and_names_the_papers_values(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    for group in ("data:", "model:", "loss (Eq. 4-10", "optimisation:", "run:"):
        assert group in text
    assert "the paper's is 224" in text and "(default: 128)" in text


def test_the_default_command_needs_no_flag_but_a_step_limit(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", SCRIPT,
                           "--max-steps", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["finished"] and result["system"] == "clip-ng-dtcg"
    assert (tmp_path / result["run"] / "last.pt").exists()
