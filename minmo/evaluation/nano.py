"""The scores of a nano: what it hears, answers, translates and says on held-out material (`minmo evaluate nano`).

What it hears is scored on its own transcripts; what it says by recognisers that nobody here wrote, beside their score
on the original voice's recordings of the same sentences (the floor). Text is greedy, speech is drawn with the seed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from rich.table import Table

import minmo
from minmo.config import SAMPLE_RATE
from minmo.conversation.session import Settings
from minmo.conversation.verbs import Reply, Sound
from minmo.data.nano.sentences import answer, facts
from minmo.data.numbers import LANGUAGES
from minmo.evaluation.judges import GRAMMAR, Judge, Moonshine, PocketSphinx, needed
from minmo.evaluation.material import Line, Material
from minmo.evaluation.scores import Score, confusion, right_rate, word_error_rate
from minmo.evaluation.words import spoken
from minmo.model import MinMo
from minmo.tokenizer.text import TRANSCRIBE

BATCH = 32
"""Utterances that are heard side by side."""
LONGEST = 32
"""Text tokens of an answer: more than any sentence of the domain has."""
PARTS = {"test-seen": "seen voices", "test-unseen": "unseen voices"}
FLOOR = "original recording (floor)"


@dataclass(frozen=True)
class Row:
    """One score. material: what was heard or said; measure: what is counted; by: who heard it."""

    task: str
    material: str
    measure: str
    score: Score
    by: str = "the model"


@dataclass
class Results:
    """Everything that an evaluation found. confusions: material -> true language -> answer -> count."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    confusions: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


class Listener:
    """A model that answers lines in batches; what it transcribed once it does not hear again for that."""

    def __init__(self, model: MinMo, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self._transcripts: dict[str, str] = {}

    def answers(self, lines: Sequence[Line], speak: bool = False) -> list[Reply]:
        """A reply to each line, in order. Raises FloatingPointError where one broke off."""
        order = sorted(range(len(lines)), key=lambda i: (lines[i].instruction, lines[i].seconds))
        replies: dict[int, Reply] = {}
        for instruction, group in groupby(order, key=lambda i: lines[i].instruction):
            for batch in _batches(list(group), BATCH // 2 if speak else BATCH):
                sounds = [lines[i].sound() for i in batch]
                settings = self._settings([lines[i].id for i in batch], speak)
                replies |= zip(batch, minmo.talk(self.model, sounds, settings, instruction=instruction), strict=True)
        return [_whole(lines[i].id, replies[i]) for i in range(len(lines))]

    def transcripts(self, lines: Sequence[Line]) -> list[str]:
        """What was heard in each line, whatever is asked about it."""
        new = {line.utterance: line for line in lines if line.utterance not in self._transcripts}
        asked = [Line(u, u, x.language, x.seconds, x.sound, x.said, x.said, TRANSCRIBE) for u, x in new.items()]
        for line, reply in zip(asked, self.answers(asked), strict=True):
            self._transcripts[line.utterance] = reply.text
        return [self._transcripts[line.utterance] for line in lines]

    def says(self, texts: Sequence[str]) -> list[Sound]:
        """Each text read aloud, 16 kHz."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        sounds: dict[int, Sound] = {}
        for batch in _batches(order, BATCH // 2):
            said = [texts[i] for i in batch]
            replies = minmo.say(self.model, said, self._settings(said, True))
            sounds |= {i: _heard(_whole(texts[i], reply)) for i, reply in zip(batch, replies, strict=True)}
        return [sounds[i] for i in range(len(texts))]

    def _settings(self, names: Sequence[str], speak: bool) -> Settings:
        """An utterance draws the same speech whatever it shares a batch with."""
        seeds = tuple((self.seed << 32) + zlib.crc32(name.encode()) for name in names)
        return Settings(seeds, temperature=0.0, max_text_tokens=LONGEST, speak=speak)


def evaluate_nano(
    checkpoint: str | Path = "nano",
    data: str | Path = "nano-corpus",
    limit: int | None = None,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> Results:
    """All scores of a checkpoint directory or preset on a corpus directory that `minmo data nano` wrote.

    limit: lines of each set, for a quick run. out: a JSON file, written anew after every task. seed: of speech, of the
    lines that a limit chooses and of the intervals. progress: called with each task's name. Raises JudgeError where a
    judge is not installed, DataError for material that cannot be used, ValueError for a file that cannot be written.
    """
    needed("jiwer")
    moonshine = Moonshine()
    judges: list[Judge] = [moonshine, PocketSphinx(), PocketSphinx(grammar=True)]
    material = Material(Path(data), limit, seed)
    model = minmo.load(checkpoint)
    results = Results(_about(model, material, [judge.name for judge in judges]), left_out=material.left_out)
    listener = Listener(model, seed)
    tasks: dict[str, Callable[[], None]] = {
        "hearing": lambda: _hearing(results, material, listener, judges, seed),
        "answering": lambda: _answering(results, material, listener, seed),
        "languages": lambda: _languages(results, material, listener, seed),
        "translating": lambda: _translating(results, material, listener, seed),
        "speaking": lambda: _speaking(results, material, listener, judges, seed),
        "speech to speech": lambda: _speech_to_speech(results, material, listener, moonshine, seed),
    }
    _write(results, out)
    for name, task in tasks.items():
        progress(name)
        task()
        _write(results, out)
    return results


def tables(results: Results) -> list[Table]:
    """The scores, and for each material who was taken for whom, to print with rich."""
    about = results.about
    weights = about["weights"] if about["trained"] else f"UNTRAINED: {about['weights']}; the scores mean nothing"
    scores = Table("task", "material", "measure", "heard by", "score", "95 %", "n", "of", title=f"nano: {weights}")
    for row in results.rows:
        s = row.score
        value, interval = ("-", "-") if s.value is None else (f"{s.value:.3f}", f"{s.low:.3f} .. {s.high:.3f}")
        scores.add_row(row.task, row.material, row.measure, row.by, value, interval, str(s.n), str(s.of))
    scores.caption = "n: utterances, of: words or answers; 95 %: bootstrap over utterances" + "".join(
        f"\nleft out: {what}" for what in results.left_out
    )
    found = [scores]
    for name, counts in results.confusions.items():
        table = Table("spoken", *[*LANGUAGES.values(), "other"], title=f"languages, {name}: answered")
        for true, answered in counts.items():
            table.add_row(true, *map(str, answered.values()))
        found.append(table)
    return found


def _hearing(results: Results, material: Material, listener: Listener, judges: list[Judge], seed: int) -> None:
    sets: dict[tuple[str, str], list[Line]] = {}
    for part, name in PARTS.items():
        for language, lines in material.by_language(f"{part}-asr").items():
            sets[name, language] = lines
    for language in LANGUAGES:
        chosen = " (development)" if language == "en" else ""
        sets[f"people, single words{chosen}", language] = material.single_words(language)
    sets["people, joined words (development)", "en"] = material.joined_words()
    for name, lines in material.unseen_people().items():
        sets[name, lines[0].language] = lines
    listener.transcripts([line for lines in sets.values() for line in lines])  # in full batches
    for (name, language), lines in sets.items():
        if not lines:
            continue
        of, title = _words([line.said for line in lines]), f"{name}, {language}"
        heard = _words(listener.transcripts(lines))
        results.rows.append(Row("hearing", title, "WER", word_error_rate(of, heard, seed)))
        if name.startswith("people") and language == "en":
            sounds = [line.sound() for line in lines]
            results.rows += _judged("hearing", title, [line.said for line in lines], sounds, judges, seed)


def _answering(results: Results, material: Material, listener: Listener, seed: int) -> None:
    arithmetic = {answer(problem, result) for problem, result in facts()}
    for part, name in PARTS.items():
        lines = material.lines(f"{part}-qa-en")
        heard = _same([x.said for x in lines], listener.transcripts(lines))
        right = _same([x.text for x in lines], [r.text for r in listener.answers(lines)])
        problem = [x.text in arithmetic for x in lines]
        other = [not p for p in problem]
        both = [h and p for h, p in zip(heard, problem, strict=True)]
        for measure, given in (
            ("arithmetic heard right", problem),
            ("arithmetic right, of those heard right", both),
            ("arithmetic right", problem),
            ("other answers right", other),
        ):
            counted = heard if measure == "arithmetic heard right" else right
            score = right_rate(counted, given, [x.utterance for x in lines], seed)
            results.rows.append(Row("answering", f"{name}, en", measure, score))


def _languages(results: Results, material: Material, listener: Listener, seed: int) -> None:
    sets = {
        name: [line for lines in material.by_language(f"{part}-lid").values() for line in lines]
        for part, name in PARTS.items()
    }
    sets["people"] = material.lines("test-people-lid")
    labels = {label.lower(): label for label in LANGUAGES.values()}
    for name, lines in sets.items():
        truth = [line.text for line in lines]
        said = [reply.text.strip().strip(".").lower() for reply in listener.answers(lines)]
        answered = [labels.get(text, text) for text in said]
        right = [a == b for a, b in zip(truth, answered, strict=True)]
        results.rows.append(
            Row("languages", name, "language right", right_rate(right, None, [x.utterance for x in lines], seed))
        )
        for true, taken in (("English", "Spanish"), ("Spanish", "English")):
            wrong = [a == taken for a in answered]
            score = right_rate(wrong, [t == true for t in truth], [x.utterance for x in lines], seed)
            results.rows.append(Row("languages", name, f"{true} taken for {taken}", score))
        results.confusions[name] = confusion(truth, answered, list(LANGUAGES.values()))


def _translating(results: Results, material: Material, listener: Listener, seed: int) -> None:
    for part, name in PARTS.items():
        for language, lines in material.by_language(f"{part}-s2tt").items():
            heard = _same([x.said for x in lines], listener.transcripts(lines))
            right = _same([x.text for x in lines], [r.text for r in listener.answers(lines)])
            score = right_rate(right, heard, [x.utterance for x in lines], seed)
            title = f"{name}, from {language}"
            results.rows.append(Row("translating", title, "number exact, of those heard right", score))


def _speaking(results: Results, material: Material, listener: Listener, judges: list[Judge], seed: int) -> None:
    lines = material.lines("valid-tts", _english_numbers)
    if not lines:
        return
    texts = [line.text for line in lines]
    original = [_recording(line) for line in lines]
    title = "held-out sentences"
    results.rows += _judged("speaking", title, texts, listener.says(texts), judges, seed)
    results.rows += _judged("speaking", f"{title}, {FLOOR}", texts, original, judges, seed)


def _speech_to_speech(results: Results, material: Material, listener: Listener, judge: Judge, seed: int) -> None:
    for part, name in PARTS.items():
        lines = material.lines(f"{part}-s2s", _english_numbers)
        if not lines:
            continue
        texts = [line.text for line in lines]
        answered = [judge(_heard(reply)) for reply in listener.answers(lines, speak=True)]
        floor = [judge(_recording(line)) for line in lines]
        for title, heard in ((f"{name}, en", answered), (f"{name}, en, {FLOOR}", floor)):
            right = _same(texts, heard, forgive=True)
            score = right_rate(right, None, [x.utterance for x in lines], seed)
            results.rows.append(Row("speech to speech", title, "right answer understood", score, judge.name))


def _judged(
    task: str, title: str, texts: Sequence[str], sounds: Sequence[Sound], judges: Sequence[Judge], seed: int
) -> list[Row]:
    """WER of each judge that knows the words, strictly and (where it can write them at all) homophones forgiven."""
    rows = []
    references = {word for text in texts for word in text.split()}
    for judge in judges:
        if judge.vocabulary is not None and not references <= judge.vocabulary:
            continue
        heard = [judge(sound) for sound in sounds]
        for measure, forgive in (("WER", False), ("WER, homophones forgiven", True)):
            if judge.vocabulary is None or not forgive:
                score = word_error_rate(_words(texts, forgive), _words(heard, forgive), seed)
                rows.append(Row(task, title, measure, score, judge.name))
    return rows


def _english_numbers(line: Line) -> bool:
    """Whether an English judge can be asked: answers also hold words of other languages."""
    return set(line.text.split()) <= set(GRAMMAR)


def _words(texts: Sequence[str], forgive: bool = False) -> list[list[str]]:
    return [spoken(text, forgive) for text in texts]


def _same(texts: Sequence[str], heard: Sequence[str], forgive: bool = False) -> list[bool]:
    return [a == b for a, b in zip(_words(texts, forgive), _words(heard, forgive), strict=True)]


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _whole(name: str, reply: Reply) -> Reply:
    if reply.fault:
        raise FloatingPointError(f"{name}: {reply.fault}")
    return reply


def _heard(reply: Reply) -> Sound:
    return np.asarray(soxr.resample(reply.audio, reply.sample_rate, SAMPLE_RATE), np.float32)


def _recording(line: Line) -> Sound:
    assert line.spoken is not None, f"{line.id} has no recording of its answer"  # tts and s2s of this corpus do
    return line.spoken()


def _about(model: MinMo, material: Material, judges: list[str]) -> dict[str, Any]:
    """What the scores were made with."""
    corpus = material.data / "corpus.json"
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return {
        "model": model.config.name,
        "weights": model.provenance,
        "sha256_of_tensors": digest.hexdigest(),
        "trained": model.trained,
        "minmo": minmo.__version__,
        "judges": judges,
        "corpus_seed": json.loads(corpus.read_text(encoding="utf-8"))["seed"] if corpus.is_file() else None,
        "limit": material.limit,
        "seed": material.seed,
    }


def _write(results: Results, out: str | Path | None) -> None:
    if out is None:
        return
    path = Path(out)
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.write_text(results.as_json(), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); give -o a file in a folder that exists"
        ) from None
