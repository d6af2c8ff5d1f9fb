"""HiFT's building blocks: residual blocks with Snake activations, and the pitch predictor (arXiv 2309.09493)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmo.token2wav.streams import Signal, Window

PITCH_REACH = 5
"""Frames of context on either side that the pitch of a frame depends on: one for each convolution."""


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        wave = torch.sin(alpha * x)
        return x + wave * wave / (alpha + 1e-9)


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, Snake, convolution; added to its input."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)
        self.snake2 = Snake(channels)
        self.conv2 = nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2)

    def forward(self, window: Window, x: Signal) -> Signal:
        y = window.conv(x.map(self.snake1), self.conv1)
        return window.add(x, window.conv(y.map(self.snake2), self.conv2))


class ResidualBlock(nn.ModuleList):
    """Residual units of one kernel size, one for each dilation."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__(ResidualUnit(channels, kernel, d) for d in dilations)

    def forward(self, window: Window, x: Signal) -> Signal:
        for unit in self:
            x = unit(window, x)
        return x


class PitchPredictor(nn.Module):
    """mel -> f0 in Hz, (batch, 1, frames)."""

    def __init__(self, n_mels: int, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(n_mels if i == 0 else channels, channels, 3, padding=1) for i in range(PITCH_REACH)
        )
        self.out = nn.Linear(channels, 1)

    def forward(self, window: Window, mel: Signal) -> Signal:
        x = mel
        for conv in self.convs:
            x = window.conv(x, cast(nn.Conv1d, conv)).map(F.elu)
        f0 = self.out(x.data.mT).mT.abs()
        return window.bound(Signal(f0, 1, x.delay))
