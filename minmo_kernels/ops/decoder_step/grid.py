"""How many blocks of a persistent kernel are on a chip at once, and whether a grid fits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from minmo_kernels.launch import Launch, compiled_for

PREFETCHED = 0.5
"""Share of the level-2 cache that the weights which are asked for ahead may take."""


@dataclass(frozen=True)
class Chip:
    """What of a GPU decides: its multiprocessors (a MIG slice has fewer), registers and shared memory of each, threads
    and blocks that one holds, bytes that the driver keeps of a block's shared memory, and the level-2 cache."""

    sms: int
    registers: int = 65_536
    shared: int = 228 << 10
    threads: int = 2048
    blocks: int = 32
    reserved: int = 1024
    cache: int = 50 << 20


INTERPRETER = Chip(sms=1)
SHIPPED = {80: Chip(sms=108, shared=164 << 10, cache=40 << 20)}
"""Chips of a capability that need not be there; an H100 for newer ones."""


def chip_of(device: torch.device, sm: int) -> Chip:
    """The GPU of a launch, or one of capability `sm` where launches are only recorded (0 = the interpreter)."""
    if sm == 0:
        return INTERPRETER
    if torch.cuda.is_available():  # what is recorded for a warm-up is for the GPU that is here
        major, minor = torch.cuda.get_device_capability()
        if device.type == "cuda" or sm == 10 * major + minor:
            return _chip(device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device()))
    return SHIPPED.get(sm, Chip(sms=132))


@functools.cache
def _chip(device: torch.device) -> Chip:
    p = torch.cuda.get_device_properties(device)
    return Chip(
        sms=p.multi_processor_count, shared=p.shared_memory_per_multiprocessor,
        threads=p.max_threads_per_multi_processor, cache=p.L2_cache_size,
    )  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """each: blocks on a multiprocessor. share: of the multiprocessors."""

    chip: Chip
    each: int
    share: float

    @property
    def sms(self) -> int:
        return max(1, int(self.chip.sms * self.share))

    @property
    def blocks(self) -> int:
        return self.sms * self.each

    @property
    def prefetch(self) -> int:
        """Bytes of one weight that are asked for ahead."""
        return int(PREFETCHED * self.chip.cache)


def resident(registers: int, shared: int, warps: int, chip: Chip) -> int:
    """Blocks of a kernel that are on a multiprocessor at once; registers a thread, shared memory a block."""
    each = -(-registers // 8) * 8 * 32 * warps
    return min(
        chip.registers // each, chip.shared // (shared + chip.reserved), chip.threads // (32 * warps), chip.blocks
    )


def refused(grid: Grid, fits: int) -> str | None:
    """Why a grid cannot run, with the numbers; None where it can."""
    if fits >= grid.each:
        return None
    return (
        f"its {grid.blocks} blocks are not on this GPU at once: {grid.sms} of {grid.chip.sms} multiprocessors hold "
        f"{fits} each, {grid.sms * fits} in all, and {grid.each} each are wanted; lower `blocks` in the launch "
        "table, or take the layers' own launches"
    )


def misfit(kernel: Any, grid: Grid) -> str | None:
    """`refused` of a compiled kernel."""
    return refused(grid, resident(kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps, grid.chip))


def misfit_of(record: Launch, sm: int, share: float) -> str | None:
    """`refused` of a recorded launch on the current GPU, of capability `sm`; compiles its kernel."""
    kernel = compiled_for(record.kernel, record.grid, *record.arguments, **record.constants, **record.options)
    chip = chip_of(torch.device("meta"), sm)
    return misfit(kernel, Grid(chip, record.grid[0] // Grid(chip, 1, share).sms, share))
