"""`minmo loadtest`: what simulated users see of a server under load, as a table, a plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minmo.audio import load_audio
from minmo.clock import percentile
from minmo.fast.profile import figures
from minmo.serving.clients import LEVELS, Level, run_levels, websockets

NOTE = (
    "latencies: p50 / p95 in ms (n), as the clients saw them: first audio from the end of the user's turn, stops from "
    "the interruption's begin; lost: replies of which bytes did not come; damaged: others came, or in another order; "
    "client late: where this is large, this machine could not play so many users"
)


def table(levels: Sequence[Level]) -> Table:
    """To print with rich; latencies p50 / p95 in milliseconds."""
    shown = Table("clients at once", *(str(level.sessions) for level in levels), padding=(0, 0))
    served = [[s for s in level.seen if not s.refused] for level in levels]
    stops = [[stop for s in seen for stop in s.stops] for seen in served]
    lags = [[lag for s in seen for lag in s.lags] for seen in served]
    rows: dict[str, list[str]] = {
        "refused": [str(len(level.seen) - len(seen)) for level, seen in zip(levels, served, strict=True)],
        "first audio": [_spread([ms for s in seen for ms in s.first_audio]) for seen in served],
        "unanswered turns": [str(sum(s.unanswered for s in seen)) for seen in served],
        **{
            f"stop: {name}": [_spread([stop[n] for stop in each]) for each in stops]
            for n, name in enumerate(("decision", "last byte", "last sound"))
        },
        "not stopped": [str(sum(s.unstopped for s in seen)) for seen in served],
        "deadline misses / ticks": [f"{level.misses:.0f} / {level.ticks:.0f}" for level in levels],
        "lost / replies": [f"{sum(s.lost for s in seen)} / {sum(s.sounds for s in seen)}" for seen in served],
        "damaged / replies": [f"{sum(s.damaged for s in seen)} / {sum(s.sounds for s in seen)}" for seen in served],
        "errors": [str(sum(len(s.errors) for s in seen)) for seen in served],
        "client late, p95": [f"{percentile(late, 95):.0f} ms" if late else "-" for late in lags],
    }
    for name, cells in rows.items():
        shown.add_row(name, *cells)
    return shown


def _spread(values: Sequence[float]) -> str:
    return f"{percentile(values, 50):.0f} / {percentile(values, 95):.0f} ({len(values)})" if values else "-"


def draw(levels: Sequence[Level], url: str, path: Path) -> None:
    """A PNG: latencies and the share of missed deadlines against the number of sessions."""
    figure = figures().Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, take in (
        ("first audio", lambda s: s.first_audio),
        ("stop: decision", lambda s: [x[0] for x in s.stops]),
        ("stop: last byte", lambda s: [x[1] for x in s.stops]),
        ("stop: last sound", lambda s: [x[2] for x in s.stops]),
    ):
        points = [(level.sessions, [ms for s in level.seen for ms in take(s)]) for level in levels]
        points = [(sessions, values) for sessions, values in points if values]
        if points:
            (line,) = left.plot([n for n, _ in points], [percentile(v, 50) for _, v in points], "o-", label=name)
            left.plot([n for n, _ in points], [percentile(v, 95) for _, v in points], "^--", color=line.get_color())
    at = [level.sessions for level in levels]
    right.plot(at, [100 * x.misses / max(x.ticks, 1) for x in levels], "o-", label="missed deadlines, % of ticks")
    right.plot(at, [100 * sum(bool(s.refused) for s in x.seen) / x.sessions for x in levels], "s-", label="refused, %")
    left.set_ylabel("ms; circles: p50, triangles: p95")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [str(n) for n in at])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("clients at once")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(url)
    figure.savefig(path, dpi=120)


def loadtest(
    url: Annotated[str, typer.Argument(help="A server's address, as http://127.0.0.1:8000.")],
    sessions: Annotated[
        list[int] | None, typer.Option(min=1, max=1024, help="Clients at once; repeat for more levels (1 2 4 8 16 32).")
    ] = None,
    wav: Annotated[list[str] | None, typer.Option(help="What the clients say; repeat for more (a sum).")] = None,
    seconds: Annotated[float, typer.Option(min=5, max=3600, help="Of each level.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of who interrupts whom when.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A folder for loadtest.json and loadtest.png.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MINMO_API_KEY", help="The server's key.")] = None,
) -> None:
    """Simulated users of a server, in real time: what they see of its latencies, and whether anything is lost."""
    from importlib.resources import files

    out, err = Console(), Console(stderr=True)
    websockets("asyncio.client")  # before anything else is done
    names = wav or [str(files("minmo") / "assets" / "sum.wav")]
    sounds = [(Path(name).stem, load_audio(name)) for name in names]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)

    def tell(level: Level) -> None:
        for reason in dict.fromkeys(s.refused for s in level.seen if s.refused):
            err.print(f"{level.sessions} sessions: refused: {reason}", highlight=False, markup=False, soft_wrap=True)
        for error in dict.fromkeys(e for s in level.seen for e in s.errors):
            err.print(f"{level.sessions} sessions: error: {error}", highlight=False, markup=False, soft_wrap=True)

    levels = run_levels(url, sounds, sessions or LEVELS, seconds=seconds, seed=seed, key=api_key, progress=tell)
    out.print(table(levels))
    out.print(NOTE, highlight=False)
    if output is not None:
        written = {"url": url, "seconds": seconds, "seed": seed, "levels": [asdict(level) for level in levels]}
        (output / "loadtest.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        draw(levels, url, output / "loadtest.png")
        out.print(f"written: {output}", highlight=False, markup=False, soft_wrap=True)
    if all(s.refused for level in levels for s in level.seen):
        raise ValueError(f"no session could begin at {url}; the lines above say why")
