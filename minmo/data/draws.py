"""Random numbers by what they are for: equal names give equal numbers, whatever else was drawn, in whatever process."""

from __future__ import annotations

import hashlib

import numpy as np


def draws(*name: str | int) -> np.random.Generator:
    """A generator of its own for a name: Philox 4x64 with the name's hash as key, so that draws never share a stream.

    name: what tells these numbers from all others, for example (seed, "noise", dialogue index).
    """
    digest = hashlib.blake2b(repr(name).encode("utf-8", "backslashreplace"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))
