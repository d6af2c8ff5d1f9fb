"""What a bug report needs: versions, machine, devices, and every operation's backends with their reasons."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from minmo.config import load_config, presets
from minmo.info import kernel_dims
from minmo_kernels import explain
from minmo_kernels.dispatch import Explanation
from minmo_kernels.spec import load_all

PACKAGES = (
    "minmo",
    "torch",
    "triton",
    "numpy",
    "einops",
    "safetensors",
    "tokenizers",
    "soundfile",
    "soxr",
    "flash-attn",
    "xformers",
)


def versions() -> list[tuple[str, str]]:
    """(package, version or "not installed")."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return [("python", platform.python_version()), *((name, version(name)) for name in PACKAGES)]


def machine(device: torch.device | None = None) -> str:
    """The machine in words: processor or GPU, cores, threads, memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{_memory()}"


def devices() -> list[str]:
    """The CPU, then every GPU."""
    gpus = [
        f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 1e9:.0f} GB"
        for i, p in enumerate(torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]
    return [f"cpu {machine()}", *(gpus or ["no CUDA device"])]


def explanations(device: str) -> Iterator[Explanation]:
    """For every operation: which backends serve a typical nano case in fp32 on this device, and why not the others."""
    parts = kernel_dims(load_config("nano"), capacity=1024)
    for spec in load_all().values():
        _, case = next(spec.cases_of(parts))
        arguments = spec.make({**case, "dtype": "float32"})
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        yield explain(spec.function, **moved)


def report() -> str:
    """The whole report as text."""
    lines = [f"{name:12} {version}" for name, version in versions()]
    lines += ["", f"platform     {platform.platform()}", *(f"device       {d}" for d in devices())]
    lines += [f"presets      {', '.join(presets())}"]
    lines += [f"environment  {k}={v}" for k, v in sorted(os.environ.items()) if k in _VARIABLES]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        lines += ["", *(str(e) for e in explanations(device))]
    return "\n".join(lines)


_VARIABLES = ("MINMO_KERNELS_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return ""
    return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
