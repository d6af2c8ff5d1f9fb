"""`sample_token` in plain PyTorch: tensor arithmetic only, so no host synchronisation on a GPU."""

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
    if len(rows) == 0:
        return rows.clone()
    active, row = rows >= 0, rows.clamp(min=0).long()
    scores = allowed(torch.where(active[:, None], logits, 0.0).to(compute_dtype(logits.dtype)), banned)

    wanted = temperature[row][:, None].to(scores.dtype)
    greedy = ~(wanted > 0)
    top = scores.amax(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    below = scores - top
    scaled = torch.where(below.isneginf(), -math.inf, below / torch.where(greedy, 1.0, wanted))

    # Ranked by the unscaled scores, whose order is exact.
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    kept = _candidates(scaled.gather(1, ranked), torch.where(greedy, 1, top_k[row][:, None]), top_p[row][:, None])
    if logits.is_cpu:  # where looking at a number costs nothing: noise for the candidates only
        width = int(kept.sum(dim=1).amax())
        ranked, kept = ranked[:, :width], kept[:, :width]
    seed, position = seeds[row][:, None], positions[row][:, None]
    noise = _gumbel(seed, position, ranked, stream, word=0).to(scores.dtype)
    best = torch.where(kept, scaled.gather(1, ranked) + noise, -math.inf).argmax(dim=1, keepdim=True)
    drawn = ranked.gather(1, best)

    if history is not None:
        again = ((history[row] == drawn).sum(dim=1, keepdim=True) >= repetition_limit) & ~greedy & active[:, None]
        if not logits.is_cpu or bool(again.any()):
            ids = torch.arange(scores.shape[1], device=scores.device)[None]
            noise = _gumbel(seed, position, ids, stream, word=1).to(scores.dtype)
            largest, other = (scaled + noise).scatter(1, drawn, -math.inf).max(dim=1, keepdim=True)
            drawn = torch.where(again & ~largest.isneginf(), other, drawn)
    return torch.where(active, drawn[:, 0], -1).to(torch.int32)


def allowed(logits: Tensor, banned: Tensor | None) -> Tensor:
    """Logits with -inf for NaN and banned ids, the largest number for +inf."""
    scores = logits.nan_to_num(nan=-math.inf, posinf=torch.finfo(logits.dtype).max, neginf=-math.inf)
    if banned is None:
        return scores
    vocab = scores.shape[1]
    index = torch.where((banned >= 0) & (banned < vocab), banned, vocab).long()
    mask = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device).scatter(1, index, True)
    return torch.where(mask[:, :vocab], -math.inf, scores)


def _candidates(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(batch, vocab) bool: which ranks the draw may give; the first one always. scaled: by rank."""
    before = torch.nn.functional.pad(scaled.softmax(dim=1).cumsum(dim=1)[:, :-1], (1, 0))
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    return ((before < top_p) | (top_p >= 1)) & ((rank < top_k) | (top_k <= 0)) | (rank == 0)


def _gumbel(seed: Tensor, position: Tensor, ids: Tensor, stream: int, word: int) -> Tensor:
    """Standard Gumbel values for ids (batch or 1, n), from one word of each id's Philox block."""
    counter = (position & _MASK, (position >> 32) & _MASK, ids, torch.full_like(ids, stream))
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return -torch.log(-torch.log(unit_interval(words[word])))
