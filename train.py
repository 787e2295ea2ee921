"""Train the systems of Tab. 2 (Sec. 5.2, 5.5): `torchrun train.py`, native DistributedDataParallel.

    torchrun train.py                                           the whole method on the phantom
    torchrun --nproc-per-node 8 train.py --train mimic_neg.jsonl \\
        --image-encoder swin_t.pth --text-encoder emilyalsentzer/Bio_ClinicalBERT --image-size 224

A run folder holds config.json, log.jsonl (one JSON object a line), last.pt, previous.pt, best.pt
and the tokenizer. All that happens in a step is a function of (seed, step): data order,
augmentation, drawn hard negatives, dropout. So a checkpoint needs no random states, and
`--resume latest` continues bit by bit on the CPU.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import datetime
import fcntl
import functools
import gc
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    LABELLED,
    WITH_GRAPH,
    GlobalBatches,
    Manifest,
    Studies,
    check_images,
    make_phantom,
)
from evaluate import provenance, validate
from loss import DynamicSoftContrastiveLoss, SoftCLIPLoss
from model import ClinicalCLIP, export_model, load_checkpoint, load_model
from negations import annotate, leave_with_parent, minimum, open_atomic, read_jsonl, run_main

# A row of Tab. 2: hard negatives (N), graph stream (G), streams of soft labels (D; none: one-hot).
SYSTEMS = {
    "clip": (False, False, ""), "clip-dt": (False, False, "t"), "clip-dtc": (False, False, "tc"),
    "clip-n": (True, False, ""), "clip-n-dtc": (True, False, "tc"),
    "clip-g": (False, True, ""), "clip-g-dtcg": (False, True, "tcg"),
    "clip-ng-dtcg": (True, True, "tcg"), "softclip": (False, False, "softclip"),
}
PHANTOM_STUDIES = 2000
COLLAPSE = 0.8    # warn when a row of soft labels spreads over this share of its columns
MAX_SKIPPED = 10  # non-finite steps in a row that stop a run
MAX_BAD = 0.05    # share of unreadable images that stops a run
TIMEOUT = datetime.timedelta(minutes=10)  # of an exchange between ranks: a lost rank ends the run
FREE_ON_RESUME = {"out", "resume", "train", "val", "image_root", "workers", "max_steps",
                  "checkpoint_every", "export", "row_chunk"}  # other flags change the result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--train", metavar="X.jsonl", help="manifest with labels and, for N and G systems, hard "
        "negatives and graphs (negations.py); none: the phantom is drawn into runs/phantom")
    add("--val", metavar="Y.jsonl", help="manifest whose val rows validate; none: those of --train")
    add("--image-root", metavar="DIR", help="overrides the manifest's image folder")
    add("--uncertain", choices=("positive", "negative"), default="positive",
        help="what an uncertain label counts as in C")
    add("--workers", type=minimum(0), default=2, help="reading processes per rank; about the "
        "number of cores per GPU, 0 to read in between")
    add = parser.add_argument_group("model").add_argument
    add("--system", choices=SYSTEMS, default="clip-ng-dtcg", help="row of Tab. 2")
    # DIFFERS from Sec. 5.2: small encoders and images are the default; the paper's are flags.
    add("--image-encoder", default="tiny", metavar="tiny|swin-t|PATH",
        help="swin-t is the paper's with random weights, PATH a file of torchvision's Swin-T")
    add("--text-encoder", default="tiny", metavar="tiny|PATH|ID",
        help="BERT-family folder or hub id; the paper's is emilyalsentzer/Bio_ClinicalBERT")
    add("--image-size", type=minimum(32), default=64, help="pixels; the paper's is 224")
    add("--width", type=minimum(1), default=512, help="width D of the joint embedding")
    add = parser.add_argument_group("loss (Eq. 4-10; the paper publishes no values)").add_argument
    for letter, stream in zip("TCG", ("text", "clinical", "graph"), strict=True):
        add(f"--w-{stream}", type=float, default=1.0, help=f"weight w_{letter} of Eq. 10")
    for stream, tau in DynamicSoftContrastiveLoss().thresholds.items():
        add(f"--tau-{stream}", type=float, default=tau, help="threshold; lower shares labels among "
            "more studies, and collapses where all similarities are high")
    add("--row-chunk", type=minimum(1),
        help="evaluate the loss that many rows at a time, to save memory")
    # ASSUMPTION: AdamW's rate, schedule, epochs, batch are CXR-CLIP's; tiny encoders get lr 1e-3.
    # DIFFERS from CXR-CLIP: gradients are clipped, norms, biases, temperature do not decay.
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=minimum(1), default=15, help="passes over the training rows")
    add("--max-steps", type=minimum(1), help="stop early; the rate still follows --epochs")
    add("--batch-size", type=minimum(2), default=128, help="global batch N, over all ranks")
    add("--accumulate", type=minimum(1), default=1, help="micro-batches per step and rank: memory "
        "of one, negatives and gradients of all")
    add("--lr", type=minimum(0, float),
        help="peak learning rate; none: 5e-5, or 1e-3 with two tiny encoders")
    add("--weight-decay", type=minimum(0, float), default=1e-4,
        help="not on norms, biases and temperature")
    add("--warmup-epochs", type=minimum(0, float), default=1.0,
        help="linear warm-up before the cosine")
    add("--clip", type=minimum(1e-9, float), default=1.0, help="largest gradient norm")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 autocasts the encoders")
    add("--seed", type=minimum(0), default=0, help="weights, data order, augmentation, dropout")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="runs/NAME", help="run folder; none: a fresh one below runs/")
    add("--resume", metavar="PATH|latest", help="a checkpoint, or the newest intact one of --out")
    add("--checkpoint-every", type=minimum(1), default=500, metavar="STEPS",
        help="steps between saves")
    add("--export", metavar="DIR", help="at the end write safetensors, config and tokenizer there")
    args = parser.parse_args(argv)
    if args.export and Path(args.export).exists() and not args.resume:
        parser.error(f"--export {args.export}: exists; choose another folder")
    if args.resume == "latest" and not args.out:
        parser.error("--resume latest: expected --out, the run folder to continue")
    if args.lr is None:
        args.lr = 1e-3 if args.image_encoder == args.text_encoder == "tiny" else 5e-5
    return args


# ---------------------------------------------------------------- ranks, seeds, signals


def start_ranks():
    """Join the process group torchrun describes. Returns rank, world and this rank's device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    return rank, world, torch.device(device)


def on_rank_0(function, rank, world):
    """Run `function` on rank 0 alone and give its result to every rank; its error ends all."""
    box = [None]
    if rank == 0:
        try:
            box = [function()]
        except (ValueError, OSError) as error:
            box = [ValueError(str(error))]
    if world > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0] if rank == 0 else SystemExit(2)  # one rank prints it
    return box[0]


def seed_step(seed, step, rank, micro):
    """Dropout and stochastic depth become a function of (seed, step, rank, micro-batch)."""
    state = np.random.SeedSequence([seed, step, rank, micro]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def start_worker(_worker):
    """Reading processes outlive a signal to their group by half a minute, for the last save."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    for name in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    leave_with_parent()  # which may be killed; a folder's lock lives as long as they do
    gc.freeze()  # a collection would touch, and so copy, every inherited page


# ---------------------------------------------------------------- the run folder


def open_folder(args):
    """The run folder of --out, or a fresh one; one that exists is only opened to resume."""
    if args.out is None:
        number = 1
        while (folder := Path("runs") / f"run-{number:03}").exists():
            number += 1
    else:
        folder = Path(args.out)
        if folder.exists() and not args.resume and any(folder.iterdir()):
            raise ValueError(f"{folder}: exists; continue it with --resume latest or choose "
                             "another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lock_folder(folder):
    """An open file whose lock keeps other runs out for as long as it lives."""
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: in use by another process") from None
    for leftover in folder.glob(".*.pt.*"):  # of a save that a kill cut short
        leftover.unlink()
    return lock


def find_checkpoint(args):
    """Path of the checkpoint to resume from: PATH, or the newest intact one of the run folder."""
    if args.resume != "latest":
        return args.resume
    damaged = []
    for path in filter(Path.exists, (Path(args.out) / name for name in ("last.pt", "previous.pt"))):
        try:
            load_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            print(f"warning: {line}; using {path.name}", file=sys.stderr)
        return str(path)
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; remove the folder to start afresh")
    return None


def memory_mb(device):
    """Peak memory of this process, on the GPU where there is one."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


class Run:
    """What a run carries from step to step, and its record in the run folder, kept by rank 0."""

    def __init__(self, args, rank, world, device, clip, optimizer, num_studies):
        self.args, self.folder, self.device = args, None, device
        self.rank, self.world, self.num_studies = rank, world, num_studies
        self.clip, self.optimizer = clip, optimizer
        self.state = {"step": 0, "validated": 0, "skipped": 0, "skipped_in_a_row": 0,
                      "unreadable": 0, "best": {}}  # step counts finished steps

    def resume(self, saved):
        """Go on from a checkpoint; refuse flags that would make it another run."""
        changed = [f"--{name.replace('_', '-')} was {saved['flags'].get(name)!r}, is now {value!r}"
                   for name, value in vars(self.args).items()
                   if name not in FREE_ON_RESUME and saved["flags"].get(name) != value]
        if changed:
            raise ValueError(f"cannot resume with other flags: {'; '.join(changed)}")
        if saved["studies"] != self.num_studies:
            raise ValueError(f"cannot resume with other data: --train had {saved['studies']} "
                             f"training studies, has {self.num_studies} now")
        self.clip.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["state"]
        if saved["world"] != self.world:
            self.say(f"warning: the run had {saved['world']} ranks and has {self.world} now; it "
                     "goes on, but not bit by bit")

    def say(self, line):
        if self.rank == 0:
            tqdm.write(line, file=sys.stderr)

    def log(self, record):
        if self.rank == 0:
            record = {k: None if v != v or v in (math.inf, -math.inf) else v  # JSON has no NaN
                      for k, v in record.items()}
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def start_log(self, total, rows, val_rows):
        """Write config.json and the tokenizer; drop log records the checkpoint does not know."""
        if self.rank:
            return
        self.clip.save_tokenizer(self.folder / "tokenizer")
        with open_atomic(self.folder / "config.json") as file:
            json.dump({"flags": vars(self.args), "world": self.world, **provenance()}, file,
                      indent=1)
        step, log = self.state["step"], self.folder / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines()
                     if line.endswith("}") and json.loads(line).get("step", 0) <= step]
            with open_atomic(log) as file:
                file.writelines(line + "\n" for line in lines)
        self.log({"argv": sys.argv, "from_step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S")})
        size = sum(p.numel() for p in self.clip.parameters() if p.requires_grad)
        self.say(f"run folder    {self.folder}\n"
                 f"system        {self.args.system} (Tab. 2), {size:,} trained weights\n"
                 f"data          {rows:,} training and {val_rows:,} validation studies\n"
                 f"steps         {step} to {total:,}, {self.args.batch_size} studies each, "
                 f"{self.world} rank(s) on {self.device.type}")

    def save(self, name="last.pt"):
        """Write a checkpoint; the last one becomes previous.pt, and a full disk costs only this."""
        if self.rank:
            return
        path, spare = self.folder / name, self.folder / "previous.tmp"
        flags = {k: v for k, v in vars(self.args).items() if k not in FREE_ON_RESUME}
        try:
            if name == "last.pt" and path.exists():
                spare.unlink(missing_ok=True)
                os.link(path, spare)
                os.replace(spare, self.folder / "previous.pt")
            with open_atomic(path, "wb") as file:
                torch.save({"model": self.clip.state_dict(), "model_config": self.clip.config,
                            "optimizer": self.optimizer.state_dict(), "state": self.state,
                            "flags": flags, "world": self.world, "studies": self.num_studies}, file)
        except (OSError, RuntimeError) as error:  # torch's zip writer hides the disk's error
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            self.say(f"warning: {path} was not written ({cause.strerror}); the one before stands")

    def validate(self, val_rows):
        """Zero-shot AUROC and retrieval on the val rows; best.pt keeps the best, never the loss."""
        # ASSUMPTION: the model to evaluate is best.pt, the best zero-shot AUROC in validation.
        step = self.state["step"]
        self.save()  # a signal during validation loses nothing
        self.state["validated"] = step
        if len(val_rows):
            workers = self.args.workers if len(val_rows) > 1000 else 0
            result = validate(self.clip, val_rows, self.args.batch_size, workers)
            self.clip.train()
            result = {k: None if math.isnan(v) else round(v, 6) for k, v in result.items()}
            self.log({"step": step, "val": result})
            self.say(f"step {step:>6}   val   " + "   ".join(
                f"{k} {'n/a' if v is None else format(v, '.3f')}" for k, v in result.items()))
            by = "retrieval@5" if result["auroc"] is None else "auroc"
            best = self.state["best"].get(by)
            if best is None or result[by] is not None and result[by] > best:
                self.state["best"] = {"step": step, **result}
                self.save("best.pt")
        self.save()

    def warn_of_collapse(self, values, num_texts, warned):
        """Once an epoch, when soft labels turn uniform: the KL then falls with nothing learned."""
        for name, value in values.items():
            if name in ("positives_text", "positives_graph") and name not in warned \
                    and value > COLLAPSE * num_texts:
                warned.add(name)
                self.say(f"warning: {name} is {value:.0f} of {num_texts}: the soft labels have "
                         f"nearly collapsed; raise --tau-{name.removeprefix('positives_')}")

    def report_unreadable(self, epoch, unreadable, manifest):
        """At the end of an epoch: which training rows were replaced, on all ranks, and lines."""
        parts = [sorted(unreadable)] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, sorted(unreadable))
        rows = sorted({row for part in parts for row in part})
        self.state["unreadable"] += len(rows)
        if rows:
            self.say(f"warning: epoch {epoch}: {len(rows)} unreadable images were replaced; "
                     f"training rows {rows[:20]}{' ...' * (len(rows) > 20)}, lines "
                     f"{[manifest.line(row) for row in rows[:20]]} of {manifest.path}")

    def stop_for_bad_numbers(self, values, batches, manifest):
        terms = [name for name, value in values.items() if not math.isfinite(value)]
        rows = torch.cat([b["index"] for b in batches]).tolist()
        raise ValueError(f"step {self.state['step']}: {MAX_SKIPPED} steps in a row without finite "
                         f"numbers, the last in {', '.join(terms)}; rank {self.rank}'s training "
                         f"rows there: {rows}, lines {[manifest.line(row) for row in rows]}")

# ---------------------------------------------------------------- data


def phantom():
    """The embedded data set: drawn once into runs/phantom, then annotated like any report."""
    raw = make_phantom(Path("runs/phantom"), studies=PHANTOM_STUDIES)
    path = raw.with_name("phantom_neg.jsonl")
    if not path.exists() or path.stat().st_mtime < raw.stat().st_mtime:
        with open_atomic(path) as file:
            for _, record in tqdm(read_jsonl(raw), total=PHANTOM_STUDIES, desc="phantom reports"):
                file.write(json.dumps(annotate(record), ensure_ascii=False) + "\n")
    return str(path)


def check_rows(args, rows, graphs):
    """Enough training rows, each with what the system needs."""
    if len(rows) < args.batch_size:
        raise ValueError(f"{rows.path}: expected at least --batch-size {args.batch_size} rows of "
                         f"split train, got {len(rows)}")
    needed = LABELLED | WITH_GRAPH if graphs else LABELLED
    lacking = np.flatnonzero(rows.bits & needed != needed)
    if len(lacking):
        raise ValueError(f"{rows.path}:{rows.line(lacking[0])}: expected report, labels"
                         f"{' and graph' * graphs}, also of each hard negative, for --system "
                         f"{args.system}; run negations.py on it first")


def read_batches(studies, args, step, epoch_steps, rank, world):
    """Yield this rank's micro-batches from `step` of the run on, --accumulate of them per step.

    One set of reading processes serves all epochs: starting them anew costs about a second.
    """
    def keys():
        for epoch in range(step // epoch_steps, args.epochs):
            start = step % epoch_steps if epoch == step // epoch_steps else 0
            for rows in GlobalBatches(len(studies), args.batch_size, args.seed, epoch, rank, world,
                                      start):
                yield from (part.tolist() for part in np.array_split(rows, args.accumulate))

    yield from DataLoader(studies, batch_sampler=keys(), num_workers=args.workers,
                          collate_fn=studies.collate, worker_init_fn=start_worker,
                          pin_memory=torch.cuda.is_available())


def to_device(x, device):
    if isinstance(x, dict):
        return {k: to_device(v, device) for k, v in x.items()}
    return x.to(device, non_blocking=True) if torch.is_tensor(x) else x


# ---------------------------------------------------------------- one step


def build_loss(args):
    _, _, streams = SYSTEMS[args.system]
    if streams == "softclip":
        return SoftCLIPLoss(row_chunk=args.row_chunk)
    w = {name: getattr(args, f"w_{name}") if name[0] in streams else 0.0
         for name in ("text", "clinical", "graph")}
    return DynamicSoftContrastiveLoss(w["text"], w["clinical"], w["graph"], args.tau_text,
                                      args.tau_clinical, args.tau_graph, soft=bool(streams),
                                      row_chunk=args.row_chunk)


def forward_backward(model, criterion, batches, autocast, seed):
    """Fig. 3, a step: gradients of the loss of all micro-batches together, and the loss's dict.

    One micro-batch: the plain way. Several: embed all without gradients, take the loss's gradient
    with respect to the embeddings, then replay each micro-batch with the same random state and send
    its share of that gradient through (gradient caching). Each negative of the batch is kept.
    """
    def embed(micro):
        seed(micro)
        with autocast:
            return model(batches[micro])

    def evaluate(out):
        labels = {k: torch.cat([b[k] for b in batches]) for k in ("labels", "hard_labels")
                  if k in batches[0]}
        return criterion(**out, **labels)

    if len(batches) == 1:
        out = evaluate(embed(0))
        out["loss"].backward()
        return out
    with torch.no_grad():
        parts = [embed(micro) for micro in range(len(batches))]
    whole = {k: torch.cat([p[k] for p in parts]).requires_grad_() for k in parts[0]
             if k != "logit_scale"}
    whole["logit_scale"] = parts[0]["logit_scale"].requires_grad_()
    out = evaluate(whole)
    out["loss"].backward()
    grads = {k: v.grad.split([len(p["image"]) for p in parts]) if v.dim() else v.grad
             for k, v in whole.items()}
    for micro in range(len(batches)):
        last = micro == len(batches) - 1
        sync = last or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if sync else model.no_sync():
            again = embed(micro)
            share = sum((v * grads[k][micro]).sum() for k, v in again.items() if v.dim())
            (share + again["logit_scale"] * grads["logit_scale"] * last).backward()
    return out


def learning_rate(step, args, epoch_steps):
    """Linear warm-up, then half a cosine to zero at the end of --epochs: a function of the step."""
    warmup, total = args.warmup_epochs * epoch_steps, args.epochs * epoch_steps
    if step < warmup:
        return args.lr * min(1, (step + 1) / warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay):
    """Weight decay on matrices alone: none on biases, norms, temperature and the empty node."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1 and "bias" not in name].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0}]


def train(run, model, criterion, batches, studies, val_rows, epoch_steps, total):
    """Steps and validations up to `total`. Returns early, saved, if a signal asks any rank to."""
    args, state, device = run.args, run.state, run.device
    signals = []
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda number, _frame: signals.append(number))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    num_texts = args.batch_size * (2 if studies.negatives else 1)
    bar = tqdm(total=total, initial=state["step"], desc=args.system, disable=run.rank > 0)
    while True:
        epoch, first = divmod(state["step"], epoch_steps)
        if (first == 0 or state["step"] >= total) and state["step"] > state["validated"]:
            run.validate(val_rows)
        if state["step"] >= total:
            return bar.close()
        unreadable, warned = set(), set()
        for step in range(state["step"], min(total, (epoch + 1) * epoch_steps)):
            began = time.perf_counter()
            micro = [to_device(next(batches), device) for _ in range(args.accumulate)]
            unreadable.update(row for batch in micro for row in batch["bad"].tolist())
            waited = time.perf_counter() - began
            # lr
            lr = learning_rate(step, args, epoch_steps)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            # forward + loss + backward
            run.optimizer.zero_grad()
            out = forward_backward(model, criterion, micro, autocast,
                                   functools.partial(seed_step, args.seed, step, run.rank))
            # step: the loss and the norm are one on all ranks, so all skip together
            norm = torch.nn.utils.clip_grad_norm_(run.clip.parameters(), args.clip)
            counts = torch.tensor([float(len(signals)), len(unreadable)], device=device)
            if run.world > 1:
                dist.all_reduce(counts)
            *values, norm, stop, bad = torch.stack([*out.values(), norm, *counts]).tolist()
            values = dict(zip(out, values, strict=True)) | {"grad_norm": norm}
            finite = math.isfinite(values["loss"]) and math.isfinite(norm)
            if finite:
                run.optimizer.step()
                run.clip.clamp_temperature()
            state["step"] = step + 1
            state["skipped"] += not finite
            state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
            # log
            took = time.perf_counter() - began
            run.log({"step": step + 1, "epoch": epoch, **values, "lr": lr,
                     "temperature": math.exp(-run.clip.logit_scale.item()),
                     "skipped": state["skipped"], "images_per_s": args.batch_size / took,
                     "data_wait": waited / took, "memory_mb": memory_mb(device)})
            run.warn_of_collapse(values, num_texts, warned)
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False,
                            text_positives=f"{values['positives_text']:.1f}/{num_texts}")
            bar.update()
            if state["skipped_in_a_row"] == MAX_SKIPPED:
                run.stop_for_bad_numbers(values, micro, studies.manifest)
            if bad > MAX_BAD * len(studies):
                raise ValueError(f"{bad:.0f} images of epoch {epoch} could not be read, more than "
                                 f"{MAX_BAD:.0%}; see python data.py check {studies.manifest.path}")
            # checkpoint
            if stop:
                run.report_unreadable(epoch, unreadable, studies.manifest)
            if stop or (step + 1) % args.checkpoint_every == 0:
                run.save()
            if stop:
                bar.close()
                return run.say(f"a signal came: saved after step {step + 1}; go on with --resume")
        run.report_unreadable(epoch, unreadable, studies.manifest)


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    if args.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of {world} ranks x "
                         f"--accumulate {args.accumulate}")
    began = time.perf_counter()
    path = args.train or on_rank_0(phantom, rank, world)
    on_rank_0(lambda: len(Manifest(path)), rank, world)  # one rank alone writes the index
    train_rows = Manifest(path, "train", args.image_root)
    val_rows = Manifest(args.val or path, "val", args.image_root)
    if not len(val_rows) and rank == 0:
        print(f"warning: {val_rows.path} has no row of split val: nothing is validated and there "
              "will be no best.pt", file=sys.stderr)

    negatives, graphs, _ = SYSTEMS[args.system]
    check_rows(args, train_rows, graphs)
    criterion = build_loss(args)
    torch.manual_seed(args.seed)  # weights are the same on all ranks
    clip = ClinicalCLIP(args.image_encoder, args.text_encoder, args.width, args.image_size,
                        graph=graphs).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(clip, args.weight_decay), lr=args.lr,
                                  fused=device.type == "cuda")
    studies = Studies(train_rows, image_size=args.image_size, tokenize=clip.tokenize,
                      negatives=negatives, graphs=graphs, uncertain=args.uncertain, seed=args.seed)
    epoch_steps = len(GlobalBatches(len(studies), args.batch_size, args.seed, 0))
    total = min(args.epochs * epoch_steps, args.max_steps or sys.maxsize)

    checkpoint = on_rank_0(lambda: find_checkpoint(args), rank, world)
    saved = load_checkpoint(Path(checkpoint)) if checkpoint else None
    run = Run(args, rank, world, device, clip, optimizer, len(studies))
    if saved:
        run.resume(saved)
    del saved  # as large as the model and its optimiser
    if run.state["validated"] < total:
        on_rank_0(lambda: studies[0, 0] and None, rank, world)  # is the image root right?
        workers = args.workers if len(val_rows) > 1000 else 0
        on_rank_0(lambda: check_images(val_rows, workers), rank, world)  # not after an epoch
    # Only now, so that a mistake above leaves no folder behind.
    run.folder, locks = on_rank_0(lambda: open_folder(args), rank, world), []
    on_rank_0(lambda: locks.append(lock_folder(run.folder)), rank, world)
    if run.state["validated"] < total:
        run.start_log(total, len(studies), len(val_rows))
        model = DistributedDataParallel(clip) if world > 1 else clip
        batches = read_batches(studies, args, run.state["step"], epoch_steps, rank, world)
        with contextlib.closing(batches):
            train(run, model, criterion, batches, studies, val_rows, epoch_steps, total)
    if rank == 0:
        whole = args.export and (Path(args.export) / "config.json").exists()
        if args.export and run.state["validated"] >= total and not whole:
            source = run.folder if (run.folder / "last.pt").exists() else checkpoint
            export_model(load_model(source), Path(args.export))
        print(json.dumps({"run": str(run.folder), "system": args.system, "seed": args.seed,
                          "finished": run.state["validated"] >= total, "step": run.state["step"],
                          "skipped": run.state["skipped"], "unreadable": run.state["unreadable"],
                          "best": run.state["best"],
                          "seconds": round(time.perf_counter() - began)}))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
