"""How a scheduler does: what it has measured of ticks, first audio and stops, and what waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from minmo.clock import percentile

KEPT = 10_000
"""Measurements of a kind that are kept, the newest."""
MEASURED = ("tick", "first_audio", "stop_decided", "stop_sent", "stop_played")


@dataclass(frozen=True)
class Spread:
    """Of `count` measurements in milliseconds; 0 where there is none."""

    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(len(values), *(percentile(values, p) for p in (50, 95, 99))) if values else cls()


@dataclass(frozen=True)
class Statistics:
    """Since the beginning; spreads are of the newest 10,000.

    sessions: that run. ticks: heard. tick_ms: from when a tick's sound was there until its events were told.
    deadline_misses: ticks that took more than 80 ms. lag_ms: how long the oldest tick that is due waits now.
    first_audio_ms: from the end of the user's voice (of a turn taken by request, from the request) to the reply's first
    sound. stop_decided_ms, stop_sent_ms, stop_played_ms: from the begin of the voice that interrupts to the decision,
    to the last sound sent, and to where the last sound ends in a client that plays on. waiting: ticks, conversations
    by their next step, and transcripts that wait. steps: batches computed, by kind. busy_s: seconds spent on them.
    """

    sessions: int
    ticks: int
    tick_ms: Spread
    deadline_misses: int
    lag_ms: float
    first_audio_ms: Spread
    stop_decided_ms: Spread
    stop_sent_ms: Spread
    stop_played_ms: Spread
    waiting: dict[str, int]
    steps: dict[str, int]
    busy_s: float


class Meter:
    """What is measured, in one thread, and read in others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, deque[float]] = {name: deque(maxlen=KEPT) for name in MEASURED}
        self._steps: dict[str, int] = {}
        self._ticks = self._misses = 0
        self._busy = 0.0

    def add(self, name: str, ms: float) -> None:
        with self._lock:
            self._values[name].append(ms)

    def tick(self, ms: float, longest_ms: float) -> None:
        with self._lock:
            self._values["tick"].append(ms)
            self._ticks += 1
            self._misses += ms > longest_ms

    def step(self, kind: str, seconds: float) -> None:
        with self._lock:
            self._steps[kind] = self._steps.get(kind, 0) + 1
            self._busy += seconds

    def statistics(self, sessions: int, lag_ms: float, waiting: dict[str, int]) -> Statistics:
        with self._lock:
            values = {name: list(kept) for name, kept in self._values.items()}
            steps, ticks, misses, busy = dict(self._steps), self._ticks, self._misses, self._busy
        spreads = {f"{name}_ms": Spread.of(kept) for name, kept in values.items()}
        return Statistics(
            sessions=sessions,
            ticks=ticks,
            deadline_misses=misses,
            lag_ms=lag_ms,
            waiting=waiting,
            steps=steps,
            busy_s=busy,
            **spreads,
        )
