"""Declaration of `rms_norm_qkv_rope_append`: cases, oracle, laws, cost."""

from __future__ import annotations

import cmath
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.append_kv import append_kv
from minmo_kernels.ops.rms_norm import rms_norm
from minmo_kernels.ops.rms_norm_qkv_rope_append import rms_norm_qkv_rope_append
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
            "heads": st.sampled_from([(1, 1), (2, 1), (2, 2)]),
            "head_dim": st.sampled_from([64, 128]),
            "capacity": st.integers(4, 12),
            "ring": st.booleans(),
            "bias": st.booleans(),
            "seed": st.integers(0, 2**31 - 1),
        }
    ).filter(lambda case: case["dim"] % group_of(case["weights"]) == 0)


def make(case: Case) -> dict[str, Any]:
    g = generator(case)
    heads, kv_heads = case["heads"]
    batch, capacity, dim, dtype = case["batch"], case["capacity"], case["dim"], case["dtype"]
    sessions, packed = batch + 1, (heads + 2 * kv_heads) * case["head_dim"]
    longest = 1_000_000 if case["ring"] else capacity - 1
    cache = (sessions, capacity, kv_heads, case["head_dim"])
    rows = random_rows(g, batch, sessions, case)
    return {
        "x": padding_nan(normal(g, batch, dim, dtype=dtype), rows),
        "norm_weight": normal(g, dim, dtype=dtype),
        **quantised("qkv_weight", normal(g, packed, dim, dtype=dtype, scale=dim**-0.5), case["weights"]),
        "qkv_bias": normal(g, packed, dtype=dtype) if case["bias"] else None,
        "k_cache": normal(g, *cache, dtype=dtype),
        "v_cache": normal(g, *cache, dtype=dtype),
        "rows": rows,
        "lengths": torch.randint(0, longest + 1, (sessions,), generator=g, dtype=torch.int32),
        "heads": heads,
        "kv_heads": kv_heads,
        "eps": 1e-6,
        "rope_theta": 10_000.0,
        "ring": case["ring"],
    }


def oracle(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    rope_theta: float,
    ring: bool,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entry by entry; the norm folded into the weight, the rotation as a product of complex numbers."""
    capacity, dim = k_cache.shape[1], k_cache.shape[3]
    k_out, v_out = k_cache.double().clone(), v_cache.double().clone()
    out = torch.zeros(x.shape[0], heads, dim, dtype=torch.float64)
    weight = dequantised(qkv_weight, weight_scale, weight_zero) * norm_weight.double()

    def turn(vectors: Tensor, position: int) -> Tensor:
        turned = vectors.clone()
        for i in range(dim // 2):
            factor = cmath.exp(1j * position * rope_theta ** (-2 * i / dim))
            value = torch.complex(vectors[:, i], vectors[:, i + dim // 2]) * factor
            turned[:, i], turned[:, i + dim // 2] = value.real, value.imag
        return turned

    for b, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        source = x[b].double()
        packed = weight @ source / (source @ source / len(source) + eps) ** 0.5
        packed = (packed + (0 if qkv_bias is None else qkv_bias.double())).reshape(-1, dim)
        position = int(lengths[row])
        slot = position % capacity if ring else position
        out[b] = turn(packed[:heads], position)
        k_out[row, slot] = turn(packed[heads : heads + kv_heads], position)
        v_out[row, slot] = packed[heads + kv_heads :]
    return out, k_out, v_out


def _equals_its_parts(case: Case) -> None:
    """In fp32 the fused operation equals rms_norm, a matrix product and append_kv."""
    arguments = make(dict(case, dtype="float32", weights="full"))
    k, v = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    q = rms_norm_qkv_rope_append(**arguments)
    qkv = rms_norm(arguments["x"], arguments["norm_weight"], arguments["rows"], eps=arguments["eps"])
    parts = append_kv(
        (qkv @ arguments["qkv_weight"].T)[:, None], arguments["qkv_bias"], k, v, arguments["rows"],
        arguments["lengths"], heads=arguments["heads"], kv_heads=arguments["kv_heads"],
        rope_theta=arguments["rope_theta"], ring=arguments["ring"],
    )  # fmt: skip
    for one, other in ((q, parts[:, 0]), (arguments["k_cache"], k), (arguments["v_cache"], v)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode of a decoder with these sizes: dim, heads, kv_heads, head_dim, capacity."""
    for batch in (1, 8):
        for weights in formats_of(dims["dim"]):
            yield {
                "dtype": "bfloat16", "weights": weights, "batch": batch, "dim": dims["dim"],
                "heads": (dims["heads"], dims["kv_heads"]), "head_dim": dims["head_dim"],
                "capacity": dims["capacity"], "ring": False, "bias": True, "seed": 0,
            }  # fmt: skip


def _packed(case: Case) -> int:
    heads, kv_heads = case["heads"]
    return (heads + 2 * kv_heads) * case["head_dim"]


def moved_bytes(case: Case) -> int:
    values = _packed(case) * case["bias"] + case["dim"] + case["batch"] * (case["dim"] + _packed(case))
    return weight_bytes(case, _packed(case), case["dim"]) + getattr(torch, case["dtype"]).itemsize * values


def flops(case: Case) -> int:
    return 2 * case["batch"] * case["dim"] * _packed(case)


SPEC = OpSpec(
    name="rms_norm_qkv_rope_append",
    function=rms_norm_qkv_rope_append,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    mutates=("k_cache", "v_cache"),
    variants=BUCKETS,
    batched=("x", "rows"),
    invariants={"equals its parts": _equals_its_parts},
)
