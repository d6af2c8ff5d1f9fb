"""`rms_norm` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(x: Tensor, weight: Tensor, rows: Tensor | None, eps: float) -> Tensor:
    out = normalise(x, weight, eps)
    if rows is not None:
        out = torch.where((rows >= 0).reshape(-1, *[1] * (x.dim() - 1)), out, 0.0)
    return out.to(x.dtype)


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in the compute dtype, for operations that begin with one."""
    wide = x.to(compute_dtype(x.dtype))
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight
