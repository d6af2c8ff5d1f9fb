"""`gate_up_swiglu` in Triton: a program for a block of units; gate and up rows lie side by side in the weight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, target, triton_dtype
from minmo_kernels.ops.linear_residual import group_size, weight_bits
from minmo_kernels.tiles import project


def run(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    eps: float,
) -> Tensor:
    batch, wide = x.shape[0], weight.shape[0]
    out = x.new_empty(batch, wide // 2)
    bucket = tuning.rows_of(batch)
    tile = tuning.config(
        "gate_up_swiglu", target(x), rows=bucket, bits=weight_bits(weight), group=group_size(weight, weight_zero)
    )
    launch(
        _gate_up_swiglu, (triton.cdiv(wide, tile["BLOCK_N"]), 1, min(batch, 1)),
        x, norm_weight, weight, weight_scale, weight_zero, rows, out, batch, eps,
        DIM=x.shape[1], DIM_OUT=wide, GROUP=group_size(weight, weight_zero), ROWS=bucket, DOT=triton_dtype(x.dtype),
        **tile,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["batch", "eps"])
def _gate_up_swiglu(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, out_ptr, batch, eps,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    gate_up_swiglu_tile(
        tl.program_id(0), x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, out_ptr, batch, eps,
        DIM, DIM_OUT, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def gate_up_swiglu_tile(
    tile, x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, out_ptr, batch, eps,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight rows tile * BLOCK_N ..., that is half as many units, of every row of the batch."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    both = project(
        x_ptr, None, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, n, batch, 1, eps,
        DIM, DIM_OUT, "normed", 1, 1, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    half: tl.constexpr = BLOCK_N // 2
    gate, up = tl.split(tl.reshape(both, (both.shape[0], half, 2)))
    out = gate / (1.0 + tl.exp(-gate)) * up
    m = tl.arange(0, both.shape[0])[:, None]
    unit = tile * half + tl.arange(0, half)[None, :]
    place = m.to(tl.int64) * (DIM_OUT // 2) + unit
    tl.store(out_ptr + place, out, mask=(m < batch) & (unit < DIM_OUT // 2))
