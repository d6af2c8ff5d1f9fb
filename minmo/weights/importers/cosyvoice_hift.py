"""CosyVoice 2's `hift.pt` -> `Vocoder`: the released names beside ours; weight norm is folded into plain weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minmo.config import VocoderConfig
from minmo.token2wav.hift import PITCH_REACH
from minmo.weights.importers.frame import Made, Part, applied, built, expected, fields, lazily
from minmo.weights.stored import CheckpointError, pickled

PARAMETRIZED = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
WEIGHT_NORM = (".weight_g", ".weight_v")
_PREFIX = "generator."


def key_table(config: VocoderConfig, norms: tuple[str, str] = PARAMETRIZED) -> dict[str, tuple[str, ...]]:
    """Each key of `Vocoder(config).state_dict()` and the released keys that it is made of; complete both ways.

    One released key is the tensor itself; two are the gain and the direction of a weight-normed one, whose names end
    as `norms` says.
    """
    return dict(_pairs(config, norms))


def convert(released: Mapping[str, Tensor], config: VocoderConfig) -> dict[str, Tensor]:
    """A released state dict under our names, weight norm folded; the file's optional prefix `generator.` is dropped.

    Raises CheckpointError that names a missing or an unknown tensor.
    """
    released = {key.removeprefix(_PREFIX): value for key, value in released.items()}
    return applied(_table(config, _norms(released)), released, "hift.pt")


def open_file(path: Path) -> Part:
    """`hift.pt` as a part; rates and kernels are the released ones, widths those of its tensors."""
    stored = {key.removeprefix(_PREFIX): weight for key, weight in pickled(path).items()}
    norms = _norms(stored)

    def size(name: str, axis: int) -> int:
        if name not in stored or len(stored[name].shape) <= axis:
            raise CheckpointError(f"{path} lacks the tensor {name!r} of a CosyVoice 2 vocoder: use its hift.pt")
        return stored[name].shape[axis]

    given = {
        "n_mels": size(f"conv_pre{norms[1]}", 1),
        "base_channels": size(f"conv_pre{norms[1]}", 0),
        "harmonics": size("m_source.l_linear.weight", 1) - 1,
        "f0_channels": size("f0_predictor.classifier.weight", 1),
    }
    config = built(VocoderConfig, given, path)
    tensors = lazily(_table(config, norms), stored, str(path), shapes=expected("vocoder", fields(config)))
    return Part("vocoder", fields(config), tensors, (path,), "cosyvoice2")


def _norms(released: Iterable[str]) -> tuple[str, str]:
    """How the names of gains and directions end: as PyTorch wrote them before its parametrizations, or since."""
    return WEIGHT_NORM if f"conv_pre{WEIGHT_NORM[0]}" in released else PARAMETRIZED


def _table(config: VocoderConfig, norms: tuple[str, str]) -> dict[str, Made]:
    table = key_table(config, norms)
    return {ours: Made(names, _fold) if len(names) == 2 else Made(names) for ours, names in table.items()}


def _fold(gain: Tensor, direction: Tensor) -> Tensor:
    """gain (first axis, 1, 1) times `direction` scaled to norm 1 over all axes but the first."""
    norm = torch.linalg.vector_norm(direction, dim=tuple(range(1, direction.dim())), keepdim=True)
    return gain * direction / norm


def _pairs(config: VocoderConfig, norms: tuple[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _plain("m_source.l_linear", "source.mix")
    yield from _normed("conv_pre", "pre", norms)
    yield from _normed("conv_post", "post", norms)
    branches = len(config.resblock_kernels)
    for i in range(len(config.upsample_rates)):
        yield from _normed(f"ups.{i}", f"ups.{i}", norms)
        yield from _plain(f"source_downs.{i}", f"source_downs.{i}")
        yield from _block(f"source_resblocks.{i}", f"source_blocks.{i}", config, norms)
        for j in range(branches):
            yield from _block(f"resblocks.{i * branches + j}", f"blocks.{i}.{j}", config, norms)
    for i in range(PITCH_REACH):
        # The released predictor is a sequence of convolutions and activations in turn.
        yield from _normed(f"f0_predictor.condnet.{2 * i}", f"pitch.convs.{i}", norms)
    yield from _plain("f0_predictor.classifier", "pitch.out")


def _block(
    theirs: str, ours: str, config: VocoderConfig, norms: tuple[str, str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for unit in range(len(config.resblock_dilations)):
        for half in (1, 2):
            yield f"{ours}.{unit}.snake{half}.alpha", (f"{theirs}.activations{half}.{unit}.alpha",)
            yield from _normed(f"{theirs}.convs{half}.{unit}", f"{ours}.{unit}.conv{half}", norms)


def _plain(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", (f"{theirs}.{name}",)


def _normed(theirs: str, ours: str, norms: tuple[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield f"{ours}.weight", (theirs + norms[0], theirs + norms[1])
    yield f"{ours}.bias", (f"{theirs}.bias",)
