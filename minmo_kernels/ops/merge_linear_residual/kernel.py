"""`merge_linear_residual` in Triton: `linear_residual` whose programs merge attention's parts as they load them."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.ops.linear_residual.kernel import run_projection


def run(
    partials: Tensor,
    lse: Tensor,
    weight: Tensor,
    residual: Tensor,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
) -> Tensor:
    parts, head_dim = partials.shape[1], partials.shape[3]
    out = torch.empty_like(residual)
    run_projection(partials, lse, weight, weight_scale, weight_zero, residual, rows, out, parts, head_dim)
    return out
