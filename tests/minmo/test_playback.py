"""Sound on its way to the user, how much of a text was heard, when a voice begins, and a client that plays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minmo.config import TICK
from minmo.conversation.client import Player
from minmo.conversation.history import heard_tokens
from minmo.conversation.playback import Playback
from minmo.tokenizer.onset import MARGIN, QUIET, RISE, Onset


def numbers(start, stop):
    return np.arange(start, stop, dtype=np.float32)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 25)), max_size=20), st.integers(1, 50))
def test_nothing_is_lost_or_overtaken_and_it_is_never_too_far_ahead(rounds, ahead):
    """rounds: samples made, then time that passes."""
    playback, now, made, sent = Playback(ahead), 0, 0, []
    generation = playback.begin()
    for size, time in rounds:
        playback.put(generation, numbers(made, made + size), last=False)
        made += size
        sent.append(playback.send(now))
        assert playback.ends - now <= max(ahead, 0) and playback.sent + playback.queued == made
        now += time
    sent.append(playback.rest(now))
    assert np.concatenate(sent).tolist() == list(range(made)) and playback.queued == 0


def test_a_cut_reply_takes_no_more_sound_and_leaves_nothing_to_the_next():
    playback = Playback(10)
    first = playback.begin()
    playback.put(first, numbers(0, 30), last=False)
    assert len(playback.send(0)) == 10 and playback.heard == 10
    playback.acknowledge(4)
    playback.acknowledge(3)
    assert playback.heard == 4, "an acknowledgement that comes late takes nothing back"
    with pytest.raises(ValueError, match="10 of this reply were sent"):
        playback.acknowledge(11)
    playback.drop()
    playback.put(first, numbers(30, 60), last=True)
    assert playback.queued == 0 and not playback.complete and len(playback.send(100)) == 0
    second = playback.begin()
    playback.put(first, numbers(30, 60), last=True)
    playback.put(second, numbers(0, 5), last=True)
    assert playback.send(100).tolist() == [0, 1, 2, 3, 4] and playback.all_sent
    assert not playback.over(104) and playback.over(105)


def test_sound_that_comes_late_begins_when_it_is_sent():
    playback = Playback(10)
    generation = playback.begin()
    playback.put(generation, numbers(0, 5), last=False)
    playback.send(0)
    assert playback.ends == 5
    playback.put(generation, numbers(5, 8), last=True)
    playback.send(50)
    assert playback.ends == 53 and playback.last_sent == 50


@pytest.mark.parametrize(
    "written,heard,total,mean,tokens",
    [
        (10, 500, 1000, 300, 5),
        (10, 599, 1000, 300, 5),
        (10, 1000, 1000, 300, 10),
        (10, 0, 1000, 300, 0),
        (10, 899, None, 300, 2),
        (3, 9000, None, 300, 3),
        (0, 80, None, 300, 0),
        (2, 0, 0, 300, 2),
    ],
)
def test_heard_text_by_hand(written, heard, total, mean, tokens):
    assert heard_tokens(written, heard, total, mean) == tokens


def tone(level: float) -> np.ndarray:
    """A tick's log-mel of 80 bands, ten of which lie at a level and the others at 0."""
    return np.pad(np.full(10, level, np.float32), (20, 50))


def test_a_voice_begins_with_two_loud_ticks_of_three_and_ends_in_quiet():
    onset = Onset()
    quiet, loud = 0.0, 1.5 * MARGIN
    changes = []
    for n, value in enumerate([quiet] * 5 + [loud, quiet, quiet] + [loud, quiet, loud] + [quiet] * (QUIET + 2)):
        if onset.hear(tone(value)):
            changes.append((n, onset.voice))
    assert changes == [(10, True), (10 + QUIET, False)]
    assert onset.began == 8 * TICK and onset.ended == 11 * TICK


def test_the_floor_follows_the_room():
    onset = Onset()
    assert not any(onset.hear(tone(0.0)) for _ in range(5))
    assert any(onset.hear(tone(1.2 * MARGIN)) for _ in range(3)), "a fan is switched on"
    steady = round(1.2 * MARGIN / RISE) + QUIET
    assert any(onset.hear(tone(1.2 * MARGIN)) for _ in range(steady)) and not onset.voice, (
        "and is the room after a while"
    )
    assert any(onset.hear(tone(2.5 * MARGIN)) for _ in range(3)) and onset.voice


def test_a_player_plays_in_order_and_stops_at_once():
    player = Player(1000)
    player.receive(10, 0, numbers(1, 6))
    player.receive(12, 0, numbers(6, 9))
    player.receive(40, 1, numbers(9, 19))
    assert player.ends == 50 and [player.played(0, now) for now in (9, 13, 16, 99)] == [0, 3, 6, 8]
    assert player.stop(44) == 44 and player.played(1, 99) == 4
    played = [0] * 10 + [*range(1, 9)] + [0] * 22 + [9, 10, 11, 12] + [0] * 16
    for begin, end in ((0, 60), (12, 42), (44, 50)):
        assert player.window(begin, end).tolist() == played[begin:end]
