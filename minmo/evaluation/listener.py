"""A model as it is judged: lines of material in batches in, its replies out, in the lines' order."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import soxr

import minmo
from minmo.config import SAMPLE_RATE
from minmo.conversation.settings import Settings
from minmo.conversation.verbs import Reply, Sound
from minmo.evaluation.material import Line
from minmo.model import MinMo
from minmo.tokenizer.text import READ_ALOUD, TRANSCRIBE

BATCH = 32
"""Lines that are heard side by side; half as many where replies are spoken."""
LONGEST = 200
"""Text tokens of a reply, by default."""


def batches(lines: Sequence[Line], size: int) -> list[list[Line]]:
    """Lines of one instruction and alike in length, `size` at a time; always the same ones for the same lines."""
    order = sorted(lines, key=lambda line: (line.instruction, line.seconds, line.id))
    groups: dict[str, list[Line]] = {}
    for line in order:
        groups.setdefault(line.instruction, []).append(line)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


class Listener:
    """Text is greedy, speech is drawn: a line draws from `seed` and its own id, whatever shares its batch."""

    def __init__(self, model: MinMo, seed: int = 0, longest: int = LONGEST) -> None:
        self.model, self.seed, self.longest = model, seed, longest

    def answers(self, lines: Sequence[Line], speak: bool = False) -> list[Reply]:
        """A reply to each of a batch of lines with one instruction: to its sound, or to the text that was typed.

        Raises FloatingPointError where one broke off.
        """
        turns = [line.sound() if line.sound else line.said for line in lines]
        replies = minmo.talk(self.model, turns, self._settings(lines, speak), instruction=lines[0].instruction)
        return [_whole(line, reply) for line, reply in zip(lines, replies, strict=True)]

    def transcripts(self, lines: Sequence[Line]) -> list[str]:
        """What is heard in each of a batch of lines, whatever it asks."""
        sounds = [line.sound() for line in lines if line.sound]
        replies = minmo.talk(self.model, sounds, self._settings(lines, False), instruction=TRANSCRIBE)
        return [_whole(line, reply).text for line, reply in zip(lines, replies, strict=True)]

    def says(self, lines: Sequence[Line], instruction: str = READ_ALOUD) -> list[Sound]:
        """The words of each of a batch of lines read aloud, 16 kHz. Raises FloatingPointError where one broke off."""
        texts = [line.said or line.text for line in lines]
        replies = minmo.say(self.model, texts, self._settings(lines, True), instruction=instruction)
        return [sound_of(_whole(line, reply)) for line, reply in zip(lines, replies, strict=True)]

    def _settings(self, lines: Sequence[Line], speak: bool) -> Settings:
        seeds = tuple((self.seed << 32) + zlib.crc32(line.id.encode()) for line in lines)
        return Settings(seeds, temperature=0.0, max_text_tokens=self.longest, speak=speak)


def sound_of(reply: Reply) -> Sound:
    """A reply's sound as judges take it, 16 kHz."""
    return np.asarray(soxr.resample(reply.audio, reply.sample_rate, SAMPLE_RATE), np.float32)


def _whole(line: Line, reply: Reply) -> Reply:
    if reply.fault:
        raise FloatingPointError(f"{line.id}: {reply.fault}")
    return reply
