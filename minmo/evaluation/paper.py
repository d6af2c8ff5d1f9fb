"""The paper's figures, quoted (`paper.json`, each table with its source), to stand beside measured ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Quoted:
    """A table: rows are (dataset, part, language, a figure for each of the systems)."""

    task: str
    source: str
    measure: str
    systems: list[str]
    rows: list[list[Any]]
    note: str = ""


def quoted(task: str) -> list[Quoted]:
    """The paper's tables of a task."""
    return [Quoted(**table) for table in _file()["tables"] if table["task"] == task]


def asked() -> tuple[str, list[list[Any]]]:
    """Where the project's first table is from, and (dataset, figure) of its rows."""
    return _file()["asked"]["source"], _file()["asked"]["rows"]


def turn_taking() -> dict[str, tuple[tuple[float, ...], tuple[float, ...], float | None]]:
    """Table 22 by data set: F1@1, 5, 10 of the assistant's and of the user's turn-taking, accuracy on back-channels."""
    found: dict[str, dict[str, list[float]]] = {}
    for dataset, part, _, figure in quoted("turns")[0].rows:
        found.setdefault(dataset, {}).setdefault(part.split(",")[0], []).append(figure)
    return {
        dataset: (
            tuple(parts["assistant's turn-taking"]),
            tuple(parts["user's turn-taking"]),
            next(iter(parts.get("back-channel accuracy", ())), None),
        )
        for dataset, parts in found.items()
    }


@cache
def _file() -> dict[str, Any]:
    text = (resources.files("minmo") / "evaluation" / "paper.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
