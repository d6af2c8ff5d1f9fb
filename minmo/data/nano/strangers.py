"""People whom nothing was trained or chosen on, and a person's words joined: further tests of nano's hearing.

Debian packages: pocketsphinx-testdata (English numbers and playing cards, several speakers, BSD) and
asterisk-prompt-it-menardi-wav (Italian numbers, Paola Dal Zot, CC-BY-SA-3.0-IT, http://www.voip.ammdomus.it). The 28
English number words of the Asterisk prompts are a development set: augmentation was chosen with them in sight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from minmo.config import SAMPLE_RATE
from minmo.data.numbers import number_words

PACKAGES = {
    "pocketsphinx-testdata": Path("/usr/share/pocketsphinx/test/data"),
    "asterisk-prompt-it-menardi-wav": Path("/usr/share/asterisk/sounds/it_IT_f_Menardi/digits"),
}
CARDS, MENARDI = PACKAGES.values()
# The package writes no text beside these two: it is what all recognisers here agree on, but for an "or" of one of them.
NUMBERS = {"numbers.raw": "thirty three four six ninety two", "tidigits/dhd.2934z.raw": "two nine three four zero"}
WORDS = frozenset({number_words(n) for n in (*range(20), *range(20, 100, 10))} | {"minus"})
"""What `joined` joins."""


def missing_packages() -> list[str]:
    return [name for name, folder in PACKAGES.items() if not folder.is_dir()]


def recordings() -> list[tuple[str, str, str, Path]]:
    """(set, language, text, file) of every recording; the cards hold words that nano was not taught."""
    found = [("people-numbers", "en", text, CARDS / name) for name, text in NUMBERS.items()]
    for entry in (CARDS / "cards" / "cards.transcription").read_text().splitlines():
        text, _, name = entry.removeprefix("<s>").rstrip(" )").partition("</s>")
        found.append(("people-cards", "en", text.strip(), CARDS / "cards" / f"{name.strip(' (')}.wav"))
    spoken = sorted((int(path.stem), path) for path in MENARDI.glob("*.wav") if path.stem.isdecimal())
    return found + [("people-menardi", "it", number_words(n, "it"), path) for n, path in spoken]


def load(path: Path) -> np.ndarray:
    """(n,) float32, 16 kHz; a file without a header holds 16 kHz, 16 bits, little-endian."""
    raw = {"samplerate": SAMPLE_RATE, "channels": 1, "format": "RAW", "subtype": "PCM_16", "endian": "LITTLE"}
    sound, rate = sf.read(path, dtype="float32", **(raw if path.suffix == ".raw" else {}))
    return np.asarray(soxr.resample(sound, rate, SAMPLE_RATE), np.float32)


def trimmed(sound: np.ndarray, margin: float = 0.03) -> np.ndarray:
    """A word without the silence around it, but for `margin` seconds; silent is what stays below 1/50 of the peak."""
    loud = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
    edge = round(margin * SAMPLE_RATE)
    return sound[max(0, loud[0] - edge) : loud[-1] + 1 + edge]


def joined(sounds: Mapping[str, np.ndarray], count: int, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    """`count` utterances (text, sound) of a person's words: strings of 3 to 6 digits, and differences of numbers below
    100 in turn.

    sounds: each word's (WORDS), trimmed. Pauses of 80 to 200 ms between words; the seed draws texts and pauses.
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
        lines.append((text, np.concatenate(pieces)))
    return lines
