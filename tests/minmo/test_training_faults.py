"""What goes wrong around a stage, its folders and its lines: one sentence each, and nothing that was there is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("lhotse")

from minmo import load, weights
from minmo.data.manifest import read_manifest
from minmo.data.nano.smoke import build
from minmo.data.schema import DataError
from minmo.training import pipeline
from minmo.training.batches import Builder
from minmo.training.loader import Batches, Sampler
from minmo.training.parallel import processes
from minmo.training.recipe import load_recipe, recipes
from minmo.training.run import _heads, _symbols, run
from minmo.training.settings import TrainingError
from minmo.training.stages import STAGES
from minmo.training.tokenize import tokenize


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build(folder)
    return folder


@pytest.fixture
def builder() -> Builder:
    model = load("nano", device="meta")
    assert model.tokenizer is not None
    return Builder(model.config, model.tokenizer, flow_options=load_recipe("nano/flow").flow)


def test_all_stages_are_one_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, dict[str, int]] = {}
    tokenized: list[tuple[str, str]] = []
    untrained = weights.untrained().state_dict()

    def touched(folder: Path) -> dict[str, int]:
        """By how much the first number of each part's first tensor grew."""
        grown = {
            k.split(".")[0]: round(float(v.view(-1)[0] - untrained[k].view(-1)[0]))
            for k, v in reversed(weights.load(folder, device="cpu").state_dict().items())
        }
        return {part: times for part, times in grown.items() if times}

    def stage(recipe: Any, start: Path, data: Path, out: Path) -> None:
        """Adds one to the first number of everything that the stage trains."""
        begun[recipe.stage] = touched(start)
        if recipe.stage == "speech-tokenizer" and not (out / "model.tmp").is_dir():
            (out / "model.tmp").mkdir()
            raise KeyboardInterrupt  # in the middle of writing the model
        model = weights.load(start, device="cpu")
        for name, tensor in model.state_dict().items():
            if name.startswith(recipe.as_run().trains):
                tensor.view(-1)[0] += 1
        weights.save(model, out / "model")

    def tokens(manifest: Path, out: Path, model: str, *, jobs: int) -> None:
        tokenized.append((out.name, Path(model).parent.name.partition("-")[2]))
        out.parent.mkdir(exist_ok=True)
        out.touch()

    monkeypatch.setattr(pipeline, "run", stage)
    monkeypatch.setattr(pipeline, "tokenize", tokens)
    names = [name.split("/")[1] for name in recipes() if name.startswith("nano/")]
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_all("nano", corpus, tmp_path, smoke=True)
    assert list(begun) == names[:3]
    stored = weights.load(tmp_path / "00-random" / "model", device="cpu").state_dict()
    assert all(map(torch.equal, untrained.values(), stored.values()))

    for other in ({"data": corpus.parent}, {"smoke": False}):
        given = {"data": corpus, "smoke": True} | other
        with pytest.raises(
            ValueError, match=r"holds a run by other recipes or on other data \(first of them: text-lm\)"
        ):
            pipeline.run_all("nano", out=tmp_path, **given)
    begun.clear()
    last = pipeline.run_all("nano", corpus, tmp_path, smoke=True)
    assert list(begun) == names[2:] and last == tmp_path / "model" and not list(tmp_path.glob("*/start"))
    # Every stage starts from the parts on which it builds, whatever ran before it; tokens are made once.
    heard = {"encoder": 1, "speech_tokenizer": 1, "vocoder": 1}
    assert begun["vocoder"] == {} and begun["flow"] == heard
    assert begun["voice-lm"] == {**heard, "llm": 1, "flow": 1}
    assert begun["duplex"] == {"llm": 2, "encoder": 3, "projector": 3}
    assert touched(last) == {
        **heard, "encoder": 3, "llm": 2, "projector": 3, "flow": 1, "voice_decoder": 4, "duplex": 1
    }  # fmt: skip
    assert tokenized == [(f"{part}-{task}.jsonl.gz", stage) for task, stage in TOKENIZED for part in ("train", "valid")]

    (folder,) = tmp_path.glob("*-encoder")
    shutil.rmtree(folder)  # to do it again
    with pytest.raises(ValueError, match="speech-tokenizer was built on an earlier encoder .* remove the folders"):
        pipeline.run_all("nano", corpus, tmp_path, smoke=True)


TOKENIZED = ("tts", "flow"), ("s2s", "s2s")


def test_stages_stand_after_those_they_build_on() -> None:
    names = list(STAGES)
    assert all([names.index(before) < n for n, stage in enumerate(STAGES.values()) for before in stage.after])


def test_stages_side_by_side_are_those_one_after_the_other(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages of their own processes, of which one fails, and then all go on."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as many threads as here
    with processes() as here:
        plans = {s: pipeline.smoked(load_recipe(f"nano/{s}")) for s in ("text-lm", "encoder", "speech-tokenizer")}
        alone, beside = (pipeline._Pipeline(dict(plans), corpus, tmp_path / name, here) for name in ("a", "b"))
        for own in (alone, beside):
            own.begin("nano")
        alone.in_turn()
        broken = beside.folder("encoder") / "checkpoints"
        broken.parent.mkdir()
        broken.write_text("in the way")
        with pytest.raises(TrainingError, match=r"encoder failed: .*checkpoints.* \(see .*log\.txt\)"):
            beside.side_by_side(2)
        broken.unlink()
        beside.side_by_side(2)
    assert not list(beside.out.glob("*/start"))  # all were waited for
    for stage in plans:
        one, other = (weights.load(own.model(stage), device="cpu") for own in (alone, beside))
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_run_goes_on_by_its_own_recipe(corpus: Path, tmp_path: Path) -> None:
    recipe = pipeline.smoked(load_recipe("nano/text-lm"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    run(recipe, "nano", corpus, tmp_path / "run")
    other = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, accumulate=2))
    with pytest.raises(ValueError, match=r"holds a run by another recipe \(first difference: loop\)"):
        run(other, "nano", corpus, tmp_path / "run")


def test_a_stage_says_what_it_cannot_start_from(corpus: Path, tmp_path: Path) -> None:
    recipe = load_recipe("nano/text-lm")
    weights.save(weights.untrained(), tmp_path / "model")
    with pytest.raises(ValueError, match="is what this run would write: give another folder"):
        run(recipe, tmp_path / "model", corpus, tmp_path)
    with pytest.raises(ValueError, match="nano is a nano, and the recipe is for minmo-8b"):
        run(load_recipe("minmo-8b/sft"), "nano", corpus, tmp_path / "out")
    bare = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=None))
    with pytest.raises(ValueError, match="names no training manifest: set data.train"):
        run(bare, "nano", corpus, tmp_path / "out")
    (tmp_path / "heads.safetensors").write_bytes(b"no archive")
    (tmp_path / "symbols.json").write_text('{"words": 3}')
    for read in (lambda: _heads(tmp_path), lambda: _symbols(tmp_path, [])):
        with pytest.raises(ValueError, match="is damaged .* run the stage that wrote it again"):
            read()


def test_lines_that_a_batch_cannot_hold(corpus: Path, builder: Builder) -> None:
    spoken, typed = (next(iter(read_manifest(corpus / f"train-{task}.jsonl.gz"))) for task in ("asr", "text"))
    for lines in ([spoken, typed], [typed, spoken]):
        with pytest.raises(DataError, match=r"some are typed, some spoken; put typed lines into data\.rehearse"):
            builder.text(lines)
    answer = next(iter(read_manifest(corpus / "train-tts.jsonl.gz")))
    for kind in (builder.voice, builder.flow):
        with pytest.raises(DataError, match=f"^cut {answer.id}: speech_tokens are missing; minmo tokenize"):
            kind([answer])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_silence_is_named_by_whichever_process_reads_it(
    corpus: Path, builder: Builder, tmp_path: Path, workers: int
) -> None:
    lines = list(read_manifest(corpus / "train-asr.jsonl.gz"))[:2]
    for n, cut in enumerate(lines):
        path = tmp_path / f"{n}.flac"
        soundfile.write(path, np.zeros(round(cut.recording.duration * 16_000)), 16_000)
        cut.recording.sources[0].source = str(path)
    from lhotse import CutSet

    manifest = tmp_path / "silent.jsonl"
    CutSet.from_cuts(lines).to_file(manifest)
    batches = Batches(builder, "text", Sampler([(read_manifest(manifest), 60.0)], 1, 0, 0, 1), workers)
    with pytest.raises(DataError, match="recording is silent; leave the line out"):
        list(batches)


def test_what_validation_cannot_hear_is_counted_once(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lhotse import CutSet

    lines = list(read_manifest(corpus / "valid-asr.jsonl.gz"))[:2]
    silence = tmp_path / "silence.flac"
    soundfile.write(silence, np.zeros(round(lines[0].recording.duration * 16_000)), 16_000)
    lines[0].recording.sources[0].source = str(silence)
    CutSet.from_cuts(lines).to_file(tmp_path / "valid.jsonl")
    recipe = pipeline.smoked(load_recipe("nano/pre-align"))
    data = dataclasses.replace(recipe.data, valid=(str(tmp_path / "valid.jsonl"),), max_seconds=60.0)
    loop = dataclasses.replace(recipe.loop, validate_every=1)
    run(dataclasses.replace(recipe, data=data, loop=loop), "nano", corpus, tmp_path / "run")
    assert "1 lines were skipped: silent 1" in capsys.readouterr().out


def test_tokens_are_made_once_by_one_model(corpus: Path, tmp_path: Path) -> None:
    plain, out = corpus / "valid-tts.jsonl.gz", tmp_path / "tokens.jsonl"
    with pytest.raises(ValueError, match="is the manifest that is read: write to another file"):
        tokenize(plain, plain, "nano")
    # What another run left is not taken, and a line that has its tokens keeps them.
    stale = tmp_path / "tokens.jsonl.0123456789ab.shares"
    stale.mkdir()
    (stale / "000000.jsonl").write_text('{"stale": 1}\n')
    assert not tokenize(plain, out, "nano")
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert first and all(line["custom"]["speech_tokens"] for line in first)
    for line in first:
        line["custom"]["speech_tokens"] = [1, 2, 3]
    out.write_text("".join(json.dumps(line) + "\n" for line in first))
    assert not tokenize(out, tmp_path / "again.jsonl", "nano")
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == first
