"""An exhaustive check of the instruction list: every interleaving of a few blocks, over several launches in a row.

    python -m minmo_kernels.ops.decoder_step.proof

A model of memory stands in for the tensors: each cell holds the number of the instruction and launch that wrote it
last. A tile reads its cells in one step and writes them in another, and what it must find there is what it finds when
one block after another runs each phase. Checked in every reachable state: no block waits for ever, every tile reads
what it must, and at the end of a launch the counters are zero. Stores are seen by other blocks at once ("early"), or at
the storing block's next arrival and no sooner ("late"). With `expires`, one waiting block may run out of its bound at
any moment: the others must then leave by the error word alone, the counters be zero again, and the next launch, before
which the host has taken the word back, be as right as any.

The check is worth something if it notices errors: `mutants` are lists with a barrier dropped, moved or miscounted, and
protocols with a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from minmo_kernels.ops.decoder_step.control import (
    NO_FAULTS,
    Block,
    Counters,
    Faults,
    Stage,
    Tile,
    advance,
    expire,
)
from minmo_kernels.ops.decoder_step.schedule import (
    KV,
    OWN,
    READS,
    WRITES,
    Program,
    Shape,
    Tiles,
    program,
)

Cell = tuple[str, int, int]
"""Buffer, layer (of caches), and which of the writer's tiles."""
Stamp = tuple[int, int]
"""Launch and instruction; (-1, -1) before anything was written."""
NOTHING: Stamp = (-1, -1)


class Failure(Exception):
    """What an interleaving did wrong."""


@dataclass(frozen=True)
class Verdict:
    """states: that were reached. fault: what is wrong, None = nothing."""

    states: int
    fault: str | None


class _State(NamedTuple):
    blocks: tuple[Block, ...]
    counters: Counters
    memory: tuple[Stamp, ...]
    busy: tuple[Tile | None, ...]
    """The tile of each block that has read and not yet written."""
    pending: tuple[tuple[tuple[int, Stamp], ...], ...]
    """Late stores of each block: (cell, stamp)."""
    launch: int


class _Model:
    """Cells of a program's buffers, and which of them a tile touches."""

    def __init__(self, listed: Program) -> None:
        self.listed = listed
        self.cells: dict[Cell, int] = {}
        self.width: dict[str, int] = {}
        for instruction in listed:
            for buffer in WRITES[instruction.phase]:
                self.width[buffer] = max(self.width.get(buffer, 0), instruction.tiles)
        for instruction in listed:
            for buffer in WRITES[instruction.phase]:
                for cell in range(self.width[buffer]):
                    self.cells.setdefault((buffer, self._layer(buffer, instruction.layer), cell), len(self.cells))
        self._touched = {
            (at, tile): self._cells(at, tile)
            for at, instruction in enumerate(listed)
            for tile in range(instruction.tiles)
        }
        self.expected: dict[tuple[int, int, int], tuple[Stamp, ...]] = {}

    @staticmethod
    def _layer(buffer: str, layer: int) -> int:
        return layer if buffer == KV else 0

    def _cells(self, at: int, tile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(read, written) cells: of a buffer with more cells than a phase has tiles, n, tile t has t, t + n …"""
        one = self.listed[at]

        def cells(buffer: str, own: bool) -> Iterator[int]:
            for cell in range(self.width.get(buffer, 0)):
                if not own or cell % one.tiles == tile:
                    yield self.cells[buffer, self._layer(buffer, one.layer), cell]

        reads = [c for buffer in READS[one.phase] for c in cells(buffer, False)]
        reads += [c for buffer in OWN.get(one.phase, ()) for c in cells(buffer, True)]
        return tuple(reads), tuple(c for buffer in WRITES[one.phase] for c in cells(buffer, True))

    def reads(self, tile: Tile) -> tuple[int, ...]:
        return self._touched[tile][0]

    def writes(self, tile: Tile) -> tuple[int, ...]:
        return self._touched[tile][1]

    def run_in_order(self, launches: int) -> None:
        """Notes what each tile finds when the list runs instruction by instruction."""
        memory = [NOTHING] * len(self.cells)
        for launch in range(launches):
            for at, instruction in enumerate(self.listed):
                for tile in range(instruction.tiles):
                    one = Tile(at, tile)
                    self.expected[launch, at, tile] = tuple(memory[c] for c in self.reads(one))
                    for cell in self.writes(one):
                        memory[cell] = (launch, at)


def check(
    listed: Program,
    blocks: int,
    *,
    right: Program | None = None,
    launches: int = 3,
    late: bool = False,
    expires: bool = False,
    faults: Faults = NO_FAULTS,
    releases: bool = True,
) -> Verdict:
    """Explores every interleaving of `launches` launches. right: the list that says what tiles must find, where
    `listed` is a mutant of it. releases: whether an arrival makes a block's stores seen (late)."""
    model = _Model(right or listed)
    model.run_in_order(launches)
    start = _State((Block(),) * blocks, Counters(), (NOTHING,) * len(model.cells), (None,) * blocks, ((),) * blocks, 0)
    seen, todo = {start}, [start]
    try:
        while todo:
            state = todo.pop()
            for following in _following(model, listed, blocks, state, launches, late, expires, faults, releases):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
    except Failure as failure:
        return Verdict(len(seen), str(failure))
    return Verdict(len(seen), None)


def _following(
    model: _Model,
    listed: Program,
    blocks: int,
    state: _State,
    launches: int,
    late: bool,
    expires: bool,
    faults: Faults,
    releases: bool,
) -> Iterator[_State]:
    if all(block.stage == Stage.DONE for block in state.blocks):
        if state.counters[:2] != (0, 0):
            raise Failure(f"after launch {state.launch + 1} the counters are {tuple(state.counters[:2])}, not zero")
        if state.launch + 1 < launches:
            memory = _stored(state.memory, [store for stores in state.pending for store in stores])  # a launch's end
            yield _State((Block(),) * blocks, Counters(), memory, state.busy, ((),) * blocks, state.launch + 1)
        return
    moved = False
    for me in range(blocks):
        for following in _steps(model, listed, blocks, me, state, late, expires, faults, releases):
            moved = True
            yield following
    if not moved:
        stuck = sorted({block.at for block in state.blocks if block.stage == Stage.WAIT})
        names = ", ".join(f"{at} ({listed[at].phase.name})" for at in stuck)
        raise Failure(f"deadlock: blocks wait at instruction {names} with {state.counters.arrived} arrivals")


def _steps(
    model: _Model,
    listed: Program,
    blocks: int,
    me: int,
    state: _State,
    late: bool,
    expires: bool,
    faults: Faults,
    releases: bool,
) -> Iterator[_State]:
    if (tile := state.busy[me]) is not None:  # it has read: now it writes
        stores = [(cell, (state.launch, tile.at)) for cell in model.writes(tile)]
        busy = _with(state.busy, me, None)
        if late:
            merged = tuple(sorted({**dict(state.pending[me]), **dict(stores)}.items()))
            yield state._replace(busy=busy, pending=_with(state.pending, me, merged))
        else:
            yield state._replace(busy=busy, memory=_stored(state.memory, stores))
        return
    block = state.blocks[me]
    waits = block.stage == Stage.WAIT and listed[block.at].wait > state.counters.arrived
    if expires and waits and not state.counters.error:
        gone, counters = expire(block, state.counters)
        yield state._replace(blocks=_with(state.blocks, me, gone), counters=counters)
    step = advance(listed, blocks, me, block, state.counters, faults)
    if step is None:
        return
    tile, following, counters, releasing = step
    moved = state._replace(blocks=_with(state.blocks, me, following), counters=counters)
    if tile is not None:
        own = dict(state.pending[me])
        found = tuple(own.get(cell, state.memory[cell]) for cell in model.reads(tile))
        if not counters.error and found != model.expected[state.launch, tile.at, tile.tile]:
            wrong = listed[tile.at]
            raise Failure(f"tile {tile.tile} of {wrong.phase.name}, layer {wrong.layer}, reads what is not written yet")
        moved = moved._replace(busy=_with(state.busy, me, tile))
    if releasing and releases and state.pending[me]:
        moved = moved._replace(memory=_stored(state.memory, state.pending[me]), pending=_with(state.pending, me, ()))
    yield moved


def _with(values: tuple, at: int, value: object) -> tuple:
    return (*values[:at], value, *values[at + 1 :])


def _stored(memory: tuple[Stamp, ...], stores: object) -> tuple[Stamp, ...]:
    changed = list(memory)
    for cell, stamp in stores:  # type: ignore[attr-defined]
        changed[cell] = stamp
    return tuple(changed)


SMALL = Shape(batch=2, layers=2, dim=3, heads=1, kv_heads=1, head_dim=1, ffn=1, vocab=2, steps=1, parts=1)
"""Two or three tiles a phase over two layers, head and choice."""
ONE = Tiles(qkv=1, out=1, gate_up=1, down=1, head=1)
SHORT = replace(SMALL, layers=1)
"""What is explored where any wait may run out."""
LISTED = (
    SMALL, replace(SMALL, merges_ahead=True), replace(SMALL, layers=1, steps=2),
    replace(SMALL, vocab=0), replace(SMALL, vocab=0, norm=False),
)  # fmt: skip
"""Two layers; with a phase that merges; two tokens; a position without a head; and without the last norm."""


@dataclass(frozen=True)
class Mutant:
    """A faulty list or protocol, and whether its stores come late."""

    name: str
    listed: Program
    faults: Faults = NO_FAULTS
    late: bool = False
    releases: bool = True
    expires: bool = False


def mutants(listed: Program, blocks: int) -> Iterator[Mutant]:
    """Each barrier dropped, moved to either side, and miscounted by one and by a grid; each arrival forgotten or
    counted twice; and faults of the protocol."""

    def changed(at: int, **fields: int) -> Program:
        return (*listed[:at], replace(listed[at], **fields), *listed[at + 1 :])

    for at, one in enumerate(listed):
        name = f"{one.phase.name} of layer {one.layer}, token {one.step}"
        if one.wait:
            yield Mutant(f"barrier before {name} dropped", changed(at, wait=0))
            earlier = changed(at, wait=0)
            yield Mutant(
                f"barrier before {name} an instruction early",
                (*earlier[: at - 1], replace(listed[at - 1], wait=one.wait), *earlier[at:]),
            )
            if at + 1 < len(listed):
                later = replace(listed[at + 1], wait=max(one.wait, listed[at + 1].wait))
                yield Mutant(
                    f"barrier before {name} an instruction late", (*earlier[: at + 1], later, *listed[at + 2 :])
                )
            for off in (-blocks, -1, 1, blocks):
                if one.wait + off > 0 or off == -1:
                    yield Mutant(f"barrier before {name} counts {off:+d}", changed(at, wait=one.wait + off))
        if one.signal and at + 1 < len(listed):
            yield Mutant(f"arrival after {name} forgotten", changed(at, signal=0))
            yield Mutant(f"arrival after {name} counted twice", changed(at, signal=2))
        elif not one.signal:
            yield Mutant(f"arrival after {name} too early", changed(at, signal=1))
    yield Mutant("counters are not reset", listed, Faults(keeps_counters=True))
    yield Mutant("a block that has left is not counted", listed, Faults(leaves_unseen=True))
    yield Mutant("arrivals do not release stores", listed, late=True, releases=False)
    yield Mutant("a waiting block ignores the error word", listed, Faults(ignores_error=True), expires=True)


@dataclass(frozen=True)
class Report:
    """states: of the right list, by what was explored; caught, missed: mutants, by name and what gave them away."""

    states: dict[str, int]
    caught: dict[str, str]
    missed: list[str]

    def __str__(self) -> str:
        lines = [f"{n:>9,} states: {name}, no fault" for name, n in self.states.items()]
        lines.append(f"{sum(self.states.values()):>9,} states in all")
        lines.append(f"{len(self.caught)} of {len(self.caught) + len(self.missed)} mutants of the list caught")
        lines += [f"  missed: {name}" for name in self.missed]
        return "\n".join(lines)


def prove(grids: tuple[int, ...] = (2, 3)) -> Report:
    """Explores the right lists, in every form, and all mutants. Raises Failure where a right list has a fault."""
    states, caught, missed = {}, {}, []
    for blocks in grids:
        for shape in LISTED:
            listed = program(shape, ONE, blocks)
            for late in (False, True):
                name = f"{blocks} blocks, layers x tokens {shape.layers} x {shape.steps}, 3 launches, "
                name += "" if shape.vocab else "no head, "
                name += f"{len(listed)} instructions, stores {'late' if late else 'early'}"
                verdict = check(listed, blocks, late=late)
                if verdict.fault:
                    raise Failure(f"{name}: {verdict.fault}")
                states[name] = verdict.states
        verdict = check(program(SHORT, ONE, blocks), blocks, expires=True)
        if verdict.fault:
            raise Failure(f"{blocks} blocks, a wait runs out: {verdict.fault}")
        states[f"{blocks} blocks, 1 layer, 3 launches, any wait may run out"] = verdict.states
        for shape in (LISTED[0], LISTED[2]):
            listed = program(shape, ONE, blocks)
            for mutant in mutants(listed, blocks):
                found = check(
                    mutant.listed, blocks, right=listed, late=mutant.late, releases=mutant.releases,
                    faults=mutant.faults, expires=mutant.expires,
                )  # fmt: skip
                name = f"{blocks} blocks, {shape.layers} x {shape.steps}: {mutant.name}"
                if found.fault is None:
                    missed.append(name)
                else:
                    caught[name] = found.fault
    return Report(states, caught, missed)


if __name__ == "__main__":
    report = prove()
    print(report)
    raise SystemExit(1 if report.missed else 0)
