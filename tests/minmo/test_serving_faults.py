"""What clients do wrong: each is one clear error, the session lives, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import re
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from realtime_client import SILENCE, VOICE, of, until_true  # noqa: E402
from websockets.exceptions import ConnectionClosed  # noqa: E402

from minmo.serving.guard import Limits  # noqa: E402
from minmo.serving.protocol import ProtocolError  # noqa: E402
from minmo.serving.settings import SessionSettings  # noqa: E402

BROKEN = {
    "no JSON": ("{", "invalid_json"),
    "NaN": ('{"type": NaN}', "invalid_json"),
    "deep": ("[" * 9_000, "invalid_json"),
    "deeper": ("[" * 100_000, "message_too_large"),
    "no object": ("[]", "invalid_json"),
    "no type": ("{}", "missing_required_parameter"),
    "type is no string": ('{"type": 3}', "missing_required_parameter"),
    "unknown": ('{"type": "session.destroy"}', "unknown_event"),
    "beta name": ('{"type": "input_audio_buffer.appendix", "audio": ""}', "unknown_event"),
    "duplex only": ('{"type": "playback.ack", "response_id": "x", "played_ms": 1}', "unknown_event"),
    "no audio": ('{"type": "input_audio_buffer.append"}', "missing_required_parameter"),
    "audio null": ('{"type": "input_audio_buffer.append", "audio": null}', "invalid_type"),
    "no base64": ('{"type": "input_audio_buffer.append", "audio": "*&^"}', "invalid_audio"),
    "half a sample": ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "invalid_audio"),
    "unknown field": ('{"type": "input_audio_buffer.commit", "final": true}', "unknown_parameter"),
    "session is a list": ('{"type": "session.update", "session": []}', "invalid_type"),
    "audio is a list": ('{"type": "session.update", "session": {"audio": [1]}}', "invalid_type"),
    "no item": ('{"type": "conversation.item.retrieve", "item_id": "nobody"}', "item_not_found"),
    "item is a list": ('{"type": "conversation.item.delete", "item_id": []}', "item_not_found"),
    "a tool's answer": (
        '{"type": "conversation.item.create", "item": {"type": "function_call_output"}}',
        "unknown_parameter|unsupported",
    ),
    "empty text": (
        '{"type": "conversation.item.create", "item": {"type": "message", "role": "user", '
        '"content": [{"type": "input_text", "text": " "}]}}',
        "invalid_request",
    ),
    "a huge number": ('{"type": "response.create", "response": {"max_output_tokens": 1e999}}', "invalid_type"),
    "too much": ('{"type": "input_audio_buffer.append", "audio": "' + "A" * (5 << 20) + '"}', "message_too_large"),
}  # fmt: skip


def test_malformed_messages(serve, scripted, client):
    c = client(serve(scripted()))
    for name, (text, code) in BROKEN.items():
        c.socket.send(text)
        error = c.error()
        assert re.fullmatch(code, error["code"]), (name, error)
        assert 10 < len(error["message"]) < 600
    c.socket.send(b"\x00\x01")
    assert c.error()["code"] == "invalid_json"
    c.say(VOICE, SILENCE)
    c.until("response.created")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([
    "output_modalities", "audio", "input", "output", "format", "turn_detection", "type", "eagerness", "voice", "rate",
    "max_output_tokens", "tools", "transcription", "model", "semantic_vad", "silence_duration_ms", "create_response",
])  # fmt: skip
shaped = st.recursive(
    json_values | names,
    lambda inner: st.dictionaries(names, inner, max_size=4) | st.lists(inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=300)
@given(given_settings=shaped)
def test_any_update_is_taken_or_refused(given_settings):
    before = SessionSettings("nano", 64)
    try:
        after = before.updated(given_settings)
    except ProtocolError as error:
        assert str(error) and error.code
    else:
        assert before.updated({}) == before
        json.dumps(after.as_json())
        # What is told is what would be asked for.
        told = {k: v for k, v in after.as_json().items() if k not in ("object", "id")}
        assert before.updated(told) == after


def test_frames_that_are_too_long(serve, scripted, client):
    """Of 16 MiB, the session lives; of more than anybody would send by mistake, the connection ends. Nobody else's."""
    running = serve(scripted())
    other, c = client(running), client(running)
    c.socket.send("A" * (16 << 20))
    assert c.error()["code"] == "message_too_large"
    with contextlib.suppress(ConnectionClosed):
        c.socket.send("A" * (33 << 20))
    with pytest.raises(ConnectionClosed):
        c.read()
    until_true(lambda: len(running.scheduler.lines) == 1)
    other.say(VOICE, SILENCE)
    other.until("response.created")


@pytest.mark.parametrize("samples", [24, 240_000])
def test_pieces_of_any_length(serve, scripted, client, samples):
    """1 ms and 10 s: the same turn."""
    running = serve(scripted())
    c = client(running)
    sound = np.concatenate([VOICE, SILENCE, SILENCE])[: 3 * 24_000]
    for at in range(0, len(sound), samples):
        c.say(sound[at : at + samples])
    came = c.until("response.created")
    assert came[0]["audio_start_ms"] == 0
    until_true(lambda: running.scheduler.lines[0].heard_samples >= 2.9 * 16_000)


def test_too_much_sound_at_once(serve, scripted, client):
    c = client(serve(scripted(), limits=Limits(message_bytes=16 << 20)))
    c.say(np.zeros(70 * 24_000, np.float32))
    assert c.error()["code"] == "no_room"
    c.say(VOICE, SILENCE)
    c.until("response.created")


def test_clients_that_vanish(serve, scripted, client):
    """In the middle of a reply, without a word: the rows are free at once."""
    running = serve(scripted(reply_s=30))
    other = client(running)
    c = client(running, "?duplex=1")
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    c.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    c.socket.socket.close()  # a reset, no closing handshake
    until_true(lambda: len(running.scheduler.lines) == 1)
    other.say(VOICE, SILENCE)
    other.until("response.created")


def test_clients_that_do_not_read(serve, scripted, client):
    """They are given up once so much is unread for so long, and hold nobody up."""
    running = serve(scripted(reply_s=3600), limits=Limits(unread_s=1.0))
    other = client(running)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", running.port))
    c = client(running, sock=raw, max_queue=1)
    c.say(VOICE, SILENCE)
    for _ in range(6):
        c.say(np.zeros(40 * 24_000, np.float32))  # of a reply as much is sent: more than the kernel's buffers hold
    until_true(lambda: len(running.scheduler.lines) == 1)
    other.say(VOICE, SILENCE)
    other.until("response.created")


def test_a_conversation_that_fails(serve, scripted, client):
    running = serve(scripted(reply_s=30))
    c = client(running)
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    running.scheduler.fault = "the flow's numbers became NaN"
    c.say(SILENCE)
    came = c.until("error")
    assert of("response.done", came)[0]["response"]["status"] == "failed"
    assert came[-1]["error"]["type"] == "server_error" and "NaN" in came[-1]["error"]["message"]
    assert c.closed()[0] == 1011
    running.scheduler.fault = ""
    other = client(running)
    other.say(VOICE, SILENCE)
    other.until("response.created")
