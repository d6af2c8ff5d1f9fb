"""CosyVoice 2's speech tokenizer v2, as a state dict of the public `s3tokenizer` package -> `SpeechTokenizer`.

(`s3tokenizer` turns the released `speech_tokenizer_v2.onnx` into such a state dict.) Query, key and value weights are
stacked to one; everything else keeps its values and shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from minmo.config import SpeechTokenizerConfig


def key_table(config: SpeechTokenizerConfig) -> dict[str, tuple[str, ...]]:
    """Every key of `SpeechTokenizer(config).state_dict()` and the released keys stacked to it, each used once."""
    return dict(_pairs(config))


def convert(released: Mapping[str, Tensor], config: SpeechTokenizerConfig) -> dict[str, Tensor]:
    """A released state dict under our names. Raises ValueError that names a missing or an unknown tensor."""
    table = key_table(config)
    wanted = {name for names in table.values() for name in names}
    if missing := sorted(wanted - set(released)):
        raise ValueError(f"the tokenizer lacks {len(missing)} tensors of this size, the first is {missing[0]!r}")
    if unknown := sorted(set(released) - wanted):
        raise ValueError(f"the tokenizer has {len(unknown)} tensors that this size lacks, the first is {unknown[0]!r}")
    return {ours: torch.cat([released[name] for name in names]) for ours, names in table.items()}


def _pairs(config: SpeechTokenizerConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for conv in ("conv1", "conv2"):
        yield from _both(f"encoder.{conv}", f"encoder.{conv}")
    for n in range(config.encoder.blocks):
        theirs = ours = f"encoder.blocks.{n}"
        yield f"{ours}.qkv.weight", tuple(f"{theirs}.attn.{part}.weight" for part in ("query", "key", "value"))
        yield f"{ours}.q_bias", (f"{theirs}.attn.query.bias",)
        yield f"{ours}.v_bias", (f"{theirs}.attn.value.bias",)
        yield f"{ours}.fsmn", (f"{theirs}.attn.fsmn_block.weight",)
        yield from _both(f"{theirs}.attn.out", f"{ours}.out")
        yield from _both(f"{theirs}.attn_ln", f"{ours}.attention_norm")
        yield from _both(f"{theirs}.mlp_ln", f"{ours}.mlp_norm")
        yield from _both(f"{theirs}.mlp.0", f"{ours}.up")
        yield from _both(f"{theirs}.mlp.2", f"{ours}.down")
    yield from _both("quantizer._codebook.project_down", "quantizer")


def _both(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for end in ("weight", "bias"):
        yield f"{ours}.{end}", (f"{theirs}.{end}",)
