"""Third launch of a decode layer: attention's split partials merged, output projection, residual."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, check, check_tensor
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.linear_residual import check_weight, decode_features, refuses_decode
from minmo_kernels.ops.merge_linear_residual.reference import reference


def merge_linear_residual(
    partials: Tensor,
    lse: Tensor,
    weight: Tensor,
    residual: Tensor,
    rows: Tensor,
    *,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """residual + merge(partials) @ weight.T, where merge weighs each part by exp(its lse) and the weights sum to one.

    Shapes: partials (batch, n, heads, head_dim) fp32 and lse (batch, n, heads) fp32, as `streaming_attention` with
    `partials=n` gives them for one query (its T axis taken away); a part with lse -inf saw nothing and is not read;
    weight (dim_out, heads head_dim) in a format of `linear_residual`; residual (batch, dim_out); rows
    (batch,) int32, -1 = padding.

    Returns (batch, dim_out) in residual's dtype, zeros for padding entries. Raises ValueError for shapes, dtypes or
    devices that do not fit.
    """
    name = "merge_linear_residual"
    check_tensor(name, "partials", partials, "batch n heads head_dim", partials.device, torch.float32)
    check_tensor(name, "lse", lse, "batch n heads", partials.device, torch.float32)
    check_tensor(name, "residual", residual, "batch dim_out", partials.device, *FLOATS)
    check_tensor(name, "rows", rows, "batch", partials.device, torch.int32)
    batch, _, heads, dim = partials.shape
    check(lse.shape == partials.shape[:3], lambda: f"{name}: lse must be {tuple(partials.shape[:3])}")
    wanted = (residual.shape[1], heads * dim)
    check_weight(name, "weight", weight, weight_scale, weight_zero, wanted, residual)
    check(
        rows.shape[0] == residual.shape[0] == batch,
        lambda: f"{name}: rows has {rows.shape[0]} entries, residual {residual.shape[0]}, partials {batch}",
    )
    return OP(partials, lse, weight, residual, rows, weight_scale, weight_zero)


OP = Op(
    "merge_linear_residual",
    "(Tensor partials, Tensor lse, Tensor weight, Tensor residual, Tensor rows, Tensor? weight_scale,"
    " Tensor? weight_zero) -> Tensor",
    reference=reference,
    fake=lambda partials, lse, weight, residual, rows, weight_scale, weight_zero: torch.empty_like(residual),
    features=lambda partials, lse, weight, *args: {
        "dim": partials.shape[3],
        **decode_features(lse, weight),
    },
    backends=(triton_backend("merge_linear_residual", refuses_decode),),
)
