"""Declaration of `mix_semantic_speech`: cases, oracle, laws, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.mix_semantic_speech import UNKNOWN_LENGTH, mix_semantic_speech
from minmo_kernels.ops.mix_semantic_speech.schedule import is_bistream
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import beyond_lengths_nan, generator, normal, random_counts, random_rows

Slot = tuple[str, int, str, int]
"""(source, its index, target, its index): sources start, vector, turn, speech; targets speech, fill, end; "" = none."""


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "query": st.integers(0, 3),
            "text": st.integers(0, 12),
            "speech": st.integers(0, 24),
            "ratio": st.sampled_from([(5, 15), (2, 3), (1, 1)]),
            "dims": st.sampled_from([(8, 3, 5), (4, 6, 6), (20, 17, 18)]),
            "form": st.sampled_from(["training", "window", "decoding"]),
            "hidden_first": st.booleans(),
            "ids": st.sampled_from(["int32", "int64"]),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    """training: whole sequences, layout by the lengths; window: any part of any layout; decoding: text still open,
    and in a `filled` case the first block's vectors for the slots behind [sos]."""
    g = generator(case)
    batch, (dim, hidden_dim, embedding_dim), form, dtype = case["batch"], case["dims"], case["form"], case["dtype"]
    semantic_block, speech_block = case["ratio"]
    vocab = 16

    def some(most: int) -> Tensor:
        return random_counts(g, batch, most, case)

    lengths = {"query": some(case["query"]), "text": some(case["text"]), "speech": some(case["speech"])}
    if form == "decoding":
        lengths["text"] = torch.full((batch,), UNKNOWN_LENGTH, dtype=torch.int32)
    vectors, tokens = case["query"] + case["text"], case["speech"]
    starts, vector_starts, speech_starts, bistream = None, None, None, None
    slots = vectors + tokens + 3
    if form != "training":
        starts, vector_starts, speech_starts = some(slots), some(vectors), some(tokens) - 1
        slots = slots // 2
        if case.get("filled"):
            starts, vector_starts, speech_starts, slots = starts * 0 + 1, starts * 0, starts * 0, vectors
        bistream = torch.ones(batch, dtype=torch.bool) if form == "decoding" else some(1).bool()
    ids = torch.randint(0, vocab, (batch, tokens), generator=g).to(getattr(torch, case["ids"]))
    first = torch.zeros(batch, dtype=torch.int32) if speech_starts is None else speech_starts
    arguments = {
        "hidden": normal(g, batch, vectors, hidden_dim, dtype=dtype),
        "embedding": normal(g, batch, vectors, embedding_dim, dtype=dtype),
        "weight": normal(g, dim, hidden_dim + embedding_dim, dtype=dtype),
        "bias": normal(g, dim, dtype=dtype),
        "speech": beyond_lengths_nan(ids, lengths["speech"] - first),
        "speech_table": normal(g, vocab, dim, dtype=dtype),
        "markers": normal(g, 3, dim, dtype=dtype),
        "rows": random_rows(g, batch, batch + 1, case),
        **{f"{name}_lengths": length for name, length in lengths.items()},
        "starts": starts,
        "vector_starts": vector_starts,
        "speech_starts": speech_starts,
        "bistream": bistream,
        "slots": slots,
        "fill": vocab + 2,
        "end_of_speech": vocab,
        "semantic_block": semantic_block,
        "speech_block": speech_block,
        "hidden_first": case["hidden_first"],
        "start_marker": 2,
        "turn_marker": 1,
    }
    used = torch.zeros(batch, vectors, dtype=torch.bool)
    for b, row in enumerate(_wanted(arguments)):
        for source, index, _, _ in row:
            local = index - (0 if vector_starts is None else int(vector_starts[b]))
            if source == "vector" and 0 <= local < vectors:
                used[b, local] = True
    for half in ("hidden", "embedding"):
        arguments[half] = torch.where(used[:, :, None], arguments[half], float("nan"))
    return arguments


def sequence(
    query: int, text: int, speech: int, bistream: bool, semantic_block: int, speech_block: int
) -> Iterator[Slot]:
    """The sequence written out slot by slot, in the order in which a decoder would produce it."""
    yield "start", 0, "", 0
    for i in range(query):
        yield "vector", i, "", 0
    said = spoken = 0
    while bistream and text - said >= semantic_block:
        for i in range(semantic_block):
            predicts = i == semantic_block - 1 and spoken < speech
            yield "vector", query + said, "speech" if predicts else "", spoken if predicts else 0
            said += 1
        for i in range(speech_block):
            token, spoken = spoken, spoken + 1
            if token >= speech:
                yield "", 0, "", 0
            elif i == speech_block - 1:
                yield "speech", token, "fill", 0
            else:
                yield "speech", token, "speech" if spoken < speech else "", spoken if spoken < speech else 0
    while said < text:
        yield "vector", query + said, "", 0
        said += 1
    token, source = 0, "turn"
    while True:
        if spoken < speech:
            yield source, token, "speech", spoken
        else:
            yield source, token, "end" if spoken == speech else "", 0
        if spoken >= speech:
            break
        token, source, spoken = spoken, "speech", spoken + 1
    while True:
        yield "", 0, "", 0


def _wanted(arguments: Mapping[str, Any]) -> Iterator[list[Slot]]:
    """Each row's slots of a call; empty for padding."""
    a = arguments
    ratio = a["semantic_block"], a["speech_block"]
    layout = a["bistream"]
    if layout is None:
        layout = [
            s / t > ratio[1] / ratio[0] if t else s > 0
            for t, s in zip(a["text_lengths"].tolist(), a["speech_lengths"].tolist(), strict=True)
        ]
    for b, row in enumerate(a["rows"].tolist()):
        start = 0 if a["starts"] is None else int(a["starts"][b])
        lengths = (int(a[f"{name}_lengths"][b]) for name in ("query", "text", "speech"))
        slots = sequence(*lengths, bool(layout[b]), *ratio)
        yield list(islice(slots, start, start + a["slots"])) if row >= 0 else []


def oracle(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Slot by slot from the written-out sequence; one product with the concatenated halves a vector."""
    a = arguments
    weight, bias = a["weight"].double(), a["bias"].double()
    halves = (a["hidden"], a["embedding"]) if a["hidden_first"] else (a["embedding"], a["hidden"])
    pairs = torch.cat([half.double() for half in halves], dim=2)
    inputs = torch.zeros(len(a["rows"]), a["slots"], weight.shape[0], dtype=torch.float64)
    targets = torch.full(inputs.shape[:2], -100, dtype=torch.int64)
    for b, slots in enumerate(_wanted(a)):
        first_vector = 0 if a["vector_starts"] is None else int(a["vector_starts"][b])
        first_token = 0 if a["speech_starts"] is None else int(a["speech_starts"][b])
        for n, (source, index, target, to) in enumerate(slots):
            if source == "start":
                inputs[b, n] = a["markers"][a["start_marker"]]
            elif source == "turn":
                inputs[b, n] = a["markers"][a["turn_marker"]]
            elif source == "vector" and 0 <= index - first_vector < pairs.shape[1]:
                inputs[b, n] = weight @ pairs[b, index - first_vector] + bias
            elif source == "speech" and 0 <= index - first_token < a["speech"].shape[1]:
                inputs[b, n] = a["speech_table"][int(a["speech"][b, index - first_token])]
            if target == "speech" and 0 <= to - first_token < a["speech"].shape[1]:
                targets[b, n] = int(a["speech"][b, to - first_token])
            elif target in ("fill", "end"):
                targets[b, n] = a["fill"] if target == "fill" else a["end_of_speech"]
    return inputs, targets


def _windows_equal_the_whole(case: Case) -> None:
    """Slots taken in two windows equal the slots of one call."""
    arguments = make({**case, "form": "training", "dtype": "float32"})
    arguments["bistream"] = is_bistream(arguments["text_lengths"], arguments["speech_lengths"], *case["ratio"])
    slots = arguments.pop("slots")
    inputs, targets = mix_semantic_speech(**arguments, slots=slots)
    cut = case["seed"] % (slots + 1)
    start = torch.full_like(arguments["rows"], cut)
    left = mix_semantic_speech(**arguments, slots=cut)
    right = mix_semantic_speech(**{**arguments, "starts": start}, slots=slots - cut)
    torch.testing.assert_close(torch.cat([left[0], right[0]], 1), inputs, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([left[1], right[1]], 1), targets)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """A training batch and a decoded block; dims: dim, llm_dim, semantic_block, speech_block."""
    ratio = (dims["semantic_block"], dims["speech_block"])
    widths = (dims["dim"], dims["llm_dim"], dims["llm_dim"])
    for form, batch, text, speech in (("training", 8, 100, 500), ("decoding", 1, 5, 1), ("decoding", 8, 5, 1)):
        yield {
            "dtype": "bfloat16", "batch": batch, "query": 0, "text": text, "speech": speech, "ratio": ratio,
            "dims": widths, "form": form, "hidden_first": True, "ids": "int32", "seed": 0,
        }  # fmt: skip


def _sizes(case: Case) -> tuple[int, int, int, int]:
    """(dim, columns of the weight, vectors, slots) of the whole batch."""
    dim, hidden_dim, embedding_dim = case["dims"]
    vectors, tokens = case["query"] + case["text"], case["speech"]
    slots = vectors + tokens + 3
    slots = slots if case["form"] == "training" else slots // 2
    return dim, hidden_dim + embedding_dim, case["batch"] * vectors, case["batch"] * slots


def moved_bytes(case: Case) -> int:
    """The weight and the vectors once; each slot's row read or computed once and written once."""
    dim, columns, vectors, slots = _sizes(case)
    return getattr(torch, case["dtype"]).itemsize * (dim * columns + vectors * columns + 2 * slots * dim) + 8 * slots


def flops(case: Case) -> int:
    dim, columns, vectors, _ = _sizes(case)
    return 2 * vectors * columns * dim


SPEC = OpSpec(
    name="mix_semantic_speech",
    function=mix_semantic_speech,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    batched=(
        "hidden", "embedding", "speech", "rows", "query_lengths", "text_lengths", "speech_lengths", "starts",
        "vector_starts", "speech_starts", "bistream",
    ),
    invariants={"windows equal the whole": _windows_equal_the_whole},
)  # fmt: skip
