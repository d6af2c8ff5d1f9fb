"""What a batch of sessions computes at once: hears 80 ms, decides, begins to speak, speaks a block.

Entry b of a batch is the session in row rows[b] of its states, -1 = none; nothing here knows what a turn is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minmo.config import is_whole
from minmo.conversation import timings as T
from minmo.conversation.settings import Settings
from minmo.conversation.timings import Clock, Timings
from minmo.model import MOST_POSITIONS, HearingState, MinMo, SpeakingState
from minmo.modules.duplex import DuplexState
from minmo.state import Lengths, read_rows, valid
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
) -> tuple[list[np.ndarray], Tensor, dict[int, str]]:
    """Semantic vectors -> speech tokens -> mel -> sound of each entry, which entries have finished (batch,), and why
    entries failed, whose states or sound are NaN; they give no more sound.

    vectors: hidden states and embeddings (batch, block, dim), of which an entry has `counts`; text_done (batch,) bool.
    """
    clock.skip()
    tokens, token_counts, _ = model.voice_decoder.step(vectors, counts, state.decoder, rows, text_done)
    finished = read_rows(state.decoder.finished, rows)
    failed = read_rows(state.decoder.failed, rows)
    faults = dict.fromkeys(torch.nonzero(failed)[:, 0].tolist(), VOICE_FAULT)
    rows = torch.where(failed, -1, rows).to(torch.int32)
    if int(token_counts.max()) > 0:
        clock.lap(T.SPEECH_BLOCK)
        clock.mark(T.TO_SPEECH)
    tokens = tokens[:, : int(token_counts.max())]
    mel, frames, _ = model.flow.step(tokens, token_counts, state.flow, rows, finished)
    if int(frames.max()) > 0:
        clock.lap(T.FLOW)
    mel = mel[:, : int(frames.max())]
    audio, samples, _ = model.vocoder.step(mel, frames, state.vocoder, rows, finished)
    if int(samples.max()) > 0:
        clock.lap(T.VOCODER)
        clock.mark(T.TO_AUDIO)
    sound = audio.float().cpu().numpy()
    pieces = [sound[entry, :n] for entry, n in enumerate(samples.tolist())]
    for entry, piece in enumerate(pieces):
        if not np.isfinite(piece).all():
            faults[entry] = SOUND_FAULT
            pieces[entry] = piece[:0]
    return pieces, finished, faults
