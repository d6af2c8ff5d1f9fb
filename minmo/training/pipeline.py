"""All stages of a preset, from random weights to a trained model (`minmo train all`).

A stage starts from the parts of the stages before it on which it builds (`Stage.after`), so it makes no difference to
what comes out whether stages run one after the other or side by side, as long as each has as many threads. A stage
whose model is there is not run again; one that was stopped goes on from its last checkpoint. Random weights are where
everything begins, also where the preset ships trained ones. Before the first stage that reads speech tokens, the
manifests of the assistant's speech get them.

OUT/NN-STAGE/checkpoints, model    what trained, the whole model after it; while it is under way, `start`: the model
                                   before it; recipe.yaml and log.txt of a stage that runs beside others
OUT/tokens, OUT/stages.json        manifests with speech tokens; what this run is made with
OUT/model                          the trained parts of all stages
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minmo import weights
from minmo.training.parallel import Processes, processes
from minmo.training.recipe import Recipe, load_recipe, recipes
from minmo.training.records import read_log
from minmo.training.run import HEADS, KINDS, SYMBOLS, decisive, note, run
from minmo.training.settings import TrainingError
from minmo.training.stages import STAGES
from minmo.training.tokenize import tokenize

SMOKE_STEPS, SMOKE_SECONDS = 3, 12.0
"""Steps and batches that only show that a stage runs."""


def run_all(preset: str, data: Path, out: Path, *, smoke: bool = False, jobs: int = 1) -> Path:
    """Runs every stage that has a recipe for the preset -> the folder of the last model.

    smoke: a few steps of each on small batches. jobs: stages that run side by side, a process each, which share the
    cores; of small models two on a core each finish sooner than one on both. Processes of torchrun take one stage after
    the other, together. Raises ValueError where the preset has no recipes, for a folder of another run, and what a
    stage raises.
    """
    names = [name for name in recipes() if name.startswith(f"{preset}/")]
    if not names:
        raise ValueError(f"there are no recipes for {preset}; known: {', '.join(recipes())}")
    plans = [load_recipe(name) for name in names]
    with processes() as here:
        if jobs > 1 and here.world > 1:
            raise ValueError("processes of torchrun take one stage after the other, together: leave --jobs out")
        own = _Pipeline({recipe.stage: smoked(recipe) if smoke else recipe for recipe in plans}, data, out, here)
        if here.rank == 0:
            own.begin(preset)
        here.wait()
        if jobs > 1:
            own.side_by_side(jobs)
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
        """Random weights, and what this run is made with. Raises ValueError for a folder whose stages were, or were to
        be, trained by other recipes or on other data, or not in their order."""
        made_with = {stage: self.made_with(stage) for stage in self.plans}
        note(self.out / "stages.json", made_with, "other recipes or on other data", "first of them")
        for stage in filter(self.done, self.plans):
            if earlier := self.outdated(stage, self.model(stage)):
                raise ValueError(
                    f"{self.folder(stage)} was built on an earlier {earlier} than is there now: remove the folders "
                    f"of all stages after {earlier}"
                )
        if not self.random.is_dir():
            part = self.random.with_name("model.tmp")
            weights.save(weights.untrained(preset, "cpu"), part)
            part.rename(self.random)

    def made_with(self, stage: str) -> dict[str, Any]:
        """The settings and manifests on which a stage's numbers depend, as JSON holds them."""
        recipe = self.plans[stage]
        files = {name: self.data / name for name in recipe.data.manifests}
        digests = {n: hashlib.sha256(file.read_bytes()).hexdigest() for n, file in files.items() if file.is_file()}
        return {"recipe": decisive(recipe), "folder": str(self.data.resolve()), "manifests": digests}

    def in_turn(self) -> None:
        """One stage after the other, in this process and those beside it."""
        for stage, recipe in self.plans.items():
            if not self.done(stage):
                self.say(f"{stage}: {STAGES[stage].goal}")
                if self.here.rank == 0:
                    self.prepare(stage, os.cpu_count() or 1)
                self.here.wait()
                folder = self.folder(stage)
                run(recipe, folder / "start", self.source(stage), folder)
                if self.here.rank == 0:
                    self.finish(stage)

    def side_by_side(self, jobs: int) -> None:
        """Up to `jobs` stages at a time, first those with the longest way ahead. Raises TrainingError where one fails;
        the others are stopped then, and go on when all is started again."""
        running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stages end with this process
        try:
            while (todo := [stage for stage in self.plans if not self.done(stage)]) or running:
                ready = [s for s in todo if s not in running and all(map(self.done, self.before(s)))]
                for stage in sorted(ready, key=self.ahead, reverse=True)[: jobs - len(running)]:
                    log = self.folder(stage) / "log.txt"
                    self.say(f"{stage}: {STAGES[stage].goal} ({log})")
                    self.prepare(stage, jobs - len(running))
                    begins = log.stat().st_size if log.is_file() else 0
                    running[stage] = self.launch(stage, max(1, (os.cpu_count() or 1) // jobs)), begins
                time.sleep(0.2)
                for stage, (child, begins) in list(running.items()):
                    if child.poll() is not None:
                        del running[stage]
                        if child.returncode or not self.done(stage):
                            raise TrainingError(self.failure(stage, child.returncode, begins))
                        self.finish(stage)
        finally:
            for child, _ in running.values():
                child.send_signal(signal.SIGINT)  # what is being saved becomes whole
            for stage, (child, _) in running.items():
                child.wait()
                if self.done(stage):  # it came to its end meanwhile
                    self.finish(stage)
            signal.signal(signal.SIGTERM, before)

    def launch(self, stage: str, threads: int) -> subprocess.Popen[bytes]:
        """The stage in a process of its own, with the recipe as it was read when all began."""
        folder = self.folder(stage)
        recipe = folder / "recipe.yaml"
        recipe.write_text(self.plans[stage].to_yaml(), encoding="utf-8")
        given = {"--config": recipe, "--from": folder / "start", "--data": self.source(stage), "--out": folder}
        command = [sys.executable, "-u", "-m", "minmo.training", stage]
        command += [str(x) for pair in given.items() for x in pair]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends them once
                env={"OMP_NUM_THREADS": str(threads), **alone},
            )

    def failure(self, stage: str, code: int, begins: int) -> str:
        """Why the stage failed, by what it wrote into its log from byte `begins` on."""
        log = self.folder(stage) / "log.txt"
        said = log.read_bytes()[begins:].decode(errors="replace").split("minmo: ")
        why = " ".join(said[-1].split()) if len(said) > 1 else "it gave no reason"
        if code < 0:
            why = f"it was ended by signal {-code}, for lack of memory if nobody did it"
        return f"{stage} failed: {why:.500} (see {log}); what the other stages reached is kept"

    def prepare(self, stage: str, jobs: int) -> None:
        """What the stage starts from, and its manifests with speech tokens, made once by `jobs` processes."""
        start = self.folder(stage) / "start"
        if not start.is_dir() or self.outdated(stage, start):  # kept, so that tokens that it has begun to make count
            self.assemble(self.before(stage), start, heads="word_ctc" in STAGES[stage].losses)
        if KINDS.get(stage) in ("flow", "voice"):
            for name in self.plans[stage].data.manifests:
                if not (self.source(stage) / name).is_file():
                    tokenize(self.data / name, self.source(stage) / name, str(start), jobs=jobs)

    def finish(self, stage: str) -> None:
        """Says how long it trained, all its parts together, and drops what it began with."""
        records = read_log(self.folder(stage) / "checkpoints")
        seconds = sum(record["seconds"] for record in records if record["kind"] == "train")
        self.say(f"{stage} trained for {seconds / 60:.1f} minutes")
        shutil.rmtree(self.folder(stage) / "start", ignore_errors=True)

    def assemble(self, stages: list[str], folder: Path, heads: bool = False) -> None:
        """A model of what these stages trained, later ones over earlier ones, and random weights elsewhere; heads: and
        the last heads that are training's own."""
        model = weights.load(self.random, device="cpu")
        part = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for stage in stages:
            source, trains = self.model(stage), self.plans[stage].as_run().trains
            trained = weights.load(source, device="cpu").state_dict()
            model.load_state_dict({k: v for k, v in trained.items() if k.startswith(trains)}, strict=False)
            model.mark_trained(trains, f"minmo train {stage}")
            for name in (HEADS, SYMBOLS):
                if heads and (source / name).is_file():
                    shutil.copyfile(source / name, part / name)
        weights.save(model, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def before(self, stage: str) -> list[str]:
        """The stages on which it builds, and on which those do, in order."""
        wanted = set(STAGES[stage].after)
        for name in reversed(STAGES):
            if name in wanted:
                wanted |= set(STAGES[name].after)
        return [name for name in self.plans if name in wanted]

    def outdated(self, stage: str, folder: Path) -> str | None:
        """A stage on which it builds whose model is missing, or newer than what was made of it in `folder`."""
        made = folder.stat().st_mtime
        earlier = self.before(stage)
        return next((s for s in earlier if not self.done(s) or self.model(s).stat().st_mtime > made), None)

    def ahead(self, stage: str) -> int:
        """Micro-batches of the longest way to the end that leads through this stage."""
        loop = self.plans[stage].loop
        after = [self.ahead(other) for other in self.plans if stage in STAGES[other].after]
        return loop.steps * loop.accumulate + max(after, default=0)

    def done(self, stage: str) -> bool:
        return self.model(stage).is_dir()

    def model(self, stage: str) -> Path:
        return self.folder(stage) / "model"

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
