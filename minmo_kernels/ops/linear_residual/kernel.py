"""`linear_residual` in Triton, and the launch that `merge_linear_residual` shares: a program for a block of outputs."""

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
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    run_projection(x, None, weight, weight_scale, weight_zero, residual, rows, out, parts=1, head_dim=1)
    return out


def run_projection(
    x: Tensor,
    lse: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    out: Tensor,
    parts: int,
    head_dim: int,
) -> None:
    """out = residual + input @ weight.T, the input being x, or with `lse` attention's parts x merged by it."""
    batch, dim_out = out.shape
    bucket = tuning.rows_of(batch)
    tile = tuning.config(
        "linear_residual",
        target(x),
        rows=bucket,
        bits=weight_bits(weight),
        group=group_size(weight, weight_zero),
        merged=lse is not None,
    )
    launch(
        _linear_residual, (triton.cdiv(dim_out, tile["BLOCK_N"]), 1, min(batch, 1)),
        x, lse, weight, weight_scale, weight_zero, residual, rows, out, batch, parts,
        DIM=x.shape[1] if lse is None else x.shape[2] * x.shape[3], DIM_OUT=dim_out,
        SOURCE="plain" if lse is None else "merged", HEAD_DIM=head_dim,
        PARTS=tuning.bucket_of(parts), GROUP=group_size(weight, weight_zero), ROWS=bucket,
        DOT=triton_dtype(out.dtype), **tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "parts"])
def _linear_residual(
    x_ptr, lse_ptr, weight_ptr, scale_ptr, zero_ptr, residual_ptr, rows_ptr, out_ptr, batch, parts,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, SOURCE: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    linear_residual_tile(
        tl.program_id(0), x_ptr, lse_ptr, weight_ptr, scale_ptr, zero_ptr, residual_ptr, rows_ptr, out_ptr, batch,
        parts,
        DIM, DIM_OUT, SOURCE, HEAD_DIM, PARTS, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def linear_residual_tile(
    tile, x_ptr, lse_ptr, weight_ptr, scale_ptr, zero_ptr, residual_ptr, rows_ptr, out_ptr, batch, parts,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, SOURCE: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs tile * BLOCK_N ... of every row."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = project(
        x_ptr, lse_ptr, None, weight_ptr, scale_ptr, zero_ptr, rows_ptr, n, batch, parts, 0.0,
        DIM, DIM_OUT, SOURCE, HEAD_DIM, PARTS, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = tl.arange(0, out.shape[0])[:, None]
    inside = (m < batch) & (n < DIM_OUT)[None, :]
    active = inside & (tl.load(rows_ptr + m, mask=m < batch, other=-1) >= 0)
    place = m.to(tl.int64) * DIM_OUT + n[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + place, mask=active, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out, mask=inside)
