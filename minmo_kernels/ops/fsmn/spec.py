"""Declaration of `fsmn`: cases, oracle, laws, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.fsmn import fsmn
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import beyond_lengths_nan, generator, normal, random_counts, random_rows


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "items": st.integers(1, 9),
            "dim": st.sampled_from([1, 3, 64]),
            "taps": st.sampled_from([(1, 0), (3, 1), (5, 0), (5, 4), (31, 15), (16, 0)]),
            "carry": st.booleans(),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    g = generator(case)
    batch, items, dim = case["batch"], case["items"], case["dim"]
    taps, right = case["taps"]
    sessions = batch + 1
    rows = random_rows(g, batch, sessions, case)
    lengths = random_counts(g, batch, items, case)
    carry = normal(g, sessions, taps - 1 - right, dim, dtype=case["dtype"])
    return {
        "v": beyond_lengths_nan(normal(g, batch, items, dim, dtype=case["dtype"]), lengths),
        "weight": normal(g, dim, 1, taps, dtype=case["dtype"], scale=taps**-0.5),
        "carry": carry if case["carry"] else None,
        "rows": rows,
        "lengths": lengths,
        "right": right,
    }


def oracle(v: Tensor, weight: Tensor, carry: Tensor | None, rows: Tensor, lengths: Tensor, right: int) -> Any:
    """Item by item over each session's list of items, tap by tap."""
    taps = weight.shape[2]
    left = taps - 1 - right
    out = torch.zeros(v.shape, dtype=torch.float64)
    kept = None if carry is None else carry.double().clone()
    for b, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        new = list(v[b, : int(lengths[b])].double())
        zero = torch.zeros(v.shape[2], dtype=torch.float64)
        history = [zero] * left if kept is None else list(kept[row].clone())
        line = history + new + [zero] * right
        for t, item in enumerate(new):
            out[b, t] = item + sum(weight[:, 0, j].double() * line[t + j] for j in range(taps))
        if kept is not None and left > 0:
            kept[row] = torch.stack((history + new)[-left:])
    return (out,) if kept is None else (out, kept)


def _split(case: Case) -> None:
    """Causal and cut in two with a carry equals in one piece."""
    case = {**case, "taps": (case["taps"][0], 0), "dtype": "float32", "carry": True}
    whole = make(case)
    cut = 1 + case["seed"] % case["items"]
    out = fsmn(**{**whole, "carry": whole["carry"].clone()})
    first = {**whole, "v": whole["v"][:, :cut], "lengths": whole["lengths"].clamp(max=cut)}
    pieces = [fsmn(**first)]
    if cut < case["items"]:
        rest = {**first, "v": whole["v"][:, cut:], "lengths": (whole["lengths"] - cut).clamp(min=0)}
        pieces.append(fsmn(**rest))
    torch.testing.assert_close(torch.cat(pieces, dim=1), out, rtol=1e-5, atol=1e-5)


def _none_is_zeros(case: Case) -> None:
    """No carry is a carry of zeros."""
    case = {**case, "carry": True}
    arguments = make(case)
    arguments["carry"].zero_()
    torch.testing.assert_close(fsmn(**arguments), fsmn(**{**arguments, "carry": None}), rtol=0, atol=0)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """A chunk of 80 ms (with carry) and 10 s in one shot, for an encoder of these sizes: encoder_dim, fsmn_kernel."""
    taps = dims["fsmn_kernel"]
    for batch in (1, 8):
        step = {"items": 2, "taps": (taps // 2 + 1, 0), "carry": True}
        whole = {"items": 250, "taps": (taps, taps // 2), "carry": False}
        for form in (step, whole):
            yield {"dtype": "bfloat16", "batch": batch, "dim": dims["encoder_dim"], "seed": 0, **form}


def moved_bytes(case: Case) -> int:
    taps, right = case["taps"]
    carry = 2 * case["batch"] * (taps - 1 - right) if case["carry"] else 0
    values = case["dim"] * (2 * case["batch"] * case["items"] + taps + carry)
    return getattr(torch, case["dtype"]).itemsize * values


def flops(case: Case) -> int:
    return case["batch"] * case["items"] * case["dim"] * (2 * case["taps"][0] + 1)


SPEC = OpSpec(
    name="fsmn",
    function=fsmn,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    mutates=("carry",),
    batched=("v", "rows", "lengths"),
    invariants={"split": _split, "no carry is zeros": _none_is_zeros},
)
