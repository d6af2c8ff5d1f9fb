"""What the shipped kernels compile to: every launch of a model's cases, and the budgets that hold their resources.

A budget file is keyed by Triton's minor version, then by GPU and kernel, because registers differ between compilers.
A budget also tells for which source and which rules it was found to hold ("proved"): what has not changed since need
not be compiled again to know.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from minmo_kernels import dispatch
from minmo_kernels.launch import Launch, launches
from minmo_kernels.spec import Case, OpSpec, load_all
from minmo_kernels.testing.binary import Binary, fingerprint
from minmo_kernels.testing.bounds import CHIPS, Bounds, Chip, bounds, resident_blocks, slowest

SIZES = ("DIM", "DIM_OUT", "HEADS", "KV_HEADS", "HIDDEN", "EMBEDDING", "VOCAB", "FFN")
"""Constants whose value above 128 (a head's) changes the number of a loop's turns or an address, and no registers."""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, for each capability that the gate compiles for."""
MARGIN = 2.0
"""How many times the memory's share of an SM a kernel that streams must be able to load."""
RATE_SLACK = 0.9
"""Share of its budgeted rate that a kernel must keep."""
REGISTER_SLACK = 8
"""Registers that a kernel may grow by before its budget counts as broken; allocation moves in steps of 8."""


def shipped(
    parts: Mapping[str, Mapping[str, int]], sm: int, operation: str | None = None
) -> Iterator[tuple[str, str, Case, Launch]]:
    """(operation, part, case, launch) for each configuration that a model of these sizes launches on `sm`: of an
    operation's binaries that differ only in widths (SIZES) the first. operation: this one alone.

    Cases come as they are; the first of each operation also in every other dtype that its spec declares, and in the
    spec's variants.
    """
    for name, spec in load_all().items():
        if operation not in (None, name):
            continue
        seen = set()
        for index, (part, case) in enumerate(spec.cases_of(parts)):
            changes: list[Mapping[str, Any]] = [{}]
            if index == 0:
                changes += [*({"dtype": dtype} for dtype in spec.dtypes), *spec.variants]
            for change in changes:
                changed = {**case, **change}
                for record in _launches(spec, changed, sm):
                    if (kind := _configuration(record)) not in seen:
                        seen.add(kind)
                        yield name, part, changed, record


def _configuration(record: Launch) -> str:
    return replace(record, constants={k: v for k, v in record.constants.items() if k not in SIZES or v <= 128}).key


def _launches(spec: OpSpec, case: Case, sm: int) -> list[Launch]:
    """Empty where the kernel does not serve the case."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            arguments = spec.make(case)
    except DataDependentOutputException:  # these cases are small
        arguments = spec.make(case)
    try:
        return launches(spec.function, arguments, sm)
    except dispatch.BackendError:
        return []


def measured(record: Launch, binary: Binary) -> dict[str, Any]:
    """What a budget holds of a launch's binary; `rate`: see `bounds`, of kernels that live on memory bandwidth."""
    budget: dict[str, Any] = {"registers": binary.registers, "shared": binary.shared}
    if streams(record):
        budget["rate"] = round(limits(record, binary).rate, 1)
    if binary.stack:
        budget["stack"] = binary.stack
    return budget


def limits(record: Launch, binary: Binary) -> Bounds:
    """The bounds of a launch's binary; of one that streams, by the bytes of its weight or cache alone; of one that has
    several such loops, those of the slowest."""
    if record.name == "decoder_step":
        return slowest(binary, record.options.get("num_stages", 3), _tile_bytes(record) // max(1, binary.warps))
    turns = -(-int(record.constants["DIM"]) // int(record.constants["BLOCK_K"])) if "ROWS" in record.constants else 1
    return bounds(binary, record.options.get("num_stages", 3), _tile_bytes(record) // max(1, binary.warps), turns)


def _tile_bytes(record: Launch) -> int:
    """Bytes of the weight or the cache that a program of a kernel that streams takes in one turn of its loop."""
    if not streams(record):
        return 0
    constants = record.constants
    named = dict(zip(record.kernel.arg_names, record.arguments, strict=False))
    if record.name == "attention":
        return 2 * int(constants["BLOCK_N"]) * int(constants["DIM"]) * int(named["k_ptr"].dtype.itemsize)
    if record.name == "decoder_step":  # the smallest of its phases'
        outputs = min(int(constants[name]) for name in ("QKV_N", "OUT_N", "GATE_UP_N", "DOWN_N"))
        return outputs * int(constants["BLOCK_K"]) * int(named["weight_ptr"].dtype.itemsize)
    bits = 4 if constants["GROUP"] else 8 * int(named["weight_ptr"].dtype.itemsize)
    return int(constants["BLOCK_N"]) * int(constants["BLOCK_K"]) * bits // 8


def streams(record: Launch) -> bool:
    """Whether a launch is there to stream weights or a cache through the chip: a decode step's projections for up to 8
    rows, attention of few queries, and whole steps."""
    constants = record.constants
    if record.name == "decoder_step":
        return True
    if record.name in ("linear_residual", "gate_up_swiglu", "qkv"):
        return bool(constants["ROWS"] <= 8)
    return record.name == "attention" and constants["BLOCK_M"] == 16


def faults(
    record: Launch, binary: Binary, sm: int, budget: Mapping[str, Any] | None, known: bool, reasons: Mapping[str, str]
) -> Iterator[str]:
    """What the gate does not let pass of a launch's binary. budget: its own, None = none is written; known: whether
    this version of Triton has budgets at all (one that has none only reports). reasons: why a kernel may keep registers
    in memory ("stack": no more than its budget), be limited by its instructions ("rate") or have too few loads under
    way ("flight")."""
    if binary.stack and ("stack" not in reasons or (known and binary.stack > (budget or {}).get("stack", 0))):
        yield f"it keeps {binary.stack} bytes a thread in memory: registers spill"
    if record.options.get("launch_cooperative_grid"):
        blocks = math.prod(record.grid)
        for chip in CHIPS[sm]:
            if (fits := resident_blocks(binary, chip)) * chip.sms < blocks:
                yield f"{blocks} blocks are not at once on a {chip.name}, whose {chip.sms} SMs hold {fits} each"
    if binary.shared > SHARED_LIMIT[sm]:
        yield f"{binary.shared} bytes of shared memory; sm_{sm} has {SHARED_LIMIT[sm]}"
    for instruction, expected in expected_instructions(record, sm).items():
        if (binary.count(instruction) > 0) != expected:
            yield f"{binary.count(instruction)} {instruction} instructions, expected {'some' if expected else 'none'}"
    rate = limits(record, binary).rate
    if streams(record):
        yield from _slow(record, binary, sm, rate, reasons)
    if not known:
        return
    if budget is None:
        yield "it has no budget; profiling/static_report.py --write-budgets writes one"
        return
    if binary.registers > budget["registers"] + REGISTER_SLACK:
        yield f"{binary.registers} registers, budget {budget['registers']}"
    if binary.shared > budget["shared"]:
        yield f"{binary.shared} bytes of shared memory, budget {budget['shared']}"
    if rate < RATE_SLACK * budget.get("rate", 0.0):
        yield f"it can load {rate:.1f} bytes a clock an SM, budget {budget['rate']}"


def _slow(record: Launch, binary: Binary, sm: int, rate: float, reasons: Mapping[str, str]) -> Iterator[str]:
    """What keeps a kernel that streams from the speed of the memory."""
    if rate == float("inf"):
        yield "no load was found in it, so nothing bounds how fast it streams"
    need = MARGIN * max(chip.share for chip in CHIPS[sm])
    if rate < need and "rate" not in reasons:
        yield f"it cannot load more than {rate:.1f} bytes a clock an SM; {need:.1f} leave memory the limit"
    if not binary.wide_loads:
        yield "none of its global loads takes 16 bytes a thread"
    for chip in CHIPS[sm]:
        flight = in_flight(record, binary, chip)
        if flight < chip.in_flight and "flight" not in reasons:
            yield f"{flight:,.0f} bytes under way an SM; {chip.in_flight:,.0f} keep the memory of a {chip.name} busy"


def in_flight(record: Launch, binary: Binary, chip: Chip) -> float:
    """Bytes that a launch has under way on a busy SM of `chip`."""
    programs = math.prod(record.grid)
    blocks = min(max(1, resident_blocks(binary, chip)), -(-programs // chip.sms))
    return blocks * binary.warps * limits(record, binary).loaded


def proof(record: Launch, sm: int, budget: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Of a launch that has no faults: changes with its source, compiler and grid, with its budget and reasons, and with
    the rules of this gate."""
    rules = "".join(Path(__file__).with_name(name).read_text() for name in ("gate.py", "binary.py", "bounds.py"))
    held = {key: value for key, value in budget.items() if key != "proved"}
    whole = f"{fingerprint(record, sm)} {record.grid} {sorted(held.items())} {sorted(reasons.items())} {rules}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def read_budgets(path: Path) -> dict[str, dict[str, Any]]:
    """This Triton version's budgets by "sm key"; empty for a version that has none."""
    budgets: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())
    return budgets.get(triton_version(), {})


def reasons_for(path: Path, record: Launch) -> dict[str, str]:
    """By kind ("stack", "rate", "flight": see `faults`): why this launch may fall short; of each kind the first entry
    whose words are all in the launch's key."""
    found: dict[str, str] = {}
    for kind, entries in json.loads(path.read_text()).get("reasons", {}).items():
        for words, reason in entries.items():
            if set(words.split()) <= set(record.key.split()):
                found.setdefault(kind, reason)
    return found


def write_budgets(path: Path, budgets: Mapping[str, Mapping[str, Any]], complete: Iterable[int]) -> None:
    """Puts budgets in the place of this Triton version's. complete: GPUs whose other budgets are of kernels that no
    longer exist; the rest stays."""
    stored = json.loads(path.read_text()) if path.is_file() else {}
    gone = tuple([f"sm_{sm} " for sm in complete])
    mine = {**{k: v for k, v in stored.get(triton_version(), {}).items() if not k.startswith(gone)}, **budgets}
    stored[triton_version()] = {key: dict(mine[key]) for key in sorted(mine)}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def triton_version() -> str:
    """Major and minor, such as "3.7"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def expected_instructions(record: Launch, sm: int) -> dict[str, bool]:
    """Which matrix instructions a launch's binary holds: 16-bit products with an M tile of 64 and more on sm_90 are
    warp-group ones (HGMMA), others HMMA; of fp32, and of one or two rows of int4 in small groups, there are none."""
    constants = record.constants
    kinds = {a.dtype for a in record.arguments if isinstance(a, torch.Tensor) and a.is_floating_point()}
    narrow = bool(kinds & {torch.float16, torch.bfloat16})
    tile = constants.get("BLOCK_M") or constants.get("BLOCK_S") or constants.get("BLOCK_T") or 0
    if record.name in ("linear_residual", "gate_up_swiglu", "qkv"):
        plain = constants["GROUP"] in (32, 64)  # of int4, which tensor cores multiply in groups of 128
        tile = 0 if plain and constants["ROWS"] <= 2 else max(16, constants["ROWS"])
    if record.name in ("merge", "append", "rms_norm", "sample", "fsmn", "log_mel") or not narrow or not tile:
        return {"HMMA": False, "HGMMA": False}
    warp_group = sm >= 90 and tile >= 64
    return {"HMMA": not warp_group, "HGMMA": warp_group}
