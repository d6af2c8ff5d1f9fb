"""Mel spectrogram of 24 kHz sound, 50 frames a second: what the flow learns to make and the vocoder to sound.

The features of HiFi-GAN at CosyVoice 2's sizes (arXiv 2412.10117): windows of 80 ms every 20 ms on sound reflected at
its ends, magnitudes on Slaney's mel scale up to 8 kHz, natural logarithm.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from minmo_kernels.ops.log_mel import mel_filters

RATE, N_FFT, HOP, TOP = 24_000, 1920, 480, 8_000
SMALLEST = 1e-5
"""Magnitudes below this count as this."""


def mel_spectrogram(audio: Tensor, n_mels: int = 80) -> Tensor:
    """Sound (batch, samples), samples a multiple of 480 -> (batch, samples / 480, n_mels), natural logarithm.

    Raises ValueError for other lengths, and below 721 samples, which the reflection needs.
    """
    if audio.dim() != 2 or audio.shape[1] % HOP or audio.shape[1] <= (N_FFT - HOP) // 2:
        raise ValueError(f"audio must be (batch, a multiple of {HOP} samples, at least 960), got {tuple(audio.shape)}")
    filters, window = _constants(n_mels, audio.dtype, audio.device)
    edge = (N_FFT - HOP) // 2
    reflected = pad(audio[:, None], (edge, edge), mode="reflect")[:, 0]
    spectrum = torch.stft(reflected, N_FFT, HOP, N_FFT, window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return (filters @ magnitude).clamp(min=SMALLEST).log().mT


@lru_cache(maxsize=8)
def _constants(n_mels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    filters = mel_filters(RATE, N_FFT, n_mels, high=TOP)
    return filters.to(device, dtype), torch.hann_window(N_FFT, dtype=dtype, device=device)
