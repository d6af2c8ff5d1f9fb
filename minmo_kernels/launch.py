"""Launching Triton kernels: a cached path for eager calls, compilation ahead of use, and a watch on late compiles.

Kernels take their run-time arguments first and their constants after them, in the order of their signature; run-time
integers are never specialised on. So a compiled kernel is found by dtypes and constants alone, and no length, position
or row count ever causes a compilation.

`recording(target)` collects launches without running them (on meta tensors, say): from such records come `warmup`, the
compile gate and the static report, so what they see is what a call launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from minmo_kernels import dispatch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on a CPU, through Triton's interpreter. Decided by the environment when this module is imported."""
AVAILABLE = importlib.util.find_spec("triton") is not None

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_cooperative_grid", "maxnreg")
COOPERATIVE_LAUNCH = 95
"""CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH of the driver's interface."""
_compiled: dict[Any, Any] = {}
_warmed = False
# Of a thread or an asynchronous task: what one records, another must run.
_warming: ContextVar[torch.device | None] = ContextVar("warming", default=None)
_recording: ContextVar[tuple[int, list[Launch]] | None] = ContextVar("recording", default=None)


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid, run-time arguments, constants by name, compiler options by name."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).strip("_")

    @property
    def key(self) -> str:
        """What tells its binary from others: kernel, dtypes, absent arguments, constants, options."""
        kinds = [str(a.dtype).removeprefix("torch.") for a in self.arguments if isinstance(a, torch.Tensor)]
        names = self.kernel.arg_names
        absent = [f"-{names[i].removesuffix('_ptr')}" for i, a in enumerate(self.arguments) if a is None]
        values = [f"{k}={v}" for k, v in {**self.constants, **self.options}.items()]
        return " ".join([self.name, *dict.fromkeys(kinds), *absent, *values])


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` over `grid`. arguments: run-time ones in signature order, None where absent. constants: the rest
    of the signature in its order, then compiler options (`OPTIONS`). A grid of no programs runs nothing.

    Raises BackendError in strict mode where it would compile after `warmup`.
    """
    if 0 in grid:
        return
    constants.setdefault("enable_fp_fusion", True)
    if (recording := _recording.get()) is not None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        recording[1].append(Launch(kernel, grid, arguments, constants, options))
    elif INTERPRETING:
        kernel[grid](*arguments, **{k: v for k, v in constants.items() if k not in OPTIONS})
    else:
        _run(kernel, grid, arguments, constants)


def compiled_for(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> Any:
    """The compiled kernel that `launch` runs for these arguments, on the current GPU: registers and shared memory."""
    constants.setdefault("enable_fp_fusion", True)
    return _found(kernel, grid, arguments, constants)[0]


def _found(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, Any, tuple[Any, ...]]:
    key = _key(kernel, arguments, constants)
    found = _compiled.get(key)
    if found is None:
        if _warmed and dispatch.is_strict():
            raise dispatch.BackendError(f"{kernel.fn.__name__} compiles after warmup(); add a case for {key[2:]}")
        found = _compiled[key] = _compile(kernel, grid, arguments, constants)
    return found


def _run(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    compiled, run, fixed = _found(kernel, grid, arguments, constants)
    stream = torch.cuda.current_stream().cuda_stream
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *fixed)


def _compile(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, Any, tuple[Any, ...]]:
    compiled = kernel.warmup(*arguments, grid=grid, **constants)
    return compiled, compiled.run, tuple([v for k, v in constants.items() if k not in OPTIONS])


def _key(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """What decides a binary: kernel, device, dtype and alignment of every tensor, which arguments are absent, constants
    and options. Options come in any order."""
    kinds = tuple([(a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else type(a) for a in arguments])
    options = tuple([constants.get(name) for name in OPTIONS])
    fixed = tuple([v for k, v in constants.items() if k not in OPTIONS])
    return (kernel, torch.cuda.current_device(), kinds, fixed, options)


@contextlib.contextmanager
def recording(sm: int) -> Iterator[list[Launch]]:
    """Inside the block, launches are collected and not run, as a GPU of compute capability `sm` (90 = 9.0) would see
    them. Results of operations are then meaningless."""
    records: list[Launch] = []
    token = _recording.set((sm, records))
    try:
        yield records
    finally:
        _recording.reset(token)


def target(tensor: torch.Tensor) -> int:
    """Compute capability that a launch on `tensor`'s device is for (90 = 9.0); 0 for the interpreter."""
    if (recording := _recording.get()) is not None:
        return recording[0]
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@functools.cache
def cooperative(device: torch.device) -> bool:
    """Whether a GPU and its driver have cooperative launches, whose blocks are all on the chip at once."""
    value = ctypes.c_int(0)
    cuda = ctypes.CDLL("libcuda.so.1")
    index = torch.cuda.current_device() if device.index is None else device.index
    return cuda.cuDeviceGetAttribute(ctypes.byref(value), COOPERATIVE_LAUNCH, index) == 0 and value.value == 1


def launches(function: Callable[..., Any], arguments: dict[str, Any], sm: int) -> list[Launch]:
    """What a public operation would launch for these arguments on a GPU of capability `sm`; only shapes are read."""
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with recording(sm) as records, dispatch.use_backend("triton"):
        function(**on_meta)
    return records


def warmup(calls: Iterable[tuple[Callable[..., Any], dict[str, Any]]], device: str = "cuda") -> int:
    """Compiles ahead what `function(**arguments)` would launch for each call, without running it; returns how many
    kernels that were. Tensors may be on the meta device. Afterwards `strict()` raises on any late compile.

    Raises BackendError for a call that the Triton backend refuses, with the reason.
    """
    global _warmed
    before = len(_compiled)
    here = torch.empty(0, device=device)  # its device has an index, as the device of every tensor there
    current = torch.cuda.device(here.device) if here.is_cuda else contextlib.nullcontext()
    token = _warming.set(here.device)
    try:
        with current:
            for function, arguments in calls:
                for record in launches(function, arguments, target(here)):
                    constants = {**record.constants, **record.options}
                    key = _key(record.kernel, record.arguments, constants)
                    if key not in _compiled:
                        _compiled[key] = _compile(record.kernel, record.grid, record.arguments, constants)
    finally:
        _warming.reset(token)
    _warmed = True
    return len(_compiled) - before


def lookup_table(make: Callable[..., torch.Tensor], *arguments: Any, device: torch.device) -> torch.Tensor:
    """make(*arguments, device), which must be cached: a kernel's constant table. `warmup` has it made on the device
    that it warms, since a copy to a GPU cannot be part of a captured graph."""
    if (warming := _warming.get()) is not None:
        make(*arguments, warming)
    return make(*arguments, device)


def triton_backend(
    operation: str, refuses: Callable[[dispatch.Request], str | None] = lambda request: None, backward: bool = False
) -> dispatch.Backend:
    """The backend whose `run` stands in the operation's `kernel.py`, imported at the first call that it serves.

    refuses: what this operation's kernel does not serve, besides what none does. backward: it is differentiable.
    """

    def run(*arguments: Any) -> Any:
        return importlib.import_module(f"minmo_kernels.ops.{operation}.kernel").run(*arguments)

    return dispatch.Backend("triton", run, lambda request: _refuses(request, backward) or refuses(request))


def _refuses(request: dispatch.Request, backward: bool) -> str | None:
    if not AVAILABLE:
        return "triton is not installed"
    if not request.current:
        return "its device is not the current one; call torch.cuda.set_device"
    if request.device == "cpu" and not INTERPRETING:
        return "on a CPU it needs TRITON_INTERPRET=1, set before the import"
    if request.device == "meta" and _recording.get() is None:
        return "meta tensors hold nothing to compute"
    if request.device not in ("cpu", "cuda", "meta"):
        return f"it does not run on {request.device}"
    if request.capability is not None and request.capability < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if torch.float64 in request.dtypes:
        return "its floating-point dtypes are float32, float16 and bfloat16, not float64"
    if request.device == "cpu" and torch.bfloat16 in request.dtypes:
        return "Triton's interpreter computes bfloat16 wrongly"
    if request.grad and not backward:
        return "it has no backward; the reference serves training"
    if not request.contiguous:
        return "a tensor is not contiguous; call .contiguous() on it"
    return None


def triton_dtype(dtype: torch.dtype) -> Any:
    """The same dtype in Triton's language."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
