"""The flow's encoder: speech tokens (25 Hz) -> hidden frames (50 Hz), causal but for a few tokens of look-ahead.

The shape of CosyVoice 2 (arXiv 2412.10117; public class `UpsampleConformerEncoder`): a look-ahead convolution, blocks
of relative-position attention and MLP, nearest x2 upsampling with a causal convolution, more blocks.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minmo_kernels as mk
from minmo.state import KVCache, State, kv_cache, masked, read_rows
from minmo.token2wav.causal import CausalConv, ChunkMask, Span


@dataclass(frozen=True)
class Relative:
    """Where the keys lie relative to the queries, the same for every block of a stack.

    see: (batch, queries, keys) bool; index: (batch, queries, keys), row of `table` for query - key;
    exists: (batch, keys) bool; table: (distances, dim), sinusoids of the distances -(queries - 1) .. keys - 1.
    """

    see: Tensor
    index: Tensor
    exists: Tensor
    table: Tensor


def relative(span: Span, queries: int, capacity: int | None, dim: int, like: Tensor) -> Relative:
    """capacity None: the keys are the queries' own positions; else the slots of a ring of that many positions."""
    step = torch.arange(queries, device=span.rows.device)
    if capacity is None:
        query = key = step[None]
        exists = key < span.lengths[:, None]
    else:
        slot = torch.arange(capacity, device=span.rows.device)
        newest = read_rows(span.after, span.rows)[:, None].long() - 1
        key = newest - torch.remainder(newest - slot, capacity)
        exists = key >= 0
        query = read_rows(span.before, span.rows)[:, None].long() + step
    see = exists[:, None].expand(-1, queries, -1)
    if (mask := span.mask) is not None:
        query_chunk = torch.div(query + mask.offset, mask.size, rounding_mode="floor")[:, :, None]
        key_chunk = torch.div(key + mask.offset, mask.size, rounding_mode="floor")[:, None]
        see = see & (key_chunk <= query_chunk)
        if mask.left >= 0:
            see = see & (key_chunk >= query_chunk - mask.left)
    distances = queries - 1 + key.shape[1]
    index = (query[:, :, None] - key[:, None] + queries - 1).clamp(0, distances - 1)
    return Relative(see, index, exists, _sinusoids(distances, queries - 1, dim, like))


def _sinusoids(distances: int, zero: int, dim: int, like: Tensor) -> Tensor:
    """Row i is the embedding of distance i - zero: sin and cos interleaved, frequencies 10000^(-2j/dim)."""
    distance = torch.arange(distances, device=like.device, dtype=torch.float32) - zero
    frequency = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * -(math.log(10000.0) / dim))
    angle = distance[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(like.dtype)


class RelativeAttention(nn.Module):
    """Self-attention whose scores also depend on the distance of query and key (Transformer-XL, arXiv 1901.02860)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.position = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.empty(heads, self.head_dim))
        nn.init.xavier_uniform_(self.content_bias)
        nn.init.xavier_uniform_(self.position_bias)

    def forward(self, x: Tensor, span: Span, relation: Relative, cache: KVCache | None) -> Tensor:
        """x (batch, items, dim) -> the same shape."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if cache is None:
            q, k, v = (part.unflatten(2, (self.heads, self.head_dim)) for part in (q, k, v))
        else:
            packed = torch.cat([q, k, v], dim=2)
            q = mk.append_kv(
                packed, None, cache.k, cache.v, span.rows, span.before, span.lengths,
                heads=self.heads, kv_heads=self.heads, rope=False, ring=True,
            )  # fmt: skip
            k, v = read_rows(cache.k, span.rows), read_rows(cache.v, span.rows)
        kind = torch.promote_types(x.dtype, torch.float32)
        q, k, v = q.to(kind), k.to(kind), v.to(kind)
        exists = relation.exists[:, :, None, None]
        k, v = torch.where(exists, k, 0.0), torch.where(exists, v, 0.0)

        embedded = self.position(relation.table).to(kind).unflatten(1, (self.heads, self.head_dim))
        with _uncast(x.device.type):  # in training, too, attention is fp32
            content = torch.einsum("bthd,bshd->bhts", q + self.content_bias.to(kind), k)
            distance = torch.einsum("bthd,rhd->bhtr", q + self.position_bias.to(kind), embedded)
            index = relation.index[:, None].expand(*distance.shape[:3], -1)
            scores = (content + distance.gather(3, index)) / math.sqrt(self.head_dim)
            scores = scores.masked_fill(~relation.see[:, None], torch.finfo(kind).min)
            out = torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v)
        return self.out(out.flatten(2).to(x.dtype))


def _uncast(device: str) -> AbstractContextManager[object]:
    """Autocast off, on the devices that have one: the meta device, where a step's capture is checked, has none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class ConformerBlock(nn.Module):
    """Pre-norm attention and MLP (a Conformer block without its convolution and first MLP)."""

    def __init__(self, dim: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.attention = RelativeAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(dim, ffn), nn.SiLU(), nn.Linear(ffn, dim))

    def forward(self, x: Tensor, span: Span, relation: Relative, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), span, relation, cache)
        return x + self.mlp(self.mlp_norm(x))


class Embed(nn.Module):
    """Linear, LayerNorm, and the scale sqrt(dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * math.sqrt(x.shape[-1])


class Lookahead(nn.Module):
    """Residual pair of convolutions: the first sees `lookahead` items to the right, the second two to the left."""

    def __init__(self, dim: int, lookahead: int) -> None:
        super().__init__()
        self.right = nn.Conv1d(dim, dim, lookahead + 1)
        self.left = CausalConv(dim, dim, 3)

    def forward(self, x: Tensor, span: Span, carry: Tensor | None) -> Tensor:
        """x (batch, items + lookahead, dim), zeros where the utterance has ended -> (batch, items, dim)."""
        hidden = F.leaky_relu(self.right(x.transpose(1, 2))).transpose(1, 2)
        return self.left(hidden, span, carry) + x[:, : hidden.shape[1]]


@dataclass
class EncoderState(State):
    """Carries of the causal convolutions (sessions, left, dim), and a ring of keys and values a block."""

    lookahead: Tensor
    upsample: Tensor
    blocks: list[KVCache]
    up_blocks: list[KVCache]


class UpsampleEncoder(nn.Module):
    """Token embeddings (25 Hz) -> hidden frames (50 Hz) of the same width."""

    def __init__(self, dim: int, heads: int, ffn: int, blocks: int, up_blocks: int, lookahead: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.embed = Embed(dim)
        self.lookahead = Lookahead(dim, lookahead)
        self.blocks = nn.ModuleList(ConformerBlock(dim, heads, ffn) for _ in range(blocks))
        self.up_conv = CausalConv(dim, dim, 5)
        self.up_embed = Embed(dim)
        self.up_blocks = nn.ModuleList(ConformerBlock(dim, heads, ffn) for _ in range(up_blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def initial_state(self, sessions: int, mask: ChunkMask) -> EncoderState:
        """mask: of the tokens, with a bounded left context."""
        like, head_dim = self.norm.weight.detach(), self.dim // self.heads
        return EncoderState(
            like.new_zeros(sessions, self.lookahead.left.left, self.dim),
            like.new_zeros(sessions, self.up_conv.left, self.dim),
            [kv_cache(sessions, mask.capacity, self.heads, head_dim, like) for _ in self.blocks],
            [kv_cache(sessions, mask.scaled(2).capacity, self.heads, head_dim, like) for _ in self.up_blocks],
        )

    def forward(self, x: Tensor, available: Tensor, span: Span, state: EncoderState | None = None) -> Tensor:
        """x (batch, items + lookahead, dim), of which `available` (batch,) exist -> (batch, 2 items, dim).

        span: of the tokens; one shot without a state.
        """
        x = masked(self.embed(x), available)
        x = self.lookahead(x, span, None if state is None else state.lookahead)
        x = self._stack(self.blocks, x, span, None if state is None else state.blocks)
        span = span.scaled(2)
        x = self.up_conv(x.repeat_interleave(2, dim=1), span, None if state is None else state.upsample)
        x = self._stack(self.up_blocks, self.up_embed(x), span, None if state is None else state.up_blocks)
        return self.norm(x)

    def _stack(self, blocks: nn.ModuleList, x: Tensor, span: Span, caches: list[KVCache] | None) -> Tensor:
        capacity = caches[0].k.shape[1] if caches else None
        relation = relative(span, x.shape[1], capacity, self.dim, x)
        for i, block in enumerate(blocks):
            x = block(x, span, relation, caches[i] if caches else None)
        return x
