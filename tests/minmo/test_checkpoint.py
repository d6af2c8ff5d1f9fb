"""Checkpoints: a bit-exact round trip, and one clear sentence for each way a file can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import minmo
from minmo.config import load_config
from minmo.weights import untrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    minmo.save(untrained("nano"), folder)
    return folder


def test_round_trip_is_bit_exact(folder):
    before, after = untrained("nano"), minmo.load(folder)
    assert not before.trained and after.trained and "model.safetensors" in after.provenance
    for (name, a), (same, b) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert name == same and torch.equal(a, b)
    assert after.tokenizer.encode("two plus three") == before.tokenizer.encode("two plus three")


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the checkpoint whose tensors were changed."""

    def make(change):
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("speaker"), "lacks the tensor 'speaker'"),
        (lambda t: t.update(extra=torch.zeros(1)), "has the tensor 'extra'"),
        (lambda t: t.update(speaker=torch.zeros(3)), r"'speaker' has the shape \(3,\)"),
    ],
)
def test_a_misfit_names_the_tensor(broken, change, message):
    with pytest.raises(minmo.CheckpointError, match=message):
        minmo.load(broken(change))


def test_a_file_that_is_no_checkpoint(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(minmo.CheckpointError, match="has no model.safetensors"):
        minmo.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(minmo.CheckpointError, match="not a readable safetensors file"):
        minmo.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a preset"):
        minmo.load("no-such-thing")


def test_wrong_dtype_and_too_much_memory():
    with pytest.raises(minmo.CheckpointError, match="dtype must be one of"):
        minmo.load("nano", dtype="int3")
    with pytest.raises(minmo.CheckpointError, match="GB"):
        minmo.load("minmo-8b", device="cpu")


def test_random_weights_are_the_same_each_time():
    a, b = untrained("nano"), untrained("nano")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not a.trained and "random weights" in a.provenance
    with pytest.raises(FileNotFoundError, match="no preset"):
        untrained("somewhere/else")


@pytest.mark.parametrize(
    "section,field,value",
    [
        ("encoder", "heads", 0),
        ("encoder", "blocks", 10**9),
        ("llm", "ffn", -1),
        ("llm", "norm_eps", -1.0),
        ("flow", "steps", 0),
        ("flow", "steps", 10**30),
        ("flow", "guidance", float("nan")),
        ("duplex", "window", 10**9),
        ("frontend", "hop", 80),
        ("voice_decoder", "semantic_block", 0),
        ("vocoder", "upsample_rates", []),
        ("vocoder", "sample_rate", 16_000),
        ("speech_tokenizer", "levels", [3, 3]),
    ],
)
def test_a_hostile_config_is_refused_by_name(tmp_path, section, field, value):
    config = json.loads(minmo.load("nano", device="meta").config.to_json())
    config[section][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json.*({field}|{section})"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe{\x00", b"1" * 5000, b'{"name": "a\\nb"}'])
def test_a_broken_config_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json") as error:
        load_config(tmp_path)
    assert len(str(error.value)) < 400


def test_weights_that_are_no_numbers_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for bad in (torch.full_like(tensors["speaker"], float("nan")), tensors["speaker"].to(torch.int8)):
        save_file({**tensors, "speaker": bad}, path)
        with pytest.raises(minmo.CheckpointError, match="'speaker' (holds NaN|is torch.int8)"):
            minmo.load(folder)
    save_file(tensors, path)


@pytest.mark.parametrize("device", ["meta:x", "xpu", "mps", 1.5, "hpu"])
def test_devices_that_are_not_served(device):
    with pytest.raises(minmo.CheckpointError, match="device must be"):
        minmo.load("nano", device=device)
