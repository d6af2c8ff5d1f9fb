"""`rms_norm_qkv_rope_append` in Triton: a program for a block of rotary pairs of one packed head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, lookup_table, target, triton_dtype
from minmo_kernels.ops.append_kv.kernel import store_kv
from minmo_kernels.ops.linear_residual import group_size, weight_bits
from minmo_kernels.tiles import project, rope_table, rotation


def run(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    rope_theta: float,
    ring: bool,
) -> Tensor:
    batch, (capacity, dim) = x.shape[0], (k_cache.shape[1], k_cache.shape[3])
    q = x.new_empty(batch, heads, dim)
    bucket = tuning.rows_of(batch)
    tile = tuning.config(
        "rms_norm_qkv_rope_append",
        target(x),
        rows=bucket,
        bits=weight_bits(qkv_weight),
        group=group_size(qkv_weight, weight_zero),
    )
    tile = {**tile, "BLOCK_N": min(tile["BLOCK_N"], dim)}  # a program stays within one head
    launch(
        _qkv, (triton.cdiv(dim, tile["BLOCK_N"]), heads + 2 * kv_heads, min(batch, 1)),
        x, norm_weight, qkv_weight, weight_scale, weight_zero, qkv_bias, k_cache, v_cache, rows, lengths,
        lookup_table(rope_table, rope_theta, dim, device=x.device), q, batch, capacity, eps,
        HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2, RING=ring, DIM=x.shape[1], GROUP=group_size(qkv_weight,
        weight_zero), ROWS=bucket,
        DOT=triton_dtype(x.dtype), **tile,
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["batch", "capacity", "eps"])
def _qkv(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, k_ptr, v_ptr, rows_ptr, lengths_ptr, table_ptr, q_ptr,
    batch,
    capacity, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, RING: tl.constexpr, DIM: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    qkv_tile(
        tl.program_id(1), tl.program_id(0), x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, k_ptr, v_ptr,
        rows_ptr,
        lengths_ptr, table_ptr, q_ptr, batch, capacity, eps,
        HEADS, KV_HEADS, HALF, RING, DIM, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def qkv_tile(
    head, block, x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, k_ptr, v_ptr, rows_ptr, lengths_ptr,
    table_ptr,
    q_ptr, batch, capacity, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, RING: tl.constexpr, DIM: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pairs block * BLOCK_N / 2 ... of a packed head, both halves of each, for every row of the batch."""
    pairs: tl.constexpr = BLOCK_N // 2
    total: tl.constexpr = (HEADS + 2 * KV_HEADS) * 2 * HALF
    j = tl.arange(0, BLOCK_N)
    n = head * (2 * HALF) + block * pairs + j // 2 + j % 2 * HALF
    both = project(
        x_ptr, None, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, n, batch, 1, eps,
        DIM, total, "normed", 1, 1, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        both += tl.load(bias_ptr + n).to(tl.float32)[None, :]
    first, second = tl.split(tl.reshape(both, (both.shape[0], pairs, 2)))

    m = tl.arange(0, both.shape[0])[:, None]
    row = tl.load(rows_ptr + m, mask=m < batch, other=-1)
    exists = row >= 0
    position = tl.load(lengths_ptr + row, mask=exists, other=0)
    i = block * pairs + tl.arange(0, pairs)[None, :]
    cos, sin = rotation(position, tl.load(table_ptr + i))
    turned = head < HEADS + KV_HEADS
    cos, sin = tl.where(turned, cos, 1.0), tl.where(turned, sin, 0.0)
    first, second = first * cos - second * sin, second * cos + first * sin
    first, second = tl.where(exists, first, 0.0), tl.where(exists, second, 0.0)

    place = (m.to(tl.int64) * HEADS + head) * (2 * HALF) + i
    is_q = (m < batch) & (head < HEADS) & (i >= 0)
    tl.store(q_ptr + place, first, mask=is_q)
    tl.store(q_ptr + place + HALF, second, mask=is_q)
    store_kv(
        first, second, k_ptr, v_ptr, None, None, row, position, capacity, head, i, exists, HEADS, KV_HEADS, HALF, RING
    )
