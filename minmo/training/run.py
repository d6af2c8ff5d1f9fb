"""Runs a stage: a recipe, a model to start from, data, and a folder for what comes of it.

OUT/checkpoints    of the loop: what trained, and how to go on (`minmo/training/checkpoints.py`)
OUT/model          the whole model after the stage (`minmo.load` reads it), the start of the next one
OUT/model/heads.safetensors, symbols.json    parts of the objective that are training's own, for a later stage
OUT/made_with.json                           the recipe, as far as numbers depend on it
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minmo import weights
from minmo.config import load_config
from minmo.data.manifest import describe_skipped, read_manifest
from minmo.model import MinMo
from minmo.token2wav.mel import RATE
from minmo.training import lora
from minmo.training.batches import Builder
from minmo.training.checkpoints import load_trained
from minmo.training.contract import Objective
from minmo.training.loader import Batches, Sampler
from minmo.training.loop import Result, fit, processes
from minmo.training.objectives.duplex import DuplexObjective
from minmo.training.objectives.recognition import EncoderObjective, Symbols
from minmo.training.objectives.sound import FlowObjective, VocoderObjective
from minmo.training.objectives.text import TextObjective
from minmo.training.objectives.tokens import TokenObjective
from minmo.training.objectives.voice import VoiceObjective
from minmo.training.recipe import Recipe
from minmo.training.settings import TrainingError

HEADS, SYMBOLS, MADE_WITH = "heads.safetensors", "symbols.json", "made_with.json"
KINDS = {
    "encoder": "speech", "speech-tokenizer": "tokens", "flow": "flow", "vocoder": "sound", "voice-lm": "voice",
    "t2s-projector": "voice", "t2s": "voice", "s2s": "voice", "duplex": "duplex",
}  # fmt: skip
"""The kind of batch of each stage (a method of `Builder`); all others take text."""


def run(recipe: Recipe, start: str | Path, data: Path, out: Path, *, skip_bad: bool = False) -> Result:
    """Trains one stage, or goes on with it.

    start: a preset or a model's folder. data: what manifests are relative to. skip_bad: leave lines out that
    cannot be used, and count them.

    Raises what `minmo.load`, `read_manifest` and `fit` raise, each with its fix.
    """
    if Path(start).resolve() == (out / "model").resolve():
        raise ValueError(f"{start} is what this run would write: give another folder to write to")
    model = weights.load(start, device="cpu").train()
    wanted = load_config(recipe.preset).name
    if model.config.name != wanted:
        raise ValueError(
            f"{start} is a {model.config.name}, and the recipe is for {wanted}: give a recipe of its preset"
        )
    if model.tokenizer is None:
        raise ValueError(f"{start} has no tokenizer.json; every stage needs its layout of a turn")
    stage, settings = recipe.as_run(), recipe.loop
    left: Counter[str] = Counter()
    d = recipe.data
    on_error = "skip" if skip_bad else "stop"
    train, valid, rehearsed = (
        [read_manifest(data / path, on_error=on_error, skipped=left, tasks=stage.tasks) for path in paths or ()]
        for paths in (d.train, d.valid, d.rehearse and d.rehearse.train)
    )
    if not train:
        raise ValueError(
            f"the recipe of {stage.name} names no training manifest: set data.train, in a copy of a recipe that ships"
        )
    symbols = _symbols(Path(start), train) if "word_ctc" in stage.losses else None
    torch.manual_seed(settings.seed)
    objective = make_objective(recipe, model, symbols, Path(start))
    with processes() as here:
        if here.rank == 0:
            note(out / MADE_WITH, decisive(recipe), "another recipe", "first difference")
        here.wait()
        builder = Builder(
            model.config, model.tokenizer, recipe.augment,
            settings.seed, symbols, recipe.chunks or (),
            1.0 if recipe.bistream_share is None else recipe.bistream_share, recipe.flow,
        )  # fmt: skip
        plain = dataclasses.replace(builder, augment=None, chunks=())
        kind = KINDS.get(stage.name, "text")

        def batches(parts: Sequence[tuple[Any, float]], builder: Builder, seed: int, workers: int) -> Batches:
            return Batches(builder, kind, Sampler(parts, d.buckets, seed, here.rank, here.world), workers)

        lessons = [(joined(train), d.max_seconds)]
        if d.rehearse is not None:
            lessons.append((joined(rehearsed), d.rehearse.max_seconds))
        loader = batches(lessons, builder, settings.seed, d.workers)
        exam = [(joined(valid), d.max_seconds)] if valid else []

        unheard: Counter[str] = Counter()
        """Of one validation: each reads the same lines."""

        def score() -> dict[str, float]:
            examined = batches(exam, plain, 0, 0)
            found = _validate(objective, examined, here.sum, here.device)
            unheard.clear()
            unheard.update(examined.skipped)
            return found

        def hear() -> dict[str, tuple[np.ndarray, int]]:
            for batch, _ in batches(exam, plain, 0, 0):
                sounds = objective.sound(objective.to_device(batch, here.device))
                return {name: (sound.float().cpu().numpy(), RATE) for name, sound in sounds.items()}
            return {}

        spread = dataclasses.replace(settings, shard=settings.shard or here.world > 1)
        checks: dict[str, Any] = {"validate": score} if valid else {}
        if valid and type(objective).sound is not Objective.sound:
            checks["samples"] = hear
        result = fit(objective, loader, spread, out / "checkpoints", **checks)
        if skipped := left + loader.skipped + unheard:
            print(describe_skipped(skipped))
        # Into a model of its own: the one that trained may be spread over many processes.
        complete = weights.load(start, device="cpu")
        made = make_objective(recipe, complete, symbols, Path(start))
        load_trained(result.last, made)
        complete.mark_trained(stage.trains, f"minmo train {stage.name}")
        if here.rank == 0:
            export(made, complete, out / "model")
        here.wait()
    return result


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The recipe as far as numbers depend on it, as JSON holds it."""
    loop = {**recipe.loop.decisive(), "accumulate": recipe.loop.accumulate}
    data = {k: v for k, v in dataclasses.asdict(recipe.data).items() if k != "workers"}
    described = {**dataclasses.asdict(recipe), "loop": loop, "data": data}
    del described["corpora"]
    return dict(json.loads(json.dumps(described)))


def note(path: Path, made_with: dict[str, Any], other: str, first: str) -> None:
    """Notes in a run's folder what it is made with. Raises ValueError where the note that is there says something else:
    a run by `other`, with the first key that differs."""
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged: remove it if nothing was changed since the run began") from None
        if differ := [key for key in {**stored, **made_with} if stored.get(key) != made_with.get(key)]:
            raise ValueError(
                f"{path.parent} holds a run by {other} ({first}: {differ[0]}): go on as it began, or give another "
                "folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(made_with, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def make_objective(recipe: Recipe, model: MinMo, symbols: Symbols | None, start: Path) -> Objective:
    """The stage's objective around the model, with `requires_grad` on exactly what the stage trains."""
    stage = recipe.as_run()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(stage.trains)
    if recipe.trainable == "lora":
        model.requires_grad_(False)
        assert recipe.lora is not None
        lora.attach(model.llm, recipe.lora)
    own: dict[str, Callable[[], Objective]] = {
        "flow": lambda: FlowObjective(model),
        "vocoder": lambda: VocoderObjective(model),
        "s2s": lambda: VoiceObjective(model, query=True),
        "duplex": lambda: DuplexObjective(model),
        **dict.fromkeys(("voice-lm", "t2s-projector", "t2s"), lambda: VoiceObjective(model, query=False)),
    }
    if symbols is None:
        return own.get(stage.name, lambda: TextObjective(model))()
    heads = _heads(start)
    if stage.name == "encoder":
        objective: Objective = EncoderObjective(model, symbols)
        objective.load_state_dict(heads, strict=False)
        return objective
    tokens = TokenObjective(model, symbols)
    recogniser = EncoderObjective(model, symbols).recogniser
    recogniser.load_state_dict({k.removeprefix("recogniser."): v for k, v in heads.items()}, strict=bool(heads))
    tokens.start_from_encoder(recogniser)
    return tokens


def export(objective: Objective, model: MinMo, folder: Path) -> None:
    """Writes the whole model, adapters merged, and the heads that are training's own; the folder is there when all of
    it is."""
    if lora.adapters(model.llm):
        lora.merge(model.llm)
    part = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    weights.save(model, part)
    heads = {k: v.cpu() for k, v in objective.state_dict().items() if not k.startswith("model.")}
    if heads:
        try:
            save_file(heads, part / HEADS)
        except SafetensorError as error:
            raise TrainingError(f"{part / HEADS} could not be written ({error}): make room and start again") from None
    recogniser = getattr(objective, "recogniser", None)
    if recogniser is not None:
        symbols = {"words": recogniser.symbols.words, "characters": recogniser.symbols.characters}
        (part / SYMBOLS).write_text(json.dumps(symbols, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def joined(manifests: Sequence[CutSet]) -> CutSet:
    """Lines of all manifests, each drawn as often as it is long: the sampler shuffles within a window only, so of
    manifests one after the other the last would be all that is learnt at the end."""
    if len(manifests) == 1:
        return manifests[0]
    return CutSet.mux(*manifests, weights=[manifest.data.lines() for manifest in manifests], seed=0)


def _symbols(start: Path, manifests: Sequence[Any]) -> Symbols:
    """Those of the stage before, or of this stage's corpus."""
    path = start / SYMBOLS
    if not path.is_file():
        return Symbols.of(cut.custom["text"] for cuts in manifests for cut in cuts)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Symbols(tuple(stored["words"]), tuple(stored["characters"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.100}); run the stage that wrote it again") from None


def _heads(start: Path) -> dict[str, torch.Tensor]:
    path = start / HEADS
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({str(error):.60}); run the stage that wrote it again") from None


def _validate(
    objective: Objective, batches: Batches, add_up: Callable[[Sequence[float]], list[float]], device: torch.device
) -> dict[str, float]:
    """Mean of each loss over a whole manifest, without augmentation, their weighted sum as the score, and what else the
    objective reports."""
    names, tallied = sorted(objective.weights), objective.tallied
    sums, counts, tallies = (dict.fromkeys(keys, 0.0) for keys in (names, names, tallied))
    for batch, _ in batches:
        for name, count in objective.counts(batch).items():
            counts[name] += count
        batch = objective.to_device(batch, device)
        for name, value in objective(batch).items():
            sums[name] += float(value)
        for name, number in objective.tally(batch).items():
            tallies[name] += number
    added = add_up([*sums.values(), *counts.values(), *tallies.values()])
    means = {n: added[i] / added[i + len(names)] for i, n in enumerate(names) if added[i + len(names)]}
    others = objective.scores(dict(zip(tallied, added[2 * len(names) :], strict=True)))
    return {**means, **others, "score": sum(objective.weights[n] * value for n, value in means.items())}
