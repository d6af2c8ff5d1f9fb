"""`sample_token` in Triton: a program for each entry, without sorting.

The candidates of top-k and the nucleus are all ids whose logit lies above a threshold, and the first few that equal it.
Logits are turned once into integers of the same order, kept in memory that the level-2 cache holds; the threshold is
then searched among all 2^32 integers, two bits with every pass over the vocabulary.
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
    keys = logits.new_empty(batch, vocab, dtype=torch.int32)
    tile = tuning.config("sample_token", target(logits), small=vocab <= 8192)
    recent = 0 if history is None else history.shape[1]
    launch(
        _sample, (batch, 1, 1),
        logits, rows, seeds, positions, temperature, top_k, top_p, history, banned, keys, ids,
        recent,
        0 if banned is None else banned.shape[1], stream - 2**32 if stream >= 2**31 else stream, repetition_limit,
        VOCAB=vocab, RECENT=tuning.bucket_of(recent), **tile,
    )  # fmt: skip
    return ids


NONE = tl.constexpr(-2139095041)
"""The key of -inf: an id that cannot be drawn."""


@triton.jit
def _swap(bits):
    """fp32 bits to integers of the same order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _key(logits_ptr, banned_ptr, entry, id, banned_count, VOCAB: tl.constexpr):
    """Keys (int32) of a block of logits: NONE for NaN, banned and absent ids, the largest number's for +inf."""
    x = tl.load(logits_ptr + entry * VOCAB + id, mask=id < VOCAB, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    x = tl.minimum(x, 3.4028234663852886e38) + 0.0  # and -0 becomes 0
    if banned_ptr is not None:
        for i in range(banned_count):
            x = tl.where(id == tl.load(banned_ptr + entry * banned_count + i), float("-inf"), x)
    return _swap(x.to(tl.int32, bitcast=True))


@triton.jit
def _scaled(key, top, temperature):
    """(logit - top) / temperature of keys, -inf for NONE at any temperature, infinity too."""
    below = _swap(key).to(tl.float32, bitcast=True) - top
    return tl.where(below > float("-inf"), below / temperature, float("-inf"))


@triton.jit
def _above(keys_ptr, first, second, third, top, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Mass and number of the keys above each of three thresholds (int32), in one pass."""
    mass1, mass2, mass3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    count1, count2, count3 = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        id = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + id, mask=id < VOCAB, other=NONE)
        mass = tl.exp(_scaled(key, top, temperature))
        mass1 += tl.where(key > first, mass, 0.0)
        mass2 += tl.where(key > second, mass, 0.0)
        mass3 += tl.where(key > third, mass, 0.0)
        count1 += (key > first).to(tl.int32)
        count2 += (key > second).to(tl.int32)
        count3 += (key > third).to(tl.int32)
    return (
        tl.sum(mass1, axis=0), tl.sum(mass2, axis=0), tl.sum(mass3, axis=0),
        tl.sum(count1, axis=0), tl.sum(count2, axis=0), tl.sum(count3, axis=0),
    )  # fmt: skip


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
    keys_ptr, ids_ptr, recent, banned_count, stream, repetition_limit,
    VOCAB: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry)
    if row < 0:
        tl.store(ids_ptr + entry, -1)
        return
    drawn = sample_tile(
        entry, row, logits_ptr, seeds_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, history_ptr,
        banned_ptr, keys_ptr, recent, banned_count, stream, repetition_limit, VOCAB, RECENT, BLOCK,
    )  # fmt: skip
    tl.store(ids_ptr + entry, drawn)


@triton.jit
def sample_tile(
    entry, row, logits_ptr, seeds_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, history_ptr, banned_ptr,
    keys_ptr, recent, banned_count, stream, repetition_limit,
    VOCAB: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The id that is drawn for an entry (int64) of session `row`."""
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    wanted = tl.load(temperature_ptr + row)
    greedy = not (wanted > 0.0)
    temperature = tl.where(greedy, 1.0, wanted)
    top_k = tl.where(greedy, 1, tl.load(top_k_ptr + row))
    top_p = tl.load(top_p_ptr + row)
    index = tl.arange(0, BLOCK)
    keys_ptr += entry * VOCAB

    largest = tl.full([BLOCK], NONE, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        key = _key(logits_ptr, banned_ptr, entry, start + index, banned_count, VOCAB)
        tl.store(keys_ptr + start + index, key, mask=start + index < VOCAB)
        largest = tl.maximum(largest, key)
    tl.debug_barrier()  # what other threads of this program have stored
    highest = tl.max(largest, axis=0)
    top = tl.maximum(_swap(highest).to(tl.float32, bitcast=True), -3.4028234663852886e38)
    lowest = highest * 0 + NONE
    total, _, _, _, _, _ = _above(keys_ptr, lowest, lowest, lowest, top, temperature, VOCAB, BLOCK)
    nucleus = tl.where(top_p < 1.0, top_p * total, float("inf"))
    limit = tl.where(top_k > 0, top_k, VOCAB + 1)

    # The lowest threshold with less than the nucleus' mass and fewer than `limit` ids above it.
    unlimited = (top_p >= 1.0) & (top_k <= 0)
    high = highest.to(tl.int64)
    low = tl.where(unlimited, high, lowest.to(tl.int64))
    low = tl.where(greedy, high, low)
    while low < high:
        first = (low + ((high - low) >> 2)).to(tl.int32)
        second = (low + ((high - low) >> 1)).to(tl.int32)
        third = (low + ((high - low) >> 2) + ((high - low) >> 1)).to(tl.int32)
        mass1, mass2, mass3, count1, count2, count3 = _above(
            keys_ptr, first, second, third, top, temperature, VOCAB, BLOCK
        )
        fits1 = (mass1 < nucleus) & (count1 < limit)
        fits2 = (mass2 < nucleus) & (count2 < limit)
        fits3 = (mass3 < nucleus) & (count3 < limit)
        high = tl.where(fits1, first, tl.where(fits2, second, tl.where(fits3, third, high)))
        low = tl.where(fits1, low, tl.where(fits2, first + 1, tl.where(fits3, second + 1, third + 1)))
    threshold = tl.where(unlimited, lowest - 1, high.to(tl.int32))
    total_above, _, _, total_count, _, _ = _above(
        keys_ptr, threshold, threshold, threshold, top, temperature, VOCAB, BLOCK
    )

    # Ids that equal the threshold join in their order while mass and count allow.
    ties = total_count * 0
    best, drawn = top * 0.0 + float("-inf"), ties
    for start in range(0, VOCAB, BLOCK):
        id = start + index
        key = tl.load(keys_ptr + id, mask=id < VOCAB, other=NONE)
        scaled = _scaled(key, top, temperature)
        tied = key == threshold
        earlier = ties + tl.cumsum(tied.to(tl.int32), axis=0) - tied.to(tl.int32)
        joins = (total_above + earlier.to(tl.float32) * tl.exp(scaled) < nucleus) & (total_count + earlier < limit)
        joins = tied & (joins | (total_count + earlier == 0))
        value = scaled + _gumbel(seed, position, id, stream, 0)
        value = tl.where((key > threshold) | joins, value, float("-inf"))
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
                key = tl.load(keys_ptr + id, mask=id < VOCAB, other=NONE)
                value = _scaled(key, top, temperature) + _gumbel(seed, position, id, stream, 1)
                value = tl.where(id != drawn, value, float("-inf"))
                here, place = tl.max(value, axis=0), tl.argmax(value, axis=0)
                other = tl.where(here > best, start + place, other)
                best = tl.maximum(best, here)
            drawn = other
    return drawn
