"""Augmentation of log-mel features: other speeds, throats, rooms, telephones and noise, at a fraction of a step's time.

All is drawn from a generator of the caller's, seeded by (seed, epoch, cut), so that a resumed run draws the same.
Features are log10 power / 4 + 1 (`minmo_kernels.log_mel`); silence is the front end's floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """How strongly; each line is drawn anew for each utterance. Shares are probabilities.

    stretch, throat: factors of time and of frequency (vocal tract length), drawn log-uniformly within 1/x .. x.
    lowpass: share of utterances heard through a telephone, cut above a drawn band. gain, tilt: in units of log10 power.
    noise: share with a noise floor, `noise_range` below the loudest frame, in log10 power. masks: bands of SpecAugment
    in time (up to `mask_frames` long) and frequency (up to `mask_bins`). pad: most frames of silence before and after.
    """

    stretch: float = 1.25
    throat: float = 1.14
    gain: float = 0.8
    tilt: float = 0.5
    lowpass: float = 0.25
    noise: float = 0.5
    noise_range: tuple[float, float] = (1.5, 4.5)
    masks: int = 2
    mask_frames: int = 12
    mask_bins: int = 12
    pad: int = 40
    from_epoch: int = 0
    """Epochs before this one hear sound as it is: an encoder that starts from nothing leaves CTC's blanks sooner."""

    def __post_init__(self) -> None:
        for name in ("stretch", "throat"):
            if not 1 <= getattr(self, name) <= 4:
                raise ValueError(f"{name} must be a factor in 1 .. 4, got {getattr(self, name):g}")
        for name in ("lowpass", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share in 0 .. 1, got {getattr(self, name):g}")
        if self.noise_range[0] > self.noise_range[1]:
            raise ValueError(f"noise_range must rise, got {list(self.noise_range)}")
        for name in ("gain", "tilt", "masks", "mask_frames", "mask_bins", "pad", "from_epoch"):
            if not 0 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must lie in 0 .. 1000, got {getattr(self, name):g}")

    def __call__(self, mel: Tensor, floor: float, rng: np.random.Generator) -> Tensor:
        """mel (frames, n_mels) -> (other frames, n_mels). floor: the features of silence."""
        frames, bins = mel.shape
        warped = max(8, round(frames * float(np.exp(rng.uniform(-1, 1) * np.log(self.stretch)))))
        throat = float(np.exp(rng.uniform(-1, 1) * np.log(self.throat)))
        mel = _resampled(mel, warped, throat)
        slope = torch.linspace(-1, 1, bins) * float(rng.uniform(-1, 1)) * self.tilt
        curve = torch.from_numpy(rng.standard_normal(6).astype(np.float32))[None, None] * 0.3 * self.tilt
        slope = slope + F.interpolate(curve, size=bins, mode="linear", align_corners=True)[0, 0]
        mel = mel + (slope + float(rng.uniform(-1, 1)) * self.gain) / 4
        if rng.random() < self.lowpass:
            mel = mel.clone()
            mel[:, int(rng.integers(int(0.6 * bins), bins)) :] = floor
        before, after = (int(n) for n in rng.integers(0, self.pad + 1, 2))
        mel = F.pad(mel, (0, 0, before, after), value=floor)
        if rng.random() < self.noise:
            mel = _noisy(mel, floor, float(rng.uniform(*self.noise_range)), rng)
        mel = mel.clamp(min=floor)
        for _ in range(self.masks):
            width, bands = int(rng.integers(0, self.mask_frames + 1)), int(rng.integers(0, self.mask_bins + 1))
            start, low = int(rng.integers(0, len(mel))), int(rng.integers(0, bins))
            mel[start : start + width] = mel.mean()
            mel[:, low : low + bands] = mel.mean()
        return mel


def _resampled(mel: Tensor, frames: int, throat: float) -> Tensor:
    """Time stretched to `frames`, and mel bin i read at i * throat (of the bins as they are: a small warp)."""
    rows = torch.linspace(-1, 1, frames)
    bins = mel.shape[1]
    columns = (torch.arange(bins) * throat).clamp(max=bins - 1) / (bins - 1) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), dim=-1)
    return F.grid_sample(mel[None, None], grid[None], align_corners=True, padding_mode="border")[0, 0]


def _noisy(mel: Tensor, floor: float, below: float, rng: np.random.Generator) -> Tensor:
    """Power of coloured noise added, `below` (log10) under the loudest frame."""
    loudest = float(mel.mean(dim=1).max()) * 4
    colour = torch.linspace(0.5, -0.5, mel.shape[1]) * float(rng.uniform(-1, 1.5))
    jitter = torch.from_numpy(rng.standard_normal(mel.shape).astype(np.float32)) * 0.25
    noise = (loudest - below + colour + jitter).clamp(min=4 * floor)
    return torch.logaddexp(mel * 4 * _LN10, noise * _LN10) / _LN10 / 4


_LN10 = float(np.log(10.0))
