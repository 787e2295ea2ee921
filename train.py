"""Train the systems of Tab. 2 (Sec. 5.2, 5.5): `torchrun train.py`, native DistributedDataParallel.

    torchrun train.py                                           the whole method on the phantom
    torchrun --nproc-per-node 8 train.py --train mimic_neg.jsonl \\
        --image-encoder swin_t.pth --text-encoder emilyalsentzer/Bio_ClinicalBERT --image-size 224

In this order: the systems, one step, the loop; the run folder; data; ranks, seeds, signals; flags.

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
import gc
import io
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401, imported later its functions would hold the process group
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    GlobalBatches,
    Manifest,
    Studies,
    UserError,
    check_images,
    expect,
    make_phantom,
    minimum,
    open_atomic,
    open_file,
    read_jsonl,
    run_main,
)
from evaluate import provenance, validate
from loss import (
    DynamicSoftContrastiveLoss,
    SigmoidSoftContrastiveLoss,
    SoftCLIPLoss,
    soft_labels,
)
from model import ClinicalCLIP, ModelError, load_checkpoint
from negations import annotate

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
PATIENCE = datetime.timedelta(days=1)     # with rank 0, while it validates, saves or checks
FREE_ON_RESUME = {"out", "resume", "train", "val", "image_root", "workers", "max_steps",
                  "checkpoint_every", "row_chunk"}  # other flags change the result


# ---------------------------------------------------------------- one step


def build_loss(args):
    """The loss of --system and --framework; a stream that the system lacks has weight 0."""
    _, _, streams = SYSTEMS[args.system]
    if streams == "softclip":
        return SoftCLIPLoss(row_chunk=args.row_chunk)
    weights = {"text": args.w_text, "clinical": args.w_clinical, "graph": args.w_graph}
    for name in weights:
        if name[0] not in streams:
            weights[name] = 0.0
    kind = DynamicSoftContrastiveLoss
    if args.framework == "sigmoid":
        kind = SigmoidSoftContrastiveLoss
    return kind(*weights.values(), args.tau_text, args.tau_clinical, args.tau_graph,
                soft=streams != "", row_chunk=args.row_chunk)


def embed(model, batch, autocast, seed):
    """Fig. 3's encoders: unit rows (B, D) by name, and the scalars logit_scale, logit_bias."""
    seed_step(*seed)
    with autocast:
        return model(batch)


def labels_of(batches):
    """C1 and, where there are hard negatives, C2 of all micro-batches: (B, 14) by name."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]
            if name in ("labels", "hard_labels")}


def plain_step(model, criterion, batch, autocast, seed):
    """One batch forward and backward: leaves gradients, returns the loss's dict."""
    losses = criterion(**embed(model, batch, autocast, (*seed, 0)), **labels_of([batch]))
    losses["loss"].backward()
    return losses


@torch.no_grad()
def embed_all(model, batches, autocast, seed):
    """The same of all micro-batches together, without a graph."""
    embedded = [embed(model, batch, autocast, (*seed, micro))
                for micro, batch in enumerate(batches)]
    whole = {}
    for name, x in embedded[0].items():
        whole[name] = x.clone()  # a scalar
        if x.dim() == 2:
            whole[name] = torch.cat([micro[name] for micro in embedded])      # (B, D)
    return whole


def cached_step(model, criterion, batches, autocast, seed):
    """The same gradients from micro-batches, with the memory of one: gradient caching.

    Embed all without a graph; take the loss of all rows together, and its gradient with respect
    to the embeddings; embed each micro-batch again, with the same random state, and send its share
    of that gradient through the encoders. So every negative of the batch is kept.
    """
    count, whole = len(batches), embed_all(model, batches, autocast, seed)
    for x in whole.values():
        x.requires_grad_()
    losses = criterion(**whole, **labels_of(batches))
    losses["loss"].backward()
    for micro, batch in enumerate(batches):
        with contextlib.ExitStack() as stack:
            if micro < count - 1 and isinstance(model, DistributedDataParallel):
                stack.enter_context(model.no_sync())  # ranks exchange gradients with the last
            again = embed(model, batch, autocast, (*seed, micro))
            shares = []
            for name, x in again.items():
                gradient = whole[name].grad
                shares.append(gradient.chunk(count)[micro] if x.dim() == 2 else gradient / count)
            torch.autograd.backward(list(again.values()), shares)
    return losses


def learning_rate(step, args, epoch_steps):
    """Linear warm-up, then half a cosine to zero at the end of --epochs: a function of the step."""
    warmup, total = args.warmup_epochs * epoch_steps, args.epochs * epoch_steps
    if step < warmup:
        return args.lr * min(1, (step + 1) / warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model, weight_decay):
    """Weight decay on matrices alone: none on biases, norms, temperature and the empty node."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() > 1 and "bias" not in name:
            decayed.append(parameter)
        else:
            spared.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]


# ---------------------------------------------------------------- the loop


def train(run, model, criterion, batches, bar):
    """Steps and validations up to `run.total`; leaves early, saved, when a signal asks any rank."""
    args, state, ranks, device = run.args, run.state, run.ranks, run.ranks.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    signals, unreadable, warned = listen(), set(), set()
    if run.epoch_is_over() and state.validated < state.step:
        run.validate()
    while state.step < run.total:
        began, epoch = time.perf_counter(), state.step // run.epoch_steps
        micro = [next(batches) for _ in range(args.accumulate)]
        for batch in micro:
            unreadable.update(batch.pop("bad").tolist())
        micro = [to_device(batch, device) for batch in micro]
        waited = time.perf_counter() - began
        # lr
        lr = learning_rate(state.step, args, run.epoch_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        # forward + loss + backward
        run.optimizer.zero_grad()
        seed = args.seed, state.step, ranks.rank
        if args.accumulate == 1:
            losses = plain_step(model, criterion, micro[0], autocast, seed)
        else:
            losses = cached_step(model, criterion, micro, autocast, seed)
        # step: the numbers are the same on all ranks, so all skip together
        losses["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.clip.parameters(), args.clip)
        losses["logit_scale"] = run.clip.logit_scale.detach()
        if args.framework == "sigmoid":
            losses["logit_bias"] = run.clip.logit_bias.detach()
        values, stop, bad = read_numbers(ranks, losses, len(signals), len(unreadable))
        logit_scale = values.pop("logit_scale")
        state.step += 1
        state.skipped_in_a_row += 1
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            run.optimizer.step()
            run.clip.clamp_temperature()
            state.skipped_in_a_row = 0
        else:
            state.skipped += 1
        # log
        took = time.perf_counter() - began
        run.log(step=state.step, epoch=epoch, **values, lr=lr, skipped=state.skipped,
                temperature=math.exp(-logit_scale), images_per_s=args.batch_size / took,
                data_wait=waited / took, memory_mb=memory_mb(device))
        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        bar.update()
        warn_of_collapse(run, values, warned)
        if state.skipped_in_a_row == MAX_SKIPPED:
            stop_for_bad_numbers(run, values, micro)
        if bad > MAX_BAD * len(run.studies):
            refuse(ranks, f"{bad:.0f} images of an epoch could not be read, more than "
                   f"{MAX_BAD:.0%}; see python data.py check {run.studies.manifest.path}")
        # checkpoint
        if stop or run.epoch_is_over():
            run.report_unreadable(unreadable)
            unreadable, warned = set(), set()
        if stop:
            run.save()
            say(ranks, f"a signal came: saved after step {state.step}; go on with --resume")
            return
        if run.epoch_is_over():
            run.validate()
        elif state.step % args.checkpoint_every == 0:
            run.save()


def read_numbers(ranks, scalars, signals, unreadable):
    """A step's numbers on the CPU, in one copy: the only time that a step waits for the device.

    scalars: tensors by name; signals, unreadable: counts of this rank. Returns floats by name, and
    both counts summed over ranks.
    """
    counts = torch.tensor([float(signals), float(unreadable)])
    counts = counts.to(ranks.device, non_blocking=True)
    if ranks.world > 1:
        dist.all_reduce(counts)
    *values, signals, unreadable = torch.stack([*scalars.values(), *counts]).detach().tolist()
    return dict(zip(scalars, values, strict=True)), signals, unreadable


def warn_of_collapse(run, values, warned):
    """Once an epoch, when soft labels turn uniform: the KL then falls with nothing learned."""
    for name in ("text", "graph"):
        value = values.get(f"positives_{name}", 0.0)
        if value > COLLAPSE * run.num_texts and name not in warned:
            warned.add(name)
            say(run.ranks, f"warning: positives_{name} is {value:.0f} of {run.num_texts}: the soft "
                f"labels have nearly collapsed; raise --tau-{name}")


def stop_for_bad_numbers(run, values, batches):
    """End the run, naming the terms that are no numbers and the lines of the last batch."""
    terms = [name for name, value in values.items() if not math.isfinite(value)]
    rows = torch.cat([batch["index"] for batch in batches]).tolist()
    refuse(run.ranks, f"step {run.state.step}: {MAX_SKIPPED} steps in a row without finite "
           f"numbers, the last in {', '.join(terms)}, of {lines_of(run, rows)}")


def look_ahead(run, criterion, batches):
    """Before step 1: what each threshold makes of these encoders; the sigmoid loss's first bias.

    Similarities of reports depend on the encoder, so no threshold suits two of them.
    """
    args, ranks, clip = run.args, run.ranks, run.clip
    batches = [to_device(batch, ranks.device) for batch in batches]
    whole = embed_all(clip, batches, contextlib.nullcontext(), (args.seed, 0, ranks.rank))
    texts = torch.cat([x for name, x in whole.items() if name in ("text", "hard_text")]).cpu()
    texts = torch.cat(all_ranks(ranks, texts))[:1024]                         # (n, D)
    positives = ""
    for tau in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98):
        y_hat = soft_labels(texts @ texts.T, tau)                             # (n, n)
        positives += f"   {tau}: {torch.special.entr(y_hat).sum(1).exp().mean():.1f}"
    say(ranks, f"positives     that a report has in effect among {len(texts)} texts of the first "
        f"batch, by --tau-text\n           {positives}\n              1: one-hot, as in CLIP; near "
        f"{len(texts)}: all alike, nothing is learned; choose a few")
    if args.framework == "sigmoid":
        inputs = {k: x for k, x in whole.items() if "text" in k or "graph" in k}
        with torch.no_grad():
            clip.logit_bias.fill_(criterion.initial_bias(**inputs, **labels_of(batches)))


# ---------------------------------------------------------------- the run folder


class Run:
    """What a run carries from step to step, and its record in the run folder.

    All ranks call the methods together; rank 0 alone writes, and the others wait for it.
    """

    def __init__(self, args, ranks, folder, path):
        self.args, self.ranks, self.folder = args, ranks, folder
        negatives, graphs, _ = SYSTEMS[args.system]
        torch.manual_seed(args.seed)  # weights are the same on all ranks
        clip = ClinicalCLIP(args.image_encoder, args.text_encoder, args.width, args.image_size,
                            graph=graphs, framework=args.framework)
        self.clip = clip.to(ranks.device).train()
        self.studies = Studies(Manifest(path, "train", args.image_root), tokenize=clip.tokenize,
                               image_size=args.image_size, negatives=negatives, graphs=graphs,
                               uncertain=args.uncertain, seed=args.seed)
        self.val_rows = Manifest(args.val or path, "val", args.image_root)
        self.optimizer = torch.optim.AdamW(parameter_groups(clip, args.weight_decay), lr=args.lr,
                                           fused=ranks.device.type == "cuda")
        self.num_texts = args.batch_size * (2 if negatives else 1)
        self.epoch_steps = len(self.studies) // args.batch_size
        self.total = min(args.epochs * self.epoch_steps, args.max_steps or sys.maxsize)
        self.state = SimpleNamespace(step=0, validated=0, skipped=0, skipped_in_a_row=0,
                                     unreadable=0, best={})  # step counts finished steps
        self.saved_step = None  # of last.pt, if this run wrote it or took it up

    def resume(self, checkpoint):
        """Go on from a checkpoint; refuse flags and data that would make it another run."""
        try:
            saved = load_checkpoint(Path(checkpoint))
        except ModelError as error:
            raise UserError(f"--resume: {error}") from None
        changed = [f"--{name.replace('_', '-')} was {saved['flags'].get(name)!r}, is now {value!r}"
                   for name, value in self.flags().items() if saved["flags"].get(name) != value]
        expect(not changed, "cannot resume", f"the same flags: {'; '.join(changed)}")
        expect(saved.get("data") == self.studies.manifest.digest(), "cannot resume",
               f"the same data: the training rows of {self.studies.manifest.path} are others now")
        self.clip.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = SimpleNamespace(**saved["state"])
        if Path(checkpoint) == self.folder / "last.pt":
            self.saved_step = self.state.step
        if not (self.folder / "best.pt").exists():
            self.state.best = {}  # it stayed in the folder that the checkpoint came from
        if saved["world"] != self.ranks.world:
            say(self.ranks, f"warning: the run had {saved['world']} ranks and has "
                f"{self.ranks.world} now; it goes on, but not bit by bit")

    def flags(self):
        return {k: v for k, v in vars(self.args).items() if k not in FREE_ON_RESUME}

    def epoch_is_over(self):
        return self.state.step % self.epoch_steps == 0 or self.state.step >= self.total

    def is_finished(self):
        """Whether all steps are made and validated, some with an effect, and last.pt holds them."""
        return (self.state.validated >= self.total and self.state.skipped < self.state.step
                and self.saved_step == self.state.step)

    def log(self, **record):
        """Append a record to log.jsonl; what is no number becomes null."""
        if self.ranks.rank == 0:
            for name, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[name] = None
            with open_file(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def start_record(self):
        """config.json, the tokenizer and the head of the log, without what a checkpoint forgot."""
        self.clip.save_tokenizer(self.folder / "tokenizer")
        with open_atomic(self.folder / "config.json") as file:
            json.dump({"flags": vars(self.args), "world": self.ranks.world, **provenance()}, file,
                      indent=1)
        step, path, records = self.state.step, self.folder / "log.jsonl", []
        if path.exists():
            for number, record in read_jsonl(path):
                logged = record.get("step", 0)
                expect(isinstance(logged, int), f"{path}:{number}", "step as a whole number")
                if logged <= step:
                    records.append(record)
        with open_atomic(path) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.log(argv=sys.argv, from_step=step, time=time.strftime("%Y-%m-%d %H:%M:%S"))
        say(self.ranks,
            f"run folder    {self.folder}\n"
            f"data          {len(self.studies):,} training and {len(self.val_rows):,} validation "
            "studies (without any: no best.pt)\n"
            f"steps         {step} to {self.total:,}, {self.args.batch_size} studies each, "
            f"{self.ranks.world} rank(s) on {self.ranks.device.type}")

    def save(self, name="last.pt"):
        """Write a checkpoint; a full disk costs that one. Returns whether it was written.

        Renames alone, which any file system can: last to previous, new to last. Readers take
        previous.pt while there is no last.pt. A last.pt that this run has not written or read may
        be damaged, and must not take the place of previous.pt.
        """
        def write():
            buffer, path = io.BytesIO(), self.folder / name
            torch.save({"model": self.clip.state_dict(), "model_config": self.clip.config,
                        "optimizer": self.optimizer.state_dict(), "state": vars(self.state),
                        "flags": self.flags(), "world": self.ranks.world,
                        "data": self.studies.manifest.digest()}, buffer)
            spare = "last.damaged.pt" if self.saved_step is None else "previous.pt"
            try:
                with open_atomic(path, "wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    if name == "last.pt" and path.exists():
                        os.replace(path, self.folder / spare)
            except UserError as error:
                say(self.ranks, f"warning: {error}; the one before stands")
                return False
            return True

        written = on_rank_0(self.ranks, write)
        if written and name == "last.pt":
            self.saved_step = self.state.step
        return written

    def validate(self):
        """Zero-shot AUROC and retrieval on the val rows; best.pt keeps the best, never the loss."""
        self.save()  # a signal during validation loses nothing
        self.state.validated = self.state.step
        if len(self.val_rows):
            better = on_rank_0(self.ranks, self.measure)
            if better and self.save("best.pt"):
                self.state.best = better
        self.save()

    def measure(self):
        """Validate and log; the result where it is the best so far, else None."""
        # ASSUMPTION: the model to evaluate is best.pt, the best zero-shot AUROC in validation.
        result = validate(self.clip, self.val_rows, self.args.batch_size,
                          self.args.workers)
        self.clip.train()
        result = {k: None if math.isnan(v) else round(v, 6) for k, v in result.items()}
        step, by = self.state.step, "auroc"
        self.log(step=step, val=result)
        say(self.ranks, f"step {step:>6}   val   " + "   ".join(
            f"{k} {'n/a' if v is None else format(v, '.3f')}" for k, v in result.items()))
        if result[by] is None:
            by = "retrieval@5"
        best = self.state.best.get(by)
        if best is None or (result[by] is not None and result[by] > best):
            return {"step": step, **result}
        return None

    def report_unreadable(self, unreadable):
        """At the end of an epoch: which training images of all ranks were replaced."""
        unreadable = set().union(*all_ranks(self.ranks, unreadable))
        self.state.unreadable += len(unreadable)
        if unreadable:
            say(self.ranks, f"warning: {len(unreadable)} unreadable images of this epoch were "
                f"replaced: {lines_of(self, unreadable)}")


def lines_of(run, rows):
    """Where training rows stand; the first twenty are enough to look at."""
    manifest = run.studies.manifest
    lines = sorted(manifest.line(row) for row in rows)
    return f"{manifest.path}, lines {', '.join(map(str, lines[:20]))}"


@contextlib.contextmanager
def open_folder(args):
    """The run folder, --out or a fresh one, locked; it goes again if nothing came of it."""
    number = 1
    while Path(f"runs/run-{number:03}").exists():
        number += 1
    folder = Path(args.out or f"runs/run-{number:03}")
    goes_on = args.resume and (args.resume == "latest" or Path(args.resume).parent == folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        expect(goes_on or not os.listdir(folder), folder, "a new folder, found another run's: "
               "continue that with --resume latest or choose another --out")
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to ({error.strerror})") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # reading processes do not inherit it
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: in use by another process") from None
        except OSError as error:
            print(f"warning: {folder}: cannot be locked ({error.strerror}); two runs in it would "
                  "spoil each other", file=sys.stderr)
        for leftover in folder.glob(".*.pt.*.tmp"):  # of a save that a kill cut short
            leftover.unlink()
        try:
            yield folder
        finally:
            if os.listdir(folder) == [".lock"]:
                shutil.rmtree(folder)


def find_checkpoint(args, folder):
    """What --resume names: a path, or the newest intact checkpoint of --out; None to start."""
    if args.resume != "latest":
        return args.resume
    damaged = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                load_checkpoint(path)
            except ModelError as error:
                damaged.append(str(error))
                continue
            if damaged:
                print(f"warning: {damaged[0]}; using {path.name}", file=sys.stderr)
            return str(path)
    expect(not damaged, folder, f"an intact checkpoint ({'; '.join(damaged)}); remove the folder "
           "to start afresh")
    return None


def memory_mb(device):
    """Peak memory of this process, on the GPU where there is one."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


# ---------------------------------------------------------------- data


def phantom():
    """The embedded data set in runs/phantom, annotated anew like any report by today's rules."""
    raw = make_phantom(Path("runs/phantom"), studies=PHANTOM_STUDIES)
    path = raw.with_name("phantom_neg.jsonl")
    with open_atomic(path) as file:
        for _, record in tqdm(read_jsonl(raw), total=PHANTOM_STUDIES, desc="phantom reports"):
            file.write(json.dumps(annotate(record), ensure_ascii=False) + "\n")
    return str(path)


def check_reading(run):
    """Before step 1: a training image, in case the image root is wrong, and all that validate."""
    run.studies[0, 0]
    check_images(run.val_rows, run.args.workers)


def check_rows(args, rows):
    """Enough training rows, each with what the system needs."""
    negatives, graphs, _ = SYSTEMS[args.system]
    expect(len(rows) >= args.batch_size, rows.path, f"at least --batch-size {args.batch_size} rows "
           f"of split train, got {len(rows)}")
    ready, needed = rows.labelled, "report and labels"
    if graphs:
        ready, needed = rows.labelled & rows.with_graphs, "report, labels and graph"
    lacking = np.flatnonzero(~ready)
    if len(lacking):
        raise UserError(f"{rows.path}:{rows.line(lacking[0])}: expected {needed}, also of each "
                        f"hard negative, for --system {args.system}; run negations.py on it first")


def read_batches(studies, args, step, rank, world):
    """Yield this rank's micro-batches from `step` of the run on, --accumulate of them per step.

    One set of reading processes serves all epochs: starting them anew costs about a second.
    """
    def keys():
        first, skipped = divmod(step, len(studies) // args.batch_size)
        for epoch in range(first, args.epochs):
            for rows in GlobalBatches(len(studies), args.batch_size, args.seed, epoch, rank, world,
                                      skipped):
                for micro in np.array_split(rows, args.accumulate):
                    yield micro.tolist()
            skipped = 0

    yield from DataLoader(studies, batch_sampler=keys(), num_workers=args.workers,
                          collate_fn=studies.collate, worker_init_fn=start_worker,
                          pin_memory=torch.cuda.is_available())


def to_device(x, device):
    """Move the tensors of a batch, however nested; a GPU copies while the CPU goes on."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if torch.is_tensor(x):
        return x.to(device, non_blocking=True)
    return x


# ---------------------------------------------------------------- ranks, seeds, signals


@dataclass
class Ranks:
    """This process among those that torchrun started, and the store at which they can wait."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None


def start_ranks():
    """Join the process group that torchrun describes."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device, backend, store = torch.device("cpu"), "gloo", None
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
    if world > 1:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, rank=rank, world_size=world, store=store, timeout=TIMEOUT)
    return Ranks(rank, world, device, store)


def leave_ranks():
    """End the process group, and with it its threads, while Python still runs.

    A thread of gloo that lets go of a tensor after that aborts the process. DistributedDataParallel
    holds the group, so it has to go first, out of an error's frames too.
    """
    if dist.is_initialized():
        error = sys.exc_info()[1]
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        dist.destroy_process_group()


def on_rank_0(ranks, function):
    """Run `function` on rank 0 alone; every rank gets its result, which JSON must hold.

    The others wait at the store, not in an exchange: validating a large set takes longer than a
    rank may be lost. If `function` fails they leave, and the error is rank 0's to show.
    """
    if ranks.world == 1:
        return function()
    turn = ranks.store.add(f"turn of rank {ranks.rank}", 1)
    if ranks.rank == 0:
        reply = {"failed": True}
        try:
            reply = {"result": function()}
        finally:
            ranks.store.set(f"turn {turn}", json.dumps(reply))
    else:
        ranks.store.wait([f"turn {turn}"], PATIENCE)
        reply = json.loads(ranks.store.get(f"turn {turn}"))
        if "failed" in reply:
            sys.exit(2)
    return reply["result"]


def all_ranks(ranks, value):
    """The values of all ranks, in rank order."""
    values = [value] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(values, value)
    return values


def say(ranks, line):
    """One line on stderr, from rank 0, above the progress bar."""
    if ranks.rank == 0:
        tqdm.write(line, file=sys.stderr)


def refuse(ranks, message):
    """A UserError that all ranks come to together: rank 0 says it, the others leave."""
    if ranks.rank:
        sys.exit(2)
    raise UserError(message)


def seed_step(seed, step, rank, micro):
    """Dropout and stochastic depth become a function of (seed, step, rank, micro-batch)."""
    state = np.random.SeedSequence([seed, step, rank, micro]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def listen():
    """A list that grows by each SIGTERM or SIGUSR1 to this rank."""
    signals = []
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, lambda number, _frame: signals.append(number))
    return signals


def start_worker(_worker):
    """Reading processes outlive a signal to their group by half a minute, for the last save."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    for name in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    gc.freeze()  # a collection would touch, and so copy, every inherited page


@contextlib.contextmanager
def user_errors():
    """What a user can mend while training runs, as one line."""
    try:
        yield
    except UserError as error:  # a reading process puts its traceback before the message
        raise UserError(str(error).rstrip().split("UserError: ")[-1]) from None
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory is full; raise --accumulate, which keeps the batch and "
                        "its gradient, or lower --batch-size or --image-size") from None
    except (EOFError, ConnectionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler may raise once more
        raise UserError("a reading process was killed; if memory is short, lower --workers"
                        ) from None


# ---------------------------------------------------------------- flags


def threshold(text):
    """An argparse type: tau of Eq. 4, 5, 9."""
    tau = minimum(0, float)(text)
    if tau >= 1:
        raise argparse.ArgumentTypeError(f"expected a number below 1, got {text}")
    return tau


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
    add("--framework", choices=("softmax", "sigmoid"), default="softmax",
        help="Eq. 1-2, or SigLIP's loss with the same soft labels")
    # DIFFERS from Sec. 5.2: small encoders and images are the default; the paper's are flags.
    add("--image-encoder", default="tiny", metavar="tiny|swin-t|PATH",
        help="swin-t is the paper's with random weights, PATH a file of torchvision's Swin-T")
    add("--text-encoder", default="tiny", metavar="tiny|PATH|ID",
        help="BERT-family folder or hub id; the paper's is emilyalsentzer/Bio_ClinicalBERT")
    add("--image-size", type=minimum(32), default=64, help="pixels; the paper's is 224")
    add("--width", type=minimum(1), default=512, help="width D of the joint embedding")
    add = parser.add_argument_group("loss (Eq. 4-10; the paper publishes no values)").add_argument
    for letter, stream in zip("TCG", ("text", "clinical", "graph"), strict=True):
        add(f"--w-{stream}", type=minimum(0, float), default=1.0,
            help=f"weight w_{letter} of Eq. 10")
    for stream, tau in DynamicSoftContrastiveLoss().thresholds.items():
        add(f"--tau-{stream}", type=threshold, default=tau, help="threshold; choose one at which a "
            "report has a few positives (shown before step 1 for text; log.jsonl has all streams): "
            "at 1 labels are one-hot, near the number of texts they collapse")
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
    args = parser.parse_args(argv)
    if args.resume == "latest" and not args.out:
        parser.error("--resume latest: expected --out, the run folder to continue")
    if args.framework == "sigmoid" and args.system == "softclip":
        parser.error("--framework sigmoid: has no softclip, whose targets are a softmax")
    if args.lr is None:
        args.lr = 1e-3 if args.image_encoder == args.text_encoder == "tiny" else 5e-5
    return args


def prepare(args, ranks, folder):
    """A run that can start; what a user can have wrong is refused here."""
    expect(args.batch_size % (ranks.world * args.accumulate) == 0,
           f"--batch-size {args.batch_size}",
           f"a multiple of {ranks.world} ranks x --accumulate {args.accumulate}")
    checkpoint = on_rank_0(ranks, lambda: find_checkpoint(args, folder))
    path = args.train or on_rank_0(ranks, phantom)
    # First on rank 0 alone, which writes the sidecars and says what is wrong.
    on_rank_0(ranks, lambda: check_rows(args, Manifest(path, "train")))
    on_rank_0(ranks, lambda: len(Manifest(args.val or path)))
    try:
        run = Run(args, ranks, folder, path)
    except ModelError as error:
        raise UserError(f"--image-encoder, --text-encoder: {error}") from None
    if checkpoint:
        run.resume(checkpoint)
    if run.state.validated < run.total:
        on_rank_0(ranks, lambda: check_reading(run))
    return run


def start_run(run):
    """From the first line of the log to the last checkpoint."""
    args, ranks, step = run.args, run.ranks, run.state.step
    on_rank_0(ranks, run.start_record)
    model = DistributedDataParallel(run.clip) if ranks.world > 1 else run.clip
    batches = read_batches(run.studies, args, step, ranks.rank, ranks.world)
    bar = tqdm(total=run.total, initial=step, desc=args.system, disable=ranks.rank > 0)
    criterion = build_loss(args)
    with user_errors(), contextlib.closing(batches), bar:
        first = []
        if step == 0:
            first = list(itertools.islice(batches, args.accumulate))
            look_ahead(run, criterion, first)
        train(run, model, criterion, itertools.chain(first, batches), bar)
    if run.saved_step != run.state.step:
        run.save()


def main(argv=None):
    args, began = parse_args(argv), time.perf_counter()
    ranks = start_ranks()
    try:
        with contextlib.ExitStack() as stack:
            folder = on_rank_0(ranks, lambda: str(stack.enter_context(open_folder(args))))
            run = prepare(args, ranks, Path(folder))
            if not run.is_finished():
                start_run(run)
        state, finished = run.state, run.is_finished()
        good = finished or state.validated < run.total
        if ranks.rank == 0:
            print(json.dumps({"run": folder, "system": args.system, "seed": args.seed,
                              "finished": finished, "step": state.step, "skipped": state.skipped,
                              "unreadable": state.unreadable, "best": state.best,
                              "seconds": round(time.perf_counter() - began)}))
            data = shlex.quote(run.studies.manifest.path)
            say(ranks, f"evaluate it   python evaluate.py {shlex.quote(folder)} --data {data}")
        if ranks.world > 1:
            dist.barrier()  # who leaves early takes the others' connections along
    finally:
        leave_ranks()
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
