"""`fsmn` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype


def reference(v: Tensor, weight: Tensor, carry: Tensor | None, rows: Tensor, lengths: Tensor, right: int) -> Tensor:
    batch, items, dim = v.shape
    kind = compute_dtype(v.dtype)
    left = weight.shape[2] - 1 - right
    count = torch.where(rows >= 0, lengths, 0)
    exists = (torch.arange(items, device=v.device) < count[:, None])[:, :, None]

    x = torch.where(exists, v, 0.0).to(kind)
    before = x.new_zeros(batch, left, dim)
    if carry is not None:
        before = torch.where((rows >= 0)[:, None, None], carry[rows.clamp(min=0).long()], 0.0).to(kind)
    joined = torch.cat([before, x], dim=1)
    padded = F.pad(joined.transpose(1, 2), [0, right])
    memory = F.conv1d(padded, weight.to(kind), groups=dim).transpose(1, 2)
    if carry is not None and left > 0:
        newest = count[:, None, None].long() + torch.arange(left, device=v.device)[:, None]
        kept = joined.gather(1, newest.expand(-1, -1, dim))
        carry[rows[rows >= 0].long()] = kept[rows >= 0].to(carry.dtype)
    return torch.where(exists, memory + x, 0.0).to(v.dtype).contiguous()
