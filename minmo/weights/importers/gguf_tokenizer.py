"""The byte-level BPE in a GGUF file's metadata -> a tokenizer.json of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minmo.weights.stored import CheckpointError

CONTROL, USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` of what text never spells, and of what is one token wherever it stands."""
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    "llama-bpe": [_SPLIT, {**_BYTES, "use_regex": False}],
}
"""How text is cut before the merges, by `tokenizer.ggml.pre`: as in the Hugging Face files of these families."""


def tokenizer_json(known: Mapping[str, Any], where: str) -> str:
    """A GGUF file's metadata -> the text of a tokenizer.json. Raises CheckpointError, which names the key, for another
    kind of tokenizer and for tables that do not fit each other."""
    if (kind := known.get("tokenizer.ggml.model")) != "gpt2":
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model is {kind!r:.40}, and only 'gpt2' (byte-level BPE) is read; "
            "take a model of the SmolLM2 or Llama 3 family"
        )
    pre = known.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.pre is {pre!r:.40}; the known ones are {', '.join(PRE_TOKENIZERS)}"
        )
    tokens, types = _texts(known, "tokens", where), known.get("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens has the same token twice")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type must have one entry for each of {len(tokens)} tokens"
        )
    merges = [tuple(merge.split(" ")) for merge in _texts(known, "merges", where)]
    if wrong := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()]:
        raise CheckpointError(f"{where}: tokenizer.ggml.merges has {' '.join(wrong[0])!r:.60}, no two tokens that join")
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": kind == CONTROL,
        }
        for (token, i), kind in zip(vocab.items(), types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
        "vocab": vocab, "merges": merges,
    }  # fmt: skip
    steps = PRE_TOKENIZERS[pre]
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True}, "model": model,
    }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False)


def with_control_tokens(known: Mapping[str, Any], where: str) -> str | None:
    """The chat template of a GGUF file, if it has one; it then defines itself the control tokens that it asks for."""
    template = known.get("tokenizer.chat_template")
    if template is None:
        return None
    if not isinstance(template, str):
        raise CheckpointError(f"{where}: tokenizer.chat_template is no text")
    tokens = _texts(known, "tokens", where)
    for kind in ("bos", "eos"):
        number = known.get(f"tokenizer.ggml.{kind}_token_id")
        if f"{kind}_token" in template:
            if not isinstance(number, int) or not 0 <= number < len(tokens):
                raise CheckpointError(f"{where}: tokenizer.ggml.{kind}_token_id is {number!r:.40}, none of its tokens")
            template = f"{{%- set {kind}_token = {json.dumps(tokens[number])} -%}}{template}"
    return template


def _texts(known: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = known.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise CheckpointError(f"{where}: tokenizer.ggml.{key} is no list of texts")
    return value
