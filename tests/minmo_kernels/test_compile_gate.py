"""Every kernel, in every shipped configuration, compiled for GPUs that are not there and held against its budget."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels import launch
from minmo_kernels.spec import load_all
from minmo_kernels.testing import gate
from minmo_kernels.testing.binary import compiled
from minmo_kernels.testing.bounds import loaded_bytes

pytestmark = [
    pytest.mark.skipif(launch.INTERPRETING, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed"),
]
BUDGETS = Path(__file__).with_name("budgets.json")


SAMPLE = 1 if int(os.environ.get("MINMO_EXAMPLES", "0")) > 200 else 10
"""One in so many of the kernels that their budgets prove is compiled all the same; all of them in the deep profile."""


@pytest.mark.parametrize("sm", gate.SHARED_LIMIT)
@pytest.mark.parametrize("name", load_all())
def test_kernels_compile_within_their_budgets(sm, name):
    found = [record for *_, record in gate.shipped(kernel_dims(load_config("minmo-8b")), sm, name)]
    assert found, f"no case of a preset launches {name}; the gate sees nothing of it"
    budgets = gate.read_budgets(BUDGETS)
    known = any(key.startswith(f"sm_{sm} ") for key in budgets)
    unknown = dict.fromkeys(("stack", "rate", "flight"), "this version of Triton has no budgets for this GPU")
    faults = []
    for record in found:
        budget = budgets.get(f"sm_{sm} {record.key}")
        reasons = gate.reasons_for(BUDGETS, record) if known else unknown
        if budget is not None and budget.get("proved") == (proof := gate.proof(record, sm, budget, reasons)):
            if int(proof, 16) % SAMPLE:
                continue
        binary = compiled(record, sm)
        for fault in gate.faults(record, binary, sm, budget, known=known, reasons=reasons):
            faults.append(f"{record.key}: {fault}")
    assert not faults, "\n".join(faults)


def test_what_was_lifted_stays_lifted():
    """Rates that instructions allow, before and after a change (`benchmarks/STATIC.md`), against today's budgets."""
    budgets = gate.read_budgets(BUDGETS)
    for words, chips in json.loads(BUDGETS.read_text())["lifted"].items():
        for sm, lifted in chips.items():
            rates = [b["rate"] for key, b in budgets.items() if {sm, *words.split()} <= set(key.split())]
            before, after = lifted["rate"]
            assert rates, f"no kernel has the words {sm} {words}"
            assert min(rates) >= gate.RATE_SLACK * after > before, f"{sm} {words}: {rates}, once {after}"


def test_whatever_decides_a_binary_changes_its_proof():
    *_, record = next(iter(gate.shipped(kernel_dims(load_config("nano")), 90, "rms_norm")))
    options = {**record.options, "num_warps": 2 * record.options.get("num_warps", 4)}
    constants = {name: 2 * value for name, value in record.constants.items()}
    arguments = tuple(a.half() if isinstance(a, torch.Tensor) else a for a in record.arguments)
    changed = [
        replace(record, **{field: value})
        for field, value in (
            ("options", options), ("constants", constants), ("arguments", arguments), ("grid", (7, 1, 1))
        )
    ]  # fmt: skip
    budget, reasons = {"registers": 32, "proved": "before"}, {"stack": "said"}
    proofs = [gate.proof(r, 90, budget, reasons) for r in (record, *changed)]
    proofs += [gate.proof(record, 80, budget, reasons), gate.proof(record, 90, {"registers": 40}, reasons)]
    proofs += [gate.proof(record, 90, budget, {})]
    assert len(set(proofs)) == len(proofs)
    assert gate.proof(record, 90, {**budget, "proved": "now"}, reasons) == proofs[0]


def test_bytes_are_counted_by_the_width_of_a_load():
    lines = {
        "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]": 512,
        "@P0 LDGSTS.E.BYPASS.128 [R75+0x800], desc[UR26][R40.64], P0": 512,
        "LDGSTS.E.64 [R1], [R2.64]": 256,
        "LDG.E R4, [R2.64]": 128,
        "LDG.E.U8 R4, [R2.64]": 32,
        "LDGDEPBAR": 0,
        "LDS.128 R4, [R2]": 0,
    }
    assert {line: loaded_bytes([line]) for line in lines} == lines


def test_a_grown_kernel_is_noticed():
    """The gate can fail: a budget below what a kernel takes, a spill, and a missing instruction are all reported."""
    name, _, _, record = next(iter(gate.shipped(kernel_dims(load_config("nano")), 90, "rms_norm")))
    binary = compiled(record, 90)
    kept = gate.measured(record, binary)
    assert name == "rms_norm"

    def faults(binary, budget, **reasons):
        return list(gate.faults(record, binary, 90, budget, known=True, reasons=reasons))

    assert faults(binary, kept) == []
    small = {**kept, "registers": binary.registers - gate.REGISTER_SLACK - 1}
    assert "registers" in faults(binary, small)[0]
    assert "no budget" in faults(binary, None)[0]
    spilling = replace(binary, stack=16)
    assert "spill" in faults(spilling, kept)[0]
    assert "spill" in faults(spilling, kept, stack="said")[0]
    assert "spill" in faults(spilling, gate.measured(record, spilling), rate="another kind")[0]
    assert faults(spilling, gate.measured(record, spilling), stack="said") == []


def test_a_projection_that_slows_down_is_noticed():
    *_, record = next(iter(gate.shipped(kernel_dims(load_config("nano")), 90, "linear_residual")))
    binary = compiled(record, 90)
    kept = gate.measured(record, binary)

    def faults(binary, budget, **reasons):
        return " ".join(gate.faults(record, binary, 90, budget, known=True, reasons=reasons))

    assert faults(binary, kept, rate="said", flight="said") == ""
    assert "budget" in faults(binary, {**kept, "rate": 2 * kept["rate"]}, rate="said", flight="said")
    assert "busy" in faults(binary, kept, rate="said")  # a nano layer is too small for a GPU
    assert "no load" in faults(replace(binary, listing=()), kept, flight="said")
    assert "16 bytes" in faults(replace(binary, instructions={}), kept, rate="said", flight="said")
