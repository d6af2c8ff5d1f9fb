"""The sessions of one server: how many a key has, which may be taken up again, and how all of them end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from minmo.conversation import Conversation, History, Phase, Settings
from minmo.conversation.events import Event
from minmo.conversation.scheduler import Action, Line, Scheduler
from minmo.serving.connection import Connection
from minmo.serving.guard import Denied, Limits
from minmo.serving.protocol import error_event
from minmo.serving.response import Wishes
from minmo.serving.session import Session
from minmo.serving.settings import SessionSettings
from minmo.serving.store import Kept, Store, StoreError
from minmo.serving.telemetry import log

SAVE_S = 0.25
"""A session that goes on is put into its store no more often than this."""


class Hall:
    """settings: of a session at its beginning. drawing: how replies are drawn, with the longest that may be. store:
    where sessions wait for their clients."""

    def __init__(
        self, scheduler: Scheduler, settings: SessionSettings, drawing: Settings, limits: Limits, store: Store
    ) -> None:
        self._scheduler, self._settings, self._drawing, self._limits = scheduler, settings, drawing, limits
        self._store = store
        self.live: dict[Session, tuple[str, Connection]] = {}
        """Whose each session is, and its connection."""
        self._tokens: dict[str, Session] = {}
        """Of live sessions."""
        self._saving: dict[Session, asyncio.Task[None]] = {}
        self.draining = False

    def check_room(self, key: str, token: str | None = None) -> None:
        """Raises Denied where a key has as many sessions as it may, beside that of a token, or none may begin."""
        if self.draining:
            raise Denied(503, "draining", "this server is ending; connect again in a while")
        resumed = None if token is None else self._tokens.get(token)
        others = sum(owner == key and session is not resumed for session, (owner, _) in self.live.items())
        if others >= self._limits.sessions_per_key:
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
            by_words=duplex and self._store.outlives,
        )
        try:
            self.check_room(key)  # again: others may have come in meanwhile
            self.live[session] = key, connection
            if kept is not None:
                session.items, session.conversation_id = kept.items, kept.conversation_id
            session.begin(await self._open(session, None if kept is None else kept.history))
            if kept is not None:
                await session.do(_drawing_by(session.drawing(Wishes.of(None, kept.settings))))
                for text in kept.unanswered:
                    await session.do(_typing(text))
                session.renumber(kept.numbers)
        except BaseException:
            session.close()
            self.live.pop(session, None)
            if kept is not None and token is not None:
                with contextlib.suppress(StoreError):  # what kept it out is what is told
                    await self._store.put_back(token, key, kept)
            raise
        if not duplex:
            return session, None
        token = secrets.token_urlsafe(24)
        self._tokens[token] = session
        if self._store.outlives:
            session.changed.set()
            self._saving[session] = asyncio.create_task(self._save(session, token))
        return session, token

    async def _open(self, session: Session, history: History | Sequence[tuple[str | None, str]] | None) -> Line:
        """A conversation for a session. Of a session that is cancelled meanwhile it ends as soon as it is there."""
        loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(
            asyncio.to_thread(
                self._scheduler.open,
                lambda events: _tell(loop, session, events),
                self._drawing,
                session.turn_taking(session.settings),
                history=history,
                transcribe=session.settings.transcription or session.by_words,
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
        saving = self._saving.pop(session, None)
        if saving is not None:
            saving.cancel()
            await asyncio.wait([saving])  # what it puts must not come after what is put below
        kept: list[Kept] = []

        def put_away(conversation: Conversation) -> list[Event]:
            events = conversation.stop() if conversation.phase in (Phase.TAKING, Phase.SPEAKING) else []
            if not conversation.voiced and conversation.turn_taking.answer is not None:
                events = events + conversation.clear()  # silence, before which no turn has begun
            kept.append(_kept(session, conversation))
            return events

        try:
            with contextlib.suppress(RuntimeError):  # it has failed, and has told so
                await session.do(put_away)
        finally:
            session.close()
            del self.live[session]
            try:
                if token is not None:
                    self._tokens.pop(token, None)
                    if kept:
                        for item in session.items:
                            item.sound = None
                        await self._store.put(token, key, kept[0], waiting=True)
            except StoreError as error:
                log("not kept", session.id, level=logging.WARNING, why=str(error))
            finally:
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
        found = self._tokens.get(token)
        if found is not None and self.live[found][0] == key:
            _, connection = self.live[found]
            _replace(found, connection)
            await connection.gone.wait()
        try:
            kept = await self._store.take(token, key)
        except StoreError as error:
            raise Denied(503, "resume_unavailable", f"{error}; begin another session, or try again") from None
        if kept is None or kept.settings.model != self._settings.model:
            raise Denied(404, "session_not_found", "there is no such session to resume, or not any more; begin another")
        return replace(kept, settings=replace(kept.settings, most_tokens=self._settings.most_tokens))

    async def _save(self, session: Session, token: str) -> None:
        """Puts a live session into a store that outlives this server: when it has changed, and often enough to stay."""
        key, connection = self.live[session]
        told = False
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(session.changed.wait(), self._limits.resume_s / 4)
            session.changed.clear()
            kept: list[Kept] = []

            def look(conversation: Conversation, kept: list[Kept] = kept) -> list[Event]:
                kept.append(_kept(session, conversation))
                return []

            try:
                await session.do(look)
            except RuntimeError:
                return  # it has ended
            try:
                ours, told = await self._store.put(token, key, kept[0], waiting=False), False
                if not ours:
                    _replace(session, connection)
                    return
            except StoreError as error:
                if not told:
                    log("not kept", session.id, level=logging.WARNING, why=str(error))
                    why = f"{error}: this session goes on, but cannot be resumed until it does"
                    connection.send(error_event(why, "resume_unavailable", kind="server_error"))
                told = True
            await asyncio.sleep(SAVE_S)


def _kept(session: Session, conversation: Conversation) -> Kept:
    return Kept.of(session.settings, session.items, session.conversation_id, conversation)


def _drawing_by(settings: Settings) -> Action:
    def change(conversation: Conversation) -> list[Event]:
        conversation.settings = settings
        return []

    return change


def _typing(text: str) -> Action:
    return lambda conversation: conversation.typed(text)


def _replace(session: Session, connection: Connection) -> None:
    """Of two connections for one session, the later one is the client's."""
    connection.send({"type": "session.replaced", "session_id": session.id})
    connection.end(4000, "the session goes on in another connection")


def _close_late(opening: asyncio.Future[Line]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _tell(loop: asyncio.AbstractEventLoop, session: Session, events: list[Event]) -> None:
    """In the engine's thread: hands over."""
    loop.call_soon_threadsafe(session.on_events, events)
