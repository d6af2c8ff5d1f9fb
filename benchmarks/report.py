"""A benchmark's JSON as a table.

python benchmarks/report.py results.json [-o RESULTS.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Markdown: one line a case, its backends side by side in the order of their time."""
    lines: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    machines = set()
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        case = ", ".join(f"{k} {v}" for k, v in info["case"].items() if k != "seed")
        share = info.get("of_copy_bandwidth")
        figure = f"{info['backend']} {1e6 * info['seconds']:.1f} µs, {info['gb_per_s']:.0f} GB/s"
        figure += "" if share is None else f", {100 * share:.0f} % of copy"
        lines.setdefault((info["operation"], info["part"], case), []).append((info["seconds"], figure))
        machines.add(f"{info['device']}, torch {info['torch']}, triton {info['triton']}")
    rows = [
        f"| {operation} | {part} | {case} | {'; '.join(figure for _, figure in sorted(figures))} |"
        for (operation, part, case), figures in lines.items()
    ]
    head = [
        *(f"Measured on {m}." for m in sorted(machines)),
        "",
        "| operation | part | case | median |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    text = table(json.loads(options.results.read_text()))
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
