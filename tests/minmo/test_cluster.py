"""Two replicas on a Ray of this machine: who is connected to a replica that is killed goes on at the other with its
history, whose clients notice nothing; and what happens where there is no room, no store, and at the end."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

# Nobody but this test may use its Ray; both are read when Ray is imported.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
ray = pytest.importorskip("ray", reason="a cluster needs pip install 'minmo[cluster]'")
pytest.importorskip("ray.serve", reason="a cluster needs pip install 'minmo[cluster]'")

import urllib.request  # noqa: E402

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from minmo.conversation import Settings  # noqa: E402
from minmo.serving import cluster  # noqa: E402
from minmo.serving.guard import Limits  # noqa: E402
from minmo.serving.plan import FREE, Plan  # noqa: E402

WAIT_S = 400
KEYS = ("k" * 32, "j" * 32)
SILENCE = base64.b64encode(bytes(2 * 1920)).decode()
SESSIONS = 3
REFUSALS = {"invalid_request", "conversation_already_has_active_response"}


class Client:
    """Sends silence in real time, as a microphone does, and keeps what comes, and when."""

    def __init__(self, port, query="", key=KEYS[0]):
        headers = {"Authorization": f"Bearer {key}"}
        self.socket = connect(
            f"ws://127.0.0.1:{port}/v1/realtime{query}", additional_headers=headers, open_timeout=WAIT_S,
            max_size=None, max_queue=None, close_timeout=1,
        )  # fmt: skip
        self.events, self.came, self.closed = [], threading.Condition(), None
        self.listening = threading.Thread(target=self._listen, daemon=True)
        self.listening.start()
        self.talking, self.silent = None, threading.Event()
        self.greeting = self.until("session.created", "session.resumed", "error")
        if self.greeting["type"] == "session.created":  # a resumed one has its settings
            self.send("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
            self.until("session.updated")

    def _listen(self):
        try:
            for message in self.socket:
                with self.came:
                    self.events.append((time.monotonic(), json.loads(message)))
                    self.came.notify_all()
        except ConnectionClosed as closed:
            self.closed = closed
        with self.came:
            self.closed = self.closed or ConnectionClosed(None, None)
            self.came.notify_all()

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def until(self, *kinds, since=0):
        """-> the first event of those kinds that came after so many others. Fails at once where what was asked for
        was refused."""

        def found():
            return next((e for _, e in self.events[since:] if e["type"] in kinds), None)

        def refused():
            return [e for _, e in self.events[since:] if e["type"] == "error" and e["error"]["code"] in REFUSALS]

        with self.came:
            assert self.came.wait_for(lambda: found() or self.closed or refused(), WAIT_S), f"no {kinds}"
            assert found(), (kinds, self.closed, [e.get("error", e["type"]) for _, e in self.events[since:]])
            return found()

    def until_closed(self):
        with self.came:
            assert self.came.wait_for(lambda: self.closed, WAIT_S)
        return self.closed.rcvd.code if self.closed.rcvd else None

    def talk(self):
        """Silence from now on: the conversation's clock."""

        def speak():
            try:
                while self.closed is None and not self.silent.wait(0.08):
                    self.send("input_audio_buffer.append", audio=SILENCE)
            except (WebSocketException, OSError):
                return

        self.talking = threading.Thread(target=speak, daemon=True)
        self.talking.start()
        return self

    def hush(self):
        """No more of it: what is asked next waits for all that was sent, which a slow machine hears late."""
        self.silent.set()
        self.talking.join(10)

    def ask(self, text, modality="text"):
        """A typed turn -> its reply's item."""
        since = len(self.events)
        content = [{"type": "input_text", "text": text}]
        self.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
        self.until("conversation.item.done", since=since)
        self.send("response.create", response={"output_modalities": [modality]})
        return self.until("response.done", since=since)["response"]["output"][0]

    def errors(self):
        return [e["error"] for _, e in self.events if e["type"] == "error"]

    def close(self):
        self.silent.set()
        self.socket.close()
        self.listening.join(10)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def logs():
    """A Ray of its own: its logs' folder. No dashboard, no usage report, no shared memory."""
    # Sockets' names are short, and pytest's folders are not.
    folder = Path("/tmp") / f"minmo-{secrets.token_hex(4)}"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(WAIT_S),
            "CUDA_VISIBLE_DEVICES": "",
        }.items():
            patch.setenv(name, value)
        port = free_port()
        options = {
            "--port": port,
            "--num-cpus": 3,
            "--num-gpus": 0,
            "--include-dashboard": "false",
            "--temp-dir": folder / "ray",
            "--object-store-memory": 80 << 20,
            "--plasma-directory": folder,
            # Where Ray chooses these itself, it ends if whoever has them takes 15 s to start.
            "--dashboard-agent-grpc-port": free_port(),
            "--dashboard-agent-listen-port": free_port(),
            "--runtime-env-agent-port": free_port(),
            "--metrics-export-port": free_port(),
        }
        try:
            for _ in range(3):  # it gives up after 30 s, which a machine that does much beside may need
                started = start_ray(folder, options)
                if started.poll() is None:
                    break
            assert started.poll() is None, (folder / "start").read_text()
            ray.init(f"127.0.0.1:{port}", namespace=cluster.NAMESPACE, log_to_driver=False)
            yield folder / "ray" / "session_latest" / "logs"
        finally:
            ray.shutdown()
            started.terminate()
            started.wait(WAIT_S)
            until_true(lambda: not processes_of(folder))
            shutil.rmtree(folder)


def start_ray(folder, options):
    """-> its process, which has ended where Ray did not start, with all that it had started."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    with (folder / "start").open("wb") as out:
        started = subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in options.items())], stdout=out, stderr=subprocess.STDOUT
        )
    until_true(lambda: b"runtime started" in (folder / "start").read_bytes() or started.poll() is not None)
    if started.poll() is not None:
        until_true(lambda: not processes_of(folder))
    return started


def processes_of(folder):
    """Those that were started for what is in a folder, and still run."""

    def of(process):
        try:
            return str(folder).encode() in (process / "cmdline").read_bytes()
        except OSError:  # it has just ended
            return False

    return [p.name for p in Path("/proc").glob("[0-9]*") if of(p)]


def until_true(condition):
    for _ in range(10 * WAIT_S):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("it did not come about")


def replica_of(client, logs):
    """-> the process of the replica that serves a client: its log says so."""
    name = client.greeting["session"]["id"]
    for _ in range(WAIT_S * 10):
        for file in logs.glob("worker-*.err"):
            if name in file.read_text(errors="replace"):
                return int(re.fullmatch(r"worker-.*-(\d+)\.err", file.name)[1])
        time.sleep(0.1)
    raise AssertionError(f"no replica knows {name}")


def told(item):
    (content,) = item["content"]
    return content.get("text") or content.get("transcript")


def check_ticks(client):
    """Every tick of 80 ms of its sound was decided, none is missing, and nothing went wrong. Where its sound was late,
    silence took its place, at which its own time stands still."""
    assert not client.errors()
    at = [e["at_ms"] for _, e in client.events if e["type"] in ("response.listen", "response.speak")]
    assert len(at) > 10 and at[-1] > 0 and np.all((np.diff(at) >= 0) & (np.diff(at) <= 80)), at


def check_history(client, question):
    """Items and context are of the conversation that has asked this: the exchange of its reply can be forgotten, which
    one that the context does not hold cannot."""
    assert client.greeting["session"]["audio"]["input"]["turn_detection"] is None
    user, assistant = client.greeting["items"]
    assert (user["role"], told(user)) == ("user", question)
    assert (assistant["role"], told(assistant), assistant["status"]) == (
        "assistant",
        f"{question} is four",
        "completed",
    )
    client.ask("one plus two")
    since = len(client.events)
    client.send("conversation.item.delete", item_id=assistant["id"])
    gone = [client.until("conversation.item.deleted", "error", since=since)]
    assert gone[0]["type"] != "error", gone
    assert client.ask("two plus one")["content"][0]["text"] == "two plus one is three"


def figures(port):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return [s for f in text_string_to_metric_families(answer.read().decode()) for s in f.samples]


def resumed(port, old, key=KEYS[0]):
    return Client(port, f"?resume={old.greeting['resume_token']}", key)


def test_two_replicas(logs):
    port, clients, scale = free_port(), [], cluster.Scale(2, 2, drain_s=5.0)
    plan = Plan(
        "nano", SESSIONS, FREE, max_positions=600, drawing=Settings(temperature=0.0, max_text_tokens=12), device="cpu",
        keys=KEYS, limits=Limits(sessions_per_key=100, session_s=600.0),
    )  # fmt: skip

    def enter(query="?duplex=1", key=KEYS[0]):
        clients.append(Client(port, query, key))
        return clients[-1]

    try:
        cluster.deploy(plan, "127.0.0.1", port, scale=scale)
        here, there = a_replica_dies(port, logs, enter)
        there_is_no_room(enter)
        the_store_dies(port, here)
        there.close()
        cluster.withdraw(scale.drain_s)
        assert here.until_closed() == 1012 and here.errors()[-1]["code"] == "draining"
        with pytest.raises((InvalidStatus, OSError)):
            Client(port)
    finally:
        for client in clients:
            client.close()
        cluster.serve.shutdown()


def a_replica_dies(port, logs, enter):
    """-> a client that was at the other, and one that has come to it."""
    pair = [enter(), enter()]
    while len(where := {replica_of(c, logs) for c in pair}) < 2:
        pair.append(enter())
    victim, survivor = pair[0], next(c for c in pair if replica_of(c, logs) != replica_of(pair[0], logs))
    assert told(victim.ask("two plus two")) == "two plus two is four"
    running = [s for s in figures(port) if s.name == "minmo_sessions"]
    assert len({s.labels["replica"] for s in running}) == len(where) and sum(s.value for s in running) == len(pair)
    for client in (victim, survivor):
        client.talk()
    item = "one plus three"
    since = len(survivor.events)
    content = [{"type": "input_text", "text": item}]
    survivor.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})
    survivor.send("response.create")
    survivor.until("response.output_audio.delta", since=since)
    time.sleep(3.0)  # by then the store has the victim's turn
    os.kill(replica_of(victim, logs), signal.SIGKILL)
    victim.until_closed()
    stranger = resumed(port, victim, KEYS[1])
    assert stranger.greeting["error"]["code"] == "session_not_found" and stranger.until_closed() == 1008
    again = enter(f"?resume={victim.greeting['resume_token']}")
    check_history(again, "two plus two")
    late = resumed(port, victim)
    assert late.greeting["error"]["code"] == "session_not_found"
    check_sound(survivor, since)
    check_ticks(survivor)
    survivor.hush()
    return survivor, again


def check_sound(client, since):
    """The reply came to its end, and its sound is what the server says that it was."""
    done = client.until("response.done", since=since)["response"]
    assert done["status"] == "completed" and told(done["output"][0]) == "one plus three is four"
    came = b"".join(
        base64.b64decode(e["delta"]) for _, e in client.events if e["type"] == "response.output_audio.delta"
    )
    client.send("conversation.item.retrieve", item_id=done["output"][0]["id"])
    kept = client.until("conversation.item.retrieved")["item"]["content"][0]["audio"]
    assert base64.b64decode(kept) == came and len(came) > 24_000


def there_is_no_room(enter):
    """Of more sessions than there may be the last is told so, and no other notices."""
    more = [enter("")]
    while more[-1].greeting["type"] != "error":
        assert len(more) <= 2 * SESSIONS
        more.append(enter(""))
    error = more[-1].greeting["error"]
    assert error["code"] == "no_room" and f"{SESSIONS} may" in error["message"] and more[-1].until_closed() == 1013
    for client in more:
        client.close()


def the_store_dies(port, client):
    ray.kill(ray.get_actor(cluster.STORE, cluster.NAMESPACE), no_restart=True)
    since = len(client.events)
    assert client.ask("two plus three")["status"] == "completed"
    error = client.until("error", since=since)["error"]
    assert error["code"] == "resume_unavailable" and "this session goes on" in error["message"]
    assert client.ask("three plus three")["status"] == "completed"
    refused = Client(port, "?resume=one-that-was-kept-there")
    assert refused.greeting["error"]["code"] == "resume_unavailable" and refused.until_closed() == 1008
