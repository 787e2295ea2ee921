"""model.py: the encoders, the one forward that DDP wraps, saving and loading.

SPDX-License-Identifier: MIT
"""

import pickle

import pytest
import torch
from PIL import Image

from gcn import collate_graphs
from model import (
    ClinicalCLIP,
    HuggingFaceCLIP,
    TinyTokenizer,
    export_model,
    load_checkpoint,
    load_model,
)
from tests.test_gcn import V1, XL

TEXTS = ["No effusions. Heart normal.", "Abnormal left lung.", "No abnormal heart."]


def tiny(**change):
    torch.manual_seed(0)
    return ClinicalCLIP(**{"image_encoder": "tiny", "text_encoder": "tiny", "width": 16,
                           "image_size": 32} | change)


def save_run(model, folder):
    folder.mkdir()
    torch.save({"model": model.state_dict(), "model_config": model.config}, folder / "last.pt")
    model.save_tokenizer(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_all_three_encoders_give_unit_rows(channels):
    model = tiny()
    pixels = torch.randint(0, 256, (3, channels, 32, 32), dtype=torch.uint8)
    for rows in (model.encode_image(pixels), model.encode_text(TEXTS),
                 model.encode_graph([V1, {}, XL])):
        assert rows.shape == (3, 16) and rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)


def test_uint8_pixels_are_normalised_to_plus_minus_one():
    model = tiny()
    pixels = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    same = (pixels.float() / 255 - 0.5) / 0.5
    assert torch.allclose(model.encode_image(pixels), model.encode_image(same), atol=1e-6)


def test_transform_gives_one_grey_channel_of_the_models_size():
    pixels = tiny().transform(Image.new("L", (100, 60), 77))
    assert pixels.shape == (1, 32, 32) and pixels.dtype == torch.uint8 and (pixels == 77).all()


def test_padding_does_not_change_a_reports_embedding():
    model = tiny().eval()
    alone, beside = model.encode_text(TEXTS[1:2]), model.encode_text(TEXTS)[1:2]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_reports_longer_than_256_tokens_are_cut():
    assert TinyTokenizer()(["word " * 400])["input_ids"].shape == (1, 256)


def test_graph_polarity_is_seen_although_the_phrase_is_the_same():
    model = tiny()
    entity = {"tokens": "effusion", "label": "OBS-DP", "relations": []}
    present, absent = ({"entities": {"1": entity | {"label": label}}}
                       for label in ("OBS-DP", "OBS-DA"))
    rows = model.encode_graph([present, absent, {}, {}])
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    assert torch.equal(rows[2], rows[3])  # the learned empty node


def test_a_phrase_has_the_same_vector_in_any_company():
    first, second = tiny(), tiny()
    first.encode_graph([XL, V1])
    alone = second.encode_graph([V1])
    assert torch.equal(first._phrases["effusion"], second._phrases["effusion"])
    assert torch.allclose(first.encode_graph([V1]), alone, atol=1e-6)


def test_the_frozen_phrase_encoder_keeps_its_weights_and_its_eval_mode(bert_folder):
    model = tiny(text_encoder=str(bert_folder)).train()
    assert model.text_encoder.training and not model.phrase_encoder.training
    assert not any(p.requires_grad for p in model.phrase_encoder.parameters())
    with torch.no_grad():
        for p in model.text_encoder.parameters():
            p.add_(1)
    assert not torch.equal(next(model.phrase_encoder.parameters()),
                           next(model.text_encoder.parameters()))


def test_every_trained_weight_gets_a_gradient_so_that_ddp_needs_no_search(bert_folder):
    for records in ([V1, XL, V1], [V1, {}, {}]):
        model = tiny(text_encoder=str(bert_folder))
        batch = {"pixels": torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8),
                 "text": model.tokenize(TEXTS), "graph": collate_graphs(records)}
        out = model(batch)
        sum(v.sum() * k for k, v in enumerate(out.values(), 1)).backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_system_without_graphs_has_no_graph_weights():
    model = tiny(graph=False)
    assert not [name for name, _ in model.named_parameters() if "gcn" in name or "phrase" in name]
    with pytest.raises(ValueError, match="without the graph stream"):
        model.encode_graph([V1])


def test_the_temperature_stays_between_clips_bounds():
    model = tiny()
    for value, kept in ((9.0, 100.0), (-1.0, 1.0), (1.0, 2.718282)):
        model.logit_scale.data.fill_(value)
        model.clamp_temperature()
        assert model.logit_scale.exp().item() == pytest.approx(kept, rel=1e-5)


def test_a_folder_without_tokenizer_config_is_read_cased_with_golden_ids(bert_folder):
    model = tiny(text_encoder=str(bert_folder))
    ids = model.tokenize(["Abnormal abnormal No effusions ."])["input_ids"]
    assert ids.tolist() == [[2, 9, 8, 7, 12, 13, 5, 3]]


def test_a_folders_own_tokenizer_config_rules(bert_folder, tmp_path):
    from transformers import AutoTokenizer
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
    AutoTokenizer.from_pretrained(bert_folder, do_lower_case=True).save_pretrained(tmp_path)
    model = tiny(text_encoder=str(tmp_path))
    assert model.tokenize(["Abnormal abnormal"])["input_ids"].tolist() == [[2, 8, 8, 3]]


@pytest.mark.parametrize("text", ["tiny", "bert"])
@pytest.mark.parametrize("how", ["run folder", "checkpoint", "export"])
def test_a_saved_model_gives_the_same_rows_without_its_sources(text, how, bert_folder, tmp_path):
    model = tiny(text_encoder=str(bert_folder) if text == "bert" else "tiny").eval()
    path = tmp_path / "run"
    if how == "export":
        export_model(model, path)
    else:
        save_run(model, path)
    again = load_model(path / "last.pt" if how == "checkpoint" else path)
    assert not again.training
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert torch.equal(again.encode_graph([V1, {}]), model.encode_graph([V1, {}]))


def test_swin_weights_are_loaded_from_a_file_and_must_fit(tmp_path):
    from torchvision.models import swin_t
    torch.manual_seed(5)
    source = swin_t()
    torch.save(source.state_dict(), tmp_path / "swin.pth")
    model = tiny(image_encoder=str(tmp_path / "swin.pth"), graph=False)
    assert torch.equal(model.image_encoder.norm.weight, source.norm.weight)
    assert torch.equal(model.image_encoder.features[0][0].weight, source.features[0][0].weight)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: weights do not fit: missing"):
        tiny(image_encoder=str(tmp_path / "other.pth"))


def test_best_is_taken_before_last(tmp_path):
    folder = save_run(tiny(), tmp_path / "run")
    torch.manual_seed(9)
    best = ClinicalCLIP("tiny", "tiny", 16, 32)
    torch.save({"model": best.state_dict(), "model_config": best.config}, folder / "best.pt")
    assert torch.equal(load_model(folder).image_projection.weight, best.image_projection.weight)


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_malicious_or_damaged_checkpoint_is_refused(tmp_path, capsys):
    with open(tmp_path / "last.pt", "wb") as file:
        pickle.dump({"model": Malicious(), "model_config": {}}, file)
    with pytest.raises(ValueError, match="last.pt: not an intact file of plain tensors"):
        load_model(tmp_path)
    torch.save({"model": Malicious(), "model_config": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt: not an intact file of plain tensors"):
        load_model(tmp_path)
    assert "never run" not in capsys.readouterr().out
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match="last.pt: not an intact file of plain tensors$"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("change,message", [
    ({"image_encoder": "resnet"}, "--image-encoder resnet: expected tiny, swin-t or a file"),
    ({"text_encoder": "/nowhere/bert"}, "--text-encoder /nowhere/bert: expected tiny, a folder"),
])
def test_unknown_encoders_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny(**change)
    assert "\n" not in str(caught.value)


def test_a_text_encoder_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a Hugging Face folder with config.json"):
        tiny(text_encoder=str(tmp_path))


def copied(folder, to, *names):
    to.mkdir()
    for name in names:
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_damaged_or_incomplete_folders_are_named_in_one_line(bert_folder, tmp_path):
    mute = copied(bert_folder, tmp_path / "mute", "config.json", "model.safetensors")
    with pytest.raises(ValueError, match=f"{mute}: expected a vocabulary .* of 18 words, got"):
        tiny(text_encoder=str(mute))
    cut = copied(bert_folder, tmp_path / "cut", "config.json", "vocab.txt", "model.safetensors")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{cut}: expected tiny, a folder or a hub id"):
        tiny(text_encoder=str(cut))
    with pytest.raises(ValueError, match="config.json: expected model_type clip, got bert"):
        load_model(bert_folder)
    run = save_run(tiny(text_encoder=str(bert_folder)), tmp_path / "run")
    alone = copied(run, tmp_path / "alone", "last.pt")
    with pytest.raises(ValueError, match="alone/tokenizer: expected the run's tokenizer"):
        load_model(alone / "last.pt")


def test_a_hugging_face_clip_answers_the_same_calls(tmp_path):
    folder = make_hugging_face_clip(tmp_path)
    model = load_model(folder)
    assert isinstance(model, HuggingFaceCLIP)
    pixels = model.transform(Image.new("L", (50, 70), 9))[None]
    assert torch.allclose(model.encode_image(pixels).norm(), torch.tensor(1.0), atol=1e-5)
    assert model.encode_text(["a b", "c"]).shape == (2, 16)


def make_hugging_face_clip(folder):
    """A CLIPModel with random weights and its own processor, saved as its authors would."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    names = ["<|startoftext|>", "<|endoftext|>", "a", "b", "c", "a</w>", "b</w>", "c</w>"]
    words = {word: i for i, word in enumerate(names)}
    tokenizer = CLIPTokenizer(vocab=words, merges=[])
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32}
    config = CLIPConfig(
        text_config=size | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1,
                            "pad_token_id": 1},
        vision_config=size | {"image_size": 32, "patch_size": 16}, projection_dim=16)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_a_path_that_is_no_model_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder with best.pt or last.pt"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="expected a run folder with best.pt or last.pt"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="nor a Hugging Face CLIP that could") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ["tiny", "bert"])
def test_reports_grouped_by_length_equal_each_report_alone(encoder, bert_folder):
    torch.manual_seed(0)
    clip = ClinicalCLIP("tiny", "tiny" if encoder == "tiny" else str(bert_folder), 16, 32,
                        graph=False).eval()
    words = "heart lung no left abnormal".split()
    texts = [" ".join(words[(i + k * k) % 5] for k in range(1 + i * 37 % 90)) for i in range(150)]
    with torch.inference_mode():
        whole = clip.encode_text(texts)
        alone = torch.cat([clip.encode_text([text]) for text in texts])
    assert torch.allclose(whole, alone, atol=1e-5)
    assert not torch.allclose(whole, alone.flip(0), atol=1e-3)  # the negative control
