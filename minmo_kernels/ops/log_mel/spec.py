"""Declaration of `log_mel`: cases, oracle, laws, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minmo_kernels.ops.log_mel import log_mel, mel_filters
from minmo_kernels.spec import Case, OpSpec
from minmo_kernels.testing import beyond_lengths_nan, generator, normal, random_counts, random_rows


def draw(st: Any) -> Any:
    return st.fixed_dictionaries(
        {
            "rule": st.sampled_from(["stream", "stream one shot", "whisper"]),
            "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
            "batch": st.integers(1, 3),
            "frames": st.sampled_from([3, 5, 8, 18]),
            "n_fft": st.sampled_from([40, 64]),
            "hop": st.sampled_from([16, 20]),
            "n_mels": st.integers(1, 12),
            "seed": st.integers(0, 2**31 - 1),
        }
    )


def make(case: Case) -> dict[str, Any]:
    """Noise whose loudness changes by 60 dB, so that both lower bounds are met."""
    g = generator(case)
    batch, frames, hop, n_fft = case["batch"], case["frames"], case["hop"], case["n_fft"]
    whisper = case["rule"] == "whisper"
    samples = frames * hop
    if whisper:
        least = n_fft // 2 + 1
        lengths = least + random_counts(g, batch, samples - least, case)
    else:
        lengths = random_counts(g, batch, frames, case) * hop
    loudness = torch.logspace(0, -3, samples)
    audio = (normal(g, batch, samples) * loudness).to(getattr(torch, case["dtype"]))
    carry = normal(g, batch + 1, n_fft - hop, dtype=case["dtype"]) if case["rule"] == "stream" else None
    return {
        "audio": beyond_lengths_nan(audio, lengths),
        "lengths": lengths,
        "carry": carry,
        "rows": random_rows(g, batch, batch + 1, case),
        "filters": mel_filters(16_000, n_fft, case["n_mels"]).float(),
        "window": torch.hann_window(n_fft),
        "rule": "whisper" if whisper else "stream",
        "hop": hop,
        "floor": -2.0,
    }


def oracle(
    audio: Tensor,
    lengths: Tensor,
    carry: Tensor | None,
    rows: Tensor,
    filters: Tensor,
    window: Tensor,
    rule: str,
    hop: int,
    floor: float,
) -> tuple[Tensor, ...]:
    """Utterance by utterance and frame by frame, with an explicit matrix of the Fourier transform."""
    n_fft = len(window)
    phase = 2 * math.pi / n_fft * torch.outer(torch.arange(n_fft // 2 + 1), torch.arange(n_fft)).double()
    out = torch.zeros(audio.shape[0], audio.shape[1] // hop, filters.shape[0], dtype=torch.float64)
    kept = None if carry is None else carry.double().clone()
    for b, row in enumerate(rows.tolist()):
        length = int(lengths[b])
        if row < 0 or length == 0:
            continue
        sound = audio[b, :length].double()
        if rule == "whisper":
            mirrored = [
                abs(i) if i < length else 2 * (length - 1) - i for i in range(-(n_fft // 2), length + n_fft // 2)
            ]
            sound = sound[mirrored]
        else:
            before = torch.zeros(n_fft - hop).double() if kept is None else kept[row]
            sound = torch.cat([before, sound])
            if kept is not None:
                kept[row] = sound[length:]
        for m in range(length // hop):
            piece = sound[m * hop : m * hop + n_fft] * window.double()
            power = (torch.cos(phase) @ piece) ** 2 + (torch.sin(phase) @ piece) ** 2
            out[b, m] = torch.log10((filters.double() @ power).clamp(min=1e-10))
        frames = out[b, : length // hop]
        bound = floor if rule == "stream" else float(frames.max()) - 8.0 if len(frames) else 0.0
        out[b, : length // hop] = (frames.clamp(min=bound) + 4) / 4
    return (out,) if kept is None else (out, kept)


def _cutting_does_not_matter(case: Case) -> None:
    """A stream in two calls gives the frames of one call, and leaves the same carry."""
    g = generator(case)
    hop, n_fft, frames = case["hop"], case["n_fft"], case["frames"]
    audio = normal(g, 1, frames * hop, dtype=case["dtype"])
    rows = torch.tensor([1], dtype=torch.int32)
    filters, window = mel_filters(16_000, n_fft, case["n_mels"]).float(), torch.hann_window(n_fft)
    cut = 1 + case["seed"] % (frames - 1)

    def run(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
        carry = torch.zeros(2, n_fft - hop, dtype=audio.dtype)
        out = []
        for piece in pieces:
            length = torch.tensor([piece.shape[1]], dtype=torch.int32)
            out.append(log_mel(piece, length, carry, rows, filters, window, hop=hop))
        return torch.cat(out, dim=1), carry

    whole, carry = run([audio])
    parts, carry_parts = run([audio[:, : cut * hop], audio[:, cut * hop :]])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(carry_parts, carry)


def cases(dims: Mapping[str, int]) -> Iterator[Case]:
    """One tick of 80 ms for many sessions, and 30 s in one shot, with this many mel bins: n_mels."""
    shared = {"dtype": "float32", "n_fft": 400, "hop": 160, "n_mels": dims["n_mels"], "seed": 0}
    for batch in (1, 8, 64):
        yield {"rule": "stream", "batch": batch, "frames": 8, **shared}
    yield {"rule": "whisper", "batch": 1, "frames": 3000, **shared}


def moved_bytes(case: Case) -> int:
    frames = case["batch"] * case["frames"]
    return getattr(torch, case["dtype"]).itemsize * frames * (case["hop"] + case["n_mels"])


def flops(case: Case) -> int:
    """A fast Fourier transform and the filter bank's non-zero weights (each bin lies in two filters)."""
    n_fft, frames = case["n_fft"], case["batch"] * case["frames"]
    return int(frames * (2.5 * n_fft * math.log2(n_fft) + 4 * (n_fft // 2 + 1)))


SPEC = OpSpec(
    name="log_mel",
    function=log_mel,
    draw=draw,
    make=make,
    oracle=oracle,
    cases=cases,
    bytes=moved_bytes,
    flops=flops,
    mutates=("carry",),
    batched=("audio", "lengths", "rows"),
    invariants={"split: cutting does not matter": _cutting_does_not_matter},
)
