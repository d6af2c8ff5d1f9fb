"""`linear_residual` in plain PyTorch, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(x: Tensor, weight: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
    kind = compute_dtype(x.dtype)
    out = residual.to(kind) + x.to(kind) @ weight.to(kind).T
    return torch.where((rows >= 0)[:, None], out, 0.0).to(x.dtype)
