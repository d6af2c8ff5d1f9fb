"""`fsmn` in Triton: a program for a block of time steps and a block of channels.

Only the first time block reads the carry (its length is at least the number of taps to the left), so it is also the one
that writes the new carry, after its last read of the old one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, target


def run(v: Tensor, weight: Tensor, carry: Tensor | None, rows: Tensor, lengths: Tensor, right: int) -> Tensor:
    batch, items, dim = v.shape
    taps = weight.shape[2]
    out = torch.empty_like(v)
    left = taps - 1 - right
    side = tuning.bucket_of(max(left, 1))
    tile = tuning.config("fsmn", target(v), few=items <= 16)
    launch(
        _fsmn, (triton.cdiv(items, max(side, tile["BLOCK_T"])), triton.cdiv(dim, tile["BLOCK_C"]), batch),
        v, weight, carry, rows, lengths, out, items,
        DIM=dim, TAPS=taps, LEFT=left, SIDE=side, BLOCK_C=tile["BLOCK_C"], BLOCK_T=max(side, tile["BLOCK_T"]),
        num_warps=tile["num_warps"],
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["items"])
def _fsmn(
    v_ptr, weight_ptr, carry_ptr, rows_ptr, lengths_ptr, out_ptr, items,
    DIM: tl.constexpr, TAPS: tl.constexpr, LEFT: tl.constexpr, SIDE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(2).to(tl.int64)
    row = tl.load(rows_ptr + entry)
    count = tl.where(row >= 0, tl.load(lengths_ptr + entry), 0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    mine, base = c < DIM, row.to(tl.int64) * LEFT

    out = tl.load(v_ptr + (entry * items + t) * DIM + c, mask=mine & (t < count), other=0.0).to(tl.float32)
    for tap in range(TAPS):
        s = t + tap - LEFT
        x = tl.load(v_ptr + (entry * items + s) * DIM + c, mask=mine & (s >= 0) & (s < count), other=0.0)
        if carry_ptr is not None:
            x += tl.load(carry_ptr + (base + LEFT + s) * DIM + c, mask=mine & (s < 0) & (row >= 0), other=0.0)
        tap_weight = tl.load(weight_ptr + c * TAPS + tap, mask=mine, other=0.0)
        out += x.to(tl.float32) * tap_weight.to(tl.float32)
    out = tl.where(t < count, out, 0.0)
    tl.store(out_ptr + (entry * items + t) * DIM + c, out, mask=mine & (t < items))

    if carry_ptr is not None:
        if LEFT > 0:
            if tl.program_id(0) == 0:
                slot = tl.arange(0, SIDE)[:, None]
                s = count + slot - LEFT
                kept = mine & (slot < LEFT) & (row >= 0)
                new = tl.load(v_ptr + (entry * items + s) * DIM + c, mask=kept & (s >= 0), other=0.0)
                new += tl.load(carry_ptr + (base + LEFT + s) * DIM + c, mask=kept & (s < 0), other=0.0)
                tl.debug_barrier()
                tl.store(carry_ptr + (base + slot) * DIM + c, new, mask=kept)
