"""Declaration of `decoder_step`: cases, oracle, laws, cost."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels import quantise
from minmo_kernels.ops.decoder_step import decoder_step, new_sync
from minmo_kernels.ops.gate_up_swiglu import gate_up_swiglu
from minmo_kernels.ops.linear_residual import linear_residual
from minmo_kernels.ops.merge_linear_residual import merge_linear_residual
from minmo_kernels.ops.rms_norm import rms_norm
from minmo_kernels.ops.rms_norm_qkv_rope_append import rms_norm_qkv_rope_append
from minmo_kernels.ops.sample_token.spec import philox
from minmo_kernels.ops.streaming_attention import streaming_attention
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import dequantised, generator, normal, padding_nan, random_rows

CLEAR = 0.03
"""Share of the largest logit by which a case's draws are decided, so that rounding decides none."""


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.just("float32"),
            "weights": st.sampled_from(["full", "int8"]),
            "batch": st.integers(1, 3),
            "layers": st.integers(1, 2),
            "dim": st.sampled_from([32, 96]),
            "heads": st.sampled_from([(1, 1), (2, 1)]),
            "head_dim": st.sampled_from([64, 128]),
            "ffn": st.sampled_from([32, 80]),
            "vocab": st.sampled_from([0, 24]),
            "steps": st.integers(1, 2),
            "norm": st.booleans(),
            "bias": st.booleans(),
            "form": st.sampled_from(["linear", "window", "ring"]),
            "seed": st.integers(0, 2**31 - 1),
        }
    ).map(_possible)


def _possible(case: Case) -> Case:
    """A step without a head is one; a head needs the norm."""
    return {**case, "steps": case["steps"] if case["vocab"] else 1, "norm": case["norm"] or case["vocab"] > 0}


def make(case: Case) -> dict[str, Any]:
    """Where tokens are drawn, the first of the seeds from which no draw is a close one."""
    if case.get("filled") or not case["vocab"]:
        return _make(case, generator(case))
    g = generator(case)
    for _ in range(100):
        arguments = _make(case, g)
        if _Oracle(arguments).run().clear:
            return arguments
    raise RuntimeError(f"no draw of this case is clear of rounding: {case}")


def _make(case: Case, g: torch.Generator) -> dict[str, Any]:
    (heads, kv_heads), dim, ffn, layers, vocab = (
        case["heads"], case["dim"], case["ffn"], case["layers"], case["vocab"]
    )  # fmt: skip
    batch, dtype, head_dim = case["batch"], case["dtype"], case["head_dim"]
    sessions, packed = batch + 1, (heads + 2 * kv_heads) * head_dim
    ring, window = case["form"] == "ring", 0 if case["form"] == "linear" else 5
    capacity = case.get("capacity", 9)
    rows = random_rows(g, batch, sessions, case)
    longest = 1_000_000 if ring else capacity - case["steps"]
    lengths = torch.randint(0, longest + 1, (sessions,), generator=g, dtype=torch.int32)
    if case.get("filled"):
        lengths = torch.full_like(lengths, longest)
    shape = (layers, sessions, capacity, kv_heads, head_dim)

    def weight(*size: int) -> Tensor:
        return normal(g, *size, dtype=dtype, scale=size[-1] ** -0.5)

    arguments: dict[str, Any] = {
        "x": padding_nan(normal(g, batch, dim, dtype=dtype), rows),
        "input_norm": normal(g, layers, dim, dtype=dtype),
        "qkv": weight(layers, packed, dim),
        "qkv_bias": normal(g, layers, packed, dtype=dtype) if case["bias"] else None,
        "out": weight(layers, dim, heads * head_dim),
        "post_norm": normal(g, layers, dim, dtype=dtype),
        "gate_up": weight(layers, 2 * ffn, dim),
        "down": weight(layers, dim, ffn),
        "k_cache": _unwritten(normal(g, *shape, dtype=dtype), lengths),
        "v_cache": _unwritten(normal(g, *shape, dtype=dtype), lengths),
        "rows": rows,
        "lengths": lengths,
        "sync": new_sync("cpu"),
        "final_norm": normal(g, dim, dtype=dtype) if case["norm"] else None,
        "heads": heads, "kv_heads": kv_heads, "eps": 1e-6, "rope_theta": 10_000.0, "window": window, "ring": ring,
        "steps": case["steps"], "banned": None, "least": None, "most": None,
    }  # fmt: skip
    stacked = ["qkv", "out", "gate_up", "down"]
    if vocab:
        integers = torch.randint(-1, vocab, (sessions, 4), generator=g, dtype=torch.int32)
        arguments |= {
            "head": weight(vocab, dim),
            "head_bias": normal(g, vocab, dtype=dtype) if case["bias"] else None,
            "embedding": normal(g, vocab, dim, dtype=dtype),
            "seeds": torch.randint(-(2**62), 2**62, (sessions,), generator=g),
            "positions": torch.randint(0, 3, (sessions,), generator=g),
            "temperature": torch.tensor([0.0, 0.7, 1.0])[torch.randint(3, (sessions,), generator=g)],
            "top_k": torch.randint(0, 4, (sessions,), generator=g, dtype=torch.int32),
            "top_p": torch.ones(sessions),
            "history": integers if case.get("filled") else (None, integers[:, :0], integers)[case["seed"] % 3],
            "banned": torch.randint(-1, vocab, (batch, 2), generator=g, dtype=torch.int32),
            "least": torch.randint(0, 4, (batch,), generator=g) if case["bias"] else None,
            "most": torch.randint(1, 5, (batch,), generator=g) if case["bias"] else None,
            "end": 1 if case["bias"] else -1,
            "stream": 2,
        }
        if case["bias"]:  # so that an end is wanted before it may come
            arguments["head_bias"][1] += 3.0
    if case["weights"] == "int8":
        for name in stacked + ["head"] * bool(vocab):
            numbers, scale = quantise.int8(arguments[name].flatten(0, -2))
            arguments[name] = numbers.view(arguments[name].shape)
            arguments[f"{name}_scale"] = scale.view(arguments[name].shape[:-1])
    return arguments


def _unwritten(cache: Tensor, lengths: Tensor) -> Tensor:
    """What no session has written yet holds infinity, which whoever reads it cannot hide."""
    written = torch.arange(cache.shape[2]) < lengths[:, None]
    return torch.where(written[None, :, :, None, None], cache, math.inf)


class _Oracle:
    """Entry by entry and position by position in fp64: a decoder, and nothing of phases, tiles or rounding."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.a = {**dict.fromkeys(("head", "history", "head_bias")), **arguments}
        a = self.a
        self.layers = [
            {name: dequantised(a[name][layer], _of(a.get(f"{name}_scale"), layer), None)
             for name in ("qkv", "out", "gate_up", "down")}
            for layer in range(len(a["qkv"]))
        ]  # fmt: skip
        self.k, self.v = a["k_cache"].double().clone(), a["v_cache"].double().clone()
        self.hidden = torch.zeros(a["x"].shape, dtype=torch.float64)
        steps = 0 if a["head"] is None else a["steps"]
        self.tokens = torch.full((len(a["x"]), steps), -1, dtype=torch.int64)
        self.clear = True

    def run(self) -> _Oracle:
        a = self.a
        head = None if a["head"] is None else dequantised(a["head"], a.get("head_scale"), None)
        for b, row in enumerate(a["rows"].tolist()):
            if row < 0:
                continue
            x, position = a["x"][b].double(), int(a["lengths"][row])
            past = [] if a["history"] is None else a["history"][row].tolist()
            for step in range(a["steps"]):
                for layer in range(len(self.layers)):
                    x = self._layer(x, layer, row, position + step)
                y = x if a["final_norm"] is None else self._norm(x, a["final_norm"])
                self.hidden[b] = y
                if head is None:
                    break
                logits = head @ y + (0 if a["head_bias"] is None else a["head_bias"].double())
                token = self._draw(logits, b, row, int(a["positions"][row]) + step, past)
                self.tokens[b, step] = token
                if token == a["end"]:
                    if step + 1 < a["steps"]:
                        self.hidden[b] = 0
                    break
                past = [*past[1:], token] if past else past
                x = a["embedding"][token].double()
        return self

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x @ x / len(x) + self.a["eps"]) ** 0.5 * weight.double()

    def _layer(self, x: Tensor, layer: int, row: int, position: int) -> Tensor:
        a, w = self.a, self.layers[layer]
        heads, kv_heads, dim, capacity = a["heads"], a["kv_heads"], self.k.shape[4], self.k.shape[2]
        y = w["qkv"] @ self._norm(x, a["input_norm"][layer])
        if a["qkv_bias"] is not None:
            y = y + a["qkv_bias"][layer].double()
        y = y.view(-1, dim)
        factor = torch.tensor([cmath.exp(1j * position * a["rope_theta"] ** (-2 * i / dim)) for i in range(dim // 2)])
        turned = torch.complex(y[:, : dim // 2], y[:, dim // 2 :]) * factor
        q, k = torch.cat([turned.real, turned.imag], dim=1)[: heads + kv_heads].split([heads, kv_heads])
        slot = position % capacity if a["ring"] else position
        self.k[layer, row, slot], self.v[layer, row, slot] = k, y[heads + kv_heads :]
        first = max(0, position + 1 - a["window"]) if a["window"] else 0
        slots = [p % capacity for p in range(first, position + 1)]
        seen = []
        for h in range(heads):
            keys, values = (c[layer, row, slots, h * kv_heads // heads] for c in (self.k, self.v))
            seen.append((keys @ q[h] / dim**0.5).softmax(dim=0) @ values)
        x = x + w["out"] @ torch.cat(seen)
        gate, up = (w["gate_up"] @ self._norm(x, a["post_norm"][layer])).view(-1, 2).unbind(1)
        return x + w["down"] @ (gate * torch.sigmoid(gate) * up)

    def _draw(self, logits: Tensor, b: int, row: int, position: int, past: list[int]) -> int:
        """Gumbel-max in Python numbers; notes where the choice was a close one."""
        a, values = self.a, dict(enumerate(logits.tolist()))
        off = set() if a["banned"] is None else set(a["banned"][b].tolist())
        if a["least"] is not None and position < a["least"][b]:
            off.add(a["end"])
        scale = max(abs(v) for v in values.values())
        values = {i: v for i, v in values.items() if i not in off}
        temperature, limit = float(a["temperature"][row]), int(a["top_k"][row])
        ranked = sorted(values, key=lambda i: -values[i])
        greedy = not temperature > 0
        kept = ranked[:1] if greedy else ranked[: limit or len(ranked)]
        if len(kept) < len(ranked):
            self._close(values[kept[-1]] - values[ranked[len(kept)]], scale)
        key = (int(a["seeds"][row]) % 2**32, int(a["seeds"][row]) >> 32 & 0xFFFFFFFF)

        def race(ids: list[int], word: int) -> int:
            scores = {}
            for i in ids:
                u = ((philox((position, 0, i, a["stream"]), key)[word] >> 9) + 0.5) / 2**23
                scores[i] = values[i] / (temperature or 1.0) - (0.0 if greedy else math.log(-math.log(u)))
            best, *others = sorted(scores, key=lambda i: -scores[i])
            if others:
                self._close((scores[best] - scores[others[0]]) * (temperature or 1.0), scale)
            return best

        token = race(kept, 0)
        if not greedy and past.count(token) >= 1:
            token = race([i for i in values if i != token], 1)
        return a["end"] if a["most"] is not None and position >= a["most"][b] else token

    def _close(self, gap: float, scale: float) -> None:
        self.clear &= gap > CLEAR * scale


def _of(scale: Tensor | None, layer: int) -> Tensor | None:
    return None if scale is None else scale[layer]


def oracle(**arguments: Any) -> tuple[Tensor, ...]:
    """See _Oracle; the counters are zero afterwards."""
    done = _Oracle(arguments).run()
    return done.hidden, done.tokens, done.k, done.v, torch.zeros(3)


def _equals_its_launches(case: Case) -> None:
    """One step is the five operations of each layer, and the last norm: same caches, same hidden state."""
    case = {**case, "vocab": 0, "steps": 1, "dtype": "float32"}
    a = make(case)
    k_cache, v_cache = a["k_cache"].clone(), a["v_cache"].clone()
    hidden, tokens = decoder_step(**a)
    assert tokens.shape == (case["batch"], 0) and not a["sync"].any()
    x, rows, ends = a["x"], a["rows"], a["lengths"] + 1
    for i in range(case["layers"]):

        def scale(name: str, i: int = i) -> dict[str, Tensor | None]:
            return {"weight_scale": _of(a.get(f"{name}_scale"), i)}

        q = rms_norm_qkv_rope_append(
            x, a["input_norm"][i], a["qkv"][i], _of(a["qkv_bias"], i), k_cache[i], v_cache[i], rows, a["lengths"],
            heads=a["heads"], kv_heads=a["kv_heads"], eps=a["eps"], rope_theta=a["rope_theta"], ring=a["ring"],
            **scale("qkv"),
        )  # fmt: skip
        parts, lse = streaming_attention(
            q[:, None], k_cache[i], v_cache[i], rows, ends, window=a["window"], ring=a["ring"], partials=2
        )
        x = merge_linear_residual(parts[:, :, 0], lse[:, :, 0], a["out"][i], x, rows, **scale("out"))
        inner = gate_up_swiglu(x, a["post_norm"][i], a["gate_up"][i], rows, eps=a["eps"], **scale("gate_up"))
        x = linear_residual(inner, a["down"][i], x, rows, **scale("down"))
    if a["final_norm"] is not None:
        x = rms_norm(x, a["final_norm"], rows, eps=a["eps"])
    torch.testing.assert_close(hidden, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["k_cache"], k_cache, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["v_cache"], v_cache, rtol=1e-4, atol=1e-5)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """Of a decoder with these sizes (layers, dim, ffn, heads, kv_heads, head_dim, capacity, vocab): all but the first
    token of a speech block where it speaks in blocks, otherwise a position without head and choice."""
    for batch in (1, 2, 4, 8):
        for weights in ("full", "int8"):
            base = {
                "dtype": "bfloat16", "weights": weights, "batch": batch, "layers": dims["layers"], "dim": dims["dim"],
                "heads": (dims["heads"], dims["kv_heads"]), "head_dim": dims["head_dim"], "ffn": dims["ffn"],
                "norm": True, "bias": True, "form": "linear", "capacity": dims["capacity"], "seed": 0,
            }  # fmt: skip
            block = dims.get("speech_block", 1)
            yield {**base, "vocab": dims["vocab"] if block > 1 else 0, "steps": max(1, block - 1)}


def moved_bytes(case: Case) -> int:
    heads, kv_heads = case["heads"]
    dim, width, ffn = case["dim"], heads * case["head_dim"], case["ffn"]
    packed = width + 2 * kv_heads * case["head_dim"]
    size = getattr(torch, case["dtype"]).itemsize

    def weight(outputs: int, inputs: int) -> int:
        return outputs * (inputs + 4) if case["weights"] == "int8" else size * outputs * inputs

    layer = weight(packed, dim) + weight(dim, width) + weight(2 * ffn, dim) + weight(dim, ffn) + size * 2 * dim
    context = case.get("capacity", 9) - case["steps"]
    cached = case["batch"] * 2 * kv_heads * case["head_dim"] * size * context
    head = weight(case["vocab"], dim) + size * case["batch"] * case["vocab"]
    return case["steps"] * (case["layers"] * (layer + cached) + head)


def flops(case: Case) -> int:
    heads, kv_heads = case["heads"]
    width = heads * case["head_dim"]
    layer = case["dim"] * (2 * width + 2 * kv_heads * case["head_dim"] + 3 * case["ffn"])
    attended = 2 * width * (case.get("capacity", 9) - case["steps"])
    whole = case["layers"] * (layer + attended) + case["dim"] * case["vocab"]
    return 2 * case["steps"] * case["batch"] * whole


SPEC = OpSpec(
    name="decoder_step",
    function=decoder_step,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    mutates=("k_cache", "v_cache", "sync"),
    variants=({"layers": 1, "vocab": 0, "steps": 1, "heads": (7, 1), "head_dim": 128, "norm": False, "form": "ring"},),
    batched=("x", "rows", "banned", "least", "most"),
    dtypes=("float16", "bfloat16"),
    cost=12,
    invariants={"equals its launches": _equals_its_launches},
)
