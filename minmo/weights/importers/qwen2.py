"""Qwen2 weights in Hugging Face's names and layout, to and from the packed backbone.

Both directions are complete: every tensor is used exactly once, and a missing, extra or misshaped one is an error. A
tied head is not stored (as in Hugging Face's own files); `from_hf` accepts one that equals the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minmo.config import BackboneConfig

_LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "o.weight": "self_attn.o_proj.weight",
    "post_norm.weight": "post_attention_layernorm.weight",
    "down.weight": "mlp.down_proj.weight",
}


def from_hf(state_dict: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """State dict of a `Qwen2ForCausalLM` -> that of `Backbone(config)`.

    With `config.vocab` 0 only `model.layers.*` and `model.norm.weight` may be there. Raises ValueError that names the
    tensor where one is missing, left over or of the wrong shape.
    """
    source = dict(state_dict)
    if config.tied and "lm_head.weight" in source:
        head = source.pop("lm_head.weight")
        if not torch.equal(head, source.get("model.embed_tokens.weight", head)):
            raise ValueError("lm_head.weight differs from model.embed_tokens.weight: set `tied` to false in the config")
    dim, ffn = config.dim, config.ffn
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    out: dict[str, Tensor] = {}
    for ours, theirs, shape in _whole(config):
        out[ours] = _take(source, theirs, shape)
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for name, shape in _layer_shapes(config).items():
            out[ours + name] = _take(source, theirs + _LAYER[name], shape)
        for kind, tail in (("weight", (dim,)), ("bias", ())):
            parts = [
                _take(source, f"{theirs}self_attn.{p}_proj.{kind}", (n, *tail))
                for p, n in (("q", q), ("k", kv), ("v", kv))
            ]
            out[f"{ours}qkv.{kind}"] = torch.cat(parts)
        gate, up = (_take(source, f"{theirs}mlp.{p}_proj.weight", (ffn, dim)) for p in ("gate", "up"))
        out[ours + "gate_up.weight"] = torch.stack([gate, up], dim=1).reshape(2 * ffn, dim)
    _nothing_left(source, "the Qwen2 checkpoint")
    return out


def to_hf(state_dict: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """State dict of `Backbone(config)` -> that of a `Qwen2ForCausalLM`; the inverse of `from_hf`, same errors."""
    source = dict(state_dict)
    dim, ffn = config.dim, config.ffn
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    out: dict[str, Tensor] = {}
    for ours, theirs, shape in _whole(config):
        out[theirs] = _take(source, ours, shape)
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for name, shape in _layer_shapes(config).items():
            out[theirs + _LAYER[name]] = _take(source, ours + name, shape)
        for kind, tail in (("weight", (dim,)), ("bias", ())):
            packed = _take(source, f"{ours}qkv.{kind}", (q + 2 * kv, *tail))
            for p, part in zip("qkv", packed.split([q, kv, kv]), strict=True):
                out[f"{theirs}self_attn.{p}_proj.{kind}"] = part.clone()
        gate_up = _take(source, ours + "gate_up.weight", (2 * ffn, dim))
        out[theirs + "mlp.gate_proj.weight"] = gate_up[0::2].clone()
        out[theirs + "mlp.up_proj.weight"] = gate_up[1::2].clone()
    _nothing_left(source, "the backbone's state dict")
    return out


def _whole(config: BackboneConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """Tensors outside the layers: (our name, their name, shape)."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("norm.weight", "model.norm.weight", (config.dim,))]
    if config.vocab:
        tensors.append(("embedding.weight", "model.embed_tokens.weight", (config.vocab, config.dim)))
        if not config.tied:
            tensors.append(("head.weight", "lm_head.weight", (config.vocab, config.dim)))
    return tensors


def _layer_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    return {
        "input_norm.weight": (config.dim,),
        "o.weight": (config.dim, config.heads * config.head_dim),
        "post_norm.weight": (config.dim,),
        "down.weight": (config.dim, config.ffn),
    }


def _take(source: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in source:
        raise ValueError(f"the tensor {name!r} is missing: the weights do not belong to this config")
    tensor = source.pop(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"the tensor {name!r} has the shape {tuple(tensor.shape)}, but the config wants {shape}")
    return tensor


def _nothing_left(source: dict[str, Tensor], where: str) -> None:
    if source:
        raise ValueError(
            f"{where} holds {len(source)} tensors that the config has no place for, such as {min(source)!r}"
        )
