"""What an evaluation found, for people: a Markdown page and a picture; measured and quoted figures apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from minmo.console import shown
from minmo.evaluation.paper import asked, quoted
from minmo.evaluation.results import Results, Row
from minmo.evaluation.scores import Score
from minmo.evaluation.tasks import EVALUATIONS, TAUGHT
from minmo.fast.profile import figures

TALLEST = 150
"""Scores that a picture shows, at most; its title says where there are more."""
CANNOT = """
These came without a unit, a protocol or a source. What can be said of them:

- They are no error rates of the paper's Table 5, where MinMo averages 4.13 on Fleurs and 7.37 on Common Voice:
  an error rate of 67 would mean two words in three wrong.
- 95.84 is no BLEU: the paper's average on CoVoST2 is 38.92, and no system's is near 95.
- 78.90 is none of the paper's three figures for MELD (61.0 UA, 65.1 WA, 54.0 F1), nor 70.10 its accuracy on vocal
  sounds (93.0). The paper does print 78.9 and 70.1, for other things: spoken Llama Questions answered in text, and
  the speaker's age in AIR-Bench.
- They can be shares in percent of something else (accuracies, of tasks or systems that were not told), or a table whose
  rows were mixed up. No figure here is compared with them, and none was tuned towards them.
"""


def write_report(results: Results, folder: Path) -> None:
    """Writes FOLDER/report.md and FOLDER/scores.png."""
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "scores.png")


def markdown(results: Results) -> str:
    about = results.about
    judges = ", ".join(about["judges"]) or "none"
    lines = [
        "# Scores",
        "",
        f"{cell(about['model'])}: {cell(about['weights'])}. Seed {about['seed']}, limit {about['limit'] or 'none'}; "
        f"judges of sound: {judges}. All intervals: 95 %, bootstrap over utterances. Shares unless a unit is given: "
        "times 100 they are the paper's percents.",
        "",
    ]
    if not about["trained"]:
        lines += ["**The weights are random: these scores show that the evaluation runs, and nothing else.**", ""]
    lines += [_taught(results), "", "![scores](scores.png)", ""]
    for task in dict.fromkeys(row.task for row in results.rows):
        lines += [*_measured(task, results), *_paper(task, results)]
    if results.left_out:
        lines += ["## Left out", "", *(f"- {cell(what)}" for what in results.left_out), ""]
    source, rows = asked()
    lines += ["## The table that was asked for", "", f"Quoted: {source}.", ""]
    lines += ["| dataset | quoted | measured here |", "|---|---|---|"]
    lines += [f"| {name} | {figure:.2f} | - |" for name, figure in rows]
    return "\n".join([*lines, CANNOT.rstrip()]) + "\n"


def cell(text: object) -> str:
    """Text that may be anybody's as a cell of a table or a title: one line, of which nothing is markup."""
    return re.sub(r"[\\`*\[\]<>|&]", r"\\\g<0>", shown(" ".join(str(text).split())))


def cells(score: Score, unit: str = "") -> str:
    """Score and interval, as two cells."""
    if score.value is None or score.low is None or score.high is None:
        return "- | -"
    digits = 1 if unit in ("ms", "BLEU") else 3
    value = f"{score.value:.{digits}f} {unit}".rstrip()
    return f"{value} | {score.low:.{digits}f} .. {score.high:.{digits}f}"


def _taught(results: Results) -> str:
    tasks = dict.fromkeys(row.task for row in results.rows)
    taught = TAUGHT.get(results.about["model"]) if results.about["trained"] else None
    if taught is None:
        return "What this model was taught is not recorded: a task that it never learned scores like chance."
    never = [f"{name} ({evaluation.meaning})" for name, evaluation in EVALUATIONS.items() if name not in taught]
    scored = [task for task in tasks if task not in taught]
    warning = f" Of these, {', '.join(scored)} is scored here nonetheless and means nothing." if scored else ""
    return f"Never taught to {cell(results.about['model'])}: {', '.join(never)}.{warning}"


def _measured(task: str, results: Results) -> Iterator[str]:
    yield from (f"## {task}: {EVALUATIONS[task].meaning}", "", "Measured:", "")
    yield from ("| set | measure | heard by | score | 95 % | utterances | of |", "|---|---|---|---|---|---|---|")
    for row in results.rows:
        if row.task == task:
            s = row.score
            yield f"| {cell(row.material)} | {cell(row.measure)} | {row.by} | {cells(s, row.unit)} | {s.n} | {s.of} |"
    yield ""
    for name, counts in results.confusions.items():
        if any(row.task == task and row.material == name for row in results.rows):
            answers = list(next(iter(counts.values())))
            yield from (
                f"{cell(name)}, answered as:",
                "",
                f"| is | {' | '.join(map(cell, answers))} |",
                "|---" * (len(answers) + 1) + "|",
            )
            yield from (f"| {cell(true)} | {' | '.join(map(str, found.values()))} |" for true, found in counts.items())
            yield ""


def _paper(task: str, results: Results) -> Iterator[str]:
    """The paper's tables, those rows alone whose dataset was measured if any was."""
    sets = {dataset for row in results.rows if row.task == task for dataset in row.datasets}
    for table in quoted(task):
        rows = [row for row in table.rows if row[0] in sets] or table.rows
        same = "the same dataset" if rows[0][0] in sets else "other data: for orientation, no comparison"
        yield from (f"Quoted, {table.source}; {table.measure}; {same}.{' ' + table.note if table.note else ''}", "")
        yield f"| dataset | part | language | {' | '.join(f'{s} (quoted)' for s in table.systems)} |"
        yield "|---" * (3 + len(table.systems)) + "|"
        yield from (f"| {' | '.join(map(str, row))} |" for row in rows)
        yield ""


def draw(results: Results, path: Path) -> None:
    """A mark and an interval for every share, task by task."""
    shares = [row for row in results.rows if row.unit == "" and row.score.value is not None]
    rows, more = shares[:TALLEST], f"; the first {TALLEST} of {len(shares)}" * (len(shares) > TALLEST)
    figure = figures().Figure(figsize=(10, 1.5 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    tasks = list(dict.fromkeys(row.task for row in rows))
    for place, row in enumerate(rows):
        s = row.score
        assert s.value is not None and s.low is not None and s.high is not None
        spread = [[max(0.0, s.value - s.low)], [max(0.0, s.high - s.value)]]
        colour, mark = f"C{tasks.index(row.task) % 10}", "v" if row.less else "^"
        axes.errorbar(s.value, place, xerr=spread, color=colour, marker=mark, markersize=5, capsize=2)
    axes.set_yticks(range(len(rows)), [_title(row) for row in rows], fontsize=6, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    untrained = "" if results.about["trained"] else ", UNTRAINED"
    title = f"{results.about['model']}{untrained}: measured, 95 % intervals (^ more is better, v less is{more})"
    axes.set_title(title, parse_math=False)
    figure.savefig(path, dpi=130)


def _title(row: Row) -> str:
    by = "" if row.by == "the model" else f" [{row.by}]"
    return shown(f"{row.material}: {row.measure}{by}")
