"""Finite scalar quantisation: encoder frames to speech-token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Fault, Op, Rule, check, check_counts, check_tensor, checked_rows
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.fsq_encode.reference import fsq_centres, reference

__all__ = ["fsq_centres", "fsq_encode"]


def fsq_encode(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, lengths: Tensor, *, levels: Sequence[int]
) -> Tensor:
    """Projects each frame to n numbers, rounds each to one of its levels and packs the digits into one id.

    With h = x weight^T + bias, digit_j = round(0.999 tanh(h_j) (L_j - 1) / 2) + (L_j - 1) / 2 (halves to even) and
    id = sum_j digit_j L_0 ... L_{j-1}: digit 0 is the least significant. Computed in fp32 (fp64 stays fp64).

    Shapes: x (batch, T, dim); weight (n, dim) and bias (n,) in x's dtype; rows (batch,) int32, -1 = padding; lengths
    (batch,) int32, valid frames of each entry; levels: n odd integers >= 3 whose product fits int32. Returns ids
    (batch, T) int32, in 0 .. prod(levels) - 1, zeros for padding entries and beyond a length.

    Raises ValueError for shapes, dtypes, devices or levels that do not fit, and on a CPU for NaN in valid frames;
    elsewhere such a frame's id is undefined.
    Source: Mentzer et al., arXiv 2309.15505; with these constants, CosyVoice 2 (arXiv 2412.10117, section 2.2).
    """
    name = "fsq_encode"
    check_tensor(name, "x", x, "batch T dim", x.device, *FLOATS)
    check_tensor(name, "weight", weight, "n dim", x.device, x.dtype)
    check_tensor(name, "bias", bias, "n", x.device, x.dtype)
    check_tensor(name, "rows", rows, "batch", x.device, torch.int32)
    check_tensor(name, "lengths", lengths, "batch", x.device, torch.int32)
    check(weight.shape[1] == x.shape[2], lambda: f"{name}: weight has {weight.shape[1]} columns for {x.shape[2]} of x")
    check(bias.shape[0] == weight.shape[0], lambda: f"{name}: weight and bias differ in their number of rows")
    check(len(rows) == len(x), lambda: f"{name}: rows has {len(rows)} entries, x {len(x)}")
    counts = check_counts(name, "lengths", lengths, len(x), x.shape[1])
    check(len(levels) == weight.shape[0], lambda: f"{name}: {len(levels)} levels for {weight.shape[0]} digits")
    check(
        all(n >= 3 and n % 2 == 1 for n in levels), lambda: f"{name}: levels must be odd and at least 3, got {levels}"
    )
    check(math.prod(levels) < 2**31, lambda: f"{name}: {math.prod(levels)} codes do not fit int32")
    lost: Rule = (
        Fault.NUMBER,
        lambda _: (x.isnan().any(dim=2) & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])).any(dim=1),
        lambda entry: f"entry {entry} of x holds NaN; look for the overflow in the model that made it",
    )
    rows = checked_rows(name, rows, None, counts, lost)
    return OP(x, weight, bias, rows, lengths, list(levels))


OP = Op(
    "fsq_encode",
    "(Tensor x, Tensor weight, Tensor bias, Tensor rows, Tensor lengths, int[] levels) -> Tensor",
    reference=reference,
    fake=lambda x, weight, bias, rows, lengths, levels: x.new_empty(x.shape[:2], dtype=torch.int32),
    features=lambda x, weight, bias, rows, lengths, levels: {"digits": len(levels)},
    backends=(triton_backend("fsq_encode"),),
)
