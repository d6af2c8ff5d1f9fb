"""What was said: closed exchanges, the open turn of the user's, and how much of a reply was heard.

The LLM's context is laid out by `minmo.data.duplex.listening_context`, on which the full-duplex predictor is trained.
The user's sound is kept as projector outputs, so that it can be read again without the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minmo.conversation.settings import Settings
from minmo.conversation.steps import check, readable
from minmo.data.duplex import listening_context
from minmo.model import MinMo
from minmo.tokenizer.text import CHAT, TextTokenizer

MS_PER_TOKEN = 300.0
"""Sound of a text token, until a voice's own mean is known: 150 words a minute, four tokens for three words."""


@dataclass
class Exchange:
    """A turn of the user's, LLM positions (n, dim) of sound or typed text, the text tokens that were heard of its
    reply, and the reply's number. typed: whether some of the turn was."""

    user: Tensor = field(repr=False)
    reply: list[int]
    number: int = -1
    typed: bool = False


class History:
    """The exchanges of a conversation, the oldest first, and the positions (1, dim) of its open turn."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.open: list[Tensor] = []
        self.typed = False
        """Whether some of the open turn was typed."""
        self._spoken_ms, self._spoken_tokens = 0.0, 0

    @classmethod
    def of_texts(cls, model: MinMo, texts: Sequence[tuple[str | None, str]]) -> History:
        """A history from what the user and the assistant said, as if all of it had been typed; None stands for a turn
        of which no word is known. Raises ValueError for a text that the model cannot read."""
        history, tokenizer = cls(), check(model, Settings(), 1)
        for user, reply in texts:
            known = [] if user is None else readable(tokenizer, user)
            ids = torch.tensor(known, dtype=torch.int64, device=model.device)
            heard = readable(tokenizer, reply) if reply else []
            history.exchanges.append(Exchange(model.llm.embed(ids), heard, typed=True))
        return history

    def number(self) -> int:
        """Numbers the exchanges from 0 -> the next one's number."""
        for number, exchange in enumerate(self.exchanges):
            exchange.number = number
        return len(self.exchanges)

    def holds(self, number: int) -> bool:
        """Whether the exchange of a reply is remembered."""
        return any(exchange.number == number for exchange in self.exchanges)

    def remove(self, number: int) -> None:
        """Forgets the exchange of a reply. Raises ValueError where it is not remembered."""
        if not self.holds(number):
            raise ValueError(f"the exchange of reply {number} is not remembered: it was forgotten, or never was")
        self.exchanges = [exchange for exchange in self.exchanges if exchange.number != number]

    def close(self, number: int) -> Exchange:
        """The open turn is answered by the reply of that number: an exchange, as yet without it; another turn opens."""
        self.exchanges.append(Exchange(torch.cat(self.open), [], number, self.typed))
        self.open, self.typed = [], False
        return self.exchanges[-1]

    def layout(self, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
        """Token ids of all that precedes the open turn, and where they say so, places in the exchanges' joined sound:
        as `listening_context` gives them."""
        closed, at = [], 0
        for exchange in self.exchanges:
            closed.append((range(at, at + len(exchange.user)), exchange.reply))
            at += len(exchange.user)
        return listening_context(tokenizer, closed, [])

    def embeddings(self, model: MinMo, tokenizer: TextTokenizer) -> Tensor:
        """What the LLM reads before the open turn, (n, dim)."""
        ids, places = (torch.tensor(x, device=model.device) for x in self.layout(tokenizer))
        x = model.llm.embed(ids.clamp(min=0))
        if not any(len(exchange.user) for exchange in self.exchanges):
            return x
        sound = torch.cat([exchange.user for exchange in self.exchanges])
        return torch.where((places >= 0)[:, None], sound[places.clamp(min=0)].to(x.dtype), x)

    def forget(self, tokenizer: TextTokenizer, room: int, most: int) -> None:
        """Drops the oldest exchanges until `most` are left, and what precedes the open turn takes at most `room`
        positions."""
        del self.exchanges[: max(0, len(self.exchanges) - most)]
        size, around = len(self.layout(tokenizer)[0]), sum(map(len, tokenizer.turn(CHAT, first=False)))
        while self.exchanges and size > room:
            size -= around + len(self.exchanges[0].user) + len(self.exchanges[0].reply)
            del self.exchanges[0]

    def spoken(self, tokens: int, ms: float) -> None:
        """A whole reply was spoken: its text tokens and the length of its sound, for the voice's mean."""
        self._spoken_tokens += tokens
        self._spoken_ms += ms

    @property
    def ms_per_token(self) -> float:
        """The voice's running mean of sound for a text token, in milliseconds."""
        return self._spoken_ms / self._spoken_tokens if self._spoken_tokens and self._spoken_ms else MS_PER_TOKEN


def heard_tokens(written: int, heard_ms: float, total_ms: float | None, ms_per_token: float) -> int:
    """How many of the `written` text tokens were heard, where text runs ahead of its sound.

    heard_ms: sound of the reply that was heard; total_ms: all its sound, where it is complete; else the voice's mean
    says how long its text takes.
    """
    expected = written * ms_per_token if total_ms is None else total_ms
    if expected <= 0:
        return written
    return min(written, math.floor(written * heard_ms / expected))
