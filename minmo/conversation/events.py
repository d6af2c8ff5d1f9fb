"""What a conversation tells whoever drives it. at_ms: milliseconds of the user's sound that it has heard by then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from minmo.conversation.turn_taking import Phase


@dataclass(frozen=True)
class Event:
    at_ms: float


@dataclass(frozen=True)
class Decision(Event):
    """Every tick's: the predictor's probabilities of "answer now" and "stop speaking", and the phase that followed."""

    answer: float
    stop: float
    phase: Phase


@dataclass(frozen=True)
class SpeechStarted(Event):
    """The user's voice began, where the onset detector puts it."""

    audio_start_ms: float


@dataclass(frozen=True)
class SpeechStopped(Event):
    """The user's voice ended."""

    audio_end_ms: float


@dataclass(frozen=True)
class TurnTaken(Event):
    """The assistant answers; its replies are numbered from 0. voice_ended_ms: where the user's voice ended; `at_ms`
    where none was noticed in the turn."""

    reply: int
    voice_ended_ms: float


@dataclass(frozen=True)
class UserText(Event):
    """What the user said in the turn that a reply answers; where it could not be transcribed, the empty text and why.
    Comes when there is time for it, perhaps after the reply."""

    reply: int
    text: str
    fault: str = ""


@dataclass(frozen=True)
class TextDelta(Event):
    """The next words of a reply, which run ahead of its sound."""

    reply: int
    text: str


@dataclass(frozen=True, eq=False)
class Sound(Event):
    """The next sound of a reply: mono float32 samples of the vocoder's rate; start: the number of its first one."""

    reply: int
    start: int
    audio: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class ReplyDone(Event):
    """All of a reply has been sent; it may still be playing. whole: its text came to an end, and was not cut at
    `Settings.max_text_tokens`."""

    reply: int
    text: str
    whole: bool = True


@dataclass(frozen=True)
class Interrupted(Event):
    """A reply was cut; a client drops at once what it has not played.

    by_user: the predictor decided so, not a request. text: what was heard of it, of heard_ms of its sound. decided_ms,
    sent_ms, played_ms: how long after the interrupting voice began the decision came, sound was last sent, and the last
    sound ends in a client that plays on; None where no voice was noticed or nothing sounded.
    """

    reply: int
    by_user: bool
    text: str
    heard_ms: float
    decided_ms: float | None
    sent_ms: float | None
    played_ms: float | None


@dataclass(frozen=True)
class Fault(Event):
    """The conversation has ended before its time, and why."""

    why: str
