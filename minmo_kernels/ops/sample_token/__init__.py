"""Choosing the next token: temperature, top-k, nucleus and repetition-aware sampling, each row by its own settings."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Fault, Op, Rule, check, check_tensor, checked_rows
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.sample_token.reference import allowed, reference


def sample_token(
    logits: Tensor,
    rows: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    history: Tensor | None = None,
    banned: Tensor | None = None,
    *,
    stream: int = 0,
    repetition_limit: int = 1,
) -> Tensor:
    """One token id for each entry, (batch,) int32; padding entries give -1.

    Shapes: logits (batch, vocab); rows (batch,) int32, -1 = padding. Settings have a row per session and live on the
    device: seeds (sessions,) int64; positions (sessions,) int64, the absolute index of the token that is drawn now;
    temperature (sessions,) fp32, 0 or less = greedy, infinity = every candidate alike; top_k (sessions,) int32, 0 or
    less = no limit; top_p (sessions,) fp32, 1 or more = no limit, 0 or less = the best id alone; history (sessions,
    window) int32, recent ids of each session in any order, -1 = empty. banned (batch, n) int32: ids that this call must
    not give, -1 = none.

    Greedy takes the largest logit, the lowest id among equals. Otherwise ids are ranked by logit (equals by id) and an
    id is a candidate while the probability of all better ones under softmax(logits / temperature) is < top_p and its
    rank is < top_k; the best one always is. One candidate is drawn by its probability. Repetition-aware sampling: if
    the drawn id occurs at least `repetition_limit` times in `history`, it is masked and the token is drawn again from
    the whole softmax, unless nothing else is left. Banned ids stay banned throughout; greedy is never redrawn.

    Randomness: Gumbel-max, argmax(logits / temperature - log(-log(u))). u of id i comes from the Philox block with key
    = the session's seed and counter = (position low, position high, i, stream): word 0 for the draw, word 1 for the
    redraw. So a token depends on its session's seed, position and logits only. `stream` (0 .. 2^32 - 1) separates uses
    of one seed.

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for active entries whose logits hold
    NaN or leave nothing to choose; elsewhere NaN is never chosen, and an entry without a choice gives id 0.
    Sources: VALL-E 2 (arXiv 2406.05370, section 3.1) and CosyVoice 2 for the repetition-aware rule.
    """
    name = "sample_token"
    device = logits.device
    check_tensor(name, "logits", logits, "batch vocab", device, *FLOATS)
    check_tensor(name, "rows", rows, "batch", device, torch.int32)
    check(rows.shape[0] == logits.shape[0], lambda: f"{name}: rows has {rows.shape[0]} entries, logits {len(logits)}")
    check(logits.shape[1] > 0, lambda: f"{name}: logits have no ids to choose from")
    settings = (
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
    )
    for label, tensor, dtype in settings:
        check_tensor(name, label, tensor, "sessions", device, dtype)
    if history is not None:
        check_tensor(name, "history", history, "sessions window", device, torch.int32)
    sizes = {len(t) for _, t, _ in settings} | (set() if history is None else {len(history)})
    check(len(sizes) == 1, lambda: f"{name}: the settings differ in their number of sessions: {sorted(sizes)}")
    if banned is not None:
        check_tensor(name, "banned", banned, "batch n", device, torch.int32)
        check(len(banned) == len(rows), lambda: f"{name}: banned has {len(banned)} entries for {len(rows)} rows")
    check(0 <= stream < 2**32, lambda: f"{name}: stream must be in 0 .. 2^32 - 1, got {stream}")
    check(repetition_limit >= 1, lambda: f"{name}: repetition_limit must be at least 1, got {repetition_limit}")
    broken: Rule = (
        Fault.NUMBER,
        lambda _: logits.isnan().any(dim=1),
        lambda _: "logits hold NaN; look for the overflow in the model that made them",
    )
    empty: Rule = (
        Fault.NUMBER,
        lambda _: allowed(logits, banned).isneginf().all(dim=1),
        lambda entry: f"every id of entry {entry} is banned or has the logit -inf; leave one",
    )
    rows = checked_rows(name, rows, len(seeds), broken, empty)
    return OP(
        logits, rows, seeds, positions, temperature, top_k, top_p, history, banned, stream, repetition_limit
    )  # fmt: skip


OP = Op(
    "sample_token",
    "(Tensor logits, Tensor rows, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p,"
    " Tensor? history, Tensor? banned, int stream, int repetition_limit) -> Tensor",
    reference=reference,
    fake=lambda logits, *args: logits.new_empty(logits.shape[:1], dtype=torch.int32),
    features=lambda *args: {"history": args[7] is not None, "banned": args[8] is not None},
    backends=(triton_backend("sample_token"),),
)
