"""Makes `assets/nano/tokenizer.json`, a byte-level BPE of 1024 ids: python -m minmo.data.nano_tokenizer

Every number word is one token, so that speech is always more than three times as long as its text: the condition of the
5:15 schedule (arXiv 2501.06282, section 3.2). Those words are entries of their own, not built by merges, which leaves
the merges to everything else. All 256 bytes are in the vocabulary, so every text can be encoded.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minmo.data.numbers import LANGUAGES, number_words
from minmo.tokenizer.text import (
    END_OF_TEXT,
    END_OF_TURN,
    READ_ALOUD,
    START_OF_TURN,
    SYSTEM,
    TRANSCRIBE,
    translation,
)

VOCABULARY = 1024
CONTROL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
# A word with at most one sign before it (" two", "-deux"); one digit; other signs; line ends; spaces.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

OPERATIONS = {
    "en": ("plus", "minus", "times", "divided by", "is", "what is"),
    "es": ("más", "menos", "por", "entre", "son", "cuánto es"),
    "fr": ("plus", "moins", "fois", "divisé par", "font", "combien font"),
    "it": ("più", "meno", "per", "diviso", "fa", "quanto fa"),
    "ru": ("плюс", "минус", "умножить на", "делить на", "равно", "сколько будет"),
}

PHRASES = """
Hello. Good morning. Good evening. Good night. Goodbye. See you tomorrow. How are you today? I am fine, thank you.
What is your name? My name is MinMo. Nice to meet you. Please say that again. I did not hear you. Can you repeat that?
Yes, please. No, thank you. Of course. I am sorry, I do not know. You are welcome. Let me think. One moment, please.
Repeat after me. Count from one to ten. Say the number in Spanish. Say it in French, please. What comes after that?
Speak slowly, please. Please speak very fast. Please speak with a happy voice. Please speak with a sad voice.
(Fast speaking rate) (Slow speaking rate) (Happy) (Sad) (Angry) (Calm)
The answer is right. The answer is wrong. That is correct. That is not correct. Try again. The sum is even. It is odd.
Which number is larger? Which one is smaller? The first number and the second number. A digit, a letter and a word.
Hola. Buenos días. Buenas noches. ¿Cómo estás? Muchas gracias. Hasta mañana. ¿Cómo se dice?
Bonjour. Bonsoir. Comment allez-vous ? Merci beaucoup. À demain. Comment dit-on ?
Ciao. Buongiorno. Buonasera. Come stai? Grazie mille. A domani. Come si dice?
Привет. Доброе утро. Добрый вечер. Как дела? Большое спасибо. До завтра. Как сказать?
"""

PROSE = """
The kettle was on the stove before anyone else in the house was awake, and the smell of coffee went up the stairs.
She opened the window, looked at the street below, and wondered whether the rain would stop before the afternoon.
There was a small garden behind the shop where the old man kept his tomatoes, his bicycle and a chair with three legs.
When the train finally came, everybody stood up at once, took their bags and walked along the platform without a word.
He wrote the letter twice, because the first time he had forgotten to say what he really wanted to tell her.
It is not hard to learn how to listen; what is hard is to keep quiet while somebody else is still speaking.
The children counted the boats in the harbour, then the clouds, then the steps on the way home, and always lost count.
A voice on the telephone asked them to hold the line, and so they waited, and talked about the weather and the news.
If you can hear the sea from here, then the wind has turned, and tomorrow will be warm enough for a long walk.
Some people read a map to find their way, others ask, and a few just follow the road until it ends somewhere.
The machine understands a question, thinks about an answer and speaks it aloud, all within the time of a breath.
They should have been there by now, she thought, but the bridge was closed and nobody had told the bus driver.
Every evening the light in the lighthouse turned, slow and even, and every evening somebody looked at it and smiled.
"""


def number_sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of the nano domain made of number words: arithmetic, digit strings, single numbers, five languages."""
    draw = random.Random(seed)
    sentences = []
    for _ in range(count):
        language = draw.choice(list(LANGUAGES))
        plus, minus, times, divided, equals, question = OPERATIONS[language]
        a, b = draw.randint(0, 50), draw.randint(0, 50)
        left, right = number_words(a, language), number_words(b, language)
        factor, product = draw.randint(1, 10), draw.randint(1, 10)
        forms = (
            f"{left} {plus} {right} {equals} {number_words(a + b, language)}",
            f"{number_words(a + b, language)} {minus} {right} {equals} {left}",
            f"{number_words(factor, language)} {times} {number_words(product, language)} {equals} "
            f"{number_words(factor * product, language)}",
            f"{number_words(factor * product, language)} {divided} {number_words(product, language)} {equals} "
            f"{number_words(factor, language)}",
            f"{question} {left} {plus} {right}",
            " ".join(number_words(draw.randint(0, 9), language) for _ in range(draw.randint(2, 8))),
            number_words(draw.randint(0, 100), language),
        )
        sentences.append(draw.choice(forms))
    return sentences


def number_tokens() -> list[str]:
    """The pieces that must be one token: every number word at the start of a text, after a space and after a hyphen."""
    pieces: dict[str, None] = {}
    for language in LANGUAGES:
        for n in range(101):
            words = re.findall(r"[ -]?[^ -]+", number_words(n, language))
            for piece in (words[0], " " + words[0], *words[1:]):
                pieces[piece] = None
    return list(pieces)


def corpus() -> list[str]:
    """What the merges are learned from: instructions, phrases, operation words, prose, and arithmetic in digits."""
    names = list(LANGUAGES.values())
    layout = [SYSTEM, TRANSCRIBE, READ_ALOUD, "system\n", "user\n", "assistant\n"]
    translations = [translation(a, b) for a in names for b in names if a != b]
    operations = [f" {word}" for words in OPERATIONS.values() for word in words]
    everyday = PHRASES.strip().splitlines() + PROSE.strip().splitlines()
    return [*layout * 20, *translations * 2, *operations * 12, *everyday * 2]


def build() -> Tokenizer:
    """The nano tokenizer; the same on every run."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pieces
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["".join(piece for piece, _ in byte_level.pre_tokenize_str(word)) for word in number_tokens()]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(alphabet + words))}
    merges = []
    for left, right in json.loads(trained.to_str())["model"]["merges"]:
        if len(vocabulary) == VOCABULARY - len(CONTROL_TOKENS):
            break
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def main() -> None:
    path = Path(__file__).parents[1] / "assets" / "nano" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    tokenizer.save(str(path))
    print(f"{path}: {tokenizer.get_vocab_size()} ids, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
