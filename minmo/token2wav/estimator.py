"""The flow's velocity estimator: a causal U-Net without time down-sampling, at 50 Hz.

The shape of CosyVoice 2 (arXiv 2412.10117; public class `CausalConditionalDecoder`): one group down, groups in the
middle, one group up that also takes the first group's output. A group is a causal ResNet block conditioned on the
flow's time, and Transformer blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.state import KVCache, State, kv_cache
from minmo.token2wav.causal import CausalConv, ChunkMask, Span, double_rows


class ResnetBlock(nn.Module):
    """Two causal convolutions (LayerNorm, Mish) with the time added in between, and a residual 1x1 convolution."""

    def __init__(self, channels: int, dim: int, time_dim: int) -> None:
        super().__init__()
        self.time = nn.Linear(time_dim, dim)
        self.conv1, self.norm1 = CausalConv(channels, dim, 3), nn.LayerNorm(dim)
        self.conv2, self.norm2 = CausalConv(dim, dim, 3), nn.LayerNorm(dim)
        self.residual = CausalConv(channels, dim, 1)

    def forward(self, x: Tensor, time: Tensor, span: Span, carries: list[Tensor | None]) -> Tensor:
        """x (batch, frames, channels), time (batch, time_dim), carries of conv1 and conv2 -> (batch, frames, dim)."""
        mish = nn.functional.mish
        hidden = mish(self.norm1(self.conv1(x, span, carries[0])))
        hidden = hidden + self.time(mish(time))[:, None]
        return mish(self.norm2(self.conv2(hidden, span, carries[1]))) + self.residual(x, span)


class TransformerBlock(nn.Module):
    """Pre-norm attention without position encoding, and MLP."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, span: Span, cache: KVCache | None) -> Tensor:
        """x (batch, frames, dim) -> the same shape."""
        normed = self.attention_norm(x)
        q, k, v = self.query(normed), self.key(normed), self.value(normed)
        if cache is None:
            q, k, v = (part.unflatten(2, (self.heads, self.head_dim)) for part in (q, k, v))
        else:
            q = mk.append_kv(
                torch.cat([q, k, v], dim=2), None, cache.k, cache.v, span.rows, span.before, span.lengths,
                heads=self.heads, kv_heads=self.heads, rope=False, ring=True,
            )  # fmt: skip
            k, v = cache.k, cache.v
        form: dict[str, Any] = {"mask": "full"}
        if (mask := span.mask) is not None:
            form = {"mask": "chunk", "chunk": mask.size, "chunk_offset": mask.offset, "left_chunks": mask.left}
        attended = mk.streaming_attention(q, k, v, span.rows, span.after, span.lengths, ring=cache is not None, **form)
        x = x + self.out(attended.flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Group(nn.Module):
    """A ResNet block and the Transformer blocks behind it."""

    def __init__(self, channels: int, dim: int, heads: int, head_dim: int, transformers: int) -> None:
        super().__init__()
        self.resnet = ResnetBlock(channels, dim, 4 * dim)
        self.transformers = nn.ModuleList(TransformerBlock(dim, heads, head_dim) for _ in range(transformers))


@dataclass
class EstimatorState(State):
    """Memory of one Euler step; sessions count twice (2s with, 2s+1 without conditions).

    carries: of each causal convolution in the order of the pass, (2 sessions, 2, channels); caches: a ring of keys and
    values a Transformer block, (2 sessions, capacity, heads, head_dim).
    """

    carries: list[Tensor]
    caches: list[KVCache]

    def reset(self, rows: Tensor) -> None:
        super().reset(double_rows(rows))


class Estimator(nn.Module):
    """Velocity of noisy mel frames at flow time t, under mu, a speaker and condition frames."""

    def __init__(self, n_mels: int, dim: int, heads: int, head_dim: int, mid_blocks: int, transformers: int) -> None:
        super().__init__()
        channels = 4 * n_mels  # x, mu, speaker, condition
        self.n_mels = n_mels
        self.time_mlp = nn.Sequential(nn.Linear(channels, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))
        self.down = Group(channels, dim, heads, head_dim, transformers)
        self.down_conv = CausalConv(dim, dim, 3)
        self.mid = nn.ModuleList(Group(dim, dim, heads, head_dim, transformers) for _ in range(mid_blocks))
        self.up = Group(2 * dim, dim, heads, head_dim, transformers)
        self.up_conv = CausalConv(dim, dim, 3)
        self.final_conv, self.final_norm = CausalConv(dim, dim, 3), nn.LayerNorm(dim)
        self.out = CausalConv(dim, n_mels, 1)

    def initial_state(self, sessions: int, mask: ChunkMask) -> EstimatorState:
        """mask: of the mel frames, with a bounded left context."""
        like = self.final_norm.weight.detach()
        # In the order of registration, which is the order of the pass.
        convs = [m for m in self.modules() if isinstance(m, CausalConv) and m.left]
        blocks = [m for m in self.modules() if isinstance(m, TransformerBlock)]
        return EstimatorState(
            [like.new_zeros(2 * sessions, conv.left, conv.in_channels) for conv in convs],
            [kv_cache(2 * sessions, mask.capacity, block.heads, block.head_dim, like) for block in blocks],
        )

    def forward(
        self,
        x: Tensor,
        mu: Tensor,
        speaker: Tensor,
        condition: Tensor,
        t: Tensor,
        span: Span,
        state: EstimatorState | None = None,
    ) -> Tensor:
        """x, mu, condition (batch, frames, n_mels), speaker (batch, n_mels), t (batch,) in 0 .. 1 -> like x.

        span: of the mel frames; one shot without a state. With a state, batch and sessions are doubled ones.
        """
        time = self.time_mlp(time_embedding(t, 4 * self.n_mels).to(x.dtype))
        x = torch.cat([x, mu, speaker[:, None].expand_as(x), condition], dim=2)
        carries: Iterator[Tensor | None] = repeat(None) if state is None else iter(state.carries)
        caches: Iterator[KVCache | None] = repeat(None) if state is None else iter(state.caches)

        def group(part: Any, x: Tensor) -> Tensor:
            x = part.resnet(x, time, span, [next(carries), next(carries)])
            for block in part.transformers:
                x = block(x, span, next(caches))
            return x

        skip = group(self.down, x)
        x = self.down_conv(skip, span, next(carries))
        for part in self.mid:
            x = group(part, x)
        x = group(self.up, torch.cat([x, skip], dim=2))
        x = self.up_conv(x, span, next(carries))
        x = nn.functional.mish(self.final_norm(self.final_conv(x, span, next(carries))))
        return self.out(x, span)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 t, sin half then cos half. t (batch,) -> (batch, dim) fp32"""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=t.device).float() * -(math.log(10000) / (half - 1)))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
