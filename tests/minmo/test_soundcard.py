"""A conversation with a person, through a simulated sound card: what is heard, played, acknowledged, dropped."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minmo import cli
from minmo.config import TICK
from minmo.conversation import command, soundcard
from minmo.conversation.events import Interrupted, Sound, TurnTaken
from minmo.conversation.soundcard import converse

RATE = 24_000


class Card:
    """sounddevice, as far as it is used: a stream whose callback is called when somebody waits for sound."""

    class PortAudioError(Exception):
        pass

    def __init__(self, blocks=10_000):
        self.played, self.heard, self.blocks, self.opened = [], 0, blocks, {}

    def Stream(self, callback, **options):
        self.opened, self.callback = options, callback
        return self

    def __enter__(self):
        for _ in range(self.blocks):
            self.block()

    def __exit__(self, *_):
        self.closed = True

    def block(self):
        size = self.opened["blocksize"]
        # A tone, so that nothing may be lost or come twice unnoticed.
        heard = 0.1 * np.sin(2 * np.pi * 200 * np.arange(self.heard, self.heard + size) / RATE)
        out = np.full((size, 1), np.nan, np.float32)
        self.callback(heard.astype(np.float32)[:, None], out, size, None, None)
        self.heard += size
        self.played.append(out[:, 0])


class Heard:
    """A conversation that notes what it hears, and answers by a plan: events by the number of the tick."""

    rate, next_step = RATE, None

    def __init__(self, plan=None):
        self.ticks, self.plan, self.acknowledged = [], plan or {}, []

    @property
    def now_ms(self):
        return 80.0 * len(self.ticks)

    def played(self, reply, ms):
        self.acknowledged.append((reply, ms))

    def tick(self, samples):
        assert samples.shape == (TICK,) and samples.dtype == np.float32
        self.ticks.append(samples)
        return self.plan.get(len(self.ticks), [])


@pytest.fixture
def card(monkeypatch):
    """Plugged in; its blocks come one by one, as they are waited for."""
    card = Card(blocks=0)
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    wait = soundcard.queue.Queue.get

    def get(self, *_, **__):
        while self.empty():
            card.block()
        return wait(self)

    monkeypatch.setattr(soundcard.queue, "Queue", type("Queue", (soundcard.queue.Queue,), {"get": get}))
    return card


def test_what_the_microphone_hears_reaches_the_conversation_whole(card):
    conversation = Heard()
    converse(conversation, lambda events: None, seconds=1.6)
    assert card.opened["samplerate"] == RATE and card.opened["blocksize"] == 240 and card.closed
    heard = np.concatenate(conversation.ticks)
    expected = 0.1 * np.sin(2 * np.pi * 200 * np.arange(len(heard)) / 16_000)
    assert np.abs(heard - expected)[200:].max() < 1e-3, "a tone at 16 kHz without a seam"
    assert not np.concatenate(card.played).any()


def test_a_reply_is_played_once_acknowledged_and_dropped_when_it_is_cut(card):
    voice = np.linspace(0.1, 0.9, RATE, dtype=np.float32)
    cut = Interrupted(0.0, 0, True, "", 0.0, None, None, None)
    first, second = Sound(160.0, 0, 0, voice[:12_000]), Sound(240.0, 0, 12_000, voice[12_000:])
    plan = {2: [TurnTaken(160.0, 0, 160.0), first], 3: [second], 8: [cut]}
    conversation, told = Heard(plan), []
    converse(conversation, told.extend, seconds=1.2)
    played = np.concatenate(card.played)
    sounding = np.flatnonzero(played)
    assert np.array_equal(played[sounding], voice[: len(sounding)]), "in order, without a gap, from the first sample"
    assert np.array_equal(sounding, np.arange(sounding[0], sounding[0] + len(sounding)))
    assert 0.4 * RATE < len(sounding) < 0.6 * RATE, "six ticks of the second that came"
    reply, ms = conversation.acknowledged[-1]
    assert reply == 0 and ms == pytest.approx(1e3 * len(sounding) / RATE, abs=11)
    assert [type(e) for e in told] == [TurnTaken, Sound, Sound, Interrupted]


def test_what_stands_before_the_conversation_hears_both_sides(card):
    seen = []

    def front(near, far):
        seen.append(far)
        return np.zeros_like(near)

    voice = np.full(RATE, 0.5, np.float32)
    conversation = Heard({2: [TurnTaken(160.0, 0, 160.0), Sound(160.0, 0, 0, voice)]})
    converse(conversation, lambda events: None, front=front, seconds=0.8)
    assert not np.concatenate(conversation.ticks).any()
    far = np.concatenate(seen)
    played = np.flatnonzero(np.concatenate(card.played))[0]
    assert np.flatnonzero(np.abs(far) > 0.25)[0] == pytest.approx(played * 2 / 3, abs=20)


def test_a_machine_that_is_too_slow_says_so(card):
    card.blocks = 1_000
    with pytest.raises(ValueError, match="2 s behind the microphone"):
        converse(Heard(), lambda events: None)


def test_a_microphone_that_falls_silent_or_is_not_there_says_so(monkeypatch):
    card = Card(blocks=0)
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    monkeypatch.setattr(soundcard, "SILENT_SECONDS", 0.01)
    with pytest.raises(ValueError, match="has given nothing"):
        converse(Heard(), lambda events: None)

    def refuse(**_):
        raise Card.PortAudioError("Invalid sample rate")

    monkeypatch.setattr(card, "Stream", refuse)
    with pytest.raises(ValueError, match="no microphone and loudspeaker at 24000 Hz: Invalid sample rate"):
        converse(Heard(), lambda events: None)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(ValueError, match=r"pip install 'minmo\[mic\]'"):
        converse(Heard(), lambda events: None)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--mic", "x.wav"], "talks with you"),
        (["--mic", "--realtime"], "leave --realtime"),
        (["--mic", "--front", "wall"], "--front must be one of"),
        ([], "needs a sound file, or --mic"),
        (["x.wav", "--front", "echo"], "--front is of"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        cli.app(["talk", *arguments], standalone_mode=False)


def test_the_command_talks(card, monkeypatch, capsys):
    from minmo.conversation.events import ReplyDone, TextDelta

    plan = {2: [TurnTaken(160.0, 0, 160.0), TextDelta(160.0, 0, "one")], 3: [ReplyDone(240.0, 0, "one")]}
    monkeypatch.setattr(cli, "_load", lambda *_: SimpleNamespace())
    monkeypatch.setattr(command, "Conversation", lambda *_: Heard(plan))
    talk = soundcard.converse
    monkeypatch.setattr(command, "converse", lambda c, show, front: talk(c, show, front=front, seconds=0.4))
    cli.app(["talk", "--mic"], standalone_mode=False)
    assert "one\n" in capsys.readouterr().out
