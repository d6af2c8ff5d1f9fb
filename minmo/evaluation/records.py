"""What a run keeps item by item, as JSON lines: the first says what it was made with, every other is a record.

A record is written when its batch is over, so that a run that is killed goes on where it stopped: what was not written
whole is dropped, and made again in the same batch as before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""Facts of one item or dialogue, by name; `id` or `name` is its own."""


def kept(path: Path, about: Record, key: str = "id") -> dict[str, Record]:
    """The records that an earlier run left, by their ids; begins the file where there is none.

    Raises ValueError where that run was made with something else than `about`, and where the file cannot be written.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        found = _parsed(path, whole)
        if found and found[0].get("about") != about:
            before = found[0].get("about", {})
            other = [name for name in about if before.get(name) != about[name]]
            raise ValueError(f"{path} is of another run ({', '.join(other)} differ): name another folder")
        if not whole or whole != text:
            _replace(path, whole or json.dumps({"about": about}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name a folder that can") from None
    return {record[key]: record for record in found[1:]}


def read(path: Path) -> tuple[Record, list[Record]]:
    """(about, records) of a file. Raises ValueError for one that is no such file."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; name a folder that `minmo evaluate -o` wrote")
    found = _parsed(path, path.read_text(encoding="utf-8"))
    if not found or "about" not in found[0]:
        raise ValueError(f"{path} does not begin with what it was made with; name a folder that `minmo evaluate` wrote")
    return found[0]["about"], found[1:]


def keep_batches(path: Path, about: Record, batches: Sequence[Collection[str]]) -> dict[str, Record]:
    """As `kept`, with the records of a batch (ids) that is not there whole taken out, to be made anew in its place."""
    found = kept(path, about)
    whole = {name for batch in batches if all(name in found for name in batch) for name in batch}
    if whole != set(found):
        found = {name: record for name, record in found.items() if name in whole}
        _replace(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in ({"about": about}, *found.values())))
    return found


def append(path: Path, records: Sequence[Record]) -> None:
    """Writes records at the end, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def _parsed(path: Path, text: str) -> list[Record]:
    try:
        return [json.loads(line) for line in text.split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
