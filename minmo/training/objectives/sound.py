"""Sound from speech tokens: conditional flow matching (flow) and spectral losses on waveforms (vocoder)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo.model import MinMo
from minmo.state import Lengths, full_lengths, masked, valid
from minmo.token2wav.causal import whole
from minmo.token2wav.mel import mel_spectrogram
from minmo.training.objectives import ModelObjective

SIGMA = 1e-6
"""Standard deviation left at the flow's end (CosyVoice 2, Matcha-TTS)."""
WINDOWS = ((512, 120, 480), (1024, 240, 960), (2048, 480, 1920))
"""n_fft, hop and window of the multi-resolution spectra, at 24 kHz."""


@dataclass(frozen=True)
class FlowBatch:
    """tokens (batch, n) int32 with lengths; mel (batch, 2 n, n_mels); noise like mel; time, drop, whole (batch,): the
    flow time, whether the conditions are hidden (guidance), and whether everything is seen; prompt (batch,) int32: mel
    frames at the start that are given."""

    tokens: Tensor
    lengths: Lengths
    mel: Tensor
    noise: Tensor
    time: Tensor
    drop: Tensor
    prompt: Tensor
    streamed: bool


class FlowObjective(ModelObjective):
    """Squared error of the velocity at a drawn time, conditions dropped for guidance, masked as a stream or not
    (CosyVoice 2, arXiv 2412.10117, section 2.4)."""

    weights = {"flow": 1.0}

    def counts(self, batch: FlowBatch) -> dict[str, float]:
        return {"flow": float((2 * batch.lengths - batch.prompt).sum()) * batch.mel.shape[2]}

    def forward(self, batch: FlowBatch) -> dict[str, Tensor]:
        flow = self.model.flow
        span = whole(batch.lengths, flow.session_mask if batch.streamed else None)
        tokens = F.pad(batch.tokens, (0, flow.config.lookahead))
        mu = flow.encode(tokens, batch.lengths, span)
        frames = batch.mel.shape[1]
        given = valid(batch.prompt, frames)[..., None]
        speaker = self.model.speaker.expand(len(mu), -1)
        speaker = flow.speaker_projection(F.normalize(speaker, dim=1))
        keep = (~batch.drop).to(mu.dtype)
        time = 1 - torch.cos(0.5 * math.pi * batch.time)
        t = time[:, None, None]
        x = (1 - (1 - SIGMA) * t) * batch.noise + t * batch.mel
        velocity = flow.estimator(
            masked(x, 2 * batch.lengths),
            mu * keep[:, None, None],
            speaker * keep[:, None],
            torch.where(given, batch.mel, 0.0) * keep[:, None, None],
            time,
            span.scaled(2),
            None,
        )
        wrong = (velocity - (batch.mel - (1 - SIGMA) * batch.noise)).square()
        counted = valid(2 * batch.lengths, frames)[..., None] & ~given
        return {"flow": torch.where(counted, wrong, 0.0).sum()}

    def sound(self, batch: FlowBatch) -> dict[str, Tensor]:
        """Of the first entry: from its tokens, as a reply is spoken, and from its own mel frames."""
        size = int(batch.lengths[0])
        own = spoken(self.model, batch.mel[:1, : 2 * size])
        return {"from tokens": sound_of_tokens(self.model, batch.tokens[:1, :size]), "from mel frames": own}


@dataclass(frozen=True)
class SoundBatch:
    """audio (batch, samples) 24 kHz, whole mel frames; f0 (batch, frames) Hz, 0 unvoiced; seeds (batch,) int64."""

    audio: Tensor
    f0: Tensor
    seeds: Tensor


class VocoderObjective(ModelObjective):
    """Multi-resolution spectra, mel frames, and the pitch that drives the source."""

    weights = {"spectrum": 1.0, "mel": 2.0, "pitch": 0.02}

    def counts(self, batch: SoundBatch) -> dict[str, float]:
        return {"spectrum": float(len(batch.audio)), "mel": float(len(batch.audio)), "pitch": float(batch.f0.numel())}

    def forward(self, batch: SoundBatch) -> dict[str, Tensor]:
        vocoder, audio = self.model.vocoder, batch.audio
        mel = mel_spectrogram(audio, vocoder.config.n_mels)
        made, f0 = vocoder.sound_and_pitch(mel, full_lengths(mel), batch.seeds)
        spectrum = sum((_spectral(made, audio, *window) for window in WINDOWS), start=made.new_zeros(()))
        again = mel_spectrogram(made, vocoder.config.n_mels)
        return {
            "spectrum": spectrum / len(WINDOWS),
            "mel": (again - mel).abs().mean(dim=(1, 2)).sum(),
            "pitch": (f0 - batch.f0).abs().sum(),
        }

    def sound(self, batch: SoundBatch) -> dict[str, Tensor]:
        """Of the first entry: made again from its mel frames, and as it is."""
        mel = mel_spectrogram(batch.audio[:1], self.model.vocoder.config.n_mels)
        return {"from mel frames": spoken(self.model, mel), "original": batch.audio[0]}


def sound_of_tokens(model: MinMo, tokens: Tensor) -> Tensor:
    """Speech tokens (1, n) -> (samples,) 24 kHz, through the model's flow and vocoder."""
    seeds = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    mel, _ = model.flow(tokens, None, model.speaker[None], seeds)
    return spoken(model, mel)


def spoken(model: MinMo, mel: Tensor) -> Tensor:
    """Mel frames (1, n, n_mels) -> (samples,) 24 kHz, through the model's vocoder."""
    audio, _ = model.vocoder(mel, None, torch.zeros(1, dtype=torch.int64, device=mel.device))
    return audio[0]


def _spectral(made: Tensor, audio: Tensor, n_fft: int, hop: int, size: int) -> Tensor:
    """Spectral convergence and log-magnitude distance, summed over the batch (Parallel WaveGAN, arXiv 1910.11480)."""
    window = torch.hann_window(size, device=audio.device, dtype=audio.dtype)

    def magnitude(x: Tensor) -> Tensor:
        spectrum = torch.stft(x, n_fft, hop, size, window, return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-7).sqrt()

    own, true = magnitude(made), magnitude(audio)
    converged = (true - own).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1).clamp(min=1e-3)
    return (converged + (true.log() - own.log()).abs().mean(dim=(1, 2))).sum()
