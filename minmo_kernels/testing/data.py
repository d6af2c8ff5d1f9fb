"""Seeded tensors for cases, and NaN wherever an operation must not look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def generator(case: Any) -> torch.Generator:
    """The generator of a case: seeded by its `seed`."""
    return torch.Generator().manual_seed(case["seed"])


def normal(g: torch.Generator, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
    """Normal values drawn in fp32 and rounded to `dtype`."""
    return (torch.randn(*shape, generator=g) * scale).to(getattr(torch, dtype))


def random_rows(g: torch.Generator, batch: int, sessions: int, *, padding: bool = True) -> Tensor:
    """Distinct session rows for a batch, one entry of it padding (-1) where `padding` and batch > 1. (batch,) int32"""
    rows = torch.randperm(sessions, generator=g)[:batch].to(torch.int32)
    if padding and batch > 1:
        rows[torch.randint(batch, (1,), generator=g)] = -1
    return rows


def beyond_lengths_nan(x: Tensor, lengths: Tensor) -> Tensor:
    """x (batch, items, ...) with NaN from each length on (integers: a huge id)."""
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    inside = inside.reshape(*inside.shape, *[1] * (x.dim() - 2))
    poison = float("nan") if x.is_floating_point() else 2**30
    return torch.where(inside, x, torch.tensor(poison, dtype=x.dtype))


def padding_nan(x: Tensor, rows: Tensor) -> Tensor:
    """x (batch, ...) with NaN in its padding entries (rows -1)."""
    return torch.where((rows >= 0).reshape(-1, *[1] * (x.dim() - 1)), x, torch.tensor(float("nan"), dtype=x.dtype))


def outputs(result: Any) -> tuple[Tensor, ...]:
    """An operation's result as a tuple of tensors."""
    return tuple(result) if isinstance(result, tuple) else (result,)


def maybe_int8(name: str, weight: Tensor, int8: bool) -> dict[str, Tensor]:
    """The arguments of a weight (dim_out, dim_in): itself, or rounded to int8 with a scale a row (`weight_scale`)."""
    if not int8:
        return {name: weight}
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127
    return {name: (weight.float() / scale[:, None]).round().to(torch.int8), "weight_scale": scale}


def dequantised(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight in fp64, for oracles."""
    return weight.double() if scale is None else weight.double() * scale.double()[:, None]


def weight_bytes(case: Any, dim_out: int, dim_in: int) -> int:
    """What a case's weight occupies."""
    return dim_out * (dim_in + 4) if case["int8"] else dim_out * dim_in * getattr(torch, case["dtype"]).itemsize
