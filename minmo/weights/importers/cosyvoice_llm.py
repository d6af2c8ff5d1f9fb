"""CosyVoice 2's speech LM (`llm.pt`) as a voice token LM: its Qwen2 body, speech embedding, head and marker table.

Its text embedding and unused text head are dropped: MinMo's semantic vectors take the text's place. The output
projector has no counterpart there and stays untrained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minmo.config import BackboneConfig, VoiceDecoderConfig
from minmo.weights.importers.frame import Made, Part, applied, built, count, expected, fields, lazily
from minmo.weights.importers.qwen2 import config_of, key_table
from minmo.weights.stored import CheckpointError, Weights, pickled

_HEAD_DIM = 64
"""Of the released body."""
_BODY = "llm.model."
DROPPED = ("llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight")
"""Released tensors without a place in MinMo."""
TABLES = {
    "speech_embedding.weight": "speech_embedding.weight",
    "llm_decoder.weight": "head.weight",
    "llm_decoder.bias": "head.bias",
    "llm_embedding.weight": "markers.weight",
}
"""Released name -> ours, for all that lies outside the body."""


def convert(released: Mapping[str, Tensor], config: VoiceDecoderConfig) -> dict[str, Tensor]:
    """The released state dict -> that of `VoiceDecoder(config)` without its output projector.

    Every released tensor is used once or dropped by name; CheckpointError names one that is missing, left over or
    misshaped.
    """
    return applied(_table(config), released, "llm.pt", DROPPED)


def open_file(path: Path, body: Path | None = None) -> Part:
    """`llm.pt` as a part without output projector. body: the `config.json` of its Qwen2 body, where it is at hand
    (CosyVoice-BlankEN's); without it heads are of 64, as released, and all other sizes those of the tensors."""
    stored = pickled(path)
    if lacking := [name for name in TABLES if name not in stored]:
        raise CheckpointError(f"{path} lacks the tensor {lacking[0]!r} of a CosyVoice 2 LM: use its llm.pt")
    rows = stored["speech_embedding.weight"].shape[0]
    lm = dataclasses.replace(config_of(body), vocab=0, tied=False) if body else _body(stored, path)
    # Past the codes: end of speech, one that is not used, fill.
    given = {"codes": rows - 3, "vocab": rows, "end_of_speech": rows - 3, "fill": rows - 1, "lm": fields(lm)}
    config = built(VoiceDecoderConfig, {**given, "llm_dim": 1}, path)
    told = {name: value for name, value in fields(config).items() if name != "llm_dim"}
    tensors = lazily(_table(config), stored, str(path), DROPPED, expected("voice_decoder", told))
    dropped = tuple(name for name in DROPPED if name in stored)
    files = (path, body) if body else (path,)
    return Part("voice_decoder", told, tensors, files, "cosyvoice2", dropped=dropped)


def _table(config: VoiceDecoderConfig) -> dict[str, Made]:
    dim, vocab = config.lm.dim, config.vocab
    markers = max(config.start_marker, config.turn_of_speech_marker) + 1
    shapes = {"speech_embedding.weight": (vocab, dim), "head.weight": (vocab, dim), "head.bias": (vocab,)}
    shapes["markers.weight"] = (markers, dim)
    table = {ours: Made((theirs,), shapes=(shapes[ours],)) for theirs, ours in TABLES.items()}
    for name, made in key_table(config.lm).items():
        table[f"lm.{name}"] = dataclasses.replace(made, sources=tuple(_BODY + source for source in made.sources))
    return table


def _body(stored: Weights, path: Path) -> BackboneConfig:
    def size(name: str, axis: int) -> int:
        full = f"{_BODY}model.layers.0.{name}"
        if full not in stored:
            raise CheckpointError(f"{path} lacks the tensor {full!r} of a CosyVoice 2 LM: use its llm.pt")
        return stored[full].shape[axis]

    given = {
        "dim": size("self_attn.q_proj.weight", 1),
        "layers": count(stored, f"{_BODY}model.layers."),
        "heads": size("self_attn.q_proj.weight", 0) // _HEAD_DIM,
        "kv_heads": size("self_attn.k_proj.weight", 0) // _HEAD_DIM,
        "head_dim": _HEAD_DIM,
        "ffn": size("mlp.gate_proj.weight", 0),
    }
    return built(BackboneConfig, given, path)
