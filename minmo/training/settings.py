"""What a run of the training loop is told: steps, learning rate, precision, what is kept. Checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("fp32", "bf16")


class TrainingError(ValueError):
    """Why a run cannot begin, continue or go on, in one sentence with what to do."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of `minmo.training.loop.fit`. Raises ValueError, one sentence, for values that make no sense."""

    steps: int
    """Optimizer steps of the whole run, interruptions included."""
    lr: float
    """Highest learning rate of AdamW."""
    warmup: int = 0
    """Steps over which the learning rate rises in a line from 0 to `lr`."""
    schedule: str = "cosine"
    """After the warm-up: `cosine`, down to `final_lr` of `lr` at the last step, or `constant`."""
    final_lr: float = 0.1
    """Share of `lr` that `cosine` ends with."""
    weight_decay: float = 0.01
    """Of matrices and larger tensors; vectors (biases, norms) never decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    accumulate: int = 1
    """Micro-batches of each process in a step."""
    precision: str = "fp32"
    """`fp32`, or `bf16`: the forward pass under autocast and, where sharded, parameters gathered in bfloat16. Master
    weights, optimizer and the sum of gradients over processes are fp32 in either."""
    shard: bool = False
    """FSDP2 over all processes. More than one process needs it."""
    checkpoint_activations: bool = False
    """Blocks compute their activations again in the backward pass."""
    compile: bool = False
    """Blocks go through torch.compile."""
    log_every: int = 10
    validate_every: int = 500
    save_every: int = 500
    keep: int = 3
    """Checkpoints that stay, newest first; the best one stays besides."""
    seed: int = 0
    spike: float = 10.0
    """A step whose loss or gradient norm is beyond this many times the running median is skipped; 1e30
    turns it off."""
    patience: int = 10
    """Skipped steps in a row after which training stops."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factor of the learning rate by prefix of parameter name, as {"encoder.": 0.4}; the longest prefix counts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "accumulate", "log_every", "validate_every", "save_every", "keep", "patience"):
            self._need(name, _whole(getattr(self, name)) and getattr(self, name) >= 1, "a whole number of 1 or more")
        for name in ("warmup", "seed"):
            self._need(name, _whole(getattr(self, name)) and getattr(self, name) >= 0, "a whole number of 0 or more")
        self._need("warmup", self.warmup <= self.steps, f"no more than steps ({self.steps})")
        for name in ("lr", "clip"):
            self._need(name, _number(getattr(self, name)) and 0 < getattr(self, name) < math.inf, "a positive number")
        self._need("final_lr", _number(self.final_lr) and 0 <= self.final_lr <= 1, "a share from 0 to 1")
        self._need("weight_decay", _number(self.weight_decay) and 0 <= self.weight_decay < 1, "at least 0 and below 1")
        self._need(
            "betas", len(self.betas) == 2 and all([_number(b) and 0 <= b < 1 for b in self.betas]), "two from 0 to 1"
        )
        self._need("spike", _number(self.spike) and self.spike > 1, "a number above 1 (1e30 turns it off)")
        self._need("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._need("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        for name in ("shard", "checkpoint_activations", "compile"):
            self._need(name, isinstance(getattr(self, name), bool), "true or false")
        factors = self.lr_scale.values()
        self._need("lr_scale", all([_number(f) and 0 < f < math.inf for f in factors]), "positive numbers by prefix")

    def _need(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1, before `lr_scale`. A function of the step and nothing else."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

    def decisive(self) -> dict[str, Any]:
        """The settings that a continued run must share with the run that it continues, as JSON holds them.

        The others say how the same numbers are computed, or what is written down.
        """
        free = {"accumulate", "shard", "checkpoint_activations", "compile"}
        free |= {"log_every", "validate_every", "save_every", "keep"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in free}
        return values | {"betas": list(self.betas), "lr_scale": dict(self.lr_scale)}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
