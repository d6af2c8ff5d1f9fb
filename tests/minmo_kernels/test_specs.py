"""Every operation, from its declaration: oracle, laws, batch independence, dispatch, torch.library registration."""

from __future__ import annotations

import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import minmo_kernels as mk
from minmo_kernels.dispatch import OPS, intercept
from minmo_kernels.spec import load_all
from minmo_kernels.testing import assert_as_good_as_reference, assert_reference_matches, outputs

SPECS = load_all()
NAMES = list(SPECS)
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def examples(spec, most=40):
    """EXAMPLES, fewer of an operation whose examples take long."""
    return settings(EXAMPLES, max_examples=max(2, most // spec.cost))


def copied(arguments):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def run(spec, arguments):
    """Outputs, then mutated arguments; the caller's tensors stay as they are."""
    arguments = copied(arguments)
    result = outputs(spec.function(**arguments))
    return (*result, *spec.mutated(arguments))


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

    @examples(spec)
    @given(spec.draw(st))
    def check(case):
        arguments = spec.make(case)
        with mk.use_backend("reference"):
            actual = run(spec, arguments)
        for a, exact in zip(actual, spec.oracle(**arguments), strict=True):
            assert_reference_matches(a, exact)

    check()


@pytest.mark.parametrize("name", [n for n in NAMES if SPECS[n].batched])
def test_no_rows_are_no_work(name):
    """On every backend that serves here, the reference and PyTorch's among them."""
    spec = SPECS[name]

    @examples(spec, 10)
    @given(spec.draw(st))
    def check(case):
        arguments = spec.make(case)
        arguments |= {k: arguments[k][:0] for k in spec.batched if arguments.get(k) is not None}
        if "return_lse" in arguments:
            arguments["return_lse"] = False
        for verdict in mk.explain(spec.function, **arguments).verdicts:
            if verdict.reason is None:
                with mk.use_backend(verdict.backend):
                    assert all(x.shape[0] == 0 for x in outputs(spec.function(**arguments)))

    check()


@pytest.mark.parametrize("name", [n for n in NAMES if len(OPS[n].backends) > 1])
def test_every_backend_is_as_good_as_the_reference(name):
    spec, op = SPECS[name], OPS[name]
    served = set()

    @examples(spec)
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
    @examples(SPECS[name])
    @given(SPECS[name].draw(st))
    def check(case):
        SPECS[name].invariants[law](case)

    check()


@pytest.mark.parametrize("name", [n for n in NAMES if SPECS[n].batched])
def test_batch_order_and_neighbours_do_not_matter(name):
    spec = SPECS[name]

    @examples(spec, 15)
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

    # The first example is the least one; the others have several entries and their optional arguments.
    @settings(examples(spec, 4), phases=[Phase.generate])
    @given(spec.draw(st))
    def check(case):
        op, arguments = intercept(spec.function, **spec.make({**case, "dtype": "float32"}))
        assert op is OPS[name]
        seen.append(torch.library.opcheck(op.torch_op, arguments))

    check()
    assert seen


def test_compiled_calls_keep_their_gradients():
    x, weight = torch.randn(2, 3, 64), torch.randn(64, requires_grad=True)

    def loss(x, weight):
        return mk.rms_norm(x, weight, eps=1e-6).pow(3).sum()

    (eager,) = torch.autograd.grad(loss(x, weight), weight)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight), weight)
    torch.testing.assert_close(compiled, eager)


def test_a_forced_backend_stays_in_its_thread():
    x = torch.ones(1, 64)
    seen = []
    with mk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(mk.explain(mk.rms_norm, x, x[0], eps=1e-6)))
        thread.start()
        thread.join()
        mine = mk.explain(mk.rms_norm, x, x[0], eps=1e-6)
    assert [v.backend for v in mine.verdicts if v.chosen] == ["reference"]
    assert len(seen) == 1


def test_a_ring_that_has_lost_what_a_query_sees_is_refused():
    cache = torch.zeros(1, 5, 1, 64)
    arguments = (torch.zeros(1, 1, 1, 64), cache, cache, torch.zeros(1, dtype=torch.int32))
    form = {"mask": "chunk", "chunk": 4, "left_chunks": 1, "ring": True}
    with pytest.raises(ValueError, match="a ring of 5 no longer holds all that the queries of entry 0 see"):
        mk.streaming_attention(*arguments, torch.tensor([11], dtype=torch.int32), **form)
    mk.streaming_attention(*arguments, torch.tensor([9], dtype=torch.int32), **form)


def test_counts_outside_the_input_are_refused():
    v, weight, rows = torch.zeros(2, 3, 8), torch.zeros(8, 1, 3), torch.arange(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"lengths must lie in 0 .. 3, got \[4, 1\]"):
        mk.fsmn(v, weight, None, rows, torch.tensor([4, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="lengths has 1 entries for a batch of 2"):
        mk.fsmn(v, weight, None, rows, torch.tensor([3], dtype=torch.int32))


def test_error_words_that_do_not_fit_are_refused():
    v, weight, rows = torch.zeros(2, 3, 8), torch.zeros(8, 1, 3), torch.arange(2, dtype=torch.int32)
    short = torch.zeros(1, dtype=torch.int32)
    with mk.strict(short), pytest.raises(ValueError, match="needs at least 2 words, one a batch entry"):
        mk.fsmn(v, weight, None, rows, torch.tensor([3, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="int32 on the operations' device"), mk.strict(torch.zeros(2)):
        pass


FAULTS = {
    "append_kv": ("row", "session"),
    "fsmn": ("row", "count"),
    "fsq_encode": ("count", "number"),
    "log_mel": ("row", "count", "rest"),
    "mix_semantic_speech": ("id",),
    "rms_norm_qkv_rope_append": ("row", "session"),
    "sample_token": ("row", "number", "nothing"),
    "streaming_attention": ("row", "session"),
}
"""What of an entry can be wrong: its row, its session's length, its own count (or that it leaves a rest), an id, the
numbers that a choice is made from (NaN, or nothing left)."""


def spoil(arguments, what, entry):
    """Makes one number of a batch entry wrong -> the fault that it is."""
    if what == "row":
        arguments["rows"][entry] = 10**6
        return mk.Fault.ROW
    if what == "session":
        arguments["lengths"][arguments["rows"][entry]] = -1
        return mk.Fault.LENGTH
    if what == "count":
        arguments["lengths"][entry] = 10**6
        return mk.Fault.LENGTH
    if what == "rest":
        arguments["lengths"][entry] += 1 if arguments["lengths"][entry] == 0 else -1
        return mk.Fault.LENGTH
    if what == "number":
        arguments["logits" if "logits" in arguments else "x"][entry] = torch.nan
        return mk.Fault.NUMBER
    if what == "nothing":
        arguments["logits"][entry] = -torch.inf
        return mk.Fault.NUMBER
    arguments["speech"][entry] = len(arguments["speech_table"])
    return mk.Fault.ID


@pytest.mark.parametrize("name,what", [(name, what) for name, kinds in FAULTS.items() for what in kinds])
def test_numbers_out_of_range_raise_or_make_padding_of_their_entry(name, what):
    spec, seen = SPECS[name], 0

    @settings(EXAMPLES, max_examples=15)
    @given(spec.draw(st), st.integers(0, 3))
    def check(case, entry):
        nonlocal seen
        whole = spec.make(case)
        rows = whole.get("rows")
        stateless = what == "row" and whole.get("carry", rows) is None
        if rows is None or entry >= len(rows) or rows[entry] < 0 or stateless:
            return
        if (what == "rest" and whole["rule"] != "stream") or (
            what == "number" and whole.get("lengths", rows)[entry] == 0
        ):
            return
        if what == "id":
            starts = whole["speech_starts"]
            first = 0 if starts is None else max(0, int(starts[entry]))
            if first >= min(int(whole["speech_lengths"][entry]), first + whole["speech"].shape[1]):
                return
        seen += 1
        wrong, without = copied(whole), copied(whole)
        without["rows"][entry] = -1
        fault = spoil(wrong, what, entry)
        with pytest.raises(ValueError, match=name):
            run(spec, wrong)
        words = torch.zeros(len(rows) + 1, dtype=torch.int32)
        with mk.strict(words), mk.use_backend("reference"):
            actual = run(spec, wrong)
        assert words.tolist() == [fault if i == entry else 0 for i in range(len(words))]
        with mk.use_backend("reference"):
            expected = run(spec, without)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0))

    check()
    assert seen
