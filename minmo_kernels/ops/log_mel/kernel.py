"""`log_mel` in Triton, stream rule: framing, window, discrete Fourier transform as products, power, filters, logarithm.

A program serves a block of frames of one entry. Only the first block of an entry looks back into the carry, so it also
writes the new one, after its last read of the old.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from minmo_kernels import tuning
from minmo_kernels.launch import launch, lookup_table, target
from minmo_kernels.ops.log_mel.reference import SMALLEST

FRAMES = 16
"""Frames a program."""


def run(
    audio: Tensor,
    lengths: Tensor,
    carry: Tensor | None,
    rows: Tensor,
    filters: Tensor,
    window: Tensor,
    rule: str,
    hop: int,
    floor: float,
) -> Tensor:
    batch, samples = audio.shape
    mels, bins = filters.shape
    n_fft, frames = window.shape[0], samples // hop
    out = audio.new_empty(batch, frames, mels)
    tile = tuning.config("log_mel", target(audio))
    circle = lookup_table(_circle, n_fft, device=audio.device)
    launch(
        _log_mel, (max(1, triton.cdiv(frames, FRAMES)), batch, 1),
        audio, lengths, carry, rows, filters, window, circle, out, samples, floor,
        MELS=mels, MELS_WIDE=max(16, tuning.bucket_of(mels)), BINS=bins, N_FFT=n_fft, HOP=hop, SMALLEST=SMALLEST,
        LEFT_WIDE=tuning.bucket_of(n_fft - hop), BLOCK_M=FRAMES, **tile,
    )  # fmt: skip
    return out


@functools.cache
def _circle(n: int, device: torch.device) -> Tensor:
    """cos and sin of 2 pi i / n. (2, n) fp32"""
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return torch.stack([angle.cos(), angle.sin()]).float().to(device)


@triton.jit(do_not_specialize=["samples", "floor"])
def _log_mel(
    audio_ptr, lengths_ptr, carry_ptr, rows_ptr, filters_ptr, window_ptr, circle_ptr, out_ptr, samples, floor,
    MELS: tl.constexpr, MELS_WIDE: tl.constexpr, BINS: tl.constexpr, N_FFT: tl.constexpr, HOP: tl.constexpr,
    SMALLEST: tl.constexpr, LEFT_WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    left: tl.constexpr = N_FFT - HOP
    entry = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + entry)
    length = tl.where(row >= 0, tl.load(lengths_ptr + entry), 0)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < length // HOP
    mel_index = tl.arange(0, MELS_WIDE)
    carried = row.to(tl.int64) * left

    mel = tl.zeros([BLOCK_M, MELS_WIDE], tl.float32)
    for first_bin in range(0, BINS, BLOCK_B):
        b = first_bin + tl.arange(0, BLOCK_B)
        real = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
        imaginary = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
        for first_tap in range(0, N_FFT, BLOCK_K):
            n = first_tap + tl.arange(0, BLOCK_K)
            j = m[:, None] * HOP + n[None, :] - left
            read = exists[:, None] & (n < N_FFT)[None, :]
            x = tl.load(audio_ptr + entry * samples + j, mask=read & (j >= 0), other=0.0).to(tl.float32)
            if carry_ptr is not None:
                x += tl.load(carry_ptr + carried + left + j, mask=read & (j < 0), other=0.0).to(tl.float32)
            x *= tl.load(window_ptr + n, mask=n < N_FFT, other=0.0).to(tl.float32)[None, :]
            turn = (n[:, None] * b[None, :]) % N_FFT
            real = tl.dot(x, tl.load(circle_ptr + turn), real, input_precision="ieee")
            imaginary = tl.dot(x, tl.load(circle_ptr + N_FFT + turn), imaginary, input_precision="ieee")
        power = real * real + imaginary * imaginary
        taken = (b < BINS)[:, None] & (mel_index < MELS)[None, :]
        filters = tl.load(filters_ptr + mel_index[None, :] * BINS + b[:, None], mask=taken, other=0.0).to(tl.float32)
        mel = tl.dot(power, filters, mel, input_precision="ieee")

    value = tl.maximum(tl.log2(tl.maximum(mel, SMALLEST)) * 0.30102999566398120, floor)
    value = tl.where(exists[:, None], (value + 4.0) / 4.0, 0.0)
    frames = samples // HOP
    place = (entry * frames + m)[:, None] * MELS + mel_index[None, :]
    tl.store(out_ptr + place, value, mask=(m < frames)[:, None] & (mel_index < MELS)[None, :])

    if carry_ptr is not None:
        if tl.program_id(0) == 0:
            slot = tl.arange(0, LEFT_WIDE)
            j = length + slot - left
            kept = (slot < left) & (row >= 0)
            new = tl.load(audio_ptr + entry * samples + j, mask=kept & (j >= 0), other=0.0)
            new += tl.load(carry_ptr + carried + left + j, mask=kept & (j < 0), other=0.0)
            tl.debug_barrier()
            tl.store(carry_ptr + carried + slot, new, mask=kept)
