"""The instruments: what they count is what the operations' specs count, and every step runs in every format."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from minmo import cli
from minmo.config import load_config
from minmo.fast import profile

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", profile.STEPS)
def test_every_step_is_measured(name):
    config = load_config("nano")
    (found,) = profile.profile(config, [name], weights="int8", contexts=[40], rows=[2], tokens=2, device=CPU)
    assert isinstance(found, profile.Measured), found
    assert (found.step, found.rows, found.context, found.weights) == (name, 2, 40, "int8")
    assert 0 < found.p50 <= found.p95 <= found.p99 < math.inf and found.first > 0
    assert found.bytes > 1000 and found.floor == found.bytes / found.bandwidth
    json.dumps(profile.as_json([found], {}))


@pytest.mark.parametrize("weights,format", [("bf16", "bf16"), ("int8", "int8")])
def test_bytes_are_those_of_the_specs(weights, format):
    """The roofline adds up what the specs of a token's launches say; the profile what the packed model holds."""
    roofline = runpy.run_path(str(ROOT / "profiling" / "roofline.py"))
    config = load_config("nano")
    model = profile.random_model(config, ["llm", "voice_decoder"], weights, CPU)
    for step, part in (("llm", "LLM"), ("voice_lm", "voice token LM")):
        launches = roofline["token"](config, part, 2, 500, format)
        expected = sum(line.count * line.bytes for line in launches)
        assert profile.STEPS[step].moves(model, 2, 500) == pytest.approx(expected, rel=0.1)


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "plot", lambda *_: [])  # matplotlib is the benchmarks'
    monkeypatch.setattr(profile, "figures", lambda: None)
    arguments = "profile --part voice_lm --context 20 --rows 1 --weights int4 --tokens 10 --output".split()
    monkeypatch.setattr(sys, "argv", ["minmo", *arguments, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "voice_lm" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "profile.json").read_text())["steps"]
    assert entry["weights"] == "int4" and entry["p50"] > 0


@pytest.mark.parametrize("option,value", [("--part", "mouth"), ("--weights", "int2")])
def test_unknown_choices_are_refused(option, value, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minmo", "profile", option, value])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "must be one of" in capsys.readouterr().err


def test_what_does_not_fit_is_said_not_tried(monkeypatch):
    monkeypatch.setattr(profile, "free_memory", lambda device: 10)
    (line,) = profile.profile(
        load_config("nano"), ["llm"], weights="fp32", contexts=[1], rows=[1], tokens=1, device=CPU
    )
    assert "GB are free" in line
