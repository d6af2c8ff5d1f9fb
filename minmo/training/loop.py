"""The training loop: `fit` runs an objective over a loader, on one CPU process or under torchrun on many GPUs.

The same lines serve both:

    with processes() as here:
        loader = ...  # this process's slice: here.rank of here.world
        result = fit(objective, loader, LoopSettings(steps=1000, lr=1e-4, shard=here.world > 1), Path("run"))

Started again with the same folder, it continues from the newest whole checkpoint.

What is exact. A run that was killed at any moment and continued on as many processes takes, on a CPU, bit for bit the
steps of one that was not: each step's randomness is drawn from (seed, step, micro-batch, process), never from what ran
before. It needs a loader whose state is exact, with augmentation drawn from what it augments. Across numbers of
processes, or micro-batches, the gradient is the same sum in another order: equal to rounding while nothing is drawn at
random (dropout differs). On a GPU the same holds as far as its kernels are deterministic. Buffers are not saved: they
are taken to be constant. Seconds and items a second are of the clock.
"""

from __future__ import annotations

import errno
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minmo.training.checkpoints import Checkpoints, newest, whole
from minmo.training.contract import Loader, Objective
from minmo.training.optimizer import adamw, gradient_norm, set_lr
from minmo.training.parallel import Processes, processes, spread, trained
from minmo.training.records import Records
from minmo.training.settings import LoopSettings, TrainingError
from minmo.training.spikes import SpikeGuard

__all__ = ["Loader", "LoopSettings", "Objective", "Result", "TrainingError", "fit", "processes"]

Batches = Iterator[tuple[Any, list[str]]]
Validate = Callable[[], dict[str, float]]
Samples = Callable[[], dict[str, tuple[np.ndarray, int]]]


@dataclass(frozen=True)
class Result:
    """last, best: checkpoints (`minmo.training.checkpoints.load_trained` reads them). skipped: steps that the spike
    guard refused. score: the best validation's; None without one."""

    step: int
    skipped: list[int]
    last: Path
    best: Path | None
    score: float | None


def fit(
    objective: Objective,
    loader: Loader,
    settings: LoopSettings,
    out: Path,
    *,
    validate: Validate | None = None,
    samples: Samples | None = None,
    to_save: nn.Module | None = None,
) -> Result:
    """Trains until `settings.steps`, from the newest whole checkpoint of `out` where there is one.

    validate: its "score", lower is better, chooses the best checkpoint. samples: sounds for TensorBoard, (samples in
    -1..1, rate in Hz). Both run on every process in evaluation mode, after every `validate_every` steps and at the end.
    to_save: the module by whose names the trained parameters go, in checkpoints and `lr_scale`; the objective itself
    by default. The objective stays trained, on its device; with `shard`, sharded.

    Raises ValueError for settings that do not fit, TrainingError where the run cannot begin or go on (a checkpoint of
    another run, too many spikes, a full disk, a dead loader process); the last whole checkpoint then stays.
    """
    with processes() as here, _keep_random_state(here), _alone(Path(out), here):
        try:
            return _Run(objective, loader, settings, Path(out), here, to_save or objective).train(validate, samples)
        except RuntimeError as error:
            # PyTorch raises it from wherever the main thread is when the process dies.
            if not (
                "DataLoader worker" in str(error) and re.search("exited unexpectedly|killed by signal", str(error))
            ):
                raise
            raise TrainingError(
                f"a process of the data loader died ({str(error).splitlines()[0]}), often for lack of memory; "
                f"{newest(Path(out))}: start again to continue, with fewer workers or smaller batches if it comes back"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise TrainingError(
                f"the log in {out} could not be written to ({error.strerror}); {newest(Path(out))}: make room and "
                "start again"
            ) from error


class _Run:
    """A run under way: what every step needs."""

    def __init__(
        self, objective: Objective, loader: Loader, settings: LoopSettings, out: Path, here: Processes, named: nn.Module
    ) -> None:
        self.objective, self.loader, self.settings, self.out, self.here = objective, loader, settings, out, here
        wanted = {id(p) for p in objective.parameters() if p.requires_grad}
        missing = len(wanted - {id(p) for p in named.parameters()})
        if not wanted or missing:
            raise ValueError(
                f"to_save lacks {missing} of the {len(wanted)} trained parameters: what trains must be saved"
                if wanted
                else "no parameter of the objective requires a gradient: set requires_grad on what trains"
            )
        for name, parameter in trained(named).items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} trains, so it must be float32, not {parameter.dtype}: load it as float32")
        spread(objective, objective.blocks, settings, here)
        self.parameters = trained(named)
        self.optimizer = adamw(self.parameters, settings)
        self.guard = SpikeGuard(settings.spike, settings.patience)
        self.checkpoints = Checkpoints(out, settings, here, self.parameters, self.optimizer, loader, self.guard)
        self.names = sorted(objective.weights)

    def train(self, validate: Validate | None, samples: Samples | None) -> Result:
        settings, here, checkpoints = self.settings, self.here, self.checkpoints
        first = checkpoints.resume()
        batches = self._batches()
        clock, items = time.monotonic(), 0
        with ExitStack() as stack:
            stack.callback(checkpoints.wait)  # what is being written becomes whole, whatever ends the run
            records = stack.enter_context(Records(self.out, first, settings.steps)) if here.rank == 0 else None
            self._training_mode()
            for step in range(first + 1, settings.steps + 1):
                values, read, fault, ids = self._step(step, batches)
                items += read
                if fault:
                    if records:
                        records.write(step, "skipped", {"why": fault, "items": " ".join(ids)})
                    self.guard.skip(step, fault, ids)
                elif records and (step % settings.log_every == 0 or step == settings.steps):
                    passed = time.monotonic() - clock
                    values |= {"seconds": passed, "items_per_second": items / passed}
                    records.write(step, "train", values)
                    clock, items = time.monotonic(), 0
                score, paused = None, time.monotonic()
                if step % settings.validate_every == 0 or step == settings.steps:
                    score = self._validation(step, validate, samples, records)
                if score is not None or step % settings.save_every == 0 or step == settings.steps:
                    checkpoints.save(step, score)
                clock += time.monotonic() - paused
                if records:
                    records.advance(step)
            checkpoints.settle()
            if records:
                records.curve()
                records.console.print(self._summary(), markup=False, highlight=False)
        best = checkpoints.best
        return Result(
            settings.steps,
            self.guard.skipped,
            here.of_first(whole(self.out))[-1],
            best.checkpoint if best else None,
            best.score if best else None,
        )

    def _step(self, step: int, batches: Batches) -> tuple[dict[str, float], int, str | None, list[str]]:
        """One optimizer step: its values, the number of items of all processes, and where it was skipped why, and
        which items they were."""
        settings, here, objective = self.settings, self.here, self.objective
        self._seed(step, "loader")
        micro = [next(batches) for _ in range(settings.accumulate)]
        own = [sum(column) for column in zip(*(self._counts(batch) for batch, _ in micro), strict=True)]
        *counts, items, failed = here.sum([*own, sum(len(ids) for _, ids in micro), self.checkpoints.failed])
        if failed:
            self.checkpoints.settle()
        share = {n: objective.weights[n] / count if count else 0.0 for n, count in zip(self.names, counts, strict=True)}
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=here.device)
        for index, (batch, _) in enumerate(micro):
            self._seed(step, index)
            with self._precision():
                losses = objective(objective.to_device(batch, here.device))
            total = torch.stack([share[name] * losses[name].float() for name in self.names]).sum()
            if not total.requires_grad:
                raise ValueError(
                    "no trained parameter has a part in the losses of forward: join them, as `x.sum() * 0`"
                )
            total.backward()
            sums += torch.stack([losses[name].detach() for name in self.names])
        parts = dict(zip(self.names, here.sum(sums.tolist()), strict=True))
        loss = sum(share[name] * parts[name] for name in self.names)
        norm = gradient_norm(self.parameters)
        fault = self.guard.fault(loss, float(norm))
        lr = settings.lr_at(step)
        if fault is None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), settings.clip, norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        skipped: list[str] = []
        if fault is not None:
            skipped = [i for theirs in here.of_all([i for _, ids in micro for i in ids]) for i in theirs]
        means = {f"loss/{n}": parts[n] / count for n, count in zip(self.names, counts, strict=True) if count}
        return {"loss": loss, **means, "gradient_norm": float(norm), "lr": lr}, int(items), fault, skipped

    def _counts(self, batch: Any) -> list[float]:
        counts = self.objective.counts(batch)
        if counts.keys() != self.objective.weights.keys():
            raise ValueError(f"counts gives {', '.join(sorted(counts))}, but weights has {', '.join(self.names)}")
        return [float(counts[name]) for name in self.names]

    def _batches(self) -> Batches:
        """Micro-batches, epoch after epoch. A loader that continues at the end of an epoch gives one empty epoch."""
        empty = 0
        while empty < 2:
            empty += 1
            for batch in self.loader:
                empty = 0
                yield batch
        raise TrainingError("the loader gives no micro-batch: look at the data and at what it filters out")

    def _validation(
        self, step: int, validate: Validate | None, samples: Samples | None, records: Records | None
    ) -> float | None:
        """The score where it is the best so far."""
        if validate is None and samples is None:
            return None
        self.objective.eval()
        with torch.no_grad(), self._precision():  # parameters are gathered as they are in training
            self._seed(step, "validate")
            scores = self.here.of_first(validate() if validate else {"score": math.inf})
            self._seed(step, "samples")
            sounds = samples() if samples else {}
        self._training_mode()
        if "score" not in scores:
            raise ValueError(f'validate must give a "score", it gave {", ".join(scores) or "nothing"}')
        if records:
            if validate:
                records.write(step, "validation", scores)
            records.sound(step, sounds)
        best = self.checkpoints.best
        better = math.isfinite(scores["score"]) and (best is None or scores["score"] < best.score)
        return scores["score"] if better else None

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _training_mode(self) -> None:
        """Frozen parts run as they do at inference."""
        self.objective.train()
        for module in self.objective.modules():
            own = list(module.parameters())
            if own and not any([p.requires_grad for p in own]):
                module.eval()

    def _seed(self, step: int, what: int | str) -> None:
        key = f"{self.settings.seed} {step} {what} {self.here.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)

    def _summary(self) -> str:
        skipped, best = self.guard.skipped, self.checkpoints.best
        steps = ", ".join(map(str, skipped[:20])) + (" …" if len(skipped) > 20 else "")
        return (
            f"{self.settings.steps} steps, {len(skipped)} skipped{f' ({steps})' if skipped else ''}; "
            f"best score {f'{best.score:.6g} at {best.checkpoint.name}' if best else 'not measured'}"
        )


@contextmanager
def _alone(out: Path, here: Processes) -> Iterator[None]:
    """Holds the folder: a run that goes on there beside this one would write over it."""
    import fcntl  # where there are no such locks, there is no gloo

    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        taken = False
        if here.rank == 0:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a killed run's loader does not inherit
            except OSError:
                taken = True
        if here.of_first(taken):
            raise TrainingError(f"another process trains in {out}: wait for it, or end it")
        yield


def _keep_random_state(here: Processes) -> Any:
    """The caller's random state returns when the run ends."""
    return torch.random.fork_rng([here.device.index] if here.device.type == "cuda" else [])
