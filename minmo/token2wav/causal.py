"""What the flow's networks share: chunk masks, the new items of one pass, and causal convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo.state import all_rows, read_rows, with_left_context, write_rows


@dataclass(frozen=True)
class ChunkMask:
    """Item p lies in chunk (p + offset) // size and sees its own chunk and `left` chunks before it (-1 = all)."""

    size: int
    offset: int = 0
    left: int = -1

    def scaled(self, factor: int) -> ChunkMask:
        """The same mask on items that are `factor` times as frequent."""
        return ChunkMask(self.size * factor, self.offset * factor, self.left)

    @property
    def capacity(self) -> int:
        """Items that a ring must hold: what the last item of a chunk sees. Only where `left` bounds it."""
        return self.size * (self.left + 1)


@dataclass(frozen=True)
class Span:
    """The new items of one pass through a network.

    rows: (batch,) int32, the session of each entry, -1 = padding; before, after: (sessions,) int32, the items of each
    session without and with the new ones; lengths: (batch,) int32, new items; mask None = every item sees all.
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    lengths: Tensor
    mask: ChunkMask | None

    def scaled(self, factor: int) -> Span:
        """The same span on items that are `factor` times as frequent."""
        mask = None if self.mask is None else self.mask.scaled(factor)
        return Span(self.rows, self.before * factor, self.after * factor, self.lengths * factor, mask)

    def doubled(self) -> Span:
        """Two entries 2b, 2b+1 for entry b, and two sessions 2s, 2s+1 for session s: guidance with and without."""
        before, after = self.before.repeat_interleave(2), self.after.repeat_interleave(2)
        return Span(double_rows(self.rows), before, after, self.lengths.repeat_interleave(2), self.mask)


def double_rows(rows: Tensor) -> Tensor:
    """Rows 2r, 2r+1 for each row r, -1 for padding. (batch,) -> (2 batch,) int32"""
    twins = torch.stack([rows * 2, rows * 2 + 1], dim=1)
    return torch.where(rows[:, None] >= 0, twins, -1).flatten().to(torch.int32)


def whole(lengths: Tensor, mask: ChunkMask | None) -> Span:
    """The span of a one-shot call: all items of every entry are new. lengths (batch,)"""
    lengths = lengths.to(torch.int32)
    return Span(all_rows(len(lengths), lengths.device), torch.zeros_like(lengths), lengths, lengths, mask)


def continued(done: Tensor, lengths: Tensor, rows: Tensor, mask: ChunkMask) -> Span:
    """The span of a streaming pass: `lengths` (batch,) new items after the `done` (sessions,) ones."""
    after = done.clone()
    write_rows(after, rows, read_rows(done, rows) + lengths)
    return Span(rows, done.clone(), after, lengths, mask)


class CausalConv(nn.Conv1d):
    """Conv1d that looks to the left only, on (batch, items, channels)."""

    def __init__(self, channels: int, channels_out: int, kernel: int) -> None:
        super().__init__(channels, channels_out, kernel)

    @property
    def left(self) -> int:
        """Items of left context, and so of a carry (sessions, left, channels)."""
        return self.kernel_size[0] - 1

    def forward(  # type: ignore[override]
        self, x: Tensor, span: Span, carry: Tensor | None = None
    ) -> Tensor:
        """x (batch, items, channels) -> (batch, items, channels_out). Without a carry, zeros stand on the left."""
        if carry is None:
            x = nn.functional.pad(x, [0, 0, self.left, 0])
        else:
            x = with_left_context(carry, x, span.lengths, span.rows)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)
