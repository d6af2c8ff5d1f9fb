"""Nano's duplex corpus: dialogues simulated from its spoken questions and answers, for training and for scores.

    OUT/{train,valid,test}-duplex.jsonl.gz   lhotse cuts of the task duplex
    OUT/sound/duplex/NAME.flac, NAME-assistant.flac   the two channels, 16 kHz

Test dialogues hold held-out sentences and, among others, voices that training never hears. Synthetic voices come
without word times, so a pause lies where a voice is weakest; whether one may come where a sentence could already be
complete ("twenty … seven") is known from the words, and told turn by turn in the field `ambiguous`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut

from minmo.config import SAMPLE_RATE
from minmo.data.dialogues import dialogue_cut, exchange, utterance
from minmo.data.draws import draws
from minmo.data.duplex import USER_TURNS
from minmo.data.manifest import read_manifest
from minmo.data.nano.sentences import SMALL_TALK
from minmo.data.nano_tokenizer import OPERATIONS
from minmo.data.numbers import LANGUAGES, number_words
from minmo.data.simulator import Conditions, Material, simulate
from minmo.data.utterances import Utterance

DIALOGUES = {"train": 4000, "valid": 40, "test": 80}
SOURCES = {
    "train": (("train-s2s",), "train-backchannels"),
    "valid": (("valid-s2s",), "train-backchannels"),
    "test": (("test-seen-s2s", "test-unseen-s2s"), "test-backchannels"),
}
"""Manifests of each set's exchanges and back-channels."""
TURNS = (2, 3, 4)
"""User turns of a dialogue, one number after another."""
BURSTS = 24
"""Knocks, clicks and coughs of a set."""

_NUMBER = "(?:" + "|".join(sorted(map(number_words, range(101)), key=len, reverse=True)) + ")"
_PROBLEM = f"{_NUMBER} (?:{'|'.join(OPERATIONS['en'][:4])}) {_NUMBER}"
_TONGUES = "|".join(name.lower() for name in LANGUAGES.values())
_COMPLETE = re.compile(
    f"(?:repeat after me )?{_NUMBER}(?: {_NUMBER})*|(?:what is |how much is |tell me )?{_PROBLEM}"
    f"|what comes after {_NUMBER}|say {_NUMBER} in (?:{_TONGUES})|{'|'.join(SMALL_TALK)}"
)


def complete(said: str) -> bool:
    """Whether somebody who says this, in English, may be waiting for an answer: it is a sentence of the domain."""
    return _COMPLETE.fullmatch(said) is not None


def ambiguous(said: str) -> bool:
    """Whether some first words of a turn, and not all of it, are a sentence of the domain."""
    words = said.split()
    return any(complete(" ".join(words[:n])) for n in range(1, len(words)))


def build_dialogues(out: Path, scale: float = 1.0, seed: int = 0) -> dict[str, tuple[int, float]]:
    """Simulates the dialogues of a built corpus -> number of dialogues and seconds of each manifest that it wrote.

    A set without any exchange, as a small corpus may leave it, gets no manifest. Raises DataError for sound that cannot
    be read.
    """
    folder = out / "sound" / "duplex"
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, tuple[int, float]] = {}
    for place, part in enumerate(SOURCES):
        material = material_of(out, part, seed)
        if material is None:
            continue
        cuts = []
        for index in range(max(1, round(DIALOGUES[part] * scale))):
            conditions = Conditions(turns=TURNS[index % len(TURNS)])
            # A seed of its own for each set: a dialogue's name stands for all that is drawn for it.
            dialogue = simulate(material, conditions, len(SOURCES) * seed + place, index)
            cut = dialogue_cut(dialogue, folder)
            cut.custom["language"] = "en"
            cut.custom["ambiguous"] = [ambiguous(e.text) for e in dialogue.events if e.kind in USER_TURNS]
            cuts.append(cut)
        CutSet.from_cuts(cuts).to_file(out / f"{part}-duplex.jsonl.gz")
        written[f"{part}-duplex"] = (len(cuts), sum(cut.duration for cut in cuts))
    return written


def material_of(out: Path, part: str, seed: int = 0) -> Material | None:
    """What the dialogues of a part ("train", "valid", "test") of a built corpus are made from; None where it has no
    exchange for it."""
    sources, murmurs = SOURCES[part]
    manifests = [out / f"{name}.jsonl.gz" for name in sources]
    exchanges = [cut for path in manifests if path.is_file() for cut in read_manifest(path, root=out)]
    if not exchanges:
        return None
    backchannels = [utterance(cut) for cut in read_manifest(out / f"{murmurs}.jsonl.gz", root=out)]
    return Material(_Exchanges(exchanges), backchannels, bursts=[_burst(seed, part, n) for n in range(BURSTS)])


class _Exchanges(Sequence[tuple[Utterance, Utterance]]):
    """Spoken exchanges, read from their files when they are asked for: a corpus of them need not fit in memory."""

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self._cuts = cuts

    def __len__(self) -> int:
        return len(self._cuts)

    @overload
    def __getitem__(self, index: int) -> tuple[Utterance, Utterance]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Utterance, Utterance]]: ...
    def __getitem__(self, index: Any) -> Any:
        return _Exchanges(self._cuts[index]) if isinstance(index, slice) else exchange(self._cuts[index])


def _burst(seed: int, part: str, index: int) -> np.ndarray:
    """A sound that is no voice, (n,) float32 16 kHz: a knock (a struck resonance), a click, or a cough (two puffs)."""
    rng, kind = draws(seed, "burst", part, index), index % 3
    if kind == 0:
        time = np.arange(int(rng.uniform(0.08, 0.25) * SAMPLE_RATE)) / SAMPLE_RATE
        sound = np.exp(-time * rng.uniform(25, 60)) * np.sin(2 * np.pi * rng.uniform(90, 500) * time)
        sound += 0.2 * rng.standard_normal(len(time)) * np.exp(-time * 400)
    elif kind == 1:
        sound = rng.standard_normal(int(rng.uniform(0.005, 0.03) * SAMPLE_RATE))
        sound *= np.hanning(len(sound))
    else:
        sound = np.concatenate([_puff(rng), np.zeros(int(rng.uniform(0.03, 0.12) * SAMPLE_RATE)), _puff(rng)])
    return (0.3 * sound / np.abs(sound).max()).astype(np.float32)


def _puff(rng: np.random.Generator) -> np.ndarray:
    """Noise through a throat: low-passed, quick to come and slow to go."""
    noise = rng.standard_normal(int(rng.uniform(0.1, 0.25) * SAMPLE_RATE))
    width = int(rng.integers(4, 16))
    share = np.arange(len(noise)) / len(noise)
    return np.convolve(noise, np.hanning(width + 2), mode="same") * np.minimum(share * 20, 1) * np.exp(-4 * share)
