r"""Train the systems of Tab. 2 (Sec. 5.2, 5.5): `torchrun train.py`, DistributedDataParallel.

    torchrun train.py                                           the whole method on the phantom
    torchrun --nproc-per-node 8 train.py --train mimic_neg.jsonl \
        --image-encoder swin_t.pth --text-encoder emilyalsentzer/Bio_ClinicalBERT --image-size 224

In this order: the systems, one step, the loop, main; then data, the run folder, ranks and flags.

A run folder holds config.json (with flags and versions), log.jsonl (one JSON object a line; of a
step's records the last counts), last.pt, previous.pt, best.pt and the tokenizer. All that happens
in a step is a function of (seed, step): data order, augmentation, drawn hard negatives, dropout. So
a checkpoint needs no random states, and `--resume latest` with the same flags and training rows
continues bit by bit on the CPU with as many ranks as before.

Signals: on SIGTERM, SIGUSR1 or Ctrl-C at any rank all ranks save after the step, before a
validation that would follow, and leave. torchrun passes SIGTERM and Ctrl-C on, SIGUSR1 with
`--signals-to-handle SIGTERM,SIGUSR1`; it then reports a failure, and kills what is left after half
a minute. Before the first step a signal ends the run at once.

Ranks: --batch-size is global, and N ranks have the gradient of one. `python train.py` does for one
process. A rank that fails says why and ends at once; torchrun ends the others. On a busy machine
set OMP_NUM_THREADS=1: threads that wait for each other made a step four times slower.

SPDX-License-Identifier: MIT
"""

import argparse
import contextlib
import datetime
import gc
import io
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401, DistributedDataParallel would import it in the run
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
    read_jsonl,
    run_main,
    text_hash,
)
from evaluate import provenance, validate
from loss import DynamicSoftContrastiveLoss, SigmoidSoftContrastiveLoss, SoftCLIPLoss
from model import ClinicalCLIP, ModelError, load_checkpoint
from negations import annotate

# A row of Tab. 2: hard negatives (N), graph stream (G), streams of soft labels (D; none: one-hot).
# softclip is a peer, with targets of texts that are its own.
SYSTEMS = {
    "clip": (False, False, ""), "clip-dt": (False, False, "t"), "clip-dtc": (False, False, "tc"),
    "clip-n": (True, False, ""), "clip-n-dtc": (True, False, "tc"),
    "clip-g": (False, True, ""), "clip-g-dtcg": (False, True, "tcg"),
    "clip-ng-dtcg": (True, True, "tcg"), "softclip": (False, False, "t"),
}
PHANTOM_STUDIES = 2000
COLLAPSE = 0.8    # warn when a row of soft labels spreads over this share of the batch
MAX_SKIPPED = 10  # non-finite steps in a row that stop a run
FREE_ON_RESUME = {"out", "resume", "train", "val", "image_root", "workers", "max_steps",
                  "checkpoint_every"}  # other flags change the result
RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
WORLD = int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = datetime.timedelta(hours=1)  # of waiting for a rank, while it validates or hangs
HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # answered by saving and leaving


# ---------------------------------------------------------------- one step


def build_loss(args):
    """The loss of --system and --framework; a stream that the system lacks has weight 0."""
    if args.system == "softclip":
        return SoftCLIPLoss()
    _, _, streams = SYSTEMS[args.system]
    kind = DynamicSoftContrastiveLoss
    if args.framework == "sigmoid":
        kind = SigmoidSoftContrastiveLoss
    weights = []
    for letter, weight in (("t", args.w_text), ("c", args.w_clinical), ("g", args.w_graph)):
        weights.append(weight if letter in streams else 0.0)
    return kind(*weights, args.tau_text, args.tau_clinical, args.tau_graph, soft=streams != "")


def embed(model, batch, autocast, key, micro):
    """Fig. 3's encoders: unit rows (B, D) by name, and the scalars logit_scale, logit_bias.

    key: (seed, step, rank), of which all that is random in a step is a function.
    """
    seed_step(*key, micro)
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


def plain_step(model, criterion, batch, autocast, key):
    """One batch forward and backward: leaves gradients, returns the loss's dict."""
    losses = criterion(**embed(model, batch, autocast, key, 0), **labels_of([batch]))
    losses["loss"].backward()
    return losses


@torch.no_grad()
def embed_all(model, batches, autocast, key):
    """`embed` of all micro-batches together, without recording gradients."""
    embedded = [embed(model, batch, autocast, key, micro)
                for micro, batch in enumerate(batches)]
    whole = {}
    for name, x in embedded[0].items():
        if x.dim() == 2:
            whole[name] = torch.cat([micro[name] for micro in embedded])      # (B, D)
        else:
            whole[name] = x.clone()  # logit_bias is the parameter itself
    return whole


def cached_step(model, criterion, batches, autocast, key):
    """The same gradients from micro-batches, with the memory of one: gradient caching.

    Embed all without recording gradients; take the loss of all rows together, and its gradient with
    respect to the embeddings; embed each micro-batch again, with the same random state, and send
    its share of that gradient through the encoders. So every negative of the batch is kept.
    """
    count = len(batches)
    whole = embed_all(model, batches, autocast, key)
    for x in whole.values():
        x.requires_grad_()
    losses = criterion(**whole, **labels_of(batches))
    losses["loss"].backward()
    for micro, batch in enumerate(batches):
        # DistributedDataParallel's switch: ranks exchange gradients with the last micro-batch.
        model.require_backward_grad_sync = micro == count - 1
        again = embed(model, batch, autocast, key, micro)
        shares = []
        for name, x in again.items():
            if x.dim() == 2:
                shares.append(whole[name].grad.chunk(count)[micro])           # (B, D)
            else:
                shares.append(whole[name].grad / count)  # of a scalar
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


def train(args, device):
    """One run, up to its last step or a signal. Returns whether a step had an effect."""
    folder = on_rank_0(choose_folder, args)
    saved = load_resumed(args, folder)
    path = args.train or on_rank_0(phantom)
    on_rank_0(check_rows, args, path)  # alone first, since it writes the sidecars
    clip, studies, val_rows = build(args, path)
    clip.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(clip, args.weight_decay), lr=args.lr,
                                  fused=device.type == "cuda")
    criterion = build_loss(args)
    state = {"step": 0, "validated": 0, "skipped": 0, "unreadable": 0, "best": {}}
    digests = {"data": studies.manifest.digest(), "val": val_rows.digest()}
    if saved:
        state = take_up(saved, clip, optimizer, digests)
    epoch_steps = len(studies) // args.batch_size
    total = args.epochs * epoch_steps
    if args.max_steps:
        total = max(state["step"], min(total, args.max_steps))
    epoch_ends = {total, *range(epoch_steps, total, epoch_steps)}
    if state["validated"] < total:
        on_rank_0(start_record, args, folder, clip, studies, val_rows)

    def save(name):
        write_checkpoint(folder / name, {
            "model": clip.state_dict(), "model_config": clip.config, "state": state,
            "optimizer": optimizer.state_dict(), "flags": vars(args), **digests})

    model = clip
    if WORLD > 1:
        model = DistributedDataParallel(clip)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    skipped_in_a_row = 0
    signals = listen()
    batches = read_batches(studies, args, state["step"], RANK, WORLD)
    with tqdm(range(state["step"], total + 1), args.system, total, initial=state["step"],
              disable=RANK > 0) as bar:
        for step in bar:
            # validation, at the end of an epoch: here, so that a resumed run makes up for it
            if step in epoch_ends and state["validated"] < step:
                state["validated"] = step
                result = on_rank_0(measure, args, folder, clip, val_rows, step)
                if score(result) > score(state["best"]):
                    state["best"] = {"step": step, **result}
                    save("best.pt")
                save("last.pt")
            if step == total:
                break
            # batch
            began = time.perf_counter()
            micro = [to_device(next(batches), device) for _ in range(args.accumulate)]
            waited = time.perf_counter() - began
            if step == 0 and args.framework == "sigmoid":
                set_first_bias(clip, criterion, micro, args.seed)
            # learning rate
            lr = learning_rate(step, args, epoch_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # forward + loss + backward
            optimizer.zero_grad()
            key = (args.seed, step, RANK)
            if args.accumulate == 1:
                losses = plain_step(model, criterion, micro[0], autocast, key)
            else:
                losses = cached_step(model, criterion, micro, autocast, key)
            grad_norm = torch.nn.utils.clip_grad_norm_(clip.parameters(), args.clip)
            temperature = 1 / clip.logit_scale.exp()  # the parameter is a logarithm
            numbers = losses | {"grad_norm": grad_norm, "temperature": temperature}
            if args.framework == "sigmoid":
                numbers["logit_bias"] = clip.logit_bias
            # the numbers of all ranks in one copy: only here a step waits for the device
            bad = sum(batch["bad"] for batch in micro)
            counts = torch.tensor([len(signals), bad], dtype=torch.float32)
            counts = counts.to(device, non_blocking=True)
            if WORLD > 1:
                dist.all_reduce(counts)
            numbers["signals"], numbers["unreadable"] = counts
            copied = torch.stack(list(numbers.values())).tolist()
            values = dict(zip(numbers, copied, strict=True))
            # step, unless a number is bad, which is so on all ranks
            state["step"] = step + 1
            state["unreadable"] += int(values["unreadable"])
            if all(map(math.isfinite, values.values())):
                optimizer.step()
                clip.clamp_temperature()
                skipped_in_a_row = 0
            else:
                state["skipped"] += 1
                skipped_in_a_row += 1
            if skipped_in_a_row == MAX_SKIPPED:
                raise UserError(f"step {step + 1}: {MAX_SKIPPED} steps without finite numbers "
                                "(null in log.jsonl): lower --lr, in another --out")
            # log
            took = time.perf_counter() - began
            log(folder, step=step + 1, epoch=step // epoch_steps, **values, lr=lr,
                skipped=state["skipped"], data_wait=waited / took,
                images_per_s=args.batch_size / took, memory_mb=memory_mb(device))
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False,
                            positives_text=f"{values['positives_text']:.1f}")
            # checkpoint, also before a validation
            if step + 1 in epoch_ends:
                warn(values, state["unreadable"], args, path)
                save("last.pt")
            elif values["signals"] or (step + 1) % args.checkpoint_every == 0:
                save("last.pt")
            if values["signals"]:
                say(f"a signal came: saved after step {step + 1}; to go on, give the same "
                    f"command with --out {folder} --resume latest")
                break
    effective = state["skipped"] < state["step"]
    if RANK == 0:
        print(json.dumps({"run": str(folder), "system": args.system, "seed": args.seed,
                          "finished": effective and state["validated"] >= total, **state}))
        say(f"evaluate it   {how_to_evaluate(args, folder, path)}")
    return effective


def set_first_bias(clip, criterion, batches, seed):
    """The sigmoid loss starts at the mean of the first batch's targets."""
    rows = embed_all(clip, batches, contextlib.nullcontext(), (seed, 0, 0))
    for name in ("image", "logit_scale", "logit_bias"):
        del rows[name]
    bias = criterion.initial_bias(**rows, **labels_of(batches))
    torch.nn.init.constant_(clip.logit_bias, bias)


def warn(values, unreadable, args, path):
    """At the end of an epoch: replaced images, and soft labels that teach nothing."""
    if unreadable:
        say(f"warning: {unreadable} unreadable images were replaced so far; "
            f"python data.py check {path} lists them")
    for name in ("text", "graph"):
        value = values.get(f"positives_{name}", 0.0)
        if value > COLLAPSE * args.batch_size:
            say(f"warning: positives_{name} is {value:.0f}: the soft labels have nearly collapsed; "
                f"raise --tau-{name} (softclip has none)")


def measure(args, folder, clip, val_rows, step):
    """Zero-shot AUROC and retrieval@5 on the val rows, logged and shown; {} without any."""
    if not len(val_rows):
        return {}
    result = validate(clip, val_rows, workers=args.workers)
    clip.train()
    log(folder, step=step, val=result)
    say(f"step {step:>6}   val   auroc {result['auroc']}   retrieval@5 {result['retrieval@5']}")
    return result


def score(result):
    """What best.pt has the best of: zero-shot AUROC, without labels retrieval@5, never the loss."""
    # ASSUMPTION: the model to evaluate is best.pt, the best zero-shot AUROC in validation.
    for name in ("auroc", "retrieval@5"):
        if result.get(name) is not None:
            return result[name]
    return -1


def main(argv=None):
    args = parse_args(argv)
    device = start_ranks()
    try:
        effective = train(args, device)
    except Exception as error:
        give_up(error)
    leave_ranks()
    if not effective:
        sys.exit(1)


# ---------------------------------------------------------------- data


def phantom():
    """The embedded data set in runs/phantom, annotated anew like any report by today's rules."""
    raw = make_phantom("runs/phantom", studies=PHANTOM_STUDIES)
    path = "runs/phantom/phantom_neg.jsonl"
    with open_atomic(path) as file:
        for _, record in tqdm(read_jsonl(raw), "phantom reports", PHANTOM_STUDIES):
            file.write(json.dumps(annotate(record), ensure_ascii=False) + "\n")
    return path


def check_rows(args, path):
    """Rows enough to train, each with what the system needs; rows that validate may be none."""
    expect(any(Manifest(path).columns["split"]), path, "rows of split train, no rows have a split")
    Manifest(args.val or path)
    rows = Manifest(path, "train")
    expect(len(rows) >= args.batch_size, path, f"at least --batch-size {args.batch_size} rows "
           f"of split train, got {len(rows)}")
    _, graphs, _ = SYSTEMS[args.system]
    ready = rows.labelled & (rows.columns["reports"] != text_hash(""))
    if graphs:
        ready &= rows.with_graphs
    expect(ready.all(), rows.where(np.argmin(ready)), "a report that is not empty, labels, and for "
           "G systems a graph, also of each hard negative; run negations.py on it first")


def build(args, path):
    """The network, the studies to train with and the rows to validate with."""
    negatives, graphs, _ = SYSTEMS[args.system]
    torch.manual_seed(args.seed)  # weights are the same on all ranks
    clip = ClinicalCLIP(args.image_encoder, args.text_encoder, args.width, args.image_size,
                        graph=graphs, framework=args.framework)
    studies = Studies(Manifest(path, "train", args.image_root), tokenize=clip.tokenize,
                      image_size=args.image_size, negatives=negatives, graphs=graphs,
                      uncertain=args.uncertain, seed=args.seed)
    return clip, studies, Manifest(args.val or path, "val", args.image_root)


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


def start_worker(_worker):
    """A reading process outlives signals, which the last step needs, but not its parent."""
    for name in HEEDED:
        signal.signal(name, signal.SIG_IGN)
    gc.freeze()  # a collection would touch, and so copy, every inherited page


def to_device(x, device):
    """Move the tensors of a batch, however nested; a GPU copies while the CPU goes on."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    if torch.is_tensor(x):
        return x.to(device, non_blocking=True)
    return x


# ---------------------------------------------------------------- the run folder


def choose_folder(args):
    """The run folder: --out or a fresh one."""
    number = 1
    while os.path.exists(f"runs/run-{number:03}"):
        number += 1
    folder = Path(args.out or f"runs/run-{number:03}")
    goes_on = args.resume == "latest" or Path(args.resume or "") == folder / "last.pt"
    expect(goes_on or not list(folder.glob("*")), folder, "a new folder, found another run's: "
           "continue that with --resume latest or choose another --out")
    return folder


def load_resumed(args, folder):
    """What --resume names, or None to start; refuses flags that would make it another run."""
    checkpoint = args.resume
    if checkpoint == "latest":
        checkpoint = on_rank_0(restore_newest, folder)
    if not checkpoint:
        return None
    saved = load_checkpoint(checkpoint)
    for name, value in vars(args).items():
        was = saved["flags"].get(name)
        expect(was == value or name in FREE_ON_RESUME, f"--{name.replace('_', '-')}",
               f"{was!r} to resume what was begun with that, got {value!r}")
    if Path(checkpoint).parent != folder:
        saved["val"] = None  # best.pt stayed there: as with other val rows the best starts anew
    return saved


def restore_newest(folder):
    """last.pt if it is intact, else previous.pt, which then takes its place; None without any."""
    for path in (folder / "last.pt", folder / "previous.pt"):
        try:
            if path.exists():
                load_checkpoint(path)
                path.replace(folder / "last.pt")
                return folder / "last.pt"
        except ModelError as error:
            say(f"warning: passed over {error}")
    expect(not list(folder.glob("*.pt")), folder,
           "an intact checkpoint; remove the folder to start afresh")


def take_up(saved, clip, optimizer, digests):
    """Go on from a checkpoint, unless the training rows are others. Returns its state."""
    expect(saved["data"] == digests["data"], "cannot resume",
           "the same data: the training rows are others now")
    clip.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    state = saved["state"]
    if saved["val"] != digests["val"]:  # other rows, or a new folder, have a best of their own
        state |= {"validated": 0, "best": {}}
    return state


def start_record(args, folder, clip, studies, val_rows):
    """After a look at the images: config.json, the tokenizer and a line of the log."""
    studies[0, 0]  # in case the image root is wrong
    check_images(val_rows, args.workers)
    with open_atomic(folder / "config.json") as file:
        json.dump({"flags": vars(args), "world": WORLD, **provenance()}, file, indent=1)
    clip.save_tokenizer(folder / "tokenizer")
    log(folder, argv=sys.argv)
    say(f"run folder    {folder}\n"
        f"data          {len(studies):,} training and {len(val_rows):,} validation studies, "
        f"{WORLD} rank(s)")


def write_checkpoint(path, content):
    """Write path by rank 0, whole or not at all.

    Renames alone, which any file system can: last to previous, new to last. Readers take
    previous.pt while there is no last.pt.
    """
    if RANK > 0:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with open_atomic(path, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        if path.name == "last.pt" and path.exists():
            path.replace(path.with_name("previous.pt"))


def log(folder, **record):
    """Append a record to log.jsonl, by rank 0; what is no number becomes null."""
    if RANK == 0:
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def memory_mb(device):
    """Peak memory of this process, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def how_to_evaluate(args, folder, path):
    """The command that evaluates a run, on a split that has rows."""
    splits = Manifest(path).columns["split"]
    split = next(name for name in ("test", "val", "train") if name in splits)
    command = f"python evaluate.py {folder} --data {path} --split {split}"
    if args.image_root:
        command += f" --image-root {args.image_root}"
    return command


# ---------------------------------------------------------------- ranks, signals, errors


def start_ranks():
    """Join the process group that torchrun describes. Returns this rank's device."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the loop listens it ends all, silently
    device, backend = "cpu", "gloo"
    if torch.cuda.is_available():
        device, backend = "cuda", "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group(backend, timeout=TIMEOUT)
    return torch.device(device)


def leave_ranks():
    """End the process group, and with it its threads, while Python still runs.

    A thread of gloo that lets go of a tensor after that aborts the process. DistributedDataParallel
    holds the group, so it has to go first.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()  # who leaves early takes the others' connections along
        dist.destroy_process_group()


def on_rank_0(function, *inputs):
    """Call a function on rank 0 alone; every rank waits for its result and gets it."""
    result = [None]
    if RANK == 0:
        result = [function(*inputs)]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


def say(line):
    """One line on stderr, from rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(line, file=sys.stderr)


def listen():
    """From now on signals do not end this rank: the list that those which come are added to."""
    signals = []

    def heed(number, _frame):
        signals.append(number)

    for name in HEEDED:
        signal.signal(name, heed)
    return signals


def give_up(error):
    """End with one line where a user can mend it, else with a traceback."""
    message = str(error).rstrip().split("UserError: ")[-1]  # a reading process's has a traceback
    if isinstance(error, torch.OutOfMemoryError):
        message = ("the GPU's memory is full; raise --accumulate, which keeps the batch and its "
                   "gradient, or lower --batch-size or --image-size")
    elif isinstance(error, (EOFError, ConnectionError)) or "DataLoader worker (pid" in message:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler may raise once more
        message = "a reading process was killed; if memory is short, lower --workers"
    elif "by peer" in message:  # gloo's connection was closed or reset
        message = f"rank {RANK} lost another rank, whose message says why"
    elif not isinstance(error, (UserError, ModelError, OSError)):  # a bug of ours
        if WORLD == 1:
            raise error
        message = traceback.format_exc()
    if WORLD == 1:
        raise UserError(message) from None
    print(f"error: {message}", file=sys.stderr)
    os._exit(2)  # at once: to end the group would wait for ranks that wait for this one


# ---------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--train", help="manifest that negations.py wrote; none: the phantom, in runs/phantom")
    add("--val", help="manifest whose val rows choose best.pt; none: those of --train")
    add("--image-root", help="overrides the manifest's image folder")
    add("--uncertain", choices=("positive", "negative"), default="positive",
        help="what an uncertain label counts as in C")
    add("--workers", type=minimum(0), default=2,
        help="reading processes per rank; about the cores per GPU, 0 to read in between")
    add("--system", choices=SYSTEMS, default="clip-ng-dtcg", help="row of Tab. 2")
    add("--framework", choices=("softmax", "sigmoid"), default="softmax",
        help="Eq. 1-2, or SigLIP's loss with the same soft labels")
    # DIFFERS from Sec. 5.2: small encoders and images are the default; the paper's are flags.
    add("--image-encoder", default="tiny",
        help="tiny, swin-t (the paper's, random) or a file of torchvision's Swin-T weights")
    add("--text-encoder", default="tiny",
        help="tiny, a BERT's folder or hub id; the paper's is emilyalsentzer/Bio_ClinicalBERT")
    add("--image-size", type=minimum(32), default=64, help="pixels; the paper's is 224")
    add("--width", type=minimum(1), default=512, help="width D of the joint embedding")
    for stream, tau in DynamicSoftContrastiveLoss().thresholds.items():
        add(f"--w-{stream}", type=minimum(0, float), default=1.0,
            help="weight of the stream in Eq. 10")
        # At 1 labels are one-hot; positives near the number of texts mean that they collapsed.
        add(f"--tau-{stream}", type=minimum(0, float, below=1), default=tau,
            help="threshold; choose one at which log.jsonl's positives are a few")
    # ASSUMPTION: AdamW's rate, schedule, epochs, batch are CXR-CLIP's; tiny encoders get lr 1e-3.
    # DIFFERS from CXR-CLIP: gradients are clipped, norms, biases, temperature do not decay.
    add("--epochs", type=minimum(1), default=15, help="passes over the training rows")
    add("--max-steps", type=minimum(1), help="stop early; the rate still follows --epochs")
    add("--batch-size", type=minimum(2), default=128, help="global batch N, over all ranks")
    add("--accumulate", type=minimum(1), default=1,
        help="micro-batches per step and rank: memory of one, negatives and gradients of all")
    add("--lr", type=minimum(0, float),
        help="peak learning rate; none: 5e-5, or 1e-3 with two tiny encoders")
    add("--weight-decay", type=minimum(0, float), default=1e-4,
        help="not on norms, biases and temperature")
    add("--warmup-epochs", type=minimum(0, float), default=1.0, help="linear, before the cosine")
    add("--clip", type=minimum(1e-9, float), default=1.0, help="largest gradient norm")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 autocasts the encoders")
    add("--seed", type=minimum(0), default=0, help="weights, data order, augmentation, dropout")
    add("--out", help="run folder; none: a fresh one below runs/")
    add("--resume", help="latest, --out's newest intact checkpoint, or one for a new --out")
    add("--checkpoint-every", type=minimum(1), default=500, help="steps between saves")
    args = parser.parse_args(argv)
    if args.resume == "latest" and not args.out:
        parser.error("--resume latest: expected --out, the run folder to continue")
    if args.framework == "sigmoid" and args.system == "softclip":
        parser.error("--framework sigmoid: has no softclip, whose targets are a softmax")
    if args.batch_size % (WORLD * args.accumulate):
        parser.error(f"--batch-size {args.batch_size}: expected a multiple of {WORLD} ranks x "
                     f"--accumulate {args.accumulate}")
    if args.lr is None:
        args.lr = 1e-3 if args.image_encoder == args.text_encoder == "tiny" else 5e-5
    return args


if __name__ == "__main__":
    run_main(main)
