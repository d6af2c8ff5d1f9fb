"""The five decode operations composed over a layer equal the backbone's step."""

from __future__ import annotations

import pytest
import torch

import minmo_kernels as mk
from minmo.config import BackboneConfig
from minmo.modules.backbone import Backbone

CONFIG = BackboneConfig(dim=48, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=40, rope_theta=1e4)


def decode_step(model, x, state, rows, partials):
    """x (batch, dim), one position a session -> hidden (batch, dim): five operations a layer and the final norm."""
    c = model.config
    ends = state.lengths.clone()
    ends[rows[rows >= 0].long()] += 1
    for layer, cache in zip(model.layers, state.layers, strict=True):
        q = mk.rms_norm_qkv_rope_append(
            x, layer.input_norm.weight, layer.qkv.weight, layer.qkv.bias, cache.k, cache.v, rows, state.lengths,
            heads=c.heads, kv_heads=c.kv_heads, eps=c.norm_eps, rope_theta=c.rope_theta,
        )  # fmt: skip
        parts, lse = mk.streaming_attention(q[:, None], cache.k, cache.v, rows, ends, partials=partials)
        x = mk.merge_linear_residual(parts[:, :, 0], lse[:, :, 0], layer.o.weight, x, rows)
        inner = mk.gate_up_swiglu(x, layer.post_norm.weight, layer.gate_up.weight, rows, eps=c.norm_eps)
        x = mk.linear_residual(inner, layer.down.weight, x, rows)
    state.lengths.copy_(ends)
    return mk.rms_norm(x, model.norm.weight, rows, eps=c.norm_eps)


@pytest.mark.parametrize("partials", [1, 3, 8])
@torch.no_grad()
def test_five_operations_equal_the_backbone_step(partials):
    """Sessions of different length, padding entries holding NaN, caches NaN where nothing was written."""
    torch.manual_seed(partials)
    model = Backbone(CONFIG)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    rows = torch.tensor([3, -1, 0, 4, -1], dtype=torch.int32)
    states = [model.initial_state(5, 16) for _ in range(2)]
    prefix, lengths = torch.randn(5, 7, CONFIG.dim), torch.tensor([7, 5, 2, 0, 3], dtype=torch.int32)
    for state in states:
        for cache in state.layers:
            cache.k.fill_(torch.nan)
            cache.v.fill_(torch.nan)
        model.step(prefix, lengths, state, rows)
    for _ in range(4):
        x = torch.randn(5, CONFIG.dim)
        x[rows < 0] = torch.nan
        expected, _, _ = model.step(x[:, None], torch.ones(5, dtype=torch.int32), states[0], rows)
        actual = decode_step(model, x, states[1], rows, partials)
        torch.testing.assert_close(actual, expected[:, 0], rtol=1e-4, atol=1e-5)
        assert not actual[rows < 0].any()
    assert torch.equal(states[0].lengths, states[1].lengths)
    for one, other in zip(states[0].layers, states[1].layers, strict=True):
        torch.testing.assert_close(one.k, other.k, rtol=1e-4, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(one.v, other.v, rtol=1e-4, atol=1e-5, equal_nan=True)
