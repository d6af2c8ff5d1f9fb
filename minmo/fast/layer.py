"""Decoder layers for serving: a single position a session, the step that everything waits for, has a path of its own.

On a CPU that path is a handful of PyTorch operations on numbers read once from the host; on a GPU it is the five
launches of `minmo_kernels`. More positions at once (prefill) take the readable layer's path.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.fast.linear import packed
from minmo.modules.backbone import DecoderLayer, RMSNorm
from minmo.state import KVCache, Lengths

MOST_FUSED_ROWS = 8
"""Rows up to which a layer of fused launches is served; more multiply matrices, as prefill does."""
PARTS = 8
"""Parts that attention over a cache is split into, for every row alike."""


class Turns:
    """The rotary embedding of single positions; one object serves all layers of a step, which share their angles."""

    def __init__(self, head_dim: int, theta: float) -> None:
        half = head_dim // 2
        self._half = half
        self._frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        self._positions: list[int] | None = None

    def __call__(self, x: Tensor, positions: list[int]) -> Tensor:
        """x (batch, heads, head_dim) turned by each entry's position, in fp32: half-split pairs, angles in fp64."""
        if positions != self._positions:
            angle = torch.tensor(positions, dtype=torch.float64)[:, None, None] * self._frequency
            cos, sin = angle.cos(), angle.sin()
            self._cos, self._sin = torch.cat([cos, cos], 2).float(), torch.cat([-sin, sin], 2).float()
            self._positions = positions
        return torch.addcmul(x * self._cos, x.roll(self._half, 2).to(self._cos.dtype), self._sin)


class _FastLayer(DecoderLayer):
    """A DecoderLayer with packed weights, made from one and for inference alone."""

    most_rows: float = math.inf
    """Rows up to which single positions take their own path."""

    def __init__(self, layer: DecoderLayer, weights: str) -> None:
        nn.Module.__init__(self)  # the parts exist
        self.config = layer.config
        self.input_norm, self.post_norm = layer.input_norm, layer.post_norm
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(self, name, packed(getattr(layer, name), weights))

    def forward(
        self,
        x: Tensor,
        lengths: Lengths,
        cache: KVCache | None,
        rows: Tensor,
        starts: Tensor,
        ends: Tensor,
        *,
        window: int = 0,
        ring: bool = False,
        before: KVCache | None = None,
    ) -> Tensor:
        """As DecoderLayer's."""
        if x.shape[1] != 1 or len(x) > self.most_rows or cache is None:
            return super().forward(x, lengths, cache, rows, starts, ends, window=window, ring=ring, before=before)
        return self._one(x, cache, rows, starts, ends, window, ring)

    def _one(
        self, x: Tensor, cache: KVCache, rows: Tensor, starts: Tensor, ends: Tensor, window: int, ring: bool
    ) -> Tensor:
        """`forward` of one position a session, (batch, 1, dim)."""
        raise NotImplementedError


class CPULayer(_FastLayer):
    """On a CPU. The rows of `gate_up` are [gate | up] here, so that both are whole halves of one product."""

    def __init__(self, layer: DecoderLayer, weights: str, turns: Turns) -> None:
        weight = layer.gate_up.weight
        halves = weight.detach().unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        layer.gate_up.weight = nn.Parameter(halves, requires_grad=False)
        super().__init__(layer, weights)
        self._turns = turns

    def feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def _one(
        self, x: Tensor, cache: KVCache, rows: Tensor, starts: Tensor, ends: Tensor, window: int, ring: bool
    ) -> Tensor:
        c = self.config
        sessions, begun = rows.tolist(), starts.tolist()
        positions = [begun[row] if row >= 0 else 0 for row in sessions]
        qkv = self.qkv(_normed(x[:, 0], self.input_norm)).unflatten(1, (-1, c.head_dim))
        turned = self._turns(qkv[:, : c.heads + c.kv_heads], positions).to(qkv.dtype)
        seen = qkv.new_zeros(len(x), c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        capacity = cache.k.shape[1]
        for entry, (row, position) in enumerate(zip(sessions, positions, strict=True)):
            if row < 0:
                continue
            first = max(0, position + 1 - window) if window else 0
            slot = position % capacity
            cache.k[row, slot] = turned[entry, c.heads :]
            cache.v[row, slot] = qkv[entry, c.heads + c.kv_heads :]
            # The query heads of one kv head are queries of one position to it. Keys hold their turns: order is free.
            query = turned[entry, : c.heads].view(1, *seen.shape[1:])
            k, v = (_slots(t[row], first, position + 1).transpose(0, 1)[None] for t in (cache.k, cache.v))
            seen[entry] = F.scaled_dot_product_attention(query, k, v)[0]
        y = x[:, 0] + self.o(seen.flatten(1))
        y = y + self.feed_forward(_normed(y, self.post_norm))
        return y[:, None]


class GPULayer(_FastLayer):
    """On a GPU, and wherever the operations run: five launches for up to MOST_FUSED_ROWS single positions."""

    most_rows = MOST_FUSED_ROWS

    def _one(
        self, x: Tensor, cache: KVCache, rows: Tensor, starts: Tensor, ends: Tensor, window: int, ring: bool
    ) -> Tensor:
        c = self.config
        q = mk.rms_norm_qkv_rope_append(
            x[:, 0], self.input_norm.weight, self.qkv.weight, self.qkv.bias, cache.k, cache.v, rows, starts,
            heads=c.heads, kv_heads=c.kv_heads, eps=c.norm_eps, rope_theta=c.rope_theta, ring=ring, **_format(self.qkv),
        )  # fmt: skip
        parts, lse = mk.streaming_attention(
            q[:, None], cache.k, cache.v, rows, ends, window=window, ring=ring, partials=PARTS
        )
        y = mk.merge_linear_residual(parts[:, :, 0], lse[:, :, 0], self.o.weight, x[:, 0], rows, **_format(self.o))
        inner = mk.gate_up_swiglu(
            y, self.post_norm.weight, self.gate_up.weight, rows, eps=c.norm_eps, **_format(self.gate_up)
        )
        return mk.linear_residual(inner, self.down.weight, y, rows, **_format(self.down))[:, None]


def _format(linear: nn.Module) -> dict[str, Any]:
    """The scales of a quantised weight, as the fused operations take them."""
    return getattr(linear, "arguments", {})


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _slots(cache: Tensor, first: int, end: int) -> Tensor:
    """Positions first .. end - 1 of a session's cache (capacity, kv_heads, head_dim), from a ring in any order."""
    capacity = len(cache)
    start, stop = first % capacity, (end - 1) % capacity + 1
    if start < stop:
        return cache[start:stop]
    return torch.cat([cache[:stop], cache[start:]])
