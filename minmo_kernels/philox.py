"""Counter-based randomness: Philox4x32-10 in plain PyTorch integers.

Every random number of the project is a pure function of (seed, stream, index): the same whatever the batch, the cutting
into chunks or the device, and bit for bit what Triton's `tl.philox` gives. Key = the session's 64-bit seed, counter =
(index low, index high, lane block, stream).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each 128-bit counter and 64-bit key. All words are int64 tensors in 0 .. 2^32-1, of shapes
    that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _multiply(c0, _ROUND_A)
        high_b, low_b = _multiply(c2, _ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def philox_words(seeds: Tensor, stream: int, index: Tensor, width: int) -> Tensor:
    """Random 32-bit words. seeds (batch,) int64; index (batch, n) int64 absolute -> (batch, n, width) int64.

    Word w of index i comes from lane w % 4 of the counter (i low, i high, w // 4, stream).
    """
    blocks = torch.arange(-(-width // 4), device=index.device)
    # Shapes that broadcast: the key's own arithmetic is a number a session.
    position, seed = index.long()[..., None], seeds.long()[:, None, None]
    words = philox_4x32(
        (position & _MASK, (position >> 32) & _MASK, blocks, torch.full_like(position[:1, :1], stream & _MASK)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return torch.stack(words, dim=-1).flatten(-2)[..., :width]


def unit_interval(words: Tensor) -> Tensor:
    """32-bit words -> fp32 strictly inside (0, 1): the upper 23 bits, centred in their step (exact in fp32)."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def philox_uniform(seeds: Tensor, stream: int, index: Tensor, width: int) -> Tensor:
    """Uniform in (0, 1). seeds (batch,) int64, index (batch, n) int64 -> (batch, n, width) fp32."""
    return unit_interval(philox_words(seeds, stream, index, width))


def philox_normal(seeds: Tensor, stream: int, index: Tensor, width: int) -> Tensor:
    """Standard normal by Box-Muller on neighbouring words. Shapes as `philox_uniform`."""
    pairs = philox_uniform(seeds, stream, index, width + width % 2).unflatten(-1, (-1, 2))
    radius = torch.sqrt(-2.0 * torch.log(pairs[..., 0]))
    angle = 2.0 * math.pi * pairs[..., 1]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(-2)[..., :width]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of 32-bit words; int64 wraps around and keeps all bits."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK
