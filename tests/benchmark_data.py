"""The part "data" of the benchmark: reading speed as ratios, a manifest of 400,000 lines.

    python tests/benchmark_data.py [images|manifest|phantom]...    2 minutes and 4 GB of disk

SPDX-License-Identifier: MIT
"""

import gc
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import GlobalBatches, Manifest, Studies, cache, make_phantom, pixels, read_image  # noqa: E402

SIZE = 224


def start_worker(_):
    gc.freeze()  # as train.py: or a collection would copy the parent's objects into every worker


def tokenize(texts):
    return {"input_ids": torch.zeros(len(texts), 256, dtype=torch.int64)}


def seconds(function, items, repeats=3):
    """Best time an item over the repeats, so that a busy machine does not decide."""
    best = []
    for _ in range(repeats):
        start = time.perf_counter()
        for item in items:
            function(item)
        best.append((time.perf_counter() - start) / len(items))
    return min(best)


def images(folder):
    """2,500 x 3,000 pixel JPEGs made by enlarging the phantom."""
    count, raw = 24, Manifest(make_phantom(folder / "small", studies=24, size=512, seed=0))
    rows = []
    (folder / "big").mkdir()
    for i in range(count):
        record = raw[i]
        large = read_image(raw.image_path(record)).resize((2500, 3000), Image.Resampling.BICUBIC)
        large.save(folder / f"big/{i}.jpg")
        rows.append(record | {"root": str(folder / "big"), "image": f"{i}.jpg", "split": "train"})
    path = folder / "big.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = time.perf_counter()
    cache(path, folder / "cached")
    print(f"cache: {(time.perf_counter() - start) / count * 1e3:.1f} ms an image, once")
    big, small = Manifest(path), Manifest(folder / "cached/big.jsonl")
    paths = [[m.image_path(m[i]) for i in range(count)] for m in (big, small)]
    full = seconds(lambda p: pixels(read_image(p), SIZE), paths[0], 1)
    draft = seconds(lambda p: pixels(read_image(p, at_least=SIZE * 5 // 4), SIZE), paths[0])
    cached = seconds(lambda p: pixels(read_image(p, at_least=SIZE * 5 // 4), SIZE), paths[1])
    print(
        f"full decode {full * 1e3:.1f} ms, scaled {draft * 1e3:.1f}, cached {cached * 1e3:.2f}: "
        f"full/scaled {full / draft:.1f} (>= 3), scaled/cached {draft / cached:.1f} (>= 5), "
        f"full/cached {full / cached:.1f} (>= 15)"
    )
    grey = [
        np.abs(
            pixels(read_image(a), SIZE).astype(int) - pixels(read_image(a, at_least=280), SIZE)
        ).mean()
        for a in paths[0]
    ]
    print(f"scaled against full decode: {np.mean(grey):.2f} grey levels on average (<= 2)")
    studies = Studies(small, image_size=SIZE, tokenize=tokenize, negatives=False, graphs=False)

    def bare(path):
        with Image.open(path) as image:
            return pil_to_tensor(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    ratios = []
    for _ in range(5):
        one = seconds(bare, paths[1] * 4)
        whole = seconds(lambda i: studies[(0, i)], list(range(count)) * 4)
        ratios.append(whole / one)
    print(
        f"a cached sample {whole * 1e3:.2f} ms, bare decode + resize + to-tensor {one * 1e3:.2f}: "
        f"{np.median(ratios):.2f} times (<= 1.3)"
    )


def memory():
    """Resident MB of this process and its children, shared pages counted once."""
    total = 0
    pids = [
        str(os.getpid()),
        *Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split(),
    ]
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) if line.startswith("Pss:") else 0
    return total / 1024


def manifest(folder, lines=400_000):
    """400,000 studies with graphs and two hard negatives each, some 3 GB."""
    from negations import annotate

    raw = Manifest(make_phantom(folder / "p", studies=400, size=64, seed=0, normal_fraction=0.1))
    rows = [annotate(raw[i]) for i in range(len(raw))]
    rows = [json.dumps(row | {"filler": "x" * max(0, 7500 - len(json.dumps(row)))}) for row in rows]
    path = folder / "large.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for k in range(lines):
            file.write(rows[k % len(rows)].replace('"phantom/', f'"phantom/{k}-', 1) + "\n")
    before = memory()
    start = time.perf_counter()
    Manifest(path)
    indexed, start = time.perf_counter() - start, time.perf_counter()
    large = Manifest(path, "train")
    opened = time.perf_counter() - start
    print(
        f"{path.stat().st_size / 1e9:.1f} GB, {lines:,} lines: indexed in {indexed:.0f} s, "
        f"opened in {opened:.2f} s (<= 5)"
    )
    studies = Studies(large, image_size=64, tokenize=tokenize, negatives=True, graphs=True)
    loader = DataLoader(
        studies,
        batch_sampler=GlobalBatches(len(studies), 128, 0, 0),
        num_workers=4,
        collate_fn=studies.collate,
        worker_init_fn=start_worker,
    )
    for k, _ in enumerate(loader):
        if k == 200:
            print(f"with 4 workers: {memory() - before:.0f} MB above the imports (<= 200)")
            break


def phantom(folder):
    start = time.perf_counter()
    make_phantom(folder / "phantom", studies=3000, size=64, seed=7)
    print(f"3,000 phantoms of 64 pixels: {time.perf_counter() - start:.1f} s (<= 10)")


def main(parts):
    torch.set_num_threads(1)
    for part in parts or ("phantom", "images", "manifest"):
        with tempfile.TemporaryDirectory() as folder:
            {"images": images, "manifest": manifest, "phantom": phantom}[part](Path(folder))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
