"""What the kernels' machine code says of their speed, without a GPU: resources, occupancy, and static bounds.

    python profiling/static_report.py [--preset minmo-8b] [--sm 80|90|100] [--operation NAME] [--write-budgets]

For each shipped kernel configuration: registers, stack and shared memory; warps that fit on an SM; programs; bytes that
the launch must move; the loop that loads most and its bounds (`minmo_kernels/testing/bounds.py`). For each chip: the
bound as a multiple of the memory's share of an SM, the bytes under way an SM, and the waves. Estimates from the binary,
not measurements.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels.spec import SPECS, load_all
from minmo_kernels.testing import gate
from minmo_kernels.testing.binary import compiled
from minmo_kernels.testing.bounds import CHIPS, resident_blocks

BUDGETS = Path(__file__).parents[1] / "tests" / "minmo_kernels" / "budgets.json"


def report(preset: str, sm: int, operation: str | None) -> tuple[Table, dict[str, dict[str, Any]]]:
    """The table for a compute capability, and what it measured as budgets."""
    table = Table(title=f"{preset} on sm_{sm}, Triton {gate.triton_version()}: static, nothing ran", show_lines=True)
    for column in ("kernel", "registers, stack, shared", "moves", "programs", "loop", "B/clk"):
        table.add_column(column)
    for chip in CHIPS[sm]:
        table.add_column(f"{chip.name}: x {chip.share:.1f} B/clk; KB of {chip.in_flight / 1024:.0f}; waves; warps")
    found = {}
    for name, part, case, record in gate.shipped(kernel_dims(load_config(preset)), sm, operation):
        binary = compiled(record, sm)
        budget, reasons = gate.measured(record, binary), gate.reasons_for(BUDGETS, record)
        if not list(gate.faults(record, binary, sm, budget, known=True, reasons=reasons)):
            budget["proved"] = gate.proof(record, sm, budget, reasons)
        found[f"sm_{sm} {record.key}"] = budget
        limit = gate.limits(record, binary)
        programs = record.grid[0] * record.grid[1] * record.grid[2]
        row = [
            f"{name} ({part}): {record.key}", f"{binary.registers}, {binary.stack}, {binary.shared}",
            f"{SPECS[name].bytes(case):,}", str(programs), str(limit.loop), f"{limit.rate:.0f}",
        ]  # fmt: skip
        for chip in CHIPS[sm]:
            blocks = max(1, resident_blocks(binary, chip))
            flight = gate.in_flight(record, binary, chip) / 1024
            waves = programs / (chip.sms * blocks)
            row.append(f"{limit.rate / chip.share:.1f}; {flight:.0f}; {waves:.2f}; {blocks * binary.warps}")
        table.add_row(*row)
    return table, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minmo-8b")
    parser.add_argument("--sm", type=int, action="append", choices=sorted(CHIPS))
    parser.add_argument("--operation", "--op", choices=list(load_all()))
    parser.add_argument("--write-budgets", action="store_true", help="make what is measured now the budget")
    options = parser.parse_args()
    console, budgets = Console(width=200), {}
    sms = options.sm or sorted(gate.SHARED_LIMIT)
    for sm in sms:
        table, found = report(options.preset, sm, options.operation)
        console.print(table)
        budgets.update(found)
    if options.write_budgets:
        gate.write_budgets(BUDGETS, budgets, sms if options.operation is None else ())
        console.print(f"{len(budgets)} budgets -> {BUDGETS}")


if __name__ == "__main__":
    main()
