"""What counts as the same words: judges write numbers, signs and contractions each in their own way."""

from __future__ import annotations

import re

from minmo.data.numbers import number_words

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
