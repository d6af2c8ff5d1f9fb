"""`mix_semantic_speech` in Triton: schedule, output projector and look-ups in one launch, and the gradient.

A program fills a block of slots and a block of the width. Semantic vectors are two accumulating products over the
halves of the projector's weight, so hidden states and embeddings are never concatenated in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, target, triton_dtype
from minmo_kernels.ops.mix_semantic_speech.schedule import SEMANTIC, SPEECH, START, TURN, schedule


def run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Arguments in schema order; differentiable in the floating-point ones."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return _Mix.apply(*arguments)
    return _forward(*arguments)


def _forward(
    hidden: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    speech: Tensor,
    speech_table: Tensor,
    markers: Tensor,
    rows: Tensor,
    starts: Tensor,
    query_lengths: Tensor,
    text_lengths: Tensor,
    speech_lengths: Tensor,
    vector_starts: Tensor,
    speech_starts: Tensor,
    bistream: Tensor,
    slots: int,
    semantic_block: int,
    speech_block: int,
    hidden_first: bool,
    start_marker: int,
    turn_marker: int,
    fill: int,
    end_of_speech: int,
) -> tuple[Tensor, Tensor]:
    batch, vectors, hidden_dim = hidden.shape
    embedding_dim, dim = embedding.shape[2], weight.shape[0]
    inputs = hidden.new_empty(batch, slots, dim)
    targets = hidden.new_empty((batch, slots), dtype=torch.int64)
    tile = tuning.config("mix_semantic_speech", target(hidden), few=slots <= 32)
    launch(
        _mix, (triton.cdiv(slots, tile["BLOCK_S"]), triton.cdiv(dim, tile["BLOCK_N"]), batch),
        hidden, embedding, weight, bias, speech, speech_table, markers, rows, starts, query_lengths, text_lengths,
        speech_lengths, vector_starts, speech_starts, bistream, inputs, targets, slots, vectors, speech.shape[1],
        start_marker, turn_marker, fill, end_of_speech,
        HIDDEN=hidden_dim, EMBEDDING=embedding_dim, DIM=dim, VOCAB=speech_table.shape[0],
        SEMANTIC_BLOCK=semantic_block, SPEECH_BLOCK=speech_block, HIDDEN_FIRST=hidden_first,
        DOT=triton_dtype(hidden.dtype), **tile,
    )  # fmt: skip
    return inputs, targets


class _Mix(torch.autograd.Function):
    """The gradient gathers each semantic vector's slot and leaves the products to the library."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = _forward(*arguments)
        ctx.save_for_backward(*arguments[:15])
        ctx.constants = arguments[15:]
        ctx.mark_non_differentiable(targets)
        return inputs, targets

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _targets: Tensor) -> tuple[Tensor | None, ...]:
        (
            hidden, embedding, weight, bias, speech, table, markers, rows, starts, query_lengths, text_lengths,
            speech_lengths, vector_starts, speech_starts, bistream,
        ) = ctx.saved_tensors  # fmt: skip
        slots, semantic_block, speech_block, hidden_first, start_marker, turn_marker, *_ = ctx.constants
        slot = starts[:, None].long() + torch.arange(slots, device=grad.device)
        lengths = (query_lengths[:, None], text_lengths[:, None], speech_lengths[:, None])
        plan = schedule(slot, *lengths, bistream[:, None], semantic_block, speech_block)
        active = (rows >= 0)[:, None]

        entry, at, vector = _places(plan.index, active & (plan.source == SEMANTIC), vector_starts, hidden.shape[1])
        picked = grad[entry, at]
        halves = [hidden[entry, vector], embedding[entry, vector]]
        split = (hidden if hidden_first else embedding).shape[2]
        sides = (slice(0, split), slice(split, None)) if hidden_first else (slice(split, None), slice(0, split))
        grads: list[Tensor] = []
        for source, side in zip((hidden, embedding), sides, strict=True):
            grads.append(torch.zeros_like(source))
            grads[-1][entry, vector] = picked @ weight[:, side]
        ordered = halves if hidden_first else halves[::-1]
        grad_weight = torch.cat([picked.T @ half for half in ordered], dim=1)

        entry, at, token = _places(plan.index, active & (plan.source == SPEECH), speech_starts, speech.shape[1])
        grad_table = torch.zeros_like(table, dtype=torch.float32)
        grad_table.index_add_(0, speech[entry, token].long(), grad[entry, at].float())
        grad_markers = torch.zeros_like(markers)
        for kind, marker in ((START, start_marker), (TURN, turn_marker)):
            grad_markers[marker] += (grad * (active & (plan.source == kind))[:, :, None]).sum(dim=(0, 1))
        grad_bias = picked.sum(dim=0)
        given = (*grads, grad_weight, grad_bias, None, grad_table.to(table.dtype), grad_markers)
        return (*given, *[None] * (len(ctx.constants) + 8))


def _places(index: Tensor, wanted: Tensor, starts: Tensor, given: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entry, slot and number in the given window of every wanted item that lies in the window."""
    local = index - starts[:, None].long()
    entry, at = torch.nonzero(wanted & (local >= 0) & (local < given), as_tuple=True)
    return entry, at, local[entry, at]


@triton.jit(do_not_specialize=["slots", "vectors", "tokens", "start_marker", "turn_marker", "fill", "end_of_speech"])
def _mix(
    hidden_ptr, embedding_ptr, weight_ptr, bias_ptr, speech_ptr, table_ptr, markers_ptr, rows_ptr, starts_ptr,
    query_ptr, text_ptr, speech_lengths_ptr, vector_starts_ptr, speech_starts_ptr, bistream_ptr, inputs_ptr,
    targets_ptr, slots, vectors, tokens, start_marker, turn_marker, fill, end_of_speech,
    HIDDEN: tl.constexpr, EMBEDDING: tl.constexpr, DIM: tl.constexpr, VOCAB: tl.constexpr,
    SEMANTIC_BLOCK: tl.constexpr, SPEECH_BLOCK: tl.constexpr, HIDDEN_FIRST: tl.constexpr, DOT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(2).to(tl.int64)
    active = tl.load(rows_ptr + entry) >= 0
    place = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    slot = tl.load(starts_ptr + entry) + place
    active = active & (place < slots)
    query, text, speech = tl.load(query_ptr + entry), tl.load(text_ptr + entry), tl.load(speech_lengths_ptr + entry)

    # The closed form of schedule.py.
    cycle: tl.constexpr = SEMANTIC_BLOCK + SPEECH_BLOCK
    blocks = tl.where(tl.load(bistream_ptr + entry) != 0, text // SEMANTIC_BLOCK, 0)
    rest = text - SEMANTIC_BLOCK * blocks
    ahead = slot - 1 - query
    in_query = (ahead < 0) & (slot > 0)
    in_block = (ahead >= 0) & (ahead < cycle * blocks)
    block = tl.maximum(ahead, 0) // cycle
    offset = ahead - cycle * block
    tail = ahead - cycle * blocks
    semantic = tl.where(in_block, offset < SEMANTIC_BLOCK, (tail >= 0) & (tail < rest))
    number = tl.where(in_block, SEMANTIC_BLOCK * block + offset, SEMANTIC_BLOCK * blocks + tail)
    after = tl.where(in_block, SPEECH_BLOCK * block + offset - SEMANTIC_BLOCK + 1, SPEECH_BLOCK * blocks + tail - rest)
    is_turn = active & (ahead >= 0) & (in_block == 0) & (tail == rest)
    is_speech = active & tl.where(in_block, offset >= SEMANTIC_BLOCK, tail > rest) & (after <= speech)
    is_start = active & (slot == 0)

    vector = tl.where(in_query, slot - 1, query + number) - tl.load(vector_starts_ptr + entry)
    use = active & (semantic | in_query) & (slot > 0) & (vector >= 0) & (vector < vectors)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    if tl.sum(use.to(tl.int32), axis=0) > 0:
        after_hidden: tl.constexpr = HIDDEN if HIDDEN_FIRST else 0
        before_hidden: tl.constexpr = 0 if HIDDEN_FIRST else EMBEDDING
        source = entry * vectors + vector
        out = _half(
            hidden_ptr, weight_ptr, source, use, n, before_hidden, out, HIDDEN, HIDDEN + EMBEDDING, DIM, DOT, BLOCK_K
        )
        out = _half(
            embedding_ptr,
            weight_ptr,
            source,
            use,
            n,
            after_hidden,
            out,
            EMBEDDING,
            HIDDEN + EMBEDDING,
            DIM,
            DOT,
            BLOCK_K,
        )
        bias = tl.load(bias_ptr + n, mask=n < DIM, other=0.0).to(tl.float32)
        out = tl.where(use[:, None], out + bias[None, :], 0.0)

    wide = (n < DIM)[None, :]
    at = after - 1 - tl.load(speech_starts_ptr + entry)
    is_speech = is_speech & (at >= 0) & (at < tokens)
    id = tl.load(speech_ptr + entry * tokens + at, mask=is_speech, other=0).to(tl.int64)
    found = is_speech & (id >= 0) & (id < VOCAB)
    looked_up = tl.load(table_ptr + id[:, None] * DIM + n[None, :], mask=found[:, None] & wide, other=0.0)
    out += looked_up.to(tl.float32)
    marker = tl.where(is_start, start_marker, turn_marker)
    marked = (is_start | is_turn)[:, None] & wide
    out += tl.load(markers_ptr + marker[:, None] * DIM + n[None, :], mask=marked, other=0.0).to(tl.float32)
    store = (entry * slots + place)[:, None] * DIM + n[None, :]
    tl.store(inputs_ptr + store, out, mask=(place < slots)[:, None] & wide)

    if tl.program_id(1) == 0:
        last = offset == cycle - 1
        predicts = tl.where(in_block, (offset >= SEMANTIC_BLOCK - 1) & (last == 0), (ahead >= 0) & (tail >= rest))
        next_at = after - tl.load(speech_starts_ptr + entry)
        known = active & predicts & (after < speech) & (next_at >= 0) & (next_at < tokens)
        goal = tl.load(speech_ptr + entry * tokens + next_at, mask=known, other=-100).to(tl.int64)
        goal = tl.where(active & in_block & last & (after <= speech), fill, goal)
        goal = tl.where(active & (in_block == 0) & predicts & (after == speech), end_of_speech, goal)
        tl.store(targets_ptr + entry * slots + place, goal, mask=place < slots)


@triton.jit
def _half(
    x_ptr, weight_ptr, source, use, n, column, out, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    DOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out + x[source] times columns `column` ... of weight rows n; only rows of x in `use` are read."""
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        taken = (k < WIDTH)[None, :]
        x = tl.load(x_ptr + source[:, None] * WIDTH + k[None, :], mask=use[:, None] & taken, other=0.0)
        place = n[:, None].to(tl.int64) * COLUMNS + column + k[None, :]
        weight = tl.load(weight_ptr + place, mask=(n < DIM)[:, None] & taken, other=0.0)
        out = tl.dot(x.to(DOT), tl.trans(weight.to(DOT)), out, input_precision="ieee")
    return out
