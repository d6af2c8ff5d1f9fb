"""The instruction list of `decoder_step`: what every block of its one launch does, in order, as data.

An instruction is a phase over a number of tiles; block b of G takes the tiles b, b + G, b + 2 G ... Where the next
phase reads what other blocks write, a barrier lies between: each block adds to a counter when its tiles are done
(`signal`), and starts the next instruction once so many arrivals were counted (`wait`). The counter only rises within a
launch, so a barrier is a number; the last block to leave takes it back to zero for the next launch.

The list is made on the host from the decoder's shape, the tiles' sizes and the grid, and read by the kernel
(`kernel.py`), by the machine that is the reference (`machine.py`), and by the proof (`proof.py`).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


class Phase(enum.IntEnum):
    """What an instruction does; a tile of each."""

    EMBED = 0
    """Puts an entry's input into the residual stream and its numbers where later steps advance them."""
    QKV = 1
    """Norm, a block of rotary pairs of a packed head, cache write."""
    ATTEND = 2
    """One kv head of one entry over one part of its cache."""
    MERGE = 3
    """The parts of an entry for a block of heads, where OUT does not merge them itself."""
    OUT = 4
    """A block of the output projection, added to the stream."""
    GATE_UP = 5
    DOWN = 6
    """A block of the down projection, added to the stream."""
    NORM = 7
    """The last norm of an entry."""
    HEAD = 8
    """A block of the logits, from the stream by a norm of its own."""
    SAMPLE = 9
    """An entry's token, whose embedding is the stream of the next step."""


WEIGHTED = (Phase.QKV, Phase.OUT, Phase.GATE_UP, Phase.DOWN, Phase.HEAD)
"""Phases that stream a weight."""


@dataclass(frozen=True)
class Shape:
    """Sizes that decide the list. vocab: 0 without a head; steps: tokens a launch; norm: whether there is a last norm;
    parts: of attention; merges_ahead: whether a phase of its own merges them."""

    batch: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int = 0
    steps: int = 1
    norm: bool = True
    parts: int = 8
    merges_ahead: bool = False


@dataclass(frozen=True)
class Tiles:
    """Outputs of a tile, by phase; gate_up: weight rows, two a unit; merge: heads."""

    qkv: int
    out: int
    gate_up: int
    down: int
    head: int
    merge: int = 4


@dataclass(frozen=True)
class Instruction:
    """wait: arrivals that must have been counted before it starts (0 = none). signal: arrivals that each block adds
    after its tiles. ahead: instruction whose weights a block asks the level-2 cache for before it waits (-1 = none)."""

    phase: Phase
    layer: int
    step: int
    tiles: int
    wait: int
    signal: int
    ahead: int = -1


Program = tuple[Instruction, ...]


def tiles_of(phase: Phase, shape: Shape, tiles: Tiles) -> int:
    """Tiles of a phase."""
    split = {
        Phase.QKV: (shape.heads + 2 * shape.kv_heads) * -(-shape.head_dim // tiles.qkv),
        Phase.ATTEND: shape.batch * shape.kv_heads * shape.parts,
        Phase.MERGE: shape.batch * -(-shape.heads // tiles.merge),
        Phase.OUT: -(-shape.dim // tiles.out),
        Phase.GATE_UP: -(-2 * shape.ffn // tiles.gate_up),
        Phase.DOWN: -(-shape.dim // tiles.down),
        Phase.HEAD: -(-shape.vocab // tiles.head),
    }
    return split.get(phase, shape.batch)


@functools.cache
def program(shape: Shape, tiles: Tiles, blocks: int) -> Program:
    """The list for a grid of so many blocks."""
    made: list[Instruction] = []
    barriers = 0
    order = list(_order(shape))
    for i, (phase, layer, step, barrier) in enumerate(order):
        barriers += barrier and i > 0
        last_before_barrier = i + 1 == len(order) or order[i + 1][3]
        wait = barriers * blocks if barrier and i > 0 else 0
        made.append(Instruction(phase, layer, step, tiles_of(phase, shape, tiles), wait, int(last_before_barrier)))
    return tuple(_looking_ahead(made))


def _order(shape: Shape) -> Iterator[tuple[Phase, int, int, bool]]:
    """(phase, layer, step, whether a barrier lies before it)."""
    yield Phase.EMBED, 0, 0, False
    for step in range(shape.steps):
        for layer in range(shape.layers):
            yield Phase.QKV, layer, step, True
            yield Phase.ATTEND, layer, step, True
            if shape.merges_ahead:
                yield Phase.MERGE, layer, step, True
            yield Phase.OUT, layer, step, True
            yield Phase.GATE_UP, layer, step, True
            yield Phase.DOWN, layer, step, True
        if shape.norm:
            yield Phase.NORM, 0, step, True
        if shape.vocab:
            yield Phase.HEAD, 0, step, not shape.norm  # reads what the norm reads, so it follows without a barrier
            yield Phase.SAMPLE, 0, step, True


def _looking_ahead(made: list[Instruction]) -> Iterator[Instruction]:
    """Each weight is asked for once: at the first wait after the weight before it was in use."""
    asked = -1
    for i, instruction in enumerate(made):
        ahead = -1
        if instruction.wait or i == 0:
            coming = next((j for j in range(i, len(made)) if made[j].phase in WEIGHTED), -1)
            if coming > asked:
                ahead = asked = coming
        yield replace(instruction, ahead=ahead)


COLUMNS = 9
"""Numbers of an instruction in the table: the fields of Instruction, but of `ahead` the phase (-1 = none) and the
layer; and a zero."""


@functools.cache
def table(listed: Program, device: torch.device) -> torch.Tensor:
    """The list as the kernel reads it, (instructions, COLUMNS) int32: phase, layer, step, tiles, wait, signal, phase
    and layer of the weight to ask for, 0."""
    numbers = []
    for one in listed:
        coming = listed[one.ahead] if one.ahead >= 0 else None
        ahead = (-1, 0) if coming is None else (int(coming.phase), coming.layer)
        numbers.append([int(one.phase), one.layer, one.step, one.tiles, one.wait, one.signal, *ahead, 0])
    return torch.tensor(numbers, dtype=torch.int32).to(device)


def barriers(listed: Program) -> int:
    """Waits of the list."""
    return sum(instruction.wait > 0 for instruction in listed)


X, Q, KV, PARTS, MERGED, INNER, LOGITS, ENTRY = "x", "q", "kv", "parts", "merged", "inner", "logits", "entry"
"""What phases exchange: the residual stream, queries, caches by layer, attention's parts, merged and SwiGLU's outputs,
logits, and an entry's own numbers (its row, lengths, history)."""
READS: dict[Phase, tuple[str, ...]] = {
    Phase.EMBED: (),
    Phase.QKV: (X, ENTRY),
    Phase.ATTEND: (Q, KV, ENTRY),
    Phase.MERGE: (PARTS,),
    Phase.OUT: (MERGED, PARTS, ENTRY),
    Phase.GATE_UP: (X, ENTRY),
    Phase.DOWN: (INNER, ENTRY),
    Phase.NORM: (X, ENTRY),
    Phase.HEAD: (X, ENTRY),
    Phase.SAMPLE: (LOGITS,),
}
"""What a tile reads that any tile may have written."""
OWN: dict[Phase, tuple[str, ...]] = {Phase.OUT: (X,), Phase.DOWN: (X,), Phase.SAMPLE: (ENTRY,)}
"""What a tile reads only where it then writes: the residual, its entry's numbers."""
WRITES: dict[Phase, tuple[str, ...]] = {
    Phase.EMBED: (X, ENTRY),
    Phase.QKV: (Q, KV),
    Phase.ATTEND: (PARTS,),
    Phase.MERGE: (MERGED,),
    Phase.OUT: (X,),
    Phase.GATE_UP: (INNER,),
    Phase.DOWN: (X,),
    Phase.NORM: (),
    Phase.HEAD: (LOGITS,),
    Phase.SAMPLE: (X, ENTRY),
}
