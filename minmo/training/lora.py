"""LoRA on the packed `qkv` projections of a decoder: low-rank updates of some of its rows (arXiv 2106.09685).

`attach` is for training alone: steps that fuse a layer's weights into kernels read `qkv.weight` by itself, so `merge`
before a model is served, converted or saved as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmo.config import BackboneConfig

ROWS = ("q", "k", "v")
"""What an adapter may be put on, in the order of the packed rows."""


@dataclass(frozen=True)
class LoRA:
    """Shape of the adapters. targets: some of "q", "k", "v"; the update is alpha / rank times B A x."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4096 or self.alpha <= 0:
            raise ValueError(f"rank must lie in 1 .. 4096 and alpha be positive, got {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in 0 .. 1 (1 excluded), got {self.dropout}")
        if not self.targets or len(set(self.targets)) < len(self.targets) or set(self.targets) - set(ROWS):
            raise ValueError(f"targets must be some of {', '.join(ROWS)}, each once, got {list(self.targets)}")


class AdaptedLinear(nn.Linear):
    """A `qkv` projection with adapters: weight and bias keep their names and are frozen, adapters are `q_a`, `q_b`, ….

    a: (rank, in), b: (rows, rank), in fp32 whatever the weights are in, for their steps are small.
    """

    def __init__(self, base: nn.Linear, config: BackboneConfig, lora: LoRA) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.lora, self.scale = lora, lora.alpha / lora.rank
        width, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.rows = dict(zip(ROWS, (width, kv, kv), strict=True))
        for target in lora.targets:
            a = torch.empty(lora.rank, self.in_features, dtype=torch.float32, device=base.weight.device)
            b = torch.zeros(self.rows[target], lora.rank, dtype=torch.float32, device=base.weight.device)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            self.register_parameter(f"{target}_a", nn.Parameter(a))
            self.register_parameter(f"{target}_b", nn.Parameter(b))

    def adapter(self, target: str) -> tuple[Tensor, Tensor]:
        """A and B of a target."""
        return self.get_parameter(f"{target}_a"), self.get_parameter(f"{target}_b")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = super().forward(x)
        dropped = F.dropout(x, self.lora.dropout, self.training)
        updates = []
        for target, rows in self.rows.items():
            if target in self.lora.targets:
                a, b = self.adapter(target)
                updates.append(self.scale * F.linear(F.linear(dropped.to(a.dtype), a), b).to(y.dtype))
            else:
                updates.append(y.new_zeros(()).expand(*y.shape[:-1], rows))
        return y + torch.cat(updates, dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain projection with the updates added to its weight, in place and in fp32 before it is rounded."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        for target, rows in zip(ROWS, self.weight.split(list(self.rows.values())), strict=True):
            if target in self.lora.targets:
                a, b = self.adapter(target)
                rows.copy_((rows.float() + self.scale * b @ a).to(rows.dtype))
        return linear.train(self.training)


def attach(backbone: nn.Module, lora: LoRA) -> None:
    """Freezes a backbone and gives every layer new adapters, drawn from torch's generator; the output stays the same.

    From then on A and B are all that trains. Raises ValueError for a backbone without decoder layers, or with adapters.
    """
    layers = list(_layers(backbone))
    if not layers:
        raise ValueError(f"there are no decoder layers to adapt in a {type(backbone).__name__}")
    if adapters(backbone):
        raise ValueError("this backbone has adapters already: merge them first")
    backbone.requires_grad_(False)
    for layer, base, config in layers:
        layer.qkv = AdaptedLinear(base, config, lora)


def adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every adapter within a module, by name: what a checkpoint of the training keeps."""
    return {
        f"{name}.{target}_{part}" if name else f"{target}_{part}": child.get_parameter(f"{target}_{part}")
        for name, child in module.named_modules()
        if isinstance(child, AdaptedLinear)
        for target in child.lora.targets
        for part in "ab"
    }


def merge(backbone: nn.Module) -> None:
    """Adds the updates to the weights and removes the adapters. Raises ValueError where there are none.

    The weights stay frozen, as `attach` left them.
    """
    if not adapters(backbone):
        raise ValueError("this backbone has no adapters to merge")
    for layer, base, _ in _layers(backbone):
        if isinstance(base, AdaptedLinear):
            layer.qkv = base.merged()


def _layers(backbone: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear, BackboneConfig]]:
    """Decoder layers, known by a `qkv` beside the sizes of a backbone; with both."""
    for layer in backbone.modules():
        qkv, config = getattr(layer, "qkv", None), getattr(layer, "config", None)
        if isinstance(qkv, nn.Linear) and isinstance(config, BackboneConfig):
            yield layer, qkv, config
