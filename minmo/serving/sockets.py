"""uvicorn's two protocols, with ends that come: of clients that ask for nothing, read nothing, or are not there.

What is sent by a transport that is being closed may wait in its buffer for as long as the other side acknowledges that
it reads nothing; and a connection on which no request comes counts as nobody's.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

REQUEST_S = 20.0
"""A whole request comes within so long of its connection or of the one before, or the connection is closed."""
MOST_WAITING = 256
"""Connections at once on which no request has come, or none is being answered; of more, the newest are not taken."""
UNREAD_S = 5.0
"""After a WebSocket's end, what its client has not read by then is thrown away."""


class Http(H11Protocol):
    """A connection until it becomes a WebSocket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if sum(isinstance(one, Http) for one in self.connections) > MOST_WAITING:
            transport.abort()
            return
        self._patience = self.loop.call_later(REQUEST_S, self._tire)

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "_patience"):
            self._patience.cancel()
        super().connection_lost(exc)

    def _tire(self) -> None:
        if self.transport.get_protocol() is not self or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
            return
        self._patience = self.loop.call_later(REQUEST_S, self._tire)


class Socket(WebSocketsSansIOProtocol):
    """A WebSocket."""

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self._soon_abort()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._soon_abort()

    def handle_parser_exception(self) -> None:
        super().handle_parser_exception()
        self._soon_abort()

    def handle_close(self, event: Any) -> None:
        super().handle_close(event)
        self._soon_abort()

    def handle_ping(self) -> None:
        """Of a client that does not read, pings are not answered: what waits for it must not grow by what it sends."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def _soon_abort(self) -> None:
        self.loop.call_later(UNREAD_S, self.transport.abort)
