"""Simulated users of a realtime server, in real time, one level of concurrency after another.

Each client is a simulated user (`minmo.data.reactive`) on a WebSocket: it says a recording, waits, interrupts replies
while they sound, plays what it is sent, and asks for every reply's sound again once it is over, to compare it byte by
byte with what came. It measures what a client sees, network included; deadline misses are the server's own count.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import soxr

from minmo.config import SAMPLE_RATE
from minmo.conversation.client import TICK_MS, Loudspeaker, Player
from minmo.conversation.front import installed
from minmo.data.reactive import OUTLASTS_MS, STOP_WITHIN_MS, ReactiveUser
from minmo.data.simulator import Conditions, Material
from minmo.data.utterances import Utterance

WIRE_RATE = 24_000
LEVELS = (1, 2, 4, 8, 16, 32)
SECONDS_A_TURN = 3
OPEN_SECONDS = 10.0
ENDS_S = 5.0
"""How long the sessions of one level may take to end before the next begins."""
CONDITIONS = Conditions(pause=0.0, backchannel=0.0, burst=0.0, barge_in=0.4, snr_db=(None,), echo_db=(None,))


@dataclass
class Seen:
    """What one client saw; milliseconds. refused: why it could not talk, in the server's words. first_audio: from the
    end of a turn to the first sound that came; unanswered: turns without any. stops: (to the end of the reply, to the
    last sound that came, to the last sound played) from an interruption's begin; unstopped: interruptions that stopped
    nothing. sounds: replies whose sound was compared; lost, damaged: of those, where bytes were missing, or others.
    lags: how late the client itself was with each tick. errors: error events, and how a connection broke off."""

    refused: str = ""
    first_audio: list[float] = field(default_factory=list)
    unanswered: int = 0
    stops: list[tuple[float, float, float]] = field(default_factory=list)
    unstopped: int = 0
    sounds: int = 0
    lost: int = 0
    damaged: int = 0
    lags: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass
class _Reply:
    """A response as it came. first, last: when its sound came; cut: when it was cancelled; quiet: when the last of it
    was played."""

    number: int
    item: str = ""
    sound: bytearray = field(default_factory=bytearray)
    first: float | None = None
    last: float | None = None
    cut: float | None = None
    over: float | None = None
    quiet: float = 0.0
    compared: bool = False


class _Client:
    """One conversation over an open socket."""

    def __init__(self, socket: Any, user: ReactiveUser, seconds: float) -> None:
        self._socket, self._user, self._seconds = socket, user, seconds
        self._player = Player(WIRE_RATE)
        self._replies: dict[str, _Reply] = {}
        self._began = 0.0
        self.seen = Seen()

    def _now(self) -> float:
        return 1e3 * (asyncio.get_running_loop().time() - self._began)

    async def run(self) -> Seen:
        closed = websockets("exceptions").ConnectionClosed
        self._began = asyncio.get_running_loop().time()
        reading = asyncio.create_task(self._read())
        try:
            await self._speak(reading)
            for _ in range(20):  # the last replies' sound, to be compared
                if all(r.compared for r in self._replies.values() if r.over is not None):
                    break
                await asyncio.sleep(0.1)
        except (OSError, closed) as error:
            self.seen.errors.append(f"the connection broke off: {error}")
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, closed):
            await reading
        self._judge()
        return self.seen

    async def _speak(self, reading: asyncio.Task[None]) -> None:
        """The microphone: 80 ms of sound every 80 ms, and how much has been played."""
        loudspeaker = Loudspeaker(self._player)
        wire = soxr.ResampleStream(SAMPLE_RATE, WIRE_RATE, 1, "float32", "QQ")
        for tick in range(int(1e3 * self._seconds / TICK_MS)):
            due = (tick + 1) * TICK_MS
            await asyncio.sleep(max(0.0, (due - self._now()) / 1e3))
            if reading.done():
                reading.result()
                raise ConnectionError("the server closed it")
            self.seen.lags.append(self._now() - due)
            near = self._user(loudspeaker.tick())
            if near is None:
                return
            pcm = np.round(np.clip(wire.resample_chunk(near), -1, 1) * 32767).astype("<i2").tobytes()
            await self._send("input_audio_buffer.append", audio=base64.b64encode(pcm).decode("ascii"))
            running = next((i for i, r in self._replies.items() if r.first is not None and r.over is None), None)
            if running is not None:
                reply = self._replies[running]
                played = self._player.played(reply.number, round(self._now() * WIRE_RATE / 1e3))
                await self._send("playback.ack", response_id=running, played_ms=int(1e3 * played / WIRE_RATE))

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message)
            kind, now = event["type"], self._now()
            if kind == "error":
                self.seen.errors.append(event["error"]["message"])
            elif kind == "response.created":
                self._replies[event["response"]["id"]] = _Reply(len(self._replies))
            elif kind == "response.output_audio.delta":
                reply = self._replies[event["response_id"]]
                data = base64.b64decode(event["delta"])
                reply.item, reply.last = event["item_id"], now
                reply.first = now if reply.first is None else reply.first
                reply.sound += data
                sound = np.frombuffer(data, "<i2").astype(np.float32) / 32768
                self._player.receive(round(now * WIRE_RATE / 1e3), reply.number, sound)
            elif kind == "response.done":
                reply = self._replies[event["response"]["id"]]
                reply.over = now
                if event["response"]["status"] == "cancelled":
                    reply.cut = now
                    reply.quiet = 1e3 * self._player.stop(round(now * WIRE_RATE / 1e3)) / WIRE_RATE
                if reply.item:
                    await self._send("conversation.item.retrieve", item_id=reply.item)
                else:
                    reply.compared = True
            elif kind == "conversation.item.retrieved":
                self._compare(event["item"])

    def _compare(self, item: dict[str, Any]) -> None:
        reply = next((r for r in self._replies.values() if r.item == item["id"]), None)
        if reply is None:
            return
        emitted = base64.b64decode(item["content"][0]["audio"])
        reply.compared = True
        self.seen.sounds += 1
        self.seen.lost += len(reply.sound) < len(emitted)
        self.seen.damaged += bytes(reply.sound) != emitted[: len(reply.sound)]

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": kind, **fields}))

    def _judge(self) -> None:
        """What the user did, beside when replies came and ended."""
        turns = [e for e in self._user.events if e.kind in ("user", "barge_in")]
        replies = [r for r in self._replies.values() if r.first is not None]
        begins = [1e3 * turn.start / SAMPLE_RATE for turn in turns]
        for turn, begin, until in zip(turns, begins, [*begins[1:], self._now()], strict=True):
            end = 1e3 * turn.end / SAMPLE_RATE
            answers = [r.first for r in replies if r.first is not None and end < r.first <= until]
            if answers:
                self.seen.first_audio.append(answers[0] - end)
            elif until > end + 1e3 * SECONDS_A_TURN and not any(begin < (r.first or 0) <= end for r in replies):
                self.seen.unanswered += 1
            if turn.kind == "barge_in":
                self._judge_stop(begin, replies)

    def _judge_stop(self, begin: float, replies: Sequence[_Reply]) -> None:
        speaking = [r for r in replies if r.first is not None and r.first < begin and (r.over or np.inf) > begin]
        for reply in speaking:
            if reply.cut is not None and reply.last is not None and reply.cut <= begin + STOP_WITHIN_MS:
                self.seen.stops.append((reply.cut - begin, reply.last - begin, reply.quiet - begin))
            elif reply.over is None or reply.over > begin + OUTLASTS_MS:
                self.seen.unstopped += 1


async def _one(url: str, key: str | None, user: ReactiveUser, seconds: float) -> Seen:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    opening = websockets("asyncio.client").connect(
        url, additional_headers=headers, max_size=None, open_timeout=OPEN_SECONDS
    )
    try:
        socket = await opening
        first = json.loads(await asyncio.wait_for(socket.recv(), OPEN_SECONDS))
    except (OSError, asyncio.TimeoutError, websockets("exceptions").WebSocketException) as error:
        body = getattr(getattr(error, "response", None), "body", b"") or b""  # of a refusal by HTTP
        return Seen(refused=f"{error} {bytes(body).decode('utf-8', 'replace')}".strip()[:300] or type(error).__name__)
    try:
        if first["type"] != "session.created":
            return Seen(refused=first.get("error", {}).get("message", f"the first event is {first['type']}"))
        return await _Client(socket, user, seconds).run()
    finally:
        await socket.close()


def websockets(module: str) -> Any:
    """A module of websockets. Raises ValueError where it is not installed."""
    return installed(f"websockets.{module}", "a load test", "serve")


def _addresses(url: str) -> tuple[str, str]:
    """A server's address, http or ws -> those of its protocol and of its metrics. Raises ValueError."""
    parts = urlsplit(url)
    schemes = {"http": ("ws", "http"), "ws": ("ws", "http"), "https": ("wss", "https"), "wss": ("wss", "https")}
    if parts.scheme not in schemes or not parts.netloc:
        raise ValueError(f"{url!r} is no address of a server; give one as http://127.0.0.1:8000")
    socket, plain = schemes[parts.scheme]
    return (
        urlunsplit((socket, parts.netloc, "/v1/realtime", "duplex=1", "")),
        urlunsplit((plain, parts.netloc, "/metrics", "", "")),
    )


def _metrics(url: str, key: str | None) -> dict[str, float]:
    """The server's metrics, summed over what they are labelled with. Raises ValueError where it gives none."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=OPEN_SECONDS) as answer:
            text = answer.read().decode("utf-8")
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{url} gives no metrics ({error}): is the server running, and the key right?") from None
    found: dict[str, float] = {}
    for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#"):
        plain = name.partition("{")[0]
        found[plain] = found.get(plain, 0.0) + float(value)
    return found


def _quiet(url: str, key: str | None) -> dict[str, float]:
    """The metrics of a server whose last clients' sessions have ended, or after ENDS_S."""
    until = time.monotonic() + ENDS_S
    while (found := _metrics(url, key)).get("minmo_sessions", 0.0) and time.monotonic() < until:
        time.sleep(0.1)
    return found


@dataclass
class Level:
    """One level of concurrency: what its clients saw, and what the server counted meanwhile."""

    sessions: int
    seen: list[Seen]
    ticks: float
    misses: float


def run_levels(
    url: str,
    sounds: Sequence[tuple[str, np.ndarray]],
    levels: Sequence[int] = LEVELS,
    *,
    seconds: float = 30.0,
    seed: int = 0,
    key: str | None = None,
    progress: Callable[[Level], None] = lambda level: None,
) -> list[Level]:
    """Levels of clients, one after another, each for so many seconds; they say `sounds`: (name, 16 kHz samples).

    Raises ValueError where nobody answers at `url`, and for sound that is silent.
    """
    socket, metrics = _addresses(url)
    said = [(Utterance(sound, name), Utterance(sound, name)) for name, sound in sounds]
    conditions = replace(CONDITIONS, turns=max(2, int(seconds / SECONDS_A_TURN)))
    found = []
    for sessions in levels:
        before = _quiet(metrics, key)
        users = [ReactiveUser(Material(said), conditions, seed, index) for index in range(sessions)]

        async def together(users: list[ReactiveUser] = users) -> list[Seen]:
            return await asyncio.gather(*(_one(socket, key, user, seconds) for user in users))

        seen = asyncio.run(together())
        after = _metrics(metrics, key)
        counts = [after.get(n, 0.0) - before.get(n, 0.0) for n in ("minmo_ticks_total", "minmo_deadline_misses_total")]
        found.append(Level(sessions, seen, *counts))
        progress(found[-1])
    return found
