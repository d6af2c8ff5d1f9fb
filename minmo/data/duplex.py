"""What the full-duplex predictor learns: labels of an open user turn from the times of a dialogue's events, and scores.

Source: arXiv 2501.06282, section 3.4. The assistant's turn begins where the user's ends; the user takes the turn back T
after the assistant's end, T ~ N(0.6, 0.4^2) s, or by barging in; a back-channel is a voice that does not. Labels are 0,
then 1 on the last positions of the open turn. Times are samples of 16 kHz, and voices lie without silence around them:
an event ends at the voice's last sound, or where a reply was cut off. LLM positions of 80 ms count on one grid over the
whole dialogue; a position belongs to what has happened when it is complete.

A session hears an open turn anew once it notices the turn's first voice (`begun_turns`): from there on the turn is what
followed, and nothing before it is heard with it. What an open turn was and what it becomes are samples of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.data.draws import draws
from minmo.tokenizer.onset import Onset
from minmo.tokenizer.text import CHAT, TextTokenizer

UNSUPERVISED = -100
"""Label of a position that has no part in the loss."""
SOUND = -1
"""Stands for an LLM position of sound in a list of token ids."""
ANSWER_GAP = 8 * TICK
"""Samples after the user's end during which the answer is due: the positive positions of turn taking."""
DELAY_MEAN, DELAY_DEVIATION = 0.6, 0.4

KINDS = {
    "user": "a turn of the user's that begins while the assistant is silent",
    "barge_in": "a turn of the user's that begins while the assistant speaks, and takes over",
    "backchannel": "the user's voice while the assistant speaks, without taking over",
    "assistant": "a turn of the assistant's; its text is what was heard of it",
    "pause": "silence inside a turn of the user's; its text is what was said before it, where known",
    "noise": "a sound in the user's channel that is no voice",
}
USER_TURNS = ("user", "barge_in")


@dataclass(frozen=True)
class Event:
    """What happens from sample `start` to before sample `end` of a dialogue; kind: one of KINDS."""

    kind: str
    start: int
    end: int
    text: str = ""


@dataclass(frozen=True)
class Begun:
    """A turn's first voice was noticed with LLM position `at`; the turn consists of those from `start` on."""

    at: int
    start: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One open user turn and its labels.

    turn: how many exchanges precede it. replying: whether the last one's reply is still being spoken: then barge-in is
    decided, else turn taking. closed: those exchanges, (the user's LLM positions, the assistant's text), the text empty
    where it is being spoken. open: LLM positions of the open turn. since: for each turn of `closed` and for `open`, the
    position with which the encoder began to hear it. turn_taking, barge_in: (len(open),) int64 of 0, 1, UNSUPERVISED.
    """

    turn: int
    replying: bool
    closed: tuple[tuple[range, str], ...]
    open: range
    since: tuple[int, ...]
    turn_taking: np.ndarray = field(repr=False)
    barge_in: np.ndarray = field(repr=False)


def position(sample: int) -> int:
    """The first LLM position that is complete after a sample of 16 kHz."""
    return sample // TICK


def turn_delay(dialogue: str, turn: int) -> int:
    """T of the paper in samples: from the assistant's end to the dialogue's user turn of that number (0, 1, …).

    Drawn anew until it is positive: a user who begins before the assistant's end barges in, at a time of their own.
    """
    generator = draws("turn delay", dialogue, turn)
    while (delay := round(SAMPLE_RATE * generator.normal(DELAY_MEAN, DELAY_DEVIATION))) <= 0:
        pass
    return delay


def begun_turns(bands: np.ndarray, events: Sequence[Event], length: int) -> list[Begun]:
    """Where a session begins the turns of a dialogue of `length` samples, in order. bands (positions, n_mels): the
    user's channel, the mean log-mel of each LLM position."""
    check_events(events, length)
    onset, found, opened, replying = Onset(), list[Begun](), 0, False
    users, replies = ([e for e in events if e.kind in kinds] for kinds in (USER_TURNS, ("assistant",)))
    taken = {position(e.end) for e in users[: len(replies)]}
    over = {position(e.end) for e in replies}
    cut = {position(e.end) for e, user in zip(replies, users[1:], strict=False) if user.kind == "barge_in"}
    for at, band in enumerate(bands):
        onset.hear(band, replying)
        if (ticks := onset.begun()) is not None:
            found.append(Begun(at, max(opened, at + 1 - ticks)))
        if at in over:
            replying = False
            if at not in cut:  # what cuts a reply loses none of its words
                onset.reply_over()
        if at in taken:
            opened, replying = at + 1, True
            onset.new_turn()
    return found


def samples(dialogue: str, events: Sequence[Event], length: int, begun: Sequence[Begun] = ()) -> list[Sample]:
    """The training samples of one dialogue of `length` samples, in order; `dialogue` names it for `turn_delay`, begun:
    where its turns were noticed.

    While a reply is being spoken, barge-in is decided under `closed` with an empty reply; afterwards, turn taking under
    what was heard of it. Both rows hold the user's channel since the answer was decided, or since the turn began.
    Raises ValueError for events that are no dialogue (`check_events`).
    """
    check_events(events, length)
    users = [e for e in events if e.kind in USER_TURNS]
    replies = [e for e in events if e.kind == "assistant"]
    voices = [e.start for e in events if e.kind in (*USER_TURNS, "backchannel")]
    found: list[Sample] = []
    closed: tuple[tuple[range, str], ...] = ()
    since: tuple[int, ...] = ()
    begin, silent_from = 0, 0
    for turn in range(len(replies) + 1):
        user = users[turn] if turn < len(users) else None
        if turn:
            reply, silent_from = replies[turn - 1], replies[turn - 1].end
            point, stop = reply.end, reply.end
            if user:
                taken = user.start if user.kind == "barge_in" else reply.end + turn_delay(dialogue, turn)
                point, stop = min(taken, user.end), user.end
            listening = (*closed[:-1], (closed[-1][0], ""))
            open_turn = range(begin, position(stop))
            found += _parts(listening, since, open_turn, (begin, position(point)), None, begun)
        stop = length
        if user:
            stop = min([user.end + ANSWER_GAP, length, *(start for start in voices if start > user.end)])
        open_turn, point = range(begin, position(stop)), position(user.end if user else length)
        found += _parts(closed, since, open_turn, None, (position(silent_from), point), begun)
        if turn < len(replies) and user:
            began, encoder = _newest(begun, begin, point)
            closed, since = (*closed, (range(began, point + 1), replies[turn].text)), (*since, encoder)
            begin = point + 1
    return [s for s in found if (s.turn_taking >= 0).any() or (s.barge_in >= 0).any()]


def _newest(begun: Sequence[Begun], begin: int, at: int) -> tuple[int, int]:
    """Of an open turn that holds the positions from `begin` on, after the position `at`: the first that it still holds,
    and that with which the encoder began."""
    past = [b for b in begun if b.at <= at]
    encoder = past[-1].start if past else 0
    return max(begin, encoder), encoder


def _parts(
    closed: tuple[tuple[range, str], ...],
    since: tuple[int, ...],
    open_turn: range,
    barge_in: tuple[int, int] | None,
    turn_taking: tuple[int, int] | None,
    begun: Sequence[Begun],
) -> list[Sample]:
    """The samples of an open turn that was begun anew while it was open: one before, and one after each time, in which
    is decided what was not before. barge_in, turn_taking: the first supervised and the first positive position."""
    parts, decided = list[Sample](), open_turn.start
    ends = [b.at + 1 for b in begun if open_turn.start <= b.at < open_turn.stop - 1]
    for stop in [*ends, open_turn.stop]:
        began, encoder = _newest(begun, open_turn.start, decided - 1)
        positions = range(began, stop)
        rows = [_labels(positions, spans) for spans in (turn_taking, barge_in)]
        for row in rows:
            row[: decided - began] = UNSUPERVISED
        parts.append(Sample(len(closed), barge_in is not None, closed, positions, (*since, encoder), *rows))
        decided = stop
    return parts


def check_events(events: Sequence[Event], length: int) -> None:
    """Raises ValueError, in one sentence, unless the events are a dialogue that lies within `length` samples."""
    before = None
    for n, event in enumerate(events):
        where = f"event {n} ({event.kind!r:.30} from {event.start} to {event.end})"
        if event.kind not in KINDS:
            raise ValueError(f"{where} is of no known kind; use one of {', '.join(KINDS)}")
        if not 0 <= event.start < event.end <= length:
            raise ValueError(f"{where} must end after it starts, within the {length} samples (16 kHz) of the dialogue")
        if n and event.start < events[n - 1].start:
            raise ValueError(f"{where} starts before the event that precedes it; sort events by their start")
        speaking = before is not None and before.kind == "assistant" and event.start < before.end
        if event.kind == "user" and speaking:
            raise ValueError(f"{where} starts while the assistant speaks; call it a barge_in or a backchannel")
        if event.kind in ("barge_in", "backchannel") and not speaking:
            raise ValueError(f"{where} must start while the assistant speaks; call it a turn of the user's")
        if event.kind == "assistant" or event.kind in USER_TURNS:
            if (before is None or before.kind == "assistant") == (event.kind == "assistant"):
                raise ValueError(f"{where} is out of turn; a user's turn comes first, then replies and turns alternate")
            before = event


def _labels(open_turn: range, spans: tuple[int, int] | None) -> np.ndarray:
    """A label sequence, given as its first supervised and its first positive position, or not at all."""
    positions = np.arange(open_turn.start, open_turn.stop)
    row = np.full(len(positions), UNSUPERVISED, dtype=np.int64)
    if spans is not None:
        row = np.where(positions >= spans[0], (positions >= spans[1]).astype(np.int64), row)
    return row


def listening_context(
    tokenizer: TextTokenizer,
    closed: Sequence[tuple[str | Sequence[int], str | Sequence[int]]],
    open_turn: Sequence[int],
) -> tuple[list[int], list[int]]:
    """What the LLM has read when a position of an open user turn is decided -> (ids, positions), of equal length.

    closed: exchanges before the turn, each (typed text or LLM positions of sound, the assistant's text or its token
    ids). The reply that is still being spoken is empty here: its own row goes on from the same prefix, and sound is
    never put into it. Where ids holds SOUND, positions tells which LLM position of sound stands there; elsewhere it is
    SOUND.
    """
    ids: list[int] = []
    positions: list[int] = []

    def put(text: str | Sequence[int]) -> None:
        tokens = tokenizer.encode(text) if isinstance(text, str) else text
        ids.extend(tokens)
        positions.extend([SOUND] * len(tokens))

    def put_user(content: str | Sequence[int]) -> None:
        if isinstance(content, str):
            put(content)
        else:
            ids.extend([SOUND] * len(content))
            positions.extend(content)

    for n, (user, assistant) in enumerate(closed):
        prefix, suffix = tokenizer.turn(CHAT, first=n == 0, typed=isinstance(user, str))
        put(prefix)
        put_user(user)
        put(suffix)
        put(assistant)
    put(tokenizer.turn(CHAT, first=not closed)[0])
    put_user(open_turn)
    return ids, positions


@dataclass(frozen=True)
class Score:
    """How decisions met events: `hits` of both."""

    hits: int
    decisions: int
    events: int

    @property
    def precision(self) -> float:
        return self.hits / self.decisions if self.decisions else float("nan")

    @property
    def recall(self) -> float:
        return self.hits / self.events if self.events else float("nan")

    @property
    def f1(self) -> float:
        """Positive F1; NaN where there is neither a decision nor an event."""
        total = self.decisions + self.events
        return 2 * self.hits / total if total else float("nan")


def f1_at_k(decisions: Sequence[Sequence[int]], events: Sequence[Sequence[int]], k: int) -> Score:
    """Scores decisions against events, LLM positions in one list a dialogue each, pooled over dialogues.

    A hit is |decision - event| <= k positions of 80 ms; each decision and each event counts in one hit at most, and as
    many hits as possible are found. Raises ValueError for another number of lists or a negative k.
    """
    if k < 0:
        raise ValueError(f"k counts LLM positions and must not be negative, got {k}")
    if len(decisions) != len(events):
        raise ValueError(f"there are decisions of {len(decisions)} dialogues and events of {len(events)}")
    hits = 0
    for made, due in zip(decisions, events, strict=True):
        waiting = sorted(made)
        for event in sorted(due):  # the earliest decision still near enough leaves most to later events
            waiting = [d for d in waiting if d >= event - k]
            if waiting and waiting[0] <= event + k:
                del waiting[0]
                hits += 1
    return Score(hits, sum(map(len, decisions)), sum(map(len, events)))
