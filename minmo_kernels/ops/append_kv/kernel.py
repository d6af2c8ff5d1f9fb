"""`append_kv` in Triton: one launch, a program for each new position and block of heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, lookup_table, target
from minmo_kernels.tiles import rope_table, rotation


def run(
    qkv: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    heads: int,
    kv_heads: int,
    rope_theta: float,
    rope: bool,
    ring: bool,
) -> Tensor:
    batch, items, _ = qkv.shape
    capacity, dim = k_cache.shape[1], k_cache.shape[3]
    q = qkv.new_empty(batch, items, heads, dim)
    tile = tuning.config("append_kv", target(qkv))
    table = lookup_table(rope_table, rope_theta, dim, device=qkv.device)
    launch(
        _append, (batch * items, triton.cdiv(heads + 2 * kv_heads, tile["BLOCK_H"]), 1),
        qkv, bias, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, table, q, items, capacity,
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, ROPE=rope, RING=ring, **tile,
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["items", "capacity"])
def _append(
    qkv_ptr, bias_ptr, k_ptr, v_ptr, rows_ptr, lengths_ptr, q_lengths_ptr, k_scale_ptr, v_scale_ptr, table_ptr, q_ptr,
    items, capacity,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr, RING: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    entry, t = tl.program_id(0) // items, tl.program_id(0) % items
    total: tl.constexpr = HEADS + 2 * KV_HEADS
    row = tl.load(rows_ptr + entry)
    count = items
    if q_lengths_ptr is not None:
        count = tl.load(q_lengths_ptr + entry)
    exists = (row >= 0) & (t < count)
    position = tl.load(lengths_ptr + row, mask=exists, other=0) + t

    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    i = tl.arange(0, HALF)[None, :]
    read = exists & (head < total) & (i >= 0)
    source = qkv_ptr + (tl.program_id(0).to(tl.int64) * total + head) * (2 * HALF) + i
    first = tl.load(source, mask=read, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=read, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        first += tl.load(bias_ptr + head * (2 * HALF) + i, mask=read, other=0.0).to(tl.float32)
        second += tl.load(bias_ptr + head * (2 * HALF) + HALF + i, mask=read, other=0.0).to(tl.float32)
    if ROPE:
        cos, sin = rotation(position, tl.load(table_ptr + i))
        turned = head < HEADS + KV_HEADS
        cos, sin = tl.where(turned, cos, 1.0), tl.where(turned, sin, 0.0)
        first, second = first * cos - second * sin, second * cos + first * sin

    is_q = (head < HEADS) & (i >= 0)
    place = (tl.program_id(0).to(tl.int64) * HEADS + head) * (2 * HALF) + i
    tl.store(q_ptr + place, first, mask=is_q)
    tl.store(q_ptr + place + HALF, second, mask=is_q)
    store_kv(
        first, second, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, row, position, capacity, head, i, exists,
        HEADS, KV_HEADS, HALF, RING,
    )  # fmt: skip


@triton.jit
def store_kv(
    first, second, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, row, position, capacity, head, i, exists,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Writes those of a block of packed heads (heads, pairs) that are keys or values into the caches.

    A position past a linear cache's capacity is not written. With scales the caches are int8, and the block holds all
    of a head's pairs.
    """
    slot = position
    if RING:
        slot = position % capacity
    write = exists & (slot >= 0) & (slot < capacity)
    at = (row.to(tl.int64) * capacity + slot) * KV_HEADS + head - HEADS
    is_k = write & (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = write & (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    if k_scale_ptr is not None:
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))[:, None]
        scale = largest / 127.0
        tl.store(k_scale_ptr + at, scale, mask=is_k)
        tl.store(v_scale_ptr + at - KV_HEADS, scale, mask=is_v)
        step = tl.where(scale > 0.0, scale, 1.0)
        # Adding and taking away 1.5 x 2^23 rounds halves to even, as torch.round does.
        first = ((first / step + 12582912.0) - 12582912.0).to(tl.int8)
        second = ((second / step + 12582912.0) - 12582912.0).to(tl.int8)
    is_k, is_v = is_k & (i >= 0), is_v & (i >= 0)
    place = at * (2 * HALF) + i
    tl.store(k_ptr + place, first, mask=is_k)
    tl.store(k_ptr + place + HALF, second, mask=is_k)
    place -= KV_HEADS * 2 * HALF
    tl.store(v_ptr + place, first, mask=is_v)
    tl.store(v_ptr + place + HALF, second, mask=is_v)
