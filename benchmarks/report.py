"""Measured cases as a table and a plot.

    python benchmarks/report.py RESULTS.json ... [-o RESULTS.md] [--plot FOLDER]

RESULTS.json is what `pytest benchmarks/ --results FILE` has written, or pytest-benchmark's own `--benchmark-json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]


def entries(path: Path) -> list[Entry]:
    """The measured cases of a file of either kind."""
    stored = json.loads(path.read_text())
    if "benchmarks" in stored:
        return [b["extra_info"] for b in stored["benchmarks"] if "seconds" in b["extra_info"]]
    return list(stored.values())


def described(case: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in case.items() if k not in ("seed", "filled"))


def table(found: Iterable[Entry]) -> str:
    """Markdown: a line a case, its backends side by side, the fastest first."""
    lines: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    machines = {}
    for e in found:
        figure = f"{e['backend']} {1e6 * e['seconds']:.1f} µs, {e['gb_per_s']:.1f} GB/s"
        if "of_copy_bandwidth" in e:
            figure += f", {100 * e['of_copy_bandwidth']:.0f} % of copy"
        if not e.get("graph", True):
            figure += " (no graph: launches included)"
        lines.setdefault((e["operation"], e["part"], described(e["case"])), []).append((e["seconds"], figure))
        machines[f"{e['device']}, torch {e['torch']}, triton {e['triton']}"] = None
    return "\n".join(
        [
            *(f"Measured on {m}; medians." for m in machines),
            "",
            "| operation | part | case | backends |",
            "|---|---|---|---|",
            *(f"| {o} | {p} | {c} | {'; '.join(f for _, f in sorted(fs))} |" for (o, p, c), fs in lines.items()),
            "",
        ]
    )


def plot(found: Iterable[Entry], folder: Path) -> list[Path]:
    """A PNG an operation: a bar a case and backend, on a logarithmic axis of microseconds."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    by_operation: dict[str, list[Entry]] = {}
    for e in found:
        by_operation.setdefault(e["operation"], []).append(e)
    written = []
    for operation, group in by_operation.items():
        figure = Figure(figsize=(12, 1 + 0.3 * len(group)), layout="constrained")
        axes = figure.subplots()
        labels = [f"{e['part']}: {described(e['case'])} [{e['backend']}]" for e in group]
        axes.barh(labels, [1e6 * e["seconds"] for e in group])
        axes.set_xscale("log")
        axes.set_xlabel("µs, median")
        axes.set_title(f"{operation} on {group[0]['device']}")
        axes.invert_yaxis()
        written.append(folder / f"{operation}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="where the table goes; to the terminal otherwise")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="a PNG an operation")
    options = parser.parse_args()
    found = [e for path in options.results for e in entries(path)]
    if options.output is None:
        print(table(found), end="")
    else:
        options.output.write_text(table(found))
    if options.plot is not None:
        for path in plot(found, options.plot):
            print(path)


if __name__ == "__main__":
    main()
