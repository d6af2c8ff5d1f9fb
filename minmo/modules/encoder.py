"""The voice encoder: log-mel frames (100 Hz) to frames of 40 ms, whole or chunk by chunk.

Two stride-2 convolutions, then pre-norm blocks of rotary attention with an FSMN memory on the values and an MLP: the
shape of the SenseVoice-large encoder (arXiv 2407.04051) that MinMo starts from (arXiv 2501.06282, section 3.1; 636M).

Its two forms share every weight:

- bidirectional: all frames see each other, the FSMN looks to both sides;
- session (what `step` computes chunk by chunk): a frame sees its own chunk and the chunks of the last `left_context`
  frames. For the FSMN what lies ahead is not there yet: its taps on later frames see zeros, as at an utterance's end.

In both, n mel frames give ceil(n / 4) frames: zeros follow the last mel frame, and no frame beyond the last is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import EncoderConfig
from minmo.state import (
    Buffer,
    KVCache,
    Lengths,
    State,
    active_lengths,
    advanced,
    all_rows,
    buffer,
    check_lengths,
    kv_cache,
    masked,
    nobody,
    read_rows,
    with_left_context,
)

MELS_PER_FRAME = 4
"""Mel frames of 10 ms in one encoder frame of 40 ms."""
PIECE = 10
"""Chunks that a step computes at once; a ring holds the left context and one piece."""


@dataclass(frozen=True)
class View:
    """What a frame sees: arguments of `streaming_attention`, and whether the FSMN looks ahead."""

    chunk: int
    """Frames that see each other; 0 = all."""
    left_chunks: int = 0
    ring: bool = False

    @property
    def attention(self) -> dict[str, Any]:
        if not self.chunk:
            return {"mask": "full"}
        return {"mask": "chunk", "chunk": self.chunk, "left_chunks": self.left_chunks, "ring": self.ring}


@dataclass
class EncoderState(State):
    """Memory of each session.

    mel: frames that wait for their chunk; mel_carry (sessions, 1, n_mels) and conv_carry (sessions, 1, dim): the last
    input of each convolution; lengths (sessions,) int32: frames so far; caches: the last frames' keys and values;
    fsmn: a layer's last values, (sessions, fsmn_kernel // 2, dim).
    """

    mel: Buffer
    mel_carry: Tensor
    conv_carry: Tensor
    lengths: Tensor
    caches: list[KVCache]
    fsmn: list[Tensor]


class Block(nn.Module):
    """x + attention(norm(x)) with FSMN memory, then x + MLP(norm(x)).

    `qkv` rows are [q | k | v]; keys have no bias.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.rope_theta = config.rope_theta
        self.attention_norm = nn.LayerNorm(dim, eps=config.attention_norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim)
        self.fsmn = nn.Parameter(torch.empty(dim, 1, config.fsmn_kernel))
        nn.init.normal_(self.fsmn, std=config.fsmn_kernel**-0.5)
        self.mlp_norm = nn.LayerNorm(dim, eps=config.mlp_norm_eps)
        self.up = nn.Linear(dim, config.ffn)
        self.down = nn.Linear(config.ffn, dim)

    def forward(
        self,
        x: Tensor,
        counts: Lengths,
        cache: KVCache | None,
        carry: Tensor | None,
        rows: Tensor,
        starts: Tensor,
        ends: Tensor,
        view: View,
    ) -> Tensor:
        """x (batch, T, dim), `counts` (batch,) of them valid -> (batch, T, dim).

        starts, ends (sessions,) int32: frames in each session's cache before and after this call. carry: the FSMN's
        memory in the session form, written in place like the cache; both None where an utterance starts and ends here.
        """
        qkv = self.qkv(self.attention_norm(x))
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        if cache is None:
            cache = kv_cache(len(x), x.shape[1], self.heads, x.shape[2] // self.heads, qkv)
        q = mk.append_kv(
            qkv, bias, cache.k, cache.v, rows, starts, counts,
            heads=self.heads, kv_heads=self.heads, rope_theta=self.rope_theta, ring=view.ring,
        )  # fmt: skip
        seen = mk.streaming_attention(q, cache.k, cache.v, rows, ends, counts, **view.attention)
        value = qkv[..., 2 * x.shape[-1] :] + self.v_bias.to(qkv.dtype)
        left = self.fsmn.shape[2] // 2
        taps, right = (self.fsmn[..., : left + 1].contiguous(), 0) if view.chunk else (self.fsmn, left)
        x = x + self.out(seen.flatten(2)) + mk.fsmn(value, taps.to(value.dtype), carry, rows, counts, right=right)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Encoder(nn.Module):
    """Log-mel frames (batch, T, n_mels) -> frames of 40 ms (batch, ceil(T / 4), dim)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.dim % config.heads or config.fsmn_kernel % 2 == 0:
            raise ValueError("an encoder needs a width that its heads divide and an odd FSMN kernel")
        if config.chunk < 1 or config.left_context % config.chunk:
            raise ValueError(f"left_context {config.left_context} must be a multiple of chunk {config.chunk}")
        self.config = config
        self.conv1 = nn.Conv1d(config.n_mels, config.dim, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim) if config.final_norm else nn.Identity()

    def forward(self, mel: Tensor, lengths: Lengths, *, chunk: int | None = None) -> tuple[Tensor, Lengths]:
        """One shot -> frames (batch, max(1, ceil(T / 4)), dim), zeros beyond their lengths, and the lengths.

        chunk: frames that see each other, by default the config's (then this equals `step`, however it is cut);
        0 = the bidirectional form. Raises ValueError for features of the wrong shape.
        """
        mel = self._checked(mel, lengths)
        chunk = self.config.chunk if chunk is None else chunk
        if chunk < 0:
            raise ValueError(f"chunk must be 0 (bidirectional) or a number of frames, got {chunk}")
        lengths = lengths.to(torch.int32)
        batch, size = mel.shape[0], max(1, -(-mel.shape[1] // MELS_PER_FRAME)) * MELS_PER_FRAME
        mel = F.pad(masked(mel, lengths), [0, 0, 0, size - mel.shape[1]])
        rows, starts = all_rows(batch, mel.device), torch.zeros_like(lengths)
        x, counts = self._convolve(F.pad(mel, [0, 0, 1, 0]), lengths, None, rows)
        view = View(chunk, self.config.left_context // chunk if chunk else 0)
        for block in self.blocks:
            x = block(x, counts, None, None, rows, starts, counts, view)
        return masked(self.norm(x), counts), counts

    def initial_state(self, sessions: int) -> EncoderState:
        config, like = self.config, self.conv1.weight.detach()
        left, capacity = config.fsmn_kernel // 2, config.left_context + PIECE * config.chunk
        return EncoderState(
            buffer(sessions, MELS_PER_FRAME * config.chunk - 1, (config.n_mels,), like),
            like.new_zeros(sessions, 1, config.n_mels),
            like.new_zeros(sessions, 1, config.dim),
            torch.zeros(sessions, dtype=torch.int32, device=like.device),
            [self._cache(sessions, capacity, like) for _ in self.blocks],
            [like.new_zeros(sessions, left, config.dim) for _ in self.blocks],
        )

    def step(
        self, mel: Tensor, x_lengths: Lengths, state: EncoderState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, EncoderState]:
        """New mel frames (batch, T, n_mels) -> frames of all chunks that they complete, lengths, state.

        An entry with `final` also gets the frames of its incomplete last chunk. Outputs are padded to whole chunks:
        (batch, (chunks that T and waiting frames can give) chunk, dim).
        """
        mel = self._checked(mel, x_lengths)
        config = self.config
        new = active_lengths(x_lengths, rows)
        total = read_rows(state.mel.count, rows) + new
        unit = MELS_PER_FRAME * config.chunk
        mel, whole = state.mel.push(mel, new, rows, final, unit)
        lengths = torch.minimum(whole, total)
        outs, counts = [], []
        for start, stop in pieces(mel.shape[1], unit, PIECE):
            count = (lengths - start).clamp(min=0, max=stop - start)
            if nobody(count):
                outs.append(mel.new_zeros(mel.shape[0], (stop - start) // MELS_PER_FRAME, config.dim))
                counts.append(count)
                continue
            x, count = self._piece(mel[:, start:stop], count, state, rows)
            outs.append(x)
            counts.append(count)
        return torch.cat(outs, dim=1), torch.stack(counts).sum(dim=0, dtype=torch.int32), state

    def _piece(self, mel: Tensor, count: Lengths, state: EncoderState, rows: Tensor) -> tuple[Tensor, Lengths]:
        """Frames on the grid, (batch, n, n_mels) with their counts -> (batch, n / 4, dim), counts; at fixed shapes and
        without reading the device."""
        view = View(self.config.chunk, self.config.left_context // self.config.chunk, ring=True)
        x, count = self._convolve(with_left_context(state.mel_carry, mel, count, rows), count, state.conv_carry, rows)
        after = advanced(state.lengths, rows, count)
        for block, cache, carry in zip(self.blocks, state.caches, state.fsmn, strict=True):
            x = block(x, count, cache, carry, rows, state.lengths, after, view)
        state.lengths.copy_(after)
        return masked(self.norm(x), count), count

    def _convolve(self, mel: Tensor, lengths: Lengths, carry: Tensor | None, rows: Tensor) -> tuple[Tensor, Lengths]:
        """mel (batch, 1 + 4n, n_mels), the first from before the `lengths` new ones -> (batch, n, dim), lengths.

        carry: the second convolution's last input, updated in place; None for zeros.
        """
        half = (lengths + 1) // 2
        x = _strided(self.conv1, mel)
        if carry is None:
            x = F.pad(masked(x, half), [0, 0, 1, 0])
        else:
            x = with_left_context(carry, x, half, rows)
        counts = (half + 1) // 2
        return masked(_strided(self.conv2, x), counts), counts

    def _cache(self, sessions: int, capacity: int, like: Tensor) -> KVCache:
        return kv_cache(sessions, capacity, self.config.heads, self.config.dim // self.config.heads, like)

    def _checked(self, mel: Tensor, lengths: Lengths) -> Tensor:
        if mel.dim() != 3 or mel.shape[2] != self.config.n_mels:
            raise ValueError(f"mel must be (batch, frames, {self.config.n_mels}), got {tuple(mel.shape)}")
        check_lengths(mel, lengths)
        return mel.to(self.conv1.weight.dtype)


def _strided(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """GELU of a convolution whose left padding is already in x (batch, items, channels)."""
    return F.gelu(F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, stride=2)).transpose(1, 2)


def pieces(items: int, unit: int, most: int) -> Iterator[tuple[int, int]]:
    """Cuts `items`, a multiple of `unit`, into (start, stop) of at most `most` units; the last unit stands alone.

    The static maximum of a step holds one unit more than input on the grid fills, so that the last is mostly empty.
    """
    last = items - unit
    for start in range(0, last, unit * most):
        yield start, min(start + unit * most, last)
    yield last, items
