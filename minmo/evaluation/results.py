"""What an evaluation found: rows with their intervals and what they were made with, as JSON and as tables."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

import minmo
from minmo.evaluation.material import Material
from minmo.evaluation.scores import Score
from minmo.model import MinMo


@dataclass(frozen=True)
class Row:
    """One score. material: what was heard or said; measure: what is counted; by: who heard it."""

    task: str
    material: str
    measure: str
    score: Score
    by: str = "the model"


@dataclass
class Results:
    """about: weights, judges, seeds. confusions: material -> true label -> answer -> count. left_out: what was looked
    for and is not there, in words."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    confusions: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes JSON; raises ValueError where that cannot be."""
        try:
            path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); name a file in a folder that exists"
            ) from None


def tables(results: Results) -> list[Table]:
    """The scores, and for each material which label was taken for which, to print with rich."""
    about = results.about
    weights = about["weights"] if about["trained"] else f"UNTRAINED: {about['weights']}; the scores mean nothing"
    scores = Table(
        "task", "material", "measure", "heard by", "score", "95 %", "n", "of",
        title=escape(f"{about['model']}: {weights}"),
    )  # fmt: skip
    for row in results.rows:
        s = row.score
        value, interval = ("-", "-") if s.value is None else (f"{s.value:.3f}", f"{s.low:.3f} .. {s.high:.3f}")
        scores.add_row(row.task, row.material, row.measure, row.by, value, interval, str(s.n), str(s.of))
    scores.caption = escape(
        "n: utterances; of: words or answers; 95 %: bootstrap over utterances; limit "
        f"{about['limit'] or 'none'}, seed {about['seed']}"
        + "".join(f"\nleft out: {what}" for what in results.left_out)
    )
    found = [scores]
    for name, counts in results.confusions.items():
        answers = next(iter(counts.values()))
        table = Table("spoken", *answers, title=f"languages, {name}: answered")
        for true, answered in counts.items():
            table.add_row(true, *map(str, answered.values()))
        found.append(table)
    return found


def made_with(model: MinMo, material: Material, judges: list[str]) -> dict[str, Any]:
    """What the scores were made with."""
    corpus = material.data / "corpus.json"
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return {
        "model": model.config.name,
        "weights": model.provenance,
        "sha256_of_tensors": digest.hexdigest(),
        "trained": model.trained,
        "minmo": minmo.__version__,
        "judges": judges,
        "corpus_seed": json.loads(corpus.read_text(encoding="utf-8"))["seed"] if corpus.is_file() else None,
        "limit": material.limit,
        "seed": material.seed,
    }
