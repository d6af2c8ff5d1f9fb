"""A client of one conversation, simulated on a recording: it speaks in real time or as fast as can be, plays what it is
sent, drops what it has not played when it interrupts, says what it has played, and keeps a log.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Fault, Interrupted, Sound, TurnTaken
from minmo.conversation.turn_taking import Phase

TICK_MS = 1e3 * TICK / SAMPLE_RATE
TAIL_MS, LONGEST_TAIL_MS = 2_000.0, 30_000.0
"""Silence after the recording: at least, and until a reply that runs is over, at most."""


class Player:
    """Plays sound as it comes, one piece after another, on a clock of its rate's samples."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._pieces: list[tuple[int, int, np.ndarray]] = []
        """(reply, when it begins, samples)."""

    @property
    def ends(self) -> int:
        """When all that came will have been played."""
        return self._pieces[-1][1] + len(self._pieces[-1][2]) if self._pieces else 0

    def receive(self, now: int, reply: int, sound: np.ndarray) -> None:
        """Sound (n,) of a reply has come: it plays now, or after what came before."""
        self._pieces.append((reply, max(now, self.ends), sound))

    def stop(self, now: int) -> int:
        """Drops what has not been played by now -> when the last sound was played."""
        self._pieces = [(reply, begins, sound[: max(0, now - begins)]) for reply, begins, sound in self._pieces]
        self._pieces = [piece for piece in self._pieces if len(piece[2])]
        return self.ends

    def played(self, reply: int, now: int) -> int:
        """Samples of a reply that have been played by now."""
        return sum(min(len(sound), max(0, now - begins)) for number, begins, sound in self._pieces if number == reply)

    def track(self, length: int) -> np.ndarray:
        """What was heard, from the beginning, as `length` samples (length,)."""
        track = np.zeros(max(length, self.ends), np.float32)
        for _, begins, sound in self._pieces:
            track[begins : begins + len(sound)] = sound
        return track[:length]


@dataclass
class Recording:
    """What a client has heard and logged.

    user (n,) 16 kHz: its own sound with the silence that followed; assistant (m,): what it played, `rate` samples a
    second, on the same clock. log: one entry an event, `json_lines` to write it. tick_ms: how long each tick took.
    """

    user: np.ndarray
    assistant: np.ndarray
    rate: int
    log: list[dict[str, Any]] = field(repr=False)
    tick_ms: list[float] = field(repr=False)

    def json_lines(self) -> str:
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.log)


def simulate(conversation: Conversation, sound: np.ndarray, *, realtime: bool = True) -> Recording:
    """Holds a conversation with a recording, mono 16 kHz float32 samples (n,).

    realtime: every tick comes when a microphone would give it, and work that is not done by then makes it late;
    otherwise each tick waits for the work that is due, so that the log and the sound are the same on every machine.
    Raises FloatingPointError where the conversation breaks off.
    """
    player, rate = Player(conversation.rate), conversation.rate
    log: list[dict[str, Any]] = []
    took: list[float] = []
    heard: list[np.ndarray] = []
    began, reply = time.perf_counter(), -1

    def now_ms() -> float:
        return 1e3 * (time.perf_counter() - began) if realtime else conversation.now_ms

    def receive(events: Sequence[Event]) -> None:
        nonlocal reply
        for event in events:
            now = round(now_ms() * rate / 1e3)
            entry = _entry(event) | ({"lag_ms": round(now_ms() - event.at_ms, 1)} if realtime else {})
            if isinstance(event, Fault):
                raise FloatingPointError(event.why)
            if isinstance(event, TurnTaken):
                reply = event.reply
            elif isinstance(event, Sound):
                player.receive(now, event.reply, event.audio)
            elif isinstance(event, Interrupted):
                last = player.stop(now)
                if event.decided_ms is not None:  # counted from the same voice's begin
                    entry["stopped_ms"] = round(max(0.0, 1e3 * last / rate - (event.at_ms - event.decided_ms)), 1)
            log.append(entry)

    padded = np.pad(sound, (0, -len(sound) % TICK))
    end_ms = 1e3 * len(padded) / SAMPLE_RATE
    while True:
        at = conversation.now_ms
        speaks = conversation.phase is not Phase.LISTENING
        if at >= end_ms + LONGEST_TAIL_MS or (at >= end_ms + TAIL_MS and not speaks):
            break
        start = len(heard) * TICK
        samples = padded[start : start + TICK] if start < len(padded) else np.zeros(TICK, np.float32)
        while conversation.next_step:  # one step at least, or a machine that is late would never answer
            receive(conversation.step())
            if realtime and now_ms() >= at + TICK_MS:
                break
        if realtime:
            time.sleep(max(0.0, (at + TICK_MS - now_ms()) / 1e3))
        if reply >= 0:
            conversation.played(reply, 1e3 * player.played(reply, round(now_ms() * rate / 1e3)) / rate)
        before = time.perf_counter()
        events = conversation.tick(samples)
        took.append(1e3 * (time.perf_counter() - before))
        heard.append(samples)
        receive(events)
    user = np.concatenate(heard)
    return Recording(user, player.track(len(user) * rate // SAMPLE_RATE), rate, log, took)


def _entry(event: Event) -> dict[str, Any]:
    """An event as a line of the log; of sound it says how much there is."""
    entry: dict[str, Any] = {"event": type(event).__name__}
    for item in dataclasses.fields(event):
        value = getattr(event, item.name)
        if isinstance(value, np.ndarray):
            entry["samples"] = len(value)
        else:
            entry[item.name] = round(value, 4) if isinstance(value, float) else value
    return entry
