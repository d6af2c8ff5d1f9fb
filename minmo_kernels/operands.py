"""Weights of few rows' products as operands of the tensor cores, in the registers that they were loaded to.

Tensor cores multiply 16 weight rows by up to 8 input rows, one instruction for 8 weights a thread, however many input
rows. What they ask is which thread holds which weight: of a row's sixteen inputs, thread t of four holds numbers
2t, 2t + 1, 2t + 8 and 2t + 9. A sum has no order, so here a thread keeps the 16 neighbouring bytes that it loads, and
the inputs are put in the order that this implies (`order_inputs`). Packed weights become 16-bit numbers by masks alone,
two at a time: a number in the lowest bits of a large power of two's pattern is that power plus the number, exactly.

A piece is what four threads load of a row, 64 bytes: 32, 64 or 128 inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pieces(
    weight_ptr, n, start,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n (BLOCK_N,), inputs start ... of a weight (DIM_OUT, DIM) of BITS each -> (BLOCK_N / 8, pieces, 8, items),
    rows in order of the first and the third axis. Items are weights of 16 bits, else words of 32; zeros beyond."""
    pieces: tl.constexpr = BLOCK_K * BITS // 512
    per_item: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    items: tl.constexpr = 64 // (2 if BITS == 16 else 4)
    row = tl.reshape(n, (n.shape[0] // 8, 1, 8, 1))
    at = start // per_item + tl.arange(0, pieces)[None, :, None, None] * items + tl.arange(0, items)[None, None, None]
    inside = (row < DIM_OUT) & ((at < DIM // per_item) | (DIM % BLOCK_K == 0))
    if BITS < 16:
        weight_ptr = weight_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    return tl.load(weight_ptr + row.to(tl.int64) * (DIM // per_item) + at, mask=inside, other=0)


@triton.jit
def full_operand(weight, SPLIT: tl.constexpr):
    """Weights of `load_pieces` -> (SPLIT, BLOCK_N, BLOCK_K / SPLIT), pieces dealt out to SPLIT sums."""
    outer: tl.constexpr = weight.shape[0]
    blocks: tl.constexpr = weight.shape[1] // SPLIT
    weight = tl.permute(tl.reshape(weight, (outer, blocks, SPLIT, 8, 4, 2, 2, 2)), (2, 0, 3, 1, 5, 6, 4, 7))
    return tl.reshape(weight, (SPLIT, outer * 8, blocks * 32))


@triton.jit
def powers(batch, DOT: tl.constexpr):
    """2^e, the least power of two whose numbers of DOT count in ones, twice in a word. e is 7 in bf16, 10 in fp16.

    The batch, which is never negative, only hides from the compiler that this is a constant: a mask and a bit pattern
    are one instruction where one of them is in a register, and two where both are constants.
    """
    power: tl.constexpr = 0x43004300 if DOT == tl.bfloat16 else 0x64006400
    return (power + tl.minimum(batch, 0)).to(tl.uint32)


@triton.jit
def int8_operands(words, power, DOT: tl.constexpr, SPLIT: tl.constexpr):
    """Words of an int8 weight -> two operands (SPLIT, BLOCK_N, BLOCK_K / SPLIT) in DOT whose sum the weights are: 2^e
    plus a number's lower seven bits, and -2^e or, of a negative one, -2^e - 128. power: see `powers`."""
    outer: tl.constexpr = words.shape[0]
    blocks: tl.constexpr = words.shape[1] // SPLIT
    words = words[:, :, :, :, None] >> (tl.arange(0, 2) * 8)
    low = _halves((words & 0x007F007F) | power, DOT)
    sign = _halves((words & 0x00800080) | (power | 0x80008000), DOT)
    low = tl.permute(tl.reshape(low, (outer, blocks, SPLIT, 8, 4, 4, 2, 2)), (2, 0, 3, 1, 5, 4, 6, 7))
    sign = tl.permute(tl.reshape(sign, (outer, blocks, SPLIT, 8, 4, 4, 2, 2)), (2, 0, 3, 1, 5, 4, 6, 7))
    return (
        tl.reshape(low, (SPLIT, outer * 8, blocks * 64)),
        tl.reshape(sign, (SPLIT, outer * 8, blocks * 64)),
    )


@triton.jit
def int4_operand(words, power, DOT: tl.constexpr):
    """Words of an int4 weight (`linear_residual` tells their order) -> (pieces, BLOCK_N, 128) in DOT, 2^e too large.
    power: see `powers`."""
    outer: tl.constexpr = words.shape[0]
    pieces: tl.constexpr = words.shape[1]
    words = words[:, :, :, :, None] >> (tl.arange(0, 4) * 4)
    numbers = tl.reshape(_halves((words & 0x000F000F) | power, DOT), (outer, pieces, 8, 4, 4, 2, 2, 2))
    return tl.reshape(tl.permute(numbers, (1, 0, 2, 4, 5, 3, 6, 7)), (pieces, outer * 8, 128))


@triton.jit
def order_inputs(x, BITS: tl.constexpr, SPLIT: tl.constexpr):
    """Inputs x (rows, BLOCK_K), for weights of BITS each -> (SPLIT, BLOCK_K / SPLIT, 8), in the order of the operands'
    columns and repeated to eight rows."""
    rows: tl.constexpr = x.shape[0]
    per_sum: tl.constexpr = x.shape[1] // SPLIT
    blocks: tl.constexpr = per_sum * BITS // 512
    if BITS == 16:
        x = tl.permute(tl.reshape(x, (rows, blocks, SPLIT, 4, 2, 2, 2)), (2, 0, 1, 4, 5, 3, 6))
    elif BITS == 8:
        x = tl.permute(tl.reshape(x, (rows, blocks, SPLIT, 4, 4, 2, 2)), (2, 0, 1, 4, 3, 6, 5))
    else:
        x = tl.permute(tl.reshape(x, (rows, blocks, SPLIT, 4, 2, 2, 2, 4)), (2, 0, 1, 7, 5, 3, 6, 4))
    x = tl.broadcast_to(tl.reshape(x, (SPLIT, 1, rows, per_sum)), (SPLIT, 8 // rows, rows, per_sum))
    return tl.permute(tl.reshape(x, (SPLIT, 8, per_sum)), (0, 2, 1))


@triton.jit
def _halves(words, DOT: tl.constexpr):
    """The two halves of 32-bit words as numbers of DOT, along a new last axis; to the compiler the words themselves."""
    low = (words & 0xFFFF).to(tl.uint16).to(DOT, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.uint16).to(DOT, bitcast=True))
