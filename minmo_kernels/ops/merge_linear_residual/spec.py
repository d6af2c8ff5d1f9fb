"""Declaration of `merge_linear_residual`: cases, oracle, laws, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.merge_linear_residual import merge_linear_residual
from minmo_kernels.ops.streaming_attention import streaming_attention
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
            "partials": st.integers(1, 3),
            "heads": st.sampled_from([1, 3]),
            "head_dim": st.sampled_from([64, 128]),
            "dim_out": st.sampled_from([32, 97]),
            "seed": st.integers(0, 2**31 - 1),
        }
    ).filter(lambda case: case["heads"] * case["head_dim"] % group_of(case["weights"]) == 0)


def make(case: Case) -> dict[str, Any]:
    """About a third of the parts saw nothing, unless the case is `filled`: their lse is -inf and their values NaN."""
    g = generator(case)
    batch, heads, dim = case["batch"], case["heads"], case["head_dim"]
    lse = 4 * normal(g, batch, case["partials"], heads)
    lse[torch.rand(lse.shape, generator=g) < (0.0 if case.get("filled") else 0.3)] = -math.inf
    partials = normal(g, batch, case["partials"], heads, dim)
    partials[lse.isneginf()] = math.nan
    rows = random_rows(g, batch, batch + 1, case)
    weight = normal(g, case["dim_out"], heads * dim, dtype=case["dtype"], scale=(heads * dim) ** -0.5)
    return {
        "partials": partials,
        "lse": lse,
        **quantised("weight", weight, case["weights"]),
        "residual": padding_nan(normal(g, batch, case["dim_out"], dtype=case["dtype"]), rows),
        "rows": rows,
    }


def oracle(
    partials: Tensor,
    lse: Tensor,
    weight: Tensor,
    residual: Tensor,
    rows: Tensor,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> tuple[Tensor]:
    """Head by head, over the parts that saw something."""
    heads, dim = partials.shape[2:]
    weight = dequantised(weight, weight_scale, weight_zero)
    out = torch.zeros(residual.shape, dtype=torch.float64)
    for b, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        out[b] = residual[b].double()
        for h in range(heads):
            parts = lse[b, :, h].isfinite().nonzero()[:, 0]
            if len(parts):
                share = torch.softmax(lse[b, parts, h].double(), 0)
                out[b] += weight[:, h * dim : (h + 1) * dim] @ (share @ partials[b, parts, h].double())
    return (out,)


def _number_of_parts(case: Case) -> None:
    """Attention cut into any number of parts gives the same result as in one."""
    g = generator(case)
    batch, heads, dim = case["batch"], case["heads"], case["head_dim"]
    q = normal(g, batch, 1, heads, dim)
    k, v = normal(g, batch + 1, 9, 1, dim), normal(g, batch + 1, 9, 1, dim)
    lengths = torch.randint(1, 10, (batch + 1,), generator=g, dtype=torch.int32)
    rows = random_rows(g, batch, batch + 1, case)
    weight, residual = normal(g, case["dim_out"], heads * dim, scale=0.1), normal(g, batch, case["dim_out"])

    def run(parts: int) -> Tensor:
        out, lse = streaming_attention(q, k, v, rows, lengths, partials=parts)
        return merge_linear_residual(out[:, :, 0], lse[:, :, 0], weight, residual, rows)

    torch.testing.assert_close(run(case["partials"]), run(1), rtol=1e-4, atol=1e-5)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode of a decoder with these sizes: dim, heads, head_dim."""
    for batch in (1, 8):
        for weights in formats_of(dims["heads"] * dims["head_dim"]):
            yield {
                "dtype": "bfloat16", "weights": weights, "batch": batch, "partials": 8, "heads": dims["heads"],
                "head_dim": dims["head_dim"], "dim_out": dims["dim"], "seed": 0,
            }  # fmt: skip


def moved_bytes(case: Case) -> int:
    width = case["heads"] * case["head_dim"]
    values = case["dim_out"] * 2 * case["batch"]
    parts = case["batch"] * case["partials"] * (width + case["heads"])
    weight = weight_bytes(case, case["dim_out"], width)
    return weight + getattr(torch, case["dtype"]).itemsize * values + 4 * parts


def flops(case: Case) -> int:
    width = case["heads"] * case["head_dim"]
    return 2 * case["batch"] * width * (case["dim_out"] + case["partials"])


SPEC = OpSpec(
    name="merge_linear_residual",
    function=merge_linear_residual,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    variants=BUCKETS,
    batched=("partials", "lse", "residual", "rows"),
    invariants={"number of parts": _number_of_parts},
)
