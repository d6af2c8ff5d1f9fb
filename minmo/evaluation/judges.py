"""Recognisers that nobody here wrote, as judges of whether speech is understood: sound in, text out.

Moonshine tiny (English, a neural transformer; PyPI moonshine-voice 0.0.59, MIT) reads whole sentences of a good voice
well and single words badly. PocketSphinx (English, hidden Markov models; PyPI pocketsphinx, BSD) comes with a language
model of its own, or bound to a grammar of number words: then it says number words of anything, even of noise, so that
it is a relative measure and never stands alone. A score is read beside the same judge's score on the original sound.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from minmo.config import SAMPLE_RATE

GRAMMAR = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred plus minus times divided by is "
    "what you said after comes"
).split()
"""Words of the number grammar: what the nano model says in English, without small talk."""
MOONSHINE = "moonshine-voice==0.0.59"
"""The only release that carries its model."""
BEFORE, AFTER = 0.3, 0.5
"""Seconds of silence around a sound, without which judges lose words at its edges, or find some there."""


class JudgeError(ValueError):
    """A package that judging needs and that is not installed."""


def needed(module: str, extra: str = "eval") -> Any:
    """Imports a package of an extra; raises JudgeError, with what to type, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        more = f" && pip install --no-deps {MOONSHINE}" if extra == "eval" else ""
        raise JudgeError(f"judging needs {module} ({error}): pip install 'minmo[{extra}]'{more}") from None


class Moonshine:
    """judge(sound) -> text with capitals, signs and digits as it likes them; sound (n,) float32, 16 kHz.

    Of silence it makes a word or two.
    """

    name = "moonshine tiny-en"
    vocabulary: frozenset[str] | None = None
    """All words that it can write; None: any."""

    def __init__(self) -> None:
        package = needed("moonshine_voice")
        assets = Path(package.__file__).parent / "assets" / "tiny-en"
        if not assets.is_dir():
            raise JudgeError(f"this moonshine-voice carries no model: pip install --no-deps {MOONSHINE}")
        # Its voice detector would drop short words.
        options = {"vad_threshold": "0.0", "identify_speakers": "false", "return_audio_data": "false"}
        self._transcriber = package.Transcriber(str(assets), package.ModelArch.TINY, options=options)

    def __call__(self, sound: np.ndarray) -> str:
        lines = self._transcriber.transcribe_without_streaming(_framed(sound).tolist(), SAMPLE_RATE).lines
        return " ".join(line.text for line in lines).strip()


class PocketSphinx:
    """judge(sound) -> text in lower case; sound (n,) float32, 16 kHz. grammar: number words alone (GRAMMAR)."""

    def __init__(self, grammar: bool = False) -> None:
        package = needed("pocketsphinx")
        self.name = "pocketsphinx, number grammar" if grammar else "pocketsphinx"
        self.vocabulary = frozenset(GRAMMAR) if grammar else None
        # Means over the utterance: the usual running ones would let a judgement depend on those before it.
        if grammar:
            self._decoder = package.Decoder(lm=None, cmn="batch", loglevel="FATAL")
            rule = f"#JSGF V1.0; grammar numbers; public <sentence> = ( {' | '.join(GRAMMAR)} )+ ;"
            self._decoder.add_jsgf_string("numbers", rule)
            self._decoder.activate_search("numbers")
        else:
            self._decoder = package.Decoder(cmn="batch", loglevel="FATAL")

    def __call__(self, sound: np.ndarray) -> str:
        samples = np.round(np.clip(_framed(sound), -1, 1) * 32767).astype("<i2")
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        heard = self._decoder.hyp()
        return "" if heard is None else str(heard.hypstr)


def _framed(sound: np.ndarray) -> np.ndarray:
    return np.pad(sound, (round(BEFORE * SAMPLE_RATE), round(AFTER * SAMPLE_RATE)))


Judge = Moonshine | PocketSphinx
