"""Weights on disk: a checkpoint is a directory with `config.json`, `model.safetensors` and `tokenizer.json`."""

from minmo.weights.checkpoint import CheckpointError, load, save

__all__ = ["CheckpointError", "load", "save"]
