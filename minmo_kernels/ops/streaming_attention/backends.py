"""Libraries that do the same job as `streaming_attention`.

PyTorch's scaled dot-product attention on a CPU: lengths are read on the host and each entry attends over exactly the
slots it may see, so nothing beyond a length is ever touched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minmo_kernels.dispatch import Backend, Request
from minmo_kernels.ops.streaming_attention.reference import first_visible, visible


def _refuses(request: Request) -> str | None:
    if request.device != "cpu":
        return "reads lengths on the host, so it serves on a CPU only"
    if request.features["lse"] or request.features["partials"]:
        return "scaled_dot_product_attention returns no log-sum-exp"
    if torch.int8 in request.dtypes:
        return "scaled_dot_product_attention takes no int8 caches"
    return None


def _run(
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
    outs = []
    for entry, (row, count) in enumerate(zip(rows.tolist(), counts, strict=True)):
        out = q.new_zeros(q.shape[1:])
        if row >= 0 and count > 0:
            end = ends[row]
            first = end - count
            start = first_visible(first, mask, window, chunk, left_chunks, chunk_offset)
            if ring:
                start = max(start, end - capacity)
                slots = torch.arange(start, end) % capacity
                k, v = k_cache[row, slots], v_cache[row, slots]
            else:
                k, v = k_cache[row, start:end], v_cache[row, start:end]
            see = None
            if not (mask == "full" or (mask == "causal" and count == 1)):
                position = torch.arange(first, end)[:, None]
                see = visible(position, torch.arange(start, end)[None], mask, window, chunk, left_chunks, chunk_offset)
            result = F.scaled_dot_product_attention(
                q[entry, :count].transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=see,
                scale=scale,
                enable_gqa=heads != kv_heads,
            )
            out = F.pad(result[0].transpose(0, 1), [0, 0, 0, 0, 0, queries - count])
        outs.append(out)
    return torch.stack(outs), q.new_empty(0, dtype=torch.float32)


TORCH = Backend("torch", _run, _refuses)
