"""`minmo train`, `minmo tokenize` and `minmo data`: also run as `torchrun ... -m minmo.training` by many processes.

What they need beyond the model (lhotse and others, the extra `train`) is imported when one of them runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console()
NEEDED = ("lhotse", "torchdata", "tensorboard", "yaml", "matplotlib")
data_app = typer.Typer(no_args_is_help=True, help="Corpora and what a line of data is.")

StageName = Annotated[str, typer.Argument(help="A stage of --list, or all of them.")]
Folder = Annotated[Path, typer.Argument(help="Where to write.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes at work.")]


def train(
    stage: StageName = "",
    config: Annotated[str, typer.Option(help="A recipe: its path, or PRESET/STAGE of those that ship.")] = "",
    start: Annotated[str, typer.Option("--from", help="The model to start from: a preset or a folder.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Where checkpoints and the model go; a run in it goes on, so it must be a folder that you trust.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="What the recipe's manifests are relative to.")] = None,
    preset: Annotated[str, typer.Option(help="Whose recipes serve where no --config is given.")] = "nano",
    list_stages: Annotated[bool, typer.Option("--list", help="Show the stages.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show sizes, memory and steps; nothing is trained.")] = False,
    smoke: Annotated[bool, typer.Option(help="A few steps of each stage, on two recordings if no --data.")] = False,
    skip_bad: Annotated[bool, typer.Option(help="Leave out lines that cannot be used, and count them.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Of all: stages that run side by side, sharing the cores.")] = 1,
) -> None:
    """Trains one stage or all; a run that was stopped goes on from its last checkpoint."""
    _need_packages()
    from minmo.training.plan import plan, show, show_stages
    from minmo.training.recipe import load_recipe
    from minmo.training.stages import STAGES

    if list_stages:
        return show_stages(out)
    if stage != "all" and stage not in STAGES:
        raise ValueError(f"stage must be all or one of {', '.join(STAGES)}, got {stage!r}; see minmo train --list")
    alone = {"--dry-run": dry_run, "--config": config, "--from": start, "--skip-bad": skip_bad}
    if stage == "all" and any(alone.values()):
        raise ValueError(f"{', '.join(name for name, given in alone.items() if given)}: for one stage, name it")
    if stage != "all" and jobs > 1:
        raise ValueError("--jobs is for all stages; processes of one stage are launched by torchrun")
    if stage != "all":
        recipe = load_recipe(config or f"{preset}/{stage}")
        if recipe.stage != stage:
            raise ValueError(f"{config} is a recipe for {recipe.stage}, not for {stage}")
        if dry_run:
            return show(plan(recipe), out)
    if output is None:
        raise ValueError("training needs a folder for checkpoints and the model: give --out")
    if data is None and not smoke:
        raise ValueError("training needs manifests: give --data (minmo data nano DIR builds those of nano)")
    from minmo.data.nano.smoke import build
    from minmo.training.parallel import processes
    from minmo.training.pipeline import run_all, smoked
    from minmo.training.run import run

    with processes() as here:  # one group for all that follows: torchrun's store knows each address once
        if data is None:
            data = output / "data"
            if here.rank == 0:
                build(data)
            here.wait()
        if stage == "all":
            made = run_all(preset, data, output, smoke=smoke, jobs=jobs)
        else:
            run(smoked(recipe) if smoke else recipe, start or recipe.preset, data, output, skip_bad=skip_bad)
            made = output / "model"
        if here.rank == 0:
            out.print(f"the model is in {made}", highlight=False)


def tokenize(
    manifest: Annotated[Path, typer.Argument(help="Cuts with the assistant's sound (target_recording).")],
    output: Annotated[Path, typer.Argument(help="The manifest to write, with speech_tokens.")],
    preset: Annotated[str, typer.Option(help="Whose speech tokenizer: a preset, or a checkpoint directory.")] = "nano",
    jobs: Jobs = 1,
) -> None:
    """Writes the speech tokens of the assistant's sound into a manifest; goes on where it was stopped."""
    _need_packages()
    from minmo.training.tokenize import tokenize as write_tokens

    write_tokens(manifest, output, preset, jobs=jobs)


@data_app.command("nano")
def nano(
    output: Folder,
    scale: Annotated[float, typer.Option(help="Of the usual amount.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same corpus.")] = 0,
    jobs: Jobs = 2,
) -> None:
    """Builds the corpus of the nano model: Debian's synthetic voices and a few people."""
    _need_packages()
    from minmo.data.nano.build import build

    summary = build(output, scale, seed, jobs)
    for name, count in summary["cuts"].items():
        out.print(f"{name:28} {count:7,} lines {summary['hours'][name]:8.2f} h", highlight=False)


@data_app.command("public")
def public(
    name: Annotated[str, typer.Argument(help="A public dataset, such as fleurs; a wrong name lists them.")],
    folder: Annotated[Path, typer.Argument(help="Your copy of it, as its publishers lay it out.")],
    output: Annotated[Path, typer.Option("-o", "--out", help="The manifest to write (.jsonl or .jsonl.gz).")],
    task: Annotated[str, typer.Option(help="Of which task (default: the dataset's first).")] = "",
    language: Annotated[str, typer.Option(help="Code of the language that is heard, such as en.")] = "",
    into: Annotated[str, typer.Option(help="s2tt: code of the language to translate into.")] = "en",
    split: Annotated[str, typer.Option(help="Which part of it (default: its test).")] = "",
) -> None:
    """Writes a manifest of a public dataset that you have; nothing is downloaded."""
    if importlib.util.find_spec("lhotse") is None:
        raise ValueError("manifests need lhotse: pip install 'minmo[eval]'")
    from minmo.data.public import write_public

    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{output} must end with .jsonl or .jsonl.gz; name it so")
    lines = write_public(name, folder, output, task=task, language=language, into=into, split=split)
    out.print(f"{output}: {lines:,} lines", highlight=False, markup=False)


@data_app.command("tasks")
def tasks() -> None:
    """What a line of data is, task by task."""
    from minmo.data.schema import print_tasks

    print_tasks()


def add_to(app: typer.Typer) -> None:
    """Puts the commands beside others."""
    app.command()(train)
    app.command()(tokenize)
    app.add_typer(data_app, name="data")


def _need_packages() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"training needs {', '.join(missing)}: pip install 'minmo[train]'")
