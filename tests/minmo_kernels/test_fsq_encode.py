"""fsq_encode beyond its declaration: the released tokenizer's rule, and what is refused."""

from __future__ import annotations

import pytest
import torch

import minmo_kernels as mk
from minmo_kernels.ops.fsq_encode import fsq_centres

ROW, LEVELS = torch.zeros(1, dtype=torch.int32), (3,) * 8


def test_parity_with_the_rule_of_the_released_tokenizer():
    """S3Tokenizer v2: round(tanh(h) 0.999…) + 1 in base 3."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(1, 5000, 16, generator=g),
        torch.randn(8, 16, generator=g),
        torch.randn(8, generator=g),
    )
    h = torch.nn.functional.linear(x, weight, bias).tanh() * 0.9990000128746033
    expected = ((h.round() + 1) * torch.pow(3.0, torch.arange(8.0))).sum(-1).int()
    ids = mk.fsq_encode(x, weight, bias, ROW, ROW + 5000, levels=LEVELS)
    assert torch.equal(ids, expected)
    assert len(ids.unique()) > 1000


def test_every_code_of_the_released_tokenizer_is_its_own_centre():
    codes = torch.arange(3**8, dtype=torch.int32)
    centres = fsq_centres(codes, LEVELS)[None]
    ids = mk.fsq_encode(centres, torch.eye(8), torch.zeros(8), ROW, ROW + len(codes), levels=LEVELS)
    assert torch.equal(ids[0], codes)


def test_halves_go_to_the_even_digit():
    """tanh(h) 0.999… exactly at a boundary: 0.5 and 1.5 of levels -2 .. 2."""
    edge = torch.tensor([0.5, -0.5, 1.5, -1.5], dtype=torch.float64) / 2 / 0.9990000128746033
    h = torch.atanh(edge)
    exactly = torch.tanh(h) * 0.9990000128746033 * 2
    ids = mk.fsq_encode(h[None, :, None], h.new_ones(1, 1), h.new_zeros(1), ROW, ROW + 4, levels=[5])
    assert ids.tolist() == [[round(v) + 2 for v in exactly.tolist()]]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"levels": (3,) * 7}, "7 levels for 8 digits"),
        ({"levels": (4,) + (3,) * 7}, "odd"),
        ({"levels": (1001,) * 8}, "int32"),
        ({"weight": torch.zeros(8, 5)}, "5 columns"),
        ({"bias": torch.zeros(3)}, "weight and bias"),
        ({"rows": torch.zeros(1, dtype=torch.int64)}, "int32"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "2 entries"),
        ({"x": torch.zeros(4, 4)}, "shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": torch.zeros(1, 2, 4), "weight": torch.zeros(8, 4), "bias": torch.zeros(8), "rows": ROW}
    with pytest.raises(ValueError, match=message):
        mk.fsq_encode(**{**arguments, "lengths": ROW + 2, "levels": LEVELS, **change})
