"""Measured cases as a table and a plot; whole steps beside other people's as ratios.

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
        return [b["extra_info"] for b in stored["benchmarks"] if "operation" in b["extra_info"]]
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


def peers(found: Iterable[Entry]) -> str:
    """Markdown: a table a whole step, a line a contender, with its ratio to the first; of quantised weights what they
    change."""
    blocks = []
    for e in found:
        lines = [
            f"{e['operation']}, {e['part']}: {e['device']}, {e.get('threads', '?')} threads, torch {e['torch']}", "",
            "| | median | 95 % | ratio |", "|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {name} | {1e3 * p['seconds']:.2f} ms | {1e3 * p['p95']:.2f} ms | {p['ratio']:.2f} |"
            for name, p in e["peers"].items()
        ]
        lines += [
            f"\n{weights}: KL to fp32 {divergence:.1e} nats, greedy tokens alike {same:.0%}"
            for weights, (divergence, same) in e.get("quality", {}).items()
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, ""])


def plot(found: Iterable[Entry], folder: Path) -> list[Path]:
    """A PNG an operation: a bar a backend, a group a case, on a logarithmic axis of microseconds. A case is named by
    what tells it from the operation's others; what all share stands in the title."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    by_operation: dict[str, list[Entry]] = {}
    for e in found:
        by_operation.setdefault(e["operation"], []).append(e)
    written = []
    for operation, group in by_operation.items():
        words = [described({"part": e["part"], **e["case"]}).split(", ") for e in group]
        shared = [word for word in words[0] if all(word in other for other in words)]
        labels = [", ".join(word for word in own if word not in shared) for own in words]
        places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        backends = sorted({e["backend"] for e in group})
        figure = Figure(figsize=(12, 1.5 + 0.22 * len(places) * len(backends)), layout="constrained")
        axes = figure.subplots()
        for i, backend in enumerate(backends):
            height = 0.8 / len(backends)
            shift = height * (i - (len(backends) - 1) / 2)
            own = [(label, e) for label, e in zip(labels, group, strict=True) if e["backend"] == backend]
            bars = axes.barh(
                [places[label] + shift for label, _ in own], [1e6 * e["seconds"] for _, e in own], height, label=backend
            )
            axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.set_yticks(range(len(places)), list(places), fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("µs, median")
        axes.set_title(f"{operation} on {group[0]['device']}\n{', '.join(shared)}", fontsize=9)
        axes.invert_yaxis()
        axes.legend(fontsize=8, loc="lower right")
        written.append(folder / f"{operation}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="where the table goes; to the terminal otherwise")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="a PNG an operation")
    options = parser.parse_args()
    everything = [e for path in options.results for e in entries(path)]
    found, whole = [e for e in everything if "seconds" in e], [e for e in everything if "peers" in e]
    text = "\n".join([table(found)] * bool(found) + [peers(whole)] * bool(whole))
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
    if options.plot is not None:
        for path in plot(found, options.plot):
            print(path)


if __name__ == "__main__":
    main()
