"""Options of the benchmarks, and what is measured once a session."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from results import Results

from minmo_kernels.testing import timing


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "minmo-8b" if torch.cuda.is_available() else "nano"
    parser.addoption("--preset", default=default, help=f"whose sizes the cases have (here: {default})")
    parser.addoption("--results", type=Path, help="a JSON file to go on with: cases in it are skipped")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return Results(request.config.getoption("--results"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def load(device: torch.device) -> Callable[[], dict[str, Any]]:
    """Reads the GPU's clocks and power; {} on a CPU."""
    return timing.load_of(device) if device.type == "cuda" else dict


@pytest.fixture(scope="session")
def machine(device: torch.device) -> dict[str, Any]:
    """What stands beside every figure."""
    found: dict[str, Any] = {"torch": torch.__version__, "triton": _triton(), "python": platform.python_version()}
    if device.type == "cpu":
        return {**found, "device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return {
        **found,
        "device": torch.cuda.get_device_name(device),
        "copy_bandwidth": timing.copy_bandwidth(device),
        "driver": timing.driver(),
    }


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)
