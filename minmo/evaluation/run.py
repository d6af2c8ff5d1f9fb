"""A run: sets of lines are put to a model batch by batch, what it answers is kept item by item, and scored.

    OUT/SET.jsonl      what it was made with, then a record of each line (`minmo/evaluation/records.py`)
    OUT/scores.json    every score with its interval; OUT/report.md and OUT/scores.png for people

Started again with the same settings a run goes on at the batch where it was stopped: the same lines share a batch, so
that the records are those of a run that was not stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import minmo
from minmo.evaluation.listener import LONGEST, Listener, batches
from minmo.evaluation.material import Line, Set, manifests_of, read_set
from minmo.evaluation.measures import answer_label, labels_of
from minmo.evaluation.measures import classified as classes
from minmo.evaluation.records import Record, append, keep_batches
from minmo.evaluation.report import write_report
from minmo.evaluation.results import Results, Row, made_with
from minmo.evaluation.scores import confusion
from minmo.evaluation.speech import Ears
from minmo.evaluation.tasks import EVALUATIONS, Bench, named


def evaluate_model(
    task: str = "all",
    checkpoint: str | Path = "nano",
    manifests: Sequence[Path] = (),
    *,
    out: Path,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    instruction: str | None = None,
    transcribe: bool = False,
    longest: int = LONGEST,
    console: Console | None = None,
) -> Results:
    """The scores of a checkpoint directory or preset in a task (of EVALUATIONS, or all) on manifests, or on the sets of
    the corpus folder `data`.

    limit: lines of each set, for a quick run, chosen by the seed. seed: of speech, of those lines and of intervals.
    instruction: in place of the lines' own. transcribe: questions and what is translated are transcribed as well.
    longest: text tokens of a reply. console: where progress is shown. Raises DataError for lines that cannot be used,
    ValueError for settings that cannot be and for a folder that holds another run, JudgeError where a package that
    scoring cannot do without is missing, FloatingPointError for weights whose numbers break.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must lie between 0 and {2**31 - 1}, got {seed}")
    tasks = named([task])
    if bool(manifests) == (data is not None):
        raise ValueError("give either manifests, or the folder of a corpus")
    paths = list(manifests) or manifests_of(data or Path())
    plan = list(_plan(tasks, [read_set(path, limit, seed, instruction, data) for path in paths]))
    if not plan:
        raise ValueError(
            f"no manifest here holds lines for {task}, which takes {_taken(tasks)}: name one by --manifest"
        )
    names = [_file(name, chosen) for name, chosen in plan]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two manifests are named {', '.join(sorted(twice))}: rename one, the records are named so")
    model = minmo.load(checkpoint)
    ears = Ears() if any(EVALUATIONS[name].speaks for name, _ in plan) else None
    about = made_with(model, ears.names if ears else [], seed=seed, data=data)
    about |= {"limit": limit, "instruction": instruction, "transcribe": transcribe, "longest": longest}
    bench = Bench(Listener(model, seed, longest), ears, transcribe)
    _begin(out)
    results = Results(about, left_out=list(ears.missing) if ears else [])
    absent = [name for name in tasks if name not in {name for name, _ in plan}]
    results.left_out += [f"{name} ({EVALUATIONS[name].meaning}): no set holds lines of it" for name in absent]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console or Console(quiet=True),
    )  # fmt: skip
    with bar:
        for (name, chosen), file in zip(plan, names, strict=True):
            shown = bar.add_task(file, total=len(chosen.lines))
            found = _records(bench, name, chosen, out / f"{file}.jsonl", about, partial(bar.advance, shown))
            results.rows += _rows(name, chosen.name, found, seed)
            if EVALUATIONS[name].measures is classes:
                labels = labels_of(found)
                answers = [answer_label(record, labels) for record in found]
                results.confusions[chosen.name] = confusion([r["reference"] for r in found], answers, labels)
    results.write(out / "scores.json")
    write_report(results, out)
    return results


def _plan(tasks: Sequence[str], sets: Sequence[Set]) -> Iterator[tuple[str, Set]]:
    """(task, its lines) for every set that a task takes."""
    for name in tasks:
        evaluation = EVALUATIONS[name]
        for chosen in sets:
            if chosen.task in evaluation.lines:
                yield name, Set(chosen.name, chosen.task, chosen.lines[: evaluation.most])


def _taken(tasks: Sequence[str]) -> str:
    return "lines of " + " or ".join(dict.fromkeys(kind for name in tasks for kind in EVALUATIONS[name].lines))


def _file(task: str, chosen: Set) -> str:
    return f"latency-{chosen.name}" if task == "latency" else chosen.name


def _records(
    bench: Bench, task: str, chosen: Set, path: Path, about: Record, advance: Callable[[int], None]
) -> list[Record]:
    """The records of all lines in the lines' order, of which `path` may hold some already."""
    evaluation = EVALUATIONS[task]
    planned = batches(chosen.lines, evaluation.batch)
    own = about | {"task": task, "set": chosen.name, "lines": _digest(chosen.lines)}
    own["judges"] = about["judges"] if evaluation.speaks else []
    found = keep_batches(path, own, [[line.id for line in batch] for batch in planned])
    advance(len(found))
    for batch in planned:
        if batch[0].id in found:
            continue
        made = evaluation.records(bench, batch)
        append(path, made)
        found |= {record["id"]: record for record in made}
        advance(len(batch))
    return [found[line.id] for line in chosen.lines]


def _rows(task: str, material: str, records: Sequence[Record], seed: int) -> Iterator[Row]:
    """Of all of them and, where there are several, of each language."""
    languages = sorted({record["language"] for record in records})
    groups = {material: list(records)}
    if len(languages) > 1 and task != "lid":
        for language in languages:
            groups[f"{material}, {language}"] = [r for r in records if r["language"] == language]
    for name, group in groups.items():
        for measure in EVALUATIONS[task].measures(group):
            score = measure.score(group, seed)
            sources = tuple(sorted({r["dataset"] for r in group if "dataset" in r}))
            yield Row(task, name, measure.name, score, measure.by, measure.unit, measure.less, sources)


def _digest(lines: Sequence[Line]) -> str:
    """Of what is asked and what is right, so that a manifest that was changed is another run."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(
            repr(
                (
                    line.id,
                    line.utterance,
                    line.language,
                    line.instruction,
                    line.said,
                    line.text,
                    line.answers,
                    line.seconds,
                )
            ).encode()
        )
    return digest.hexdigest()[:16]


def _begin(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be a folder ({error.strerror}); name another with -o") from None
