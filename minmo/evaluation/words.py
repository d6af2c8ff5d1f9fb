"""What counts as the same words: judges write numbers, signs and contractions each in their own way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from minmo.data.languages import CHARACTERS
from minmo.data.numbers import number_words
from minmo.evaluation.judges import needed

SIGNS = {"+": "plus", "×": "times", "*": "times", "÷": "divided by", "=": "is", "%": "percent"}
CONTRACTIONS = {
    "i'm": "i am", "you're": "you are", "what's": "what is", "it's": "it is", "that's": "that is", "let's": "let us",
    "can't": "can not", "don't": "do not",
}  # fmt: skip
HOMOPHONES = {"for": "four", "fore": "four", "to": "two", "too": "two", "won": "one", "ate": "eight"}


def spoken(text: str, forgive: bool = False) -> list[str]:
    """The words of a text as they are said, in lower case, without signs of writing.

    Digits up to 100 are read as a number, longer ones digit by digit; a sign of arithmetic is a word, a minus only
    after a space ("0-1-3" is how a judge writes a string of digits). "and" is dropped, as numbers are said with it and
    without. forgive: words that sound alike count as the number ("to", "for", "won", "ate").
    """
    text = text.lower().replace("’", "'")
    text = re.sub(r"(?<!\S)[-–](?=\s|\d)|−", " minus ", text)
    text = re.sub(r"(?<=\d)\s*[x/]\s*(?=\d)", lambda m: " times " if "x" in m[0] else " divided by ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, f" {word} ")
    words: list[str] = []
    for piece in re.findall(r"\d+|[^\W\d_]+(?:'[^\W\d_]+)*", text):
        words += _number(piece) if piece.isdecimal() else CONTRACTIONS.get(piece, piece).replace("'", "").split()
    words = [word for word in words if word != "and"]
    return [HOMOPHONES.get(word, word) for word in words] if forgive else words


def _number(digits: str) -> list[str]:
    whole = int(digits)
    if whole <= 100 and str(whole) == digits:
        return number_words(whole).split()
    return [number_words(int(digit)) for digit in digits]


def normalised(text: str, language: str) -> list[str]:
    """What errors are counted in: the words of a text after Whisper's normaliser (PyPI whisper-normalizer), for English
    with its spellings and numbers; the characters where a language is written without spaces (CHARACTERS).

    The paper counts with a "modified Whisper normaliser", which was not published.
    """
    if language in CHARACTERS:
        return [character for character in _basic()(text) if not character.isspace()]
    return list((_english() if language == "en" else _basic())(text).split())


@cache
def _english() -> Callable[[str], str]:
    normaliser: Callable[[str], str] = needed("whisper_normalizer.english").EnglishTextNormalizer()
    return normaliser


@cache
def _basic() -> Callable[[str], str]:
    normaliser: Callable[[str], str] = needed("whisper_normalizer.basic").BasicTextNormalizer()
    return normaliser


def same(text: str, other: str, language: str = "en") -> bool:
    """Whether two texts say the same: as they are said, homophones forgiven, or after Whisper's normaliser."""
    return any(a == b for a, b in _readings(text, other, language))


def holds(text: str, answers: Iterable[str], language: str = "en") -> bool:
    """Whether a text holds one of some answers, word for word one after the other."""
    return any(_within(a, b) for answer in answers for b, a in _readings(text, answer, language))


def label_in(text: str, labels: Sequence[str]) -> str:
    """The label that an answer is, or the only one that it names; the answer itself, in lower case, where there is
    none."""
    answer = _basic()(text).strip()
    plain = {label: _basic()(label).strip() for label in labels}
    exact = [label for label, words in plain.items() if words == answer]
    named = exact or [label for label, words in plain.items() if _within(words.split(), answer.split())]
    return named[0] if len(named) == 1 else answer


def _readings(text: str, other: str, language: str) -> Iterable[tuple[list[str], list[str]]]:
    yield normalised(text, language), normalised(other, language)
    if language not in CHARACTERS:
        yield spoken(text, forgive=language == "en"), spoken(other, forgive=language == "en")


def _within(words: list[str], text: list[str]) -> bool:
    return bool(words) and any(text[i : i + len(words)] == words for i in range(len(text) - len(words) + 1))
