"""Steps as CUDA graphs: captured once for each number of rows and shape, then replayed, a single launch each.

A step that is captured reads and writes fixed memory: its inputs are copied into buffers, its outputs out of them, and
the state is the engine's own, allocated once. Entries are filled up to a bucket of rows with padding (row -1), which
steps neither read nor write; so a graph can be captured while sessions are under way.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minmo.state import State, unlooking
from minmo_kernels.dispatch import as_usual

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows that steps are captured for."""

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Takes a call on fixed memory; gives what runs it again, and its outputs, which each run writes anew."""


def bucket(rows: int, most: int) -> int:
    """The least bucket that holds so many rows, and no more than an engine has; beyond all buckets, all that it has."""
    return min(most, next((b for b in BUCKETS if b >= rows), most))


class CudaCapture:
    """Captures on a GPU. Graphs of one lane share their memory, so they are replayed one after another; graphs of
    different lanes may run side by side: each has a stream of its own to be captured on, with which the libraries'
    workspaces go."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        # Once in full, just as it is captured: kernels are compiled, and libraries allocate what they keep.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), unlooking():
            call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = call()
        return graph.replay, outputs


class _Recorded:
    """One graph: its input buffers, what replays it, and its outputs."""

    def __init__(self, step: Graphed, arguments: Sequence[Any], rows: int, capture: Capture) -> None:
        self._fill = [-1 if i == step.rows_at else 0 for i in range(len(arguments))]
        with torch.inference_mode(False), torch.no_grad():  # buffers that may be written in either mode
            self._inputs = [
                a.new_full((rows, *a.shape[1:]), fill) if isinstance(a, Tensor) else a
                for a, fill in zip(arguments, self._fill, strict=True)
            ]
            self._replay, self._outputs = capture(lambda: step.function(*self._inputs))

    def __call__(self, arguments: Sequence[Any]) -> Any:
        batch = 0
        for own, given, fill in zip(self._inputs, arguments, self._fill, strict=True):
            if isinstance(own, Tensor):
                batch = len(given)
                own[:batch].copy_(given)
                own[batch:].fill_(fill)
        self._replay()
        # The next replay writes over the outputs.
        return _each(self._outputs, lambda t: t[:batch].clone())


class Graphed:
    """A step on one state: calls whose arguments fit are replayed, others run launch by launch.

    method: of a part; takes tensors with the batch first, one of them named `rows`, the state, and constants. fits: of
    the same arguments, whether their shapes are those of steady work. Each combination of shapes and rows is captured
    when it first comes, with a warning where that is late. Where a backend is forced or error words are kept
    (`mk.use_backend`, `mk.strict`), calls run launch by launch: a graph would not heed them.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        state: State,
        fits: Callable[..., bool],
        capture: Capture,
        most_rows: int,
    ) -> None:
        self._method = weakref.WeakMethod(method)  # the part holds this object
        self._signature = inspect.signature(method)
        self.rows_at = list(self._signature.parameters).index("rows")
        self._state, self._fits, self._capture, self._most_rows = state, fits, capture, most_rows
        self._graphs: dict[tuple[object, ...], _Recorded] = {}
        self.complete = False
        """Whether everything that is expected has been captured."""

    def twin(self) -> Graphed:
        """The same step with graphs of its own."""
        return Graphed(self.function, self._state, self._fits, self._capture, self._most_rows)

    @property
    def function(self) -> Callable[..., Any]:
        """The step, launch by launch."""
        method = self._method()
        if method is None:
            raise ReferenceError("the part of this step no longer exists")
        return method

    def __call__(self, *positional: Any, **named: Any) -> Any:
        arguments = self._signature.bind(*positional, **named).args
        batch = len(arguments[self.rows_at])
        own = any(a is self._state for a in arguments) and as_usual()
        if not batch or not own or not self._fits(*arguments):
            return self.function(*arguments)
        rows = bucket(batch, self._most_rows)
        key = tuple((rows, *a.shape[1:], a.dtype) if isinstance(a, Tensor) else None for a in arguments)
        if key not in self._graphs:
            self._graphs[key] = _Recorded(self, arguments, rows, self._capture)
            if self.complete:
                warnings.warn(f"{self.function.__qualname__} was captured after the warm-up, for {key}", stacklevel=2)
        return self._graphs[key](arguments)


def replay(
    part: nn.Module,
    method: str,
    state: State,
    capture: Capture,
    most_rows: int,
    fits: Callable[..., bool] = lambda *_: True,
) -> Graphed:
    """Puts a graphed step on `state` in the place of a part's method."""
    step = Graphed(getattr(type(part), method).__get__(part), state, fits, capture, most_rows)
    object.__setattr__(part, method, step)
    return step


def _each(outputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Outputs with the function applied to their tensors; states stay."""
    if isinstance(outputs, Tensor):
        return function(outputs)
    if isinstance(outputs, tuple):
        return tuple(_each(o, function) for o in outputs)
    return outputs
