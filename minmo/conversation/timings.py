"""Where a turn's time goes: samples by stage, and their percentiles."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from minmo.clock import now, percentile

STAGES = (
    "resampler to 16 kHz (delay, no compute)",
    "front end + encoder (80 ms of sound)",
    "input projector (80 ms of sound)",
    "LLM prefill + duplex predictor (80 ms of sound)",
    "prompt prefill",
    "first text token",
    "5 text tokens",
    "15 speech tokens",
    "token2wav, flow",
    "token2wav, vocoder",
    "end of input -> first text token",
    "end of input -> first 15 speech tokens",
    "end of input -> first audio chunk",
    "end of input -> end of reply",
)
"""Every stage, in the order of a turn. The first is there where the sound had another rate. The last four are
counted from the end of the input, compute only."""
(
    RESAMPLER,
    ENCODER,
    PROJECTOR,
    LISTEN,
    PREFILL,
    FIRST_TEXT,
    FIVE_TEXT,
    SPEECH_BLOCK,
    FLOW,
    VOCODER,
    TO_TEXT,
    TO_SPEECH,
    TO_AUDIO,
    TOTAL,
) = STAGES


KEPT = 10_000
"""Samples of a stage that are kept, the newest: a session may last for hours."""


@dataclass
class Timings:
    """Seconds by stage, in order of measurement."""

    samples: dict[str, deque[float]] = field(default_factory=lambda: {stage: deque(maxlen=KEPT) for stage in STAGES})

    def add(self, stage: str, seconds: float) -> None:
        self.samples[stage].append(seconds)

    @contextlib.contextmanager
    def measure(self, stage: str, device: torch.device) -> Iterator[None]:
        """Times the block; on a GPU until its work is done."""
        start = now(device)
        yield
        self.add(stage, now(device) - start)

    def merge(self, other: Timings) -> None:
        for stage, values in other.samples.items():
            self.samples[stage].extend(values)

    def table(self) -> list[tuple[str, int, float, float]]:
        """(stage, number of samples, p50 ms, p95 ms) for every stage that was measured."""
        return [(s, len(v), 1e3 * percentile(v, 50), 1e3 * percentile(v, 95)) for s, v in self.samples.items() if v]


class Clock:
    """Times one answer: laps between neighbouring events, marks (once each) from the end of the input."""

    def __init__(self, timings: Timings, device: torch.device) -> None:
        self._timings, self._device = timings, device
        self._start = self._last = now(device)
        self._marked: set[str] = set()

    def skip(self) -> None:
        """The next lap begins here."""
        self._last = now(self._device)

    def lap(self, stage: str) -> None:
        """Adds the time since the last lap to a stage."""
        last, self._last = self._last, now(self._device)
        self._timings.add(stage, self._last - last)

    def mark(self, stage: str) -> None:
        if stage not in self._marked:
            self._marked.add(stage)
            self._timings.add(stage, now(self._device) - self._start)
