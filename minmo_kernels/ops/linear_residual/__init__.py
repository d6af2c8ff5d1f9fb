"""Fifth launch of a decode layer: down projection and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import Op, check, check_tensor
from minmo_kernels.ops.linear_residual.reference import reference


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
    """residual + x @ weight.T.

    Shapes: x (batch, dim_in); weight (dim_out, dim_in); residual (batch, dim_out); rows (batch,) int32, -1 = padding.
    Returns (batch, dim_out), zeros for padding entries. Raises ValueError for shapes, dtypes or devices that do not
    fit.
    """
    name = "linear_residual"
    check_tensor(name, "x", x, "batch dim_in", x.device)
    check_tensor(name, "weight", weight, "dim_out dim_in", x.device, x.dtype)
    check_tensor(name, "residual", residual, "batch dim_out", x.device, x.dtype)
    check_tensor(name, "rows", rows, "batch", x.device, torch.int32)
    check(
        tuple(weight.shape) == (residual.shape[1], x.shape[1]),
        lambda: (
            f"{name}: weight must be (dim_out, dim_in) = {(residual.shape[1], x.shape[1])}, got {tuple(weight.shape)}"
        ),
    )
    check(
        rows.shape[0] == residual.shape[0] == x.shape[0],
        lambda: f"{name}: rows has {rows.shape[0]} entries, residual {residual.shape[0]}, x {x.shape[0]}",
    )
    return OP(x, weight, residual, rows)


OP = Op(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor residual, Tensor rows) -> Tensor",
    reference=reference,
    fake=lambda x, weight, residual, rows: torch.empty_like(residual),
)
