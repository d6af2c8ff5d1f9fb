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
    mine = _copied(arguments)
    with dispatch.use_backend(backend):
        result = outputs(spec.function(**mine))
    assert_holds(spec, case, arguments, [*result, *spec.mutated(mine)])


def assert_holds(spec: OpSpec, case: Case, arguments: dict[str, Any], result: list[torch.Tensor]) -> None:
    """The same for a result that is there: outputs, then mutated arguments; the first ones may be all there is."""
    results = [result]
    for widened in (None, getattr(torch, case["dtype"])):
        mine = _copied(arguments, widened)
        with dispatch.use_backend("reference"):
            outs = outputs(spec.function(**mine))
        results.append([*outs, *spec.mutated(mine)])
    for actual, reference, exact in zip(*results, strict=False):
        seen = exact == exact  # what no call has written yet is NaN
        assert_as_good_as_reference(actual[seen], reference[seen], exact[seen])


def clones(arguments: dict[str, Any], moves: int, device: torch.device) -> list[dict[str, Any]]:
    """The call's arguments, as often as it takes to keep the cache cold. moves: bytes that a call touches."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor))
    room = torch.cuda.mem_get_info(device)[0] // 2 // max(1, size)
    count = max(2, min(SETS, room, -(-COLD * cache // max(1, moves))))
    return [_copied(arguments) for _ in range(count)]


def captured(
    function: Callable[..., Any], sets: list[dict[str, Any]], must: bool = True
) -> tuple[Callable[[], None], bool]:
    """A call that runs `function` once with every set of arguments, and whether it replays a graph: a function that
    reads the host (some libraries and references do) cannot be captured, and is an error where it `must` be."""

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
    except RuntimeError as error:
        if must or isinstance(error, torch.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        return calls, False
    return graph.replay, True


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
    copy, _ = captured(lambda source, target: target.copy_(source), [{"source": source, "target": target}])
    return 2 * source.numel() / statistics.median(event_times(copy))


def driver() -> str:
    """The version of the GPU's driver."""
    try:
        import pynvml
    except ImportError:
        return "unknown, nvidia-ml-py is not installed"
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def load_of(device: torch.device) -> Callable[[], dict[str, Any]]:
    """A function that reads clocks, power and what holds the clocks back (NVML's bits), which mean something only while
    the GPU works; {} where nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        return dict
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return lambda: {
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "held_back_by": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    }
