"""Decode layers of five launches: beside the readable backbone, counted, compiled and, on a GPU, replayed as a graph.

With TRITON_INTERPRET=1 or on a GPU every operation is its Triton kernel; elsewhere the references are composed.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

import minmo_kernels as mk
from minmo.config import BackboneConfig
from minmo.modules.backbone import Backbone
from minmo_kernels import launch
from minmo_kernels.ops.mix_semantic_speech.spec import SPEC as MIX
from minmo_kernels.ops.sample_token.spec import SPEC as SAMPLE

CONFIG = BackboneConfig(dim=48, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=40, rope_theta=1e4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = torch.tensor([3, -1, 0, 4, -1], dtype=torch.int32, device=DEVICE)


def kernels():
    """Forces Triton where it runs."""
    return mk.use_backend("triton") if launch.INTERPRETING or DEVICE == "cuda" else contextlib.nullcontext()


def decode(model, x, state, rows, ends, partials):
    """x (batch, dim), one position a session -> hidden (batch, dim): five operations a layer and the final norm. ends
    (sessions,): lengths with the new position. Writes the caches, not the lengths."""
    c = model.config
    for layer, cache in zip(model.layers, state.layers, strict=True):
        q = mk.rms_norm_qkv_rope_append(
            x, layer.input_norm.weight, layer.qkv.weight, layer.qkv.bias, cache.k, cache.v, rows, state.lengths,
            heads=c.heads, kv_heads=c.kv_heads, eps=c.norm_eps, rope_theta=c.rope_theta,
        )  # fmt: skip
        parts, lse = mk.streaming_attention(q[:, None], cache.k, cache.v, rows, ends, partials=partials)
        x = mk.merge_linear_residual(parts[:, :, 0], lse[:, :, 0], layer.o.weight, x, rows)
        inner = mk.gate_up_swiglu(x, layer.post_norm.weight, layer.gate_up.weight, rows, eps=c.norm_eps)
        x = mk.linear_residual(inner, layer.down.weight, x, rows)
    return mk.rms_norm(x, model.norm.weight, rows, eps=c.norm_eps)


def advanced(lengths, rows):
    ends = lengths.clone()
    ends[rows[rows >= 0].long()] += 1
    return ends


def backbone(seed, dtype=torch.float32):
    """A model with random weights, and two equal states of five sessions of different lengths, NaN where nothing was
    written."""
    torch.manual_seed(seed)
    model = Backbone(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    model = model.to(DEVICE, dtype)
    states = [model.initial_state(5, 16) for _ in range(2)]
    lengths = torch.tensor([7, 5, 2, 0, 3], dtype=torch.int32, device=DEVICE)
    prefix = torch.randn(5, 7, CONFIG.dim).to(DEVICE, dtype)
    for state in states:
        for cache in state.layers:
            cache.k.fill_(torch.nan)
            cache.v.fill_(torch.nan)
        model.step(prefix, lengths, state, ROWS)
    return model, states


@pytest.mark.parametrize("partials", [1, 3, 8])
@torch.no_grad()
def test_five_operations_equal_the_backbone_step(partials):
    model, states = backbone(partials)
    for _ in range(2):
        x = torch.randn(5, CONFIG.dim).to(DEVICE)
        x[ROWS < 0] = torch.nan
        expected, _, _ = model.step(x[:, None], torch.ones_like(ROWS), states[0], ROWS)
        ends = advanced(states[1].lengths, ROWS)
        with kernels():
            actual = decode(model, x, states[1], ROWS, ends, partials)
        states[1].lengths.copy_(ends)
        torch.testing.assert_close(actual, expected[:, 0], rtol=1e-4, atol=1e-5)
        assert not actual[ROWS < 0].any()
    assert torch.equal(states[0].lengths, states[1].lengths)
    for one, other in zip(states[0].layers, states[1].layers, strict=True):
        torch.testing.assert_close(one.k, other.k, rtol=1e-4, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(one.v, other.v, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize("batch,a_layer", [(1, 5), (2, 5), (5, 6)])
def test_the_launches_of_a_token(batch, a_layer):
    """Input slots, layers, norm, head, choice. From three rows on the parts of attention are merged by a launch."""
    vocab = 100
    with torch.device("meta"):
        model = Backbone(CONFIG)
        state = model.initial_state(batch, 16)
        rows, ends = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
        head = torch.empty(vocab, CONFIG.dim)
    mix = {
        "dtype": "float32", "batch": batch, "query": 0, "text": 5, "speech": 1, "ratio": (5, 15), "form": "decoding",
        "dims": (CONFIG.dim, 64, 64), "hidden_first": True, "ids": "int32", "filled": True, "seed": 0,
    }  # fmt: skip
    sample = {
        "dtype": "float32", "batch": batch, "vocab": vocab, "history": 10, "limit": 1, "banned": 2, "stream": 0,
        "seed": 0,
    }  # fmt: skip
    slots, settings = (
        {k: on_meta(v) for k, v in spec.make(case).items()} for spec, case in ((MIX, mix), (SAMPLE, sample))
    )
    with launch.recording(90) as records, mk.use_backend("triton"), torch.no_grad():
        inputs, _ = mk.mix_semantic_speech(**slots)
        x = decode(model, inputs[:, 0].contiguous(), state, rows, ends, partials=8)
        logits = mk.linear_residual(x, head, None, rows)
        mk.sample_token(**{**settings, "logits": logits})
    assert len(records) == a_layer * CONFIG.layers + 4, [record.name for record in records]


def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def test_a_layer_compiles_without_a_graph_break():
    model, (one, other) = backbone(0)
    x = torch.randn(5, CONFIG.dim).to(DEVICE)
    ends = advanced(one.lengths, ROWS)
    eager = decode(model, x, one, ROWS, ends, 3)
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(model, x, other, ROWS, ends, 3), eager)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.k.nan_to_num(7.0), b.k.nan_to_num(7.0))
        assert torch.equal(a.v.nan_to_num(7.0), b.v.nan_to_num(7.0))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@torch.no_grad()
def test_a_replayed_graph_is_the_eager_step():
    """Captured right after `warmup`, without an eager call before: nothing is left to compile or to copy."""
    model, (one, other) = backbone(0, torch.bfloat16)
    x = torch.randn(5, CONFIG.dim).to(DEVICE, torch.bfloat16)
    ends = advanced(one.lengths, ROWS)
    arguments = {"model": model, "x": x, "state": one, "rows": ROWS, "ends": ends, "partials": 8}
    shapes = replace_tensors(arguments)
    mk.warmup([(decode, shapes)])
    graph = torch.cuda.CUDAGraph()
    with mk.strict(), mk.use_backend("triton"), torch.cuda.graph(graph):
        replayed = decode(**arguments)
    graph.replay()
    with kernels():
        eager = decode(model, x, other, ROWS, ends, 8)
    assert torch.equal(replayed, eager)


def replace_tensors(arguments):
    """The same call on the meta device."""
    model, state = Backbone(CONFIG).to("meta", arguments["x"].dtype), arguments["state"]
    cache = replace(state.cache, k=on_meta(state.cache.k), v=on_meta(state.cache.v))
    state = replace(state, cache=cache, lengths=on_meta(state.lengths))
    return {**{k: on_meta(v) for k, v in arguments.items()}, "model": model, "state": state}
