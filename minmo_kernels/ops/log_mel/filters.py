"""The triangular mel filter bank that log-mel operations take as an argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LINEAR_STEP = 200.0 / 3.0
"""Hz of one mel below 1 kHz on Slaney's scale."""
_KNEE = 1000.0
_LOG_STEP = math.log(6.4) / 27.0
"""Natural log of the frequency ratio of one mel above 1 kHz."""


def mel_filters(sample_rate: int, n_fft: int, n_mels: int, *, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangular filters on Slaney's mel scale, each of area 1 in Hz. -> (n_mels, n_fft // 2 + 1) fp64

    low, high: the band in Hz, by default up to half the sample rate. The same numbers as librosa's defaults, which
    Whisper and CosyVoice use. Source: Slaney, Auditory Toolbox (1998).
    """
    top = sample_rate / 2 if high is None else high
    if not (0 <= low < top <= sample_rate / 2):
        raise ValueError(f"mel_filters: the band {low} .. {top} Hz must lie within 0 .. {sample_rate / 2} Hz")
    edges = _to_hz(torch.linspace(_to_mel(low), _to_mel(top), n_mels + 2, dtype=torch.float64))
    bins = torch.linspace(0.0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangle = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0.0)
    return triangle * 2.0 / (right - left)


def _to_mel(hz: float) -> float:
    return hz / _LINEAR_STEP if hz < _KNEE else _KNEE / _LINEAR_STEP + math.log(hz / _KNEE) / _LOG_STEP


def _to_hz(mel: Tensor) -> Tensor:
    knee = _KNEE / _LINEAR_STEP
    return torch.where(mel < knee, mel * _LINEAR_STEP, _KNEE * torch.exp(_LOG_STEP * (mel - knee)))
