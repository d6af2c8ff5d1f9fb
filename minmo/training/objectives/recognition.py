"""Connectionist temporal classification over words and over characters: what teaches an encoder to hear.

Two heads on 25 Hz frames. Words alone make a small encoder leave CTC's plateau of blanks within a few hundred steps;
characters carry over to words that it has not heard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmo.data.numbers import spoken_words
from minmo.model import MinMo
from minmo.training.objectives import ModelObjective


@dataclass(frozen=True)
class Symbols:
    """The words and characters of a corpus; id 0 is CTC's blank, 1 what is not among them."""

    words: tuple[str, ...]
    characters: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Symbols:
        texts = list(texts)
        words = {word for text in texts for word in spoken_words(text)}
        return cls(tuple(sorted(words)), tuple(sorted({c for word in words for c in word} | {" "})))

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        words = {word: i + 2 for i, word in enumerate(self.words)}
        characters = {c: i + 2 for i, c in enumerate(self.characters)}
        said = spoken_words(text)
        return [words.get(w, 1) for w in said], [characters.get(c, 1) for c in " ".join(said)]


@dataclass(frozen=True)
class SpeechBatch:
    """mel (batch, frames, n_mels); words, characters (batch, n) int64 with their lengths (batch,).

    chunk: encoder frames that see each other; None = the session's, 0 = all.
    """

    mel: Tensor
    mel_lengths: Tensor
    words: Tensor
    word_lengths: Tensor
    characters: Tensor
    character_lengths: Tensor
    chunk: int | None = None


class Recogniser(nn.Module):
    """The two heads: frames (batch, n, dim) -> log-probabilities, and the losses of a batch."""

    def __init__(self, dim: int, symbols: Symbols) -> None:
        super().__init__()
        self.symbols = symbols
        self.words = nn.Linear(dim, len(symbols.words) + 2)
        self.characters = nn.Linear(dim, len(symbols.characters) + 2)

    def losses(self, frames: Tensor, counts: Tensor, batch: SpeechBatch) -> dict[str, Tensor]:
        return {
            "word_ctc": _ctc(self.words(frames), counts, batch.words, batch.word_lengths),
            "character_ctc": _ctc(self.characters(frames), counts, batch.characters, batch.character_lengths),
        }

    @torch.no_grad()
    def recognised(self, frames: Tensor, counts: Tensor) -> list[str]:
        """Greedy words of each entry."""
        best = self.words(frames).argmax(dim=-1)
        return [self._collapsed(ids[:n].tolist()) for ids, n in zip(best, counts.tolist(), strict=True)]

    def _collapsed(self, ids: Sequence[int]) -> str:
        kept = [i for n, i in enumerate(ids) if i > 1 and (n == 0 or ids[n - 1] != i)]
        return " ".join(self.symbols.words[i - 2] for i in kept)


def _ctc(logits: Tensor, counts: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    log = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    return F.ctc_loss(log, targets, counts.long(), lengths.long(), reduction="sum", zero_infinity=True)


class EncoderObjective(ModelObjective):
    """The encoder under the two heads, which are training's own."""

    weights = {"word_ctc": 1.0, "character_ctc": 0.5}

    def __init__(self, model: MinMo, symbols: Symbols) -> None:
        super().__init__(model)
        self.recogniser = Recogniser(model.config.encoder.dim, symbols)

    def counts(self, batch: SpeechBatch) -> dict[str, float]:
        """CTC sums are over frames' paths; they are counted a symbol."""
        return {"word_ctc": float(batch.word_lengths.sum()), "character_ctc": float(batch.character_lengths.sum())}

    def forward(self, batch: SpeechBatch) -> dict[str, Tensor]:
        frames, counts = self.model.encoder(batch.mel, batch.mel_lengths, chunk=batch.chunk)
        return self.recogniser.losses(frames, counts, batch)
