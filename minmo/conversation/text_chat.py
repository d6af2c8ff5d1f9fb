"""A typed conversation with a language model alone: no sound, no turn taking, one person.

It runs the readable backbone of a MinMo, with its key-value cache, on whatever language model `minmo import` made: this
is how imported weights are tried before a voice is put around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch

import minmo_kernels as mk
from minmo.conversation.settings import Settings
from minmo.conversation.steps import TEXT_STREAM, readable, sampling
from minmo.model import PREFILL
from minmo.modules.backbone import Backbone, truncate
from minmo.state import all_rows, full_lengths
from minmo.tokenizer.chat_template import ChatTemplate
from minmo.tokenizer.text import SYSTEM, TextStream, TextTokenizer
from minmo.weights.parts import CHAT_TEMPLATE, TOKENIZER, build, open_parts
from minmo.weights.parts import FILE as PARTS


class TextChat:
    """Remembers what was said, as text and in the backbone's cache.

    template: the model's own; None lays turns out as MinMo does (ChatML). system: what the model is told first; None
    leaves that to the template. max_positions: the longest conversation, in tokens.
    """

    def __init__(
        self,
        llm: Backbone,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None = None,
        *,
        system: str | None = None,
        max_positions: int = 4096,
    ) -> None:
        if max_positions < 1:
            raise ValueError(f"max_positions must be at least 1, got {max_positions}")
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._llm, self._tokenizer, self._template = llm, tokenizer, template
        self._state = llm.initial_state(1, max_positions)
        self._read: list[int] = []

    def say(self, text: str, settings: Settings) -> Iterator[str]:
        """The answer to what a person typed, piece by piece; it ends by itself, after `max_text_tokens`, or where the
        context is full. An answer that is not read to its end is remembered as far as it came.

        Raises ValueError for text that the model cannot read, and for a conversation that is too long for its context.
        """
        readable(self._tokenizer, text)
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(asked)
        if len(prompt) >= self._state.capacity:
            raise ValueError(
                f"the conversation has grown to {len(prompt)} tokens, and {self._state.capacity} were provided for: "
                "begin a new one, or set --max-positions higher"
            )
        return self._answer(asked, prompt, settings)

    def _answer(self, asked: list[dict[str, str]], prompt: list[int], settings: Settings) -> Iterator[str]:
        device = self._state.lengths.device
        hidden = self._catch_up(prompt)
        drawn = torch.zeros(1, dtype=torch.int64, device=device)
        draws = sampling(self._tokenizer, [settings], torch.tensor([settings.seed], device=device), drawn)
        stream, said = TextStream(self._tokenizer), ""
        try:
            for _ in range(settings.max_text_tokens):
                drawn += 1
                token = int(
                    mk.sample_token(
                        self._llm.logits(hidden), all_rows(1, device), draws.seeds, draws.drawn, draws.temperature,
                        draws.top_k, draws.top_p, banned=draws.banned, stream=TEXT_STREAM,
                    )
                )  # fmt: skip
                if token == self._tokenizer.end_of_turn or len(self._read) == self._state.capacity:
                    break
                if piece := stream.push([token]):
                    said += piece
                    yield piece
                hidden = self._append([token])
            if piece := stream.flush():
                said += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if self._template is not None:
            return self._template.ids(self._tokenizer, messages)
        tokenizer, system = self._tokenizer, SYSTEM
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        ids = tokenizer.block("system", system)
        for message in messages:
            ids += tokenizer.block(message["role"], message["content"])
        return [*ids, *tokenizer.header("assistant")]

    def _catch_up(self, prompt: list[int]) -> torch.Tensor:
        """Brings the cache to a prompt, of which it keeps what it has read already -> the last state, (1, dim)."""
        differ = (i for i, (a, b) in enumerate(zip(self._read, prompt, strict=False)) if a != b)
        kept = min(next(differ, len(self._read)), len(prompt) - 1)
        truncate(self._state, 0, kept)
        del self._read[kept:]
        for start in range(kept, len(prompt), PREFILL):
            hidden = self._append(prompt[start : start + PREFILL])
        return hidden

    def _append(self, ids: list[int]) -> torch.Tensor:
        device = self._state.lengths.device
        x = self._llm.embed(torch.tensor([ids], device=device))
        hidden, _, _ = self._llm.step(x, full_lengths(x), self._state, all_rows(1, device))
        self._read += ids
        return hidden[:, -1]


def open_chat(
    folder: Path,
    *,
    system: str | None = None,
    max_positions: int = 4096,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextChat:
    """A conversation with the language model in a folder that `minmo import` wrote.

    Raises ValueError, in one sentence, for a folder without one, or without its tokenizer.
    """
    if not (folder / PARTS).is_file():
        raise ValueError(
            f"{folder} is no folder that minmo import wrote (it has no {PARTS}); a whole MinMo is asked by minmo ask"
        )
    part = next((part for part in open_parts(folder) if part.name == "llm"), None)
    if part is None or part.tokenizer is None:
        lacks = "language model" if part is None else "tokenizer.json"
        raise ValueError(f"{folder} has no {lacks}: import one that has, as by minmo import gguf")
    template = ChatTemplate(part.chat_template, str(folder / CHAT_TEMPLATE)) if part.chat_template else None
    llm = cast(Backbone, build(part, dtype)).to(device or "cpu")
    tokenizer = TextTokenizer(part.tokenizer, str(folder / TOKENIZER))
    return TextChat(llm, tokenizer, template, system=system, max_positions=max_positions)
