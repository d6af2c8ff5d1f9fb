"""Text tokenizer: byte-level BPE from a tokenizer.json, and the ChatML layout of a turn (arXiv 2501.06282, section 3).

A user turn is `prefix + content + suffix`; the content is one LLM position per 80 ms of sound, or the ids of a typed
text. Control tokens are put in by id alone: text, whatever it says, is only ever encoded as text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
SYSTEM = "You are a helpful assistant."

# Task instructions, the first words of a user turn. The paper prints the first two; the others are this project's.
TRANSCRIBE = "Speech Transcription"
TRANSLATE = "Translate {source} into {target}"
LANGUAGE = "Language Identification"
EMOTION = "Speech Emotion Recognition"
SOUND = "Sound Event Detection"
AGE = "Speaker Age"
GENDER = "Speaker Gender"
READ_ALOUD = "Read the following text aloud"
CHAT = ""

_FIX = "use the tokenizer.json of a Qwen2.5 model or of the nano preset"


def translation(source: str, target: str) -> str:
    """The instruction to translate between two languages, by their English names ("English", "French")."""
    if not source.strip() or not target.strip():
        raise ValueError(f"translation needs the names of two languages, got {source!r} and {target!r}")
    return TRANSLATE.format(source=source, target=target)


class TextTokenizer:
    """Text <-> token ids. Raises ValueError, in one sentence, for a tokenizer.json that it cannot use.

    tokenizer_json: the file's text; source: what to call it in messages.
    """

    def __init__(self, tokenizer_json: str, source: str = "tokenizer.json") -> None:
        try:
            spec = json.loads(tokenizer_json)
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
            # Added tokens are matched inside the text they are given; without them all of it is plain text.
            self._plain = Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "post_processor": None}))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{source} is not a tokenizer.json ({error}); {_FIX}") from None
        if (spec.get("decoder") or {}).get("type") != "ByteLevel":
            raise ValueError(f"{source} is not a byte-level BPE; {_FIX}")
        self._json = tokenizer_json
        self._bytes = {character: byte for byte, character in _byte_characters().items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {i: b"" if token.special else token.content.encode() for i, token in added.items()}
        self.special_ids = sorted(i for i, token in added.items() if token.special)
        """Ids of the control tokens, which stand for no text."""
        self.size = max(self._tokenizer.get_vocab().values()) + 1
        """Number of ids: the rows that the LLM's embedding table has at least."""
        self.start_of_turn = self._control(START_OF_TURN, source)
        self.end_of_turn = self._control(END_OF_TURN, source)
        self._line_end = self.encode("\n")

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Reads a tokenizer.json: a preset's (`minmo/assets/nano`) or a checkpoint directory's."""
        try:
            return cls(Path(path).read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise ValueError(f"there is no readable tokenizer.json at {path} ({error.strerror}); {_FIX}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; {_FIX}") from None

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json that this was made from."""
        Path(path).write_text(self._json, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Control tokens in it are spelt out as text, never obeyed."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a character (a lone surrogate) at index {error.start}; decode its bytes as UTF-8"
            ) from None
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def markup(self, text: str) -> list[int]:
        """The ids of what a chat template writes: control tokens in it are obeyed. Never for what people say."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control tokens and ids without a token are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one id, perhaps only a part of a character; empty for control tokens."""
        if token < 0:
            raise ValueError(f"a token id is never negative, got {token}")
        if token in self._added:
            return self._added[token]
        return bytes(self._bytes[character] for character in self._tokenizer.id_to_token(token) or "")

    def turn(
        self,
        instruction: str = CHAT,
        *,
        first: bool = True,
        typed: bool = False,
        history: Sequence[tuple[str, str]] = (),
    ) -> tuple[list[int], list[int]]:
        """What stands before and after the content of a user turn -> (prefix, suffix).

        first: the conversation begins here, with the system block; else the prefix first ends the assistant's turn that
        is still open in the LLM's context. typed: the content is text, which a line end parts from the instruction.
        history: closed exchanges before this turn, (user, assistant) texts.
        """
        prefix = self.system if first else self.closing
        for user, assistant in history:
            prefix += self.block("user", user) + self.block("assistant", assistant)
        parting = self._line_end if instruction and typed else []
        prefix += [*self.header("user"), *self.encode(instruction), *parting]
        return prefix, [*self._end(), *self.header("assistant")]

    @property
    def system(self) -> list[int]:
        """What every conversation begins with: the prefix of its first turn starts so."""
        return self.block("system", SYSTEM)

    @property
    def closing(self) -> list[int]:
        """What ends the assistant's turn: the prefix of the next one starts so."""
        return self._end()

    def header(self, role: str) -> list[int]:
        """How somebody's words begin: `assistant` where the model is to speak."""
        return [self.start_of_turn, *self.encode(role), *self._line_end]

    def _end(self) -> list[int]:
        return [self.end_of_turn, *self._line_end]

    def block(self, role: str, text: str) -> list[int]:
        """Somebody's words, from header to end."""
        return [*self.header(role), *self.encode(text), *self._end()]

    def _control(self, token: str, source: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found not in self.special_ids:
            raise ValueError(f"{source} has no control token {token}; {_FIX}")
        if found in self.encode(token):
            raise ValueError(f"{source} lets text spell the control token {token}; {_FIX}")
        return int(found)


class TextStream:
    """Decodes ids as they come: what every `push` and the last `flush` return, joined, is `decode` of all the ids."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; a character is held back until all its bytes are there."""
        return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that never became complete. The stream then starts anew."""
        return self._utf8.decode(b"", final=True)


def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary: itself if printable, else from U+0100 on."""
    table = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
    rest = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + n) for n, byte in enumerate(rest)}
