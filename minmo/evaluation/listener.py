"""A model as it is judged: lines of material in batches in, its replies out, in the lines' order."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import soxr

import minmo
from minmo.config import SAMPLE_RATE
from minmo.conversation.settings import Settings
from minmo.conversation.verbs import Reply, Sound
from minmo.evaluation.material import Line
from minmo.model import MinMo
from minmo.tokenizer.text import TRANSCRIBE

BATCH = 32
"""Utterances that are heard side by side; half as many where replies are spoken."""
LONGEST = 32
"""Text tokens of a reply: more than any sentence of the nano domain has."""


class Listener:
    """Text is greedy, speech is drawn: an utterance draws from `seed` and its own name, whatever shares its batch."""

    def __init__(self, model: MinMo, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self._transcripts: dict[str, str] = {}

    def answers(self, lines: Sequence[Line], speak: bool = False) -> list[Reply]:
        """A reply to each line. Raises FloatingPointError where one broke off."""
        order = sorted(range(len(lines)), key=lambda i: (lines[i].instruction, lines[i].seconds))
        replies: dict[int, Reply] = {}
        for instruction, group in groupby(order, key=lambda i: lines[i].instruction):
            for batch in _batches(list(group), BATCH // 2 if speak else BATCH):
                sounds = [lines[i].sound() for i in batch]
                settings = self._settings([lines[i].id for i in batch], speak)
                replies |= zip(batch, minmo.talk(self.model, sounds, settings, instruction=instruction), strict=True)
        return [_whole(line.id, replies[i]) for i, line in enumerate(lines)]

    def transcripts(self, lines: Sequence[Line]) -> list[str]:
        """What is heard in each line, whatever it asks; a sound that was transcribed before is not heard again."""
        new = {line.utterance: line for line in lines if line.utterance not in self._transcripts}
        asked = [Line(u, u, x.language, x.seconds, x.sound, x.said, x.said, TRANSCRIBE) for u, x in new.items()]
        for line, reply in zip(asked, self.answers(asked), strict=True):
            self._transcripts[line.utterance] = reply.text
        return [self._transcripts[line.utterance] for line in lines]

    def says(self, texts: Sequence[str]) -> list[Sound]:
        """Each text read aloud, 16 kHz. Raises FloatingPointError where one broke off."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        replies: dict[int, Reply] = {}
        for batch in _batches(order, BATCH // 2):
            said = [texts[i] for i in batch]
            replies |= zip(batch, minmo.say(self.model, said, self._settings(said, True)), strict=True)
        return [sound_of(_whole(text, replies[i])) for i, text in enumerate(texts)]

    def _settings(self, names: Sequence[str], speak: bool) -> Settings:
        seeds = tuple((self.seed << 32) + zlib.crc32(name.encode()) for name in names)
        return Settings(seeds, temperature=0.0, max_text_tokens=LONGEST, speak=speak)


def sound_of(reply: Reply) -> Sound:
    """A reply's sound as judges take it, 16 kHz."""
    return np.asarray(soxr.resample(reply.audio, reply.sample_rate, SAMPLE_RATE), np.float32)


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _whole(name: str, reply: Reply) -> Reply:
    if reply.fault:
        raise FloatingPointError(f"{name}: {reply.fault}")
    return reply
