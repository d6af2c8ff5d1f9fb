"""Declaration of `sample_token`: cases, oracle, laws, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.sample_token import sample_token
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import generator, normal, random_rows


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "vocab": st.integers(2, 48),
            "ties": st.booleans(),
            "history": st.sampled_from([0, 1, 10]),
            "limit": st.integers(1, 2),
            "banned": st.integers(0, 2),
            "stream": st.sampled_from([0, 1, 2**32 - 1]),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    """Settings of every kind in one batch. Cumulative probabilities stay clear of top_p, where rounding decides."""
    g = generator(case)
    batch, vocab = case["batch"], case["vocab"]
    sessions = batch + 1
    logits = normal(g, batch, vocab, dtype=case["dtype"], scale=2.0)
    if case.get("ties"):  # whole numbers: the last candidate's equals lie in every block
        logits = logits.round()
    elif vocab > 2:
        logits[:, 2] = logits[:, 0]
    rows = random_rows(g, batch, sessions, case)
    logits[rows < 0] = math.nan
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.5, math.inf])[torch.randint(5, (sessions,), generator=g)]
    banned = torch.full((batch, case["banned"]), -1, dtype=torch.int32)
    if vocab > 3 and banned.numel():
        banned[:, 0] = torch.randint(0, vocab, (batch,), generator=g, dtype=torch.int32)
    top_p = torch.tensor([0.3, 0.8, 1.0])[torch.randint(3, (sessions,), generator=g)]
    for b, row in enumerate(rows.tolist()):
        if row >= 0 and temperature[row] > 0:
            before = [p for _, p in ranked(_weights(logits[b], float(temperature[row]), banned[b].tolist()))]
            if top_p[row] < 1 and min(abs(p - float(top_p[row])) for p in before) < 1e-5:
                top_p[row] = max((high - low, (low + high) / 2) for low, high in pairwise([*before, 1.0]))[1]
    top_k = torch.randint(0, 5, (sessions,), generator=g, dtype=torch.int32)
    if case.get("filled"):  # as a voice token LM samples
        temperature, top_p, top_k = (torch.full_like(x, v) for x, v in ((temperature, 1.0), (top_p, 0.8), (top_k, 25)))
    return {
        "logits": logits,
        "rows": rows,
        "seeds": torch.randint(-(2**62), 2**62, (sessions,), generator=g),
        "positions": torch.randint(0, 2**40, (sessions,), generator=g),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "history": torch.randint(-1, min(vocab, 4), (sessions, case["history"]), generator=g, dtype=torch.int32)
        if case["history"]
        else None,
        "banned": banned if case["banned"] else None,
        "stream": case["stream"],
        "repetition_limit": case["limit"],
    }


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def _weights(logits: Tensor, temperature: float, banned: list[int]) -> dict[int, float]:
    """exp(logit / temperature) up to a common factor, of every id that may be drawn: by falling logit, equals by id."""
    values = {i: x for i, x in enumerate(logits.tolist()) if i not in banned}
    order = sorted(values, key=lambda i: (-values[i], i))
    return {i: math.exp((values[i] - values[order[0]]) / temperature) for i in order}


def ranked(weights: Mapping[int, float]) -> list[tuple[int, float]]:
    """(id, probability of all better ids), the best first as `weights` are."""
    out, before, total = [], 0.0, math.fsum(weights.values())
    for i, weight in weights.items():
        out.append((i, before))
        before += weight / total
    return out


def race(weights: Mapping[int, float], counter: tuple[int, int, int], key: tuple[int, int], word: int) -> int:
    """The id whose exponential waiting time -log(u) / weight ends first: the same law and winner as Gumbel-max."""
    low, high, stream = counter
    times = {}
    for i, weight in weights.items():
        u = ((philox((low, high, i, stream), key)[word] >> 9) + 0.5) / 2**23
        times[i] = -math.log(u) / weight
    return min(times, key=lambda i: (times[i], i))


def oracle(
    logits: Tensor,
    rows: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    history: Tensor | None,
    banned: Tensor | None,
    stream: int,
    repetition_limit: int,
) -> tuple[Tensor]:
    """Entry by entry and id by id in Python numbers, drawn by a race of exponentials."""
    out = torch.full(rows.shape, -1, dtype=torch.int64)
    for b, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        off = [] if banned is None else banned[b].tolist()
        if temperature[row] == 0:
            left = {i: x for i, x in enumerate(logits[b].tolist()) if i not in off}
            out[b] = min(left, key=lambda i: (-left[i], i))
            continue
        weights = _weights(logits[b], float(temperature[row]), off)
        limit = int(top_k[row]) or len(weights)
        nucleus = float(top_p[row])
        candidates = [i for i, before in ranked(weights)[:limit] if before < nucleus or nucleus >= 1]
        key = (int(seeds[row]) % 2**32, int(seeds[row]) >> 32 & 0xFFFFFFFF)
        counter = (int(positions[row]) % 2**32, int(positions[row]) >> 32, stream)
        first = race({i: weights[i] for i in candidates}, counter, key, word=0)
        others = {i: w for i, w in weights.items() if i != first}
        repeated = history is not None and history[row].tolist().count(first) >= repetition_limit
        out[b] = race(others, counter, key, word=1) if repeated and others else first
    return (out,)


def _any_logits_give_an_id(case: Case) -> None:
    """Whatever the finite or infinite logits, active entries get an id of the vocabulary that is not banned."""
    arguments = make(case)
    arguments["logits"] = arguments["logits"].float() * 1e30
    arguments["logits"][:, 1] = math.inf
    ids = sample_token(**arguments)
    active = arguments["rows"] >= 0
    assert (ids[~active] == -1).all()
    assert ((ids[active] >= 0) & (ids[active] < case["vocab"])).all()
    if arguments["banned"] is not None:
        assert not (arguments["banned"][active] == ids[active][:, None]).any()


def _certain(case: Case) -> None:
    """top_k = 1 and a tiny temperature are greedy, however the seed falls."""
    arguments = make(case)
    arguments["history"] = None
    greedy = sample_token(**dict(arguments, temperature=arguments["temperature"] * 0))
    one = torch.ones_like(arguments["top_k"])
    always = torch.ones_like(arguments["temperature"])
    assert torch.equal(sample_token(**dict(arguments, top_k=one, temperature=always)), greedy)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """A step of a decoder with these sizes: vocab."""
    for batch in (1, 8):
        yield {
            "dtype": "bfloat16", "batch": batch, "vocab": dims["vocab"], "history": 10, "limit": 1, "banned": 2,
            "stream": 0, "seed": 0,
        }  # fmt: skip


def moved_bytes(case: Case) -> int:
    return getattr(torch, case["dtype"]).itemsize * case["batch"] * case["vocab"]


def flops(case: Case) -> int:
    """Ten Philox rounds of two wide products each dominate: integer operations, counted as two an id and round."""
    return 20 * case["batch"] * case["vocab"]


SPEC = OpSpec(
    name="sample_token",
    function=sample_token,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    batched=("logits", "rows", "banned"),
    invariants={"any logits give an id": _any_logits_give_an_id, "certain choices are greedy": _certain},
)
