"""Library calls as their users make them, beside which `streaming_attention` is timed.

The backends of minmo_kernels adapt such calls to its contract (rows, padding), which costs small launches around them;
here everything that can be done ahead is done ahead, so that the library is measured and not the adapter. Cases are
`filled`: every cache full and no entry padding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from minmo_kernels.ops.streaming_attention.backends import INSTALLED

Call = tuple[Callable[..., Tensor], dict[str, Any]]
"""A function and its arguments -> (batch, T, heads, dim)."""


def sdpa_flash(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, **_: Any) -> Call | str:
    """scaled_dot_product_attention pinned to its flash kernel, caches gathered ahead."""
    if k_cache.dtype == torch.int8:
        return "it takes no int8 caches"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        mask = causal_lower_right(queries, keys) if queries > 1 else None
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    session = rows.long()
    k, v = (cache[session].transpose(1, 2) for cache in (k_cache, v_cache))
    return call, {"q": q.transpose(1, 2), "k": k, "v": v}


def flash_attn(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, lengths: Tensor, **_: Any) -> Call | str:
    """flash_attn_with_kvcache with ends and sessions as it takes them."""
    if not INSTALLED["flash_attn"]:
        return "flash_attn is not installed"
    if not q.is_cuda or k_cache.dtype not in (torch.float16, torch.bfloat16):
        return "it runs on a GPU, in fp16 and bf16"
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache

    def call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, session: Tensor) -> Tensor:
        return function(q, k, v, cache_seqlens=ends, cache_batch_idx=session, causal=True)

    return call, {"q": q, "k": k_cache, "v": v_cache, "ends": lengths[rows.long()], "session": rows}


PEERS: dict[str, dict[str, Callable[..., Call | str]]] = {
    "streaming_attention": {"sdpa_flash alone": sdpa_flash, "flash_attn alone": flash_attn}
}
"""By operation, by name: given the operation's arguments, a call or why there is none."""
