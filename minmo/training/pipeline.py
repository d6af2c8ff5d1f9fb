"""All stages of a preset, from random weights to a trained model (`minmo train all`).

A stage starts from the parts of the stages before it on which it builds (`Stage.after`), so it makes no difference to
what comes out whether stages run one after the other or side by side. A stage whose model is there is not run again;
one that was stopped goes on from its last checkpoint. Random weights are where everything begins, also where the
preset ships trained ones. Before the first stage that reads speech tokens, the manifests of the assistant's speech get
them.

OUT/NN-STAGE/start, checkpoints, model    what it began with, what trained, the whole model after it; log.txt of those
                                          that ran side by side
OUT/tokens, OUT/stages.json               manifests with speech tokens; the recipes of this run
OUT/model                                 the trained parts of all stages
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from minmo import weights
from minmo.training.parallel import Processes, processes
from minmo.training.recipe import Recipe, load_recipe, recipes
from minmo.training.run import HEADS, KINDS, SYMBOLS, run
from minmo.training.settings import TrainingError
from minmo.training.stages import STAGES
from minmo.training.tokenize import tokenize

SMOKE_STEPS, SMOKE_SECONDS = 3, 12.0
"""Steps and batches that only show that a stage runs."""


def run_all(preset: str, data: Path, out: Path, *, smoke: bool = False, jobs: int = 1) -> Path:
    """Runs every stage that has a recipe for the preset -> the folder of the last model.

    smoke: a few steps of each on small batches. jobs: stages that run side by side, a process each, which share the
    cores; of small models two on a core each finish sooner than one on both. Processes of torchrun take one stage after
    the other, together. Raises ValueError where the preset has no recipes, and what a stage raises.
    """
    names = [name for name in recipes() if name.startswith(f"{preset}/")]
    if not names:
        raise ValueError(f"there are no recipes for {preset}; known: {', '.join(recipes())}")
    plans = [load_recipe(name) for name in names]
    with processes() as here:
        own = _Pipeline({recipe.stage: smoked(recipe) if smoke else recipe for recipe in plans}, data, out, here)
        if here.rank == 0:
            own.begin(preset)
        here.wait()
        if jobs > 1 and here.world == 1:
            own.side_by_side(jobs, smoke)
        else:
            own.in_turn()
        if here.rank == 0:
            own.assemble(list(own.plans), out / "model")
        here.wait()
    return out / "model"


def smoked(recipe: Recipe) -> Recipe:
    """The recipe with a few small steps."""
    few = min(recipe.data.max_seconds, SMOKE_SECONDS)
    rehearse = recipe.data.rehearse and dataclasses.replace(recipe.data.rehearse, max_seconds=few)
    data = dataclasses.replace(recipe.data, max_seconds=few, buckets=2, rehearse=rehearse)
    loop = dataclasses.replace(
        recipe.loop, steps=SMOKE_STEPS, warmup=1, log_every=1, validate_every=SMOKE_STEPS, save_every=SMOKE_STEPS
    )
    return dataclasses.replace(recipe, loop=loop, data=data)


@dataclass
class _Pipeline:
    """plans: each stage's recipe, in the order of the stages."""

    plans: dict[str, Recipe]
    data: Path
    out: Path
    here: Processes

    def begin(self, preset: str) -> None:
        """Random weights, and the recipes of this run. Raises ValueError for a folder whose stages were, or were to be,
        trained by other recipes or on other data."""
        described = {
            stage: {
                **dataclasses.asdict(recipe),
                "loop": recipe.loop.decisive(),
                "data": {**dataclasses.asdict(recipe.data), "folder": str(self.data.resolve())},
            }
            for stage, recipe in self.plans.items()
        }
        path = self.out / "stages.json"
        own = json.loads(json.dumps(described))
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if differ := [stage for stage in {**stored, **own} if stored.get(stage) != own.get(stage)]:
                raise ValueError(
                    f"{self.out} holds a run by other recipes or on other data (first of them: {differ[0]}): "
                    "go on as it began, or give another folder"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
        if not self.random.is_dir():
            part = self.random.with_name("model.tmp")
            weights.save(weights.untrained(preset, "cpu"), part)
            part.rename(self.random)

    def in_turn(self) -> None:
        """One stage after the other, in this process and those beside it."""
        for stage, recipe in self.plans.items():
            if not self.done(stage):
                self.say(f"{stage}: {STAGES[stage].goal}")
                if self.here.rank == 0:
                    self.prepare(stage, 1)
                self.here.wait()
                began, folder = time.monotonic(), self.folder(stage)
                run(recipe, folder / "start", self.source(stage), folder)
                self.say(f"{stage} took {(time.monotonic() - began) / 60:.1f} minutes")

    def side_by_side(self, jobs: int, smoke: bool) -> None:
        """Up to `jobs` stages at a time, first those with the longest way ahead. Raises TrainingError where one fails;
        the others are stopped then, and go on when all is started again."""
        running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        with ExitStack() as stack:
            while todo := [stage for stage in self.plans if not self.done(stage)]:
                ready = [s for s in todo if s not in running and all(map(self.done, self.before(s)))]
                for stage in sorted(ready, key=self.ahead, reverse=True)[: jobs - len(running)]:
                    self.say(f"{stage}: {STAGES[stage].goal}")
                    self.prepare(stage, jobs - len(running))
                    child = self.launch(stage, max(1, (os.cpu_count() or 1) // jobs), smoke)
                    stack.callback(_end, child)
                    running[stage] = child, time.monotonic()
                time.sleep(0.2)
                for stage, (child, began) in list(running.items()):
                    if child.poll() is not None:
                        del running[stage]
                        if child.returncode or not self.done(stage):
                            log = self.folder(stage) / "log.txt"
                            raise TrainingError(
                                f"{stage} failed: {_last_words(log)} ({log}); start again to go on from there"
                            )
                        self.say(f"{stage} took {(time.monotonic() - began) / 60:.1f} minutes")

    def launch(self, stage: str, threads: int, smoke: bool) -> subprocess.Popen[bytes]:
        """The stage in a process of its own."""
        folder = self.folder(stage)
        given = {
            "--config": f"{self.plans[stage].preset}/{stage}",
            "--from": folder / "start",
            "--data": self.source(stage),
            "--out": folder,
        }
        command = [sys.executable, "-m", "minmo.training", stage, *(str(x) for pair in given.items() for x in pair)]
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command + ["--smoke"] * smoke,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )

    def prepare(self, stage: str, jobs: int) -> None:
        """What the stage starts from, and its manifests with speech tokens, made once by `jobs` processes."""
        start = self.folder(stage) / "start"
        self.assemble(self.before(stage), start)
        if KINDS.get(stage) in ("flow", "voice"):
            data = self.plans[stage].data
            for name in (*(data.train or ()), *(data.valid or ())):
                if not (self.source(stage) / name).is_file():
                    tokenize(self.data / name, self.source(stage) / name, str(start), jobs=jobs)

    def assemble(self, stages: list[str], folder: Path) -> None:
        """A model of what these stages trained, later ones over earlier ones, and random weights elsewhere; and heads
        that are training's own, of the last stage that has some."""
        if folder.is_dir():
            return
        model = weights.load(self.random, device="cpu")
        part = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for stage in stages:
            source, trains = self.folder(stage) / "model", self.plans[stage].as_run().trains
            trained = weights.load(source, device="cpu").state_dict()
            model.load_state_dict({k: v for k, v in trained.items() if k.startswith(trains)}, strict=False)
            for name in (HEADS, SYMBOLS):
                if (source / name).is_file():
                    shutil.copyfile(source / name, part / name)
        weights.save(model, part)
        part.rename(folder)

    def before(self, stage: str) -> list[str]:
        """The stages on which it builds, and on which those do, in order."""
        wanted = set(STAGES[stage].after)
        for name in reversed(STAGES):
            if name in wanted:
                wanted |= set(STAGES[name].after)
        return [name for name in self.plans if name in wanted]

    def ahead(self, stage: str) -> int:
        """Micro-batches of the longest way to the end that leads through this stage."""
        loop = self.plans[stage].loop
        after = [self.ahead(other) for other in self.plans if stage in STAGES[other].after]
        return loop.steps * loop.accumulate + max(after, default=0)

    def done(self, stage: str) -> bool:
        return (self.folder(stage) / "model").is_dir()

    def folder(self, stage: str) -> Path:
        return self.out / f"{list(self.plans).index(stage) + 1:02}-{stage}"

    def source(self, stage: str) -> Path:
        """Where its manifests lie."""
        return self.out / "tokens" if KINDS.get(stage) in ("flow", "voice") else self.data

    @property
    def random(self) -> Path:
        return self.out / "00-random" / "model"

    def say(self, text: str) -> None:
        if self.here.rank == 0:
            print(text, flush=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        child.wait()


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
