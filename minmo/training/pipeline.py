"""All stages of a preset, one after the other, each from the model of the one before (`minmo train all`).

The first one starts from random weights, also where the preset ships trained ones.

A stage whose model is there is not run again; one that was stopped goes on from its last checkpoint. Before the first
stage that reads speech tokens, the manifests of the assistant's speech get them.
"""

from __future__ import annotations

import dataclasses
import json
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
    plans = [load_recipe(name) for name in names]
    start = out / "00-random" / "model"
    with processes() as here:
        if here.rank == 0:
            _same_run(out, [smoked(recipe) if smoke else recipe for recipe in plans], data)
            if not start.is_dir():
                part = start.with_name("model.tmp")
                weights.save(weights.untrained(preset, "cpu"), part)
                part.rename(start)
        here.wait()
    for number, recipe in enumerate(plans, 1):
        stage = STAGES[recipe.stage]
        folder = out / f"{number:02}-{stage.name}"
        if not (folder / "model").is_dir():
            print(f"{number} of {len(plans)}: {stage.name}: {stage.goal}")
            if KINDS.get(stage.name) in ("flow", "voice"):
                _with_tokens(recipe, data, out, str(start), jobs)
            began = time.monotonic()
            run(smoked(recipe) if smoke else recipe, start, data, folder, tokens=out / "tokens")
            print(f"{stage.name} took {(time.monotonic() - began) / 60:.1f} minutes")
        start = folder / "model"
    return start


def _same_run(out: Path, plans: list[Recipe], data: Path) -> None:
    """Refuses a folder whose stages were, or were to be, trained by other recipes or on other data."""
    described = {
        recipe.stage: {
            **dataclasses.asdict(recipe),
            "loop": recipe.loop.decisive(),
            "data": {**dataclasses.asdict(recipe.data), "folder": str(data.resolve())},
        }
        for recipe in plans
    }
    path = out / "stages.json"
    own = json.loads(json.dumps(described))
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if differ := [stage for stage in {**stored, **own} if stored.get(stage) != own.get(stage)]:
            raise ValueError(
                f"{out} holds a run by other recipes or on other data (first of them: {differ[0]}): "
                "go on as it began, or give another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def smoked(recipe: Recipe) -> Recipe:
    """The recipe with a few small steps."""
    few = min(recipe.data.max_seconds, SMOKE_SECONDS)
    rehearse = recipe.data.rehearse and dataclasses.replace(recipe.data.rehearse, max_seconds=few)
    data = dataclasses.replace(recipe.data, max_seconds=few, buckets=2, rehearse=rehearse)
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
