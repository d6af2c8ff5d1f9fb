"""A session's settings as the client knows them: partial updates in, the effective object out. What the model lacks is
refused, never ignored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minmo.conversation import EAGERNESS
from minmo.serving.protocol import Json, ProtocolError, a_bool, a_number, an_object, check_fields, one_of
from minmo.serving.sound import FORMATS

VOICE = "minmo"
"""The one voice."""
SILENCE_MS = 640
"""Silence after which the onset detector says that a voice has ended."""


@dataclass(frozen=True)
class TurnDetection:
    """Who decides that the user's turn is over: `semantic_vad`, the full-duplex predictor; `server_vad`, a pause.

    create_response, interrupt_response: whether a reply is begun, and cut, by it; else there are events only.
    """

    kind: str = "semantic_vad"
    eagerness: str = "auto"
    silence_duration_ms: int = SILENCE_MS
    create_response: bool = True
    interrupt_response: bool = True

    def as_json(self) -> Json:
        own: Json = (
            {"eagerness": self.eagerness}
            if self.kind == "semantic_vad"
            else {"threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": self.silence_duration_ms}
        )
        both = {"create_response": self.create_response, "interrupt_response": self.interrupt_response}
        return {"type": self.kind, **own, **both}


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "instructions": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "auto", "none"),
    "parallel_tool_calls": (None, False, True),
    "include": (None, []),
    "prompt": (None,),
    "reasoning": (None,),
    "tracing": (None,),
    "truncation": (None, "auto"),
}
"""Fields for which the model has nothing, and the values that ask for nothing."""
LACKS = {
    "instructions": "the model follows no instructions",
    "tools": "the model calls no tools",
    "tool_choice": "the model calls no tools",
    "truncation": "the oldest turns are forgotten where the context is full",
}


@dataclass(frozen=True)
class SessionSettings:
    """model: the preset's name, which cannot be changed. most_tokens: the longest reply that the server allows."""

    model: str
    most_tokens: int
    modality: str = "audio"
    max_output_tokens: int | None = None
    input_format: str = "audio/pcm"
    output_format: str = "audio/pcm"
    transcription: bool = False
    turn_detection: TurnDetection | None = TurnDetection()

    @property
    def max_tokens(self) -> int:
        return self.most_tokens if self.max_output_tokens is None else min(self.most_tokens, self.max_output_tokens)

    def updated(self, given: Any) -> SessionSettings:
        """With the fields of a `session.update`, all or none of them: absent means unchanged. Raises ProtocolError."""
        given = an_object(given, "session")
        check_fields(given, {"type", "model", "output_modalities", "audio", "max_output_tokens", *NEUTRAL}, "session")
        changes: dict[str, Any] = {}
        if given.get("type", "realtime") != "realtime":
            raise ProtocolError(
                "session.type must be realtime: only conversations are served", "unsupported", "session.type"
            )
        if given.get("model", self.model) not in (None, self.model):
            raise ProtocolError(
                f"session.model is {self.model} here and cannot be changed", "unsupported", "session.model"
            )
        refuse_what_is_lacking(given, "session")
        if "output_modalities" in given:
            changes["modality"] = modality(given["output_modalities"], "session.output_modalities")
        if "max_output_tokens" in given:
            changes["max_output_tokens"] = max_tokens(given["max_output_tokens"], "session.max_output_tokens")
        audio = an_object(given.get("audio") or {}, "session.audio")
        check_fields(audio, {"input", "output"}, "session.audio")
        changes |= _input(an_object(audio.get("input") or {}, "session.audio.input"))
        if output := an_object(audio.get("output") or {}, "session.audio.output"):
            changes |= output_audio(output, "session.audio.output")
        return dataclasses.replace(self, **changes)

    def as_json(self) -> Json:
        """The effective `session` object of session.created and session.updated, without its id."""
        transcription = {"model": self.model} if self.transcription else None
        return {
            "type": "realtime",
            "object": "realtime.session",
            "model": self.model,
            "output_modalities": [self.modality],
            "instructions": "",
            "tools": [],
            "tool_choice": "none",
            "max_output_tokens": "inf" if self.max_output_tokens is None else self.max_output_tokens,
            "truncation": "auto",
            "audio": {
                "input": {
                    "format": format_json(self.input_format),
                    "noise_reduction": None,
                    "transcription": transcription,
                    "turn_detection": None if self.turn_detection is None else self.turn_detection.as_json(),
                },
                "output": {"format": format_json(self.output_format), "voice": VOICE, "speed": 1.0},
            },
        }


def refuse_what_is_lacking(given: Json, where: str) -> None:
    for name, values in NEUTRAL.items():
        if name in given and given[name] not in values:
            why = LACKS.get(name, "the model has nothing like it")
            raise ProtocolError(
                f"{where}.{name} is not supported: {why}; leave it out", "unsupported", f"{where}.{name}"
            )


def modality(value: Any, where: str) -> str:
    if not isinstance(value, list) or len(value) != 1:
        raise ProtocolError(f'{where} must be ["audio"] (with its transcript) or ["text"]', "invalid_value", where)
    return one_of(value[0], where, ("audio", "text"))


def max_tokens(value: Any, where: str) -> int | None:
    return None if value in (None, "inf") else int(a_number(value, where, 1, 4096, whole=True))


def output_audio(given: Json, where: str) -> dict[str, Any]:
    """audio.output of a session or a response -> what it changes."""
    check_fields(given, {"format", "voice", "speed"}, where)
    if given.get("voice", VOICE) not in (None, VOICE):
        raise ProtocolError(
            f"the model has one voice, {VOICE!r}; leave {where}.voice out", "unsupported", f"{where}.voice"
        )
    if given.get("speed", 1) not in (None, 1):
        raise ProtocolError(f"speech has one speed, 1; leave {where}.speed out", "unsupported", f"{where}.speed")
    return {"output_format": _format(given["format"], f"{where}.format")} if given.get("format") is not None else {}


def format_json(name: str) -> Json:
    return {"type": name, "rate": FORMATS[name][1]} if name == "audio/pcm" else {"type": name}


def _format(value: Any, where: str) -> str:
    given = an_object(value, where)
    check_fields(given, {"type", "rate"}, where)
    name = one_of(given.get("type"), f"{where}.type", FORMATS)
    rate = FORMATS[name][1]
    if given.get("rate", rate) not in (None, rate):
        raise ProtocolError(
            f"{name} has {rate} samples a second, not {given['rate']!r:.20}: resample before you send, or after you "
            "receive",
            "unsupported",
            f"{where}.rate",
        )
    return name


def _input(given: Json) -> dict[str, Any]:
    where, changes = "session.audio.input", dict[str, Any]()
    check_fields(given, {"format", "noise_reduction", "transcription", "turn_detection"}, where)
    if given.get("format") is not None:
        changes["input_format"] = _format(given["format"], f"{where}.format")
    if given.get("noise_reduction") is not None:
        raise ProtocolError(
            f"{where}.noise_reduction is not supported; reduce noise before you send",
            "unsupported",
            f"{where}.noise_reduction",
        )
    if "transcription" in given:
        changes["transcription"] = given["transcription"] is not None
        if given["transcription"] is not None:
            transcription = an_object(given["transcription"], f"{where}.transcription")
            check_fields(transcription, {"model", "language"}, f"{where}.transcription")
    if "turn_detection" in given:
        changes["turn_detection"] = _turn_detection(given["turn_detection"], f"{where}.turn_detection")
    return changes


def _turn_detection(value: Any, where: str) -> TurnDetection | None:
    if value is None:
        return None
    given = an_object(value, where)
    kind = one_of(given.get("type"), f"{where}.type", ("semantic_vad", "server_vad"))
    both = {"type", "create_response", "interrupt_response"}
    found: dict[str, Any] = {"kind": kind}
    for name in ("create_response", "interrupt_response"):
        if given.get(name) is not None:
            found[name] = a_bool(given[name], f"{where}.{name}")
    if kind == "semantic_vad":
        check_fields(given, both | {"eagerness"}, where)
        if given.get("eagerness") is not None:
            found["eagerness"] = one_of(given["eagerness"], f"{where}.eagerness", EAGERNESS)
        return TurnDetection(**found)
    check_fields(given, both | {"threshold", "prefix_padding_ms", "silence_duration_ms", "idle_timeout_ms"}, where)
    for name, fixed in (("threshold", 0.5), ("prefix_padding_ms", 300), ("idle_timeout_ms", None)):
        if given.get(name, fixed) not in (None, fixed):
            raise ProtocolError(
                f"{where}.{name} cannot be set: it is {fixed}; leave it out", "unsupported", f"{where}.{name}"
            )
    if given.get("silence_duration_ms") is not None:
        asked = a_number(given["silence_duration_ms"], f"{where}.silence_duration_ms", 0, 10_000, whole=True)
        found["silence_duration_ms"] = max(SILENCE_MS, int(asked))  # as `session.updated` tells
    return TurnDetection(**found)
