"""A whole decode step in one launch: every layer of a decoder, its last norm, and where wanted tokens one after
another."""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_kernels.dispatch import FLOATS, Op, Request, check, check_number, check_tensor, checked_rows
from minmo_kernels.launch import cooperative, triton_backend
from minmo_kernels.ops.append_kv import fitting, refuses_head_dim
from minmo_kernels.ops.decoder_step.machine import BROKEN, reference
from minmo_kernels.ops.linear_residual import MISALIGNED, loads_words, rows_bucket

__all__ = ["BROKEN", "MOST_ROWS", "MOST_SPINS", "SPINS", "decoder_step", "new_sync"]

MOST_ROWS = 8
"""Rows that one launch serves; more are launched layer by layer."""
MOST_GROUP = 16
"""Query heads that share a kv head."""
SPINS = 1 << 20
"""Looks at a barrier's counter, about a microsecond each, after which a block gives up: far longer than any phase."""
MOST_SPINS = 2**31 - 1
"""A block counts its looks in 32 bits."""
WORDS = 3
"""Arrivals, blocks that have left, and the error word."""


def new_sync(device: torch.device | str) -> Tensor:
    """Counters of `decoder_step` for launches that run one after another, (3,) int32. The last is the error word."""
    return torch.zeros(WORDS, dtype=torch.int32, device=device)


def decoder_step(
    x: Tensor,
    input_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    out: Tensor,
    post_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    lengths: Tensor,
    sync: Tensor,
    final_norm: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    rope_theta: float,
    window: int = 0,
    ring: bool = False,
    qkv_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    head: Tensor | None = None,
    head_scale: Tensor | None = None,
    head_bias: Tensor | None = None,
    embedding: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    history: Tensor | None = None,
    banned: Tensor | None = None,
    least: Tensor | None = None,
    most: Tensor | None = None,
    end: int = -1,
    stream: int = 0,
    repetition_limit: int = 1,
    steps: int = 1,
    share: float = 1.0,
    spins: int = SPINS,
) -> tuple[Tensor, Tensor]:
    """One new position of each session through all layers, as one cooperative launch; with a head, `steps` of them.

    Layers are the five operations of a decode layer (`rms_norm_qkv_rope_append`, `streaming_attention`,
    `merge_linear_residual`, `gate_up_swiglu`, `linear_residual`), with their rounding, weights stacked: input_norm,
    post_norm (layers, dim); qkv (layers, (heads + 2 kv_heads) head_dim, dim), qkv_bias (layers, the same) or None; out
    (layers, dim, heads head_dim); gate_up (layers, 2 ffn, dim), rows interleaved; down (layers, dim, ffn); k_cache,
    v_cache (layers, sessions, capacity, kv_heads, head_dim), written in place. Weights hold x's dtype, or int8 with a
    scale (layers, outputs) fp32 each. x (batch, dim); rows (batch,) int32, -1 = padding; lengths (sessions,) int32,
    positions already in the caches, which the caller advances. window, ring: as in `streaming_attention`.

    Returns hidden (batch, dim) in x's dtype, after final_norm (dim,) where there is one, zeros for padding entries; and
    tokens (batch, steps) int32, or (batch, 0) without a head.

    With a head (vocab, dim), int8 with head_scale (vocab,), head_bias (vocab,) or None, each step draws a token from
    the last norm's output as `sample_token` does: seeds, positions, temperature, top_k, top_p, history as there, none
    of them written (a step within the launch has the position after and sees the tokens before it), banned (batch, n).
    The next step's input is the token's row of embedding (vocab, dim). `end` (-1 = none) ends an entry: it is not drawn
    where fewer than least (batch,) int64 is the position, and given where `most` (batch,) int64 is reached (None = no
    bound). An entry that has ended gives -1 from then on; one whose logits hold NaN gives BROKEN (-2) and ends. So an
    entry has taken as many positions as its tokens that are not -1. `hidden` is then the last step's, zeros for entries
    that ended before it.

    sync: `new_sync`, on the device, for this and no other launch at a time; a launch leaves the first two words zero.
    Its third is the error word: not zero, nothing of the result means anything, caches hold what they held up to
    `lengths`, and the caller sets it to zero and does the step by other means. A block sets it that has waited `spins`
    looks at a barrier (1 + the instruction's index in `schedule.program`). share: of the GPU's multiprocessors, above 0
    up to 1.

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for positions past a linear cache's
    capacity; BackendError, before anything runs, where the grid does not fit on the GPU at once.
    """
    name, device = "decoder_step", x.device
    check_tensor(name, "x", x, "batch dim", device, *FLOATS)
    check_number(name, "eps", eps, 0.0)
    check_number(name, "rope_theta", rope_theta, 1.0)
    check_tensor(name, "k_cache", k_cache, "layers sessions capacity kv_heads head_dim", device, x.dtype)
    check_tensor(name, "rows", rows, "batch", device, torch.int32)
    check_tensor(name, "lengths", lengths, "sessions", device, torch.int32)
    check_tensor(name, "sync", sync, "words", device, torch.int32)
    layers, sessions, capacity, cached, head_dim = k_cache.shape
    batch, dim = x.shape
    check(cached == kv_heads, lambda: f"{name}: the caches have {cached} heads, not {kv_heads}")
    check(heads % kv_heads == 0, lambda: f"{name}: {heads} heads are no multiple of {kv_heads} kv heads")
    check(len(rows) == batch, lambda: f"{name}: rows has {len(rows)} entries, x {batch}")
    check(len(lengths) == sessions, lambda: f"{name}: lengths has {len(lengths)} rows for {sessions} sessions")
    check(len(sync) == WORDS, lambda: f"{name}: sync must be new_sync(device), {WORDS} words, got {len(sync)}")
    check(window >= 0 and steps >= 1, lambda: f"{name}: window is 0 or more, steps 1 or more")
    check(1 <= spins <= MOST_SPINS, lambda: f"{name}: spins must be from 1 to {MOST_SPINS}, got {spins}")
    check(0.0 < share <= 1.0, lambda: f"{name}: share must lie above 0 and up to 1, got {share}")
    if ring:
        check(window > 0, lambda: f"{name}: a ring cache needs a window")
        check(
            capacity >= window - 1 + steps,
            lambda: f"{name}: a ring of {capacity} cannot hold a window of {window} and {steps} new positions",
        )
    check(
        gate_up.dim() == 3 and gate_up.shape[1] % 2 == 0,
        lambda: f"{name}: gate_up must have the shape (layers, 2 ffn, dim), got {tuple(gate_up.shape)}",
    )
    wide, packed = gate_up.shape[1], (heads + 2 * kv_heads) * head_dim
    _check_shape(name, "v_cache", v_cache, tuple(k_cache.shape), x)
    for label, tensor in (("input_norm", input_norm), ("post_norm", post_norm)):
        _check_shape(name, label, tensor, (layers, dim), x)
    if qkv_bias is not None:
        _check_shape(name, "qkv_bias", qkv_bias, (layers, packed), x)
    weights = (
        ("qkv", qkv, qkv_scale, (layers, packed, dim)),
        ("out", out, out_scale, (layers, dim, heads * head_dim)),
        ("gate_up", gate_up, gate_up_scale, (layers, wide, dim)),
        ("down", down, down_scale, (layers, dim, wide // 2)),
    )
    for label, weight, scale, shape in weights:
        _check_weight(name, label, weight, scale, shape, x)
    if final_norm is not None:
        _check_shape(name, "final_norm", final_norm, (dim,), x)
    if head is None:
        check(steps == 1, lambda: f"{name}: {steps} steps need a head that draws their tokens")
    else:
        vocab = len(head)
        check(final_norm is not None, lambda: f"{name}: a head needs final_norm")
        _check_weight(name, "head", head, head_scale, (vocab, dim), x)
        if head_bias is not None:
            _check_shape(name, "head_bias", head_bias, (vocab,), x)
        if embedding is None:
            check(steps == 1, lambda: f"{name}: {steps} steps need an embedding, the rows of which are their inputs")
        else:
            _check_shape(name, "embedding", embedding, (vocab, dim), x)
        settings = (
            ("seeds", seeds, torch.int64, sessions),
            ("positions", positions, torch.int64, sessions),
            ("temperature", temperature, torch.float32, sessions),
            ("top_k", top_k, torch.int32, sessions),
            ("top_p", top_p, torch.float32, sessions),
            ("least", least, torch.int64, batch),
            ("most", most, torch.int64, batch),
        )
        for label, given, dtype, size in settings:
            if given is None:
                check(label in ("least", "most"), lambda label=label: f"{name}: a head needs {label}")
                continue
            check_tensor(name, label, given, "n", device, dtype)
            check(len(given) == size, lambda label=label, size=size: f"{name}: {label} must have {size} values")
        for label, given, size in (("history", history, sessions), ("banned", banned, batch)):
            if given is not None:
                check_tensor(name, label, given, "n ids", device, torch.int32)
                check(len(given) == size, lambda label=label, size=size: f"{name}: {label} must have {size} rows")
        check(-1 <= end < vocab, lambda: f"{name}: end must be an id below {vocab}, or -1, got {end}")
        check(end >= 0 or most is None, lambda: f"{name}: where most is reached an entry gives end, which is -1 (none)")
        check(0 <= stream < 2**32, lambda: f"{name}: stream must be in 0 .. 2^32 - 1, got {stream}")
        check(repetition_limit >= 1, lambda: f"{name}: repetition_limit must be at least 1, got {repetition_limit}")
    # Where `most` ends an entry it may need less room than all steps would take.
    rows = checked_rows(name, rows, sessions, fitting(lengths, steps if most is None else 1, capacity, ring))
    return OP(
        x, input_norm, qkv, qkv_bias, out, post_norm, gate_up, down, k_cache, v_cache, rows, lengths, sync, final_norm,
        qkv_scale, out_scale, gate_up_scale, down_scale, head, head_scale, head_bias, embedding, seeds, positions,
        temperature, top_k, top_p, history, banned, least, most, heads, kv_heads, eps, rope_theta, window, ring, end,
        stream, repetition_limit, steps, share, spins,
    )  # fmt: skip


def _check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_tensor(op, name, tensor, " ".join(map(str, shape)), x.device, x.dtype)
    check(tuple(tensor.shape) == shape, lambda: f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")


def _check_weight(op: str, name: str, weight: Tensor, scale: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    check_tensor(op, name, weight, " ".join(map(str, shape)), x.device, x.dtype, torch.int8)
    check(tuple(weight.shape) == shape, lambda: f"{op}: {name} must be {shape}, got {tuple(weight.shape)}")
    whole = weight.dtype != torch.int8
    check((scale is None) == whole, lambda: f"{op}: {name}_scale goes with an int8 {name}, and only with one")
    if scale is not None:
        check_tensor(op, f"{name}_scale", scale, " ".join(map(str, shape[:-1])), x.device, torch.float32)
        check(
            tuple(scale.shape) == shape[:-1],
            lambda: f"{op}: {name}_scale must be {shape[:-1]}, got {tuple(scale.shape)}",
        )


def _refuses(request: Request) -> str | None:
    features = request.features
    if features["rows"] > MOST_ROWS:
        return f"one launch serves up to {MOST_ROWS} rows; more take the layers' own launches"
    if (reason := refuses_head_dim(request)) is not None:
        return reason
    if not features["aligned"]:
        return MISALIGNED
    if features["group"] > MOST_GROUP:
        return f"{features['group']} query heads share a kv head; it serves up to {MOST_GROUP}"
    if not features["cooperative"]:
        return "this GPU or its driver has no cooperative launch, without which a barrier could wait for ever"
    if request.device != "cpu" and request.dtypes[0] == torch.float32:
        return "on a GPU its activations are 16-bit; fp32 takes the layers' own launches"
    return None


def _features(*args):
    x, k_cache, head, heads, kv_heads, ring = args[0], args[8], args[18], args[31], args[32], args[36]
    return {
        "rows": rows_bucket(len(x)),
        "dim": k_cache.shape[4],
        "group": heads // kv_heads,
        "ring": ring,
        "head": head is not None,
        "aligned": all(map(loads_words, (args[2], args[4], args[6], args[7]))) and (head is None or loads_words(head)),
        "cooperative": _cooperative(x.device),
    }


def _cooperative(device: torch.device) -> bool:
    """Of a GPU; for what is only recorded, of the current one, if any."""
    if device.type == "meta" and torch.cuda.is_available():
        return cooperative(torch.device("cuda", torch.cuda.current_device()))
    return device.type != "cuda" or cooperative(device)


def _fake(*args):
    x, head, steps = args[0], args[18], args[40]
    return torch.empty_like(x), x.new_empty((x.shape[0], 0 if head is None else steps), dtype=torch.int32)


OP = Op(
    "decoder_step",
    "(Tensor x, Tensor input_norm, Tensor qkv, Tensor? qkv_bias, Tensor out, Tensor post_norm, Tensor gate_up,"
    " Tensor down, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows, Tensor lengths, Tensor(c!) sync,"
    " Tensor? final_norm, Tensor? qkv_scale, Tensor? out_scale, Tensor? gate_up_scale, Tensor? down_scale,"
    " Tensor? head, Tensor? head_scale, Tensor? head_bias, Tensor? embedding, Tensor? seeds, Tensor? positions,"
    " Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? history, Tensor? banned, Tensor? least, Tensor? most,"
    " int heads, int kv_heads, float eps, float rope_theta, int window, bool ring, int end, int stream,"
    " int repetition_limit, int steps, float share, int spins) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    features=_features,
    backends=(triton_backend("decoder_step", _refuses),),
)
