"""A folder of parts, what `minmo import` writes: `parts.json` (their configurations), weights under a MinMo's names,
`tokenizer.json` and `chat_template.jinja` where there are such, and `manifest.json`. It opens as the public files do,
and assembles like them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minmo.model import NothingDrawn, Origin
from minmo.tokenizer.text import TextTokenizer
from minmo.weights import manifest
from minmo.weights.importers.frame import KINDS, Part, check, module
from minmo.weights.manifest import Stamp
from minmo.weights.stored import CheckpointError, indexed, json_file, usable
from minmo.weights.written import bar, total_bytes, whole, write

FILE = "parts.json"
TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"


def save_parts(parts: Sequence[Part], out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes parts into a new folder, tensor by tensor; on any error nothing is left. dtype: None keeps each tensor's.

    Raises CheckpointError, in one sentence that names the tensor, for what does not fit or is no number in that dtype.
    """
    for part in parts:
        check(part)
    weights = {full(part.name, name): weight for part in parts for name, weight in part.tensors.items()}
    llm = next((part for part in parts if part.name == "llm"), None)
    texts = {} if llm is None else {TOKENIZER: llm.tokenizer, CHAT_TEMPLATE: llm.chat_template}
    if llm is not None and llm.tokenizer:
        TextTokenizer(llm.tokenizer, f"the tokenizer of {llm.files[0]}")  # one that a MinMo can use
    with whole(out) as folder, bar("writing", total_bytes(weights, dtype)) as told:
        files = write(weights, folder, dtype, told=told)
        (folder / FILE).write_text(json.dumps({p.name: dict(p.config) for p in parts}, indent=1) + "\n")
        for name, text in texts.items():
            if text:
                (folder / name).write_text(text, encoding="utf-8")
        for name in (FILE, *(name for name, text in texts.items() if text)):
            files[name] = Stamp.of(folder / name)
        manifest.write(folder, {part.name: origin(part, dtype) for part in parts}, files)


def open_parts(folder: Path) -> list[Part]:
    """The parts of a folder that `save_parts` wrote, not read yet. Raises CheckpointError for what is none."""
    configs = json_file(folder / FILE)
    if strange := [name for name, config in configs.items() if not isinstance(config, dict)]:
        raise CheckpointError(f"{folder / FILE}: {strange[0]!r} is no object: import it again")
    origins, _ = manifest.read(folder)
    if set(configs) != set(origins) or not set(configs) <= {*KINDS, "speaker"}:
        raise CheckpointError(f"{folder}: {FILE} and {manifest.FILE} do not name the same parts: import them again")
    _, weights = indexed(folder)
    if unknown := [name for name in weights if name.partition(".")[0] not in configs]:
        raise CheckpointError(f"{folder} has the tensor {unknown[0]!r}, of none of its parts: import them again")
    texts = {n: (folder / n).read_text("utf-8") for n in (TOKENIZER, CHAT_TEMPLATE) if (folder / n).is_file()}
    parts = []
    for name, config in configs.items():
        was = origins[name]
        tensors = {n.partition(".")[2]: w for n, w in weights.items() if n.partition(".")[0] == name}
        part = Part(
            name, config, tensors, (folder / FILE,), was.importer,
            tokenizer=texts.get(TOKENIZER) if name == "llm" else None,
            chat_template=texts.get(CHAT_TEMPLATE) if name == "llm" else None,
            start=was.start, notes=was.notes, dropped=was.dropped, zeroed=was.zeroed, origin=was,
        )  # fmt: skip
        check(part)
        parts.append(part)
    return parts


def build(part: Part, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A part's module with its weights, in evaluation mode. A voice decoder needs `llm_dim` and an output projector."""
    check(part)
    with torch.device("meta"), NothingDrawn():
        made = module(part.name, part.config)
    state = {name: usable(weight.where, name, weight.read(), dtype) for name, weight in part.tensors.items()}
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


def origin(part: Part, dtype: torch.dtype | None) -> Origin:
    """What a manifest says of a part; one that came from a folder of parts keeps what that one said."""
    if part.origin is not None:
        return part.origin
    stamps = [Stamp.of(path) for path in part.files]
    return Origin(
        "start" if part.start else "imported",
        part.importer,
        manifest.made_by(),
        tuple({"file": s.file, "bytes": s.bytes, "sha256": s.sha256} for s in stamps),
        str(dtype).removeprefix("torch.") if dtype else "as stored",
        part.start,
        part.notes,
        part.dropped,
        part.zeroed,
    )


def full(part: str, name: str) -> str:
    """A tensor's name in a MinMo."""
    return f"{part}.{name}" if name else part
