"""The command line: real files of every kind, one sentence and exit code 2 for what cannot be served."""

import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import safetensors.torch
import soundfile
import soxr
import torch

from minmo import cli, weights
from minmo.conversation import client

QUESTION = resources.files("minmo") / "assets" / "question.wav"


def run(*arguments, expect=0, capsys=None, monkeypatch=None):
    monkeypatch.setattr(sys, "argv", ["minmo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    captured = capsys.readouterr()
    assert (stop.value.code or 0) == expect, captured.out + captured.err
    assert "Traceback" not in captured.err + captured.out
    return captured


@pytest.fixture
def minmo(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *a, expect=0: run(*a, expect=expect, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.parametrize("rate,channels,subtype", [(8_000, 1, "PCM_16"), (48_000, 2, "PCM_24"), (96_000, 1, "PCM_U8")])
def test_talk_takes_any_sound_file(minmo, tmp_path, rate, channels, subtype):
    samples, original = soundfile.read(QUESTION, dtype="float32", frames=8_000)
    samples = soxr.resample(samples, original, rate)
    soundfile.write(tmp_path / "in.wav", np.repeat(samples[:, None], channels, 1), rate, subtype=subtype)
    shown = minmo("talk", tmp_path / "in.wav", "-o", tmp_path / "out.wav", "--max-text-tokens", 2)
    assert "resampler to 16 kHz" in shown.out
    for stage in ("input projector", "prompt prefill", "first text token", "15 speech tokens", "first audio chunk"):
        assert stage in shown.out
    assert "machine:" in shown.out and "backend:" in shown.out
    sound, out_rate = soundfile.read(tmp_path / "out.wav")
    assert out_rate == 24_000 and len(sound) > 0 and np.isfinite(sound).all()


def test_a_conversation_with_a_file(minmo, tmp_path, monkeypatch):
    samples, rate = soundfile.read(QUESTION, dtype="float32", frames=8_000)
    soundfile.write(tmp_path / "in.wav", samples, rate)
    monkeypatch.setattr(client, "TAIL_MS", 0.0)
    monkeypatch.setattr(client, "LONGEST_TAIL_MS", 0.0)
    both = tmp_path / "both.wav"
    short = ("--max-text-tokens", 2, "--max-speech-ratio", 3, "--fast", "--eagerness", "high")
    shown = minmo("talk", "--duplex", tmp_path / "in.wav", "-o", both, *short)
    assert "tick of 80 ms: p50" in shown.out and "both.jsonl" in shown.out
    sound, rate = soundfile.read(both)
    log = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    decisions = [entry for entry in log if entry["event"] == "Decision"]
    assert rate == 24_000 and sound.shape == (len(decisions) * 1920, 2) and np.abs(sound[:, 0]).max() > 0.01
    assert {"at_ms", "answer", "stop", "phase"} < set(decisions[0])
    assert "give -o" in minmo("talk", "--duplex", QUESTION, expect=2).err
    assert "leave --realtime" in minmo("talk", "--duplex", QUESTION, "-o", both, "--realtime", expect=2).err
    assert "one of low" in minmo("talk", "--duplex", QUESTION, "-o", both, "--eagerness", "very", expect=2).err


def test_random_weights_are_named(minmo, monkeypatch):
    monkeypatch.setattr(cli.minmo, "load", lambda *given: weights.untrained())
    shown = minmo("ask", "two plus three", "--max-text-tokens", 2)
    assert "UNTRAINED" in shown.out and "random weights" in shown.out


def test_the_other_commands(minmo, tmp_path):
    short = ("--max-text-tokens", 2)
    assert "reply:" in minmo("transcribe", QUESTION, *short).out
    assert "reply:" in minmo("translate", "two plus three", "--to", "French", *short).out
    assert "reply:" in minmo("ask", "what is two plus three?", *short).out
    minmo("say", "two", "-o", tmp_path / "said.wav", "--max-speech-ratio", 4)
    assert soundfile.info(tmp_path / "said.wav").frames > 0
    assert "7,615,616,512" in minmo("info", "minmo-8b").out
    report = minmo("doctor").out
    assert "torch" in report and "streaming_attention" in report and "accepts" in report


def test_export_writes_a_model_in_another_dtype(minmo, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    weights.save(weights.untrained(), whole)
    shown = minmo("export", whole, "-o", tmp_path / "half")
    assert "written:" in shown.out and "MB" in shown.out
    own, half = safetensors.torch.load_file(whole / "model.safetensors"), tmp_path / "half" / "model.safetensors"
    for name, tensor in safetensors.torch.load_file(half).items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, own[name].half())
    minmo("export", whole, "-o", tmp_path / "half", expect=2)
    monkeypatch.setattr(cli.minmo, "load", lambda *given: weights.untrained())
    assert "nothing to export" in minmo("export", "-o", tmp_path / "new", expect=2).err


@pytest.fixture
def bad(tmp_path):
    """Files that cannot be heard."""

    def make(kind):
        path = tmp_path / f"{kind}.wav"
        if kind == "empty":
            soundfile.write(path, np.zeros(0), 16_000)
        elif kind == "nan":
            soundfile.write(path, np.full(1000, np.nan, np.float32), 16_000, subtype="FLOAT")
        elif kind == "text":
            path.write_text("this is not sound")
        elif kind == "nothing":
            path.write_bytes(b"")
        elif kind == "long":
            soundfile.write(path, np.zeros(8_000 * 7_200, np.int16), 8_000, subtype="PCM_U8")
        elif kind == "folder":
            path.mkdir()
        elif kind == "cut":
            soundfile.write(path, np.zeros(8_000, np.float32), 16_000)
            path.write_bytes(path.read_bytes()[:5_000])
        elif kind == "n" * 300:
            return path
        return path

    return make


@pytest.mark.parametrize("kind", ["empty", "nan", "text", "nothing", "long", "folder", "missing", "cut", "n" * 300])
def test_what_cannot_be_heard_is_one_sentence_and_exit_code_2(minmo, bad, tmp_path, kind):
    shown = minmo("talk", bad(kind), "-o", tmp_path / "out.wav", expect=2)
    lines = [line for line in shown.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("minmo: ")
    assert not (tmp_path / "out.wav").exists()


def test_other_misuse_is_exit_code_2(minmo, tmp_path):
    assert "neither a preset" in minmo("talk", QUESTION, "--preset", "none", expect=2).err
    assert "device" in minmo("talk", QUESTION, "--device", "toaster", expect=2).err
    assert "dtype" in minmo("talk", QUESTION, "--dtype", "int3", expect=2).err
    assert "temperature" in minmo("talk", QUESTION, "--temperature", "-1", expect=2).err
    assert "empty" in minmo("say", "  ", "-o", tmp_path / "x.wav", expect=2).err
    assert "shapes only" in minmo("talk", QUESTION, "--device", "meta", expect=2).err
    assert "device" in minmo("talk", QUESTION, "--device", "xpu", expect=2).err
    assert "Missing argument" in minmo("transcribe", expect=2).err
    assert "needs a sound file" in minmo("talk", expect=2).err
    assert "seed" in minmo("ask", "a", "--seed", "x", expect=2).err
    assert "cannot be written" in minmo("talk", QUESTION, "-o", "/proc/x.wav", expect=2).err
    (tmp_path / "same.wav").write_bytes(QUESTION.read_bytes())
    assert "is the input" in minmo("talk", tmp_path / "same.wav", "-o", tmp_path / "same.wav", expect=2).err
    assert "out.xyz" in minmo("talk", QUESTION, "-o", tmp_path / "out.xyz", expect=2).err


def test_help_and_no_arguments_are_no_error(minmo):
    assert "transcribe" in minmo().out and "transcribe" in minmo("--help").out


def test_names_are_never_read_as_markup(minmo, tmp_path):
    place = tmp_path / "x [live].wav"
    assert "x [live].wav" in minmo("say", "one", "-o", place, "--max-speech-ratio", 4).out.replace("\n", "")
    assert place.exists()


def test_it_runs_as_a_program_and_never_asks_the_network(tmp_path):
    """A fresh process in which every socket raises."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "sys.argv = ['minmo', 'ask', 'hello', '--max-text-tokens', '2']\n"
        "from minmo.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reply:" in done.stdout
