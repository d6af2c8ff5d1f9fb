"""`fsq_encode` in Triton: projection, tanh, rounding and packing for a block of frames in one program."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, lookup_table, target, triton_dtype
from minmo_kernels.ops.fsq_encode.reference import SHRINK


def run(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, lengths: Tensor, levels: list[int]) -> Tensor:
    batch, frames, dim = x.shape
    ids = x.new_empty((batch, frames), dtype=torch.int32)
    tile = tuning.config("fsq_encode", target(x))
    launch(
        _fsq_encode, (triton.cdiv(frames, 16), batch, 1),
        x, weight, bias, rows, lengths, lookup_table(_levels, tuple(levels), device=x.device), ids, frames,
        DIM=dim, DIGITS=len(levels), WIDTH=max(16, tuning.bucket_of(len(levels))), SHRINK=SHRINK, BLOCK_T=16,
        DOT=triton_dtype(x.dtype), **tile,
    )  # fmt: skip
    return ids


@functools.cache
def _levels(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """Levels and place values of the digits. (2, digits) int32"""
    places = [math.prod(levels[:i]) for i in range(len(levels))]
    return torch.tensor([levels, places], dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["frames"])
def _fsq_encode(
    x_ptr, weight_ptr, bias_ptr, rows_ptr, lengths_ptr, levels_ptr, ids_ptr, frames,
    DIM: tl.constexpr, DIGITS: tl.constexpr, WIDTH: tl.constexpr, SHRINK: tl.constexpr, BLOCK_T: tl.constexpr,
    DOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1).to(tl.int64)
    count = tl.where(tl.load(rows_ptr + entry) >= 0, tl.load(lengths_ptr + entry), 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, WIDTH)
    features = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        exists = (t < count)[:, None] & (k < DIM)[None, :]
        x = tl.load(x_ptr + (entry * frames + t)[:, None] * DIM + k[None, :], mask=exists, other=0.0)
        taken = (k < DIM)[:, None] & (j < DIGITS)[None, :]
        weight = tl.load(weight_ptr + j[None, :] * DIM + k[:, None], mask=taken, other=0.0)
        features = tl.dot(x.to(DOT), weight.to(DOT), features, input_precision="ieee")
    features += tl.load(bias_ptr + j, mask=j < DIGITS, other=0.0).to(tl.float32)[None, :]

    # tanh by exp(-2|h|), which cannot overflow; halves round to even by adding and taking away 1.5 x 2^23.
    decay = tl.exp(-2.0 * tl.abs(features))
    magnitude = (1.0 - decay) / (1.0 + decay)
    squashed = tl.where(features < 0.0, -magnitude, magnitude)
    level = tl.load(levels_ptr + j, mask=j < DIGITS, other=1)
    half = (level - 1) // 2
    digit = (squashed * SHRINK * half.to(tl.float32)[None, :] + 12582912.0) - 12582912.0
    digit = digit.to(tl.int32) + half[None, :]
    place_value = tl.load(levels_ptr + DIGITS + j, mask=j < DIGITS, other=0)
    ids = tl.sum(digit * place_value[None, :], axis=1)
    tl.store(ids_ptr + entry * frames + t, tl.where(t < count, ids, 0), mask=t < frames)
