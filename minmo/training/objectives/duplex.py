"""Two cross entropies of the full-duplex predictor: answer now, and stop speaking (arXiv 2501.06282, section 3.4).

The LLM reads what a session has read when the position is decided (`minmo.data.duplex`): the exchanges before the open
turn that the model remembers, the user's sound in them, then the open turn. The predictor begins anew with each open
turn and sees its positions alone; so does the encoder, with the turn's first voice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo.data.duplex import Score, f1_at_k
from minmo.modules.duplex import BARGE_IN, TURN_TAKING
from minmo.state import Lengths, take
from minmo.training.objectives import ModelObjective

THRESHOLD = 0.5
"""Probability from which on a position decides, in validation."""
SCORED = (1, 5)
"""The K of F1@K: LLM positions between decision and event that still are a hit."""


@dataclass(frozen=True)
class DuplexBatch:
    """Open user turns ("samples") of a few dialogues.

    mel (streams, frames, n_mels) with lengths: the user's channel from where the encoder began to hear it. ids,
    positions, stream (samples, n) int64 with lengths: the listening contexts, whose last `open_lengths` entries are the
    open turns; where positions is not negative, that LLM position of that stream's sound stands. turn_taking, barge_in
    (samples, m) int64: labels 0 and 1 of the open turns, -100 where there is none.
    """

    mel: Tensor
    mel_lengths: Lengths
    ids: Tensor
    positions: Tensor
    stream: Tensor
    lengths: Lengths
    open_lengths: Lengths
    turn_taking: Tensor
    barge_in: Tensor

    def labels(self) -> dict[str, tuple[int, Tensor]]:
        """By decision: its place in the logits, and its labels."""
        return {"turn_taking": (TURN_TAKING, self.turn_taking), "barge_in": (BARGE_IN, self.barge_in)}


class DuplexObjective(ModelObjective):
    """Cross entropies of the two decisions; validation also scores them as F1@K.

    The classes are not weighted, so a threshold of 0.5 keeps its meaning: of nano's supervised positions, 16 % are
    positive for turn taking and 33 % for barge-in.
    """

    weights = {"turn_taking": 1.0, "barge_in": 1.0}
    tallied = tuple(
        f"{name}/{k}/{part}" for name in weights for k in SCORED for part in ("hits", "decisions", "events")
    )

    def counts(self, batch: DuplexBatch) -> dict[str, float]:
        return {name: float((labels >= 0).sum()) for name, (_, labels) in batch.labels().items()}

    def forward(self, batch: DuplexBatch) -> dict[str, Tensor]:
        logits = self.logits(batch)
        return {
            name: F.cross_entropy(logits[:, :, place].flatten(0, 1).float(), labels.flatten(), reduction="sum")
            for name, (place, labels) in batch.labels().items()
        }

    def logits(self, batch: DuplexBatch) -> Tensor:
        """(samples, m, 2 decisions, 2), zeros beyond the open turns' lengths."""
        return self.model.duplex(self.hidden(batch), batch.open_lengths)

    @torch.no_grad()
    def hidden(self, batch: DuplexBatch) -> Tensor:
        """The LLM's hidden states of the open turns, (samples, m, dim); what gives them is frozen.

        Streams run through encoder and projector once, and samples share what these gave: as a session keeps it and
        reads it again.
        """
        model = self.model
        heard, _ = model.projector(*model.encoder(batch.mel, batch.mel_lengths))
        sound = heard[batch.stream, batch.positions.clamp(min=0)]
        x = torch.where((batch.positions >= 0)[..., None], sound, model.llm.embed(batch.ids.clamp(min=0)))
        size = batch.turn_taking.shape[1]
        hidden = F.pad(model.llm(x, batch.lengths), (0, 0, 0, size))
        return take(hidden, batch.lengths - batch.open_lengths, size)

    def tally(self, batch: DuplexBatch) -> dict[str, float]:
        """Hits, decisions and events of F1@K: a sample's decision is its first supervised position past THRESHOLD, its
        event the first positive one."""
        logits = self.logits(batch).float()
        found: dict[str, float] = {}
        for name, (place, labels) in batch.labels().items():
            yes = torch.softmax(logits[:, :, place], dim=-1)[..., 1] > THRESHOLD
            decisions, events = _first(yes & (labels >= 0)), _first(labels == 1)
            for k in SCORED:
                score = f1_at_k(decisions, events, k)
                for part in ("hits", "decisions", "events"):
                    found[f"{name}/{k}/{part}"] = float(getattr(score, part))
        return found

    def scores(self, totals: dict[str, float]) -> dict[str, float]:
        """turn_taking/f1@1, turn_taking/f1@5, barge_in/f1@1, barge_in/f1@5; none where nothing was due or decided."""
        found = {}
        for name in self.weights:
            for k in SCORED:
                score = Score(*(int(totals[f"{name}/{k}/{part}"]) for part in ("hits", "decisions", "events")))
                if score.decisions + score.events:
                    found[f"{name}/f1@{k}"] = score.f1
        return found


def _first(marks: Tensor) -> list[list[int]]:
    """The first marked position of each row of marks (rows, m) bool, as a list of one or none."""
    return [torch.nonzero(row)[:1, 0].tolist() for row in marks]
