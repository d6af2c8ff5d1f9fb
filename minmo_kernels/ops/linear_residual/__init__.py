"""Fifth launch of a decode layer: down projection and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import Op, Request, check, check_tensor
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.linear_residual.reference import reference
from minmo_kernels.tuning import bucket_of

MOST_ROWS = 64
"""The largest bucket of a decode step."""


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, rows: Tensor, *, weight_scale: Tensor | None = None
) -> Tensor:
    """residual + x @ weight.T.

    Shapes: x (batch, dim_in); weight (dim_out, dim_in), or int8 with weight_scale (dim_out,) fp32: the weight is then
    weight * weight_scale[:, None]; residual (batch, dim_out); rows (batch,) int32, -1 = padding. Returns
    (batch, dim_out), zeros for padding entries. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    name = "linear_residual"
    check_tensor(name, "x", x, "batch dim_in", x.device)
    check_tensor(name, "weight", weight, "dim_out dim_in", x.device, x.dtype, torch.int8)
    check_scale(name, weight, weight_scale)
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
    return OP(x, weight, residual, rows, weight_scale)


def check_scale(op: str, weight: Tensor, scale: Tensor | None) -> None:
    """An int8 weight has one scale a row, any other none."""
    if weight.dtype != torch.int8:
        check(scale is None, lambda: f"{op}: weight_scale goes with an int8 weight, not {weight.dtype}")
    elif scale is None:
        raise ValueError(f"{op}: an int8 weight needs weight_scale, ({weight.shape[0]},) fp32")
    else:
        check_tensor(op, "weight_scale", scale, "dim_out", weight.device, torch.float32)
        check(len(scale) == len(weight), lambda: f"{op}: weight_scale has {len(scale)} values for {len(weight)} rows")


def rows_bucket(batch: int) -> int:
    """What the choice of a backend may know of the batch: its bucket, MOST_ROWS + 1 beyond the kernels' largest."""
    return bucket_of(batch) if batch <= MOST_ROWS else MOST_ROWS + 1


def refuses_many_rows(request: Request) -> str | None:
    """Shared by the projections of a decode layer."""
    if request.features["rows"] > MOST_ROWS:
        return f"a decode step has up to {MOST_ROWS} rows; more are prefill, which the library serves"
    return None


OP = Op(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor residual, Tensor rows, Tensor? weight_scale) -> Tensor",
    reference=reference,
    fake=lambda x, weight, residual, rows, weight_scale: torch.empty_like(residual),
    features=lambda x, *args: {"rows": rows_bucket(len(x))},
    backends=(triton_backend("linear_residual", refuses_many_rows),),
)
