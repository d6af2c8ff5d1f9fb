"""The operations, one folder each: `__init__` is the contract, `reference` the oracle, `spec` the declaration."""
