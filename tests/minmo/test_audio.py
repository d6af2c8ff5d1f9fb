"""Sound files: every kind that can be heard, one clear sentence for those that cannot, atomic writing, resampling."""

from __future__ import annotations

import os
import tracemalloc
from importlib import resources

import numpy as np
import pytest
import soundfile
import torch

from minmo.audio import AudioError, Resampler, check_output, concerns, load_audio, resample, save_audio

QUESTION = resources.files("minmo") / "assets" / "question.wav"


def tone(rate, seconds=1.0, hz=440.0):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    "rate,channels,suffix,subtype",
    [
        (16_000, 1, ".wav", "PCM_16"),
        (8_000, 1, ".wav", "PCM_U8"),
        (8_000, 1, ".wav", "ULAW"),
        (96_000, 2, ".wav", "FLOAT"),
        (48_000, 6, ".flac", "PCM_24"),
        (44_100, 2, ".ogg", "VORBIS"),
        (44_100, 1, ".mp3", "MPEG_LAYER_III"),
        (22_050, 1, ".aiff", "PCM_16"),
    ],
)
def test_any_rate_width_channel_count_and_format(tmp_path, rate, channels, suffix, subtype):
    path = tmp_path / f"sound{suffix}"
    soundfile.write(path, np.repeat(tone(rate)[:, None], channels, 1), rate, subtype=subtype)
    heard = load_audio(path)
    assert heard.dtype == np.float32 and heard.ndim == 1
    assert abs(len(heard) - 16_000) <= (0 if suffix != ".mp3" else 1200)
    middle = slice(4_000, 12_000)
    if suffix != ".mp3":  # whose decoder shifts the sound
        assert np.abs(heard[middle] - tone(16_000)[middle]).max() < 0.04
    assert abs(np.sqrt(np.mean(heard[middle] ** 2)) - 0.5 / np.sqrt(2)) < 0.01


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.stack([np.full(400, 0.5), np.full(400, 0.25)], 1), 16_000)
    assert np.allclose(load_audio(tmp_path / "x.wav"), 0.375, atol=1e-4)


@pytest.mark.parametrize(
    "kind,message",
    [
        ("no.wav", "does not exist"),
        ("folder.wav", "not a file"),
        ("empty.wav", "holds 0 samples"),
        ("short.wav", "holds 1 samples at 96000"),
        ("nothing.wav", "0 bytes"),
        ("text.wav", "not sound"),
        ("headerless.raw", "not sound"),
        ("nan.wav", "NaN"),
        ("inf.wav", "NaN or infinite"),
        ("unscaled.wav", "scale them to -1 .. 1"),
        ("hours.wav", "120 min 0 s, longer than the limit of 600 s"),
        ("damaged.flac", "damaged|not sound"),
    ],
)
def test_what_cannot_be_heard_is_one_sentence(tmp_path, kind, message):
    path = tmp_path / kind
    if kind == "folder.wav":
        path.mkdir()
    elif kind == "empty.wav":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind == "short.wav":
        soundfile.write(path, np.zeros(1), 96_000)
    elif kind == "nothing.wav":
        path.touch()
    elif kind in ("text.wav", "headerless.raw"):
        path.write_bytes(b"this is not sound" * 100)
    elif kind in ("nan.wav", "inf.wav", "unscaled.wav"):
        value = {"nan.wav": np.nan, "inf.wav": np.inf, "unscaled.wav": 20_000.0}[kind]
        soundfile.write(path, np.append(tone(16_000), value).astype(np.float32), 16_000, subtype="FLOAT")
    elif kind == "hours.wav":
        soundfile.write(path, np.zeros(8_000 * 7_200, np.int16), 8_000, subtype="PCM_U8")
    elif kind == "damaged.flac":
        soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 300_000), 16_000)
        data = bytearray(path.read_bytes())
        data[5_000:200_000] = os.urandom(1) * 195_000
        path.write_bytes(data)
    with pytest.raises(AudioError, match=message) as error:
        load_audio(path)
    assert "\n" not in str(error.value) and kind in str(error.value)


def test_silent_clipped_and_one_sample_sounds_are_valid_and_named(tmp_path):
    sounds = {"silent": np.zeros(16_000), "full scale": np.sign(tone(16_000)), "ms": np.full(1, 0.1)}
    for word, samples in sounds.items():
        soundfile.write(tmp_path / "x.wav", samples, 16_000)
        heard = load_audio(tmp_path / "x.wav")
        assert len(heard) == len(samples) and any(word in c for c in concerns(heard))
    assert concerns(load_audio(QUESTION)) == []


def test_the_limit_can_be_raised_and_memory_follows_the_16_khz_sound(tmp_path):
    """A minute at 48 kHz stereo is 23 MB of float32 at once; read in blocks it stays near the 4 MB that come out."""
    soundfile.write(tmp_path / "x.wav", np.zeros((48_000 * 60, 2), np.int16), 48_000, subtype="PCM_U8")
    with pytest.raises(AudioError, match="1 min 0 s"):
        load_audio(tmp_path / "x.wav", max_seconds=59)
    tracemalloc.start()
    try:
        assert len(load_audio(tmp_path / "x.wav", max_seconds=60)) == 60 * 16_000
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000, 96_000])
def test_split_of_a_resampled_stream_changes_nothing(rate):
    rng = np.random.default_rng(rate)
    sound = rng.standard_normal(rate // 2).astype(np.float32)
    whole = resample(sound, rate)
    stream = Resampler(rate)
    for _ in range(2):  # `final` makes it new again
        out, position = [], 0
        while position < len(sound):
            size = int(rng.integers(0, 2 * rate // 12))
            out.append(stream.push(sound[position : position + size]))
            assert stream.delay_ms < 250
            position += size
        out.append(stream.push(sound[:0], final=True))
        assert np.array_equal(np.concatenate(out), whole)
    assert len(whole) == 8_000


def test_resampling_removes_what_would_alias():
    assert np.abs(resample(tone(48_000, hz=12_000.0), 48_000)[2_000:-2_000]).max() < 1e-3
    with pytest.raises(AudioError, match="sample rates"):
        Resampler(0)


@pytest.mark.parametrize("suffix", [".wav", ".FLAC"])
def test_saved_sound_comes_back_to_the_bit(tmp_path, suffix):
    sound, rate = soundfile.read(QUESTION, dtype="float32")
    save_audio(tmp_path / f"x{suffix}", sound, rate)
    again, again_rate = soundfile.read(tmp_path / f"x{suffix}", dtype="float32")
    assert again_rate == rate and np.array_equal(again, sound)
    save_audio(tmp_path / f"x{suffix}", torch.tensor([2.0, -2.0, 0.25]), 24_000)
    again, again_rate = soundfile.read(tmp_path / f"x{suffix}", dtype="float32")
    assert again_rate == 24_000 and np.allclose(again, [1.0, -1.0, 0.25], atol=1e-4)
    save_audio(tmp_path / f"x{suffix}", np.array([[0.5, -0.5], [0.25, 0.0]]), 24_000)
    assert soundfile.read(tmp_path / f"x{suffix}")[0].tolist() == [[0.5, -0.5], [0.25, 0.0]]
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize(
    "name,samples,message",
    [
        ("x.wav", np.array([0.0, np.nan]), "NaN"),
        ("x.wav", np.zeros((2, 3)), "shape"),
        ("x.wav", np.zeros(3, np.int16), "floats"),
        ("x.xyz", np.zeros(3), "must end in .wav or .flac"),
        ("no/x.wav", np.zeros(3), "does not exist"),
        ("folder.wav", np.zeros(3), "is a directory"),
    ],
)
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path, name, samples, message):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "x.wav").write_text("old")
    with pytest.raises(AudioError, match=message):
        save_audio(tmp_path / name, samples, 16_000)
    assert (tmp_path / "x.wav").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.wav", "x.wav"]


def test_a_failing_write_is_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "x.wav").write_text("old")
    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(AudioError, match="No space left"):
        save_audio(tmp_path / "x.wav", np.zeros(3), 16_000)
    assert (tmp_path / "x.wav").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    assert check_output(tmp_path / "y.wav") == tmp_path / "y.wav"
