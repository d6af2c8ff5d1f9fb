"""Scores with their uncertainty: ratios over utterances with bootstrap intervals, word errors, confusions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from minmo.evaluation.judges import needed

RESAMPLES = 2000
OTHER = "(none of them)"
"""An answer that is none of the labels. No label itself: data sets have classes that are called "other"."""


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


Value = Callable[[np.ndarray], np.ndarray]
"""Sums (..., k) over utterances -> the values (...) that they come to; NaN where there is nothing to count."""


def quotient(sums: np.ndarray) -> np.ndarray:
    """The first of two sums by the second."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)


def ratio(
    counted: Sequence[float], of: Sequence[float], utterances: Sequence[Hashable] | None = None, seed: int = 0
) -> Score:
    """sum(counted) / sum(of), with a percentile bootstrap over utterances.

    counted, of: an entry each, such as word errors and words, or 0/1 and 1. utterances: which utterance an entry rests
    on (each its own, by default); those of one are drawn together. seed: of the resampling. Where every utterance says
    the same, resampling knows no doubt: there the interval reaches 3/n to either side, the rule of three.
    """
    if not len(counted) == len(of) == len(of if utterances is None else utterances):
        raise ValueError("counted, of and utterances must have an entry each")
    return in_doubt(estimate(np.asarray([counted, of], np.float64).T.reshape(-1, 2), quotient, utterances, seed))


def in_doubt(score: Score, within: tuple[float, float] = (0.0, 1.0)) -> Score:
    """A share with an interval that is not empty (see `ratio`). within: what shares, or differences of shares, can be;
    an error rate may lie beyond."""
    if score.value is None or score.low != score.high:
        return score
    least, most = min(within[0], score.value), max(within[1], score.value)
    low, high = max(least, score.value - 3 / score.n), min(most, score.value + 3 / score.n)
    return Score(score.value, low, high, score.n, score.of)


def estimate(
    entries: np.ndarray, value: Value = quotient, utterances: Sequence[Hashable] | None = None, seed: int = 0
) -> Score:
    """value(sums of the entries) with a percentile bootstrap over utterances.

    entries (n, k): what each adds to k sums, of which the last is what it counts for (words, answers): utterances for
    which that is nothing do not count. value: of sums to a score, such as BLEU of n-gram counts; where it gives NaN
    there is no score.
    """
    sums = _by_utterance(entries, utterances)
    sums = sums[sums[:, -1] > 0]
    if not len(sums):
        return Score(None, None, None, 0, 0)
    return _interval(sums, value, seed)


def _interval(sums: np.ndarray, value: Value, seed: int) -> Score:
    """sums (n, k), of utterances."""
    total = sums.sum(axis=0)
    given = float(value(total[None])[0])
    if not np.isfinite(given):
        return Score(None, None, None, len(sums), round(total[-1]))
    found = value(_resampled(sums, seed))
    low, high = (float(x) for x in np.percentile(found[np.isfinite(found)], [2.5, 97.5]))
    return Score(given, low, high, len(sums), round(total[-1]))


def difference(
    first: np.ndarray,
    second: np.ndarray,
    value: Value = quotient,
    utterances: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Score:
    """value(second) - value(first) of the same n items, (n, k) each, with a paired bootstrap: both are drawn alike."""
    if first.shape != second.shape:
        raise ValueError("both must have an entry for each of the same items")
    width = first.shape[1]
    both = _by_utterance(np.concatenate([first, second], axis=1), utterances)
    both = both[(both[:, width - 1] > 0) & (both[:, -1] > 0)]
    if not len(both):
        return Score(None, None, None, 0, 0)

    def apart(sums: np.ndarray) -> np.ndarray:
        return value(sums[:, width:]) - value(sums[:, :width])

    return _interval(both, apart, seed)


def _by_utterance(entries: np.ndarray, utterances: Sequence[Hashable] | None) -> np.ndarray:
    """Entries of one utterance added up: (utterances, k), in order of their first entries."""
    if utterances is None:
        return entries
    place = {name: i for i, name in enumerate(dict.fromkeys(utterances))}
    sums = np.zeros((len(place), entries.shape[1]))
    np.add.at(sums, [place[name] for name in utterances], entries)
    return sums


def _resampled(sums: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES, k): sums over utterances drawn with replacement; a few at a time, for n may be ten thousand."""
    rng, n = np.random.default_rng(seed), len(sums)
    even = np.full(n, 1 / n)
    return np.concatenate([rng.multinomial(n, even, RESAMPLES // 20) @ sums for _ in range(20)])


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
    """counts[true][answered] over `labels`; any other answer counts as OTHER."""
    counts = {label: dict.fromkeys([*labels, OTHER], 0) for label in labels}
    for true, answer in zip(truth, answered, strict=True):
        counts[true][answer if answer in labels else OTHER] += 1
    return counts
