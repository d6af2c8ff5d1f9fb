"""Counter-based randomness: published answers, Triton's integers, statistics."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import minmo_kernels as mk
from minmo_kernels.philox import philox_4x32, philox_words

FULL = 0xFFFFFFFF
# Known answers for philox4x32-10 (Random123, kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_known_answers(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == expected


TRITON = """
import torch, triton, triton.language as tl

@triton.jit
def words(seed, low, high, block, stream, out, n: tl.constexpr):
    i = tl.arange(0, n)
    seeds = tl.load(seed + i)
    a, b, c, d = tl.philox(seeds, tl.load(low + i), tl.load(high + i), tl.load(block + i), tl.load(stream + i))
    tl.store(out + i, a.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out + n + i, b.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out + 2 * n + i, c.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(out + 3 * n + i, d.to(tl.uint32, bitcast=True).to(tl.int64))

from minmo_kernels.philox import philox_4x32
g = torch.Generator().manual_seed(0)
n = 64
seed = torch.randint(-2**63, 2**63 - 1, (n,), generator=g)
counter = [torch.randint(0, 2**32, (n,), generator=g) for _ in range(4)]
out = torch.zeros(4, n, dtype=torch.int64)
narrow = [torch.where(c >= 2**31, c - 2**32, c).to(torch.int32) for c in counter]
words[(1,)](seed, *narrow, out, n)
ours = philox_4x32(tuple(counter), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
assert torch.equal(out, torch.stack(ours)), (out[:, :3], [w[:3] for w in ours])
print("equal")
"""


def test_words_are_tritons(tmp_path):
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    script = tmp_path / "words.py"  # Triton reads a kernel's source from its file.
    script.write_text(TRITON)
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


def test_a_word_depends_on_seed_stream_and_index_only():
    seeds = torch.tensor([3, -5, 2**62])
    index = torch.tensor([[0, 7, 2**40]]).expand(3, -1)
    whole = philox_words(seeds, 1, index, 9)
    assert whole.shape == (3, 3, 9)
    assert torch.equal(philox_words(seeds[1:2], 1, index[1:2, 2:], 5), whole[1:2, 2:, :5])
    flat = [tuple(w) for s in (0, 1) for w in philox_words(seeds, s, index, 4).flatten(0, 1).tolist()]
    assert len(set(flat)) == len(flat)


def test_uniform_and_normal_have_their_moments():
    seeds, index = torch.tensor([11]), torch.arange(20_000)[None]
    u = mk.philox_uniform(seeds, 0, index, 2)
    assert u.dtype == torch.float32 and 0 < u.min() and u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.005 and abs(float(u.var()) - 1 / 12) < 0.002
    n = mk.philox_normal(seeds, 0, index, 3)
    assert n.isfinite().all()
    assert abs(float(n.mean())) < 0.02 and abs(float(n.std()) - 1) < 0.02
    assert abs(float(torch.corrcoef(n[0].T)[0, 1])) < 0.03
