"""Every kernel, in every shipped configuration, compiled for GPUs that are not there and held against its budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels import launch
from minmo_kernels.spec import load_all
from minmo_kernels.testing import gate
from minmo_kernels.testing.binary import compiled

pytestmark = [
    pytest.mark.skipif(launch.INTERPRETING, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed"),
]
BUDGETS = Path(__file__).with_name("budgets.json")


@pytest.mark.parametrize("sm", gate.SHARED_LIMIT)
@pytest.mark.parametrize("name", load_all())
def test_kernels_compile_within_their_budgets(sm, name):
    found = [record for *_, record in gate.shipped(kernel_dims(load_config("minmo-8b")), sm, name)]
    assert found, f"no case of a preset launches {name}; the gate sees nothing of it"
    budgets = gate.read_budgets(BUDGETS)
    known = any(key.startswith(f"sm_{sm} ") for key in budgets)
    unknown = None if known else "this version of Triton has no budgets for this GPU"
    faults = []
    for record in found:
        binary = compiled(record, sm)
        budget, reason = budgets.get(f"sm_{sm} {record.key}"), gate.reason_for(BUDGETS, record) or unknown
        for fault in gate.faults(record, binary, sm, budget, known=known, reason=reason):
            faults.append(f"{record.key}: {fault}")
    assert not faults, "\n".join(faults)


def test_a_grown_kernel_is_noticed():
    """The gate can fail: a budget below what a kernel takes, a spill, and a missing instruction are all reported."""
    name, _, _, record = next(iter(gate.shipped(kernel_dims(load_config("nano")), 90, "rms_norm")))
    binary = compiled(record, 90)
    kept = gate.measured(record, binary)
    assert name == "rms_norm"
    assert list(gate.faults(record, binary, 90, kept, known=True)) == []
    small = {**kept, "registers": binary.registers - gate.REGISTER_SLACK - 1}
    assert "registers" in next(gate.faults(record, binary, 90, small, known=True))
    assert "no budget" in next(gate.faults(record, binary, 90, None, known=True))
    spilling = replace(binary, stack=16)
    assert "spill" in next(gate.faults(record, spilling, 90, kept, known=True))
    assert "spill" in next(gate.faults(record, spilling, 90, kept, known=True, reason="said"))
    assert list(gate.faults(record, spilling, 90, gate.measured(record, spilling), known=True, reason="said")) == []


def test_a_projection_that_slows_down_is_noticed():
    *_, record = next(iter(gate.shipped(kernel_dims(load_config("nano")), 90, "linear_residual")))
    binary = compiled(record, 90)
    kept = gate.measured(record, binary)
    assert list(gate.faults(record, binary, 90, kept, known=True, reason="none")) == []
    faster = {**kept, "rate": 2 * kept["rate"]}
    assert "budget" in next(gate.faults(record, binary, 90, faster, known=True, reason="none"))
    empty = replace(binary, listing=())
    assert "no load" in next(gate.faults(record, empty, 90, None, known=False))
