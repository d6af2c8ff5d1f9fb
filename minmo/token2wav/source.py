"""The vocoder's source: harmonics of the predicted pitch plus noise, mixed to one excitation signal.

Neural source-filter model with HiFT's frame-wise phase: each harmonic's phase is summed over frames at the frame
centres and linear in between, constant before the first and after the last centre. All harmonics start at phase zero,
as in CosyVoice 2's vocoder: its random initial phases are lost where it resamples to frames and never reach the sound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import VocoderConfig
from minmo.token2wav.streams import Signal, Window

NOISE_STREAM = 0x48494654
"""Philox stream of the source's noise; the index is the absolute sample."""

_CYCLE_BITS = 40
"""Phases are integers, 2^40 to a cycle: sums are exact and wrap, so a long stream loses no precision."""


class HarmonicSource(nn.Module):
    """(f0 per frame) -> excitation per sample: tanh of a learned mix of the fundamental and its harmonics."""

    def __init__(self, config: VocoderConfig, hop: int) -> None:
        super().__init__()
        self.config, self.hop = config, hop
        self.mix = nn.Linear(config.harmonics + 1, 1)

    def forward(
        self, window: Window, f0: Signal, phase: Tensor, counted: Tensor, seeds: Tensor, noise: Tensor | None = None
    ) -> tuple[Signal, Tensor]:
        """f0: Hz, one channel, one item a frame, zero outside. phase: (batch, harmonics + 1) int64, at the last frame
        before the first counted one; counted: (batch, frames) bool, the frames that move the phase.

        seeds (batch,) int64; noise (batch, samples, harmonics + 1), standard normal, takes the place of the seeds'.
        Returns the excitation, one item a sample, and the phase advance of each frame (batch, frames, harmonics + 1).
        """
        with torch.no_grad():
            f0, following = window.look_ahead(f0)
            wide = torch.float64 if f0.data.dtype == torch.float64 else torch.float32
            pitch, following = f0.data[:, 0].to(wide), following[:, 0].to(wide)
            after = self._cycles(following)
            before = self._cycles(pitch)
            advance = (before * 2**_CYCLE_BITS).round().long()
            phase = phase[:, None] + (advance * counted[..., None]).cumsum(1)
            before = before * (window.positions(f0) > 0)[..., None]
            # Samples lie half a step off the frame centres: the first half of a frame leans on the frame before.
            lean = (torch.arange(self.hop, device=pitch.device, dtype=wide) + 0.5) / self.hop - 0.5
            lean = lean[:, None]
            slope = torch.where(lean < 0, before[:, :, None], after[:, :, None])
            centre = (phase & (2**_CYCLE_BITS - 1)).to(wide) * 2.0**-_CYCLE_BITS
            turns = (centre[:, :, None] + lean * slope).flatten(1, 2)
            voiced = (pitch > self.config.voiced_threshold).to(wide).repeat_interleave(self.hop, 1)[..., None]
            sines = torch.sin(2 * math.pi * (turns - turns.floor())) * self.config.source_amplitude
            excitation = Signal(f0.data, self.hop, self.hop * f0.delay)
            if noise is None:
                sample = window.positions(Signal(turns.mT, self.hop, excitation.delay)).clamp(min=0)
                noise = mk.philox_normal(seeds, NOISE_STREAM, sample, self.config.harmonics + 1)
            level = voiced * self.config.noise_amplitude + (1 - voiced) * self.config.source_amplitude / 3
            tones = (sines * voiced + level * noise.to(wide)).to(self.mix.weight.dtype)
        mixed = torch.tanh(self.mix(tones)).mT
        return window.bound(Signal(mixed, self.hop, excitation.delay)), advance

    def _cycles(self, f0: Tensor) -> Tensor:
        """Cycles of each harmonic in a frame. (batch, frames) -> (batch, frames, harmonics + 1)"""
        order = torch.arange(1, self.config.harmonics + 2, device=f0.device, dtype=f0.dtype)
        return (f0[..., None] * order / self.config.sample_rate) % 1 * self.hop
