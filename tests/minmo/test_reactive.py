"""The user who hears: events lie where its voice is, and things happen while the assistant really sounds."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation.client import Loudspeaker, Player
from minmo.conversation.front import FRONTS
from minmo.data.draws import draws
from minmo.data.reactive import LIVE, PATIENCE, ReactiveUser
from minmo.data.simulator import Material, power, room
from minmo.data.utterances import Utterance

SECOND = SAMPLE_RATE
PLAIN = replace(LIVE, pause=0, barge_in=0, backchannel=0, burst=0, snr_db=(None,), echo_db=(None,), turns=3)


def speech(text, seconds=0.8):
    return Utterance((0.1 * draws("speech", text).standard_normal(round(seconds * SECOND))).astype(np.float32), text)


MATERIAL = Material([(speech("one"), speech("a", 2)), (speech("two"), speech("b", 2))], [speech("uh huh", 0.3)])


class Assistant:
    """Answers each turn 0.5 s after it ended, for so many seconds; stops 0.4 s after an interruption began."""

    def __init__(self, user, seconds=2.0):
        self.user, self.seconds, self.plays, self.channel = user, seconds, [], []

    def run(self, ticks=600):
        for n in range(ticks):
            turns = [e for e in self.user.events if e.kind in ("user", "barge_in")]
            at = np.arange(n * TICK, (n + 1) * TICK)
            played = np.zeros(TICK, np.float32)
            for turn, following in zip(turns, [*turns, None][1:], strict=True):
                begin, end = turn.end + SECOND // 2, turn.end + SECOND // 2 + round(self.seconds * SECOND)
                if following is not None and following.kind == "barge_in":
                    end = min(end, following.start + 2 * SECOND // 5)
                played[(at >= begin) & (at < end)] = 0.1
            self.plays.append(played)
            channel = self.user(played)
            if channel is None:
                return np.concatenate(self.channel), np.concatenate(self.plays[:-1])
            self.channel.append(channel)
        raise AssertionError("the user never ends")


def user(conditions, index=0):
    return ReactiveUser(MATERIAL, conditions, 1, index)


def test_a_user_asks_hears_the_answer_out_and_asks_again():
    u = user(PLAIN)
    channel, played = Assistant(u).run()
    assert [e.kind for e in u.events] == ["user"] * 3 and channel.shape == played.shape
    sounds = np.flatnonzero(np.abs(channel) > 1e-6)
    for event, following in zip(u.events, [*u.events[1:], None], strict=True):
        inside = sounds[(sounds >= event.start) & (sounds < event.end)]
        assert (
            inside[0] == event.start and inside[-1] == event.end - 1 and len(inside) > 0.99 * (event.end - event.start)
        )
        if following is not None:
            over = event.end + SECOND // 2 + 2 * SECOND
            assert 0.4 * SECOND <= following.start - over < 3 * SECOND, "T after the reply's end"
    assert sum(e.end - e.start for e in u.events) >= len(sounds), "nothing sounds beside the events"


@examples(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["barge_in", "backchannel", "burst"]))
def test_what_happens_in_a_reply_happens_while_it_sounds(index, what):
    u = user(replace(PLAIN, **{what: 1.0}), index)
    _, played = Assistant(u).run()
    kinds = {"burst": "noise"}
    found = [e for e in u.events if e.kind == kinds.get(what, what)]
    assert len(found) == (2 if what == "barge_in" else 3), "the last turn cannot be interrupted by another"
    for event in found:
        assert played[event.start] != 0 and not played[event.start - SECOND // 10 :].all()
        assert 0.2 * SECOND <= event.start - np.flatnonzero(played[: event.start] == 0)[-1] <= 0.72 * SECOND


def test_who_gets_no_answer_asks_something_else():
    u = user(PLAIN)
    Assistant(u, seconds=0.0).run()
    assert [b.start - a.end for a, b in zip(u.events, u.events[1:], strict=False)] == [PATIENCE + 160] * 2


def test_all_is_a_function_of_the_seed_and_of_what_was_played():
    lively = replace(LIVE, turns=4)
    one, again, other = user(lively, 3), user(lively, 3), user(lively, 4)
    first, second, third = (Assistant(u).run()[0] for u in (one, again, other))
    assert np.array_equal(first, second) and one.events == again.events
    assert one.events != other.events and len(first) != len(third)


@pytest.mark.parametrize("db", [-10.0, -30.0])
def test_echo_is_as_loud_as_asked_and_late(db):
    u = user(replace(PLAIN, echo_db=(db,), lead_seconds=(30.0, 30.0)))
    voice = MATERIAL.exchanges[0][1].samples
    played = np.concatenate([voice, np.zeros(8000, np.float32)])[: (len(voice) + 8000) // TICK * TICK]
    channel = np.concatenate([u(tick) for tick in played.reshape(-1, TICK)])
    assert 10 * np.log10(power(channel[: len(voice)]) / power(voice)) == pytest.approx(db, abs=0.5)
    assert not channel[: SECOND // 100].any(), "no sooner than 10 ms"


def test_two_things_cannot_happen_in_one_reply():
    with pytest.raises(ValueError, match="must not exceed 1"):
        user(replace(PLAIN, barge_in=0.6, backchannel=0.6))


def test_a_loudspeaker_plays_what_its_player_plays_and_not_later():
    player = Player(24_000)
    tone = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000).astype(np.float32)
    player.receive(2_400, 0, tone[:10_000])
    player.receive(0, 0, tone[10_000:])
    loudspeaker = Loudspeaker(player)
    heard = np.concatenate([loudspeaker.tick() for _ in range(16)])
    expected = np.sin(2 * np.pi * 440 * (np.arange(16_000)) / 16_000)
    begin = 1_600 + 16  # 100 ms, and 1 ms of the interpolation
    assert np.abs(heard[begin : begin + 15_900] - expected[:15_900]).max() < 0.15
    assert not heard[:1_590].any() and player.spans() == [(0, 2_400, 26_400)]
    assert np.array_equal(player.window(2_390, 2_410), np.r_[np.zeros(10), tone[:10]].astype(np.float32))


def test_echo_control_takes_the_echo_and_leaves_the_voice():
    pytest.importorskip("livekit.rtc", reason="echo control needs livekit: pip install 'minmo[echo]'")
    rng = np.random.default_rng(0)
    size = 8 * SECOND // TICK * TICK
    # Speech-like: noise whose loudness changes at the pace of syllables.
    far = (0.1 * rng.standard_normal(size) * np.abs(np.sin(np.arange(size) / 1_700))).astype(np.float32)
    echo = np.convolve(far, room("a room"))[:size]
    echo = (echo * np.sqrt(0.1 * power(far) / power(echo))).astype(np.float32)
    front = FRONTS["echo"]()
    pairs = zip(echo.reshape(-1, TICK), far.reshape(-1, TICK), strict=True)
    heard = np.concatenate([front(near, played) for near, played in pairs])
    half = size // 2
    assert 10 * np.log10(power(echo[half:]) / power(heard[half:])) > 20, "of an echo at -10 dB, once it is learned"
    voice = (0.1 * rng.standard_normal(SECOND // TICK * TICK)).astype(np.float32)
    silence = np.zeros(TICK, np.float32)
    kept = np.concatenate([front(near, silence) for near in voice.reshape(-1, TICK)])
    assert power(kept) > 0.5 * power(voice)


def test_a_voice_gate_lets_a_voice_pass_and_no_noise():
    pytest.importorskip("silero_vad", reason="a voice gate needs silero-vad: pip install 'minmo[eval]'")
    from importlib import resources

    import minmo

    voice = minmo.load_audio(resources.files("minmo") / "assets" / "sum.wav")
    noise = (0.05 * np.random.default_rng(0).standard_normal(2 * SECOND // TICK * TICK)).astype(np.float32)
    gate, silence = FRONTS["gate"](), np.zeros(TICK, np.float32)
    quiet = np.concatenate([gate(tick, silence) for tick in noise.reshape(-1, TICK)])
    assert power(quiet) < 0.2 * power(noise)
    voice = np.pad(voice, (0, -len(voice) % TICK))
    heard = np.concatenate([gate(tick, silence) for tick in voice.reshape(-1, TICK)])
    assert power(heard) > 0.8 * power(voice)


@pytest.mark.parametrize("name,module", [("echo", "livekit.rtc"), ("gate", "silero_vad")])
def test_a_missing_front_says_what_to_type(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install 'minmo\["):
        FRONTS[name]()
