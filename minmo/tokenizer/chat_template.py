"""The chat template that comes with a language model: Jinja, as Hugging Face's tokenizers and GGUF files hold it.

What the template writes itself may be control tokens; what people say never is: messages stand in the template as
markers, and are put in as plain text when the rest has become ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from minmo.tokenizer.text import TextTokenizer

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters around a message's number."""
_MARKER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class ChatTemplate:
    """Lays out a conversation for one model. Raises ValueError, in one sentence, for a template that does not read."""

    def __init__(self, source: str, where: str = "chat_template.jinja") -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ValueError("chat templates need Jinja: pip install 'minmo[import]'") from None
        self._where, self._errors = where, (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{where} is no chat template ({error}): import the model again") from None

    def ids(self, tokenizer: TextTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages, each {"role", "content"}, the user's last -> the ids up to where the assistant's words begin.

        Raises ValueError with the template's own complaint, as about an unknown role.
        """
        marked = [{**m, "content": f"{_OPEN}{i}{_CLOSE}"} for i, m in enumerate(messages)]
        settings: dict[str, Any] = {"messages": marked, "add_generation_prompt": True, "tools": None}
        try:
            text = self._template.render(settings)
        except self._errors as error:
            raise ValueError(f"{self._where} refuses this conversation: {error}") from None
        ids: list[int] = []
        for i, piece in enumerate(_MARKER.split(text)):  # in turn the template's words and a message's number
            ids += tokenizer.encode(messages[int(piece)]["content"]) if i % 2 else tokenizer.markup(piece)
        return ids


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
