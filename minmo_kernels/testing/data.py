"""Seeded tensors for cases, and NaN wherever an operation must not look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minmo_kernels import quantise
from minmo_kernels.quantise import FORMATS, group_of


def generator(case: Any) -> torch.Generator:
    """The generator of a case: seeded by its `seed`."""
    return torch.Generator().manual_seed(case["seed"])


def normal(g: torch.Generator, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
    """Normal values drawn in fp32 and rounded to `dtype`."""
    return (torch.randn(*shape, generator=g) * scale).to(getattr(torch, dtype))


def random_rows(g: torch.Generator, batch: int, sessions: int, case: Any) -> Tensor:
    """Distinct session rows for a batch, one entry of it padding (-1) where batch > 1 and the case is not `filled`.
    (batch,) int32"""
    rows = torch.randperm(sessions, generator=g)[:batch].to(torch.int32)
    if batch > 1 and not case.get("filled"):
        rows[torch.randint(batch, (1,), generator=g)] = -1
    return rows


def random_counts(g: torch.Generator, batch: int, most: int, case: Any) -> Tensor:
    """Numbers from 0 to `most`, all of them `most` in a case that is `filled`. (batch,) int32"""
    if case.get("filled"):
        return torch.full((batch,), most, dtype=torch.int32)
    return torch.randint(0, most + 1, (batch,), generator=g, dtype=torch.int32)


def beyond_lengths_nan(x: Tensor, lengths: Tensor) -> Tensor:
    """x (batch, items, ...) with NaN from each length on (integers: a huge id)."""
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    inside = inside.reshape(*inside.shape, *[1] * (x.dim() - 2))
    poison = float("nan") if x.is_floating_point() else min(2**30, torch.iinfo(x.dtype).max)
    return torch.where(inside, x, torch.tensor(poison, dtype=x.dtype))


def padding_nan(x: Tensor, rows: Tensor) -> Tensor:
    """x (batch, ...) with NaN in its padding entries (rows -1)."""
    return torch.where((rows >= 0).reshape(-1, *[1] * (x.dim() - 1)), x, torch.tensor(float("nan"), dtype=x.dtype))


def outputs(result: Any) -> tuple[Tensor, ...]:
    """An operation's result as a tuple of tensors."""
    return tuple(result) if isinstance(result, tuple) else (result,)


BUCKETS = (
    *({"batch": batch, "weights": form} for batch in (2, 64) for form in ("full", "int8", "int4 g32")),
    {"batch": 32, "weights": "full"},
    *({"batch": batch, "weights": "full", "dtype": "float32"} for batch in (2, 8)),
)
"""Variants of the projections' cases: buckets that have a launch configuration or a tile of their own."""


def formats_of(width: int) -> list[str]:
    """The formats that a model's projection of so many inputs has: int4 in the largest groups that divide it."""
    groups = [form for form in reversed(FORMATS) if form.startswith("int4") and width % group_of(form) == 0]
    return ["full", "int8", *groups[:1]]


def quantised(name: str, weight: Tensor, form: str) -> dict[str, Tensor]:
    """The arguments of a weight (dim_out, dim_in) in a format: itself, or rounded, with `weight_scale` and for int4
    `weight_zero`."""
    if form == "full":
        return {name: weight}
    if form == "int8":
        numbers, scale = quantise.int8(weight)
        return {name: numbers, "weight_scale": scale}
    numbers, scale, zero = quantise.int4(weight, group_of(form))
    return {name: quantise.int4_words(numbers), "weight_scale": scale, "weight_zero": zero}


def dequantised(weight: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """A weight in fp64, for oracles: number by number, two to a byte in int4."""
    if scale is None:
        return weight.double()
    if zero is None:
        return weight.double() * scale.double()[:, None]
    numbers = torch.empty(weight.shape[0], 2 * weight.shape[1], dtype=torch.float64)
    for at in range(weight.shape[1]):
        piece, word, byte = at // 16, at // 4 % 4, at % 4
        column = 32 * piece + 8 * byte + word
        numbers[:, column], numbers[:, column + 4] = weight[:, at].double() % 16, weight[:, at].double() // 16
    each = numbers.shape[1] // scale.shape[1]
    scale, zero = (x.double().repeat_interleave(each, dim=1) for x in (scale, zero))
    return (numbers - zero) * scale


def weight_bytes(case: Any, dim_out: int, dim_in: int) -> int:
    """What a case's weight occupies."""
    size = getattr(torch, case["dtype"]).itemsize
    if case["weights"] == "full":
        return dim_out * dim_in * size
    if case["weights"] == "int8":
        return dim_out * (dim_in + 4)
    return dim_out * (dim_in // 2 + 2 * size * (dim_in // group_of(case["weights"])))


def quantised_cache(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A cache (sessions, capacity, kv_heads, dim) as int8 and its scales (sessions, capacity, kv_heads)."""
    scale = cache.float().abs().amax(dim=-1) / 127
    return (cache.float() / scale[..., None]).round().to(torch.int8), scale


def dequantised_cache(cache: Tensor, scale: Tensor | None) -> Tensor:
    """What a cache means, in fp64; a new tensor."""
    return cache.double() if scale is None else cache.double() * scale.double()[..., None]
