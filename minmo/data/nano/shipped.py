"""Builds the small corpus that ships for scores: `python -m minmo.data.nano.shipped minmo/assets/eval`.

It is laid out as the nano corpus is (`minmo/data/nano/build.py`), tests alone: people's prompts that are held out of
training, sentences that are, in voices that training hears ("seen") and in some that it does not, with sound as Opus
and paths relative to the folder. Only voices whose sound may be passed on and used for anything speak here.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr
from lhotse import CutSet, Recording

from minmo.config import SAMPLE_RATE
from minmo.data.manifest import read_manifest, validate
from minmo.data.nano import human, strangers
from minmo.data.nano.build import ASSISTANT_RATE, BACKCHANNELS, VALID, number_set, plan
from minmo.data.nano.dialogues import build_dialogues
from minmo.data.nano.sentences import Sentence, draw, language_of, results_right
from minmo.data.nano.voices import ASSISTANT, CMU, GPL3, VOICES, Voice, synthesise
from minmo.data.numbers import LANGUAGES
from minmo.tokenizer.text import LANGUAGE

SEEN = {
    "en": ("flite-rms", "pico-en-GB", "espeak-en-gb"),
    "es": ("pico-es-ES", "espeak-es"),
    "fr": ("pico-fr-FR", "espeak-fr"),
    "it": ("pico-it-IT", "espeak-it"),
    "ru": ("espeak-ru", "espeak-ru-f3"),
}
UNSEEN = {
    "en": [
        Voice("festival", "ked_diphone", "en", CMU, "festvox-kdlpc16k", test=True),
        Voice("festival", "cmu_us_slt_arctic_hts", "en", CMU, "festvox-us-slt-hts", test=True),
    ]
} | {
    code: [Voice("espeak", f"{code}+{variant}", code, GPL3, "espeak-ng", test=True) for variant in ("Annie", "Andy")]
    for code in ("es", "fr", "it", "ru")
}
"""Other variants of a synthesiser that training hears stand for voices that it does not, but in English."""
SENTENCES, ENGLISH, PROMPTS, READ, DIALOGUES, JOINED = 10, 24, 14, 24, 8, 30
"""Of a language and kind of voice; of English; people's prompts of a language; sentences read aloud; joined words."""
ENCODED = {"format": "OGG", "subtype": "OPUS"}


class Shipped:
    """Manifests in the making; every sound is written once, under a name of its own."""

    def __init__(self, out: Path) -> None:
        self.out, self.manifests = out, dict[str, list[Any]]()
        (out / "sound").mkdir(parents=True)

    def recording(self, name: str, sound: np.ndarray, rate: int = SAMPLE_RATE) -> Recording:
        path = self.out / "sound" / f"{name}.ogg"
        if not path.is_file():
            sf.write(path, np.clip(sound, -1, 1), rate, **ENCODED)
        found = Recording.from_file(path, recording_id=name)
        found.sources[0].source = f"sound/{name}.ogg"
        return found

    def add(self, manifest: str, name: str, recording: Recording, **custom: Any) -> None:
        cut = recording.to_cut()
        cut.id, cut.custom = name, custom
        if custom["task"] == "tts":
            cut.recording = None
        self.manifests.setdefault(manifest, []).append(cut)

    def write(self) -> None:
        for name, cuts in sorted(self.manifests.items()):
            path = self.out / f"{name}.jsonl.gz"
            CutSet.from_cuts(cuts).to_file(path)
            for cut in read_manifest(path, root=self.out):
                validate(cut)


def build(out: Path) -> dict[str, int]:
    """Writes the corpus into a folder that must not exist -> lines by manifest."""
    shipped = Shipped(out)
    _people(shipped)
    _sentences(shipped)
    _answers(shipped)
    shipped.write()
    _dialogues(shipped)
    return {name: len(cuts) for name, cuts in sorted(shipped.manifests.items())}


def _people(shipped: Shipped) -> None:
    words: dict[str, np.ndarray] = {}
    prompts: dict[str, list[human.Prompt]] = {}
    for prompt in human.prompts():
        name = f"asterisk-{prompt.language}-{prompt.name.replace('/', '-')}"
        if prompt.name.startswith("digits/") and prompt.text in number_set(prompt.language):
            recording = shipped.recording(name, human.decode(prompt))
            by = {"language": prompt.language, "voice": human.SPEAKERS[prompt.language][0]}
            shipped.add(f"test-people-digits-{prompt.language}", name, recording, task="asr", text=prompt.text, **by)
        if prompt.language == "en" and prompt.text in strangers.WORDS and prompt.name.startswith(human.TESTS_ONLY):
            words.setdefault(prompt.text, strangers.trimmed(human.decode(prompt)))
        if prompt.test and not prompt.name.startswith(human.TESTS_ONLY):
            prompts.setdefault(prompt.language, []).append(prompt)
    for language, held_out in prompts.items():
        ordered = sorted(held_out, key=lambda p: zlib.crc32(p.name.encode()))
        for prompt, sound in islice(_of_a_length(ordered), PROMPTS):
            name = f"asterisk-{language}-{prompt.name.replace('/', '-')}"
            label = {"task": "lid", "instruction": LANGUAGE, "text": LANGUAGES[language], "language": language}
            shipped.add("test-people-lid", f"{name}-lid", shipped.recording(name, sound), **label)
    for n, (text, sound) in enumerate(strangers.joined(words, JOINED)):
        recording = shipped.recording(f"joined-{n}", sound)
        shipped.add("test-people-joined-en", f"joined-{n}", recording, task="asr", text=text, language="en")
    for kind, language, text, path in strangers.recordings():
        if path.parts[-2] == "tidigits":
            continue  # TIDIGITS is the LDC's, whatever package it is in
        name = f"{kind}-{path.stem}"
        recording = shipped.recording(name, strangers.load(path))
        shipped.add(f"test-{kind}-{language}", name, recording, task="asr", text=text, language=language)


def _of_a_length(prompts: list[human.Prompt]) -> Iterator[tuple[human.Prompt, np.ndarray]]:
    """Long enough to tell a language, short enough for a file of a few kilobytes."""
    for prompt in prompts:
        sound = human.decode(prompt)
        if 1.0 <= len(sound) / SAMPLE_RATE <= 4.0:
            yield prompt, sound


def _sentences(shipped: Shipped) -> None:
    """Held-out sentences, each said by one seen and one unseen voice in turn, with all that can be asked of them."""
    by_id = {voice.id: voice for voice in VOICES}
    for language in LANGUAGES:
        count = ENGLISH if language == "en" else SENTENCES
        tests = list({s.said: s for s in draw(language, 4000, seed=1) if s.held_out}.values())
        for part, voices in (("seen", [by_id[name] for name in SEEN[language]]), ("unseen", UNSEEN[language])):
            rng = random.Random(f"{language} {part}")
            for n, sentence in enumerate(rng.sample(tests, count)):
                voice = voices[n % len(voices)]
                name = f"{voice.id}-{zlib.crc32(sentence.said.encode()):08x}"
                recording = shipped.recording(name, _said(voice, sentence.said))
                _asked(shipped, part, sentence, voice, recording, n)


def _asked(shipped: Shipped, part: str, sentence: Sentence, voice: Voice, recording: Recording, n: int) -> None:
    about = {"source_text": sentence.said, "language": sentence.language, "voice": voice.id}
    tasks = sentence.tasks()
    into = [task for task in tasks if task[0] == "s2tt"]
    for task, instruction, text in [t for t in tasks if t[0] != "s2tt"] + [into[(n + i) % 4] for i in (0, 1) if into]:
        of_one = "" if task in ("lid", "s2tt") else f"-{sentence.language}"
        name = f"{recording.id}-{task}" + (f"-{instruction.split()[-1]}" if task == "s2tt" else "")
        more = {"answers": right} if task == "qa" and (right := results_right(text)) else {}
        custom = {"task": task, "instruction": instruction, "text": text, **about, **more}
        shipped.add(f"test-{part}-{task}{of_one}", name, recording, **custom)
        if task == "qa" and language_of(text) == "en":
            spoken = shipped.recording(f"answer-{zlib.crc32(text.encode()):08x}", _answer(text), ASSISTANT_RATE)
            target = {"target_recording": spoken, "target_recording_unaligned": True}
            custom = {**custom, "task": "s2s", **target}
            shipped.add(f"test-{part}-s2s", f"{recording.id}-s2s", recording, **custom)


def _answers(shipped: Shipped) -> None:
    """Sentences of the assistant's that no stage of its voice trains on, and users' murmurs."""
    kept = [text for n, text in enumerate(plan().answers) if n % VALID == 0 and language_of(text) == "en"]
    for text in random.Random(0).sample(kept, READ):
        spoken = shipped.recording(f"answer-{zlib.crc32(text.encode()):08x}", _answer(text), ASSISTANT_RATE)
        custom = {"task": "tts", "text": text, "language": "en", "target_recording": spoken}
        shipped.add("valid-tts", f"{spoken.id}-tts", spoken, **custom)
    for voice in UNSEEN["en"]:
        for text in BACKCHANNELS:
            name = f"{voice.id}-{text.replace(' ', '-')}"
            recording = shipped.recording(name, _said(voice, text))
            shipped.add("test-backchannels", name, recording, task="asr", text=text, language="en", voice=voice.id)


def _dialogues(shipped: Shipped) -> None:
    """Simulated from what was written: the user's side alone, which is what the predictor hears."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "corpus"
        shutil.copytree(shipped.out, whole)
        build_dialogues(whole, DIALOGUES / 80)
        cuts = list(read_manifest(whole / "test-duplex.jsonl.gz"))
        for cut in cuts:
            custom = {name: value for name, value in cut.custom.items() if name != "target_recording"}
            shipped.add("test-duplex", cut.id, shipped.recording(cut.recording.id, cut.load_audio()[0]), **custom)
    shipped.write()


def _said(voice: Voice, text: str) -> np.ndarray:
    sound, rate = synthesise(voice, text)
    return np.asarray(soxr.resample(sound, rate, SAMPLE_RATE), np.float32)


def _answer(text: str) -> np.ndarray:
    sound, rate = synthesise(ASSISTANT, text)
    return np.asarray(soxr.resample(sound, rate, ASSISTANT_RATE), np.float32)


if __name__ == "__main__":
    for manifest, lines in build(Path(sys.argv[1])).items():
        print(f"{manifest:28} {lines:4} lines")
