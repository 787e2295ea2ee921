"""model.py: the encoders, the one forward that DDP wraps, saving and loading.

SPDX-License-Identifier: MIT
"""

import pickle
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data import read_image
from gcn import collate_graphs
from model import (
    ClinicalCLIP,
    HuggingFaceCLIP,
    ModelError,
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


def copied(folder, to, *names):
    to.mkdir()
    for name in names:
        (to / name).write_bytes((folder / name).read_bytes())
    return to


@pytest.mark.parametrize("channels", [1, 3])
def test_all_three_encoders_give_unit_rows(channels):
    model = tiny()
    pixels = torch.randint(0, 256, (3, channels, 32, 32), dtype=torch.uint8)
    for rows in (model.encode_image(pixels), model.encode_text(TEXTS),
                 model.encode_graph([V1, {}, XL])):
        assert rows.shape == (3, 16) and rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    same = (pixels.float() / 255 - 0.5) / 0.5
    assert torch.allclose(model.encode_image(pixels), model.encode_image(same), atol=1e-6)


def test_transform_gives_one_grey_channel_of_the_models_size():
    pixels = tiny().transform(Image.new("L", (100, 60), 77))
    assert pixels.shape == (1, 32, 32) and pixels.dtype == torch.uint8 and (pixels == 77).all()


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


def random_phrases(count, seed=0):
    """Distinct phrases of one to four words, most of which are not in the test's vocabulary."""
    rng, phrases = random.Random(seed), set()
    words = "heart lung no left abnormal effusion effusions normal small large base mild".split()
    while len(phrases) < count:
        phrases.add(" ".join(rng.choice(words) for _ in range(rng.randint(1, 4))))
    return sorted(phrases)


def afresh(model, phrases):
    """The vectors of `phrases`, none of which was met before."""
    model.phrase_vectors.clear()
    return model.embed_phrases(phrases)


@pytest.mark.parametrize("encoder", ["tiny", "bert"])
def test_a_phrase_has_the_same_bits_in_any_company_and_place(encoder, bert_folder):
    model = tiny(text_encoder="tiny" if encoder == "tiny" else str(bert_folder))
    phrases = random_phrases(400)
    phrases += ["heart " * 100, "heart lung " * 100, "!"]  # longer than the shape, without a word
    together = afresh(model, phrases)
    order = list(range(len(phrases)))
    random.Random(1).shuffle(order)
    assert torch.equal(afresh(model, [phrases[i] for i in order]), together[order])
    for i in [0, 17, 200, 399, 400, 402]:
        assert torch.equal(afresh(model, [phrases[i]])[0], together[i])
    assert not torch.allclose(together[0], together[1], atol=1e-3)  # the negative control
    for phrase in ("heart", "no left lung", "effusions"):  # the mean of its words' hidden states
        tokens = model.tokenize([phrase])
        with torch.no_grad():
            hidden = model.phrase_encoder.eval()(tokens["input_ids"], tokens["attention_mask"])[0]
        words = hidden[1:] if encoder == "tiny" else hidden[1:-1]
        assert torch.allclose(model.embed_phrases([phrase])[0], words.mean(0), atol=1e-6)


def test_a_phrase_is_encoded_once_and_its_vector_is_never_saved():
    model = tiny()
    before = set(model.state_dict())
    with torch.inference_mode():
        model.encode_graph([V1])
    first = model.encode_graph([XL, V1])  # phrases of an evaluation serve training
    first.sum().backward()
    assert model.gcn.layer1.weight.grad.abs().sum() > 0
    vectors = dict(model.phrase_vectors)
    assert torch.equal(model.encode_graph([XL, V1]), first) and len(vectors) == 1 + 7
    assert all(model.phrase_vectors[phrase] is vector for phrase, vector in vectors.items())
    # What was encoded before changes nothing, and vectors follow the module to its device.
    assert torch.equal(model.encode_graph([V1, {}]), tiny().encode_graph([V1, {}]))
    assert model.to("meta").embed_phrases(["effusion", None]).device.type == "meta"
    assert set(model.state_dict()) == before
    assert not any("phrase_vectors" in name for name, _ in model.named_buffers())


def test_the_frozen_phrase_encoder_keeps_its_weights_and_has_no_dropout(bert_folder):
    model = tiny(text_encoder=str(bert_folder)).train()
    assert not any(p.requires_grad for p in model.phrase_encoder.parameters())
    assert torch.equal(afresh(model, ["heart"]), afresh(model, ["heart"]))
    text = [model.encode_text(["heart"]) for _ in range(2)]
    assert not torch.equal(*text)  # the negative control: in training the text encoder has some
    with torch.no_grad():
        for p in model.text_encoder.parameters():
            p.add_(1)
    assert not torch.equal(next(model.phrase_encoder.parameters()),
                           next(model.text_encoder.parameters()))


class Waits(TorchDispatchMode):
    """Notes each operation that would make the host wait for a GPU's result."""

    names = ("_local_scalar_dense", "nonzero", "_unique", "unique_dim", "item", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__.startswith(self.names):
            self.seen.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("image", ["tiny", "swin-t"])
@pytest.mark.parametrize("text", ["tiny", "bert"])
def test_a_warm_step_never_waits_for_the_device(text, image, bert_folder):
    model = tiny(image_encoder=image, text_encoder="tiny" if text == "tiny" else str(bert_folder))
    batch = {"pixels": torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)}
    for side, records in (("", [V1, {}, XL]), ("hard_", [XL, V1, V1])):
        batch[f"{side}text"] = model.tokenize(["No heart. " * 50, *TEXTS[1:]])
        batch[f"{side}graph"] = collate_graphs(records)
    model(batch)  # now all phrases are in the table
    with Waits() as waits:
        sum(value.sum() for value in model(batch).values()).backward()
    assert waits.seen == []
    with Waits() as waits:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
        torch.ones(2).unique()
    assert len(waits.seen) == 3  # the negative control


def test_every_trained_weight_gets_a_gradient_so_that_ddp_needs_no_search(bert_folder):
    for records, framework in (([V1, XL, V1], "softmax"), ([V1, {}, {}], "sigmoid")):
        model = tiny(text_encoder=str(bert_folder), framework=framework)
        batch = {"pixels": torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8),
                 "text": model.tokenize(TEXTS), "graph": collate_graphs(records)}
        out = model(batch)
        sum(v.sum() * k for k, v in enumerate(out.values(), 1)).backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("framework,temperature", [("softmax", 0.07), ("sigmoid", 0.1)])
def test_each_framework_has_its_clamped_temperature_and_sigmoid_alone_a_bias(framework,
                                                                             temperature):
    model = tiny(framework=framework)
    batch = {"pixels": torch.zeros(3, 1, 32, 32), "text": model.tokenize(TEXTS)}
    assert model(batch)["logit_scale"].item() == pytest.approx(1 / temperature)
    names = {name for name, _ in model.named_parameters()}
    assert ("logit_bias" in names) == ("logit_bias" in model(batch)) == (framework == "sigmoid")
    assert names - {"logit_bias"} == {name for name, _ in tiny().named_parameters()}
    for value, kept in ((9.0, 100.0), (-1.0, 1.0), (1.0, 2.718282)):
        model.logit_scale.data.fill_(value)
        model.clamp_temperature()
        assert model.logit_scale.exp().item() == pytest.approx(kept, rel=1e-5)
    if framework == "sigmoid":
        assert model(batch)["logit_bias"].item() == -10  # it is not clamped


def test_a_checkpoint_that_names_no_framework_is_softmax(tmp_path):
    model = tiny(graph=False)
    assert not [name for name in model.state_dict() if "gcn" in name or "phrase" in name]
    del model.config["framework"]
    again = load_model(save_run(model, tmp_path / "run"))
    assert again.config["framework"] == "softmax" and not hasattr(again, "logit_bias")


def test_a_folder_without_tokenizer_config_is_read_cased_else_its_config_rules(bert_folder,
                                                                               tmp_path):
    from transformers import AutoTokenizer
    model = tiny(text_encoder=str(bert_folder))
    ids = model.tokenize(["Abnormal abnormal No effusions ."])["input_ids"]
    assert ids.tolist() == [[2, 9, 8, 7, 12, 13, 5, 3]]
    own = copied(bert_folder, tmp_path / "own", "config.json", "vocab.txt", "model.safetensors")
    AutoTokenizer.from_pretrained(bert_folder, do_lower_case=True).save_pretrained(own)
    model = tiny(text_encoder=str(own))
    assert model.tokenize(["Abnormal abnormal"])["input_ids"].tolist() == [[2, 8, 8, 3]]


@pytest.mark.parametrize("text", ["tiny", "bert"])
@pytest.mark.parametrize("how", ["run folder", "checkpoint", "export"])
def test_a_saved_model_gives_the_same_rows_without_its_sources(text, how, bert_folder, tmp_path):
    model = tiny(text_encoder=str(bert_folder) if text == "bert" else "tiny", framework="sigmoid")
    model.eval().logit_bias.data.fill_(-2.5)
    path = tmp_path / "run"
    if how == "export":
        export_model(model, path)
    else:
        save_run(model, path)
    again = load_model(path / "last.pt" if how == "checkpoint" else path)
    assert not again.training and again.config == model.config and again.logit_bias.item() == -2.5
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert torch.equal(again.encode_graph([V1, {}]), model.encode_graph([V1, {}]))


def test_a_checkpoint_with_a_renamed_weight_is_refused_in_one_line_with_both_names(tmp_path):
    state = tiny().state_dict()
    state["graph_projection.weight"] = state.pop("gcn.layer1.weight")
    torch.save({"model": state, "model_config": tiny().config}, tmp_path / "last.pt")
    with pytest.raises(ModelError, match="last.pt: expected weights that .*layer1.*graph_proj"
                       ) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_swin_weights_are_loaded_from_files_of_both_formats_and_must_fit(tmp_path):
    from torchvision.models import swin_t
    torch.manual_seed(5)
    source, path = swin_t(), tmp_path / "swin.pth"
    for zipped in (True, False):  # torch's format of today, and an older one
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
        network = tiny(image_encoder=str(path), graph=False).image_encoder
        assert torch.equal(network.norm.weight, source.norm.weight)
        assert torch.equal(network.features[0][0].weight, source.features[0][0].weight)
    for part in (path.read_bytes()[:100_000], b"", b"not weights"):
        path.write_bytes(part)
        with pytest.raises(ModelError, match="swin.pth: expected tiny, swin-t or an intact file"):
            tiny(image_encoder=str(path))
    for strange, message in (([torch.zeros(1)], ""), ({1: torch.zeros(1)}, ""),
                             ({"norm.weight": "text"}, ""),
                             (source.state_dict() | {"other": torch.zeros(1)},
                              'expected tiny.*Unexpected key.*"other"')):
        torch.save(strange, path)
        with pytest.raises(ModelError, match=f"swin.pth: {message}"):
            tiny(image_encoder=str(path))


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
    path, malicious = tmp_path / "last.pt", {"model": Malicious(), "model_config": {}}
    contents = [pickle.dumps(malicious), b"PK\x03\x04 half a file"]
    for strange in (malicious, [1], {"model": {}}):
        torch.save(strange, path)
        contents.append(path.read_bytes())
    expected = "last.pt: expected an intact checkpoint of train.py"
    for content in contents:
        path.write_bytes(content)
        for load, source in ((load_model, tmp_path), (load_checkpoint, path)):
            with pytest.raises(ModelError, match=expected) as caught:
                load(source)
            assert "\n" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out
    with pytest.raises(ModelError, match=expected):
        load_checkpoint(tmp_path / "none" / "last.pt")


def test_one_flipped_bit_in_a_checkpoints_tensors_is_refused(tmp_path):
    path = save_run(tiny(), tmp_path / "run") / "last.pt"
    intact = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    rng, silent = random.Random(0), 0
    for _ in range(20):
        entry = rng.choice(tensors)
        damaged = bytearray(intact)
        start = intact.index(entry.filename.encode(), entry.header_offset)
        start += len(entry.filename) + int.from_bytes(
            intact[entry.header_offset + 28:entry.header_offset + 30], "little")
        damaged[start + rng.randrange(entry.file_size)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        silent += torch.load(path, weights_only=True) is not None
        with pytest.raises(ModelError, match="last.pt: expected an intact checkpoint"):
            load_checkpoint(path)
    assert silent == 20  # torch.load alone takes each of them
    path.write_bytes(intact)
    load_checkpoint(path)


def rewrite(folder, to, change):
    """A copy of a saved network whose tensors went through `change`."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, to, dirs_exist_ok=True)
    state = {}
    for key, x in load_file(folder / "model.safetensors").items():
        state |= change(key, x)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_weights_that_are_missing_or_do_not_fit_are_refused(kind, bert_folder, tmp_path):
    folder, load = bert_folder, lambda path: tiny(text_encoder=path)
    if kind == "clip":
        folder, load = make_hugging_face_clip(tmp_path / "clip"), load_model
    to = tmp_path / "changed"
    layer = "layer_norm1.weight" if kind == "clip" else "0.output.LayerNorm.weight"
    for count, change in (
            ("[0-9]{2}", lambda key, x: {f"module.{key}": x}),  # a wrapper's prefix
            ("[12]", lambda key, x: {} if key.endswith(layer) else {key: x}),
            ("[12]", lambda key, x: {key: x[:3].clone() if key.endswith(layer) else x})):
        message = f"changed: {count} weights are missing or of another shape, the first "
        with pytest.raises(ModelError, match=message) as caught:
            load(rewrite(folder, to, change))
        assert str(caught.value).endswith(layer) or count != "[12]"
    heads = {f"{name}.weight": torch.zeros(2) for name in ("cls.one", "lm_head", "classifier")}
    load(rewrite(folder, to, lambda key, x: {key: x} | heads))


def test_a_deep_image_is_refused_and_read_image_makes_it_fit(tmp_path):
    deep = np.linspace(0, 40_000, 32 * 32).reshape(32, 32)
    clip = load_model(make_hugging_face_clip(tmp_path / "clip"))
    for image in (Image.fromarray(deep.astype(np.uint16)), Image.fromarray(deep.astype(np.int32)),
                  Image.fromarray(deep.astype(np.float32))):
        for model in (tiny(), clip):
            with pytest.raises(ModelError, match="expected an 8-bit image, .*data.py's read_image"):
                model.transform(image)
    Image.fromarray(deep.astype(np.uint16)).save(tmp_path / "deep.png")
    assert len(tiny().transform(read_image(tmp_path / "deep.png")).unique()) > 100


def test_unknown_damaged_or_incomplete_encoders_are_one_clear_line(bert_folder, tmp_path):
    mute = copied(bert_folder, tmp_path / "mute", "config.json", "model.safetensors")
    cut = copied(bert_folder, tmp_path / "cut", "config.json", "vocab.txt", "model.safetensors")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    expected = "expected tiny, a Hugging Face folder with config.json"
    for change, message in (
            ({"image_encoder": "resnet"}, "resnet: expected tiny, swin-t or an intact file of"),
            ({"text_encoder": "/nowhere/bert"}, f"/nowhere/bert: {expected}"),
            ({"text_encoder": "tests"}, f"tests: {expected}"),
            ({"text_encoder": str(mute)}, f"{mute}: .*json has [0-9]+ of 18 words"),
            ({"text_encoder": str(cut)}, f"{cut}: {expected}")):
        with pytest.raises(ModelError, match=message) as caught:
            tiny(**change)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="expected a run folder, .*, got model_type bert"):
        load_model(bert_folder)
    run = save_run(tiny(text_encoder=str(bert_folder)), tmp_path / "run")
    alone = copied(run, tmp_path / "alone", "last.pt")
    with pytest.raises(ModelError, match="alone/tokenizer: expected a tokenizer's files"):
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


def test_a_path_that_is_no_model_is_one_clear_line(tmp_path, capsys):
    for name in (str(tmp_path), str(tmp_path / "nothing"), "nobody/nothing", "run-001"):
        with pytest.raises(ModelError, match=f"^{name}: expected a run folder, its checkpoint, or"
                           ) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)
        asked = f"no folder {name}; asking the hub" in capsys.readouterr().err
        assert asked == (not name.startswith("/"))


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
