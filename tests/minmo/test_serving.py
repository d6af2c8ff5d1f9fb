"""The server over loopback, its conversations scripted: the protocol, its errors, limits, keys, resume, and what
clients may do to it. Every event that it sends is one of the stock SDK's types, or one of ours by name."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")
sdk = pytest.importorskip("openai.types.realtime", reason="the stock client: pip install 'openai[realtime]'")

import pydantic  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

import minmo  # noqa: E402
from minmo.conversation import Phase  # noqa: E402
from minmo.conversation import events as E  # noqa: E402
from minmo.serving import command  # noqa: E402
from minmo.serving.app import PAGE, PAGES  # noqa: E402
from minmo.serving.guard import Guard, Limits  # noqa: E402
from minmo.serving.microphone import Microphone  # noqa: E402
from minmo.serving.protocol import ProtocolError  # noqa: E402
from minmo.serving.session import Session  # noqa: E402
from minmo.serving.settings import SessionSettings  # noqa: E402
from minmo.serving.sound import FORMATS, Encoding  # noqa: E402

SERVER_EVENT = pydantic.TypeAdapter(sdk.RealtimeServerEvent)
OURS = {
    "session.resumed", "session.replaced", "response.listen", "response.speak", "response.interrupted",
    "playback.acknowledged",
}  # fmt: skip
VOICE = (0.2 * np.sin(2 * np.pi * 300 / 24_000 * np.arange(24_000))).astype(np.float32)
SILENCE = np.zeros(24_000, np.float32)
REPLY = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]
"""A spoken reply, runs of deltas taken as one."""


def pcm(sound):
    return base64.b64encode((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes()).decode()


class Client:
    """A client that keeps all it was sent, and holds it against the SDK's types."""

    def __init__(self, url, **options):
        self.socket = connect(url, **{"max_size": None, "max_queue": None, "close_timeout": 1, **options})
        self.events = []

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def say(self, *sounds):
        for sound in sounds:
            self.send("input_audio_buffer.append", audio=pcm(sound))

    def read(self, timeout=60):
        event = json.loads(self.socket.recv(timeout))
        if event["type"] not in OURS:
            SERVER_EVENT.validate_python(event)
        self.events.append(event)
        return event

    def until(self, kind, timeout=60):
        """-> the events that came, the last of that type."""
        came = []
        while not came or came[-1]["type"] != kind:
            came.append(self.read(timeout))
            assert came[-1]["type"] != "error" or kind == "error", came[-1]
        return came

    def error(self):
        return self.until("error")[-1]["error"]

    def closed(self):
        """-> the code and reason with which the server closes."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.read()
        return closed.value.rcvd.code, closed.value.rcvd.reason

    def update(self, **audio_input):
        self.send("session.update", session={"type": "realtime", "audio": {"input": audio_input}})
        return self.until("session.updated")[-1]["session"]


@pytest.fixture
def client():
    """client(running, query, **options of websockets) -> Client, that has been greeted."""
    with contextlib.ExitStack() as stack:

        def start(running, query="", greeted=True, **options):
            one = Client(running.ws(query), **options)
            stack.callback(one.socket.close)
            if greeted:
                one.greeting = one.read()
            return one

        yield start


def kinds(events):
    """Types in order, runs of one type taken as one."""
    names = [event["type"] for event in events if not event["type"].startswith(("response.listen", "response.speak"))]
    return [name for n, name in enumerate(names) if n == 0 or names[n - 1] != name]


def of(kind, events):
    return [event for event in events if event["type"] == kind]


def until_true(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come about")


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# The protocol.


def test_a_spoken_turn(serve, scripted, client):
    """Names and order of a turn, its sound whole, and what is kept of it."""
    c = client(serve(scripted(reply_s=0.8)))
    assert c.greeting["type"] == "session.created" and "resume_token" not in c.greeting
    c.update(transcription={"model": "nano"})
    c.say(VOICE, SILENCE, SILENCE)
    came = c.until("response.done")
    at = kinds(came).index("response.created")
    assert kinds(came)[:at] == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    told = [kind for kind in kinds(came)[at:] if "input_audio_transcription" not in kind]
    assert told == REPLY
    started, stopped, committed = came[:3]
    assert started["item_id"] == stopped["item_id"] == committed["item_id"]
    assert started["audio_start_ms"] == 0 and 1000 <= stopped["audio_end_ms"] <= 1500
    sound = b"".join(base64.b64decode(event["delta"]) for event in of("response.output_audio.delta", came))
    expected = np.round(0.3 * np.sin(2 * np.pi * 440 / 24_000 * np.arange(19_200)) * 32768)
    np.testing.assert_allclose(np.frombuffer(sound, "<i2"), expected, atol=1)
    done = came[-1]["response"]
    assert done["status"] == "completed" and done["status_details"] is None
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "three and four"}]
    transcript = of("conversation.item.input_audio_transcription.completed", came)
    assert [(t["item_id"], t["transcript"]) for t in transcript] == [(committed["item_id"], "what is it")]
    c.send("conversation.item.retrieve", item_id=done["output"][0]["id"])
    content = c.until("conversation.item.retrieved")[-1]["item"]["content"][0]
    assert base64.b64decode(content["audio"]) == sound
    ids = [event["event_id"] for event in c.events]
    assert len(set(ids)) == len(ids)


def test_barge_in(serve, scripted, client):
    """The reply is told to be over before the voice is told to have begun; a client says what it has played of it."""
    running = serve(scripted(reply_s=30))
    c = client(running)
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    c.say(VOICE)
    came = c.until("input_audio_buffer.speech_started")
    assert kinds(came)[-7:] == [*REPLY[-6:], "input_audio_buffer.speech_started"]
    done = of("response.done", came)[0]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "turn_detected")
    item = done["output"][0]["id"]
    c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=80)
    c.until("conversation.item.truncated")
    assert running.scheduler.opened[0].conversation.acknowledged == [(0, 80)]
    c.send("conversation.item.retrieve", item_id=item)
    content = c.until("conversation.item.retrieved")[-1]["item"]["content"][0]
    assert content["transcript"] is None and len(base64.b64decode(content["audio"])) == 80 * 48
    c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=10_000)
    assert c.error()["param"] == "audio_end_ms"


def test_a_voice_that_does_not_interrupt_is_told_after_the_reply(serve, scripted, client):
    running = serve(scripted(reply_s=2))
    c = client(running)
    c.update(turn_detection={"type": "semantic_vad", "interrupt_response": False})
    c.say(VOICE, SILENCE)
    c.until("response.created")
    c.say(VOICE, VOICE, VOICE)
    came = c.until("input_audio_buffer.speech_started")
    assert of("response.done", came)[0]["response"]["status"] == "completed"


def test_push_to_talk(serve, scripted, client):
    running = serve(scripted(reply_s=20))
    c = client(running)
    assert c.update(turn_detection=None)["audio"]["input"]["turn_detection"] is None
    c.send("input_audio_buffer.commit")
    assert c.error()["code"] == "input_audio_buffer_commit_empty"
    c.say(VOICE)
    c.send("input_audio_buffer.clear")
    assert kinds(c.until("input_audio_buffer.cleared")) == ["input_audio_buffer.cleared"]
    c.send("response.create")
    assert "nothing was heard" in c.error()["message"]
    c.say(VOICE)
    c.send("input_audio_buffer.commit")
    c.send("response.create", response={"metadata": {"turn": "1"}})
    came = c.until("response.output_audio.delta")
    assert kinds(came)[:4] == [
        "input_audio_buffer.committed", "conversation.item.added", "conversation.item.done", "response.created",
    ]  # fmt: skip
    assert of("response.created", came)[0]["response"]["metadata"] == {"turn": "1"}
    c.send("response.create")
    assert c.error()["code"] == "conversation_already_has_active_response"
    c.send("response.cancel", response_id="resp_of_somebody")
    assert c.error()["code"] == "response_cancel_not_active"
    c.send("response.cancel")
    done = c.until("response.done")[-1]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    c.send("response.cancel")
    assert c.error()["code"] == "response_cancel_not_active"


def test_a_pause_ends_the_turn_with_server_vad(serve, scripted, client):
    running = serve(scripted())
    c = client(running)
    c.update(turn_detection={"type": "server_vad", "silence_duration_ms": 800})
    c.say(VOICE, SILENCE[:12_000], VOICE, SILENCE, SILENCE)
    came = c.until("response.done")
    assert kinds(came).count("input_audio_buffer.speech_stopped") == 2
    assert kinds(came).count("input_audio_buffer.committed") == kinds(came).count("response.created") == 1
    assert kinds(came).index("response.created") > kinds(came)[2:].index("input_audio_buffer.speech_stopped")


def test_turns_without_replies(serve, scripted, client):
    """create_response false: the predictor commits the turn, and the client asks for the reply."""
    c = client(serve(scripted()))
    # A scripted predictor is sure for one tick.
    c.update(turn_detection={"type": "semantic_vad", "eagerness": "high", "create_response": False})
    c.say(VOICE, SILENCE)
    assert "response.created" not in kinds(c.until("conversation.item.done"))
    c.send("response.create")
    c.until("response.done")


def test_typed_turns_in_text(serve, scripted, client):
    running = serve(scripted())
    c = client(running)
    message = {
        "type": "message",
        "role": "user",
        "id": "mine",
        "content": [{"type": "input_text", "text": "two plus two"}],
    }
    c.send("conversation.item.create", item=message)
    assert kinds(c.until("conversation.item.done")) == ["conversation.item.added", "conversation.item.done"]
    c.send("conversation.item.create", item=message)
    assert c.error()["code"] == "item_id_taken"
    c.send("response.create", response={"output_modalities": ["text"]})
    came = c.until("response.done")
    text = "".join(event["delta"] for event in of("response.output_text.delta", came))
    assert text == came[-1]["response"]["output"][0]["content"][0]["text"] == "three and four"
    assert not of("response.output_audio.delta", came)
    assert running.scheduler.opened[0].conversation.settings.speak  # of that response alone
    c.send("conversation.item.delete", item_id="mine")
    gone = [c.until("conversation.item.deleted")[-1]["item_id"] for _ in range(2)]
    assert gone == ["mine", came[-1]["response"]["output"][0]["id"]]
    assert running.scheduler.opened[0].conversation.removed == [0]
    c.send("conversation.item.retrieve", item_id="mine")
    assert c.error()["code"] == "item_not_found"


@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_telephones(serve, scripted, client, name):
    running = serve(scripted(reply_s=0.8))
    c = client(running)
    audio = {"input": {"format": {"type": name}}, "output": {"format": {"type": name}}}
    c.send("session.update", session={"type": "realtime", "audio": audio})
    c.until("session.updated")
    encoder = Encoding(name, 24_000, to_wire=True)
    data = encoder.encode(np.concatenate([VOICE, SILENCE, SILENCE]), final=True)
    assert len(data) == 3 * 8000
    c.send("input_audio_buffer.append", audio=base64.b64encode(data).decode())
    came = c.until("response.done")
    sound = b"".join(base64.b64decode(event["delta"]) for event in of("response.output_audio.delta", came))
    assert len(sound) == round(0.8 * 8000)


def test_the_stock_sdk_asks_for_what_is_not_there(serve, scripted, client):
    """Every update is taken as a whole or refused as a whole."""
    c = client(serve(scripted()))
    before = c.greeting["session"]
    for session in (
        {"instructions": "be brief"},
        {"tools": [{"type": "function", "name": "f"}]},
        {"output_modalities": ["text"], "audio": {"output": {"voice": "alloy"}}},
        {"output_modalities": ["text"], "audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}},
        {"output_modalities": ["audio", "text"]},
        {"output_modalities": ["text"], "model": "gpt-realtime"},
        {"output_modalities": ["text"], "audio": {"input": {"turn_detection": {"type": "telepathy"}}}},
        {"output_modalities": ["text"], "temperature": 0.8},
        {"max_output_tokens": 0},
    ):
        c.send("session.update", event_id="mine", session={"type": "realtime", **session})
        error = c.error()
        assert error["type"] == "invalid_request_error" and error["event_id"] == "mine" and error["param"]
    c.send("session.update", session={"type": "realtime"})
    assert c.until("session.updated")[-1]["session"] == before


# What clients do wrong. Each is one clear error, and the session lives.

BROKEN = {
    "no JSON": ("{", "invalid_json"),
    "NaN": ('{"type": NaN}', "invalid_json"),
    "deep": ("[" * 100_000, "invalid_json"),
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
    assert running.scheduler.lines[0].heard_samples >= 1.6 * 16_000


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


# Who may come in.


def test_keys(serve, scripted, client):
    key = "k" * 32
    running = serve(scripted(), guard=Guard([key, "j" * 32]))
    for options in ({}, {"additional_headers": {"Authorization": "Bearer wrong"}}, {"query": f"?api_key={key}"}):
        with pytest.raises(InvalidStatus) as denied:
            client(running, options.pop("query", ""), **options)
        assert denied.value.response.status_code == 401
        assert json.loads(denied.value.response.body)["error"]["code"] == "invalid_api_key"
    client(running, additional_headers={"Authorization": f"Bearer {key}"})
    c = client(running, subprotocols=["realtime", f"openai-insecure-api-key.{key}"])
    assert c.socket.subprotocol == "realtime"
    assert get(f"{running.url}/metrics")[0] == 401
    assert get(f"{running.url}/metrics", Authorization=f"Bearer {key}")[0] == 200
    assert get(f"{running.url}/health")[0] == get(f"{running.url}/ready")[0] == get(running.url)[0] == 200


@pytest.mark.parametrize(
    "host, origin", [("", "https://evil.example"), ("", "null"), ("evil.example", "http://evil.example")]
)
def test_pages_of_other_sites(serve, scripted, client, host, origin):
    """Also one whose name has been pointed at this machine."""
    running = serve(scripted())
    raw = socket.create_connection(("127.0.0.1", running.port))
    with pytest.raises(InvalidStatus) as denied:
        Client(f"ws://{host or '127.0.0.1'}/v1/realtime", sock=raw, origin=origin)
    assert denied.value.response.status_code == 403
    raw.close()


def test_our_own_page_and_those_that_are_let_in(serve, scripted, client):
    running = serve(scripted(), guard=Guard(origins=["https://friend.example"]))
    client(running, origin=running.url)
    client(running, origin="https://friend.example")


def test_it_does_not_open_to_strangers(tmp_path, monkeypatch):
    """All of it is said before a model is loaded."""
    monkeypatch.setattr(command.FastMinMo, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    (short := tmp_path / "short").write_text("secret\n")
    (empty := tmp_path / "empty").write_text("\n")
    (pem := tmp_path / "cert.pem").write_text("")
    for options, word in (
        ({"host": "0.0.0.0"}, "--api-keys"),
        ({"host": "192.168.0.7"}, "--api-keys"),
        ({"api_keys": short}, "16 characters"),
        ({"api_keys": empty}, "no API key"),
        ({"tls_cert": pem}, "go together"),
        ({"tls_cert": pem, "tls_key": tmp_path / "none.pem"}, "none.pem"),
    ):
        with pytest.raises(ValueError, match=word):
            command.serve(**options)


def test_the_address(serve, scripted, client):
    running = serve(scripted())
    for query, word in (("?model=gpt-realtime", "nano"), ("?duplex=yes", "duplex"), ("?key=secret", "key")):
        c = client(running, query, greeted=False)
        assert word in c.error()["message"]
        assert c.closed()[0] == 1008
    assert client(running, "?model=nano").greeting["session"]["model"] == "nano"


def test_limits(serve, scripted, client):
    limits = Limits(sessions_per_key=2, idle_s=1.0, session_s=3.0)
    running = serve(scripted(rooms=1), limits=limits)
    c = client(running)
    c2 = client(running, greeted=False)
    assert "time for no more" in c2.error()["message"] and c2.closed()[0] == 1013
    assert c.error()["code"] == "session_idle" and c.closed()[0] == 1001
    running.scheduler.rooms = 9
    c, other = client(running), client(running)
    with pytest.raises(InvalidStatus) as denied:
        client(running)
    assert denied.value.response.status_code == 429
    with pytest.raises(ConnectionClosed):
        while True:
            c.say(SILENCE[:960])
            other.say(SILENCE[:960])
            time.sleep(0.04)
    assert c.error()["code"] == "session_expired"


# Duplex, resume, the end.


def test_duplex_events(serve, scripted, client):
    running = serve(scripted(reply_s=30))
    c = client(running, "?duplex=1")
    c.say(VOICE, SILENCE, SILENCE)
    came = c.until("response.output_audio.delta")
    decisions = [e for e in came if e["type"] in ("response.listen", "response.speak")]
    assert decisions[0]["type"] == "response.listen" and decisions[0]["at_ms"] == 80
    response = of("response.created", came)[0]["response"]["id"]
    c.send("playback.ack", response_id=response, played_ms=40)
    assert c.until("playback.acknowledged")[-1]["playback"]["played_ms"] == 40
    assert running.scheduler.opened[0].conversation.acknowledged == [(0, 40)]
    c.send("playback.ack", response_id=response, played_ms=1e6)
    assert c.error()["param"] == "played_ms"
    c.say(VOICE)
    cut = c.until("response.interrupted")[-1]
    assert cut["response_id"] == response and cut["heard_text"] == "three and " and cut["decided_ms"] == 240


def test_resume(serve, scripted, client):
    """A dropped client comes back to its settings and its history; each token serves once."""
    running = serve(scripted(reply_s=30), limits=Limits(resume_s=60))
    c = client(running, "?duplex=1")
    c.update(turn_detection={"type": "semantic_vad", "eagerness": "low"})
    c.say(VOICE, SILENCE)
    response = of("response.output_item.added", c.until("response.output_audio.delta"))[0]
    c.socket.socket.close()
    until_true(lambda: not running.scheduler.lines)
    again = client(running, f"?resume={c.greeting['resume_token']}")
    greeting = again.greeting
    assert greeting["type"] == "session.resumed" and greeting["resume_token"] != c.greeting["resume_token"]
    assert greeting["session"]["audio"]["input"]["turn_detection"]["eagerness"] == "low"
    assert [item["role"] for item in greeting["items"]] == ["user", "assistant"]
    assert greeting["items"][1]["id"] == response["item"]["id"] and greeting["items"][1]["status"] == "incomplete"
    assert len(running.scheduler.opened[1].conversation.history.exchanges) == 1
    again.send("conversation.item.delete", item_id=response["item"]["id"])
    again.until("conversation.item.deleted")
    late = client(running, f"?resume={c.greeting['resume_token']}", greeted=False)
    assert late.error()["code"] == "session_not_found" and late.closed()[0] == 1008


def test_two_sockets_for_one_session(serve, scripted, client):
    """The later one has it; the other is told."""
    running = serve(scripted(reply_s=30))
    c = client(running, "?duplex=1")
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    later = client(running, f"?resume={c.greeting['resume_token']}")
    assert later.greeting["type"] == "session.resumed"
    came = c.until("session.replaced")
    assert c.closed()[0] == 4000 and came
    assert len(running.scheduler.lines) == 1
    later.say(VOICE, SILENCE)
    later.until("response.created")


def test_tokens_end(serve, scripted, client):
    running = serve(scripted(), limits=Limits(resume_s=0.2), guard=Guard(["k" * 32, "j" * 32]))
    mine, yours = ({"additional_headers": {"Authorization": f"Bearer {key * 32}"}} for key in "kj")
    c = client(running, "?duplex=1", **mine)
    token = f"?resume={c.greeting['resume_token']}"
    stolen = client(running, token, greeted=False, **yours)
    assert stolen.error()["code"] == "session_not_found"
    c.socket.close()
    until_true(lambda: not running.scheduler.lines)
    time.sleep(0.5)
    assert client(running, token, greeted=False, **mine).error()["code"] == "session_not_found"


def test_drain(serve, scripted, client):
    """Who is idle is sent away at once, who is being spoken to hears the end; nobody comes in."""
    running = serve(scripted(reply_s=1.6))
    running.uvicorn._seconds = 60
    speaking, idle = client(running), client(running)
    speaking.say(VOICE, SILENCE)
    speaking.until("response.output_audio.delta")
    running.uvicorn.handle_exit(15, None)
    assert idle.error()["code"] == "draining" and idle.closed()[0] == 1012
    assert get(f"{running.url}/ready")[0] == 503 and get(f"{running.url}/health")[0] == 200
    with pytest.raises(InvalidStatus) as denied:
        client(running)
    assert denied.value.response.status_code == 503
    assert speaking.until("response.done")[-1]["response"]["status"] == "completed"
    assert speaking.error()["code"] == "draining" and speaking.closed()[0] == 1012
    until_true(lambda: running.uvicorn.should_exit)


def test_metrics(serve, scripted, client):
    running = serve(scripted())
    c = client(running)
    c.send("nonsense")
    c.error()
    found = {s.name: s for f in text_string_to_metric_families(get(f"{running.url}/metrics")[1]) for s in f.samples}
    assert found["minmo_sessions"].value == 1
    assert found["minmo_errors_total"].labels == {"code": "unknown_event"}
    for name in ("tick", "first_audio", "stop_decided", "stop_sent", "stop_played"):
        assert f"minmo_{name}_seconds" in found
    assert {"minmo_deadline_misses_total", "minmo_waiting", "minmo_lag_seconds"} <= found.keys()


def test_nothing_is_kept_unless_asked(serve, scripted, client, tmp_path, caplog):
    caplog.set_level("DEBUG", logger="minmo")
    running = serve(scripted(reply_s=0.8))
    c = client(running)
    c.update(transcription={"model": "nano"})
    c.say(VOICE, SILENCE, SILENCE)
    c.until("response.done")
    c.socket.close()
    until_true(lambda: not running.server.hall.live)
    ours = "".join(r.getMessage() + str(vars(r)) for r in caplog.records if r.name.startswith("minmo"))
    assert c.greeting["session"]["id"] in ours and "three and" not in ours and "what is it" not in ours
    recorded = serve(scripted(reply_s=0.8), record=tmp_path)
    c = client(recorded)
    c.say(VOICE, SILENCE, SILENCE)
    c.until("response.done")
    c.socket.close()
    until_true(lambda: not recorded.server.hall.live)
    (folder,) = tmp_path.iterdir()
    assert abs(len(minmo.load_audio(folder / "user.wav")) - 3 * 16_000) < 800  # the resampler keeps back 33 ms
    assert len(minmo.load_audio(folder / "assistant.wav")) == pytest.approx(0.8 * 16_000, abs=2)
    until_true(lambda: "three and four" in (folder / "events.jsonl").read_text())


def test_the_page_is_whole(serve, scripted):
    """No outside resource, and headers that would not let one in."""
    running = serve(scripted())
    for path, (name, kind) in PAGES.items():
        with urllib.request.urlopen(running.url + path, timeout=60) as answer:
            assert answer.headers.get_content_type() == kind
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert answer.read() == (PAGE / name).read_bytes()
        assert not re.findall(r"(?:https?:)?//[a-z]+\.[a-z]", (PAGE / name).read_text())
    assert get(f"{running.url}/../app.py")[0] == 404


# Laws of the parts.


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
