"""Checkpoints of a run: written beside training, whole or absent, and continued from on any number of processes.

`step-000123/` is a PyTorch distributed checkpoint of the trained parameters and their optimizer state, with `run.json`
(step, settings, names and shapes, spike guard, the best checkpoint so far) and `loader.pt` (position in the data). It
is written as `step-000123.tmp` and renamed when every byte of every process is on the disk. Random states are not kept:
the loop draws from (seed, step) alone.

A checkpoint's metadata (PyTorch's `.metadata`) is a pickle: continue only from folders that you trust.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from minmo.training.parallel import Processes, processes
from minmo.training.settings import LoopSettings, TrainingError

_WHOLE = re.compile(r"step-(\d{6,})")
_RUN, _LOADER = "run.json", "loader.pt"


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest validation score."""

    checkpoint: Path
    score: float


def whole(out: Path) -> list[Path]:
    """Whole checkpoints of a run's folder, oldest first."""
    found = [path for path in out.glob("step-*") if _WHOLE.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest(out: Path) -> str:
    """In words, for errors."""
    found = whole(out)
    return f"the last whole checkpoint is {found[-1].name if found else 'none'}"


def step_of(checkpoint: Path) -> int:
    match = _WHOLE.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not a checkpoint: its name must be step- and a number")
    return int(match[1])


def best(out: Path) -> Best | None:
    """As the newest checkpoint knows it; None where no validation gave a score yet, or its checkpoint is gone."""
    found = whole(out)
    stored = _run(found[-1])["best"] if found else None
    if stored is None or not (out / stored["checkpoint"]).is_dir():
        return None
    return Best(out / stored["checkpoint"], stored["score"])


def load_trained(checkpoint: Path, module: nn.Module) -> None:
    """Copies a checkpoint's parameters into a module of the names that it was saved under; the rest stays.

    For what follows training, on a module that is not sharded; where many processes run, each of them calls it. Raises
    TrainingError where a name or shape is not the module's.
    """
    stored = {name: torch.Size(shape) for name, shape in _run(checkpoint)["parameters"].items()}
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, shape in stored.items():
        if name not in own or own[name].shape != shape:
            raise TrainingError(f"{checkpoint} holds {name!r} of shape {tuple(shape)}, which this module has not")
    with processes() as here:
        _read({"parameters": {name: own[name] for name in stored}}, checkpoint, here.group)


class Checkpoints:
    """Writes and reads the checkpoints of one run. Every process has one and calls the same methods in the same order.

    parameters: what is trained, by name, sharded or not. optimizer: with a state for each of them. extra: gives what
    `run.json` keeps besides, and takes it back (`state_dict`, `load_state_dict`), the same on every process. loader:
    its state must not depend on the process: the first one's is kept for all.
    """

    def __init__(
        self,
        out: Path,
        settings: LoopSettings,
        here: Processes,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loader: Any,
        extra: Any,
    ) -> None:
        self._out, self._settings, self._here = out, settings, here
        self._parameters, self._optimizer, self._loader, self._extra = parameters, optimizer, loader, extra
        self._shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        self._pending: Future[Any] | None = None
        # Of its own: a save talks between processes from its thread while the loop does so from its own.
        self._group = dist.new_group(backend="gloo")
        if here.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            for torn in out.glob("step-*.tmp"):
                shutil.rmtree(torn)
        here.wait()
        self.best = here.of_first(best(out) if here.rank == 0 else None)

    def _tensors(self) -> dict[str, dict[str, Any]]:
        """What the distributed checkpoint holds; loading copies into these very tensors."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optimizer": {name: self._optimizer.state[parameter] for name, parameter in self._parameters.items()},
        }

    def resume(self) -> int:
        """Continues from the newest whole checkpoint: its step, 0 where there is none.

        Raises TrainingError for one of other settings or parameters.
        """
        checkpoints = self._here.of_first(whole(self._out))
        if not checkpoints:
            return 0
        checkpoint = checkpoints[-1]
        run = _run(checkpoint)
        for kind, stored, own in (
            ("the setting", run["settings"], json.loads(json.dumps(self._settings.decisive()))),
            ("the parameter", run["parameters"], self._shapes),
        ):
            for name in sorted(stored.keys() | own.keys()):
                if stored.get(name) != own.get(name):
                    raise TrainingError(
                        f"{checkpoint} is of another run: {kind} {name} was {_shown(stored, name)} there and is "
                        f"{_shown(own, name)} here; train as before, or into another folder"
                    )
        _read(self._tensors(), checkpoint, self._here.group)
        self._extra.load_state_dict(run["extra"])
        try:
            position = torch.load(checkpoint / _LOADER, weights_only=True)
        except Exception as error:  # whatever a broken archive makes the reader stumble over
            raise TrainingError(_broken(checkpoint, error)) from error
        self._loader.load_state_dict(position)
        return int(run["step"])

    def save(self, step: int, score: float | None = None) -> None:
        """Begins to write a checkpoint and returns when the state is copied. score: where it is the best so far.

        Raises TrainingError where the save before it failed.
        """
        self.settle()
        final = self._out / f"step-{step:06d}"
        part = final.with_name(final.name + ".tmp")
        if score is not None:
            self.best = Best(final, score)
        files = {}
        if self._here.rank == 0:
            run = {
                "step": step,
                "settings": self._settings.decisive(),
                "parameters": self._shapes,
                "extra": self._extra.state_dict(),
                "best": {"checkpoint": self.best.checkpoint.name, "score": self.best.score} if self.best else None,
            }
            position = io.BytesIO()
            torch.save(self._loader.state_dict(), position)
            files = {_RUN: json.dumps(run, indent=1).encode(), _LOADER: position.getvalue()}
        self._pending = dcp.async_save(
            self._tensors(),
            storage_writer=dcp.FileSystemWriter(part, sync_files=True),
            process_group=self._group,
        )
        if self._here.rank == 0:
            thread = ThreadPoolExecutor(1)
            self._pending = thread.submit(self._finish, self._pending, final, part, files, self.best)
            thread.shutdown(wait=False)

    def _finish(
        self, written: Future[Any], final: Path, part: Path, files: dict[str, bytes], at_best: Best | None
    ) -> None:
        """On the first process, when all have written: the small files, the name, and what need not stay."""
        try:
            written.result()
            for name, content in files.items():
                _write(part / name, content)
            os.rename(part, final)
            _sync(self._out)
        except BaseException as error:
            free = shutil.disk_usage(self._out).free / 1e6
            shutil.rmtree(part, ignore_errors=True)  # what was written of it fills the disk
            raise TrainingError(
                f"{final.name} could not be written to {self._out} ({free:.0f} MB are free there; {_cause(error)}); "
                f"{newest(self._out)}: make room and start again"
            ) from error
        stays = {*whole(self._out)[-self._settings.keep :], at_best.checkpoint if at_best else final}
        for old in whole(self._out):
            if old not in stays:
                # Renamed first, so that a name of a whole checkpoint never stands for half of one.
                shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed on this process."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until this process has nothing more to write."""
        if self._pending is not None:
            wait([self._pending])

    def settle(self) -> None:
        """Until the save under way is whole. Raises TrainingError on every process where it failed on one."""
        self.wait()
        error = self._pending.exception() if self._pending is not None else None
        self._pending = None
        faults = [fault for fault in self._here.of_all(str(error) if error else None) if fault]
        if faults:
            raise error if isinstance(error, TrainingError) else TrainingError(faults[0])


def _run(checkpoint: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((checkpoint / _RUN).read_text(encoding="utf-8"))
        missing = {"step", "settings", "parameters", "extra", "best"} - set(run)
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{checkpoint} is not a checkpoint of this loop ({error}); name or keep another") from None
    if missing:
        raise TrainingError(f"{checkpoint / _RUN} lacks {', '.join(sorted(missing))}; name or keep another checkpoint")
    return run


def _read(tensors: dict[str, dict[str, Any]], checkpoint: Path, group: Any) -> None:
    try:
        dcp.load(tensors, checkpoint_id=checkpoint, process_group=group)
    except CheckpointException as error:
        raise TrainingError(_broken(checkpoint, error)) from error


def _broken(checkpoint: Path, error: BaseException) -> str:
    return f"{checkpoint} cannot be read ({_cause(error)}); move it away to continue from the one before it"


def _cause(error: BaseException) -> str:
    """One line; the distributed checkpoint's own error is a list of stack traces."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    lines = [str(cause).strip() for cause, _ in failures.values()] or [str(error).strip()]
    return f"{lines[0]:.200}".splitlines()[0] if lines[0] else type(error).__name__


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """So that a rename outlives a loss of power; a folder cannot be opened everywhere."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
