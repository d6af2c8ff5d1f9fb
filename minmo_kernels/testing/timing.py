"""How a call is timed on a GPU, once its result has held: by replaying a captured graph over rotating inputs.

Rotating inputs keep the L2 cache cold: the sets of arguments together are several times its size, so that what is
measured is memory, as in a decode step whose weights pass by once. A graph takes the launches' own cost out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from minmo_kernels import dispatch
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing.data import outputs
from minmo_kernels.testing.tolerance import assert_as_good_as_reference

SETS = 64
"""Most sets of arguments in rotation; calls that move less than the cache's 64th part are timed warm, which is as they
run."""
COLD = 5
"""All sets together move at least this many times the L2 cache, where SETS and memory allow."""


def arguments_for(spec: OpSpec, case: Case, device: torch.device) -> dict[str, Any]:
    """The case's arguments as a decode step gives them: no log-sum-exp."""
    arguments = spec.make(case)
    if "return_lse" in arguments:
        arguments["return_lse"] = False
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def _copied(arguments: dict[str, Any], widened: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments with tensors of their own, those of the dtype `widened` in fp64."""
    return {
        name: value.to(torch.float64 if value.dtype == widened else value.dtype, copy=True)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


def assert_backend_holds(spec: OpSpec, case: Case, backend: str, arguments: dict[str, Any]) -> None:
    """The backend's error on the case's arguments against the reference's, both measured from the reference in fp64."""
    results = []
    for name, widened in ((backend, None), ("reference", None), ("reference", getattr(torch, case["dtype"]))):
        mine = _copied(arguments, widened)
        with dispatch.use_backend(name):
            result = outputs(spec.function(**mine))
        results.append([*result, *spec.mutated(mine)])
    for actual, reference, exact in zip(*results, strict=True):
        seen = exact == exact  # what no call has written yet is NaN
        assert_as_good_as_reference(actual[seen], reference[seen], exact[seen])


def clones(arguments: dict[str, Any], moves: int, device: torch.device) -> list[dict[str, Any]]:
    """The call's arguments, as often as it takes to keep the cache cold. moves: bytes that a call touches."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor))
    room = torch.cuda.mem_get_info(device)[0] // 2 // max(1, size)
    count = max(2, min(SETS, room, -(-COLD * cache // max(1, moves))))
    return [_copied(arguments) for _ in range(count)]


def captured(function: Callable[..., Any], sets: list[dict[str, Any]]) -> Callable[[], None]:
    """Calls `function` once with every set of arguments: by replaying a graph, or directly where the function reads the
    host and cannot be captured (the references do)."""

    def calls() -> None:
        for arguments in sets:
            function(**arguments)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except RuntimeError:
        torch.cuda.synchronize()
        return calls
    return graph.replay


def event_times(calls: Callable[[], None], repeats: int = 30) -> list[float]:
    """Seconds of each repeat between two events on the GPU."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        calls()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy reads and writes, both counted, on this GPU and now."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graph = captured(lambda source, target: target.copy_(source), [{"source": source, "target": target}])
    return 2 * source.numel() / statistics.median(event_times(graph))
