"""Bias, rotary embedding and cache write of new positions, from the packed qkv projection."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import (
    FLOATS,
    Fault,
    Op,
    Request,
    Rule,
    check,
    check_counts,
    check_number,
    check_tensor,
    checked_rows,
)
from minmo_kernels.launch import triton_backend
from minmo_kernels.ops.append_kv.reference import reference


def append_kv(
    qkv: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    q_lengths: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    heads: int,
    kv_heads: int,
    rope_theta: float = 10_000.0,
    rope: bool = True,
    ring: bool = False,
) -> Tensor:
    """Adds the bias, rotates q and k by their positions, writes k and v into the caches in place and returns q.

    Shapes: qkv (batch, T, (heads + 2 kv_heads) dim), packed [q | k | v]; bias ((heads + 2 kv_heads) dim,) or None;
    k_cache, v_cache (sessions, capacity, kv_heads, dim), written; rows (batch,) int32, -1 = padding; lengths
    (sessions,) int32, the positions already in each cache: new item t of entry b becomes position
    lengths[rows[b]] + t. The caller advances the lengths afterwards. q_lengths (batch,) int32: new items, default T.

    Caches hold qkv's dtype, or int8 with k_scale and v_scale (sessions, capacity, kv_heads) fp32, written likewise: a
    vector is then kept as round(vector / scale), scale being its largest magnitude / 127.

    Rotary embedding: half-split pairs (i, i + dim/2), angle = position * rope_theta^(-2i/dim). Slots: position p in
    slot p, or p % capacity with `ring`. Returns q (batch, T, heads, dim), zeros for what does not exist.

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for positions past a linear cache's
    capacity; the caches are then unchanged.
    """
    name = "append_kv"
    check_tensor(name, "qkv", qkv, "batch T packed", qkv.device, *FLOATS)
    check_number(name, "rope_theta", rope_theta, 1.0)
    for label, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, label, cache, "sessions capacity kv_heads dim", qkv.device, qkv.dtype, torch.int8)
    check_cache_scales(name, k_cache, v_cache, k_scale, v_scale, written=True)
    check_tensor(name, "rows", rows, "batch", qkv.device, torch.int32)
    check_tensor(name, "lengths", lengths, "sessions", qkv.device, torch.int32)
    if bias is not None:
        check_tensor(name, "bias", bias, "packed", qkv.device, qkv.dtype)
    rules: list[Rule] = []
    if q_lengths is not None:
        check_tensor(name, "q_lengths", q_lengths, "batch", qkv.device, torch.int32)
        rules.append(check_counts(name, "q_lengths", q_lengths, len(qkv), qkv.shape[1]))
    capacity, dim = k_cache.shape[1], k_cache.shape[3]
    packed = (heads + 2 * kv_heads) * dim
    check(k_cache.shape[2] == kv_heads, lambda: f"{name}: the caches have {k_cache.shape[2]} heads, not {kv_heads}")
    check(
        qkv.shape[2] == packed,
        lambda: f"{name}: qkv's last axis must be (heads + 2 kv_heads) dim = {packed}, got {qkv.shape[2]}",
    )
    check(bias is None or len(bias) == packed, lambda: f"{name}: bias has {len(bias)} values, not {packed}")
    check(len(lengths) == len(k_cache), lambda: f"{name}: lengths has {len(lengths)} rows for {len(k_cache)} sessions")
    check(rows.shape[0] == qkv.shape[0], lambda: f"{name}: rows has {rows.shape[0]} entries, qkv {qkv.shape[0]}")
    check(
        qkv.shape[1] <= capacity,
        lambda: f"{name}: {qkv.shape[1]} new positions do not fit into a cache of {capacity}; append in pieces",
    )
    rules.append(fitting(lengths, qkv.shape[1] if q_lengths is None else q_lengths, capacity, ring))
    rows = checked_rows(name, rows, len(k_cache), *rules)
    return OP(
        qkv, bias, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, heads, kv_heads, rope_theta, rope, ring
    )


def fitting(lengths: Tensor, new: int | Tensor, capacity: int, ring: bool) -> Rule:
    """The rule that `new` positions a row fit behind its `lengths` (sessions,) into a cache."""
    return (
        Fault.LENGTH,
        lambda session: (lengths[session] < 0) | ((lengths[session] > capacity - new) & (not ring)),
        lambda entry: f"entry {entry} does not fit a cache of {capacity}: lengths are {lengths.tolist()}",
    )


def check_cache_scales(
    op: str, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, written: bool
) -> None:
    """Shared by the operations on caches: both alike, and int8 ones, only those, with a scale a vector."""
    check(
        k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype,
        lambda: f"{op}: k_cache and v_cache differ in shape or dtype",
    )
    check(
        not written or k_cache is not v_cache,
        lambda: f"{op}: k_cache and v_cache are one tensor; values need their own",
    )
    check(
        min(k_cache.shape[1:]) > 0 and k_cache.shape[3] % 2 == 0,
        lambda: f"{op}: caches need positions, heads and an even head dimension, got {tuple(k_cache.shape)}",
    )
    for label, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype != torch.int8:
            check(scale is None, lambda label=label: f"{op}: {label} goes with int8 caches, not {k_cache.dtype}")
        elif scale is None:
            raise ValueError(f"{op}: int8 caches need {label}, {tuple(k_cache.shape[:3])} fp32")
        else:
            check_tensor(op, label, scale, "sessions capacity kv_heads", k_cache.device, torch.float32)
            check(
                scale.shape == k_cache.shape[:3],
                lambda label=label: f"{op}: {label} must be {tuple(k_cache.shape[:3])}, as the caches",
            )


def _fake(
    qkv, bias, k_cache, v_cache, rows, lengths, q_lengths, k_scale, v_scale, heads, kv_heads, rope_theta, rope, ring
):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], heads, k_cache.shape[3]))


def refuses_head_dim(request: Request) -> str | None:
    """Shared by the operations on caches."""
    dim = request.features["dim"]
    return None if dim in (64, 128) else f"its head dimension is 64 or 128, not {dim}"


OP = Op(
    "append_kv",
    "(Tensor qkv, Tensor? bias, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows, Tensor lengths,"
    " Tensor? q_lengths, Tensor(c!)? k_scale, Tensor(d!)? v_scale, int heads, int kv_heads, float rope_theta,"
    " bool rope, bool ring) -> Tensor",
    reference=reference,
    fake=_fake,
    features=lambda qkv, bias, k, *args: {"ring": args[-1], "rope": args[-2], "dim": k.shape[3]},
    backends=(triton_backend("append_kv", refuses_head_dim),),
)
