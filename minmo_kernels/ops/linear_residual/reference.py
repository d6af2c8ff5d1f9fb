"""`linear_residual` in plain PyTorch, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(x: Tensor, weight: Tensor, residual: Tensor, rows: Tensor, weight_scale: Tensor | None) -> Tensor:
    kind = compute_dtype(x.dtype)
    out = residual.to(kind) + x.to(kind) @ dequantised(weight, weight_scale, kind).T
    return torch.where((rows >= 0)[:, None], out, 0.0).to(x.dtype)


def dequantised(weight: Tensor, scale: Tensor | None, kind: torch.dtype) -> Tensor:
    """A weight in the compute dtype; an int8 one times its scale a row."""
    return weight.to(kind) if scale is None else weight.to(kind) * scale.to(kind)[:, None]
