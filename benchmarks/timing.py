"""How a call is timed: on a GPU by replaying a captured graph over rotating inputs, on a CPU directly.

Rotating inputs keep the L2 cache cold: the sets of arguments together are several times its size, so that what is
measured is memory, as in a decode step whose weights pass by once. A graph takes the launches' own cost out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

SETS = 16
"""Most sets of arguments in rotation."""
COLD = 5
"""All sets together are at least this many times the L2 cache, where memory allows."""


def clones(arguments: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """The call's arguments, as often as it takes to keep the cache cold."""
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    size = max(1, sum(t.numel() * t.element_size() for t in tensors))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(SETS, max(2, -(-COLD * cache // size)))
    return [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()} for _ in range(count)]


def captured(function: Callable[..., Any], sets: list[dict[str, Any]]) -> torch.cuda.CUDAGraph:
    """A graph that calls `function` once with every set of arguments."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets:
            function(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(**arguments)
    return graph


def event_times(graph: torch.cuda.CUDAGraph, replays: int = 30) -> list[float]:
    """Seconds of each replay between two events on the GPU."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy reads and writes, both counted, on this GPU and now."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graph = captured(lambda source, target: target.copy_(source), [{"source": source, "target": target}])
    return 2 * source.numel() / statistics.median(event_times(graph))
