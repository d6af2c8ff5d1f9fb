"""A stream of the user's sound in, a stream of the assistant's sound out: `full_duplex` for sync and async iterables.

A turn ends where the full-duplex predictor decides so, or where the input ends; the reply is then given whole before
more input is taken.
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
import torch

from minmo.config import SAMPLE_RATE, TICK, is_real
from minmo.conversation.session import Session, Settings
from minmo.conversation.verbs import Sound, check_sound
from minmo.model import MinMo
from minmo.modules.duplex import TURN_TAKING
from minmo.tokenizer.text import CHAT


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
    final: the turn is complete.
    """

    audio: Sound
    transcript: str
    timestamp_ms: float
    final: bool = False


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
    """Listens to a stream and answers each of its turns.

    threshold: the predictor's turn-taking probability from which a turn counts as ended, asked every 80 ms; sound after
    the decision belongs to the next turn. max_positions: LLM context of the conversation, by default the model's: as a
    turn begins, the oldest are forgotten where less than half of it is free; a single turn that exceeds it raises
    ValueError. An async stream gives an async iterator; all of them compute in one thread off the event loop, so a
    FastMinMo serves async streams, or calls from another thread, not both at once. Raises AudioError for a piece of
    sound that cannot be heard, and FloatingPointError where the model's numbers become NaN.
    """
    if not is_real(threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability in 0 .. 1, got {threshold!r}")
    opened = functools.partial(
        _Turns, model, settings, threshold, model.max_positions if max_positions is None else max_positions
    )
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
    """One conversation: cuts the stream into ticks of 80 ms, decides after each, and answers a turn that has ended.

    So neither the replies nor their number depend on how the stream was cut into pieces.
    """

    def __init__(self, model: MinMo, settings: Settings, threshold: float, max_positions: int) -> None:
        self._session = Session(model, 1, settings, max_positions)
        self._first = True
        self._threshold = threshold
        self._waiting: Sound = np.zeros(0, np.float32)
        self._heard = False
        self._end_ms = self._spent = self._resumed = 0.0

    def take(self, piece: VoiceInput) -> Iterator[VoiceOutput]:
        """Hears a piece; answers every turn that ends in it."""
        if not isinstance(piece, VoiceInput):
            raise ValueError(f"a stream's items must be minmo.VoiceInput, got {type(piece).__name__}")
        self._begin(piece.end_ms)
        if len(piece.audio):
            self._waiting = np.concatenate([self._waiting, check_sound(piece.audio)])
        while len(self._waiting) >= TICK:
            tick, self._waiting = self._waiting[:TICK], self._waiting[TICK:]
            decisions = self._hear(tick, final=False)
            if bool(decisions.isnan().any()):
                raise FloatingPointError("the full-duplex predictor gave NaN: its weights or the LLM's are broken")
            if bool((decisions[0, :, TURN_TAKING] >= self._threshold).any()):
                yield from self._answer()

    def finish(self) -> Iterator[VoiceOutput]:
        """The input has ended: answers what is left of it."""
        self._begin(self._end_ms)
        if self._heard or len(self._waiting):
            rest, self._waiting = self._waiting, self._waiting[:0]
            yield from self._answer(rest)

    def check(self) -> None:
        """Raises RuntimeError in a thread that must not use the session."""
        self._session.check()

    def close(self) -> None:
        """The conversation has ended: its row is free."""
        self._session.close()

    def _answer(self, rest: Sound = np.zeros(0, np.float32)) -> Iterator[VoiceOutput]:  # noqa: B008 (never written)
        self._hear(rest, final=True)
        _, suffix = self._session.tokenizer.turn(CHAT)
        self._session.read([suffix])
        for (piece,) in self._session.answer():
            if piece.fault:
                raise FloatingPointError(piece.fault)
            self._spent += time.perf_counter() - self._resumed
            yield VoiceOutput(piece.audio, piece.text, self._end_ms + 1e3 * self._spent, piece.done)
            self._resumed = time.perf_counter()
        self._heard = False

    def _hear(self, samples: Sound, final: bool) -> torch.Tensor:
        if not self._heard:
            tokenizer = self._session.tokenizer
            before = tokenizer.system if self._first else tokenizer.closing
            prefix, _ = tokenizer.turn(CHAT, first=self._first)
            self._session.open_turn([before], [prefix[len(before) :]])
            self._heard, self._first = True, False
        device = self._session.device
        lengths = torch.tensor([len(samples)], dtype=torch.int32, device=device)
        audio = torch.from_numpy(samples)[None].to(device)
        return self._session.hear(audio, lengths, torch.tensor([final], device=device))

    def _begin(self, end_ms: float) -> None:
        """The clock of the outputs: the end of the newest input, plus the time spent computing since."""
        if not is_real(end_ms) or not math.isfinite(end_ms):
            raise ValueError(f"timestamp_ms must be a finite number of milliseconds, got {end_ms!r}")
        self._end_ms, self._spent, self._resumed = float(end_ms), 0.0, time.perf_counter()
