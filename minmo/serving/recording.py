"""Recordings of sessions, where an operator has asked for them: both sides' sound, and the events without it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from minmo.config import SAMPLE_RATE
from minmo.serving.protocol import Json

RETRIEVED = "conversation.item.retrieved"


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
        sound = {"delta", "audio"} if event["type"] in ("response.output_audio.delta", RETRIEVED) else set()
        self._events.write(json.dumps({"time": round(time.time(), 3), **_without(event, sound)}) + "\n")

    def close(self) -> None:
        for file in (self._user, self._assistant, self._events):
            file.close()


def _without(value: Any, names: set[str]) -> Any:
    """A JSON value, in which no object has the fields of those names."""
    if isinstance(value, Mapping):
        return {k: _without(v, names) for k, v in value.items() if k not in names}
    return [_without(v, names) for v in value] if isinstance(value, list) else value
