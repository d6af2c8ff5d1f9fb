"""The steps that conversations of one engine share: a tick, and a piece of the work between ticks, each for a batch.

What a conversation makes of its part of a result is its own: an error in that is its result alone, an exception in the
place of events, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmo.config import TICK
from minmo.conversation import steps
from minmo.conversation import timings as T
from minmo.conversation.branches import read_pieces
from minmo.conversation.events import Event
from minmo.state import full_lengths, read_rows
from minmo.tokenizer.frontend import FRAMES

if TYPE_CHECKING:
    from minmo.conversation.conversation import Conversation

Outcome = list[Event] | Exception
"""What came of a step for one conversation."""


@torch.inference_mode()
def tick(conversations: Sequence[Conversation], sounds: Sequence[np.ndarray]) -> list[Outcome]:
    """A tick of several conversations, each with its 1280 samples. Raises ValueError, with nothing heard, for sound
    that is none and for conversations that cannot share."""
    for conversation, samples in zip(conversations, sounds, strict=True):
        if conversation._fault:
            raise ValueError(f"this conversation has ended: {conversation._fault}; begin another")
        if not isinstance(samples, np.ndarray) or samples.shape != (TICK,) or samples.dtype != np.float32:
            given = f"{samples.dtype} of shape {samples.shape}" if isinstance(samples, np.ndarray) else type(samples)
            raise ValueError(f"a tick takes an array of {TICK} float32 samples, got {given}")
        if not np.isfinite(samples).all():
            raise ValueError("the sound holds NaN or infinite samples; repair what records it")
    first = conversations[0]
    model, state, timings = first.model, first._state, first.timings
    if any(c._state is not state for c in conversations):
        raise ValueError("only conversations of one FastMinMo share a tick: those of a MinMo have a state each")
    for conversation in conversations:
        conversation._make_room()
    rows, listening = _rows(conversations), _rows(conversations, listening=True)
    audio = torch.from_numpy(np.stack(sounds)).to(model.device)
    flows = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    positions, counts, mel = steps.hear(model, state.hearing, rows, audio, full_lengths(audio), flows, timings)
    with timings.measure(T.LISTEN, model.device):
        hidden, _, _ = model.llm.step(positions, counts, state.llm, listening)
        decisions = steps.decide(model, state.duplex, rows, hidden, counts)[:, 0].tolist()
    bands = mel[:, :FRAMES].float().mean(dim=1).cpu().numpy()
    return _each(conversations, lambda n, c: c._ticked(sounds[n], positions[n], hidden[n], decisions[n], bands[n]))


@torch.inference_mode()
def read(conversations: Sequence[Conversation]) -> list[Outcome]:
    """Reads the next piece of context of several conversations whose next step is "read"."""
    first = conversations[0]
    rows = _rows(conversations, listening=False)
    readings = [c._branches.reading for c in conversations if c._branches.reading is not None]
    pieces = [c._branches.next_piece(reading) for c, reading in zip(conversations, readings, strict=True)]
    with first.timings.measure(T.PREFILL, first.model.device):
        hidden = read_pieces(first.model, first._state.llm, rows, pieces)
    return _each(conversations, lambda n, c: c._has_read(readings[n], hidden[n]))


@torch.inference_mode()
def write(conversations: Sequence[Conversation]) -> list[Outcome]:
    """Writes the next block of text of several conversations whose next step is "write"."""
    first = conversations[0]
    answers = [c._answer for c in conversations if c._answer is not None]
    device = first.model.device
    sampling = steps.sampling(
        first.tokenizer,
        [a.settings for a in answers],
        torch.tensor([a.seed for a in answers], dtype=torch.int64, device=device),
        torch.tensor([c._drawn for c in conversations], dtype=torch.int64, device=device),
    )
    block = steps.write(
        first.model,
        first._state.llm,
        _rows(conversations, listening=False),
        torch.cat([a.last for a in answers]),
        sampling,
        [a.settings.max_text_tokens - len(a.ids) for a in answers],
    )
    drawn = sampling.drawn.tolist()
    return _each(conversations, lambda n, c: c._wrote(answers[n], block, n, drawn[n]))


@torch.inference_mode()
def speak(conversations: Sequence[Conversation]) -> list[Outcome]:
    """Speaks the next block of several conversations whose next step is "speak": its speech tokens."""
    first = conversations[0]
    model, device = first.model, first.model.device
    answers = [c._answer for c in conversations if c._answer is not None]
    nothing = torch.zeros(1, model.config.voice_decoder.semantic_block, model.config.llm.dim, device=device)
    silent = (nothing.to(answers[0].last.dtype),) * 2
    blocks = [(*silent, 0) if answer.block is None else answer.block for answer in answers]
    tokens, spoken, finished, faults = steps.speak(
        model,
        first._state.speaking,
        _rows(conversations),
        (torch.cat([b[0] for b in blocks]), torch.cat([b[1] for b in blocks])),
        torch.tensor([b[2] for b in blocks], dtype=torch.int32, device=device),
        torch.tensor([answer.written for answer in answers], device=device),
        answers[0].clock,
    )
    ended = finished.tolist()
    own = [tokens[n, :count].clone() for n, count in enumerate(spoken.tolist())]
    return _each(
        conversations,
        lambda n, c: c._fail(faults[n]) if n in faults else c._spoke(answers[n], own[n], ended[n]),
    )


@torch.inference_mode()
def flow(conversations: Sequence[Conversation]) -> list[Outcome]:
    """Gives the next mel frames of what several conversations have spoken, whose next step is "flow"."""
    first = conversations[0]
    model, state, rows = first.model, first._state.speaking, _rows(conversations)
    answers = [c._answer for c in conversations if c._answer is not None]
    tokens = [answer.tokens for answer in answers if answer.tokens is not None]
    mel, frames = steps.flow(
        model,
        state,
        rows,
        pad_sequence(tokens, batch_first=True),
        torch.tensor([len(t) for t in tokens], dtype=torch.int32, device=model.device),
        torch.tensor([answer.spoken for answer in answers], device=model.device),
        answers[0].clock,
        whole=False,
    )
    counts, waiting = frames.tolist(), read_rows(state.flow.waiting, rows).tolist()
    return _each(conversations, lambda n, c: c._flowed(answers[n], mel[n, : counts[n]].clone(), not waiting[n]))


@torch.inference_mode()
def sound(conversations: Sequence[Conversation]) -> list[Outcome]:
    """Gives a piece of sound of several conversations' mel frames, whose next step is "sound", or, where it is
    "end", what the vocoder has held back."""
    first = conversations[0]
    device = first.model.device
    answers = [c._answer for c in conversations if c._answer is not None]
    mels = [answer.piece for answer in answers]
    ended = [answer.ends for answer in answers]
    sounds, faults = steps.sound(
        first.model,
        first._state.speaking,
        _rows(conversations),
        pad_sequence(mels, batch_first=True),
        torch.tensor([len(mel) for mel in mels], dtype=torch.int32, device=device),
        torch.tensor(ended, device=device),
        answers[0].clock,
    )
    return _each(
        conversations,
        lambda n, c: c._fail(faults[n]) if n in faults else c._sounded(answers[n], sounds[n], ended[n]),
    )


STEPS: dict[str, Callable[[Sequence[Conversation]], list[Outcome]]] = {
    "read": read,
    "write": write,
    "speak": speak,
    "flow": flow,
    "sound": sound,
    "end": sound,
}
"""By what `Conversation.next_step` says."""


def _each(conversations: Sequence[Conversation], own: Callable[[int, Conversation], list[Event]]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for n, conversation in enumerate(conversations):
        try:
            outcomes.append(own(n, conversation))
        except Exception as error:  # whoever drives it raises or tells it
            outcomes.append(error)
    return outcomes


def _rows(conversations: Sequence[Conversation], listening: bool | None = None) -> Tensor:
    """(batch,) int32: the conversations' own rows, or those of the LLM's branches that listen, or that do not."""
    branches = [c._branches for c in conversations]
    rows = [b.own if listening is None else b.listening if listening else b.spare for b in branches]
    return torch.tensor(rows, dtype=torch.int32, device=conversations[0].model.device)
