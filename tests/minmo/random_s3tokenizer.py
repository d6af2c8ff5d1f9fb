"""A small speech tokenizer of the public `s3tokenizer`'s own class."""

from __future__ import annotations

import sys

import torch

DIM, HEADS, BLOCKS = 128, 2, 6


def random_tokenizer():
    """At a reduced width, every parameter random (norms and biases too); s3tokenizer has been imported."""
    model = sys.modules["s3tokenizer.model_v2"]
    sizes = model.ModelConfig(n_audio_state=DIM, n_audio_head=HEADS, n_audio_layer=BLOCKS)
    tokenizer = model.S3TokenizerV2("speech_tokenizer_v2_25hz", sizes).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for parameter in tokenizer.parameters():
        noise = torch.randn(parameter.shape, generator=g)
        if parameter.dim() == 1:
            parameter += 0.2 * noise
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return tokenizer
