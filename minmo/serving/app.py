"""The ASGI app: `WS /v1/realtime`, the page, /health, /ready and /metrics."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from minmo.conversation import Settings
from minmo.conversation.scheduler import Refused, Scheduler
from minmo.serving import requests
from minmo.serving.connection import Connection
from minmo.serving.guard import Denied, Guard, Limits
from minmo.serving.hall import Hall
from minmo.serving.protocol import error_event
from minmo.serving.recording import Recorder
from minmo.serving.settings import SessionSettings
from minmo.serving.store import Kept, Shelf, Store
from minmo.serving.telemetry import Metrics, log

PAGE = Path(__file__).parent / "page"
PAGES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/audio.js": ("audio.js", "text/javascript"),
}
"""All that is served of the page: no path comes from the wire."""
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "permissions-policy": "microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
OUR_CODES = {1000, 1001, 1005, 1006, 1008, 1011, 1012, 4000}
"""With which connections end, unless their clients name another."""
QUERY = {"model", "duplex", "resume"}
MOST_KEPT = 64
"""Sessions that wait for their clients at once; of more, the oldest are given up."""


@dataclass(eq=False)
class Server:
    """What the routes share. name: of the model. record: where sessions are recorded, nowhere by default. store: where
    they wait for their clients, here by default."""

    scheduler: Scheduler
    name: str
    drawing: Settings = Settings(max_text_tokens=64)  # noqa: RUF009 (frozen)
    guard: Guard = field(default_factory=Guard)
    limits: Limits = Limits()  # noqa: RUF009 (frozen)
    record: Path | None = None
    store: Store | None = None

    def __post_init__(self) -> None:
        settings = SessionSettings(self.name, self.drawing.max_text_tokens)
        store = self.store or Shelf[Kept](self.limits.resume_s, MOST_KEPT)
        self.hall = Hall(self.scheduler, settings, self.drawing, self.limits, store)
        self.metrics = Metrics(self.scheduler)
        self.exposition: Callable[[], Awaitable[bytes]] = self._own_figures
        """What /metrics answers."""

    def app(self) -> Starlette:
        pages = [Route(path, _page(*what)) for path, what in PAGES.items()]
        return Starlette(
            routes=[
                *pages,
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.read_metrics),
                WebSocketRoute("/v1/realtime", self.realtime),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self.hall.drain(0.0)

    async def health(self, request: Request) -> Response:
        """Whether the process can serve at all; where not, only another one can."""
        alive = self.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "the engine has failed"}, 200 if alive else 503)

    async def ready(self, request: Request) -> Response:
        """Whether a session may begin here."""
        draining = self.hall.draining
        return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)

    async def read_metrics(self, request: Request) -> Response:
        try:
            self.guard.admit(request)
        except Denied as denied:
            return _denial(denied)
        return Response(await self.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _own_figures(self) -> bytes:
        return self.metrics.exposition()

    async def realtime(self, websocket: WebSocket) -> None:
        """One connection, from its request to its end."""
        try:
            key = self.guard.admit(websocket)
            self.hall.check_room(key, websocket.query_params.get("resume"))
        except Denied as denied:
            self.metrics.connections.labels(denied.code).inc()
            log("denied", code=denied.code)
            await websocket.send_denial_response(_denial(denied))
            return
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(subprotocol="realtime" if "realtime" in offered else None)
        connection = Connection(websocket, self.limits, lambda code: self.metrics.errors.labels(code).inc())
        try:
            duplex, resume = self._asked(websocket)
            session, token = await self.hall.enter(key, connection, duplex, resume)
        except Denied as refused:
            await self._refuse(connection, str(refused), refused.code, 1008)
            return
        except Refused as refused:
            await self._refuse(connection, str(refused), "no_room", 1013)
            return
        except (RuntimeError, ValueError) as error:  # the engine has failed, or a history is not for it
            await self._refuse(connection, f"no session could begin: {error}", "server_error", 1011)
            return
        self.metrics.connections.labels("accepted" if resume is None else "resumed").inc()
        log("session began", session.id, duplex=duplex, resumed=resume is not None)
        end = 1011, "the server failed"
        recorder: Recorder | None = None
        try:
            if self.record is not None:
                try:
                    recorder = Recorder(self.record, session.id, self.scheduler.model.config.vocoder.sample_rate)
                except OSError as error:  # a full disk: who asked for recordings wants no session without one
                    log("no recording", session.id, level=logging.ERROR, why=str(error))
                    await self._refuse(connection, "this server cannot record, as it must", "server_error", 1011)
                    return
            session.recorder = recorder
            session.greet(token, resumed=resume is not None)
            end = await connection.run(lambda text: requests.receive(session, text), session.tick)
        finally:
            try:
                await self.hall.leave(session, token)
            finally:
                if recorder is not None:
                    recorder.close()
            # A client may name any code: as a label each would be kept for ever.
            self.metrics.closed.labels(str(end[0]) if end[0] in OUR_CODES else "client").inc()
            log("session ended", session.id, code=end[0], reason=end[1])

    async def _refuse(self, connection: Connection, why: str, code: str, close: int) -> None:
        """No session: one error event, and the end."""
        self.metrics.connections.labels(code).inc()
        log("refused", code=code)
        kind = "server_error" if close == 1011 else "invalid_request_error"
        connection.send(error_event(why, code, kind=kind))
        connection.end(close, code)
        await connection.run(_nothing, lambda: None)

    def _asked(self, websocket: WebSocket) -> tuple[bool, str | None]:
        """Of the query: whether duplex, and the token of a session to resume. Raises Denied."""
        query = websocket.query_params
        if unknown := sorted(set(query) - QUERY):
            raise Denied(400, "unknown_parameter", f"the address has {unknown[0]!r:.80}; it may have {sorted(QUERY)}")
        if (model := query.get("model", self.name)) != self.name:
            raise Denied(
                404, "model_not_found", f"this server has {self.name}, not {model!r:.80}; ask for ?model={self.name}"
            )
        duplex, resume = query.get("duplex", "0"), query.get("resume")
        if duplex not in ("0", "1"):
            raise Denied(400, "invalid_value", f"duplex must be 0 or 1, got {duplex!r:.80}")
        return duplex == "1" or resume is not None, resume


def _page(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    body = (PAGE / name).read_bytes()

    async def serve(request: Request) -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return serve


def _denial(denied: Denied) -> Response:
    error = {"type": "invalid_request_error", "code": denied.code, "message": str(denied)}
    return JSONResponse({"error": error}, denied.status)


async def _nothing(text: str) -> None:
    return None
