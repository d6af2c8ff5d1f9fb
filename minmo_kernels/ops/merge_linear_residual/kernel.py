"""`merge_linear_residual` in Triton: for few rows `linear_residual` whose programs merge attention's parts as they load
them; for more a launch that merges, then `linear_residual`.

Every program of a projection merges the parts of every row again. At one row of 16-bit weights that is as many bytes
from the level-2 cache as the weights have; at eight rows, or with smaller weights, it would be most instructions too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.ops.linear_residual import kernel as linear_residual
from minmo_kernels.ops.linear_residual import weight_bits
from minmo_kernels.ops.streaming_attention.kernel import merge


def merges_ahead(bucket: int, weight: Tensor) -> bool:
    """Whether a launch merges before the projection: from three rows on, from two with int8 and always with int4."""
    return bucket > 2 or 8 * bucket > weight_bits(weight)


def run(
    partials: Tensor,
    lse: Tensor,
    weight: Tensor,
    residual: Tensor,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
) -> Tensor:
    batch, parts, heads, dim = partials.shape
    if merges_ahead(tuning.rows_of(batch), weight):
        x = residual.new_empty(batch, heads * dim)
        merge(partials, lse, x, None, queries=1, parts=parts, heads=heads, dim=dim)
        return linear_residual.run(x, weight, residual, rows, weight_scale, weight_zero)
    out = torch.empty_like(residual)
    linear_residual.run_projection(
        partials, lse, weight, weight_scale, weight_zero, residual, rows, out, parts=parts, head_dim=dim
    )
    return out
