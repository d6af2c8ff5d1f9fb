"""Declaration of `fsq_encode`: cases, oracle, laws, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.fsq_encode import fsq_centres, fsq_encode
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import beyond_lengths_nan, generator, normal, random_counts, random_rows

LEVELS = ((3, 3, 3, 3, 3, 3, 3, 3), (5, 5, 5, 5), (3,), (3, 7, 9))
MARGIN = 1e-4
"""Distance to a rounding boundary, in digits, from which on fp32 and fp64 must agree."""


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "items": st.sampled_from([1, 4, 9, 20]),
            "dim": st.integers(1, 24),
            "levels": st.sampled_from(LEVELS),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    """Random features; a frame within MARGIN of a boundary, where rounding decides, becomes zeros."""
    g = generator(case)
    batch, items, dim, levels = case["batch"], case["items"], case["dim"], case["levels"]
    x = normal(g, batch, items, dim, dtype=case["dtype"], scale=2.0)
    weight = normal(g, len(levels), dim, dtype=case["dtype"], scale=dim**-0.5)
    bias = normal(g, len(levels), dtype=case["dtype"], scale=0.01)
    value = scaled(x, weight, bias, levels)
    unclear = ((value - value.floor() - 0.5).abs() < MARGIN).any(dim=-1, keepdim=True)
    lengths = random_counts(g, batch, items, case)
    return {
        "x": beyond_lengths_nan(torch.where(unclear, 0.0, x), lengths),
        "weight": weight,
        "bias": bias,
        "rows": random_rows(g, batch, batch + 1, case),
        "lengths": lengths,
        "levels": levels,
    }


def scaled(x: Tensor, weight: Tensor, bias: Tensor, levels: tuple[int, ...]) -> Tensor:
    """The fp64 numbers that are rounded to digits (before the shift to non-negative ones)."""
    h = (x.double()[..., None, :] * weight.double()).sum(dim=-1) + bias.double()
    return torch.tanh(h) * 0.9990000128746033 * torch.tensor([(n - 1) / 2 for n in levels], dtype=torch.float64)


def oracle(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, lengths: Tensor, levels: tuple[int, ...]) -> Any:
    """Frame by frame in Python integers, most significant digit first."""
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    for b, row in enumerate(rows.tolist()):
        for t in range(int(lengths[b]) if row >= 0 else 0):
            values = scaled(x[b, t], weight, bias, levels).tolist()
            number = 0
            for value, n in zip(reversed(values), reversed(levels), strict=True):
                number = number * n + round(value) + (n - 1) // 2
            ids[b, t] = number
    return (ids,)


def _in_range(case: Case) -> None:
    """Ids are codes, zeros where nothing exists, whatever the size of the features."""
    arguments = make(case)
    arguments["x"] = arguments["x"] * 1e4
    ids = fsq_encode(**arguments)
    assert ids.dtype == torch.int32
    assert 0 <= int(ids.min()) and int(ids.max()) < math.prod(case["levels"])


def _idempotent(case: Case) -> None:
    """The centre of a code's cell is quantised to that code (for about 500 codes)."""
    levels, count = case["levels"], math.prod(case["levels"])
    step = 1 + count // 500
    codes = torch.arange(case["seed"] % step, count, step, dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    identity, no_bias = torch.eye(len(levels)), torch.zeros(len(levels))
    again = fsq_encode(fsq_centres(codes, levels)[None], identity, no_bias, one - 1, one * len(codes), levels=levels)
    assert torch.equal(again[0], codes)


def _only_boundaries_differ(case: Case) -> None:
    """Without the margin, fp32 and fp64 may differ near boundaries only, by one digit each, and seldom."""
    g = generator(case)
    levels, frames = case["levels"], 256
    x = normal(g, 1, frames, case["dim"], scale=2.0)
    weight, bias = normal(g, len(levels), case["dim"]), normal(g, len(levels))
    one = torch.ones(1, dtype=torch.int32)
    ids = fsq_encode(x, weight, bias, one - 1, one * frames, levels=levels)
    exact = oracle(x, weight, bias, one - 1, one * frames, levels)[0]
    value = scaled(x, weight, bias, levels)
    near = ((value - value.floor() - 0.5).abs() < MARGIN).any(dim=-1)
    assert torch.equal(ids[~near], exact[~near].int())
    assert int((ids != exact).sum()) <= 1, f"{int((ids != exact).sum())} of {frames} frames differ at a boundary"


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """A chunk of 80 ms and 10 s of speech at 25 Hz, for a tokenizer of these sizes: tokenizer_dim."""
    for items in (2, 250):
        yield {
            "dtype": "bfloat16",
            "batch": 1,
            "items": items,
            "dim": dims["tokenizer_dim"],
            "levels": LEVELS[0],
            "seed": 0,
        }


def moved_bytes(case: Case) -> int:
    frames, digits = case["batch"] * case["items"], len(case["levels"])
    return getattr(torch, case["dtype"]).itemsize * (frames + digits) * case["dim"] + 4 * frames


def flops(case: Case) -> int:
    return 2 * case["batch"] * case["items"] * case["dim"] * len(case["levels"])


SPEC = OpSpec(
    name="fsq_encode",
    function=fsq_encode,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    batched=("x", "rows", "lengths"),
    invariants={
        "ids are codes": _in_range,
        "idempotent": _idempotent,
        "only boundaries differ": _only_boundaries_differ,
    },
)
