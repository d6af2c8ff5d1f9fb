"""Many conversations on one engine: one thread computes, and whose work is due first goes first.

Ticks that are due share a batch and come before everything; after each such batch comes one bounded step of other work,
so that no tick waits for more than one step and no reply waits for ever. Of the other work goes first what has the
nearest deadline: a block of text or sound when the reply's sound will have run out, context to be read again half a
second after it became due. A step takes in others of its kind while it stays within its bound. Transcripts are written
when nothing is due, and sound that comes faster than real time is heard when nothing else waits. What is asked of a
conversation is done between batches, and takes as long as it takes.

Late input is processed, none is dropped, and what a conversation tells comes in its order, whoever else is served.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from minmo.config import is_whole
from minmo.conversation import batch
from minmo.conversation.budget import TICK_MS, Budget
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Fault, Interrupted, Sound, TurnTaken, UserText
from minmo.conversation.history import History
from minmo.conversation.line import Action, Call, Line, Refused, Tick
from minmo.conversation.settings import Settings
from minmo.conversation.statistics import Meter, Statistics
from minmo.conversation.transcripts import Transcriber
from minmo.conversation.turn_taking import TurnTaking
from minmo.fast.engine import FastMinMo

__all__ = ["Action", "Line", "Refused", "Scheduler"]

LOG = logging.getLogger(__name__)
BOUND_MS = TICK_MS / 2
"""How long a step may get by others' sharing it."""


class Scheduler:
    """Owns an engine and the one thread that calls it.

    model: a FastMinMo, of which a conversation takes two rows, and all transcripts together one. budget: what its steps
    cost; measured now where none is given, which takes seconds. max_sessions: conversations at once, where that is
    fewer. Raises ValueError for a model that serves no batches; measuring raises RuntimeError while another thread has
    sessions in it.
    """

    def __init__(self, model: FastMinMo, *, budget: Budget | None = None, max_sessions: int | None = None) -> None:
        if not isinstance(model, FastMinMo):
            raise ValueError(f"a scheduler needs a minmo.FastMinMo, got {type(model).__name__}")
        if model.capacity < 2:
            raise ValueError("a conversation takes two rows: make the FastMinMo with rows=2 or more")
        if max_sessions is not None and (not is_whole(max_sessions) or max_sessions < 1):
            raise ValueError(f"max_sessions must be a whole number from 1 on, got {max_sessions!r}")
        self.model, self.max_sessions = model, max_sessions
        self._meter = Meter()
        self._transcriber: Transcriber | None = None
        self._wake = threading.Condition(threading.RLock())
        """Guards what follows, which more than one thread touches."""
        self._calls: deque[Call] = deque()
        self._lines: list[Line] = []
        self._closed = ""
        self._thread = threading.Thread(target=self._serve, name="minmo-engine", daemon=True)
        self._thread.start()
        try:
            self.budget = budget or self._call(lambda: Budget.measure(model, model.capacity // 2))
        except BaseException:
            self.close()
            raise

    def open(
        self,
        on_events: Callable[[list[Event]], None],
        settings: Settings = Settings(),  # noqa: B008 (frozen)
        turn_taking: TurnTaking = TurnTaking(),  # noqa: B008 (frozen)
        *,
        history: History | Sequence[tuple[str | None, str]] | None = None,
        transcribe: bool = False,
    ) -> Line:
        """A new conversation; from any thread, which waits for at most one step.

        on_events: called in the engine's thread with events in order; it must not block, and a conversation whose
        callback raises ends. history: what was said before, or its texts (as in `History.of_texts`). transcribe:
        tell what the user said, as `UserText`. Raises Refused where one more cannot be served in time, and ValueError
        for settings that cannot be.
        """
        return self._call(lambda: self._begin(on_events, settings, turn_taking, history, transcribe))

    @property
    def alive(self) -> bool:
        """Whether its thread runs: else every call raises, and only another scheduler helps."""
        return self._thread.is_alive()

    def statistics(self) -> Statistics:
        """From any thread."""
        now = time.perf_counter()
        waiting = dict.fromkeys(("tick", *batch.STEPS, "transcribe"), 0)
        with self._wake:
            heads = [line._inbox[0] for line in self._lines if line._inbox]
            waiting["tick"] = sum(isinstance(item, Tick) for line in self._lines for item in line._inbox)
            for line in self._lines:
                if line._step:
                    waiting[line._step] += 1
            waiting["transcribe"] = len(self._transcriber or ())
            sessions = len(self._lines)
        lag = max((now - item.due for item in heads if isinstance(item, Tick)), default=0.0)
        return self._meter.statistics(sessions, max(0.0, 1e3 * lag), waiting)

    def close(self) -> None:
        """Ends all conversations, and the thread; no event comes after. Not for `on_events`, nor is `open`."""
        self._check_thread()
        with self._wake:
            lines = list(self._lines)
        for line in lines:
            line.close()
        with self._wake:
            self._closed = self._closed or "this scheduler was closed"
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("the engine's thread would wait for itself: open and close from another")

    def _call(self, run: Callable[[], Any]) -> Any:
        self._check_thread()
        call = Call(run)
        with self._wake:
            if self._closed:
                raise RuntimeError(self._closed)
            self._calls.append(call)
            self._wake.notify()
        return call.future.result()

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        try:
            while self._wait():
                self._answer_calls()
                self._round()
        except BaseException as error:
            LOG.exception("the engine's thread failed")
            with self._wake:
                self._closed = f"the engine's thread failed ({type(error).__name__}: {error}): make another scheduler"
            for line in list(self._lines):
                self._tell(line, [Fault(line._conversation.now_ms, self._closed)])
        finally:
            for line in list(self._lines):
                self._end(line)
            if self._transcriber is not None:
                self._transcriber.close()
            with self._wake:
                calls, self._calls = list(self._calls), deque()
            for call in calls:
                call.refuse(self._closed)

    def _wait(self) -> bool:
        """Until there is something to do, or the end has come: then false."""
        with self._wake:
            while not self._calls and not self._closed and not self._busy():
                self._wake.wait()
            return not self._closed or bool(self._calls)

    def _answer_calls(self) -> None:
        """What was asked for of no conversation in particular: many that open at once let others' ticks in between."""
        began = time.perf_counter()
        while self._calls and time.perf_counter() - began <= BOUND_MS / 1e3:
            self._calls.popleft()()

    def _busy(self) -> bool:
        return bool(self._transcriber) or any(line._inbox or line._conversation.next_step for line in self._lines)

    def _begin(
        self,
        on_events: Callable[[list[Event]], None],
        settings: Settings,
        turn_taking: TurnTaking,
        history: History | Sequence[tuple[str | None, str]] | None,
        transcribe: bool,
    ) -> Line:
        running = len(self._lines)
        if self.max_sessions is not None and running >= self.max_sessions:
            raise Refused(f"{running} sessions run, and {self.max_sessions} may: end one, or raise max_sessions")
        self._admit(running + 1, transcribe, "one more")
        if history is not None and not isinstance(history, History):
            history = History.of_texts(self.model, history)
        if transcribe and self._transcriber is None:
            self._transcriber = Transcriber(self.model)
        line = Line(self, Conversation(self.model, settings, turn_taking, history=history), on_events, transcribe)
        with self._wake:
            self._lines.append(line)
        return line

    def _admit(self, sessions: int, transcribe: bool, what: str) -> None:
        """Raises Refused where there is no room for so many sessions, one more of which is transcribed or not."""
        running, transcribed = len(self._lines), sum(line._transcribe for line in self._lines) + transcribe
        one = transcribe or self._transcriber is not None
        if 2 * sessions + one > self.model.capacity:
            raise Refused(
                f"{running} sessions run, and {self.model.capacity} rows have no room for {what}, two a session"
                f"{' and one for transcripts' if one else ''}: end one, or make the FastMinMo with more rows"
            )
        if shortage := self.budget.shortage(sessions, transcribed):
            raise Refused(
                f"{running} sessions run, which with {what} would need {shortage}: end one, or serve on a faster "
                "machine or on several"
            )

    def _transcribe_line(self, line: Line, wanted: bool) -> None:
        if wanted and not line._transcribe:
            self._admit(len(self._lines), True, "transcripts")
            if self._transcriber is None:
                self._transcriber = Transcriber(self.model)
        line._transcribe = wanted
        self._rest()

    def _rest(self) -> None:
        """Where nobody wants transcripts any more their row is free."""
        transcriber = self._transcriber
        if transcriber is not None and not transcriber and not any(line._transcribe for line in self._lines):
            transcriber.close()
            self._transcriber = None

    def _round(self) -> None:
        """One batch of ticks that are due, and one step of other work; where there is neither, a piece of a transcript,
        and where there is none of those, ticks ahead of time."""
        now = time.perf_counter()
        due, ahead = list[Line](), list[Line]()
        for line in list(self._lines):
            while (call := self._asked_now(line)) is not None:
                call()
                if time.perf_counter() - now > BOUND_MS / 1e3:
                    break  # the rest after the next batch: who asks for much keeps nobody waiting
            if line._conversation.opened and (tick := self._next_tick(line)) is not None:
                (due if tick.due <= now else ahead).append(line)
        if due:
            self._hear(due)
        if work := self._next_work():
            kind, lines = work
            self._shared(kind, lines, lambda: batch.STEPS[kind]([line._conversation for line in lines]))
        elif due:
            return
        elif self._transcriber:
            began = time.perf_counter()
            try:
                self._transcriber.step()
            except Exception as error:
                LOG.exception("a transcript failed")
                self._transcriber.give_up(f"its transcript failed ({type(error).__name__}: {error})")
            self._rest()
            self._meter.step("transcribe", time.perf_counter() - began)
        elif ahead:
            self._hear(ahead)

    def _asked_now(self, line: Line) -> Call | None:
        """What was to be done once the sound before it had been heard, as it has."""
        with self._wake:
            ready = line._inbox and line._conversation.opened and not line._ended
            if not ready or not isinstance(call := line._inbox[0], Call):
                return None
            if call.patient and line._conversation.next_step == "read":
                return None
            line._inbox.popleft()
            return call

    def _next_tick(self, line: Line) -> Tick | None:
        with self._wake:
            return item if line._inbox and not line._ended and isinstance(item := line._inbox[0], Tick) else None

    def _hear(self, lines: Sequence[Line]) -> None:
        hearing, now = list[tuple[Line, Tick]](), time.perf_counter()
        with self._wake:
            for line in lines:
                if (tick := self._next_tick(line)) is not None:  # it may have been cleared meanwhile
                    line._inbox.popleft()
                    line._heard = min(tick.due, now)
                    hearing.append((line, tick))
        if not hearing:
            return
        lines = [line for line, _ in hearing]
        sounds = [tick.samples for _, tick in hearing]
        self._shared("tick", lines, lambda: batch.tick([line._conversation for line in lines], sounds))
        now = time.perf_counter()
        for _, tick in hearing:
            self._meter.tick(1e3 * max(0.0, now - tick.due), TICK_MS)

    def _next_work(self) -> tuple[str, list[Line]] | None:
        """The most urgent step that is due, and the lines that share it."""
        now = time.perf_counter()
        due = sorted((line._deadline(now), n) for n, line in enumerate(self._lines))
        waiting = [line for _, n in due if (line := self._lines[n])._step and not line._ended]
        if not waiting:
            return None
        kind = waiting[0]._step
        assert kind is not None
        same = [line for line in waiting if line._step == kind]
        return kind, same[: self.budget.most(kind, BOUND_MS, len(same))]

    def _shared(self, kind: str, lines: Sequence[Line], step: Callable[[], list[batch.Outcome]]) -> None:
        """Does a step of several lines and tells each its events. An error of one conversation's ends that; where the
        step itself fails nobody can say what it left behind, and all that shared it end."""
        began = time.perf_counter()
        try:
            outcomes = step()
        except Exception as error:
            outcomes = [error] * len(lines)
        self._meter.step(kind, time.perf_counter() - began)
        for line, outcome in zip(lines, outcomes, strict=True):
            if isinstance(outcome, Exception):
                LOG.error("a %s of %d conversations failed", kind, len(lines), exc_info=outcome)
                why = f"a step of it failed ({type(outcome).__name__}: {outcome})"
                outcome = [Fault(line._conversation.now_ms, why)]
            self._tell(line, outcome)

    def _act(self, line: Line, action: Action) -> list[Event]:
        if line._ended:
            raise RuntimeError(line._ended)
        asked = time.perf_counter()
        try:
            events = action(line._conversation)
            self._tell(line, events, asked)
        finally:
            if why := line._conversation.fault:  # of which nothing was told: it must not share another step
                self._tell(line, [Fault(line._conversation.now_ms, why)])
        return events

    def _tell(self, line: Line, events: list[Event], asked: float | None = None) -> None:
        """asked: when somebody asked for what they tell."""
        faults = [event.why for event in events if isinstance(event, Fault)]
        with line._telling:
            if line._ended or not events:
                return
            try:
                line._on_events(events)
            except BaseException:
                LOG.exception("a conversation's on_events failed, and the conversation ends")
                faults.append("what takes its events failed")
            if faults:
                line._ended = f"this conversation has ended: {faults[0]}; open another"
        if faults:
            self._end(line)
        else:
            self._measure(line, events, asked)

    def _measure(self, line: Line, events: list[Event], asked: float | None) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, TurnTaken):
                line._asked = asked or line._heard - (event.at_ms - event.voice_ended_ms) / 1e3
                if line._transcribe:
                    self._transcribe(line, event.reply)
            elif isinstance(event, Sound) and line._asked:
                self._meter.add("first_audio", 1e3 * (now - line._asked))
                line._asked = 0.0
            elif isinstance(event, Interrupted):
                late = 1e3 * (now - line._heard)
                for name in ("decided", "sent", "played"):
                    if (ms := getattr(event, f"{name}_ms")) is not None:
                        self._meter.add(f"stop_{name}", ms + late)

    def _transcribe(self, line: Line, reply: int) -> None:
        exchanges = line._conversation.history.exchanges
        exchange = next((e for e in exchanges if e.number == reply), None)
        if self._transcriber is not None and exchange is not None and not exchange.typed:

            def done(text: str, fault: str) -> None:
                self._tell(line, [UserText(line._conversation.now_ms, reply, text, fault)])

            self._transcriber.add(line, exchange.user, done)

    def _end(self, line: Line) -> None:
        """Its rows are free, and nobody waits for it in vain."""
        if line not in self._lines:
            return
        with self._wake:
            line._ended = line._ended or self._closed
            self._lines.remove(line)
            waiting, line._inbox = line._inbox, deque()
        line._conversation.close()
        if self._transcriber is not None:
            self._transcriber.drop(line)
            self._rest()
        for item in waiting:
            if isinstance(item, Call):
                item.refuse(line._ended)
