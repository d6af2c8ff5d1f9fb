"""What a run writes down as it goes: a line a logged step, TensorBoard, a progress bar, the loss curve at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

LOG, CURVE, BOARD = "log.jsonl", "loss.png", "tensorboard"


class Records:
    """The records of one run in its folder; `with` closes them. What is beyond `step`, from which it goes on, goes."""

    def __init__(self, out: Path, step: int, steps: int) -> None:
        self._out, self._steps = out, steps
        kept = [record for record in read_log(out) if record["step"] <= step]
        part = out / f"{LOG}.tmp"
        part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(part, out / LOG)
        self._log = open(out / LOG, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(out / BOARD), purge_step=step + 1)
        self.console = Console()
        # Refreshed by the loop: a loader forks its workers, which is safest without a thread that draws.
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=self.console, auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=steps, completed=step, note="")

    def __enter__(self) -> Records:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._board.close()
        self._log.close()

    def write(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        """One record: group (`train`, `validation`, `skipped`) and what it holds; numbers go to TensorBoard too."""
        self._log.write(json.dumps({"step": step, "kind": group, **values}) + "\n")
        for name, value in values.items():
            if not isinstance(value, str):
                self._board.add_scalar(f"{group}/{name}", value, step)
        if group == "train":
            self._bar.update(self._task, note=f"loss {values['loss']:.4g}")
        if group != "train" or not self.console.is_terminal:
            shown = ", ".join(f"{k} {_short(v) if isinstance(v, str) else f'{v:.4g}'}" for k, v in values.items())
            self._bar.console.print(f"step {step} {group}: {shown}", markup=False, highlight=False)

    def sound(self, step: int, sounds: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Sounds for TensorBoard: float samples in -1..1, and their rate in Hz."""
        for name, (samples, rate) in sounds.items():
            self._board.add_audio(name, torch.from_numpy(np.asarray(samples, np.float32)), step, sample_rate=rate)

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        self._bar.refresh()

    def curve(self) -> None:
        """Draws `loss.png`: every loss and the validation score over steps."""
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot()
        lines: dict[str, list[tuple[int, float]]] = {}
        for record in read_log(self._out):
            for name, value in record.items():
                if record["kind"] == "train" and (name == "loss" or name.startswith("loss/")):
                    lines.setdefault(name, []).append((record["step"], value))
                elif record["kind"] == "validation" and name == "score":
                    lines.setdefault("validation score", []).append((record["step"], value))
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        if lines and all([not value <= 0 for points in lines.values() for _, value in points]):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if lines:
            axes.legend()
        figure.savefig(self._out / CURVE, dpi=100)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run's folder; the last line, where a killed process left half of it, is left out."""
    if not (out / LOG).is_file():
        return []
    lines = (out / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
