"""What somebody does to the server who means it no good: everybody else is served as before, and memory stays flat."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from realtime_client import SILENCE, VOICE, get, kinds, of, until_true  # noqa: E402
from websockets.exceptions import ConnectionClosed  # noqa: E402

import minmo  # noqa: E402
from minmo.conversation import Phase  # noqa: E402
from minmo.conversation import events as E  # noqa: E402
from minmo.serving import app, items, protocol, sockets  # noqa: E402
from minmo.serving.guard import Denied, Guard, Limits  # noqa: E402
from minmo.serving.hall import Hall  # noqa: E402
from minmo.serving.recording import Recorder  # noqa: E402
from minmo.serving.session import Session  # noqa: E402
from minmo.serving.settings import SessionSettings  # noqa: E402
from minmo.serving.store import Shelf  # noqa: E402

MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two plus two"}]}
HOSTILE = {
    "a million lists": ('{"type": "x", "a": [' + "[]," * 1_000_000 + "[]]}", "message_too_large"),
    "half a million keys": ('{"type": "x"' + ', "k": 0' * 400_000 + "}", "message_too_large"),
    "a number of 4,000 digits": (
        '{"type": "conversation.item.truncate", "item_id": "mine", "content_index": ' + "9" * 4000 + "}",
        "missing_required_parameter",
    ),
    "another": (
        '{"type": "conversation.item.truncate", "item_id": "mine", "audio_end_ms": 1, "content_index": '
        + "9" * 4000 + "}",
        "invalid_value",
    ),
    "a longer one": ('{"type": ' + "9" * 5000 + "}", "invalid_json"),
    "half a character": ('{"type": "\\ud800"}', "unknown_event"),
    "half a character as a name": ('{"type": "response.cancel", "\\udfff": 1}', "unknown_parameter"),
    "NUL": ('{"type": "input_audio_buffer.append", "audio": "AA\\u0000A"}', "invalid_audio"),
    "base64 of the web": ('{"type": "input_audio_buffer.append", "audio": "__--"}', "invalid_audio"),
    "base64 with lines": ('{"type": "input_audio_buffer.append", "audio": "AA\\nAA"}', "invalid_audio"),
    "base64 beyond its end": ('{"type": "input_audio_buffer.append", "audio": "AA==AA=="}', "invalid_audio"),
}  # fmt: skip


def a_session(sent, ended=None):
    ended = [] if ended is None else ended
    end = lambda code, why: ended.append(code)  # noqa: E731
    return Session(SessionSettings("nano", 64), minmo.Settings(max_text_tokens=64), 24_000, sent.append, end)


def test_hostile_messages(serve, scripted, client):
    c = client(serve(scripted()))
    c.send("conversation.item.create", item={**MESSAGE, "id": "mine"})
    c.until("conversation.item.done")
    for name, (text, code) in HOSTILE.items():
        c.socket.send(text)
        error = c.error()
        assert error["code"] == code and len(error["message"]) < 600, (name, error)
    c.send("response.cancel", event_id="\ud800" * 600)
    assert c.error()["event_id"] == "\ud800" * 512
    with pytest.raises(protocol.ProtocolError, match="values"):
        protocol.decode("[" + "{}," * protocol.MOST_VALUES + "{}]")
    c.say(VOICE, SILENCE)
    c.until("response.created")


def test_text_that_is_none(serve, scripted, client):
    """A frame that is no UTF-8 ends its own connection."""
    running = serve(scripted())
    other, c = client(running), client(running)
    c.socket.send(b"\xff\xfe", text=True)
    with pytest.raises(ConnectionClosed) as closed:
        c.read()
    assert closed.value.rcvd.code == 1007
    until_true(lambda: len(running.scheduler.lines) == 1)
    other.say(VOICE, SILENCE)
    other.until("response.created")


@pytest.mark.parametrize(
    "host", ["[::1", "[evil]", "", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "2130706433"]
)
def test_hosts(serve, scripted, host):
    """What is no name of this machine is refused, with a sentence, and never fails."""
    running = serve(scripted())
    status, body = get(f"{running.url}/metrics", Host=host)
    assert status == 403 and json.loads(body)["error"]["code"] == "wrong_host"


def test_connections_on_which_nothing_comes(serve, scripted, client, monkeypatch):
    """Nothing, half a request, or half of a second one: they end, and beyond some no more are taken; who has a session
    or a whole request notices nothing."""
    monkeypatch.setattr(sockets, "REQUEST_S", 1.0)
    monkeypatch.setattr(sockets, "MOST_WAITING", 8)
    running = serve(scripted())
    c = client(running)
    whole = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n\r\n".encode()
    held = []
    for sent in (b"", whole[:20], whole + whole[:20]) * 2:
        held.append(socket.create_connection(("127.0.0.1", running.port)))
        held[-1].sendall(sent)
    assert get(f"{running.url}/health")[0] == 200
    held += [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]

    def over(one):
        one.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            while one.recv(4096):
                pass
        one.close()

    for one in held:
        over(one)
    c.say(VOICE, SILENCE)
    c.until("response.created")
    assert get(f"{running.url}/health")[0] == 200


def test_the_socket_of_a_client_that_does_not_read(serve, scripted, client, monkeypatch):
    """It pings, and reads neither sound nor pongs: what waits for it stays small, and its socket ends soon after it."""
    monkeypatch.setattr(sockets, "UNREAD_S", 0.2)
    monkeypatch.setattr("minmo.serving.connection.FAREWELL_S", 0.2)
    running = serve(scripted(reply_s=3600), limits=Limits(unread_s=2.0))
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", running.port))
    c = client(running, sock=raw, max_queue=1)
    connections = running.uvicorn.server_state.connections
    (own,) = connections
    c.say(VOICE, SILENCE)
    for _ in range(6):
        c.say(np.zeros(40 * 24_000, np.float32))
    until_true(lambda: not own.writable.is_set())
    full = own.transport.get_write_buffer_size()
    frame = b"\x89\xfd" + b"\0" * 4 + b"x" * 125  # a ping, masked with zeros
    with contextlib.suppress(OSError):
        raw.settimeout(5)
        for _ in range(200):
            raw.sendall(frame * 100)
            assert own.transport.get_write_buffer_size() <= full
    until_true(lambda: not running.scheduler.lines and not connections)


def test_a_flood_holds_nobody_up(serve, scripted, client):
    """Thousands of tiny events and of refused ones: another's turn goes on between them."""
    running = serve(scripted())
    flooding, other = client(running), client(running)
    over = threading.Event()

    def flood():
        tiny = json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(b"\0\0").decode()})
        with contextlib.suppress(ConnectionClosed):
            while not over.is_set():
                flooding.socket.send(tiny)
                flooding.socket.send('{"type": "response.create", "x": 1}')

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        other.say(VOICE, SILENCE, SILENCE)
        other.until("response.done")
    finally:
        over.set()
        thread.join(60)
    assert running.scheduler.alive


def test_sound_that_is_none_does_not_stop_the_clock(serve, scripted, client):
    """Silence takes the place of empty pieces: a reply that runs is heard to its end."""
    c = client(serve(scripted(reply_s=0.8)))
    c.say(VOICE, SILENCE[:12_000])
    over = threading.Event()

    def nothing():
        while not over.is_set():
            c.send("input_audio_buffer.append", audio="")
            time.sleep(0.02)

    thread = threading.Thread(target=nothing)
    thread.start()
    try:
        c.until("response.done")
    finally:
        over.set()
        thread.join(60)


def test_more_sound_than_may_wait_is_not_even_read(serve, scripted, client):
    c = client(serve(scripted()))
    c.send("session.update", session={"type": "realtime", "audio": {"input": {"format": {"type": "audio/pcmu"}}}})
    c.until("session.updated")
    c.send("input_audio_buffer.append", audio=base64.b64encode(bytes(3_000_000)).decode())
    error = c.error()
    assert error["code"] == "no_room" and error["message"].startswith("375.0 s")


def test_ids_that_collide(serve, scripted, client):
    """Not with an item that is, and not with the one that the sound will become."""
    c = client(serve(scripted(reply_s=30)))
    c.say(VOICE)
    coming = c.until("input_audio_buffer.speech_started")[-1]["item_id"]
    c.send("conversation.item.create", item={**MESSAGE, "id": coming})
    assert c.error()["code"] == "item_id_taken"
    c.say(SILENCE)
    replied = of("response.output_item.added", c.until("response.output_audio.delta"))[0]["item"]["id"]
    c.send("conversation.item.create", item={**MESSAGE, "id": replied})
    assert c.error()["code"] == "item_id_taken"


def test_more_items_than_are_kept_while_a_reply_runs(serve, scripted, client, monkeypatch):
    """The reply's own item is among those that can be named no more; it ends as any other."""
    monkeypatch.setattr(items, "MOST_ITEMS", 3)
    c = client(serve(scripted(reply_s=30)))
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    for _ in range(5):
        c.send("conversation.item.create", item=MESSAGE)
        c.until("conversation.item.done")
    c.send("response.cancel")
    assert c.until("response.done")[-1]["response"]["status"] == "cancelled"


def test_truncating_what_still_sounds(serve, scripted, client):
    """Who has stopped playing stops the reply, and its item holds what was heard and no more."""
    c = client(serve(scripted(reply_s=30)))
    c.say(VOICE, SILENCE)
    item = of("response.output_item.added", c.until("response.output_audio.delta"))[0]["item"]["id"]
    c.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=40)
    came = c.until("conversation.item.truncated")
    assert of("response.done", came)[0]["response"]["status"] == "cancelled"
    c.say(SILENCE)
    c.send("conversation.item.retrieve", item_id=item)
    content = c.until("conversation.item.retrieved")[-1]["item"]["content"][0]
    assert len(base64.b64decode(content["audio"])) == 40 * 48


def test_a_storm_of_requests(serve, scripted, client):
    """Responses asked for and cancelled as fast as can be, settings changed in between: each is answered once, every
    response that begins ends, and the session lives."""
    c = client(serve(scripted(reply_s=30)))
    c.update(turn_detection=None)
    for n in range(40):
        c.send("conversation.item.create", item=MESSAGE)
        c.send("response.create")
        c.send("response.create")
        c.send("session.update", session={"type": "realtime", "max_output_tokens": 1 + n})
        c.send("response.cancel")
        c.send("response.cancel")
    c.send("session.update", session={"type": "realtime", "max_output_tokens": "inf"})
    came = []
    while not came or came[-1].get("session", {}).get("max_output_tokens") != "inf":
        came.append(c.read())
    names = [event["type"] for event in came]
    assert names.count("response.created") == names.count("response.done") == 40
    assert names.count("error") == 80 and names.count("session.updated") == 41


def test_codes_that_clients_make_up(serve, scripted, client):
    """They are no labels: what is kept for metrics does not grow by what clients do."""
    running = serve(scripted())
    for code in (3001, 4567, 1000):
        client(running).socket.close(code)
    until_true(lambda: not running.server.hall.live)
    families = text_string_to_metric_families(get(f"{running.url}/metrics")[1])
    codes = {s.labels["code"]: s.value for f in families for s in f.samples if s.name == "minmo_closed_total"}
    assert codes == {"client": 2.0, "1000": 1.0}


def test_one_who_goes_while_the_conversation_opens():
    """The line that comes late is closed by itself."""
    opening, go, closed = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        def open(self, *_, **__):
            opening.set()
            go.wait(60)
            return type("Late", (), {"close": lambda self: closed.set()})()

    async def cancelled():
        settings = SessionSettings("nano", 64)
        hall = Hall(Slow(), settings, minmo.Settings(max_text_tokens=64), Limits(), Shelf(60.0, 1))
        session = a_session([])
        entering = asyncio.ensure_future(hall._open(session, None))
        await asyncio.to_thread(opening.wait, 60)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        go.set()
        await asyncio.to_thread(closed.wait, 60)

    asyncio.run(cancelled())
    assert closed.is_set()


def test_an_engine_that_has_failed(serve, scripted, client, monkeypatch):
    running = serve(scripted())
    monkeypatch.setattr(running.scheduler, "open", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("it is gone")))
    c = client(running, greeted=False)
    error = c.error()
    assert error["type"] == "server_error" and "it is gone" in error["message"] and c.closed()[0] == 1011
    assert not running.server.hall.live


def test_a_disk_that_is_full(serve, scripted, client, tmp_path, monkeypatch):
    """Before a session, or within one: it ends with an error event; nobody else's does."""
    running = serve(scripted(reply_s=30), record=tmp_path)
    c, other = client(running), client(running)
    c.say(VOICE, SILENCE)
    c.until("response.output_audio.delta")
    (session, *_) = [s for s in running.server.hall.live if s.id == c.greeting["session"]["id"]]
    monkeypatch.setattr(session.recorder, "assistant", lambda sound: (_ for _ in ()).throw(OSError(28, "full")))
    c.say(SILENCE)
    assert c.error()["type"] == "server_error" and c.closed()[0] == 1011
    monkeypatch.setattr(app, "Recorder", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    third = client(running, greeted=False)
    assert "record" in third.error()["message"] and third.closed()[0] == 1011
    other.say(VOICE, SILENCE)
    other.until("response.output_audio.delta")


def test_a_recording_holds_its_sound_once(tmp_path):
    recorder = Recorder(tmp_path, "sess_1", 24_000)
    recorder.event({"type": "conversation.item.retrieved", "item": {"id": "a", "content": [{"audio": "AAAA" * 99}]}})
    recorder.event({"type": "response.output_audio.delta", "delta": "AAAA" * 99})
    recorder.event({"type": "response.output_text.delta", "delta": "four"})
    recorder.close()
    (file,) = tmp_path.glob("*/events.jsonl")
    assert "AAAA" not in file.read_text() and "four" in file.read_text()


def test_events_that_come_after_the_end():
    """They were on their way from the engine's thread as the session ended: they change nothing that is kept of it."""
    sent = []
    session = a_session(sent)
    session.close()
    session.on_events([E.TurnTaken(80.0, 0, 0.0), E.TextDelta(80.0, 0, "five")])
    assert not sent and not list(session.items)


def test_sound_that_comes_while_a_pause_is_answered():
    """It is the next item's: the turn that the pause has ended is one item."""
    sent, asked = [], []
    session = a_session(sent)
    session.updated(session.settings.updated({"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}))
    session._without_waiting = asked.append
    session.input.add_sound(bytes(48_000))
    session.on_events([E.SpeechStarted(240.0, 80.0), E.SpeechStopped(1640.0, 1000.0)])
    session.on_events([E.Decision(1680.0, 0.0, 0.0, Phase.LISTENING)])
    session.input.add_sound(bytes(960))
    session.on_events([E.TurnTaken(1760.0, 0, 1000.0)])
    assert len(asked) == 1 and kinds(sent).count("input_audio_buffer.committed") == 1
    assert session.input.sound_ms == 20.0


def test_clocks_that_jump(serve, scripted, client, monkeypatch):
    """The wall clock may go anywhere. The steady one stands still while a laptop sleeps, or leaps: of an hour that
    nobody heard, no more silence is heard than of a moment."""
    c = client(serve(scripted()))
    for hours in (1, -48, 1e5):
        monkeypatch.setattr(time, "time", lambda kept=time.time, hours=hours: kept() + 3600 * hours)
        c.say(VOICE, SILENCE, SILENCE)
        c.until("response.done")
    now, heard = [1000.0], []
    session = Session(
        SessionSettings("nano", 64), minmo.Settings(max_text_tokens=64), 24_000, print, print, clock=lambda: now[0]
    )
    session.begin(type("Line", (), {"hear": lambda self, sound: heard.append(len(sound))})())
    session._phase = Phase.SPEAKING
    for leap in (0.3, 3600.0, 0.08, 0.08, 1e6):
        now[0] += leap
        session._at_ms = session.microphone._heard_ms
        session.tick()
    assert max(heard) <= 5 * 1280 and sum(heard) < 20 * 1280


def test_keys_of_others_do_not_resume():
    guard = Guard(["k" * 32, "j" * 32])

    def ask(**headers):
        return guard.admit(type("Asked", (), {"headers": {"host": "localhost", **headers}})())

    assert ask(authorization="bearer  " + "j" * 32) == "1"
    for key in ("", "k" * 31, "k" * 33, "k" * 32 + "j" * 32, "\xff" * 32, "k" * 31 + "\x00"):
        with pytest.raises(Denied, match="API key"):
            ask(authorization=f"Bearer {key}")
