"""What a nano is judged on: held-out manifests of the nano corpus, and recordings of people.

The 28 English number words of the corpus, alone and joined to utterances, are a development set: augmentation was
chosen with them in sight. People whom nothing was trained or chosen on come as Debian packages: pocketsphinx-testdata
(English numbers and playing cards, several speakers, BSD) and asterisk-prompt-it-menardi-wav (Italian numbers, Paola
Dal Zot, CC-BY-SA-3.0-IT, http://www.voip.ammdomus.it).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr

from minmo.config import SAMPLE_RATE
from minmo.conversation.verbs import Sound
from minmo.data.manifest import describe_skipped, load_sound, read_manifest
from minmo.data.numbers import LANGUAGES, number_words
from minmo.data.schema import TASKS, DataError
from minmo.tokenizer.text import CHAT, TRANSCRIBE

POCKETSPHINX = Path("/usr/share/pocketsphinx/test/data")
MENARDI = Path("/usr/share/asterisk/sounds/it_IT_f_Menardi/digits")
# The package writes no text beside these two: it is what all recognisers here agree on, but for an "or" of one of them.
NUMBERS = {"numbers.raw": "thirty three four six ninety two", "tidigits/dhd.2934z.raw": "two nine three four zero"}


@dataclass(frozen=True)
class Line:
    """An utterance that is heard, and what is asked about it.

    utterance: names the sound, which several lines may share; sound: loads it, (n,) float32, 16 kHz; said: its words;
    text: the right answer to `instruction`; spoken: loads the recording of that answer, 16 kHz, where there is one.
    """

    id: str
    utterance: str
    language: str
    seconds: float
    sound: Callable[[], Sound]
    said: str
    text: str
    instruction: str = TRANSCRIBE
    spoken: Callable[[], Sound] | None = None


class Material:
    """The manifests of a corpus directory; `limit`: at most so many lines of each, the same ones for one seed.

    left_out: what was looked for and is not there or cannot be used, in words.
    """

    def __init__(self, data: Path, limit: int | None = None, seed: int = 0) -> None:
        if not any(data.glob("test-*.jsonl.gz")):
            raise DataError(
                f"{data} holds no manifests test-*.jsonl.gz; give the folder that `minmo data nano` wrote",
                "missing manifest",
            )
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.data, self.limit, self.seed = data, limit, seed
        self.left_out: list[str] = []

    def lines(self, name: str, usable: Callable[[Line], bool] = lambda line: True) -> list[Line]:
        """The usable lines of one manifest, drawn; none, noted in `left_out`, where there is no such manifest."""
        path = self.data / f"{name}.jsonl.gz"
        if not path.is_file():
            self.left_out.append(f"{name}: the corpus has no such manifest")
            return []
        skipped: Counter[str] = Counter()
        lines = [_line(cut) for cut in read_manifest(path, on_error="skip", skipped=skipped)]
        if skipped:
            self.left_out.append(f"{name}: {describe_skipped(skipped)}")
        return self.drawn([line for line in lines if usable(line)])

    def by_language(self, name: str) -> dict[str, list[Line]]:
        """The lines of the manifests NAME-LANGUAGE that the corpus has: not every language has unseen voices."""
        languages = [code for code in LANGUAGES if (self.data / f"{name}-{code}.jsonl.gz").is_file()]
        if not languages:
            self.left_out.append(f"{name}: the corpus has no such manifest")
        return {code: self.lines(f"{name}-{code}") for code in languages}

    def drawn(self, lines: list[Line]) -> list[Line]:
        """At most `limit` of some lines, in an order that the seed draws."""
        return sorted(lines, key=lambda line: zlib.crc32(f"{self.seed} {line.id}".encode()))[: self.limit]

    def single_words(self, language: str) -> list[Line]:
        """Number words that a person said one at a time (for English: development)."""
        words = {number_words(n, language) for n in range(101)}
        return self.lines(f"test-people-digits-{language}", lambda line: line.text in words)

    def joined_words(self, count: int = 60) -> list[Line]:
        """Digit strings and differences, joined from a person's English words (development)."""
        path = self.data / "test-people-digits-en.jsonl.gz"
        if not path.is_file():
            return []
        cuts = {cut.custom["text"]: cut for cut in read_manifest(path, on_error="skip")}
        words = {number_words(n) for n in (*range(20), *range(20, 100, 10))} | {"minus"}
        if lacking := words - set(cuts):
            self.left_out.append(f"joined words: the corpus has no recording of {', '.join(sorted(lacking))}")
            return []
        sounds = {word: trimmed(load_sound(cuts[word])) for word in words}
        return self.drawn(joined(sounds, count, self.seed))

    def unseen_people(self) -> dict[str, list[Line]]:
        """People of other packages, by what they say."""
        sets: dict[str, list[Line]] = {}
        if POCKETSPHINX.is_dir():
            raw = [_recorded(POCKETSPHINX / name, text, "en") for name, text in NUMBERS.items()]
            cards = []
            for entry in (POCKETSPHINX / "cards" / "cards.transcription").read_text().splitlines():
                text, _, name = entry.removeprefix("<s>").rstrip(" )").partition("</s>")
                cards.append(_recorded(POCKETSPHINX / "cards" / f"{name.strip(' (')}.wav", text.strip(), "en"))
            sets["people, numbers"], sets["people, playing cards (words not taught)"] = raw, cards
        else:
            self.left_out.append("people, numbers and cards: apt-get install pocketsphinx-testdata")
        if MENARDI.is_dir():
            spoken = sorted((int(p.stem), p) for p in MENARDI.glob("*.wav") if p.stem.isdecimal())
            sets["people, single words, other speaker"] = [
                _recorded(path, number_words(n, "it"), "it") for n, path in spoken
            ]
        else:
            self.left_out.append("people, Italian numbers: apt-get install asterisk-prompt-it-menardi-wav")
        return {name: self.drawn(lines) for name, lines in sets.items()}


def trimmed(sound: Sound, margin: float = 0.03) -> Sound:
    """A word without the silence around it, but for `margin` seconds; silent is what stays below 1/50 of the peak."""
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
    edge = round(margin * SAMPLE_RATE)
    return sound[max(0, loud[0] - edge) : loud[-1] + 1 + edge]


def joined(sounds: dict[str, Sound], count: int, seed: int = 0) -> list[Line]:
    """`count` utterances of a person's words: strings of 3 to 6 digits, and differences of numbers below 100 in turn.

    sounds: each word's, trimmed. Pauses of 80 to 200 ms between words; the seed draws texts and pauses.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for n in range(count):
        if n % 2 == 0:
            text = " ".join(number_words(int(digit)) for digit in rng.integers(0, 10, rng.integers(3, 7)))
        else:
            text = " minus ".join(number_words(int(number)) for number in rng.integers(0, 100, 2))
        pieces = [np.zeros(round(0.2 * SAMPLE_RATE), np.float32)]
        for word in text.split():
            pieces += [sounds[word], np.zeros(round(rng.uniform(0.08, 0.2) * SAMPLE_RATE), np.float32)]
        lines.append(_at_hand(f"joined-{n}", np.concatenate(pieces), text, "en"))
    return lines


def _line(cut: Any) -> Line:
    custom = cut.custom
    recording = cut.recording
    task, target = TASKS[custom["task"]], custom.get("target_recording")
    return Line(
        id=cut.id,
        utterance=recording.id if recording else cut.id,
        language=custom.get("language", "en"),
        seconds=cut.duration,
        sound=partial(load_sound, cut),
        said=custom.get("source_text", custom["text"]),
        text=custom["text"],
        instruction=custom.get("instruction", task.instruction or CHAT),
        spoken=partial(load_sound, cut, "target_recording") if target is not None else None,
    )


def _recorded(path: Path, text: str, language: str) -> Line:
    # A file without a header holds 16 kHz, 16 bits, little-endian.
    raw = {"samplerate": SAMPLE_RATE, "channels": 1, "format": "RAW", "subtype": "PCM_16", "endian": "LITTLE"}
    sound, rate = sf.read(path, dtype="float32", **(raw if path.suffix == ".raw" else {}))
    return _at_hand(str(path), np.asarray(soxr.resample(sound, rate, SAMPLE_RATE), np.float32), text, language)


def _at_hand(name: str, sound: Sound, text: str, language: str) -> Line:
    return Line(name, name, language, len(sound) / SAMPLE_RATE, lambda: sound, text, text)
