"""AdamW over what is trained: parameter groups by name, and state that exists before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minmo.training.settings import LoopSettings


def adamw(parameters: Mapping[str, nn.Parameter], settings: LoopSettings) -> torch.optim.AdamW:
    """An AdamW with one group a factor of `lr_scale` and kind of decay; a group's "scale" is that factor.

    Every parameter has its state from the start, so that what a checkpoint holds never depends on which parameters
    had a gradient so far. Raises ValueError for a prefix that no parameter has.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = set(settings.lr_scale)
    for name, parameter in parameters.items():
        prefixes = [prefix for prefix in settings.lr_scale if name.startswith(prefix)]
        unused -= set(prefixes)
        scale = settings.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    if unused:
        raise ValueError(
            f"lr_scale names {min(unused)!r}, with which no trained parameter begins; "
            f"there are {', '.join(sorted({name.split('.')[0] + '.' for name in parameters}))}"
        )
    optimizer = torch.optim.AdamW(
        [{"params": members, "scale": scale, "weight_decay": decay} for (scale, decay), members in groups.items()],
        lr=settings.lr,
        betas=settings.betas,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def gradient_norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Norm of the whole gradient, of all shards where it is sharded: a plain tensor, the same on every process."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
