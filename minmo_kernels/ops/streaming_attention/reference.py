"""`streaming_attention` in plain PyTorch: positions of every slot, one mask, one softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: str,
    window: int,
    chunk: int,
    left_chunks: int,
    chunk_offset: int,
    ring: bool,
    scale: float,
    partials: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = q.shape
    capacity, kv_heads = k_cache.shape[1], k_cache.shape[2]
    kind = compute_dtype(q.dtype)
    index = rows.clamp(min=0).long()
    end = torch.where(rows >= 0, lengths[index], 0)

    query, exists = query_positions(end, rows, q_lengths, queries)
    key, written = slot_positions(end, capacity, ring)
    see = written[:, None] & exists[:, :, None]
    see = see & visible(query[:, :, None], key[:, None], mask, window, chunk, left_chunks, chunk_offset)

    # What a session has not written may be NaN, and 0 * NaN is NaN: such slots become zeros.
    k, v = (
        torch.where(written[:, :, None, None], cached_values(cache, scales, index, kind), 0.0)
        for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
    )
    grouped = torch.where(exists[:, :, None, None], q, 0.0).to(kind).unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bthgd,bshd->bthgs", grouped * scale, k)
    scores = scores.masked_fill(~see[:, :, None, None], float("-inf"))

    if partials == 0:
        out, lse = _softmax_sum(scores, v)
        return out.to(q.dtype), lse.float() if return_lse else q.new_empty(0, dtype=torch.float32)
    width = -(-capacity // partials)
    spans = [slice(i * width, min((i + 1) * width, capacity)) for i in range(partials)]
    parts = [_softmax_sum(scores[..., s], v[:, s]) for s in spans]
    return torch.stack([p[0] for p in parts], 1).float(), torch.stack([p[1] for p in parts], 1).float()


def cached_values(cache: Tensor, scales: Tensor | None, index: Tensor, kind: torch.dtype) -> Tensor:
    """What the caches of sessions `index` hold, in dtype `kind`. (batch, capacity, kv_heads, dim)"""
    return cache[index].to(kind) if scales is None else cache[index].to(kind) * scales[index][..., None].to(kind)


def query_positions(end: Tensor, rows: Tensor, q_lengths: Tensor | None, queries: int) -> tuple[Tensor, Tensor]:
    """Absolute position of each query and whether it exists, both (batch, T)."""
    count = torch.full_like(end, queries) if q_lengths is None else q_lengths
    step = torch.arange(queries, device=end.device)
    return (end - count)[:, None] + step, (step < count[:, None]) & (rows >= 0)[:, None]


def slot_positions(end: Tensor, capacity: int, ring: bool) -> tuple[Tensor, Tensor]:
    """Absolute position held by each cache slot and whether it was written, both (batch, capacity)."""
    slot = torch.arange(capacity, device=end.device)
    if not ring:
        return slot.expand(end.shape[0], -1), slot < end[:, None]
    newest = end[:, None] - 1
    position = newest - torch.remainder(newest - slot, capacity)
    return position, position >= 0


def visible(
    query: Tensor, key: Tensor, mask: str, window: int, chunk: int, left_chunks: int, chunk_offset: int
) -> Tensor:
    """The mask rule on absolute positions, broadcast."""
    if mask == "full":
        return (key == key) & (query == query)
    if mask == "causal":
        see = key <= query
        return see & (key > query - window) if window > 0 else see
    query_chunk = torch.div(query + chunk_offset, chunk, rounding_mode="floor")
    key_chunk = torch.div(key + chunk_offset, chunk, rounding_mode="floor")
    see = key_chunk <= query_chunk
    return see & (key_chunk >= query_chunk - left_chunks) if left_chunks >= 0 else see


def first_visible(query: Any, mask: str, window: int, chunk: int, left_chunks: int, chunk_offset: int) -> Any:
    """The lowest position that a query sees, or a negative number for the first one. query: an integer or a tensor."""
    if mask == "causal" and window > 0:
        return query - window + 1
    if mask == "chunk" and left_chunks >= 0:
        return ((query + chunk_offset) // chunk - left_chunks) * chunk - chunk_offset
    return query * 0


def _softmax_sum(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """scores (b, t, kv, group, s), v (b, s, kv, d) -> out (b, t, heads, d), lse (b, t, heads)."""
    if v.shape[1] == 0:
        shape = (scores.shape[0], scores.shape[1], scores.shape[2] * scores.shape[3])
        return v.new_zeros((*shape, v.shape[3])), v.new_full(shape, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isfinite(), lse, 0.0)[..., None])
    out = torch.einsum("bthgs,bshd->bthgd", weights, v)
    return out.flatten(2, 3), lse.flatten(2, 3)
