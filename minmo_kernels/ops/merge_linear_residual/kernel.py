"""`merge_linear_residual` in Triton: for one and two rows `linear_residual` whose programs merge attention's parts as
they load them; for more a launch that merges, then `linear_residual`.

Every program of a projection would merge the parts of every row again. At eight rows that is eight times the weights'
bytes from the level-2 cache, and most of the instructions; at one row it is as many bytes as the weights'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.ops.linear_residual import kernel as linear_residual
from minmo_kernels.ops.streaming_attention.kernel import merge

MOST_ROWS = 2
"""The largest bucket whose projection merges by itself."""


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
    if tuning.rows_of(batch) > MOST_ROWS:
        x = residual.new_empty(batch, heads * dim)
        merge(partials, lse, x, None, queries=1, parts=parts, heads=heads, dim=dim)
        return linear_residual.run(x, weight, residual, rows, weight_scale, weight_zero)
    out = torch.empty_like(residual)
    linear_residual.run_projection(
        partials, lse, weight, weight_scale, weight_zero, residual, rows, out, parts=parts, head_dim=dim
    )
    return out
