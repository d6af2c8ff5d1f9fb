"""A reply's sound on its way to the user: paced on the conversation's clock, dropped at once when the reply is cut.

Times and lengths are samples of the reply's rate. Every reply has a generation; what was made for an earlier one cannot
be put in any more.
"""

from __future__ import annotations

from collections import deque

import numpy as np


class Playback:
    """The sound of one conversation's newest reply.

    ahead: samples that may have been sent beyond what time allows to have been played. sent, queued, total: samples of
    this reply that were sent, wait, and were made in all. ends: when what was sent will have been played by a client
    that plays it as it comes. acknowledged: samples that the client says it has played, None where it never said.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self.generation = 0
        self._begin()

    def _begin(self) -> None:
        self._queue: deque[np.ndarray] = deque()
        self.sent = self.queued = self.ends = 0
        self.last_sent: int | None = None
        """When sound was last sent."""
        self.acknowledged: int | None = None
        self.complete = False
        """Whether all of the reply's sound has been made."""

    def begin(self) -> int:
        """A new reply begins, and what is left of the last one is dropped -> its generation."""
        self.generation += 1
        self._begin()
        return self.generation

    def drop(self) -> None:
        """The reply is cut: nothing more of it is sent, and nothing more of it can be put in."""
        self.generation += 1
        self._queue.clear()
        self.queued = 0

    def put(self, generation: int, sound: np.ndarray, last: bool) -> None:
        """Adds sound (n,) of a generation, `last` with its last; of an earlier generation nothing is kept."""
        if generation != self.generation:
            return
        if len(sound):
            self._queue.append(sound)
            self.queued += len(sound)
        self.complete |= last

    def send(self, now: int) -> np.ndarray:
        """The sound that may go to the user now, (n,): until it is `ahead` of what can have been played."""
        return self._send(now, self._ahead - max(0, self.ends - now))

    def rest(self, now: int) -> np.ndarray:
        """All that waits, (n,), for a user who will not interrupt any more."""
        return self._send(now, self.queued)

    def _send(self, now: int, room: int) -> np.ndarray:
        pieces = []
        while self._queue and room > 0:
            piece = self._queue.popleft()
            if len(piece) > room:
                self._queue.appendleft(piece[room:])
                piece = piece[:room]
            room -= len(piece)
            pieces.append(piece)
        if not pieces:
            return np.zeros(0, np.float32)
        sound = np.concatenate(pieces)
        self.queued -= len(sound)
        self.sent += len(sound)
        self.ends, self.last_sent = max(now, self.ends) + len(sound), now
        return sound

    def acknowledge(self, played: int) -> None:
        """The client has played so many samples of this reply. Raises ValueError for more than were sent."""
        if not 0 <= played <= self.sent:
            raise ValueError(f"{played} samples cannot have been played: {self.sent} of this reply were sent")
        self.acknowledged = max(played, self.acknowledged or 0)

    @property
    def heard(self) -> int:
        """Samples that the user has heard: as acknowledged, else what was sent."""
        return self.sent if self.acknowledged is None else self.acknowledged

    @property
    def all_sent(self) -> bool:
        return self.complete and not self.queued

    def over(self, now: int) -> bool:
        """Whether all of the reply has been sent and has had the time to be played."""
        return self.all_sent and now >= self.ends
