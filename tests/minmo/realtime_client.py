"""A client that holds all it is sent against the stock SDK's types, and what tests of the server say and expect."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

sdk = pytest.importorskip("openai.types.realtime", reason="the stock client: pip install 'openai[realtime]'")

import pydantic  # noqa: E402
from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

SERVER_EVENT = pydantic.TypeAdapter(sdk.RealtimeServerEvent)
OURS = {
    "session.resumed", "session.replaced", "response.listen", "response.speak", "response.interrupted",
    "playback.acknowledged",
}  # fmt: skip
VOICE = (0.2 * np.sin(2 * np.pi * 300 / 24_000 * np.arange(24_000))).astype(np.float32)
SILENCE = np.zeros(24_000, np.float32)
REPLY = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]
"""A spoken reply, runs of deltas taken as one."""


EXTRAS = {
    "RealtimeSessionCreateRequest.id",
    "RealtimeSessionCreateRequest.object",
    "SessionCreatedEvent.resume_token",
}
"""Two that OpenAI's server sends, too, though the SDK's types leave them out; and ours, of `?duplex=1`."""


def extras(value):
    """Fields that the SDK's types do not know, as Type.field, anywhere in an event."""
    if isinstance(value, pydantic.BaseModel):
        yield from (f"{type(value).__name__}.{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from extras(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            yield from extras(one)


def pcm(sound):
    return base64.b64encode((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes()).decode()


class Client:
    """A client that keeps all it was sent, and holds it against the SDK's types."""

    def __init__(self, url, **options):
        self.socket = connect(
            url, **{"max_size": None, "max_queue": None, "close_timeout": 1, "open_timeout": 60, **options}
        )  # fmt: skip
        self.events = []

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def say(self, *sounds):
        for sound in sounds:
            self.send("input_audio_buffer.append", audio=pcm(sound))

    def read(self, timeout=60):
        event = json.loads(self.socket.recv(timeout))
        if event["type"] not in OURS:
            unknown = set(extras(SERVER_EVENT.validate_python(event)))
            assert unknown <= EXTRAS, (unknown, event)
        self.events.append(event)
        return event

    def until(self, kind, timeout=60):
        """-> the events that came, the last of that type."""
        came = []
        while not came or came[-1]["type"] != kind:
            came.append(self.read(timeout))
            assert came[-1]["type"] != "error" or kind == "error", came[-1]
        return came

    def error(self):
        return self.until("error")[-1]["error"]

    def closed(self):
        """-> the code and reason with which the server closes."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.read()
        return closed.value.rcvd.code, closed.value.rcvd.reason

    def update(self, **audio_input):
        self.send("session.update", session={"type": "realtime", "audio": {"input": audio_input}})
        return self.until("session.updated")[-1]["session"]


def kinds(events):
    """Types in order, runs of one type taken as one."""
    names = [event["type"] for event in events if not event["type"].startswith(("response.listen", "response.speak"))]
    return [name for n, name in enumerate(names) if n == 0 or names[n - 1] != name]


def of(kind, events):
    return [event for event in events if event["type"] == kind]


def until_true(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come about")


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
