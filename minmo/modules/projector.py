"""The input projector: encoder frames (25 Hz) to positions of the LLM (12.5 Hz, 80 ms each) in the LLM's width.

A stride-2 convolution, then two pre-norm Transformer layers without position encoding. Source: arXiv 2501.06282,
section 3.1 and Table 1 ("2 Transformer layers and 1 CNN layer", ~170M); the paper gives no more, so the kernel (3), the
ReLU feed-forward of the LLM's width and the biases are this project's reading, by the parameter count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import ProjectorConfig
from minmo.modules.encoder import pieces
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

FRAMES_PER_POSITION = 2
"""Encoder frames of 40 ms in one position of 80 ms."""
PIECE = 16
"""Positions that a step computes at once; a ring holds the left context and one piece."""


@dataclass
class ProjectorState(State):
    """Memory of each session.

    frames: at most one frame that waits for the second of its position; carry (sessions, 1, input_dim): the last frame
    before; lengths (sessions,) int32: positions so far; caches: the last positions' keys and values.
    """

    frames: Buffer
    carry: Tensor
    lengths: Tensor
    caches: list[KVCache]


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). `qkv` rows are [q | k | v]."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, config.ffn)
        self.down = nn.Linear(config.ffn, dim)

    def forward(
        self,
        x: Tensor,
        counts: Lengths,
        cache: KVCache | None,
        rows: Tensor,
        starts: Tensor,
        ends: Tensor,
        *,
        window: int,
        ring: bool = False,
    ) -> Tensor:
        """x (batch, T, dim), `counts` (batch,) of them valid -> (batch, T, dim).

        starts, ends (sessions,) int32: positions in each session's cache before and after this call; cache: None in one
        shot. window: positions that one sees, its own included; 0 = all, later ones too.
        """
        qkv = self.qkv(self.attention_norm(x))
        if cache is None:
            cache = kv_cache(len(x), x.shape[1], self.heads, x.shape[2] // self.heads, qkv)
        q = mk.append_kv(
            qkv, None, cache.k, cache.v, rows, starts, counts,
            heads=self.heads, kv_heads=self.heads, rope=False, ring=ring,
        )  # fmt: skip
        mask = "causal" if window else "full"
        seen = mk.streaming_attention(q, cache.k, cache.v, rows, ends, counts, mask=mask, window=window, ring=ring)
        x = x + self.out(seen.flatten(2))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class Projector(nn.Module):
    """Encoder frames (batch, T, input_dim) -> positions (batch, ceil(T / 2), dim)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        if config.dim % config.heads or config.left_context < 0:
            raise ValueError("a projector needs a width that its heads divide and a left_context of at least 0")
        self.config = config
        self.conv = nn.Conv1d(config.input_dim, config.dim, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, lengths: Lengths, *, causal: bool = True) -> tuple[Tensor, Lengths]:
        """One shot -> positions (batch, max(1, ceil(T / 2)), dim), zeros beyond their lengths, and the lengths.

        causal: each position sees the `left_context` before it (then this equals `step`, however it is cut); otherwise
        all see each other. Raises ValueError for frames of the wrong shape.
        """
        x = self._checked(x, lengths)
        lengths = lengths.to(torch.int32)
        batch, size = x.shape[0], max(1, -(-x.shape[1] // FRAMES_PER_POSITION)) * FRAMES_PER_POSITION
        x = F.pad(masked(x, lengths), [0, 0, 1, size - x.shape[1]])
        x, counts = self._convolve(x, lengths)
        rows, starts = all_rows(batch, x.device), torch.zeros_like(lengths)
        window = self.config.left_context + 1 if causal else 0
        for layer in self.layers:
            x = layer(x, counts, None, rows, starts, counts, window=window)
        return masked(x, counts), counts

    def initial_state(self, sessions: int) -> ProjectorState:
        config, like = self.config, self.conv.weight.detach()
        return ProjectorState(
            buffer(sessions, FRAMES_PER_POSITION - 1, (config.input_dim,), like),
            like.new_zeros(sessions, 1, config.input_dim),
            torch.zeros(sessions, dtype=torch.int32, device=like.device),
            [self._cache(sessions, config.left_context + PIECE, like) for _ in self.layers],
        )

    def step(
        self, x: Tensor, x_lengths: Lengths, state: ProjectorState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, ProjectorState]:
        """New frames (batch, T, input_dim) -> the positions that they complete, lengths, state.

        An entry with `final` also gets the position of a single last frame. Outputs are padded to what T and one
        waiting frame can give, (batch, ceil((T + 1) / 2), dim).
        """
        x = self._checked(x, x_lengths)
        config = self.config
        new = active_lengths(x_lengths, rows)
        total = read_rows(state.frames.count, rows) + new
        x, whole = state.frames.push(x, new, rows, final, FRAMES_PER_POSITION)
        lengths = torch.minimum(whole, total)
        outs, counts = [], []
        for start, stop in pieces(x.shape[1], FRAMES_PER_POSITION, PIECE):
            count = (lengths - start).clamp(min=0, max=stop - start)
            if nobody(count):
                outs.append(x.new_zeros(x.shape[0], (stop - start) // FRAMES_PER_POSITION, config.dim))
                counts.append(count)
                continue
            y, count = self._piece(x[:, start:stop], count, state, rows)
            outs.append(y)
            counts.append(count)
        return torch.cat(outs, dim=1), torch.stack(counts).sum(dim=0, dtype=torch.int32), state

    def _piece(self, x: Tensor, count: Lengths, state: ProjectorState, rows: Tensor) -> tuple[Tensor, Lengths]:
        """Frames on the grid, (batch, n, input_dim) with their counts -> (batch, n / 2, dim), counts; at fixed shapes
        and without reading the device."""
        y, count = self._convolve(with_left_context(state.carry, x, count, rows), count)
        after = advanced(state.lengths, rows, count)
        for layer, cache in zip(self.layers, state.caches, strict=True):
            y = layer(y, count, cache, rows, state.lengths, after, window=self.config.left_context + 1, ring=True)
        state.lengths.copy_(after)
        return masked(y, count), count

    def _convolve(self, x: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        """x (batch, 1 + 2n, input_dim), one frame before the `lengths` new ones -> (batch, n, dim), lengths."""
        counts = (lengths + 1) // 2
        y = F.conv1d(x.transpose(1, 2), self.conv.weight, self.conv.bias, stride=2).transpose(1, 2)
        return masked(y, counts), counts

    def _cache(self, sessions: int, capacity: int, like: Tensor) -> KVCache:
        return kv_cache(sessions, capacity, self.config.heads, self.config.dim // self.config.heads, like)

    def _checked(self, x: Tensor, lengths: Lengths) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.config.input_dim:
            raise ValueError(f"frames must be (batch, T, {self.config.input_dim}), got {tuple(x.shape)}")
        check_lengths(x, lengths)
        return x.to(self.conv.weight.dtype)
