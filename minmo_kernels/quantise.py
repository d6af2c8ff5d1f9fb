"""Weights in fewer bits: the formats of a decode step's projections (`linear_residual` says what each holds).

Round to nearest, nothing learned: int8 with one scale an output, int4 with a scale and a zero point for a group of
inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("full", "int8", "int4 g32", "int4 g64", "int4 g128")
"""The activations' dtype; int8 with a scale a row; int4 with a scale and a zero point a group of so many inputs."""


def group_of(form: str) -> int:
    """Inputs that share a scale in an int4 format; 1 for the others, which any width suits."""
    return int(form.split("g")[1]) if form.startswith("int4") else 1


def int8(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """weight (dim_out, dim_in) -> numbers int8, scale (dim_out,): weight = numbers * scale[:, None]."""
    scale = (weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127).to(scale_dtype)
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight (dim_out, dim_in) -> numbers 0 .. 15 (dim_out, dim_in) uint8, scale and zero (dim_out, dim_in / group) in
    weight's dtype: weight = (numbers - zero) * scale, by groups."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low).clamp(min=1e-5) / 15).to(weight.dtype)
    zero = (-low / scale.float()).to(weight.dtype)
    numbers = (groups / scale.float()[..., None] + zero.float()[..., None]).round().clamp(0, 15)
    return numbers.to(torch.uint8).flatten(1), scale, zero


def int4_words(numbers: Tensor) -> Tensor:
    """Numbers of `int4` (dim_out, dim_in) in the kernels' layout, two a byte: (dim_out, dim_in / 2) uint8."""
    even, odd = numbers.unflatten(1, (-1, 4, 2, 4)).transpose(2, 4).unbind(3)
    return (even | odd << 4).flatten(1)
