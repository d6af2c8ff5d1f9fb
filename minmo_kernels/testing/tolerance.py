"""How close is close: bounds derived from fp64 and from the reference's own error, never tuned by hand."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS32 = torch.finfo(torch.float32).eps
_ORDER = 4 * _EPS32
"""What the order of an fp32 sum is worth, relative to the largest value. A sum of K terms wanders by about sqrt(K) / 2
ulp (Higham and Mary, 2019), by less in a library that keeps several accumulators: a reference is never credited with a
smaller error than this. Measured over drawn fp32 projections of up to 256 inputs: references 0.5 to 3, kernels 0.5 to
5.4 ulp. It does not show in the bounds of half-precision outputs."""


def max_error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest absolute error, largest magnitude of `exact`); infinities must agree, NaN is an error."""
    actual, exact = actual.double(), exact.double()
    assert actual.shape == exact.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), "infinities differ"
    if not finite.any():
        return 0.0, 0.0
    error = (actual[finite] - exact[finite]).abs().max().item()
    assert error == error, "NaN in the output"
    return error, exact[finite].abs().max().item()


def assert_as_good_as_reference(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """max|actual - fp64| <= 2 (max|reference - fp64| + eps max|fp64|), eps of the output; integers are equal.

    The reference's error counts as 4 fp32 ulp of max|fp64| where it is smaller: see `_ORDER`.
    """
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype)), "integer outputs differ"
        return
    error, scale = max_error(actual, exact)
    allowed = max(max_error(reference, exact)[0], _ORDER * scale)
    bound = 2 * (allowed + torch.finfo(actual.dtype).eps * scale)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g} (largest value {scale:.3g})"


def assert_reference_matches(actual: Tensor, exact: Tensor) -> None:
    """The reference against fp64: fp32 arithmetic (64 ulp of the largest value), then one rounding to the dtype."""
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype)), "integer outputs differ"
        return
    error, scale = max_error(actual, exact)
    bound = (torch.finfo(actual.dtype).eps + 64 * _EPS32) * max(scale, 1e-6)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g} (largest value {scale:.3g})"
