"""Every stage on a corpus of two recordings: what trains and what does not, what is counted, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lhotse")

from lhotse import CutSet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minmo import load, weights
from minmo.data.manifest import read_manifest
from minmo.data.nano.smoke import build
from minmo.training.batches import Builder
from minmo.training.loader import Sampler
from minmo.training.objectives.recognition import Symbols
from minmo.training.objectives.text import TextObjective
from minmo.training.pipeline import smoked
from minmo.training.recipe import load_recipe, recipes
from minmo.training.run import KINDS, joined, make_objective, run
from minmo.training.stages import STAGES
from minmo.training.tokenize import tokenize

TRAINED = [name for name in STAGES if name != "duplex"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build(folder)
    for task in ("tts", "s2s"):
        plain = folder / f"train-{task}.jsonl.gz"
        plain.rename(folder / f"plain-{task}.jsonl.gz")
        tokenize(folder / f"plain-{task}.jsonl.gz", plain, "nano")
    return folder


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def stage_and_batch(name: str, corpus: Path, cuts: int = 3) -> tuple[Any, Any]:
    recipe = load_recipe(f"nano/{name}")
    model = weights.untrained().train()
    lines = [cut for path in recipe.data.train or () for cut in read_manifest(corpus / path)]
    lines = [*lines[:cuts], *lines[-cuts:]]
    symbols = Symbols.of(line.custom["text"] for line in lines) if "word_ctc" in STAGES[name].losses else None
    assert model.tokenizer is not None
    builder = Builder(model.config, model.tokenizer, symbols=symbols, flow_options=recipe.flow)
    objective = make_objective(recipe, model, symbols, corpus)
    return objective, getattr(builder, KINDS.get(name, "text"))(lines)


def mean(objective: Any, batch: Any) -> torch.Tensor:
    counts, sums = objective.counts(batch), objective(batch)
    assert counts.keys() == sums.keys() == objective.weights.keys() == set(STAGES_LOSSES[type(objective).__name__])
    return torch.stack([objective.weights[n] * sums[n] / max(counts[n], 1) for n in sums]).sum()


STAGES_LOSSES = {
    "TextObjective": ("text",),
    "EncoderObjective": ("word_ctc", "character_ctc"),
    "TokenObjective": ("word_ctc", "character_ctc", "mel"),
    "FlowObjective": ("flow",),
    "VocoderObjective": ("spectrum", "mel", "pitch"),
    "VoiceObjective": ("speech",),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_stage_trains_what_it_names_and_nothing_else(name: str, corpus: Path) -> None:
    objective, batch = stage_and_batch(name, corpus)
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    own = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=1e-2)
    mean(objective, batch).backward()
    assert all([p.grad is None for p in objective.parameters() if not p.requires_grad])
    optimizer.step()
    changed = {k for k, v in objective.model.state_dict().items() if not torch.equal(v, before[k])}
    trains = load_recipe(f"nano/{name}").as_run().trains
    named = {k for k, _ in objective.model.named_parameters() if k.startswith(trains)}
    assert changed <= named
    # Rows of tables that the batch does not use, keys' biases (softmax does not see them) and the like stay.
    assert len(changed) > 0.8 * len(named), sorted(named - changed)


PREPARED_BY = {"pre-align": "sft", "full-align": "sft", "t2s-projector": "voice-lm"}
"""Stages that learn little while what they lead into is random, and the stage that trains it."""


@pytest.mark.parametrize("name", TRAINED)
def test_a_stage_learns_one_batch(name: str, corpus: Path) -> None:
    objective, batch = stage_and_batch(name, corpus, cuts=1)
    if name in PREPARED_BY:
        before, _ = stage_and_batch(PREPARED_BY[name], corpus, cuts=1)
        learn(before, batch)
        trains, fresh = STAGES[name].trains, objective.model.state_dict()
        objective.model.load_state_dict(
            {k: fresh[k] if k.startswith(trains) else v for k, v in before.model.state_dict().items()}
        )
    alone = name in ("pre-align", "t2s-projector")  # a projector between frozen parts reaches less
    first = mean(objective, batch).item()
    learn(objective, batch, *((60, 1e-2) if alone else ()))
    assert mean(objective, batch).item() < (0.98 if alone else 0.7) * first


def learn(objective: Any, batch: Any, steps: int = 20, lr: float = 3e-3) -> None:
    lr = 5e-4 if hasattr(batch, "audio") else lr
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        mean(objective, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()


@pytest.mark.parametrize("name", ["vocoder", "flow", "t2s"])
def test_what_a_validation_lets_hear(name: str, corpus: Path) -> None:
    objective, batch = stage_and_batch(name, corpus, cuts=1)
    with torch.no_grad():
        sounds = objective.eval().sound(batch)
    assert len(sounds) == 2 and len({len(sound) for sound in sounds.values()}) == 1
    for sound in sounds.values():
        assert (
            sound.dim() == 1 and len(sound) >= 24_000 // 2 and bool(sound.isfinite().all()) and float(sound.std()) > 0
        )


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("minmo-8b/")])
def test_a_stage_runs_as_the_large_recipe_does(name: str, corpus: Path, tmp_path: Path) -> None:
    """Shards, bfloat16 and activation checkpoints in steps, validation and export."""
    loop = load_recipe(name).loop
    how = {key: getattr(loop, key) for key in ("precision", "shard", "checkpoint_activations", "compile")}
    recipe = smoked(load_recipe(f"nano/{name.split('/')[1]}"))
    valid = recipe.data.train if recipe.stage != "duplex" else recipe.data.valid
    recipe = dataclasses.replace(
        recipe,
        loop=dataclasses.replace(recipe.loop, **how, steps=1, validate_every=1, save_every=1),
        data=dataclasses.replace(recipe.data, valid=valid),  # of speech tokens, the corpus has those of training alone
    )
    result = run(recipe, "nano", corpus, tmp_path / "run")
    assert result.score is not None and math.isfinite(result.score) and not result.skipped
    assert load(tmp_path / "run" / "model").trained
    if recipe.stage in ("vocoder", "flow", "t2s"):
        board = EventAccumulator(str(tmp_path / "run" / "checkpoints" / "tensorboard"))
        assert len(board.Reload().Tags()["audio"]) == 2


def test_speech_is_counted_as_the_decoder_targets_it(corpus: Path) -> None:
    for name in ("voice-lm", "s2s"):
        objective, batch = stage_and_batch(name, corpus)
        for blocks in (True, False):
            batch = dataclasses.replace(batch, blocks=torch.full_like(batch.blocks, blocks))
            _, targets = objective.logits(batch)
            assert objective.counts(batch)["speech"] == float((targets != -100).sum())


def test_text_is_learned_from_the_assistant_alone(corpus: Path) -> None:
    objective, batch = stage_and_batch("sft", corpus)
    tokenizer = objective.model.tokenizer
    for row, targets in zip(batch.after, batch.targets(), strict=True):
        learned = [int(i) for i in targets if i != -100]
        assert learned[-1] == tokenizer.end_of_turn
        suffix = tokenizer.turn("")[1]
        assert row[: len(suffix)].tolist() == suffix and (targets[: len(suffix)] == -100).all()
        assert row[len(suffix) : len(suffix) + len(learned)].tolist() == learned


def test_what_a_batch_shares_changes_nothing(corpus: Path) -> None:
    objective, batch = stage_and_batch("text-lm", corpus)
    assert isinstance(objective, TextObjective) and batch.shared > 10
    results = []
    for shared in (0, batch.shared):
        objective.zero_grad()
        loss = mean(objective, dataclasses.replace(batch, shared=shared))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-3)


def test_tokens_are_those_of_the_speech(corpus: Path) -> None:
    model = load("nano")
    cuts = list(read_manifest(corpus / "train-tts.jsonl.gz"))
    for cut in cuts[:2]:
        # 25 a second of sound, filled up to 80 ms; the mel frames of the flow are twice as many.
        tokens = cut.custom["speech_tokens"]
        assert len(tokens) == 2 * -(-round(cut.duration * 16_000) // 1280)
        assert max(tokens) < model.config.flow.codes and len(set(tokens)) > 3
        builder = Builder(model.config, model.tokenizer)
        assert len(builder._spectrogram(cut)) == 2 * len(tokens)


def test_a_manifest_of_fewer_lines_than_buckets_is_read_whole(corpus: Path) -> None:
    lines = read_manifest(corpus / "valid-duplex.jsonl.gz")
    assert [len(cuts) for _, cuts in Sampler([(lines, 30.0)], 4, 0, 0, 1)] == [1]
    lines = read_manifest(corpus / "valid-s2s.jsonl.gz")
    assert sum(len(cuts) for _, cuts in Sampler([(lines, 30.0)], 100, 0, 0, 1)) == len(list(lines))


def test_lines_of_several_manifests_are_mixed_to_the_end(corpus: Path, tmp_path: Path) -> None:
    line = next(iter(read_manifest(corpus / "train-text.jsonl.gz")))
    manifests = []
    for name, count in (("few", 100), ("many", 400)):
        CutSet.from_cuts(line.with_id(f"{name}-{n}") for n in range(count)).to_file(tmp_path / f"{name}.jsonl")
        manifests.append(read_manifest(tmp_path / f"{name}.jsonl"))
    ids = [cut.id for cut in joined(manifests)]
    assert len(ids) == len(set(ids)) == 500
    for tenth in range(10):
        assert 2 <= sum(i.startswith("few") for i in ids[50 * tenth :][:50]) <= 22


def test_what_is_rehearsed_comes_in_turn(corpus: Path) -> None:
    """Batch by batch, each epoch anew, and a run that goes on takes the batches that it had left."""

    def sampler() -> Sampler:
        parts = [(read_manifest(corpus / f"train-{task}.jsonl.gz"), 3.0) for task in ("asr", "text")]
        return Sampler(parts, 1, 0, 0, 1)

    def tasks(epoch: Iterable[tuple[int, Sequence[Any]]]) -> list[str]:
        return [{cut.custom["task"] for cut in cuts}.pop() for _, cuts in epoch]

    whole = sampler()
    first = tasks(whole)
    assert len(first) >= 4 and first == ["asr", "text"] * (len(first) // 2) + ["asr"] * (len(first) % 2)
    assert tasks(whole)[:2] == ["asr", "text"]

    one, other = sampler(), sampler()
    batches = iter(one)
    seen = [[cut.id for cut in next(batches)[1]] for _ in range(2)]
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    left = [[cut.id for cut in cuts] for _, cuts in batches]
    assert [[cut.id for cut in cuts] for _, cuts in other] == left and left and seen[0] != left[0]
