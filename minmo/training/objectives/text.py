"""Next-token loss of the assistant's text, after typed or spoken turns: text-lm, pre-align, full-align and sft.

The layout is a conversation's (`TextTokenizer.turn`): prefix, the user's content (token ids, or one position per 80 ms
of sound), suffix, the assistant's text and the end of the turn. Only that text and its end are learned
(arXiv 2501.06282, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo.state import join, take, valid
from minmo.training.objectives import ModelObjective


@dataclass(frozen=True)
class TextBatch:
    """before: ids up to the content, and a typed content; after: ids from the suffix to the end of the
    assistant's turn.

    mel (batch, frames, n_mels): of what was said, None for typed turns. asked (batch,): how many ids of `after` are
    not learned. chunk: encoder frames that see each other; None = the session's, 0 = all. shared: ids that
    begin all of `before`. All lengths (batch,) int32.
    """

    before: Tensor
    before_lengths: Tensor
    after: Tensor
    after_lengths: Tensor
    asked: Tensor
    mel: Tensor | None = None
    mel_lengths: Tensor | None = None
    chunk: int | None = None
    shared: int = 0

    def targets(self) -> Tensor:
        """`after` where it is learned, -100 elsewhere. (batch, n) int64"""
        size = self.after.shape[1]
        learned = valid(self.after_lengths, size) & ~valid(self.asked, size)
        return torch.where(learned, self.after.long(), -100)


class TextObjective(ModelObjective):
    """Cross entropy of the assistant's tokens."""

    weights = {"text": 1.0}

    def counts(self, batch: TextBatch) -> dict[str, float]:
        return {"text": float((batch.targets() >= 0).sum())}

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        logits, targets = self.logits(batch), batch.targets()
        return {"text": F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")}

    def logits(self, batch: TextBatch) -> Tensor:
        """Of each id of `after`, (batch, n, vocab)."""
        model = self.model
        x, lengths = model.llm.embed(batch.before), batch.before_lengths
        if batch.mel is not None and batch.mel_lengths is not None:
            frames, counts = model.encoder(batch.mel, batch.mel_lengths, chunk=batch.chunk)
            x, lengths = join(x, lengths, *model.projector(frames, counts))
        first = lengths
        x, lengths = join(x, lengths, model.llm.embed(batch.after), batch.after_lengths)
        hidden = model.llm(x[:, : int(lengths.max())], lengths, shared=batch.shared)
        return model.llm.logits(take(F.pad(hidden, (0, 0, 0, batch.after.shape[1])), first - 1, batch.after.shape[1]))
