"""`gate_up_swiglu` in plain PyTorch, rounded once at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo_kernels.ops.linear_residual.reference import dequantised
from minmo_kernels.ops.rms_norm.reference import normalise


def reference(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    rows: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    eps: float,
) -> Tensor:
    normed = normalise(torch.where((rows >= 0)[:, None], x, 0.0), norm_weight, eps)
    gate, up = (normed @ dequantised(weight, weight_scale, weight_zero, normed.dtype).T).unflatten(1, (-1, 2)).unbind(2)
    return (F.silu(gate) * up).to(x.dtype)
