"""Who speaks when, by silero-vad, which nobody here wrote: a judge of the times in a recorded conversation.

PyPI silero-vad (MIT) carries its model; it decides every 32 ms, and hears voices, not noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch

from minmo.audio import resample
from minmo.config import SAMPLE_RATE
from minmo.evaluation.judges import needed

Spans = list[tuple[float, float]]
"""Begin and end in milliseconds, in order."""
SHORTEST_MS, GAP_MS = 60, 200
"""A voice and a silence of less are none."""


class Silero:
    """judge(file) -> the spans of voice in each channel of a sound file."""

    name = "silero-vad"

    def __init__(self) -> None:
        package = needed("silero_vad")
        self._model, self._spans = package.load_silero_vad(), package.get_speech_timestamps

    def __call__(self, file: Path) -> list[Spans]:
        sound, rate = soundfile.read(file, dtype="float32", always_2d=True)
        return [self.spans(resample(channel, rate)) for channel in sound.T]

    def spans(self, sound: np.ndarray) -> Spans:
        """sound (n,) 16 kHz."""
        found = self._spans(
            torch.from_numpy(np.ascontiguousarray(sound)), self._model, sampling_rate=SAMPLE_RATE,
            min_speech_duration_ms=SHORTEST_MS, min_silence_duration_ms=GAP_MS, speech_pad_ms=0,
        )  # fmt: skip
        return [(1e3 * span["start"] / SAMPLE_RATE, 1e3 * span["end"] / SAMPLE_RATE) for span in found]
