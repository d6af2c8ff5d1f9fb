"""`sample_token` in Triton: a program for each entry, without sorting.

The candidates of top-k and the nucleus are all ids whose logit lies above a threshold, and the first few that equal it:
the threshold is found by bisection over the order of floating-point numbers, 32 sums over the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, target


def run(
    logits: Tensor,
    rows: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    history: Tensor | None,
    banned: Tensor | None,
    stream: int,
    repetition_limit: int,
) -> Tensor:
    batch, vocab = logits.shape
    ids = logits.new_empty(batch, dtype=torch.int32)
    tile = tuning.config("sample_token", target(logits), small=vocab <= 8192)
    recent = 0 if history is None else history.shape[1]
    launch(
        _sample, (batch, 1, 1),
        logits, rows, seeds, positions, temperature, top_k, top_p, history, banned, ids, recent,
        0 if banned is None else banned.shape[1], stream - 2**32 if stream >= 2**31 else stream, repetition_limit,
        VOCAB=vocab, RECENT=tuning.bucket_of(recent), **tile,
    )  # fmt: skip
    return ids


@triton.jit
def _scores(logits_ptr, banned_ptr, entry, id, banned_count, VOCAB: tl.constexpr):
    """A block of logits in fp32: -inf for NaN, banned and absent ids, the largest number for +inf."""
    x = tl.load(logits_ptr + entry * VOCAB + id, mask=id < VOCAB, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    x = tl.minimum(x, 3.4028234663852886e38) + 0.0  # and -0 becomes 0
    if banned_ptr is not None:
        for i in range(banned_count):
            x = tl.where(id == tl.load(banned_ptr + entry * banned_count + i), float("-inf"), x)
    return x


@triton.jit
def _order(x):
    """int64 keys in the order of fp32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _gumbel(seed, position, id, stream, WORD: tl.constexpr):
    """Standard Gumbel values of ids, from one word of each id's Philox block."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    none = id.to(tl.uint32) * 0
    first, second, _, _ = tl.philox(seed, none + low, none + high, id.to(tl.uint32), none + stream.to(tl.uint32))
    word = first if WORD == 0 else second
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit(do_not_specialize=["recent", "banned_count", "stream", "repetition_limit"])
def _sample(
    logits_ptr, rows_ptr, seeds_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, history_ptr, banned_ptr,
    ids_ptr, recent, banned_count, stream, repetition_limit,
    VOCAB: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry)
    if row < 0:
        tl.store(ids_ptr + entry, -1)
        return
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    wanted = tl.load(temperature_ptr + row)
    greedy = not (wanted > 0.0)
    temperature = tl.where(greedy, 1.0, wanted)
    top_k = tl.where(greedy, 1, tl.load(top_k_ptr + row))
    top_p = tl.load(top_p_ptr + row)
    index = tl.arange(0, BLOCK)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        largest = tl.maximum(largest, _scores(logits_ptr, banned_ptr, entry, start + index, banned_count, VOCAB))
    top = tl.maximum(tl.max(largest, axis=0), -3.4028234663852886e38)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = _scores(logits_ptr, banned_ptr, entry, start + index, banned_count, VOCAB)
        mass += tl.exp((x - top) / temperature)
    nucleus = tl.where(top_p < 1.0, top_p * tl.sum(mass, axis=0), float("inf"))
    limit = tl.where(top_k > 0, top_k, VOCAB + 1)

    # The lowest threshold with less than the nucleus' mass and fewer than `limit` ids above it.
    high = _order(top)
    low = tl.where((top_p < 1.0) | (top_k > 0), high * 0 - 2147483648, high)
    low = tl.where(greedy, high, low)
    while low < high:
        middle = (low + high) >> 1
        above = tl.zeros([BLOCK], tl.float32)
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, VOCAB, BLOCK):
            x = _scores(logits_ptr, banned_ptr, entry, start + index, banned_count, VOCAB)
            better = _order(x) > middle
            above += tl.where(better, tl.exp((x - top) / temperature), 0.0)
            count += better.to(tl.int32)
        fits = (tl.sum(above, axis=0) < nucleus) & (tl.sum(count, axis=0) < limit)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    unlimited = (top_p >= 1.0) & (top_k <= 0)
    threshold = tl.where(unlimited, high * 0 - 2147483649, high)

    # Ids that equal the threshold join in their order while mass and count allow.
    above = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        x = _scores(logits_ptr, banned_ptr, entry, start + index, banned_count, VOCAB)
        better = _order(x) > threshold
        above += tl.where(better, tl.exp((x - top) / temperature), 0.0)
        count += better.to(tl.int32)
    total_above, total_count = tl.sum(above, axis=0), tl.sum(count, axis=0)

    ties = total_count * 0
    best, drawn = top * 0.0 + float("-inf"), ties
    for start in range(0, VOCAB, BLOCK):
        id = start + index
        x = _scores(logits_ptr, banned_ptr, entry, id, banned_count, VOCAB)
        share = tl.exp((x - top) / temperature)
        tied = _order(x) == threshold
        earlier = ties + tl.cumsum(tied.to(tl.int32), axis=0) - tied.to(tl.int32)
        joins = (total_above + earlier.to(tl.float32) * share < nucleus) & (total_count + earlier < limit)
        joins = tied & (joins | (total_count + earlier == 0))
        value = (x - top) / temperature + _gumbel(seed, position, id, stream, 0)
        value = tl.where((_order(x) > threshold) | joins, value, float("-inf"))
        here, place = tl.max(value, axis=0), tl.argmax(value, axis=0)
        drawn = tl.where(here > best, start + place, drawn)
        best = tl.maximum(best, here)
        ties += tl.sum(tied.to(tl.int32), axis=0)

    if history_ptr is not None:
        i = tl.arange(0, RECENT)
        past = tl.load(history_ptr + row.to(tl.int64) * recent + i, mask=i < recent, other=-1)
        repeated = tl.sum((past == drawn).to(tl.int32), axis=0)
        if (repeated >= repetition_limit) & (not greedy):
            best = best * 0.0 + float("-inf")
            other = drawn
            for start in range(0, VOCAB, BLOCK):
                id = start + index
                x = _scores(logits_ptr, banned_ptr, entry, id, banned_count, VOCAB)
                value = (x - top) / temperature + _gumbel(seed, position, id, stream, 1)
                value = tl.where((x > float("-inf")) & (id != drawn), value, float("-inf"))
                here, place = tl.max(value, axis=0), tl.argmax(value, axis=0)
                other = tl.where(here > best, start + place, other)
                best = tl.maximum(best, here)
            drawn = other
    tl.store(ids_ptr + entry, drawn)
