"""What a binary says of a kernel's speed before anything runs: three static bounds, for the chips that we target.

- issue: bytes a clock an SM, if its four schedulers issue the loop that loads most without a pause;
- slow: the same where conversions and special functions, which run at a half and an eighth of the rate, are the limit;
- flight: bytes under way an SM, against what Little's law asks for (bandwidth x latency).
They say what cannot be faster, never how fast it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minmo_kernels.testing.binary import Binary, Loop

LATENCY = 700e-9
"""Seconds from a load to its data under load."""
SCHEDULERS = 4
_SLOW = {re.compile(r"\b(I2F|F2I|F2F|I2I|FRND)\b"): 64, re.compile(r"\bMUFU\b"): 16}
"""Results a clock an SM of conversions and special functions (CUDA C++ Programming Guide, arithmetic instructions)."""
REGISTERS = 65_536
MOST_WARPS, MOST_BLOCKS = 64, 32
_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


@dataclass(frozen=True)
class Chip:
    """sms, clock in Hz, shared memory of an SM; bandwidth in bytes a second: the maker's figure, except the H200's,
    which is a copy's."""

    name: str
    sms: int
    clock: float
    shared: int
    bandwidth: float

    @property
    def share(self) -> float:
        """Bytes a clock that the memory delivers to an SM."""
        return self.bandwidth / self.sms / self.clock

    @property
    def in_flight(self) -> float:
        """Bytes that must be under way an SM to keep the memory busy."""
        return self.bandwidth * LATENCY / self.sms


CHIPS = {
    80: [Chip("A100", 108, 1.41e9, 164 << 10, 2.04e12)],
    90: [Chip("H100", 132, 1.755e9, 228 << 10, 3.35e12), Chip("H200", 132, 1.755e9, 228 << 10, 4.3e12)],
    100: [Chip("B200", 148, 1.965e9, 228 << 10, 8.0e12)],
}
"""By compute capability; the gate holds 80 and 90, 100 is information."""


@dataclass(frozen=True)
class Bounds:
    """Of a binary's busiest loop. loop: its warp instructions; issue, slow: bytes a clock an SM (infinite where
    nothing limits); loaded: bytes that a warp loads in one turn, times the turns that are under way together."""

    loop: int
    issue: float
    slow: float
    loaded: int

    @property
    def rate(self) -> float:
        """Bytes a clock an SM that neither bound forbids."""
        return min(self.issue, self.slow)


def bounds(binary: Binary, stages: int, streamed: int = 0, turns: int = 1) -> Bounds:
    """stages: the launch's num_stages; loads through shared memory run so many turns less one ahead. streamed: bytes of
    its weight or cache that a warp takes in a turn, where that is known: the rest of what it loads (activations,
    scales) comes from a cache and is no progress. Unrolled loops are then bounded from below; of loops within the
    busiest one a single turn counts. A binary without a loop, which was unrolled for all its `turns`, is taken as a
    whole."""
    if loops := binary.loops():
        return _of_loop(binary, max(loops, key=lambda loop: _progress(loop.own)), stages, streamed)
    whole = Loop(tuple(text for _, text in binary.listing), ())
    bound = _of_loop(binary, whole, stages, streamed * turns)
    return replace(bound, loaded=bound.loaded // turns)


def slowest(binary: Binary, stages: int, streamed: int) -> Bounds:
    """Of a binary with several loops that stream weights (a persistent kernel's phases), those of the one that is the
    most limited. Counted are innermost loops whose loads of 16 bytes a thread, which weights are, come to `streamed` at
    least, the bytes of the smallest tile that a warp takes; not those with special functions: attention, its merge and
    the choice, which operations of their own are held to."""
    found = []
    for loop in binary.loops():
        wide = loaded_bytes([text for text in loop.own if ".128" in text])
        if not loop.nested and wide >= streamed and not any("MUFU" in text for text in loop.own):
            bound = _of_loop(binary, loop, stages, wide)
            found.append(replace(bound, loaded=bound.loaded // max(1, wide // streamed)))
    return min(found, key=lambda bound: bound.rate, default=Bounds(0, float("inf"), float("inf"), 0))


def _of_loop(binary: Binary, busiest: Loop, stages: int, streamed: int) -> Bounds:
    size = loaded_bytes(busiest.own)
    if streamed:
        size = min(size, streamed)

    body = busiest.own + busiest.nested
    slow = max(32 / rate * sum(1 for text in body if kind.search(text)) for kind, rate in _SLOW.items())
    ahead = max(1, stages - 1) if binary.count("LDGSTS") else 1
    return Bounds(
        loop=len(body),
        issue=SCHEDULERS * size / len(body) if body else float("inf"),
        slow=size / slow if slow else float("inf"),
        loaded=min(size, streamed or size) * ahead,
    )


def _progress(body: Sequence[str]) -> tuple[bool, int]:
    """What tells the loop that a kernel is there for: copies that run ahead, else the most bytes."""
    return any("LDGSTS" in text for text in body), loaded_bytes(body)


def resident_blocks(binary: Binary, chip: Chip) -> int:
    """Programs that fit on an SM at once."""
    registers = -(-binary.registers // 8) * 8 * 32 * binary.warps
    shared = chip.shared // (binary.shared + 1024)
    return min(REGISTERS // registers, shared, MOST_WARPS // binary.warps, MOST_BLOCKS)


def loaded_bytes(body: Sequence[str]) -> int:
    """Bytes that one warp loads from global memory in these instructions."""
    total = 0
    for text in body:
        if match := re.search(r"\b(LDG|LDGSTS)\b(\.\S+)?", text):
            suffix = match[2] or ""
            total += 32 * next((size for name, size in _WIDTHS.items() if name in suffix), 4)
    return total
