"""Safetensors files written tensor by tensor, so that no more than one tensor is in memory; the library's own writer
takes a whole file's. Folders appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from minmo.console import err
from minmo.weights.manifest import Stamp
from minmo.weights.stored import DTYPES, CheckpointError, Weight, Weights, usable

SHARD = 4 << 30
"""Bytes of tensors in one file, at most, unless one tensor is larger."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 26
_OURS = re.compile(r"model.*\.safetensors(\.index\.json)?|(config|parts|tokenizer|manifest)\.json|chat_template\.jinja")
"""Files of a folder that `whole` makes."""


def write(
    weights: Weights,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    stem: str = "model",
    shard: int = SHARD,
    told: Callable[[int], None] = lambda size: None,
) -> dict[str, Stamp]:
    """Writes `STEM.safetensors`, or more files and their index if they would pass `shard` bytes -> files by name.

    dtype: None keeps each as it is. told: hears the bytes of every tensor as it
    is written. Raises CheckpointError that names a tensor which is no number in that dtype, and for a full disk.
    """
    groups = _groups(weights, dtype, shard)
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    stamps: dict[str, Stamp] = {}
    for name, group in zip(names, groups, strict=True):
        try:
            stamps[name] = _file(folder / name, {n: weights[n] for n in group}, dtype, told)
        except OSError as error:
            raise CheckpointError(
                f"{folder / name} could not be written ({error.strerror}): make room and save again"
            ) from None
    if len(groups) > 1:
        index = folder / f"{stem}.safetensors.index.json"
        total = sum(_bytes(w, dtype) for w in weights.values())
        table = {n: name for name, group in zip(names, groups, strict=True) for n in group}
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=1) + "\n")
        stamps[index.name] = Stamp.of(index)
    return stamps


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends, and is gone when it raises. Raises
    CheckpointError where `out` is there already, and for a full disk. What a killed run left in it is removed; another
    folder of that name is not."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out} is there already: name a new folder, so that nothing is overwritten")
    part = out.with_name(f"{out.name}.tmp")
    if part.is_dir() and (strange := sorted(file.name for file in part.iterdir() if not _OURS.fullmatch(file.name))):
        raise CheckpointError(f"{part} holds {strange[0]!r}, which is no weights: move it, or name another folder")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{part} could not be made ({error.strerror}): name another folder") from None
    try:
        yield part
        part.rename(out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{out} could not be written ({error.strerror}): make room, or name another folder"
            ) from None
        raise


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes on stderr, where that is a terminal -> what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.advance(task, size)


def total_bytes(weights: Weights, dtype: torch.dtype | None) -> int:
    """What they take in a file."""
    return sum(_bytes(weight, dtype) for weight in weights.values())


def _groups(weights: Weights, dtype: torch.dtype | None, shard: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        more = _bytes(weight, dtype)
        if groups[-1] and size + more > shard:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    return groups


def _file(path: Path, weights: Weights, dtype: torch.dtype | None, told: Callable[[int], None]) -> Stamp:
    names = sorted(weights, key=lambda name: -_stored(weights[name], dtype).itemsize)  # wide ones first: all aligned
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + _bytes(weights[name], dtype)
        kind = _NAMES[_stored(weights[name], dtype)]
        entries[name] = {"dtype": kind, "shape": list(weights[name].shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header):
            digest.update(piece)
            file.write(piece)
        for name in names:
            weight = weights[name]
            tensor = usable(weight.where, name, weight.read(), _stored(weight, dtype))
            if tuple(tensor.shape) != weight.shape:
                raise CheckpointError(
                    f"{weight.where}: {name!r} has the shape {tuple(tensor.shape)}, not {weight.shape}"
                )
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for at in range(0, len(data), _PIECE):
                digest.update(data[at : at + _PIECE])
                file.write(data[at : at + _PIECE])
            told(len(data))
    return Stamp(path.name, 8 + len(header) + start, digest.hexdigest())


def _stored(weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write: fp64 is nowhere a MinMo's, so its default is fp32."""
    return dtype or (torch.float32 if weight.dtype == torch.float64 else weight.dtype)


def _bytes(weight: Weight, dtype: torch.dtype | None) -> int:
    return weight.numel * _stored(weight, dtype).itemsize
