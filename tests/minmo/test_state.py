"""Rows of a streaming state: written and reset alike with and without a look at which entries are padding."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from minmo.state import Buffer, buffer, write_rows, write_rows_unseen


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.permutations(range(5)), st.lists(st.booleans(), min_size=0, max_size=5), st.sampled_from([(), (3,), (2, 2)]))
def test_rows_are_written_alike_without_a_look(order, active, features):
    rows = torch.tensor([r if a else -1 for r, a in zip(order, active, strict=False)], dtype=torch.int32)
    state = torch.arange(5.0).reshape(5, *[1] * len(features)).expand(5, *features).clone()
    value = torch.randn(len(rows), *features, dtype=torch.float64)
    value[rows < 0] = torch.nan
    wanted = state.clone()
    for entry, row in enumerate(rows.tolist()):
        if row >= 0:
            wanted[row] = value[entry].float()
    for write in (write_rows, write_rows_unseen) if len(rows) else (write_rows,):
        own = state.clone()
        write(own, rows, value)
        assert torch.equal(own, wanted)


def test_a_reset_leaves_the_others_alone():
    state = buffer(3, 2, (4,), torch.zeros(()))
    state.data.fill_(1.0)
    state.count.fill_(2)
    state.reset(torch.tensor([2, -1, 0], dtype=torch.int32))
    assert isinstance(state, Buffer)
    assert state.count.tolist() == [0, 2, 0]
    assert state.data.sum(dim=(1, 2)).tolist() == [0.0, 8.0, 0.0]
