"""What an evaluation found: rows with their intervals and what they were made with, as JSON and as tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Column, Table

import minmo
from minmo.console import shown
from minmo.evaluation.scores import Score
from minmo.model import MinMo


@dataclass(frozen=True)
class Row:
    """One score. material: what was heard or said; measure: what is counted; by: who heard it; unit: of the score, ""
    for a share; less: whether less is better; datasets: the public datasets that it is of."""

    task: str
    material: str
    measure: str
    score: Score
    by: str = "the model"
    unit: str = ""
    less: bool = False
    datasets: tuple[str, ...] = ()


@dataclass
class Results:
    """about: weights, judges, seeds. confusions: material -> true label -> answer -> count. left_out: what was looked
    for and is not there, in words."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    confusions: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes JSON, beside it and renamed; raises ValueError where that cannot be."""
        unfinished = path.with_name(path.name + ".part")
        try:
            unfinished.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); name a file in a folder that exists"
            ) from None


def tables(results: Results) -> list[Table]:
    """The scores, and for each material which label was taken for which, to print with rich."""
    about = results.about
    weights = about["weights"] if about["trained"] else f"UNTRAINED: {about['weights']}; the scores mean nothing"
    scores = Table(
        "task", Column("material", overflow="fold"), "measure", "heard by", "score", "95 %", "n", "of",
        title=_cell(f"{about['model']}: {weights}"),
    )  # fmt: skip
    for row in results.rows:
        s, unit = row.score, f" {row.unit}".rstrip()
        value, interval = ("-", "-") if s.value is None else (f"{s.value:.3f}{unit}", f"{s.low:.3f} .. {s.high:.3f}")
        scores.add_row(*map(_cell, (row.task, row.material, row.measure, row.by, value, interval, s.n, s.of)))
    scores.caption = _cell(
        "n: utterances; of: words or answers; 95 %: bootstrap over utterances; limit "
        f"{about['limit'] or 'none'}, seed {about['seed']}"
        + "".join(f"\nleft out: {what}" for what in results.left_out)
    )
    found = [scores]
    for name, counts in results.confusions.items():
        answers = next(iter(counts.values()))
        table = Table("is", *map(_cell, answers), title=_cell(f"{name}, answered as"))
        for true, answered in counts.items():
            table.add_row(_cell(true), *map(str, answered.values()))
        found.append(table)
    return found


def _cell(text: object) -> str:
    return escape(shown(str(text)))


def made_with(model: MinMo, judges: list[str], *, seed: int, data: Path | None = None) -> dict[str, Any]:
    """What scores were made with; data: the corpus folder, whose seed is told where it has one."""
    corpus = data / "corpus.json" if data is not None else None
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "model": model.config.name,
        "weights": model.provenance,
        "sha256_of_tensors": digest.hexdigest(),
        "trained": model.trained,
        "minmo": minmo.__version__,
        "judges": judges,
        "corpus_seed": json.loads(corpus.read_text(encoding="utf-8"))["seed"] if corpus and corpus.is_file() else None,
        "seed": seed,
    }
