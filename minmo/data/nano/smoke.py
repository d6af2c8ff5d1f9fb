"""A corpus of seconds, from the two recordings that ship with the package: it shows that a pipeline runs, no more.

The manifests have the names of the nano corpus (`minmo/data/nano/build.py`), so its recipes run on them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import soundfile as sf
import soxr
from lhotse import CutSet, MonoCut, Recording

from minmo.config import SAMPLE_RATE
from minmo.data.nano.dialogues import build_dialogues
from minmo.data.nano.sentences import Sentence
from minmo.tokenizer.text import LANGUAGE

SAID = {
    "question": Sentence("en", "two plus three", "two plus three is five", (2, 3)),
    "sentence": Sentence("en", "which folder should i save the message to", "you are welcome"),
}
COPIES = 4
"""Of each recording, one slower than the other."""


def build(out: Path) -> None:
    """Writes OUT/sound and the manifests `{train,valid}-{text,asr,qa,mixed,tts,s2s,duplex}.jsonl.gz`."""
    out = out.resolve()
    (out / "sound").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[Any]] = {}
    for name, sentence in SAID.items():
        sound, rate = sf.read(str(resources.files("minmo") / "assets" / f"{name}.wav"), dtype="float32")
        for copy in range(COPIES):
            slower = soxr.resample(sound, rate, SAMPLE_RATE * (1 + 0.1 * copy))
            heard = _kept(slower, SAMPLE_RATE, out / "sound" / f"{name}-{copy}.flac")
            spoken = _kept(soxr.resample(slower, SAMPLE_RATE, 24_000), 24_000, out / "sound" / f"{name}-{copy}-24.flac")
            for line in _lines(sentence, heard, spoken):
                lines.setdefault({"s2tt": "mixed", "lid": "mixed"}.get(task := line.custom["task"], task), []).append(
                    line
                )
    for task, cuts in lines.items():
        for part in ("train", "valid"):
            CutSet.from_cuts(cuts).to_file(out / f"{part}-{task}.jsonl.gz")
    CutSet.from_cuts(lines["asr"][:1]).to_file(out / "train-backchannels.jsonl.gz")
    build_dialogues(out, scale=0.004)


def _kept(sound: Any, rate: int, path: Path) -> Recording:
    sf.write(path, sound, rate)
    return Recording.from_file(path)


def _lines(sentence: Sentence, heard: Recording, spoken: Recording) -> list[MonoCut]:
    common = {"source_text": sentence.said, "language": "en"}
    tasks = [*sentence.tasks(), ("lid", LANGUAGE, "English")]
    cuts = []
    for n, (task, instruction, text) in enumerate(tasks):
        custom = {"task": task, "instruction": instruction, "text": text, **common}
        cuts.append(_cut(f"{heard.id}-{n}", heard.duration, heard, custom))
    target = {"target_recording": spoken}
    asked = {"task": "s2s", "text": sentence.reply, **common, **target, "target_recording_unaligned": True}
    cuts.append(_cut(f"{heard.id}-s2s", heard.duration, heard, asked))
    cuts.append(_cut(f"{heard.id}-tts", spoken.duration, None, {"task": "tts", "text": sentence.said, **target}))
    typed = {"task": "text", "text": sentence.reply, "source_text": sentence.said}
    cuts.append(_cut(f"{heard.id}-text", 2.0, None, typed))
    return cuts


def _cut(name: str, seconds: float, recording: Recording | None, custom: dict[str, Any]) -> MonoCut:
    return MonoCut(id=name, start=0.0, duration=seconds, channel=0, recording=recording, custom=custom)
