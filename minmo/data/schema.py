"""What a line of training data is, task by task. `minmo/data/manifest.py` reads and checks manifests, lhotse CutSets.

A line is one lhotse MonoCut. Its recording is what the model hears: the user, at any rate. All else lies in custom
fields (FIELDS), `task` first. What the assistant says is `target_recording`, a lhotse Recording among them. lhotse cuts
such a recording to the times of the cut, which is right where both run side by side (duplex) and where there is no
other sound (tts: the cut has no recording, and lasts as long as its target). In s2s an answer is as long as it is:
there `target_recording_unaligned` must be true. lhotse's Shar writes an unaligned recording with the wrong length, so
at that scale s2s keeps `speech_tokens`, which is all that its stage reads.

A text line has no sound: its cut's duration only says what it counts for in a batch, 0.08 s a token being a fair price.
How a line is laid out for the LLM is `layout`, and for duplex `minmo.data.duplex.listening_context`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minmo.config import SAMPLE_RATE
from minmo.data.duplex import KINDS, Event
from minmo.tokenizer.text import (
    AGE,
    CHAT,
    EMOTION,
    GENDER,
    LANGUAGE,
    READ_ALOUD,
    SOUND,
    TRANSCRIBE,
    TextTokenizer,
    translation,
)  # fmt: skip

if TYPE_CHECKING:
    from lhotse.cut import Cut


class DataError(ValueError):
    """A line of data that cannot be used; reason: what is wrong in two or three words, the same for all such lines."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Field:
    """A custom field: its type in words, what it means."""

    type: str
    meaning: str


FIELDS = {
    "task": Field("name of a task", "what the line teaches"),
    "instruction": Field("text", "first words of the user's turn; may be empty"),
    "text": Field("text", "the assistant's text: transcript, translation, label, answer, or what is spoken"),
    "answers": Field("list of texts", "other answers that are right; an answer that holds one of them is"),
    "source_text": Field("text", "what the user said or typed"),
    "language": Field("text", "code of the language that is heard, or spoken in tts"),
    "dataset": Field("text", "the public dataset that the line is from"),
    "history": Field('list of {"user": text, "assistant": text}', "exchanges before this one, oldest first"),
    "target_recording": Field("lhotse Recording", "the assistant's sound"),
    "speech_tokens": Field("list of integers", "the assistant's speech tokens, 25 a second"),
    "events": Field(
        'list of {"kind", "start", "end", "text"}',
        f"times in samples of 16 kHz since the cut's start; kinds: {', '.join(KINDS)}",
    ),
    "ambiguous": Field(
        "list of true or false", "a value for each turn of the user's: some first words of it could be all that is said"
    ),
}


@dataclass(frozen=True)
class Task:
    """One task: which fields a line must have, of which it needs one, which it may have; `recording` is the cut's own.

    instruction: what stands for a missing `instruction`; None where a line must bring one. example: a valid line.
    """

    meaning: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: Mapping[str, Any]
    either: tuple[str, ...] = ()
    instruction: str | None = None


def _recording(name: str, seconds: float, rate: int = SAMPLE_RATE) -> dict[str, Any]:
    return {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": f"audio/{name}.flac"}],
        "sampling_rate": rate,
        "num_samples": round(seconds * rate),
        "duration": seconds,
        "channel_ids": [0],
    }


def _line(task: str, seconds: float, heard: str | None = None, **custom: Any) -> dict[str, Any]:
    """A cut as lhotse writes it."""
    cut = {"id": f"{task}-1", "start": 0.0, "duration": seconds, "channel": 0, "supervisions": []}
    sound = {"recording": _recording(heard, seconds)} if heard else {}
    return {**cut, **sound, "custom": {"task": task, **custom}, "type": "MonoCut"}


_SPEECH = ("target_recording", "speech_tokens")
_HEARD = ("source_text", "language")
_ANSWER = _recording("answer", 1.6, 24_000)

TASKS: dict[str, Task] = {
    "asr": Task(
        "speech to its transcript", ("recording", "text"), ("instruction", "language"),
        _line("asr", 2.5, "seven", text="seven plus five", language="en"), instruction=TRANSCRIBE,
    ),
    "s2tt": Task(
        "speech to its translation", ("recording", "instruction", "text"), _HEARD,
        _line("s2tt", 2.5, "seven", instruction=translation("English", "French"), text="sept plus cinq"),
    ),
    "lid": Task(
        "speech to its language", ("recording", "instruction", "text"), _HEARD,
        _line("lid", 2.5, "seven", instruction=LANGUAGE, text="English"),
    ),
    "ser": Task(
        "speech to the speaker's emotion", ("recording", "instruction", "text"), _HEARD,
        _line("ser", 2.5, "seven", instruction=EMOTION, text="happy"),
    ),
    "aed": Task(
        "sound to the names of its events", ("recording", "instruction", "text"), _HEARD,
        _line("aed", 2.5, "cough", instruction=SOUND, text="cough"),
    ),
    "age": Task(
        "speech to the speaker's age, as one of some groups", ("recording", "instruction", "text"), _HEARD,
        _line("age", 2.5, "seven", instruction=AGE, text="thirties"),
    ),
    "gender": Task(
        "speech to the speaker's gender", ("recording", "instruction", "text"), _HEARD,
        _line("gender", 2.5, "seven", instruction=GENDER, text="female"),
    ),
    "qa": Task(
        "a spoken question to an answer in text", ("recording", "text"), ("instruction", "history", "answers", *_HEARD),
        _line("qa", 2.5, "seven", text="Twelve.", source_text="What is seven plus five?"), instruction=CHAT,
    ),
    "text": Task(
        "a typed turn to its answer; no sound", ("source_text", "text"), ("instruction", "history", "language"),
        _line("text", 0.8, source_text="What is seven plus five?", text="Twelve."), instruction=CHAT,
    ),
    "tts": Task(
        "text to speech", ("text",), ("instruction", "language"),
        _line("tts", 1.6, text="It is twelve.", target_recording=_ANSWER), _SPEECH, READ_ALOUD,
    ),
    "instruct-tts": Task(
        "text to speech in the manner asked for", ("instruction", "text"), ("source_text", "language"),
        _line("instruct-tts", 1.6, instruction="Please speak very fast", source_text="It is twelve.",
              text="(Fast speaking rate) It is twelve.", speech_tokens=[17, 303, 4], target_recording=_ANSWER),
        _SPEECH,
    ),
    "s2s": Task(
        "a spoken question to a spoken answer", ("recording", "text"), ("instruction", "history", "answers", *_HEARD),
        _line("s2s", 2.5, "seven", text="It is twelve.", target_recording=_ANSWER, target_recording_unaligned=True),
        _SPEECH, CHAT,
    ),
    "duplex": Task(
        "a dialogue: the user's channel is the recording, the assistant's the target", ("recording", "events"),
        ("target_recording", "language", "ambiguous"),
        _line("duplex", 5.0, "dialogue", events=[
            {"kind": "user", "start": 4800, "end": 30400, "text": "What is seven plus five?"},
            {"kind": "assistant", "start": 43200, "end": 67200, "text": "It is twelve."},
            {"kind": "backchannel", "start": 56000, "end": 60800, "text": "uh-huh"},
        ]), instruction=CHAT,
    ),
}  # fmt: skip


def describe_tasks() -> str:
    """All tasks and fields as plain text: what each needs, and an example line."""
    lines = [
        "A line is a lhotse MonoCut; these are its custom fields, besides `recording`, which is the cut's own:",
        "",
    ]
    lines += [f"  {name:17} {entry.type}: {entry.meaning}" for name, entry in FIELDS.items()]
    for name, task in TASKS.items():
        lines += ["", f"{name}: {task.meaning}", f"  needs     {', '.join(('task', *task.required))}"]
        lines += [f"  one of    {', '.join(task.either)}"] if task.either else []
        lines += [f"  may have  {', '.join(task.optional)}", f"  example   {json.dumps(task.example)}"]
    return "\n".join(lines)


def print_tasks() -> None:
    """Prints `describe_tasks`."""
    print(describe_tasks())


@dataclass(frozen=True)
class Layout:
    """A line as token ids: prefix + content + suffix is read, reply is learnt; content None is sound."""

    prefix: list[int]
    content: list[int] | None
    suffix: list[int]
    reply: list[int]


def layout(cut: Cut, tokenizer: TextTokenizer) -> Layout:
    """ChatML of a line that was validated (all tasks but duplex): instruction, then sound or text; the reply ends with
    the control token that ends a turn. tts reads `source_text` where it is given, else the text itself."""
    custom: dict[str, Any] = {name: value for name, value in cut.custom.items() if value is not None}
    task = TASKS[custom["task"]]
    typed = "recording" not in task.required
    history = [(turn["user"], turn["assistant"]) for turn in custom.get("history", [])]
    instruction = custom.get("instruction", task.instruction or CHAT)
    prefix, suffix = tokenizer.turn(instruction, typed=typed, history=history)
    content = tokenizer.encode(custom.get("source_text", custom["text"])) if typed else None
    return Layout(prefix, content, suffix, [*tokenizer.encode(custom["text"]), tokenizer.end_of_turn])


def events_of(cut: Cut) -> list[Event]:
    """The events of a duplex line."""
    return [Event(**event) for event in cut.custom["events"]]
