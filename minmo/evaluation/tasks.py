"""The tasks of the paper as they are scored here: which lines they take, how a record of each line is made, what is
counted of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import minmo
from minmo.conversation.settings import Settings
from minmo.conversation.timings import TO_AUDIO, TO_SPEECH, TO_TEXT, TOTAL
from minmo.evaluation import measures
from minmo.evaluation.listener import BATCH, Listener, sound_of
from minmo.evaluation.material import Line
from minmo.evaluation.measures import Measure
from minmo.evaluation.records import Record
from minmo.evaluation.speech import Ears, measured, wanted
from minmo.evaluation.turns import count_turns
from minmo.model import MinMo


@dataclass
class Bench:
    """What lines are put to: the model in batches, judges of its sound (none where no task speaks), and whether
    questions are transcribed as well, to part what was misheard from what was not known."""

    listener: Listener
    ears: Ears | None
    transcribe: bool = False
    engine: MinMo | None = None

    def fast(self) -> MinMo:
        """The serving engine, whose latency is measured, with one row."""
        if self.engine is None:
            self.engine = minmo.FastMinMo(self.listener.model, rows=1, keep_model=True)
        return self.engine

    def sound(self) -> Ears:
        assert self.ears is not None, "judges are made where a task speaks"
        return self.ears


@dataclass(frozen=True)
class Evaluation:
    """meaning: in words. lines: the schema's tasks that it takes. batch: lines side by side. records: of a batch.
    measures: of a set's records. most: lines of a set that are enough; speaks: whether sound is judged."""

    meaning: str
    lines: tuple[str, ...]
    records: Callable[[Bench, Sequence[Line]], list[Record]]
    measures: Callable[[Sequence[Record]], Iterator[Measure]]
    batch: int = BATCH
    speaks: bool = False
    most: int | None = None


def _about(line: Line) -> Record:
    kept = {"id": line.id, "utterance": line.utterance, "language": line.language, "reference": line.text}
    kept |= {"said": line.said} if line.said else {}
    return kept | ({"dataset": line.dataset} if line.dataset else {})


def _text(bench: Bench, lines: Sequence[Line]) -> list[Record]:
    replies = bench.listener.answers(lines)
    transcribed = bench.transcribe and lines[0].task in ("s2tt", "qa")
    heard = bench.listener.transcripts(lines) if transcribed else [None] * len(lines)
    found = []
    for line, reply, words in zip(lines, replies, heard, strict=True):
        more: Record = {"heard": words} if words is not None and line.said else {}
        more |= {"target": line.target} if line.target else {}
        more |= {"answers": list(line.answers)} if line.task == "qa" else {}
        found.append(_about(line) | {"answer": reply.text} | more)
    return found


def _spoken(bench: Bench, lines: Sequence[Line]) -> list[Record]:
    replies = bench.listener.answers(lines, speak=True)
    heard = bench.listener.transcripts(lines) if bench.transcribe else [None] * len(lines)
    found = []
    for line, reply, words in zip(lines, replies, heard, strict=True):
        more: Record = {"heard": words} if words is not None and line.said else {}
        more |= {"answers": list(line.answers), **bench.sound().judge(line, sound_of(reply))}
        found.append(_about(line) | {"answer": reply.text} | more)
    return found


def _read(bench: Bench, lines: Sequence[Line]) -> list[Record]:
    sounds = bench.listener.says(lines)
    return [_about(line) | bench.sound().judge(line, sound) for line, sound in zip(lines, sounds, strict=True)]


def _styled(bench: Bench, lines: Sequence[Line]) -> list[Record]:
    """The same words as the manner asks for them and as they are read without it: only the manner differs."""
    words = [line.said or line.text for line in lines]
    sounds = bench.listener.says(lines, lines[0].instruction)
    plain = bench.listener.says(lines)
    return [
        _about(line)
        | {"instruction": line.instruction, "wanted": wanted(line.instruction) and list(wanted(line.instruction) or ())}
        | {"styled": measured(sound, text), "plain": measured(usual, text)}
        for line, text, sound, usual in zip(lines, words, sounds, plain, strict=True)
    ]


STAGES = {TO_TEXT: "first text", TO_SPEECH: "first speech tokens", TO_AUDIO: "first sound", TOTAL: "whole reply"}


def _timed(bench: Bench, lines: Sequence[Line]) -> list[Record]:
    """One at a time by the serving engine: from the end of what was heard, compute alone."""
    found = []
    for line in lines:
        assert line.sound is not None
        settings = Settings(bench.listener.seed, temperature=0.0, max_text_tokens=bench.listener.longest)
        reply = minmo.talk(bench.fast(), line.sound(), settings, instruction=line.instruction)
        ms = {name: [round(1e3 * s, 3) for s in reply.timings.samples[stage]] for stage, name in STAGES.items()}
        found.append(
            _about(line) | {"answer": reply.text, "ms": {name: values for name, values in ms.items() if values}}
        )
    return found


def _turns(bench: Bench, lines: Sequence[Line]) -> list[Record]:
    found = []
    for line in lines:
        with torch.inference_mode():
            turns = count_turns(bench.listener.model, line.cut)
        found.append(_about(line) | {"marks": turns.marks, "right": turns.right})
    return found


EVALUATIONS: dict[str, Evaluation] = {
    "asr": Evaluation("speech recognition", ("asr",), _text, measures.heard),
    "s2tt": Evaluation("speech to text translation", ("s2tt",), _text, measures.translated),
    "lid": Evaluation("language identification", ("lid",), _text, measures.classified),
    "ser": Evaluation("speech emotion recognition", ("ser",), _text, measures.classified),
    "aed": Evaluation("vocal sound classification", ("aed",), _text, measures.classified),
    "age": Evaluation("the speaker's age", ("age",), _text, measures.classified),
    "gender": Evaluation("the speaker's gender", ("gender",), _text, measures.classified),
    "qa": Evaluation("spoken questions answered in text", ("qa",), _text, measures.answered),
    "s2s": Evaluation(
        "spoken questions answered aloud", ("s2s",), _spoken, measures.spoken_answers, BATCH // 2, speaks=True
    ),
    "tts": Evaluation("reading aloud", ("tts",), _read, measures.read_aloud, BATCH // 2, speaks=True),
    "instruct-tts": Evaluation(
        "reading in the manner asked for", ("instruct-tts",), _styled, measures.styled, BATCH // 2
    ),
    "turns": Evaluation("the full-duplex predictor on dialogues", ("duplex",), _turns, measures.turns_taken, 1),
    "latency": Evaluation("latency of a spoken reply", ("s2s",), _timed, measures.latencies, 1, most=12),
}
TAUGHT = {"nano": frozenset(("asr", "s2tt", "lid", "qa", "s2s", "tts", "turns", "latency"))}
"""What the presets that ship with weights have learned; a score in another task says nothing of them."""


def named(names: Sequence[str]) -> list[str]:
    """Tasks by name, "all" among them. Raises ValueError for one that is not."""
    if unknown := sorted(set(names) - set(EVALUATIONS) - {"all"}):
        raise ValueError(
            f"there is no task {', '.join(unknown)}; use all, {', '.join(EVALUATIONS)}, or duplex for conversations"
        )
    return list(EVALUATIONS) if "all" in names else [name for name in EVALUATIONS if name in names]
