r"""Train the systems of Tab. 2 (Sec. 5.2, 5.5): `torchrun train.py`, DistributedDataParallel.

    torchrun train.py                                           the whole method on the phantom
    torchrun --nproc-per-node 8 train.py --train mimic_neg.jsonl \
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
    Manifest,
    Studies,
    UserError,
    check_images,
    expect,
    global_batches,
    make_phantom,
    minimum,
    open_atomic,
    patient_hash,
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
    if streams == "softclip":  # not letters of streams
        return SoftCLIPLoss(row_chunk=args.row_chunk)
    kind = DynamicSoftContrastiveLoss
    if args.framework == "sigmoid":
        kind = SigmoidSoftContrastiveLoss
    weights = {"t": args.w_text, "c": args.w_clinical, "g": args.w_graph}
    weights = [weight if letter in streams else 0.0 for letter, weight in weights.items()]
    return kind(*weights, args.tau_text, args.tau_clinical, args.tau_graph, soft=streams != "",
                row_chunk=args.row_chunk)


def embed(model, batch, autocast, place, micro):
    """Fig. 3's encoders: unit rows (B, D) by name, and the scalars logit_scale, logit_bias."""
    seed_step(*place, micro)
    with autocast:
        return model(batch)


def seed_step(seed, step, rank, micro):
    """Dropout and stochastic depth become a function of (seed, step, rank, micro-batch)."""
    state = np.random.SeedSequence([seed, step, rank, micro]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def labels_of(batches):
    """C1 and, where there are hard negatives, C2 of all micro-batches: (B, 14) by name."""
    names = batches[0].keys() & {"labels", "hard_labels"}
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def plain_step(model, criterion, batch, autocast, place):
    """One batch forward and backward: leaves gradients, returns the loss's dict.

    place: (seed, step, rank), of which all that is random is a function.
    """
    losses = criterion(**embed(model, batch, autocast, place, 0), **labels_of([batch]))
    losses["loss"].backward()
    return losses


@torch.no_grad()
def embed_all(model, batches, autocast, place):
    """`embed` of all micro-batches together, without recording gradients."""
    embedded = [embed(model, batch, autocast, place, micro)
                for micro, batch in enumerate(batches)]
    whole = {}
    for name, x in embedded[0].items():
        whole[name] = x.clone()  # a scalar
        if x.dim() == 2:
            whole[name] = torch.cat([micro[name] for micro in embedded])      # (B, D)
    return whole


def cached_step(model, criterion, batches, autocast, place):
    """The same gradients from micro-batches, with the memory of one: gradient caching.

    Embed all without recording gradients; take the loss of all rows together, and its gradient with
    respect to the embeddings; embed each micro-batch again, with the same random state, and send
    its share of that gradient through the encoders. So every negative of the batch is kept.
    """
    count = len(batches)
    whole = embed_all(model, batches, autocast, place)
    for x in whole.values():
        x.requires_grad_()
    losses = criterion(**whole, **labels_of(batches))
    losses["loss"].backward()
    for micro, batch in enumerate(batches):
        exchange = contextlib.nullcontext()
        if micro < count - 1 and isinstance(model, DistributedDataParallel):
            exchange = model.no_sync()  # ranks exchange gradients with the last one
        with exchange:
            again = embed(model, batch, autocast, place, micro)
            shares = []
            for name, x in again.items():
                gradient = whole[name].grad
                shares.append(gradient.chunk(count)[micro] if x.dim() == 2 else gradient / count)
            torch.autograd.backward(list(again.values()), shares)
    return losses


def learning_rate(step, args, epoch_steps):
    """Linear warm-up, then half a cosine to zero at the end of --epochs: a function of the step."""
    warmup = args.warmup_epochs * epoch_steps
    if step < warmup:
        return args.lr * min(1, (step + 1) / warmup)
    share = (step - warmup) / max(1, args.epochs * epoch_steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model, weight_decay):
    """Weight decay on matrices alone: none on biases, norms, temperature and the empty node."""
    decayed = []
    spared = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() > 1 and "bias" not in name:
            decayed.append(parameter)
        elif parameter.requires_grad:
            spared.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": spared, "weight_decay": 0.0}]


# ---------------------------------------------------------------- the loop


def train(run, model, criterion, batches, bar):
    """Steps and validations up to `run.total`; leaves early, saved, when a signal asks any rank."""
    args = run.args
    state = run.state
    autocast = torch.autocast(run.ranks.device.type, torch.bfloat16,
                              enabled=args.precision == "bf16")
    signals = listen()
    if run.epoch_is_over() and state.validated < state.step:
        run.validate()
    while state.step < run.total:
        began = time.perf_counter()
        micro = [to_device(next(batches), run.ranks.device) for _ in range(args.accumulate)]
        waited = time.perf_counter() - began
        # lr
        lr = learning_rate(state.step, args, run.epoch_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        # forward + loss + backward
        run.optimizer.zero_grad()
        place = (args.seed, state.step, run.ranks.rank)
        if args.accumulate == 1:
            losses = plain_step(model, criterion, micro[0], autocast, place)
        else:
            losses = cached_step(model, criterion, micro, autocast, place)
        losses["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.clip.parameters(), args.clip)
        losses["logit_scale"] = run.clip.logit_scale.detach()
        if args.framework == "sigmoid":
            losses["logit_bias"] = run.clip.logit_bias.detach()
        unreadable = sum(batch["bad"] for batch in micro)
        values, (stop, unreadable) = read_numbers(run.ranks, losses, len(signals), unreadable)
        temperature = math.exp(-values.pop("logit_scale"))  # the parameter is a logarithm
        # step
        update(run, values)
        # log
        took = time.perf_counter() - began
        run.log(step=state.step, epoch=(state.step - 1) // run.epoch_steps, **values, lr=lr,
                temperature=temperature, skipped=state.skipped, data_wait=waited / took,
                images_per_s=args.batch_size / took, memory_mb=memory_mb(run.ranks.device))
        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        bar.update()
        # unreadable images
        state.unreadable += int(unreadable)
        if state.unreadable > MAX_BAD * max(len(run.studies), state.step * args.batch_size):
            refuse(run.ranks, f"{state.unreadable} images could not be read, more than "
                   f"{MAX_BAD:.0%}; python data.py check {run.studies.manifest.path} lists them")
        # checkpoint
        if run.epoch_is_over():
            warn(run, values)
            run.validate()
        elif stop or state.step % args.checkpoint_every == 0:
            run.save()
        if stop:
            say(run.ranks, f"a signal came: saved after step {state.step}; go on with --resume")
            return


def read_numbers(ranks, scalars, *counts):
    """A step's numbers on the CPU, in one copy: the only time that a step waits for the device.

    scalars: tensors by name, equal on all ranks; counts: numbers of this rank. Returns floats by
    name, and the counts summed over ranks.
    """
    counts = torch.tensor(counts, dtype=torch.float32).to(ranks.device, non_blocking=True)
    if ranks.world > 1:
        dist.all_reduce(counts)
    numbers = torch.stack([*scalars.values(), *counts]).detach().tolist()
    return dict(zip(scalars, numbers, strict=False)), numbers[len(scalars):]


def update(run, values):
    """The optimiser's step, unless the numbers are bad: they are the same on all ranks."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    run.state.step += 1
    if wrong:
        run.state.skipped += 1
        run.skipped_in_a_row += 1
    else:
        run.optimizer.step()
        run.clip.clamp_temperature()
        run.skipped_in_a_row = 0
    if run.skipped_in_a_row == MAX_SKIPPED:
        refuse(run.ranks, f"step {run.state.step}: {MAX_SKIPPED} steps in a row without finite "
               f"numbers, the last in {', '.join(wrong)}")


def warn(run, values):
    """At the end of an epoch: replaced images, and soft labels that teach nothing."""
    if run.state.unreadable:
        say(run.ranks, f"warning: {run.state.unreadable} unreadable images were replaced so far; "
            f"python data.py check {run.studies.manifest.path} lists them")
    for name in ("text", "graph"):
        value = values.get(f"positives_{name}", 0.0)
        if value > COLLAPSE * run.num_texts:
            say(run.ranks, f"warning: positives_{name} is {value:.0f} of {run.num_texts}: the soft "
                f"labels have nearly collapsed; raise --tau-{name} (softclip has none)")


def look_ahead(run, criterion, batches):
    """Before step 1: what each threshold makes of these encoders; the sigmoid loss's first bias.

    Similarities of reports depend on the encoder, so no threshold suits two of them.
    """
    batches = [to_device(batch, run.ranks.device) for batch in batches]
    whole = embed_all(run.clip, batches, contextlib.nullcontext(), (run.args.seed, 0, 0))
    inputs = {k: x for k, x in whole.items() if "text" in k or "graph" in k}
    texts = torch.cat([x for name, x in inputs.items() if "text" in name])[:1024]  # (n, D)
    positives = ""
    for tau in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98):
        y_hat = soft_labels(texts @ texts.T, tau)                             # (n, n)
        positives += f"   {tau}: {torch.special.entr(y_hat).sum(1).exp().mean():.1f}"
    say(run.ranks,
        f"positives     that a report has in effect among {len(texts)} of the first batch's "
        f"{run.num_texts} texts, by --tau-text\n           {positives}\n"
        f"              1: one-hot, as in CLIP; near {len(texts)}: all alike, nothing is learned; "
        "choose a few")
    if run.args.framework == "sigmoid":
        bias = criterion.initial_bias(**inputs, **labels_of(batches))
        torch.nn.init.constant_(run.clip.logit_bias, bias)


# ---------------------------------------------------------------- the run folder


class Run:
    """What a run carries from step to step, and its record in the run folder.

    All ranks call the methods together; rank 0 alone writes, and the others wait for it.
    """

    def __init__(self, args, ranks, folder, path):
        self.args = args
        self.ranks = ranks
        self.folder = folder
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
        self.state = SimpleNamespace(step=0, validated=0, skipped=0, unreadable=0, best={})
        self.skipped_in_a_row = 0
        self.saved_step = None  # of last.pt, if this run wrote it or took it up
        self.log_bytes = 0  # of log.jsonl, at the checkpoint that this run goes on from

    def resume(self, checkpoint):
        """Go on from a checkpoint; refuse flags and data that would make it another run."""
        saved = load_checkpoint(checkpoint)
        changed = [f"--{name.replace('_', '-')} was {saved['flags'].get(name)!r}, is now {value!r}"
                   for name, value in self.flags().items() if saved["flags"].get(name) != value]
        expect(not changed, "cannot resume", f"the same flags: {'; '.join(changed)}")
        expect(saved.get("data") == self.studies.manifest.digest(), "cannot resume",
               f"the same data: the training rows of {self.studies.manifest.path} are others now")
        self.clip.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = SimpleNamespace(**saved["state"])
        self.log_bytes = saved.get("log_bytes", sys.maxsize)  # older ones leave the log whole
        if checkpoint == self.folder / "last.pt":
            self.saved_step = self.state.step
        val = self.val_rows.digest()
        if not (self.folder / "best.pt").exists() or saved.get("val", val) != val:
            self.state.best = {}  # it stayed in another folder, or was the best of other rows
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
            try:
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:  # a full disk; the run goes on
                say(self.ranks, f"warning: log.jsonl: a line was not written ({error.strerror})")

    def start_record(self):
        """config.json, the tokenizer and the head of the log; what is after the checkpoint goes."""
        self.clip.save_tokenizer(self.folder / "tokenizer")
        with open_atomic(self.folder / "config.json") as file:
            config = {"flags": vars(self.args), "world": self.ranks.world, **provenance()}
            json.dump(config, file, indent=1)
        with open(self.folder / "log.jsonl", "a") as file:
            file.truncate(min(file.tell(), self.log_bytes))
        self.log(argv=sys.argv, from_step=self.state.step, time=time.strftime("%Y-%m-%d %H:%M:%S"))
        say(self.ranks,
            f"run folder    {self.folder}\n"
            f"data          {len(self.studies):,} training and {len(self.val_rows):,} validation "
            "studies (without any: no best.pt)\n"
            f"steps         {self.state.step} to {self.total:,}, {self.args.batch_size} studies "
            f"each, {self.ranks.world} rank(s) on {self.ranks.device.type}")

    def save(self, name="last.pt"):
        """Write a checkpoint, by rank 0. Returns whether it was written."""
        written = on_rank_0(self.ranks, lambda: self.write(self.folder / name))
        if written and name == "last.pt":
            self.saved_step = self.state.step
        return written

    def write(self, path):
        """The same on rank 0; a full disk costs that checkpoint.

        Renames alone, which any file system can: last to previous, new to last. Readers take
        previous.pt while there is no last.pt. A last.pt that this run has not written or read may
        be damaged, and must not take the place of previous.pt.
        """
        buffer = io.BytesIO()
        torch.save({"model": self.clip.state_dict(), "model_config": self.clip.config,
                    "optimizer": self.optimizer.state_dict(), "state": vars(self.state),
                    "flags": self.flags(), "world": self.ranks.world,
                    "data": self.studies.manifest.digest(), "val": self.val_rows.digest(),
                    "log_bytes": os.path.getsize(self.folder / "log.jsonl")}, buffer)
        spare = "last.damaged.pt" if self.saved_step is None else "previous.pt"
        try:
            with open_atomic(path, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                if path.name == "last.pt" and path.exists():
                    os.replace(path, self.folder / spare)
        except UserError as error:
            say(self.ranks, f"warning: {error}; the one before stands")
            return False
        return True

    def validate(self):
        """Zero-shot AUROC and retrieval on the val rows; best.pt keeps the best, never the loss."""
        self.save()  # a signal during validation loses nothing
        self.state.validated = self.state.step
        if len(self.val_rows):
            before = self.state.best
            better = on_rank_0(self.ranks, self.measure)
            self.state.best = better or before
            if better and not self.save("best.pt"):
                self.state.best = before
        self.save()

    def measure(self):
        """Validate and log; the result where it is the best so far, else None."""
        # ASSUMPTION: the model to evaluate is best.pt, the best zero-shot AUROC in validation.
        result = validate(self.clip, self.val_rows, workers=self.args.workers)
        self.clip.train()
        self.log(step=self.state.step, val=result)
        say(self.ranks, f"step {self.state.step:>6}   val   "
            + "   ".join(f"{name} {value}" for name, value in result.items()))
        by = "retrieval@5" if result["auroc"] is None else "auroc"
        if self.state.best and (result[by] or 0) <= (self.state.best[by] or 0):
            return None
        return {"step": self.state.step, **result}


@contextlib.contextmanager
def open_folder(args):
    """The run folder, --out or a fresh one, locked; it goes again if nothing came of it."""
    fresh = (Path(f"runs/run-{number:03}") for number in itertools.count(1))
    folder = Path(args.out or next(path for path in fresh if not path.exists()))
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
    paths = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    for path in paths:
        try:
            load_checkpoint(path)
            return str(path)
        except ModelError as error:
            print(f"warning: passed over {error}", file=sys.stderr)
    expect(not paths, folder, "an intact checkpoint; remove the folder to start afresh")
    return None


def memory_mb(device):
    """Peak memory of this process, on the GPU where there is one."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


# ---------------------------------------------------------------- data


def phantom():
    """The embedded data set in runs/phantom, annotated anew like any report by today's rules."""
    raw = make_phantom("runs/phantom", studies=PHANTOM_STUDIES)
    path = raw.with_name("phantom_neg.jsonl")
    with open_atomic(path) as file:
        for _, record in tqdm(read_jsonl(raw), total=PHANTOM_STUDIES, desc="phantom reports"):
            file.write(json.dumps(annotate(record), ensure_ascii=False) + "\n")
    return str(path)


def check_rows(args, path):
    """Rows enough to train, each with what the system needs; rows that validate may be none."""
    rows = Manifest(path, "train")
    Manifest(args.val or path)
    expect(len(rows) >= args.batch_size, path, f"at least --batch-size {args.batch_size} rows "
           f"of split train, got {len(rows)}")
    _, graphs, _ = SYSTEMS[args.system]
    ready = rows.labelled & (rows.with_graphs | (not graphs))
    needed = "report, labels and graph" if graphs else "report and labels"
    expect(ready.all(), rows.where(np.argmin(ready)), f"{needed}, also of each hard negative, for "
           f"--system {args.system}; run negations.py on it first")
    empty = rows.columns["reports"] == patient_hash("")
    expect(not empty.any(), rows.where(np.argmax(empty)), "a report that is not empty")


def check_reading(run):
    """Before step 1: a training image, in case the image root is wrong, and all that validate."""
    run.studies[0, 0]
    check_images(run.val_rows, run.args.workers)


def read_batches(studies, args, step, rank, world):
    """Yield this rank's micro-batches from `step` of the run on, --accumulate of them per step.

    One set of reading processes serves all epochs: starting them anew costs about a second.
    """
    def keys():
        first, skipped = divmod(step, len(studies) // args.batch_size)
        for epoch in range(first, args.epochs):
            for rows in global_batches(len(studies), args.batch_size, args.seed, epoch, rank, world,
                                       skipped):
                yield from np.array_split(rows, args.accumulate)
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


# ---------------------------------------------------------------- ranks, signals


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
    ranks = Ranks(rank, world, torch.device("cpu"))
    if torch.cuda.is_available():
        ranks.device = torch.device("cuda", local)
        torch.cuda.set_device(ranks.device)
    if world > 1:
        ranks.store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, store=ranks.store,
                                timeout=TIMEOUT)
    return ranks


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


def say(ranks, line):
    """One line on stderr, from rank 0, above the progress bar."""
    if ranks.rank == 0:
        tqdm.write(line, file=sys.stderr)


def refuse(ranks, message):
    """A UserError that all ranks come to together: rank 0 says it, the others leave."""
    if ranks.rank:
        sys.exit(2)
    raise UserError(message)


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
        add(f"--tau-{stream}", type=minimum(0, float, below=1), default=tau,
            help="threshold; start from one at which a report has a few positives (shown before "
            "step 1 for text) and watch them in log.jsonl: at 1 labels are one-hot, near the "
            "number of texts they have collapsed")
    add("--row-chunk", type=minimum(1), help="rows of the loss at a time; fewer save memory")
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
    add("--warmup-epochs", type=minimum(0, float), default=1.0, help="linear, before the cosine")
    add("--clip", type=minimum(1e-9, float), default=1.0, help="largest gradient norm")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 autocasts the encoders")
    add("--seed", type=minimum(0), default=0, help="weights, data order, augmentation, dropout")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="runs/NAME", help="run folder; none: a fresh one below runs/")
    add("--resume", metavar="PATH|latest", help="a checkpoint, or the newest intact one of --out")
    add("--checkpoint-every", type=minimum(1), default=500, help="steps between saves")
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
    on_rank_0(ranks, lambda: check_rows(args, path))  # alone first, since it writes the sidecars
    try:
        run = Run(args, ranks, folder, path)
        if checkpoint:
            run.resume(Path(checkpoint))
    except ModelError as error:
        raise UserError(f"--image-encoder, --text-encoder, --resume: {error}") from None
    if run.state.validated < run.total:
        on_rank_0(ranks, lambda: check_reading(run))
    return run


def start_run(run):
    """From the first line of the log to the last checkpoint."""
    on_rank_0(run.ranks, run.start_record)
    step = run.state.step
    model = run.clip
    if run.ranks.world > 1:
        model = DistributedDataParallel(model)
    criterion = build_loss(run.args)
    batches = read_batches(run.studies, run.args, step, run.ranks.rank, run.ranks.world)
    bar = tqdm(total=run.total, initial=step, desc=run.args.system, disable=run.ranks.rank > 0)
    with user_errors(), contextlib.closing(batches), bar:
        first = []
        if step == 0:
            first = list(itertools.islice(batches, run.args.accumulate))
            look_ahead(run, criterion, first)
        train(run, model, criterion, itertools.chain(first, batches), bar)
    if run.saved_step != run.state.step:
        run.save()


def main(argv=None):
    args = parse_args(argv)
    began = time.perf_counter()
    ranks = start_ranks()
    try:
        with contextlib.ExitStack() as stack:
            folder = on_rank_0(ranks, lambda: str(stack.enter_context(open_folder(args))))
            run = prepare(args, ranks, Path(folder))
            if not run.is_finished():
                start_run(run)
        if ranks.rank == 0:
            print(json.dumps({"run": folder, "system": args.system, "seed": args.seed,
                              "finished": run.is_finished(), **vars(run.state),
                              "seconds": round(time.perf_counter() - began)}))
            words = ["python", "evaluate.py", folder, "--data", run.studies.manifest.path]
            if args.image_root:
                words += ["--image-root", args.image_root]
            say(ranks, f"evaluate it   {shlex.join(words)}")
        if ranks.world > 1:
            dist.barrier()  # who leaves early takes the others' connections along
    finally:
        leave_ranks()
    if run.state.validated >= run.total and not run.is_finished():
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
