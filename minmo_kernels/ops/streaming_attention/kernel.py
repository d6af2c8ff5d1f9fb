"""`streaming_attention` in Triton: one kernel for decode and chunked prefill, and one that merges split parts.

A program serves one entry, one kv head and a block of that head's queries (query positions x the query heads that
share it), over one part of the cache. Lengths, rows and positions are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, target
from minmo_kernels.tiles import first_visible, past_visible, visible

MERGED_HEADS = 4
"""Heads that a program of the merge takes."""


def run(
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
    fold, sm = queries * heads // kv_heads, target(q)
    tile = tuning.config("streaming_attention", sm, few=fold <= 16, dim=dim, wide=q.dtype == torch.float32)
    blocks = triton.cdiv(fold, tile["BLOCK_M"])
    parts = partials or tuning.parts_of(sm, batch * kv_heads * blocks)
    split = partials > 0 or parts > 1
    axes = (batch, parts) if split else (batch,)
    out = q.new_empty((*axes, queries, heads, dim), dtype=torch.float32 if split else q.dtype)
    lse = q.new_empty((*axes, queries, heads) if split or return_lse else (0,), dtype=torch.float32)
    launch(
        _attention, (blocks * kv_heads, parts, batch),
        q, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, out, lse if split or return_lse else None,
        queries, capacity, window, chunk, left_chunks, chunk_offset, scale,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, MASK=mask, RING=ring, **tile,
    )  # fmt: skip
    if not split or partials > 0:
        return out, lse
    merged = torch.empty_like(q)
    total = q.new_empty((batch, queries, heads) if return_lse else (0,), dtype=torch.float32)
    merge(out, lse, merged, total if return_lse else None, queries=queries, parts=parts, heads=heads, dim=dim)
    return merged, total


def merge(
    out: Tensor, lse: Tensor, merged: Tensor, total: Tensor | None, queries: int, parts: int, heads: int, dim: int
) -> None:
    """Parts out (batch, parts, queries, heads, dim) fp32 with their log-sum-exp -> merged (batch, queries, heads, dim)
    and, where it is wanted, total (batch, queries, heads). A part whose log-sum-exp is -inf is not read."""
    launch(
        _merge, (len(out) * queries, triton.cdiv(heads, MERGED_HEADS), 1),
        out, lse, merged, total, queries, parts,
        HEADS=heads, DIM=dim, BLOCK_H=MERGED_HEADS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "capacity", "window", "chunk", "left_chunks", "chunk_offset", "scale"])
def _attention(
    q_ptr, k_ptr, v_ptr, rows_ptr, lengths_ptr, q_lengths_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, queries,
    capacity, window, chunk, left_chunks, chunk_offset, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr, RING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    attention_tile(
        tl.program_id(2), tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS, tl.program_id(1),
        tl.num_programs(1),
        q_ptr, k_ptr, v_ptr, rows_ptr, lengths_ptr, q_lengths_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, queries,
        capacity, window, chunk, left_chunks, chunk_offset, scale, HEADS, KV_HEADS, DIM, MASK, RING, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def attention_tile(
    entry, kv_head, block, part, parts,
    q_ptr, k_ptr, v_ptr, rows_ptr, lengths_ptr, q_lengths_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, queries,
    capacity, window, chunk, left_chunks, chunk_offset, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, MASK: tl.constexpr, RING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries block * BLOCK_M ... of one kv head of one entry over one of `parts` ranges of its cache."""
    group: tl.constexpr = HEADS // KV_HEADS
    row = tl.load(rows_ptr + entry)
    count = queries
    if q_lengths_ptr is not None:
        count = tl.load(q_lengths_ptr + entry)
    count = tl.where(row >= 0, count, 0)
    end = tl.load(lengths_ptr + row, mask=row >= 0, other=0)
    first = end - count

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    t = m // group
    exists = t < count
    place = (entry.to(tl.int64) * queries + t) * HEADS + kv_head * group + m % group
    d = tl.arange(0, DIM)
    q = tl.load(q_ptr + place[:, None] * DIM + d[None, :], mask=exists[:, None], other=0.0)
    query = first + t

    # This part's slots: an equal share of what the entry's queries see, in steps of 16; then what this block's do.
    low, high = 0, tl.minimum(end, capacity)
    if not RING:
        low = first_visible(first, window, chunk, left_chunks, chunk_offset, MASK) // 16 * 16
    width = tl.cdiv(high - low, 16 * parts) * 16
    low += part * width
    high = tl.minimum(low + width, high)
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, count - 1)
    if not RING:
        start = first_visible(first + block * BLOCK_M // group, window, chunk, left_chunks, chunk_offset, MASK)
        low = tl.maximum(low, start // 16 * 16)
        high = tl.minimum(high, past_visible(first + last, end, chunk, chunk_offset, MASK))
    high = tl.where(block * BLOCK_M // group < count, high, low)

    base = row.to(tl.int64) * capacity
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, DIM], tl.float32)
    for begin in range(low, high, BLOCK_N):
        slot = begin + tl.arange(0, BLOCK_N)
        written = slot < high
        key = slot
        if RING:
            key = end - 1 - (end - 1 - slot + capacity) % capacity
        vector = (base + slot) * KV_HEADS + kv_head
        at = vector[:, None] * DIM + d[None, :]
        k = tl.load(k_ptr + at, mask=written[:, None], other=0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        if k_scale_ptr is not None:
            scores *= tl.load(k_scale_ptr + vector, mask=written, other=0.0)[None, :]
        see = visible(query[:, None], key[None, :], window, chunk, left_chunks, chunk_offset, MASK)
        scores = tl.where(see & written[None, :] & exists[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(new_top > float("-inf"), new_top, 0.0)
        weight = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weight, axis=1)
        v = tl.load(v_ptr + at, mask=written[:, None], other=0)
        if v_scale_ptr is not None:
            v = v.to(tl.float32) * tl.load(v_scale_ptr + vector, mask=written, other=0.0)[:, None]
        v = v.to(q.dtype)
        out = tl.dot(weight.to(q.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]

    place = ((entry.to(tl.int64) * parts + part) * queries + t) * HEADS + kv_head * group + m % group
    inside = t < queries
    tl.store(out_ptr + place[:, None] * DIM + d[None, :], out, mask=inside[:, None])
    if lse_ptr is not None:
        tl.store(lse_ptr + place, top * 0.6931471805599453 + tl.log(tl.where(total > 0.0, total, 1.0)), mask=inside)


@triton.jit(do_not_specialize=["queries", "parts"])
def _merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, queries, parts,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    merge_tile(
        tl.program_id(0), tl.program_id(1), part_ptr, part_lse_ptr, out_ptr, lse_ptr, queries, parts,
        HEADS, DIM, BLOCK_H,
    )  # fmt: skip


@triton.jit
def merge_tile(
    vector, block, part_ptr, part_lse_ptr, out_ptr, lse_ptr, queries, parts,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Parts of one (entry, query), weighted by exp(their log-sum-exp), for a block of heads."""
    entry, t = vector // queries, vector % queries
    head = block * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, DIM)
    inside = head < HEADS
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    out = tl.zeros([BLOCK_H, DIM], tl.float32)
    for part in range(parts):
        place = ((entry.to(tl.int64) * parts + part) * queries + t) * HEADS + head
        lse = tl.load(part_lse_ptr + place, mask=inside, other=float("-inf"))
        seen = lse > float("-inf")
        value = tl.load(part_ptr + place[:, None] * DIM + d[None, :], mask=seen[:, None], other=0.0)
        new_top = tl.maximum(top, lse)
        safe = tl.where(new_top > float("-inf"), new_top, 0.0)
        shrink, share = tl.exp(top - safe), tl.exp(lse - safe)
        out = out * shrink[:, None] + value * share[:, None]
        total = total * shrink + share
        top = new_top
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    place = vector.to(tl.int64) * HEADS + head
    tl.store(out_ptr + place[:, None] * DIM + d[None, :], out, mask=inside[:, None])
    if lse_ptr is not None:
        tl.store(lse_ptr + place, top + tl.log(tl.where(total > 0.0, total, 1.0)), mask=inside)
