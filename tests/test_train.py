"""train.py: every system, exact resume, several ranks, and what happens when things break.

SPDX-License-Identifier: MIT
"""

import errno
import fcntl
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import train
from data import Manifest, Studies, UserError, global_batches, run_main
from model import ClinicalCLIP, load_checkpoint

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


@pytest.mark.parametrize("system", ["clip", "clip-ng-dtcg"])
def test_the_sigmoid_framework_trains_its_bias_and_says_so_in_the_checkpoint(system, phantom,
                                                                              tmp_path):
    out, flags = tmp_path / "run", ["--system", system, "--framework", "sigmoid"]
    log = run(phantom, out, *flags, "--max-steps", "2")
    assert log[1]["loss"] > 0 and log[2]["logit_bias"] != log[1]["logit_bias"]
    assert log[1]["temperature"] == pytest.approx(0.1)
    saved = load_checkpoint(out / "last.pt")
    assert saved["flags"]["framework"] == saved["model_config"]["framework"] == "sigmoid"
    assert json.loads((out / "config.json").read_text())["flags"]["framework"] == "sigmoid"
    if system == "clip":  # one pair of 12 is positive
        assert log[1]["logit_bias"] == pytest.approx(math.log(1 / 11), rel=1e-5)
    run(phantom, tmp_path / "cut", *flags, "--max-steps", "1")
    again = run(phantom, tmp_path / "cut", *flags, "--max-steps", "2", "--resume", "latest")
    assert again[2]["loss"] == log[2]["loss"]  # the bias is set once, and not on resume
    run(phantom, tmp_path / "softmax", "--system", system, "--max-steps", "1")
    assert "logit_bias" not in weights(tmp_path / "softmax")


def test_the_positives_of_the_first_batch_are_shown_before_step_1_alone(phantom, tmp_path, capsys):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if "0.98: " in line)
    positives = [float(part.split(": ")[1]) for part in line.split("   ") if ": " in part]
    assert 24 >= positives[0] > positives[-1] >= 1 and positives == sorted(positives, reverse=True)
    assert f"python evaluate.py {out} --data {phantom}\n" in err
    run(phantom, out, "--max-steps", "2", "--resume", "latest")
    assert "0.98: " not in capsys.readouterr().err


def test_streams_outside_a_system_have_no_weight():
    args = train.parse_args(["--system", "clip-dt", "--w-clinical", "5"])
    assert train.build_loss(args).weights == {"text": 1.0, "clinical": 0.0, "graph": 0.0}


def test_a_run_folder_explains_itself_and_ends_with_one_json_line(phantom, tmp_path, capsys):
    run(phantom, tmp_path / "run", "--max-steps", "3")
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


def test_no_report_text_is_left_in_a_run_folder(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "2")
    record = json.loads(phantom.read_text().splitlines()[0])
    secrets = [b"pneumothorax", b"effusion", record["id"].encode()]
    assert all(secret in phantom.read_bytes() for secret in secrets)
    for path in out.rglob("*"):
        if path.is_file():
            assert not [s for s in secrets if s in path.read_bytes()], path.name


def test_weight_decay_spares_norms_biases_and_the_temperature(bert_folder):
    clip = ClinicalCLIP("swin-t", str(bert_folder), width=16, framework="sigmoid")
    decayed, spared = train.parameter_groups(clip, 0.1)
    names = {id(p): n for n, p in clip.named_parameters()}
    decayed_names, spared_names = ([names[id(p)] for p in g["params"]] for g in (decayed, spared))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {"logit_scale", "logit_bias", "empty_node"} <= set(spared_names)
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


def step(model, batches, seed):
    if len(batches) == 1:
        return train.plain_step(model, criterion(), batches[0], FP32, seed)
    return train.cached_step(model, criterion(), batches, FP32, seed)


def test_accumulation_gives_the_gradient_of_the_whole_batch(phantom):
    clip, studies, keys = make_step(phantom)
    results = []
    for micro in (1, 2, 4):
        batches = [studies.collate([studies[k] for k in part.tolist()])
                   for part in torch.tensor(keys).chunk(micro)]
        clip.zero_grad()
        out = step(clip, batches, (0, 0, 0))
        results.append((out["loss"].item(), gradients(clip)))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert difference(grads, results[0][1]) < 1e-4


@pytest.mark.parametrize("replayed", [True, False])
def test_accumulation_replays_dropout_with_the_same_random_state(phantom, bert_folder, replayed,
                                                                 monkeypatch):
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
    seed_step, calls = train.seed_step, []

    def seed(*numbers):
        calls.append(numbers)
        seed_step(*numbers[:3], numbers[3] if replayed else len(calls))

    monkeypatch.setattr(train, "seed_step", seed)
    step(clip, batches, (0, 0, 0))
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
    batches = train.read_batches(studies, args, 0, rank, world)
    for _ in range(20):
        optimizer.zero_grad()
        micro = [next(batches) for _ in range(accumulate)]
        step(model, micro, (0, 0, 0))
        optimizer.step()
    if rank == 0:
        torch.save(clip.state_dict(), f"{folder}/{world}-{accumulate}.pt")
    del model
    train.leave_ranks()


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


def flip_a_bit(path):
    """Damage that loads without complaint: one bit of one tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return bytes(content)


def test_a_checkpoint_with_one_bit_wrong_gives_way_to_the_one_before(phantom, uninterrupted,
                                                                      tmp_path, capsys):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "6", "--checkpoint-every", "2")
    damaged, before = flip_a_bit(out / "last.pt"), (out / "previous.pt").read_bytes()
    run(phantom, out, "--max-steps", "16", "--resume", "latest")
    assert re.search("warning: passed over .*/last.pt: ", capsys.readouterr().err)
    assert same(weights(out), weights(uninterrupted / "1"))
    assert (out / "last.damaged.pt").read_bytes() == damaged
    assert before != (out / "previous.pt").read_bytes() != damaged
    flip_a_bit(out / "last.pt")
    flip_a_bit(out / "previous.pt")
    with pytest.raises(UserError, match="an intact checkpoint; remove the folder to start"):
        run(phantom, out, "--max-steps", "16", "--resume", "latest")


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("renamed", ["previous.pt", "last.pt"])
def test_a_kill_at_a_rename_leaves_an_intact_checkpoint(phantom, tmp_path, monkeypatch, renamed,
                                                        damaged):
    """Also the first save after last.pt was found damaged: previous.pt is all there is."""
    out, replace = tmp_path / "run", os.replace
    run(phantom, out, "--max-steps", "2", "--checkpoint-every", "1")
    if damaged:
        flip_a_bit(out / "last.pt")

    def kill(source, target):
        if Path(target).name in (renamed, "last.damaged.pt" if renamed == "previous.pt" else ""):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        run(phantom, out, "--max-steps", "3", "--resume", "latest")
    monkeypatch.setattr(os, "replace", replace)
    args = train.parse_args(["--out", str(out), "--resume", "latest"])
    assert load_checkpoint(Path(train.find_checkpoint(args, out)))["state"]["step"] in (1, 2)


def test_saving_needs_neither_hard_links_nor_a_file_system_that_locks(phantom, tmp_path,
                                                                      monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(fcntl, "lockf", unsupported)
    run(phantom, tmp_path / "run", "--max-steps", "2", "--checkpoint-every", "1")
    captured = capsys.readouterr()
    assert "run: cannot be locked (Operation not supported)" in captured.err
    assert "not written" not in captured.err and json.loads(captured.out)["finished"]
    assert load_checkpoint(tmp_path / "run/previous.pt")["state"]["step"] == 2


def test_a_checkpoint_may_go_on_in_a_new_folder_but_not_in_another_runs(phantom, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    run(phantom, a, "--max-steps", "10")
    run(phantom, b, "--max-steps", "1", "--seed", "1")
    before = {p.name: p.read_bytes() for p in b.iterdir()}
    with pytest.raises(UserError, match="b: expected a new folder, found another run's"):
        run(phantom, b, "--max-steps", "11", "--resume", str(a / "last.pt"))
    assert before == {p.name: p.read_bytes() for p in b.iterdir()}
    assert json.loads(capsys.readouterr().out.splitlines()[0])["best"]["step"] == 10
    c = tmp_path / "c"
    assert set(run(phantom, c, "--max-steps", "11", "--resume", str(a / "last.pt"))) == {11}
    result = json.loads(capsys.readouterr().out)
    assert result["best"]["step"] == 11 and (c / "best.pt").exists()  # a's is not c's


def test_other_val_rows_have_a_best_of_their_own(phantom, tmp_path, capsys):
    lines = phantom.read_text(encoding="utf-8").splitlines(keepends=True)
    val = [line for line in lines if json.loads(line)["split"] == "val"]
    other = phantom.with_name("other_val.jsonl")
    other.write_text("".join(val[::2]), encoding="utf-8")
    bests = {}
    for name, flags in {"same": [], "others": ["--val", str(other)]}.items():
        out = tmp_path / name
        run(phantom, out, "--max-steps", "10")
        state = load_checkpoint(out / "last.pt")
        state["state"]["best"] |= {"auroc": 1.0}  # which no later validation beats
        torch.save(state, out / "last.pt")
        capsys.readouterr()
        run(phantom, out, "--max-steps", "11", "--resume", "latest", *flags)
        bests[name] = json.loads(capsys.readouterr().out)["best"]["step"]
    assert bests == {"same": 10, "others": 11}


def test_best_pt_knows_that_it_is_the_best(phantom, tmp_path, capsys):
    run(phantom, tmp_path / "run")
    said = json.loads(capsys.readouterr().out)["best"]
    state = load_checkpoint(tmp_path / "run/best.pt")["state"]
    assert state["best"] == said and state["step"] == said["step"]


def test_a_run_ends_with_the_command_that_evaluates_it(phantom, tmp_path, capsys):
    out = tmp_path / "a run"
    run(phantom, out, "--max-steps", "2", "--image-root", str(phantom.parent))
    command = capsys.readouterr().err.split("evaluate it ")[1].strip()
    assert command.startswith(f"python evaluate.py '{out}' --data {phantom} --image-root ")
    subprocess.run([sys.executable, *shlex.split(command)[1:], "--task", "retrieval", "--split",
                    "val", "--resamples", "2"], cwd=Path(SCRIPT).parent, check=True)


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
    with pytest.raises(UserError, match="flags: --tau-text was 0.98, is now 0.5; --seed was 0"):
        run(phantom, out, "--max-steps", "2", "--resume", "latest", "--tau-text", "0.5",
            "--seed", "3")


@pytest.mark.parametrize("change", ["fewer rows", "another order", "one label"])
def test_resuming_with_other_data_is_refused(phantom, tmp_path, change):
    out, path = tmp_path / "run", tmp_path / "other.jsonl"
    run(phantom, out, "--max-steps", "1")
    records = [json.loads(line) for line in phantom.read_text(encoding="utf-8").splitlines()]
    if change == "fewer rows":
        records = records[:-30]
    elif change == "another order":
        records.reverse()
    else:
        row = next(r for r in records if r["split"] == "train")
        row["labels"]["Edema"] = -1 if row["labels"].get("Edema") != -1 else 0
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(UserError, match="the same data: the training rows of .* are others now"):
        run(path, out, "--max-steps", "2", "--resume", "latest")
    assert not (out / "log.jsonl").read_text(encoding="utf-8").count("argv") > 1


def test_records_after_the_checkpoint_leave_the_log(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "4", "--checkpoint-every", "1")
    shutil.copy(out / "previous.pt", out / "last.pt")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1}\n')
    assert set(run(phantom, out, "--max-steps", "5", "--resume", "latest")) == {1, 2, 3, 4, 5}


def test_a_checkpoint_of_older_code_leaves_the_log_whole(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "2")
    saved = load_checkpoint(out / "last.pt")
    del saved["log_bytes"]
    torch.save(saved, out / "last.pt")
    assert set(run(phantom, out, "--max-steps", "3", "--resume", "latest")) == {1, 2, 3}


def test_another_world_size_resumes_and_says_that_it_is_not_bit_exact(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    process = start(phantom, out, "--max-steps", "2", "--resume", "latest", ranks=2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "had 1 ranks and has 2 now; it goes on, but not bit by bit" in err


def test_two_nodes_train_together_and_resume(phantom, tmp_path):
    """Two agents of torchrun over loopback, as on two machines that share the run folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for steps in ("2", "3"):
        agents = [subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--local-addr",
             "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-id", steps, "--rdzv-endpoint",
             f"127.0.0.1:{port}", SCRIPT, "--train", str(phantom), "--out", str(tmp_path / "run"),
             *SMALL, "--max-steps", steps, "--resume", "latest"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
            for _ in range(2)]
        outputs = [agent.communicate(timeout=120) for agent in agents]
        for agent, (_, err) in zip(agents, outputs, strict=True):
            assert agent.returncode == 0, err
    result = json.loads("".join(out for out, _ in outputs).splitlines()[-1])
    assert result["finished"] and set(read_log(tmp_path / "run")) == {1, 2, 3}


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

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return validate(*args, **options)

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


def start_rank(rank, world=2):
    """This process as a rank of torchrun's."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29611", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)


def gloo_threads():
    tasks = Path("/proc/self/task").iterdir()
    return [name for task in tasks if "gloo" in (name := (task / "comm").read_text())]


def nan_rank(rank, phantom, out):
    start_rank(rank)
    keys = list(global_batches(len(Manifest(phantom, "train")), 12, 0, 0, rank=1, world=2))[1]
    OneBadRow.bad_rows = {keys[0][1]}  # read by rank 1 in the second step
    train.Studies = OneBadRow
    run(phantom, out, "--max-steps", "4")
    assert not gloo_threads()  # one that lives while Python ends may abort the process


def test_a_bad_number_on_one_rank_skips_that_step_on_all(phantom, tmp_path):
    out = tmp_path / "run"
    mp.spawn(nan_rank, (phantom, out), nprocs=2)
    log = read_log(out)
    assert [log[s]["skipped"] for s in (1, 2, 3, 4)] == [0, 1, 1, 1]
    assert all(w.isfinite().all() for w in weights(out).values())


def bad_rank(rank, phantom, out):
    start_rank(rank)
    OneBadRow.bad_rows = range(10_000)
    train.Studies = OneBadRow
    with pytest.raises(SystemExit if rank else UserError):
        run(phantom, out, "--epochs", "20")
    assert not gloo_threads()


def test_an_error_that_all_ranks_come_to_leaves_no_thread_of_the_group(phantom, tmp_path):
    mp.spawn(bad_rank, (phantom, tmp_path / "run"), nprocs=2)


def slow_rank(rank, phantom, out):
    start_rank(rank)
    train.TIMEOUT, validate = timedelta(seconds=4), train.validate

    def slow(*args, **options):
        time.sleep(8)
        return validate(*args, **options)

    train.validate = slow
    run(phantom, out, "--max-steps", "1")


def test_a_validation_may_take_longer_than_a_rank_may_be_lost(phantom, tmp_path):
    mp.spawn(slow_rank, (phantom, tmp_path / "run"), nprocs=2)
    assert load_checkpoint(tmp_path / "run/last.pt")["state"]["validated"] == 1


def failing_rank(rank, error):
    def fail():
        raise error

    start_rank(rank)
    ranks = train.start_ranks()
    assert train.on_rank_0(ranks, lambda: ["of", rank]) == ["of", 0]
    began = time.time()
    with pytest.raises(SystemExit if rank else type(error)):
        train.on_rank_0(ranks, fail)
    assert time.time() - began < 30
    assert train.read_numbers(ranks, {}, rank, 1)[1] == [1, 2]
    train.leave_ranks()
    assert not gloo_threads()


@pytest.mark.parametrize("error", [UserError("yours"), KeyError("ours")])
def test_an_error_of_rank_0_ends_all_ranks_and_is_its_own(error):
    mp.spawn(failing_rank, (error,), nprocs=2)


def test_ten_steps_of_bad_numbers_stop_the_run_and_name_step_and_term(phantom, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(train, "Studies", OneBadRow)
    monkeypatch.setattr(OneBadRow, "bad_rows", range(10_000))
    with pytest.raises(UserError, match=r"step 10: 10 steps in a row without finite numbers, the "
                                         r"last in loss, image_text"):
        run(phantom, tmp_path / "run", "--epochs", "20")


def test_a_rate_that_explodes_is_skipped_and_told_on_a_line_of_its_own(phantom, tmp_path, capsys,
                                                                       monkeypatch):
    flags = ["--train", str(phantom), "--out", str(tmp_path / "run"), *SMALL, "--lr", "1e6"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as left:
        run_main(train.main)
    assert left.value.code == 2
    assert re.search(r"\nerror: step \d+: 10 steps in a row without finite numbers, the last in "
                     r"[^\n]+\n$", capsys.readouterr().err)


def test_a_run_whose_steps_were_all_skipped_is_not_finished(phantom, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run(phantom, tmp_path / "run", "--max-steps", "2", "--w-text", "1e38")
    result = json.loads(capsys.readouterr().out)
    assert left.value.code == 1 and not result["finished"]
    assert result["skipped"] == result["step"] == 2


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


def test_unreadable_images_are_replaced_and_counted(phantom, tmp_path, capsys):
    path, images = copy_phantom(phantom, tmp_path / "data")
    images[3].write_bytes(images[3].read_bytes()[:100])
    images[5].unlink()
    run(path, tmp_path / "run")
    said = capsys.readouterr()
    assert ("warning: 2 unreadable images were replaced so far; python data.py check "
            f"{path} lists them\n") in said.err
    assert json.loads(said.out.splitlines()[-1])["unreadable"] >= 2


def test_an_unreadable_validation_image_stops_the_run_before_it_begins(phantom, tmp_path):
    path, _ = copy_phantom(phantom, tmp_path / "data")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    line, image = next((n, r["image"]) for n, r in enumerate(records, 1) if r["split"] == "val")
    (tmp_path / "data" / image).write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=f"copy.jsonl:{line}: expected an intact") as caught:
        run(path, tmp_path / "run")
    assert image not in str(caught.value)  # a file's name may hold a patient's number
    assert not (tmp_path / "run").exists()


def test_too_many_unreadable_images_stop_the_run(phantom, tmp_path):
    path, images = copy_phantom(phantom, tmp_path / "data")
    for image in images[::4]:
        image.write_bytes(b"")
    with pytest.raises(UserError, match="images could not be read, more than 5%"):
        run(path, tmp_path / "run")


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(phantom, uninterrupted, tmp_path,
                                                             monkeypatch, capsys):
    out, save, calls = tmp_path / "run", torch.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, file):
        calls.append(1)
        if len(calls) > 2:  # no file may grow beyond 100 bytes from now on, nor the log any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    try:
        with pytest.raises(SystemExit) as left:
            run(phantom, out, "--max-steps", "7", "--checkpoint-every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    assert left.value.code == 1 and not json.loads(captured.out.splitlines()[-1])["finished"]
    assert "last.pt: was not written (File too large)" in captured.err
    assert "log.jsonl: a line was not written (File too large)" in captured.err
    assert load_checkpoint(out / "last.pt")["state"]["step"] == 4
    assert not list(out.glob(".*.pt.*"))
    monkeypatch.setattr(torch, "save", save)
    run(phantom, out, "--max-steps", "16", "--resume", "latest")
    assert same(weights(out), weights(uninterrupted / "1"))


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_a_killed_run_leaves_its_folder_free_though_reading_processes_live_on(phantom, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--epochs", "500", "--workers", "2", "--checkpoint-every", "1")
    wait_for(lambda: steps_done(out) >= 2)
    readers = children(process)
    process.kill()
    process.communicate()
    assert len(readers) >= 2
    with train.open_folder(train.parse_args(["--out", str(out), "--resume", "latest"])):
        pass
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in readers), 30)


def test_a_killed_reading_process_is_one_line(phantom, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--epochs", "500", "--workers", "1")
    wait_for(lambda: steps_done(out) >= 1)
    os.kill(int(children(process)[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].endswith("error: a reading process was killed; if memory is "
                                         "short, lower --workers") and "Traceback" not in err


def test_errors_of_the_gpus_memory_and_of_reading_processes_are_one_line():
    with pytest.raises(UserError, match="the GPU's memory is full; raise --accumulate"):
        with train.user_errors():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(UserError, match=r"^x.jsonl:3: expected images$"):
        with train.user_errors():
            raise UserError("Caught UserError in DataLoader worker process 0.\nOriginal "
                            "Traceback:\ndata.UserError: x.jsonl:3: expected images\n")
    with pytest.raises(RuntimeError, match="shapes"):  # a bug keeps its traceback
        with train.user_errors():
            raise RuntimeError("shapes cannot be multiplied")


def test_a_wrong_image_root_is_one_line_and_no_folder(phantom, tmp_path):
    lines = [json.loads(line) for line in phantom.read_text().splitlines()]
    (tmp_path / "t.jsonl").write_text("".join(
        json.dumps(r) + "\n" for r in lines if r["split"] == "train"))
    with pytest.raises(UserError, match="expected images, 20 in a row could not be read"):
        run(tmp_path / "t.jsonl", tmp_path / "run", "--image-root", str(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_in_use_is_refused(phantom, tmp_path):
    out = tmp_path / "run"
    process = start(phantom, out, "--epochs", "500")
    wait_for(lambda: steps_done(out) >= 1)
    with pytest.raises(UserError, match="run: in use by another process"):
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


def test_an_existing_run_folder_is_never_overwritten(phantom, tmp_path):
    out = tmp_path / "run"
    run(phantom, out, "--max-steps", "1")
    before = weights(out)
    with pytest.raises(UserError, match="run: expected a new folder, found another run's: cont"):
        run(phantom, out, "--max-steps", "2")
    assert same(before, weights(out))


@pytest.mark.parametrize("flags,message", [
    (["--train", "nothing.jsonl"], "nothing.jsonl"),
    (["--train", "bad.jsonl"], "bad.jsonl:2: expected"),
    (["--train", "raw.jsonl", "--batch-size", "2"], "raw.jsonl:1: expected report, labels"),
    (["--train", "half.jsonl", "--batch-size", "2", "--system", "clip"],
     "half.jsonl:3: expected report and labels, also of each hard negative, for --system clip"),
    (["--train", "mute.jsonl", "--batch-size", "2", "--system", "clip-n"],
     "mute.jsonl: expected hard_negatives to train with"),
    (["--train", "empty.jsonl", "--batch-size", "2", "--system", "clip"],
     "empty.jsonl:2: expected a report that is not empty"),
    (["--train", "raw.jsonl"], "raw.jsonl: expected at least --batch-size 128 rows of split train"),
    (["--tau-text", "1"], "--tau-text: expected a number of at least 0 and below 1, got 1"),
    (["--w-graph", "-1"], "--w-graph: expected a number of at least 0, got -1"),
    (["--system", "softclip", "--framework", "sigmoid"], "--framework sigmoid: has no softclip"),
    (["--system", "clip-x"], "invalid choice: 'clip-x'"),
    (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got 0"),
    (["--resume", "latest"], "--resume latest: expected --out"),
    (["--max-steps", "0"], "--max-steps: expected a whole number of at least 1, got 0"),
    (["--lr", "nan"], "--lr: expected a number of at least 0, got nan"),
    (["--text-encoder", ".", "--batch-size", "12"], "a Hugging Face folder with config.json"),
    (["--batch-size", "9", "--accumulate", "2"], "--batch-size 9: expected a multiple of"),
    (["--batch-size", "12", "--resume", "x.pt"], "x.pt"),
])
def test_a_mistake_is_one_clear_line_and_exit_status_2(flags, message, phantom, tmp_path, capsys,
                                                       monkeypatch):
    raw = '{"id": "a/%d", "image": "a.png", "split": "train", "report": "Clear."}\n'
    (tmp_path / "raw.jsonl").write_text("".join(raw % k for k in range(4)))
    labelled = raw[:-2] + ', "labels": {"Edema": 1}}\n'
    (tmp_path / "mute.jsonl").write_text("".join(labelled % k for k in range(4)))
    empty = (labelled % 1).replace("Clear.", " ")
    (tmp_path / "empty.jsonl").write_text(labelled % 0 + empty)
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
    text = " ".join(capsys.readouterr().out.split())  # however narrow the terminal
    for group in ("data:", "model:", "loss (Eq. 4-10", "optimisation:", "run:"):
        assert group in text
    assert "the paper's is 224" in text and "(default: 128)" in text


def test_the_phantoms_reports_are_annotated_by_the_rules_of_today(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PHANTOM_STUDIES", 20)
    first = Path(train.phantom()).read_text()
    assert Path(train.phantom()).read_text() == first
    annotate = train.annotate
    monkeypatch.setattr(train, "annotate", lambda record: annotate(record) | {"rules": "new"})
    assert Path(train.phantom()).read_text().count('"rules": "new"') == 20


def test_the_default_command_needs_no_flag_but_a_step_limit(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", SCRIPT,
                           "--max-steps", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["finished"] and result["system"] == "clip-ng-dtcg"
    assert (tmp_path / result["run"] / "last.pt").exists()
