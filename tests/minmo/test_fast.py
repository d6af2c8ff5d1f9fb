"""FastMinMo: packed layers compute what their weights say, and the parts what the readable model's compute."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import minmo
from minmo.fast.linear import (
    INT4_GROUP,
    MOST_INT8_ROWS,
    SMALLEST_REORDERED,
    WEIGHTS,
    Int4Linear,
    Int8Linear,
    KernelLinear,
    ReorderedLinear,
    activations,
    packed,
)
from minmo.state import all_rows, full_lengths
from minmo_kernels import quantise

BF16 = torch.finfo(torch.bfloat16).eps


def linear(inputs, outputs, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return layer


def meant(layer, weights):
    """The weight that a format stores, in fp64."""
    weight = layer.weight
    if weights in ("int8", "int4") and layer.in_features % INT4_GROUP:
        weights = "bf16"
    if weights == "int8":
        numbers, scale = quantise.int8(weight, torch.bfloat16)
        return numbers.double() * scale.double()[:, None]
    if weights == "int4":
        numbers, scale, zero = quantise.int4(weight.bfloat16(), INT4_GROUP)
        return (
            (numbers.double().unflatten(1, (-1, INT4_GROUP)) - zero.double()[..., None]) * scale.double()[..., None]
        ).flatten(1)
    return weight.to(activations(weights)).double()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(WEIGHTS),
    st.sampled_from([3, 32, 40, 64, 192]),
    st.sampled_from([1, 2, 16, 50, 70]),
    st.sampled_from([(1,), (0,), (1, 1), (2, 3), (MOST_INT8_ROWS,), (MOST_INT8_ROWS + 1,), (2, 0), (3, 30)]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_a_packed_layer_computes_what_its_weight_says(weights, inputs, outputs, shape, bias, seed):
    torch.manual_seed(seed)
    layer = linear(inputs, outputs, bias)
    x = torch.randn(*shape, inputs).to(activations(weights))
    exact = x.double() @ meant(layer, weights).T
    exact = exact if layer.bias is None else exact + layer.bias.to(x.dtype).double()
    y = packed(copy.deepcopy(layer), weights)(x)
    assert y.dtype == x.dtype and y.shape == exact.shape
    if y.numel():
        # Products in bf16 are rounded, then the bias is added and rounded again; int4's offsets are rounded, too.
        size = x.double().abs() @ meant(layer, weights).abs().T
        bound = 1e-5 if weights == "fp32" else 3 * BF16
        assert ((y.double() - exact).abs() <= bound * (size + 1)).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_format_has_its_layer(weights):
    torch.manual_seed(0)
    layer = linear(512, 528)
    assert layer.weight.numel() >= SMALLEST_REORDERED
    kind = {"int8": Int8Linear, "int4": Int4Linear}.get(weights, ReorderedLinear)
    if kind is ReorderedLinear and not torch.backends.mkldnn.is_available():
        kind = nn.Linear
    own = packed(copy.deepcopy(layer), weights)
    assert type(own) is kind or (weights == "bf16" and type(own) is nn.Linear)  # a CPU without bf16
    for rows in (1, 3, 40):
        x = torch.randn(rows, 512)
        torch.testing.assert_close(
            own(x.to(activations(weights))).float(), layer(x), rtol=0.1,
            atol={"fp32": 1e-5, "bf16": 0.02, "int8": 0.03, "int4": 0.3}[weights],
        )  # fmt: skip


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_layer_of_a_gpu_stores_the_same_numbers(weights):
    """Its operation runs here on the reference, over more rows than one call takes."""
    torch.manual_seed(0)
    layer = linear(64, 48)
    x = torch.randn(2, 35, 64).bfloat16()
    y = KernelLinear(layer, weights)(x)
    torch.testing.assert_close(y, packed(copy.deepcopy(layer), weights)(x), rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def readable():
    return minmo.load("nano", device="cpu")


@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_steps_equal_the_readable_ones(readable, weights):
    """One shot of the readable LLM against prefill and single positions of the fast one, and the duplex predictor."""
    fast = minmo.FastMinMo(readable, weights=weights, keep_model=True)
    torch.manual_seed(1)
    ids = torch.randint(0, readable.config.llm.vocab, (2, 9))
    rows = all_rows(2)
    states = [model.initial_state(2, 16, 16) for model in (readable, fast)]
    outs = []
    for model, state in zip((readable, fast), states, strict=True):
        pieces = []
        for piece in model.llm.embed(ids).split([6, 1, 1, 1], dim=1):
            hidden, lengths, _ = model.llm.step(piece, full_lengths(piece), state.llm, rows)
            logits, _, _ = model.duplex.step(hidden, lengths, state.duplex, rows)
            pieces.append((hidden, model.llm.logits(hidden), logits))
        outs.append([torch.cat(part, dim=1).float() for part in zip(*pieces, strict=True)])
    for own, theirs in zip(outs[1], outs[0], strict=True):
        error = ((own - theirs).norm() / theirs.norm()).item()
        assert error < {"fp32": 1e-5, "bf16": 0.03, "int8": 0.05, "int4": 0.4}[weights]
    assert torch.equal(states[0].llm.lengths, states[1].llm.lengths)


@torch.no_grad()
def test_the_voice_decoder_gives_the_same_logits(readable):
    fast = minmo.FastMinMo(readable, weights="fp32", keep_model=True)
    torch.manual_seed(2)
    c = readable.config.voice_decoder
    hidden, embedding = torch.randn(2, 12, c.llm_dim), torch.randn(2, 12, c.llm_dim)
    speech = torch.randint(0, c.codes, (2, 40))
    arguments = (
        hidden, embedding, torch.tensor([4, 0], dtype=torch.int32), torch.tensor([8, 12], dtype=torch.int32), speech,
        torch.tensor([40, 38], dtype=torch.int32),
    )  # fmt: skip
    torch.testing.assert_close(
        fast.voice_decoder.forced(*arguments), readable.voice_decoder.forced(*arguments), rtol=1e-3, atol=1e-4
    )


def test_a_model_gives_its_weights_up_once():
    model = minmo.load("nano", device="cpu")
    fast = minmo.FastMinMo(model)
    assert fast.weights == "fp32" and fast.tokenizer is model.tokenizer and fast.provenance == model.provenance
    with pytest.raises(AttributeError, match="given to a FastMinMo"):
        model.llm(torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="already"):
        minmo.FastMinMo(fast)
    with pytest.raises(ValueError, match="given to a FastMinMo"):
        minmo.FastMinMo(model)


def test_what_cannot_be_served_is_refused(readable):
    with pytest.raises(ValueError, match="fp32, bf16, int8, int4, got 'int2'"):
        minmo.FastMinMo(readable, weights="int2")
    with pytest.raises(ValueError, match="shapes only"):
        minmo.FastMinMo(minmo.load("nano", device="meta"))
    assert readable.llm is not None
