"""`sample_token` in plain PyTorch: tensor arithmetic only, so it runs without a host synchronisation on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype
from minmo_kernels.philox import philox_4x32, unit_interval

_MASK = 0xFFFFFFFF


def reference(
    logits: Tensor,
    rows: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    history: Tensor | None,
    banned: Tensor | None,
    stream: int,
    repetition_limit: int,
) -> Tensor:
    active, row = rows >= 0, rows.clamp(min=0).long()
    scores = _finite(logits, active) if banned is None else _without(_finite(logits, active), banned)
    if logits.is_cpu and bool((active & scores.isneginf().all(dim=1)).any()):
        raise ValueError("sample_token: every id of an active entry is banned or has the logit -inf; leave one")

    wanted = temperature[row][:, None].to(scores.dtype)
    greedy = ~(wanted > 0)
    top = scores.amax(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    scaled = torch.where(scores.isneginf(), -math.inf, (scores - top) / torch.where(greedy, 1.0, wanted))

    kept = _candidates(scores, scaled, top_k[row][:, None], top_p[row][:, None])
    noise, redraw_noise = (n.to(scores.dtype) for n in _gumbel(seeds[row], positions[row], stream, scores.shape[1]))
    drawn = torch.where(kept, scaled + noise, -math.inf).argmax(dim=1, keepdim=True)

    if history is not None:
        repeated = (history[row] == drawn).sum(dim=1, keepdim=True) >= repetition_limit
        others = (scaled + redraw_noise).scatter(1, drawn, -math.inf)
        best, other = others.max(dim=1, keepdim=True)
        drawn = torch.where(repeated & ~best.isneginf(), other, drawn)

    chosen = torch.where(greedy, scores.argmax(dim=1, keepdim=True), drawn)[:, 0]
    return torch.where(active, chosen, -1).to(torch.int32)


def _finite(logits: Tensor, active: Tensor) -> Tensor:
    """Logits in the compute dtype: NaN becomes -inf (never chosen), +inf the largest number; zeros for padding."""
    if logits.is_cpu and bool((logits.isnan().any(dim=1) & active).any()):
        raise ValueError("sample_token: logits hold NaN; look for the overflow in the model that made them")
    wide = torch.where(active[:, None], logits, 0.0).to(compute_dtype(logits.dtype))
    return wide.nan_to_num(nan=-math.inf, posinf=torch.finfo(wide.dtype).max, neginf=-math.inf)


def _without(scores: Tensor, banned: Tensor) -> Tensor:
    vocab = scores.shape[1]
    index = torch.where((banned >= 0) & (banned < vocab), banned, vocab).long()
    mask = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device).scatter(1, index, True)
    return torch.where(mask[:, :vocab], -math.inf, scores)


def _candidates(scores: Tensor, scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(batch, vocab) bool: which ids the draw may give. Sorted by the unscaled scores, whose order is exact."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    probability = scaled.gather(1, order).softmax(dim=1)
    before = torch.nn.functional.pad(probability.cumsum(dim=1)[:, :-1], (1, 0))
    rank = torch.arange(scores.shape[1], device=scores.device)
    kept = ((before < top_p) | (top_p >= 1)) & ((rank < top_k) | (top_k <= 0)) | (rank == 0)
    return torch.zeros_like(kept).scatter(1, order, kept)


def _gumbel(seeds: Tensor, positions: Tensor, stream: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Two independent standard Gumbel values for each entry and id, (batch, vocab) each: the draw's, the redraw's."""
    ids = torch.arange(vocab, device=seeds.device)[None]
    position, seed = positions[:, None], seeds[:, None]
    counter = (position & _MASK, (position >> 32) & _MASK, ids, torch.full_like(ids, stream))
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    first, second = (-torch.log(-torch.log(unit_interval(w.expand(-1, vocab)))) for w in words[:2])
    return first, second
