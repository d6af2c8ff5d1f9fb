"""`minmo evaluate`: the scores of a nano, printed and written.

What it needs beyond the model (judges, lhotse and others, the extra `eval`) is imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out, err = Console(), Console(stderr=True)


def evaluate(
    task: Annotated[str, typer.Argument(help="One of the tasks, or all of them.")] = "all",
    preset: Annotated[str, typer.Option(help="A preset, or a checkpoint directory.")] = "nano",
    data: Annotated[Path, typer.Option(help="The corpus that `minmo data nano` wrote.")] = Path("corpus"),
    limit: Annotated[int | None, typer.Option(help="Lines of each set, for a quick run.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--out", help="A JSON file for the scores.")] = None,
    seed: Annotated[int, typer.Option(help="Of speech, of drawn lines and of intervals.")] = 0,
) -> None:
    """Scores a nano on held-out material: hearing, answering, languages, translating, speaking, speech-to-speech
    and turn-taking."""
    from minmo.evaluation.judges import needed

    needed("lhotse")
    from minmo.evaluation.nano import evaluate_nano
    from minmo.evaluation.results import tables

    chosen = () if task == "all" else (task,)
    found = evaluate_nano(
        preset, data, limit, output, tasks=chosen, seed=seed, progress=lambda name: err.print(name, highlight=False)
    )
    for table in tables(found):
        out.print(table)
