"""A MinMo put together from public files in miniature: it loads, talks, and says what of it is random."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import public_files as public
import pytest
import torch

import minmo
from minmo import cli
from minmo.model import concerns
from minmo.weights import manifest
from minmo.weights.assemble import assemble, find
from minmo.weights.importers.table import IMPORTERS
from minmo.weights.parts import save_parts
from minmo.weights.stored import CheckpointError

RANDOM = {"projector", "voice_decoder.output_projector", "duplex", "speech_tokenizer", "speaker"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Public files, an imported encoder and tokenizer, and a MinMo assembled of them."""
    folder = tmp_path_factory.mktemp("public")
    public.qwen(folder / "qwen", dtype=torch.bfloat16)
    (folder / "cosyvoice").mkdir()
    public.cosyvoice(folder / "cosyvoice")
    public.encoder(folder / "encoder")
    public.encoder(folder / "speech-tokenizer", name="speech_tokenizer")
    assemble(given(folder), folder / "minmo", torch.bfloat16, seed=3)
    return folder


def given(folder, **others):
    names = {"llm": "qwen", "cosyvoice": "cosyvoice", "encoder": "encoder", **others}
    return [part for name, source in names.items() for part in find(folder / source, name)]


def test_every_tensor_is_that_of_its_file(files):
    model = minmo.load(files / "minmo", dtype=torch.bfloat16)
    for part in given(files):
        for name, weight in part.tensors.items():
            own = model.state_dict()[f"{part.name}.{name}"]
            assert torch.equal(own, weight.read().to(torch.bfloat16)), (part.name, name)
    assert model.config.llm.rope_theta == 5e4 and model.config.flow.codes == 27
    assert model.tokenizer.encode("two") == minmo.load("nano", "meta").tokenizer.encode("two")


def test_it_says_what_is_random_and_what_is_a_start(files, monkeypatch, capsys):
    model = minmo.load(files / "minmo")
    assert {name for name, origin in model.origins.items() if origin.state == "random"} == RANDOM
    assert model.origins["encoder"].state == "start" and model.origins["llm"].state == "imported"
    assert model.origins["duplex"].seed == 3 and "random: projector" in model.provenance
    assert "no MinMo encoder" in model.provenance
    monkeypatch.setattr(sys, "argv", ["minmo", "info", str(files / "minmo"), "--verify"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    for words in (
        "random",
        "only a start",
        "no MinMo encoder",
        "seed 3",
        "whisper",
        "llm.pt",
        "are as they were written",
    ):
        assert words in shown, words


def test_it_talks(files, monkeypatch, capsys, tmp_path):
    minmo.save_audio(tmp_path / "in.wav", 0.1 * np.sin(np.arange(4000)).astype(np.float32), 16_000)
    sizes = ["--max-text-tokens", "2", "--max-speech-ratio", "3"]
    monkeypatch.setattr(
        sys, "argv", ["minmo", "talk", str(tmp_path / "in.wav"), "--preset", str(files / "minmo"), *sizes]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr()
    assert not stop.value.code, shown.err
    assert "random: projector, voice_decoder.output_projector, duplex" in shown.err.replace("\n", " ")
    assert "no MinMo encoder" in shown.err and "latency" in shown.out


def test_imported_folders_assemble_to_the_same(files, tmp_path):
    for name in ("qwen2", "cosyvoice2"):
        save_parts(IMPORTERS[name].open(files / name.rstrip("2")), tmp_path / name, torch.bfloat16)
    parts = [*find(tmp_path / "qwen2", "llm"), *find(tmp_path / "cosyvoice2", "cosyvoice")]
    assemble([*parts, *find(files / "encoder", "encoder")], tmp_path / "minmo", torch.bfloat16, seed=3)
    first, second = (minmo.load(folder / "minmo").state_dict() for folder in (files, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    sources = minmo.load(tmp_path / "minmo").origins["flow"].sources
    assert {"llm.pt", "flow.pt"} & {source["file"] for source in sources} == {"flow.pt"}


def test_the_seed_decides_what_is_drawn(files, tmp_path):
    parts = given(files, speech_tokenizer="speech-tokenizer")
    assemble(parts, tmp_path / "other", torch.bfloat16, seed=4)
    first, second = minmo.load(files / "minmo"), minmo.load(tmp_path / "other")
    drawn, own = "duplex.down.weight", "llm.norm.weight"
    assert not torch.equal(first.state_dict()[drawn], second.state_dict()[drawn])
    assert torch.equal(first.state_dict()[own], second.state_dict()[own])
    assert second.origins["speech_tokenizer"].state == "imported"


def test_saved_again_in_shards_it_is_the_same_bit_for_bit(files, tmp_path):
    model = minmo.load(files / "minmo", dtype=torch.bfloat16)
    minmo.save(model, tmp_path / "saved", shard=200_000)
    assert len(list((tmp_path / "saved").glob("model-0*.safetensors"))) > 3
    again = minmo.load(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert again.origins == model.origins and manifest.verify(tmp_path / "saved") > 5
    minmo.save(model, tmp_path / "saved")  # in its place: no shard is left beside the one file
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors*")] == ["model.safetensors"]
    assert manifest.verify(tmp_path / "saved") == 3
    model.mark_trained(("projector.", "voice_decoder."), "minmo train")
    minmo.save(model, tmp_path / "trained")
    left = " ".join(concerns(minmo.load(tmp_path / "trained").origins))
    assert "projector" not in left and "random: duplex" in left and "no MinMo encoder" in left


def test_the_public_writer_reads_our_shards(files):
    """Files that we write are plain safetensors: their own library reads them."""
    from safetensors.torch import load_file

    stored = load_file(files / "minmo" / "model.safetensors")
    assert all(torch.equal(stored[k], v) for k, v in minmo.load(files / "minmo", dtype="bfloat16").state_dict().items())


def edited(files, tmp_path, name, change):
    folder = tmp_path / name
    public.shutil.copytree(files / name, folder)
    change(folder)
    return folder


def test_parts_that_do_not_fit_are_one_sentence(files, tmp_path):
    parts = given(files)
    public.encoder(tmp_path / "mels", dataclasses.replace(public.ENCODER, n_mels=20), name="speech_tokenizer")
    with pytest.raises(CheckpointError, match="do not fit each other: .*n_mels.* must be equal, got 16 and 20"):
        assemble([*parts, *find(tmp_path / "mels", "speech_tokenizer")], tmp_path / "no")
    with pytest.raises(CheckpointError, match="holds nothing that gives encoder"):
        find(files / "qwen", "encoder")
    with pytest.raises(CheckpointError, match="has no llm, which --llm gives"):
        find(files / "encoder", "llm")
    with pytest.raises(CheckpointError, match="there is no .*nowhere: give --speech-tokenizer"):
        find(files / "nowhere", "speech_tokenizer")
    without = edited(files, tmp_path, "qwen", lambda f: (f / "tokenizer.json").unlink())
    with pytest.raises(CheckpointError, match="has no tokenizer.json, which a MinMo needs"):
        assemble([*find(without, "llm"), *parts[1:]], tmp_path / "no")
    with pytest.raises(CheckpointError, match="minmo is there already"):
        assemble(parts, files / "minmo")
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.tmp").exists()


def test_a_checkpoint_that_was_damaged_is_one_sentence(files, tmp_path):
    minmo.save(minmo.load(files / "minmo"), tmp_path / "whole", shard=300_000)
    shard = sorted((tmp_path / "whole").glob("model-0*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a readable safetensors file"):
        minmo.load(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=f"{shard.name} has {len(data) - 9} bytes, not {len(data)}"):
        manifest.verify(tmp_path / "whole")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        minmo.load(tmp_path / "whole")
    shard.write_bytes(data)
    (tmp_path / "whole" / "manifest.json").write_text(json.dumps({"parts": 3}))
    with pytest.raises(CheckpointError, match="manifest.json is no manifest"):
        minmo.load(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds parts of a MinMo, not all of one"):
        minmo.load(files / "encoder")
