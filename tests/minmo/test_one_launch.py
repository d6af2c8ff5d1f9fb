"""Decoders' steps as single launches: the same numbers, chosen by what was measured, and what follows a fault."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import minmo
import minmo_kernels as mk
from minmo.config import BackboneConfig, DuplexConfig, VoiceDecoderConfig, load_config
from minmo.fast import engine as engine_module
from minmo.fast import one_launch
from minmo.fast.graphs import replay
from minmo.fast.layer import GPULayer
from minmo.model import shapes
from minmo.modules.backbone import Backbone
from minmo.modules.duplex import DuplexPredictor
from minmo.modules.voice_decoder import VoiceDecoder, VoiceDecoderState
from minmo.state import State, unlooking
from minmo_kernels import launch

LM = BackboneConfig(dim=32, layers=2, heads=2, kv_heads=1, head_dim=64, ffn=40)
VOICE = VoiceDecoderConfig(lm=LM, llm_dim=16, codes=20, vocab=23, end_of_speech=20, fill=22)
DUPLEX = DuplexConfig(
    input_dim=16, window=9, layer=BackboneConfig(dim=32, layers=1, heads=2, kv_heads=1, head_dim=64, ffn=40)
)


class StandIn:
    """A graph's place: runs the call again into the first outputs, without a look at what is computed."""

    def __call__(self, call):
        with unlooking():
            outputs = call()

        def again():
            with unlooking():
                for own, new in zip(tensors(outputs), tensors(call()), strict=True):
                    own.copy_(new)

        return again, outputs


def tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for o in outputs for t in tensors(o)] if isinstance(outputs, tuple) else []


def made(kind, config, seed=0):
    """A part with random weights and a GPU's layers."""
    torch.manual_seed(seed)
    part = kind(config).requires_grad_(False)
    for parameter in part.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2) + (parameter.dim() == 1))
    for owner, name in ((getattr(part, "lm", part), "layers"), (part, "layer")):
        if isinstance(layer := getattr(owner, name, None), torch.nn.ModuleList):
            setattr(owner, name, torch.nn.ModuleList(GPULayer(one, "fp32") for one in layer))
        elif layer is not None:
            setattr(owner, name, GPULayer(layer, "fp32"))
    return part.eval()


def launched_once(step, graphed, rows=(1, 2, 4, 8), limits=one_launch.DEFAULT):
    """Puts single launches in a step's place; `graphed`: with graphs, played."""
    if graphed:
        replay(step.part, step.method, step.state, StandIn(), 8, step.fits)
    return one_launch.put(step, step.build(step.part, limits), frozenset(rows))


def backbone_step(part, state):
    fits, build = one_launch.one_position, one_launch.in_backbone
    return one_launch.Step("LLM", part, "step", state, build, fits, tuple)


def voice_step(part, state):
    build = one_launch.in_voice_decoder
    return one_launch.Step("speech block", part, "_round", state, build, one_launch.always, tuple)


@pytest.mark.parametrize("graphed", [False, True])
@torch.no_grad()
def test_a_backbone_steps_in_one_launch_as_by_its_layers(graphed, monkeypatch):
    plain, other = made(Backbone, LM), made(Backbone, LM)
    states = [part.initial_state(4, 12) for part in (plain, other)]
    launched_once(backbone_step(other, states[1]), graphed, limits=one_launch.Limits(0.3, 77))
    calls, whole = [], mk.decoder_step
    monkeypatch.setattr(mk, "decoder_step", lambda *a, **k: calls.append(k) or whole(*a, **k))
    rows = torch.tensor([2, -1, 0], dtype=torch.int32)
    for width in (3, 1, 1, 2, 1):
        x, lengths = torch.randn(3, width, LM.dim), torch.tensor([width, width, width], dtype=torch.int32)
        expected, actual = (
            part.step(x, lengths, state, rows)[0] for part, state in zip((plain, other), states, strict=True)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(states[0].lengths, states[1].lengths)
    for one, another in zip(states[0].layers, states[1].layers, strict=True):
        torch.testing.assert_close(one.k, another.k, rtol=1e-4, atol=1e-5)
    assert len(calls) >= 3, "single positions went in one launch"
    assert all((k["share"], k["spins"]) == (0.3, 77) for k in calls)
    assert other.layers[1].qkv.weight.untyped_storage().data_ptr() == (
        other.layers[0].qkv.weight.untyped_storage().data_ptr()
    ), "both ways share one memory"


@torch.no_grad()
def test_more_rows_other_states_and_forced_backends_go_layer_by_layer(monkeypatch):
    part = made(Backbone, LM)
    state, foreign = part.initial_state(9, 4), part.initial_state(1, 4)
    launched_once(backbone_step(part, state), False, rows=(1,))
    monkeypatch.setattr(mk, "decoder_step", lambda *a, **k: pytest.fail("a single launch"))
    for batch, own in ((9, state), (2, state), (1, foreign)):
        x, one = torch.randn(batch, 1, LM.dim), torch.ones(batch, dtype=torch.int32)
        part.step(x, one, own, torch.arange(batch, dtype=torch.int32))
    x, one = torch.randn(1, 1, LM.dim), torch.ones(1, dtype=torch.int32)
    with mk.use_backend("reference"):
        part.step(x, one, state, one - 1)


@pytest.mark.parametrize("graphed", [False, True])
@torch.no_grad()
def test_a_speech_block_is_one_launch_after_its_first_token(graphed):
    plain, other = made(VoiceDecoder, VOICE, 3), made(VoiceDecoder, VOICE, 3)
    states = [part.initial_state(4, 120) for part in (plain, other)]
    launched_once(voice_step(other, states[1]), graphed)
    rows = torch.tensor([1, 3, -1, 0], dtype=torch.int32)
    seeds = torch.tensor([5, 6, 0, 8])
    g, told, ended = torch.Generator().manual_seed(1), 0, 0
    for part, state in zip((plain, other), states, strict=True):
        part.start(state, rows, seeds, min_ratio=1.0, max_ratio=torch.tensor([4.0, 5.0, 1.0, 4.2]))
    for final in (False, False, True, True, True):
        n = 0 if told >= 12 else (5, 5, 2)[told // 5]
        told += n
        x = [torch.randn(4, n, VOICE.llm_dim, generator=g) for _ in range(2)]
        lengths, end = torch.full((4,), n, dtype=torch.int32), torch.full((4,), final)
        expected, actual = (
            part.step(x, lengths, state, rows, end)[:2] for part, state in zip((plain, other), states, strict=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)), "the same tokens"
        ended += int(states[0].finished.sum())
    assert ended, "a reply ended within a block"
    same(states[0], states[1])


def same(one: State, other: State) -> None:
    for field in fields(VoiceDecoderState):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
    assert torch.equal(one.lm.lengths, other.lm.lengths)


@torch.no_grad()
def test_the_predictor_decides_in_one_launch():
    plain, other = made(DuplexPredictor, DUPLEX), made(DuplexPredictor, DUPLEX)
    states = [part.initial_state(2) for part in (plain, other)]
    build, fits = one_launch.in_predictor, one_launch.one_position
    launched_once(one_launch.Step("predictor", other, "step", states[1], build, fits, tuple), True)
    rows, one = torch.tensor([1, 0], dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    for _ in range(45):  # around the ring
        x = torch.randn(2, 1, 16)
        expected, actual = (p.step(x, one, s, rows)[0] for p, s in zip((plain, other), states, strict=True))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LLM", "speech block"])
@torch.no_grad()
def test_after_a_fault_the_step_is_done_again_layer_by_layer(kind, monkeypatch, caplog):
    """The launch that gives up has spoilt what it could: outputs, caches beyond the lengths, the state's numbers."""
    torch.manual_seed(0)
    config, cls = (LM, Backbone) if kind == "LLM" else (VOICE, VoiceDecoder)
    plain, other = made(cls, config, 3), made(cls, config, 3)
    states = [part.initial_state(2, 60) if kind == "LLM" else part.initial_state(2, 60) for part in (plain, other)]
    one = launched_once((backbone_step if kind == "LLM" else voice_step)(other, states[1]), True)
    whole, calls = mk.decoder_step, []

    def gives_up(*arguments, **named):
        hidden, tokens = whole(*arguments, **named)
        calls.append(1)
        named["sync"][2] = 8
        return hidden * torch.nan, tokens.clamp(max=0)

    monkeypatch.setattr(mk, "decoder_step", gives_up)
    rows, count = torch.tensor([1, 0], dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    more = torch.zeros(2, dtype=torch.bool)
    if kind != "LLM":
        for part, state in zip((plain, other), states, strict=True):
            part.start(state, rows, torch.tensor([5, 6]))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            x = torch.randn(2, 1, LM.dim) if kind == "LLM" else torch.randn(2, 5, VOICE.llm_dim)
            results = []
            for part, state in zip((plain, other), states, strict=True):
                if kind == "LLM":
                    results.append(part.step(x, count, state, rows)[0])
                else:
                    results.append(part.step((x, x), count * 5, state, rows, more)[0])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert one.failed and len(caplog.records) == 1
    assert "waited in vain at instruction 7" in caplog.records[0].message
    assert not one._stack.sync.any()
    assert len(calls) <= 3, "once, or as often as a played capture runs it"
    if kind == "LLM":
        assert states[1].lengths.tolist() == [3, 3]
    else:
        same(states[0], states[1])


def test_a_results_file_decides(tmp_path):
    part = made(Backbone, LM)

    def found(weights="bf16", share=1.0):
        return one_launch.verdict("Some GPU", "LLM", part, 1, weights, share, tmp_path)

    def line(**changes):
        entry = {"seconds": 1.0, "layers": 1.5, "wrong": 0, "faults": 0, "replays": 10_000, "share": 1.0}
        entry |= {"sizes": one_launch.sizes(part), **changes}
        (tmp_path / "some-gpu-one-launch.json").write_text(json.dumps({"LLM bf16 1": entry}))
        return found()

    none = found()
    assert not none.chosen and "there is no some-gpu-one-launch.json" in str(none)
    assert line().chosen and "1.50 times as fast in 10000 replays" in str(line())
    assert not line(layers=0.9).chosen
    assert not line(wrong=1).chosen and "1 wrong" in str(line(wrong=1))
    assert not line(faults=1).chosen
    other = line(sizes={**one_launch.sizes(part), "layers": 99})
    assert not other.chosen and "of other sizes" in str(other)
    line()
    assert not found(share=0.5).chosen
    assert "no line for it with int8" in found("int8").reason


def test_where_it_cannot_run_it_raises():
    model = minmo.load("nano", device="cpu")
    with pytest.raises(ValueError, match='one_launch "on" needs a GPU'):
        minmo.FastMinMo(model, one_launch="on")  # and takes nothing from the model
    with pytest.raises(ValueError, match="one_launch must be one of auto, on, off"):
        minmo.FastMinMo(model, one_launch="yes")
    for share in (0, 1.5, True, float("nan"), "all"):
        with pytest.raises(ValueError, match="one_launch_share must be a number above 0 and up to 1"):
            minmo.FastMinMo(model, one_launch_share=share)
    for spins in (0, 2**31, 1e6):
        with pytest.raises(ValueError, match="one_launch_spins must be a whole number from 1 to 2147483647"):
            minmo.FastMinMo(model, one_launch_spins=spins)
    engine = minmo.FastMinMo(model, rows=1, max_positions=50, max_voice_positions=50, keep_model=True)
    assert "CPU" in engine.explain() and engine.overlaps
    with pytest.raises(ValueError, match="needs a GPU"):
        one_launch.Stack(list(engine.llm.layers))


@pytest.fixture
def binary(monkeypatch):
    """What every kernel compiles to for a GPU of capability 9.0 that is not here."""
    stub = SimpleNamespace(n_regs=255, metadata=SimpleNamespace(shared=70_000, num_warps=8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_compile", lambda *_: (stub, None, ()))
    return stub


def planned(weights, wanted="on", rows=3, limits=one_launch.DEFAULT):
    steps = engine_module.planned(load_config("nano"), weights)
    return one_launch.plan(steps, wanted, "Some GPU", 90, weights, rows, limits)


@pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_plan_needs_no_weights(weights, binary):
    found = planned(weights)
    assert [(one.part, one.rows) for one in found] == [
        (part, rows) for part in ("LLM", "speech block", "predictor") for rows in (1, 2, 4)
    ]
    assert all(one.chosen for one in found) and len(launch._compiled) == 9
    assert not any(one.chosen for one in planned(weights, "off") + planned(weights, "auto"))


@pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
def test_what_cannot_be_is_said_before_a_weight_is_taken(binary, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="bf16 and int8 weights, not int4"):
        planned("int4")
    with pytest.raises(ValueError, match="the LLM cannot be one launch a step: .* activations are 16-bit"):
        planned("fp32")
    binary.metadata.shared = 300_000
    with pytest.raises(ValueError, match="its 132 blocks are not on this GPU at once: 132 of 132 "):
        planned("bf16")
    with pytest.raises(ValueError, match="its 33 blocks are not on this GPU at once: 33 of 132"):
        planned("bf16", limits=one_launch.Limits(0.25))
    part = shapes(load_config("nano")).llm
    line = {"seconds": 1.0, "layers": 2.0, "wrong": 0, "faults": 0, "replays": 9, "share": 1.0}
    line["sizes"] = one_launch.sizes(part)
    (tmp_path / "some-gpu-one-launch.json").write_text(json.dumps({"LLM bf16 1": line}))
    monkeypatch.setattr(one_launch, "RESULTS", tmp_path)
    first = planned("bf16", "auto")[0]
    assert not first.chosen and "layer by layer, which cannot be: its 132 blocks" in str(first)
    binary.metadata.shared = 70_000
    assert [one.rows for one in planned("bf16", "auto") if one.chosen] == [1]


def test_a_refused_plan_leaves_the_model_as_it_was(monkeypatch):
    def refuses(*_):
        raise ValueError("it cannot be")

    monkeypatch.setattr(engine_module, "_launches", refuses)
    model = minmo.load("nano", device="cpu")
    with pytest.raises(ValueError, match="it cannot be"):
        minmo.FastMinMo(model)
    assert not model.given and model.llm is not None


@pytest.mark.parametrize(("share", "overlaps"), [(1.0, False), (0.6, False), (0.5, True)])
def test_streams_overlap_only_where_two_launches_fit_side_by_side(share, overlaps, monkeypatch):
    chosen = one_launch.Verdict("LLM", 1, True, "said")
    monkeypatch.setattr(engine_module, "_launches", lambda *_: [chosen])
    monkeypatch.setattr(engine_module, "install", lambda *_: [])
    model = minmo.load("nano", device="cpu")
    settings = {"rows": 1, "max_positions": 50, "max_voice_positions": 50, "one_launch_spins": 5000}
    engine = minmo.FastMinMo(model, one_launch_share=share, **settings)
    assert engine.overlaps is overlaps
    monkeypatch.setattr(minmo.FastMinMo, "device", torch.device("cuda"))
    way = "beside one another" if overlaps else "one after the other"
    said = f"takes {share:.0%} of the multiprocessors and gives up after 5,000 looks at a barrier"
    assert said in engine.explain() and engine.explain().endswith(way)
    engine._single.append(SimpleNamespace(name="LLM", failed=True))
    assert "LLM: a launch has given up" in engine.explain()


def test_only_what_the_plan_has_chosen_becomes_a_launch():
    part, voice = made(Backbone, LM), made(VoiceDecoder, VOICE)
    steps = [backbone_step(part, part.initial_state(3, 4)), voice_step(voice, voice.initial_state(3, 40))]
    replay(part, "step", steps[0].state, StandIn(), 3, one_launch.one_position)
    found = [
        one_launch.Verdict(s.name, rows, s.name == "LLM" and rows > 1, "said") for s in steps for rows in (1, 2, 4)
    ]
    (one,) = one_launch.install(steps, found, one_launch.Limits(0.5, 9))
    assert part.step is one and one.single is not one.layered, "graphs of its own"
    assert [one.chooses(rows) for rows in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    assert (one._stack.weights["share"], one._stack.weights["spins"]) == (0.5, 9)
    assert "_round" not in vars(voice)
