"""The full-duplex predictor: streaming laws far beyond its window, sizes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from minmo.config import BackboneConfig, DuplexConfig
from minmo.modules import duplex
from minmo.modules.duplex import BARGE_IN, TURN_TAKING, DuplexPredictor

CONFIG = DuplexConfig(20, BackboneConfig(dim=16, layers=1, heads=2, kv_heads=1, head_dim=64, ffn=24), window=6)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def predictor(seed=0):
    torch.manual_seed(seed)
    model = DuplexPredictor(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(0, 2**31 - 1))
@torch.no_grad()
def test_split_law_far_past_the_window(seed):
    """Two sessions out of step over some ten windows, longest step longer than a piece: the ring wraps many times."""
    g = torch.Generator().manual_seed(seed)
    model = predictor(seed)
    total = torch.randint(120, 160, (2,), generator=g).tolist()
    x = torch.randn(2, max(total), 20, generator=g)
    expected = model(x, int32(*total))
    state = model.initial_state(3)
    state.cache.k.fill_(torch.nan)
    state.cache.v.fill_(torch.nan)
    done, got = [0, 0], [[], []]
    while done != total:
        size = int(torch.randint(0, 2 * duplex.PIECE + 9, (), generator=g))
        piece = torch.full((3, size, 20), torch.nan)
        counts, rows = [0, size, 0], [2, -1, 0]
        for entry, b in ((0, 0), (2, 1)):
            counts[entry] = int(torch.randint(0, min(size, total[b] - done[b]) + 1, (), generator=g))
            piece[entry, : counts[entry]] = x[b, done[b] : done[b] + counts[entry]]
        out, lengths, state = model.step(piece, int32(*counts), state, int32(*rows))
        assert lengths.tolist() == [counts[0], 0, counts[2]]
        for entry, b in ((0, 0), (2, 1)):
            got[b].append(out[entry, : counts[entry]])
            done[b] += counts[entry]
    assert state.lengths.tolist() == [total[1], 0, total[0]]
    for b in range(2):
        torch.testing.assert_close(torch.cat(got[b]), expected[b, : total[b]], **CLOSE)


@torch.no_grad()
def test_split_single_ticks_equal_one_shot():
    model = predictor()
    x = torch.randn(1, 40, 20)
    state = model.initial_state(1)
    ticks = [model.step(x[:, t : t + 1], int32(1), state, int32(0))[0] for t in range(40)]
    torch.testing.assert_close(torch.cat(ticks, 1), model(x), **CLOSE)
    state.reset(int32(0))
    again, _, _ = model.step(x[:, :1], int32(1), state, int32(0))
    assert torch.equal(again, ticks[0])


@torch.no_grad()
def test_the_window_is_what_a_decision_sees():
    """What lies `window` positions back has no influence; what lies one nearer has."""
    model = predictor()
    x = torch.randn(1, 12, 20)
    last = model(x)[:, -1]
    assert torch.equal(model(torch.cat([-x[:, :6], x[:, 6:]], 1))[:, -1], last)
    assert not torch.allclose(model(torch.cat([x[:, :6], -x[:, 6:7], x[:, 7:]], 1))[:, -1], last)


@torch.no_grad()
def test_logits_are_the_two_heads():
    model = predictor()
    out = model(torch.randn(2, 5, 20), int32(5, 2))
    assert out.shape == (2, 5, 2, 2) and not out[1, 2:].any()
    model.turn_taking.weight.zero_()
    model.turn_taking.bias.copy_(torch.tensor([3.0, 4.0]))
    changed = model(torch.randn(1, 5, 20))
    assert (changed[:, :, TURN_TAKING] == torch.tensor([3.0, 4.0])).all()
    assert changed[:, :, BARGE_IN].std() > 0


@torch.no_grad()
def test_neighbours_do_not_change_a_bit():
    model = predictor()
    x = torch.randn(2, 9, 20)

    def run(other, row):
        out, _, _ = model.step(torch.stack([x[0], other]), int32(9, 7), model.initial_state(3), int32(1, row))
        return out[0]

    assert torch.equal(run(x[1], 0), run(torch.full((9, 20), torch.nan), -1))


def test_parameter_count_of_the_paper():
    layer = BackboneConfig(dim=896, layers=1, heads=7, kv_heads=1, head_dim=128, ffn=4736)
    with torch.device("meta"):
        model = DuplexPredictor(DuplexConfig(3584, layer))
    assert sum(p.numel() for p in model.parameters()) == 17_783_172


def test_bad_input_is_named():
    model = predictor()
    with pytest.raises(ValueError, match=r"hidden must be \(batch, T, 20\)"):
        model(torch.zeros(1, 2, 19))
    with pytest.raises(ValueError, match="lengths must lie in 0 .. 2"):
        model.step(torch.zeros(1, 2, 20), int32(3), model.initial_state(1), int32(0))
