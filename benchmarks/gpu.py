"""What a machine with a GPU is for, in stages of under eight minutes: one JSON a stage, flushed as it goes.

    make gpu STAGE=test|tune|bench|steps|sanitize RESULTS=folder

`test`, `bench` and `steps` go on where they stopped when they are called again with the same folder. Files are named
after the GPU: `<gpu>-test.json`, `<gpu>-bench.json`; `tune` rewrites the launch table of this GPU's capability. `steps`
also writes `<gpu>-one-launch.json`, by which `FastMinMo` chooses single launches: `one_launch.py`, in a process of its
own for each line, with a watchdog.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LIMIT = 470
"""Seconds that a stage may take."""
SANITIZERS = ("memcheck", "racecheck", "synccheck")
WATCHED = 90
"""Seconds that a line of single launches may take before its process is killed."""
KERNEL_TESTS = [f"tests/minmo_kernels/test_{name}.py" for name in ("triton", "decode_layer", "decoder_step")]
ENGINE_TESTS = [f"tests/minmo/test_{name}.py" for name in ("graphs", "one_launch", "session")]


def python(*arguments: str, **environment: str) -> int:
    """Runs Python in the repository's root within the stage's time -> its exit status, 124 when time ran out."""
    try:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        return 124


def test(path: Path) -> int:
    """Every kernel's numbers on this GPU, bf16 included, and the engine's graphs; leaves out what passed before."""
    import pytest

    passed = json.loads(path.read_text()) if path.is_file() else {}
    deadline = time.monotonic() + LIMIT - 60

    class Kept:
        def pytest_collection_modifyitems(self, items: list) -> None:
            items[:] = [item for item in items if passed.get(item.nodeid) != "passed"]

        def pytest_runtest_logreport(self, report) -> None:
            if report.when == "call" or report.outcome != "passed":
                passed[report.nodeid] = report.outcome
                path.write_text(json.dumps(passed, indent=1) + "\n")

        def pytest_runtest_setup(self, item: pytest.Item) -> None:
            if time.monotonic() > deadline:
                pytest.exit("the stage's time is over; call it again to go on", returncode=124)

    os.chdir(ROOT)
    os.environ.setdefault("MINMO_EXAMPLES", "20")  # most of them compile a kernel for sizes of their own
    return int(pytest.main([*KERNEL_TESTS, *ENGINE_TESTS], plugins=[Kept()]))


def tune(path: Path) -> int:
    """Launch configurations for the sizes of minmo-8b; the table keeps every bucket that was finished."""
    from minmo.config import load_config
    from minmo.info import kernel_dims

    dims = json.dumps(kernel_dims(load_config("minmo-8b")))
    return python("-m", "minmo_kernels.tuning.tune", "--dims", dims, "--budget", str(LIMIT - 60))


def bench(path: Path) -> int:
    """Every operation x case of minmo-8b x backend; whole steps beside their peers."""
    return python("-m", "pytest", "benchmarks/", "--benchmark-only", "--preset", "minmo-8b", "--results", str(path))


def steps(path: Path) -> int:
    """The latency of every step of the engine at minmo-8b's sizes, by context, rows and weights."""
    from results import Results

    from minmo.config import load_config
    from minmo.fast import profile

    results, deadline = Results(path), time.monotonic() + LIMIT
    if not _single_launches(Results(path.with_name(path.name.replace("-steps", "-one-launch"))), deadline):
        return 124
    for weights in ("bf16", "int8", "int4"):
        for name in profile.STEPS:
            for context, rows in ((1024, (1, 2, 4, 8, 16, 32, 64)), (128, (1,)), (8192, (1,))):
                key = f"{name} {weights} {context} {max(rows)}"
                if key in results.kept:
                    continue
                if time.monotonic() > deadline:
                    return 124
                found = profile.profile(
                    load_config("minmo-8b"), [name], weights=weights, contexts=[context], rows=rows, tokens=60,
                    device=torch.device("cuda"),
                )  # fmt: skip
                for line in found:
                    if isinstance(line, str):
                        results.keep(f"{key} not measured", {"reason": line})
                    else:
                        results.keep(f"{key} {line.rows}", {**asdict(line), "torch": torch.__version__})
                results.keep(key, {"done": True})
    return 0


def _single_launches(results: Any, deadline: float) -> bool:
    """A line for each part, format and bucket of rows, 10,000 replays each; False when time runs out."""
    for part in ("speech block", "LLM"):
        for weights in ("bf16", "int8"):
            for rows in (1, 2, 4, 8):
                if (key := f"{part} {weights} {rows}") in results.kept:
                    continue
                if time.monotonic() + WATCHED > deadline:
                    return False
                command = [sys.executable, "benchmarks/one_launch.py", part, weights, str(rows)]
                failed = {"replays": 0, "wrong": 0, "faults": 1, "seconds": 1.0, "layers": 0.0}
                try:
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WATCHED)
                    if done.returncode == 0:
                        results.keep(key, json.loads(done.stdout.splitlines()[-1]))
                    else:
                        results.keep(key, {**failed, "error": done.stderr[-2000:]})
                except subprocess.TimeoutExpired:  # run() has killed it
                    results.keep(key, {**failed, "error": f"it did not end within {WATCHED} s and was killed"})
    return True


def sanitize(path: Path) -> int:
    """A few examples of every kernel under each of compute-sanitizer's tools, which share the time."""
    environment = {**os.environ, "MINMO_EXAMPLES": "4", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log, found = path.with_suffix(".log"), dict[str, Any]()
    for name in SANITIZERS:
        tool = ["compute-sanitizer", "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
        command = [*tool, sys.executable, "-m", "pytest", "-x", KERNEL_TESTS[0], "-k", "as_good"]
        with log.open("w") as out:
            try:
                status = subprocess.run(
                    command, cwd=ROOT, env=environment, timeout=LIMIT / len(SANITIZERS), stdout=out, stderr=out
                ).returncode
            except subprocess.TimeoutExpired:
                status = 124
        found[name] = {"exit": status, "tail": log.read_text()[-4000:]}
        path.write_text(json.dumps(found, indent=1) + "\n")
        log.unlink()
    return next((result["exit"] for result in found.values() if result["exit"]), 0)


STAGES = {"test": test, "tune": tune, "bench": bench, "steps": steps, "sanitize": sanitize}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; `make test` and profiling/static_report.py say what can be said without one")
    options.results.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    sys.exit(STAGES[options.stage](options.results.resolve() / f"{gpu}-{options.stage}.json"))


if __name__ == "__main__":
    main()
