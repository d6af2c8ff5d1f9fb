"""What a streaming state is: dataclasses of tensors with one row per session, and the moves that every part makes.

A part's `step(x, x_lengths, state, rows, final)` works on a batch of entries. `rows` (batch,) int32 names each entry's
session; -1 is padding: nothing of the state is read or written for it and its output length is 0. `x_lengths` (batch,)
int32 may be 0; what lies beyond a length may hold anything, NaN included. State tensors are updated in place, so a
state is owned by one stream of steps at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

Lengths = Tensor
"""(batch,) int32: valid items of each batch entry."""


class State:
    """Base of every streaming state: a dataclass of tensors (rows first), nested states, and lists of either."""

    def reset(self, rows: Tensor) -> None:
        """Makes the named sessions new again. rows: (n,) int, -1 entries are ignored."""
        for part in self._parts():
            if isinstance(part, State):
                part.reset(rows)
            else:
                write_rows(part, rows, part.new_zeros(()).expand(len(rows), *part.shape[1:]))

    @property
    def nbytes(self) -> int:
        """Memory of all sessions together, in bytes."""
        return sum(p.nbytes if isinstance(p, State) else p.numel() * p.element_size() for p in self._parts())

    def _parts(self) -> Iterator[Tensor | State]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(part, (Tensor, State)):
                    yield part


@dataclass
class KVCache(State):
    """Keys and values of one attention layer, (sessions, capacity, kv_heads, head_dim).

    `reset` leaves them alone: positions beyond a session's length are never read.
    """

    k: Tensor
    v: Tensor

    def reset(self, rows: Tensor) -> None:
        return None


def kv_cache(sessions: int, capacity: int, kv_heads: int, head_dim: int, like: Tensor) -> KVCache:
    """An empty cache with the dtype and device of `like`."""
    shape = (sessions, capacity, kv_heads, head_dim)
    return KVCache(like.new_zeros(shape), like.new_zeros(shape))


def all_rows(batch: int, device: torch.device | str | None = None) -> Tensor:
    """Row b for entry b: how one-shot calls use operations on per-session state. -> (batch,) int32"""
    return torch.arange(batch, dtype=torch.int32, device=device)


def full_lengths(x: Tensor) -> Lengths:
    """Lengths that say every item of x (batch, items, ...) is valid. -> (batch,) int32"""
    return torch.full((x.shape[0],), x.shape[1], dtype=torch.int32, device=x.device)


_unlooking: ContextVar[bool] = ContextVar("unlooking", default=False)


@contextlib.contextmanager
def unlooking() -> Iterator[None]:
    """Inside, steps run as they do while a CUDA graph is captured: no number of the device is read."""
    token = _unlooking.set(True)
    try:
        yield
    finally:
        _unlooking.reset(token)


def may_look(x: Tensor) -> bool:
    """Whether a number of x may be read here and now: always, but while a CUDA graph is captured."""
    return not _unlooking.get() and (x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing())


def nobody(entries: Tensor) -> bool:
    """True where no entry has anything to do, (batch,) counts or bool; False where that must not be read."""
    return may_look(entries) and not bool(entries.any())


def valid(lengths: Lengths, size: int) -> Tensor:
    """(batch, size) bool: item t of entry b lies within its length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def check_lengths(x: Tensor, lengths: Lengths) -> None:
    """Raises ValueError where lengths are not one an entry of x (batch, items, ...), or one exceeds its items.

    Numbers are looked at on a CPU alone, where that is free.
    """
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths must have the shape ({x.shape[0]},), one for each entry, got {tuple(lengths.shape)}")
    if lengths.is_cpu and bool(((lengths > x.shape[1]) | (lengths < 0)).any()):
        raise ValueError(f"lengths must lie in 0 .. {x.shape[1]}, the items of the input, got {lengths.tolist()}")


def masked(x: Tensor, lengths: Lengths) -> Tensor:
    """x (batch, items, ...) with zeros beyond each length (NaN there does not survive)."""
    keep = valid(lengths, x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
    return torch.where(keep, x, x.new_zeros(()))


def active_lengths(lengths: Lengths, rows: Tensor) -> Lengths:
    """Lengths with 0 for padding entries (rows -1)."""
    return torch.where(rows >= 0, lengths, 0).to(torch.int32)


def advanced(lengths: Tensor, rows: Tensor, counts: Lengths) -> Tensor:
    """lengths (sessions,) plus each entry's count (0 for padding entries), as a new tensor."""
    return lengths.index_add(0, rows.clamp(min=0).long(), counts)


def read_rows(state: Tensor, rows: Tensor) -> Tensor:
    """state (sessions, ...) -> (batch, ...); padding entries read as zeros."""
    out = state[rows.clamp(min=0).long()]
    keep = (rows >= 0).reshape(-1, *[1] * (out.dim() - 1))
    return torch.where(keep, out, out.new_zeros(()))


def write_rows(state: Tensor, rows: Tensor, value: Tensor) -> None:
    """Writes value (batch, ...) into state (sessions, ...) in place; padding entries write nothing."""
    if rows.is_cpu:
        keep = rows >= 0
        state[rows[keep].long()] = value[keep].to(state.dtype)
    elif len(rows):
        write_rows_unseen(state, rows, value)


def write_rows_unseen(state: Tensor, rows: Tensor, value: Tensor) -> None:
    """`write_rows` without a look at `rows`, for a GPU's queue: padding entries write again what the first active one
    writes, or what row 0 holds already."""
    keep = rows >= 0
    first = keep.int().argmax()
    entry = torch.where(keep, torch.arange(len(rows), device=rows.device), first)
    row = rows[entry].clamp(min=0).long()
    # A tensor alone as an index of a vector, `keep[first]`, would be read on the host.
    state[row] = torch.where(keep.any(), value[entry].to(state.dtype), state[row])


def take(x: Tensor, start: Tensor, size: int) -> Tensor:
    """x (batch, items, ...) -> (batch, size, ...): items start[b] .. start[b]+size-1, clamped to the last item."""
    index = (start[:, None].long() + torch.arange(size, device=x.device)).clamp(max=x.shape[1] - 1)
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def with_left_context(carry: Tensor, x: Tensor, lengths: Lengths, rows: Tensor) -> Tensor:
    """Puts each session's last items before its new ones, and keeps the new last items: a causal convolution's memory.

    carry: (sessions, left, ...), updated in place; x: (batch, items, ...) -> (batch, left + items, ...), zeros beyond
    each entry's `left + length`.
    """
    left = carry.shape[1]
    joined = torch.cat([read_rows(carry, rows).to(x.dtype), masked(x, active_lengths(lengths, rows))], dim=1)
    if left:
        write_rows(carry, rows, take(joined, active_lengths(lengths, rows), left))
    return joined


@dataclass
class Buffer(State):
    """Items that wait for their part's fixed grid to fill, so that results never depend on how input arrived.

    data: (sessions, capacity, ...) with the waiting items first; count: (sessions,) int32.
    """

    data: Tensor
    count: Tensor

    def push(self, x: Tensor, x_lengths: Lengths, rows: Tensor, final: Tensor, unit: int) -> tuple[Tensor, Lengths]:
        """Adds x (batch, items, ...) and hands out all complete units, in order.

        An entry with `final` also hands out its incomplete last unit, filled up with zeros. Returns (batch, n, ...) and
        its lengths, multiples of `unit`, with n = the largest multiple that these shapes can give.
        """
        waiting = read_rows(self.count, rows)
        joined, total = join(read_rows(self.data, rows), waiting, x, active_lengths(x_lengths, rows))
        whole = torch.where(final, -(-total // unit), total // unit).to(torch.int32) * unit
        size = -(-joined.shape[1] // unit) * unit
        out = torch.nn.functional.pad(joined, [0, 0] * (joined.dim() - 2) + [0, size - joined.shape[1]])
        rest = (total - whole).clamp(min=0)
        capacity = self.data.shape[1]
        if capacity:
            write_rows(self.data, rows, masked(take(out, whole, capacity), rest))
        write_rows(self.count, rows, rest)
        return out, whole


def buffer(sessions: int, capacity: int, features: tuple[int, ...], like: Tensor) -> Buffer:
    """An empty buffer for up to `capacity` (= unit - 1) waiting items."""
    return Buffer(
        like.new_zeros((sessions, capacity, *features)),
        torch.zeros(sessions, dtype=torch.int32, device=like.device),
    )


def join(first: Tensor, first_lengths: Lengths, second: Tensor, second_lengths: Lengths) -> tuple[Tensor, Lengths]:
    """Concatenates per entry: the valid items of `first`, then those of `second`, then zeros.

    (batch, n, ...), (batch, m, ...) -> (batch, n + m, ...) and the total lengths.
    """
    both = torch.cat([first, second.to(first.dtype)], dim=1)
    n = first.shape[1]
    position = torch.arange(both.shape[1], device=both.device)[None]
    index = torch.where(position < first_lengths[:, None], position, position - first_lengths[:, None] + n)
    index = index.clamp(max=both.shape[1] - 1).long()
    index = index.reshape(*index.shape, *[1] * (both.dim() - 2)).expand(-1, -1, *both.shape[2:])
    total = (first_lengths + second_lengths).to(torch.int32)
    return masked(both.gather(1, index), total), total


def join_all(pieces: Sequence[tuple[Tensor, Lengths]]) -> tuple[Tensor, Lengths]:
    """`join` of any number of pieces (batch, n_i, ...) with their lengths, in one pass, as long as the longest."""
    both = torch.cat([x for x, _ in pieces], dim=1)
    exists = torch.cat([valid(lengths, x.shape[1]) for x, lengths in pieces], dim=1)
    total = exists.sum(dim=1, dtype=torch.int32)
    order = torch.argsort(~exists, dim=1, stable=True)[:, : int(total.max())]
    order = order.reshape(*order.shape, *[1] * (both.dim() - 2)).expand(-1, -1, *both.shape[2:])
    return masked(both.gather(1, order), total), total
