"""How a block walks the instruction list, as one function from state to state: what `machine.py` executes and
`proof.py` explores. The kernel does the same (`kernel.py`, `_decoder_step`).

Counters are those of the kernel's `sync` words: arrivals at barriers, blocks that have left, and the error word. A
block that waits in vain for its bound sets the error word; every waiting block looks at it, and leaves. The last block
to leave takes the first two counters back to zero, in error too, so that the next launch needs no call of the host.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from minmo_kernels.ops.decoder_step.schedule import Program


class Counters(NamedTuple):
    """`sync` of the kernel: error is 0, or 1 + the instruction at which a block gave up."""

    arrived: int = 0
    left: int = 0
    error: int = 0


class Stage(enum.IntEnum):
    WAIT = 0
    WORK = 1
    LEAVE = 2
    DONE = 3


class Block(NamedTuple):
    """Where a block stands: instruction, its next tile, and what it is about."""

    at: int = 0
    tile: int = 0
    stage: Stage = Stage.WAIT


class Tile(NamedTuple):
    """A tile to compute, of an instruction by its index."""

    at: int
    tile: int


@dataclass(frozen=True)
class Faults:
    """Ways in which a kernel could get the protocol wrong, for the proof to notice."""

    keeps_counters: bool = False
    """The last block to leave does not reset."""
    leaves_unseen: bool = False
    """A block that has left is not counted."""
    ignores_error: bool = False
    """A waiting block does not look at the error word."""


NO_FAULTS = Faults()


def advance(
    listed: Program, blocks: int, me: int, block: Block, counters: Counters, faults: Faults = NO_FAULTS
) -> tuple[Tile | None, Block, Counters, bool] | None:
    """One step of block `me`: a tile that it computes, if any; where it then stands; the counters; and whether all that
    it has written is released with this step. None where it can only wait, or is done."""
    if block.stage == Stage.WAIT:
        if counters.error and not faults.ignores_error:
            return None, block._replace(stage=Stage.LEAVE), counters, False
        if counters.arrived < listed[block.at].wait:
            return None
        return None, block._replace(stage=Stage.WORK, tile=me), counters, False
    if block.stage == Stage.WORK:
        instruction = listed[block.at]
        if block.tile < instruction.tiles:
            return Tile(block.at, block.tile), block._replace(tile=block.tile + blocks), counters, False
        following = Block(block.at + 1, 0, Stage.WAIT if block.at + 1 < len(listed) else Stage.LEAVE)
        counted = counters._replace(arrived=counters.arrived + instruction.signal)
        return None, following, counted, instruction.signal > 0
    if block.stage == Stage.LEAVE:
        left = counters.left + (not faults.leaves_unseen)
        if left == blocks and not faults.keeps_counters:
            counters = counters._replace(arrived=0, left=0)
        else:
            counters = counters._replace(left=left)
        return None, block._replace(stage=Stage.DONE), counters, True
    return None


def expire(block: Block, counters: Counters) -> tuple[Block, Counters]:
    """A waiting block's bound runs out: it says so, and leaves."""
    return block._replace(stage=Stage.LEAVE), counters._replace(error=counters.error or block.at + 1)
