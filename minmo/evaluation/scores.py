"""Scores with their uncertainty: ratios over utterances with bootstrap intervals, word errors, confusions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from minmo.evaluation.judges import needed

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A ratio and its 95 % interval; n: independent utterances that it rests on, of: words or answers counted.

    value, low and high are None where there was nothing to count.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    of: int

    def __str__(self) -> str:
        return "nothing to count" if self.value is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(
    counted: Sequence[float], of: Sequence[int], utterances: Sequence[Hashable] | None = None, seed: int = 0
) -> Score:
    """sum(counted) / sum(of), with a percentile bootstrap over utterances.

    counted, of: an entry each, such as word errors and words, or 0/1 and 1. utterances: which utterance an entry rests
    on (each its own, by default); those of one are drawn together. seed: of the resampling. Where every utterance says
    the same, resampling knows no doubt: there the interval reaches 3/n to either side, the rule of three.
    """
    if not len(counted) == len(of) == len(of if utterances is None else utterances):
        raise ValueError("counted, of and utterances must have an entry each")
    names = list(dict.fromkeys(range(len(of)) if utterances is None else utterances))
    place = {name: i for i, name in enumerate(names)}
    sums = np.zeros((2, len(names)))
    for entry, name in enumerate(range(len(of)) if utterances is None else utterances):
        sums[:, place[name]] += counted[entry], of[entry]
    total = sums.sum(axis=1)
    n = int((sums[1] > 0).sum())
    if not n:
        return Score(None, None, None, 0, 0)
    value = float(total[0] / total[1])
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    resampled = sums @ weights.T  # (2, resamples)
    ratios = resampled[0][resampled[1] > 0] / resampled[1][resampled[1] > 0]
    low, high = (float(x) for x in np.percentile(ratios, [2.5, 97.5]))
    if low == high:
        low, high = max(0.0, value - 3 / n), min(max(1.0, value), value + 3 / n)
    return Score(value, low, high, n, int(total[1]))


def quantile(values: Sequence[float], q: float, utterances: Sequence[Hashable] | None = None, seed: int = 0) -> Score:
    """The q-quantile (0 .. 1) of values, with a percentile bootstrap over utterances, as `ratio`.

    Of a single utterance the interval is the value alone: resampling knows nothing of its doubt.
    """
    owners = list(range(len(values)) if utterances is None else utterances)
    if len(owners) != len(values):
        raise ValueError("values and utterances must have an entry each")
    if not values:
        return Score(None, None, None, 0, 0)
    groups: dict[Hashable, list[float]] = {}
    for owner, value in zip(owners, values, strict=True):
        groups.setdefault(owner, []).append(value)
    arrays = [np.asarray(group) for group in groups.values()]
    chosen = np.random.default_rng(seed).integers(len(arrays), size=(RESAMPLES, len(arrays)))
    resampled = [np.quantile(np.concatenate([arrays[i] for i in row]), q) for row in chosen]
    low, high = (float(x) for x in np.percentile(resampled, [2.5, 97.5]))
    return Score(float(np.quantile(values, q)), low, high, len(arrays), len(values))


def word_errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Substitutions, deletions and insertions that part two lists of words (jiwer)."""
    if not reference:
        raise ValueError("there are no words to hear: a reference is empty")
    if not heard:
        return len(reference)
    found = needed("jiwer").process_words(" ".join(reference), " ".join(heard))
    return int(found.substitutions + found.deletions + found.insertions)


def word_error_rate(references: Sequence[Sequence[str]], heard: Sequence[Sequence[str]], seed: int = 0) -> Score:
    """WER over utterances, lists of words each."""
    errors = [word_errors(r, h) for r, h in zip(references, heard, strict=True)]
    return ratio(errors, [len(r) for r in references], seed=seed)


def right_rate(
    right: Sequence[bool],
    given: Sequence[bool] | None = None,
    utterances: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Score:
    """How often an answer is right; given: only of those entries for which this holds ("heard right")."""
    counts = [1] * len(right) if given is None else [int(g) for g in given]
    return ratio([int(r) * c for r, c in zip(right, counts, strict=True)], counts, utterances, seed)


def f1(marks: Sequence[tuple[int, int, int]], utterances: Sequence[Hashable] | None = None, seed: int = 0) -> Score:
    """Positive F1 of entries (hits, decisions, events): twice the hits by decisions and events together."""
    return ratio([2 * hits for hits, _, _ in marks], [made + due for _, made, due in marks], utterances, seed)


def confusion(truth: Sequence[str], answered: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """counts[true][answered] over `labels`; any other answer counts as "other"."""
    counts = {label: dict.fromkeys([*labels, "other"], 0) for label in labels}
    for true, answer in zip(truth, answered, strict=True):
        counts[true][answer if answer in labels else "other"] += 1
    return counts
