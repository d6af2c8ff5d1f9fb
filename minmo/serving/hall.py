"""The sessions of one server: how many a key has, which may be taken up again, and how all of them end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass

from minmo.conversation import Conversation, History, Phase, Settings
from minmo.conversation.events import Event
from minmo.conversation.scheduler import Line, Scheduler
from minmo.serving.connection import Connection
from minmo.serving.guard import Denied, Limits
from minmo.serving.items import Items
from minmo.serving.protocol import error_event
from minmo.serving.session import Session
from minmo.serving.settings import SessionSettings

MOST_KEPT = 64
"""Sessions that wait for their clients at once; of more, the oldest are given up."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a session whose client has gone: no rows, no caches. reply numbers of items are the history's."""

    settings: SessionSettings
    items: Items
    history: History
    conversation_id: str


class Hall:
    """settings: of a session at its beginning. drawing: how replies are drawn, with the longest that may be."""

    def __init__(self, scheduler: Scheduler, settings: SessionSettings, drawing: Settings, limits: Limits) -> None:
        self._scheduler, self._settings, self._drawing, self._limits = scheduler, settings, drawing, limits
        self.live: dict[Session, tuple[str, Connection]] = {}
        """Whose each session is, and its connection."""
        self._tokens: dict[str, Session | Kept] = {}
        self._owners: dict[str, str] = {}
        self.draining = False

    def check_room(self, key: str) -> None:
        """Raises Denied where a key has as many sessions as it may, or none may begin."""
        if self.draining:
            raise Denied(503, "draining", "this server is ending; connect again in a while")
        if sum(owner == key for owner, _ in self.live.values()) >= self._limits.sessions_per_key:
            raise Denied(
                429, "too_many_sessions", f"a key may have {self._limits.sessions_per_key} sessions at once; end one"
            )

    async def enter(
        self, key: str, connection: Connection, duplex: bool, token: str | None
    ) -> tuple[Session, str | None]:
        """A session for a connection, that of a token taken up again, and a token to take it up later, with duplex.

        Raises Denied, also for a token that is not known, and what `Scheduler.open` raises.
        """
        kept = None if token is None else await self._take_up(key, token)
        session = Session(
            self._settings if kept is None else kept.settings,
            self._drawing,
            self._scheduler.model.config.vocoder.sample_rate,
            connection.send,
            connection.end,
            duplex=duplex,
        )
        try:
            self.check_room(key)  # again: others may have come in meanwhile
            self.live[session] = key, connection
            if kept is not None:
                session.items, session.conversation_id = kept.items, kept.conversation_id
            session.begin(await self._open(session, None if kept is None else kept.history))
        except BaseException:
            self.live.pop(session, None)
            if kept is not None and token is not None:
                self._keep(token, key, kept)
            raise
        if not duplex:
            return session, None
        token = secrets.token_urlsafe(24)
        self._tokens[token], self._owners[token] = session, key
        return session, token

    async def _open(self, session: Session, history: History | None) -> Line:
        """A conversation for a session. Of a session that is cancelled meanwhile it ends as soon as it is there."""
        loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(
            asyncio.to_thread(
                self._scheduler.open,
                lambda events: _tell(loop, session, events),
                self._drawing,
                session.turn_taking(session.settings),
                history=history,
                transcribe=session.settings.transcription,
            )
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_late)
            raise

    async def leave(self, session: Session, token: str | None) -> None:
        """Its client has gone, or it is over: its rows are free, and with a token it may be taken up for a while."""
        key, connection = self.live[session]
        history: list[History] = []

        def put_away(conversation: Conversation) -> list[Event]:
            history.append(conversation.history)
            return conversation.stop() if conversation.phase in (Phase.TAKING, Phase.SPEAKING) else []

        try:
            with contextlib.suppress(RuntimeError):  # it has failed, and has told so
                await session.do(put_away)
        finally:
            session.close()
            del self.live[session]
            if token is not None:
                self._tokens.pop(token, None)
                self._owners.pop(token, None)
                if history:
                    session.renumber(history[0])
                    kept = Kept(session.settings, session.items, history[0], session.conversation_id)
                    self._keep(token, key, kept)
            connection.gone.set()

    async def drain(self, seconds: float) -> None:
        """No session begins any more; each ends when its reply is over, all of them after so many seconds."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.live:
            for session, (_, connection) in list(self.live.items()):
                if session.response is None or time.monotonic() > deadline:
                    connection.send(
                        error_event("this server is ending; connect again", "draining", kind="server_error")
                    )
                    connection.end(1012, "this server is ending")
            if time.monotonic() > deadline + 5:
                return
            await asyncio.sleep(0.05)

    async def _take_up(self, key: str, token: str) -> Kept:
        """Raises Denied. A session that is live is taken from its connection: of two, the later one is the client's."""
        found = self._tokens.get(token) if self._owners.get(token) == key else None
        if isinstance(found, Session):
            _, connection = self.live[found]
            connection.send({"type": "session.replaced", "session_id": found.id})
            connection.end(4000, "the session goes on in another connection")
            await connection.gone.wait()
            found = self._tokens.get(token)
        if not isinstance(found, Kept):
            raise Denied(404, "session_not_found", "there is no such session to resume, or not any more; begin another")
        del self._tokens[token], self._owners[token]
        return found

    def _keep(self, token: str, key: str, kept: Kept) -> None:
        for item in kept.items:
            item.sound = None
        waiting = [token for token, found in self._tokens.items() if isinstance(found, Kept)]
        if len(waiting) >= MOST_KEPT:
            del self._tokens[waiting[0]], self._owners[waiting[0]]
        self._tokens[token], self._owners[token] = kept, key

        def forget() -> None:
            if self._tokens.get(token) is kept:
                del self._tokens[token], self._owners[token]

        asyncio.get_running_loop().call_later(self._limits.resume_s, forget)


def _close_late(opening: asyncio.Future[Line]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _tell(loop: asyncio.AbstractEventLoop, session: Session, events: list[Event]) -> None:
    """In the engine's thread: hands over."""
    loop.call_soon_threadsafe(session.on_events, events)
