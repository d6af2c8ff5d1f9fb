"""One piece of work beside another: a reply is spoken while its next words are written."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

SPEAK_BESIDE = False
"""Whether a CPU, too, speaks a block of text while it writes the next, which takes two cores."""

_Result = TypeVar("_Result")


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all replies: memory and workspaces stay with a stream."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(
    device: torch.device, overlaps: bool = True
) -> Iterator[Callable[[Callable[[], _Result]], Callable[[], _Result]]]:
    """Gives what begins a call and returns what waits for its result: on a GPU the call runs on a stream and in a
    thread of its own, beside what its caller does next; on a CPU, and where nothing overlaps, at once.

    A call must end with its results on the host: by then its stream has finished, and memory may be reused.
    """
    if not overlaps or (device.type != "cuda" and not SPEAK_BESIDE):
        yield lambda call: functools.partial(_given, call())
        return
    stream = _stream(device) if device.type == "cuda" else None

    def begin(call: Callable[[], _Result]) -> Callable[[], _Result]:
        ready = None if stream is None else torch.cuda.current_stream(device).record_event()

        def run() -> _Result:
            with torch.inference_mode(), torch.cuda.stream(stream):
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                return call()

        return worker.submit(contextvars.copy_context().run, run).result

    with ThreadPoolExecutor(1, "minmo-speech") as worker:
        yield begin


def _given(result: _Result) -> _Result:
    return result
