"""`append_kv` in plain PyTorch, and the rotary embedding that other references share."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(
    qkv: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    heads: int,
    kv_heads: int,
    rope_theta: float,
    rope: bool,
    ring: bool,
) -> Tensor:
    batch, items, _ = qkv.shape
    capacity, dim = k_cache.shape[1], k_cache.shape[3]
    count = torch.full_like(rows, items) if q_lengths is None else q_lengths
    step = torch.arange(items, device=qkv.device)
    exists = (step < count[:, None]) & (rows >= 0)[:, None]
    position = lengths[rows.clamp(min=0).long()][:, None] + step

    packed = torch.where(exists[:, :, None], qkv, 0.0).to(compute_dtype(qkv.dtype))
    if bias is not None:
        packed = packed + bias
    q, k, v = packed.unflatten(2, (-1, dim)).split([heads, kv_heads, kv_heads], dim=2)
    if rope:
        q, k = rotate(q, position, rope_theta), rotate(k, position, rope_theta)

    slot = (position % capacity if ring else position)[exists].long()
    row = rows[:, None].expand_as(exists)[exists].long()
    for x, cache, scale in ((k[exists], k_cache, k_scale), (v[exists], v_cache, v_scale)):
        if scale is not None:
            step = x.abs().amax(dim=-1) / 127
            scale[row, slot] = step.to(scale.dtype)
            x = torch.round(x / torch.where(step > 0, step, 1.0)[..., None])
        cache[row, slot] = x.to(cache.dtype)
    return torch.where(exists[:, :, None, None], q, 0.0).to(qkv.dtype)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding, half-split pairs. x (batch, T, heads, dim), position (batch, T).

    The angle is computed in fp64: in fp32 it would be off by position x 6e-8, which grows with a conversation.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position.double()[..., None] * frequency)[:, :, None]
    cos, sin = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
