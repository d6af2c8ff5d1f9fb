"""The Triton kernels: against the fp64 oracles through Triton's interpreter, and what they refuse and compile.

The numbers run with TRITON_INTERPRET=1 (a process of its own: the switch is read at import) or on a GPU; what needs no
numbers runs everywhere.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import minmo_kernels as mk
from minmo.config import load_config, presets
from minmo_kernels import launch, tuning
from minmo_kernels.dispatch import OPS, BackendError
from minmo_kernels.spec import load_all
from minmo_kernels.testing import assert_as_good_as_reference, outputs

SPECS = load_all()
NAMES = list(SPECS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["float32", "float16"] if DEVICE == "cpu" else ["float32", "float16", "bfloat16"]
EXAMPLES = int(os.environ.get("MINMO_EXAMPLES", "200"))
"""Examples an operation, a fiftieth of them a law; 5000 is the deep profile."""
# Without shrinking, which would interpret a failing kernel hundreds of times; the cases are small as they are.
RUN = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LAW = settings(RUN, max_examples=max(4, EXAMPLES // 50))


def fewer(spec, usual=RUN):
    """The settings of an operation, with fewer examples where they take long."""
    return settings(usual, max_examples=max(2, usual.max_examples // spec.cost))


numbers = pytest.mark.skipif(not (launch.INTERPRETING or DEVICE == "cuda"), reason="needs TRITON_INTERPRET=1 or a GPU")
interpreted = pytest.mark.skipif(not launch.INTERPRETING, reason="needs TRITON_INTERPRET=1: it makes tensors on a CPU")


@pytest.fixture(scope="module", autouse=True)
def language_patched_once():
    """Triton's interpreter puts its own functions into triton.language for a launch, and needlessly again for every
    call of a function inside a kernel, which takes half of its time."""
    if not launch.INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def rounded_once(builder, a, b, d, *how):
        """A dot's sum of products in fp64: in fp32 its order, and so its error, would be that of this machine's BLAS,
        which is no kernel's."""
        if d.data.dtype != np.float32 or a.data.dtype.kind != "f" or b.data.dtype.kind != "f":
            return dot(builder, a, b, d, *how)
        wide = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(wide.astype(np.float32), d.dtype.scalar)

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", rounded_once)
        yield
    scope.restore()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory holds NaN, or a huge number: whatever a kernel forgets to write shows."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        huge = True if x.dtype == torch.bool else float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        return x.fill_(huge)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def drawn(spec):
    """Cases of the operation in the dtypes that this machine computes rightly."""
    return st.tuples(spec.draw(st), st.sampled_from(DTYPES)).map(lambda pair: dict(pair[0], dtype=pair[1]))


def arguments_of(spec, case):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in spec.make(case).items()}


def run(spec, case, backend):
    """Outputs, then mutated arguments, on the host."""
    arguments = arguments_of(spec, case)
    with mk.use_backend(backend):
        result = outputs(spec.function(**arguments))
    return [x.cpu() for x in (*result, *spec.mutated(arguments))]


def served(spec, case):
    verdicts = mk.explain(spec.function, **arguments_of(spec, case)).verdicts
    return next(v.reason for v in verdicts if v.backend == "triton") is None


@numbers
@pytest.mark.parametrize("name", NAMES)
def test_kernel_is_as_good_as_the_reference(name):
    spec, count = SPECS[name], 0

    @fewer(spec)
    @given(drawn(spec))
    def check(case):
        nonlocal count
        if served(spec, case):
            count += 1
            exact = spec.oracle(**spec.make(case))
            for a, r, e in zip(run(spec, case, "triton"), run(spec, case, "reference"), exact, strict=True):
                assert_as_good_as_reference(a, r, e)

    check()
    whole = EXAMPLES // spec.cost
    assert count >= whole // 4, f"{name}: the kernel served {count} of {whole} examples"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_libraries_are_as_good_as_the_reference():
    """Whatever library serves a case on this machine, flex attention included, which serves only where it is forced."""
    spec, served = SPECS["streaming_attention"], set()

    @RUN
    @given(drawn(spec))
    def check(case):
        exact = spec.oracle(**spec.make(case))
        for name in [b.name for b in OPS[spec.name].backends if b.name not in ("triton", "reference")]:
            try:
                actual = run(spec, case, name)
            except BackendError:
                continue
            served.add(name)
            for a, r, e in zip(actual, run(spec, case, "reference"), exact, strict=True):
                assert_as_good_as_reference(a, r, e)

    check()
    assert "flex" in served


@numbers
@pytest.mark.parametrize("name", [n for n in NAMES if SPECS[n].batched])
def test_no_rows_are_no_work(name):
    spec, seen = SPECS[name], 0

    @settings(RUN, max_examples=max(2, 8 // spec.cost))
    @given(drawn(spec))
    def check(case):
        nonlocal seen
        if not served(spec, case):
            return
        seen += 1
        arguments = arguments_of(spec, case)
        state = [x.clone() for x in spec.mutated(arguments)]
        none = {k: arguments[k][:0] for k in spec.batched if arguments.get(k) is not None}
        with mk.use_backend("triton"):
            results = outputs(spec.function(**{**arguments, **none}))
        assert all(x.shape[0] == 0 for x in results)
        for before, after in zip(state, spec.mutated(arguments), strict=True):
            assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))

    check()
    assert seen


@interpreted
@pytest.mark.parametrize("name,law", [(n, law) for n in NAMES for law in sorted(SPECS[n].invariants)])
def test_kernel_obeys_the_laws(name, law):
    @fewer(SPECS[name], LAW)
    @given(drawn(SPECS[name]))
    def check(case):
        SPECS[name].invariants[law](case)

    check()


@numbers
@pytest.mark.parametrize("name", [n for n in NAMES if SPECS[n].batched])
def test_neighbours_do_not_change_a_bit(name):
    spec = SPECS[name]

    @fewer(spec, LAW)
    @given(drawn(spec))
    def check(case):
        arguments = arguments_of(spec, case)
        if not served(spec, case) or arguments.get("rows") is None:
            return
        batch = len(arguments["rows"])

        def first(rows):
            changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            with mk.use_backend("triton"):
                results = outputs(spec.function(**{**changed, "rows": rows}))
            return [x[0].nan_to_num(7.0) for x in results if x.shape[:1] == (batch,)]

        alone = torch.where(torch.arange(batch, device=DEVICE) == 0, arguments["rows"], -1).to(torch.int32)
        for a, b in zip(first(arguments["rows"]), first(alone), strict=True):
            assert torch.equal(a, b)

    check()


@numbers
@pytest.mark.parametrize("name", ["gate_up_swiglu", "linear_residual", "streaming_attention"])
def test_in_invariant_a_row_alone_is_the_same_to_the_bit(name):
    spec = SPECS[name]

    @LAW
    @given(drawn(spec))
    def check(case):
        arguments = arguments_of(spec, {**case, "batch": 3})
        with mk.use_backend("triton"), mk.invariant():
            together = outputs(spec.function(**arguments))
            for b in range(3):
                one = {k: arguments[k][b : b + 1] for k in spec.batched if arguments.get(k) is not None}
                for x, y in zip(together, outputs(spec.function(**{**arguments, **one})), strict=True):
                    assert torch.equal(x[b : b + 1].nan_to_num(7.0), y.nan_to_num(7.0))

    check()


@numbers
def test_the_mix_has_the_references_gradient():
    spec = SPECS["mix_semantic_speech"]
    floats = ("hidden", "embedding", "weight", "bias", "speech_table", "markers")

    @LAW
    @given(drawn(spec))
    def check(case):
        grads = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            arguments = arguments_of(spec, dict(case, dtype="float32"))
            for name in floats:
                arguments[name] = arguments[name].nan_to_num(0.0).to(dtype).requires_grad_()
            with mk.use_backend(backend):
                inputs, _ = spec.function(**arguments)
            weights = torch.linspace(-1, 1, inputs.numel(), dtype=torch.float64, device=DEVICE).view(inputs.shape)
            (inputs.double() * weights).sum().backward()
            grads.append([arguments[name].grad for name in floats])
        for name, a, e in zip(floats, *grads, strict=True):
            largest = float(e.abs().max()) if e.numel() else 0.0
            assert e.numel() == 0 or float((a - e).abs().max()) <= 1e-5 * largest + 1e-12, name

    check()


@numbers
def test_edges_are_defined():
    """No rows, all rows inactive, a length of zero, a full cache, a ring wrapped many times."""
    q, cache = torch.randn(2, 1, 4, 64, device=DEVICE), torch.randn(3, 8, 2, 64, device=DEVICE)

    def attend(rows, lengths, **form):
        rows, lengths = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, lengths))
        with mk.use_backend("triton"):
            return mk.streaming_attention(q[: len(rows)], cache, cache, rows, lengths, return_lse=True, **form)

    out, lse = attend([], [1, 1, 1])
    assert out.shape == (0, 1, 4, 64)
    out, lse = attend([-1, -1], [1, 1, 1])
    assert not out.any() and lse.isneginf().all()
    out, lse = attend([0, 1], [8, 1, 0])
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:1].transpose(1, 2), cache[:1].transpose(1, 2), cache[:1].transpose(1, 2), enable_gqa=True
    )
    torch.testing.assert_close(out[:1].transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    ring, _ = attend([0, 1], [8 + 8 * 10**6, 9, 0], ring=True, window=8)
    torch.testing.assert_close(ring[0], out[0], rtol=1e-5, atol=1e-5)


def test_every_preset_has_head_dimensions_that_the_kernels_serve():
    for name in presets():
        config = load_config(name)
        dims = {
            config.llm.head_dim,
            config.voice_decoder.lm.head_dim,
            config.duplex.layer.head_dim,
            config.encoder.dim // config.encoder.heads,
            config.projector.dim // config.projector.heads,
            config.speech_tokenizer.encoder.dim // config.speech_tokenizer.encoder.heads,
            config.flow.estimator_head_dim,
        }
        assert dims <= {64, 128}, name


def test_lengths_positions_and_row_counts_are_no_constants():
    """A sweep of run-time sizes asks for one binary an operation and bucket."""
    attend = SPECS["streaming_attention"]
    base = {
        "form": "causal", "dtype": "bfloat16", "batch": 2, "queries": 1, "heads": (4, 2), "dim": 64, "capacity": 12,
        "int8": False, "scale": None, "all_queries": False, "seed": 0,
    }  # fmt: skip
    keys = set()
    for capacity in (12, 13, 100, 1000):
        for seed in range(3):
            arguments = attend.make(dict(base, capacity=capacity, seed=seed))
            keys |= {record.key for record in launch.launches(attend.function, arguments, 90)}
    assert len(keys) == 2, keys  # the attention and the merge of its parts
    linear = SPECS["linear_residual"]
    case = {"dtype": "bfloat16", "weights": "full", "dim_in": 96, "dim_out": 64, "residual": True, "seed": 0}
    keys = set()
    for batch in range(1, 65):
        arguments = linear.make(dict(case, batch=batch))
        keys |= {record.key for record in launch.launches(linear.function, arguments, 90)}
    assert len(keys) == 7, keys  # the buckets 1, 2, 4 … 64


@pytest.mark.skipif(launch.INTERPRETING or DEVICE == "cuda", reason="here the kernels serve")
def test_without_a_gpu_a_forced_kernel_says_what_it_needs():
    x = torch.ones(1, 64)
    with mk.use_backend("triton"), pytest.raises(BackendError, match="TRITON_INTERPRET=1, set before the import"):
        mk.rms_norm(x, x[0], eps=1e-6)


@numbers
def test_what_a_kernel_does_not_serve_goes_to_the_next_backend():
    cache = torch.zeros(1, 4, 1, 96, device=DEVICE)
    arguments = (
        torch.zeros(1, 1, 1, 96, device=DEVICE),
        cache,
        cache,
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    lengths = torch.ones(1, dtype=torch.int32, device=DEVICE)
    reason = mk.explain(mk.streaming_attention, *arguments, lengths).verdicts[0].reason
    assert reason == "its head dimension is 64 or 128, not 96"
    assert mk.streaming_attention(*arguments, lengths).shape == (1, 1, 1, 96)
    x = torch.ones(4, 128, device=DEVICE).t()
    assert "not contiguous" in mk.explain(mk.rms_norm, x, x[0].contiguous(), eps=1e-6).verdicts[0].reason
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    x = torch.ones(1, 64, device=DEVICE)
    assert "no backward" in mk.explain(mk.rms_norm, x, weight, eps=1e-6).verdicts[0].reason
    mk.rms_norm(x, weight, eps=1e-6).sum().backward()
    assert weight.grad is not None


@numbers
@pytest.mark.parametrize("weights", ["full", "int8", "int4 g128"])
def test_a_product_of_few_rows_in_blocks_as_wide_as_a_gpu_has_them(weights):
    """Blocks of a table for GPUs deal their pieces out to several sums, more than once each."""
    spec = SPECS["linear_residual"]
    for batch in (1, 2, 3, 8):
        case = {
            "dtype": "float16", "weights": weights, "batch": batch, "dim_in": 1152, "dim_out": 24, "residual": True,
            "seed": batch,
        }  # fmt: skip
        with tuning.trial("linear_residual", {"BLOCK_N": 16, "BLOCK_K": 1024}):
            (found,) = run(spec, case, "triton")
        (reference,) = run(spec, case, "reference")
        assert_as_good_as_reference(found, reference, spec.oracle(**spec.make(case))[0])
