"""Two runs on the same items: what differs, with intervals of pairs, and which items did it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minmo.evaluation.measures import Measure
from minmo.evaluation.records import Record, read
from minmo.evaluation.report import cell, cells
from minmo.evaluation.scores import Score
from minmo.evaluation.tasks import EVALUATIONS

SHOWN = 10
"""Items of a set that changed most, each way."""


@dataclass(frozen=True)
class Change:
    """A measure of the items that both runs have: the first run's score, the second's, and second minus first."""

    material: str
    measure: str
    by: str
    first: Score
    second: Score
    difference: Score
    less: bool
    unit: str = ""

    @property
    def verdict(self) -> str:
        """better or worse where the interval leaves zero out, else no difference that these items show; one utterance
        alone shows none."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None or low <= 0 <= high or self.difference.n < 2:
            return "not told apart"
        return "better" if (low > 0) != self.less else "worse"


def compare(first: Path, second: Path, seed: int = 0) -> tuple[list[Change], str]:
    """The changes from the run in the folder `first` to that in `second`, and a page of Markdown about them.

    Only items that both asked alike count. Raises ValueError where a folder holds no run, or they share no item.
    """
    changes: list[Change] = []
    pages: list[str] = []
    about: dict[str, Any] = {}
    names = sorted({path.name for path in first.glob("*.jsonl")} & {path.name for path in second.glob("*.jsonl")})
    for name in names:
        (about_a, one), (about_b, other) = read(first / name), read(second / name)
        about = about or {"first": about_a, "second": about_b}
        if about_a.get("task") != about_b.get("task") or about_a.get("task") not in EVALUATIONS:
            continue
        pairs = list(_pairs(one, other))
        if not pairs:
            continue
        a, b = [list(side) for side in zip(*pairs, strict=True)]
        measures = {(m.name, m.by): m for m in EVALUATIONS[about_a["task"]].measures(a + b)}
        for measure in measures.values():
            found = measure.compared(a, b, seed)
            if found is not None and found.value is not None:
                scores = measure.score(a, seed), measure.score(b, seed)
                of = about_a["set"], measure.name, measure.by
                changes.append(Change(*of, *scores, found, measure.less, measure.unit))
        pages += _items(about_a["set"], next(iter(measures.values())), a, b)
    if not changes:
        raise ValueError(f"{first} and {second} hold no item that both were asked; run both on the same manifests")
    return changes, "\n".join([*_head(about, changes), *pages]) + "\n"


def _pairs(first: Sequence[Record], second: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    by_id = {record["id"]: record for record in second}
    for record in first:
        other = by_id.get(record["id"])
        if other is not None and other["reference"] == record["reference"]:
            yield record, other


def _head(about: dict[str, Any], changes: Sequence[Change]) -> Iterator[str]:
    yield from ("# Compared, item by item", "")
    for name, made in about.items():
        untrained = "" if made["trained"] else " (UNTRAINED: random weights)"
        yield f"- {name}: {cell(made['model'])}, {cell(made['weights'])}{untrained}, {made['sha256_of_tensors'][:12]}"
    yield from ("", "Difference: second minus first, 95 % interval of a paired bootstrap over utterances.", "")
    yield "| set | measure | heard by | first | second | difference | 95 % | utterances | second is |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for c in changes:
        one, two = (cells(score, c.unit).split(" |")[0] for score in (c.first, c.second))
        apart = f"{cells(c.difference, c.unit)} | {c.difference.n} | {c.verdict}"
        yield f"| {cell(c.material)} | {cell(c.measure)} | {c.by} | {one} | {two} | {apart} |"
    yield ""


def _items(material: str, measure: Measure, first: Sequence[Record], second: Sequence[Record]) -> Iterator[str]:
    """The items whose entry changed most in the first measure of a set, where an answer in words tells why."""
    changed = []
    for a, b in zip(first, second, strict=True):
        one, two = measure.entry(a), measure.entry(b)
        if one is None or two is None or not one[-1] or not two[-1] or "answer" not in a or a["answer"] == b["answer"]:
            continue
        better = (float(two[0]) / two[-1] - float(one[0]) / one[-1]) * (-1 if measure.less else 1)
        changed.append((better, a, b))
    changed.sort(key=lambda item: (item[0], item[1]["id"]))
    losses = [item for item in changed if item[0] < 0][:SHOWN]
    gains = [item for item in changed[::-1] if item[0] > 0][:SHOWN]
    for title, items in (("worse", losses), ("better", gains)):
        if items:
            yield from (f"## {cell(material)}: answered {title} by the second ({cell(measure.name)})", "")
            yield from ("| item | right | first | second |", "|---|---|---|---|")
            for _, a, b in items:
                yield f"| {' | '.join(map(cell, (a['id'], a['reference'], a['answer'], b['answer'])))} |"
            yield ""
