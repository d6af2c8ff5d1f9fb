"""Log-mel features, as a causal stream or with Whisper's centred frames."""

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
from minmo_kernels.ops.log_mel.filters import mel_filters
from minmo_kernels.ops.log_mel.reference import reference

__all__ = ["log_mel", "mel_filters"]

RULES = ("stream", "whisper")


def log_mel(
    audio: Tensor,
    lengths: Tensor,
    carry: Tensor | None,
    rows: Tensor,
    filters: Tensor,
    window: Tensor,
    *,
    rule: str = "stream",
    hop: int = 160,
    floor: float = -6.0,
) -> Tensor:
    """Log-mel features of sound, (batch, samples // hop, n_mels) in audio's dtype; zeros beyond lengths[b] // hop.

    A frame is the power spectrum of n_fft windowed samples, weighted by the filters; its value is
    (max(log10(max(mel, 1e-10)), lower bound) + 4) / 4, computed in fp32 (fp64 stays fp64).

    Shapes: audio (batch, samples); lengths (batch,) int32, valid samples; rows (batch,) int32, -1 = padding; filters
    (n_mels, n_fft // 2 + 1) and window (n_fft,), floating point of any precision.

    rule "stream": frame m ends with sample hop (m + 1) - 1 and looks n_fft - hop samples back, so it is causal and
    the cutting into calls does not matter; lengths are multiples of hop; the lower bound is `floor` (log10 of power).
    carry (sessions, n_fft - hop), in audio's dtype, holds each session's last samples (zeros at the start) and is
    updated in place; None = all start with zeros and nothing is kept.
    rule "whisper": one shot; frame m is centred on sample hop m, mirrored about the utterance's ends; the lower bound
    is the utterance's maximum - 8; carry must be None. Utterances need at least n_fft // 2 + 1 samples (or none).

    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for lengths that the rule forbids.
    Source: Radford et al. (Whisper), arXiv 2212.04356, section 2.2.
    """
    name = "log_mel"
    check_tensor(name, "audio", audio, "batch samples", audio.device)
    check(audio.dtype in FLOATS, lambda: f"{name}: audio must be floating point in -1 .. 1, got {audio.dtype}")
    check_number(name, "floor", floor)
    check_tensor(name, "lengths", lengths, "batch", audio.device, torch.int32)
    check_tensor(name, "rows", rows, "batch", audio.device, torch.int32)
    check_tensor(name, "filters", filters, "n_mels bins", audio.device)
    check_tensor(name, "window", window, "n_fft", audio.device)
    n_fft = window.shape[0]
    check(len(rows) == len(audio), lambda: f"{name}: rows has {len(rows)} entries, audio {len(audio)}")
    counts = check_counts(name, "lengths", lengths, len(audio), audio.shape[1])
    check(
        filters.shape[1] == n_fft // 2 + 1,
        lambda: f"{name}: filters have {filters.shape[1]} bins, but a window of {n_fft} gives {n_fft // 2 + 1}",
    )
    check(rule in RULES, lambda: f"{name}: rule must be one of {', '.join(RULES)}, got {rule!r}")
    check(0 < hop <= n_fft, lambda: f"{name}: hop must be in 1 .. {n_fft}, got {hop}")
    if carry is not None:
        check(rule == "stream", lambda: f"{name}: the whisper rule is one shot; pass carry=None")
        check_tensor(name, "carry", carry, "sessions left", audio.device, audio.dtype)
        check(carry.shape[1] == n_fft - hop, lambda: f"{name}: carry holds {carry.shape[1]} samples, not {n_fft - hop}")
    fits: Rule = (
        Fault.LENGTH,
        lambda _: lengths % hop != 0,
        lambda _: f"lengths must be multiples of {hop} samples under the stream rule; buffer the rest",
    )
    if rule == "whisper":
        fits = (
            Fault.LENGTH,
            lambda _: (lengths > 0) & (lengths <= n_fft // 2),
            lambda _: (
                f"the whisper rule mirrors {n_fft // 2} samples at each end and needs at least {n_fft // 2 + 1}; "
                "lengthen the sound with silence"
            ),
        )
    rows = checked_rows(name, rows, None if carry is None else len(carry), counts, fits)
    return OP(audio, lengths, carry, rows, filters, window, rule, hop, floor)


def _refuses(request: Request) -> str | None:
    if request.features["rule"] != "stream":
        return "the whisper rule needs the utterance's maximum; the reference serves it"
    if request.features["n_fft"] > 16 * request.features["hop"]:
        return "a window is longer than a program's frames"
    return None


OP = Op(
    "log_mel",
    "(Tensor audio, Tensor lengths, Tensor(a!)? carry, Tensor rows, Tensor filters, Tensor window, str rule, int hop,"
    " float floor) -> Tensor",
    reference=reference,
    fake=lambda audio, lengths, carry, rows, filters, window, rule, hop, floor: audio.new_empty(
        (audio.shape[0], audio.shape[1] // hop, filters.shape[0])
    ),
    features=lambda audio, lengths, carry, rows, filters, window, rule, hop, floor: {
        "rule": rule,
        "n_fft": window.shape[0],
        "hop": hop,
    },
    backends=(triton_backend("log_mel", _refuses),),
)
