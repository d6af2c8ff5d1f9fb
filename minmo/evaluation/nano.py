"""The scores of a nano: what it hears, answers, translates and says, and when, on held-out material (`minmo evaluate`).

What it hears is scored on its own transcripts; what it says by recognisers that nobody here wrote, beside their score
on the original voice's recordings of the same sentences (the floor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import minmo
from minmo.conversation.verbs import Sound
from minmo.data.nano.sentences import answer, facts
from minmo.data.numbers import LANGUAGES
from minmo.data.schema import DataError
from minmo.evaluation.judges import GRAMMAR, Judge, Moonshine, PocketSphinx, needed
from minmo.evaluation.listener import Listener, sound_of
from minmo.evaluation.material import Line, Material
from minmo.evaluation.results import Results, Row, made_with
from minmo.evaluation.scores import Score, confusion, right_rate, word_error_rate
from minmo.evaluation.turns import take_turns
from minmo.evaluation.words import spoken

PARTS = {"test-seen": "seen voices", "test-unseen": "unseen voices"}
FLOOR = "original recording (floor)"


@dataclass(frozen=True)
class Run:
    """What an evaluation goes on with; judges: the first of them judges spoken answers."""

    material: Material
    listener: Listener
    judges: list[Judge]
    results: Results
    seed: int

    def add(self, task: str, material: str, measure: str, score: Score) -> None:
        self.results.rows.append(Row(task, material, measure, score))

    def right(self, lines: Sequence[Line], right: Sequence[bool], given: Sequence[bool] | None = None) -> Score:
        return right_rate(right, given, [line.utterance for line in lines], self.seed)


def evaluate_nano(
    checkpoint: str | Path = "nano",
    data: str | Path = "nano-corpus",
    limit: int | None = None,
    out: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda task: None,
) -> Results:
    """Scores of a checkpoint directory or preset on a corpus directory that `minmo data nano` wrote.

    limit: lines of each set, for a quick run. tasks: of TASKS, all by default. out: a JSON file; OUT.part holds what
    there is until all is done. seed: of speech, of the lines that a limit chooses and of the intervals. progress: is
    told each task's name. Raises JudgeError where a judge is not installed, DataError for material that cannot be used,
    ValueError for an unknown task or a file that cannot be written, FloatingPointError for weights whose numbers break.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must lie between 0 and {2**31 - 1}, got {seed}")
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"there is no task {', '.join(sorted(unknown))}; use {', '.join(TASKS)}")
    needed("jiwer")
    judges: list[Judge] = [Moonshine(), PocketSphinx(), PocketSphinx(grammar=True)]
    material = Material(Path(data), limit, seed)
    model = minmo.load(checkpoint)
    # One list: what the tasks look for in vain is in the results as soon as it is noted.
    results = Results(made_with(model, material, [j.name for j in judges]), left_out=material.left_out)
    run = Run(material, Listener(model, seed), judges, results, seed)
    unfinished = None if out is None else Path(f"{out}.part")
    for name in tasks or TASKS:
        if unfinished is not None:
            results.write(unfinished)
        progress(name)
        TASKS[name](run)
    if unfinished is not None:
        results.write(unfinished)
        unfinished.replace(str(out))
    return results


def _hearing(run: Run) -> None:
    sets: dict[tuple[str, str], list[Line]] = {}
    for part, name in PARTS.items():
        for language, lines in run.material.by_language(f"{part}-asr").items():
            sets[name, language] = lines
    for language in LANGUAGES:
        chosen = " (development)" if language == "en" else ""
        sets[f"people, single words{chosen}", language] = run.material.single_words(language)
    sets["people, joined words (development)", "en"] = run.material.joined_words()
    for name, lines in run.material.unseen_people().items():
        sets[name, lines[0].language] = lines
    run.listener.transcripts([line for lines in sets.values() for line in lines])  # in full batches
    for (name, language), lines in sets.items():
        texts, title = [line.said for line in lines], f"{name}, {language}"
        run.add("hearing", title, "WER", _wer(texts, run.listener.transcripts(lines), run.seed))
        if name.startswith("people") and language == "en":
            _judge(run, "hearing", title, texts, [line.sound() for line in lines])


def _answering(run: Run) -> None:
    for part, name in PARTS.items():
        lines = run.material.lines(f"{part}-qa-en")
        heard = _same([x.said for x in lines], run.listener.transcripts(lines))
        right = _same([x.text for x in lines], [reply.text for reply in run.listener.answers(lines)])
        problem = _sums([x.text for x in lines])
        both = [h and p for h, p in zip(heard, problem, strict=True)]
        for measure, counted, given in (
            ("arithmetic heard right", heard, problem),
            ("arithmetic right, of those heard right", right, both),
            ("arithmetic right", right, problem),
            ("other answers right", right, [not p for p in problem]),
        ):
            run.add("answering", f"{name}, en", measure, run.right(lines, counted, given))


def _languages(run: Run) -> None:
    sets = {
        name: [line for lines in run.material.by_language(f"{part}-lid").values() for line in lines]
        for part, name in PARTS.items()
    }
    sets["people"] = run.material.lines("test-people-lid")
    labels = {label.lower(): label for label in LANGUAGES.values()}
    for name, lines in sets.items():
        truth = [line.text for line in lines]
        said = [reply.text.strip(" .").lower() for reply in run.listener.answers(lines)]
        answered = [labels.get(text, text) for text in said]
        right = [a == b for a, b in zip(truth, answered, strict=True)]
        run.add("languages", name, "language right", run.right(lines, right))
        for true, taken in (("English", "Spanish"), ("Spanish", "English")):
            score = run.right(lines, [a == taken for a in answered], [t == true for t in truth])
            run.add("languages", name, f"{true} taken for {taken}", score)
        run.results.confusions[name] = confusion(truth, answered, list(LANGUAGES.values()))


def _translating(run: Run) -> None:
    for part, name in PARTS.items():
        for language, lines in run.material.by_language(f"{part}-s2tt").items():
            heard = _same([x.said for x in lines], run.listener.transcripts(lines))
            right = _same([x.text for x in lines], [reply.text for reply in run.listener.answers(lines)])
            title = f"{name}, from {language}"
            run.add("translating", title, "numbers exact, of those heard right", run.right(lines, right, heard))


def _speaking(run: Run) -> None:
    lines = run.material.lines("valid-tts", _english_numbers)
    texts = [line.text for line in lines]
    _judge(run, "speaking", "held-out sentences", texts, run.listener.says(texts))
    _judge(run, "speaking", f"held-out sentences, {FLOOR}", texts, [_recording(line) for line in lines])


def _speech_to_speech(run: Run) -> None:
    judge = run.judges[0]
    for part, name in PARTS.items():
        lines = run.material.lines(f"{part}-s2s", _english_numbers)
        answered = [judge(sound_of(reply)) for reply in run.listener.answers(lines, speak=True)]
        floor = [judge(_recording(line)) for line in lines]
        texts = [line.text for line in lines]
        sums = _sums(texts)
        for title, heard in ((f"{name}, en", answered), (f"{name}, en, {FLOOR}", floor)):
            words, result = _same(texts, heard, forgive=True), _results_alike(texts, heard)
            for measure, right, given in (
                ("right answer understood, every word", words, None),
                ("right result understood, arithmetic", result, sums),
            ):
                score = run.right(lines, right, given)
                run.results.rows.append(Row("speech-to-speech", title, measure, score, judge.name))


def _turns(run: Run) -> None:
    taken = take_turns(run.listener.model, run.material)
    for measure, score in taken.scores(run.seed).items():
        run.add("turn-taking", "simulated dialogues", measure, score)


TASKS: dict[str, Callable[[Run], None]] = {
    "hearing": _hearing,
    "answering": _answering,
    "languages": _languages,
    "translating": _translating,
    "speaking": _speaking,
    "speech-to-speech": _speech_to_speech,
    "turn-taking": _turns,
}


def _judge(run: Run, task: str, title: str, texts: Sequence[str], sounds: Sequence[Sound]) -> None:
    """WER of each judge that knows the words, strictly and, where it can write them at all, homophones forgiven."""
    words = {word for text in texts for word in text.split()}
    for judge in run.judges:
        if judge.vocabulary is not None and not words <= judge.vocabulary:
            continue
        heard = [judge(sound) for sound in sounds]
        for measure, forgive in (("WER", False), ("WER, homophones forgiven", True)):
            if judge.vocabulary is None or not forgive:
                score = _wer(texts, heard, run.seed, forgive)
                run.results.rows.append(Row(task, title, measure, score, judge.name))


def _english_numbers(line: Line) -> bool:
    """Whether an English judge can be asked: answers also hold words of other languages."""
    return set(line.text.split()) <= set(GRAMMAR)


def _wer(texts: Sequence[str], heard: Sequence[str], seed: int, forgive: bool = False) -> Score:
    return word_error_rate(_words(texts, forgive), _words(heard, forgive), seed)


def _words(texts: Sequence[str], forgive: bool = False) -> list[list[str]]:
    return [spoken(text, forgive) for text in texts]


def _same(texts: Sequence[str], heard: Sequence[str], forgive: bool = False) -> list[bool]:
    return [a == b for a, b in zip(_words(texts, forgive), _words(heard, forgive), strict=True)]


def _sums(texts: Sequence[str]) -> list[bool]:
    """Which of these answers are facts of the domain's arithmetic."""
    arithmetic = {answer(problem, result) for problem, result in facts()}
    return [text in arithmetic for text in texts]


def _results_alike(texts: Sequence[str], heard: Sequence[str]) -> list[bool]:
    """Whether what was heard after the last "is" are the words that the text has there, homophones forgiven."""

    def result(words: list[str]) -> list[str]:
        return words[len(words) - words[::-1].index("is") :] if "is" in words else []

    pairs = zip(_words(texts, forgive=True), _words(heard, forgive=True), strict=True)
    return [result(text) == result(words) for text, words in pairs]


def _recording(line: Line) -> Sound:
    if line.spoken is None:
        raise DataError(f"{line.id} has no target_recording, the floor of what is said: add it", "missing recording")
    return line.spoken()
