"""`manifest.json`: where each part of a checkpoint comes from, and the sha256 of its files.

It is written beside the weights by `save`, `minmo import` and `minmo assemble`, and goes along from file to file: what
was imported, what is only a start for training, what was drawn at random.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minmo.config import is_whole
from minmo.console import shown
from minmo.model import Origin
from minmo.weights.stored import CheckpointError, json_file, sha256

FILE = "manifest.json"


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was read or written."""

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Stamp:
        return cls(path.name, path.stat().st_size, sha256(path))


def write(folder: Path, origins: Mapping[str, Origin], files: Mapping[str, Stamp]) -> None:
    """Writes a folder's manifest."""
    content = {
        "made_by": made_by(),
        "parts": {part: dataclasses.asdict(origin) for part, origin in origins.items()},
        "files": [dataclasses.asdict(stamp) for stamp in files.values()],
    }
    (folder / FILE).write_text(json.dumps(_clean(content), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Origin], list[Stamp]]:
    """A folder's manifest; empty where it has none. Raises CheckpointError for one that is no manifest."""
    path = folder / FILE
    if not path.is_file():
        return {}, []
    content = json_file(path)
    try:
        parts = {_line(part): _origin(fields) for part, fields in content["parts"].items()}
        return parts, [_stamp(stamp) for stamp in content["files"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is no manifest ({error}): remove it, or fetch the folder again") from None


def verify(folder: Path) -> int:
    """Reads every file of a manifest and compares its sha256 -> how many there are. Raises CheckpointError that names
    the first that differs or is missing, and for a folder without a manifest."""
    _, stamps = read(folder)
    if not stamps:
        raise CheckpointError(f"{folder} has no {FILE}, so there is nothing to compare with")
    for stamp in stamps:
        path = folder / stamp.file
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {stamp.file}, which its {FILE} lists: fetch it again")
        if path.stat().st_size != stamp.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {stamp.bytes}: fetch it again")
        if sha256(path) != stamp.sha256:
            raise CheckpointError(f"{path} is not the file that was written (its sha256 differs): fetch it again")
    return len(stamps)


def made_by() -> str:
    """Program and version."""
    return f"minmo {version('minmo')}"


def _origin(fields: dict[str, Any]) -> Origin:
    """An origin whose fields can be shown as they are. Raises TypeError or ValueError for another."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    origin = Origin(**given)
    for source in origin.sources:
        _stamp(source)
    if not (origin.seed is None or is_whole(origin.seed)):
        raise ValueError(f"seed is {origin.seed!r:.60}")
    for text in (origin.state, origin.importer, origin.made_by, origin.dtype, origin.start):
        _line(text)
    for texts in (origin.notes, origin.dropped, origin.zeroed):
        if not isinstance(texts, tuple):
            raise ValueError(f"{texts!r:.60} is no list")
        for text in texts:
            _line(text)
    return origin


def _stamp(fields: dict[str, Any]) -> Stamp:
    """A stamp of a file of the folder itself. Raises TypeError or ValueError for another."""
    stamp = Stamp(**fields)
    if Path(_line(stamp.file)).name != stamp.file or not is_whole(stamp.bytes):
        raise ValueError(f"{stamp.file!r:.60} with {stamp.bytes!r:.60} bytes is no file of a folder")
    _line(stamp.sha256)
    return stamp


def _clean(content: Any) -> Any:
    """With every text a line that `read` takes: names in public files may hold anything."""
    if isinstance(content, dict):
        return {_clean(key): _clean(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_clean(value) for value in content]
    return shown(" ".join(content.split("\n"))) if isinstance(content, str) else content


def _line(text: Any) -> str:
    if not isinstance(text, str) or not text.isprintable():
        raise ValueError(f"{text!r:.60} is no line of text")
    return text
