"""Labels of the full-duplex predictor from event times, the context they are decided in, and scores at K."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import minmo
from minmo.config import SAMPLE_RATE, TICK
from minmo.data import duplex
from minmo.data.duplex import (
    ANSWER_GAP,
    SOUND,
    UNSUPERVISED,
    USER_TURNS,
    Begun,
    Event,
    begun_turns,
    f1_at_k,
    listening_context,
    position,
    samples,
    turn_delay,
)
from minmo.tokenizer.onset import MARGIN
from minmo.tokenizer.text import TextTokenizer

NANO = Path(minmo.__file__).parent / "assets" / "nano" / "tokenizer.json"


def ticks(kind, start, end, text=""):
    return Event(kind, round(start * TICK), round(end * TICK), text)


def runs(labels):
    """[(label, how often in a row), …]"""
    found = []
    for label in labels.tolist():
        if found and found[-1][0] == label:
            found[-1][1] += 1
        else:
            found.append([label, 1])
    return [tuple(run) for run in found]


def test_a_dialogue_by_hand(monkeypatch):
    """One of everything, in ticks of 80 ms; positions count when they are complete."""
    monkeypatch.setattr(duplex, "turn_delay", lambda dialogue, turn: round(5.25 * TICK))
    events = [
        ticks("user", 2.5, 6.5),
        ticks("pause", 4, 5),
        ticks("assistant", 16, 24, "one"),
        ticks("backchannel", 18, 20),
        ticks("barge_in", 22.5, 30),
        ticks("assistant", 40, 44, "two"),
        ticks("noise", 46, 47),
        ticks("user", 52, 55),
        ticks("assistant", 62, 64, "three"),
    ]
    got = samples("a", events, 70 * TICK)
    no = UNSUPERVISED
    first, second, third = (range(7), "one"), (range(7, 31), "two"), (range(31, 56), "three")

    def quiet(exchange):
        return exchange[0], ""

    assert [(s.closed, s.open, runs(s.turn_taking), runs(s.barge_in)) for s in got] == [
        ((), range(14), [(0, 6), (1, 8)], [(no, 14)]),
        ((quiet(first),), range(7, 30), [(no, 23)], [(0, 15), (1, 8)]),
        ((first,), range(7, 38), [(no, 17), (0, 6), (1, 8)], [(no, 31)]),
        ((first, quiet(second)), range(31, 55), [(no, 24)], [(0, 18), (1, 6)]),  # taken back at 44 + 5.25
        ((first, second), range(31, 63), [(no, 13), (0, 11), (1, 8)], [(no, 32)]),
        ((first, second, quiet(third)), range(56, 64), [(no, 8)], [(0, 8)]),
        ((first, second, third), range(56, 70), [(no, 8), (0, 6)], [(no, 14)]),
    ]


def test_the_answer_is_due_until_the_user_speaks_again():
    """A back-channel two ticks after the user's end leaves two positive positions."""
    events = [ticks("user", 1, 4), ticks("assistant", 5, 9), ticks("backchannel", 6, 8)]
    assert runs(samples("a", events, 9 * TICK)[0].turn_taking) == [(0, 4), (1, 2)]


def test_one_sample_of_voice_makes_a_position():
    """The position that holds a barge-in's first sample is positive, and so is the one that holds the user's last."""
    events = [Event("user", 0, 2 * TICK - 1), ticks("assistant", 3, 9), Event("barge_in", 6 * TICK - 1, 9 * TICK)]
    first, second = samples("a", events, 9 * TICK)
    assert runs(first.turn_taking)[0] == (0, 1)
    assert second.open == range(2, 9) and runs(second.barge_in) == [(0, 3), (1, 4)]


@st.composite
def dialogues(draw):
    """Events that follow one another by the rules, and the dialogue's length."""
    step = st.integers(1, 9 * TICK)
    events, now, kind = [], draw(st.integers(0, 3 * TICK)), "user"
    for _ in range(draw(st.integers(1, 4))):
        end = now + draw(step)
        events.append(Event(kind, now, end, "user"))
        start = end + draw(st.integers(0, 12 * TICK))
        stop = start + draw(st.integers(3, 20 * TICK))
        events.append(Event("assistant", start, stop, "assistant"))
        if draw(st.booleans()):
            begin = draw(st.integers(start, stop - 1))
            events.append(Event("backchannel", begin, begin + draw(step), "yes"))
        kind = draw(st.sampled_from(USER_TURNS))
        now = draw(st.integers(start, stop - 1)) if kind == "barge_in" else stop + draw(step)
        if kind == "barge_in" and events[-1].kind == "backchannel":
            now = max(now, events[-1].start)
    events.sort(key=lambda e: e.start)
    return events, max(e.end for e in events) + draw(st.integers(0, 20 * TICK))


@settings(max_examples=300)
@given(dialogues(), st.text(max_size=3))
def test_positives_lie_in_their_spans(dialogue, name):
    """A position is positive only where it became complete after the user's end (within the gap), or after the user
    took the turn and before the turn's end; there all are that are supervised."""
    events, length = dialogue
    users = [e for e in events if e.kind in USER_TURNS]
    for sample in samples(name, events, length):
        assert len(sample.open) == len(sample.turn_taking) == len(sample.barge_in)
        complete = (np.arange(sample.open.start, sample.open.stop) + 1) * TICK
        assert complete.max(initial=0) <= length
        turn = len(sample.closed)
        user = users[turn] if turn < len(users) else None
        speaking = sample.replying
        assert turn == sample.turn and speaking == (turn > 0 and not sample.closed[-1][1])
        due, other = (sample.barge_in, sample.turn_taking) if speaking else (sample.turn_taking, sample.barge_in)
        assert (other == UNSUPERVISED).all() and set(due.tolist()) <= {UNSUPERVISED, 0, 1}
        positive = due == 1
        if user is None:
            assert not positive.any()
        elif speaking:
            reply = max((e for e in events if e.kind == "assistant" and e.start <= user.start), key=lambda e: e.start)
            taken = user.start if user.kind == "barge_in" else reply.end + turn_delay(name, turn)
            assert (positive == ((complete > taken) & (complete <= user.end))).all()
        else:
            assert not (positive & ((complete <= user.end) | (complete > user.end + ANSWER_GAP))).any()
            assert positive[(complete > user.end) & (due >= 0)].all()
        heard = [*(r for r, _ in sample.closed), sample.open]
        assert [r.start for r in heard] == [0, *(r.stop for r in heard[:-1])]  # nothing is lost or heard twice


def decisions(got):
    """By decision, its turn and LLM position, the labels that were given."""
    found = {}
    for s in got:
        for p, a, b in zip(s.open, s.turn_taking.tolist(), s.barge_in.tolist(), strict=True):
            if max(a, b) != UNSUPERVISED:
                found.setdefault((s.replying, s.turn, p), []).append((a, b))
    return found


@settings(max_examples=300)
@given(dialogues(), st.data())
def test_turns_that_are_begun_anew_are_decided_as_if_they_were_not(dialogue, data):
    """Every decision is made once, with the same label, in what the open turn was by then: since it was begun last,
    after the turn before."""
    events, length = dialogue
    whole = samples("a", events, length)
    noticed = sorted(data.draw(st.sets(st.integers(0, length // TICK), max_size=6)))
    begun, least = [], 0
    for at in noticed:
        opened = max((s.open.start for s in whole if s.open.start <= at), default=0)
        begun.append(Begun(at, least := data.draw(st.integers(max(least, opened), max(least, at)))))
    got = samples("a", events, length, begun)
    assert decisions(got) == decisions(whole) and all(len(labels) == 1 for labels in decisions(got).values())
    for sample in got:
        labels = np.maximum(sample.turn_taking, sample.barge_in)
        supervised = [p for p, label in zip(sample.open, labels, strict=True) if label >= 0]
        last = max((b for b in begun if b.at < supervised[0]), key=lambda b: b.at, default=Begun(-1, 0))
        opened = next(s.open.start for s in whole if s.turn == sample.turn)
        assert sample.open.start == max(opened, last.start) and sample.since[-1] == last.start
        assert not any(last.at < b.at < supervised[-1] for b in begun), "what is begun anew is another sample"
        before = next(s.closed for s in whole if (s.turn, s.replying) == (sample.turn, sample.replying))
        for (user, _), (full, _), since in zip(sample.closed, before, sample.since, strict=False):
            assert user.stop == full.stop and full.start <= user.start and since <= user.start


def test_a_session_begins_turns_with_their_voices():
    """Quiet, a voice, a reply with a murmur, which is no part of the next turn, and the next turn after it."""
    events = [ticks("user", 10, 20), ticks("assistant", 30, 60), ticks("backchannel", 35, 38), ticks("user", 70, 80)]
    bands = np.zeros((90, 80), np.float32)
    for begin, end in ((10, 20), (35, 38), (70, 80)):
        bands[begin:end] = 2 * MARGIN
    assert begun_turns(bands, events, 90 * TICK) == [Begun(11, 10 - 4), Begun(36, 35 - 4), Begun(71, 70 - 4)]
    echo = bands.copy()
    echo[30:60] = 3 * MARGIN
    assert begun_turns(echo, events, 90 * TICK) == [Begun(11, 6), Begun(31, 26), Begun(71, 66)], "an echo is forgotten"
    echo[60:70] = 3 * MARGIN
    assert [b.at for b in begun_turns(echo, events, 90 * TICK)] == [11, 31, 62], "unless it goes on"
    events[3] = ticks("barge_in", 55, 80)
    assert [b.at for b in begun_turns(echo, events, 90 * TICK)] == [11, 31], "or the user cut the reply"


@settings(max_examples=300)
@given(dialogues(), st.floats(0, 1))
def test_cutting_a_dialogue_changes_no_earlier_label(dialogue, share):
    events, length = dialogue
    cut = position(round(share * length)) * TICK
    kept = [dataclasses.replace(e, end=min(e.end, cut)) for e in events if e.start < cut]

    def labels(got):
        return {
            (len(s.closed), bool(s.closed) and not s.closed[-1][1], p): (int(a), int(b))
            for s in got
            for p, a, b in zip(s.open, s.turn_taking, s.barge_in, strict=True)
            if max(a, b) >= 0
        }

    whole, part = labels(samples("a", events, length)), labels(samples("a", kept, cut))
    assert part.items() <= whole.items()


def test_turn_delays_follow_the_papers_normal():
    """Over zero, mean and spread of N(0.6, 0.4^2) above zero; the same for the same turn, other turns are others."""
    seconds = np.array([turn_delay(f"d{n}", t) for n in range(2000) for t in (1, 2)]) / SAMPLE_RATE
    assert seconds.min() > 0
    assert abs(seconds.mean() - 0.656) < 0.02 and abs(seconds.std() - 0.349) < 0.02
    assert turn_delay("d7", 2) == round(seconds[15] * SAMPLE_RATE)
    assert len(set(seconds[:40])) == 40


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([ticks("cough", 0, 1)], "of no known kind; use one of user"),
        ([ticks("user", 2, 2)], "must end after it starts"),
        ([ticks("user", 2, 11)], "within the 12800 samples"),
        ([ticks("user", 2, 3), ticks("noise", 1, 2)], "sort events by their start"),
        ([ticks("assistant", 2, 3)], "is out of turn"),
        ([ticks("user", 2, 3), ticks("user", 4, 5)], "is out of turn"),
        ([ticks("user", 2, 3), ticks("assistant", 4, 6), ticks("user", 5, 7)], "call it a barge_in or a backchannel"),
        ([ticks("user", 2, 3), ticks("assistant", 4, 5), ticks("barge_in", 5, 7)], "call it a turn of the user's"),
        ([ticks("user", 2, 3), ticks("backchannel", 4, 5)], "call it a turn of the user's"),
    ],
)
def test_events_that_are_no_dialogue_are_named(events, says):
    with pytest.raises(ValueError, match=says):
        samples("a", events, 10 * TICK)


def test_the_listening_context_spelt_out():
    """A heard question, half a reply, a typed one whose reply is being spoken: that reply is empty, then sound."""
    tokenizer = TextTokenizer.from_file(NANO)
    ids, positions = listening_context(tokenizer, [(range(3), "five"), ("two", "")], range(7, 9))
    start, end, line = [tokenizer.start_of_turn], [tokenizer.end_of_turn], tokenizer.encode("\n")
    user, assistant = tokenizer.encode("user"), tokenizer.encode("assistant")
    system = [
        *start,
        *tokenizer.encode("system"),
        *line,
        *tokenizer.encode("You are a helpful assistant."),
        *end,
        *line,
    ]
    before = [*system, *start, *user, *line]
    between = [
        *end, *line, *start, *assistant, *line, *tokenizer.encode("five"), *end, *line,
        *start, *user, *line, *tokenizer.encode("two"), *end, *line,
        *start, *assistant, *line, *end, *line, *start, *user, *line,
    ]  # fmt: skip
    assert ids == [*before, SOUND, SOUND, SOUND, *between, SOUND, SOUND]
    assert positions == [*[SOUND] * len(before), 0, 1, 2, *[SOUND] * len(between), 7, 8]


def test_the_listening_context_is_the_tokenizers_own_layout():
    tokenizer = TextTokenizer.from_file(NANO)
    turns = [("one plus one", "two"), ("and three", "")]
    assert listening_context(tokenizer, turns, [])[0] == tokenizer.turn(history=turns)[0]
    assert listening_context(tokenizer, [], [])[0] == tokenizer.turn()[0]
    ids = tokenizer.encode("two")
    assert listening_context(tokenizer, [("one plus one", ids)], []) == listening_context(
        tokenizer, [("one plus one", "two")], []
    )


def test_f1_at_k_by_hand():
    decisions, events = [[10, 11, 40], [5], []], [[11, 30], [6, 7], [9]]
    assert f1_at_k(decisions, events, 0) == duplex.Score(1, 4, 5)
    score = f1_at_k(decisions, events, 1)
    assert (score.hits, score.precision, score.recall, score.f1) == (2, 0.5, 0.4, 4 / 9)
    assert f1_at_k(decisions, events, 10).hits == 3
    assert np.isnan(f1_at_k([[]], [[]], 1).f1) and f1_at_k([[1]], [[]], 1).f1 == 0
    with pytest.raises(ValueError, match="decisions of 1 dialogues and events of 2"):
        f1_at_k([[]], [[], []], 1)
    with pytest.raises(ValueError, match="must not be negative"):
        f1_at_k([[]], [[]], -1)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 12), max_size=5), st.lists(st.integers(0, 12), max_size=5), st.integers(0, 4))
def test_f1_finds_as_many_hits_as_there_can_be(decisions, events, k):
    def most(rest, due):
        if not due:
            return 0
        partners = [n for n, d in enumerate(rest) if abs(d - due[0]) <= k]
        return max([most(rest, due[1:]), *(1 + most(rest[:n] + rest[n + 1 :], due[1:]) for n in partners)])

    assert f1_at_k([decisions], [events], k).hits == most(decisions, events)
