"""The input projector: size, lengths, what each form sees, gradients, errors."""

from __future__ import annotations

import pytest
import torch

from minmo.config import ProjectorConfig, load_config
from minmo.modules.projector import Projector

SMALL = ProjectorConfig(input_dim=10, dim=64, heads=1, ffn=32, layers=1, left_context=4)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def projector():
    torch.manual_seed(0)
    return Projector(SMALL)


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        projector = Projector(load_config("minmo-8b").projector)
    assert sum(p.numel() for p in projector.parameters()) == 167_978_496


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_and_padding(projector, causal):
    totals = list(range(10))
    x = torch.randn(len(totals), 9, 10)
    for n in totals:
        x[n, n:] = float("nan")
    y, counts = projector.requires_grad_(False)(x, ints(totals), causal=causal)
    assert y.shape == (len(totals), 5, 64)
    assert counts.tolist() == [(n - 1) // 2 + 1 for n in totals]
    for n, count in zip(totals[1:], counts.tolist()[1:], strict=True):
        alone, _ = projector(x[n : n + 1, :n], ints([n]), causal=causal)
        torch.testing.assert_close(y[n, :count], alone[0], rtol=1e-5, atol=1e-5)
        assert not y[n, count:].any()


@pytest.mark.parametrize("causal,seen", [(True, (2 * (9 - 4) - 1, 2 * 9 + 1)), (False, (0, 39))])
def test_what_a_position_sees(projector, causal, seen):
    x = torch.randn(1, 40, 10, requires_grad=True)
    y, _ = projector(x, ints([40]), causal=causal)
    y[0, 9].square().sum().backward()
    touched = x.grad[0].abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert (touched[0], touched[-1]) == seen


def test_gradients_reach_every_parameter(projector):
    y, _ = projector(torch.randn(2, 21, 10), ints([21, 8]))
    y.square().sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_activations_stay_of_about_unit_size():
    config = load_config("nano").projector
    torch.manual_seed(0)
    y, _ = Projector(config).requires_grad_(False)(torch.randn(1, 50, config.input_dim), ints([50]))
    assert 0.1 < float(y.square().mean().sqrt()) < 10


def test_wrong_input_is_named(projector):
    with pytest.raises(ValueError, match=r"frames must be \(batch, T, 10\), got \(1, 3, 9\)"):
        projector(torch.zeros(1, 3, 9), ints([3]))
