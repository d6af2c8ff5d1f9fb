"""The app on uvicorn, which ends in order: on SIGTERM or Ctrl-C replies may still be heard to their end; a second
signal ends at once."""

from __future__ import annotations

import asyncio
import signal
import ssl
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from minmo.serving.hall import Hall
from minmo.serving.sockets import Http, Socket
from minmo.serving.telemetry import log, log_to_stderr

HARD_BYTES = 32 << 20
"""A message that is longer than may be is read and refused up to here; beyond, its connection ends with 1009."""
PING_S = 20.0
"""A client that answers no ping for so long has gone."""


class Draining(uvicorn.Server):
    """seconds: that replies may go on after the first signal."""

    def __init__(self, config: uvicorn.Config, hall: Hall, seconds: float) -> None:
        super().__init__(config)
        self._hall, self._seconds = hall, seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        ports = [s.getsockname()[1] for server in self.servers for s in server.sockets]
        log("listening", host=self.config.host, port=ports[0] if ports else None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._hall.draining:
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True
            return
        log("draining", signal=signal.Signals(sig).name, sessions=len(self._hall.live))
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._hall.draining = True
        self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._hall.drain(self._seconds)
        finally:
            self.should_exit = True


def check_pair(certificate: Path, key: Path) -> None:
    """Raises ValueError where no TLS comes of them, before a model is loaded."""

    def password() -> str:
        raise ValueError(f"{key} is encrypted, and nobody is here to be asked; openssl pkey -in IN -out OUT mends it")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password)
    except (ssl.SSLError, OSError) as error:
        why = getattr(error, "reason", None) or error.strerror or type(error).__name__
        raise ValueError(
            f"{certificate} and {key} are no certificate chain and its private key in PEM ({why}); give files that "
            "belong together"
        ) from None


def config(
    app: Starlette, host: str, port: int, tls_cert: Path | None = None, tls_key: Path | None = None
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host,
        port,
        http=Http,
        ws=Socket,
        ws_max_size=HARD_BYTES,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PING_S,
        ws_per_message_deflate=False,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def run(config: uvicorn.Config, hall: Hall, drain_s: float) -> None:
    """Serves until a signal ends it."""
    log_to_stderr()
    Draining(config, hall, drain_s).run()
