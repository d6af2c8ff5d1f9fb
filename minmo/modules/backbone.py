"""The language model's backbone: a Qwen2-shaped decoder with packed weights, run whole or position by position.

It serves the LLM (with token embedding and head) and, without them, the body of the voice token LM; the full-duplex
predictor is built from its `DecoderLayer`. A conversation is a row of linear key-value caches that can be cut back
(`truncate`) and branched (`copy_prefix`).

Source: Qwen2.5 (arXiv 2412.15115) as used in MinMo (arXiv 2501.06282, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import BackboneConfig
from minmo.state import (
    KVCache,
    Lengths,
    State,
    active_lengths,
    advanced,
    all_rows,
    check_lengths,
    full_lengths,
    kv_cache,
    masked,
    may_look,
)

INITIAL_STD = 0.02
"""Standard deviation of untrained weights."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return mk.rms_norm(x, self.weight.to(x.dtype), eps=self.eps)


class DecoderLayer(nn.Module):
    """Pre-norm causal attention with rotary positions, then a SwiGLU feed-forward.

    Packed weights: `qkv` rows are [q | k | v]; `gate_up` rows interleave, 2i = gate i, 2i+1 = up i.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        self.input_norm = RMSNorm(config.dim, config.norm_eps)
        self.qkv = nn.Linear(config.dim, width + 2 * config.kv_heads * config.head_dim)
        self.o = nn.Linear(width, config.dim, bias=False)
        self.post_norm = RMSNorm(config.dim, config.norm_eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.dim, bias=False)

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
        """x (batch, T, dim), zeros beyond `lengths` (batch,) -> (batch, T, dim), zeros there too.

        rows: -1 where a length is 0. cache: the session's keys and values, written in place; None in one shot. starts,
        ends (sessions,) int32: positions in each cache before and after this call. window > 0: a position sees the last
        `window` positions, its own included. ring: position p lies in slot p % capacity (needs a window). before:
        keys and values (1, n, ...) that every entry begins with, instead of a cache; starts and ends count them.
        """
        config = self.config
        qkv = self.qkv(self.input_norm(x))
        if before is not None:
            cache = KVCache(*(_continued(part, len(x), x.shape[1]) for part in (before.k, before.v)))
        if cache is None:  # of this layer alone, so that autograd keeps it, and in qkv's dtype, which autocast chooses
            cache = layer_cache(config, len(x), x.shape[1], qkv)
        q = mk.append_kv(
            qkv, None, cache.k, cache.v, rows, starts, lengths,
            heads=config.heads, kv_heads=config.kv_heads, rope_theta=config.rope_theta, ring=ring,
        )  # fmt: skip
        seen = mk.streaming_attention(q, cache.k, cache.v, rows, ends, lengths, window=window, ring=ring)
        x = x + self.o(seen.flatten(2))
        return x + self.feed_forward(self.post_norm(x))

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU: x (..., dim) -> (..., dim)."""
        gate, up = self.gate_up(x).unflatten(-1, (self.config.ffn, 2)).unbind(-1)
        return self.down(F.silu(gate) * up)


def _as_computed(x: Tensor) -> Tensor:
    """A tensor of the dtype in which projections of x come out: autocast's, where it is on."""
    kind = x.device.type
    return x.new_empty(0, dtype=torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _continued(cache: Tensor, batch: int, more: int) -> Tensor:
    """Keys or values (1, n, ...) as the beginning of `batch` caches with room for `more` positions."""
    room = cache.new_zeros(batch, more, *cache.shape[2:])
    return torch.cat([cache.expand(batch, *cache.shape[1:]), room], dim=1)


def layer_cache(config: BackboneConfig, sessions: int, capacity: int, like: Tensor) -> KVCache:
    """An empty cache for one layer, with the dtype and device of `like`."""
    return kv_cache(sessions, capacity, config.kv_heads, config.head_dim, like)


@dataclass
class BackboneState(State):
    """The context of each session: a linear cache for each layer and the positions in it, (sessions,) int32."""

    cache: KVCache
    """Of all layers, (layers, sessions, capacity, kv_heads, head_dim), as one launch takes them."""
    lengths: Tensor

    def __post_init__(self) -> None:
        self.layers = [KVCache(k, v) for k, v in zip(self.cache.k, self.cache.v, strict=True)]

    @property
    def capacity(self) -> int:
        """Positions that each session can hold."""
        return self.cache.k.shape[2]


class Backbone(nn.Module):
    """Decoder over embeddings; with a vocabulary (`config.vocab` > 0) also `embed` and `logits`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim) if config.vocab else None
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False) if config.vocab and not config.tied else None
        initialise(self)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) int -> embeddings (..., dim). Raises ValueError for an id outside the vocabulary."""
        if self.embedding is None:
            raise ValueError("this backbone has no token embedding (config.vocab is 0): give it embeddings")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(f"token id {wrong} is outside the vocabulary 0 .. {self.config.vocab - 1}")
        return self.embedding(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., dim) after the final norm -> (..., vocab)."""
        if self.embedding is None:
            raise ValueError("this backbone has no head (config.vocab is 0): use the hidden states")
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(self, x: Tensor, lengths: Lengths | None = None, *, shared: int = 0) -> Tensor:
        """One shot: embeddings (batch, T, dim) -> hidden states after the final norm, same shape, zeros beyond.

        shared: so many first positions are the same in all entries, and are computed once; every length is larger.
        """
        lengths = full_lengths(x) if lengths is None else lengths
        self._check_input(x, lengths)
        if x.numel() == 0:
            return x
        batch = len(x)
        first, x = x[:1, :shared], masked(x[:, shared:], lengths - shared)
        rows, starts = all_rows(batch, x.device), torch.full_like(lengths, shared)
        for layer in self.layers:
            before = None
            if shared:
                before = layer_cache(self.config, 1, shared, _as_computed(x))
                first = layer(first, starts[:1], before, rows[:1], torch.zeros_like(starts[:1]), starts[:1])
            x = layer(x, lengths - shared, None, rows, starts, lengths, before=before)
        return self.norm(torch.cat([first.expand(batch, -1, -1), x], dim=1))

    def initial_state(self, sessions: int, capacity: int) -> BackboneState:
        """Empty contexts of up to `capacity` positions for `sessions` sessions."""
        like = self.norm.weight.detach()
        shape = (len(self.layers), sessions, capacity, self.config.kv_heads, self.config.head_dim)
        return BackboneState(
            KVCache(like.new_zeros(shape), like.new_zeros(shape)),
            torch.zeros(sessions, dtype=torch.int32, device=like.device),
        )

    def step(
        self, x: Tensor, x_lengths: Lengths, state: BackboneState, rows: Tensor, final: Tensor | None = None
    ) -> tuple[Tensor, Lengths, BackboneState]:
        """Appends embeddings x (batch, T, dim) to each session -> hidden states (batch, T, dim), lengths, state.

        Every position comes out at once, so `final` has nothing to flush. Raises ValueError, with the state unchanged,
        where a session would outgrow its capacity or a length exceeds T.
        """
        lengths = active_lengths(x_lengths, rows)
        self._check_input(x, lengths)
        if x.numel() == 0:
            return x, lengths, state
        ends = advanced(state.lengths, rows, lengths)
        if may_look(ends) and (needed := int(ends.max())) > state.capacity:
            raise ValueError(
                f"the context would grow to {needed} positions, but a session holds at most {state.capacity}: "
                "drop old turns first, or make the state with a larger capacity"
            )
        size = x.shape[1]
        x = masked(x[:, : state.capacity], lengths)  # what fits: padding alone may be longer than a cache
        rows = torch.where(lengths > 0, rows, -1).to(torch.int32)
        x = self._through(x, lengths, state, rows, ends)
        state.lengths.copy_(ends)
        return F.pad(x, [0, 0, 0, size - x.shape[1]]), lengths, state

    def _through(self, x: Tensor, lengths: Lengths, state: BackboneState, rows: Tensor, ends: Tensor) -> Tensor:
        """All layers and the last norm; ends (sessions,): positions with the new ones."""
        for layer, cache in zip(self.layers, state.layers, strict=True):
            x = layer(x, lengths, cache, rows, state.lengths, ends)
        return self.norm(x)

    def _check_input(self, x: Tensor, lengths: Lengths) -> None:
        if x.dim() != 3 or x.shape[2] != self.config.dim:
            raise ValueError(f"x must have the shape (batch, T, {self.config.dim}), got {tuple(x.shape)}")
        check_lengths(x, lengths)


def initialise(module: nn.Module) -> None:
    """Untrained weights: normal matrices, zero biases, norms left at one."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=INITIAL_STD)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)


def truncate(state: BackboneState, rows: Tensor | int, position: Tensor | int) -> BackboneState:
    """Cuts sessions back to their first `position` positions, in place.

    rows: one row or (n,) int, -1 ignored; position: one number or (n,). Raises ValueError where a session is shorter.
    """
    rows = torch.as_tensor(rows, device=state.lengths.device).reshape(-1)
    position = torch.as_tensor(position, device=rows.device).expand_as(rows)[rows >= 0]
    index = rows[rows >= 0].long()
    have = state.lengths[index]
    if bool(((position < 0) | (position > have)).any()):
        raise ValueError(f"cannot truncate to {position.tolist()}: the sessions hold {have.tolist()} positions")
    state.lengths[index] = position.to(torch.int32)
    return state


def copy_prefix(state: BackboneState, src: int, dst: int, n: int) -> BackboneState:
    """Makes session `dst` a branch of session `src` after its first `n` positions, in place.

    What `dst` held is dropped. Raises ValueError where `src` holds fewer than `n` positions.
    """
    sessions = state.lengths.shape[0]
    if not (0 <= src < sessions and 0 <= dst < sessions):
        raise ValueError(f"copy_prefix: rows {src} and {dst} must lie in 0 .. {sessions - 1}")
    if not 0 <= n <= (have := int(state.lengths[src])):
        raise ValueError(f"cannot copy {n} positions: session {src} holds {have}")
    for cache in state.layers:
        cache.k[dst, :n] = cache.k[src, :n]
        cache.v[dst, :n] = cache.v[src, :n]
    state.lengths[dst] = n
    return state
