"""Qwen2 weights in Hugging Face's names and layout, to and from the packed backbone; a Qwen2.5 folder as a part.

Both directions are complete: every tensor is used exactly once, and a missing, extra or misshaped one is an error. A
tied head is not stored (as in Hugging Face's own files); one that equals the embedding is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minmo.config import BackboneConfig, from_fields
from minmo.tokenizer.text import TextTokenizer
from minmo.weights.importers.frame import Importer, Made, Part, applied, fields, lazily, stacked
from minmo.weights.stored import CheckpointError, indexed, json_file

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYER = {
    "input_norm.weight": "input_layernorm.weight",
    "o.weight": "self_attn.o_proj.weight",
    "post_norm.weight": "post_attention_layernorm.weight",
    "down.weight": "mlp.down_proj.weight",
}
_SIZES = {
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "vocab": "vocab_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def open_folder(folder: Path) -> list[Part]:
    """A Qwen2.5 of any size: `config.json`, `model.safetensors` or shards and their index, `tokenizer.json`."""
    config = config_of(folder / "config.json")
    files, stored = indexed(folder)
    where = str(folder)
    if config.tied and _HEAD in stored:
        head, embedding = stored[_HEAD], stored.get(_EMBEDDING)
        if embedding is not None and not torch.equal(head.read(), embedding.read()):
            raise CheckpointError(f"{where}: {_HEAD} differs from {_EMBEDDING}, though config.json ties the two")
        stored = {name: weight for name, weight in stored.items() if name != _HEAD}
    text = folder / "tokenizer.json"
    notes: tuple[str, ...] = ()
    if text.is_file():
        size = TextTokenizer.from_file(text).size
        if size > config.vocab:
            raise CheckpointError(f"{text} has {size} ids and the embedding {config.vocab}: use the files of one model")
    else:
        notes = (f"{folder} has no tokenizer.json: this LLM reads and writes ids alone",)
    files = [folder / "config.json", *files, *([text] if text.is_file() else [])]
    words = text.read_text("utf-8") if text.is_file() else None
    tensors = lazily(key_table(config), stored, where)
    return [Part("llm", fields(config), tensors, tuple(files), "qwen2", tokenizer=words, notes=notes)]


def config_of(path: Path) -> BackboneConfig:
    """The backbone that a Hugging Face `config.json` describes. Raises CheckpointError for what is no Qwen2, or one
    that needs what this backbone does not compute."""
    given = json_file(path)
    if given.get("model_type") != "qwen2":
        raise CheckpointError(f"{path}: model_type is {given.get('model_type')!r:.60}, and this reads qwen2")
    rope = given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters is {rope!r:.60}, no object: use the config.json of the weights")
    scaling = given.get("rope_scaling") or {k: v for k, v in rope.items() if k == "rope_type" and v != "default"}
    for name, is_off, wanted in (
        ("hidden_act", given.get("hidden_act", "silu") == "silu", "silu"),
        ("use_sliding_window", not given.get("use_sliding_window"), "false"),
        ("rope_scaling", not scaling, "null"),
    ):
        if not is_off:
            raise CheckpointError(f"{path}: {name} is not {wanted}, which this backbone does not compute")
    for name in (*_SIZES.values(),):
        if name not in given:
            raise CheckpointError(f"{path} lacks the field {name!r}: use the config.json of the weights")
    sizes: dict[str, Any] = {ours: given[theirs] for ours, theirs in _SIZES.items()}
    heads, dim = sizes["heads"], sizes["dim"]
    whole = isinstance(heads, int) and isinstance(dim, int) and heads > 0
    sizes["head_dim"] = given.get("head_dim") or (dim // heads if whole else 0)
    theta = rope.get("rope_theta", given.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{path} lacks the field 'rope_theta': use the config.json of the weights")
    try:
        tied = given.get("tie_word_embeddings", False)
        config: BackboneConfig = from_fields(BackboneConfig, {**sizes, "rope_theta": theta, "tied": tied}, "llm")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def recognises(path: Path) -> bool:
    """Whether a folder holds a Qwen2."""
    try:
        return json_file(path / "config.json").get("model_type") == "qwen2"
    except CheckpointError:
        return False


IMPORTER = Importer(
    "qwen2", ("llm",), "a Hugging Face folder of Qwen2.5: config.json, *.safetensors, tokenizer.json", open_folder,
    recognises,
)  # fmt: skip


def key_table(config: BackboneConfig) -> dict[str, Made]:
    """Each key of `Backbone(config).state_dict()` and what it is made of; complete both ways.

    With `config.vocab` 0 that is `model.layers.*` and `model.norm.weight`.
    """
    dim, ffn = config.dim, config.ffn
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = {ours: Made((theirs,), shapes=(shape,)) for ours, theirs, shape in _whole(config)}
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for name, shape in _layer_shapes(config).items():
            table[ours + name] = Made((theirs + _LAYER[name],), shapes=(shape,))
        for kind, tail in (("weight", (dim,)), ("bias", ())):
            names = tuple(f"{theirs}self_attn.{p}_proj.{kind}" for p in "qkv")
            table[f"{ours}qkv.{kind}"] = Made(names, stacked, tuple((n, *tail) for n in (q, kv, kv)))
        names = tuple(f"{theirs}mlp.{p}_proj.weight" for p in ("gate", "up"))
        table[ours + "gate_up.weight"] = Made(names, interleaved, ((ffn, dim), (ffn, dim)))
    return table


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of both in turn, gate first."""
    return torch.stack([gate, up], dim=1).flatten(0, 1)


def from_hf(state_dict: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """State dict of a `Qwen2ForCausalLM` -> that of `Backbone(config)`.

    Raises ValueError that names the tensor where one is missing, left over or of the wrong shape.
    """
    source = dict(state_dict)
    if config.tied and _HEAD in source:
        head = source.pop(_HEAD)
        if not torch.equal(head, source.get(_EMBEDDING, head)):
            raise ValueError(f"{_HEAD} differs from {_EMBEDDING}: set `tied` to false in the config")
    return applied(key_table(config), source, "the Qwen2 checkpoint")


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
