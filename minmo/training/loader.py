"""Manifests to micro-batches: lhotse's bucketing by duration, a stateful data loader, each process its slice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler, RoundRobinSampler
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from minmo.data.schema import DataError
from minmo.training.batches import Builder

Epoch = tuple[int, Sequence[Any]]


class Sampler:
    """Batches of cuts of about equal length; (epoch, cuts) for this process.

    parts: cuts and the seconds of sound in a batch of them. Of several parts batches come in turn, and an epoch ends
    with the shortest. The sampler below knows nothing of processes, so its position is the same number on all of them;
    a batch with fewer cuts than processes is left out on all.
    """

    def __init__(self, parts: Sequence[tuple[CutSet, float]], buckets: int, seed: int, rank: int, world: int) -> None:
        each = [_bucketed(cuts, max_seconds, buckets, seed) for cuts, max_seconds in parts]
        self._inner = each[0] if len(each) == 1 else RoundRobinSampler(*each, stop_early=True)
        self._epoch, self._rank, self._world = 0, rank, world

    def __iter__(self) -> Iterator[Epoch]:
        self._inner.set_epoch(self._epoch)
        for cuts in self._inner:
            cuts = list(cuts)
            if len(cuts) >= self._world:
                yield self._epoch, cuts[self._rank :: self._world]
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "inner": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._inner.load_state_dict(state["inner"])


def _bucketed(cuts: CutSet, max_seconds: float, buckets: int, seed: int) -> DynamicBucketingSampler:
    # lhotse asks for two buckets at least and as many cuts as buckets; else all lie below the one bound.
    one = buckets == 1 or sum(1 for _ in islice(cuts, buckets)) < buckets
    bounds: dict[str, Any] = {"duration_bins": [max_seconds]} if one else {"num_buckets": buckets}
    return DynamicBucketingSampler(
        cuts, max_duration=max_seconds, shuffle=True, seed=seed, world_size=1, rank=0, drop_last=False, **bounds
    )


class _Lines(Dataset):
    """(epoch, cuts) -> a batch, its cuts' ids, and why cuts were left out; or a fault, for the first process to raise:
    errors do not cross processes whole."""

    def __init__(self, builder: Builder, build: Callable[[Sequence[Any]], Any]) -> None:
        self.builder, self.build = builder, build

    def __getitem__(self, item: Epoch) -> tuple[Any, list[str], list[str]] | DataError:
        self.builder.epoch, cuts = item[0], list(item[1])
        left: list[str] = []
        while True:
            try:
                return self.build(cuts), [cut.id for cut in cuts], left
            except DataError as error:
                bad = [cut for cut in cuts if str(error).startswith(f"cut {cut.id}:")]
                if not bad:
                    return error
                cuts = [cut for cut in cuts if cut.id != bad[0].id]
                left.append(error.reason)
                if not cuts:
                    return error  # one unusable cut among many is left out, a whole batch of them is no accident


class Batches:
    """A loader of the training loop: (batch, ids). `skipped` counts cuts whose sound could not be used, by reason."""

    def __init__(self, builder: Builder, kind: str, sampler: Sampler, workers: int) -> None:
        self.skipped: Counter[str] = Counter()
        lines = _Lines(builder, getattr(builder, kind))
        self._loader = StatefulDataLoader(lines, sampler=sampler, batch_size=None, num_workers=workers)

    def __iter__(self) -> Iterator[tuple[Any, list[str]]]:
        for found in self._loader:
            if isinstance(found, DataError):
                raise found
            batch, ids, left = found
            self.skipped.update(left)
            yield batch, ids

    def state_dict(self) -> dict[str, Any]:
        return dict(self._loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)
