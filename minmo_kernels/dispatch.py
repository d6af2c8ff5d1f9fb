"""Which code serves an operation: the operation's name is its meaning, a backend is how.

Each backend states a predicate that answers None (it serves) or a reason (why not). The choice depends on the
operation, the device, the dtype and the operation's features (masks, cache form: never lengths), is made once for
each such combination and is a table look-up afterwards: no environment reads and no probing in a call.

Every operation is also registered with `torch.library` as `minmo_kernels::<name>`, with its mutated arguments declared
and a fake function, so that `torch.compile(fullgraph=True)` and `torch.export` see one opaque operation. Eager code
calls the chosen backend directly, so autograd sees through the references; a compiled call that needs a gradient traces
through the reference for the same reason.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("minmo_kernels", "FRAGMENT")
OPS: dict[str, Op] = {}
"""All operations by name, in the order of registration."""

# Of a thread or an asynchronous task, so that forcing a backend in one never reaches another.
_FORCED = os.environ.get("MINMO_KERNELS_BACKEND") or None
_forced: ContextVar[str | None] = ContextVar("forced", default=_FORCED)
_strict: ContextVar[bool] = ContextVar("strict", default=False)
_words: ContextVar[torch.Tensor | None] = ContextVar("words", default=None)
_intercepting: ContextVar[bool] = ContextVar("intercepting", default=False)


class BackendError(RuntimeError):
    """A forced backend, or strict mode, cannot be satisfied."""


@dataclass(frozen=True)
class Request:
    """What a backend's predicate may look at: everything that decides the choice, and no lengths."""

    device: str
    capability: tuple[int, int] | None
    dtypes: tuple[torch.dtype, ...]
    """Of the tensor arguments in schema order."""
    contiguous: bool
    """Every tensor is."""
    grad: bool
    """The call must be differentiable."""
    current: bool
    """A GPU call's device is the one that launches go to."""
    forced: bool
    """A backend is forced, by name."""
    features: dict[str, Any]


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation.

    run: takes the operation's arguments in schema order. refuses: None when it serves a request, else the reason.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Request], str | None] = lambda request: None


@dataclass(frozen=True)
class Verdict:
    """One backend's answer in an explanation."""

    backend: str
    reason: str | None
    chosen: bool

    def __str__(self) -> str:
        answer = "accepts" if self.reason is None else f"refuses: {self.reason}"
        return f"{'->' if self.chosen else '  '} {self.backend}: {answer}"


@dataclass(frozen=True)
class Explanation:
    """Every backend of an operation for one call, with reasons; `->` marks the one that runs (none where a forced one
    refuses)."""

    op: str
    request: Request
    verdicts: tuple[Verdict, ...]
    forced: str | None

    def __str__(self) -> str:
        features = ", ".join(f"{k}={v}" for k, v in self.request.features.items())
        where = self.request.device + ("" if self.request.capability is None else f" sm_{self._sm}")
        dtype = str(self.request.dtypes[0]).removeprefix("torch.")
        head = f"{self.op} on {where}, {dtype}, {features or 'no features'}"
        if self.forced is not None:
            head += f"; forced: {self.forced}"
            if self.forced not in [v.backend for v in self.verdicts]:
                head += ", which it does not have: the call raises BackendError"
        return "\n".join([head, *map(str, self.verdicts)])

    @property
    def _sm(self) -> str:
        return "".join(map(str, self.request.capability or ()))


class Op:
    """A registered operation.

    schema: torch.library schema without the name, mutated arguments as `Tensor(a!)`. reference: the oracle, always
    the last choice. fake: output shapes and dtypes for tracing. features: what of a call, besides device and dtype of
    the first argument, may decide the backend (hashable values, never lengths).
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        features: Callable[..., dict[str, Hashable]] = lambda *args: {},
        backends: tuple[Backend, ...] = (),
    ) -> None:
        self.name = name
        self.backends = (*backends, Backend("reference", reference))
        self._features = features
        self._table: dict[Hashable, Backend] = {}
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"minmo_kernels::{name}", fake, lib=_LIBRARY)
        self.torch_op = getattr(torch.ops.minmo_kernels, name).default
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.backends[-1].run(*args) if _needs_grad(args) else self.torch_op(*args)
        if _intercepting.get():
            raise _Intercepted(self, args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Backend:
        """The backend that serves this call. Raises BackendError where a forced one or strict mode cannot."""
        features = self._features(*args)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        dtypes = tuple([t.dtype for t in tensors])
        contiguous = all([t.is_contiguous() for t in tensors])
        grad = _needs_grad(tensors)
        key = (
            args[0].device,
            _is_current(args[0].device),
            dtypes,
            contiguous,
            grad,
            _forced.get(),
            _strict.get(),
            *features.values(),
        )
        backend = self._table.get(key)
        if backend is None:
            backend = self._select(self.request(*args))
            if args[0].device.type != "meta":
                self._table[key] = backend
        return backend

    def request(self, *args: Any) -> Request:
        """What backends are asked about a call."""
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        device = args[0].device
        return Request(
            device=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtypes=tuple([t.dtype for t in tensors]),
            contiguous=all([t.is_contiguous() for t in tensors]),
            grad=_needs_grad(tensors),
            current=_is_current(device),
            forced=_forced.get() is not None,
            features=self._features(*args),
        )

    def _select(self, request: Request) -> Backend:
        if (forced := _forced.get()) is not None:
            for backend in self.backends:
                if backend.name == forced:
                    if reason := backend.refuses(request):
                        raise BackendError(f"{self.name}: the forced backend {forced!r} cannot serve: {reason}")
                    return backend
            known = ", ".join(b.name for b in self.backends)
            raise BackendError(f"{self.name} has no backend {forced!r}; it has {known}")
        chosen = next(b for b in self.backends if b.refuses(request) is None)
        if _strict.get() and chosen.name == "reference":
            raise BackendError(f"strict mode: only the reference serves this call\n{self._explain(request)}")
        return chosen

    def _explain(self, request: Request) -> Explanation:
        reasons = [(b.name, b.refuses(request)) for b in self.backends]
        first = next(name for name, reason in reasons if reason is None)
        chosen = _forced.get() or first
        verdicts = tuple(Verdict(n, r, n == chosen and r is None) for n, r in reasons)
        return Explanation(self.name, request, verdicts, _forced.get())


def backends_in_use() -> dict[str, list[str]]:
    """For each operation called so far in this process, the backends that served it."""
    used = {name: sorted({b.name for b in op._table.values()}) for name, op in OPS.items()}
    return {name: backends for name, backends in used.items() if backends}


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `function(*args, **kwargs)`, and why not the others. Runs nothing.

    >>> print(minmo_kernels.explain(minmo_kernels.rms_norm, x, weight, eps=1e-6))
    """
    op, arguments = intercept(function, *args, **kwargs)
    return op._explain(op.request(*arguments))


def intercept(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Op, tuple[Any, ...]]:
    """The operation that a public function reaches and its arguments in schema order, without running it."""
    tokens = _intercepting.set(True), _words.set(None)
    try:
        function(*args, **kwargs)
    except _Intercepted as call:
        return call.op, call.args
    finally:
        _intercepting.reset(tokens[0])
        _words.reset(tokens[1])
    raise TypeError(f"{function!r} is not an operation of minmo_kernels")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for all operations inside the block. One that cannot serve raises BackendError. A call that
    torch.compile traces and that needs a gradient is the reference's all the same."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def strict(words: torch.Tensor | None = None) -> Iterator[None]:
    """Inside the block, a call that only the reference could serve raises BackendError, with every backend's reason.

    words: (batch or more,) int32 on the operations' device. Then every call also checks the numbers that say where to
    read and write (rows, lengths, counts, ids): an entry for which one is out of range counts as padding, and the
    `Fault` is set in its word, on the device, without a synchronisation, so in captured graphs too. Without words these
    numbers are checked on a CPU, where they raise ValueError; elsewhere a call with bad ones is undefined, and so it is
    in code that torch.compile has traced. On a CPU, where many operations have the reference alone, use
    `use_backend("reference")` along with words.
    """
    if words is not None and not (isinstance(words, torch.Tensor) and words.dtype == torch.int32 and words.dim() == 1):
        raise ValueError("strict(words) needs a tensor (batch or more,) int32 on the operations' device")
    tokens = _strict.set(True), _words.set(words)
    try:
        yield
    finally:
        _strict.reset(tokens[0])
        _words.reset(tokens[1])


def as_usual() -> bool:
    """Whether nothing is asked of the calls in this block alone: no backend is forced here, no error words are kept."""
    return _forced.get() == _FORCED and _words.get() is None


def is_strict() -> bool:
    """Whether the call is inside `strict()`."""
    return _strict.get()


class Fault(enum.IntFlag):
    """Bits of an error word: see `strict`."""

    ROW = 1
    """rows names a session that does not exist."""
    LENGTH = 2
    """A length or a count that the input or the cache cannot hold."""
    ID = 4
    """A token id outside its table."""
    NUMBER = 8
    """NaN where a choice is made from numbers, or nothing left to choose from."""


Rule = tuple[Fault, Callable[[torch.Tensor], torch.Tensor], Callable[[int], str]]
"""A check of values: what it finds; which entries are wrong, (batch,) bool, given each one's session (batch,) int64;
and the message about one of them."""


def checked_rows(op: str, rows: torch.Tensor, sessions: int | None, *rules: Rule) -> torch.Tensor:
    """`rows` after the checks of values, for the active entries: raises on a CPU, makes padding of them under
    `strict(words)`, and does nothing otherwise. sessions: how many there are, None where no state is read."""
    check(sessions != 0, lambda: f"{op}: there are no sessions, the tensors of their state have no rows")
    if torch.compiler.is_compiling():
        return rows
    words = _words.get()
    if words is None and not rows.is_cpu:
        return rows
    if words is not None and (len(words) < len(rows) or words.device != rows.device):
        raise ValueError(f"{op}: strict(words) needs at least {len(rows)} words, one a batch entry, on {rows.device}")
    last = 2**31 - 1 if sessions is None else sessions - 1
    beyond: Rule = (
        Fault.ROW,
        lambda _: rows > last,
        lambda entry: f"rows names session {int(rows[entry])} of {sessions}",
    )
    session = rows.clamp(0, last).long()
    for fault, find, message in (beyond, *rules):
        wrong = find(session) & (rows >= 0)
        if words is not None:
            words[: len(rows)].bitwise_or_(wrong.int() * fault)
            rows = torch.where(wrong, -1, rows)
        elif bool(wrong.any()):
            raise ValueError(f"{op}: {message(int(wrong.nonzero()[0]))}")
    return rows


def check(condition: bool, message: Callable[[], str]) -> None:
    """Argument validation of the public functions; the message is built only when it is needed."""
    if not condition:
        raise ValueError(message())


def check_tensor(op: str, name: str, tensor: torch.Tensor, shape: str, device: torch.device, *dtypes: Any) -> None:
    """Checks one argument against a shape such as "batch T heads dim", a device and the allowed dtypes (none = any)."""
    axes = shape.split()
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor ({', '.join(axes)}), got {type(tensor).__name__}")
    if tensor.dim() != len(axes):
        raise ValueError(f"{op}: {name} must have the shape ({', '.join(axes)}), got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the first argument is on {device}; move it there")
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_number(op: str, name: str, value: float, least: float = -math.inf) -> None:
    """Checks that a setting is finite and no less than `least`."""
    if not (math.isfinite(value) and value >= least):
        bound = "" if least == -math.inf else f" from {least:g} on"
        raise ValueError(f"{op}: {name} must be a finite number{bound}, got {value}")


def check_counts(op: str, name: str, counts: torch.Tensor, batch: int, most: int) -> Rule:
    """Checks that counts has one entry a batch entry -> the rule that each lies in 0 .. most."""
    if len(counts) != batch:
        raise ValueError(f"{op}: {name} has {len(counts)} entries for a batch of {batch}")
    return (
        Fault.LENGTH,
        lambda _: (counts < 0) | (counts > most),
        lambda _: f"{name} must lie in 0 .. {most}, got {counts.tolist()}",
    )


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of the numbers that an operation computes with."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a reference computes in: fp32 for anything narrower, the input's own precision otherwise."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _needs_grad(arguments: Iterable[Any]) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and any([isinstance(a, torch.Tensor) and a.requires_grad for a in arguments])


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


class _Intercepted(Exception):
    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        super().__init__(op.name)
        self.op, self.args = op, args
