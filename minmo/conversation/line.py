"""One conversation of a scheduler, as any thread may use it: what waits for the engine's thread, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event
from minmo.conversation.verbs import check_sound

if TYPE_CHECKING:
    from minmo.conversation.scheduler import Scheduler

TICK_S = TICK / SAMPLE_RATE
MOST_WAITING_S = 60.0
"""Sound of one line that may wait to be heard."""
BURST_S = 1.0
"""Sound that may come at once and still counts as real time: what a network holds back and then lets go."""
PACE_S = 0.999 * TICK_S
"""Real time of a tick: a client's clock may run a little faster than this machine's, and for hours."""
READ_S = 0.5
"""From when context is to be read, or text without sound written, until it should have been."""

Action = Callable[[Conversation], list[Event]]


class Refused(Exception):
    """There is no room for what was asked; says why, and what would help."""


@dataclass(frozen=True, eq=False)
class Tick:
    """80 ms of sound, and when it is due, in seconds of `time.perf_counter`."""

    samples: np.ndarray
    due: float


@dataclass(frozen=True, eq=False)
class Call:
    """Something for the engine's thread to do, and who waits for its result. patient: context that is to be read is
    read before, piece by piece; else it would be at once, while all others wait."""

    run: Callable[[], Any]
    patient: bool = False
    future: Future[Any] = field(default_factory=Future)

    def __call__(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.run())
            except BaseException as error:  # whatever it raises: the thread that serves all others goes on
                self.future.set_exception(error)

    def refuse(self, why: str) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(RuntimeError(why))


class Line:
    """One conversation of a scheduler, for any thread. Made by `Scheduler.open`."""

    def __init__(
        self,
        scheduler: Scheduler,
        conversation: Conversation,
        on_events: Callable[[list[Event]], None],
        transcribe: bool,
    ) -> None:
        self._scheduler, self._conversation, self._on_events = scheduler, conversation, on_events
        self._transcribe = transcribe
        self._wake = scheduler._wake
        """Guards what follows, which more than one thread touches."""
        self._inbox: deque[Tick | Call] = deque()
        self._pieces: list[np.ndarray] = []
        self._count = 0
        """Samples in `_pieces`: of a tick that is not complete."""
        self.dropped_ms = 0.0
        """Sound that was given and will never be heard: it was cleared before."""
        self._paced = 0.0
        """When the next tick would be due in real time."""
        self._ended = ""
        """Why it has ended, where it has."""
        self._telling = threading.RLock()
        """Held while events are told, so that none is once `close` has returned."""
        # What the engine's thread alone touches.
        self._step: str | None = None
        self._since = 0.0
        """When `_step` became due."""
        self._heard = 0.0
        """When the newest tick was due, or was heard where that was before."""
        self._asked = 0.0
        """From when the first sound of the reply is waited for; 0 once it was told."""

    def hear(self, samples: np.ndarray) -> None:
        """The user's sound: 16 kHz mono float32 samples, (n,), of any length.

        Raises AudioError for sound that cannot be heard, Refused where too much waits already (nothing of this is taken
        then), and RuntimeError once the conversation has ended.
        """
        if isinstance(samples, np.ndarray) and samples.shape == (0,):
            return
        sound = check_sound(samples)
        with self._wake:
            self._check_open()
            waiting = len(self._inbox) * TICK_S + (self._count + len(sound)) / SAMPLE_RATE
            if waiting > MOST_WAITING_S:
                raise Refused(
                    f"{waiting:.1f} s of sound would wait to be heard, and {MOST_WAITING_S:.0f} s may: send it no "
                    "faster than it is spoken"
                )
            self._pieces.append(sound.copy())  # the caller's array may be used again
            self._count += len(sound)
            if self._count >= TICK:
                whole = np.concatenate(self._pieces)
                rest = len(whole) % TICK
                self._pieces, self._count = [whole[len(whole) - rest :]], rest
                self._put(whole[: len(whole) - rest])

    def do(self, action: Action, *, after_sound: bool = False) -> Future[list[Event]]:
        """Runs an action in the engine's thread, before the next batch, or once the conversation's history has been
        read. Its events are told, and are the future's result; an error goes to the future, and the conversation goes
        on. It must not wait for anything. Actions run in the order in which they were asked for, but before those that
        wait for sound.

        after_sound: not before all sound that was given has been heard, and context that was to be read has been read;
        of the sound an incomplete last tick is filled up with silence.
        """
        call = Call(lambda: self._scheduler._act(self, action), patient=after_sound)
        with self._wake:
            if self._ended:
                call.refuse(self._ended)
                return call.future
            if after_sound and self._count:
                rest = np.concatenate(self._pieces)
                self._pieces, self._count = [], 0
                self._put(np.pad(rest, (0, TICK - len(rest))))
            ticks = (n for n, item in enumerate(self._inbox) if isinstance(item, Tick))
            self._inbox.insert(len(self._inbox) if after_sound else next(ticks, len(self._inbox)), call)
            self._wake.notify()
        return call.future

    def transcribe(self, wanted: bool) -> Future[None]:
        """Whether what the user says is told as text, from the next turn on. The future raises Refused where there is
        no time or row for it."""
        return self._ask(lambda: self._scheduler._transcribe_line(self, wanted))

    def clear(self) -> Future[list[Event]]:
        """Forgets the open turn, with all sound of it that still waits to be heard; what was asked for before, and the
        sound that it waits for, comes first."""
        with self._wake:
            while self._inbox and isinstance(self._inbox[-1], Tick):
                self._inbox.pop()
                self._paced -= PACE_S
                self._count += TICK
            self.dropped_ms += 1e3 * self._count / SAMPLE_RATE
            self._pieces, self._count = [], 0
            return self.do(Conversation.clear, after_sound=True)

    def close(self) -> None:
        """Ends the conversation. No event comes after; its rows are free for whatever is opened next."""
        with self._telling, self._wake:
            if not self._ended:
                self._ended = "this conversation was closed: open another"
                self._scheduler._calls.append(Call(lambda: self._scheduler._end(self)))
                self._wake.notify()

    def _ask(self, run: Callable[[], Any]) -> Future[Any]:
        """Has the engine's thread do something before its next batch."""
        call = Call(run)
        with self._wake:
            if self._ended:
                call.refuse(self._ended)
            else:
                self._scheduler._calls.append(call)
                self._wake.notify()
        return call.future

    def _put(self, samples: np.ndarray) -> None:
        """Whole ticks, (n,), are to be heard."""
        now = time.perf_counter()
        for tick in samples.reshape(-1, TICK):
            self._inbox.append(Tick(tick, max(now, self._paced - BURST_S)))
            self._paced = max(now, self._paced) + PACE_S
        self._wake.notify()

    def _check_open(self) -> None:
        if self._ended:
            raise RuntimeError(self._ended)

    def _deadline(self, now: float) -> float:
        """When the step that is due should have been done."""
        step = self._conversation.next_step
        if step != self._step:
            self._step, self._since = step, now
        if not self._conversation.opened:
            return self._since  # its ticks wait for it
        if step == "read" or not self._conversation.speaks:
            return self._since + READ_S
        buffered = self._conversation.buffered_ms
        return now + buffered / 1e3 if buffered else self._since
