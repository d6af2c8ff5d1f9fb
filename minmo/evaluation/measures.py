"""What is counted of an item's record, task by task: measures, from which scores and comparisons follow.

A measure says what each record adds to some sums and what the sums come to, so that word errors, BLEU and F1 are
resampled alike (`minmo/evaluation/scores.py`); or which values a record has, of which a quantile is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minmo.data.languages import CHARACTERS
from minmo.evaluation.judges import needed
from minmo.evaluation.records import Record
from minmo.evaluation.scores import OTHER, Score, Value, difference, estimate, in_doubt, quantile, quotient, word_errors
from minmo.evaluation.words import holds, label_in, normalised, same, spoken

ORIGINAL = "original recording (floor)"


@dataclass(frozen=True)
class Measure:
    """entry: what a record adds to the sums, the last of them what it counts for, or None where it does not count;
    with `q` the values that it has. value: of sums to a score. by: who heard what is counted. less: less is better.
    unit: of the score, for reports; "" is a share."""

    name: str
    entry: Callable[[Record], Sequence[float] | None]
    value: Value = quotient
    by: str = "the model"
    less: bool = False
    q: float | None = None
    unit: str = ""

    def score(self, records: Sequence[Record], seed: int) -> Score:
        """With an interval over utterances."""
        counted = [(entry, r["utterance"]) for r in records if (entry := self.entry(r)) is not None]
        owners = [owner for _, owner in counted]
        if self.q is not None:
            flat = [(value, owner) for values, owner in counted for value in values]
            return quantile([v for v, _ in flat], self.q, [o for _, o in flat], seed)
        if not counted:
            return Score(None, None, None, 0, 0)
        score = estimate(np.asarray([entry for entry, _ in counted], np.float64), self.value, owners, seed)
        return score if self.unit else in_doubt(score)

    def compared(self, first: Sequence[Record], second: Sequence[Record], seed: int) -> Score | None:
        """Second minus first on the same items, in order; None where a difference of these is not defined."""
        pairs = [(self.entry(a), self.entry(b), a["utterance"]) for a, b in zip(first, second, strict=True)]
        both = [(a, b, owner) for a, b, owner in pairs if a is not None and b is not None]
        if self.q is not None or not both:
            return None
        one, other = (np.asarray([pair[i] for pair in both], np.float64) for i in (0, 1))
        found = difference(one, other, self.value, [owner for _, _, owner in both], seed)
        return found if self.unit else in_doubt(found, (-1.0, 1.0))


def heard(records: Sequence[Record]) -> Iterator[Measure]:
    """Transcripts: WER, or CER where a language is written without spaces."""
    yield from _errors(lambda r: r["answer"], records)


def translated(records: Sequence[Record]) -> Iterator[Measure]:
    targets = sorted({r["target"] for r in records})
    for target in targets:
        bleu = bleu_of(target)
        name = f"BLEU {bleu.get_signature()}" + (f", into {target}" if len(targets) > 1 else "")
        yield Measure(name, partial(_bleu, bleu, target), _corpus_bleu, unit="BLEU")
    yield from _right("word for word", lambda r: same(r["reference"], r["answer"], r["target"]), records)


def classified(records: Sequence[Record]) -> Iterator[Measure]:
    """Weighted accuracy (of all), unweighted (mean over classes) and macro F1, as EmoBox counts them."""
    labels = labels_of(records)
    entry = partial(_confused, labels)
    size = len(labels)
    for name, value in (("accuracy (WA)", _weighted), ("accuracy, mean over classes (UA)", _unweighted), ("F1", _f1)):
        yield Measure(name, entry, partial(value, size))


def answered(records: Sequence[Record]) -> Iterator[Measure]:
    def right(record: Record) -> bool:
        return holds(record["answer"], record["answers"] or [record["reference"]], record["language"])

    yield from _right("right (holds an answer)", right, records)
    yield from _right("word for word", lambda r: same(r["reference"], r["answer"], r["language"]), records)


def spoken_answers(records: Sequence[Record]) -> Iterator[Measure]:
    """What a recogniser understands of them; what they say in text is `answered`."""
    yield from answered(records)
    for judge, kind in _judged(records):
        name = "" if kind == "judged" else f", {ORIGINAL}"
        yield Measure(f"right answer understood{name}", partial(_understood, kind, judge), by=judge)
    for judge in sorted({judge for judge, kind in _judged(records) if kind == "judged"}):
        yield Measure("WER of the speech against its text", partial(_says_its_text, judge), by=judge, less=True)
    yield from _sounds(records)


def read_aloud(records: Sequence[Record]) -> Iterator[Measure]:
    for judge, kind in _judged(records):
        name = "" if kind == "judged" else f", {ORIGINAL}"
        for measure in _errors(lambda r, k=kind, j=judge: r[k].get(j), records, judge):  # type: ignore[misc]
            yield Measure(f"{measure.name}{name}", measure.entry, by=judge, less=True)
    yield from _sounds(records)


def styled(records: Sequence[Record]) -> Iterator[Measure]:
    """What the manner asked for did to the sound, beside the same words read plainly."""
    for quantity, name in (("rate", "words a second"), ("pitch", "pitch"), ("level", "level, dB")):
        for sign, asked in ((1, "more"), (-1, "less")):
            wanted = [r for r in records if r["wanted"] == [quantity, sign]]
            if not wanted:
                continue
            entry = partial(_changed, quantity, sign)
            title = f"{name} with it by without, asked for {asked}"
            yield Measure(title, entry, q=0.5, unit="dB" if quantity == "level" else "times")
            yield Measure(f"{name}: {asked}, as asked", partial(_followed, quantity, sign))


def latencies(records: Sequence[Record]) -> Iterator[Measure]:
    for stage in dict.fromkeys(stage for r in records for stage in r["ms"]):
        for q in (0.5, 0.95):
            yield Measure(f"{stage}, p{100 * q:.0f}", partial(_values, stage), q=q, less=True, unit="ms")


def turns_taken(records: Sequence[Record]) -> Iterator[Measure]:
    """F1 of decisions, and shares of what was right (`minmo/evaluation/turns.py`)."""
    for name in dict.fromkeys(name for r in records for name in r["marks"]):
        yield Measure(name, partial(_f1_of_decisions, name))
    for name in dict.fromkeys(name for r in records for name in r["right"]):
        yield Measure(name, partial(_share, name))


def labels_of(records: Sequence[Record]) -> list[str]:
    return sorted({r["reference"] for r in records})


def answer_label(record: Record, labels: Sequence[str]) -> str:
    found = label_in(record["answer"], labels)
    return found if found in labels else OTHER


def bleu_of(target: str) -> Any:
    """sacrebleu's BLEU for a language; where it wants a tokeniser with a dictionary of its own (Japanese, Korean),
    characters."""
    tokenizers = {"zh": "zh", "yue": "zh"} | dict.fromkeys(CHARACTERS - {"zh", "yue"}, "char")
    bleu = needed("sacrebleu.metrics").BLEU(tokenize=tokenizers.get(target, "13a"))
    bleu.corpus_score([""], [[""]])  # its signature then knows of the one reference
    return bleu


def _errors(
    said: Callable[[Record], str | None], records: Sequence[Record], by: str = "the model"
) -> Iterator[Measure]:
    characters = {r["language"] in CHARACTERS for r in records}

    def entry(words: Callable[[str, str], list[str]], record: Record) -> Sequence[float] | None:
        reference, answer = words(record["reference"], record["language"]), said(record)
        if answer is None or not reference:
            return None
        return word_errors(reference, words(answer, record["language"])), len(reference)

    name = "CER" if characters == {True} else "WER" if characters == {False} else "CER or WER"
    yield Measure(f"{name} (Whisper's normaliser)", partial(entry, normalised), by=by, less=True)
    if characters == {False}:
        forgive = by != "the model"  # a recogniser writes "for" where it hears "four"
        as_said = partial(entry, lambda text, _: spoken(text, forgive))
        name = "WER (words as said, homophones forgiven)" if forgive else "WER (words as said)"
        yield Measure(name, as_said, by=by, less=True)


def _right(name: str, right: Callable[[Record], bool], records: Sequence[Record]) -> Iterator[Measure]:
    """How often, and how often where the words were heard right: what a model misheard, it could not know."""
    yield Measure(name, lambda r: (right(r), 1))
    if any(r.get("heard") is not None for r in records):

        def well(r: Record) -> bool:
            return r.get("heard") is not None and same(r["said"], r["heard"], r["language"])

        yield Measure("heard right", lambda r: None if r.get("heard") is None else (well(r), 1))
        yield Measure(f"{name}, of those heard right", lambda r: (right(r), 1) if well(r) else None)


def _judged(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(judge, "judged" or "floor") of all that judged some of them."""
    kinds = ("judged", "floor")
    return list(dict.fromkeys((judge, kind) for r in records for kind in kinds for judge in r.get(kind) or {}))


def _understood(kind: str, judge: str, record: Record) -> Sequence[float] | None:
    text = (record.get(kind) or {}).get(judge)
    if text is None:
        return None
    return holds(text, record["answers"] or [record["reference"]], record["language"]), 1


def _says_its_text(judge: str, record: Record) -> Sequence[float] | None:
    words, text = spoken(record["answer"], forgive=True), (record.get("judged") or {}).get(judge)
    return None if text is None or not words else (word_errors(words, spoken(text, forgive=True)), len(words))


def _sounds(records: Sequence[Record]) -> Iterator[Measure]:
    """How good and how constant the voice is, where there are judges of it."""
    if any(r.get("mos") is not None for r in records):
        for kind, name in (("mos", ""), ("floor_mos", f", {ORIGINAL}")):
            entry = partial(_one, kind)
            yield Measure(f"quality of the sound (1 to 5){name}", entry, by="speechmos DNSMOS", unit="MOS")
    embedded = [r["voice"] for r in records if r.get("voice")]
    if len(embedded) > 1:
        total = np.sum(embedded, axis=0)
        name = "likeness of a voice to that of the other items (cosine)"
        yield Measure(name, partial(_like_the_others, total), by="Resemblyzer", unit="cosine")
    if any(r.get("likeness") is not None for r in records):
        name = "likeness of the voice to its recording (cosine)"
        yield Measure(name, partial(_one, "likeness"), by="Resemblyzer", unit="cosine")


def _like_the_others(total: np.ndarray, record: Record) -> Sequence[float] | None:
    if not record.get("voice"):
        return None
    own = np.asarray(record["voice"])
    others = total - own
    return float(own @ others / np.linalg.norm(own) / np.linalg.norm(others)), 1


def _one(field: str, record: Record) -> Sequence[float] | None:
    return None if record.get(field) is None else (record[field], 1)


def _bleu(bleu: Any, target: str, record: Record) -> Sequence[float] | None:
    if record["target"] != target:
        return None
    found = bleu.corpus_score([record["answer"]], [[record["reference"]]])
    return *found.counts, *found.totals, max(0, found.ref_len - 3), found.sys_len, found.ref_len


def _corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """NaN where no reference has four words: BLEU counts runs of four, and of the best answer it would be 0."""
    compute = needed("sacrebleu.metrics").BLEU.compute_bleu
    rows = sums.round().astype(int).tolist()
    scores = [compute(row[:4], row[4:8], row[9], row[10], smooth_method="exp").score for row in rows]
    return np.asarray([score if row[8] else np.nan for row, score in zip(rows, scores, strict=True)])


def _confused(labels: list[str], record: Record) -> Sequence[float]:
    counts = np.zeros((len(labels), len(labels) + 1))
    answer = answer_label(record, labels)
    column = labels.index(answer) if answer in labels else len(labels)
    counts[labels.index(record["reference"]), column] = 1
    return *counts.ravel(), 1


def _counts(size: int, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right, true, answered) by class, (..., classes) each."""
    table = sums[..., :-1].reshape(*sums.shape[:-1], size, size + 1)
    return np.diagonal(table, axis1=-2, axis2=-1), table.sum(axis=-1), table[..., :size].sum(axis=-2)


def _weighted(size: int, sums: np.ndarray) -> np.ndarray:
    right, true, _ = _counts(size, sums)
    return np.asarray(right.sum(axis=-1) / true.sum(axis=-1))


def _unweighted(size: int, sums: np.ndarray) -> np.ndarray:
    right, true, _ = _counts(size, sums)
    recall = np.where(true > 0, right / np.maximum(true, 1), 0)
    return np.asarray(recall.sum(axis=-1) / (true > 0).sum(axis=-1))  # over the classes that were drawn


def _f1(size: int, sums: np.ndarray) -> np.ndarray:
    right, true, answers = _counts(size, sums)
    f1 = 2 * right / np.maximum(true + answers, 1)
    return np.asarray(f1.sum(axis=-1) / ((true + answers) > 0).sum(axis=-1))


def _changed(quantity: str, sign: int, record: Record) -> Sequence[float] | None:
    """What a styled reading has of a quantity, by the plain one; dB are subtracted."""
    if record["wanted"] != [quantity, sign]:
        return None
    with_it, without = record["styled"].get(quantity), record["plain"].get(quantity)
    if with_it is None or not without:
        return None
    return [with_it - without if quantity == "level" else with_it / without]


def _followed(quantity: str, sign: int, record: Record) -> Sequence[float] | None:
    change = _changed(quantity, sign, record)
    return None if change is None else (sign * (change[0] - (quantity != "level")) > 0, 1)


def _values(stage: str, record: Record) -> Sequence[float] | None:
    return record["ms"].get(stage)


def _f1_of_decisions(name: str, record: Record) -> Sequence[float] | None:
    marks = record["marks"].get(name)
    return None if not marks else (2 * sum(m[0] for m in marks), sum(m[1] + m[2] for m in marks))


def _share(name: str, record: Record) -> Sequence[float] | None:
    right = record["right"].get(name)
    return None if not right else (sum(right), len(right))
