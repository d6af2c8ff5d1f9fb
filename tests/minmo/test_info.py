"""The paper's sizes come out, counted on the meta device."""

import pytest

import minmo
from minmo.config import MinMoConfig, load_config, presets
from minmo.info import count, engine_rows, rows, state_rows
from minmo.model import shapes

COUNTS = {
    "voice encoder": 636_318_720,
    "input projector": 167_978_496,
    "LLM": 7_615_616_512,
    "output projector": 6_423_424,
    "voice token LM": 369_669_156,
    "full-duplex predictor": 17_783_172,
    "speech tokenizer": 123_714_568,
    "token2wav: flow": 112_549_360,
    "token2wav: vocoder": 20_806_557,
}


def test_minmo_8b_has_the_papers_sizes():
    counted = {module: n for module, _, n, _ in rows("minmo-8b")}
    assert {k: counted[k] for k in COUNTS} == COUNTS
    assert counted["all"] == sum(COUNTS.values())


def test_nano_stays_small():
    counted = {module: n for module, _, n, _ in rows("nano")}
    assert counted["all"] <= 11_000_000


@pytest.mark.parametrize("preset", presets())
def test_config_survives_json_and_states_have_a_size(preset):
    config = load_config(preset)
    assert MinMoConfig.from_json(config.to_json()) == config
    assert all(size > 0 for _, _, size in state_rows(preset))


@pytest.mark.parametrize("preset", presets())
def test_head_dimensions_suit_the_kernels(preset):
    model = shapes(load_config(preset))
    state = model.initial_state(1, 8, 8)
    dims = {t.shape[-1] for name, t in named_caches(state)}
    assert dims <= {64, 128} and count(model) > 0


def named_caches(state, prefix=""):
    from minmo.state import KVCache, State

    for name, value in vars(state).items():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, KVCache):
                yield f"{prefix}{name}", part.k
            elif isinstance(part, State):
                yield from named_caches(part, f"{prefix}{name}.")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"nam": "x"}, "unknown field 'nam'"),
        ({"name": 3}, "name must be of type str"),
        ({"flow": {"dim": "wide"}}, "config.flow.dim must be of type int"),
        ({"flow": {"codes": 7}}, "must be equal"),
        ({"flow": []}, "must be an object"),
    ],
)
def test_a_bad_config_is_named(change, message):
    import json

    data = {**json.loads(load_config("nano").to_json()), **change}
    with pytest.raises(ValueError, match=message):
        MinMoConfig.from_json(json.dumps(data))


def test_an_engines_memory_is_what_it_allocates():
    fast = minmo.FastMinMo(minmo.load("nano", "cpu"), rows=2, max_positions=64, max_voice_positions=96)
    sizes = {name: wide for name, wide, _ in engine_rows("nano", 2, 64, 96)}
    seats = fast.join(1, 1, 1)
    assert sizes["all"] == seats.state.nbytes
    assert sizes["LLM"] == seats.state.llm.nbytes
    assert all(narrow <= wide for _, wide, narrow in engine_rows("nano", 2, 64, 96))
