"""A decode layer of five launches: beside the readable layer, and under torch.compile without a graph break."""

from __future__ import annotations

import pytest
import torch

import minmo_kernels as mk
from minmo.config import load_config
from minmo.modules.backbone import DecoderLayer, layer_cache

ROWS = torch.tensor([2, -1, 0], dtype=torch.int32)


def decode(x, layer, k, v, starts, ends, partials=3):
    """One position a session through `layer` -> (batch, dim); k and v are written."""
    config, eps = layer.config, layer.config.norm_eps
    q = mk.rms_norm_qkv_rope_append(
        x, layer.input_norm.weight, layer.qkv.weight, layer.qkv.bias, k, v, ROWS, starts,
        heads=config.heads, kv_heads=config.kv_heads, eps=eps, rope_theta=config.rope_theta,
    )  # fmt: skip
    parts, lse = mk.streaming_attention(q[:, None], k, v, ROWS, ends, partials=partials)
    x = mk.merge_linear_residual(parts[:, :, 0], lse[:, :, 0], layer.o.weight, x, ROWS)
    h = mk.gate_up_swiglu(x, layer.post_norm.weight, layer.gate_up.weight, ROWS, eps=eps)
    return mk.linear_residual(h, layer.down.weight, x, ROWS)


@pytest.fixture
def setting():
    torch.manual_seed(0)
    config = load_config("nano").llm
    layer = DecoderLayer(config).requires_grad_(False)
    x = torch.randn(3, config.dim)
    cache = layer_cache(config, 3, 8, x)
    cache.k.normal_()
    cache.v.normal_()
    starts = torch.tensor([4, 0, 7], dtype=torch.int32)
    return layer, x, cache, starts, starts + 1


def test_five_launches_are_the_readable_layer(setting):
    layer, x, cache, starts, ends = setting
    k, v = cache.k.clone(), cache.v.clone()
    fused = decode(x, layer, k, v, starts, ends)
    lengths = (ROWS >= 0).to(torch.int32)
    plain = layer(x[:, None], lengths, cache, ROWS, starts, ends)[:, 0]
    torch.testing.assert_close(fused[ROWS >= 0], plain[ROWS >= 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k, cache.k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v, cache.v, rtol=1e-4, atol=1e-5)
    assert not fused[ROWS < 0].any()


def test_a_layer_compiles_without_a_graph_break(setting):
    layer, x, cache, starts, ends = setting
    k, v = cache.k.clone(), cache.v.clone()
    eager = decode(x, layer, k, v, starts, ends)
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(x, layer, cache.k, cache.v, starts, ends)
    assert torch.equal(out, eager)
    assert torch.equal(cache.k, k)
    assert torch.equal(cache.v, v)
