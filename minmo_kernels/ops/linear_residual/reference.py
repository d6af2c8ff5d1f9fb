"""`linear_residual` in plain PyTorch, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
) -> Tensor:
    kind = compute_dtype(x.dtype)
    out = x.to(kind) @ dequantised(weight, weight_scale, weight_zero, kind).T
    if residual is not None:
        out = residual.to(kind) + out
    return torch.where((rows >= 0)[:, None], out, 0.0).to(x.dtype)


def dequantised(weight: Tensor, scale: Tensor | None, zero: Tensor | None, kind: torch.dtype) -> Tensor:
    """A weight of any format of `linear_residual` in the compute dtype."""
    if scale is None:
        return weight.to(kind)
    if zero is None:
        return weight.to(kind) * scale.to(kind)[:, None]
    words = weight.unflatten(1, (-1, 4, 4)).transpose(2, 3)  # (dim_out, dim_in / 32, byte of a word, word)
    numbers = torch.stack([words & 15, words >> 4], dim=3).to(kind).reshape(*scale.shape, -1)
    return ((numbers - zero.to(kind)[..., None]) * scale.to(kind)[..., None]).flatten(1)
