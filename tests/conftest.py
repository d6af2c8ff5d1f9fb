"""Settings of every test: one thread a process, and examples that are the same on every run."""

from __future__ import annotations

import torch
from hypothesis import settings

# Tensors here are small, and processes run side by side (`make test`): more threads would only wait for each other.
torch.set_num_threads(1)

# `pytest --hypothesis-profile=default` draws new examples instead.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    """Each of two processes starts with a half of the list (`--dist worksteal`): tests of one kind, which take alike
    long, go to both."""
    kernels = [item for item in items if "tests/minmo_kernels/" in item.nodeid]
    others = [item for item in items if "tests/minmo_kernels/" not in item.nodeid]
    items[:] = kernels[::2] + others + kernels[1::2]
