"""The benchmark's parts that no other test reaches, with tiny sizes.

SPDX-License-Identifier: MIT
"""

import benchmark
import pytest
import torch

TINY = benchmark.GPU(
    device="cpu", image_encoder="tiny", image_size=32, batches=(8,), precisions=("bf16",),
    bert=(("hidden_size", 32), ("num_hidden_layers", 1), ("num_attention_heads", 2),
          ("intermediate_size", 32), ("vocab_size", 400)),
    systems=("clip",), systems_batch=8, steps=3, skip=1, studies=24, workers=0,
    losses=(8,), width=16, repeats=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this says that none is")
def test_without_a_gpu_the_gpu_part_says_so(capsys):
    benchmark.bench_gpu()
    assert "there is no GPU here" in capsys.readouterr().out


def test_the_gpu_part_prints_its_tables(capsys):
    benchmark.bench_gpu(TINY)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("| GPU | batch | precision | images/s | GB |")
    assert lines[at + 2].startswith("| cpu | 8 | bf16 | ")
    assert sum(line.startswith("| 8 | bf16 |") and line.count("%") == 2 for line in lines) == 1
    assert "| clip | 1.00 | 1.00 |" in lines
    loss, = (line for line in lines if line.startswith("| 8 |") and line.count("ms") == 4)
    assert "out of memory" not in loss


def test_a_run_that_is_out_of_memory_is_a_row_and_another_failure_an_error(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    monkeypatch.setattr(benchmark.train, "__file__", str(script))
    run = (tmp_path, "bert", tmp_path / "run", TINY, "clip", 8, "fp32")
    script.write_text("raise SystemExit('CUDA out of memory; lower --batch-size')")
    assert benchmark.train_on(*run) is None
    script.write_text("raise SystemExit('another mistake')")
    with pytest.raises(RuntimeError, match="another mistake"):
        benchmark.train_on(*run)
