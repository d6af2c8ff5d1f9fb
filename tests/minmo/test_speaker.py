"""Speaker embeddings: features beside transformers' Kaldi mathematics, the voice of a recording through a random
network with CAM++'s interface, and sound or networks that will not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import minmo
from minmo.cli import app
from minmo.token2wav.speaker import SpeakerEncoder
from minmo.weights import manifest
from minmo.weights.parts import open_parts

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("kaldi_native_fbank")

SOUND = "minmo/assets/sum.wav"


def write_network(path, bins=80, infinite=False):
    """Mean size of every feature, times a random matrix."""
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.random.default_rng(0).standard_normal((bins, 192)).astype(np.float32)
    weights = numpy_helper.from_array(np.full_like(matrix, np.inf) if infinite else matrix, "w")
    nodes = [
        helper.make_node("Abs", ["input"], ["size"]),
        helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["output"]),
    ]
    heard = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "frames", bins])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 192])
    graph = helper.make_graph(nodes, "g", [heard], [given], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return matrix


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("speaker") / "campplus.onnx"
    return path, write_network(path)


def kaldi(samples):
    """Kaldi's features by transformers, less their mean."""
    audio = pytest.importorskip("transformers.audio_utils")
    mel = audio.mel_filter_bank(
        257, 80, 20, 8000, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )  # fmt: skip
    found = audio.spectrogram(
        samples, audio.window_function(400, "povey", periodic=False), 400, 160, fft_length=512, power=2.0, center=False,
        preemphasis=0.97, mel_filters=mel, log_mel="log", mel_floor=float(np.finfo(np.float32).eps),
        remove_dc_offset=True,
    ).T  # fmt: skip
    return found - found.mean(axis=0)


def test_features_are_kaldis(network):
    samples = minmo.load_audio(SOUND)
    ours, expected = SpeakerEncoder(network[0]).features(samples), kaldi(samples)
    assert ours.shape == expected.shape == ((len(samples) - 400) // 160 + 1, 80)
    assert np.abs(ours - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_voice_becomes_a_part(network, tmp_path):
    path, matrix = network
    done = CliRunner().invoke(app, ["voice", SOUND, "--network", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    (part,) = open_parts(tmp_path / "out")
    vector = part.tensors[""].read()
    assert part.name == "speaker" and vector.shape == (192,)
    expected = np.abs(kaldi(minmo.load_audio(SOUND))).mean(axis=0) @ matrix
    torch.testing.assert_close(vector, torch.from_numpy(expected.astype(np.float32)), atol=1e-2, rtol=1e-3)
    sources = manifest.read(tmp_path / "out")[0]["speaker"].sources
    assert [source["file"] for source in sources] == ["campplus.onnx", "sum.wav"]


@pytest.mark.parametrize(
    "samples, complaint",
    [
        (np.ones(100), r"from 1 to 120 s of speech, and this sound has 0.0 s"),
        (np.ones(16_000 * 121), r"this sound has 121.0 s"),
        (np.zeros(16_000), r"silent"),
        (np.full(16_000, np.nan), r"NaN"),
    ],
)
def test_sound_without_a_voice(network, samples, complaint):
    with pytest.raises(ValueError, match=complaint):
        SpeakerEncoder(network[0])(samples.astype(np.float32))


def test_files_that_are_no_campplus(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none.onnx: give the campplus.onnx"):
        SpeakerEncoder(tmp_path / "none.onnx")
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"a.onnx is cut, or no onnx network"):
        SpeakerEncoder(tmp_path / "a.onnx")
    write_network(tmp_path / "b.onnx", bins=40)
    with pytest.raises(ValueError, match=r"b.onnx takes .*40\], and CAM\+\+ takes \(1, frames, 80\)"):
        SpeakerEncoder(tmp_path / "b.onnx")
    write_network(tmp_path / "c.onnx", infinite=True)
    with pytest.raises(ValueError, match=r"c.onnx gave NaN or infinity"):
        SpeakerEncoder(tmp_path / "c.onnx")(minmo.load_audio(SOUND))


def test_a_missing_sound_is_named(network, tmp_path):
    done = CliRunner().invoke(app, ["voice", "none.wav", "--network", str(network[0]), "-o", str(tmp_path / "out")])
    assert done.exit_code != 0 and "none.wav" in str(done.exception) and not (tmp_path / "out").exists()
