"""FastMinMo: packed layers compute what their weights say, and the parts what the readable model's compute."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import minmo
from minmo.conversation.session import Session
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
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


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
    """Prefill, single positions, logits and duplex decisions of both, step by step, on words that the model knows: of
    what it never saw it thinks nothing definite, and an error relative to that says little."""
    fast = minmo.FastMinMo(readable, weights=weights, keep_model=True)
    said = ("what is five plus three five plus three is", "forty two minus seven is thirty five tell me")
    ids = torch.tensor([readable.tokenizer.encode(text)[:9] for text in said])
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


def test_a_model_gives_its_weights_up_once(tmp_path):
    model = minmo.load("nano", device="cpu")
    fast = minmo.FastMinMo(model)
    assert fast.weights == "fp32" and fast.tokenizer is model.tokenizer and fast.provenance == model.provenance
    with pytest.raises(AttributeError, match="given to a FastMinMo"):
        model.llm(torch.zeros(1, 1, 4))
    for without in (model, minmo.FastMinMo(minmo.load("nano", device="cpu"), weights="int8")):
        with pytest.raises(minmo.CheckpointError, match="packed, or were given"):
            minmo.save(without, tmp_path)
    assert not list(tmp_path.iterdir())
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


QUIET = minmo.Settings(max_text_tokens=4, max_speech_ratio=4, seed=3)


@pytest.fixture(scope="module")
def engine(readable):
    return minmo.FastMinMo(readable, rows=3, max_positions=300, max_voice_positions=500, keep_model=True)


def test_a_session_in_an_engine_answers_like_the_readable_model(readable, engine):
    """Text and sound of a typed turn; a second session, in other rows and of other calls, changes nothing."""
    expected = minmo.ask(readable, "seven", replace(QUIET, speak=True))
    busy = Session(engine, 2, replace(QUIET, seed=9), 100)
    busy.read([[5, 6, 7], [8]])
    actual = minmo.ask(engine, "seven", replace(QUIET, speak=True))
    alone = engine_alone(readable)
    assert actual.text == expected.text
    assert np.array_equal(actual.audio, alone.audio)
    assert len(actual.audio) == len(expected.audio)
    assert np.abs(actual.audio - expected.audio).max() < 1e-3 * np.abs(expected.audio).max() + 1e-6
    busy.close()


def engine_alone(readable):
    fast = minmo.FastMinMo(readable, rows=3, max_positions=300, max_voice_positions=500, keep_model=True)
    holder = Session(fast, 2, QUIET, 100)  # the same rows are free
    reply = minmo.ask(fast, "seven", replace(QUIET, speak=True))
    holder.close()
    return reply


@torch.no_grad()
def test_rows_join_and_leave_out_of_step(engine):
    """Whatever the other rows do, a session's states are bit for bit the same; a row that is free again is new."""
    x = torch.randn(6, 1, 1, engine.config.llm.dim)

    def run(others):
        others_seats = engine.join(1, 50, 50)
        seats = engine.join(1, 50, 50)
        found = []
        for i in range(6):
            if others and i in (1, 2, 4):
                step = torch.full((1, 1, engine.config.llm.dim), torch.nan if i == 4 else float(i))
                engine.llm.step(step, torch.ones(1, dtype=torch.int32), others_seats.state.llm, others_seats.rows)
            hidden, _, _ = engine.llm.step(x[i], torch.ones(1, dtype=torch.int32), seats.state.llm, seats.rows)
            found.append(hidden)
        others_seats.leave()
        seats.leave()
        return torch.cat(found)

    assert torch.equal(run(False), run(True))
    seats = engine.join(3, 1, 1)
    assert not seats.state.llm.lengths.any()
    seats.leave()


def test_what_does_not_fit_an_engine_is_refused(engine):
    seats = engine.join(2, 10, 10)
    with pytest.raises(ValueError, match="2 of 3 rows are taken.*more rows"):
        engine.join(2, 10, 10)
    with pytest.raises(ValueError, match="max_positions 301, the FastMinMo was made with 300"):
        engine.join(1, 301, 10)
    with pytest.raises(ValueError, match="max_voice_positions 501"):
        engine.join(1, 10, 501)
    with ThreadPoolExecutor(1) as other:
        for call in (lambda: seats.state, lambda: engine.join(1, 1, 1)):
            with pytest.raises(RuntimeError, match="one thread"):
                other.submit(call).result()
    assert seats.state is not None  # and nothing was harmed
    seats.leave()
    with pytest.raises(ValueError, match="has left"):
        _ = seats.state
    engine.join(3, 10, 10)  # not held: free at once
    engine.join(3, 10, 10).leave()
    for name in ("rows", "max_positions", "max_voice_positions"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            minmo.FastMinMo(minmo.load("nano"), **{name: 0})


def test_what_does_not_fit_or_is_no_model_leaves_the_model_as_it_was():
    model = minmo.load("nano", device="cpu")
    with pytest.raises(ValueError, match="GB are free: lower rows"):
        minmo.FastMinMo(model, rows=4096, max_positions=1 << 22)
    with pytest.raises(ValueError, match="rows must be a whole number from 1 to 4096"):
        minmo.FastMinMo(model, rows=10**30)
    with pytest.raises(ValueError, match="made from a MinMo .minmo.load., got str"):
        minmo.FastMinMo("nano")
    with pytest.raises(TypeError, match="row_count"):
        minmo.FastMinMo.from_pretrained("a directory that nobody looks at", row_count=1)
    fast = minmo.FastMinMo(model, rows=1, max_positions=40, max_voice_positions=100, prefill=10**6)
    assert fast.prefill == 40


def test_a_stream_survives_another_threads_call(readable):
    fast = minmo.FastMinMo(readable, rows=2, max_positions=100, max_voice_positions=300, keep_model=True)
    heard = [minmo.VoiceInput(np.full(4000, 1e-3, np.float32), 0.0)]
    outputs = minmo.full_duplex(fast, heard, replace(QUIET, max_text_tokens=8), threshold=1.0)
    first = next(outputs)
    with ThreadPoolExecutor(1) as other:
        for call in (lambda: next(outputs), outputs.close):
            with pytest.raises(RuntimeError, match="one thread"):
                other.submit(call).result()
    rest = list(outputs)
    assert not first.final and rest[-1].final
    fast.join(2, 10, 10).leave()  # the rows are free
