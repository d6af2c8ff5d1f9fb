"""The nano tokenizer's making: the committed file, one token a number word, speech over three times as long as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from minmo.data.nano_tokenizer import build, corpus, number_sentences, number_tokens
from minmo.data.numbers import LANGUAGES, number_words, spoken_words
from minmo.tokenizer.text import TextTokenizer

FILE = Path(__file__).parents[2] / "minmo" / "assets" / "nano" / "tokenizer.json"
NANO = TextTokenizer.from_file(FILE)
SECONDS_PER_WORD = 0.35
FRAME_RATE = 25


def test_the_committed_file_is_what_build_makes() -> None:
    assert build().to_str(pretty=True) == FILE.read_text(encoding="utf-8")


def test_one_token_a_number_word() -> None:
    for piece in number_tokens():
        assert len(NANO.encode(piece)) == 1, piece
    for language in LANGUAGES:
        for n in range(101):
            words = number_words(n, language)
            assert len(NANO.encode(words)) == len(NANO.encode(" " + words)) == len(spoken_words(words)), words


def test_speech_is_more_than_three_times_as_long_as_its_text() -> None:
    """The condition of the 5:15 schedule, on at least 99 % of the domain's sentences."""
    sentences = number_sentences(1000, seed=1)
    fits = [FRAME_RATE * SECONDS_PER_WORD * len(spoken_words(s)) > 3 * len(NANO.encode(s)) for s in sentences]
    assert sum(fits) >= 0.99 * len(sentences)


def test_one_token_and_no_more_for_most_words_of_the_domain() -> None:
    """So fast speech (0.2 s a word) still leaves room: at most 1.3 tokens a word on average."""
    sentences = number_sentences(1000, seed=2)
    tokens = sum(len(NANO.encode(s)) for s in sentences)
    assert tokens <= 1.3 * sum(len(spoken_words(s)) for s in sentences)


def test_the_corpus_is_the_same_on_every_run() -> None:
    assert corpus() == corpus()
    assert number_sentences(50) == number_sentences(50)


@pytest.mark.parametrize(
    ("n", "language", "words"),
    [
        (0, "en", "zero"), (21, "en", "twenty one"), (100, "en", "one hundred"),
        (22, "es", "veintidós"), (31, "es", "treinta y uno"), (100, "es", "cien"),
        (21, "fr", "vingt et un"), (71, "fr", "soixante et onze"), (80, "fr", "quatre-vingts"),
        (81, "fr", "quatre-vingt-un"), (99, "fr", "quatre-vingt-dix-neuf"), (70, "fr", "soixante-dix"),
        (23, "it", "ventitré"), (28, "it", "ventotto"), (41, "it", "quarantuno"), (100, "it", "cento"),
        (17, "ru", "семнадцать"), (40, "ru", "сорок"), (92, "ru", "девяносто два"),
    ],
)  # fmt: skip
def test_number_words(n: int, language: str, words: str) -> None:
    assert number_words(n, language) == words


def test_number_words_are_distinct_and_bounded() -> None:
    for language in LANGUAGES:
        assert len({number_words(n, language) for n in range(101)}) == 101
    with pytest.raises(ValueError, match="reach from 0 to 100"):
        number_words(101)
    with pytest.raises(ValueError, match="use one of en, es"):
        number_words(1, "de")
