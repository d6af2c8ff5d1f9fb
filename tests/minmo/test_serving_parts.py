"""Laws of the parts: one session without a socket, the encodings, the silence that stands in for sound."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from realtime_client import kinds  # noqa: E402

import minmo  # noqa: E402
from minmo.conversation import Phase  # noqa: E402
from minmo.conversation import events as E  # noqa: E402
from minmo.serving.microphone import Microphone  # noqa: E402
from minmo.serving.session import ATTENTION_S, Session  # noqa: E402
from minmo.serving.settings import SessionSettings  # noqa: E402
from minmo.serving.sound import FORMATS, Encoding  # noqa: E402


def test_a_voice_in_the_tick_after_the_pause_stops_the_reply():
    """With server_vad. It is told before the tick's phase is."""
    sent, asked = [], []
    vad = {"type": "realtime", "audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
    settings = SessionSettings("nano", 64).updated(vad)
    session = Session(settings, minmo.Settings(max_text_tokens=64), 24_000, sent.append, print)
    session.begin(SimpleNamespace(do=lambda action: asked.append(action) or Future()))
    session.input.sound_ms = 1000.0
    session.on_events([E.SpeechStarted(240.0, 80.0), E.Decision(240.0, 0.0, 0.0, Phase.LISTENING)])
    session.on_events([E.SpeechStopped(1640.0, 1000.0), E.Decision(1640.0, 0.0, 0.0, Phase.LISTENING)])
    assert len(asked) == 1, "to take the turn"
    session.on_events([E.TurnTaken(1640.0, 0, 1000.0)])
    session.on_events([E.SpeechStarted(1720.0, 1560.0), E.Decision(1720.0, 0.0, 0.0, Phase.TAKING)])
    assert len(asked) == 2, "to stop the reply"


def test_a_turn_without_a_reply_is_over_once():
    """However sure the predictor stays in the silence after it, in which sound goes on to come."""
    sent = []
    vad = {"type": "semantic_vad", "create_response": False}
    settings = SessionSettings("nano", 64).updated({"type": "realtime", "audio": {"input": {"turn_detection": vad}}})
    session = Session(settings, minmo.Settings(max_text_tokens=64), 24_000, sent.append, print)
    for turn in (1, 2):
        session.on_events([E.SpeechStarted(240.0, 80.0)])
        for tick in range(30):
            session.input.add_sound(bytes(3840))
            session.on_events([E.Decision(tick * 80.0, 0.99, 0.0, Phase.LISTENING)])
        assert kinds(sent).count("input_audio_buffer.committed") == turn


def test_a_silent_client_is_listened_to_for_a_while():
    microphone, now, ticks = Microphone(), 100.0, 0
    microphone.came(now, 1000.0)
    for _ in range(1500):  # two minutes
        now += 0.08
        if microphone.since(now) <= ATTENTION_S:
            ticks += microphone.missing(now)
    assert ATTENTION_S - 1 < 0.08 * ticks < ATTENTION_S + 1


def test_a_voice_that_goes_on_through_the_turn():
    """A turn that was taken too early is interrupted: clients, which stop playing at `speech_started`, are told so."""
    sent = []
    session = Session(SessionSettings("nano", 64), minmo.Settings(max_text_tokens=64), 24_000, sent.append, print)
    session.input.sound_ms = 1000.0
    sound = np.zeros(1920, np.float32)
    session.on_events([E.SpeechStarted(240.0, 80.0), E.Decision(240.0, 0.0, 1.0, Phase.LISTENING)])
    session.on_events([E.Decision(800.0, 1.0, 0.0, Phase.TAKING), E.TurnTaken(800.0, 0, 700.0)])
    session.on_events([E.TextDelta(800.0, 0, "five"), E.Sound(800.0, 0, 0, sound)])
    session.on_events([E.Interrupted(1200.0, 0, True, "", 80.0, 1120.0, 720.0, 920.0)])
    session.on_events([E.SpeechStopped(2000.0, 1400.0)])
    told = [e["type"].rsplit(".", 1)[-1] for e in sent if e["type"].startswith("input_audio_buffer.speech")]
    assert told == ["speech_started", "speech_stopped"] * 2
    assert kinds(sent)[-3:] == [
        "response.done",
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
    ]


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(FORMATS)), cuts=st.lists(st.integers(0, 2400), max_size=12), seed=st.integers(0, 9)
)  # fmt: skip
def test_how_sound_is_cut_never_matters(name, cuts, seed):
    """Both ways, each format; and there and back is the same sound, to the format's precision."""
    sound = (0.3 * np.sin(np.arange(2400) * (0.02 + 0.01 * seed))).astype(np.float32)
    edges = [0, *sorted(cuts), 2400]
    whole, cut = Encoding(name, 24_000, to_wire=True), Encoding(name, 24_000, to_wire=True)
    data = whole.encode(sound, final=True)
    pieces = b"".join(cut.encode(sound[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + cut.encode(
        sound[:0], True
    )
    assert pieces == data
    back, parts = Encoding(name, 16_000, to_wire=False), Encoding(name, 16_000, to_wire=False)
    heard = np.concatenate([back.decode(data), back.flush()])
    steps = sorted({min(len(data), c // whole.width * whole.width) for c in cuts} | {0, len(data)})
    found = [parts.decode(data[a:b]) for a, b in zip(steps, steps[1:], strict=False)]
    np.testing.assert_allclose(np.concatenate([*found, parts.flush()]), heard, atol=1e-6)
    assert len(heard) == pytest.approx(1600, abs=2)
    expected = 0.3 * np.sin(np.arange(len(heard)) * 1.5 * (0.02 + 0.01 * seed))
    assert np.abs(heard - expected)[100:-100].max() < 0.02


@settings(max_examples=100)
@given(
    pieces=st.lists(st.tuples(st.floats(0, 0.6), st.integers(1, 900)), min_size=1, max_size=20),
    step=st.sampled_from([0.02, 0.08, 0.13]),
)
def test_silence_stands_in_for_sound_that_does_not_come(pieces, step):
    """Time never stands still for longer than what may come late, silence is never put inside of sound, and a client's
    own milliseconds stay its own."""
    microphone, now, sent, silent = Microphone(), 100.0, 0.0, 0.0
    microphone.came(now, 0.0)
    covered = now
    for pause, ms in pieces:
        until = now + pause
        while now < until:
            now = min(until, now + step)
            due = microphone.missing(now)
            assert not due or covered <= now - 0.08
            silent += 80.0 * due
            covered += 0.08 * due
            assert now - covered <= 0.2 + step + 1e-6
        start = sent + silent
        microphone.came(now, ms)
        covered = max(now, covered) + ms / 1e3
        assert microphone.client_ms(start + ms / 2) == pytest.approx(sent + ms / 2, abs=1)
        sent += ms
