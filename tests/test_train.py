"""train.py: every system, exact resume, several ranks, and what happens when things break.

SPDX-License-Identifier: MIT
"""

import contextlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import evaluate
import train
from data import Manifest, Studies, UserError, global_batches, run_main
from model import ClinicalCLIP, ModelError, load_checkpoint

FP32 = torch.autocast("cpu", enabled=False)
SMALL = ["--width", "32", "--batch-size", "12", "--image-size", "32", "--epochs", "2",
         "--workers", "0"]  # epochs of 10 steps
FORKS = mp.get_context("forkserver")  # of a process that has imported, and done nothing else,
FORKS.set_forkserver_preload(["train", "torch._dynamo"])  # the latter for each first optimiser
STARTED = []


@pytest.fixture(autouse=True)
def clean_up():
    """Handlers of signals, and processes that a failed test left."""
    before = {name: signal.getsignal(name) for name in train.HEEDED}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)
    for started in STARTED:
        started.kill()
    STARTED.clear()


def run(phantom, out, *flags):
    """A run in this process; its log's records by step."""
    train.main(["--train", str(phantom), "--out", str(out), *SMALL, *flags])
    return read_log(out)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """Processes that call function(*inputs) as ranks that torchrun starts; they print to files."""

    def __init__(self, logs, ranks, function, *inputs):
        logs.mkdir(exist_ok=True)
        self.logs, port = logs, free_port()
        self.processes = [FORKS.Process(target=be_rank, args=(logs, rank, ranks, port, function,
                                                              inputs)) for rank in range(ranks)]
        for process in self.processes:
            process.start()
        self.pids = [process.pid for process in self.processes]
        STARTED.append(self)

    def wait(self, timeout=60):
        """The exit codes."""
        for process in self.processes:
            process.join(timeout)
        return [process.exitcode for process in self.processes]

    def read(self, name, rank=0):
        return (self.logs / f"{name}{rank}").read_text()

    def kill(self):
        """SIGKILL to all, as a power cut would."""
        for process in self.processes:
            process.kill()
        self.wait()


def be_rank(logs, rank, world, port, function, inputs):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train.RANK, train.WORLD = rank, world
    mp.set_start_method("fork", force=True)  # of reading processes, as ever
    torch.set_num_threads(1)
    run_main(lambda: function(*inputs))


def start(phantom, out, *flags, ranks=1, fault=None):
    """A run in processes of its own; fault is called in each before it begins."""
    return Ranks(out.with_name(f"{out.name}-logs"), ranks, begin, fault, phantom, out, flags)


def begin(fault, phantom, out, flags):
    if fault:
        fault()
    run(phantom, out, *flags)
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            assert "gloo" not in (thread / "comm").read_text()  # it might abort Python's end


def read_log(out):
    """Records by step; of a step's records the last counts."""
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if "loss" in r}


def losses(out):
    return {step: record["loss"] for step, record in read_log(out).items()}


def weights(out, name="last.pt"):
    return load_checkpoint(Path(out) / name)["model"]


def state(out, name="last.pt"):
    return load_checkpoint(Path(out) / name)["state"]


def assert_bit_equal(a, b):
    """Two runs have the same losses and weights."""
    assert losses(a) == losses(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


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


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rows_of(phantom):
    return [json.loads(line) for line in phantom.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


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
    if system == "clip-dt":  # a stream outside the system has no weight
        criterion = train.build_loss(train.parse_args(["--system", system, "--w-clinical", "5"]))
        assert criterion.weights == {"text": 1.0, "clinical": 0.0, "graph": 0.0}


@pytest.mark.parametrize("system", ["clip", "clip-ng-dtcg"])
def test_the_sigmoid_framework_trains_its_bias_and_says_so_in_the_checkpoint(system, phantom,
                                                                              tmp_path):
    out, flags = tmp_path / "run", ["--system", system, "--framework", "sigmoid"]
    log = run(phantom, out, *flags, "--max-steps", "2")
    assert log[1]["loss"] > 0 and log[2]["logit_bias"] != log[1]["logit_bias"]
    assert log[1]["temperature"] == pytest.approx(0.1)
    saved = load_checkpoint(out / "last.pt")
    assert saved["flags"]["framework"] == saved["model_config"]["framework"] == "sigmoid"
    if system == "clip":  # one pair of 12 is positive
        assert log[1]["logit_bias"] == pytest.approx(math.log(1 / 11), rel=1e-5)
    run(phantom, tmp_path / "cut", *flags, "--max-steps", "1")
    again = run(phantom, tmp_path / "cut", *flags, "--max-steps", "2", "--resume", "latest")
    assert again[2]["loss"] == log[2]["loss"]  # the bias is set once, and not on resume


def test_a_run_folder_explains_itself_and_holds_no_report(phantom, tmp_path, capsys):
    out = tmp_path / "run"
    log = run(phantom, out, "--image-root", str(phantom.parent))
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["finished"] and result["step"] == 20 and 0 <= result["best"]["auroc"] <= 1
    assert {"config.json", "log.jsonl", "last.pt", "previous.pt", "best.pt"} == set(contents(out))
    best = state(out, "best.pt")
    assert best["best"] == result["best"] and best["step"] == result["best"]["step"]
    assert "argv" in json.loads((out / "log.jsonl").read_text().splitlines()[0])
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["batch_size"] == 12 and "torch" in config["versions"]
    assert {"lr", "temperature", "grad_norm", "images_per_s", "data_wait", "memory_mb",
            "positives_text", "skipped"} <= log[3].keys()
    assert "positives_text=" in said.err and "logit_bias" not in weights(out)
    secrets = [b"pneumothorax", b"effusion", rows_of(phantom)[0]["id"].encode()]
    assert all(secret in phantom.read_bytes() for secret in secrets)
    for path in out.rglob("*"):
        if path.is_file():
            assert not [s for s in secrets if s in path.read_bytes()], path.name
    command = said.err.split("evaluate it ")[1].strip()
    assert command.startswith(f"python evaluate.py {out} --data {phantom} --split test --image-r")
    evaluate.main([*shlex.split(command)[2:], "--task", "retrieval", "--resamples", "2"])


def test_weight_decay_spares_norms_biases_and_the_temperature(bert_folder):
    clip = ClinicalCLIP("swin-t", str(bert_folder), width=16, framework="sigmoid")
    decayed, spared = train.parameter_groups(clip, 0.1)
    names = {id(p): n for n, p in clip.named_parameters()}
    decayed_names, spared_names = ([names[id(p)] for p in g["params"]] for g in (decayed, spared))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {"logit_scale", "logit_bias", "empty_node"} <= set(spared_names)
    assert not [n for n in decayed_names if "bias" in n or "norm" in n.lower()]
    assert [n for n in spared_names if "relative_position_bias_table" in n]
    trained = [n for n, p in clip.named_parameters() if p.requires_grad]
    assert sorted(decayed_names + spared_names) == sorted(trained)
    assert not [n for n in trained if "phrase_encoder" in n]


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
    return train.build_loss(train.parse_args(["--batch-size", "12"]))


def step(model, batches, seed):
    if len(batches) == 1:
        return train.plain_step(model, criterion(), batches[0], FP32, seed)
    return train.cached_step(model, criterion(), batches, FP32, seed)


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


def sgd(accumulate, phantom, folder):
    """8 SGD steps on one data order; rank 0 saves the weights."""
    warnings.simplefilter("error", FutureWarning)
    clip, studies, _ = make_step(phantom)
    model = clip
    if train.WORLD > 1:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(clip)
    args = train.parse_args(["--batch-size", "12", "--accumulate", str(accumulate),
                             "--workers", "0"])
    optimizer = torch.optim.SGD(clip.parameters(), lr=0.025)
    batches = train.read_batches(studies, args, 0, train.RANK, train.WORLD)
    for _ in range(8):
        optimizer.zero_grad()
        micro = [next(batches) for _ in range(accumulate)]
        step(model, micro, (0, 0, 0))
        optimizer.step()
    if train.RANK == 0:
        torch.save(clip.state_dict(), f"{folder}/{train.WORLD}-{accumulate}.pt")
    del model
    train.leave_ranks()


def test_ranks_and_accumulation_end_with_the_weights_of_one_rank(phantom, tmp_path):
    sgd(1, phantom, tmp_path)
    sgd(4, phantom, tmp_path)
    for world, accumulate in ((3, 1), (2, 2)):
        ranks = Ranks(tmp_path / "logs", world, sgd, accumulate, phantom, tmp_path)
        assert set(ranks.wait()) == {0}, ranks.read("err")
    one, before = torch.load(tmp_path / "1-1.pt"), make_step(phantom)[0].state_dict()
    assert max((one[k] - before[k]).abs().max() for k in one) > 1e-3
    for name in ("1-4.pt", "3-1.pt", "2-2.pt"):
        many = torch.load(tmp_path / name)
        assert max((one[k] - many[k]).abs().max() for k in one) < 1e-5, name


# ---------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def uninterrupted(phantom, tmp_path_factory):
    """Runs of 16 steps that nothing disturbs, on one rank and on two."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(phantom, folder / "1", "--max-steps", "16")
    started = start(phantom, folder / "2", "--max-steps", "16", ranks=2)
    assert started.wait() == [0, 0], started.read("err")
    assert json.loads(started.read("out").splitlines()[-1])["step"] == 16
    one, two = losses(folder / "1"), losses(folder / "2")
    assert set(one) == set(range(1, 17)) and one == pytest.approx(two, rel=1e-5)
    return folder


def test_a_killed_run_and_one_that_was_left_by_ctrl_c_resume_bit_by_bit(phantom, uninterrupted,
                                                                        tmp_path):
    out, flags = tmp_path / "run", ["--max-steps", "16", "--checkpoint-every", "3", "--resume",
                                    "latest", "--workers", "1"]
    started = start(phantom, out, *flags, ranks=2)
    wait_for(lambda: steps_done(out) >= 4)
    readers = [reader for pid in started.pids for reader in children(pid)]
    started.kill()
    assert steps_done(out) < 8 and len(readers) == 2
    started = start(phantom, out, *flags, ranks=2)
    wait_for(lambda: steps_done(out) >= 8)
    os.kill(started.pids[1], signal.SIGINT)  # at one rank: all save and leave
    assert started.wait() == [0, 0], started.read("err")
    result = json.loads(started.read("out").splitlines()[-1])
    assert not result["finished"] and state(out)["step"] == result["step"] < 16
    assert (f"a signal came: saved after step {result['step']}; to go on, give the same command "
            f"with --out {out} --resume latest") in started.read("err")
    started = start(phantom, out, *flags, ranks=2)
    assert started.wait() == [0, 0], started.read("err")
    assert_bit_equal(out, uninterrupted / "2")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in readers), 30)


def flip_a_bit(path):
    """Damage that loads without complaint: one bit of one tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(phantom, uninterrupted, tmp_path,
                                                          capsys):
    out, flags = tmp_path / "run", ["--max-steps", "16", "--resume", "latest"]
    run(phantom, out, "--max-steps", "6", "--checkpoint-every", "2")
    damaged = flip_a_bit(out / "last.pt")
    with pytest.raises(UserError, match="an intact checkpoint of train.py"):
        run(phantom, out, "--max-steps", "16", "--resume", str(out / "last.pt"))
    run(phantom, out, *flags)
    assert re.search("warning: passed over .*/last.pt: ", capsys.readouterr().err)
    assert_bit_equal(out, uninterrupted / "1")
    assert damaged not in contents(out).values() and state(out, "previous.pt")["step"] == 16
    flip_a_bit(out / "last.pt")
    flip_a_bit(out / "previous.pt")
    with pytest.raises(UserError, match="an intact checkpoint; remove the folder to start"):
        run(phantom, out, *flags)


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
        if Path(target).name == renamed:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        patch.setattr(os, "link", None)  # which some file systems lack
        run(phantom, out, "--max-steps", "3", "--resume", "latest")
    train.restore_newest(out)
    assert state(out)["step"] in (1, 2)


def test_a_folder_without_a_checkpoint_to_go_on_from_is_refused(phantom, tmp_path):
    out, flags = tmp_path / "run", ["--max-steps", "1", "--resume", "latest"]
    assert set(run(phantom, out, *flags)) == {1}  # of nothing: starts
    for name in ("last.pt", "previous.pt"):
        (out / name).unlink()
    before = contents(out)
    assert "best.pt" in before
    with pytest.raises(UserError, match="run: expected an intact checkpoint; remove the folder"):
        run(phantom, out, *flags)
    assert contents(out) == before
    (out / "best.pt").unlink()  # killed before the first save: starts afresh and appends
    assert set(run(phantom, out, *flags)) == {1}
    assert contents(out)["log.jsonl"].startswith(before["log.jsonl"])


def test_a_checkpoint_goes_on_in_a_new_folder_but_not_in_another_runs(phantom, tmp_path, capsys):
    a, b, c = (tmp_path / name for name in "abc")
    run(phantom, a, "--max-steps", "10")
    assert last_json(capsys)["best"]["step"] == 10
    run(phantom, b, "--max-steps", "1", "--seed", "1")
    before = contents(a), contents(b)
    for out, checkpoint in ((b, a / "last.pt"), (a, a / "previous.pt"), (b, None)):
        flags = ["--resume", str(checkpoint)] if checkpoint else []
        with pytest.raises(UserError, match="expected a new folder, found another run's: contin"):
            run(phantom, out, "--max-steps", "11", *flags)
    assert before == (contents(a), contents(b))
    capsys.readouterr()
    assert set(run(phantom, c, "--max-steps", "11", "--resume", str(a / "last.pt"))) == {11}
    assert last_json(capsys)["best"]["step"] >= 10 and (c / "best.pt").exists()
    run(phantom, a, "--max-steps", "11", "--resume", str(a / "last.pt"))
    assert last_json(capsys)["step"] == 11


def test_other_val_rows_have_a_best_of_their_own(phantom, tmp_path, capsys):
    val = [row for row in rows_of(phantom) if row["split"] == "val"]
    other = write(phantom.with_name("other_val.jsonl"), val[::2])
    out, bests = tmp_path / "run", []
    run(phantom, out, "--max-steps", "1")
    for steps, flags in (("2", []), ("3", ["--val", str(other)])):
        saved = load_checkpoint(out / "last.pt")
        saved["state"]["best"] |= {"auroc": 1.0}  # which no later validation beats
        torch.save(saved, out / "last.pt")
        run(phantom, out, "--max-steps", steps, "--resume", "latest", *flags)
        bests.append(last_json(capsys)["best"]["step"])
    assert bests == [1, 3]


def test_a_finished_run_is_left_as_it_is_and_needs_no_images(phantom, tmp_path, capsys):
    path, images = copy_phantom(phantom, tmp_path / "data")
    out = tmp_path / "run"
    run(path, out, "--max-steps", "2")
    for image in images:
        image.unlink()
    before = contents(out)
    run(path, out, "--max-steps", "2", "--resume", "latest")
    run(path, out, "--max-steps", "1", "--resume", "latest")  # fewer than were made
    assert contents(out) == before and last_json(capsys)["finished"]


def test_resuming_with_other_flags_or_data_is_refused(phantom, tmp_path, monkeypatch):
    out, path = tmp_path / "run", tmp_path / "other.jsonl"
    flags = ["--max-steps", "2", "--resume", "latest"]
    run(phantom, out, "--max-steps", "1")
    before = contents(out)
    monkeypatch.chdir(tmp_path)  # where the phantom would be drawn
    with pytest.raises(UserError, match="^--tau-text: expected 0.98 .*, got 0.5"):
        train.main(["--out", str(out), *SMALL, *flags, "--tau-text", "0.5"])
    assert not Path("runs").exists()
    rows = rows_of(phantom)
    relabelled = rows_of(phantom)
    labels = next(row for row in relabelled if row["split"] == "train")["labels"]
    labels["Edema"] = -1 if labels.get("Edema") != -1 else 0
    for others in (rows[:-30], rows[::-1], relabelled):
        write(path, others)
        with pytest.raises(UserError, match="the same data: the training rows are others now"):
            run(path, out, *flags)
    assert contents(out) == before


def test_two_nodes_train_together_and_one_process_goes_on(phantom, tmp_path):
    """Two agents of torchrun over loopback, as on two machines that share the run folder."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--local-addr",
               "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint",
               f"127.0.0.1:{free_port()}", train.__file__, "--train", str(phantom), "--out",
               str(out), *SMALL, "--max-steps", "2"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=settings) for _ in range(2)]
    outputs = [agent.communicate(timeout=120) for agent in agents]
    for agent, (_, err) in zip(agents, outputs, strict=True):
        assert agent.returncode == 0, err
    assert json.loads("".join(printed for printed, _ in outputs).splitlines()[-1])["finished"]
    assert set(run(phantom, out, "--max-steps", "3", "--resume", "latest")) == {1, 2, 3}


# ---------------------------------------------------------------- signals


def test_a_signal_before_or_in_a_validation_loses_nothing(phantom, uninterrupted, tmp_path, capsys,
                                                          monkeypatch):
    flags = ["--max-steps", "16", "--workers", "1", "--resume", "latest"]
    rate, validate = train.learning_rate, train.validate

    def signal_at_the_end_of_an_epoch(step, *inputs):
        if step == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
        return rate(step, *inputs)

    def signal_while_validating(*inputs, **options):
        readers = mp.active_children()
        assert readers
        for pid in (*(reader.pid for reader in readers), os.getpid()):  # as torchrun does
            os.kill(pid, signal.SIGTERM)
        time.sleep(1)  # in which a reader that does not ignore it dies
        return validate(*inputs, **options)

    for name, fault, step, validated in (
            ("learning_rate", signal_at_the_end_of_an_epoch, 10, 0),
            ("validate", signal_while_validating, 11, 10)):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(train, name, fault)
            run(phantom, out, *flags)
        assert f"saved after step {step};" in capsys.readouterr().err
        assert state(out)["validated"] == validated
        assert ("best.pt" in contents(out)) == (validated > 0)
        run(phantom, out, *flags)
        assert_bit_equal(out, uninterrupted / "1")


def wait_before_the_loop():
    def check_rows(*_):
        print("waiting", flush=True)
        time.sleep(60)

    train.check_rows = check_rows


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_loop_ends_the_run_without_a_traceback(phantom, tmp_path, name):
    started = start(phantom, tmp_path / "run", fault=wait_before_the_loop)
    wait_for(lambda: (started.logs / "out0").exists() and "waiting" in started.read("out"))
    os.kill(started.pids[0], name)
    assert started.wait() == [-name] and started.read("err") == ""
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- faults


def fail_in_a_step(folder, killed):
    plain_step = train.plain_step

    def fail(model, criterion, batch, autocast, key):
        if key[1:] == (2, 1):  # the third step, of rank 1
            (folder / "failed").touch()
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise TypeError("shapes do not fit")
        return plain_step(model, criterion, batch, autocast, key)

    train.plain_step = fail


@pytest.mark.parametrize("killed", [False, True])
def test_an_error_of_one_rank_is_printed_at_once_and_ends_all(phantom, tmp_path, killed):
    started = start(phantom, tmp_path / "run", ranks=2,
                    fault=partial(fail_in_a_step, tmp_path, killed))
    assert started.wait(30) == [2, -signal.SIGKILL if killed else 2]
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 10
    if not killed:
        err = started.logs / "err1"
        assert err.stat().st_mtime - (tmp_path / "failed").stat().st_mtime < 5
        assert "Traceback" in err.read_text() and "TypeError: shapes do not fit" in err.read_text()
    err = started.read("err").splitlines()
    assert err[-1] == "error: rank 0 lost another rank, whose message says why"
    assert not [line for line in err if "Traceback" in line]


def test_an_error_of_rank_0_alone_ends_all_ranks(tmp_path):
    started = start("nothing.jsonl", tmp_path / "run", ranks=2)
    assert started.wait() == [2, 2]
    assert re.fullmatch("error: nothing.jsonl: expected .*\n", started.read("err"))
    assert "Traceback" not in started.read("err", 1)


def spoil_a_row(phantom):
    """Of a row that rank 1 reads in the second step the pixels are no finite numbers."""
    keys = list(global_batches(len(Manifest(phantom, "train")), 12, 0, 0, rank=1, world=2))[1]
    collate = Studies.collate

    def spoil(studies, samples):
        batch = collate(studies, samples)
        batch["pixels"] = batch["pixels"].float() / 255
        batch["pixels"][batch["index"] == keys[0][1]] = float("nan")
        return batch

    Studies.collate = spoil


def test_a_bad_number_on_one_rank_skips_that_step_on_all(phantom, tmp_path):
    out = tmp_path / "run"
    started = start(phantom, out, "--max-steps", "4", ranks=2, fault=partial(spoil_a_row, phantom))
    assert started.wait() == [0, 0], started.read("err")
    log = read_log(out)
    assert [log[s]["skipped"] for s in (1, 2, 3, 4)] == [0, 1, 1, 1]
    assert all(w.isfinite().all() for w in weights(out).values())


def test_a_rate_that_explodes_stops_after_ten_steps_on_a_line_of_its_own(phantom, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run_main(lambda: run(phantom, tmp_path / "run", "--lr", "1e6"))
    assert left.value.code == 2
    assert re.search(r"\nerror: step \d+: 10 steps without finite numbers \(null in log.jsonl\): "
                     r"lower --lr, in another --out\n$", capsys.readouterr().err)
    log = read_log(tmp_path / "run")
    assert None in log[max(log)].values()


def test_a_run_whose_steps_were_all_skipped_is_not_finished(phantom, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run(phantom, tmp_path / "run", "--max-steps", "2", "--w-text", "1e38")
    result = last_json(capsys)
    assert left.value.code == 1 and not result["finished"]
    assert result["skipped"] == result["step"] == 2


def copy_phantom(phantom, folder):
    """The phantom again, under images of its own that a test may spoil: those of training."""
    rows = rows_of(phantom)
    for row in rows:
        target = folder / row["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((Path(row["root"]) / row["image"]).read_bytes())
        row["root"] = str(folder)
    return (write(folder / "copy.jsonl", rows),
            [folder / row["image"] for row in rows if row["split"] == "train"])


def test_unreadable_images_are_replaced_and_counted(phantom, tmp_path, capsys):
    path, images = copy_phantom(phantom, tmp_path / "data")
    images[3].write_bytes(images[3].read_bytes()[:100])
    images[5].unlink()
    run(path, tmp_path / "run")
    said = capsys.readouterr()
    assert ("warning: 2 unreadable images were replaced so far; python data.py check "
            f"{path} lists them\n") in said.err
    assert json.loads(said.out.splitlines()[-1])["unreadable"] >= 2


def test_images_that_stop_a_run_stop_it_before_it_begins(phantom, tmp_path):
    rows = rows_of(phantom)
    path = write(tmp_path / "t.jsonl", [row for row in rows if row["split"] == "train"])
    with pytest.raises(UserError, match="expected images, 20 in a row could not be read"):
        run(path, tmp_path / "run", "--image-root", str(tmp_path))
    path, _ = copy_phantom(phantom, tmp_path / "data")
    line, image = next((n, r["image"]) for n, r in enumerate(rows, 1) if r["split"] == "val")
    (tmp_path / "data" / image).write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=f"copy.jsonl:{line}: expected an intact") as caught:
        run(path, tmp_path / "run")
    assert image not in str(caught.value)  # a file's name may hold a patient's number
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the bar
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoints_before(phantom, tmp_path, monkeypatch):
    out, save, calls = tmp_path / "run", torch.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(content, file):
        calls.append(1)
        if len(calls) > 2:  # no file may grow beyond 100 bytes from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    try:
        with pytest.raises(UserError, match=r"last.pt: was not written \(File too large\)"):
            run(phantom, out, "--max-steps", "7", "--checkpoint-every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state(out)["step"] == 4 and state(out, "previous.pt")["step"] == 2
    assert not list(out.glob(".*.pt.*"))


def test_a_killed_reading_process_is_one_line(phantom, tmp_path):
    out = tmp_path / "run"
    started = start(phantom, out, "--epochs", "500", "--workers", "1")
    wait_for(lambda: steps_done(out) >= 1)
    os.kill(children(started.pids[0])[0], signal.SIGKILL)
    assert started.wait() == [2]
    assert started.read("err").endswith("error: a reading process was killed; if memory is short, "
                                        "lower --workers\n")
    assert "Traceback" not in started.read("err")


@pytest.mark.parametrize("error,kind,message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), UserError,
     "the GPU's memory is full; raise --accumulate"),
    (UserError("Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n"
               "data.UserError: x.jsonl:3: expected images\n"), UserError,
     r"^x.jsonl:3: expected images$"),
    (ModelError("x.pt: expected weights"), UserError, "^x.pt: expected weights$"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n"),
     RuntimeError, "Caught"),  # a bug of ours keeps its traceback
])
def test_what_a_user_can_mend_is_one_line(error, kind, message):
    with pytest.raises(kind, match=message):
        train.give_up(error)


def test_collapsed_soft_labels_warn_once_an_epoch_also_in_bf16(phantom, tmp_path, capsys):
    log = run(phantom, tmp_path / "run", "--tau-text", "0", "--tau-clinical", "0", "--max-steps",
              "4", "--system", "clip-dtc", "--uncertain", "negative", "--precision", "bf16")
    assert log[4]["skipped"] == 0 and log[4]["loss"] > 0
    assert next(iter(weights(tmp_path / "run").values())).dtype == torch.float32
    assert capsys.readouterr().err.count("warning: positives_text is 12: ") == 1


# ---------------------------------------------------------------- a user's mistakes


def test_one_validation_study_gives_no_number_and_no_end(phantom, tmp_path, capsys):
    rows = rows_of(phantom)
    val = [row for row in rows if row["split"] == "val"]
    path = write(tmp_path / "one.jsonl", [r for r in rows if r["split"] == "train"] + val[:1])
    assert len(run(path, tmp_path / "run", "--max-steps", "11")) == 11  # two validations
    said = capsys.readouterr()
    assert json.loads(said.out)["finished"] and not json.loads(said.out)["best"]
    assert said.err.endswith(f"evaluate.py {tmp_path / 'run'} --data {path} --split val\n")


RAW = {"image": "a.png", "split": "train", "report": "Clear."}
LABELLED = RAW | {"labels": {"Edema": 1}}
MANIFESTS = {
    "raw": [RAW] * 4, "half": [LABELLED] * 2 + [RAW] * 2, "mute": [LABELLED] * 4,
    "empty": [LABELLED, LABELLED | {"report": " "}],
    "loose": [{"image": "a.png", "report": "Clear."}] * 4,
}


@pytest.mark.parametrize("flags,message", [
    (["--train", "nothing.jsonl"], "nothing.jsonl"),
    (["--train", "bad.jsonl"], "bad.jsonl:2: expected"),
    (["--train", "raw.jsonl", "--batch-size", "2"], "raw.jsonl:1: expected a report that is not "
     "empty, labels, and for G systems a graph, also of each hard negative; run negations.py"),
    (["--train", "half.jsonl", "--batch-size", "2", "--system", "clip"], "half.jsonl:3: expected"),
    (["--train", "mute.jsonl", "--batch-size", "2", "--system", "clip-n"],
     "mute.jsonl: expected hard_negatives to train with"),
    (["--train", "empty.jsonl", "--batch-size", "2", "--system", "clip"],
     "empty.jsonl:2: expected a report that is not empty"),
    (["--train", "raw.jsonl"], "raw.jsonl: expected at least --batch-size 128 rows of split train"),
    (["--train", "loose.jsonl"], "loose.jsonl: expected rows of split train, no rows have a split"),
    (["--tau-text", "1"], "--tau-text: expected a number of at least 0 and below 1, got 1"),
    (["--system", "softclip", "--framework", "sigmoid"], "--framework sigmoid: has no softclip"),
    (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got 0"),
    (["--resume", "latest"], "--resume latest: expected --out"),
    (["--text-encoder", ".", "--batch-size", "12"], "a Hugging Face folder with config.json"),
    (["--batch-size", "9", "--accumulate", "2"], "--batch-size 9: expected a multiple of"),
    (["--batch-size", "12", "--resume", "x.pt"], "x.pt"),
])
def test_a_mistake_is_one_clear_line_and_exit_status_2(flags, message, phantom, tmp_path, capsys,
                                                       monkeypatch):
    for name, rows in MANIFESTS.items():
        write(tmp_path / f"{name}.jsonl", [row | {"id": f"a/{k}"} for k, row in enumerate(rows)])
    (tmp_path / "bad.jsonl").write_text('{"id": "a/1", "image": "a.png"}\n{"id": \n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        run_main(lambda: train.main(["--train", str(phantom), *flags]))
    err = capsys.readouterr().err
    assert left.value.code == 2 and message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/run-*"))


def test_the_default_command_needs_no_flag_and_annotates_the_phantom_by_the_rules_of_today(
        tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PHANTOM_STUDIES", 200)
    train.main(["--max-steps", "1"])
    result = last_json(capsys)
    assert result["finished"] and result["system"] == "clip-ng-dtcg"
    assert (tmp_path / result["run"] / "last.pt").exists()
    first = Path("runs/phantom/phantom_neg.jsonl").read_text()
    assert Path(train.phantom()).read_text() == first
    annotate = train.annotate
    monkeypatch.setattr(train, "annotate", lambda record: annotate(record) | {"rules": "new"})
    assert Path(train.phantom()).read_text().count('"rules": "new"') == 200
