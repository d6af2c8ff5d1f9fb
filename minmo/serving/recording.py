"""Recordings of sessions, where an operator has asked for them: both sides' sound, and the events without it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import soundfile

from minmo.config import SAMPLE_RATE
from minmo.serving.protocol import Json


class Recorder:
    """One session's folder: user.wav (16 kHz, what the client sent), assistant.wav (what was sent to it), events.jsonl.

    Raises OSError where it cannot be written.
    """

    def __init__(self, folder: Path, name: str, rate: int) -> None:
        own = folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{name}"
        own.mkdir(parents=True, mode=0o700)
        self._user = soundfile.SoundFile(own / "user.wav", "w", SAMPLE_RATE, 1, "PCM_16")
        self._assistant = soundfile.SoundFile(own / "assistant.wav", "w", rate, 1, "PCM_16")
        self._events = (own / "events.jsonl").open("w", encoding="utf-8")

    def user(self, sound: np.ndarray) -> None:
        self._user.write(sound)

    def assistant(self, sound: np.ndarray) -> None:
        self._assistant.write(sound)

    def event(self, event: Json) -> None:
        kept = {k: v for k, v in event.items() if not (k == "delta" and event["type"] == "response.output_audio.delta")}
        self._events.write(json.dumps({"time": round(time.time(), 3), **kept}) + "\n")

    def close(self) -> None:
        for file in (self._user, self._assistant, self._events):
            file.close()
