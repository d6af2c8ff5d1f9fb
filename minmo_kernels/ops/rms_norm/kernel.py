"""`rms_norm` in Triton: a program for each vector."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels.launch import launch


def run(x: Tensor, weight: Tensor, rows: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x)
    dim = x.shape[-1]
    vectors = x.numel() // dim
    each = vectors // max(1, x.shape[0])
    launch(
        _rms_norm, (vectors, 1, 1), x, weight, rows, out, each, eps,
        DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=4 if dim <= 2048 else 8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["each", "eps"])
def _rms_norm(x_ptr, weight_ptr, rows_ptr, out_ptr, each, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    rms_norm_tile(tl.program_id(0), x_ptr, weight_ptr, rows_ptr, out_ptr, each, eps, DIM, BLOCK)


@triton.jit
def rms_norm_tile(vector, x_ptr, weight_ptr, rows_ptr, out_ptr, each, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One vector, a block as wide as it; `each` vectors share a row."""
    active = vector >= 0
    if rows_ptr is not None:
        active = tl.load(rows_ptr + vector // each) >= 0
    i = tl.arange(0, BLOCK)
    place = vector.to(tl.int64) * DIM + i
    x = tl.load(x_ptr + place, mask=active & (i < DIM), other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / DIM + eps)
    weight = tl.load(weight_ptr + i, mask=i < DIM, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, tl.where(active, x * scale * weight, 0.0), mask=i < DIM)
