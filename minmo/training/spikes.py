"""Steps that would harm: a loss or gradient norm that is not finite, or far beyond what the run has seen lately."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from minmo.training.settings import TrainingError

WINDOW = 100
"""Accepted steps whose median is the measure."""
ENOUGH = 10
"""Accepted steps before which only what is not finite is a spike."""
NAMED = 20
"""Items that a message names, newest batches first."""


class SpikeGuard:
    """Judges every step. skipped: the steps that it refused so far."""

    def __init__(self, spike: float, patience: int) -> None:
        self._spike, self._patience = spike, patience
        self._seen: dict[str, deque[float]] = {
            "loss": deque(maxlen=WINDOW),
            "gradient norm": deque(maxlen=WINDOW),
        }
        self._row: list[list[str]] = []
        self.skipped: list[int] = []

    def fault(self, loss: float, norm: float) -> str | None:
        """Why a step must not be taken, in words; None where it may, and then it counts as seen."""
        values = {"loss": loss, "gradient norm": norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
            seen = self._seen[name]
            usual = median(seen) if len(seen) >= ENOUGH else 0.0
            if usual > 0 and value > self._spike * usual:
                return f"the {name} is {value:.4g}, usually {usual:.4g}"
        for name, value in values.items():
            self._seen[name].append(value)
        self._row.clear()
        return None

    def skip(self, step: int, fault: str, ids: list[str]) -> None:
        """Counts a refused step; ids: its items, of all processes. Raises TrainingError where the patience is over."""
        self.skipped.append(step)
        self._row.append(ids)
        if len(self._row) >= self._patience:
            items = [i for batch in reversed(self._row) for i in batch]
            named = ", ".join(items[:NAMED]) + (f" and {len(items) - NAMED} more" if len(items) > NAMED else "")
            raise TrainingError(
                f"training stopped at step {step}: {len(self._row)} in a row were skipped, the last because "
                f"{fault}; look at their items ({named}; all are in log.jsonl), or lower lr, or raise spike or patience"
            )

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"seen": {k: list(v) for k, v in self._seen.items()}, "row": list(self._row), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state["seen"].items():
            self._seen[name] = deque(values, maxlen=WINDOW)
        self._row = [list(batch) for batch in state["row"]]
        self.skipped = list(state["skipped"])
