"""The instruction list of a decode step: its shape, the exhaustive check of it and of faulty ones, and the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import minmo_kernels as mk
from minmo.config import load_config
from minmo.info import kernel_dims
from minmo_kernels import launch
from minmo_kernels.ops.decoder_step import proof
from minmo_kernels.ops.decoder_step.control import Counters
from minmo_kernels.ops.decoder_step.grid import Chip, Grid, refused, resident
from minmo_kernels.ops.decoder_step.machine import BROKEN, Arguments, Machine
from minmo_kernels.ops.decoder_step.schedule import (
    COLUMNS,
    WEIGHTED,
    Phase,
    Shape,
    Tiles,
    barriers,
    program,
    table,
    tiles_of,
)
from minmo_kernels.ops.decoder_step.spec import SPEC

SHAPE = Shape(batch=2, layers=3, dim=96, heads=4, kv_heads=2, head_dim=64, ffn=80, vocab=50, steps=2)
TILES = Tiles(qkv=16, out=16, gate_up=32, down=16, head=16)
CASE = {
    "dtype": "float32", "weights": "full", "batch": 2, "layers": 2, "dim": 32, "heads": (2, 1), "head_dim": 64,
    "ffn": 32, "vocab": 24, "steps": 2, "norm": True, "bias": False, "form": "linear", "seed": 4,
}  # fmt: skip


def test_the_list_is_right_in_every_interleaving_and_every_fault_is_caught(capsys):
    """Two blocks here; `python -m minmo_kernels.ops.decoder_step.proof` does three as well."""
    report = proof.prove((2,))
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.missed
    assert len(report.caught) > 200 and sum(report.states.values()) > 20_000
    assert any("deadlock" in fault for fault in report.caught.values())
    assert any("reads what is not written" in fault for fault in report.caught.values())


def test_three_blocks_are_right_too():
    for late in (False, True):
        assert proof.check(program(proof.SMALL, proof.ONE, 3), 3, late=late).fault is None


def test_a_right_list_that_is_not_is_an_error(monkeypatch):
    def without_barriers(shape, tiles, blocks):
        return tuple(replace(one, wait=0) for one in program(shape, tiles, blocks))

    monkeypatch.setattr(proof, "program", without_barriers)
    with pytest.raises(proof.Failure, match="reads what is not written"):
        proof.prove((2,))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_token_has_five_barriers_a_layer_and_two(ahead):
    listed = program(replace(SHAPE, merges_ahead=ahead), TILES, 7)
    assert barriers(listed) == SHAPE.steps * ((5 + ahead) * SHAPE.layers + 2)
    waits = [one.wait for one in listed if one.wait]
    assert waits == [7 * (i + 1) for i in range(len(waits))], "each counts all arrivals before it"
    assert sum(one.signal for one in listed) == len(waits) + 1
    asked = [one.ahead for one in listed if one.ahead >= 0]
    weighted = [i for i, one in enumerate(listed) if one.phase in WEIGHTED]
    assert asked == weighted, "every weight is asked for ahead, once and in order"
    assert table(listed, torch.device("cpu")).shape == (len(listed), COLUMNS)


def test_tiles_cover_what_a_phase_computes():
    count = {phase: tiles_of(phase, SHAPE, TILES) for phase in Phase}
    assert count[Phase.QKV] == 8 * 4 and count[Phase.ATTEND] == 2 * 2 * 8 and count[Phase.OUT] == 6
    assert count[Phase.GATE_UP] == 5 and count[Phase.DOWN] == 6 and count[Phase.HEAD] == 4 and count[Phase.SAMPLE] == 2


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_the_machine_computes_the_same_on_any_grid(blocks):
    _, arguments = mk.dispatch.intercept(mk.decoder_step, **SPEC.make(CASE))
    given = Arguments(*arguments)
    expected = mk.decoder_step(**SPEC.make(CASE))
    shape = given.shape(3, merges_ahead=False)
    tiles = Tiles(qkv=64, out=8, gate_up=6, down=5, head=7)
    actual = Machine(given, shape, tiles).run(program(shape, tiles, blocks), blocks)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(actual[1], expected[1])


def test_the_machine_notices_a_list_without_a_barrier():
    _, arguments = mk.dispatch.intercept(mk.decoder_step, **SPEC.make(CASE))
    given = Arguments(*arguments)
    shape, tiles = given.shape(2, merges_ahead=False), Tiles(qkv=64, out=8, gate_up=8, down=8, head=8)
    listed = program(shape, tiles, 2)
    dropped = tuple(replace(one, wait=0) if one.phase == Phase.GATE_UP else one for one in listed)
    hidden, _ = Machine(given, shape, tiles).run(dropped, 2)
    assert not torch.allclose(hidden, mk.decoder_step(**SPEC.make(CASE))[0], rtol=1e-3)
    stuck = tuple(replace(one, wait=one.wait + 1) if one.phase == Phase.OUT else one for one in listed)
    with pytest.raises(RuntimeError, match="deadlock"):
        Machine(given, shape, tiles).run(stuck, 2)


def test_logits_that_are_not_numbers_end_their_entry_alone():
    case = {**CASE, "batch": 3, "seed": 6}
    arguments = SPEC.make(case)
    entries = (arguments["rows"] >= 0).nonzero()[:, 0].tolist()
    whole = mk.decoder_step(**SPEC.make(case))[1]
    arguments["x"][entries[0]] = torch.nan
    tokens = mk.decoder_step(**arguments)[1]
    assert tokens[entries[0]].tolist() == [BROKEN, -1]
    assert torch.equal(tokens[entries[1:]], whole[entries[1:]])


@pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
@pytest.mark.parametrize("steps", [1, 14])
def test_any_number_of_tokens_is_one_launch(steps):
    """And one binary: the list is data."""
    (part,) = [dims for name, dims in kernel_dims(load_config("nano")).items() if name == "voice token LM"]
    case = {**next(c for c in SPEC.cases(part) if c["batch"] == 1), "steps": steps, "filled": True}
    (record,) = launch.launches(SPEC.function, SPEC.make(case), 90)
    assert record.options["launch_cooperative_grid"] and record.grid == (132, 1, 1)
    assert record.constants["ROWS"] == 1 and len(record.arguments[0]) > steps * 5 * part["layers"]


def test_what_one_launch_does_not_serve_is_said():
    a = SPEC.make({**CASE, "vocab": 0, "steps": 1})

    def reason(**changes):
        return mk.explain(mk.decoder_step, **{**a, **changes}).verdicts[0].reason

    nine = {"x": a["x"][:1].expand(9, -1).contiguous(), "rows": torch.full((9,), -1, dtype=torch.int32)}
    with launch.recording(90):
        on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in {**a, **nine}.items()}
        assert "up to 8 rows" in mk.explain(mk.decoder_step, **on_meta).verdicts[0].reason
    if not launch.INTERPRETING and launch.AVAILABLE:
        assert "TRITON_INTERPRET" in reason()
    with pytest.raises(ValueError, match="sync must be new_sync"):
        mk.decoder_step(**{**a, "sync": torch.zeros(2, dtype=torch.int32)})
    with pytest.raises(ValueError, match="2 steps need a head"):
        mk.decoder_step(**{**a, "steps": 2})
    with pytest.raises(ValueError, match="share must lie above 0"):
        mk.decoder_step(**{**a, "share": 0.0})
    for spins in (0, 2**31):
        with pytest.raises(ValueError, match="spins must be from 1 to 2147483647"):
            mk.decoder_step(**{**a, "spins": spins})
    with pytest.raises(ValueError, match=r"gate_up must have the shape .*, got \(2, 63, 32\)"):
        mk.decoder_step(**{**a, "gate_up": a["gate_up"][:, 1:].contiguous()})
    drawing = SPEC.make(CASE)
    with pytest.raises(ValueError, match="where most is reached an entry gives end"):
        mk.decoder_step(**{**drawing, "most": torch.ones(2, dtype=torch.int64)})


def test_a_device_without_cooperative_launch_is_refused_and_weights_whose_words_do_not_load():
    def asked(arguments):
        return mk.decoder_step.__globals__["OP"].request(*mk.dispatch.intercept(mk.decoder_step, **arguments)[1])

    request, refuses = asked(SPEC.make(CASE)), mk.decoder_step.__globals__["_refuses"]
    assert refuses(request) is None
    assert "no cooperative launch" in refuses(replace(request, features={**request.features, "cooperative": False}))
    assert "64 or 128, not 96" in refuses(replace(request, features={**request.features, "dim": 96}))
    assert "17 query heads" in refuses(replace(request, features={**request.features, "group": 17}))
    assert "16-bit" in refuses(replace(request, device="meta"))
    for name in ("qkv", "out", "gate_up", "down", "head"):
        arguments = SPEC.make({**CASE, "weights": "int8"})
        odd = torch.zeros(arguments[name].numel() + 1, dtype=torch.int8)[1:]
        arguments[name] = odd.view(arguments[name].shape)
        assert "no multiple of 4 bytes" in refuses(asked(arguments)), name


def test_a_grid_that_does_not_fit_is_refused_with_the_numbers():
    h100, slice_of_it = Chip(sms=132), Chip(sms=16)
    assert resident(255, 70_000, 8, h100) == 1 and resident(128, 70_000, 8, h100) == 2
    assert resident(128, 120_000, 4, h100) == 1
    assert refused(Grid(h100, 1, 1.0), 1) is None
    reason = refused(Grid(slice_of_it, 2, 0.5), 1)
    assert "its 16 blocks are not on this GPU at once: 8 of 16 multiprocessors hold 1 each, 8 in all" in reason
    assert Grid(h100, 1, 0.25).blocks == 33
    assert Counters() == (0, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_wait_in_vain_ends_with_the_error_word_on_a_gpu():
    """An arrival that is lost: every block leaves, the counters are zero, the next launch is right."""
    case = {**CASE, "dtype": "bfloat16"}
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in SPEC.make(case).items()}
    with mk.use_backend("triton"):
        right = mk.decoder_step(**arguments)
        arguments["sync"][0] = -1  # an arrival is lost
        mk.decoder_step(**arguments, spins=1000)
        assert arguments["sync"].tolist()[:2] == [0, 0] and arguments["sync"][2] > 0
        arguments["sync"].zero_()
        again = mk.decoder_step(**arguments)
    assert torch.equal(right[0], again[0]) and torch.equal(right[1], again[1])
