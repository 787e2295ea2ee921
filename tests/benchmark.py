"""Timings and memory as ratios, measured side by side in one run: `python tests/benchmark.py`.

    python tests/benchmark.py                   everything: 5 minutes, 4 GB of disk for a while
    python tests/benchmark.py loss gcn          these parts

Absolute times depend on the machine; each row compares two things that ran in turns.

SPDX-License-Identifier: MIT
"""

import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate  # noqa: E402
import train  # noqa: E402
from data import (  # noqa: E402
    GlobalBatches,
    Manifest,
    Studies,
    cache,
    make_phantom,
    pixels,
    read_image,
)
from gcn import GCN  # noqa: E402
from loss import DynamicSoftContrastiveLoss  # noqa: E402
from model import ClinicalCLIP  # noqa: E402
from negations import annotate  # noqa: E402


def ratio(first, second, runs=7):
    """Median over runs of time(first) / time(second), the two taken in turns, and both medians."""
    times = ([], [])
    for _ in range(runs + 1):
        for function, kept in zip((first, second), times, strict=True):
            began = time.perf_counter()
            function()
            kept.append(time.perf_counter() - began)
    pairs = [a / b for a, b in zip(*(t[1:] for t in times), strict=True)]
    return statistics.median(pairs), *(statistics.median(t[1:]) for t in times)


def row(what, value, wanted, detail=""):
    print(f"{what:<62} {value:>9}   wanted {wanted:<9} {detail}", flush=True)


# ---------------------------------------------------------------- loss.py


def loss_batch(B, D=512, K=14):
    """Embeddings whose similarities spread around 0.5, with a third of reports without labels."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(1, D, generator=g)
    rows = {k: F.normalize(common + torch.randn(B, D, generator=g), dim=1).requires_grad_()
            for k in ("image", "text", "hard_text", "graph", "hard_graph")}
    rows["labels"] = (torch.rand(B, K, generator=g) < 0.1).float()
    rows["hard_labels"] = (torch.rand(B, K, generator=g) < 0.1).float()
    return rows, torch.tensor(14.0, requires_grad=True)


def ours(rows, scale, row_chunk=None):
    rows = dict(rows)
    criterion = DynamicSoftContrastiveLoss(1, 1, 1, 0.5, 0.5, 0.5, row_chunk=row_chunk)
    out = criterion(rows.pop("image"), rows.pop("text"), rows.pop("labels"), scale, **rows)
    out["loss"].backward()
    return out["loss"].item()


def literal(rows, scale):
    """The 18 KL terms of Eq. 10, each written out, in plain autograd."""
    joined = {k: torch.cat([rows[k], rows[f"hard_{k}"]]) for k in ("text", "graph", "labels")}
    modality = {"image": rows["image"], "text": joined["text"], "graph": joined["graph"]}
    streams = (joined["text"], F.normalize(joined["labels"], dim=1), joined["graph"])
    B, total = len(rows["image"]), 0
    for a, b in itertools.permutations(modality, 2):
        for x in streams:
            left = modality[a][:B] if b == "image" else modality[a]
            log_p = (scale * left @ modality[b].T).log_softmax(1)
            with torch.no_grad():
                y = ((x @ x.T - 0.5) / 0.5).clamp(min=0).fill_diagonal_(1)
                y = y[:log_p.shape[0], :log_p.shape[1]]
                y = y / y.sum(1, keepdim=True)
            total = total + F.kl_div(log_p, y, reduction="batchmean")
    total.backward()
    return total.item()


def info_nce(rows, scale):
    logits, own = scale * rows["image"] @ rows["text"].T, torch.arange(len(rows["image"]))
    (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)).backward()


def memory_gb(name):
    """VmRSS or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def peak_memory(row_chunk, B, queue):
    rows, scale = loss_batch(B)
    before = memory_gb("VmRSS")
    ours(rows, scale, row_chunk)
    queue.put(memory_gb("VmHWM") - before)


def bench_loss():
    rows, scale = loss_batch(1024)
    assert abs(ours(rows, scale) / literal(rows, scale) - 1) < 1e-5
    value, a, b = ratio(lambda: literal(rows, scale), lambda: ours(rows, scale))
    row("18 literal KL terms / loss, B = 1024, D = 512", f"{value:.1f} x", ">= 3 x",
        f"{a:.2f} s / {b:.2f} s")
    value, a, b = ratio(lambda: ours(rows, scale), lambda: info_nce(rows, scale))
    row("loss / InfoNCE, B = 1024, D = 512", f"{value:.1f} x", "<= 12 x", f"{a:.2f} s / {b:.3f} s")
    value, a, b = ratio(lambda: ours(rows, scale, 256), lambda: ours(rows, scale))
    row("row_chunk=256 / unchunked, B = 1024", f"{value:.2f} x", "<= 2 x", f"{a:.2f} s / {b:.2f} s")
    entropies = [torch.rand(2048) for _ in range(3)]  # h of every row, which the value needs anyway
    value, a, b = ratio(lambda: [h.exp().sum() / len(h) for h in entropies],
                        lambda: ours(rows, scale))
    row('the diagnostics "positives_*" / loss', f"{100 * value:.2f} %", "< 3 %")
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(
        target=peak_memory, args=(256, 8192, queue))
    process.start()
    row("memory beyond the inputs, B = 8192, row_chunk=256", f"{queue.get():.2f} GB", "< 3 GB")
    process.join()


# ---------------------------------------------------------------- gcn.py


def graph_batch(graphs=256, nodes=18, edges=13, features=772):
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(nodes // 2, nodes * 3 // 2 + 1, (graphs,), generator=g)
    starts = sizes.cumsum(0) - sizes
    pairs = [torch.randint(int(n), (2, edges), generator=g) + s
             for n, s in zip(sizes, starts, strict=True)]
    pairs = torch.cat([p[:, p[0] < p[1]] for p in pairs], 1).unique(dim=1)
    x = torch.randn(int(sizes.sum()), features, generator=g)
    return x, pairs, torch.arange(graphs).repeat_interleave(sizes), graphs


def bench_gcn():
    try:
        from torch_geometric.nn import GCNConv, global_mean_pool
    except ImportError:
        return print("gcn: torch_geometric is not installed, nothing to compare with")
    x, edges, graph, count = graph_batch()
    net, first, second = GCN(772, 256, 256), GCNConv(772, 256), GCNConv(256, 256)

    def theirs():
        both = torch.cat([edges, edges.flip(0)], 1)
        h = second(torch.relu(first(x, both)), both)
        global_mean_pool(h, graph, count).sum().backward()

    value, a, b = ratio(theirs, lambda: net(x, edges, graph, count).sum().backward(), runs=31)
    row("torch_geometric's GCNConv x 2 + pool / GCN, 256 graphs", f"{value:.2f} x", ">= 1.3 x",
        f"{1e3 * a:.1f} ms / {1e3 * b:.1f} ms")


# ---------------------------------------------------------------- data.py


def best(function, items, repeats=3):
    """Best time an item over the repeats, so that a busy machine does not decide."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for item in items:
            function(item)
        times.append((time.perf_counter() - began) / len(items))
    return min(times)


def no_tokens(texts):
    return {"input_ids": torch.zeros(len(texts), 256, dtype=torch.int64)}


def enlarged(folder, count=24):
    """2,500 x 3,000 pixel JPEGs made by enlarging the phantom: their manifest."""
    raw = Manifest(make_phantom(folder / "small", studies=count, size=512, seed=0))
    (folder / "big").mkdir()
    with open(folder / "big.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            record = raw[i] | {"root": str(folder / "big"), "image": f"{i}.jpg", "split": "train"}
            small = read_image(raw.image_path(i))
            large = small.resize((2500, 3000), Image.Resampling.BICUBIC)
            large.save(folder / "big" / record["image"])
            file.write(json.dumps(record) + "\n")
    return folder / "big.jsonl"


def bench_images(size=224):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path, folder = enlarged(Path(name)), Path(name)
        cache(path, folder / "cached")
        big, small = Manifest(path), Manifest(folder / "cached/big.jsonl")
        paths, cached_paths = ([m.image_path(i) for i in range(len(m))] for m in (big, small))

        def draft(path):
            return pixels(read_image(path, at_least=size * 5 // 4), size)

        full = best(lambda path: pixels(read_image(path), size), paths, 1)
        scaled, cached = best(draft, paths), best(draft, cached_paths)
        ms = f"{1e3 * full:.1f}, {1e3 * scaled:.1f}, {1e3 * cached:.2f} ms"
        row("2,500 x 3,000 JPEG: full decode / scaled", f"{full / scaled:.1f} x", ">= 3 x", ms)
        row("scaled decode / from the cache", f"{scaled / cached:.1f} x", ">= 5 x")
        row("full decode / from the cache", f"{full / cached:.1f} x", ">= 15 x")
        grey = [np.abs(pixels(read_image(p), size).astype(int) - draft(p)).mean() for p in paths]
        row("scaled against full decode, mean grey levels", f"{np.mean(grey):.2f}", "<= 2")
        studies = Studies(small, image_size=size, tokenize=no_tokens, negatives=False, graphs=False)

        def bare(path):
            with Image.open(path) as image:
                return pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))

        value, a, b = ratio(lambda: [studies[(0, i)] for i in range(len(small))] * 4,
                            lambda: [bare(p) for p in cached_paths] * 4)
        row("a cached sample / bare decode + resize + to-tensor", f"{value:.2f} x", "<= 1.3 x",
            f"{1e3 * a / len(small):.2f} / {1e3 * b / len(small):.2f} ms")


def shared_memory_mb():
    """Resident MB of this process and its children, shared pages counted once."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    files = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (os.getpid(), *children))
    return sum(int(line.split()[1]) for text in files for line in text.splitlines()
               if line.startswith("Pss:")) / 1024


def manifest_memory(path, queue):
    """In a process of its own: memory above the imports after 200 batches by 4 workers."""
    before = shared_memory_mb()
    large = Manifest(path, "train")
    studies = Studies(large, image_size=64, tokenize=no_tokens, negatives=True, graphs=True)
    batches = iter(DataLoader(studies, batch_sampler=GlobalBatches(len(studies), 128, 0, 0),
                              num_workers=4, collate_fn=studies.collate,
                              worker_init_fn=train.start_worker, multiprocessing_context="fork"))
    for _ in range(200):
        next(batches)
    queue.put(shared_memory_mb() - before)
    del batches


def bench_manifest(lines=400_000):
    """400,000 studies with graphs and hard negatives, some 3 GB on disk."""
    with tempfile.TemporaryDirectory() as name:
        raw = Manifest(make_phantom(Path(name) / "p", studies=400, normal_fraction=0.1))
        rows = [json.dumps(annotate(raw[i])) for i in range(len(raw))]
        rows = [text[:-1] + f', "filler": "{"x" * max(0, 7500 - len(text))}"}}' for text in rows]
        path = Path(name) / "large.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(rows[k % len(rows)].replace('"phantom/', f'"phantom/{k}-', 1) + "\n"
                            for k in range(lines))
        began = time.perf_counter()
        Manifest(path)
        indexed, began = time.perf_counter() - began, time.perf_counter()
        Manifest(path, "train")
        row(f"{path.stat().st_size / 1e9:.1f} GB, {lines:,} lines: opened after the first time",
            f"{time.perf_counter() - began:.2f} s", "<= 5 s", f"indexed once in {indexed:.0f} s")
        queue = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(
            target=manifest_memory, args=(path, queue))
        process.start()
        row("memory above the imports, 4 workers, after 200 batches", f"{queue.get():.0f} MB",
            "<= 200 MB")
        process.join()


def bench_phantom():
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        make_phantom(Path(name), studies=3000, size=64, seed=7)
        row("3,000 phantoms of 64 pixels", f"{time.perf_counter() - began:.1f} s", "<= 10 s")


# ---------------------------------------------------------------- train.py


def step_seconds(folder):
    """Median seconds a step of a run, its first epoch left out."""
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if r.get("step", 0) > 12 and "loss" in r]
    return statistics.median(128 / r["images_per_s"] for r in steps)


def run_training(folder, ranks, threads, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), train.__file__, "--out", str(folder), "--max-steps", "36", *flags]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent,
                   env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return step_seconds(folder)


def bare_step_seconds(path, steps=36):
    """Median seconds of the encoders' forward and backward and the optimiser's step alone."""
    torch.manual_seed(0)
    clip = ClinicalCLIP("tiny", "tiny", 512, 64).train()
    optimizer = torch.optim.AdamW(train.parameter_groups(clip, 1e-4), lr=1e-3)
    studies = Studies(Manifest(path, "train"), image_size=64, tokenize=clip.tokenize,
                      negatives=True, graphs=True)
    keys = list(GlobalBatches(len(studies), 128, 0, 0))
    batches = [studies.collate([studies[key] for key in rows]) for rows in keys]
    times = []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        sum((v * v.detach()).sum() for v in clip(batch).values()).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[12:])


def timed_training(folder, queue):
    """In a process of its own: the default run, and the share of each step outside, in per cent."""
    os.chdir(folder)
    spent, first = [], []

    def timed(function, since=lambda began: began):
        def run(*args, **kwargs):
            began = time.perf_counter()
            out = function(*args, **kwargs)
            spent.append(time.perf_counter() - since(began))
            return out
        return run

    def forward(clip, batch, plain=ClinicalCLIP.forward):
        out = plain(clip, batch)
        for rows in out.values():  # the loss's backward ends where the first gradient arrives
            rows.register_hook(lambda _: first.append(time.perf_counter()))
        return out

    ClinicalCLIP.forward = timed(forward)
    torch.Tensor.backward = timed(torch.Tensor.backward, lambda _: min(first))
    torch.optim.AdamW.step = timed(torch.optim.AdamW.step)
    log, shares = train.Run.log, []

    def watch(run, record):
        if "images_per_s" in record:
            shares.append(100 * (1 - sum(spent) * record["images_per_s"] / 128))
            spent.clear(), first.clear()
        log(run, record)

    train.Run.log = watch
    train.main(["--out", "timed", "--max-steps", "36"])
    queue.put(statistics.median(shares[12:]))


def bench_train():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        queue = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(
            target=timed_training, args=(folder, queue))
        process.start()
        row("share of a step outside encoders and optimiser", f"{queue.get():.1f} %", "<= 8 %")
        process.join()
        shares = []
        for turn in range(3):
            whole = run_training(folder / f"a{turn}", 1, torch.get_num_threads())
            bare = bare_step_seconds(folder / "runs/phantom/phantom_neg.jsonl")
            shares.append(100 * (1 - bare / whole))
        row("a step's time above encoders and optimiser with idle cores",
            f"{statistics.median(shares):.1f} %", "-",
            f"of 3 turns, all: {', '.join(f'{s:.1f}' for s in shares)}")
        gains = []
        for turn in range(3):
            one = run_training(folder / f"b{turn}", 1, 1, "--workers", "0")
            two = run_training(folder / f"c{turn}", 2, 1, "--workers", "0")
            gains.append(one / two / 2)
        row("throughput of 2 ranks of 1 thread / twice 1 rank", f"{statistics.median(gains):.2f}",
            ">= 0.85", f"of 3 turns, all: {', '.join(f'{g:.2f}' for g in gains)}")


# ---------------------------------------------------------------- evaluate.py


def bench_evaluate(count=64):
    rng = np.random.default_rng(0)
    scores, patients = rng.normal(size=(10_000, 14)), rng.integers(0, 6_000, 10_000)
    truth = (rng.random((10_000, 14)) < 0.1).astype(np.float32)
    began = time.perf_counter()
    evaluate.bootstrap(evaluate.classification(scores, truth, list("abcdefghijklmn")), patients)
    row("AUROC, AP, accuracy of 14 classes, 10,000 images, 1,000 resamples",
        f"{time.perf_counter() - began:.1f} s", "<= 5 s")
    with tempfile.TemporaryDirectory() as name:
        manifest = Manifest(make_phantom(Path(name), studies=count, size=256))
        clip = ClinicalCLIP("swin-t", "tiny", graph=False).eval()
        pixels = torch.stack([clip.transform(read_image(manifest.image_path(i)))
                              for i in range(len(manifest))])

        def bare():
            with torch.inference_mode():
                for part in pixels.split(16):
                    clip.encode_image(part)

        value, a, b = ratio(bare, lambda: evaluate.embed_images(clip, manifest, 16), runs=3)
        row("throughput of embed_images / bare Swin-T, 224 pixels", f"{value:.2f}", ">= 0.9",
            f"{a:.1f} / {b:.1f} s for {len(manifest)} images")


PARTS = {"loss": bench_loss, "gcn": bench_gcn, "images": bench_images, "manifest": bench_manifest,
         "phantom": bench_phantom, "train": bench_train, "evaluate": bench_evaluate}

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        sys.exit(f"error: unknown part {', '.join(sorted(unknown))}, expected {', '.join(PARTS)}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
