"""Who may come in: keys, hosts, origins, the address, and the limits of a client."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
import urllib.request

import pytest

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")

from realtime_client import SILENCE, VOICE, Client, get, until_true  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from minmo.serving import command, plan  # noqa: E402
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
    monkeypatch.setattr(plan.FastMinMo, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
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


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """certified(name) -> a self-signed certificate of 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")

    def make(name):
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        try:
            subprocess.run([*command, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no openssl here to make a certificate")
        return certificate, key

    return make


def test_tls(serve, scripted, client, certified):
    """By a handshake: who trusts the certificate talks, nobody else does, and nobody in the clear."""
    certificate, key = certified("ours")
    running = serve(scripted(reply_s=0.8), tls=(certificate, key))
    trusting = ssl.create_default_context(cafile=certificate)
    c = client(running, ssl=trusting, origin=running.url)
    c.say(VOICE, SILENCE, SILENCE)
    assert c.until("response.done")[-1]["response"]["status"] == "completed"
    with urllib.request.urlopen(f"{running.url}/health", context=trusting, timeout=60) as answer:
        assert answer.status == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        client(running)
    with pytest.raises((OSError, InvalidMessage)):
        connect(running.ws().replace("wss:", "ws:"))
    c.socket.close()
    until_true(lambda: not running.scheduler.lines)


def test_certificates_that_are_none(certified, tmp_path, monkeypatch):
    """One sentence, before a model is loaded."""
    monkeypatch.setattr(plan.FastMinMo, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    (certificate, key), (_, other) = certified("ours"), certified("another")
    locked, words = tmp_path / "locked.key", tmp_path / "words"
    words.write_text("no certificate\n")
    subprocess.run(["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", key, "-out", locked], check=True)
    for cert, private, word in (
        (certificate, other, "belong together"),
        (key, certificate, "belong together"),
        (words, key, "belong together"),
        (certificate, words, "belong together"),
        (certificate, locked, "encrypted"),
    ):
        with pytest.raises(ValueError, match=word) as told:
            command.serve(tls_cert=cert, tls_key=private)
        assert "\n" not in str(told.value)
