"""`fsq_encode` in plain PyTorch, and the grid of codes that it shares with its tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype

SHRINK = 0.9990000128746033
"""Keeps tanh's limits inside the outermost cells; the fp32 value of the released tokenizer."""


def reference(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, lengths: Tensor, levels: Sequence[int]) -> Tensor:
    exists = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]) & (rows >= 0)[:, None]
    wide = torch.where(exists[:, :, None], x, 0.0).to(compute_dtype(x.dtype))
    features = torch.nn.functional.linear(wide, weight.to(wide.dtype), bias.to(wide.dtype))
    half = (torch.tensor(levels, device=x.device) - 1) // 2
    digits = torch.round(torch.tanh(features) * SHRINK * half) + half
    ids = (digits.long() * place_values(levels, x.device)).sum(dim=-1)
    return torch.where(exists, ids, 0).to(torch.int32)


def place_values(levels: Sequence[int], device: torch.device) -> Tensor:
    """What one step of each digit adds to the id: 1, L_0, L_0 L_1, … -> (n,) int64"""
    return torch.tensor([math.prod(levels[:j]) for j in range(len(levels))], device=device)


def fsq_centres(ids: Tensor, levels: Sequence[int]) -> Tensor:
    """Projected features (before tanh) that lie well inside each code's cell. ids (...) -> (..., n) fp32.

    Quantising them gives `ids` again: the value of digit d of L levels is atanh(0.999 (2d / (L-1) - 1)).
    """
    sizes = torch.tensor(levels, device=ids.device)
    digits = ids.long()[..., None] // place_values(levels, ids.device) % sizes
    return torch.atanh(0.999 * (2.0 * digits / (sizes - 1) - 1.0))
