"""What a model is judged on: the lines of manifests (`minmo/data/schema.py`), a set each.

A folder is a corpus: its manifests `test-*.jsonl.gz`, with `valid-tts`, are its sets, as `minmo data nano` writes them
and as the package ships some (`minmo/assets/eval`). A set holds lines of one task.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from minmo.conversation.verbs import Sound
from minmo.data.languages import code_of, name_of
from minmo.data.manifest import load_sound, read_manifest
from minmo.data.schema import TASKS, DataError
from minmo.tokenizer.text import CHAT, TRANSLATE

SHIPPED = Path(str(resources.files("minmo") / "assets" / "eval"))
"""The corpus that ships: a small one, in the domain of nano (`minmo/data/nano/shipped.py`)."""
QUICK = 12
"""Lines of each of its sets that all tasks together take by default: minutes on two cores."""
MURMURS = "test-backchannels.jsonl.gz"
"""What dialogues are made with; no set of its own."""
ENDINGS = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class Line:
    """What is heard or read, and what is asked about it.

    utterance: names the sound, which several lines may share; language: what is heard, or spoken in tts; sound: loads
    it, (n,) float32, 16 kHz (typed lines have none); said: the user's words, "" where they are not known; text: the
    right answer to `instruction`; answers: others that are right; target: the language of a translation, "" elsewhere;
    spoken: loads the recording of the answer, 16 kHz, where there is one. cut: the lhotse cut that all this is from.
    """

    id: str
    task: str
    utterance: str
    language: str
    seconds: float
    sound: Callable[[], Sound] | None
    said: str
    text: str
    instruction: str = CHAT
    answers: tuple[str, ...] = ()
    target: str = ""
    spoken: Callable[[], Sound] | None = None
    dataset: str = ""
    cut: Any = None


@dataclass(frozen=True)
class Set:
    """The lines of one manifest."""

    name: str
    task: str
    lines: list[Line]


def manifests_of(folder: Path) -> list[Path]:
    """The sets of a corpus folder. Raises DataError where it holds none."""
    found = sorted({*folder.glob("test-*.jsonl.gz"), *folder.glob("valid-tts.jsonl.gz")} - {folder / MURMURS})
    if not any(path.name.startswith("test-") for path in found):
        what = f"{folder} holds no manifests test-*.jsonl.gz"
        raise DataError(
            f"{what}; give the folder that `minmo data nano` wrote, or --manifest FILE for others", "missing manifest"
        )
    return found


def read_set(
    path: Path, limit: int | None = None, seed: int = 0, instruction: str | None = None, root: Path | None = None
) -> Set:
    """The lines of a manifest; `limit`: at most so many, the same ones for one seed. instruction: in place of the
    lines' own. root: what relative paths of sounds are relative to, by default the working directory.

    Raises DataError, one sentence with the manifest and the line, for the first line that cannot be used: a score on
    part of a set is none of that set.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    lines: dict[str, Line] = {}
    for number, cut in enumerate(read_manifest(path, root=root), 1):
        line = _line(cut, f"{path}, line {number}")
        if line.id in lines:
            raise DataError(f"{path}, line {number}: there is an id {line.id} already; give each line its own", "twice")
        lines[line.id] = line if instruction is None else replace(line, instruction=instruction)
    tasks = sorted({line.task for line in lines.values()})
    if len(tasks) > 1:
        raise DataError(f"{path} holds lines of {', '.join(tasks)}; write a manifest for each task", "mixed tasks")
    return Set(_name(path), tasks[0], drawn(list(lines.values()), limit, seed))


def drawn(lines: Sequence[Line], limit: int | None, seed: int = 0) -> list[Line]:
    """At most `limit` of some lines, in an order that the seed draws."""
    return sorted(lines, key=lambda line: (zlib.crc32(f"{seed} {line.id}".encode()), line.id))[:limit]


def _name(path: Path) -> str:
    return next((path.name.removesuffix(end) for end in ENDINGS if path.name.endswith(end)), path.name)


def _line(cut: Any, where: str) -> Line:
    custom = {name: value for name, value in cut.custom.items() if value is not None}
    task, recording = TASKS[custom["task"]], cut.recording
    language = custom.get("language", "en")
    instruction = custom.get("instruction", task.instruction or CHAT)
    try:
        name_of(language)
        target = _target(instruction) if custom["task"] == "s2tt" else ""
    except ValueError as error:
        raise DataError(f"{where}: {error}", "wrong language") from None
    text = custom.get("text", "")
    return Line(
        id=cut.id,
        task=custom["task"],
        utterance=recording.id if recording else cut.id,
        language=language,
        seconds=cut.duration,
        sound=partial(load_sound, cut) if recording else None,
        said=custom.get("source_text", text if custom["task"] == "asr" else ""),
        text=text,
        instruction=instruction,
        answers=tuple(custom.get("answers", ())),
        target=target,
        spoken=partial(load_sound, cut, "target_recording") if custom.get("target_recording") is not None else None,
        dataset=custom.get("dataset", ""),
        cut=cut,
    )


def _target(instruction: str) -> str:
    """The code of the language that a translation is asked into."""
    before, between, _ = TRANSLATE.replace("{target}", "{source}").split("{source}")
    named = instruction.removeprefix(before).partition(between)[2]
    code = code_of(named)
    if not instruction.startswith(before) or code is None:
        what = f"the instruction {instruction!r:.60} names no language that is known here to translate into"
        raise ValueError(f"{what}; write it as {TRANSLATE.format(source='English', target='French')!r}")
    return code
