"""A session from its duplex events to its end: resumed, drained, counted, recorded or not; and the page's files."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from realtime_client import SILENCE, VOICE, get, of, until_true  # noqa: E402
from websockets.exceptions import InvalidStatus  # noqa: E402

import minmo  # noqa: E402
from minmo.serving.app import PAGE, PAGES  # noqa: E402
from minmo.serving.guard import Guard, Limits  # noqa: E402


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


def test_a_session_in_text_is_resumed_in_text(serve, scripted, client):
    """And its replies are as short as they were."""
    running = serve(scripted(reply_s=0.5))
    c = client(running, "?duplex=1")
    c.send("session.update", session={"type": "realtime", "output_modalities": ["text"], "max_output_tokens": 7})
    c.until("session.updated")
    c.socket.close()
    again = client(running, f"?resume={c.greeting['resume_token']}")
    assert again.greeting["session"]["output_modalities"] == ["text"]
    again.say(VOICE, SILENCE, SILENCE)
    assert not of("response.output_audio.delta", again.until("response.done"))
    drawn = running.scheduler.opened[1].conversation.settings
    assert not drawn.speak and drawn.max_text_tokens == 7


def test_who_has_all_sessions_that_may_be_resumes_one_of_them(serve, scripted, client):
    """Its connection may be lost, of which the server does not know yet."""
    running = serve(scripted(), limits=Limits(sessions_per_key=1))
    c = client(running, "?duplex=1")
    with pytest.raises(InvalidStatus):
        client(running, "?resume=another")
    assert client(running, f"?resume={c.greeting['resume_token']}").greeting["type"] == "session.resumed"


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
