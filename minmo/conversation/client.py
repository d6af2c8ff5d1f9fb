"""A client of one conversation, simulated: it speaks in real time or as fast as can be, plays what it is sent, drops
what it has not played when it interrupts, says what it has played, and keeps a log.

What it says is a recording, or comes from a user who hears what it plays.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soxr

from minmo.audio import resample
from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Fault, Interrupted, Sound, TurnTaken
from minmo.conversation.front import Front, as_it_is
from minmo.conversation.turn_taking import Phase

TICK_MS = 1e3 * TICK / SAMPLE_RATE
TAIL_MS, LONGEST_TAIL_MS = 2_000.0, 30_000.0
"""Silence after the user's last sound: at least, and until a reply that runs is over, at most."""

User = Callable[[np.ndarray], "np.ndarray | None"]
"""Who speaks: told what the loudspeaker plays in the next 80 ms, gives the microphone's sound of these, or None where
there is nothing more to say. Both are (TICK,) float32, 16 kHz."""


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

    def forget(self, before: int) -> None:
        """What was played before that sample is not asked for any more."""
        self._pieces = [piece for piece in self._pieces if piece[1] + len(piece[2]) >= before]

    def played(self, reply: int, now: int) -> int:
        """Samples of a reply that have been played by now."""
        return sum(min(len(sound), max(0, now - begins)) for number, begins, sound in self._pieces if number == reply)

    def window(self, begin: int, end: int) -> np.ndarray:
        """What is played from sample `begin` to before `end`, (end - begin,), as far as it has come."""
        window = np.zeros(end - begin, np.float32)
        for _, begins, sound in reversed(self._pieces):
            if begins + len(sound) <= begin:
                break
            piece = sound[max(0, begin - begins) : max(0, end - begins)]
            at = max(0, begins - begin)
            window[at : at + len(piece)] = piece
        return window

    def spans(self) -> list[tuple[int, int, int]]:
        """(reply, first sample, past the last) of what was played without a gap."""
        spans: list[tuple[int, int, int]] = []
        for reply, begins, sound in self._pieces:
            ends = begins + len(sound)
            if spans and spans[-1][0] == reply and spans[-1][2] == begins:
                spans[-1] = (reply, spans[-1][1], ends)
            else:
                spans.append((reply, begins, ends))
        return spans


class Loudspeaker:
    """What a player plays, 80 ms after 80 ms, as 16 kHz samples (TICK,): what a microphone beside it may pick up.

    Cubic interpolation: it is not late, as a resampler with a filter would be.
    """

    def __init__(self, player: Player) -> None:
        self._player = player
        self._resampler = soxr.ResampleStream(player.rate, SAMPLE_RATE, 1, "float32", "QQ")
        self._ticks = 0
        self._waiting = np.zeros(16, np.float32)

    def tick(self) -> np.ndarray:
        begin, end = (n * TICK * self._player.rate // SAMPLE_RATE for n in (self._ticks, self._ticks + 1))
        self._ticks += 1
        sound = self._resampler.resample_chunk(self._player.window(begin, end))
        self._waiting = np.concatenate([self._waiting, sound])
        tick, self._waiting = self._waiting[:TICK], self._waiting[TICK:]
        return tick


@dataclass
class Recording:
    """What a client has heard and logged.

    user (n,) 16 kHz: its own sound with the silence that followed; assistant (m,): what it played, `rate` samples a
    second, on the same clock. spans: (reply, first sample, past the last) of what it played. log: one entry an event,
    `json_lines` to write it. tick_ms: how long each tick took.
    """

    user: np.ndarray
    assistant: np.ndarray
    rate: int
    spans: list[tuple[int, int, int]] = field(repr=False)
    log: list[dict[str, Any]] = field(repr=False)
    tick_ms: list[float] = field(repr=False)

    def json_lines(self) -> str:
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.log)

    def stereo(self) -> np.ndarray:
        """Both sides at `rate`, (m, 2): left the user, right the assistant."""
        user = resample(self.user, SAMPLE_RATE, self.rate)[: len(self.assistant)]
        return np.stack([np.pad(user, (0, len(self.assistant) - len(user))), self.assistant], 1)


def simulate(
    conversation: Conversation, sound: np.ndarray | User, *, realtime: bool = True, front: Front = as_it_is
) -> Recording:
    """Holds a conversation with a recording, mono 16 kHz float32 samples (n,), or with a user who hears.

    realtime: every tick comes when a microphone would give it, and work that is not done by then makes it late;
    otherwise each tick waits for the work that is due, so that the log and the sound are the same on every machine.
    front: what the microphone's sound passes before the conversation hears it.
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

    speaks = sound if callable(sound) else _recorded(sound)
    loudspeaker = Loudspeaker(player)
    silent_since: float | None = None
    while True:
        at = conversation.now_ms
        if silent_since is not None:
            tail, listens = at - silent_since, conversation.phase is Phase.LISTENING
            if tail >= LONGEST_TAIL_MS or (tail >= TAIL_MS and listens):
                break
        while conversation.next_step:  # one step at least, or a machine that is late would never answer
            receive(conversation.step())
            if realtime and now_ms() >= at + TICK_MS:
                break
        if realtime:
            time.sleep(max(0.0, (at + TICK_MS - now_ms()) / 1e3))
        if reply >= 0:
            conversation.played(reply, 1e3 * player.played(reply, round(now_ms() * rate / 1e3)) / rate)
        far = loudspeaker.tick()
        near = None if silent_since is not None else speaks(far)
        if near is None:
            silent_since = at if silent_since is None else silent_since
            near = np.zeros(TICK, np.float32)
        before = time.perf_counter()
        events = conversation.tick(front(near, far))
        took.append(1e3 * (time.perf_counter() - before))
        heard.append(near)
        receive(events)
    user = np.concatenate(heard)
    return Recording(user, player.window(0, len(user) * rate // SAMPLE_RATE), rate, player.spans(), log, took)


def _recorded(sound: np.ndarray) -> User:
    """A user who says what was recorded, and hears nothing."""
    ticks = iter(np.pad(sound, (0, -len(sound) % TICK)).reshape(-1, TICK))
    return lambda far: next(ticks, None)


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
