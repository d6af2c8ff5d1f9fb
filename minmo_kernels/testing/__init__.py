"""Tools for testing operations, ours or a third party's: the tolerance rule, poisoned data, seeded tensors."""

from minmo_kernels.testing.data import (
    beyond_lengths_nan,
    dequantised,
    generator,
    maybe_int8,
    normal,
    outputs,
    padding_nan,
    random_rows,
    weight_bytes,
)
from minmo_kernels.testing.tolerance import assert_as_good_as_reference, assert_reference_matches, max_error

__all__ = [
    "assert_as_good_as_reference",
    "assert_reference_matches",
    "beyond_lengths_nan",
    "dequantised",
    "generator",
    "max_error",
    "maybe_int8",
    "normal",
    "outputs",
    "padding_nan",
    "random_rows",
    "weight_bytes",
]
