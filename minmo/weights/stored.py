"""Weights in files, before they are read: names, shapes and dtypes, and each tensor when it is asked for.

Nothing here holds a file's tensors: a safetensors file is mapped, and its pages are let go as reading goes on.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Safetensors' names."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be stored as."""
_KEPT = 256 << 20
"""Bytes that are read through one mapping of a file: those pages count as this process's memory."""
_PIECE = 1 << 24
"""Numbers that are looked at, or converted, at once."""


class CheckpointError(ValueError):
    """A checkpoint that does not fit its configuration, or cannot be read."""


@dataclass(frozen=True)
class Weight:
    """A tensor that has not been read yet. read: gives it, of this shape and dtype; may be called again. where: its
    file, for messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    where: str = "the model"

    @classmethod
    def of(cls, tensor: Tensor, where: str = where) -> Weight:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, where)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


Weights = Mapping[str, Weight]


def safetensors(*paths: Path) -> dict[str, Weight]:
    """All tensors of safetensors files, by name. Raises CheckpointError for one that is none, is cut, or repeats a
    name."""
    found: dict[str, Weight] = {}
    for path in paths:
        mapped = _Mapped(path)
        for name, shape, dtype in mapped.header():
            if name in found:
                raise CheckpointError(f"{path} holds {name!r}, which another file of this checkpoint holds, too")
            found[name] = Weight(shape, dtype, lambda m=mapped, n=name: m.read(n), str(path))  # type: ignore[misc]
    return found


def indexed(folder: Path, stem: str = "model") -> tuple[list[Path], dict[str, Weight]]:
    """The tensors of `STEM.safetensors`, or of the files that `STEM.safetensors.index.json` names, and those files.

    Raises CheckpointError where there is neither, a file is missing or cut, or the index names what is not there.
    """
    one, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if one.is_file():
        return [one], safetensors(one)
    if not index.is_file():
        raise CheckpointError(
            f"{folder} has no {one.name} and no {index.name}: put the weights there (safetensors only)"
        )
    table = json_file(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files: fetch it again")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is no file of its folder: fetch it again")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, one of the {len(names)} files of {index.name}: fetch it")
    files = [folder / name for name in names]
    found = {path.name: set(safetensors(path)) for path in files}
    for tensor, name in table.items():
        if tensor not in found[name]:
            raise CheckpointError(f"{folder / name} lacks the tensor {tensor!r}, which {index.name} places there")
    return files, safetensors(*files)


def pickled(path: Path) -> dict[str, Weight]:
    """The state dict that a `.pt` file holds, mapped; files that hold anything but tensors are refused unread.

    Raises CheckpointError for a file with code in it, one that is cut, and one that is no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path}: put the file there")
    if _compressed(path):
        raise CheckpointError(f"{path} is compressed, as torch.save leaves no file: use the released one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = str(error).replace("\n", " ")
        found = what[what.find("GLOBAL ") : what.find("GLOBAL ") + 60] if "GLOBAL " in what else "a broken pickle"
        raise CheckpointError(
            f"{path} holds more than tensors ({found.split(' was ')[0]}) and is not run; use the released file"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is cut, or no file of torch.save ({first:.120}): fetch it again") from None
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{path} holds no state dict, but a {type(content).__name__}: use the released file")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is no tensor, but a {type(tensor).__name__}: use the released file"
            )
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name!r} is sparse, nested or without data: use the released file")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a view that repeats what is stored
            raise CheckpointError(
                f"{path}: {name!r} has the shape {tuple(tensor.shape)} and too few bytes for it: use the released file"
            )
    return {name: Weight.of(tensor, str(path)) for name, tensor in content.items()}


def _compressed(path: Path) -> bool:
    """Whether a zip file unpacks to more than it is, which no file of torch.save does: a small one could fill all
    memory. What is no whole zip file is torch's to refuse."""
    try:
        with zipfile.ZipFile(path) as packed:
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return False


def json_file(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): put the file there") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({str(error):.80}): fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again")
    return content


def usable(where: str, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored tensor as a weight of a dtype: itself where it is of that. Raises CheckpointError that names it where it
    is no float, or holds NaN or infinity as stored or as converted."""
    if stored.dtype not in FLOATS:
        raise CheckpointError(f"{where}: {name!r} is {stored.dtype}; weights are float32, bfloat16 or float16")
    if stored.dtype == dtype:
        tensor = stored
    else:
        tensor = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        for source, target in zip(_pieces(stored), _pieces(tensor), strict=True):
            target.copy_(source)
    if all(bool(piece.isfinite().all()) for piece in _pieces(tensor)):
        return tensor
    short = str(dtype).removeprefix("torch.")
    if stored.dtype != dtype and all(bool(piece.isfinite().all()) for piece in _pieces(stored)):
        most = max(piece.abs().max().item() for piece in _pieces(stored))
        raise CheckpointError(
            f"{where}: {name!r} reaches {most:.4g}, and {short} ends at {torch.finfo(dtype).max:.4g}: take another"
        )
    raise CheckpointError(f"{where}: {name!r} holds NaN or infinite numbers as {short}; export it again")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers, some at a time, as views."""
    yield from (tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)).split(_PIECE)


class _Mapped:
    """One safetensors file. A tensor is a view of the mapping until its last user is gone; the mapping is renewed now
    and then, so that what is converted or written as it comes leaves no pages behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._read = 0

    def header(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        file = self._open()
        for name in file.keys():
            part = file.get_slice(name)
            kind = DTYPES.get(part.get_dtype())
            if kind is None:
                raise CheckpointError(f"{self._path}: {name!r} is {part.get_dtype()}; weights are floats")
            yield name, tuple(part.get_shape()), kind
        self._file = None

    def read(self, name: str) -> Tensor:
        if self._file is None or self._read > _KEPT:
            self._file, self._read = self._open(), 0
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: {name!r} cannot be read ({error}): fetch the file again") from None
        self._read += tensor.nbytes
        return tensor

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise CheckpointError(f"there is no {self._path}: put the file there") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self._path} is not a readable safetensors file ({error}): it is cut or damaged, fetch it again"
            ) from None
