"""What the tests share: the project on the path, one small phantom, no network.

SPDX-License-Identifier: MIT
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A phantom of 160 studies with labels, hard negatives and graphs: the path of its manifest."""
    from data import make_phantom, read_jsonl
    from negations import annotate
    raw = make_phantom(tmp_path_factory.mktemp("phantom"), studies=160, size=64, seed=1)
    path = raw.with_name("phantom_neg.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for _, record in read_jsonl(raw):
            file.write(json.dumps(annotate(record)) + "\n")
    return path


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A folder as Bio_ClinicalBERT's: config, cased vocabulary and weights, no tokenizer config."""
    from transformers import BertConfig, BertModel
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "no", "No", "abnormal", "Abnormal",
             "heart", "Heart", "effusion", "##s", "lung", "left", "right", "normal"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=48, max_position_embeddings=300)
    BertModel(config).save_pretrained(folder)
    return folder
