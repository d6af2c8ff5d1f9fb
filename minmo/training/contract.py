"""What the training loop asks of what it trains and of what it reads: `Objective` and `Loader`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """What is minimised: losses by name, each a mean over its own targets, added up by `weights`.

    The caller sets `requires_grad`. Parts without a trained parameter run in evaluation mode, all others in training
    mode. Under `shard` every process must reach the same trained parameters in the same order, through the `forward`
    of the blocks, in every micro-batch.
    """

    weights: dict[str, float]
    """Of every loss that `counts` and `forward` name."""
    tallied: tuple[str, ...] = ()
    """What `tally` names, where a stage is validated by more than its losses."""

    @abstractmethod
    def counts(self, batch: Any) -> dict[str, float]:
        """Number of targets of each loss in a micro-batch as the loader gave it, known without a forward pass."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Sum of each loss over its targets: fp32 scalars. Without targets it is 0, still joined to the parameters
        (`logits.sum() * 0`)."""

    def tally(self, batch: Any) -> dict[str, float]:
        """Numbers of a validation batch, on the device, that are added up for `scores`: those of `tallied`."""
        return {}

    def scores(self, totals: dict[str, float]) -> dict[str, float]:
        """What validation reports besides the losses, from the sums of `tally` over all of its batches."""
        return {}

    def sound(self, batch: Any) -> dict[str, Tensor]:
        """What a validation batch, on the device, lets hear, by name: (samples,) at 24 kHz; nothing where there is no
        sound to judge a stage by."""
        return {}

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """The micro-batch on the device: a tensor, or a dataclass of tensors and of such dataclasses."""
        if isinstance(batch, Tensor):
            return batch.to(device, non_blocking=True)
        if not dataclasses.is_dataclass(batch) or isinstance(batch, type):
            return batch
        values = {f.name: self.to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **values)

    def blocks(self) -> Sequence[nn.Module]:
        """Layers that are sharded, compiled and checkpointed each by itself; read from the model at every call."""
        return ()


class Loader(Protocol):
    """This process's micro-batches, as (batch, ids of its items); every `iter` is the next epoch.

    All processes get equally many. The state is the position in the data as if one process read all of it, the same
    on each: torchdata's StatefulDataLoader over a sampler that knows nothing of processes.
    """

    def __iter__(self) -> Iterator[tuple[Any, list[str]]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...
