"""The front end: 16 kHz sound to log-mel frames, 100 a second, as a causal stream or by Whisper's centred rule.

MinMo's encoder takes Whisper-shaped features without the padding to 30 s (arXiv 2501.06282, section 3.1). Under the
`stream` rule 80 ms of sound finish exactly 8 frames, which are one position of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import SAMPLE_RATE, FrontendConfig
from minmo.state import Buffer, Lengths, State, all_rows, buffer, masked
from minmo_kernels.ops.log_mel import mel_filters

FRAMES = 8
"""Mel frames of the stream's grid: 80 ms, one position of the language model."""


@dataclass
class FrontendState(State):
    """Samples that wait for their 80 ms to fill, and the last samples before them, (sessions, n_fft - hop)."""

    waiting: Buffer
    carry: Tensor


class Frontend(nn.Module):
    """Log-mel features by the rule of the configuration. Has no parameters; computes in fp32 (fp64 sound in fp64)."""

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        if config.rule not in ("stream", "whisper"):
            raise ValueError(f"the front end's rule must be 'stream' or 'whisper', got {config.rule!r}")
        self.config = config
        self.grid = FRAMES * config.hop
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, audio: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        """One shot. audio (batch, samples) 16 kHz in -1 .. 1, lengths (batch,) int32 -> mel (batch, frames, n_mels).

        stream: each utterance is filled up with zeros to whole 80 ms, so frames = 8 ceil(samples / 1280), as in `step`
        with `final`. whisper: frames = samples // 160; ValueError on a CPU for 1 .. 200 samples.
        """
        audio = _wide(audio)
        if self.config.rule == "stream":
            audio = nn.functional.pad(masked(audio, lengths), (0, -audio.shape[1] % self.grid))
            lengths = -(-lengths // self.grid) * self.grid
        lengths = lengths.to(torch.int32)
        rows = all_rows(audio.shape[0], audio.device)
        return self._log_mel(audio, lengths, None, rows), lengths // self.config.hop

    def initial_state(self, sessions: int, like: Tensor | None = None) -> FrontendState:
        """Empty state on the device of `like`, by default the CPU; samples are kept in fp32 (fp64 if `like` is)."""
        like = torch.zeros(()) if like is None else _wide(like.new_zeros(()))
        return FrontendState(
            buffer(sessions, self.grid - 1, (), like),
            like.new_zeros(sessions, self.config.n_fft - self.config.hop),
        )

    def step(
        self, audio: Tensor, lengths: Lengths, state: FrontendState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, FrontendState]:
        """New samples (batch, samples) of the sessions in rows -> mel (batch, n, n_mels), lengths, state.

        Every complete 80 ms gives 8 frames; `final` (batch,) bool fills an incomplete rest with zeros. Raises
        ValueError under the whisper rule, whose lower bound depends on the whole utterance.
        """
        if self.config.rule != "stream":
            raise ValueError("the whisper rule needs the whole utterance: call the front end, or set the rule 'stream'")
        samples, count = state.waiting.push(audio, lengths, rows, final, self.grid)
        mel = self._log_mel(samples, count, state.carry, rows)
        return mel, count // self.config.hop, state

    def _log_mel(self, audio: Tensor, lengths: Lengths, carry: Tensor | None, rows: Tensor) -> Tensor:
        c = self.config
        filters, window = self._filters_and_window(audio)
        return mk.log_mel(audio, lengths, carry, rows, filters, window, rule=c.rule, hop=c.hop, floor=c.floor)

    def _filters_and_window(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Recomputed from the configuration for each device and dtype, so that nothing is lost on the meta device."""
        key = (audio.device, audio.dtype)
        if key not in self._constants:
            with torch.inference_mode(False), torch.device("cpu"):
                filters = mel_filters(SAMPLE_RATE, self.config.n_fft, self.config.n_mels)
                window = torch.hann_window(self.config.n_fft, dtype=torch.float64)
                self._constants[key] = (filters.to(*key), window.to(*key))
        return self._constants[key]


def _wide(audio: Tensor) -> Tensor:
    return audio if audio.dtype == torch.float64 else audio.to(torch.float32)
