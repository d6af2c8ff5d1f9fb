"""The user's side of a conversation's clock: a conversation moves by the sound that it hears, so where a client sends
none, silence is heard in its place, at the speed of time.

Sound that came lasts as long as it is, from when it came or from the end of what came before; so a client that sends
ten seconds at once, every ten seconds, is no different from one that sends a millisecond at a time.
"""

from __future__ import annotations

from collections import deque

from minmo.config import SAMPLE_RATE, TICK

TICK_S = TICK / SAMPLE_RATE
LATE_S = 0.2
"""Sound may come so late before silence takes its place."""
AT_ONCE = 5
"""Most ticks of silence at once: of a longer gap, while nobody asked, the rest is forgotten."""


class Microphone:
    """Seconds are those of a steady clock; milliseconds count the conversation's sound."""

    def __init__(self) -> None:
        self._until = self._ended = 0.0
        """When the sound that has come is over, silence in its place included, and without."""
        self._heard_ms = self._silent_ms = 0.0
        self._gaps: deque[tuple[float, float]] = deque()
        """(at which millisecond of the conversation, how long) silence was put in, the newest."""

    def came(self, now: float, ms: float) -> None:
        """The client sent so much sound."""
        self._until = self._ended = max(now, self._until) + ms / 1e3
        self._heard_ms += ms

    def rest(self, now: float) -> None:
        """The user's turn is over: time goes on from here, whatever sound came ahead of it."""
        self._until, self._ended = min(self._until, now), min(self._ended, now)

    def dropped(self, ms: float) -> None:
        """So much of what came will never be heard: it was cleared before."""
        self._heard_ms -= ms
        self._silent_ms -= ms

    @property
    def heard_ms(self) -> float:
        """What has come, and silence in its place, in all."""
        return self._heard_ms

    def missing(self, now: float) -> int:
        """Ticks of silence that are due now; they count as heard."""
        if now - self._until < max(LATE_S, TICK_S):
            return 0
        due = int((now - self._until) / TICK_S)
        if due > AT_ONCE:
            due, self._until = AT_ONCE, now - AT_ONCE * TICK_S
        self._until += due * TICK_S
        ms = 1e3 * due * TICK_S
        if self._gaps and sum(self._gaps[-1]) >= self._heard_ms:
            at, length = self._gaps.pop()
            self._gaps.append((at, length + ms))
        else:
            self._gaps.append((self._heard_ms, ms))
        self._heard_ms += ms
        if len(self._gaps) > 100:
            self._silent_ms += self._gaps.popleft()[1]
        return due

    def ahead_ms(self, at_ms: float) -> float:
        """How much more has come, and silence in its place, than a conversation has heard by then."""
        return self._heard_ms - at_ms

    def since(self, now: float) -> float:
        """Seconds since the client's own sound ended."""
        return max(0.0, now - self._ended)

    def client_ms(self, at_ms: float) -> int:
        """A time of the conversation as milliseconds of the sound that the client sent."""
        silent = self._silent_ms + sum(min(length, max(0.0, at_ms - at)) for at, length in self._gaps)
        return max(0, round(at_ms - silent))
