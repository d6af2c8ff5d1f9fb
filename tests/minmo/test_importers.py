"""Public checkpoints, written small by the libraries that own their layout, read as parts of a MinMo: same numbers."""

from __future__ import annotations

import pytest
import torch

from minmo.state import full_lengths
from minmo.weights.importers.qwen2 import open_folder
from minmo.weights.parts import build, open_parts, save_parts

NANO_TOKENIZER = "minmo/assets/nano/tokenizer.json"


def write_qwen(folder, tied, shard="200KB", dtype=torch.float32, **changes):
    """A random Qwen2 in transformers' own files -> the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96,
        vocab_size=400, tie_word_embeddings=tied, **changes,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["200KB", "1GB"])
def test_qwen_logits_are_those_of_transformers(tmp_path, tied, shard):
    theirs = write_qwen(tmp_path / "hf", tied, shard)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file() == (shard == "200KB")
    save_parts(open_folder(tmp_path / "hf"), tmp_path / "out")
    (part,) = open_parts(tmp_path / "out")
    ours = build(part)
    ids = torch.randint(0, 400, (2, 9))
    with torch.no_grad():
        hidden = ours(ours.embed(ids), full_lengths(ids))
        ours_logits = ours.logits(hidden)
        torch.testing.assert_close(ours_logits, theirs(ids).logits, atol=2e-5, rtol=1e-4)
