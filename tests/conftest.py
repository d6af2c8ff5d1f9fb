"""Settings of every test: one thread a process, and examples that are the same on every run."""

from __future__ import annotations

import torch
from hypothesis import settings

# Tensors here are small, and processes run side by side (`make test`): more threads would only wait for each other.
torch.set_num_threads(1)

# `pytest --hypothesis-profile=default` draws new examples instead.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")
