"""One process or many: where a process stands, and how an objective is spread over all of them (FSDP2).

There is always a process group, of one where nobody launched more, so that the loop knows a single way to count, to
save and to sum.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from minmo.training.settings import LoopSettings

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WRAPPER = "_checkpoint_wrapped_module."


@dataclass(frozen=True)
class Processes:
    """This process among `world`. group: a gloo group for numbers of the host, on GPUs too."""

    rank: int
    world: int
    device: torch.device
    group: Any

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def of_first(self, value: Any) -> Any:
        """What the first process holds."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """What every process holds, by rank."""
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value, group=self.group)
        return boxes

    def wait(self) -> None:
        """Until all are here."""
        dist.barrier(group=self.group)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun launched, or this one alone; on `cuda:LOCAL_RANK` where there are GPUs, else the CPU.

    A process group that exists already is used and left; another is ended with the block. An objective that was
    sharded inside can be used for as long as its process group lives.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    begun = not dist.is_initialized()
    if begun:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if all([name in os.environ for name in _LAUNCHED]):
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))
    finally:
        if begun:
            dist.destroy_process_group()
            # A group left for the collector would be ended in whatever is forked later, where its threads are not.
            gc.collect()


def spread(root: nn.Module, blocks: Callable[[], Sequence[nn.Module]], settings: LoopSettings, here: Processes) -> None:
    """Prepares an objective in place: activation checkpoints, compilation and shards for each block, then the root.

    blocks: gives the blocks as they stand now. Raises ValueError where the settings do not fit.
    """
    if here.world > 1 and not settings.shard:
        raise ValueError(f"{here.world} processes were launched, but shard is false: set it, or launch one process")
    if (settings.checkpoint_activations or settings.compile) and not blocks():
        raise ValueError("checkpoint_activations and compile work on blocks, and this objective names none: unset them")
    if settings.checkpoint_activations:
        chosen = {id(block) for block in blocks()}
        apply_activation_checkpointing(
            root, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: id(module) in chosen
        )
    if settings.compile:
        for block in blocks():
            block.compile()
    if not settings.shard:
        root.to(here.device)
        return
    policy = MixedPrecisionPolicy()
    if settings.precision == "bf16":
        # Autocast decides about inputs, as in one process; what a batch holds keeps its precision.
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(here.device.type, (here.world,))
    for module in [*blocks(), root]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for name in ("tally", "sound"):
        register_fsdp_forward_method(root, name)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The loss is normalised over all processes already: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by the names that they have where nothing is wrapped."""
    return {name.replace(_WRAPPER, ""): p for name, p in module.named_parameters() if p.requires_grad}
