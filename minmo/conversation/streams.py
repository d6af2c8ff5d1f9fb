"""A stream of the user's sound in, a stream of the assistant's sound out: `full_duplex` for sync and async iterables.

A turn ends where the full-duplex predictor decides so, or where the input ends; the reply is then given whole before
more input is taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from minmo.config import SAMPLE_RATE
from minmo.conversation.session import Session, Settings
from minmo.conversation.verbs import Sound, check_sound
from minmo.model import MinMo
from minmo.modules.duplex import TURN_TAKING
from minmo.tokenizer.text import CHAT


@dataclass(frozen=True)
class VoiceInput:
    """A piece of the user's sound, of any length: mono 16 kHz float32, and when its first sample was heard."""

    audio: Sound
    timestamp_ms: float

    @property
    def end_ms(self) -> float:
        return self.timestamp_ms + 1e3 * len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class VoiceOutput:
    """A piece of the assistant's turn: mono 24 kHz float32 sound, the text that came with it, and when it was ready.

    timestamp_ms is on the input's clock: the end of the last input taken plus the time spent since. final: the turn is
    complete.
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
    max_positions: int = ...,
) -> Iterator[VoiceOutput]: ...
@overload
def full_duplex(
    model: MinMo,
    stream: AsyncIterable[VoiceInput],
    settings: Settings = ...,
    *,
    threshold: float = ...,
    max_positions: int = ...,
) -> AsyncIterator[VoiceOutput]: ...
def full_duplex(
    model: MinMo,
    stream: Iterable[VoiceInput] | AsyncIterable[VoiceInput],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    threshold: float = 0.5,
    max_positions: int = 4096,
) -> Iterator[VoiceOutput] | AsyncIterator[VoiceOutput]:
    """Listens to a stream and answers each of its turns.

    threshold: the predictor's turn-taking probability from which a turn counts as ended. max_positions: LLM context of
    the conversation; running out of it raises ValueError. An async stream gives an async iterator, whose computing is
    done off the event loop. Raises AudioError for a piece of sound that cannot be heard.
    """
    turns = _Turns(model, settings, threshold, max_positions)
    if isinstance(stream, AsyncIterable):
        return _answers_async(turns, stream)
    return _answers(turns, stream)


def _answers(turns: _Turns, stream: Iterable[VoiceInput]) -> Iterator[VoiceOutput]:
    for piece in stream:
        if turns.take(piece):
            yield from turns.answer()
    if turns.heard:
        yield from turns.answer()


async def _answers_async(turns: _Turns, stream: AsyncIterable[VoiceInput]) -> AsyncIterator[VoiceOutput]:
    async def answer() -> AsyncIterator[VoiceOutput]:
        outputs = turns.answer()
        while (output := await asyncio.to_thread(next, outputs, None)) is not None:
            yield output

    async for piece in stream:
        if await asyncio.to_thread(turns.take, piece):
            async for output in answer():
                yield output
    if turns.heard:
        async for output in answer():
            yield output


class _Turns:
    """One conversation: takes sound until a turn ends, then answers it."""

    def __init__(self, model: MinMo, settings: Settings, threshold: float, max_positions: int) -> None:
        self._session = Session(model, 1, settings, max_positions)
        self._prefix, self._suffix = self._session.tokenizer.turn(CHAT)
        self._next_prefix, _ = self._session.tokenizer.turn(CHAT, first=False)
        self._threshold = threshold
        self._end_ms = 0.0
        self._taken_at = 0.0
        self.heard = False
        self._session.read([self._prefix])

    def take(self, piece: VoiceInput) -> bool:
        """Hears a piece; whether the predictor decided that the user's turn has ended."""
        samples = check_sound(piece.audio)
        self._end_ms, self._taken_at = piece.end_ms, time.perf_counter()
        self.heard = True
        decisions = self._hear(samples, final=False)
        return bool((decisions[0, :, TURN_TAKING] >= self._threshold).any())

    def answer(self) -> Iterator[VoiceOutput]:
        self._hear(np.zeros(0, np.float32), final=True)
        self._session.read([self._suffix])
        for (piece,) in self._session.answer():
            ready = self._end_ms + 1e3 * (time.perf_counter() - self._taken_at)
            yield VoiceOutput(piece.audio, piece.text, ready, piece.done)
        self._session.read([self._next_prefix])
        self.heard = False

    def _hear(self, samples: Sound, final: bool) -> torch.Tensor:
        device = self._session.device
        lengths = torch.tensor([len(samples)], dtype=torch.int32, device=device)
        audio = torch.from_numpy(samples)[None].to(device)
        return self._session.hear(audio, lengths, torch.tensor([final], device=device))
