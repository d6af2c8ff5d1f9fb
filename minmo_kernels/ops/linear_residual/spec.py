"""Declaration of `linear_residual`: cases, oracle, laws, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.linear_residual import linear_residual
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
            "dim_in": st.sampled_from([32, 96, 130, 256]),
            "dim_out": st.sampled_from([16, 64, 101]),
            "residual": st.booleans(),
            "seed": st.integers(0, 2**31 - 1),
        }
    ).filter(lambda case: case["dim_in"] % group_of(case["weights"]) == 0)


def make(case: Case) -> dict[str, Any]:
    g = generator(case)
    batch, dim_in, dim_out, dtype = case["batch"], case["dim_in"], case["dim_out"], case["dtype"]
    rows = random_rows(g, batch, batch + 1, case)
    return {
        "x": padding_nan(normal(g, batch, dim_in, dtype=dtype), rows),
        **quantised("weight", normal(g, dim_out, dim_in, dtype=dtype, scale=dim_in**-0.5), case["weights"]),
        "residual": padding_nan(normal(g, batch, dim_out, dtype=dtype), rows) if case["residual"] else None,
        "rows": rows,
    }


def oracle(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> tuple[Tensor]:
    """One extra input that is always 1 carries the residual."""
    weight = dequantised(weight, weight_scale, weight_zero)
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    if residual is None:
        residual = out
    for b, row in enumerate(rows.tolist()):
        if row >= 0:
            columns = torch.cat([weight, residual[b].double()[:, None]], dim=1)
            out[b] = columns @ torch.cat([x[b].double(), torch.ones(1, dtype=torch.float64)])
    return (out,)


def _sum_of_halves(case: Case) -> None:
    """Two halves of the input, one after the other, give the whole."""
    arguments = make(dict(case, dtype="float32", weights="full"))
    x, weight, half = arguments["x"], arguments["weight"], case["dim_in"] // 2
    first = linear_residual(**dict(arguments, x=x[:, :half].contiguous(), weight=weight[:, :half].contiguous()))
    both = linear_residual(
        **dict(arguments, x=x[:, half:].contiguous(), weight=weight[:, half:].contiguous(), residual=first)
    )
    torch.testing.assert_close(both, linear_residual(**arguments), rtol=1e-4, atol=1e-5)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode of a decoder with these sizes: dim, ffn (the down projection), vocab (the head)."""
    projections = [(dims["ffn"], dims["dim"], True)]
    if "vocab" in dims:
        projections.append((dims["dim"], dims["vocab"], False))
    for dim_in, dim_out, residual in projections:
        for batch in (1, 8):
            for weights in formats_of(dim_in):
                yield {
                    "dtype": "bfloat16", "weights": weights, "batch": batch, "dim_in": dim_in, "dim_out": dim_out,
                    "residual": residual, "seed": 0,
                }  # fmt: skip


def moved_bytes(case: Case) -> int:
    values = case["batch"] * (case["dim_in"] + case["dim_out"] * (2 if case["residual"] else 1))
    return weight_bytes(case, case["dim_out"], case["dim_in"]) + getattr(torch, case["dtype"]).itemsize * values


def flops(case: Case) -> int:
    return 2 * case["batch"] * case["dim_in"] * case["dim_out"]


SPEC = OpSpec(
    name="linear_residual",
    function=linear_residual,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    variants=BUCKETS,
    batched=("x", "residual", "rows"),
    invariants={"sum of halves": _sum_of_halves},
)
