"""Convolutional networks on whole signals and on streams, from one description of the network.

A network is written once against `Window`, whose operations take and return `Signal`s. `Window` computes a stretch of
an utterance in one shot. `Stream` computes the same numbers piece by piece: each operation keeps just the input items
that its next outputs need, and its output lags by a fixed delay, known from the kernel sizes, so nothing is computed
twice and a step costs the same however long the utterance is. Positions are absolute: what lies before the start or
after the end of the utterance is zero in front of every convolution, exactly as zero padding in one shot, and cuts
leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENDLESS = 1 << 40
"""End position, in frames, of an utterance whose end is not known yet."""


@dataclass(frozen=True)
class Signal:
    """data (batch, channels, rate * frames): `rate` items a frame.

    Item 0 is at position rate * first frame - delay; an utterance of n frames holds rate * n + extra items.
    """

    data: Tensor
    rate: int
    delay: int = 0
    extra: int = 0

    def map(self, f: Callable[[Tensor], Tensor]) -> Signal:
        """f on every item; f(0) must be 0, so that silence outside the utterance stays silent."""
        return replace(self, data=f(self.data))


class Window:
    """Frames start .. start + frames - 1 of each entry in one shot; positions outside 0 .. end are silent.

    start, end: (batch,) int64, in frames; start may be negative. What lies before a positive start counts as zeros, so
    the first receptive field of such a window is not the utterance's sound.
    """

    def __init__(self, start: Tensor, end: Tensor) -> None:
        self.start, self.end = start, end
        self._inside: dict[tuple[int, ...], Tensor] = {}

    def positions(self, x: Signal) -> Tensor:
        """(batch, items) int64: absolute position of each item."""
        return (self.start * x.rate - x.delay)[:, None] + torch.arange(x.data.shape[2], device=x.data.device)

    def inside(self, x: Signal) -> Tensor:
        """(batch, 1, items) bool: which items belong to the utterance."""
        key = (x.rate, x.delay, x.extra, x.data.shape[2])
        if key not in self._inside:
            position = self.positions(x)
            inside = (position >= 0) & (position < (self.end * x.rate + x.extra)[:, None])
            self._inside[key] = inside[:, None]
        return self._inside[key]

    def bound(self, x: Signal) -> Signal:
        """x with zeros outside the utterance."""
        return replace(x, data=torch.where(self.inside(x), x.data, x.data.new_zeros(())))

    def conv(self, x: Signal, layer: nn.Conv1d) -> Signal:
        return self.convolve(x, layer.weight, layer.bias, layer.stride[0], layer.dilation[0], int(layer.padding[0]))

    def convolve(
        self,
        x: Signal,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int = 1,
        dilation: int = 1,
        padding: int = 0,
    ) -> Signal:
        """Conv1d with `padding` zeros at both ends of the utterance; weight (out, in, kernel)."""
        reach = dilation * (weight.shape[2] - 1)
        delay = self._delay(-(-(x.delay + reach - padding) // stride))
        data = self._extend(x.data, stride * delay - x.delay + padding, reach - padding)
        y = F.conv1d(data, weight, bias, stride=stride, dilation=dilation)[..., : x.data.shape[2] // stride]
        extra = (x.extra + 2 * padding - reach - 1) // stride + 1
        return self.bound(Signal(y, x.rate // stride, delay, extra))

    def conv_transpose(self, x: Signal, layer: nn.ConvTranspose1d) -> Signal:
        stride, kernel, padding = layer.stride[0], layer.kernel_size[0], int(layer.padding[0])
        past = (kernel - 1) // stride
        delay = self._delay(stride * x.delay + padding)
        y = F.conv_transpose1d(self._extend(x.data, past, 0), layer.weight, layer.bias, stride=stride)
        offset = stride * (past + x.delay) + padding - delay
        y = y[..., offset : offset + stride * x.data.shape[2]]
        return self.bound(Signal(y, x.rate * stride, delay, stride * (x.extra - 1) + kernel - 2 * padding))

    def reflect(self, x: Signal, left: int, right: int) -> Signal:
        """x with `left` mirrored items before its start and `right` after its end (the edge item is not repeated)."""
        delay = self._delay(x.delay + left)
        past = 2 * (left + right)
        data = self._extend(x.data, past, 0)
        out = Signal(x.data, x.rate, delay, x.extra + left + right)
        source = (self.positions(out) - left).abs()
        last = (self.end * x.rate + x.extra - 1)[:, None]
        source = torch.where(source > last, 2 * last - source, source)
        index = (source - (self.start * x.rate - x.delay - past)[:, None]).clamp(0, data.shape[2] - 1)
        return self.bound(replace(out, data=data.gather(2, index[:, None].expand(-1, data.shape[1], -1))))

    def look_ahead(self, x: Signal) -> tuple[Signal, Tensor]:
        """x late enough that every item's successor is known, and the successors (batch, channels, items)."""
        delay = self._delay(x.delay + 1)
        data = self._extend(x.data, delay - x.delay, 1)
        items = x.data.shape[2]
        return replace(x, data=data[..., :items], delay=delay), data[..., 1 : items + 1]

    def add(self, a: Signal, b: Signal) -> Signal:
        """a + b, the earlier one delayed to meet the later one."""
        delay = max(a.delay, b.delay)
        return replace(a, data=self._late(a, delay) + self._late(b, delay), delay=delay)

    def _late(self, x: Signal, delay: int) -> Tensor:
        if delay == x.delay:
            return x.data
        return self._extend(x.data, delay - x.delay, 0)[..., : x.data.shape[2]]

    def _delay(self, needed: int) -> int:
        return 0

    def _extend(self, data: Tensor, left: int, right: int) -> Tensor:
        return F.pad(data, (left, right))


class Stream(Window):
    """Continues a stream of frames: start = frames seen before, lengths (batch,) = new frames of each entry.

    frames: the step's padded length. memory: (batch, size) what earlier steps kept, all operations' items in the order
    of the network; `kept` gives the same for the next step. With memory None nothing is remembered, and `size` counts
    what the network asks for.
    """

    def __init__(self, start: Tensor, end: Tensor, lengths: Tensor, frames: int, memory: Tensor | None) -> None:
        super().__init__(start, end)
        self.lengths, self.frames, self.memory = lengths, frames, memory
        self.size = 0
        self._kept: list[Tensor] = []

    def kept(self) -> Tensor:
        """(batch, size): memory for the next step."""
        return torch.cat(self._kept, dim=1)

    def _delay(self, needed: int) -> int:
        return needed

    def _extend(self, data: Tensor, left: int, right: int) -> Tensor:
        batch, channels, items = data.shape
        if not left:
            return data
        offset, self.size = self.size, self.size + channels * left
        if self.memory is None:
            return F.pad(data, (left, 0))
        past = self.memory[:, offset : self.size].reshape(batch, channels, left).to(data.dtype)
        joined = torch.cat([past, data], dim=2)
        new = self.lengths[:, None].long() * (items // self.frames)
        index = new + torch.arange(left, device=data.device)
        self._kept.append(joined.gather(2, index[:, None].expand(-1, channels, -1)).flatten(1))
        return joined
