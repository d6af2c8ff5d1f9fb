"""Fifth launch of a decode layer, down projection and residual; without a residual, the head of a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, Request, check, check_tensor
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.linear_residual.reference import reference
from minmo_kernels.tuning import MOST_ROWS, bucket_of

GROUPS = (32, 64, 128)
"""Inputs that may share an int4 scale and zero point."""


def linear_residual(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    *,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """residual + x @ weight.T.

    Shapes: x (batch, dim_in); weight (dim_out, dim_in) in one of three formats; residual (batch, dim_out), or None for
    the product alone; rows (batch,) int32, -1 = padding. Returns (batch, dim_out) in x's dtype, zeros for padding
    entries. Raises ValueError for shapes, dtypes or devices that do not fit.

    Weight formats, here and in the other projections of a decode step:
    - x's dtype, as it is;
    - int8 with weight_scale (dim_out,) fp32: weight * weight_scale[:, None];
    - int4, uint8 (dim_out, dim_in / 2) with weight_scale and weight_zero (dim_out, groups) in x's dtype, a group being
      32, 64 or 128 inputs: (number - weight_zero) * weight_scale. Each 32 inputs are four little-endian words of
      four bytes: bits 4i .. 4i + 3 of word j hold number 4i + j, so that a thread which loads all four has
      neighbours under one mask.
    """
    name = "linear_residual"
    check_tensor(name, "x", x, "batch dim_in", x.device, *FLOATS)
    check_tensor(name, "rows", rows, "batch", x.device, torch.int32)
    check_weight(name, "weight", weight, weight_scale, weight_zero, (len(weight), x.shape[1]), x)
    check(len(rows) == len(x), lambda: f"{name}: rows has {len(rows)} entries, x {len(x)}")
    if residual is not None:
        check_tensor(name, "residual", residual, "batch dim_out", x.device, x.dtype)
        wanted = (len(x), len(weight))
        check(residual.shape == wanted, lambda: f"{name}: residual must be {wanted}, got {tuple(residual.shape)}")
    return OP(x, weight, residual, rows, weight_scale, weight_zero)


def check_weight(
    op: str,
    name: str,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    shape: tuple[int, int],
    x: Tensor,
) -> None:
    """A projection's weight of logical `shape` for inputs like x, in a format of `linear_residual`."""
    check_tensor(op, name, weight, "dim_out dim_in", x.device, x.dtype, torch.int8, torch.uint8)
    dim_out, dim_in = shape
    if weight.dtype == torch.uint8:
        if scale is None or zero is None:
            raise ValueError(f"{op}: an int4 {name} needs weight_scale and weight_zero, ({dim_out}, groups) each")
        for label, tensor in (("weight_scale", scale), ("weight_zero", zero)):
            check_tensor(op, label, tensor, "dim_out groups", x.device, x.dtype)
            groups = tensor.shape[1]
            check(
                groups > 0 and dim_in == groups * (dim_in // groups) and dim_in // groups in GROUPS,
                lambda groups=groups, label=label: (
                    f"{op}: {label} has {groups} groups for {dim_in} inputs; a group is of 32, 64 or 128"
                ),
            )
        check(
            scale.shape == zero.shape and len(scale) == dim_out,
            lambda: f"{op}: weight_scale and weight_zero must be ({dim_out}, groups)",
        )
        shape = (dim_out, dim_in // 2)
    elif weight.dtype == torch.int8:
        if scale is None:
            raise ValueError(f"{op}: an int8 {name} needs weight_scale, ({dim_out},) fp32")
        check_tensor(op, "weight_scale", scale, "dim_out", x.device, torch.float32)
        check(len(scale) == dim_out, lambda: f"{op}: weight_scale has {len(scale)} values for {dim_out} rows")
        check(zero is None, lambda: f"{op}: weight_zero goes with an int4 {name}")
    else:
        check(scale is None and zero is None, lambda: f"{op}: weight_scale goes with an int8 or int4 {name}")
    check(tuple(weight.shape) == shape, lambda: f"{op}: {name} must be {shape}, got {tuple(weight.shape)}")


def weight_bits(weight: Tensor) -> int:
    """Bits of a stored weight: 4, 8, 16 or 32."""
    return 4 if weight.dtype == torch.uint8 else 8 * weight.dtype.itemsize


def group_size(weight: Tensor, zero: Tensor | None) -> int:
    """Inputs that share an int4 scale; 0 for the other formats."""
    return 0 if zero is None else 2 * weight.shape[1] // zero.shape[1]


def rows_bucket(batch: int) -> int:
    """What the choice of a backend may know of the batch: its bucket, MOST_ROWS + 1 beyond the kernels' largest."""
    return bucket_of(batch) if batch <= MOST_ROWS else MOST_ROWS + 1


MISALIGNED = "an int8 or int4 weight starts at an address that is no multiple of 4 bytes; call .clone() on it"


def loads_words(weight: Tensor) -> bool:
    """Whether a weight can be loaded by words where it is int8 or int4."""
    packed = weight.dtype in (torch.int8, torch.uint8)
    return not packed or weight.device.type == "meta" or weight.data_ptr() % 4 == 0


def decode_features(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """What may decide the backend of a decode layer's projections: the bucket of the batch, and whether the words of an
    int8 or int4 weight can be loaded."""
    return {"rows": rows_bucket(len(x)), "aligned": loads_words(weight)}


def refuses_decode(request: Request) -> str | None:
    """Shared by the projections of a decode layer."""
    if not request.features["aligned"]:
        return MISALIGNED
    if request.features["rows"] > MOST_ROWS:
        return f"a decode step has up to {MOST_ROWS} rows; more are prefill, which the library serves"
    return None


OP = Op(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor? residual, Tensor rows, Tensor? weight_scale, Tensor? weight_zero) -> Tensor",
    reference=reference,
    fake=lambda x, weight, *args: x.new_empty((x.shape[0], weight.shape[0])),
    features=lambda x, weight, *args: decode_features(x, weight),
    backends=(triton_backend("linear_residual", refuses_decode),),
)
