"""The voice token LM's inputs and targets: semantic vectors and speech tokens intermixed in a fixed ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Fault, Op, Rule, check, check_counts, check_tensor, checked_rows
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.mix_semantic_speech.reference import reference
from minmo_kernels.ops.mix_semantic_speech.schedule import UNKNOWN_LENGTH, is_bistream

__all__ = ["UNKNOWN_LENGTH", "mix_semantic_speech"]


def mix_semantic_speech(
    hidden: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor,
    speech: Tensor,
    speech_table: Tensor,
    markers: Tensor,
    rows: Tensor,
    query_lengths: Tensor,
    text_lengths: Tensor,
    speech_lengths: Tensor,
    starts: Tensor | None = None,
    vector_starts: Tensor | None = None,
    speech_starts: Tensor | None = None,
    bistream: Tensor | None = None,
    *,
    slots: int,
    fill: int,
    end_of_speech: int,
    semantic_block: int = 5,
    speech_block: int = 15,
    hidden_first: bool = True,
    start_marker: int = 0,
    turn_marker: int = 1,
) -> tuple[Tensor, Tensor]:
    """Slots starts .. starts + slots - 1 of each row's sequence: inputs and next-token targets of the voice token LM.

    The sequence is [sos][query vectors], blocks of {5 semantic vectors, 15 speech tokens}, the remaining semantic
    vectors, [turn of speech], the remaining speech tokens (`schedule.py`; MinMo, arXiv 2501.06282, section 3.2). A
    semantic vector is weight [hidden ; embedding] + bias, the output projector.

    Shapes: hidden (batch, N, dh) and embedding (batch, N, de), LLM states and input embeddings of consecutive semantic
    vectors (the query's first, then the text's); weight (dim, dh + de), bias (dim,); speech (batch, M) int32 or int64
    ids, consecutive speech tokens; speech_table (vocab, dim); markers (n, dim); rows (batch,) int32, -1 = padding.
    Lengths (batch,) int32 in items; a text length of UNKNOWN_LENGTH says that more text will come, and speech_lengths
    then counts the tokens so far. Windows, all (batch,) int32, default 0: starts, the first slot wanted;
    vector_starts, the number (in the sequence) of hidden[:, 0]; speech_starts, of speech[:, 0]. So training gives
    everything from 0, decoding only what is new. bistream (batch,) bool: layout with blocks or with all text first;
    default by the lengths, true where speech / text > 15 / 5.

    hidden_first: order of the two halves along the columns of `weight`. start_marker, turn_marker: rows of `markers`.
    fill, end_of_speech: ids that the slot after a block's speech and the last slot predict.

    Returns inputs (batch, slots, dim) in hidden's dtype and targets (batch, slots) int64. Slots outside a sequence,
    slots whose vector or token lies outside the given windows, and padding rows: zeros, target -100. Vectors that no
    wanted slot holds and ids beyond speech_lengths are never read. Differentiable in every floating-point argument.

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for speech ids outside the table.
    """
    name = "mix_semantic_speech"
    device = hidden.device
    check_tensor(name, "hidden", hidden, "batch vectors hidden_dim", device, *FLOATS)
    check_tensor(name, "embedding", embedding, "batch vectors embedding_dim", device, hidden.dtype)
    check_tensor(name, "weight", weight, "dim hidden_dim+embedding_dim", device, hidden.dtype)
    check_tensor(name, "bias", bias, "dim", device, hidden.dtype)
    check_tensor(name, "speech", speech, "batch tokens", device, torch.int32, torch.int64)
    check_tensor(name, "speech_table", speech_table, "vocab dim", device, hidden.dtype)
    check_tensor(name, "markers", markers, "markers dim", device, hidden.dtype)
    dim, batch = weight.shape[0], hidden.shape[0]
    check(
        embedding.shape[:2] == hidden.shape[:2],
        lambda: f"{name}: hidden {tuple(hidden.shape)} and embedding {tuple(embedding.shape)} must pair up",
    )
    check(
        weight.shape[1] == hidden.shape[2] + embedding.shape[2],
        lambda: f"{name}: weight must have {hidden.shape[2] + embedding.shape[2]} columns, got {weight.shape[1]}",
    )
    for label, tensor in (("bias", bias), ("speech_table", speech_table), ("markers", markers)):
        check(
            tensor.shape[-1] == dim,
            lambda label=label, tensor=tensor: f"{name}: {label} must be {dim} wide, got {tensor.shape[-1]}",
        )
    check(speech.shape[0] == batch, lambda: f"{name}: speech has {speech.shape[0]} entries for a batch of {batch}")
    check(
        slots >= 0 and semantic_block > 0 and speech_block > 0,
        lambda: f"{name}: slots must be >= 0 and both block sizes > 0",
    )
    for marker in (start_marker, turn_marker):
        check(
            0 <= marker < markers.shape[0],
            lambda marker=marker: f"{name}: marker row {marker} does not exist, markers has {markers.shape[0]} rows",
        )
    starts, vector_starts, speech_starts = (
        torch.zeros_like(rows) if given is None else given for given in (starts, vector_starts, speech_starts)
    )
    if bistream is None:
        bistream = is_bistream(text_lengths, speech_lengths, semantic_block, speech_block)
    counts = {"query_lengths": query_lengths, "text_lengths": text_lengths, "speech_lengths": speech_lengths}
    for label, tensor, kind in (
        ("rows", rows, torch.int32),
        *((label, lengths, torch.int32) for label, lengths in counts.items()),
        ("starts", starts, torch.int32),
        ("vector_starts", vector_starts, torch.int32),
        ("speech_starts", speech_starts, torch.int32),
        ("bistream", bistream, torch.bool),
    ):
        check_tensor(name, label, tensor, "batch", device, kind)
        check(
            tensor.shape[0] == batch,
            lambda label=label, tensor=tensor: f"{name}: {label} has {tensor.shape[0]} entries for a batch of {batch}",
        )
    rows = checked_rows(
        name,
        rows,
        None,
        *(check_counts(name, label, lengths, batch, UNKNOWN_LENGTH) for label, lengths in counts.items()),
        _known_ids(speech, speech_starts, speech_lengths, len(speech_table)),
    )
    return OP(
        hidden, embedding, weight, bias, speech, speech_table, markers, rows, starts, query_lengths, text_lengths,
        speech_lengths, vector_starts, speech_starts, bistream, slots, semantic_block, speech_block, hidden_first,
        start_marker, turn_marker, fill, end_of_speech,
    )  # fmt: skip


def _known_ids(speech: Tensor, starts: Tensor, lengths: Tensor, vocab: int) -> Rule:
    """The rule that the speech tokens that exist are rows of the table."""

    def unknown() -> Tensor:
        number = starts[:, None] + torch.arange(speech.shape[1], device=speech.device, dtype=torch.int32)
        return (number >= 0) & (number < lengths[:, None]) & ((speech < 0) | (speech >= vocab))

    return (
        Fault.ID,
        lambda _: unknown().any(dim=1),
        lambda entry: (
            f"speech ids must lie in 0 .. {vocab - 1} (rows of speech_table),"
            f" got {speech[entry][unknown()[entry]].tolist()}"
        ),
    )


def _fake(hidden, embedding, weight, bias, speech, speech_table, markers, rows, starts, query_lengths, text_lengths,
          speech_lengths, vector_starts, speech_starts, bistream, slots, *constants):  # fmt: skip
    batch = hidden.shape[0]
    return hidden.new_empty((batch, slots, weight.shape[0])), rows.new_empty((batch, slots), dtype=torch.int64)


OP = Op(
    "mix_semantic_speech",
    "(Tensor hidden, Tensor embedding, Tensor weight, Tensor bias, Tensor speech, Tensor speech_table, Tensor markers,"
    " Tensor rows, Tensor starts, Tensor query_lengths, Tensor text_lengths, Tensor speech_lengths,"
    " Tensor vector_starts, Tensor speech_starts, Tensor bistream, int slots, int semantic_block, int speech_block,"
    " bool hidden_first, int start_marker, int turn_marker, int fill, int end_of_speech) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    features=lambda *args: {"hidden_first": args[18]},
    backends=(triton_backend("mix_semantic_speech", backward=True),),
)
