"""Who may speak: a state machine of four phases, driven by the full-duplex predictor's two decisions every 80 ms.

listening -> taking -> speaking -> yielding -> listening; an interruption goes from taking to yielding, too. Thresholds,
how long a decision must stand, and hysteresis are settings; `EAGERNESS` names sets of them. Nothing here computes
anything else, keeps time or draws numbers, so a sequence of probabilities always gives the same turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from minmo.config import is_real, is_whole


class Phase(str, Enum):
    """What the assistant does: hears the user's turn; has decided to answer, and nothing sounds yet; is heard; has
    stopped, and takes in what was heard of its reply."""

    LISTENING = "listening"
    TAKING = "taking"
    SPEAKING = "speaking"
    YIELDING = "yielding"


@dataclass(frozen=True)
class TurnTaking:
    """How sure the predictor must be, and for how long.

    answer, stop: probabilities from which a tick counts for "answer the user now" and for "stop speaking", None where
    that is decided by request alone;
    answer_ticks, stop_ticks: ticks of 80 ms that must count. hysteresis: a run of counting ticks survives those that
    fall short of the threshold by no more than this, which themselves count nothing. Raises ValueError for values out
    of range.
    """

    answer: float | None = 0.7
    answer_ticks: int = 2
    stop: float | None = 0.8
    stop_ticks: int = 1
    hysteresis: float = 0.1

    def __post_init__(self) -> None:
        for name in ("answer", "stop", "hysteresis"):
            value: Any = getattr(self, name)
            if value is None and name != "hysteresis":
                continue
            if not is_real(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability in 0 .. 1, got {value!r}")
        for name in ("answer_ticks", "stop_ticks"):
            value = getattr(self, name)
            if not is_whole(value) or not 1 <= value <= 100:
                raise ValueError(f"{name} counts ticks of 80 ms and must lie between 1 and 100, got {value!r}")

    @property
    def by_request(self) -> bool:
        """Whether the predictor has no say."""
        return self.answer is None and self.stop is None


EAGERNESS = {
    "low": TurnTaking(answer=0.7, answer_ticks=6, stop=0.5, stop_ticks=2),
    "medium": TurnTaking(answer=0.6, answer_ticks=3, stop=0.6, stop_ticks=2),
    "high": TurnTaking(answer=0.4, answer_ticks=1, stop=0.7, stop_ticks=3),
    "auto": TurnTaking(),
}
"""How eager the assistant is to speak: `low` waits long for the user and gives way soon, `high` does the opposite.
`auto` is chosen for nano: to answer, two ticks at the least threshold that hears single words with gaps of 0.2 s as one
turn, wherever they lie on the clock's grid; to stop, the quickest that lets 85 % of validation's back-channels pass."""


BY_REQUEST = TurnTaking(answer=None, stop=None)
"""Turns are taken and replies stopped by request alone: push to talk."""


def eagerness(name: str) -> TurnTaking:
    """The settings of that name. Raises ValueError for one that is not there."""
    if name not in EAGERNESS:
        raise ValueError(f"eagerness must be one of {', '.join(EAGERNESS)}, got {name!r}")
    return EAGERNESS[name]


class Floor:
    """The phase of one conversation. A move that its phase does not allow raises RuntimeError."""

    def __init__(self, settings: TurnTaking) -> None:
        self.settings = settings
        self.phase = Phase.LISTENING
        self._run = 0

    def change(self, settings: TurnTaking) -> None:
        """Decides by other settings from now on."""
        self.settings, self._run = settings, 0

    def hear(self, answer: float, stop: float) -> bool:
        """Takes one tick's probabilities -> whether the phase changed by them: to taking, or to yielding.

        While listening, `answer` decides; while taking and speaking, `stop`; while yielding, neither.
        """
        s = self.settings
        if self.phase is Phase.YIELDING:
            return False
        listening = self.phase is Phase.LISTENING
        value, threshold, ticks = (answer, s.answer, s.answer_ticks) if listening else (stop, s.stop, s.stop_ticks)
        if threshold is None:
            return False
        if value >= threshold:
            self._run += 1
        elif value < threshold - s.hysteresis:
            self._run = 0
        if self._run < ticks:
            return False
        self._move(Phase.TAKING if listening else Phase.YIELDING)
        return True

    def take(self) -> None:
        """The turn is taken by request: listening -> taking."""
        self._leave(Phase.LISTENING)
        self._move(Phase.TAKING)

    def speak(self) -> None:
        """The first sound is on its way to the user: taking -> speaking."""
        self._leave(Phase.TAKING)
        run = self._run
        self._move(Phase.SPEAKING)
        self._run = run  # who interrupts goes on doing so

    def give_way(self) -> None:
        """The reply is over, or is cut by request: taking or speaking -> yielding."""
        self._leave(Phase.TAKING, Phase.SPEAKING)
        self._move(Phase.YIELDING)

    def listen(self) -> None:
        """What was heard of the reply has been taken in: yielding -> listening."""
        self._leave(Phase.YIELDING)
        self._move(Phase.LISTENING)

    def correct(self) -> None:
        """What was heard turns out to be less: listening or yielding -> yielding."""
        self._leave(Phase.LISTENING, Phase.YIELDING)
        self._move(Phase.YIELDING)

    def _leave(self, *phases: Phase) -> None:
        if self.phase not in phases:
            raise RuntimeError(f"the assistant is {self.phase.value}: it cannot do this from there")

    def _move(self, phase: Phase) -> None:
        self.phase, self._run = phase, 0
