"""The wire's grammar: client events as JSON objects, and what is wrong with them as one sentence.

Names and order are those of OpenAI's Realtime protocol (GA). Of a client's event every field is known or refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

Json = dict[str, Any]
MOST_VALUES = 10_000
"""Values in one message: a million small ones take seconds to be read, in which nobody is served."""


class ProtocolError(Exception):
    """What a client asked for cannot be done: a sentence for people, a code for programs, the field at fault."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_urlsafe(12)}"


def error_event(
    message: str,
    code: str,
    *,
    param: str | None = None,
    client_event: str | None = None,
    kind: str = "invalid_request_error",
) -> Json:
    """kind: `invalid_request_error` where the client can mend it, else `server_error`."""
    error = {"type": kind, "code": code, "message": message, "param": param, "event_id": client_event}
    return {"type": "error", "error": error}


FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "session.update": ({"session"}, set()),
    "input_audio_buffer.append": ({"audio"}, set()),
    "input_audio_buffer.commit": (set(), set()),
    "input_audio_buffer.clear": (set(), set()),
    "conversation.item.create": ({"item"}, {"previous_item_id"}),
    "conversation.item.retrieve": ({"item_id"}, set()),
    "conversation.item.delete": ({"item_id"}, set()),
    "conversation.item.truncate": ({"item_id", "content_index", "audio_end_ms"}, set()),
    "response.create": (set(), {"response"}),
    "response.cancel": (set(), {"response_id"}),
}
"""Client events, the fields that each must have, and those that it may have."""
DUPLEX_FIELDS: dict[str, tuple[set[str], set[str]]] = {"playback.ack": ({"response_id", "played_ms"}, set())}
"""Those of `?duplex=1`."""


def decode(text: str) -> Json:
    """One message -> a JSON object, of which nothing else is known. Raises ProtocolError."""
    if sum(text.count(mark) for mark in ",[{") > MOST_VALUES:
        raise ProtocolError(f"the message may hold more than {MOST_VALUES} values; send fewer", "message_too_large")
    try:
        event = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ProtocolError("the message is not JSON; send one JSON object a message", "invalid_json") from None
    if not isinstance(event, dict):
        raise ProtocolError("the message is no JSON object; send one with a `type`", "invalid_json")
    return event


def check(event: Json, *, duplex: bool) -> str:
    """The type of a client event that is known and whose fields are there. Raises ProtocolError."""
    kind = event.get("type")
    known = FIELDS | DUPLEX_FIELDS if duplex else FIELDS
    if not isinstance(kind, str):
        raise ProtocolError("the event has no `type`", "missing_required_parameter", "type")
    if kind not in known:
        hint = "; connect with ?duplex=1 for it" if kind in DUPLEX_FIELDS else f"; known are {', '.join(known)}"
        raise ProtocolError(f"there is no client event {kind!r:.80}{hint}", "unknown_event", "type")
    must, may = known[kind]
    if missing := must - event.keys():
        name = sorted(missing)[0]
        raise ProtocolError(f"{kind} needs `{name}`", "missing_required_parameter", name)
    check_fields(event, must | may | {"type", "event_id"}, kind)
    return kind


def event_id(event: Json) -> str | None:
    """The client's name for its event, if it gave one."""
    name = event.get("event_id")
    return name[:512] if isinstance(name, str) else None


def check_fields(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises ProtocolError for a field that is not known."""
    if unknown := sorted(set(given) - set(known)):
        raise ProtocolError(
            f"{where} has no field {unknown[0]!r:.80}; it has {', '.join(sorted(known))}",
            "unknown_parameter",
            f"{where}.{unknown[0]}"[:200],
        )


def an_object(value: Any, where: str) -> Json:
    if not isinstance(value, dict):
        raise ProtocolError(f"{where} must be an object, got {_kind(value)}", "invalid_type", where)
    return value


def a_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"{where} must be a string, got {_kind(value)}", "invalid_type", where)
    return value


def a_bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError(f"{where} must be true or false, got {_kind(value)}", "invalid_type", where)
    return value


def a_number(value: Any, where: str, low: float, high: float, *, whole: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kind = "an integer" if whole else "a number"
        raise ProtocolError(f"{where} must be {kind}, got {_kind(value)}", "invalid_type", where)
    if not low <= value <= high:
        raise ProtocolError(
            f"{where} must lie between {low:g} and {high:g}, got {str(value):.40}", "invalid_value", where
        )
    return value


def one_of(value: Any, where: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ProtocolError(f"{where} must be one of {', '.join(allowed)}, got {value!r:.80}", "invalid_value", where)
    return value


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def _no_constant(name: str) -> None:
    raise ValueError(name)
