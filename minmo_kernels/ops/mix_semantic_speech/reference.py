"""`mix_semantic_speech` in plain PyTorch: two products for the semantic vectors, then one look-up per slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype
from minmo_kernels.ops.mix_semantic_speech.schedule import END, FILL, SEMANTIC, SPEECH, START, TURN, schedule

IGNORE = -100


def reference(
    hidden: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    speech: Tensor,
    speech_table: Tensor,
    markers: Tensor,
    rows: Tensor,
    starts: Tensor,
    query_lengths: Tensor,
    text_lengths: Tensor,
    speech_lengths: Tensor,
    vector_starts: Tensor,
    speech_starts: Tensor,
    bistream: Tensor,
    slots: int,
    semantic_block: int,
    speech_block: int,
    hidden_first: bool,
    start_marker: int,
    turn_marker: int,
    fill: int,
    end_of_speech: int,
) -> tuple[Tensor, Tensor]:
    kind = compute_dtype(hidden.dtype)
    slot = starts[:, None].long() + torch.arange(slots, device=hidden.device)
    lengths = (query_lengths[:, None], text_lengths[:, None], speech_lengths[:, None])
    plan = schedule(slot, *lengths, bistream[:, None], semantic_block, speech_block)
    active = (rows >= 0)[:, None]

    # One item more than given, so that an empty window can be indexed too; whatever no slot uses becomes zeros.
    given = hidden.shape[1]
    local, use_vector = _window(plan.index, active & (plan.source == SEMANTIC), vector_starts, given)
    used = torch.zeros(len(rows), given + 1, dtype=torch.bool, device=hidden.device)
    used = used.scatter(1, torch.where(use_vector, local, given), True)[:, :given, None]
    halves = (hidden, embedding) if hidden_first else (embedding, hidden)
    first, second = (torch.where(used, x, 0.0).to(kind) for x in halves)
    split = first.shape[2]
    vectors = F.linear(first, weight[:, :split].to(kind)) + F.linear(second, weight[:, split:].to(kind), bias.to(kind))
    vectors = F.pad(vectors, (0, 0, 0, 1)).gather(1, local[:, :, None].expand(-1, -1, vectors.shape[2]))

    at, use_speech = _window(plan.index, active & (plan.source == SPEECH), speech_starts, speech.shape[1])
    to, use_target = _window(plan.target_index, active & (plan.target == SPEECH), speech_starts, speech.shape[1])
    ids = F.pad(speech.long(), (0, 1))
    tokens = torch.where(use_speech, ids.gather(1, at), 0)

    inputs = torch.where(use_vector[:, :, None], vectors, 0.0)
    inputs = torch.where(use_speech[:, :, None], speech_table[tokens].to(kind), inputs)
    for source, marker in ((START, start_marker), (TURN, turn_marker)):
        inputs = torch.where((active & (plan.source == source))[:, :, None], markers[marker].to(kind), inputs)

    targets = torch.where(use_target, ids.gather(1, to), IGNORE)
    targets = torch.where(active & (plan.target == FILL), fill, targets)
    targets = torch.where(active & (plan.target == END), end_of_speech, targets)
    return inputs.to(hidden.dtype), targets


def _window(index: Tensor, wanted: Tensor, starts: Tensor, given: int) -> tuple[Tensor, Tensor]:
    """Where in a window of `given` items each wanted index lies (`given` if not there), and whether it lies there."""
    local = index - starts[:, None].long()
    there = wanted & (local >= 0) & (local < given)
    return torch.where(there, local, given), there
