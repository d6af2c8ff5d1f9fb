"""Linear layers for serving: weights packed once, in 32, 16, 8 or 4 bits.

On a CPU the products are PyTorch's own: oneDNN's on reordered weights for fp32 and bf16, and the weight-only int8 and
int4 ones, which take bf16 activations. On a GPU `minmo_kernels.linear_residual` takes int8 and int4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.state import all_rows
from minmo_kernels import quantise

WEIGHTS = ("fp32", "bf16", "int8", "int4")
"""Formats of a served model's weights. With int8 and int4, activations, embeddings and norms are bf16."""
INT4_GROUP = 32
"""Inputs that share an int4 scale and zero point; int8 takes multiples of it, too (PyTorch's int8 product reads beyond
its weight where 16 does not divide the inputs)."""
INT4_OUTPUTS = 16
"""PyTorch's int4 product takes multiples of so many outputs."""
MOST_INT8_ROWS = 8
"""Rows up to which a CPU's int8 product, which costs the same again for every row, beats one with numbers that are
turned to bf16 first (one core, AVX-512: the two meet between 8 and 16)."""
SMALLEST_REORDERED = 1 << 18
"""Weights from which oneDNN's reordered product beats PyTorch's plain one, whose call costs less."""
MOST_KERNEL_ROWS = 64
"""Rows that `linear_residual` takes at once."""


def activations(weights: str) -> torch.dtype:
    """The dtype of activations, embeddings and norms beside weights of a format."""
    return torch.float32 if weights == "fp32" else torch.bfloat16


def packed(linear: nn.Linear, weights: str) -> nn.Module:
    """A layer that computes what `linear` does, for inference, with its weight in a format of WEIGHTS.

    int8 and int4 need inputs that INT4_GROUP divides: other layers are kept in bf16.
    """
    if weights in ("int8", "int4") and linear.in_features % INT4_GROUP:
        weights = "bf16"
    if weights in ("int8", "int4"):
        if not linear.weight.is_cpu:
            return KernelLinear(linear, weights)
        return Int8Linear(linear) if weights == "int8" else Int4Linear(linear)
    linear = linear.to(activations(weights))
    if linear.weight.is_cpu and linear.weight.numel() >= SMALLEST_REORDERED and _reorders(linear.weight.dtype):
        return ReorderedLinear(linear)
    return linear


class ReorderedLinear(nn.Module):
    """A full-precision weight in oneDNN's own order, on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
        self.bias = _bias(linear, linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) in the weight's dtype -> (..., outputs)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """int8 numbers (outputs, inputs) and a bf16 scale an output, on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.numbers, self.scale = quantise.int8(linear.weight.detach(), torch.bfloat16)
        self.bias = _bias(linear, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) bf16 -> (..., outputs)."""
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > MOST_INT8_ROWS:
            wide = x.dtype if _reorders(x.dtype) else torch.float32  # where a CPU computes faster
            y = (F.linear(flat.to(wide), self.numbers.to(wide)) * self.scale).to(x.dtype)
        else:
            y = torch._weight_int8pack_mm(flat, self.numbers, self.scale)
        return _biased(y, self.bias).reshape(*x.shape[:-1], y.shape[1])


class Int4Linear(nn.Module):
    """int4 numbers in the order of PyTorch's CPU product, a bf16 scale and offset for INT4_GROUP inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.outputs = linear.out_features
        weight = F.pad(linear.weight.detach().to(torch.bfloat16), (0, 0, 0, -self.outputs % INT4_OUTPUTS))
        numbers, scale, zero = quantise.int4(weight, INT4_GROUP)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        # The product takes (number - 8) * scale + offset; (groups, outputs, 2).
        offset = (8 - zero.float()) * scale.float()
        self.scale_and_offset = torch.stack([scale.float(), offset], dim=2).transpose(0, 1).to(torch.bfloat16)
        self.scale_and_offset = self.scale_and_offset.contiguous()
        self.bias = _bias(linear, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) bf16 -> (..., outputs)."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, INT4_GROUP, self.scale_and_offset)
        return _biased(y[:, : self.outputs], self.bias).reshape(*x.shape[:-1], self.outputs)


class KernelLinear(nn.Module):
    """int8 or int4 weights as `minmo_kernels.linear_residual` takes them, on any device."""

    def __init__(self, linear: nn.Linear, weights: str) -> None:
        super().__init__()
        weight = linear.weight.detach().to(torch.bfloat16)
        self.zero: Tensor | None = None
        if weights == "int8":
            self.weight, self.scale = quantise.int8(weight, torch.float32)
        else:
            numbers, self.scale, self.zero = quantise.int4(weight, INT4_GROUP)
            self.weight = quantise.int4_words(numbers)
        self.bias = _bias(linear, torch.bfloat16)

    @property
    def arguments(self) -> dict[str, Any]:
        """The weight as the fused operations take it."""
        return {"weight_scale": self.scale, "weight_zero": self.zero}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) bf16 -> (..., outputs)."""
        pieces = [
            mk.linear_residual(piece, self.weight, None, all_rows(len(piece), x.device), **self.arguments)
            for piece in x.reshape(-1, x.shape[-1]).split(MOST_KERNEL_ROWS)
        ]
        y = torch.cat(pieces)
        return _biased(y, self.bias).reshape(*x.shape[:-1], y.shape[1])


def _reorders(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN computes in a dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _bias(linear: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().to(dtype)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias
