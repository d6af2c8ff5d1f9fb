"""Libraries that do the same job as `streaming_attention`: each with what it refuses, and the call.

On a CPU PyTorch's scaled dot-product attention: lengths are read on the host and each entry attends over exactly the
slots it may see, so nothing beyond a length is ever touched. On a GPU flash-attn, PyTorch's varlen attention and
xformers, peers of our kernel and its oracles, and flex attention, which takes every mask but copies the cache.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo_kernels.dispatch import Backend, Request
from minmo_kernels.ops.streaming_attention.reference import (
    cached_values,
    first_visible,
    query_positions,
    slot_positions,
    visible,
)

PAGE = 256
"""The unit of a page of keys in the flash kernels behind varlen attention."""


INSTALLED = {
    "flash_attn": importlib.util.find_spec("flash_attn") is not None,
    "xformers": importlib.util.find_spec("xformers") is not None,
    "varlen": tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13),  # earlier ones read no caches
}
"""Looked up once, at import."""


def _torch_refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return "reads lengths on the host, so it serves on a CPU only"
    if request.features["lse"] or request.features["partials"]:
        return "scaled_dot_product_attention returns no log-sum-exp"
    if torch.int8 in request.dtypes:
        return "scaled_dot_product_attention takes no int8 caches"
    return None


def _gpu_library_refuses(request: Request, module: str) -> str | None:
    """What none of the flash libraries serves."""
    if not INSTALLED[module]:
        return "it came with torch 2.13" if module == "varlen" else f"{module} is not installed"
    if request.device != "cuda":
        return "it runs on a GPU only"
    if request.capability is not None and request.capability < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if request.dtypes[0] not in (torch.float16, torch.bfloat16):
        return "it takes fp16 and bf16 only"
    if request.features["dim"] % 8 or request.features["dim"] > 256:
        return "its head dimension is a multiple of 8 up to 256"
    if torch.int8 in request.dtypes:
        return "it takes no int8 caches"
    if request.grad:
        return "attention over a cache has no backward there"
    if request.features["ring"]:
        return "its keys lie in the order of positions, a ring's do not"
    if request.features["mask"] == "chunk":
        return "it has no chunked mask over one range of queries"
    if request.features["ragged"]:
        return "every entry has the same number of queries there"
    if request.features["partials"]:
        return "it returns merged results only"
    return None


def _flash_refuses(request: Request) -> str | None:
    return _gpu_library_refuses(request, "flash_attn")


def _varlen_refuses(request: Request) -> str | None:
    if reason := _gpu_library_refuses(request, "varlen"):
        return reason
    return None if request.features["paged"] else f"a session's capacity must be a multiple of its page, {PAGE}"


def _xformers_refuses(request: Request) -> str | None:
    if reason := _gpu_library_refuses(request, "xformers"):
        return reason
    if request.features["window"]:
        return "its masks over a cache have no window"
    return "it returns no log-sum-exp here" if request.features["lse"] else None


def _flex_refuses(request: Request) -> str | None:
    if request.device != "cuda":
        return "without a GPU it is eager attention, which the reference is already"
    if not request.forced:
        return "it copies the cache: an oracle, which serves where it is forced"
    if torch.float64 in request.dtypes or request.features["dim"] < 16:
        return "it takes 32 bits at most and head dimensions from 16"
    if request.features["partials"]:
        return "it returns merged results only"
    return "attention over a cache has no backward here" if request.grad else None


def _torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    mask: str,
    window: int,
    chunk: int,
    left_chunks: int,
    chunk_offset: int,
    ring: bool,
    scale: float,
    partials: int,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    capacity, kv_heads = k_cache.shape[1], k_cache.shape[2]
    counts = [queries] * batch if q_lengths is None else q_lengths.tolist()
    ends = lengths.tolist()
    # Rows by unbind: the gradient of an index is as large as what was indexed, once a row.
    queries_of, keys_of, values_of = q.unbind(), k_cache.unbind(), v_cache.unbind()
    outs = []
    for entry, (row, count) in enumerate(zip(rows.tolist(), counts, strict=True)):
        out = q.new_zeros(q.shape[1:])
        if row >= 0 and count > 0:
            end = ends[row]
            first = end - count
            start = max(0, first_visible(first, mask, window, chunk, left_chunks, chunk_offset))
            if ring:
                start = max(start, end - capacity)
                slots = torch.arange(start, end) % capacity
                k, v = keys_of[row][slots], values_of[row][slots]
            else:
                k, v = keys_of[row][start:end], values_of[row][start:end]
            # A whole causal sequence needs no mask of its own, and a lone query sees all that is left.
            whole = mask == "causal" and window == 0 and count == end
            see = None
            if not (whole or mask == "full" or (mask == "causal" and count == 1)):
                position = torch.arange(first, end)[:, None]
                see = visible(position, torch.arange(start, end)[None], mask, window, chunk, left_chunks, chunk_offset)
            result = F.scaled_dot_product_attention(
                queries_of[entry][:count].transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=see,
                is_causal=whole,
                scale=scale,
                enable_gqa=heads != kv_heads,
            )
            out = F.pad(result[0].transpose(0, 1), [0, 0, 0, 0, 0, queries - count])
        outs.append(out)
    return torch.stack(outs) if outs else q.new_empty(q.shape), q.new_empty(0, dtype=torch.float32)


def _ends(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Session of each entry and its end position, 0 and 0 for padding. (batch,) int32"""
    session = rows.clamp(min=0)
    return session, torch.where(rows >= 0, lengths[session.long()], 0).to(torch.int32)


def _cleared(out: Tensor, lse: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros and -inf for padding entries. out (batch, T, heads, dim), lse (batch, T, heads)"""
    active = (rows >= 0)[:, None, None]
    out = torch.where(active[..., None], out, 0.0)
    if lse is None:
        return out, out.new_empty(0, dtype=torch.float32)
    return out, torch.where(active, lse.float(), float("-inf"))


def _flash(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, lengths: Tensor, _q_lengths: None, _k_scale: None,
    _v_scale: None, mask: str, window: int, _chunk: int, _left: int, _offset: int, _ring: bool, scale: float,
    _partials: int, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    session, ends = _ends(rows, lengths)
    out, lse, *_ = importlib.import_module("flash_attn").flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=ends, cache_batch_idx=session, softmax_scale=scale, causal=mask == "causal",
        window_size=(window - 1, 0) if window else (-1, -1), return_softmax_lse=True,
    )  # fmt: skip
    return _cleared(out, lse.transpose(1, 2) if return_lse else None, rows)


def _varlen(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, lengths: Tensor, _q_lengths: None, _k_scale: None,
    _v_scale: None, mask: str, window: int, _chunk: int, _left: int, _offset: int, _ring: bool, scale: float,
    _partials: int, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A session is one page."""
    varlen = importlib.import_module("torch.nn.attention.varlen")
    batch, queries, heads, dim = q.shape
    session, ends = _ends(rows, lengths)
    left = -1 if window == 0 else window - 1
    starts = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * queries
    out, lse = varlen.varlen_attn(
        q.flatten(0, 1), k_cache, v_cache, starts, None, queries, k_cache.shape[1],
        return_aux=varlen.AuxRequest(lse=True), scale=scale, window_size=(left, 0 if mask == "causal" else -1),
        enable_gqa=heads != k_cache.shape[2], seqused_k=ends, block_table=session[:, None],
    )  # fmt: skip
    # The documentation says (queries, heads); the operator beneath and its fake function say (heads, queries).
    lse = lse.T.reshape(batch, queries, heads) if return_lse else None
    return _cleared(out.view(batch, queries, heads, dim), lse, rows)


def _xformers(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, lengths: Tensor, _q_lengths: None, _k_scale: None,
    _v_scale: None, mask: str, _window: int, _chunk: int, _left: int, _offset: int, _ring: bool, scale: float,
    _partials: int, _return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Its masks are built from lists, so this reads lengths on the host and cannot be captured."""
    fmha = importlib.import_module("xformers.ops.fmha")
    batch, queries, heads, dim = q.shape
    sessions, capacity, kv_heads, _ = k_cache.shape
    session, ends = _ends(rows, lengths)
    # Padding attends over something that exists; its result is thrown away.
    ends = torch.where(rows >= 0, ends, queries)
    kind = fmha.attn_bias.BlockDiagonalGappyKeysMask
    if mask == "causal":
        kind = fmha.attn_bias.BlockDiagonalCausalWithOffsetGappyKeysMask
    bias = kind.from_seqlens(
        q_seqlen=[queries] * batch,
        kv_seqstarts=[*(session * capacity).tolist(), sessions * capacity],
        kv_seqlen=ends.tolist(),
        device=q.device,
    )
    grouped = (1, -1, kv_heads, heads // kv_heads, dim)
    k, v = (cache.reshape(1, -1, kv_heads, 1, dim).expand(grouped) for cache in (k_cache, v_cache))
    out = fmha.memory_efficient_attention(q.reshape(grouped), k, v, attn_bias=bias, scale=scale)
    return _cleared(out.reshape(q.shape), None, rows)


def _flex(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, lengths: Tensor, q_lengths: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, mask: str, window: int, chunk: int, left_chunks: int,
    chunk_offset: int, ring: bool, scale: float, _partials: int, return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Copies what each session has written, so that nothing else is read: an oracle, not a fast path."""
    session, ends = _ends(rows, lengths)
    query, exists = query_positions(ends, rows, q_lengths, q.shape[1])
    key, written = slot_positions(ends, k_cache.shape[1], ring)
    see = written[:, None] & exists[:, :, None]
    see = see & visible(query[:, :, None], key[:, None], mask, window, chunk, left_chunks, chunk_offset)
    k, v = (
        torch.where(written[:, :, None, None], cached_values(cache, scales, session.long(), q.dtype), 0.0)
        for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
    )
    clean = torch.where(exists[:, :, None, None], q, 0.0)

    def hidden(score: Tensor, b: Tensor, _head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(see[b, t, s], score, float("-inf"))

    out, aux = _flex_attention()(
        clean.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=hidden, scale=scale,
        enable_gqa=q.shape[2] != k_cache.shape[2], return_aux=_lse_request(),
    )  # fmt: skip
    some = see.any(dim=2)[:, :, None]
    out = torch.where(some[..., None], out.transpose(1, 2), 0.0)
    lse = torch.where(some, aux.lse.transpose(1, 2).float(), float("-inf"))
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


def _lse_request() -> Any:
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)


@functools.cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


BACKENDS = (
    Backend("torch", _torch, _torch_refuses),
    Backend("flash_attn", _flash, _flash_refuses),
    Backend("varlen", _varlen, _varlen_refuses),
    Backend("xformers", _xformers, _xformers_refuses),
    Backend("flex", _flex, _flex_refuses),
)
"""In the order of preference after our own kernel."""
