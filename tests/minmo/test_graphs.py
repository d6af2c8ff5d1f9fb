"""Steps as graphs: what is captured may be captured, and a replay is the step. A stand-in takes the place of a GPU."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import minmo
import minmo.modules.backbone
import minmo_kernels as mk
from minmo.config import load_config
from minmo.fast import profile
from minmo.fast.engine import LANGUAGE, optimised
from minmo.fast.graphs import bucket, replay
from minmo.model import shapes
from minmo.state import unlooking
from minmo_kernels import launch

STEPS = ["encoder", "projector", "text", "prefill", "predictor", "speech block", "flow", "vocoder"]
LAUNCHES_A_LAYER = 5


def calls(model, batch):
    """Each graphed step with steady arguments for a batch on the model's device, by name."""
    c, dtype, state = model.config, model.llm.norm.weight.dtype, model.initial_state(4, 100, 100)
    rows = torch.zeros(batch, dtype=torch.int32)
    one, no, ends = torch.ones_like(rows), torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64)

    def x(*shape, dtype=dtype):
        return torch.zeros(batch, *shape, dtype=dtype)

    hearing, speaking, chunk = state.hearing, state.speaking, c.flow.chunk
    mel = x(2 * chunk, c.flow.n_mels, dtype=torch.float32)
    tokens = x(chunk + c.flow.lookahead, dtype=torch.int32)
    return {
        "encoder": lambda: model.encoder._piece(x(16, c.encoder.n_mels), one, hearing.encoder, rows),
        "projector": lambda: model.projector._piece(x(6, c.projector.input_dim), one, hearing.projector, rows),
        "text": lambda: model.llm.step(x(1, c.llm.dim), one, state.llm, rows),
        "prefill": lambda: model.llm.step(x(64, c.llm.dim), one, state.llm, rows),
        "predictor": lambda: model.duplex.step(x(1, c.llm.dim), one, state.duplex, rows),
        "speech block": lambda: model.voice_decoder._round(
            x(c.voice_decoder.semantic_block, 2 * c.llm.dim), one, no, speaking.decoder, rows, None
        ),
        "flow": lambda: model.flow._chunk(tokens, one, one, mel, speaking.flow, rows),
        "vocoder": lambda: model.vocoder._advance(mel, one, speaking.vocoder, rows, ends),
    }


def capturable(monkeypatch, preset, weights, names):
    """Runs steps where nothing can be read from the device and nothing be sent to it -> launches of each."""
    model = shapes(load_config(preset))
    for name in LANGUAGE:
        setattr(model, name, optimised(getattr(model, name), weights))

    def sent(*_, **__):
        raise AssertionError("a captured step makes a tensor from numbers of the host")

    found = {}
    with torch.device("meta"), torch.no_grad():
        steps = calls(model, 2)
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, sent)
        monkeypatch.setattr(torch.Tensor, "new_tensor", sent)
        for name in names:
            with launch.recording(90) as records, mk.use_backend("triton"), unlooking():
                steps[name]()
            found[name] = len(records)
    return found


@pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_step_never_looks_at_the_device(monkeypatch, weights):
    """A look, or an operation that no kernel serves, would break a capture: on the meta device either raises."""
    found = capturable(monkeypatch, "nano", weights, STEPS)
    a_layer = LAUNCHES_A_LAYER + (weights != "bf16")  # two rows of a quantised product do not merge attention's parts
    assert found["text"] == a_layer * load_config("nano").llm.layers + 1, "and the last norm"


@pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
def test_a_step_of_full_size_never_looks_at_the_device(monkeypatch):
    found = capturable(monkeypatch, "minmo-8b", "bf16", ["encoder", "projector", "text", "prefill", "predictor"])
    assert found["text"] == LAUNCHES_A_LAYER * 28 + 1


def test_a_look_is_noticed(monkeypatch):
    monkeypatch.setattr(minmo.modules.backbone, "advanced", lambda lengths, rows, counts: lengths + int(counts.max()))
    with pytest.raises(RuntimeError, match="meta"):
        capturable(monkeypatch, "nano", "bf16", ["text"])


class StandIn:
    """Replays by running the call again into the first outputs: like a graph, on the same memory and without a look at
    what is computed."""

    def __call__(self, call):
        with unlooking():
            outputs = call()

        def replay():
            with unlooking():
                for own, new in zip(tensors(outputs), tensors(call()), strict=True):
                    own.copy_(new)

        return replay, outputs


def tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for o in outputs for t in tensors(o)] if isinstance(outputs, tuple) else []


QUIET = minmo.Settings(max_text_tokens=7, max_speech_ratio=5, seed=3)


@pytest.fixture(scope="module")
def engines():
    """An engine, and one that replays, both warm."""
    model = minmo.load("nano", device="cpu")
    made = [minmo.FastMinMo(model, rows=3, max_positions=300, max_voice_positions=500, keep_model=True) for _ in "ab"]
    made[1]._replay_with(StandIn)
    for engine in made:
        took = engine.warmup()
        assert all(seconds > 0 for seconds in took.values())
        assert {name.rpartition(", ")[2] for name in took} == {"1 rows", "2 rows", "3 rows"}
    return made


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_replayed_steps_give_the_same_reply(engines, batch):
    turns = [0.1 * np.random.default_rng(0).standard_normal(9000).astype(np.float32), "two plus three", "seven"][:batch]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is captured late
        eager, replayed = (minmo.talk(engine, turns, QUIET) for engine in engines)
    for one, other in zip(eager, replayed, strict=True):
        assert one.text == other.text and len(one.audio) and np.array_equal(one.audio, other.audio)
    assert all(step._graphs for step in engines[1]._graphed if step.function.__name__ != "_unit")


@torch.no_grad()
def test_a_replay_leaves_other_rows_alone(engines):
    """Entries are filled up to a bucket; sessions that sit in the other rows do not notice, nor does a new capture."""
    engine = engines[1]
    busy = engine.join(1, 50, 50)
    dim = engine.config.llm.dim
    x, one = torch.randn(1, 1, dim), torch.ones(1, dtype=torch.int32)
    engine.llm.step(x, one, busy.state.llm, busy.rows)
    kept = [cache.k.clone() for cache in busy.state.llm.layers]
    seats = engine.join(2, 50, 50)
    step = next(s for s in engine._graphed if s.function.__self__ is engine.llm)
    step._graphs.clear()
    with pytest.warns(UserWarning, match="captured after the warm-up"):
        engine.llm.step(x.expand(2, 1, dim), one.expand(2), seats.state.llm, seats.rows)
    row = int(busy.rows[0])
    assert int(busy.state.llm.lengths[row]) == 1
    for before, cache in zip(kept, busy.state.llm.layers, strict=True):
        assert torch.equal(before[row], cache.k[row])
    with pytest.warns(UserWarning, match="captured"):
        first = engine.llm.step(x, one, busy.state.llm, busy.rows)[0]
    again = first.clone()
    engine.llm.step(-x, one, busy.state.llm, busy.rows)
    assert torch.equal(first, again), "an output is its caller's"
    seats.leave()
    busy.leave()


def test_other_states_and_shapes_run_launch_by_launch(engines):
    engine = engines[1]
    state = engine.initial_state(2, 10, 10)
    x, three = torch.randn(1, 3, engine.config.llm.dim), torch.full((1,), 3, dtype=torch.int32)
    before = sum(len(step._graphs) for step in engine._graphed)
    with torch.no_grad():
        hidden, _, _ = engine.llm.step(x, three, state.llm, torch.zeros(1, dtype=torch.int32))
    assert hidden.shape == x.shape and sum(len(step._graphs) for step in engine._graphed) == before


def test_buckets():
    assert [bucket(n, 12) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert bucket(65, 100) == 100


def test_a_warm_up_needs_the_engine_to_itself(engines, monkeypatch):
    engine = engines[0]
    seats = engine.join(1, 10, 10)
    with pytest.raises(ValueError, match="rows are taken"):
        engine.warmup()
    seats.leave()

    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(engine.flow, "step", full)
    with pytest.raises(ValueError, match="2 GiB.*fewer rows"):
        engine.warmup()
    engine.join(3, 10, 10).leave()


def test_settings_of_an_engine():
    model = minmo.load("nano", device="cpu")
    with pytest.raises(ValueError, match="graphs must be one of auto, off"):
        minmo.FastMinMo(model, graphs="on")
    with pytest.raises(ValueError, match="prefill must be a whole number"):
        minmo.FastMinMo(model, prefill=0)
    reply = replace(QUIET, speak=False)
    small = minmo.FastMinMo(model, rows=1, prefill=8, max_positions=200, keep_model=True)
    assert minmo.ask(small, "two plus three", reply).text == minmo.ask(model, "two plus three", reply).text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_on_a_gpu_graphs_give_the_eager_reply_and_allocate_nothing(weights):
    model = minmo.load("nano", device="cuda")
    settings = {"rows": 4, "max_positions": 300, "max_voice_positions": 500, "weights": weights, "keep_model": True}
    eager, fast = minmo.FastMinMo(model, graphs="off", **settings), minmo.FastMinMo(model, **settings)
    fast.warmup()
    turns = ["seven", "two plus three", "nine"]  # of a bucket of four rows
    for one, other in zip(minmo.ask(eager, turns, QUIET), minmo.ask(fast, turns, QUIET), strict=True):
        assert one.text == other.text and len(one.audio) == len(other.audio)
        assert np.abs(one.audio - other.audio).max() < 0.01 * np.abs(one.audio).max()
    seats = fast.join(1, 300, 500)
    x = torch.zeros(1, 1, fast.config.llm.dim, dtype=fast.dtype, device="cuda")
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    with torch.inference_mode():
        fast.llm.step(x, one, seats.state.llm, seats.rows)
        held = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                fast.llm.step(x, one, seats.state.llm, seats.rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == held


def test_every_profiled_step_runs_as_a_graph(monkeypatch):
    monkeypatch.setattr(profile, "_replayed", lambda p, m, state, rows: replay(p, m, state, StandIn(), rows))
    lines = list(
        profile.profile(
            load_config("nano"), list(profile.STEPS), weights="fp32", contexts=[16], rows=[1], tokens=10,
            device=torch.device("cpu"),
        )
    )  # fmt: skip
    assert [getattr(line, "step", line) for line in lines] == list(profile.STEPS)


def test_a_forced_backend_and_error_words_are_heeded(engines):
    engine = engines[1]
    step = next(s for s in engine._graphed if s.function.__self__ is engine.llm)
    seats = engine.join(1, 10, 10)
    x, one = torch.zeros(1, 1, engine.config.llm.dim), torch.ones(1, dtype=torch.int32)
    replayed = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a test before has emptied the step's graphs
        engine.llm.step(x, one, seats.state.llm, rows=seats.rows)  # names of arguments are as they were
        (graph,) = [graph for key, graph in step._graphs.items() if key[0][:2] == (1, 1)]
        graph._replay = lambda: replayed.append(1)
        with mk.use_backend("reference"):
            engine.llm.step(x, one, seats.state.llm, seats.rows)
        with mk.strict(torch.zeros(1, dtype=torch.int32)), mk.use_backend("reference"):
            engine.llm.step(x, one, seats.state.llm, seats.rows)
    assert replayed == [] and int(seats.state.llm.lengths[seats.rows[0]]) == 3
    step._graphs.clear()
    seats.leave()
