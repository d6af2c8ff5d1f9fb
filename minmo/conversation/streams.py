"""A stream of the user's sound in, a stream of the assistant's sound out: `full_duplex` for sync and async iterables.

A turn ends where the full-duplex predictor decides so, or where the input ends. The input is heard while a reply is
given, and its sound comes at the pace of the input: an interruption stops it.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import overload

import numpy as np

from minmo.config import SAMPLE_RATE, TICK, is_real
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Fault, Interrupted, ReplyDone, TextDelta, TurnTaken
from minmo.conversation.events import Sound as SoundEvent
from minmo.conversation.settings import Settings
from minmo.conversation.turn_taking import Phase, TurnTaking
from minmo.conversation.verbs import Sound, check_sound
from minmo.model import MinMo


@dataclass(frozen=True, eq=False)
class VoiceInput:
    """A piece of the user's sound, of any length, none included: mono 16 kHz float32 samples, and when the
    first of them was heard."""

    audio: Sound
    timestamp_ms: float

    @property
    def end_ms(self) -> float:
        return self.timestamp_ms + 1e3 * len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True, eq=False)
class VoiceOutput:
    """A piece of the assistant's turn: mono 24 kHz float32 sound, the text that came with it, and when it was ready.

    timestamp_ms is on the input's clock: the end of the last input taken plus the time spent computing since.
    final: the turn is complete. interrupted: the user has cut it, perhaps after its final output, and what has not been
    played is to be dropped.
    """

    audio: Sound
    transcript: str
    timestamp_ms: float
    final: bool = False
    interrupted: bool = False


def latency(voice_input: VoiceInput, voice_output: VoiceOutput) -> float:
    """Milliseconds from the last sample of the input to the moment when the output was ready to be played."""
    return voice_output.timestamp_ms - voice_input.end_ms


@overload
def full_duplex(
    model: MinMo,
    stream: Iterable[VoiceInput],
    settings: Settings = ...,
    *,
    threshold: float = ...,
    max_positions: int | None = ...,
) -> Iterator[VoiceOutput]: ...
@overload
def full_duplex(
    model: MinMo,
    stream: AsyncIterable[VoiceInput],
    settings: Settings = ...,
    *,
    threshold: float = ...,
    max_positions: int | None = ...,
) -> AsyncIterator[VoiceOutput]: ...
def full_duplex(
    model: MinMo,
    stream: Iterable[VoiceInput] | AsyncIterable[VoiceInput],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    threshold: float = 0.5,
    max_positions: int | None = None,
) -> Iterator[VoiceOutput] | AsyncIterator[VoiceOutput]:
    """Listens to a stream and answers each of its turns, listening on while it speaks.

    The stream is the clock: 80 ms of it let 80 ms of a reply go out, of which at most 200 ms are ahead, and what is
    left of a reply when the stream ends comes at once. A reply ends early where the predictor decides that the user
    takes over; a turn that the stream's end leaves open is answered where a voice was noticed in it, and a first one
    always.

    threshold: the predictor's turn-taking probability from which a turn counts as ended, asked every 80 ms and reached
    twice in a row; sound after the decision belongs to the next turn. max_positions: LLM context of the conversation,
    by default the model's; the oldest exchanges are forgotten as it fills up, and ValueError is raised where a turn and
    its reply do not fit. A FastMinMo needs two free rows. An async stream gives an async iterator; all of them compute
    in one thread off the event loop, so a FastMinMo serves async streams, or calls from another thread, not both at
    once. Raises AudioError for a piece of sound that cannot be heard, and FloatingPointError where the model's numbers
    become NaN.
    """
    if not is_real(threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability in 0 .. 1, got {threshold!r}")
    opened = functools.partial(_Turns, model, settings, TurnTaking(answer=threshold), max_positions)
    if isinstance(stream, AsyncIterable):
        return _answers_async(opened, stream)
    if not isinstance(stream, Iterable):
        raise ValueError(f"stream must be an iterable of minmo.VoiceInput, got {type(stream).__name__}")
    return _Answers(opened(), stream)


class _Answers(Iterator[VoiceOutput]):
    """The outputs of a sync stream. A call from a thread that must not use the session raises; the stream goes on."""

    def __init__(self, turns: _Turns, stream: Iterable[VoiceInput]) -> None:
        self._turns, self._outputs = turns, _answers(turns, stream)

    def __next__(self) -> VoiceOutput:
        self._turns.check()
        return next(self._outputs)

    def close(self) -> None:
        """Ends the conversation."""
        self._turns.check()
        self._outputs.close()


def _answers(turns: _Turns, stream: Iterable[VoiceInput]) -> Generator[VoiceOutput, None, None]:
    try:
        for piece in stream:
            yield from turns.take(piece)
        yield from turns.finish()
    finally:
        turns.close()


_COMPUTING = ThreadPoolExecutor(1, "minmo")
"""Off the event loop, and in one thread for all streams: an engine takes calls from one thread."""


async def _answers_async(opened: Callable[[], _Turns], stream: AsyncIterable[VoiceInput]) -> AsyncIterator[VoiceOutput]:
    loop = asyncio.get_running_loop()
    turns = await loop.run_in_executor(_COMPUTING, opened)
    try:
        async for piece in stream:
            outputs = turns.take(piece)
            while (output := await loop.run_in_executor(_COMPUTING, next, outputs, None)) is not None:
                yield output
        outputs = turns.finish()
        while (output := await loop.run_in_executor(_COMPUTING, next, outputs, None)) is not None:
            yield output
    finally:
        await loop.run_in_executor(_COMPUTING, turns.close)


class _Turns:
    """One conversation: cuts the stream into ticks of 80 ms, and does between them what work is due.

    So neither the replies nor their number depend on how the stream was cut into pieces.
    """

    def __init__(self, model: MinMo, settings: Settings, turn_taking: TurnTaking, max_positions: int | None) -> None:
        self._conversation = Conversation(model, settings, turn_taking, max_positions=max_positions)
        self._waiting: Sound = np.zeros(0, np.float32)
        self._end_ms = self._spent = self._resumed = 0.0
        self._answered = False
        """Whether a turn has been."""

    def take(self, piece: VoiceInput) -> Iterator[VoiceOutput]:
        """Hears a piece, and gives what may be sent by its end."""
        if not isinstance(piece, VoiceInput):
            raise ValueError(f"a stream's items must be minmo.VoiceInput, got {type(piece).__name__}")
        self._begin(piece.end_ms)
        if len(piece.audio):
            self._waiting = np.concatenate([self._waiting, check_sound(piece.audio)])
        while len(self._waiting) >= TICK:
            tick, self._waiting = self._waiting[:TICK], self._waiting[TICK:]
            yield from self._tick(tick)

    def finish(self) -> Iterator[VoiceOutput]:
        """The input has ended: what is left of it is heard, answered where it is a turn, and replies are given whole,
        as nobody can interrupt them any more."""
        self._begin(self._end_ms)
        if rest := len(self._waiting):
            yield from self._tick(np.pad(self._waiting, (0, TICK - rest)))
        yield from self._rest()
        conversation = self._conversation
        if conversation.history.open and (conversation.voiced or not self._answered):
            yield from self._outputs(conversation.take_turn())
            yield from self._rest()

    def check(self) -> None:
        """Raises RuntimeError in a thread that must not use the conversation."""
        self._conversation.check()

    def close(self) -> None:
        """The conversation has ended: its rows are free."""
        self._conversation.close()

    def _tick(self, samples: Sound) -> Iterator[VoiceOutput]:
        yield from self._outputs(self._conversation.tick(samples))
        while self._conversation.next_step:
            yield from self._outputs(self._conversation.step())

    def _rest(self) -> Iterator[VoiceOutput]:
        """What is left of a reply, at once."""
        while self._conversation.phase is not Phase.LISTENING:
            yield from self._outputs(self._conversation.step() or self._conversation.flush())

    def _outputs(self, events: list[Event]) -> Iterator[VoiceOutput]:
        """One output for the events of a tick or a step, where there is something to give."""
        for event in events:
            if isinstance(event, Fault):
                raise FloatingPointError(event.why)
            self._answered |= isinstance(event, TurnTaken)
        text = "".join(event.text for event in events if isinstance(event, TextDelta))
        sounds = [event.audio for event in events if isinstance(event, SoundEvent)]
        done, cut = (any(isinstance(event, kind) for event in events) for kind in (ReplyDone, Interrupted))
        if text or sounds or done or cut:
            self._spent += time.perf_counter() - self._resumed
            sound = np.concatenate([np.zeros(0, np.float32), *sounds])
            yield VoiceOutput(sound, text, self._end_ms + 1e3 * self._spent, done or cut, cut)
            self._resumed = time.perf_counter()

    def _begin(self, end_ms: float) -> None:
        """The clock of the outputs: the end of the newest input, plus the time spent computing since."""
        if not is_real(end_ms) or not math.isfinite(end_ms):
            raise ValueError(f"timestamp_ms must be a finite number of milliseconds, got {end_ms!r}")
        self._end_ms, self._spent, self._resumed = float(end_ms), 0.0, time.perf_counter()
