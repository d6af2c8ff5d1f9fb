"""One response of the assistant's, as the server events that tell of it, in OpenAI's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minmo.serving.items import Item
from minmo.serving.protocol import Json, ProtocolError, an_object, check_fields, new_id
from minmo.serving.settings import (
    NEUTRAL,
    VOICE,
    SessionSettings,
    format_json,
    max_tokens,
    modality,
    output_audio,
    refuse_what_is_lacking,
)
from minmo.serving.sound import Encoding, to_base64


@dataclass(frozen=True)
class Wishes:
    """What a response shall be like. max_tokens: of its text."""

    modality: str
    output_format: str
    max_tokens: int
    metadata: Json | None = None

    @classmethod
    def of(cls, given: Any, settings: SessionSettings) -> Wishes:
        """A `response.create`'s `response`, over what the session says. Raises ProtocolError."""
        where = "response"
        given = {} if given is None else an_object(given, where)
        check_fields(
            given,
            {"output_modalities", "audio", "max_output_tokens", "metadata", "conversation", "input", *NEUTRAL},
            where,
        )
        refuse_what_is_lacking(given, where)
        if given.get("conversation", "auto") not in (None, "auto") or given.get("input") is not None:
            raise ProtocolError(
                "a response always answers the conversation; leave response.conversation and response.input out",
                "unsupported",
                where,
            )
        kind = (
            modality(given["output_modalities"], f"{where}.output_modalities")
            if given.get("output_modalities")
            else None
        )
        most = max_tokens(given.get("max_output_tokens"), f"{where}.max_output_tokens")
        audio = an_object(given.get("audio") or {}, f"{where}.audio")
        check_fields(audio, {"output"}, f"{where}.audio")
        output = output_audio(an_object(audio.get("output") or {}, f"{where}.audio.output"), f"{where}.audio.output")
        return cls(
            kind or settings.modality,
            output.get("output_format", settings.output_format),
            settings.max_tokens if most is None else min(most, settings.most_tokens),
            _metadata(given.get("metadata")),
        )


class Response:
    """reply: its number in the conversation. rate: of the model's sound. It is told by `send` from `begin` on."""

    def __init__(self, reply: int, wishes: Wishes, conversation: str, rate: int, send: Callable[[Json], None]) -> None:
        self.id, self.reply, self._wishes, self._conversation = new_id("resp"), reply, wishes, conversation
        self._send = send
        self._encoder = Encoding(wishes.output_format, rate, to_wire=True)
        self._audio = wishes.modality == "audio"
        self.item = Item(
            new_id("item"),
            "assistant",
            "output_audio" if self._audio else "output_text",
            "",
            reply=reply,
            bytes_per_ms=self._encoder.rate * self._encoder.width / 1e3,
        )
        self._status = "in_progress"
        self._reason: str | None = None

    def begin(self, previous: str | None) -> None:
        """It has been created; its item follows that of `previous`."""
        self._send({"type": "response.created", "response": self.as_json()})
        item = self.item.as_json()
        self._tell("output_item.added", item=item, output_index=0)
        self._send({"type": "conversation.item.added", "previous_item_id": previous, "item": item})
        self._tell_part("content_part.added", part=self._part("", begun=True))

    def text(self, words: str) -> None:
        self.item.text = (self.item.text or "") + words
        self._tell_part("output_audio_transcript.delta" if self._audio else "output_text.delta", delta=words)

    def sound(self, audio: np.ndarray, final: bool = False) -> None:
        """audio (n,) at the model's rate."""
        if data := self._encoder.encode(audio, final):
            self.item.add_sound(data)
            self._tell_part("output_audio.delta", delta=to_base64(data))

    def finish(self, status: str, reason: str | None, previous: str | None) -> None:
        """It is over: completed, incomplete (max_output_tokens), cancelled (by a turn or the client) or failed."""
        text = self.item.text or ""
        self._status, self._reason = status, reason
        self.item.status = "completed" if status == "completed" else "incomplete"
        if self._audio:
            if status in ("completed", "incomplete"):
                self.sound(np.zeros(0, np.float32), final=True)
            self._tell_part("output_audio.done")
            self._tell_part("output_audio_transcript.done", transcript=text)
        else:
            self._tell_part("output_text.done", text=text)
        self._tell_part("content_part.done", part=self._part(text))
        item = self.item.as_json()
        self._send({"type": "conversation.item.done", "previous_item_id": previous, "item": item})
        self._tell("output_item.done", item=item, output_index=0)
        self._send({"type": "response.done", "response": self.as_json()})

    def as_json(self) -> Json:
        over = self._status != "in_progress"
        details = {"type": self._status, "reason": self._reason} if over and self._status != "completed" else None
        output = {"format": format_json(self._wishes.output_format), "voice": VOICE}
        return {
            "object": "realtime.response",
            "id": self.id,
            "conversation_id": self._conversation,
            "status": self._status,
            "status_details": details,
            "output": [self.item.as_json()] if over else [],
            "output_modalities": [self._wishes.modality],
            "audio": {"output": output},
            "max_output_tokens": self._wishes.max_tokens,
            "metadata": self._wishes.metadata,
            "usage": None,
        }

    def _part(self, text: str, begun: bool = False) -> Json:
        if self._audio:
            return {"type": "audio", "transcript": text} | ({} if begun else {"audio": None})
        return {"type": "text", "text": text}

    def _tell_part(self, kind: str, **fields: Any) -> None:
        self._tell(kind, item_id=self.item.id, output_index=0, content_index=0, **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        self._send({"type": f"response.{kind}", "response_id": self.id, **fields})


def _metadata(value: Any) -> Json | None:
    if value is None:
        return None
    given = an_object(value, "response.metadata")
    strings = all(isinstance(v, str) and len(v) <= 512 and len(k) <= 64 for k, v in given.items())
    if len(given) > 16 or not strings:
        raise ProtocolError("metadata holds at most 16 short strings", "invalid_value", "response.metadata")
    return given
