"""`decoder_step` in Triton: one persistent kernel whose blocks walk the instruction list.

A phase is the tile function of the operation that serves it launch by launch, so both compute the same numbers from the
same tiles. New here are the walk, the barrier between phases, and what a token needs besides: its input, and the next
one's. Where kernels are interpreted, whose programs run one after another, each instruction is a launch; barriers are
then looked at with the same counts, and must hold at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import dispatch, tuning
from minmo_kernels.launch import INTERPRETING, OPTIONS, compiled_for, launch, lookup_table, target, triton_dtype
from minmo_kernels.ops.decoder_step.grid import Grid, chip_of, misfit
from minmo_kernels.ops.decoder_step.machine import BROKEN, Arguments
from minmo_kernels.ops.decoder_step.schedule import Tiles, program, table
from minmo_kernels.ops.gate_up_swiglu.kernel import gate_up_swiglu_tile
from minmo_kernels.ops.linear_residual import weight_bits
from minmo_kernels.ops.linear_residual.kernel import linear_residual_tile
from minmo_kernels.ops.merge_linear_residual.kernel import merges_ahead
from minmo_kernels.ops.rms_norm.kernel import rms_norm_tile
from minmo_kernels.ops.rms_norm_qkv_rope_append.kernel import qkv_tile
from minmo_kernels.ops.sample_token.kernel import sample_tile
from minmo_kernels.ops.streaming_attention.kernel import MERGED_HEADS, attention_tile, merge_tile
from minmo_kernels.tiles import project, rope_table

TILE = ("QKV_N", "OUT_N", "GATE_UP_N", "DOWN_N", "HEAD_N", "BLOCK_N", "BLOCK_K", "SAMPLE_BLOCK")
"""What a launch table says of tiles: outputs of each product, slots of attention, inputs of every product, and ids of
the choice."""


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = Arguments(*arguments)
    x, (batch, dim) = given.x, given.x.shape
    tokens = x.new_empty((batch, 0 if given.head is None else given.steps), dtype=torch.int32)
    if batch == 0:
        return torch.empty_like(x), tokens
    sm, bucket = target(x), tuning.bucket_of(batch)
    values = tuning.config(
        "decoder_step", sm, rows=bucket, bits=weight_bits(given.qkv), head=given.head is not None
    )  # fmt: skip
    tile = dict(values)
    shape = given.shape(values["PARTS"], merges_ahead(bucket, given.out))
    tile["QKV_N"] = min(tile["QKV_N"], shape.head_dim)
    tiles = Tiles(
        qkv=tile["QKV_N"], out=tile["OUT_N"], gate_up=tile["GATE_UP_N"], down=tile["DOWN_N"], head=tile["HEAD_N"],
        merge=MERGED_HEADS,
    )  # fmt: skip
    chip = chip_of(x.device, sm)
    grid = Grid(chip, values["blocks"], given.share)
    listed = program(shape, tiles, grid.blocks)
    width, vocab, (_, sessions, capacity, *_) = shape.heads * shape.head_dim, shape.vocab, given.k_cache.shape
    sampling = vocab > 0

    def fresh(*size: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(size, dtype=dtype)

    stream = fresh(batch, dim)
    hidden = stream if given.final_norm is None else fresh(batch, dim)
    recent = 0 if given.history is None else given.history.shape[1]
    forbidden = 0 if given.banned is None else given.banned.shape[1]
    run_time = (
        lookup_table(table, listed, device=x.device), given.sync, x, given.input_norm, given.qkv, given.qkv_scale,
        given.qkv_bias, given.out, given.out_scale, given.post_norm, given.gate_up, given.gate_up_scale, given.down,
        given.down_scale, given.final_norm, given.head, given.head_scale, given.head_bias, given.embedding,
        given.k_cache, given.v_cache, lookup_table(rope_table, given.rope_theta, shape.head_dim, device=x.device),
        given.rows, given.lengths, given.seeds, given.positions, given.temperature, given.top_k, given.top_p,
        given.history if recent else None, given.banned, given.least, given.most,
        stream, fresh(batch, width), fresh(batch, shape.parts, width, dtype=torch.float32),
        fresh(batch, shape.parts, shape.heads, dtype=torch.float32), fresh(batch, width), fresh(batch, shape.ffn),
        hidden, fresh(batch, vocab) if sampling else None, fresh(batch, vocab, dtype=torch.int32) if sampling else None,
        tokens if sampling else None, fresh(batch, dtype=torch.int32), fresh(2, sessions, dtype=torch.int32),
        fresh(sessions, dtype=torch.int64) if sampling else None,
        fresh(sessions, recent, dtype=torch.int32) if sampling and recent else None,
        fresh(batch, forbidden + 1, dtype=torch.int32) if sampling else None,
    )  # fmt: skip
    scalars = (
        batch, sessions, capacity, shape.parts, given.window, recent, forbidden, given.end,
        given.stream - 2**32 if given.stream >= 2**31 else given.stream, given.repetition_limit, given.steps,
        given.spins, grid.prefetch, shape.head_dim**-0.5, given.eps,
    )  # fmt: skip
    constants = {
        "DIM": dim, "HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "HEAD_DIM":
        shape.head_dim, "FFN": shape.ffn, "VOCAB": vocab, "RECENT": tuning.bucket_of(recent), "RING": given.ring,
        "MERGES_AHEAD": shape.merges_ahead, "PARTS": tuning.bucket_of(shape.parts), "ROWS": bucket,
        "DOT": triton_dtype(x.dtype), "BLOCK_M": 16, "MERGED": MERGED_HEADS, "PREFETCH": not INTERPRETING,
        **{name: tile[name] for name in TILE}, "NORM_BLOCK": triton.next_power_of_2(dim),
        **{name: tile[name] for name in OPTIONS if name in tile},
        "launch_cooperative_grid": True,
    }  # fmt: skip
    if INTERPRETING:
        for at in range(len(listed)):
            launch(_decoder_step, (grid.blocks, 1, 1), *run_time, at, at + 1, len(listed), *scalars, **constants)
        return hidden, tokens
    if x.is_cuda:
        kernel = compiled_for(_decoder_step, (grid.blocks, 1, 1), *run_time, 0, 0, 0, *scalars, **constants)
        if (reason := misfit(kernel, grid)) is not None:
            raise dispatch.BackendError(f"decoder_step: {reason}")
    launch(_decoder_step, (grid.blocks, 1, 1), *run_time, 0, len(listed), len(listed), *scalars, **constants)
    return hidden, tokens


EMBED, QKV, ATTEND, MERGE, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
GATE_UP, DOWN, NORM, HEAD, SAMPLE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
"""`schedule.Phase`."""
COLUMNS = tl.constexpr(9)
NOT_A_NUMBER = tl.constexpr(BROKEN)


@triton.jit(
    do_not_specialize=[
        "first", "last", "all", "batch", "sessions", "capacity", "parts", "window", "recent", "forbidden", "end",
        "stream_id", "repetition_limit", "steps", "spins", "prefetch", "scale", "eps",
    ]
)  # fmt: skip
def _decoder_step(
    listed_ptr, sync_ptr, x_ptr, input_norm_ptr, weight_ptr, qkv_scale_ptr, qkv_bias_ptr, out_ptr, out_scale_ptr,
    post_norm_ptr, gate_up_ptr, gate_up_scale_ptr, down_ptr, down_scale_ptr, final_norm_ptr, head_ptr, head_scale_ptr,
    head_bias_ptr, embedding_ptr, k_ptr, v_ptr, table_ptr, rows_ptr, lengths_ptr, seeds_ptr, positions_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, history_ptr, banned_ptr, least_ptr, most_ptr,
    stream_ptr, q_ptr, parts_ptr, lse_ptr, merged_ptr, inner_ptr, hidden_ptr, logits_ptr, keys_ptr, tokens_ptr,
    alive_ptr, ends_ptr, at_ptr, seen_ptr, off_ptr,
    first, last, all, batch, sessions, capacity, parts, window, recent, forbidden, end, stream_id, repetition_limit,
    steps, spins, prefetch, scale, eps,
    DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    FFN: tl.constexpr, VOCAB: tl.constexpr, RECENT: tl.constexpr, RING: tl.constexpr, MERGES_AHEAD: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, MERGED: tl.constexpr,
    PREFETCH: tl.constexpr, QKV_N: tl.constexpr, OUT_N: tl.constexpr, GATE_UP_N: tl.constexpr, DOWN_N: tl.constexpr,
    HEAD_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLE_BLOCK: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Instructions first .. last of `all`. ends_ptr: lengths with the new position, after lengths without it."""
    me, blocks = tl.program_id(0), tl.num_programs(0)
    width: tl.constexpr = HEADS * HEAD_DIM
    packed: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    at = first
    while at < last:
        one = listed_ptr + at * COLUMNS
        phase, layer, step, tiles = tl.load(one), tl.load(one + 1).to(tl.int64), tl.load(one + 2), tl.load(one + 3)
        wait, signal = tl.load(one + 4), tl.load(one + 5)
        # Nothing, which the compiler cannot know: addresses are then made by the phase that uses them. Taken out of
        # this loop, those of all phases would fill the registers of each.
        none = tl.load(one + 8) * 128
        x, q, inner, merged, alive = (
            stream_ptr + none,
            q_ptr + none,
            inner_ptr + none,
            merged_ptr + none,
            alive_ptr + none,
        )
        parted, sums, ends = parts_ptr + none, lse_ptr + none, ends_ptr + none
        if PREFETCH:
            _ask_ahead(
                tl.load(one + 6), tl.load(one + 7).to(tl.int64), me, blocks, prefetch, weight_ptr, out_ptr, gate_up_ptr,
                down_ptr, head_ptr, packed, DIM, width, FFN, VOCAB,
            )  # fmt: skip
        if wait > 0:
            tiles = _arrivals(sync_ptr, wait, spins, at, tiles)
        turns = tl.cdiv(tiles - me, blocks)
        if phase == EMBED:
            for turn in range(turns):
                tile = me + turn * blocks
                _embed(
                    tile, x_ptr, rows_ptr, lengths_ptr, positions_ptr, history_ptr, banned_ptr, least_ptr, x,
                    alive, ends, at_ptr, seen_ptr, off_ptr, sessions, recent, forbidden, end,
                    DIM, VOCAB, RECENT, BLOCK_K,
                )  # fmt: skip
        elif phase == QKV:
            blocks_a_head: tl.constexpr = (HEAD_DIM + QKV_N - 1) // QKV_N
            for turn in range(turns):
                tile = me + turn * blocks
                qkv_tile(
                    tile // blocks_a_head, tile % blocks_a_head, x, input_norm_ptr + layer * DIM,
                    weight_ptr + layer * (packed * DIM), _row(qkv_scale_ptr, layer, packed), None,
                    _row(qkv_bias_ptr, layer, packed), _cache(k_ptr, layer, sessions, capacity, KV_HEADS, HEAD_DIM),
                    _cache(v_ptr, layer, sessions, capacity, KV_HEADS, HEAD_DIM), alive, ends, table_ptr + none, q,
                    batch, capacity, eps,
                    HEADS, KV_HEADS, HEAD_DIM // 2, RING, DIM, 0, ROWS, DOT, QKV_N, BLOCK_K,
                )  # fmt: skip
        elif phase == ATTEND:
            for turn in range(turns):
                tile = me + turn * blocks
                attention_tile(
                    tile // (KV_HEADS * parts), tile // parts % KV_HEADS, tile * 0, tile % parts, parts,
                    q, _cache(k_ptr, layer, sessions, capacity, KV_HEADS, HEAD_DIM),
                    _cache(v_ptr, layer, sessions, capacity, KV_HEADS, HEAD_DIM), alive, ends + sessions, None,
                    None, None, parted, sums, 1, capacity, window, 0, -1, 0, scale,
                    HEADS, KV_HEADS, HEAD_DIM, "causal", RING, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        elif phase == OUT:
            for turn in range(turns):
                tile = me + turn * blocks
                if MERGES_AHEAD:
                    linear_residual_tile(
                        tile, merged, None, out_ptr + layer * (DIM * width), _row(out_scale_ptr, layer, DIM), None,
                        x, alive, x, batch, 1,
                        width, DIM, "plain", 1, 1, 0, ROWS, DOT, OUT_N, BLOCK_K,
                    )  # fmt: skip
                else:
                    linear_residual_tile(
                        tile, parted, sums, out_ptr + layer * (DIM * width), _row(out_scale_ptr, layer, DIM),
                        None, x, alive, x, batch, parts,
                        width, DIM, "merged", HEAD_DIM, PARTS, 0, ROWS, DOT, OUT_N, BLOCK_K,
                    )  # fmt: skip
        elif phase == GATE_UP:
            for turn in range(turns):
                tile = me + turn * blocks
                gate_up_swiglu_tile(
                    tile, x, post_norm_ptr + layer * DIM, gate_up_ptr + layer * (2 * FFN * DIM),
                    _row(gate_up_scale_ptr, layer, 2 * FFN), None, alive, inner, batch, eps,
                    DIM, 2 * FFN, 0, ROWS, DOT, GATE_UP_N, BLOCK_K,
                )  # fmt: skip
        elif phase == DOWN:
            for turn in range(turns):
                tile = me + turn * blocks
                linear_residual_tile(
                    tile, inner, None, down_ptr + layer * (DIM * FFN), _row(down_scale_ptr, layer, DIM), None,
                    x, alive, x, batch, 1,
                    FFN, DIM, "plain", 1, 1, 0, ROWS, DOT, DOWN_N, BLOCK_K,
                )  # fmt: skip
        if MERGES_AHEAD:
            if phase == MERGE:
                heads: tl.constexpr = (HEADS + MERGED - 1) // MERGED
                for turn in range(turns):
                    tile = me + turn * blocks
                    merge_tile(
                        tile // heads, tile % heads, parted, sums, merged, None, 1, parts,
                        HEADS, HEAD_DIM, MERGED,
                    )  # fmt: skip
        if final_norm_ptr is not None:
            if phase == NORM:
                for turn in range(turns):
                    tile = me + turn * blocks
                    rms_norm_tile(tile, x, final_norm_ptr + none, alive, hidden_ptr + none, 1, eps, DIM, NORM_BLOCK)
        if VOCAB > 0:
            if phase == HEAD:
                for turn in range(turns):
                    tile = me + turn * blocks
                    _head(
                        tile, x, final_norm_ptr + none, head_ptr + none, head_scale_ptr, head_bias_ptr, alive,
                        logits_ptr + none, batch, eps, DIM, VOCAB, ROWS, DOT, HEAD_N, BLOCK_K,
                    )  # fmt: skip
            elif phase == SAMPLE:
                for turn in range(turns):
                    tile = me + turn * blocks
                    _sample(
                        tile, step, logits_ptr + none, seeds_ptr, temperature_ptr, top_k_ptr, top_p_ptr, embedding_ptr,
                        least_ptr, most_ptr, keys_ptr + none, tokens_ptr, x, alive, ends, at_ptr, seen_ptr,
                        off_ptr, sessions, recent, forbidden, end, stream_id, repetition_limit, steps,
                        DIM, VOCAB, RECENT, SAMPLE_BLOCK, BLOCK_K,
                    )  # fmt: skip
        at += 1
        if tiles < 0:
            at = last
        elif signal > 0:
            tl.debug_barrier()  # every thread's stores come before this block's arrival
            tl.atomic_add(sync_ptr, signal, sem="release", scope="gpu")
    _leave(sync_ptr, last == all, blocks)


@triton.jit
def _arrivals(sync_ptr, wanted, spins, at, tiles):
    """Waits until so many arrivals are counted -> tiles, or -1 where this block or another has given up.

    Looks are plain loads past the first-level cache, of each warp for itself. What decides is then read by an atomic,
    one thread's for all: it acquires what other blocks have released, and no warp can see another answer than its
    block.
    """
    seen = tl.load(sync_ptr, volatile=True)
    error = tl.load(sync_ptr + 2, volatile=True)
    looks = 0
    while (seen < wanted) & (error == 0) & (looks < spins):
        seen = tl.load(sync_ptr, volatile=True)
        error = tl.load(sync_ptr + 2, volatile=True)
        looks += 1
    seen = tl.atomic_add(sync_ptr, 0, sem="acquire", scope="gpu")
    error = tl.atomic_add(sync_ptr + 2, 0, sem="relaxed", scope="gpu")
    if (seen < wanted) & (error == 0):
        tl.atomic_cas(sync_ptr + 2, 0, at + 1, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return tl.where((seen >= wanted) & (error == 0), tiles, -1)


@triton.jit
def _leave(sync_ptr, done, blocks):
    """The last block to leave takes the counters back to zero: nobody looks at them any more."""
    if done:
        if tl.atomic_add(sync_ptr + 1, 1, sem="acq_rel", scope="gpu") == blocks - 1:
            tl.atomic_xchg(sync_ptr, 0, sem="relaxed", scope="gpu")
            tl.atomic_xchg(sync_ptr + 1, 0, sem="relaxed", scope="gpu")


@triton.jit
def _row(ptr, layer, WIDTH: tl.constexpr):
    """A layer's numbers of a stacked vector, None where there is none."""
    if ptr is None:
        return None
    else:
        return ptr + layer * WIDTH


@triton.jit
def _cache(ptr, layer, sessions, capacity, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A layer's cache."""
    return ptr + layer * sessions * capacity * (KV_HEADS * HEAD_DIM)


@triton.jit
def _ask_ahead(
    phase, layer, me, blocks, most, qkv_ptr, out_ptr, gate_up_ptr, down_ptr, head_ptr,
    PACKED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, FFN: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    """Asks the level-2 cache for this block's share of the first `most` bytes of a phase's weight."""
    if phase == QKV:
        _ask(qkv_ptr + layer * (PACKED * DIM), PACKED * DIM, me, blocks, most)
    elif phase == OUT:
        _ask(out_ptr + layer * (DIM * WIDTH), DIM * WIDTH, me, blocks, most)
    elif phase == GATE_UP:
        _ask(gate_up_ptr + layer * (2 * FFN * DIM), 2 * FFN * DIM, me, blocks, most)
    elif phase == DOWN:
        _ask(down_ptr + layer * (DIM * FFN), DIM * FFN, me, blocks, most)
    if VOCAB > 0:
        if phase == HEAD:
            _ask(head_ptr, VOCAB * DIM, me, blocks, most)


@triton.jit
def _ask(ptr, NUMBERS: tl.constexpr, me, blocks, most):
    size: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    line: tl.constexpr = 128 // size
    lanes: tl.constexpr = 128
    whole: tl.constexpr = (NUMBERS + line - 1) // line
    lines = tl.minimum(whole, most // 128)
    for start in range(me * lanes, lines, blocks * lanes):
        place = start + tl.arange(0, lanes)
        place = tl.minimum(place, lines - 1)  # a line that was asked for is asked for again
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr + place.to(tl.int64) * line], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _embed(
    entry, x_ptr, rows_ptr, lengths_ptr, positions_ptr, history_ptr, banned_ptr, least_ptr, stream_ptr, alive_ptr,
    ends_ptr, at_ptr, seen_ptr, off_ptr, sessions, recent, forbidden, end,
    DIM: tl.constexpr, VOCAB: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An entry's input into the stream, and its numbers into memory of their own, which later steps advance."""
    row = tl.load(rows_ptr + entry)
    tl.store(alive_ptr + entry, row)
    if row >= 0:
        _copy(x_ptr + entry.to(tl.int64) * DIM, stream_ptr + entry.to(tl.int64) * DIM, DIM, BLOCK)
        length = tl.load(lengths_ptr + row)
        tl.store(ends_ptr + row, length)
        tl.store(ends_ptr + sessions + row, length + 1)
        if VOCAB > 0:
            position = tl.load(positions_ptr + row)
            tl.store(at_ptr + row, position)
            i = tl.arange(0, RECENT)
            if history_ptr is not None:
                place = row.to(tl.int64) * recent + i
                tl.store(seen_ptr + place, tl.load(history_ptr + place, mask=i < recent, other=-1), mask=i < recent)
            if banned_ptr is not None:
                for j in range(forbidden):
                    tl.store(off_ptr + entry * (forbidden + 1) + j, tl.load(banned_ptr + entry * forbidden + j))
            _forbid_end(entry, position, least_ptr, off_ptr, forbidden, end)


@triton.jit
def _copy(from_ptr, to_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < SIZE, other=0.0), mask=i < SIZE)


@triton.jit
def _forbid_end(entry, position, least_ptr, off_ptr, forbidden, end):
    """The last of an entry's banned ids: `end` where it is too early for it, else none."""
    early = position < 0
    if least_ptr is not None:
        early = position < tl.load(least_ptr + entry)
    tl.store(off_ptr + entry * (forbidden + 1) + forbidden, tl.where(early, end, -1))


@triton.jit
def _head(
    tile, stream_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, rows_ptr, logits_ptr, batch, eps,
    DIM: tl.constexpr, VOCAB: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits tile * BLOCK_N ... of every row."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = project(
        stream_ptr, None, norm_ptr, weight_ptr, scale_ptr, None, rows_ptr, n, batch, 1, eps,
        DIM, VOCAB, "normed", 1, 1, 0, ROWS, DOT, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < VOCAB, other=0.0).to(tl.float32)[None, :]
    m = tl.arange(0, out.shape[0])[:, None]
    tl.store(logits_ptr + m.to(tl.int64) * VOCAB + n[None, :], out, mask=(m < batch) & (n < VOCAB)[None, :])


@triton.jit
def _sample(
    entry, step, logits_ptr, seeds_ptr, temperature_ptr, top_k_ptr, top_p_ptr, embedding_ptr, least_ptr, most_ptr,
    keys_ptr, tokens_ptr, stream_ptr, alive_ptr, ends_ptr, at_ptr, seen_ptr, off_ptr, sessions, recent, forbidden, end,
    stream_id, repetition_limit, steps,
    DIM: tl.constexpr, VOCAB: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """An entry's token, and what the next step needs of it: its embedding in the stream, its numbers advanced."""
    row = tl.load(alive_ptr + entry)
    token = tl.full([], -1, tl.int32)
    if row >= 0:
        broken = tl.zeros([BLOCK], tl.int32)
        for start in range(0, VOCAB, BLOCK):
            id = start + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + entry.to(tl.int64) * VOCAB + id, mask=id < VOCAB, other=0.0).to(tl.float32)
            broken += (logit != logit).to(tl.int32)
        token = sample_tile(
            entry.to(tl.int64), row, logits_ptr, seeds_ptr, at_ptr, temperature_ptr, top_k_ptr, top_p_ptr, seen_ptr,
            off_ptr, keys_ptr, recent, forbidden + 1, stream_id, repetition_limit, VOCAB, RECENT, BLOCK,
        )  # fmt: skip
        position = tl.load(at_ptr + row)
        if most_ptr is not None:
            token = tl.where(position >= tl.load(most_ptr + entry), end, token)
        token = tl.where(tl.sum(broken, axis=0) > 0, NOT_A_NUMBER, token)
        if (token == end) | (token < 0):
            tl.store(alive_ptr + entry, -1)
        elif step + 1 < steps:
            length = tl.load(ends_ptr + row)
            tl.debug_barrier()  # every thread has read what now changes
            tl.store(at_ptr + row, position + 1)
            tl.store(ends_ptr + row, length + 1)
            tl.store(ends_ptr + sessions + row, length + 2)
            if seen_ptr is not None:  # the oldest comes first
                tl.store(seen_ptr + row.to(tl.int64) * recent + step % recent, token)
            _forbid_end(entry, position + 1, least_ptr, off_ptr, forbidden, end)
            if embedding_ptr is not None:
                _copy(embedding_ptr + token.to(tl.int64) * DIM, stream_ptr + entry.to(tl.int64) * DIM, DIM, BLOCK_K)
    tl.store(tokens_ptr + entry * steps + step, token)
