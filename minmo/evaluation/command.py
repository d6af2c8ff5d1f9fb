"""`minmo evaluate`: the scores of a nano, printed and written.

What it needs beyond the model (judges, lhotse and others, the extra `eval`) is imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minmo.conversation.front import FRONTS
from minmo.conversation.turn_taking import EAGERNESS

out, err = Console(), Console(stderr=True)


def evaluate(
    task: Annotated[str, typer.Argument(help="One of the tasks, all of them, or duplex: live conversations.")] = "all",
    preset: Annotated[str, typer.Option(help="A preset, or a checkpoint directory.")] = "nano",
    data: Annotated[Path, typer.Option(help="The corpus that `minmo data nano` wrote.")] = Path("corpus"),
    limit: Annotated[int | None, typer.Option(help="Lines of each set, or conversations, for a quick run.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="A JSON file for the scores; of duplex, a folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of speech, of drawn lines and of intervals.")] = 0,
    realtime: Annotated[bool, typer.Option("--realtime", help="duplex: in real time, so that compute counts.")] = False,
    eagerness: Annotated[str, typer.Option(help=f"duplex: how eager to speak, {', '.join(EAGERNESS)}.")] = "auto",
    front: Annotated[str, typer.Option(help=f"duplex: before the model, {', '.join(FRONTS)}.")] = "none",
) -> None:
    """Scores a nano on held-out material: hearing, answering, languages, translating, speaking, speech-to-speech
    and turn-taking; `duplex` holds conversations with it."""
    from minmo.evaluation.judges import needed

    needed("lhotse")
    from minmo.evaluation.nano import evaluate_nano
    from minmo.evaluation.results import tables

    if task == "duplex":
        from minmo.evaluation.duplex import evaluate_duplex

        folder = Path("duplex") if output is None else output
        found = evaluate_duplex(
            preset, data, folder, limit, seed=seed, realtime=realtime, eager=eagerness, front=front,
            progress=lambda name: err.print(name, highlight=False),
        )  # fmt: skip
        for table in tables(found):
            out.print(table)
        out.print(f"written: {folder}", highlight=False, markup=False, soft_wrap=True)
        return
    if realtime or eagerness != "auto" or front != "none":
        raise ValueError("--realtime, --eagerness and --front are of `minmo evaluate duplex`: leave them out here")
    chosen = () if task == "all" else (task,)
    found = evaluate_nano(
        preset, data, limit, output, tasks=chosen, seed=seed, progress=lambda name: err.print(name, highlight=False)
    )
    for table in tables(found):
        out.print(table)
