"""Checkpoints: a bit-exact round trip, and one clear sentence for each way a file can be wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import minmo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    minmo.save(minmo.load("nano"), folder)
    return folder


def test_round_trip_is_bit_exact(folder):
    before, after = minmo.load("nano"), minmo.load(folder)
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
    a, b = minmo.load("nano"), minmo.load("nano")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert "random weights" in a.provenance
