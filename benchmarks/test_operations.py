"""Every operation x case of a preset x backend, generated from the specs.

    pytest benchmarks/ --benchmark-only [--preset minmo-8b] [--results FILE] [--benchmark-json FILE]

A backend is timed only after its result on this very case has held against the fp64 reference: a wrong kernel has no
speed. On a CPU the reference and torch backends are timed, so that the command works everywhere.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import PEERS
from results import Results

import minmo_kernels as mk
from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels.dispatch import OPS
from minmo_kernels.spec import OpSpec, load_all
from minmo_kernels.testing import timing

ROUNDS = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parts = kernel_dims(load_config(metafunc.config.getoption("preset")))
    found = []
    for name, spec in load_all().items():
        for part, case in spec.cases_of(parts):
            for backend in [*(b.name for b in OPS[name].backends), *PEERS.get(name, {})]:
                words = " ".join(f"{k}={v}" for k, v in case.items() if k not in ("seed", "filled"))
                found.append(pytest.param(spec, part, case, backend, id=f"{name}[{part}] {backend} {words}"))
    metafunc.parametrize("spec,part,case,backend", found)


def test_operation(
    benchmark: Any,
    spec: OpSpec,
    part: str,
    case: Any,
    backend: str,
    device: torch.device,
    machine: dict[str, Any],
    load: Callable[[], dict[str, Any]],
    results: Results,
) -> None:
    name = results.name(spec.name, part, backend, case)
    if name in results.kept:
        pytest.skip("measured already, in the results file")
    arguments = timing.arguments_for(spec, case, device)
    function, own = spec.function, arguments
    if backend in PEERS.get(spec.name, {}):
        found = PEERS[spec.name][backend](**arguments)
        if isinstance(found, str):
            pytest.skip(f"{backend}: {found}")
        function, own = found
        timing.assert_holds(spec, case, arguments, [function(**own)])
    else:
        verdict = next(v for v in mk.explain(spec.function, **arguments).verdicts if v.backend == backend)
        if verdict.reason is not None:
            pytest.skip(f"{backend}: {verdict.reason}")
        timing.assert_backend_holds(spec, case, backend, arguments)
    moves, flops = spec.bytes(case), spec.flops(case)
    benchmark.extra_info.update(
        {"operation": spec.name, "part": part, "backend": backend, "case": dict(case), "bytes": moves, **machine}
    )
    with contextlib.nullcontext() if own is not arguments else mk.use_backend(backend):
        if device.type == "cpu":
            benchmark.pedantic(function, kwargs=own, rounds=ROUNDS, warmup_rounds=2)
            seconds = benchmark.stats.stats.median
        else:
            sets = timing.clones(own, moves, device)
            calls, graph = timing.captured(function, sets, must=backend == "triton")

            def run() -> None:
                calls()
                torch.cuda.synchronize()

            benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
            samples = [s / len(sets) for s in timing.event_times(calls)]
            seconds = statistics.median(samples)
            for _ in range(20):  # the clocks are read while these run
                calls()
            benchmark.extra_info.update(load())
            torch.cuda.synchronize()
            benchmark.extra_info["graph"] = graph
            benchmark.extra_info["spread"] = (max(samples) - min(samples)) / seconds
            benchmark.extra_info["of_copy_bandwidth"] = moves / seconds / machine["copy_bandwidth"]
    benchmark.extra_info.update(
        {"seconds": seconds, "gb_per_s": moves / seconds / 1e9, "tflops": flops / seconds / 1e12}
    )
    results.keep(name, benchmark.extra_info)
