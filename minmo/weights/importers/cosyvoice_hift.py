"""CosyVoice 2's `hift.pt` -> `Vocoder`: the released names beside ours; weight norm is folded into plain weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from minmo.config import VocoderConfig
from minmo.token2wav.hift import PITCH_REACH

_NORMED = ".parametrizations.weight.original"


def key_table(config: VocoderConfig) -> dict[str, tuple[str, ...]]:
    """Each key of `Vocoder(config).state_dict()` and the released keys that it is made of; complete both ways.

    One released key is the tensor itself; two are the gain and the direction of a weight-normed one.
    """
    return dict(_pairs(config))


def convert(released: Mapping[str, Tensor], config: VocoderConfig) -> dict[str, Tensor]:
    """A released state dict under our names, weight norm folded; the file's optional prefix `generator.` is dropped.

    Raises ValueError that names a missing or an unknown tensor.
    """
    released = {key.removeprefix("generator."): value for key, value in released.items()}
    table = key_table(config)
    wanted = {key for keys in table.values() for key in keys}
    if missing := sorted(wanted - set(released)):
        raise ValueError(f"hift.pt lacks {len(missing)} tensors of this size of vocoder, the first is {missing[0]!r}")
    if unknown := sorted(set(released) - wanted):
        raise ValueError(f"hift.pt has {len(unknown)} tensors that this size of vocoder lacks, first {unknown[0]!r}")
    return {
        ours: released[keys[0]] if len(keys) == 1 else _fold(released[keys[0]], released[keys[1]])
        for ours, keys in table.items()
    }


def _fold(gain: Tensor, direction: Tensor) -> Tensor:
    """gain (first axis, 1, 1) times `direction` scaled to norm 1 over all axes but the first."""
    norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.dim())), keepdim=True)
    return gain * direction / norm


def _pairs(config: VocoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _plain("m_source.l_linear", "source.mix")
    yield from _normed("conv_pre", "pre")
    yield from _normed("conv_post", "post")
    branches = len(config.resblock_kernels)
    for i in range(len(config.upsample_rates)):
        yield from _normed(f"ups.{i}", f"ups.{i}")
        yield from _plain(f"source_downs.{i}", f"source_downs.{i}")
        yield from _block(f"source_resblocks.{i}", f"source_blocks.{i}", config)
        for j in range(branches):
            yield from _block(f"resblocks.{i * branches + j}", f"blocks.{i}.{j}", config)
    for i in range(PITCH_REACH):
        # The released predictor is a sequence of convolutions and activations in turn.
        yield from _normed(f"f0_predictor.condnet.{2 * i}", f"pitch.convs.{i}")
    yield from _plain("f0_predictor.classifier", "pitch.out")


def _block(theirs: str, ours: str, config: VocoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for unit in range(len(config.resblock_dilations)):
        for half in (1, 2):
            yield f"{ours}.{unit}.snake{half}.alpha", (f"{theirs}.activations{half}.{unit}.alpha",)
            yield from _normed(f"{theirs}.convs{half}.{unit}", f"{ours}.{unit}.conv{half}")


def _plain(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", (f"{theirs}.{name}",)


def _normed(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{ours}.weight", (f"{theirs}{_NORMED}0", f"{theirs}{_NORMED}1")
    yield f"{ours}.bias", (f"{theirs}.bias",)
