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

_BEGINNING = b'{"about": '
Record = dict[str, Any]
"""Facts of one item or dialogue, by name; `id` or `name` is its own."""


def kept(path: Path, about: Record, key: str = "id") -> dict[str, Record]:
    """The records that an earlier run left, by their ids; begins the file where there is none.

    Raises ValueError where that run was made with something else than `about`, where the file is none of a run's, and
    where it cannot be written.
    """
    try:
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a kill may part the bytes of a character
        if not _BEGINNING.startswith(data[: len(_BEGINNING)]):
            raise ValueError(f"{path} is no file of a run: name another folder, so that it is not overwritten")
        found = _parsed(path, whole, key)
        if found and found[0]["about"] != about:
            other = [name for name in about if found[0]["about"].get(name) != about[name]]
            raise ValueError(f"{path} is of another run ({', '.join(other)} differ): name another folder")
        if not whole:
            _replace(path, _line({"about": about}))
        elif whole != data:
            _replace(path, whole.decode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name a folder that can") from None
    return {record[key]: record for record in found[1:]}


def read(path: Path) -> tuple[Record, list[Record]]:
    """(about, records) of a file. Raises ValueError for one that is no such file."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; name a folder that `minmo evaluate -o` wrote")
    data = path.read_bytes()
    if not data.startswith(_BEGINNING):
        raise ValueError(f"{path} does not begin with what it was made with; name a folder that `minmo evaluate` wrote")
    found = _parsed(path, data, "id")
    return found[0]["about"], found[1:]


def keep_batches(path: Path, about: Record, batches: Sequence[Collection[str]]) -> dict[str, Record]:
    """As `kept`, with the records of a batch (ids) that is not there whole taken out, to be made anew in its place."""
    found = kept(path, about)
    whole = {name for batch in batches if all(name in found for name in batch) for name in batch}
    if whole != set(found):
        found = {name: record for name, record in found.items() if name in whole}
        _replace(path, "".join(map(_line, ({"about": about}, *found.values()))))
    return found


def append(path: Path, records: Sequence[Record]) -> None:
    """Writes records at the end, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(_line, records)))
        file.flush()
        os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parsed(path: Path, data: bytes, key: str) -> list[Record]:
    """What a file was made with, and its records; none of an empty file."""
    try:
        found = [json.loads(line) for line in data.decode().split("\n") if line]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None
    if not all(isinstance(x, dict) and (key if i else "about") in x for i, x in enumerate(found)):
        raise ValueError(f"{path} is damaged (a line of it is no record); delete it and run again")
    return found


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
