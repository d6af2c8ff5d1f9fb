"""What an operation is, as data: one `OpSpec` feeds property tests, compile gate, benchmarks, roofline and docs.

A case is plain values only (sizes, flags, a dtype name, a seed), so that it prints, hashes and travels as JSON;
`make` turns it into tensors with a seeded generator, with NaN wherever nothing may be read.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Case = Mapping[str, Any]

SPECS: dict[str, OpSpec] = {}
"""All specs by operation name."""


@dataclass(frozen=True)
class OpSpec:
    """An operation's declaration.

    function: the public function; make(case) gives its keyword arguments. draw(st): a hypothesis strategy of cases,
    given the module `hypothesis.strategies` (the package itself does not import it). oracle: an independent fp64
    formulation with the function's keyword arguments, returning its outputs in a tuple, then what `mutated` gives.
    cases(dims): the cases that a model with these sizes uses. bytes, flops: what one call must move and compute.
    invariants: laws beyond the oracle, each a function of a case that asserts.
    """

    name: str
    function: Callable[..., Any]
    draw: Callable[[Any], Any]
    make: Callable[[Case], dict[str, Any]]
    oracle: Callable[..., tuple[Any, ...]]
    cases: Callable[[Mapping[str, int]], Iterable[Case]]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    mutates: tuple[str, ...] = ()
    variants: tuple[Mapping[str, Any], ...] = ()
    """Changes to a case that launch other kernels or configurations than `cases` do, for the compile gate."""
    batched: tuple[str, ...] = ()
    """Arguments whose first axis is the batch (`rows` included): permuting them permutes the outputs."""
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    cost: int = 1
    """How many of another operation's examples one of this takes as long as: property tests draw so many fewer."""
    invariants: Mapping[str, Callable[[Case], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SPECS[self.name] = self

    def mutated(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a call has left in the arguments that it writes. Not in int8 ones, where a number at a boundary may be
        rounded either way: for those an operation has a law."""
        written = [arguments[name] for name in self.mutates if arguments[name] is not None]
        return tuple(x for x in written if x.dtype != torch.int8)

    def cases_of(self, parts: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, Case]]:
        """(part, case) for every part of a model, sizes by name, whose sizes this operation's cases are made of.

        Such cases are `filled`: no entry is padding and every length is as large as the cost counts it.
        """
        for part, dims in parts.items():
            try:
                yield from ((part, {"filled": True, **case}) for case in list(self.cases(dims)))
            except KeyError:
                continue


def load_all() -> dict[str, OpSpec]:
    """Imports every operation's spec -> SPECS, in the order of their names."""
    from minmo_kernels import ops

    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"minmo_kernels.ops.{module.name}.spec")
    return dict(sorted(SPECS.items()))
