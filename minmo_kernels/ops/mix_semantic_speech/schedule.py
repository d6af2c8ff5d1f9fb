"""The interleaved sequence of the voice token LM as a closed form: slot -> what stands there and what it predicts.

One schedule serves the training layout, one-shot inference and step-by-step decoding. Sequence of a row with query
length Q, text length L and speech length S, for the ratio 5:15 (MinMo, arXiv 2501.06282, section 3.2; targets as in
CosyVoice 2, arXiv 2412.10117, section 2.3):

    [sos] [Q query vectors] F x {[5 semantic vectors] [15 speech tokens]} [L - 5F semantic vectors] [turn of speech]
    [the remaining speech tokens]

F = L // 5 in the bistream layout, 0 in the unistream layout. All numbers here are computed in int64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN_LENGTH = 1 << 24
"""Text length of a row whose text is not complete yet: every slot then lies in a block."""

NONE, START, SEMANTIC, TURN, SPEECH, FILL, END = range(7)
"""What a slot holds (NONE, START, SEMANTIC, TURN, SPEECH) or predicts (NONE, SPEECH, FILL, END)."""


class Schedule(NamedTuple):
    """int64 tensors of one shape. index: number of the semantic vector (query first, then text) or speech token."""

    source: Tensor
    index: Tensor  # type: ignore[assignment]
    target: Tensor
    target_index: Tensor


def is_bistream(text_lengths: Tensor, speech_lengths: Tensor, semantic_block: int, speech_block: int) -> Tensor:
    """Which layout lengths ask for in training: bool, true where speech / text exceeds the ratio (15 / 5)."""
    return speech_lengths.long() * semantic_block > text_lengths.long() * speech_block


def schedule(
    slot: Tensor,
    query_lengths: Tensor,
    text_lengths: Tensor,
    speech_lengths: Tensor,
    bistream: Tensor,
    semantic_block: int = 5,
    speech_block: int = 15,
) -> Schedule:
    """What stands in each slot and what it predicts; all arguments broadcast. NONE lies outside the sequence.

    A block's last semantic slot predicts its first speech token, each speech slot the next one, and the block's last
    speech slot predicts FILL ("give me text"), which itself is never an input. Turn of speech predicts the next speech
    token, the last speech token predicts END; everything else predicts nothing.
    """
    query, speech = query_lengths.long(), speech_lengths.long()
    blocks, cycle, rest = _layout(text_lengths, bistream, semantic_block, speech_block)
    place = slot.long() - 1 - query
    in_query = (place < 0) & (slot > 0)
    in_block = (place >= 0) & (place < cycle * blocks)
    block = torch.div(place, cycle, rounding_mode="floor")
    offset = place - cycle * block
    tail = place - cycle * blocks

    semantic = torch.where(in_block, offset < semantic_block, (tail >= 0) & (tail < rest))
    text = torch.where(in_block, semantic_block * block + offset, semantic_block * blocks + tail)
    # Speech tokens before the slot's right edge: a slot that predicts speech predicts this one.
    after = torch.where(
        in_block, speech_block * block + offset - semantic_block + 1, speech_block * blocks + tail - rest
    )
    token = after - 1
    is_speech = torch.where(in_block, offset >= semantic_block, tail > rest) & (token < speech)

    source = torch.where(slot == 0, START, NONE)
    source = torch.where(semantic | in_query, SEMANTIC, source)
    source = torch.where(~in_block & (tail == rest), TURN, source)
    source = torch.where(is_speech, SPEECH, source)
    index = torch.where(in_query, slot - 1, torch.where(semantic, query + text, torch.where(is_speech, token, 0)))

    last = offset == cycle - 1
    predicts = torch.where(in_block, (offset >= semantic_block - 1) & ~last, tail >= rest)
    target = torch.where(predicts & (after < speech), SPEECH, NONE)
    target = torch.where(in_block & last & (token < speech), FILL, target)
    target = torch.where(~in_block & predicts & (after == speech), END, target)
    return Schedule(source, index, target, torch.where(target == SPEECH, after, 0))


def slot_of_speech(
    index: Tensor,
    query_lengths: Tensor,
    text_lengths: Tensor,
    bistream: Tensor,
    semantic_block: int = 5,
    speech_block: int = 15,
) -> Tensor:
    """Inverse of the schedule: the slot of speech token `index` (int64); the slot before it predicts that token."""
    blocks, cycle, rest = _layout(text_lengths, bistream, semantic_block, speech_block)
    index = index.long()
    block = torch.div(index, speech_block, rounding_mode="floor")
    inside = cycle * block + semantic_block + index - speech_block * block
    tail = cycle * blocks + rest + 1 + index - speech_block * blocks
    return 1 + query_lengths.long() + torch.where(block < blocks, inside, tail)


def total_slots(query_lengths: Tensor, text_lengths: Tensor, speech_lengths: Tensor) -> Tensor:
    """Length of a complete sequence in slots (int64), the same in both layouts."""
    return 2 + query_lengths.long() + text_lengths.long() + speech_lengths.long()


def _layout(
    text_lengths: Tensor, bistream: Tensor, semantic_block: int, speech_block: int
) -> tuple[Tensor, int, Tensor]:
    """(full blocks, slots a block, semantic vectors after the last full block)."""
    text = text_lengths.long()
    blocks = torch.where(bistream, torch.div(text, semantic_block, rounding_mode="floor"), 0)
    return blocks, semantic_block + speech_block, text - semantic_block * blocks
