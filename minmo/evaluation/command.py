"""`minmo evaluate`: the scores of a model, printed and written.

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
    task: Annotated[
        str, typer.Argument(help="A task, all of them, duplex (live conversations), or compare (two folders).")
    ] = "all",
    runs: Annotated[list[Path] | None, typer.Argument(help="compare: the folders of two runs.")] = None,
    preset: Annotated[str, typer.Option(help="A preset, or a checkpoint directory.")] = "nano",
    manifest: Annotated[
        list[Path] | None,
        typer.Option("--manifest", help="Lines of the task (lhotse cuts); may be given several times."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A corpus folder, as `minmo data nano` writes it (default: what ships).")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Lines of each set, or conversations, for a quick run (default: all; 12 for all that ships)."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder to write; a run in it goes on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of speech, of drawn lines and of intervals.")] = 0,
    instruction: Annotated[str | None, typer.Option(help="In place of the lines' own instructions.")] = None,
    transcribe: Annotated[
        bool, typer.Option("--transcribe", help="Also transcribe questions: parts misheard from not known.")
    ] = False,
    max_text_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in text tokens.")] = 200,
    realtime: Annotated[bool, typer.Option("--realtime", help="duplex: in real time, so that compute counts.")] = False,
    eagerness: Annotated[str, typer.Option(help=f"duplex: how eager to speak, {', '.join(EAGERNESS)}.")] = "auto",
    front: Annotated[str, typer.Option(help=f"duplex: before the model, {', '.join(FRONTS)}.")] = "none",
) -> None:
    """Scores a model on manifests, or on the sets of a corpus; `duplex` holds conversations with it, and `compare A B`
    tells two runs apart item by item. `minmo data tasks` says what a line is."""
    from minmo.evaluation.judges import needed

    for package in ("lhotse", "jiwer", "whisper_normalizer", "sacrebleu"):
        needed(package)
    from minmo.evaluation.material import QUICK, SHIPPED
    from minmo.evaluation.results import tables

    manifests, folders, corpus = list(manifest or ()), list(runs or ()), data or SHIPPED
    if task == "compare":
        return _compare(folders, output, seed)
    if folders:
        raise ValueError(f"{folders[0]} is one argument too many: folders are of `minmo evaluate compare A B`")
    if manifests and data is not None:
        raise ValueError("--manifest and --data are two ways to name lines: give one of them")
    if task == "duplex":
        from minmo.evaluation.duplex import evaluate_duplex

        if manifests or instruction is not None or transcribe:
            raise ValueError("duplex talks about a corpus: leave out --manifest, --instruction and --transcribe")
        folder = Path("duplex") if output is None else output
        found = evaluate_duplex(
            preset, corpus, folder, limit, seed=seed, realtime=realtime, eager=eagerness, front=front,
            progress=lambda name: err.print(name, highlight=False),
        )  # fmt: skip
    else:
        from minmo.evaluation.run import evaluate_model

        if realtime or eagerness != "auto" or front != "none":
            raise ValueError("--realtime, --eagerness and --front are of `minmo evaluate duplex`: leave them out here")
        if task == "all" and limit is None and not manifests and data is None:
            limit = QUICK
        folder = Path("scores") if output is None else output
        found = evaluate_model(
            task, preset, manifests, out=folder, data=None if manifests else corpus, limit=limit, seed=seed,
            instruction=instruction, transcribe=transcribe, longest=max_text_tokens, console=err,
        )  # fmt: skip
    for table in tables(found):
        out.print(table)
    out.print(f"written: {folder}", highlight=False, markup=False, soft_wrap=True)


def _compare(folders: list[Path], output: Path | None, seed: int) -> None:
    from minmo.evaluation.compare import compare

    if len(folders) != 2:
        raise ValueError(f"compare takes the folders of two runs, got {len(folders)}")
    _, page = compare(folders[0], folders[1], seed)
    if output is None:
        out.print(page, highlight=False, markup=False, soft_wrap=True)
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.md").write_text(page, encoding="utf-8")
    out.print(f"written: {output / 'compare.md'}", highlight=False, markup=False, soft_wrap=True)
