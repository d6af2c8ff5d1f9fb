"""All stages of a preset, one after the other, each from the model of the one before (`minmo train all`).

The first one starts from random weights, also where the preset ships trained ones.

A stage whose model is there is not run again; one that was stopped goes on from its last checkpoint. Before the first
stage that reads speech tokens, the manifests of the assistant's speech get them.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from minmo import weights
from minmo.training.loop import processes
from minmo.training.recipe import Recipe, load_recipe, recipes
from minmo.training.run import KINDS, run
from minmo.training.stages import STAGES
from minmo.training.tokenize import tokenize

SMOKE_STEPS, SMOKE_SECONDS = 3, 12.0
"""Steps and batches that only show that a stage runs."""


def run_all(preset: str, data: Path, out: Path, *, smoke: bool = False, jobs: int = 1) -> Path:
    """Runs every stage that has a recipe for the preset -> the folder of the last model.

    smoke: a few steps of each on small batches. jobs: processes that tokenize. Raises ValueError where the preset has
    no recipes, and what a stage raises.
    """
    names = [name for name in recipes() if name.startswith(f"{preset}/")]
    if not names:
        raise ValueError(f"there are no recipes for {preset}; known: {', '.join(recipes())}")
    start = out / "00-random" / "model"
    with processes() as here:
        if here.rank == 0 and not (start / "model.safetensors").is_file():
            weights.save(weights.untrained(preset, "cpu"), start)
        here.wait()
    for number, name in enumerate(names, 1):
        recipe = load_recipe(name)
        stage = STAGES[recipe.stage]
        folder = out / f"{number:02}-{stage.name}"
        if not (folder / "model" / "model.safetensors").is_file():
            print(f"{number} of {len(names)}: {stage.name}: {stage.goal}")
            if KINDS.get(stage.name) in ("flow", "voice"):
                _with_tokens(recipe, data, out, str(start), jobs)
            began = time.monotonic()
            run(smoked(recipe) if smoke else recipe, start, data, folder, tokens=out / "tokens")
            print(f"{stage.name} took {(time.monotonic() - began) / 60:.1f} minutes")
        start = folder / "model"
    return start


def smoked(recipe: Recipe) -> Recipe:
    """The recipe with a few small steps."""
    few = {"max_seconds": min(recipe.data.max_seconds, SMOKE_SECONDS)}
    rehearse = recipe.data.rehearse and dataclasses.replace(recipe.data.rehearse, **few)
    data = dataclasses.replace(recipe.data, **few, buckets=2, rehearse=rehearse)
    loop = dataclasses.replace(
        recipe.loop, steps=SMOKE_STEPS, warmup=1, log_every=1, validate_every=SMOKE_STEPS, save_every=SMOKE_STEPS
    )
    return dataclasses.replace(recipe, loop=loop, data=data)


def _with_tokens(recipe: Recipe, data: Path, out: Path, model: str, jobs: int) -> None:
    """Speech tokens for the manifests that a stage reads, made once, by the first process."""
    with processes() as here:
        if here.rank == 0:
            for name in (*(recipe.data.train or ()), *(recipe.data.valid or ())):
                if not (out / "tokens" / name).is_file():
                    tokenize(data / name, out / "tokens" / name, model, jobs=jobs)
        here.wait()
