"""Launching, with a compiler and a GPU that the test plays: what `warmup` compiles is what calls look up."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from minmo_kernels import dispatch, launch
from minmo_kernels.ops.linear_residual.spec import SPEC as LINEAR
from minmo_kernels.ops.streaming_attention.spec import SPEC as ATTENTION

pytestmark = pytest.mark.skipif(not launch.AVAILABLE, reason="triton is not installed")
CASES = {
    "linear_residual": (LINEAR, {"weights": "int8", "batch": 8, "dim_in": 256, "dim_out": 64, "residual": True}),
    "streaming_attention": (
        ATTENTION,
        {"form": "causal", "batch": 2, "queries": 1, "heads": (4, 2), "dim": 64, "capacity": 12, "int8": False,
         "scale": None, "all_queries": True},
    ),
}  # fmt: skip


@pytest.fixture
def played(monkeypatch):
    """A GPU of capability 9.0 whose kernels do nothing -> the launches that ran."""
    ran = []
    stub = SimpleNamespace(function=0, packed_metadata=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(launch, "INTERPRETING", False)
    kernels = [importlib.import_module(f"minmo_kernels.ops.{spec.name}.kernel") for spec, _ in CASES.values()]
    for module in (launch, *kernels):
        monkeypatch.setattr(module, "target", lambda tensor: 90)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_warmed", False)
    monkeypatch.setattr(launch, "_compile", lambda *_: (stub, lambda *a: ran.append(a), ()))
    return ran


def called(spec, case):
    """Runs an operation's kernel with a model's kind of tensors: weights are Parameters."""
    given = spec.make(case)
    if "weight" in given and given["weight"].is_floating_point():
        given["weight"] = torch.nn.Parameter(given["weight"], requires_grad=False)
    _, arguments = dispatch.intercept(spec.function, **given)
    importlib.import_module(f"minmo_kernels.ops.{spec.name}.kernel").run(*arguments)


@pytest.mark.parametrize("name", CASES)
def test_a_call_finds_what_warmup_compiled(name, played):
    spec, sizes = CASES[name]
    case = {"dtype": "bfloat16", "seed": 0, **sizes}
    assert launch.warmup([(spec.function, spec.make(case))], device="cpu") > 0
    with dispatch.strict():
        called(spec, case)
        assert played
        with pytest.raises(dispatch.BackendError, match=r"compiles after warmup\(\); add a case for"):
            called(spec, {**case, "dtype": "float16"})
    called(spec, {**case, "dtype": "float16"})


def test_a_parameter_is_a_tensor_and_a_lesser_alignment_another_binary(played):
    spec, sizes = CASES["linear_residual"]
    case = {"dtype": "float32", "seed": 0, **sizes, "weights": "full"}
    called(spec, case)
    (key,) = launch._compiled
    assert (torch.float32, True) in key[2]
    assert torch.nn.Parameter not in key[2]
    x = torch.zeros(65)[1:]
    assert launch._key(None, (x,), {}) != launch._key(None, (torch.zeros(64),), {})
