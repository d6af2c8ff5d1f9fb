"""Who may come in: keys, hosts, origins, the address, and the limits of a client."""

from __future__ import annotations

import json
import socket
import time

import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from realtime_client import SILENCE, Client, get  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from minmo.serving import command  # noqa: E402
from minmo.serving.guard import Guard, Limits  # noqa: E402


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
