"""`rms_norm_qkv_rope_append` in plain PyTorch, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.ops.append_kv.reference import reference as append_reference
from minmo_kernels.ops.linear_residual.reference import dequantised
from minmo_kernels.ops.rms_norm.reference import normalise


def reference(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    weight_scale: Tensor | None,
    weight_zero: Tensor | None,
    heads: int,
    kv_heads: int,
    eps: float,
    rope_theta: float,
    ring: bool,
) -> Tensor:
    normed = normalise(torch.where((rows >= 0)[:, None], x, 0.0), norm_weight, eps)
    qkv = normed @ dequantised(qkv_weight, weight_scale, weight_zero, normed.dtype).T
    q = append_reference(
        qkv[:, None], qkv_bias, k_cache, v_cache, rows, lengths, None, None, None, heads, kv_heads, rope_theta, True,
        ring,
    )  # fmt: skip
    return q[:, 0].to(x.dtype)
