"""Declaration of `streaming_attention`: cases, oracle, laws, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.streaming_attention import streaming_attention
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import (
    assert_reference_matches,
    beyond_lengths_nan,
    dequantised_cache,
    generator,
    max_error,
    normal,
    quantised_cache,
    random_rows,
)

FORMS: dict[str, dict[str, Any]] = {
    "full": {"mask": "full"},
    "causal": {"mask": "causal"},
    "window": {"mask": "causal", "window": 5},
    "window ring": {"mask": "causal", "window": 5, "ring": True},
    "chunk": {"mask": "chunk", "chunk": 3},
    "chunk left": {"mask": "chunk", "chunk": 3, "left_chunks": 2, "chunk_offset": 1},
    "chunk ring": {"mask": "chunk", "chunk": 2, "left_chunks": 2, "chunk_offset": 1, "ring": True},
}


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "form": st.sampled_from(sorted(FORMS)),
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "queries": st.integers(1, 5),
            "heads": st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1), (7, 1)]),
            "dim": st.sampled_from([64, 128]),
            "capacity": st.sampled_from([12, 19, 40]),
            "int8": st.booleans(),
            "scale": st.sampled_from([None, 0.3]),
            "all_queries": st.booleans(),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    g = generator(case)
    form = FORMS[case["form"]]
    heads, kv_heads = case["heads"]
    batch, queries, capacity = case["batch"], case["queries"], case["capacity"]
    sessions = batch + 1
    longest = capacity if not form.get("ring") else 3 * capacity
    lengths = torch.randint(queries, longest + 1, (sessions,), generator=g, dtype=torch.int32)
    if case.get("filled"):  # to the end of the cache, as the cost counts it
        lengths.fill_(capacity)
    q_lengths = torch.randint(0, queries + 1, (batch,), generator=g, dtype=torch.int32)
    if case["all_queries"]:
        q_lengths.fill_(queries)
    q = normal(g, batch, queries, heads, case["dim"], dtype=case["dtype"])
    k, v = (normal(g, sessions, capacity, kv_heads, case["dim"], dtype=case["dtype"]) for _ in range(2))
    scales: dict[str, Tensor] = {}
    if case["int8"]:
        (k, k_scale), (v, v_scale) = quantised_cache(k), quantised_cache(v)
        scales = {
            "k_scale": beyond_lengths_nan(k_scale, lengths),
            "v_scale": beyond_lengths_nan(v_scale, lengths),
        }
    return {
        "q": beyond_lengths_nan(q, q_lengths),
        "k_cache": beyond_lengths_nan(k, lengths),
        "v_cache": beyond_lengths_nan(v, lengths),
        "rows": random_rows(g, batch, sessions, case),
        "lengths": lengths,
        "q_lengths": None if case["all_queries"] else q_lengths,
        "scale": case["scale"],
        "return_lse": True,
        **scales,
        **form,
    }


def oracle(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    mask: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: int = 0,
    chunk: int = 0,
    left_chunks: int = -1,
    chunk_offset: int = 0,
    ring: bool = False,
    scale: float | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Query by query and key by key, over an explicit list of the positions that the query sees."""
    k_cache, v_cache = dequantised_cache(k_cache, k_scale), dequantised_cache(v_cache, v_scale)
    batch, queries, heads, dim = q.shape
    capacity, group = k_cache.shape[1], heads // k_cache.shape[2]
    counts = [queries] * batch if q_lengths is None else q_lengths.tolist()
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b, row in enumerate(rows.tolist()):
        for t in range(counts[b] if row >= 0 else 0):
            end = int(lengths[row])
            query = end - counts[b] + t
            seen = list(range(max(0, end - capacity) if ring else 0, end))
            if mask == "causal":
                seen = [p for p in seen if p <= query and (window == 0 or query - p < window)]
            if mask == "chunk":
                own = (query + chunk_offset) // chunk
                behind = [(p, own - (p + chunk_offset) // chunk) for p in seen]
                seen = [p for p, n in behind if n >= 0 and (left_chunks < 0 or n <= left_chunks)]
            slots = [p % capacity for p in seen]
            for h in range(heads):
                keys = k_cache[row, slots, h // group]
                scores = keys @ q[b, t, h].double() * (1 / math.sqrt(dim) if scale is None else scale)
                lse[b, t, h] = torch.logsumexp(scores, 0)
                out[b, t, h] = torch.softmax(scores, 0) @ v_cache[row, slots, h // group]
    return out, lse


def _one_query_at_a_time(case: Case) -> None:
    """Cutting the new positions into single ones changes nothing (under a causal mask: a chunk sees itself whole)."""
    if FORMS[case["form"]]["mask"] != "causal":
        return
    arguments = make(dict(case, all_queries=False))
    together, _ = streaming_attention(**arguments)
    rows, lengths, count = arguments["rows"], arguments["lengths"], arguments["q_lengths"]
    for b in range(len(rows)):
        for t in range(int(count[b]) if rows[b] >= 0 else 0):
            earlier = lengths - (count[b] - t - 1)
            single = dict(arguments, q=arguments["q"][b : b + 1, t : t + 1], rows=rows[b : b + 1], lengths=earlier)
            one, _ = streaming_attention(**dict(single, q_lengths=None))
            _assert_equal(one[0, 0], together[b, t])


def _partials_merge(case: Case) -> None:
    """Any number of partials, merged by their log-sum-exp, equals the whole."""
    arguments = make(case)
    out, lse = oracle(**arguments)
    parts, part_lse = streaming_attention(**arguments, partials=1 + case["seed"] % 5)
    total = torch.logsumexp(part_lse, dim=1)
    weight = torch.exp(part_lse - torch.where(total.isfinite(), total, 0.0)[:, None])
    assert_reference_matches((parts * weight[..., None]).sum(1).to(arguments["q"].dtype), out)
    assert_reference_matches(total, lse)


def _assert_equal(first: Tensor, second: Tensor) -> None:
    """Within the rounding of two computations of the same numbers."""
    error, largest = max_error(first, second)
    assert error <= 2 * (torch.finfo(first.dtype).eps + 64 * torch.finfo(torch.float32).eps) * largest


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Decode and prefill of a decoder with these sizes: heads, kv_heads, head_dim, capacity."""
    for batch in (1, 8):
        for queries, int8 in ((1, False), (1, True), (64, False)):
            yield {
                "form": "causal", "dtype": "bfloat16", "batch": batch, "queries": queries,
                "heads": (dims["heads"], dims["kv_heads"]), "dim": dims["head_dim"], "scale": None, "all_queries": True,
                "capacity": dims["capacity"], "int8": int8, "seed": 0,
            }  # fmt: skip


def moved_bytes(case: Case) -> int:
    size = getattr(torch, case["dtype"]).itemsize
    heads, kv_heads = case["heads"]
    cache = 2 * case["capacity"] * kv_heads * (case["dim"] + 4 if case["int8"] else size * case["dim"])
    return case["batch"] * (cache + 2 * size * case["dim"] * case["queries"] * heads)


def flops(case: Case) -> int:
    return 4 * case["batch"] * case["queries"] * case["capacity"] * case["heads"][0] * case["dim"]


SPEC = OpSpec(
    name="streaming_attention",
    function=streaming_attention,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    variants=tuple({"form": form} for form in FORMS) + tuple({"form": form, "queries": 64} for form in FORMS),
    batched=("q", "rows", "q_lengths"),
    invariants={"one query at a time": _one_query_at_a_time, "partials merge": _partials_merge},
)
