"""The speech tokenizer: size, windows of long utterances, and the same tokens as the public `s3tokenizer`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import soundfile
import torch
from random_s3tokenizer import BLOCKS, DIM, HEADS, random_tokenizer

from minmo.config import EncoderConfig, SpeechTokenizerConfig, load_config
from minmo.tokenizer.speech import SpeechTokenizer
from minmo.weights.importers.s3tokenizer import convert, key_table


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        tokenizer = SpeechTokenizer(load_config("minmo-8b").speech_tokenizer)
    assert sum(p.numel() for p in tokenizer.parameters()) == 123_714_568


def test_untrained_tokens_are_varied():
    config = load_config("nano").speech_tokenizer
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(config).requires_grad_(False)
    ids, counts = tokenizer.encode(torch.randn(1, 400, config.encoder.n_mels) * 0.5, ints([400]))
    assert counts.tolist() == [100] and len(set(ids[0].tolist())) > 50


@pytest.fixture(scope="module")
def s3():
    """`s3tokenizer`, without its file readers: torchaudio (PyPI's does not load beside a CPU torch) and onnx."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchaudio", "onnx"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        importlib.import_module("s3tokenizer.model_v2")
        return importlib.import_module("s3tokenizer")


@pytest.fixture(scope="module")
def theirs(s3, speech):
    """Their class at a reduced width, every parameter random (norms and biases too), all levels in use."""
    tokenizer = random_tokenizer()
    project = tokenizer.quantizer._codebook.project_down
    features = project(tokenizer.encoder(*s3.padding(speech[:1]))[0][0])
    project.weight /= features.std(dim=0)[:, None]
    project.bias.copy_((project.bias - features.mean(dim=0)) / features.std(dim=0))
    return tokenizer


@pytest.fixture(scope="module")
def ours(theirs):
    block = theirs.encoder.blocks[0]
    encoder = EncoderConfig(
        n_mels=128, dim=DIM, heads=HEADS, ffn=4 * DIM, blocks=BLOCKS, attention_norm_eps=block.attn_ln.eps,
        mlp_norm_eps=block.mlp_ln.eps, final_norm=False,
    )  # fmt: skip
    config = SpeechTokenizerConfig(encoder)
    tokenizer = SpeechTokenizer(config).eval().requires_grad_(False)
    tokenizer.load_state_dict(convert(theirs.state_dict(), config))
    return tokenizer


@pytest.fixture(scope="module")
def speech(s3):
    """Real speech as their log-mel: two AISHELL-1 utterances that come with s3tokenizer. (128, frames) each"""
    files = sorted((Path(s3.__file__).parent / "assets").glob("*.wav"))
    assert len(files) == 2
    return [s3.log_mel_spectrogram(torch.from_numpy(soundfile.read(f, dtype="float32")[0])) for f in files]


def assert_same_tokens(actual, expected, features):
    """Equal but where a projected feature lies within 1e-4 of a rounding boundary; those are counted."""
    value = torch.tanh(features.double()) * 0.9990000128746033
    close = ((value.abs() - 0.5).abs() < 1e-4).any(dim=-1)
    differ = actual != expected
    print(f"{len(expected)} tokens, {int(close.sum())} near a boundary, {int(differ.sum())} differ")
    assert not (differ & ~close).any()
    assert int(close.sum()) <= 0.01 * len(expected) + 1


def test_parity_of_hidden_states(s3, theirs, ours, speech):
    mel, lengths = s3.padding(speech)
    expected, expected_lengths = theirs.encoder(mel, lengths)
    actual, counts = ours.encoder(mel.transpose(1, 2), lengths, chunk=0)
    assert counts.tolist() == expected_lengths.tolist()
    for a, e, n in zip(actual, expected, counts.tolist(), strict=True):
        error = float((a[:n] - e[:n]).abs().max() / e[:n].abs().max())
        print(f"{n} frames, largest relative difference {error:.1e}")
        assert error < 1e-5


def test_parity_of_tokens_on_real_speech(s3, theirs, ours, speech):
    mel, lengths = s3.padding(speech)
    expected, expected_lengths = theirs.quantize(mel, lengths)
    actual, counts = ours.encode(mel.transpose(1, 2), lengths)
    assert counts.tolist() == expected_lengths.tolist()
    features = theirs.quantizer._codebook.project_down(theirs.encoder(mel, lengths)[0])
    for a, e, f, n in zip(actual, expected, features, counts.tolist(), strict=True):
        assert_same_tokens(a[:n], e[:n], f[:n])
        assert len(set(e[:n].tolist())) > n / 2, "the tokens hardly vary: the comparison says little"


def test_parity_of_tokens_beyond_30_seconds(s3, theirs, ours, speech):
    """Two windows; from three on the public code may add one that the windows before already cover."""
    long = torch.cat(speech * 6, dim=1)[:, :4700]
    mel, lengths = s3.padding([long, speech[0]])
    expected, expected_lengths = theirs.quantize(mel, lengths)
    actual, counts = ours.encode(mel.transpose(1, 2), lengths)
    assert counts.tolist() == expected_lengths.tolist() == [1175, -(-speech[0].shape[1] // 4)]
    for a, e, n in zip(actual, expected, counts.tolist(), strict=True):
        assert int((a[:n] != e[:n]).sum()) <= 0.002 * n


@pytest.mark.parametrize("frames", [3000, 3001, 5600, 5603, 6500])
def test_long_utterances_get_a_token_every_40_ms(frames):
    config = SpeechTokenizerConfig(EncoderConfig(n_mels=4, dim=64, heads=1, ffn=16, blocks=1, final_norm=False))
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(config).requires_grad_(False)
    mel = torch.randn(2, frames, 4)
    ids, counts = tokenizer.encode(mel, ints([frames, 2990]))
    assert counts.tolist() == [-(-frames // 4), 748]
    alone, count = tokenizer.encode(mel[:1], ints([frames]))
    assert int((alone[0] != ids[0, : count[0]]).sum()) <= 1
    assert not ids[1, counts[1] :].any()
    if frames > 3000:
        first, _ = tokenizer.encode(mel[:1, :3000], ints([3000]))
        assert int((first[0, :700] != ids[0, :700]).sum()) <= 1


def test_mapping_of_released_names_is_complete_both_ways(theirs, ours):
    table = key_table(ours.config)
    assert set(table) == set(ours.state_dict())
    used = [name for names in table.values() for name in names]
    assert len(used) == len(set(used)) and set(used) == set(theirs.state_dict())
    released = dict(theirs.state_dict())
    missing = {k: v for k, v in released.items() if k != "encoder.conv2.bias"}
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* 'encoder.conv2.bias'"):
        convert(missing, ours.config)
    with pytest.raises(ValueError, match=r"1 tensors that this size lacks, the first is 'extra'"):
        convert({**released, "extra": torch.zeros(1)}, ours.config)


def test_released_names_and_shapes_of_version_2():
    """The released tokenizer's tensors as published: 6 blocks of width 1280."""
    config = load_config("minmo-8b").speech_tokenizer
    with torch.device("meta"):
        state = SpeechTokenizer(config).state_dict()
    table = key_table(config)
    assert set(table) == set(state)
    assert table["encoder.blocks.5.qkv.weight"] == tuple(
        f"encoder.blocks.5.attn.{part}.weight" for part in ("query", "key", "value")
    )
    assert state["encoder.blocks.5.fsmn"].shape == (1280, 1, 31)
    assert state["quantizer.weight"].shape == (8, 1280)
