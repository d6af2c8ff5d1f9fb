"""CosyVoice 2's speech LM (`llm.pt`) as a voice token LM: its Qwen2 body, speech embedding, head and marker table.

Its text embedding and unused text head are dropped: MinMo's semantic vectors take the text's place. The output
projector has no counterpart there and stays untrained.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from minmo.config import VoiceDecoderConfig
from minmo.weights.importers.qwen2 import from_hf

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

    Every released tensor is used once or dropped by name; ValueError names one that is missing, left over or misshaped.
    """
    dim, vocab = config.lm.dim, config.vocab
    markers = max(config.start_marker, config.turn_of_speech_marker) + 1
    shapes = {"speech_embedding.weight": (vocab, dim), "head.weight": (vocab, dim), "head.bias": (vocab,)}
    shapes["markers.weight"] = (markers, dim)
    out: dict[str, Tensor] = {}
    for theirs, ours in TABLES.items():
        if theirs not in released:
            raise ValueError(f"llm.pt lacks the tensor {theirs!r}")
        if tuple(released[theirs].shape) != shapes[ours]:
            raise ValueError(
                f"llm.pt: {theirs!r} has the shape {tuple(released[theirs].shape)}, the config wants {shapes[ours]}"
            )
        out[ours] = released[theirs]
    rest = {k: v for k, v in released.items() if k not in TABLES and k not in DROPPED}
    if strange := sorted(k for k in rest if not k.startswith(_BODY)):
        raise ValueError(f"llm.pt holds {strange[0]!r}, which this config has no place for")
    body = from_hf({k.removeprefix(_BODY): v for k, v in rest.items()}, config.lm)
    return out | {f"lm.{name}": tensor for name, tensor in body.items()}
