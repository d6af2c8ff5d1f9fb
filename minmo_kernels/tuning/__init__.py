"""Launch configurations as data: one JSON a compute capability, read once.

A table maps an operation to entries `[conditions, configuration]` in order; the first entry whose conditions all hold
serves. `cpu.json` is for the interpreter (few, large programs), `smXX.json` for GPUs of capability XX and newer.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


@functools.cache
def table(sm: int) -> dict[str, list[tuple[dict[str, Any], dict[str, int]]]]:
    """The table for a capability (0 = the interpreter): the newest one that is not newer."""
    if sm == 0:
        return json.loads((_FOLDER / "cpu.json").read_text())
    known = sorted(int(p.stem[2:]) for p in _FOLDER.glob("sm*.json"))
    name = f"sm{max(k for k in known if k <= sm)}.json"
    return json.loads((_FOLDER / name).read_text())


@functools.cache
def config(operation: str, sm: int, **bucket: Any) -> dict[str, int]:
    """The configuration of an operation for a bucket, a few coarse facts about the call (never lengths).

    Raises LookupError where no entry of the table fits.
    """
    for conditions, values in table(sm)[operation]:
        if all(bucket[name] == wanted for name, wanted in conditions.items()):
            return values
    raise LookupError(f"no launch configuration of {operation} for sm {sm} and {bucket}; add one to the table")


def bucket_of(n: int) -> int:
    """The power of two at or above n, 1 at least."""
    return 1 << max(0, n - 1).bit_length()
