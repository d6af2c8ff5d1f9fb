"""Pieces of kernels that several operations share, as `@triton.jit` functions over blocks.

They load, compute in fp32 and return; which block, and what happens to the result, is the caller's. Only `kernel.py`
files import this module: it needs triton.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from minmo_kernels.operands import full_operand, int4_operand, int8_operands, load_pieces, order_inputs, powers


@functools.cache
def rope_table(theta: float, dim: int, device: torch.device) -> torch.Tensor:
    """Rotary frequencies in turns a position, as 64-bit fixed-point fractions. (dim / 2,) int64

    position x frequency in wrapping 64-bit integers is the angle modulo a turn, exact at every position where a product
    in fp32 has long lost it.
    """
    turns = theta ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)) / (2 * math.pi)
    return (turns * 2.0**64).round().to(torch.int64).to(device)


@triton.jit
def rotation(position, frequency):
    """cos and sin of position x frequency; frequency: a block of `rope_table`, position: integer, broadcast.

    Series over an eighth of a turn to either side, below fp32's rounding: the library's functions would bring their
    reduction of large angles along, and with it local memory.
    """
    turn = ((position.to(tl.int64) * frequency) >> 32).to(tl.int32)  # in 2^-32 turns
    quadrant = (turn >> 29) + 1 >> 1
    x = (turn - (quadrant << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    y = x * x
    sin = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    cos = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    odd, negative = (quadrant & 1) != 0, (quadrant & 2) != 0
    cos, sin = tl.where(odd, -sin, cos), tl.where(odd, cos, sin)
    return tl.where(negative, -cos, cos), tl.where(negative, -sin, sin)


@triton.jit
def visible(query, key, window, chunk, left_chunks, chunk_offset, MASK: tl.constexpr):
    """The mask rule of `streaming_attention` on absolute positions, broadcast."""
    if MASK == "causal":
        see = (key <= query) & ((key > query - window) | (window == 0))
    elif MASK == "chunk":
        query_chunk = (query + chunk_offset) // chunk
        key_chunk = (key + chunk_offset) // chunk
        see = (key_chunk <= query_chunk) & ((key_chunk >= query_chunk - left_chunks) | (left_chunks < 0))
    else:
        see = (key == key) & (query == query)
    return see


@triton.jit
def first_visible(query, window, chunk, left_chunks, chunk_offset, MASK: tl.constexpr):
    """The lowest position that a query sees."""
    lowest = query * 0
    if MASK == "causal":
        lowest = tl.where(window > 0, tl.maximum(query - window + 1, 0), 0)
    elif MASK == "chunk":
        start = ((query + chunk_offset) // chunk - left_chunks) * chunk - chunk_offset
        lowest = tl.where(left_chunks >= 0, tl.maximum(start, 0), 0)
    return lowest


@triton.jit
def past_visible(query, end, chunk, chunk_offset, MASK: tl.constexpr):
    """One past the highest position that a query sees, `end` at most."""
    past = end
    if MASK == "causal":
        past = tl.minimum(end, query + 1)
    elif MASK == "chunk":
        past = tl.minimum(end, ((query + chunk_offset) // chunk + 1) * chunk - chunk_offset)
    return past


@triton.jit
def load_inputs(
    x_ptr, lse_ptr, norm_ptr, scale, m, active, start, parts,
    DIM: tl.constexpr, SOURCE: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of a projection's input in fp32, rows m (M, 1) where active (M, 1), columns start ... -> (M, BLOCK_K).

    SOURCE "plain": x (rows, DIM). "normed": x times `scale` (M, 1), the inverse root mean square, times the norm's
    weight. "merged": see `merge_parts`.
    """
    if SOURCE == "merged":
        x = merge_parts(x_ptr, lse_ptr, m, active, start, parts, DIM, HEAD_DIM, PARTS, BLOCK_K)
    else:
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64) * DIM + k, mask=active & (k < DIM), other=0.0).to(tl.float32)
        if SOURCE == "normed":
            x = x * scale * tl.load(norm_ptr + k, mask=k < DIM, other=0.0).to(tl.float32)
    return x


@triton.jit
def merge_parts(
    x_ptr, lse_ptr, m, active, start, parts,
    DIM: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns start ... of attention's unmerged parts x (rows, parts, DIM) fp32, merged by their log-sum-exp (rows,
    parts, heads) -> (M, BLOCK_K). PARTS: a power of two that is not below `parts`, so that all of them load at once.

    Four columns share a head, so shares are computed for each four and not for each column. Being a sum over an axis,
    it is computed once a program, and not by each thread that needs a column.
    """
    heads: tl.constexpr = DIM // HEAD_DIM
    part = tl.arange(0, PARTS)[None, :, None]
    four = start // 4 + tl.arange(0, BLOCK_K // 4)[None, None, :]
    read = active[:, :, None] & (part < parts) & (four < DIM // 4)
    at = m[:, :, None] * parts + part
    lse = tl.load(lse_ptr + at * heads + four * 4 // HEAD_DIM, mask=read, other=float("-inf"))
    top = tl.max(lse, axis=1)[:, None, :]
    share = tl.exp(lse - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(share, axis=1)[:, None, :]
    share = share / tl.where(total > 0.0, total, 1.0)
    place = at.to(tl.int64)[:, :, :, None] * DIM + four[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None]
    seen = (read & (share > 0.0))[:, :, :, None]  # what saw nothing holds anything
    value = tl.load(x_ptr + place, mask=seen, other=0.0)
    return tl.reshape(tl.sum(value * share[:, :, :, None], axis=1), (m.shape[0], BLOCK_K))


@triton.jit
def inverse_rms(x_ptr, m, active, eps, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of rows m (M, 1) of x (rows, DIM), zeros read for what is not active. (M, 1) fp32"""
    columns = tl.arange(0, BLOCK_K)[None, :]
    squares = tl.zeros([m.shape[0], BLOCK_K], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        k = start + columns
        x = tl.load(x_ptr + m.to(tl.int64) * DIM + k, mask=active & (k < DIM), other=0.0).to(tl.float32)
        squares += x * x
    return 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1)[:, None] / DIM + eps)


@triton.jit
def load_weights(weight_ptr, n, k, DIM: tl.constexpr, DIM_OUT: tl.constexpr):
    """A block of a weight (DIM_OUT, DIM) as it is stored, rows n (BLOCK_N,), columns k (1, BLOCK_K); zeros beyond."""
    return tl.load(weight_ptr + n[:, None].to(tl.int64) * DIM + k, mask=(n < DIM_OUT)[:, None] & (k < DIM), other=0)


@triton.jit
def load_int4(
    weight_ptr, scale_ptr, zero_ptr, n, start,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n (BLOCK_N,), columns start ... of an int4 weight -> numbers, scale, shift: numbers * scale + shift.

    numbers (BLOCK_N, BLOCK_K / 32, 8, 4) fp32, columns in order, are converted where they lie in their words: number
    4i + j is 16^i times too large, which scale (BLOCK_N, BLOCK_K / 32, 8, 1) takes back, so that a weight costs a mask
    and a conversion. shift (BLOCK_N, BLOCK_K / 32, 1, 1). Both are 0 where there is no weight.
    """
    piece = start // 32 + tl.arange(0, BLOCK_K // 32)[None, :, None, None]
    word = tl.arange(0, 4)[None, None, None, :]
    row = n[:, None, None, None].to(tl.int64)
    read = (n < DIM_OUT)[:, None, None, None] & (piece < DIM // 32)
    words_ptr = weight_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    words = tl.load(words_ptr + row * (DIM // 8) + piece * 4 + word, mask=read & (word >= 0), other=0)
    place = tl.arange(0, 8)[None, None, :, None] * 4
    numbers = (words & (15 << place).to(tl.uint32)).to(tl.float32)
    at = row * (DIM // GROUP) + piece // (GROUP // 32)
    step = tl.load(scale_ptr + at, mask=read, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=read, other=0.0).to(tl.float32)
    smaller = ((127 - place) << 23).to(tl.float32, bitcast=True)  # 2^-place
    return numbers, step * smaller, step * -zero


@triton.jit
def int4_product(numbers, scale, shift, x):
    """Weights of `load_int4` times inputs (1, BLOCK_K), summed within 32 columns -> (BLOCK_N, BLOCK_K / 32)."""
    x = tl.reshape(x, (1, numbers.shape[1], 8, 4))
    product = tl.sum(tl.sum(numbers * x, axis=3) * tl.reshape(scale, numbers.shape[:3]), axis=2)
    return product + tl.reshape(shift, product.shape) * tl.sum(tl.sum(x, axis=3), axis=2)


@triton.jit
def project(
    x_ptr, lse_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, n, batch, parts, eps,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, SOURCE: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Input rows times weight rows n (BLOCK_N,) of a row-major weight (DIM_OUT, DIM) -> (M, BLOCK_N) fp32.

    ROWS is the bucket of the batch. Up to 8 rows of a 16-bit dtype DOT: see `project_few`. Else, for 1 and 2 rows, M is
    ROWS: plain multiplications, which is all that a memory-bound product of fp32 needs. Their inputs are loaded before
    the weights: between two loads' layouts the compiler takes the later one's for the product, and weights should stay
    in the registers that they came to. Above that M is at least 16. Rows of the batch that are padding count as zeros.
    An int8 weight has one fp32 scale a row in scale_ptr; int4 (GROUP > 0): see `load_int4`.
    """
    whole_words: tl.constexpr = scale_ptr is None or DIM % 4 == 0  # of int8
    columns = tl.arange(0, BLOCK_K)[None, :]
    if ROWS <= 8 and DOT != tl.float32 and (GROUP == 128 or GROUP == 0 and whole_words):
        out = project_few(
            x_ptr, lse_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, n, batch, parts, eps,
            DIM, DIM_OUT, SOURCE, HEAD_DIM, PARTS, GROUP, ROWS, DOT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif ROWS <= 2:
        first = tl.zeros([1, 1], tl.int32)
        active0 = tl.load(rows_ptr + first) >= 0
        active1 = tl.load(rows_ptr + first + 1, mask=first + 1 < batch, other=-1) >= 0
        norm0, norm1 = 1.0, 1.0
        if SOURCE == "normed":
            norm0 = inverse_rms(x_ptr, first, active0, eps, DIM, BLOCK_K)
            if ROWS == 2:
                norm1 = inverse_rms(x_ptr, first + 1, active1, eps, DIM, BLOCK_K)
        sums: tl.constexpr = BLOCK_K if GROUP == 0 else BLOCK_K // 32
        sum0 = tl.zeros([BLOCK_N, sums], tl.float32)
        sum1 = tl.zeros([BLOCK_N, sums], tl.float32)
        for start in range(0, DIM, BLOCK_K):
            k = start + columns
            x0 = load_inputs(
                x_ptr, lse_ptr, norm_ptr, norm0, first, active0, start, parts, DIM, SOURCE, HEAD_DIM, PARTS, BLOCK_K
            )
            if ROWS == 2:
                x1 = load_inputs(
                    x_ptr, lse_ptr, norm_ptr, norm1, first + 1, active1, start, parts,
                    DIM, SOURCE, HEAD_DIM, PARTS, BLOCK_K,
                )  # fmt: skip
            if GROUP == 0:
                weight = load_weights(weight_ptr, n, k, DIM, DIM_OUT).to(tl.float32)
                sum0 += weight * x0
                if ROWS == 2:
                    sum1 += weight * x1
            else:
                numbers, scale, shift = load_int4(
                    weight_ptr, scale_ptr, zero_ptr, n, start, DIM, DIM_OUT, GROUP, BLOCK_K
                )
                sum0 += int4_product(numbers, scale, shift, x0)
                if ROWS == 2:
                    sum1 += int4_product(numbers, scale, shift, x1)
        if ROWS == 1:
            out = tl.sum(sum0, axis=1)[None, :]
        else:
            out = tl.trans(tl.join(tl.sum(sum0, axis=1), tl.sum(sum1, axis=1)))
    else:
        BLOCK_M: tl.constexpr = 16 if ROWS < 16 else ROWS
        m = tl.arange(0, BLOCK_M)[:, None]
        active = tl.load(rows_ptr + m, mask=m < batch, other=-1) >= 0
        norm = 1.0
        if SOURCE == "normed":
            norm = inverse_rms(x_ptr, m, active, eps, DIM, BLOCK_K)
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, DIM, BLOCK_K):
            k = start + columns
            if GROUP == 0:
                weight = load_weights(weight_ptr, n, k, DIM, DIM_OUT).to(DOT)
            else:
                numbers, scale, shift = load_int4(
                    weight_ptr, scale_ptr, zero_ptr, n, start, DIM, DIM_OUT, GROUP, BLOCK_K
                )
                weight = tl.reshape((numbers * scale + shift).to(DOT), (BLOCK_N, BLOCK_K))
            x = load_inputs(
                x_ptr, lse_ptr, norm_ptr, norm, m, active, start, parts, DIM, SOURCE, HEAD_DIM, PARTS, BLOCK_K
            )
            out = tl.dot(x.to(DOT), tl.trans(weight), out, input_precision="ieee")
    if scale_ptr is not None and GROUP == 0:
        out = out * tl.load(scale_ptr + n, mask=n < DIM_OUT, other=0.0)[None, :]
    return out


@triton.jit
def project_few(
    x_ptr, lse_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, rows_ptr, n, batch, parts, eps,
    DIM: tl.constexpr, DIM_OUT: tl.constexpr, SOURCE: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`project` of 1, 2, 4 or 8 rows in a 16-bit dtype, without an int8 weight's scale -> (8, BLOCK_N) fp32, the rows
    repeated; int4 in groups of 128.

    Tensor cores with the weight as their first operand, which takes one instruction for 8 weights a thread, for any of
    these numbers of rows; BLOCK_N is at least 16. Warps share out the inputs, not the outputs (SPLIT sums, added at
    the end), so that a block may have as few as 16 outputs. Sums of an int4 weight are by groups: numbers that are too
    large by an offset, less offset and zero point times the sum of the inputs, times the scale.
    """
    BITS: tl.constexpr = 4 if GROUP > 0 else (16 if scale_ptr is None else 8)
    PIECES: tl.constexpr = BLOCK_K * BITS // 512
    SPLIT: tl.constexpr = PIECES if BITS == 4 or PIECES < 8 else 8
    m = tl.arange(0, ROWS)[:, None]
    active = tl.load(rows_ptr + m, mask=m < batch, other=-1) >= 0
    norm = 1.0
    if SOURCE == "normed":
        norm = inverse_rms(x_ptr, m, active, eps, DIM, BLOCK_K)
    power = powers(batch, DOT)
    offset: tl.constexpr = 128.0 if DOT == tl.bfloat16 else 1024.0
    out = tl.zeros([SPLIT, BLOCK_N, 8], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        weight = load_pieces(weight_ptr, n, start, DIM, DIM_OUT, BITS, BLOCK_K)
        x = load_inputs(x_ptr, lse_ptr, norm_ptr, norm, m, active, start, parts, DIM, SOURCE, HEAD_DIM, PARTS, BLOCK_K)
        x = order_inputs(x.to(DOT), BITS, SPLIT)
        if BITS == 16:
            out = tl.dot(full_operand(weight, SPLIT), x, out)
        elif BITS == 8:
            low, sign = int8_operands(weight, power, DOT, SPLIT)
            out = tl.dot(sign, x, tl.dot(low, x, out))
        else:
            piece = start // GROUP + tl.arange(0, PIECES)[:, None]
            at = n[None, :].to(tl.int64) * (DIM // GROUP) + piece
            read = (n < DIM_OUT)[None, :] & (piece < DIM // GROUP)
            scale = tl.load(scale_ptr + at, mask=read, other=0.0).to(tl.float32)[:, :, None]
            zero = tl.load(zero_ptr + at, mask=read, other=0.0).to(tl.float32)[:, :, None]
            product = tl.dot(int4_operand(weight, power, DOT), x)
            total = tl.dot(tl.full([PIECES, BLOCK_N, GROUP], 1.0, DOT), x)
            out += scale * (product - (offset + zero) * total)
    return tl.trans(tl.sum(out, axis=0))
