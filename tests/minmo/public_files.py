"""Writers of public checkpoints in miniature, random: by the library that owns the layout where there is one, else by
its documented names (golden/*_keys.txt)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
import transformers

import minmo
from minmo.config import EncoderConfig, FlowConfig, SpeechTokenizerConfig, VocoderConfig
from minmo.weights.importers import cosyvoice_flow, cosyvoice_hift
from minmo.weights.importers.frame import Part, expected, fields, module
from minmo.weights.parts import save_parts

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = Path(minmo.__file__).parent / "assets" / "nano" / "tokenizer.json"
FLOW = FlowConfig(
    codes=27, dim=16, heads=2, ffn=32, blocks=1, up_blocks=1, speaker_dim=5, estimator_dim=16, estimator_heads=1,
    estimator_mid_blocks=1, estimator_transformers=1,
)  # fmt: skip
VOCODER = VocoderConfig(base_channels=16, f0_channels=8)
ENCODER = EncoderConfig(n_mels=16, dim=64, heads=1, ffn=64, blocks=2, fsmn_kernel=3)


def qwen(folder, *, tied=False, shard="300KB", dtype=torch.float32, vocab=1024, layers=2):
    """A Qwen2 in transformers' own files, with a tokenizer.json -> transformers' model."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=96,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 5e4},
        )  # fmt: skip
    )
    for name, parameter in model.named_parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.to(dtype).eval().save_pretrained(folder, max_shard_size=shard)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    return model


def cosyvoice(folder, norms=cosyvoice_hift.PARAMETRIZED):
    """CosyVoice 2's three files -> what the vocoder's folded weights must be, by torch's own weight norm."""
    blank = folder / "CosyVoice-BlankEN"
    body = qwen(blank, tied=True, vocab=40, layers=1)
    state = {f"llm.model.{name}": tensor for name, tensor in body.state_dict().items()}
    state["llm_embedding.weight"] = torch.randn(2, 128)
    state["speech_embedding.weight"] = torch.randn(FLOW.codes + 3, 128)
    state["llm_decoder.weight"], state["llm_decoder.bias"] = (
        torch.randn(FLOW.codes + 3, 128),
        torch.randn(FLOW.codes + 3),
    )
    torch.save(state, folder / "llm.pt")

    ours = expected("flow", fields(FLOW))
    names = cosyvoice_flow.key_table(FLOW)
    assert set(names) == _documented("flow", r"encoder.*encoders\.([1-9])|mid_blocks\.([1-9])|\.1\.([1-3])\.")
    flow = {theirs: 0.1 * torch.randn(ours[mine]) for theirs, mine in names.items()}
    torch.save(flow, folder / "flow.pt")

    ours, hift, folded = expected("vocoder", fields(VOCODER)), {}, {}
    for mine, theirs in cosyvoice_hift.key_table(VOCODER, norms).items():
        tensor = 0.1 * torch.randn(ours[mine])
        if len(theirs) == 1:
            hift[theirs[0]] = folded[mine] = tensor
        else:
            hift[theirs[0]], hift[theirs[1]] = torch.rand(len(tensor), 1, 1), tensor
            folded[mine] = torch._weight_norm(tensor, hift[theirs[0]], 0)
    documented = _documented("hift", "^$")
    if norms == cosyvoice_hift.PARAMETRIZED:
        assert set(hift) == documented
    torch.save({f"generator.{name}": tensor for name, tensor in hift.items()}, folder / "hift.pt")
    return folded


def encoder(folder, config=ENCODER, name="encoder"):
    """A random encoder, or a speech tokenizer of one, as a folder of parts; a stand-in for one that was imported."""
    if name == "speech_tokenizer":
        config = SpeechTokenizerConfig(config, (3, 3, 3))
    torch.manual_seed(1)
    state = module(name, fields(config)).state_dict()
    source = folder.with_suffix(".bin")
    source.write_bytes(b"public")
    from minmo.weights.stored import Weight

    tensors = {key: Weight.of(tensor) for key, tensor in state.items()}
    start = "the encoder of a test, a start for training and no MinMo encoder" if name == "encoder" else ""
    save_parts([Part(name, fields(config), tensors, (source,), "whisper", start=start)], folder)


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None) if value is None else content.update({key: value})
    path.write_text(json.dumps(content))


def _documented(name, beyond):
    lines = (GOLDEN / f"{name}_keys.txt").read_text().splitlines()
    return {line.split()[0] for line in lines if not re.search(beyond, line.split()[0])}
