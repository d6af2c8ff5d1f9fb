"""Every operation, from its declaration: oracle, laws, batch independence, dispatch, torch.library registration."""

from __future__ import annotations

import importlib
import pkgutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import minmo_kernels as mk
from minmo_kernels import ops
from minmo_kernels.dispatch import OPS, intercept
from minmo_kernels.spec import SPECS
from minmo_kernels.testing import assert_as_good_as_reference, assert_reference_matches, outputs

for _module in pkgutil.iter_modules(ops.__path__):
    importlib.import_module(f"minmo_kernels.ops.{_module.name}.spec")

NAMES = sorted(SPECS)
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def copied(arguments):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def run(spec, arguments):
    """Outputs, then mutated arguments; the caller's tensors stay as they are."""
    arguments = copied(arguments)
    result = outputs(spec.function(**arguments))
    return (*result, *(arguments[name] for name in spec.mutates if arguments[name] is not None))


def close(actual, expected, dtype):
    if not actual.is_floating_point():
        return torch.equal(actual, expected)
    return torch.allclose(actual, expected, rtol=1e-2 if dtype != "float32" else 1e-4, atol=1e-5, equal_nan=True)


def test_every_operation_is_declared():
    assert NAMES == sorted(OPS)
    for name in NAMES:
        assert getattr(mk, name) is SPECS[name].function
        assert SPECS[name].function.__doc__, name


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_fp64_oracle(name):
    spec = SPECS[name]

    @EXAMPLES
    @given(spec.draw(st))
    def check(case):
        arguments = spec.make(case)
        with mk.use_backend("reference"):
            actual = run(spec, arguments)
        for a, exact in zip(actual, spec.oracle(**arguments), strict=True):
            assert_reference_matches(a, exact, spec.slack(case))

    check()


@pytest.mark.parametrize("name", [n for n in NAMES if len(OPS[n].backends) > 1])
def test_every_backend_is_as_good_as_the_reference(name):
    spec, op = SPECS[name], OPS[name]
    served = set()

    @EXAMPLES
    @given(spec.draw(st))
    def check(case):
        arguments = spec.make(case)
        if "return_lse" in arguments:
            arguments["return_lse"] = False
        with mk.use_backend("reference"):
            reference = run(spec, arguments)
        exact = spec.oracle(**arguments)
        for verdict in mk.explain(spec.function, **arguments).verdicts:
            if verdict.backend == "reference" or verdict.reason is not None:
                continue
            served.add(verdict.backend)
            with mk.use_backend(verdict.backend):
                actual = run(spec, arguments)
            for a, r, e in zip(actual, reference, exact, strict=False):
                assert_as_good_as_reference(a, r, e)

    check()
    assert served or all(b.name != "torch" for b in op.backends)


@pytest.mark.parametrize("name,law", [(n, law) for n in NAMES for law in sorted(SPECS[n].invariants)])
def test_law(name, law):
    @EXAMPLES
    @given(SPECS[name].draw(st))
    def check(case):
        SPECS[name].invariants[law](case)

    check()


@pytest.mark.parametrize("name", [n for n in NAMES if SPECS[n].batched])
def test_batch_order_and_neighbours_do_not_matter(name):
    spec = SPECS[name]

    @settings(EXAMPLES, max_examples=15)
    @given(spec.draw(st))
    def check(case):
        arguments = spec.make(case)
        batch = arguments[spec.batched[0]].shape[0]
        out = outputs(spec.function(**copied(arguments)))
        order = torch.arange(batch).flip(0)
        flipped = copied(arguments)
        for key in spec.batched:
            if arguments[key] is not None:
                flipped[key] = arguments[key][order]
        for a, b in zip(out, outputs(spec.function(**flipped)), strict=True):
            if a.shape[:1] == (batch,):
                assert close(b, a[order], case["dtype"])
        if arguments.get("rows") is None:
            return
        alone = copied(arguments)
        alone["rows"] = torch.where(torch.arange(batch) == 0, alone["rows"], -1).to(torch.int32)
        for a, b in zip(out, outputs(spec.function(**alone)), strict=True):
            if a.shape[:1] == (batch,):
                assert torch.equal(a[0].nan_to_num(7.0), b[0].nan_to_num(7.0)), "a neighbour changed the output"

    check()


@pytest.mark.parametrize("name", NAMES)
def test_torch_library_registration(name):
    spec = SPECS[name]
    seen = []

    @settings(EXAMPLES, max_examples=1)
    @given(spec.draw(st))
    def check(case):
        op, arguments = intercept(spec.function, **spec.make({**case, "dtype": "float32"}))
        assert op is OPS[name]
        seen.append(torch.library.opcheck(op.torch_op, arguments))

    check()
    assert seen
