"""First launch of a decode layer: norm, packed qkv projection, bias, rotary embedding and cache write."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, Request, check, check_number, check_tensor, checked_rows
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.append_kv import check_cache_scales, fitting, refuses_head_dim
from minmo_kernels.ops.linear_residual import check_weight, decode_features, refuses_decode
from minmo_kernels.ops.rms_norm_qkv_rope_append.reference import reference


def rms_norm_qkv_rope_append(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    rope_theta: float,
    ring: bool = False,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """One new position a session: `append_kv(rms_norm(x) @ qkv_weight.T + qkv_bias)` without rounding in between.

    Shapes: x (batch, dim); norm_weight (dim,); qkv_weight ((heads + 2 kv_heads) head_dim, dim), packed [q | k | v],
    in a format of `linear_residual`; qkv_bias of as many values, or None; k_cache, v_cache
    (sessions, capacity, kv_heads, head_dim), written in place; rows (batch,) int32, -1 = padding; lengths (sessions,)
    int32, the positions already in each cache: the new one takes position lengths[row], in slot lengths[row] or, with
    `ring`, lengths[row] % capacity. The caller advances them.

    Returns q (batch, heads, head_dim), rotated (half-split pairs), zeros for padding entries. Raises ValueError for
    shapes, dtypes or devices that do not fit, and on a CPU for a position past a linear cache's capacity; the caches
    are then unchanged.
    """
    name = "rms_norm_qkv_rope_append"
    check_tensor(name, "x", x, "batch dim", x.device, *FLOATS)
    check_number(name, "eps", eps, 0.0)
    check_number(name, "rope_theta", rope_theta, 1.0)
    check_tensor(name, "norm_weight", norm_weight, "dim", x.device, x.dtype)
    for label, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, label, cache, "sessions capacity kv_heads head_dim", x.device, x.dtype)
    check_tensor(name, "rows", rows, "batch", x.device, torch.int32)
    check_tensor(name, "lengths", lengths, "sessions", x.device, torch.int32)
    wanted = ((heads + 2 * kv_heads) * k_cache.shape[3], x.shape[1])
    check_weight(name, "qkv_weight", qkv_weight, weight_scale, weight_zero, wanted, x)
    check(
        norm_weight.shape[0] == x.shape[1],
        lambda: f"{name}: norm_weight has {norm_weight.shape[0]} values, x {x.shape[1]}",
    )
    if qkv_bias is not None:
        check_tensor(name, "qkv_bias", qkv_bias, "packed", x.device, x.dtype)
        check(
            qkv_bias.shape[0] == wanted[0], lambda: f"{name}: qkv_bias has {qkv_bias.shape[0]} values, not {wanted[0]}"
        )
    check_cache_scales(name, k_cache, v_cache, None, None, written=True)
    check(k_cache.shape[2] == kv_heads, lambda: f"{name}: the caches have {k_cache.shape[2]} heads, not {kv_heads}")
    check(rows.shape[0] == x.shape[0], lambda: f"{name}: rows has {rows.shape[0]} entries, x {x.shape[0]}")
    check(
        lengths.shape[0] == k_cache.shape[0],
        lambda: f"{name}: lengths has {lengths.shape[0]} rows for {k_cache.shape[0]} sessions",
    )
    rows = checked_rows(name, rows, len(k_cache), fitting(lengths, 1, k_cache.shape[1], ring))
    return OP(
        x,
        norm_weight,
        qkv_weight,
        qkv_bias,
        k_cache,
        v_cache,
        rows,
        lengths,
        weight_scale,
        weight_zero,
        heads,
        kv_heads,
        eps,
        rope_theta,
        ring,
    )


def _refuses(request: Request) -> str | None:
    return refuses_decode(request) or refuses_head_dim(request)


OP = Op(
    "rms_norm_qkv_rope_append",
    "(Tensor x, Tensor norm_weight, Tensor qkv_weight, Tensor? qkv_bias, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor rows, Tensor lengths, Tensor? weight_scale, Tensor? weight_zero, int heads, int kv_heads, float eps,"
    " float rope_theta, bool ring) -> Tensor",
    reference=reference,
    fake=lambda x, norm, weight, bias, k_cache, v_cache, rows, lengths, scale, zero, heads, *rest: x.new_empty(
        (x.shape[0], heads, k_cache.shape[3])
    ),
    features=lambda x, norm, weight, bias, k, *args: {
        "ring": args[-1],
        "dim": k.shape[3],
        **decode_features(x, weight),
    },
    backends=(triton_backend("rms_norm_qkv_rope_append", _refuses),),
)
