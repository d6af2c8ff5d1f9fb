"""sample_token beyond its declaration: the drawn distribution, independence of the batch, and what is refused."""

from __future__ import annotations

import pytest
import torch

import minmo_kernels as mk

DRAWS = 8_000
LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -4.0])
# Quantiles .999 of the chi-square distribution by degrees of freedom.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


def settings(n, temperature=1.0, top_k=0, top_p=1.0, seed=7):
    """n sessions with the same settings at positions 0 .. n-1, as keyword arguments."""
    return {
        "rows": torch.arange(n, dtype=torch.int32),
        "seeds": torch.full((n,), seed),
        "positions": torch.arange(n),
        "temperature": torch.full((n,), temperature),
        "top_k": torch.full((n,), top_k, dtype=torch.int32),
        "top_p": torch.full((n,), top_p),
    }


def assert_drawn_from(expected, **arguments):
    ids = mk.sample_token(LOGITS.expand(DRAWS, -1), **arguments)
    counts = torch.bincount(ids.long(), minlength=len(expected)).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - DRAWS * expected)[possible].square() / (DRAWS * expected[possible])).sum()
    assert statistic < CHI_SQUARE[int(possible.sum()) - 1]


def nucleus(temperature, top_k, top_p):
    p = torch.softmax(LOGITS.double() / temperature, 0)  # already in falling order
    kept = (p.cumsum(0) - p < top_p) & (torch.arange(len(p)) < (top_k or len(p)))
    return p * kept / (p * kept).sum()


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 25, 0.8), (2.0, 5, 0.7)])
def test_tokens_follow_the_truncated_softmax(temperature, top_k, top_p):
    assert_drawn_from(nucleus(temperature, top_k, top_p), **settings(DRAWS, temperature, top_k, top_p))


def test_repeated_tokens_are_redrawn_from_the_rest_of_the_full_softmax():
    first, full = nucleus(1.0, 4, 0.8), torch.softmax(LOGITS.double(), 0)
    expected = first.clone()
    for repeated in (0, 2):
        others = full.index_fill(0, torch.tensor([repeated]), 0.0)
        expected[repeated] -= first[repeated]
        expected += first[repeated] * others / others.sum()
    history = torch.tensor([[2, -1, 0, 5]], dtype=torch.int32).expand(DRAWS, -1).contiguous()
    assert_drawn_from(expected, **settings(DRAWS, 1.0, 4, 0.8), history=history)


def test_seeds_positions_and_streams_draw_independently():
    """Pairs of neighbours fall as the product of their distributions."""
    p = torch.softmax(LOGITS.double(), 0)
    a = mk.sample_token(LOGITS.expand(DRAWS, -1), **settings(DRAWS)).long()
    for other in (settings(DRAWS, seed=8), {**settings(DRAWS), "positions": torch.arange(DRAWS) + 1}, None):
        b = mk.sample_token(LOGITS.expand(DRAWS, -1), **(other or settings(DRAWS)), stream=0 if other else 1).long()
        same = float((a == b).double().mean())
        assert abs(same - float(p.square().sum())) < 4 * (0.25 / DRAWS) ** 0.5


def test_a_token_depends_on_its_session_only():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=g)
    all_settings = settings(6, 0.9, 0, 0.95)
    rows = torch.tensor([4, -1, 0, 5, 2, 1], dtype=torch.int32)
    together = mk.sample_token(logits, **{**all_settings, "rows": rows})
    assert together[1] == -1
    for b in (0, 2, 5):
        row = rows[b : b + 1]
        alone = {k: v[row] for k, v in all_settings.items() if k != "rows"}
        assert mk.sample_token(logits[b : b + 1], row * 0, **alone) == together[b]


def test_greedy_takes_the_lowest_of_equals_and_is_never_redrawn():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    history = torch.tensor([[1, 1]], dtype=torch.int32)
    assert mk.sample_token(logits, **settings(1, temperature=0.0), history=history).tolist() == [1]
    banned = torch.tensor([[1, -1, 99]], dtype=torch.int32)
    assert mk.sample_token(logits, **settings(1, temperature=0.0), banned=banned).tolist() == [2]


def test_a_repeated_token_without_alternative_stays():
    logits = torch.tensor([[0.0, -torch.inf]])
    history = torch.zeros(1, 3, dtype=torch.int32)
    assert mk.sample_token(logits, **settings(1), history=history).tolist() == [0]


def test_nan_and_nothing_to_choose_are_refused_in_active_entries_only():
    logits = torch.zeros(2, 3)
    logits[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        mk.sample_token(logits, **settings(2))
    padded = {**settings(2), "rows": torch.tensor([0, -1], dtype=torch.int32)}
    assert mk.sample_token(logits, **padded)[1] == -1
    with pytest.raises(ValueError, match="every id"):
        mk.sample_token(torch.full((1, 3), -torch.inf), **settings(1))
    with pytest.raises(ValueError, match="every id"):
        mk.sample_token(torch.zeros(1, 2), **settings(1), banned=torch.tensor([[0, 1]], dtype=torch.int32))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seeds": torch.zeros(1, dtype=torch.int32)}, "seeds must be int64"),
        ({"top_p": torch.ones(2)}, "number of sessions"),
        ({"banned": torch.zeros(3, 1, dtype=torch.int32)}, "banned has 3"),
        ({"stream": -1}, "stream"),
        ({"repetition_limit": 0}, "repetition_limit"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "2 entries"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mk.sample_token(torch.zeros(1, 3), **{**settings(1), **change})
