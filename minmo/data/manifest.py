"""Reads manifests, line by line and lazily, checks each line, and loads the sound that it names."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from lhotse import CutSet, MonoCut, Recording
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, open_best

from minmo.config import SAMPLE_RATE, is_real, is_whole
from minmo.data.duplex import USER_TURNS, Event, check_events
from minmo.data.schema import TASKS, DataError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""What a path does not begin with: `http:`, `s3:`, `pipe:`."""
SILENT = 1e-4
"""Peak below which a sound is silence."""


@dataclass(frozen=True)
class Limits:
    """What a line may be: seconds of a sound, of a dialogue, characters of a text."""

    min_seconds: float = 0.1
    max_seconds: float = 60.0
    max_dialogue_seconds: float = 1800.0
    max_characters: int = 10_000


LIMITS = Limits()


def read_manifest(
    path: str | Path,
    *,
    on_error: str = "stop",
    limits: Limits = LIMITS,
    skipped: Counter[str] | None = None,
    tasks: Collection[str] = TASKS,
    root: Path | None = None,
) -> CutSet:
    """The lines of a manifest as a lazy CutSet: cuts as JSONL (.jsonl, .jsonl.gz), or a directory of lhotse Shar.

    A line that does not parse or validate raises DataError with the manifest and the line's number when it is reached
    (`stop`), or is left out (`skip`) and counted in `skipped` by its reason, once however often the set is read. A
    manifest with no usable line at all raises too. tasks: those that are wanted here; a line of another does not
    validate. root: the folder in which sounds lie that are named by a relative path (by default the working directory).
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
    if not Path(path).is_file() and not Path(path).is_dir():
        raise DataError(f"there is no manifest at {path}; check the path", "missing manifest")
    if Path(path).is_dir() and not any(Path(path).glob("cuts.*")):
        raise DataError(
            f"{path} is a directory without lhotse Shar (cuts.*.jsonl.gz); check the path", "missing manifest"
        )
    return CutSet(Manifest(Path(path), on_error, limits, Counter() if skipped is None else skipped, tasks, root))


def describe_skipped(skipped: Counter[str]) -> str:
    """One line for the lines that were left out, most frequent reason first."""
    if not skipped:
        return "no line was skipped"
    reasons = ", ".join(f"{reason} {n}" for reason, n in skipped.most_common())
    return f"{skipped.total()} lines were skipped: {reasons}"


class Manifest:
    """The validated cuts of one manifest, each time anew from its beginning."""

    def __init__(
        self,
        path: Path,
        on_error: str,
        limits: Limits,
        skipped: Counter[str],
        tasks: Collection[str],
        root: Path | None = None,
    ) -> None:
        self.path, self.on_error, self.limits, self.skipped = path, on_error, limits, skipped
        self.tasks, self.root = tasks, root
        self._counted = 0
        """Lines whose faults are in `skipped` already."""

    def __iter__(self) -> Iterator[Cut]:
        usable, number = 0, 0
        lines = self._shar() if self.path.is_dir() else self._text(self.path)
        for number, line in enumerate(lines, 1):
            try:
                cut = line if isinstance(line, Cut) else _parsed(line)
                if self.root is not None:
                    _place(cut, self.root)
                validate(cut, self.limits)
                if (task := cut.custom["task"]) not in self.tasks:
                    raise _wrong(
                        cut, "task", f"is {task}, and what is wanted here is {', '.join(self.tasks)}", "other task"
                    )
            except DataError as error:
                if self.on_error == "stop":
                    raise DataError(f"{self.path}, line {number}: {error}", error.reason) from None
                self.skipped[error.reason] += number > self._counted
                continue
            usable += 1
            yield cut
        self._counted = max(self._counted, number)
        if not usable:
            raise DataError(f"{self.path} holds no usable line among its {number}; correct it", "empty manifest")

    def lines(self) -> int:
        """How many lines there are, unread and usable or not."""
        paths = sorted(self.path.glob("cuts.*.jsonl*")) if self.path.is_dir() else [self.path]
        return sum(1 for path in paths for _ in self._text(path))

    def _text(self, path: Path) -> Iterator[str]:
        try:
            with open_best(path, "r") as file:
                yield from file
        except (OSError, EOFError, UnicodeError) as error:
            raise DataError(f"{path} is damaged ({error}); write it again", "damaged manifest") from None

    def _shar(self) -> Iterator[Cut]:
        try:
            yield from CutSet.from_shar(in_dir=self.path)
        except Exception as error:  # lhotse's reader asserts, and passes on what tar, JSON and gzip raise
            fix = "write it again with CutSet.to_shar"
            raise DataError(f"{self.path} is damaged ({error!r:.100}); {fix}", "damaged manifest") from error


def _parsed(line: str) -> Cut:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({str(error):.60}); write one cut a line", "no JSON") from None
    try:
        cut = deserialize_item(item)
    except Exception as error:  # whatever a line of another shape makes lhotse's reader stumble over
        raise DataError(f"no lhotse cut ({error!r:.60}); write it with CutSet.to_file", "no cut") from None
    return cut


def _place(cut: Cut, root: Path) -> None:
    """Sounds with a relative path lie in `root`."""
    both = (_recording_of(cut, "recording"), _recording_of(cut, "target_recording")) if isinstance(cut, MonoCut) else ()
    for recording in both:
        for source in recording.sources if isinstance(recording, Recording) else ():
            if source.type == "file" and isinstance(source.source, str) and not _ADDRESS.match(source.source):
                source.source = str(root / source.source)


def load_sound(cut: Cut, field: str = "recording", sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Sound of a line, (n,) float32 at `sample_rate`: its `recording`, or its `target_recording`.

    Raises DataError for what cannot be read, is empty, silent or not finite.
    """
    recording = _recording_of(cut, field)
    if recording is None:
        raise _wrong(cut, field, "is missing; this needs its sound", f"missing {field}")
    try:
        sound = cut.load_audio() if field == "recording" else cut.load_custom(field)
    except (AudioLoadingError, DurationMismatchError, AssertionError, OSError, ValueError) as error:
        raise _wrong(cut, field, f"cannot be read ({str(error):.80}); write it again", "unreadable sound") from error
    sound = np.asarray(sound, dtype=np.float32).mean(axis=0)
    if not np.isfinite(sound).all():
        raise _wrong(cut, field, "holds NaN or infinite samples; write it again from its source", "not finite")
    if np.abs(sound).max(initial=0.0) < SILENT:
        raise _wrong(cut, field, "is silent; leave the line out", "silent")
    return (
        sound if recording.sampling_rate == sample_rate else soxr.resample(sound, recording.sampling_rate, sample_rate)
    )


def validate(cut: Cut, limits: Limits = LIMITS) -> None:
    """Raises DataError, one sentence with the cut's id, the field and the fix, unless the cut is a line of its task.

    Sound is looked for and not opened: what it holds is checked when it is loaded.
    """
    if not isinstance(cut, MonoCut):
        name = getattr(cut, "id", "without id")
        raise DataError(
            f"cut {name} is a {type(cut).__name__}; only MonoCuts can be used: save it as one", "no MonoCut"
        )
    custom = cut.custom or {}
    name = custom.get("task")
    if not isinstance(name, str) or name not in TASKS:
        raise _wrong(cut, "task", f"is {name!r:.40}; set it to one of {', '.join(TASKS)}", "unknown task")
    task = TASKS[name]
    have = {k for k, v in custom.items() if v is not None} | ({"recording"} if cut.recording is not None else set())
    for field in task.required:
        if field not in have:
            raise _wrong(cut, field, f"is missing, and every {name} line needs it: add it", f"missing {field}")
    if task.either and not have & set(task.either):
        raise _wrong(
            cut, " or ".join(task.either), f"is missing, and {name} needs one of them: add it", "missing speech"
        )
    if "recording" in have and "recording" not in task.required:
        fix = "move the assistant's sound to target_recording" if task.either else "a spoken question is a qa line"
        raise _wrong(cut, "recording", f"is there, but {name} hears nothing: {fix}", "unwanted recording")
    _check_times(cut, name, limits)
    for field in sorted(have & set(_CHECKS)):
        _CHECKS[field](cut, field, custom[field], limits)
    for field in sorted(have & {"recording", "target_recording"}):
        _check_files(cut, field, _recording_of(cut, field))


def _recording_of(cut: Cut, field: str) -> Any:
    return cut.recording if field == "recording" else (cut.custom or {}).get(field)


def _wrong(cut: Cut, field: str, what: str, reason: str) -> DataError:
    return DataError(f"cut {cut.id}: {field} {what}", reason)


def _check_text(cut: Cut, field: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, str):
        raise _wrong(cut, field, f"must be text, got {value!r:.40}; write a string", f"wrong {field}")
    if not value.strip() and field != "instruction":
        raise _wrong(cut, field, "is empty; write what is said, or leave the line out", f"empty {field}")
    if len(value) > limits.max_characters:
        raise _wrong(
            cut, field, f"has {len(value)} characters, limit {limits.max_characters}; split it", f"long {field}"
        )
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise _wrong(cut, field, "holds half a character (a lone surrogate); write it as UTF-8", f"wrong {field}")


def _check_tokens(cut: Cut, field: str, value: Any, limits: Limits) -> None:
    if not (isinstance(value, list) and value and all(is_whole(v) and v >= 0 for v in value)):
        fix = "write a list of integers from 0 on"
        raise _wrong(cut, field, f"must be speech tokens, got {value!r:.40}; {fix}", f"wrong {field}")


def _check_answers(cut: Cut, field: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, list) or not value:
        raise _wrong(cut, field, f"must be a list of texts, got {value!r:.40}; write one, or none", f"wrong {field}")
    for n, text in enumerate(value):
        _check_text(cut, f"{field}[{n}]", text, limits)


def _check_history(cut: Cut, field: str, value: Any, limits: Limits) -> None:
    if not isinstance(value, list) or not all(isinstance(v, dict) and set(v) == {"user", "assistant"} for v in value):
        raise _wrong(cut, field, 'must be a list of {"user": text, "assistant": text}; write it so', f"wrong {field}")
    for n, turn in enumerate(value):
        for who, text in turn.items():
            _check_text(cut, f"history[{n}].{who}", text, limits)


def _check_target(cut: Cut, field: str, value: Any, limits: Limits) -> None:
    _check_recording(cut, field, value)
    unaligned = cut.custom.get(f"{field}_unaligned", False)
    if cut.custom["task"] == "s2s" and unaligned is not True:
        raise _wrong(cut, field, f"has a length of its own: set {field}_unaligned to true", f"aligned {field}")
    end = cut.start + cut.duration  # lhotse's own `end` needs a recording
    if not unaligned and end > value.duration + 1e-3:
        what = f"lasts {value.duration:g} s, less than its cut, which ends at {end:g} s; correct the cut's duration"
        raise _wrong(cut, field, what, f"short {field}")
    if unaligned:
        _check_seconds(cut, field, value.duration, limits.min_seconds, limits.max_seconds)


def _check_events(cut: Cut, field: str, value: Any, limits: Limits) -> None:
    known = {f.name for f in fields(Event)}
    needed = {"kind", "start", "end"}
    if not isinstance(value, list) or not all(isinstance(v, dict) and needed <= set(v) <= known for v in value):
        raise _wrong(cut, field, f"must be a list of objects with {', '.join(sorted(known))}", f"wrong {field}")
    for n, event in enumerate(value):
        if not (is_whole(event["start"]) and is_whole(event["end"]) and isinstance(event["kind"], str)):
            raise _wrong(cut, f"events[{n}]", "needs whole samples and a kind as text; write them so", f"wrong {field}")
        if event.get("text", "") != "":  # nothing need have been heard, or be known
            _check_text(cut, f"events[{n}].text", event["text"], limits)
    try:
        check_events([Event(**event) for event in value], round(cut.duration * SAMPLE_RATE))
    except ValueError as error:
        raise _wrong(cut, field, f"are wrong: {error}", f"wrong {field}") from None
    turns, marks = sum(event["kind"] in USER_TURNS for event in value), cut.custom.get("ambiguous")
    if marks is None:
        return
    if not isinstance(marks, list) or len(marks) != turns or not all(isinstance(mark, bool) for mark in marks):
        what = f"is {marks!r:.40}; write true or false for each of the {turns} turns of the user's"
        raise _wrong(cut, "ambiguous", what, "wrong ambiguous")


_CHECKS: dict[str, Callable[[Any, str, Any, Limits], None]] = {
    **dict.fromkeys(("instruction", "text", "source_text", "language", "dataset"), _check_text),
    "answers": _check_answers,
    "speech_tokens": _check_tokens,
    "history": _check_history,
    "target_recording": _check_target,
    "events": _check_events,
}


def _check_times(cut: Cut, task: str, limits: Limits) -> None:
    for field, value in (("start", cut.start), ("duration", cut.duration)):
        if not (is_real(value) and math.isfinite(value)):
            raise _wrong(cut, field, f"must be seconds, got {value!r:.40}; write a number", f"wrong {field}")
    most = limits.max_dialogue_seconds if task == "duplex" else limits.max_seconds
    least = limits.min_seconds if task != "text" else 1e-6
    _check_seconds(cut, "duration", cut.duration, least, most)
    if cut.recording is None:
        return
    _check_recording(cut, "recording", cut.recording)
    end = cut.start + cut.duration
    if cut.start < 0 or end > cut.recording.duration + 1e-3:
        what = f"ends at {cut.recording.duration:g} s, the cut at {end:g} s; correct the cut's start and duration"
        raise _wrong(cut, "recording", what, "short recording")


def _check_recording(cut: Cut, field: str, value: Any) -> None:
    fix = "write what Recording.from_file gives"
    if not isinstance(value, Recording) or not is_real(value.duration) or not is_whole(value.sampling_rate):
        raise _wrong(cut, field, f"must be a lhotse Recording, got {value!r:.60}; {fix}", f"wrong {field}")
    for source in value.sources:
        # lhotse would run a command and open an address: no line of data does so here. Shar's sounds are in memory.
        form = (source.type, type(source.source))
        if form not in (("file", str), ("memory", bytes)) or (form[1] is str and _ADDRESS.match(source.source)):
            raise _wrong(cut, field, f"is no file but {source.type} {source.source!r:.40}; {fix}", f"wrong {field}")
    channels = value.channel_ids if isinstance(value.channel_ids, list) else []
    if field == "recording" and cut.channel not in channels:
        raise _wrong(
            cut, "channel", f"is {cut.channel!r:.20}, which its recording has not; correct it", "wrong channel"
        )


def _check_seconds(cut: Cut, field: str, seconds: float, least: float, most: float) -> None:
    if not seconds >= least:
        raise _wrong(
            cut, field, f"is {seconds:g} s, less than the {least:g} s that can be used; leave it out", "too short"
        )
    if not seconds <= most:
        raise _wrong(cut, field, f"is {seconds:g} s, more than the {most:g} s that are allowed; cut it", "too long")


def _check_files(cut: Cut, field: str, recording: Any) -> None:
    for source in recording.sources:
        if source.type == "file" and not os.path.isfile(source.source):
            what = f"names the file {source.source}, which is not there; correct the path (from the working directory)"
            raise _wrong(cut, field, what, "missing file")
