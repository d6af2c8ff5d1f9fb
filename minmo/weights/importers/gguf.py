"""A GGUF file in the Llama layout (SmolLM2, Llama 2 and 3, as llama.cpp stores them) -> `Backbone` and its tokenizer.

Quantised weights become floats. What the layout and the backbone differ in: llama.cpp stores the rows of each query and
key head as (even, odd) pairs of a rotation, Hugging Face and the backbone as two halves; and the backbone has biases of
queries, keys and values, which are zero here: the same numbers.

Source: the GGUF specification and the public converter's row order (llama.cpp, `LlamaModel.permute`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minmo.config import BackboneConfig
from minmo.weights.importers.frame import Importer, Made, Part, built, fields, lazily
from minmo.weights.importers.gguf_tokenizer import tokenizer_json, with_control_tokens
from minmo.weights.importers.qwen2 import interleaved
from minmo.weights.stored import CheckpointError, Weight, Weights

NAME = "gguf"
_LLAMA = "llama"
_WHOLE = (int,)
_NUMBER = (int, float)
REFUSED: dict[str, tuple[Any, str]] = {
    "expert_count": (0, "a mixture of experts"),
    "rope.scaling.type": ("none", "scaled rotary positions"),
    "attention.sliding_window": (0, "windowed attention"),
    "rope.scale_linear": (1.0, "scaled rotary positions"),
}
"""Metadata that a backbone has no place for, the value at which it says nothing, and what it would mean."""


def open_gguf(path: Path) -> list[Part]:
    """The language model in one file. Raises CheckpointError, which names file and key, for what is no such file."""
    reader = _reader(path)
    known = _metadata(reader, path)
    stored = {tensor.name: _weight(tensor, path) for tensor in reader.tensors}
    config = config_of(known, stored, path)
    table = key_table(config)
    return [
        Part(
            name="llm",
            config=fields(config),
            tensors=lazily(table, stored, str(path)),
            files=(path,),
            importer=NAME,
            tokenizer=tokenizer_json(known, str(path)),
            chat_template=with_control_tokens(known, str(path)),
            notes=_notes(reader),
            zeroed=("layers.*.qkv.bias",),
        )
    ]


def recognises(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


IMPORTER = Importer(
    NAME, ("llm",), "a .gguf file of a SmolLM2 or of another Llama with a byte-level BPE", open_gguf, recognises
)


def key_table(config: BackboneConfig) -> dict[str, Made]:
    """Each key of `Backbone(config).state_dict()`, and the tensors of the file that it is made of."""
    return dict(_pairs(config))


def config_of(known: Mapping[str, Any], stored: Weights, path: Path) -> BackboneConfig:
    """Sizes from a file's metadata. Raises CheckpointError for another architecture, and for what a backbone lacks."""
    where, architecture = str(path), known.get("general.architecture")
    if architecture != _LLAMA:
        raise CheckpointError(
            f"{where}: general.architecture is {architecture!r:.40}, and only {_LLAMA!r} (SmolLM2, Llama) is read; "
            "import other models from their Hugging Face folder"
        )
    for key, (nothing, meaning) in REFUSED.items():
        if (value := known.get(f"{_LLAMA}.{key}", nothing)) != nothing:
            raise CheckpointError(f"{where}: {_LLAMA}.{key} is {value!r:.40}: {meaning}, which the backbone has not")
    if "rope_freqs.weight" in stored:
        raise CheckpointError(f"{where} has 'rope_freqs.weight': scaled rotary positions, which the backbone has not")

    def number(key: str, default: float | None = None, kinds: tuple[type, ...] = _WHOLE) -> Any:
        value: Any = known.get(f"{_LLAMA}.{key}", default)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not value > 0:
            what = "is missing" if value is None else f"is {value!r:.40}, and should be one positive number"
            raise CheckpointError(f"{where}: {_LLAMA}.{key} {what}")
        return value

    dim, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", dim // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if number(key, head_dim) != head_dim:
            raise CheckpointError(f"{where}: {_LLAMA}.{key} must be the width of a head, {head_dim}")
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{where} lacks the tensor 'token_embd.weight'")
    sizes = {
        "dim": dim, "layers": number("block_count"), "heads": heads,
        "kv_heads": number("attention.head_count_kv", heads), "head_dim": head_dim,
        "ffn": number("feed_forward_length"),
        "vocab": stored["token_embd.weight"].shape[0], "rope_theta": number("rope.freq_base", 10_000.0, _NUMBER),
        "norm_eps": number("attention.layer_norm_rms_epsilon", None, _NUMBER), "tied": "output.weight" not in stored,
    }  # fmt: skip
    config: BackboneConfig = built(BackboneConfig, sizes, path)
    return config


def _pairs(config: BackboneConfig) -> Iterator[tuple[str, Made]]:
    dim, ffn = config.dim, config.ffn
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def alone(name: str, *shape: int) -> Made:
        return Made((name,), shapes=(shape,))

    yield "embedding.weight", alone("token_embd.weight", config.vocab, dim)
    yield "norm.weight", alone("output_norm.weight", dim)
    if not config.tied:
        yield "head.weight", alone("output.weight", config.vocab, dim)
    join = partial(_qkv, config.heads, config.kv_heads)
    for i in range(config.layers):
        ours, theirs = f"layers.{i}", f"blk.{i}"
        yield f"{ours}.input_norm.weight", alone(f"{theirs}.attn_norm.weight", dim)
        parts = tuple(f"{theirs}.attn_{part}.weight" for part in "qkv")
        yield f"{ours}.qkv.weight", Made(parts, join, ((q, dim), (kv, dim), (kv, dim)))
        yield f"{ours}.qkv.bias", Made((), partial(torch.zeros, q + 2 * kv))
        yield f"{ours}.o.weight", alone(f"{theirs}.attn_output.weight", dim, q)
        yield f"{ours}.post_norm.weight", alone(f"{theirs}.ffn_norm.weight", dim)
        gate_up = (f"{theirs}.ffn_gate.weight", f"{theirs}.ffn_up.weight")
        yield f"{ours}.gate_up.weight", Made(gate_up, interleaved, ((ffn, dim), (ffn, dim)))
        yield f"{ours}.down.weight", alone(f"{theirs}.ffn_down.weight", dim, ffn)


def _qkv(heads: int, kv_heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([_halves(q, heads), _halves(k, kv_heads), v])


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, 2) -> (head, 2, pair): what a rotation turns together lies half a head apart."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files are read by the gguf package: pip install 'minmo[import]'") from None
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give a .gguf file")
    if not recognises(path):
        raise CheckpointError(f"{path} is no GGUF file: its first four bytes are not GGUF")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # numpy's and Python's own, one for each way in which bytes can lack
        first = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is cut or damaged ({first:.100}): fetch it again") from None


def _metadata(reader: Any, path: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}): fetch it again") from None


def _weight(tensor: Any, path: Path) -> Weight:
    from gguf.quants import dequantize

    def read() -> Tensor:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: {tensor.name!r} is {tensor.tensor_type.name}, which the gguf package cannot turn into "
                "floats; take a file of another quantisation, such as Q8_0"
            ) from None
        return torch.tensor(values)  # a copy: the file is mapped

    return Weight(tuple(int(n) for n in reversed(tensor.shape)), torch.float32, read, str(path))


def _notes(reader: Any) -> tuple[str, ...]:
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors} - {"F32", "F16", "BF16"})
    if not kinds:
        return ()
    return (f"its weights were stored as {', '.join(kinds)}, and are what these say, as floats",)
