"""A file of measured cases that grows by one after every case, so that a run that is cut off loses nothing and the next
goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """Entries by name, kept in `path` (None = nowhere)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.kept: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            self.kept = json.loads(path.read_text())

    @staticmethod
    def name(operation: str, part: str, backend: str, case: Mapping[str, Any]) -> str:
        """What tells one measurement from another."""
        return " ".join([operation, part, backend, json.dumps(dict(case), sort_keys=True)])

    def keep(self, name: str, entry: Mapping[str, Any]) -> None:
        """Adds an entry and writes the file."""
        self.kept[name] = dict(entry)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.kept, indent=1) + "\n")
