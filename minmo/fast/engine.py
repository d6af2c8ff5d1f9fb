"""`FastMinMo`: a MinMo for serving. The same parts with the same steps, on weights that are packed once.

It is built from a readable `MinMo`, whose weights it takes over, and serves wherever that does. Parts that hear, read
and speak (encoder, projector, LLM, voice decoder, full-duplex predictor) take the asked format; the front end, flow and
vocoder keep theirs.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from minmo.fast.linear import WEIGHTS, activations, packed
from minmo.model import MinMo
from minmo.modules.backbone import Backbone
from minmo.weights import load

LANGUAGE = ("encoder", "projector", "llm", "voice_decoder", "duplex")
"""Parts whose weights are packed."""


class FastMinMo(MinMo):
    """A MinMo for inference alone.

    model: taken over, so that nothing is held twice: its parts raise when they are used again. keep_model: copied
    instead. weights: "fp32", "bf16", "int8" (a scale an output) or "int4" (a scale and a zero point for 32 inputs), by
    default the model's own dtype. Raises ValueError for an unknown format.
    """

    def __init__(self, model: MinMo, *, weights: str | None = None, keep_model: bool = False) -> None:
        nn.Module.__init__(self)  # the parts exist
        if isinstance(model, FastMinMo):
            raise ValueError("this is a FastMinMo already; build another from a MinMo (minmo.load)")
        if model.device.type == "meta":
            raise ValueError("this model holds shapes only (device 'meta'); load it on cpu or cuda to serve it")
        if not model.has_parts:
            raise ValueError(
                "this model's weights were given to a FastMinMo: use that, or make it with keep_model=True"
            )
        if weights is None:
            weights = "fp32" if model.dtype == torch.float32 else "bf16"
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        self.weights = weights
        self.config, self.tokenizer = model.config, model.tokenizer
        self.trained, self.provenance = model.trained, model.provenance
        self.register_buffer("speaker", model.speaker)
        parts = copy.deepcopy(list(model.named_children())) if keep_model else model.give_up()
        for name, part in parts:
            self.add_module(name, optimised(part, weights) if name in LANGUAGE else part)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, preset_or_dir: str | Path = "nano", *, weights: str | None = None) -> FastMinMo:
        """From a preset or a checkpoint directory; arguments and errors as of `minmo.load` and FastMinMo."""
        return cls(load(preset_or_dir), weights=weights)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language parts' activations."""
        return activations(self.weights)


def optimised(part: nn.Module, weights: str) -> nn.Module:
    """A part with its linear layers packed and everything else in the format's activations, in place."""
    for module in part.modules():
        if isinstance(module, Backbone) and module.embedding is not None and module.head is None:  # tied
            vocab, dim = module.embedding.weight.shape
            module.head = nn.Linear(dim, vocab, bias=False, device="meta")
            module.head.weight = module.embedding.weight
    for module in list(part.modules()):
        for name, child in module.named_children():
            # The output projector's weight goes to `mix_semantic_speech` as it is.
            if isinstance(child, nn.Linear) and name != "output_projector":
                setattr(module, name, packed(child, weights))
    return part.to(activations(weights))
