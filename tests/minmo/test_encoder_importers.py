"""The speech tokenizer in CosyVoice 2's onnx layout, and Whisper's encoder: small random ones, written by the libraries
that own them, read as parts."""

from __future__ import annotations

import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from random_s3tokenizer import BLOCKS, DIM, HEADS, random_tokenizer

from minmo.modules.encoder import View
from minmo.weights import CheckpointError, manifest
from minmo.weights.importers import speech_tokenizer_onnx, whisper
from minmo.weights.parts import build, open_parts, save_parts

onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def s3():
    """`s3tokenizer`; torchaudio, whose PyPI build does not load beside a CPU torch, is only its file reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
        yield pytest.importorskip("s3tokenizer")


def exported(s3, path):
    """A random tokenizer of s3tokenizer's class, exported by PyTorch with the names of the released file -> mel frames
    of real speech (128, 300), and the ids that the file gives for them."""
    tokenizer = random_tokenizer()
    sound = sorted((Path(s3.__file__).parent / "assets").glob("*.wav"))[0]
    mel = s3.log_mel_spectrogram(torch.from_numpy(soundfile.read(sound, dtype="float32")[0]))[:, :300]
    project = tokenizer.quantizer._codebook.project_down
    features = project(tokenizer.encoder(mel[None], torch.tensor([300]))[0][0])
    project.weight /= features.std(dim=0)[:, None]
    project.bias.copy_((project.bias - features.mean(dim=0)) / features.std(dim=0))

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.quantizer = tokenizer.encoder, tokenizer.quantizer

        def forward(self, feats, feats_length):
            return self.quantizer.encode(self.encoder(feats, feats_length)[0])

    # The exporter knows no complex numbers: the rotations are given as what their only user makes of them.
    tokenizer.encoder.freqs_cis = torch.view_as_real(tokenizer.encoder.freqs_cis)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch, "view_as_real", lambda x: x)
        torch.onnx.export(
            Whole(), (mel[None], torch.tensor([300])), path, dynamo=False, opset_version=17,
            input_names=["feats", "feats_length"], output_names=["indices"],
        )  # fmt: skip
        ids = Whole()(mel[None], torch.tensor([300]))[0]
    return mel, ids


@pytest.fixture(scope="module")
def released(s3, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "speech_tokenizer_v2.onnx"
    return path, *exported(s3, path)


def test_onnx_tokens_are_those_of_onnxruntime_and_s3tokenizer(released):
    path, mel, ids = released
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"feats": mel[None].numpy(), "feats_length": np.array([300])})
    tokenizer, _ = speech_tokenizer_onnx.open_onnx(path)
    ours, counts = build(tokenizer).encode(mel.T[None], torch.tensor([300], dtype=torch.int32))
    assert counts.tolist() == [75] and len(set(ids.tolist())) > 40
    # A feature may lie on a boundary between two levels, where rounding decides.
    assert int((ours[0] != ids).sum()) <= 1 and int((ours[0].numpy() != theirs[0]).sum()) <= 1


def with_released_names(graph):
    """The names that s3tokenizer asks for: those of the released file's initialisers outside the blocks, no `encoder`
    before the blocks, and a product and a sum for the last projection."""
    names = {"quantizer._codebook.project_down.bias": "quantizer.project_in.bias"}
    for node in graph.node:
        node.name = node.name.replace("/encoder/blocks", "/blocks")
        if node.op_type == "Conv" and "blocks" not in node.name:
            first = 2216 if "conv1" in node.name else 2218
            names |= {node.input[1]: f"onnx::Conv_{first}", node.input[2]: f"onnx::Conv_{first + 1}"}
    (last,) = (node for node in graph.node if node.op_type == "Gemm")
    x, weight, bias = last.input
    names[weight] = "onnx::MatMul_2536"
    tensor = next(tensor for tensor in graph.initializer if tensor.name == weight)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).T.copy(), weight))
    at = list(graph.node).index(last)
    graph.node.insert(at, onnx.helper.make_node("Add", ["product", bias], [last.output[0]], "/quantizer/Add"))
    graph.node.insert(at, onnx.helper.make_node("MatMul", [x, weight], ["product"], "/quantizer/MatMul"))
    graph.node.remove(last)
    for holder in graph.node:
        for i, name in enumerate(holder.input):
            holder.input[i] = names.get(name, name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def test_onnx_is_mapped_as_s3tokenizer_maps_it(s3, released, tmp_path):
    path = edited(released[0], tmp_path / "a.onnx", with_released_names)
    theirs = s3.utils.onnx2torch(str(path))
    ours, epsilons = speech_tokenizer_onnx.released_names(path)
    assert set(ours) == set(theirs) and epsilons == (1e-5, 1e-5)
    for name, weight in ours.items():
        assert torch.equal(weight.read(), theirs[name]), name


def test_an_encoder_start_is_called_one(released, tmp_path):
    path, mel, _ = released
    parts = speech_tokenizer_onnx.open_onnx(path)
    save_parts(parts, tmp_path / "out")
    origins, _ = manifest.read(tmp_path / "out")
    assert origins["speech_tokenizer"].state == "imported" and origins["encoder"].state == "start"
    assert "quantiser" in origins["encoder"].start
    tokenizer, encoder = open_parts(tmp_path / "out")
    assert encoder.config["blocks"] == BLOCKS and not encoder.config["final_norm"]
    lengths = torch.tensor([300], dtype=torch.int32)
    alone, _ = build(encoder)(mel.T[None], lengths)
    inside, _ = build(tokenizer).encoder(mel.T[None], lengths)
    assert torch.equal(alone, inside)


def edited(path, out, edit):
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, out)
    return out


def without_norms(graph):
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            node.op_type = "Other"


def with_more_blocks(graph):
    graph.node.extend([node for node in graph.node if "blocks.5" in node.name])


def with_bias_on_keys(graph):
    key = next(node for node in graph.node if node.name.endswith("blocks.0/attn/key/MatMul"))
    bias = onnx.numpy_helper.from_array(np.zeros(DIM, np.float32), "bias")
    graph.initializer.append(bias)
    graph.node.append(onnx.helper.make_node("Add", [key.output[0], "bias"], ["unused"], "more"))


def wider(graph):
    name = next(n.input[1] for n in graph.node if n.name.endswith("blocks.2/mlp/mlp.0/MatMul"))
    tensor = next(t for t in graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((DIM, 8), np.float32), name))


def other_epsilon(graph):
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    next(a for a in norms[4].attribute if a.name == "epsilon").f = 0.1


@pytest.mark.parametrize(
    "edit, complaint",
    [
        (without_norms, r"has 0 nodes LayerNormalization with weights, not 12: it is no speech_tokenizer_v2.onnx"),
        (with_more_blocks, r"has 9 nodes Conv with weights, not 8: it is no"),
        (with_bias_on_keys, r"blocks.0/attn/key/MatMul has a bias: it is no speech_tokenizer_v2.onnx"),
        (wider, r"what stands for 'encoder.blocks.2.mlp.0.weight' has the shape \(8, 128\)"),
        (other_epsilon, r"epsilons of its norms differ"),
    ],
)
def test_onnx_of_another_version(released, tmp_path, edit, complaint):
    path = edited(released[0], tmp_path / "a.onnx", edit)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        speech_tokenizer_onnx.open_onnx(path)
    assert str(path) in str(caught.value)


def test_onnx_that_is_cut_or_none(released, tmp_path):
    whole = released[0].read_bytes()
    for size in (0, 10, len(whole) // 2):
        (tmp_path / "a.onnx").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a.onnx (is cut, or no onnx file|has 0 nodes)"):
            speech_tokenizer_onnx.open_onnx(tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match="there is no file"):
        speech_tokenizer_onnx.open_onnx(tmp_path / "none.onnx")


# Whisper


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=DIM, encoder_layers=2, encoder_attention_heads=HEADS, encoder_ffn_dim=256, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=64, num_mel_bins=16, vocab_size=100, max_source_positions=50,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    return folder, model.model.encoder


def of_one(layer, x):
    out = layer(x, None)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("view", [View(0), View(2, 125)])
def test_a_block_on_one_frame_is_whispers(theirs, view):
    """There the positions and the mask say nothing, and the memory is to say nothing."""
    folder, encoder = theirs
    (part,) = whisper.open_whisper(folder)
    ours = build(part)
    x = expected = torch.randn(5, 1, DIM, generator=torch.Generator().manual_seed(0))
    rows, one = torch.arange(5, dtype=torch.int32), torch.ones(5, dtype=torch.int32)
    for layer, block in zip(encoder.layers, ours.blocks, strict=True):
        expected = of_one(layer, expected)
        x = block(x, one, None, None, rows, torch.zeros_like(one), one, view)
        torch.testing.assert_close(x, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.norm(x), encoder.layer_norm(expected), atol=2e-5, rtol=1e-5)


def test_projections_of_many_frames_are_whispers(theirs):
    folder, encoder = theirs
    ours = build(whisper.open_whisper(folder)[0])
    x = torch.randn(1, 9, DIM, generator=torch.Generator().manual_seed(0))
    for layer, block in zip(encoder.layers, ours.blocks, strict=True):
        normed = layer.self_attn_layer_norm(x)
        attention = layer.self_attn
        expected = torch.cat([f(normed) for f in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
        bias = torch.cat([block.q_bias, torch.zeros(DIM), block.v_bias])
        torch.testing.assert_close(block.qkv(block.attention_norm(x)) + bias, expected, atol=2e-5, rtol=1e-5)
    mel = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(0))
    every_other = encoder.conv1(mel)[..., ::2]  # stride 2 keeps every other output of the same kernel
    torch.testing.assert_close(ours.conv1(mel), every_other, atol=2e-5, rtol=1e-5)


def test_the_manifest_says_what_is_not_whispers(theirs, tmp_path, capsys):
    from minmo.weights.command import import_

    import_("whisper", theirs[0], tmp_path / "out")
    said = capsys.readouterr().out
    origin = manifest.read(tmp_path / "out")[0]["encoder"]
    assert origin.state == "start" and origin.zeroed == ("blocks.*.fsmn",)
    assert "model.encoder.embed_positions.weight" in origin.dropped
    for told in ("only a start", "encoder: it is Whisper's", "moves by 10 ms", "sinusoidal", "FSMN", "80 ms"):
        assert told in said
    assert all(note in said for note in origin.notes)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"model_type": "bart"}, r"config.json: model_type is 'bart', and only 'whisper'"),
        ({"d_model": None}, r"config.json: d_model must be a positive number, and is None"),
        ({"activation_function": "relu"}, r"activation_function is 'relu'"),
        ({"encoder_attention_heads": 3}, r"encoder_attention_heads 3 do not divide d_model 128"),
        ({"encoder_layers": 3}, r"lacks the tensor 'layers.2.self_attn"),
        ({"encoder_layers": 1}, r"has no place for, such as 'layers.1.fc1.bias'"),
        ({"num_mel_bins": 80}, r"'conv1.weight' has the shape \(128, 16, 3\)"),
        ({"encoder_layers": 1000}, r"config.json has sizes that do not go together: .*blocks must lie between"),
    ],
)
def test_what_is_no_whisper_of_this_size(theirs, tmp_path, change, complaint):
    folder = tmp_path / "hf"
    shutil.copytree(theirs[0], folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(CheckpointError, match=complaint) as caught:
        save_parts(whisper.open_whisper(folder), tmp_path / "out")
    assert str(folder) in str(caught.value) and not (tmp_path / "out").exists()
