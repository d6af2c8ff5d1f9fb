"""What is said in the nano domain and what is answered: numbers, arithmetic and a few lines of small talk.

Everything is lower case without punctuation, a number word a token (`minmo.data.nano_tokenizer`). A closed vocabulary.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache

from minmo.data.nano_tokenizer import OPERATIONS
from minmo.data.numbers import LANGUAGES, number_words
from minmo.tokenizer.text import CHAT, LANGUAGE, TRANSCRIBE, translation

SMALL_TALK = {
    "hello": "hello how can i help you",
    "good morning": "good morning to you",
    "good evening": "good evening to you",
    "how are you": "i am fine thank you",
    "what is your name": "my name is minmo",
    "who are you": "i am minmo a small voice model",
    "what can you do": "i can add numbers repeat them and translate them",
    "thank you": "you are welcome",
    "goodbye": "goodbye see you tomorrow",
    "can you hear me": "yes i can hear you",
    "count from one to five": "one two three four five",
}
QUESTIONS = ("what is {}", "how much is {}", "tell me {}", "{}")
HELD_OUT = 12
"""One sentence in so many never enters training."""


@dataclass(frozen=True)
class Sentence:
    """said: the user's words; reply: the assistant's answer where the words alone ask for one, else empty; numbers:
    what was said where it is numbers alone, for translation."""

    language: str
    said: str
    reply: str = ""
    numbers: tuple[int, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether the sentence is kept for tests; single words and small talk are not: there are too few of them."""
        return len(self.said.split()) > 2 and self.said not in SMALL_TALK and _hash(self.said) % HELD_OUT == 0

    def tasks(self) -> list[tuple[str, str, str]]:
        """(task, instruction, assistant's text) of everything that can be asked about this sound."""
        tasks = [("asr", TRANSCRIBE, self.said), ("lid", LANGUAGE, LANGUAGES[self.language])]
        if self.reply:
            tasks.append(("qa", CHAT, self.reply))
        for target in LANGUAGES if self.numbers else ():
            if target != self.language:
                tasks.append(("s2tt", translation(LANGUAGES[self.language], LANGUAGES[target]), self.spoken_in(target)))
        return tasks

    def spoken_in(self, language: str) -> str:
        return " ".join(number_words(n, language) for n in self.numbers)


def facts(language: str = "en") -> list[tuple[str, str]]:
    """All arithmetic of the domain, (problem, result): sums and differences of 0..50, products, quotients of 0..10."""
    plus, minus, times, divided, _, _ = OPERATIONS[language]
    word = {n: number_words(n, language) for n in range(101)}
    out = []
    for a in range(51):
        for b in range(51):
            out.append((f"{word[a]} {plus} {word[b]}", word[a + b]))
            if b <= a:
                out.append((f"{word[a]} {minus} {word[b]}", word[a - b]))
    for a in range(11):
        for b in range(11):
            out.append((f"{word[a]} {times} {word[b]}", word[a * b]))
            if b:
                out.append((f"{word[a * b]} {divided} {word[b]}", word[a]))
    return out


def answer(problem: str, result: str) -> str:
    return f"{problem} is {result}"


def results_right(reply: str) -> list[str]:
    """What an answer to a sum must hold to be right, its result; nothing for another reply."""
    problem, is_sum, result = reply.rpartition(" is ")
    return [f"is {result}"] if is_sum and (problem, result) in _every_fact() else []


def language_of(reply: str) -> str:
    """The code of the language that a reply is in: English, but for a number in another one."""
    return next((code for code in LANGUAGES if reply in _numbers(code)), "en")


@cache
def _numbers(language: str) -> frozenset[str]:
    return frozenset(number_words(n, language) for n in range(101))


@cache
def _every_fact() -> frozenset[tuple[str, str]]:
    return frozenset(facts())


def draw(language: str, count: int, seed: int = 0) -> list[Sentence]:
    """`count` sentences of a language, some of them several times; the same ones on every run."""
    rng = random.Random(f"{seed} {language}")
    if language != "en":
        return [_foreign(language, rng) for _ in range(count)]
    problems = facts()
    return [_english(rng, problems) for _ in range(count)]


def _english(rng: random.Random, problems: list[tuple[str, str]]) -> Sentence:
    kind = rng.random()
    if kind < 0.40:
        # Small numbers more often, and each operation as often as another.
        problem, result = _problem(rng)
        return Sentence("en", rng.choice(QUESTIONS).format(problem), answer(problem, result))
    if kind < 0.58:
        return _bare((rng.randint(0, 20) if rng.random() < 0.6 else rng.randint(0, 100),))
    if kind < 0.72:
        return _bare(_string(rng))
    if kind < 0.82:
        numbers = _string(rng)
        words = _words(numbers)
        return Sentence("en", f"repeat after me {words}", words)
    if kind < 0.90:
        n, target = rng.randint(0, 100), rng.choice([t for t in LANGUAGES if t != "en"])
        return Sentence("en", f"say {_words((n,))} in {LANGUAGES[target].lower()}", number_words(n, target))
    if kind < 0.94:
        n = rng.randint(0, 99)
        return Sentence("en", f"what comes after {_words((n,))}", f"after {_words((n,))} comes {_words((n + 1,))}")
    said = rng.choice(list(SMALL_TALK))
    return Sentence("en", said, SMALL_TALK[said])


def _problem(rng: random.Random) -> tuple[str, str]:
    plus, minus, times, divided, _, _ = OPERATIONS["en"]
    top = 20 if rng.random() < 0.4 else 50
    a, b, kind = rng.randint(0, top), rng.randint(0, top), rng.random()
    if kind < 0.4:
        return f"{_words((a,))} {plus} {_words((b,))}", _words((a + b,))
    if kind < 0.7:
        a, b = max(a, b), min(a, b)
        return f"{_words((a,))} {minus} {_words((b,))}", _words((a - b,))
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if kind < 0.85:
        return f"{_words((a,))} {times} {_words((b,))}", _words((a * b,))
    b = max(b, 1)
    return f"{_words((a * b,))} {divided} {_words((b,))}", _words((a,))


def _foreign(language: str, rng: random.Random) -> Sentence:
    kind = rng.random()
    if kind < 0.35:
        numbers: tuple[int, ...] = (rng.randint(0, 100),)
    elif kind < 0.7:
        numbers = _string(rng)
    else:
        plus, minus, times, _, _, question = OPERATIONS[language]
        a, b = (number_words(rng.randint(0, 50), language) for _ in range(2))
        return Sentence(language, f"{question} {a} {rng.choice((plus, minus, times))} {b}")
    return Sentence(language, " ".join(number_words(n, language) for n in numbers), "", numbers)


def _bare(numbers: tuple[int, ...]) -> Sentence:
    words = _words(numbers)
    return Sentence("en", words, f"you said {words}", numbers)


def _string(rng: random.Random) -> tuple[int, ...]:
    """Digits, or now and then larger numbers."""
    if rng.random() < 0.7:
        return tuple(rng.randint(0, 9) for _ in range(rng.randint(2, 6)))
    return tuple(rng.randint(0, 100) for _ in range(rng.randint(2, 4)))


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(number_words(n) for n in numbers)


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def typed(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(instruction, typed text, assistant's text): every fact of arithmetic twice, those of times and divided, which
    are few and asked as often, ten times, and `count` drawn sentences with all that can be asked about them in
    writing."""
    rng = random.Random(f"{seed} typed")
    _, _, times, divided, _, _ = OPERATIONS["en"]
    few = [fact for fact in facts() if f" {times} " in fact[0] or f" {divided} " in fact[0]]
    lines = [(CHAT, rng.choice(QUESTIONS).format(problem), answer(problem, r)) for problem, r in facts() * 2 + few * 8]
    for language in LANGUAGES:
        for sentence in draw(language, count if language == "en" else count // 4, seed):
            lines += [(i, sentence.said, text) for task, i, text in sentence.tasks() if task != "lid"]
    return lines
