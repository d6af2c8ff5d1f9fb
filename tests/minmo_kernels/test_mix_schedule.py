"""The 5:15 schedule against sequences written out by hand and by a naive builder, over every length of interest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import minmo_kernels as mk
from minmo_kernels.ops.mix_semantic_speech.schedule import (
    END,
    FILL,
    SEMANTIC,
    SPEECH,
    START,
    TURN,
    UNKNOWN_LENGTH,
    is_bistream,
    schedule,
    slot_of_speech,
    total_slots,
)

NUMBERED = np.stack([np.stack([np.full(200, kind), np.arange(200)], axis=1) for kind in range(7)])
"""(kind, n) -> the pair (kind, n)."""


def built(query, text, speech, bistream):
    """(source, index, target, target index) of every slot, by appending pieces as a data loader would. (slots, 4)"""

    def run(kind, first, last):
        return NUMBERED[kind, first:last]

    nothing = np.zeros((1 + query + text, 2), dtype=int)
    inputs, targets = [run(START, 0, 1), run(SEMANTIC, 0, query)], [nothing[: 1 + query]]
    blocks = -(-(text + 1) // 5) if bistream else 1
    for block in range(blocks - 1):
        spoken = run(SPEECH, 15 * block, 15 * block + 15)
        inputs += [run(SEMANTIC, query + 5 * block, query + 5 * block + 5), spoken]
        targets += [nothing[:4], spoken, [[FILL, 0]]]
    said, spoken = run(SEMANTIC, query + 5 * (blocks - 1), query + text), run(SPEECH, 15 * (blocks - 1), speech)
    inputs += [said, [[TURN, 0]], spoken]
    targets += [nothing[: len(said)], spoken, [[END, 0]]]
    return np.concatenate([np.concatenate(inputs), np.concatenate(targets)], axis=1)


def all_lengths(layout):
    """Every (query, text, speech) of the grid whose lengths ask for the layout, three int32 tensors."""
    grid = torch.cartesian_prod(torch.tensor([0, 3]), torch.arange(41), torch.arange(121)).to(torch.int32)
    bistream = is_bistream(grid[:, 1], grid[:, 2], 5, 15)
    return grid[bistream == (layout == "bistream")].unbind(1)


@pytest.mark.parametrize("layout", ["bistream", "unistream"])
def test_schedule_equals_naive_builder_over_the_grid(layout):
    query, text, speech = all_lengths(layout)
    slots = int(total_slots(query, text, speech).max()) + 3
    expected = np.zeros((len(query), slots, 4), dtype=int)
    for n, lengths in enumerate(zip(query.tolist(), text.tolist(), speech.tolist(), strict=True)):
        row = built(*lengths, layout == "bistream")
        assert len(row) == 2 + sum(lengths)
        expected[n, : len(row)] = row
    bistream = torch.full((len(query), 1), layout == "bistream")
    actual = schedule(torch.arange(slots), query[:, None], text[:, None], speech[:, None], bistream)
    assert torch.equal(torch.stack(actual, dim=2), torch.from_numpy(expected))


@pytest.mark.parametrize("layout", ["bistream", "unistream"])
def test_schedule_inverse_finds_every_speech_token(layout):
    query, text, speech = (x[:, None] for x in all_lengths(layout))
    bistream = torch.full_like(query, layout == "bistream", dtype=torch.bool)
    index = torch.arange(120)
    slot = slot_of_speech(index, query, text, bistream)
    here = schedule(slot, query, text, speech, bistream)
    before = schedule(slot - 1, query, text, speech, bistream)
    exists = (index < speech).expand_as(slot)
    assert (here.source[exists] == SPEECH).all() and (here.source[~exists] != SPEECH).all()
    assert torch.equal(here.index[exists], index.expand_as(slot)[exists])
    # The slot before predicts the token, except for fill between two blocks, where the next semantic vectors stand.
    assert torch.equal(before.target_index[exists], here.index[exists])
    assert (before.target[exists] == SPEECH).all()


def test_schedule_of_an_open_text_agrees_with_any_text_that_follows():
    """While text is still coming, slots are those of every longer text, up to the end of the last block decoded."""
    query, text, speech = (x[:, None] for x in all_lengths("bistream"))
    bistream = torch.ones_like(query, dtype=torch.bool)
    slot = torch.arange(170)
    known = schedule(slot, query, text, speech, bistream)
    open_text = schedule(slot, query, torch.full_like(text, UNKNOWN_LENGTH), speech, bistream)
    shared = slot < 1 + query + 20 * (text // 5)
    for a, b in zip(known, open_text, strict=True):
        assert torch.equal(a[shared], b[shared])


def test_schedule_layout_by_lengths():
    text = torch.tensor([0, 0, 1, 1, 10, 10], dtype=torch.int32)
    speech = torch.tensor([0, 1, 3, 4, 30, 31], dtype=torch.int32)
    assert is_bistream(text, speech, 5, 15).tolist() == [False, True, False, True, False, True]


def mixed(query, text, speech, **kwargs):
    """Targets of one row, and inputs as names: vectors and ids are told apart by their values."""
    vectors = query + text
    width = torch.ones(1, 2)
    lengths = [torch.tensor([n], dtype=torch.int32) for n in (query, text, speech)]
    inputs, targets = mk.mix_semantic_speech(
        1000.0 + torch.arange(vectors).reshape(1, -1, 1).float(),
        torch.zeros(1, vectors, 1),
        width,
        torch.zeros(1),
        torch.arange(speech).reshape(1, -1),
        torch.arange(200).reshape(-1, 1).float(),
        torch.tensor([[-1.0], [-2.0]]),
        torch.zeros(1, dtype=torch.int32),
        *lengths,
        slots=2 + vectors + speech,
        fill=702,
        end_of_speech=700,
        **kwargs,
    )
    return inputs[0, :, 0].tolist(), targets[0].tolist()


SOS, TURN_OF_SPEECH, NO = -1.0, -2.0, -100


def z(first, last):
    return [1000.0 + i for i in range(first, last)]


def s(first, last):
    return list(range(first, last))


def test_schedule_example_two_blocks_and_a_tail():
    inputs, targets = mixed(0, 10, 60)
    assert inputs == [SOS, *z(0, 5), *s(0, 15), *z(5, 10), *s(15, 30), TURN_OF_SPEECH, *s(30, 60)]
    first = [NO, NO, NO, NO, NO, *s(0, 15), 702]
    assert targets == [*first, NO, NO, NO, NO, *s(15, 30), 702, *s(30, 60), 700]


def test_schedule_example_query_and_rest():
    inputs, targets = mixed(2, 7, 25)
    assert inputs == [SOS, *z(0, 2), *z(2, 7), *s(0, 15), *z(7, 9), TURN_OF_SPEECH, *s(15, 25)]
    assert targets == [NO] * 7 + [*s(0, 15), 702, NO, NO, *s(15, 25), 700]


def test_schedule_example_unistream():
    inputs, targets = mixed(1, 7, 21)
    assert inputs == [SOS, *z(0, 8), TURN_OF_SPEECH, *s(0, 21)]
    assert targets == [NO] * 9 + [*s(0, 21), 700]


@pytest.mark.parametrize("bistream", [torch.tensor([True]), torch.tensor([False])])
def test_schedule_example_no_text(bistream):
    assert mixed(1, 0, 3, bistream=bistream) == ([SOS, *z(0, 1), TURN_OF_SPEECH, 0, 1, 2], [NO, NO, 0, 1, 2, 700])
    assert mixed(0, 0, 0, bistream=bistream) == ([SOS, TURN_OF_SPEECH], [NO, 700])


def test_schedule_example_speech_that_just_ends_a_block():
    inputs, targets = mixed(0, 5, 15, bistream=torch.tensor([True]))
    assert inputs == [SOS, *z(0, 5), *s(0, 15), TURN_OF_SPEECH]
    assert targets == [NO] * 5 + [*s(0, 15), 702, 700]


def some_arguments(dtype=torch.float64):
    """A small batch of both layouts with a padding row, everything random."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    lengths = torch.tensor([[2, 7, 24], [0, 3, 4], [1, 5, 16]], dtype=torch.int32)
    return {
        "hidden": normal(3, 9, 2),
        "embedding": normal(3, 9, 3),
        "weight": normal(4, 5),
        "bias": normal(4),
        "speech": torch.randint(0, 6, (3, 24), generator=g, dtype=torch.int32),
        "speech_table": normal(6, 4),
        "markers": normal(2, 4),
        "rows": torch.tensor([4, -1, 0], dtype=torch.int32),
        **dict(zip(("query_lengths", "text_lengths", "speech_lengths"), lengths.unbind(1), strict=True)),
    }


FLOATS = ("hidden", "embedding", "weight", "bias", "speech_table", "markers")


def test_mix_gradients():
    arguments = some_arguments()
    leaves = [arguments.pop(name).requires_grad_() for name in FLOATS]

    def inputs(*floats):
        named = dict(zip(FLOATS, floats, strict=True))
        return mk.mix_semantic_speech(**named, **arguments, slots=36, fill=8, end_of_speech=6)[0]

    assert torch.autograd.gradcheck(inputs, leaves, fast_mode=True)


def test_mix_gradients_never_see_unused_vectors():
    arguments = some_arguments()
    beyond = torch.arange(9) >= (arguments["query_lengths"] + arguments["text_lengths"])[:, None]
    beyond[1] = True
    for name in ("hidden", "embedding"):
        arguments[name] = arguments[name].masked_fill(beyond[:, :, None], float("nan"))
    for name in FLOATS:
        arguments[name].requires_grad_()
    mk.mix_semantic_speech(**arguments, slots=40, fill=8, end_of_speech=6)[0].square().sum().backward()
    assert all(arguments[name].grad.isfinite().all() for name in FLOATS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(4, 6, dtype=torch.float64)}, "weight must have 5 columns, got 6"),
        ({"embedding": torch.zeros(3, 8, 3, dtype=torch.float64)}, "must pair up"),
        ({"markers": torch.zeros(1, 4, dtype=torch.float64)}, "marker row 1 does not exist"),
        ({"text_lengths": torch.zeros(3, dtype=torch.int64)}, "text_lengths must be int32, got int64"),
        ({"speech": torch.full((3, 24), 6)}, "speech ids must lie in 0 .. 5"),
        ({"speech": torch.zeros(2, 24, dtype=torch.int64)}, "speech has 2 entries for a batch of 3"),
        ({"bias": torch.zeros(4)}, "bias must be float64, got float32"),
    ],
)
def test_mix_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        mk.mix_semantic_speech(**{**some_arguments(), **change}, slots=40, fill=8, end_of_speech=6)
