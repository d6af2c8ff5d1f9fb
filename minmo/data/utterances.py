"""Speech and its text, and what the simulator does to it: trim it, put a pause into it, break it off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minmo.config import SAMPLE_RATE
from minmo.data.duplex import Event

FRAME = SAMPLE_RATE // 100
"""Samples over which energy is taken: 10 ms."""
VOICED_DB = -40.0
"""A frame is voice from this level on, relative to the loudest frame."""
FADE = SAMPLE_RATE // 200
"""Samples over which a cut is faded: 5 ms."""


@dataclass(frozen=True, eq=False)
class Utterance:
    """Speech: samples (n,) float32 16 kHz, its text, and (word, start, end) in samples where known."""

    samples: np.ndarray
    text: str
    words: tuple[tuple[str, int, int], ...] = ()


def voiced(samples: np.ndarray, level: float = VOICED_DB) -> tuple[int, int]:
    """Where the voice of a sound (n,) begins and ends, to 10 ms: its first and past its last frame above `level` dB.

    Raises ValueError for a sound of another shape, or without any finite sound in it.
    """
    if np.ndim(samples) != 1 or not np.isfinite(samples).all() or not np.any(samples):
        raise ValueError("an utterance must be finite samples (n,), and not silent; leave it out")
    frames = np.pad(samples.astype(np.float64), [0, -len(samples) % FRAME]).reshape(-1, FRAME)
    energy = np.mean(frames**2, axis=1)
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (level / 10))
    return int(loud[0]) * FRAME, min((int(loud[-1]) + 1) * FRAME, len(samples))


def trimmed(utterance: Utterance) -> Utterance:
    """Without the silence around the voice."""
    start, end = voiced(utterance.samples)
    words = tuple((w, max(a - start, 0), min(b, end) - start) for w, a, b in utterance.words)
    return Utterance(utterance.samples[start:end], utterance.text, words)


def with_pause(utterance: Utterance, length: int, generator: np.random.Generator) -> tuple[Utterance, list[Event]]:
    """Puts `length` samples of silence between two words, or, without word times, where the voice is weakest.

    Returns the utterance and its pauses: one, or none where there is a single word or too little sound (0.3 s).
    """
    samples, words, before = utterance.samples, utterance.words, ""
    if len(samples) < 30 * FRAME or len(words or utterance.text.split()) == 1:
        return utterance, []
    if words:
        n = int(generator.integers(1, len(words)))
        at = (words[n - 1][2] + words[n][1]) // 2
        before = " ".join(word for word, _, _ in words[:n])
    else:
        low, high = len(samples) // 4, 3 * len(samples) // 4
        energy = np.convolve(samples.astype(np.float64) ** 2, np.ones(2 * FRAME), mode="same")
        at = low + int(np.argmin(energy[low:high]))
    at = min(max(at, FADE), len(samples) - FADE)
    left, right = samples[:at].copy(), samples[at:].copy()
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    left[-FADE:] *= ramp[::-1]
    right[:FADE] *= ramp
    sound = np.concatenate([left, np.zeros(length, np.float32), right])
    later = tuple((w, a + length * (a >= at), b + length * (b > at)) for w, a, b in words)
    return Utterance(sound, utterance.text, later), [Event("pause", at, at + length, before)]


def heard(utterance: Utterance, length: int) -> Utterance:
    """The first `length` samples, and the words that were complete by then: by their times, else by their share."""
    if length >= len(utterance.samples):
        return utterance
    samples = utterance.samples[:length].copy()
    samples[-FADE:] *= np.linspace(1, 0, min(FADE, length), dtype=np.float32)
    words = tuple(word for word in utterance.words if word[2] <= length)
    if utterance.words:
        return Utterance(samples, " ".join(word for word, _, _ in words), words)
    said = utterance.text.split()
    return Utterance(samples, " ".join(said[: len(said) * length // len(utterance.samples)]))
