"""Time as every measurement here takes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch


def now(device: torch.device) -> float:
    """Seconds on a steady clock, after a GPU has finished what it was given on the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation between the two nearest samples."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
