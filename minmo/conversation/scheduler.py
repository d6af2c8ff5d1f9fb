"""Many conversations on one engine: one thread computes, and whose work is due first goes first.

Ticks that are due share a batch and come before everything; after each such batch, one bounded step of other work is
done, so that no tick waits for more than one step and no reply waits for ever. Of the other work goes first what has
the nearest deadline: a block of text or sound when the reply's sound will have run out, context to be read again half a
second after it became due. Sound that comes faster than real time is heard when nothing else is due.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation import conversation as together
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Fault
from minmo.conversation.history import History
from minmo.conversation.settings import Settings
from minmo.conversation.turn_taking import TurnTaking
from minmo.conversation.verbs import check_sound
from minmo.fast.engine import FastMinMo

LOG = logging.getLogger(__name__)
TICK_S = TICK / SAMPLE_RATE
MOST_WAITING_S = 60.0
"""Sound of one line that may wait to be heard."""
BURST_S = 1.0
"""Sound that may come at once and still counts as real time: what a network holds back and then lets go."""
READ_S = 0.5
"""When context that is to be read again should have been."""

Action = Callable[[Conversation], list[Event]]


class Refused(Exception):
    """There is no room for what was asked; says why, and what would help."""


@dataclass(frozen=True, eq=False)
class _Tick:
    """80 ms of sound, and when it is due, in seconds of `time.perf_counter`."""

    samples: np.ndarray
    due: float


@dataclass(frozen=True, eq=False)
class _Request:
    """Something to be done with a conversation, and who waits for it."""

    action: Action
    future: Future[list[Event]]


class Line:
    """One conversation of a scheduler, for any thread. Made by `Scheduler.open`."""

    def __init__(self, scheduler: Scheduler, conversation: Conversation, on_events: Callable[[list[Event]], None]):
        self._scheduler, self._conversation, self._on_events = scheduler, conversation, on_events
        self._telling = threading.RLock()
        """Held while events are told, so that none is once `close` has returned."""
        self._inbox: deque[_Tick | _Request] = deque()
        self._pieces: list[np.ndarray] = []
        self._count = 0
        """Samples in `_pieces`: of a tick that is not complete."""
        self._paced = 0.0
        """When the next tick would be due in real time."""
        self._ended = ""
        """Why it has ended, where it has."""

    def hear(self, samples: np.ndarray) -> None:
        """The user's sound: 16 kHz mono float32 samples, (n,), of any length.

        Raises AudioError for sound that cannot be heard, Refused where too much waits already (nothing of this is taken
        then), and RuntimeError once the conversation has ended.
        """
        if len(samples) == 0:
            return
        sound = check_sound(samples)
        with self._scheduler._wake:
            self._check_open()
            ticks = sum(isinstance(item, _Tick) for item in self._inbox)
            waiting = ticks * TICK_S + (self._count + len(sound)) / SAMPLE_RATE
            if waiting > MOST_WAITING_S:
                raise Refused(
                    f"{waiting:.1f} s of sound would wait to be heard, and {MOST_WAITING_S:.0f} s may: send it no "
                    "faster than it is spoken"
                )
            self._pieces.append(sound)
            self._count += len(sound)
            if self._count >= TICK:
                whole = np.concatenate(self._pieces)
                cut = len(whole) // TICK * TICK
                for start in range(0, cut, TICK):
                    self._put_tick(whole[start : start + TICK])
                self._pieces, self._count = [whole[cut:]], len(whole) - cut
                self._scheduler._wake.notify()

    def do(self, action: Action, *, after_sound: bool = False) -> Future[list[Event]]:
        """Runs an action in the engine's thread between batches: its events are told, and are the future's result; an
        error of its goes to the future, and the conversation goes on.

        after_sound: once all sound that was given before has been heard, of which an incomplete last tick is filled up
        with silence.
        """
        future: Future[list[Event]] = Future()
        request = _Request(action, future)
        with self._scheduler._wake:
            if self._ended:
                future.set_exception(RuntimeError(self._ended))
                return future
            if after_sound:
                if self._count:
                    rest = np.concatenate(self._pieces)
                    self._put_tick(np.pad(rest, (0, TICK - len(rest))))
                    self._pieces, self._count = [], 0
                self._inbox.append(request)
            else:
                self._scheduler._calls.append(lambda: self._scheduler._act(self, request))
            self._scheduler._wake.notify()
        return future

    def close(self) -> None:
        """Ends the conversation. No event comes after; its rows are free for whatever is opened next."""
        with self._telling, self._scheduler._wake:
            if not self._ended:
                self._ended = "this conversation was closed: open another"
                self._scheduler._calls.append(lambda: self._scheduler._end(self))
                self._scheduler._wake.notify()

    def _put_tick(self, samples: np.ndarray) -> None:
        now = time.perf_counter()
        self._inbox.append(_Tick(samples, max(now, self._paced - BURST_S)))
        self._paced = max(now, self._paced) + TICK_S

    def _check_open(self) -> None:
        if self._ended:
            raise RuntimeError(self._ended)


class Scheduler:
    """Owns an engine and the one thread that calls it.

    model: a FastMinMo, of which a conversation takes two rows. max_sessions: conversations at once, by default as many
    as there are rows for. Raises ValueError for a model that serves no batches.
    """

    def __init__(self, model: FastMinMo, *, budget: Any = None, max_sessions: int | None = None) -> None:
        if not isinstance(model, FastMinMo):
            raise ValueError(f"a scheduler needs a minmo.FastMinMo, got {type(model).__name__}")
        self.model = model
        most = model.capacity // 2
        self.max_sessions = most if max_sessions is None else min(max_sessions, most)
        self._wake = threading.Condition(threading.RLock())
        self._calls: deque[Callable[[], None]] = deque()
        self._lines: list[Line] = []
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="minmo-engine", daemon=True)
        self._thread.start()

    def open(
        self,
        on_events: Callable[[list[Event]], None],
        settings: Settings = Settings(),  # noqa: B008 (frozen)
        turn_taking: TurnTaking = TurnTaking(),  # noqa: B008 (frozen)
        *,
        history: History | None = None,
        transcribe: bool = False,
    ) -> Line:
        """A new conversation; from any thread, which waits for at most one step.

        on_events: called in the engine's thread with events in order; it must not block, and a conversation whose
        callback raises ends. Raises Refused where one more cannot be served in time, and ValueError for settings that
        cannot be.
        """
        opened: Future[Line] = Future()

        def begin() -> None:
            try:
                if len(self._lines) >= self.max_sessions:
                    raise Refused(f"{len(self._lines)} sessions run, and {self.max_sessions} may: end one first")
                line = Line(self, Conversation(self.model, settings, turn_taking, history=history), on_events)
                self._lines.append(line)
                opened.set_result(line)
            except BaseException as error:
                opened.set_exception(error)

        self._call(begin)
        return opened.result()

    def close(self) -> None:
        """Ends all conversations, and the thread; no event comes after."""
        for line in list(self._lines):
            line.close()
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _call(self, call: Callable[[], None]) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("this scheduler was closed")
            self._calls.append(call)
            self._wake.notify()

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._calls and not self._closing and not any(line._inbox for line in self._lines):
                    if self._next_work():
                        break
                    self._wake.wait()
                if self._closing and not self._calls:
                    return
                calls = list(self._calls)
                self._calls.clear()
            for call in calls:
                call()
            self._round()

    def _round(self) -> None:
        """One batch of ticks that are due, and one step of other work; where there is neither, ticks ahead of time."""
        for line in list(self._lines):
            while not line._ended and line._inbox and isinstance(line._inbox[0], _Request):
                with self._wake:
                    request = line._inbox.popleft()
                assert isinstance(request, _Request)
                self._act(line, request)
        now = time.perf_counter()
        heard = [line for line in self._lines if line._inbox]
        due = [line for line in heard if isinstance(item := line._inbox[0], _Tick) and item.due <= now]
        if due:
            self._hear(due)
        if work := self._next_work():
            self._step(*work)
        elif not due and (ahead := [line for line in heard if line._inbox and isinstance(line._inbox[0], _Tick)]):
            self._hear(ahead)

    def _hear(self, lines: Sequence[Line]) -> None:
        with self._wake:
            ticks = [line._inbox.popleft() for line in lines]
        sounds = [tick.samples for tick in ticks if isinstance(tick, _Tick)]
        self._shared(lines, lambda: together.tick([line._conversation for line in lines], sounds))

    def _next_work(self) -> tuple[str, list[Line]] | None:
        """The kind of the most urgent step, and all lines that wait for one of its kind."""
        due = [(line._conversation.next_step, line) for line in self._lines if not line._ended]
        for kind in ("speak", "write", "read"):
            if lines := [line for step, line in due if step == kind]:
                return kind, lines
        return None

    def _step(self, kind: str, lines: list[Line]) -> None:
        self._shared(lines, lambda: together.STEPS[kind]([line._conversation for line in lines]))

    def _shared(self, lines: Sequence[Line], step: Callable[[], list[list[Event]]]) -> None:
        """Does a step of several lines and tells each its events."""
        try:
            told = step()
        except Exception as error:
            LOG.exception("a step of %d conversations failed", len(lines))
            told = [[Fault(line._conversation.now_ms, f"{type(error).__name__}: {error}")] for line in lines]
        for line, events in zip(lines, told, strict=True):
            self._tell(line, events)

    def _act(self, line: Line, request: _Request) -> None:
        if not request.future.set_running_or_notify_cancel():
            return
        if line._ended:
            request.future.set_exception(RuntimeError(line._ended))
            return
        try:
            events = request.action(line._conversation)
        except Exception as error:
            request.future.set_exception(error)
        else:
            self._tell(line, events)
            request.future.set_result(events)

    def _tell(self, line: Line, events: list[Event]) -> None:
        faults = [event.why for event in events if isinstance(event, Fault)]
        with line._telling:
            if line._ended or not events:
                return
            try:
                line._on_events(events)
            except Exception:
                LOG.exception("what a conversation's events were told to failed: it ends")
                faults.append("its events could not be told")
            if faults:
                line._ended = f"this conversation has ended: {faults[0]}; open another"
        if faults:
            self._end(line)

    def _end(self, line: Line) -> None:
        """Its rows are free, and nobody waits for it in vain."""
        if line not in self._lines:
            return
        self._lines.remove(line)
        line._conversation.close()
        with self._wake:
            requests = [item for item in line._inbox if isinstance(item, _Request)]
            line._inbox.clear()
        for request in requests:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(RuntimeError(line._ended))
