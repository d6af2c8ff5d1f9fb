"""What the microphone's sound may pass before a conversation hears it; by default nothing.

A front is called every 80 ms with the microphone's samples and what the loudspeaker played meanwhile, (TICK,) float32
of 16 kHz each, and gives the samples that are heard, as many and not later.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from minmo.config import SAMPLE_RATE, TICK

Front = Callable[[np.ndarray, np.ndarray], np.ndarray]


def as_it_is(near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The microphone's sound and nothing else."""
    return near


class EchoControl:
    """Takes the loudspeaker's sound out of the microphone's: WebRTC's canceller (AEC3), as PyPI livekit brings it.

    It learns the way from loudspeaker to microphone in a second or two of sound, and treats pieces of 10 ms.
    """

    def __init__(self) -> None:
        self._rtc = installed("livekit.rtc", "echo control", "echo")
        self._processing = self._rtc.AudioProcessingModule(
            echo_cancellation=True, noise_suppression=False, high_pass_filter=False, auto_gain_control=False
        )

    def __call__(self, near: np.ndarray, far: np.ndarray) -> np.ndarray:
        size = SAMPLE_RATE // 100
        pieces = []
        for at in range(0, TICK, size):
            played, heard = (self._frame(sound[at : at + size]) for sound in (far, near))
            self._processing.process_reverse_stream(played)
            self._processing.process_stream(heard)
            pieces.append(np.frombuffer(heard.data, np.int16).astype(np.float32) / 32768)
        return np.concatenate(pieces)

    def _frame(self, sound: np.ndarray) -> Any:
        whole = np.clip(np.round(sound * 32768), -32768, 32767).astype(np.int16)
        return self._rtc.AudioFrame(whole.tobytes(), SAMPLE_RATE, 1, len(whole))


class VoiceGate:
    """Silences what silero-vad takes for no voice, of which a voice's first 80 ms may be lost."""

    THRESHOLD, OPEN = 0.5, SAMPLE_RATE // 2
    """Probability from which a piece of 32 ms is voice, and samples that the gate stays open after the last one."""

    def __init__(self) -> None:
        self._model = installed("silero_vad", "a voice gate", "eval").load_silero_vad()
        self._waiting = np.zeros(0, np.float32)
        self._left = 0

    def __call__(self, near: np.ndarray, far: np.ndarray) -> np.ndarray:
        self._waiting = np.concatenate([self._waiting, near])
        opened = self._left > 0
        while len(self._waiting) >= 512:
            piece, self._waiting = self._waiting[:512], self._waiting[512:]
            with torch.inference_mode():
                voice = float(self._model(torch.from_numpy(piece), SAMPLE_RATE)) >= self.THRESHOLD
            self._left = self.OPEN if voice else self._left - len(piece)
            opened |= voice
        return near if opened else np.zeros_like(near)


def _through(*fronts: Front) -> Front:
    def front(near: np.ndarray, far: np.ndarray) -> np.ndarray:
        for each in fronts:
            near = each(near, far)
        return near

    return front


FRONTS: dict[str, Callable[[], Front]] = {
    "none": lambda: as_it_is,
    "echo": EchoControl,
    "gate": VoiceGate,
    "echo+gate": lambda: _through(EchoControl(), VoiceGate()),
}
"""Makes a front, of one conversation, by name."""


def installed(module: str, what: str, extra: str) -> Any:
    """Imports what an extra brings. Raises ValueError, with what to type, where it or its system library is missing."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ValueError(f"{what} needs {module} ({error}): pip install 'minmo[{extra}]'") from None
