"""Launch configurations as data: one JSON a compute capability, read once.

A table maps an operation to entries `[conditions, configuration]` in order; the first entry whose conditions all hold
serves. `cpu.json` is for the interpreter (few programs of blocks that examples cross), `smXX.json` for GPUs of
capability XX and newer.
`python -m minmo_kernels.tuning.tune` measures on a GPU and rewrites its table.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple


class Trial(NamedTuple):
    """A configuration that the tuner tries, and every (table, bucket) that was asked for meanwhile."""

    operation: str
    values: dict[str, int]
    asked: list[tuple[str, dict[str, Any]]]


FOLDER = Path(__file__).parent
MOST_ROWS = 64
"""The largest bucket of a decode step."""
_invariant: ContextVar[bool] = ContextVar("invariant", default=False)
_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


@functools.cache
def table(sm: int) -> dict[str, list[tuple[dict[str, Any], dict[str, int]]]]:
    """The table for a capability (0 = the interpreter): the newest one that is not newer."""
    return json.loads(path_of(sm).read_text())


def path_of(sm: int) -> Path:
    """Where `table(sm)` is read from."""
    if sm == 0:
        return FOLDER / "cpu.json"
    known = sorted(int(p.stem[2:]) for p in FOLDER.glob("sm*.json"))
    return FOLDER / f"sm{max(k for k in known if k <= sm)}.json"


def config(operation: str, sm: int, **bucket: Any) -> dict[str, int]:
    """The configuration of an operation for a bucket, a few coarse facts about the call (never lengths).

    Raises LookupError where no entry of the table fits.
    """
    if (trial := _trial.get()) is not None:
        trial.asked.append((operation, bucket))
        if trial.operation == operation:
            return trial.values
    return _config(operation, sm, **bucket)


@functools.cache
def _config(operation: str, sm: int, **bucket: Any) -> dict[str, int]:
    for conditions, values in table(sm)[operation]:
        if all(bucket[name] == wanted for name, wanted in conditions.items()):
            return values
    raise LookupError(f"no launch configuration of {operation} for sm {sm} and {bucket}; add one to the table")


@contextlib.contextmanager
def trial(operation: str, values: dict[str, int]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Inside the block `operation` is launched with `values`; gives what was asked for, (operation, bucket) each."""
    asked: list[tuple[str, dict[str, Any]]] = []
    token = _trial.set(Trial(operation, values, asked))
    try:
        yield asked
    finally:
        _trial.reset(token)


def bucket_of(n: int) -> int:
    """The power of two at or above n, 1 at least."""
    return 1 << max(0, n - 1).bit_length()


def rows_of(batch: int) -> int:
    """The bucket that a decode step's projection of so many rows is launched for: the largest one in `invariant`."""
    return MOST_ROWS if _invariant.get() else bucket_of(batch)


def parts_of(sm: int, programs: int) -> int:
    """Splits of the cache for attention that would otherwise run so many programs: one in `invariant`."""
    return 1 if _invariant.get() else config("attention_parts", sm, programs=bucket_of(programs))["parts"]


@contextlib.contextmanager
def invariant() -> Iterator[None]:
    """Inside the block the Triton kernels compute a row in the same way, bit for bit, whatever the size of its batch,
    up to MOST_ROWS: one bucket, one algorithm a projection, one split of the cache. Slower for few rows. Other backends
    know nothing of it."""
    token = _invariant.set(True)
    try:
        yield
    finally:
        _invariant.reset(token)
