"""Cuts to batches: sound is read, turned to features and augmented, text to ids in the layout of a conversation.

One builder a kind of batch; a stage names the one that it takes (`minmo/training/run.py`). All drawing is seeded by
(seed, epoch, cut), so that what a cut becomes depends on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minmo.config import MinMoConfig
from minmo.state import Lengths
from minmo.tokenizer.frontend import Frontend
from minmo.tokenizer.text import TextTokenizer
from minmo.training.augment import Augment
from minmo.training.objectives.recognition import SpeechBatch, Symbols
from minmo.training.objectives.text import TextBatch


@dataclass
class Builder:
    """What every kind of batch needs: the sizes, the tokenizer, and how sound is varied (None = as it is)."""

    config: MinMoConfig
    tokenizer: TextTokenizer
    augment: Augment | None = None
    seed: int = 0
    epoch: int = 0
    symbols: Symbols | None = None
    frontend: Frontend = field(init=False)

    def __post_init__(self) -> None:
        self.frontend = Frontend(self.config.frontend)

    def generator(self, cut: Any) -> np.random.Generator:
        """Draws for this cut in this epoch, and for no other."""
        key = hashlib.sha256(f"{self.seed} {self.epoch} {cut.id}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))

    def features(self, cuts: Sequence[Any]) -> tuple[Tensor, Lengths]:
        """Log-mel frames of what the users say -> (batch, frames, n_mels) and their lengths."""
        sounds = [torch.from_numpy(cut.load_audio()[0].astype(np.float32)) for cut in cuts]
        audio, lengths = padded(sounds)
        mel, counts = self.frontend(audio, lengths)
        if self.augment is None:
            return mel, counts
        silence = (self.config.frontend.floor + 4) / 4
        return padded(
            [self.augment(m[:n], silence, self.generator(cut)) for m, n, cut in zip(mel, counts, cuts, strict=True)]
        )

    def text(self, cuts: Sequence[Any]) -> TextBatch:
        """Turns whose assistant's text is learned; those with a recording are spoken, the others typed."""
        before, after, asked = [], [], []
        spoken = cuts[0].has_recording
        for cut in cuts:
            prefix, suffix = self.tokenizer.turn(cut.custom["instruction"])
            typed = [] if spoken else self.tokenizer.encode(" " + cut.custom["source_text"])
            before.append(torch.tensor(prefix + typed))
            after.append(torch.tensor([*suffix, *self.tokenizer.encode(cut.custom["text"]), self.tokenizer.end_of_turn]))
            asked.append(len(suffix))
        mel = self.features(cuts) if spoken else (None, None)
        return TextBatch(*padded(before), *padded(after), torch.tensor(asked, dtype=torch.int32), *mel)

    def speech(self, cuts: Sequence[Any]) -> SpeechBatch:
        """What was said, for recognition."""
        assert self.symbols is not None
        words, characters = zip(*(self.symbols.encode(cut.custom["text"]) for cut in cuts), strict=True)
        return SpeechBatch(
            *self.features(cuts),
            *padded([torch.tensor(w) for w in words]),
            *padded([torch.tensor(c) for c in characters]),
        )


def padded(items: Sequence[Tensor]) -> tuple[Tensor, Lengths]:
    """Tensors (n_i, ...) -> (batch, max n_i, ...), zeros beyond, and the lengths int32."""
    lengths = torch.tensor([len(item) for item in items], dtype=torch.int32)
    return torch.nn.utils.rnn.pad_sequence(list(items), batch_first=True), lengths


