"""The weights that ship: they hear a question and answer it, in words that somebody else's recogniser understands."""

from __future__ import annotations

import re
from importlib import resources

import numpy as np
import pytest
import soxr

import minmo
from minmo.data.nano.sentences import answer, facts
from minmo.evaluation.words import spoken

ASSETS = resources.files("minmo") / "assets"
GREEDY = minmo.Settings(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return minmo.load("nano", "cpu")


@pytest.fixture(scope="module")
def reply(model):
    return minmo.talk(model, minmo.load_audio(str(ASSETS / "sum.wav")), GREEDY)


def test_it_is_trained_small_and_described(model):
    assert model.trained
    files = [file for file in (ASSETS / "nano").iterdir() if file.name.endswith((".safetensors", ".json"))]
    assert sum(len(file.read_bytes()) for file in files) <= 24_000_000
    assert sum(p.numel() for p in model.parameters()) <= 11_000_000
    card = (ASSETS / "nano" / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-SA-3.0" in card and not re.search("@[A-Z]+", card)


def test_a_persons_question_is_answered(reply):
    assert reply.text == "five plus three is eight"


def test_the_answer_is_understood(reply):
    judges = pytest.importorskip("minmo.evaluation.judges")
    pytest.importorskip("moonshine_voice")
    sound = np.asarray(soxr.resample(reply.audio, reply.sample_rate, 16_000), np.float32)
    assert spoken(judges.Moonshine()(sound), forgive=True) == spoken("five plus three is eight")


def test_typed_sums(model):
    """Every 40th fact; the card says how many it knows."""
    some = facts()[::40]
    replies = minmo.ask(model, [problem for problem, _ in some], minmo.Settings(speak=False, temperature=0.0))
    right = [reply.text == answer(*fact) for reply, fact in zip(replies, some, strict=True)]
    assert sum(right) >= 0.9 * len(right)
