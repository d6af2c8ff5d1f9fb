"""The feed-forward sequential memory of SAN-M attention: a depthwise convolution over time, plus its input."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, check, check_counts, check_tensor, checked_rows
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.fsmn.reference import reference


def fsmn(v: Tensor, weight: Tensor, carry: Tensor | None, rows: Tensor, lengths: Tensor, *, right: int = 0) -> Tensor:
    """v plus a depthwise convolution of v over time, continued from each session's last items.

    out[b, t, c] = v[b, t, c] + sum_j weight[c, 0, j] x[b, t + j - left, c] with left = k - 1 - right, where x is the
    session's carry before t = 0, v within the length, and zeros after it. Computed in fp32 (fp64 stays fp64).

    Shapes: v (batch, T, dim), T >= 1; weight (dim, 1, k) in v's dtype; carry (sessions, left, dim) in v's dtype, the
    last `left` items of each session, updated in place, or None for zeros that are not kept; rows (batch,) int32, -1 =
    padding; lengths (batch,) int32, new items of each entry. right: taps on later items, 0 .. k - 1. Returns
    (batch, T, dim) in v's dtype, zeros for padding entries and beyond a length.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    Source: Gao et al., SAN-M, arXiv 2006.01713, on the values as in SenseVoice (arXiv 2407.04051).
    """
    name = "fsmn"
    check_tensor(name, "v", v, "batch T dim", v.device, *FLOATS)
    check_tensor(name, "weight", weight, "dim one k", v.device, v.dtype)
    check_tensor(name, "rows", rows, "batch", v.device, torch.int32)
    check_tensor(name, "lengths", lengths, "batch", v.device, torch.int32)
    batch, items, dim = v.shape
    taps = weight.shape[2]
    check(items >= 1, lambda: f"{name}: v has no items; give at least one and say with lengths which are valid")
    check(weight.shape[:2] == (dim, 1), lambda: f"{name}: weight must be ({dim}, 1, k), got {tuple(weight.shape)}")
    check(0 <= right < taps, lambda: f"{name}: right must be in 0 .. {taps - 1}, got {right}")
    check(len(rows) == batch, lambda: f"{name}: rows has {len(rows)} entries, v {batch}")
    counts = check_counts(name, "lengths", lengths, batch, items)
    if carry is not None:
        check_tensor(name, "carry", carry, "sessions left dim", v.device, v.dtype)
        check(
            carry.shape[1:] == (taps - 1 - right, dim),
            lambda: f"{name}: carry must be (sessions, {taps - 1 - right}, {dim}), got {tuple(carry.shape)}",
        )
    rows = checked_rows(name, rows, None if carry is None else len(carry), counts)
    return OP(v, weight, carry, rows, lengths, right)


OP = Op(
    "fsmn",
    "(Tensor v, Tensor weight, Tensor(a!)? carry, Tensor rows, Tensor lengths, int right) -> Tensor",
    reference=reference,
    fake=lambda v, weight, carry, rows, lengths, right: v.new_empty(v.shape),
    features=lambda v, weight, carry, rows, lengths, right: {"taps": weight.shape[2], "carry": carry is not None},
    backends=(triton_backend("fsmn"),),
)
