"""Measures launch configurations on this machine's GPU and rewrites its table.

    python -m minmo_kernels.tuning.tune --dims '{"LLM": {"dim": 3584, ...}}' [--operation NAME] [--budget 400]

For every case that a model of these sizes launches, the candidates around the present configuration are compiled,
checked against the reference and timed, each in the case's bucket; the fastest becomes the first entry of its bucket in
`smXX.json`. What was there stays behind it as the default. GPU, driver, versions and the buckets that are done go into
the table's "measured" entry, so that a run on the same GPU and Triton goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from minmo_kernels import dispatch, tuning
from minmo_kernels.launch import launches
from minmo_kernels.spec import OpSpec, load_all
from minmo_kernels.testing import timing

STEPS: dict[str, tuple[float, ...]] = {"num_warps": (0.5, 1, 2), "num_stages": (-1, 0, 1), "parts": (0.5, 1, 2)}
STEPS |= {"BLOCK" + axis: (0.5, 1, 2) for axis in ("", "_N", "_K", "_M", "_S", "_B", "_T", "_C", "_H")}
"""What is varied around a configuration, up to two at once: factors, and for num_stages differences."""
ALONE = ("QKV_N", "OUT_N", "GATE_UP_N", "DOWN_N", "HEAD_N", "SAMPLE_BLOCK", "PARTS", "blocks")
"""What is varied one at a time, by a factor of two: of a decode step what is each phase's own, and blocks."""
Measure = Callable[[OpSpec, Mapping[str, Any]], float | None]


def neighbours(values: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """A configuration, then those that differ from it in one or two of STEPS, or in one of ALONE."""
    yield dict(values)
    for name in ALONE:
        if name in values:
            yield {**values, name: 2 * values[name]}
            if values[name] > 1:
                yield {**values, name: values[name] // 2}
    names = [name for name in STEPS if name in values]
    for i, first in enumerate(names):
        for second in names[i:]:
            for a in STEPS[first]:
                for b in STEPS[second] if second != first else (None,):
                    changed = dict(values)
                    changed[first] = _moved(first, values[first], a)
                    if b is not None:
                        changed[second] = _moved(second, values[second], b)
                    if changed != values and min(changed.values()) > 0:
                        yield changed


def _moved(name: str, value: int, step: float) -> int:
    return int(value + step) if name == "num_stages" else int(value * step)


Found = dict[str, list[tuple[dict[str, Any], dict[str, int]]]]


def tuned(
    parts: Mapping[str, Mapping[str, int]],
    sm: int,
    measure: Measure,
    operations: list[str],
    deadline: float,
    keep: Callable[[Found, str], None] = lambda found, bucket: None,
    done: Collection[str] = (),
) -> Found:
    """Entries (bucket, fastest configuration) by table. Cases that share a bucket are judged together, by the sum of
    their seconds.

    measure: seconds of a case under the present trial, None = the configuration does not work. Stops at `deadline`
    (time.monotonic); keep: called after every bucket with what there is and the bucket's name; done: names of buckets
    to leave out.
    """
    specs = load_all()
    sharing: dict[str, tuple[str, dict[str, Any], list[tuple[OpSpec, Mapping[str, Any]]]]] = {}
    for name in operations:
        for _, case in specs[name].cases_of(parts):
            with tuning.trial("", {}) as asked:
                launches(specs[name].function, specs[name].make(case), sm)
                for table, bucket in asked:
                    _, _, cases = sharing.setdefault(json.dumps([table, bucket]), (table, bucket, []))
                    if (specs[name], case) not in cases:
                        cases.append((specs[name], case))
    found: Found = {}
    for name, (table, bucket, cases) in sharing.items():
        if name in done:
            continue
        present = tuning.config(table, sm, **bucket)
        best: tuple[float, dict[str, int]] | None = None
        for values in {json.dumps(v, sort_keys=True): v for v in neighbours(present)}.values():
            if time.monotonic() > deadline:
                return found
            with tuning.trial(table, values):
                times = [measure(spec, case) for spec, case in cases]
            seconds = None if None in times else sum(t for t in times if t is not None)
            if seconds is not None and (best is None or seconds < best[0]):
                best = (seconds, values)
        if best is not None and best[1] != present:
            found.setdefault(table, []).append((bucket, best[1]))
        keep(found, name)
    return found


def timed(spec: OpSpec, case: Mapping[str, Any]) -> float | None:
    """Median seconds of a call on this GPU with a cold cache; None where it does not launch or its result is wrong."""
    import triton.errors

    device = torch.device("cuda")
    arguments = timing.arguments_for(spec, case, device)
    try:
        timing.assert_backend_holds(spec, case, "triton", arguments)
        with dispatch.use_backend("triton"):
            sets = timing.clones(arguments, spec.bytes(case), device)
            times = timing.event_times(timing.captured(spec.function, sets)[0])
    # A tile that does not fit, or a wrong result: not a candidate.
    except (AssertionError, RuntimeError, ValueError, triton.errors.TritonError):
        return None
    return statistics.median(times) / len(sets)


def write(sm: int, found: Found, before: Mapping[str, Any], measured: dict[str, Any]) -> str:
    """Writes the table `before` with the found entries in front, for this capability alone -> the file's name."""
    table: dict[str, Any] = dict(before)
    for operation, entries in found.items():
        new = [conditions for conditions, _ in entries]
        table[operation] = [*entries, *(e for e in table[operation] if e[0] not in new)]
    table["measured"] = measured
    path = tuning.FOLDER / f"sm{sm}.json"
    lines = [f"  {json.dumps(k)}: {json.dumps(v) if isinstance(v, dict) else _entries(v)}" for k, v in table.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path.name


def _entries(entries: list[Any]) -> str:
    return "[\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=json.loads, required=True, help="sizes of a model's parts, JSON by part")
    parser.add_argument("--operation", action="append", choices=list(load_all()))
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which it stops with what it has")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning measures, so it needs a GPU; the tables that came with the package serve without")
    major, minor = torch.cuda.get_device_capability()
    import triton

    versions = {"driver": timing.driver(), "torch": torch.__version__, "triton": triton.__version__}
    measured: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), **versions}
    operations = options.operation or list(load_all())
    sm = 10 * major + minor
    before: dict[str, Any] = dict(tuning.table(sm))
    done: list[str] = []
    if (last := before.get("measured")) and all(last.get(k) == v for k, v in measured.items()):
        done = list(last["done"])

    def keep(found: Found, bucket: str) -> None:
        done.append(bucket)
        path = write(sm, found, before, {**measured, "done": done})
        print(f"{len(done)} buckets done, {sum(map(len, found.values()))} changed now -> {path}", flush=True)

    tuned(options.dims, sm, timed, operations, time.monotonic() + options.budget, keep, tuple(done))


if __name__ == "__main__":
    main()
