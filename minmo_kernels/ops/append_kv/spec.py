"""Declaration of `append_kv`: cases, oracle, laws, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.append_kv import append_kv
from minmo_kernels.ops.streaming_attention import streaming_attention
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import (
    beyond_lengths_nan,
    generator,
    normal,
    quantised_cache,
    random_counts,
    random_rows,
)


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "items": st.integers(1, 5),
            "heads": st.sampled_from([(1, 1), (4, 2), (7, 1)]),
            "dim": st.sampled_from([64, 128]),
            "capacity": st.integers(8, 16),
            "int8": st.booleans(),
            "ring": st.booleans(),
            "rope": st.booleans(),
            "bias": st.booleans(),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    g = generator(case)
    heads, kv_heads = case["heads"]
    batch, items, capacity, dim = case["batch"], case["items"], case["capacity"], case["dim"]
    sessions, packed = batch + 1, (heads + 2 * kv_heads) * dim
    longest = 1_000_000 if case["ring"] else capacity - items
    lengths = torch.randint(0, longest + 1, (sessions,), generator=g, dtype=torch.int32)
    q_lengths = random_counts(g, batch, items, case)
    qkv = normal(g, batch, items, packed, dtype=case["dtype"])
    k, v = (normal(g, sessions, capacity, kv_heads, dim, dtype=case["dtype"]) for _ in range(2))
    if case["int8"]:
        (k, k_scale), (v, v_scale) = quantised_cache(k), quantised_cache(v)
    return {
        "qkv": beyond_lengths_nan(qkv, q_lengths),
        "bias": normal(g, packed, dtype=case["dtype"]) if case["bias"] else None,
        "k_cache": k,
        "v_cache": v,
        "rows": random_rows(g, batch, sessions, case),
        "lengths": lengths,
        "q_lengths": q_lengths,
        "k_scale": k_scale if case["int8"] else None,
        "v_scale": v_scale if case["int8"] else None,
        "heads": heads,
        "kv_heads": kv_heads,
        "rope_theta": 10_000.0,
        "rope": case["rope"],
        "ring": case["ring"],
    }


def oracle(
    qkv: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    heads: int,
    kv_heads: int,
    rope_theta: float,
    rope: bool,
    ring: bool,
) -> tuple[Tensor, ...]:
    """Position by position; the rotation as a product of complex numbers. Of int8 caches, the scales."""
    capacity, dim = k_cache.shape[1], k_cache.shape[3]
    if k_scale is None or v_scale is None:
        k_out, v_out = k_cache.double().clone(), v_cache.double().clone()
    else:
        k_out, v_out = k_scale.double().clone(), v_scale.double().clone()

    def kept(x: Tensor) -> Tensor:
        return x if k_scale is None else x.abs().amax(dim=-1) / 127

    out = torch.zeros(qkv.shape[0], qkv.shape[1], heads, dim, dtype=torch.float64)
    half = dim // 2
    frequency = torch.tensor([rope_theta ** (-2 * i / dim) for i in range(half)], dtype=torch.float64)

    def turn(x: Tensor, position: int) -> Tensor:
        if not rope:
            return x
        rotated = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(half).double(), position * frequency)
        return torch.cat([rotated.real, rotated.imag], dim=1)

    for b, row in enumerate(rows.tolist()):
        for t in range(int(q_lengths[b]) if row >= 0 else 0):
            x = qkv[b, t].double() + (0 if bias is None else bias.double())
            x = x.reshape(heads + 2 * kv_heads, dim)
            position = int(lengths[row]) + t
            slot = position % capacity if ring else position
            out[b, t] = turn(x[:heads], position)
            k_out[row, slot] = kept(turn(x[heads : heads + kv_heads], position))
            v_out[row, slot] = kept(x[heads + kv_heads :])
    return out, k_out, v_out


def _int8_is_the_rounded_cache(case: Case) -> None:
    """An int8 cache holds what one in full precision holds, rounded to the nearest of 255 steps; the rest stays."""
    case = dict(case, dtype="float32")
    full, int8, before = (make(dict(case, int8=int8)) for int8 in (False, True, True))
    append_kv(**full)
    append_kv(**int8)
    ring, capacity = case["ring"], case["capacity"]
    for b, row in enumerate(full["rows"].tolist()):
        for t in range(int(full["q_lengths"][b]) if row >= 0 else 0):
            slot = (int(full["lengths"][row]) + t) % capacity if ring else int(full["lengths"][row]) + t
            for name in ("k", "v"):
                vectors, scale = full[f"{name}_cache"][row, slot], int8[f"{name}_scale"][row, slot]
                error = int8[f"{name}_cache"][row, slot] * scale[:, None] - vectors
                assert bool((error.abs() <= 0.5001 * scale[:, None]).all())
                before[f"{name}_cache"][row, slot] = int8[f"{name}_cache"][row, slot]
    assert torch.equal(before["k_cache"], int8["k_cache"])
    assert torch.equal(before["v_cache"], int8["v_cache"])


def _append_then_attend(case: Case) -> None:
    """Appending in two pieces and attending equals attending over the concatenated sequence, within the capacity."""
    g = generator(case)
    heads, kv_heads = case["heads"]
    dim, capacity = case["dim"], case["capacity"]
    kind: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "rope": case["rope"]}
    qkv = normal(g, 1, capacity, (heads + 2 * kv_heads) * dim)
    cut = 1 + case["seed"] % (capacity - 1)
    rows = torch.tensor([1], dtype=torch.int32)
    window = {"mask": "causal", "window": 3, "ring": True} if case["ring"] else {"mask": "causal"}

    def run(pieces: list[Tensor], slots: int) -> Tensor:
        k, v = torch.full((2, slots, kv_heads, dim), math.nan), torch.full((2, slots, kv_heads, dim), math.nan)
        lengths = torch.zeros(2, dtype=torch.int32)
        outs = []
        for piece in pieces:
            q = append_kv(piece, None, k, v, rows, lengths, **kind, ring=case["ring"])
            lengths[1] += piece.shape[1]
            outs.append(streaming_attention(q, k, v, rows, lengths, **window))
        return torch.cat(outs, dim=1)

    whole = run([qkv], capacity + 2)
    torch.testing.assert_close(run([qkv[:, :cut], qkv[:, cut:]], capacity + 2), whole, rtol=1e-4, atol=1e-5)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode and prefill of a decoder with these sizes: heads, kv_heads, head_dim, capacity."""
    for batch in (1, 8):
        for items, int8 in ((1, False), (1, True), (64, False)):
            yield {
                "dtype": "bfloat16", "batch": batch, "items": items, "heads": (dims["heads"], dims["kv_heads"]),
                "dim": dims["head_dim"], "capacity": dims["capacity"], "int8": int8, "ring": False, "rope": True,
                "bias": True, "seed": 0,
            }  # fmt: skip


def moved_bytes(case: Case) -> int:
    heads, kv_heads = case["heads"]
    vectors, size = case["batch"] * case["items"], getattr(torch, case["dtype"]).itemsize
    cached = 2 * kv_heads * (case["dim"] + 4 if case["int8"] else case["dim"] * size)
    return vectors * (cached + (2 * heads + 2 * kv_heads) * case["dim"] * size)


def flops(case: Case) -> int:
    heads, kv_heads = case["heads"]
    return 4 * case["batch"] * case["items"] * (heads + 2 * kv_heads) * case["dim"]


SPEC = OpSpec(
    name="append_kv",
    function=append_kv,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    mutates=("k_cache", "v_cache", "k_scale", "v_scale"),
    variants=({"ring": True}, {"rope": False}),
    batched=("qkv", "rows", "q_lengths"),
    invariants={
        "append then attend": _append_then_attend,
        "int8 is the rounded cache": _int8_is_the_rounded_cache,
    },
)
