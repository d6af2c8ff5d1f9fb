"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, check, check_number, check_tensor
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.rms_norm.reference import reference


def rms_norm(x: Tensor, weight: Tensor, rows: Tensor | None = None, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32.

    Shapes: x (batch, ..., dim); weight (dim,); rows (batch,) int32 or None, entries of -1 give zeros. Returns x's
    shape and dtype. Raises ValueError for shapes, dtypes or devices that do not fit. Source: Zhang and Sennrich, 2019.
    """
    name = "rms_norm"
    check(x.dim() >= 2, lambda: f"{name}: x must have the shape (batch, ..., dim), got {tuple(x.shape)}")
    check(x.dtype in FLOATS, lambda: f"{name}: x must be floating point, got {x.dtype}")
    check(x.shape[-1] > 0, lambda: f"{name}: x has vectors of no values")
    check_number(name, "eps", eps, 0.0)
    check_tensor(name, "weight", weight, "dim", x.device, x.dtype)
    check(weight.shape[0] == x.shape[-1], lambda: f"{name}: weight has {weight.shape[0]} values for {x.shape[-1]}")
    if rows is not None:
        check_tensor(name, "rows", rows, "batch", x.device, torch.int32)
        check(rows.shape[0] == x.shape[0], lambda: f"{name}: rows has {rows.shape[0]} entries, x {x.shape[0]}")
    return OP(x, weight, rows, eps)


OP = Op(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor? rows, float eps) -> Tensor",
    reference=reference,
    fake=lambda x, weight, rows, eps: torch.empty_like(x),
    backends=(triton_backend("rms_norm"),),
)
