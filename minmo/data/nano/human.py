"""People in the corpus: the recorded prompts of the Asterisk telephone system, as Debian packages them (G.722, 16 kHz).

One speaker a language, each prompt with its exact text. They teach and test language identification; the single number
words test hearing. Digits, letters and the phonetic alphabet are never trained on, nor is one prompt in three.
Sound: CC-BY-SA-3.0 (ru: CC-BY-3.0); the speakers are named in SPEAKERS.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPEAKERS = {
    "en": ("en_US_f_Allison", "Allison Smith"),
    "es": ("es_MX_f_Allison", "Allison Smith"),
    "fr": ("fr_CA_f_June", "June Wallack"),
    "it": ("it_IT_m_Carlo", "Carlo Flauto"),
    "ru": ("ru_RU_f_IvrvoiceRU", "IVR Voice RU"),
}
LICENCES = dict.fromkeys(SPEAKERS, "CC-BY-SA-3.0") | {"ru": "CC-BY-3.0"}
SOUNDS = Path("/usr/share/asterisk/sounds")
DOCUMENTS = Path("/usr/share/doc")
TESTS_ONLY = ("digits/", "letters/", "phonetic/")
SHORTEST = 0.6
"""Seconds; shorter prompts say too little to tell a language."""
LONGEST = 20.0
"""Seconds; longer prompts are whole menus read out, no turn of a conversation."""


@dataclass(frozen=True)
class Prompt:
    language: str
    name: str
    text: str
    path: Path

    @property
    def test(self) -> bool:
        return self.name.startswith(TESTS_ONLY) or zlib.crc32(self.text.encode()) % 3 == 0


def missing_packages() -> list[str]:
    """Debian packages that hold prompts or their texts and are not there."""
    wanted = {f"asterisk-core-sounds-{lang}": DOCUMENTS / f"asterisk-core-sounds-{lang}" for lang in SPEAKERS}
    wanted |= {f"asterisk-core-sounds-{lang}-g722": SOUNDS / folder for lang, (folder, _) in SPEAKERS.items()}
    return sorted(package for package, folder in wanted.items() if not folder.is_dir())


def prompts() -> list[Prompt]:
    """All prompts with a text and a sound; the silences have no text."""
    out = []
    for language, (folder, _) in SPEAKERS.items():
        listing = DOCUMENTS / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
        with gzip.open(listing, "rt", encoding="utf-8", errors="replace") as lines:
            texts: dict[str, str] = {}
            for line in lines:
                name, found, text = line.strip().partition(":")
                if found and not name.startswith(";") and re.search(r"\w", text):
                    texts.setdefault(name.strip(), text.strip())
        for name, text in sorted(texts.items()):
            path = SOUNDS / folder / f"{name}.g722"
            if path.is_file():
                out.append(Prompt(language, name, text, path))
    return out


def decode(prompt: Prompt) -> np.ndarray:
    """Mono float32 at 16 kHz."""
    from G722 import G722  # of the extra `data`

    return np.asarray(G722(16_000, 64_000).decode(prompt.path.read_bytes()), np.float32) / 32768
