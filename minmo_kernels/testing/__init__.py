"""Tools for testing operations, ours or a third party's: the tolerance rule, poisoned data, seeded tensors."""

from minmo_kernels.quantise import FORMATS, group_of
from minmo_kernels.testing.data import (
    BUCKETS,
    beyond_lengths_nan,
    dequantised,
    dequantised_cache,
    formats_of,
    generator,
    normal,
    outputs,
    padding_nan,
    quantised,
    quantised_cache,
    random_counts,
    random_rows,
    weight_bytes,
)
from minmo_kernels.testing.tolerance import assert_as_good_as_reference, assert_reference_matches, max_error

__all__ = [
    "BUCKETS",
    "FORMATS",
    "assert_as_good_as_reference",
    "assert_reference_matches",
    "beyond_lengths_nan",
    "dequantised",
    "dequantised_cache",
    "formats_of",
    "generator",
    "group_of",
    "max_error",
    "normal",
    "outputs",
    "padding_nan",
    "quantised",
    "quantised_cache",
    "random_counts",
    "random_rows",
    "weight_bytes",
]
