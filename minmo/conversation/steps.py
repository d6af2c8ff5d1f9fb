"""What a batch of sessions computes at once: hears 80 ms, decides, writes a block, begins to speak, speaks a block,
gives its mel frames, and its sound.

Entry b of a batch is the session in row rows[b] of its states, -1 = none; nothing here knows what a turn is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import minmo_kernels as mk
from minmo.config import is_whole
from minmo.conversation import timings as T
from minmo.conversation.settings import Settings
from minmo.conversation.timings import Clock, Timings
from minmo.model import MOST_POSITIONS, HearingState, MinMo, SpeakingState
from minmo.modules.backbone import BackboneState
from minmo.modules.duplex import DuplexState
from minmo.state import Lengths, all_rows, read_rows, valid
from minmo.tokenizer.text import TextTokenizer

TEXT_STREAM = 1
"""Random stream of text sampling (the voice decoder and token2wav have their own)."""
VOICE_FAULT = "the voice decoder's state became NaN: its weights or the LLM's are broken"
SOUND_FAULT = "the vocoder gave NaN or infinite sound: the weights of flow or vocoder are broken"
TEXT_FAULT = "the LLM's state became NaN: its weights or what it was given are broken"
PREDICTOR_FAULT = "the full-duplex predictor gave NaN: its weights or the LLM's are broken"


def check(model: MinMo, settings: Settings, max_positions: int) -> TextTokenizer:
    """The tokenizer of a model that can converse with these settings. Raises ValueError where it cannot."""
    if model.tokenizer is None:
        raise ValueError(f"{model.config.name} has no tokenizer.json; load a checkpoint directory that holds one")
    if not isinstance(settings, Settings):
        raise ValueError(f"settings must be a minmo.Settings, got {type(settings).__name__}")
    if model.device.type == "meta":
        raise ValueError("this model holds shapes only (device 'meta'); load it on cpu or cuda to use it")
    if not is_whole(max_positions) or not 0 < max_positions <= MOST_POSITIONS:
        raise ValueError(f"max_positions must lie between 1 and {MOST_POSITIONS}, got {max_positions!r}")
    return model.tokenizer


MOST_TYPED = 4096
"""Longest text that a person types, in text tokens."""


def readable(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The ids of a text that a person typed. Raises ValueError for one that is empty, too long, or has characters that
    are not in the model's vocabulary."""
    if not isinstance(text, str):
        raise ValueError(f"a text must be a string, got {type(text).__name__}")
    if not text.strip():
        raise ValueError("the text is empty; give it some words")
    if len(text) > 16 * MOST_TYPED or len(ids := tokenizer.encode(text)) > MOST_TYPED:
        raise ValueError(f"the text of {len(text)} characters is longer than {MOST_TYPED} tokens; cut it into pieces")
    known, wanted = (unicodedata.normalize("NFC", t) for t in (tokenizer.decode(ids), text))
    if known != wanted:
        lost = sorted({character for character in wanted if character not in known})
        raise ValueError(
            f"the model cannot read {''.join(lost)[:40]!r}: its tokenizer has no tokens for it; leave it out"
        )
    return ids


def hear(
    model: MinMo, state: HearingState, rows: Tensor, audio: Tensor, lengths: Lengths, final: Tensor, timings: Timings
) -> tuple[Tensor, Lengths, Tensor]:
    """Sound (batch, samples) 16 kHz -> LLM positions (batch, n, dim), their counts (batch,), and the log-mel frames of
    the 80 ms that became complete (batch, frames, n_mels)."""
    with timings.measure(T.ENCODER, model.device):
        mel, counts, _ = model.frontend.step(audio, lengths, state.frontend, rows, final)
        frames, counts, _ = model.encoder.step(mel.to(model.dtype), counts, state.encoder, rows, final)
    with timings.measure(T.PROJECTOR, model.device):
        positions, counts, _ = model.projector.step(frames, counts, state.projector, rows, final)
    return positions[:, : int(counts.max())], counts, mel


def decide(model: MinMo, state: DuplexState, rows: Tensor, hidden: Tensor, counts: Lengths) -> Tensor:
    """Hidden states (batch, n, dim) of the newest positions -> the full-duplex predictor's probabilities (batch, n, 2),
    turn taking and barge-in; NaN where an entry has fewer."""
    logits, _, _ = model.duplex.step(hidden, counts, state, rows)
    decisions = torch.softmax(logits.float(), dim=-1)[..., 1]
    return torch.where(valid(counts, decisions.shape[1])[..., None], decisions, torch.nan)


@dataclass(frozen=True, eq=False)
class Sampling:
    """How a batch's text is drawn, one value an entry, (batch,). drawn: how many tokens an entry has drawn, counted on
    in place. banned: (batch, n) ids that are never drawn."""

    seeds: Tensor
    drawn: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    banned: Tensor


def sampling(tokenizer: TextTokenizer, settings: Sequence[Settings], seeds: Tensor, drawn: Tensor) -> Sampling:
    """An entry's settings each. Of the control tokens, text may only draw the one that ends it."""
    device = seeds.device
    control = [i for i in tokenizer.special_ids if i != tokenizer.end_of_turn]
    return Sampling(
        seeds,
        drawn,
        torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device),
        torch.tensor([s.top_k for s in settings], dtype=torch.int32, device=device),
        torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device),
        torch.tensor(control, dtype=torch.int32, device=device).expand(len(settings), -1),
    )


@dataclass(frozen=True, eq=False)
class Block:
    """The next words of a batch. vectors: hidden states and embeddings (batch, block, dim), as many an entry as it has
    ids, a token's embedding with the state that predicted it; last (batch, dim): the states that predict what follows;
    ended, broken: whether an entry's text ended in this block, and whether its state became NaN."""

    vectors: tuple[Tensor, Tensor]
    ids: list[list[int]]
    last: Tensor
    ended: list[bool]
    broken: list[bool]

    @property
    def counts(self) -> list[int]:
        return [len(ids) for ids in self.ids]


def write(
    model: MinMo,
    state: BackboneState,
    rows: Tensor,
    last: Tensor,
    sampling: Sampling,
    room: Sequence[int],
    forced: Sequence[Sequence[int]] | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> Block:
    """Draws the next block of text and reads it, token by token.

    last (batch, dim): the states that predict the first token. room: how many tokens an entry may still write. forced:
    the block's tokens, where the text is given; what is shorter than a block ends in it. on_token: called when the
    tokens of each place of the block are known.
    """
    size, device, block = len(rows), rows.device, model.config.voice_decoder.semantic_block
    end = model.tokenizer.end_of_turn if model.tokenizer else -1
    entries = all_rows(size, device)
    active = (rows >= 0).tolist()
    writing, broken, ids = list(active), [False] * size, [list[int]() for _ in range(size)]
    states, embeddings = [], []
    for place in range(block):
        writing = [w and len(i) < most for w, i, most in zip(writing, ids, room, strict=True)]
        if forced is None:
            logits = model.llm.logits(last)
            nan = logits.isnan().any(dim=1).tolist()
        else:
            nan = last.isnan().any(dim=1).tolist()
        broken = [b or (w and n) for b, w, n in zip(broken, writing, nan, strict=True)]
        writing = [w and not b for w, b in zip(writing, broken, strict=True)]
        if forced is None:
            draws = torch.tensor(writing, device=device)
            sampling.drawn.add_(draws)
            token = mk.sample_token(
                logits,
                torch.where(draws, entries, -1).to(torch.int32),
                sampling.seeds,
                sampling.drawn,
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
                banned=sampling.banned,
                stream=TEXT_STREAM,
            ).tolist()
        else:
            token = [text[place] if place < len(text) else end for text in forced]
        writing = [w and t != end for w, t in zip(writing, token, strict=True)]
        for new, t, w in zip(ids, token, writing, strict=True):
            new += [t] * w
        x = model.llm.embed(torch.tensor([t if w else 0 for t, w in zip(token, writing, strict=True)], device=device))
        states.append(last)
        embeddings.append(x)
        if not any(writing):
            break
        on_token()
        writes = torch.tensor(writing, device=device)
        hidden, _, _ = model.llm.step(
            x[:, None], writes.to(torch.int32), state, torch.where(writes, rows, -1).to(torch.int32)
        )
        last = torch.where(writes[:, None], hidden[:, 0], last)
    short = [0, 0, 0, block - len(states)]
    pad = torch.nn.functional.pad
    vectors = pad(torch.stack(states, 1), short), pad(torch.stack(embeddings, 1), short)
    ended = [a and not w for a, w in zip(active, writing, strict=True)]
    return Block(vectors, ids, last, ended, broken)


def start_speaking(
    model: MinMo,
    state: SpeakingState,
    rows: Tensor,
    seeds: Tensor,
    settings: Settings,
    query: tuple[Tensor, Tensor, Lengths] | None,
) -> None:
    """New speaking states, one voice for all. seeds (batch,) int64; query: hidden states and embeddings (batch, n, dim)
    of the user's turn, and their lengths."""
    model.flow.start(state.flow, rows, model.speaker.expand(len(rows), -1), seeds)
    model.vocoder.start(state.vocoder, rows, seeds)
    model.voice_decoder.start(
        state.decoder,
        rows,
        seeds,
        temperature=settings.voice_temperature,
        top_k=settings.voice_top_k,
        top_p=settings.voice_top_p,
        max_ratio=settings.max_speech_ratio,
        query=query,
    )


def speak(
    model: MinMo,
    state: SpeakingState,
    rows: Tensor,
    vectors: tuple[Tensor, Tensor],
    counts: Lengths,
    text_done: Tensor,
    clock: Clock,
) -> tuple[Tensor, Lengths, Tensor, dict[int, str]]:
    """Semantic vectors -> speech tokens (batch, n) int32 and their counts (batch,), which entries have finished
    (batch,), and why entries failed, whose states are NaN.

    vectors: hidden states and embeddings (batch, block, dim), of which an entry has `counts`; text_done (batch,) bool.
    """
    clock.skip()
    tokens, token_counts, _ = model.voice_decoder.step(vectors, counts, state.decoder, rows, text_done)
    finished = read_rows(state.decoder.finished, rows)
    failed = read_rows(state.decoder.failed, rows)
    faults = dict.fromkeys(torch.nonzero(failed)[:, 0].tolist(), VOICE_FAULT)
    if int(token_counts.max()) > 0:
        clock.lap(T.SPEECH_BLOCK)
        clock.mark(T.TO_SPEECH)
    return tokens[:, : int(token_counts.max())], token_counts, finished, faults


def flow(
    model: MinMo,
    state: SpeakingState,
    rows: Tensor,
    tokens: Tensor,
    counts: Lengths,
    finished: Tensor,
    clock: Clock,
    *,
    whole: bool,
) -> tuple[Tensor, Lengths]:
    """What `speak` gave -> mel frames (batch, n, n_mels) and their counts (batch,): those of all chunks that are
    complete, or, where not `whole`, of the next one (see `Flow.chunk`)."""
    clock.skip()
    step = model.flow.step if whole else model.flow.chunk
    mel, frames, _ = step(tokens, counts, state.flow, rows, finished)
    if int(frames.max()) > 0:
        clock.lap(T.FLOW)
    return mel[:, : int(frames.max())], frames


def sound(
    model: MinMo, state: SpeakingState, rows: Tensor, mel: Tensor, frames: Lengths, finished: Tensor, clock: Clock
) -> tuple[list[np.ndarray], dict[int, str]]:
    """What `flow` gave -> the sound of each entry, and why entries failed, whose sound is NaN: they give none."""
    clock.skip()
    audio, samples, _ = model.vocoder.step(mel, frames, state.vocoder, rows, finished)
    if int(samples.max()) > 0:
        clock.lap(T.VOCODER)
        clock.mark(T.TO_AUDIO)
    faults: dict[int, str] = {}
    heard = audio.float().cpu().numpy()
    pieces = [heard[entry, :n] for entry, n in enumerate(samples.tolist())]
    for entry, piece in enumerate(pieces):
        if not np.isfinite(piece).all():
            faults[entry] = SOUND_FAULT
            pieces[entry] = piece[:0]
    return pieces, faults
