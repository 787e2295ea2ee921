"""Timings and memory as ratios, measured side by side in one run: `python tests/benchmark.py`.

    python tests/benchmark.py                   everything: 10 minutes, 4 GB of disk for a while
    python tests/benchmark.py loss gcn          these parts
    python tests/benchmark.py gpu               for a GPU (never run); without one it says so

Absolute times depend on the machine; each row compares two things that ran in turns. `gpu` alone
prints absolute numbers, with the card's name.

SPDX-License-Identifier: MIT
"""

import functools
import gc
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate  # noqa: E402
import gcn  # noqa: E402
import train  # noqa: E402
from data import (  # noqa: E402
    Manifest,
    Studies,
    cache,
    global_batches,
    make_phantom,
    pixels,
    read_image,
)
from loss import DynamicSoftContrastiveLoss, SigmoidSoftContrastiveLoss  # noqa: E402
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


def apart(function, *args):
    """function(*args) in a fresh process, with which its memory and its changes to others go."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


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


def ours(rows, *scalars, row_chunk=None):
    """Forward and backward: with a scale the softmax loss, with scale and bias the sigmoid one."""
    rows = dict(rows)
    kind = (DynamicSoftContrastiveLoss, SigmoidSoftContrastiveLoss)[len(scalars) - 1]
    criterion = kind(1, 1, 1, 0.5, 0.5, 0.5, row_chunk=row_chunk)
    out = criterion(rows.pop("image"), rows.pop("text"), rows.pop("labels"), *scalars, **rows)
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


def peak_memory(B, row_chunk, *bias):
    """GB beyond the inputs; call it `apart`."""
    rows, scale = loss_batch(B)
    before = memory_gb("VmRSS")
    ours(rows, scale, *bias, row_chunk=row_chunk)
    return memory_gb("VmHWM") - before


def bench_loss():
    rows, scale = loss_batch(1024)
    bias = -2.0
    assert abs(ours(rows, scale) / literal(rows, scale) - 1) < 1e-5
    value, a, b = ratio(lambda: literal(rows, scale), lambda: ours(rows, scale))
    row("18 literal KL terms / loss, B = 1024, D = 512", f"{value:.1f} x", ">= 3 x",
        f"{a:.2f} s / {b:.2f} s")
    value, a, b = ratio(lambda: ours(rows, scale), lambda: info_nce(rows, scale))
    row("loss / InfoNCE, B = 1024, D = 512", f"{value:.1f} x", "<= 12 x", f"{a:.2f} s / {b:.3f} s")
    value, a, b = ratio(lambda: ours(rows, scale, bias), lambda: ours(rows, scale))
    row("sigmoid loss / softmax loss, B = 1024", f"{value:.2f} x", "-", f"{a:.2f} s / {b:.2f} s")
    a, b = apart(peak_memory, 1024, None, bias), apart(peak_memory, 1024, None)
    row("the same in memory", f"{a / b:.2f} x", "-", f"{a:.2f} GB / {b:.2f} GB")
    value, a, b = ratio(lambda: ours(rows, scale, row_chunk=256), lambda: ours(rows, scale))
    row("row_chunk=256 / unchunked, B = 1024", f"{value:.2f} x", "<= 2.2 x",
        f"{a:.2f} s / {b:.2f} s")
    entropies = [torch.rand(2048) for _ in range(3)]  # h of every row, which the value needs anyway
    value, a, b = ratio(lambda: [h.exp().sum() / len(h) for h in entropies],
                        lambda: ours(rows, scale))
    row('the diagnostics "positives_*" / loss', f"{100 * value:.2f} %", "< 3 %")
    row("memory beyond the inputs, B = 8192, row_chunk=256",
        f"{apart(peak_memory, 8192, 256):.2f} GB", "< 2 GB")


# ---------------------------------------------------------------- gcn.py


def graph_records(graphs=256, nodes=18, edges=13):
    """RadGraph records of random graphs, as large as those of reports."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(graphs):
        count = int(rng.integers(nodes // 2, nodes * 3 // 2 + 1))
        entities = {str(i): {"tokens": f"word{i}", "label": "OBS-DP", "start_ix": i, "end_ix": i,
                             "relations": []} for i in range(count)}
        for source, target in rng.integers(count, size=(edges, 2)).tolist():
            if source < target:
                entities[str(source)]["relations"].append(["located_at", str(target)])
        text = " ".join(entity["tokens"] for entity in entities.values())
        records.append({"text": text, "entities": entities})
    return records


def edge_index(records):
    """The records' edges as torch_geometric has them: (2, 2E), both directions, each once."""
    pairs, first = set(), 0
    for record in records:
        phrases, _, edges = gcn.read_radgraph(record)
        for i, j in edges:
            pairs |= {(first + i, first + j), (first + j, first + i)}
        first += len(phrases)
    return torch.tensor(sorted(pairs)).T


def bench_gcn(features=772):
    try:
        from torch_geometric.nn import GCNConv, global_mean_pool
    except ImportError:
        return print("gcn: torch_geometric is not installed, nothing to compare with")
    records = graph_records()
    batch, edges = gcn.collate_graphs(records), edge_index(records)
    graph, sizes = batch["graph_index"], batch["sizes"]
    x = torch.randn(len(graph), features)
    net, first, second = gcn.GCN(features, 256, 256), GCNConv(features, 256), GCNConv(256, 256)

    def ours():
        net(x, batch).sum().backward()

    def theirs():
        h = second(torch.relu(first(x, edges)), edges)
        global_mean_pool(h, graph, len(sizes)).sum().backward()

    value, a, b = ratio(theirs, ours, runs=31)
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
    ids = torch.zeros(len(texts), 256, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "lengths": [256] * len(texts)}


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


def freeze(_worker):
    """As in train.py: a collection would touch, and so copy, every page that is shared."""
    gc.freeze()


def manifest_memory(path):
    """Memory above the imports, in MB, after 200 batches by 4 workers."""
    before = shared_memory_mb()
    large = Manifest(path, "train")
    studies = Studies(large, image_size=64, tokenize=no_tokens, negatives=True, graphs=True)
    batches = iter(DataLoader(studies, batch_sampler=global_batches(len(studies), 128, 0, 0),
                              num_workers=4, collate_fn=studies.collate,
                              worker_init_fn=freeze, multiprocessing_context="fork"))
    for _ in range(200):
        next(batches)
    return shared_memory_mb() - before


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
        row("memory above the imports, 4 workers, after 200 batches",
            f"{apart(manifest_memory, path):.0f} MB", "<= 200 MB")


def bench_phantom():
    with tempfile.TemporaryDirectory() as name:
        began = time.perf_counter()
        make_phantom(Path(name), studies=3000, size=64, seed=7)
        row("3,000 phantoms of 64 pixels", f"{time.perf_counter() - began:.1f} s", "<= 10 s")


# ---------------------------------------------------------------- train.py


def log_steps(folder, skip=12):
    """The records of a run's log that are of a step, the first ones left out."""
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r and r["step"] > skip]


def run_training(folder, ranks, threads, *flags):
    """Median seconds of a step of the default run, its first epoch left out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               str(ranks), train.__file__, "--out", str(folder), "--max-steps", "36", *flags]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent,
                   env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return statistics.median(128 / r["images_per_s"] for r in log_steps(folder))


def to_device(x, device):
    """A batch with its tensors on the device; lists stay."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    return x.to(device) if torch.is_tensor(x) else x


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def bare_step_seconds(path, steps, skip, encoders=("tiny", "tiny"), size=64, batch_size=128,
                      device="cpu", precision="fp32"):
    """Median seconds of the encoders' forward and backward and the optimiser's step alone.

    path: a manifest, whose batches are made before; the whole method, random weights.
    """
    torch.manual_seed(0)
    clip = ClinicalCLIP(*encoders, 512, size, graph=True).to(device).train()
    weights = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=device == "cuda")
    studies = Studies(Manifest(path, "train"), image_size=size, tokenize=clip.tokenize,
                      negatives=True, graphs=True)
    keys = itertools.islice(global_batches(len(studies), batch_size, 0, 0), 12)
    batches = [to_device(studies.collate([studies[key] for key in rows]), device) for rows in keys]
    times = []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        synchronize(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            out = clip(batch)
        sum((v * v.detach()).sum() for v in out.values()).backward()
        optimizer.step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[skip:])


def timed_training(folder):
    """The default run, in which calls are timed: the share of a step outside them, in per cent."""
    os.chdir(folder)
    spent, first, steps = [], [], []  # seconds of one step's pieces; gradients' arrival; all steps

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

    timed_step = timed(torch.optim.AdamW.step)

    def step(optimizer):
        timed_step(optimizer)
        steps.append(sum(spent))
        spent.clear()
        first.clear()

    ClinicalCLIP.forward = timed(forward)
    torch.Tensor.backward = timed(torch.Tensor.backward, lambda _: min(first))
    torch.optim.AdamW.step = step
    train.main(["--out", "timed", "--max-steps", "36"])
    whole = [128 / r["images_per_s"] for r in log_steps("timed", skip=0)]
    shares = [100 * (1 - inside / total) for inside, total in zip(steps, whole, strict=True)]
    return statistics.median(shares[12:])


def bench_train():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row("share of a step outside encoders and optimiser",
            f"{apart(timed_training, folder):.1f} %", "<= 8 %")
        shares = []
        for turn in range(3):
            whole = run_training(folder / f"a{turn}", 1, torch.get_num_threads())
            bare = bare_step_seconds(folder / "runs/phantom/phantom_neg.jsonl", steps=36, skip=12)
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


class RandomModel:
    """Scores of no meaning at no cost: what remains is the work of evaluate.py."""

    def transform(self, image):
        return torch.zeros(1)

    def encode_image(self, pixels):
        return torch.randn(len(pixels), 64)

    def encode_text(self, texts):
        return torch.randn(len(texts), 64)


def bench_evaluate(images=10_000, count=64):
    with tempfile.TemporaryDirectory() as name:
        raw = Manifest(make_phantom(Path(name) / "few", studies=count, size=256))
        many = Path(name) / "many.jsonl"
        with open(many, "w", encoding="utf-8") as file:
            for i in range(images):
                record = raw[i % count] | {"id": f"phantom/{i}", "patient": str(i * 6 // 10)}
                file.write(json.dumps(record) + "\n")
        bench = evaluate.Bench(RandomModel(), Manifest(many))
        zero_shot = evaluate.TASKS["zero-shot"]
        zero_shot(bench)  # which embeds, once for all tasks
        began = time.perf_counter()
        zero_shot(bench)
        row(f"zero-shot metrics of 14 classes, {images:,} images, 1,000 resamples",
            f"{time.perf_counter() - began:.1f} s", "<= 10 s")
        clip = ClinicalCLIP("swin-t", "tiny", graph=False).eval()
        pixels = torch.stack([clip.transform(read_image(raw.image_path(i)))
                              for i in range(count)])

        def bare():
            with torch.inference_mode():
                for part in pixels.split(16):
                    clip.encode_image(part)

        value, a, b = ratio(bare, lambda: evaluate.Bench(clip, raw, batch_size=16).images, runs=3)
        row("throughput of evaluation's embedding / bare Swin-T, 224 pixels", f"{value:.2f}",
            ">= 0.9", f"{a:.1f} / {b:.1f} s for {count} images")


# ---------------------------------------------------------------- a GPU


class GPU(NamedTuple):
    """What `gpu` measures; tests take smaller sizes."""

    device: str = "cuda"
    image_encoder: str = "swin-t"
    bert: tuple = ()  # changes to BERT-base's configuration
    image_size: int = 224
    batches: tuple = (16, 32, 64, 128, 256)
    precisions: tuple = ("fp32", "bf16")
    systems: tuple = tuple(train.SYSTEMS)
    systems_batch: int = 64
    steps: int = 40
    skip: int = 15  # of them: the first are slower
    studies: int = 2500
    workers: int = min(16, os.cpu_count() or 1)
    losses: tuple = (1024, 2048, 4096, 8192)
    width: int = 512
    repeats: int = 10


def long_phantom(folder, studies, size):
    """A phantom of training rows alone, with reports about as long as MIMIC's: its manifest."""
    raw = Manifest(make_phantom(folder / "phantom", studies=studies, size=size))
    path = folder / "long.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(len(raw)):
            record = annotate(raw[i]) | {"split": "train"}
            for side in (record, *record["hard_negatives"]):
                side["report"] = " ".join([side["report"]] * 3)
            file.write(json.dumps(record) + "\n")
    return path


def random_bert(folder, changes, manifest):
    """A folder of BERT-base with random weights; its vocabulary has the words of the reports."""
    from transformers import BertConfig, BertModel
    config = BertConfig(**dict(changes))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rows = Manifest(manifest)
    reports = {word for i in range(len(rows)) for word in re.findall(r"\w+|\S", rows[i]["report"])}
    words = (words + sorted(reports))[:config.vocab_size]
    words += [f"word{i}" for i in range(config.vocab_size - len(words))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertModel(config).save_pretrained(folder)
    return folder


def train_on(manifest, text_encoder, out, sizes, system, batch, precision):
    """The log's steps of a run of train.py, or None if it ran out of memory."""
    if sizes.device == "cuda":
        torch.cuda.empty_cache()  # what this process keeps is not the run's
    words = ["--train", manifest, "--out", out, "--system", system, "--batch-size", batch,
             "--precision", precision, "--image-encoder", sizes.image_encoder, "--text-encoder",
             text_encoder, "--image-size", sizes.image_size, "--max-steps", sizes.steps,
             "--workers", sizes.workers]
    done = subprocess.run([sys.executable, train.__file__, *map(str, words)], encoding="utf-8",
                          capture_output=True)
    if done.returncode and "out of memory" in done.stderr.lower():
        return None
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return log_steps(out, sizes.skip)


def steps_on_gpu(folder, manifest, text_encoder, sizes, card):
    """The README's table, and where the time of a step goes."""
    table = ["| GPU | batch | precision | images/s | GB |", "|---|---|---|---|---|"]
    shares = ["| batch | precision | outside encoders and optimiser | waiting for data |",
              "|---|---|---|---|"]
    for precision in sizes.precisions:
        for batch in sizes.batches:
            steps = train_on(manifest, text_encoder, folder / f"{precision}-{batch}", sizes,
                             "clip-ng-dtcg", batch, precision)
            if steps is None:
                table.append(f"| {card} | {batch} | {precision} | out of memory | - |")
                continue
            speed = statistics.median(r["images_per_s"] for r in steps)
            memory = steps[-1]["memory_mb"] / 1024
            table.append(f"| {card} | {batch} | {precision} | {speed:.0f} | {memory:.1f} |")
            bare = bare_step_seconds(manifest, sizes.steps, sizes.skip,
                                     (sizes.image_encoder, str(text_encoder)), sizes.image_size,
                                     batch, sizes.device, precision)
            outside = 100 * (1 - bare * speed / batch)
            waited = 100 * statistics.median(r["data_wait"] for r in steps)
            shares.append(f"| {batch} | {precision} | {outside:.1f} % | {waited:.1f} % |")
    print("\nThe whole method, Swin-T and BERT-base:", "", *table, "", *shares, sep="\n")


def systems_on_gpu(folder, manifest, text_encoder, sizes):
    """Time of a step and memory of every system, relative to CLIP."""
    precision, batch, rows = sizes.precisions[-1], sizes.systems_batch, {}
    for system in sizes.systems:
        steps = train_on(manifest, text_encoder, folder / system, sizes, system, batch, precision)
        if steps:
            rows[system] = (statistics.median(1 / r["images_per_s"] for r in steps),
                            steps[-1]["memory_mb"])
    print(f"\nRelative to CLIP, batch {batch}, {precision}:", "",
          "| system | time of a step | peak memory |", "|---|---|---|", sep="\n")
    for system, (seconds, memory) in rows.items():
        first = rows["clip"]
        print(f"| {system} | {seconds / first[0]:.2f} | {memory / first[1]:.2f} |")


def loss_on_gpu(function, sizes):
    """Milliseconds and GB beyond its inputs of function(), as a cell of a table."""
    cuda = sizes.device == "cuda"
    times = []
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with torch.device(sizes.device):  # what the functions make is made there
            for _ in range(sizes.repeats + 1):
                synchronize(sizes.device)
                began = time.perf_counter()
                function()
                synchronize(sizes.device)
                times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return "out of memory"
    memory = f", {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GB" if cuda else ""
    return f"{1e3 * statistics.median(times[1:]):.1f} ms{memory}"


def losses_on_gpu(sizes):
    print(f"\nThe loss alone, forward and backward, D = {sizes.width}, with hard negatives and "
          "graphs:\n\n| B | InfoNCE | 18 literal KL terms | this loss | row_chunk=256 |\n"
          "|---|---|---|---|---|")
    for B in sizes.losses:
        rows, scale = loss_batch(B, sizes.width)
        rows = {name: x.detach().to(sizes.device) for name, x in rows.items()}
        for name, x in rows.items():
            x.requires_grad_("labels" not in name)
        scale = scale.detach().to(sizes.device).requires_grad_()
        chunked = functools.partial(ours, row_chunk=256)
        cells = [loss_on_gpu(functools.partial(function, rows, scale), sizes)
                 for function in (info_nce, literal, ours, chunked)]
        print(f"| {B} | {' | '.join(cells)} |", flush=True)


def bench_gpu(sizes=None):
    """sizes: a GPU; none: the paper's encoders."""
    sizes = sizes or GPU()
    if sizes.device == "cuda" and not torch.cuda.is_available():
        return print("gpu: there is no GPU here, so nothing was measured")
    card = torch.cuda.get_device_name() if sizes.device == "cuda" else sizes.device
    print(f"gpu: {card}, torch {torch.__version__}, {sizes.workers} reading processes")
    losses_on_gpu(sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = long_phantom(folder, sizes.studies, max(32, sizes.image_size * 8 // 7))
        text_encoder = random_bert(folder / "bert", sizes.bert, manifest)
        steps_on_gpu(folder, manifest, text_encoder, sizes, card)
        systems_on_gpu(folder, manifest, text_encoder, sizes)


PARTS = {"loss": bench_loss, "gcn": bench_gcn, "images": bench_images, "manifest": bench_manifest,
         "phantom": bench_phantom, "train": bench_train, "evaluate": bench_evaluate,
         "gpu": bench_gpu}

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        sys.exit(f"error: unknown part {', '.join(sorted(unknown))}, expected {', '.join(PARTS)}")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
