"""Declaration of `rms_norm`: cases, oracle, laws, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.rms_norm import rms_norm
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import generator, normal, padding_nan, random_rows


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 4),
            "items": st.integers(0, 3),
            "dim": st.sampled_from([1, 64, 192, 257]),
            "rows": st.booleans(),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    """items 0 means that x has no item axis."""
    g = generator(case)
    middle = (case["items"],) if case["items"] else ()
    x = normal(g, case["batch"], *middle, case["dim"], dtype=case["dtype"])
    rows = random_rows(g, case["batch"], case["batch"] + 1, case) if case["rows"] else None
    return {
        "x": x if rows is None else padding_nan(x, rows),
        "weight": normal(g, case["dim"], dtype=case["dtype"]),
        "rows": rows,
        "eps": 1e-6,
    }


def oracle(x: Tensor, weight: Tensor, rows: Tensor | None, eps: float) -> tuple[Tensor]:
    """Vector by vector: a unit-length direction, stretched to sqrt(dim)."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        if rows is None or rows[b] >= 0:
            for source, target in zip(x[b].reshape(-1, x.shape[-1]), out[b].view(-1, x.shape[-1]), strict=True):
                vector = source.double()
                length = torch.linalg.vector_norm(torch.cat([vector, vector.new_tensor([(eps * len(vector)) ** 0.5])]))
                target.copy_(vector / length * len(vector) ** 0.5 * weight.double())
    return (out,)


def _scale_does_not_matter(case: Case) -> None:
    """Inputs twice as large give the same output, where eps is negligible."""
    arguments = make(dict(case, dtype="float32"))
    arguments["eps"] = 0.0
    twice = rms_norm(**dict(arguments, x=arguments["x"] * 2))
    torch.testing.assert_close(twice, rms_norm(**arguments), rtol=1e-6, atol=1e-6)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode and prefill at a model's width: dim."""
    for batch in (1, 8):
        for items in (0, 64):
            yield {
                "dtype": "bfloat16", "batch": batch, "items": items, "dim": dims["dim"], "rows": True, "seed": 0,
            }  # fmt: skip


def _values(case: Case) -> int:
    return case["batch"] * max(case["items"], 1) * case["dim"]


def moved_bytes(case: Case) -> int:
    return getattr(torch, case["dtype"]).itemsize * (2 * _values(case) + case["dim"])


def flops(case: Case) -> int:
    return 4 * _values(case)


SPEC = OpSpec(
    name="rms_norm",
    function=rms_norm,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    batched=("x", "rows"),
    invariants={"scale does not matter": _scale_does_not_matter},
)
