"""Loading and saving a MinMo, strictly: every tensor by name and shape, safetensors only, never the network."""

from __future__ import annotations

import os
import shutil
from importlib import resources
from pathlib import Path

import torch

from minmo.config import MinMoConfig, load_config, presets
from minmo.model import MinMo, Origin, concerns, shapes
from minmo.tokenizer.text import TextTokenizer
from minmo.weights import manifest
from minmo.weights.manifest import Stamp
from minmo.weights.stored import CheckpointError, Weight, Weights, indexed, usable
from minmo.weights.written import SHARD, whole, write

RANDOM_SEED = 0
_WEIGHTS = "model.safetensors"


def load(
    preset_or_dir: str | Path = "nano",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> MinMo:
    """A MinMo in evaluation mode, by preset name or checkpoint directory.

    A preset without weights of its own gets random ones (`untrained`). device: default CUDA where there is one, else
    the CPU; "meta" builds shapes only. Raises CheckpointError (one sentence) for what does not fit, FileNotFoundError
    for an unknown name.
    """
    device = pick_device(device)
    dtype = _dtype(dtype)
    config = load_config(preset_or_dir)
    folder = _folder(preset_or_dir)
    there = any((folder / name).is_file() for name in (_WEIGHTS, f"{_WEIGHTS}.index.json"))
    if device.type == "meta" or (str(preset_or_dir) in presets() and not there):
        return _ready(_random(config, device, dtype), folder)
    model = shapes(config)
    files, stored = indexed(folder)
    where = str(files[0] if len(files) == 1 else folder)
    _check(where, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, stored)
    # One at a time: what is converted, or copied to a GPU, leaves the file's pages behind.
    state = {
        name: usable(stored[name].where, name, stored[name].read(), dtype).to(device) for name in model.state_dict()
    }
    model.load_state_dict(state, assign=True)
    model.trained = True
    model.origins, _ = manifest.read(folder)
    named = files[0].name if len(files) == 1 else f"{len(files)} files"
    model.provenance = "; ".join([f"weights from {named} of {preset_or_dir}", *concerns(model.origins)])
    return _ready(model, folder)


def untrained(
    preset: str = "nano", device: str | torch.device | None = None, dtype: torch.dtype | str = torch.float32
) -> MinMo:
    """A preset's MinMo with random weights from a fixed seed, where training starts from nothing.

    `model.trained` is False and `model.provenance` says so. device, dtype and errors as in `load`.
    """
    device, dtype = pick_device(device), _dtype(dtype)
    if preset not in presets():
        raise FileNotFoundError(f"{preset!r} is no preset; there are {', '.join(presets())}")
    return _ready(_random(load_config(preset), device, dtype), _folder(preset))


def _ready(model: MinMo, folder: Path) -> MinMo:
    """In evaluation mode, with the tokenizer of its folder where there is one."""
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        model.tokenizer = TextTokenizer.from_file(tokenizer)
        if model.tokenizer.size > model.config.llm.vocab:
            raise CheckpointError(
                f"{tokenizer} has {model.tokenizer.size} ids, but the LLM's vocabulary (llm.vocab in config.json) "
                f"holds {model.config.llm.vocab}; use the files of one model"
            )
    return model.requires_grad_(False).eval()


def save(model: MinMo, directory: str | Path, *, shard: int = SHARD) -> None:
    """Writes `config.json`, the weights, `tokenizer.json` and `manifest.json`; `load` gives the same tensors back.

    The weights are `model.safetensors`, or files of at most `shard` bytes and their index. A new folder appears when
    all of it is written; in one that is there, files are replaced when all have been written beside them.

    Raises CheckpointError for a model whose weights are packed, or were given to a FastMinMo, and for a full disk.
    """
    if model.state_dict().keys() != shapes(model.config).state_dict().keys():
        raise CheckpointError(
            "this model does not hold its weights as they are stored (they are packed, or were given to a FastMinMo): "
            "save the MinMo before, or make the FastMinMo with keep_model=True"
        )
    folder = Path(directory)
    if not folder.exists():
        with whole(folder) as part:
            _write(model, part, shard)
        return
    beside = folder / ".saved"
    shutil.rmtree(beside, ignore_errors=True)
    with whole(beside) as part:
        _write(model, part, shard)
    written = {file.name for file in beside.iterdir()}
    for file in beside.iterdir():
        file.replace(folder / file.name)
    beside.rmdir()
    for old in folder.glob("model*.safetensors*"):
        if old.name not in written:
            old.unlink()


def _write(model: MinMo, folder: Path, shard: int) -> None:
    state = {name: Weight.of(tensor.detach(), model.config.name) for name, tensor in model.state_dict().items()}
    files = write(state, folder, shard=shard)
    (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")
    names = ["config.json"]
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer.json")
        names.append("tokenizer.json")
    manifest.write(folder, model.origins, files | {name: Stamp.of(folder / name) for name in names})


def _folder(preset_or_dir: str | Path) -> Path:
    """Where a checkpoint's files lie; a preset's are package data."""
    if str(preset_or_dir) in presets():
        return Path(str(resources.files("minmo") / "assets" / str(preset_or_dir)))
    return Path(preset_or_dir)


def _random(config: MinMoConfig, device: torch.device, dtype: torch.dtype) -> MinMo:
    model = shapes(config)
    if device.type == "meta":
        return model.to(dtype)
    need = 4 * sum(t.numel() for t in model.state_dict().values())  # drawn in fp32, on the host
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > 0.8 * have:
        raise CheckpointError(
            f"random weights for {config.name} take {need / 1e9:.1f} GB and this machine has {have / 1e9:.1f} GB; "
            'use device="meta" to inspect it, or give a checkpoint directory'
        )
    with torch.random.fork_rng(devices=[]):  # the CPU's generator alone, which is what draws here
        torch.default_generator.manual_seed(RANDOM_SEED)
        model = MinMo(config)
    model.provenance = f"random weights (seed {RANDOM_SEED})"
    drawn = Origin("random", made_by=manifest.made_by(), seed=RANDOM_SEED)
    parts = [name for name, part in model.named_children() if next(part.parameters(), None) is not None]
    model.origins = dict.fromkeys([*parts, "voice_decoder.output_projector"], drawn)
    return model.to(device, dtype)


def _check(where: str, ours: dict[str, tuple[int, ...]], stored: Weights) -> None:
    """Holds all names and shapes against the configuration's, before the first tensor is read."""
    for name, shape in ours.items():
        if name not in stored:
            raise CheckpointError(f"{where} lacks the tensor {name!r} of shape {shape}")
    for name, weight in stored.items():
        if name not in ours:
            raise CheckpointError(f"{where} has the tensor {name!r}, which this configuration does not know")
        if weight.shape != ours[name]:
            raise CheckpointError(
                f"{where}: {name!r} has the shape {weight.shape}, the configuration wants {ours[name]}"
            )


def pick_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise CheckpointError(f"device must be cpu, cuda, cuda:N or meta, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda", "meta"):
        raise CheckpointError(f"device must be cpu, cuda, cuda:N or meta, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device {device!r} was asked for, but PyTorch sees no GPU; use cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"device {device!r} was asked for, but PyTorch sees {torch.cuda.device_count()} GPUs")
    return chosen


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    value = names.get(dtype) if isinstance(dtype, str) else dtype
    if value is None or value not in names.values():
        raise CheckpointError(f"dtype must be one of {', '.join(names)}, got {dtype!r}")
    return value
