"""Loading and saving a MinMo, strictly: every tensor by name and shape, safetensors only, never the network."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minmo.config import MinMoConfig, load_config, presets
from minmo.model import MinMo, shapes
from minmo.tokenizer.text import TextTokenizer
from minmo.weights.stored import CheckpointError

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
    weights = folder / _WEIGHTS
    if device.type == "meta" or not weights.is_file():
        if str(preset_or_dir) not in presets():
            raise CheckpointError(f"{folder} has no {_WEIGHTS}; put the weights there (safetensors only)")
        return untrained(str(preset_or_dir), device, dtype)
    model = shapes(config)
    tensors = _read(weights, {k: v.shape for k, v in model.state_dict().items()}, device, dtype)
    model.load_state_dict(tensors, assign=True)
    model.trained = True
    model.provenance = f"weights from {weights.name} of {preset_or_dir}"
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


def save(model: MinMo, directory: str | Path) -> None:
    """Writes `config.json`, `model.safetensors` and `tokenizer.json`; `load` gives the same tensors back.

    Raises CheckpointError for a model whose weights are packed, or were given to a FastMinMo, and for a full disk.
    """
    if model.state_dict().keys() != shapes(model.config).state_dict().keys():
        raise CheckpointError(
            "this model does not hold its weights as they are stored (they are packed, or were given to a FastMinMo): "
            "save the MinMo before, or make the FastMinMo with keep_model=True"
        )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, folder / _WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / _WEIGHTS} could not be written ({error}): make room and save again") from None
    (folder / "config.json").write_text(model.config.to_json(), encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(folder / "tokenizer.json")


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
    return model.to(device, dtype)


def _read(path: Path, shapes: dict[str, torch.Size], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a file, checked against names and shapes before the first one is read."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            stored = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}
            for name in shapes:
                if name not in stored:
                    raise CheckpointError(f"{path} lacks the tensor {name!r} of shape {tuple(shapes[name])}")
            for name, shape in stored.items():
                if name not in shapes:
                    raise CheckpointError(f"{path} has the tensor {name!r}, which this configuration does not know")
                if shape != shapes[name]:
                    raise CheckpointError(
                        f"{path}: {name!r} has the shape {tuple(shape)}, the configuration wants {tuple(shapes[name])}"
                    )
            return {name: _usable(path, name, file.get_tensor(name), dtype) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _usable(path: Path, name: str, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored tensor as a weight."""
    if stored.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{path}: {name!r} is {stored.dtype}; weights are float32, bfloat16 or float16")
    tensor = stored.to(dtype)
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{path}: {name!r} holds NaN or infinite numbers as {str(dtype).removeprefix('torch.')}; export it again"
        )
    return tensor


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
