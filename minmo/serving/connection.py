"""One WebSocket: messages in, events out, in order; and its limits: what is unread, unsaid, or too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from minmo.config import SAMPLE_RATE, TICK
from minmo.serving.guard import Limits
from minmo.serving.protocol import Json, error_event, new_id

TICK_S = TICK / SAMPLE_RATE
FAREWELL_S = 2.0
"""What is left to send when a session ends has so long."""


class Connection:
    """An accepted WebSocket. on_error: told the code of each error event that is sent."""

    def __init__(self, websocket: WebSocket, limits: Limits, on_error: Callable[[str], None]) -> None:
        self._websocket, self._limits, self._on_error = websocket, limits, on_error
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[tuple[float, str]] = asyncio.Queue()
        """When each was put in."""
        self._unread = 0
        self._oldest: float | None = None
        """When what is being written was put in."""
        self._heard = 0.0
        self._gone = False
        self._ended: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        """Whether it is over and its session has been put away."""

    def send(self, event: Json) -> None:
        """Puts an event behind those that wait. A client that leaves too much unread is given up."""
        if self._ended.done():
            return
        if event["type"] == "error":
            self._on_error(event["error"]["code"])
        text = json.dumps({"event_id": new_id("event"), **event})
        self._unread += len(text)
        if self._unread > self._limits.unread_bytes:
            self._give_up()
            return
        self._outbox.put_nowait((self._loop.time(), text))

    def end(self, code: int, reason: str) -> None:
        """The session ends once what waits has been sent."""
        if not self._ended.done():
            self._ended.set_result((code, reason))

    def _give_up(self) -> None:
        self._outbox = asyncio.Queue()  # a farewell would not be read either
        self.end(1008, "the client reads too slowly")

    async def run(self, receive: Callable[[str], Awaitable[None]], tick: Callable[[], None]) -> tuple[int, str]:
        """Serves until either side ends it -> the WebSocket code and why. Raises what `receive` or `tick` do."""
        self._heard = began = self._loop.time()
        work: list[asyncio.Task[None]] = [
            asyncio.create_task(self._read(receive)),
            asyncio.create_task(self._write()),
            asyncio.create_task(self._tick(tick, began)),
        ]
        either: list[asyncio.Future[Any]] = [*work, self._ended]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            failed = next((t.exception() for t in work if t.done() and t.exception()), None)
            if failed is not None:
                self.send(error_event("the server failed; connect again", "server_error", kind="server_error"))
                self.end(1011, "the server failed")
            code, reason = self._ended.result() if self._ended.done() else (1006, "the client has gone")
            if not self._gone:
                await self._say_farewell(work, code, reason)
            if failed is not None:
                raise failed
            return code, reason
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _say_farewell(self, work: list[asyncio.Task[None]], code: int, reason: str) -> None:
        work[0].cancel()
        work[2].cancel()
        with contextlib.suppress(asyncio.TimeoutError, WebSocketDisconnect, RuntimeError):
            await asyncio.wait_for(self._outbox.join(), FAREWELL_S)
            work[1].cancel()
            await asyncio.wait_for(self._websocket.close(code, reason), FAREWELL_S)

    async def _read(self, receive: Callable[[str], Awaitable[None]]) -> None:
        most = self._limits.message_bytes
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                self._gone = True
                self.end(message.get("code") or 1005, "the client has gone")
                return
            self._heard = self._loop.time()
            text = message.get("text")
            if text is None:
                self.send(error_event("the message is binary; send JSON as text", "invalid_json"))
            elif len(text) > most:
                self.send(error_event(f"the message has {len(text)} bytes, and {most} may come", "message_too_large"))
            else:
                await receive(text)
            await asyncio.sleep(0)  # who sends without end is served in turn with the others

    async def _write(self) -> None:
        while True:
            outbox = self._outbox
            self._oldest, text = await outbox.get()
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # `_read` notices that it is gone
                await self._websocket.send_text(text)
            self._unread, self._oldest = self._unread - len(text), None
            outbox.task_done()

    async def _tick(self, tick: Callable[[], None], began: float) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            tick()
            now = self._loop.time()
            if self._oldest is not None and now - self._oldest > self._limits.unread_s:
                self._give_up()
            for over, limit, code, what in (
                (now - began, self._limits.session_s, "session_expired", "a session may last"),
                (now - self._heard, self._limits.idle_s, "session_idle", "a client may be silent for"),
            ):
                if over > limit:
                    self.send(error_event(f"{what} {limit:g} s; connect again", code))
                    self.end(1001, code)
