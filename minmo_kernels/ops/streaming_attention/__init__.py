"""Attention of new queries over each session's cache: decode, chunked prefill, chunked streaming and one shot alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minmo_kernels.dispatch import (
    FLOATS,
    Fault,
    Op,
    Rule,
    check,
    check_counts,
    check_number,
    check_tensor,
    checked_rows,
)
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.append_kv import check_cache_scales, refuses_head_dim
from minmo_kernels.ops.streaming_attention import backends
from minmo_kernels.ops.streaming_attention.reference import first_visible, reference

MASKS = ("full", "causal", "chunk")


def streaming_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    mask: str = "causal",
    window: int = 0,
    chunk: int = 0,
    left_chunks: int = -1,
    chunk_offset: int = 0,
    ring: bool = False,
    scale: float | None = None,
    partials: int = 0,
    return_lse: bool = False,
) -> Any:
    """Softmax attention of the newest positions of each session over its cached keys and values.

    Shapes: q (batch, T, heads, dim); k_cache, v_cache (sessions, capacity, kv_heads, dim), heads a multiple of
    kv_heads (query head h reads kv head h // (heads / kv_heads)); rows (batch,) int32, -1 = padding; lengths
    (sessions,) int32, each session's end position, the new ones included; q_lengths (batch,) int32, default T. Query t
    of entry b has the absolute position lengths[rows[b]] - q_lengths[b] + t.

    Caches: position p lies in slot p, or with `ring` in slot p % capacity (the last `capacity` positions exist; a
    bounded mask is then required, and capacity must hold all that the call's queries see). One shot: the sequence's
    own keys and values are the cache. They hold q's dtype, or int8 with k_scale and v_scale (sessions, capacity,
    kv_heads) fp32, as `append_kv` writes them: number * scale.

    Masks: "full", every position; "causal", key <= query (bottom-right), within the last `window` positions where
    window > 0 (the query's own counts); "chunk", with c(p) = (p + chunk_offset) // chunk: c(key) <= c(query), and
    c(key) >= c(query) - left_chunks where left_chunks >= 0.

    scale: of the scores, default 1 / sqrt(dim). Returns out (batch, T, heads, dim) in q's dtype, zeros for padding
    entries, queries beyond q_lengths and queries that see nothing; with `return_lse` also the natural log-sum-exp of
    the scores (batch, T, heads) fp32, -inf there. partials = n > 0 gives n unmerged parts over
    disjoint ranges of slots, cut where the backend likes: out (batch, n, T, heads, dim) fp32 and lse
    (batch, n, T, heads), always both.

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for lengths that the cache or T cannot
    hold, and for a ring that no longer holds what a query sees.
    """
    name = "streaming_attention"
    check_tensor(name, "q", q, "batch T heads dim", q.device, *FLOATS)
    for label, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, label, cache, "sessions capacity kv_heads dim", q.device, q.dtype, torch.int8)
    check_cache_scales(name, k_cache, v_cache, k_scale, v_scale, written=False)
    check_tensor(name, "rows", rows, "batch", q.device, torch.int32)
    check_tensor(name, "lengths", lengths, "sessions", q.device, torch.int32)
    batch, queries, heads, dim = q.shape
    sessions, capacity, kv_heads, _ = k_cache.shape
    check(k_cache.shape[3] == dim, lambda: f"{name}: q has head dimension {dim}, the caches {k_cache.shape[3]}")
    check(heads % kv_heads == 0, lambda: f"{name}: {heads} heads are no multiple of {kv_heads} kv heads")
    check(rows.shape[0] == batch, lambda: f"{name}: rows has {rows.shape[0]} entries for a batch of {batch}")
    check(lengths.shape[0] == sessions, lambda: f"{name}: lengths has {lengths.shape[0]} rows for {sessions} sessions")
    rules: list[Rule] = []
    if q_lengths is not None:
        check_tensor(name, "q_lengths", q_lengths, "batch", q.device, torch.int32)
        rules.append(check_counts(name, "q_lengths", q_lengths, batch, queries))
    check(mask in MASKS, lambda: f"{name}: mask must be one of {', '.join(MASKS)}, got {mask!r}")
    check((mask == "chunk") == (chunk > 0), lambda: f"{name}: chunk must be > 0 with mask 'chunk' and 0 otherwise")
    check(window >= 0 and partials >= 0, lambda: f"{name}: window and partials are 0 (none) or positive")
    check(chunk_offset >= 0, lambda: f"{name}: chunk_offset is 0 or positive, got {chunk_offset}; add a chunk to it")
    scale = dim**-0.5 if scale is None else scale
    check_number(name, "scale", scale)
    check(window == 0 or mask == "causal", lambda: f"{name}: window goes with mask 'causal'")
    if ring:
        seen = window - 1 if mask == "causal" and window > 0 else chunk * left_chunks if left_chunks >= 0 else -1
        check(seen >= 0, lambda: f"{name}: a ring cache needs a bounded mask (window > 0 or left_chunks >= 0)")
        check(
            capacity >= seen + queries,
            lambda: f"{name}: a ring of {capacity} cannot hold {seen} positions of context and {queries} new ones",
        )
    counts = queries if q_lengths is None else q_lengths
    rules += _fitting(lengths, counts, capacity, mask, window, chunk, left_chunks, chunk_offset, ring)
    rows = checked_rows(name, rows, sessions, *rules)
    out, lse = OP(
        q, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, mask, window, chunk, left_chunks,
        chunk_offset, ring, scale, partials, return_lse or partials > 0,
    )  # fmt: skip
    return (out, lse) if return_lse or partials > 0 else out


def _fitting(
    lengths: Tensor,
    counts: int | Tensor,
    capacity: int,
    mask: str,
    window: int,
    chunk: int,
    left_chunks: int,
    chunk_offset: int,
    ring: bool,
) -> tuple[Rule, Rule]:
    """The rules that a row has as many positions as queries, and that its cache holds what they see."""

    def lost(session: Tensor) -> Tensor:
        end = lengths[session]
        if not ring:
            return end > capacity
        seen = first_visible(end - counts, mask, window, chunk, left_chunks, chunk_offset)
        return (end > capacity) & (seen < end - capacity) & (torch.as_tensor(counts, device=end.device) > 0)

    held = f"a ring of {capacity} no longer holds all that" if ring else f"a cache of {capacity} cannot hold what"
    return (
        (
            Fault.LENGTH,
            lambda session: lengths[session] < counts,
            lambda entry: f"entry {entry} has more queries than positions, lengths are {lengths.tolist()}",
        ),
        (
            Fault.LENGTH,
            lost,
            lambda entry: f"{held} the queries of entry {entry} see, lengths are {lengths.tolist()}",
        ),
    )


def _fake(
    q, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, mask, window, chunk, left_chunks, chunk_offset,
    ring, scale, partials, return_lse,
):  # fmt: skip
    batch, queries, heads, dim = q.shape
    parts = (batch, partials) if partials else (batch,)
    out = q.new_empty((*parts, queries, heads, dim), dtype=torch.float32 if partials else q.dtype)
    lse = q.new_empty((*parts, queries, heads) if return_lse else (0,), dtype=torch.float32)
    return out, lse


def _features(
    q, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, mask, window, chunk, left_chunks, chunk_offset,
    ring, scale, partials, return_lse,
):  # fmt: skip
    return {
        "mask": mask,
        "window": window > 0,
        "ring": ring,
        "dim": q.shape[3],
        "ragged": q_lengths is not None,
        "paged": k_cache.shape[1] % backends.PAGE == 0,
        "lse": return_lse,
        "partials": partials > 0,
    }


OP = Op(
    "streaming_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor rows, Tensor lengths, Tensor? q_lengths, Tensor? k_scale,"
    " Tensor? v_scale, str mask, int window, int chunk, int left_chunks, int chunk_offset, bool ring, float scale,"
    " int partials, bool return_lse) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    features=_features,
    backends=(triton_backend("streaming_attention", refuses_head_dim), *backends.BACKENDS),
)
