"""`merge_linear_residual` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype
from minmo_kernels.ops.linear_residual.reference import dequantised


def reference(
    partials: Tensor,
    lse: Tensor,
    weight: Tensor,
    residual: Tensor,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
) -> Tensor:
    kind = compute_dtype(residual.dtype)
    total = torch.logsumexp(lse.to(kind), dim=1, keepdim=True)
    # A head that saw nothing in any part has total -inf; its weights are zeros, not exp(-inf + inf).
    share = torch.exp(lse.to(kind) - torch.where(total.isfinite(), total, 0.0))
    seen = torch.where(lse.isneginf()[..., None], 0.0, partials.to(kind))
    merged = (seen * share[..., None]).sum(dim=1).flatten(1)
    out = residual.to(kind) + merged @ dequantised(weight, weight_scale, weight_zero, kind).T
    return torch.where((rows >= 0)[:, None], out, 0.0).to(residual.dtype)
