"""When the user's voice begins and ends, by loudness alone: it stamps events and trims silence, and decides no turn.

Loudness is a tick's mean log-mel energy, and the floor adapts to the room: it falls with a quieter tick at once and
rises slowly. A voice is there once 2 of 3 ticks lie above the floor by a margin.
"""

from __future__ import annotations

from collections import deque

from minmo.config import TICK

MARGIN = 0.2
"""Above the floor, in units of the front end's log-mel: 8 dB."""
RISE = 0.004
"""By which the floor rises a tick: 2 dB a second."""
RECENT, LOUD = 3, 2
"""Ticks that are looked at, and how many of them must be loud."""
QUIET = 8
"""Ticks without a loud one that end a voice."""


class Onset:
    """The user's voice in one stream of ticks. began, ended: samples of 16 kHz where the last voice did, None before
    there was any."""

    def __init__(self) -> None:
        self.voice = False
        self.began: int | None = None
        self.ended: int | None = None
        self._floor: float | None = None
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._ticks = 0
        self._last_loud = 0

    @property
    def last(self) -> int:
        """Samples of 16 kHz where the last loud tick ended."""
        return self._last_loud * TICK

    def hear(self, loudness: float) -> bool:
        """Takes one tick's mean log-mel -> whether a voice began or ended with it, as `voice` says."""
        self._floor = loudness if self._floor is None else min(loudness, self._floor + RISE)
        loud = loudness > self._floor + MARGIN
        self._recent.append(loud)
        self._ticks += 1
        if loud:
            self._last_loud = self._ticks
        if not self.voice and sum(self._recent) >= LOUD:
            first = self._ticks - len(self._recent) + self._recent.index(True)
            self.voice, self.began = True, first * TICK
            return True
        if self.voice and self._ticks - self._last_loud >= QUIET:
            self.voice, self.ended = False, self._last_loud * TICK
            return True
        return False
