"""The load test against a server that is simulated, honest or not: what it must see, it sees."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from dataclasses import replace
from http import HTTPStatus
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("websockets", reason="a load test needs pip install 'minmo[serve]'")

from websockets.asyncio.server import serve  # noqa: E402

from minmo import cli  # noqa: E402
from minmo.serving import clients  # noqa: E402
from minmo.serving import loadtest as module  # noqa: E402
from minmo.serving.clients import CONDITIONS, Level, Seen, run_levels  # noqa: E402
from minmo.serving.loadtest import draw, table  # noqa: E402

VOICE = (0.3 * np.random.default_rng(0).standard_normal(8_000)).astype(np.float32)
DELTA = 1_920


def pcm(rng, loud=0.1):
    return (loud * 32767 * rng.standard_normal(DELTA)).clip(-32768, 32767).astype("<i2").tobytes()


class Server:
    """Answers 240 ms after a voice, with 1.2 s at the pace of time; stops 240 ms after a voice begins. fault:
    "lose" or "swap" deltas of each reply. room: sessions that it takes."""

    def __init__(self, fault="", room=100):
        self.fault, self.room, self.sessions, self.ticks = fault, room, 0, 0
        self.acknowledged = 0

    async def talk(self, socket):
        if self.sessions >= self.room:
            await socket.send(json.dumps({"type": "error", "error": {"message": "there is no room; come back later"}}))
            return
        self.sessions += 1
        rng, sounds, replies = np.random.default_rng(0), {}, 0
        await socket.send(json.dumps({"type": "session.created", "session": {}}))
        quiet = loud = 0
        speaking, left, held = "", 0, None

        async def tell(kind, **fields):
            await socket.send(json.dumps({"type": kind, **fields}))

        async for message in socket:
            event = json.loads(message)
            if event["type"] == "playback.ack":
                self.acknowledged += 1
            elif event["type"] == "conversation.item.retrieve":
                name = event["item_id"]
                content = [{"audio": base64.b64encode(sounds[name]).decode()}]
                await tell("conversation.item.retrieved", item={"id": name, "content": content})
            if event["type"] != "input_audio_buffer.append":
                continue
            self.ticks += 1
            heard = np.frombuffer(base64.b64decode(event["audio"]), "<i2") / 32768
            assert DELTA - 10 <= len(heard) <= DELTA + 10
            loud, quiet = (loud + 1, 0) if np.sqrt(np.mean(heard**2)) > 0.05 else (0, quiet + 1)
            if not speaking and quiet == 3 and self.ticks > 3:
                speaking, left, replies = f"r{replies}", 15, replies + 1
                sounds[f"i-{speaking}"] = b""
                await tell("response.created", response={"id": speaking})
            elif speaking:
                over = "cancelled" if loud >= 3 else "completed" if left == 0 else ""
                if over:
                    await tell("response.done", response={"id": speaking, "status": over})
                    speaking, quiet = "", 10
                    continue
                data, left = pcm(rng), left - 1
                sounds[f"i-{speaking}"] += data
                if self.fault == "lose" and left == 10:
                    continue
                if self.fault == "swap" and left == 10:
                    held = data
                    continue
                for each in (data, held) if held else (data,):
                    delta = base64.b64encode(each).decode()
                    ids = {"response_id": speaking, "item_id": f"i-{speaking}"}
                    await tell("response.output_audio.delta", delta=delta, **ids)
                held = None

    def metrics(self, connection, request):
        if request.path != "/metrics":
            return None
        text = f'# HELP x\nminmo_ticks_total {self.ticks}.0\nminmo_deadline_misses_total 2.0\nx{{a="b"}} 1.0\n'
        return connection.respond(HTTPStatus.OK, text)

    @contextlib.contextmanager
    def run(self):
        loop, ready, found = asyncio.new_event_loop(), threading.Event(), SimpleNamespace()

        async def main():
            found.stop = asyncio.Event()
            async with serve(self.talk, "127.0.0.1", 0, process_request=self.metrics) as server:
                found.port = server.sockets[0].getsockname()[1]
                ready.set()
                await found.stop.wait()

        thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
        thread.start()
        assert ready.wait(10)
        try:
            yield f"http://127.0.0.1:{found.port}"
        finally:
            loop.call_soon_threadsafe(found.stop.set)
            thread.join(10)


@pytest.mark.parametrize("fault,lost,damaged", [("", False, False), ("lose", True, True), ("swap", False, True)])
def test_what_a_server_loses_or_swaps_is_seen(fault, lost, damaged, monkeypatch):
    monkeypatch.setattr(clients, "CONDITIONS", replace(CONDITIONS, barge_in=0.0))
    server = Server(fault)
    with server.run() as url:
        (level,) = run_levels(url, [("noise", VOICE)], [2], seconds=4.8)
    seen = level.seen
    assert len(seen) == 2 and not any(s.refused or s.errors for s in seen)
    assert all(s.sounds >= 1 for s in seen)
    assert any(s.lost for s in seen) == lost and any(s.damaged for s in seen) == damaged
    assert level.ticks == server.ticks > 80 and level.misses == 0
    assert all(0 <= ms for s in seen for ms in s.first_audio) and server.acknowledged > 10


def test_interruptions_are_timed_and_what_is_refused_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "CONDITIONS", replace(CONDITIONS, barge_in=1.0))
    with Server(room=2).run() as url:
        levels = run_levels(url, [("noise", VOICE)], [3], seconds=4.8)
    seen = levels[0].seen
    assert [s.refused for s in seen].count("there is no room; come back later") == 1
    stops = [stop for s in seen for stop in s.stops]
    assert stops and all(last <= decided and 0 < decided < 2_000 for decided, last, _ in stops)
    shown = dict(zip(*(list(column.cells) for column in table(levels).columns), strict=True))
    assert shown["refused"] == "1" and shown["deadline misses / ticks"].startswith("0 / ")
    draw(levels, url, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_wrong_address_is_one_sentence():
    with pytest.raises(ValueError, match="no address of a server"):
        run_levels("localhost:8000", [("noise", VOICE)], [1])
    with pytest.raises(ValueError, match="gives no metrics"):
        run_levels("http://127.0.0.1:9", [("noise", VOICE)], [1])


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    level = Level(1, [Seen(first_audio=[300.0], stops=[(400.0, 380.0, 390.0)], sounds=2, lags=[1.0])], 75, 1)
    monkeypatch.setattr(module, "run_levels", lambda *_, progress, **__: [level])
    cli.app(["loadtest", "http://127.0.0.1:8000", "-o", str(tmp_path / "out")], standalone_mode=False)
    assert "1 / 75" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "loadtest.json").read_text())["levels"][0]["misses"] == 1
    assert (tmp_path / "out" / "loadtest.png").is_file()
    monkeypatch.setattr(module, "run_levels", lambda *_, progress, **__: [Level(1, [Seen(refused="no")], 0, 0)])
    with pytest.raises(ValueError, match="no session could begin"):
        cli.app(["loadtest", "http://127.0.0.1:8000"], standalone_mode=False)
