"""Supervised speech tokens: a recogniser's loss through the quantiser (CosyVoice, arXiv 2407.05407, section 2.1).

Behind the tokenizer's encoder and its finite scalar quantiser stand more encoder blocks, training's own, and the two
recognition heads: what the tokens lose, the recogniser cannot hear. A third head must rebuild the mel frames of the
assistant's voice from the same codes, so that the tokens also say how a word was spoken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo.model import MinMo
from minmo.modules.encoder import Block, View
from minmo.state import all_rows, masked, valid
from minmo.training.objectives import ModelObjective
from minmo.training.objectives.recognition import Recogniser, SpeechBatch, Symbols
from minmo_kernels.ops.fsq_encode.reference import SHRINK


@dataclass(frozen=True)
class TokenBatch:
    """speech: as for recognition. voiced (batch,) bool: entries of the assistant's voice; target (batch, 2 n, n_mels):
    their 50 Hz mel frames, two a token."""

    speech: SpeechBatch
    voiced: Tensor
    target: Tensor


class TokenObjective(ModelObjective):
    """The speech tokenizer, and behind it a recogniser and a mel head of training's own."""

    weights = {"word_ctc": 1.0, "character_ctc": 0.5, "mel": 1.0}

    def __init__(self, model: MinMo, symbols: Symbols, blocks: int = 2) -> None:
        super().__init__(model)
        config = model.config.encoder
        self.up = nn.Linear(len(model.config.speech_tokenizer.levels), config.dim)
        self.behind = nn.ModuleList(Block(config) for _ in range(blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.recogniser = Recogniser(config.dim, symbols)
        self.mel = nn.Sequential(
            nn.Conv1d(config.dim, config.dim, 5, padding=2), nn.GELU(), nn.Conv1d(config.dim, config.dim, 5, padding=2),
            nn.GELU(), nn.Conv1d(config.dim, 2 * model.config.flow.n_mels, 1),
        )  # fmt: skip

    @torch.no_grad()
    def start_from_encoder(self, recogniser: Recogniser | None = None) -> None:
        """The voice encoder's first blocks become the tokenizer's, its next ones those behind the quantiser."""
        source, own = self.model.encoder, self.model.speech_tokenizer.encoder
        own.conv1.load_state_dict(source.conv1.state_dict())
        own.conv2.load_state_dict(source.conv2.state_dict())
        blocks = [*own.blocks, *self.behind]
        for mine, theirs in zip(blocks, source.blocks, strict=False):
            mine.load_state_dict(theirs.state_dict())
        if recogniser is not None:
            self.recogniser.load_state_dict(recogniser.state_dict())

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        speech, bins = batch.speech, batch.target.shape[2]
        return {
            "word_ctc": float(speech.word_lengths.sum()),
            "character_ctc": float(speech.character_lengths.sum()),
            "mel": float(self._frames(batch).sum()) * bins,
        }

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        tokenizer, speech = self.model.speech_tokenizer, batch.speech
        x, counts = tokenizer.encoder(speech.mel, speech.mel_lengths, chunk=speech.chunk)
        codes = masked(self.up(quantised(tokenizer.quantizer(x), tokenizer.config.levels)), counts)
        rows, starts = all_rows(len(x), x.device), torch.zeros_like(counts)
        heard = codes
        for block in self.behind:
            heard = block(heard, counts, None, None, rows, starts, counts, View(0))
        losses = self.recogniser.losses(self.norm(heard), counts, speech)
        mel = self.mel(codes.mT).mT.unflatten(2, (2, -1)).flatten(1, 2)
        size = min(mel.shape[1], batch.target.shape[1])
        wrong = (mel[:, :size] - batch.target[:, :size]).abs() * self._frames(batch)[:, :size, None]
        return {**losses, "mel": wrong.sum()}

    def _frames(self, batch: TokenBatch) -> Tensor:
        """The target frames that count, (batch, 2 n)."""
        lengths = -(-batch.speech.mel_lengths // 4) * 2
        return valid(lengths, batch.target.shape[1]) & batch.voiced[:, None]


def quantised(features: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The quantiser's grid in -1 .. 1, its gradient that of tanh (straight through). (..., len(levels)) in and out."""
    half = (torch.tensor(levels, device=features.device) - 1) // 2
    bounded = torch.tanh(features) * SHRINK
    return bounded + (torch.round(bounded * half) / half - bounded).detach()
