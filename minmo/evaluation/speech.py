"""What is measured of speech that a model made: by judges, which are optional, and from the sound itself.

A judge that is not installed leaves its field out, and `missing` says why: an empty column, not a zero. Recognisers
and their scores: `minmo/evaluation/judges.py`. DNSMOS tells speech from junk and hardly good from bad; Resemblyzer
embeds a voice in 256 numbers, whose cosine tells speakers apart.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from minmo.config import SAMPLE_RATE
from minmo.conversation.verbs import Sound
from minmo.data.utterances import voiced
from minmo.evaluation.judges import Judge, JudgeError, Moonshine, PocketSphinx, needed
from minmo.evaluation.material import Line
from minmo.evaluation.records import Record
from minmo.evaluation.words import spoken

AUDIBLE_DB = -20.0
"""From here on, relative to the loudest 10 ms, a sound counts as voice when its length is measured."""
PITCHED = 3
"""Fewest voiced frames (5 ms) that have a pitch."""
STYLES = {
    "fast": ("rate", 1), "quick": ("rate", 1), "slow": ("rate", -1),
    "high": ("pitch", 1), "low": ("pitch", -1), "deep": ("pitch", -1),
    "loud": ("level", 1), "soft": ("level", -1), "quiet": ("level", -1),
}  # fmt: skip
"""Words of an instruction that ask for more or less of something that can be measured from the sound."""


def wanted(instruction: str) -> tuple[str, int] | None:
    """(rate, pitch or level; more or less) that an instruction asks for; None for what no measurement here tells, such
    as an emotion."""
    words = instruction.lower().replace(",", " ").split()
    return next((STYLES[stem] for word in words for stem in STYLES if word.removesuffix(".").startswith(stem)), None)


class Ears:
    """All judges that are installed; each sound is judged with silence around it."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        makers: tuple[Callable[[], Judge], ...] = (Moonshine, PocketSphinx, lambda: PocketSphinx(grammar=True))
        self.recognisers: list[Judge] = [judge for make in makers if (judge := self._made(make)) is not None]
        self._mos = self._made(_dnsmos)
        self._voice = self._made(_embedder)

    @property
    def names(self) -> list[str]:
        others = {"speechmos DNSMOS": self._mos, "Resemblyzer": self._voice}
        return [judge.name for judge in self.recognisers] + [name for name, judge in others.items() if judge]

    def judge(self, line: Line, sound: Sound) -> Record:
        """judged, mos, voice: of `sound` (n,), 16 kHz; floor, floor_mos, likeness: beside the line's own recording."""
        own = line.spoken() if line.spoken else None
        words = set(spoken(line.text))
        texts = [j for j in self.recognisers if line.language == "en" and (not j.vocabulary or words <= j.vocabulary)]
        record: Record = {"judged": {j.name: j(sound) for j in texts}, "seconds": round(len(sound) / SAMPLE_RATE, 3)}
        if own is not None:
            record["floor"] = {j.name: j(own) for j in texts}
        if self._mos is not None and len(sound):
            record["mos"] = self._mos(sound)
            if own is not None:
                record["floor_mos"] = self._mos(own)
        if self._voice is not None and len(sound):
            embedding = self._voice(sound)
            record["voice"] = [round(float(x), 4) for x in embedding]
            if own is not None:
                record["likeness"] = round(float(embedding @ self._voice(own)), 4)
        return record

    def _made(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except JudgeError as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return None


def measured(sound: Sound, text: str) -> dict[str, float | None]:
    """rate (words a second of voice), pitch (Hz, median of voiced frames), level (dB of full scale) of speech; None for
    what it has too little of."""
    if not np.any(sound):
        return {"rate": None, "pitch": None, "level": None}
    begin, end = voiced(sound, AUDIBLE_DB)
    voice = sound[begin:end]
    return {
        "rate": round(len(text.split()) / (len(voice) / SAMPLE_RATE), 4),
        "pitch": pitch(voice),
        "level": round(float(10 * np.log10(np.mean(np.square(voice, dtype=np.float64)))), 3),
    }


def pitch(sound: Sound) -> float | None:
    """Median fundamental frequency in Hz (WORLD's DIO and StoneMask); None where next to nothing is voiced."""
    world = needed("pyworld")
    samples = np.ascontiguousarray(sound, np.float64)
    rough, times = world.dio(samples, SAMPLE_RATE)
    found = world.stonemask(samples, rough, times, SAMPLE_RATE)
    found = found[found > 0]
    return round(float(np.median(found)), 3) if len(found) >= PITCHED else None


def _dnsmos() -> Callable[[Sound], float]:
    """Overall quality by Microsoft's DNSMOS P.835, 1 to 5 (PyPI speechmos, which carries its models; MIT)."""
    run = needed("speechmos.dnsmos", extra="judges").run

    def quality(sound: Sound) -> float:
        return round(float(run(np.clip(sound, -1, 1).astype(np.float32), SAMPLE_RATE)["ovrl_mos"]), 4)

    return quality


def _embedder() -> Callable[[Sound], np.ndarray]:
    """A voice as a unit vector (256,) (PyPI Resemblyzer, which carries its model; Apache-2.0)."""
    package = needed("resemblyzer", extra="judges")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how long loading took
        encoder = package.VoiceEncoder("cpu")
    return lambda sound: np.asarray(encoder.embed_utterance(np.asarray(sound, np.float32)))
