"""When the user's voice begins and ends, by loudness alone: it stamps events, trims silence and says where an open turn
begins, and decides no turn. Conversations listen with it, and the full-duplex predictor is trained on what they keep.

Loudness is how far a tick's loudest mel bands lie above the floor of each, which adapts to the room: it falls with a
quieter tick at once and rises slowly. A voice is there once 2 of 3 ticks are loud. Band by band a voice stands out from
noise that is a tenth of its power; the sum over all bands does not show it.
"""

from __future__ import annotations

import numpy as np

from minmo.config import SAMPLE_RATE, TICK

LOUDEST = 8
"""One in so many bands is looked at, the loudest ones above their floors."""
MARGIN = 0.2
"""By which they lie above their floors in a loud tick, on average, in units of the front end's log-mel: 8 dB."""
RISE = 0.004
"""By which a floor rises a tick: 2 dB a second."""
RECENT, LOUD = 3, 2
"""Ticks that are looked at, and how many of them must be loud."""
QUIET = 8
"""Ticks without a loud one that end a voice."""
BEFORE_VOICE = 4
"""LLM positions that stay in front of the first voice of a turn: 300 ms."""
JUST_BEGUN = SAMPLE_RATE
"""Samples since a voice began, up to which it goes on into the turn after a reply."""


class Onset:
    """The user's voice in one stream of ticks, and where their open turn begins.

    began, ended: samples of 16 kHz where the last voice did, None before there was any; turn: where the first voice
    since `new_turn` began, which may have been going on then. A turn begins with its first voice. One that ends while a
    reply is heard let it go on, and belongs to no turn.
    """

    def __init__(self) -> None:
        self.voice = False
        self.began: int | None = None
        self.ended: int | None = None
        self.turn: int | None = None
        self._floor: np.ndarray | None = None
        self._recent: list[int] = []
        """Which of the last ticks were loud, by their numbers."""
        self._ticks = self._turns_ticks = 0
        self._last_loud = 0
        self._told = False
        """Whether `begun` has told of this turn."""

    @property
    def last(self) -> int:
        """Samples of 16 kHz where the last loud tick ended."""
        return self._last_loud * TICK

    def new_turn(self) -> None:
        """Another turn begins with the next tick."""
        self.turn, self._turns_ticks, self._told = None, self._ticks, False

    def go_on(self) -> None:
        """The open turn has begun before the first tick."""
        self.turn, self._told = 0, True

    def reply_over(self) -> None:
        """A reply was heard to its end: a voice that has been there for long was its echo, or let it go on."""
        if self.turn is not None and self._ticks * TICK - self.turn > JUST_BEGUN:
            self.new_turn()

    def begun(self) -> int | None:
        """Once a turn has its first voice: of how many ticks, the last one included, it consists so far. Told once."""
        if self._told or self.turn is None:
            return None
        self._told = True
        return self._ticks - self.turn // TICK + BEFORE_VOICE

    def hear(self, bands: np.ndarray, replying: bool = False) -> bool:
        """Takes one tick's mean log-mel, (n_mels,) -> whether a voice began or ended with it, as `voice` says.
        replying: whether a reply is running."""
        self._floor = bands if self._floor is None else np.minimum(bands, self._floor + RISE)
        above = np.sort(bands - self._floor)[-max(1, len(bands) // LOUDEST) :]
        loud = float(above.mean()) > MARGIN
        self._recent = [tick for tick in self._recent if tick > self._ticks - RECENT]
        if loud:
            self._recent.append(self._ticks)
        self._ticks += 1
        if loud:
            self._last_loud = self._ticks
        turns = [tick for tick in self._recent if tick >= self._turns_ticks]
        if self.turn is None and len(turns) >= LOUD:
            self.turn = turns[0] * TICK
        if not self.voice and len(self._recent) >= LOUD:
            self.voice, self.began = True, self._recent[0] * TICK
            return True
        if self.voice and self._ticks - self._last_loud >= QUIET:
            self.voice, self.ended = False, self._last_loud * TICK
            if replying:
                self.new_turn()
            return True
        return False
