"""The supervised semantic speech tokenizer: log-mel frames to discrete speech tokens at 25 Hz.

The first blocks of a SenseVoice-large shaped encoder, then finite scalar quantisation: CosyVoice 2's tokenizer v2
(arXiv 2412.10117, section 2.2), whose tokens MinMo's voice decoder speaks (arXiv 2501.06282, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import SpeechTokenizerConfig
from minmo.modules.encoder import MELS_PER_FRAME, Encoder, EncoderState
from minmo.state import Lengths, all_rows

WINDOW = 3000
"""Mel frames that `encode` reads at once (30 s)."""
OVERLAP = 400
"""Mel frames that neighbouring windows share (4 s)."""


class SpeechTokenizer(nn.Module):
    """Log-mel frames (batch, T, n_mels) -> speech tokens (batch, ceil(T / 4)) int32."""

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.quantizer = nn.Linear(config.encoder.dim, len(config.levels))
        # Features of about unit size use all levels; torch's default would leave every frame in the middle cell.
        nn.init.normal_(self.quantizer.weight, std=2.0 * config.encoder.dim**-0.5)
        nn.init.zeros_(self.quantizer.bias)

    def encode(self, mel: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        """Whole utterances, every frame in sight of every other -> tokens (batch, max(1, ceil(T / 4))), lengths.

        One longer than 30 s is read in windows of 30 s, a new one every 26 s until one reaches its end; of the 4 s that
        two windows share, the first half of the tokens comes from the earlier and the rest from the later window.
        """
        lengths = lengths.to(torch.int32)
        ids, counts = self._quantize(*self.encoder(mel[:, :WINDOW], lengths.clamp(max=WINDOW), chunk=0))
        half = OVERLAP // 2 // MELS_PER_FRAME
        start = 0
        while start + WINDOW < mel.shape[1]:
            start += WINDOW - OVERLAP
            rest = mel[:, start : start + WINDOW]
            # An utterance that ended in the window before has no token to give here.
            more = torch.where(lengths > start + OVERLAP, lengths - start, 0).clamp(max=WINDOW)
            later, later_counts = self._quantize(*self.encoder(rest, more, chunk=0))
            keep = start // MELS_PER_FRAME + half
            joined = torch.cat([ids[:, :keep], later[:, half:]], dim=1)
            earlier = torch.nn.functional.pad(ids, [0, joined.shape[1] - ids.shape[1]])
            ids = torch.where((more > 0)[:, None], joined, earlier)
            counts = torch.where(more > 0, start // MELS_PER_FRAME + later_counts, counts)
        return ids, counts

    def forward(self, mel: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        """One shot in the session form, what `step` gives however it is cut -> tokens, lengths."""
        return self._quantize(*self.encoder(mel, lengths))

    def initial_state(self, sessions: int) -> EncoderState:
        return self.encoder.initial_state(sessions)

    def step(
        self, mel: Tensor, x_lengths: Lengths, state: EncoderState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, EncoderState]:
        """New mel frames (batch, T, n_mels) -> the tokens of all chunks that they complete, lengths, state.

        An entry with `final` also gets those of its incomplete last chunk; zeros beyond the lengths.
        """
        x, counts, state = self.encoder.step(mel, x_lengths, state, rows, final)
        ids, counts = self._quantize(x, counts)
        return ids, counts, state

    def _quantize(self, x: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        weight, bias = self.quantizer.weight, self.quantizer.bias
        rows = all_rows(x.shape[0], x.device)
        return mk.fsq_encode(x, weight, bias, rows, lengths, levels=self.config.levels), lengths
