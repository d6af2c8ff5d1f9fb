"""Fourth launch of a decode layer: norm, gate and up projections, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, check, check_number, check_tensor
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.gate_up_swiglu.reference import reference
from minmo_kernels.ops.linear_residual import check_weight, decode_features, refuses_decode


def gate_up_swiglu(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    rows: Tensor,
    *,
    eps: float,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up of the normed input, with gate and up interleaved in one weight, without rounding in between.

    Shapes: x (batch, dim); norm_weight (dim,); weight (2 ffn, dim), row 2i = gate i, row 2i + 1 = up i, in a
    format of `linear_residual`; rows (batch,) int32, -1 = padding. Returns (batch, ffn) in x's dtype, zeros for
    padding entries. Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: Shazeer, 2020 (arXiv 2002.05202).
    """
    name = "gate_up_swiglu"
    check_tensor(name, "x", x, "batch dim", x.device, *FLOATS)
    check_number(name, "eps", eps, 0.0)
    check_tensor(name, "norm_weight", norm_weight, "dim", x.device, x.dtype)
    check_tensor(name, "rows", rows, "batch", x.device, torch.int32)
    check(
        norm_weight.shape[0] == x.shape[1],
        lambda: f"{name}: norm_weight has {norm_weight.shape[0]} values, x {x.shape[1]}",
    )
    check_weight(name, "weight", weight, weight_scale, weight_zero, (len(weight), x.shape[1]), x)
    check(weight.shape[0] % 2 == 0, lambda: f"{name}: weight must have 2 rows a unit, got {weight.shape[0]}")
    check(rows.shape[0] == x.shape[0], lambda: f"{name}: rows has {rows.shape[0]} entries, x {x.shape[0]}")
    return OP(x, norm_weight, weight, rows, weight_scale, weight_zero, eps)


OP = Op(
    "gate_up_swiglu",
    "(Tensor x, Tensor norm_weight, Tensor weight, Tensor rows, Tensor? weight_scale, Tensor? weight_zero,"
    " float eps) -> Tensor",
    reference=reference,
    fake=lambda x, norm_weight, weight, rows, weight_scale, weight_zero, eps: x.new_empty(
        (x.shape[0], weight.shape[0] // 2)
    ),
    features=lambda x, norm, weight, *args: decode_features(x, weight),
    backends=(triton_backend("gate_up_swiglu", refuses_decode),),
)
