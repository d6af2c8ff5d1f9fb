"""Whisper's encoder in Hugging Face's layout (whisper-large-v3) -> the start of a voice encoder.

What Whisper and this encoder share is copied: convolutions, projections of attention, MLPs, norms. Three things differ,
so that the result has to be trained before it hears anything:

- Whisper's first convolution has stride 1 (50 Hz), this one 2 (25 Hz): its kernel is copied, and sees other frames;
- Whisper adds sinusoids to the frames, this encoder rotates queries and keys: the sinusoids are dropped;
- this encoder has an FSMN memory, which passes the values on besides attention: here its middle tap is -1 and the rest
  are zero, so that it adds nothing. A block on a single frame computes exactly what Whisper's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minmo.config import EncoderConfig
from minmo.weights.importers.frame import Importer, Made, Part, built, fields, lazily, stacked
from minmo.weights.stored import CheckpointError, indexed, json_file

NAME = "whisper"
START = "it is Whisper's, at half its frame rate, with other positions"
NOTES = (
    "the first convolution's kernel is Whisper's, which moves by 10 ms; here it moves by 20",
    "Whisper's sinusoidal positions are dropped; queries and keys are rotated instead",
    "the FSMN memory adds nothing (its middle tap is -1, as the memory also passes its input on)",
    "Whisper hears 30 s at once; here a frame sees its own 80 ms and 10 s before it",
)
_POSITIONS = "embed_positions.weight"
_SIZES = {
    "num_mel_bins": "n_mels",
    "d_model": "dim",
    "encoder_attention_heads": "heads",
    "encoder_ffn_dim": "ffn",
    "encoder_layers": "blocks",
}


def open_whisper(folder: Path) -> list[Part]:
    """The encoder of a folder with config.json and safetensors. Raises CheckpointError, which names file and key, for
    another model."""
    config = config_of(folder / "config.json")
    files, stored = indexed(folder)
    prefix = next((p for p in ("model.encoder.", "encoder.") if f"{p}conv1.weight" in stored), None)
    if prefix is None:
        raise CheckpointError(f"{folder} lacks the tensor 'model.encoder.conv1.weight': it holds no Whisper encoder")
    encoder = {name.removeprefix(prefix): weight for name, weight in stored.items() if name.startswith(prefix)}
    dropped = (_POSITIONS,)
    table = key_table(config)
    return [
        Part(
            name="encoder",
            config=fields(config),
            tensors=lazily(table, encoder, str(folder), dropped),
            files=(folder / "config.json", *files),
            importer=NAME,
            start=START,
            notes=NOTES,
            dropped=(*(f"{prefix}{name}" for name in dropped), "all of Whisper's decoder"),
            zeroed=("blocks.*.fsmn",),
        )
    ]


def recognises(path: Path) -> bool:
    try:
        return json_file(path / "config.json").get("model_type") == "whisper"
    except CheckpointError:
        return False


IMPORTER = Importer(
    NAME, ("encoder",), "a Hugging Face folder of Whisper: config.json, *.safetensors", open_whisper, recognises
)


def config_of(path: Path) -> EncoderConfig:
    """Sizes from Whisper's config.json. Raises CheckpointError that names the key for what does not fit."""
    where, described = str(path), json_file(path)
    if (kind := described.get("model_type")) != "whisper":
        raise CheckpointError(f"{where}: model_type is {kind!r:.40}, and only 'whisper' is read")
    if (activation := described.get("activation_function", "gelu")) != "gelu":
        raise CheckpointError(f"{where}: activation_function is {activation!r:.40}, and this encoder has 'gelu'")
    sizes: dict[str, int] = {}
    for theirs, ours in _SIZES.items():
        value = described.get(theirs)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {theirs} must be a positive number, and is {value!r:.40}")
        sizes[ours] = value
    if sizes["dim"] % sizes["heads"]:
        raise CheckpointError(f"{where}: encoder_attention_heads {sizes['heads']} do not divide d_model {sizes['dim']}")
    config: EncoderConfig = built(EncoderConfig, sizes, path)
    return config


def key_table(config: EncoderConfig) -> dict[str, Made]:
    """Each key of `Encoder(config).state_dict()`, and the tensors of Whisper's encoder that it is made of."""
    return dict(_pairs(config))


def _pairs(config: EncoderConfig) -> Iterator[tuple[str, Made]]:
    dim, ffn = config.dim, config.ffn
    yield from _both("conv1", "conv1", dim, config.n_mels, 3)
    yield from _both("conv2", "conv2", dim, dim, 3)
    yield from _both("layer_norm", "norm", dim)
    for n in range(config.blocks):
        ours, theirs = f"blocks.{n}", f"layers.{n}"
        projections = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        yield f"{ours}.qkv.weight", Made(projections, stacked, ((dim, dim),) * 3)
        for part in "qv":
            yield f"{ours}.{part}_bias", Made((f"{theirs}.self_attn.{part}_proj.bias",), shapes=((dim,),))
        yield f"{ours}.fsmn", Made((), partial(_silent, dim, config.fsmn_kernel))
        yield from _both(f"{theirs}.self_attn.out_proj", f"{ours}.out", dim, dim)
        yield from _both(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm", dim)
        yield from _both(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm", dim)
        yield from _both(f"{theirs}.fc1", f"{ours}.up", ffn, dim)
        yield from _both(f"{theirs}.fc2", f"{ours}.down", dim, ffn)


def _silent(dim: int, taps: int) -> Tensor:
    """A memory that takes away the input which it passes on."""
    weight = torch.zeros(dim, 1, taps)
    weight[..., taps // 2] = -1.0
    return weight


def _both(theirs: str, ours: str, *shape: int) -> Iterator[tuple[str, Made]]:
    yield f"{ours}.weight", Made((f"{theirs}.weight",), shapes=(shape,))
    yield f"{ours}.bias", Made((f"{theirs}.bias",), shapes=(shape[:1],))
