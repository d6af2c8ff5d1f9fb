"""Declaration of `gate_up_swiglu`: cases, oracle, laws, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.gate_up_swiglu import gate_up_swiglu
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import (
    BUCKETS,
    FORMATS,
    dequantised,
    formats_of,
    generator,
    group_of,
    normal,
    padding_nan,
    quantised,
    random_rows,
    weight_bytes,
)


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "weights": st.sampled_from(FORMATS),
            "batch": st.integers(1, 4),
            "dim": st.sampled_from([32, 96, 130, 256]),
            "ffn": st.sampled_from([16, 64, 101]),
            "seed": st.integers(0, 2**31 - 1),
        }
    ).filter(lambda case: case["dim"] % group_of(case["weights"]) == 0)


def make(case: Case) -> dict[str, Any]:
    g = generator(case)
    batch, dim, dtype = case["batch"], case["dim"], case["dtype"]
    rows = random_rows(g, batch, batch + 1, case)
    return {
        "x": padding_nan(normal(g, batch, dim, dtype=dtype), rows),
        "norm_weight": normal(g, dim, dtype=dtype),
        **quantised("weight", normal(g, 2 * case["ffn"], dim, dtype=dtype, scale=dim**-0.5), case["weights"]),
        "rows": rows,
        "eps": 1e-6,
    }


def oracle(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    rows: Tensor,
    eps: float,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> tuple[Tensor]:
    """Two separate matrices; the norm folded into them."""
    weight = dequantised(weight, weight_scale, weight_zero)
    out = torch.zeros(x.shape[0], weight.shape[0] // 2, dtype=torch.float64)
    gate, up = (weight[i::2] * norm_weight.double() for i in (0, 1))
    for b, row in enumerate(rows.tolist()):
        if row >= 0:
            source = x[b].double()
            source = source / (source @ source / len(source) + eps) ** 0.5
            g = gate @ source
            out[b] = g / (1 + torch.exp(-g)) * (up @ source)
    return (out,)


def _units_are_independent(case: Case) -> None:
    """A slice of the weight's row pairs gives that slice of the output."""
    arguments = make(dict(case, dtype="float32", weights="full"))
    half = case["ffn"] // 2
    part = gate_up_swiglu(**dict(arguments, weight=arguments["weight"][2 * half :]))
    torch.testing.assert_close(part, gate_up_swiglu(**arguments)[:, half:], rtol=1e-4, atol=1e-5)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode of a decoder with these sizes: dim, ffn."""
    for batch in (1, 8):
        for weights in formats_of(dims["dim"]):
            yield {
                "dtype": "bfloat16", "weights": weights, "batch": batch, "dim": dims["dim"], "ffn": dims["ffn"],
                "seed": 0,
            }  # fmt: skip


def moved_bytes(case: Case) -> int:
    values = case["dim"] + case["batch"] * (case["dim"] + case["ffn"])
    return weight_bytes(case, 2 * case["ffn"], case["dim"]) + getattr(torch, case["dtype"]).itemsize * values


def flops(case: Case) -> int:
    return 4 * case["batch"] * case["dim"] * case["ffn"]


SPEC = OpSpec(
    name="gate_up_swiglu",
    function=gate_up_swiglu,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    variants=BUCKETS,
    batched=("x", "rows"),
    invariants={"units are independent": _units_are_independent},
)
