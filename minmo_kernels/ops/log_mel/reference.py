"""`log_mel` in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype

SMALLEST = 1e-10
"""Mel power below this counts as this, as in Whisper."""


def reference(
    audio: Tensor,
    lengths: Tensor,
    carry: Tensor | None,
    rows: Tensor,
    filters: Tensor,
    window: Tensor,
    rule: str,
    hop: int,
    floor: float,
) -> Tensor:
    n_fft = window.shape[0]
    length = torch.where(rows >= 0, lengths, 0)
    inside = torch.arange(audio.shape[1], device=audio.device) < length[:, None]
    samples = torch.where(inside, audio, 0.0).to(compute_dtype(audio.dtype))
    extended = (
        _prepend(samples, length, carry, rows, n_fft - hop) if rule == "stream" else _reflect(samples, length, n_fft)
    )

    frames = audio.shape[1] // hop
    if frames == 0 or audio.shape[0] == 0:
        return audio.new_zeros(audio.shape[0], frames, filters.shape[0])
    pieces = extended.unfold(1, n_fft, hop)[:, :frames]
    spectrum = torch.fft.rfft(pieces * window.to(samples.dtype))
    power = spectrum.real.square() + spectrum.imag.square()
    mel = (power @ filters.to(samples.dtype).T).clamp(min=SMALLEST).log10()

    exists = (torch.arange(frames, device=audio.device) < (length // hop)[:, None])[:, :, None]
    if rule == "stream":
        mel = mel.clamp(min=floor)
    else:
        loudest = torch.where(exists, mel, math.log10(SMALLEST)).amax(dim=(1, 2), keepdim=True)
        mel = torch.maximum(mel, loudest - 8.0)
    return torch.where(exists, (mel + 4.0) / 4.0, 0.0).to(audio.dtype)


def _prepend(samples: Tensor, length: Tensor, carry: Tensor | None, rows: Tensor, left: int) -> Tensor:
    """Puts each session's last `left` samples in front and keeps the new last ones. -> (batch, left + samples)"""
    if carry is None:
        return torch.nn.functional.pad(samples, (left, 0))
    active = rows >= 0
    before = torch.where(active[:, None], carry[rows.clamp(min=0).long()], 0.0).to(samples.dtype)
    joined = torch.cat([before, samples], dim=1)
    last = joined.gather(1, length[:, None].long() + torch.arange(left, device=samples.device))
    carry[rows[active].long()] = last[active].detach().to(carry.dtype)
    return joined


def _reflect(samples: Tensor, length: Tensor, n_fft: int) -> Tensor:
    """Mirrors n_fft // 2 samples about the first and the last sample of each entry."""
    side, size = n_fft // 2, samples.shape[1]
    position = torch.arange(-side, size + side, device=samples.device)
    last = length[:, None].long() - 1
    index = torch.where(position > last, 2 * last - position, position.abs())
    return samples.gather(1, index.clamp(0, max(size - 1, 0)))
