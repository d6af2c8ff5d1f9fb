"""What the kernels' machine code says of their speed, without a GPU: resources, occupancy, and three static bounds.

    python profiling/static_report.py [--preset minmo-8b] [--sm 90] [--write-budgets]

For each shipped kernel: registers and shared memory; warps that fit on an SM; bytes that the launch must move; and for
the loop that loads most, beside the chip's memory bandwidth:
- issue: bytes a clock an SM if its four schedulers issue the loop's instructions without a pause;
- flight: bytes under way an SM, and what Little's law asks for (bandwidth x latency);
- waves: programs over those that fit on the chip at once.
Estimates from the binary, not measurements: they say what cannot be faster, never how fast it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels.spec import SPECS
from minmo_kernels.testing import gate
from minmo_kernels.testing.binary import Binary, compiled

BUDGETS = Path(__file__).parents[1] / "tests" / "minmo_kernels" / "budgets.json"
LATENCY = 700e-9
"""Seconds from a load to its data under load."""
SCHEDULERS = 4
REGISTERS = 65_536
MOST_WARPS, MOST_BLOCKS = 64, 32


@dataclass(frozen=True)
class Chip:
    """sms, clock in Hz and shared memory an SM; bandwidth in bytes a second: the maker's figure, except the H200's,
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
}


def resident_blocks(binary: Binary, chip: Chip) -> int:
    """Programs that fit on an SM."""
    registers = -(-binary.registers // 8) * 8 * 32 * binary.warps
    shared = chip.shared // (binary.shared + 1024)
    return min(REGISTERS // registers, shared, MOST_WARPS // binary.warps, MOST_BLOCKS)


def loaded_bytes(body: Sequence[str]) -> int:
    """Bytes that one warp loads from global memory in these instructions."""
    total = 0
    for text in body:
        if match := re.search(r"\b(LDG|LDGSTS)(\.\S+)?", text):
            suffix = match[2] or ""
            wide = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
            total += 32 * next((size for name, size in wide.items() if name in suffix), 4)
    return total


def report(preset: str, sm: int) -> tuple[Table, dict[str, dict[str, int]]]:
    chips = CHIPS[sm]
    table = Table(title=f"{preset} on sm_{sm}, Triton {gate.triton_version()}: static, nothing ran")
    for column in ("kernel", "part", "registers", "stack", "shared", "warps/SM", "programs", "moves", "loop", "issue"):
        table.add_column(column)
    for chip in chips:
        table.add_column(f"{chip.name}: memory {chip.share:.1f} B/clk; flight of {chip.in_flight / 1024:.0f} KB; waves")
    budgets = {}
    for name, part, case, record in gate.shipped(kernel_dims(load_config(preset)), sm):
        binary = compiled(record, sm)
        budgets[f"sm_{sm} {record.key}"] = gate.measured(binary)
        body = max(binary.innermost_loops(), key=loaded_bytes, default=())
        issue = SCHEDULERS * loaded_bytes(body) / len(body) if body else 0.0
        programs = record.grid[0] * record.grid[1] * record.grid[2]
        stages = max(1, record.options.get("num_stages", 3) - 1) if binary.count("LDGSTS") else 1
        row = [
            record.key, part, str(binary.registers), str(binary.stack), str(binary.shared),
            "/".join(str(resident_blocks(binary, c) * binary.warps) for c in chips), str(programs),
            f"{SPECS[name].bytes(case):,}", str(len(body)), f"{issue:.0f} B/clk" if issue else "-",
        ]  # fmt: skip
        for chip in chips:
            blocks = resident_blocks(binary, chip)
            flight = min(blocks, -(-programs // chip.sms)) * binary.warps * loaded_bytes(body) * stages
            row.append(
                f"{issue / chip.share:.1f}x; {flight / 1024:.0f} KB; {programs / (chip.sms * max(1, blocks)):.2f}"
            )
        table.add_row(*row)
    return table, budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minmo-8b")
    parser.add_argument("--sm", type=int, action="append", choices=sorted(CHIPS))
    parser.add_argument("--write-budgets", action="store_true", help="make what is measured now the budget")
    options = parser.parse_args()
    console, budgets = Console(width=240), {}
    for sm in options.sm or sorted(CHIPS):
        table, found = report(options.preset, sm)
        console.print(table)
        budgets.update(found)
    if options.write_budgets:
        gate.write_budgets(BUDGETS, budgets)
        console.print(f"{len(budgets)} budgets -> {BUDGETS}")


if __name__ == "__main__":
    main()
