"""When the full-duplex predictor answers and stops, on simulated dialogues, position by position of 80 ms.

The predictor reads what a session has read at each position: the layout and the objective that it learned with
(`minmo/training/objectives/duplex.py`). A decision is what a session makes of its probabilities (`TurnTaking`). So this
scores decisions, and leaves out what a session does after a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minmo.conversation.turn_taking import Floor, TurnTaking
from minmo.data.duplex import Sample, f1_at_k, position
from minmo.data.manifest import load_sound
from minmo.data.schema import events_of
from minmo.evaluation.scores import Score, f1, right_rate
from minmo.model import MinMo
from minmo.modules.duplex import BARGE_IN, TURN_TAKING
from minmo.training.batches import Builder
from minmo.training.objectives.duplex import DuplexObjective

SCORED = (1, 5, 10)
"""The K of F1@K, as the paper's Table 22 has them."""


@dataclass
class Turns:
    """An entry each decision that was due or taken: (hits, decisions, events) of an open turn by what is counted, and
    whether a back-channel was let pass and a pause waited through. dialogues: whose the entry is."""

    marks: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)
    dialogues: dict[str, list[str]] = field(default_factory=dict)

    def scores(self, seed: int) -> dict[str, Score]:
        """By name, F1 of decisions and rates of what was right, with intervals over dialogues."""
        found = {name: f1(marks, self.dialogues[name], seed) for name, marks in self.marks.items()}
        return found | {name: right_rate(r, None, self.dialogues[name], seed) for name, r in self.right.items()}

    def mark(self, name: str, dialogue: str, decision: int | None, event: int | None, k: int) -> None:
        """An open turn's first decision and its event, LLM positions."""
        made, due = ([] if place is None else [place] for place in (decision, event))
        score = f1_at_k([made], [due], k)
        self.marks.setdefault(name, []).append((score.hits, score.decisions, score.events))
        self.dialogues.setdefault(name, []).append(dialogue)

    def add(self, other: Turns) -> None:
        """The entries of another dialogue."""
        for name, marks in other.marks.items():
            self.marks.setdefault(name, []).extend(marks)
        for name, right in other.right.items():
            self.right.setdefault(name, []).extend(right)
        for name, dialogues in other.dialogues.items():
            self.dialogues.setdefault(name, []).extend(dialogues)

    def judge(self, name: str, dialogue: str, right: bool) -> None:
        self.right.setdefault(name, []).append(right)
        self.dialogues.setdefault(name, []).append(dialogue)


def count_turns(model: MinMo, cut: Any) -> Turns:
    """Decisions on one dialogue, a line of the task duplex."""
    if model.tokenizer is None:
        raise ValueError(f"{model.config.name} has no tokenizer.json; load a checkpoint directory that holds one")
    builder, objective = Builder(model.config, model.tokenizer), DuplexObjective(model).eval()
    samples = builder.open_turns(cut, sound := load_sound(cut))
    with torch.inference_mode():
        logits = objective.logits(builder.listened([sound], [(0, sample) for sample in samples])).float()
    turns = Turns()
    _count(turns, cut, _whole(samples, torch.softmax(logits, dim=-1)[..., 1]))
    return turns


@dataclass
class _OpenTurn:
    """What was decided in an open turn: which of the two, after how many exchanges; by supervised position the label
    and the probabilities (turn taking, barge-in)."""

    place: int
    before: int
    labels: dict[int, int] = field(default_factory=dict)
    probabilities: dict[int, list[float]] = field(default_factory=dict)


def _whole(samples: Sequence[Sample], probabilities: Tensor) -> list[_OpenTurn]:
    """Open turns of their samples, of which a turn that was begun anew has several. probabilities (samples, m, 2)."""
    found: dict[tuple[int, int], _OpenTurn] = {}
    for sample, row in zip(samples, probabilities.tolist(), strict=True):
        place, labels = (BARGE_IN, sample.barge_in) if sample.replying else (TURN_TAKING, sample.turn_taking)
        turn = found.setdefault((place, sample.turn), _OpenTurn(place, sample.turn))
        for p, label, decisions in zip(sample.open, labels.tolist(), row, strict=False):
            if label >= 0:
                turn.labels[p], turn.probabilities[p] = label, decisions
    return list(found.values())


def _decisions(turn: _OpenTurn) -> set[int]:
    """The supervised positions at which a session would decide; after each it is asked anew."""
    taken, floor = set[int](), _asked(turn.place)
    for p, decisions in sorted(turn.probabilities.items()):
        if floor.hear(*decisions):
            taken.add(p)
            floor = _asked(turn.place)
    return taken


def _asked(place: int) -> Floor:
    """A floor whose phase asks for this decision."""
    floor = Floor(TurnTaking())
    if place == BARGE_IN:
        floor.take()
        floor.speak()
    return floor


DECISIONS = {
    TURN_TAKING: ("end of turn", "pause", "pauses of a turn waited through"),
    BARGE_IN: ("barge-in", "backchannel", "back-channels let pass"),
}
"""By decision: its name, what must not bring it about, and the name of that."""


def _count(turns: Turns, cut: Any, opened: Sequence[_OpenTurn]) -> None:
    events, name = events_of(cut), cut.recording.id
    for turn in opened:
        decision, kind, waited = DECISIONS[turn.place]
        taken = _decisions(turn)
        due = min((p for p, label in turn.labels.items() if label == 1), default=None)
        names = [decision]
        if turn.place == TURN_TAKING and due is not None:
            doubtful = cut.custom.get("ambiguous", [])[turn.before :][:1] == [True]
            names.append(f"{decision}, {'ambiguous' if doubtful else 'unambiguous'} turns")
        for k in SCORED:
            for what in names:
                turns.mark(f"{what}, F1@{k}", name, min(taken, default=None), due, k)
        for event in events:
            span = set(range(position(event.start), position(event.end) + 1))
            if event.kind == kind and span <= turn.labels.keys():
                turns.judge(waited, name, not span & taken)
