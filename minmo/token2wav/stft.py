"""The vocoder's short Fourier transforms as convolutions, so that they stream like every other layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minmo.config import VocoderConfig
from minmo.token2wav.streams import Signal, Window

_MAGNITUDE_LIMIT = 100.0


def wide(like: Tensor) -> torch.dtype:
    """The dtype in which sound is computed: fp32, or fp64 where `like` has it."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def inverse_stft(window: Window, x: Signal, config: VocoderConfig) -> Signal:
    """Log magnitude and phase (batch, n_fft + 2, items) -> sound by overlap-add over the sum of squared windows."""
    n, hop = config.istft_n_fft, config.istft_hop
    data = x.data.to(wide(x.data))
    magnitude = data[:, : n // 2 + 1].clamp(max=math.log(_MAGNITUDE_LIMIT)).exp()
    angle = data[:, n // 2 + 1 :].sin()
    spectrum = window.bound(
        Signal(torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], 1), x.rate, x.delay, x.extra)
    )
    # A block of `hop` samples takes part of the frames block - overlap/2 + 1 .. block + overlap/2.
    overlap = n // hop
    hann = _hann(n, data)
    inverse = _inverse_dft(n, data) * hann
    weight = inverse.unflatten(1, (overlap, hop)).flip(1).permute(2, 0, 1)
    y = window.convolve(spectrum, weight, padding=overlap // 2 - 1)
    frame = window.positions(y)[..., None] + torch.arange(1 - overlap // 2, overlap // 2 + 1, device=data.device)
    exists = (frame >= 0) & (frame < (window.end * x.rate + x.extra)[:, None, None])
    envelope = exists.to(data.dtype) @ (hann**2).unflatten(0, (overlap, hop)).flip(0)
    audio = (y.data.mT / envelope.clamp(min=1e-8)).flatten(1, 2)
    audio = audio.clamp(-config.limit, config.limit)
    return Signal(audio[:, None], hop * y.rate, hop * y.delay)


def _hann(n: int, like: Tensor) -> Tensor:
    return 0.5 - 0.5 * torch.cos(2 * math.pi / n * torch.arange(n, device=like.device, dtype=wide(like)))


def _angles(n: int, like: Tensor) -> Tensor:
    """(n // 2 + 1, n): the angle of each frequency at each sample."""
    frequency = torch.arange(n // 2 + 1, device=like.device)
    cycle = frequency[:, None] * torch.arange(n, device=like.device) % n
    return cycle.to(wide(like)) * (2 * math.pi / n)


def stft_weight(config: VocoderConfig, like: Tensor) -> Tensor:
    """Hann-windowed DFT as a convolution kernel (n_fft + 2, 1, n_fft): real parts, then imaginary parts."""
    n = config.istft_n_fft
    angles = _angles(n, like)
    return (torch.cat([angles.cos(), -angles.sin()]) * _hann(n, like))[:, None].to(like.dtype)


def _inverse_dft(n: int, like: Tensor) -> Tensor:
    """(n + 2, n): the samples that each real part, then each imaginary part, of a real signal's spectrum stands for."""
    angles = _angles(n, like)
    twice = torch.full((n // 2 + 1, 1), 2.0, device=like.device, dtype=angles.dtype)
    twice[0] = twice[-1] = 1.0
    return torch.cat([angles.cos() * twice, -angles.sin() * twice]) / n
