"""Weights on disk: a checkpoint is a directory with `config.json`, `model.safetensors` or shards, `tokenizer.json` and
`manifest.json`."""

from minmo.weights.checkpoint import load, pick_device, save, untrained
from minmo.weights.stored import CheckpointError

__all__ = ["CheckpointError", "load", "pick_device", "save", "untrained"]
