"""A turn through every part: text, sound, timings; batches, seeds, streams."""

import asyncio
from importlib import resources

import numpy as np
import pytest
import torch

import minmo
from minmo.conversation import timings as T

SHORT = minmo.Settings(max_text_tokens=6, max_speech_ratio=4)


@pytest.fixture(scope="module")
def model():
    return minmo.load("nano")


@pytest.fixture(scope="module")
def question():
    return minmo.load_audio(resources.files("minmo") / "assets" / "question.wav")


def test_a_turn_gives_text_sound_and_every_timing(model, question):
    pieces = []
    reply = minmo.talk(model, question, SHORT, on_pieces=lambda p: pieces.append(p[0]))
    assert reply.sample_rate == 24_000 and reply.audio.dtype == np.float32
    assert len(reply.audio) > 0 and len(reply.audio) % 960 == 0  # whole speech tokens of 40 ms
    assert np.isfinite(reply.audio).all() and np.abs(reply.audio).max() <= 0.99
    assert "".join(p.text for p in pieces) == reply.text
    assert np.array_equal(np.concatenate([p.audio for p in pieces]), reply.audio)
    assert [p.done for p in pieces] == [False] * (len(pieces) - 1) + [True]
    measured = {stage for stage, *_ in reply.timings.table()}
    assert measured == set(T.STAGES)


def test_the_same_seed_gives_the_same_reply_and_another_a_different_one(model, question):
    first, again = (minmo.talk(model, question, SHORT) for _ in range(2))
    other = minmo.talk(model, question, minmo.Settings(max_text_tokens=6, max_speech_ratio=4, seed=1))
    assert first.text == again.text and np.array_equal(first.audio, again.audio)
    assert other.text != first.text


def test_a_batch_answers_each_entry_as_if_alone(model, question):
    turns = [question, "what is two plus three", question[: len(question) // 2]]
    settings = minmo.Settings(max_text_tokens=6, max_speech_ratio=4, temperature=0.0, voice_temperature=0.0)
    together = minmo.talk(model, turns, settings)
    for turn, reply in zip(turns, together, strict=True):
        alone = minmo.talk(model, turn, settings)
        assert alone.text == reply.text
        n = min(len(alone.audio), len(reply.audio), 12 * 960)
        # Seeds differ by entry, so the vocoder's noise does; the speech tokens do not.
        assert len(alone.audio) == len(reply.audio) and n > 0


def test_the_other_verbs(model, question):
    assert isinstance(minmo.transcribe(model, question, SHORT).text, str)
    translated = minmo.translate(
        model, [question, "two"], "English", "French", minmo.Settings(max_text_tokens=3, speak=False)
    )
    assert [len(r.audio) for r in translated] == [0, 0]
    assert len(minmo.ask(model, "what is two plus three", SHORT).audio) > 0
    spoken = minmo.say(model, ["two plus three", "one"], SHORT)
    assert [r.text for r in spoken] == ["two plus three", "one"]
    assert all(len(r.audio) > 0 for r in spoken)


def stream(sound, piece=1600):
    for start in range(0, len(sound), piece):
        yield minmo.VoiceInput(sound[start : start + piece], 1e3 * start / 16_000)


def test_full_duplex_sync_and_async_agree(model, question):
    inputs = list(stream(question))
    outputs = list(minmo.full_duplex(model, inputs, SHORT))
    assert outputs[-1].final and sum(len(o.audio) for o in outputs) > 0
    assert minmo.latency(inputs[-1], outputs[0]) >= 0

    async def run():
        async def source():
            for item in inputs:
                yield item

        return [o async for o in minmo.full_duplex(model, source(), SHORT)]

    again = asyncio.run(run())
    assert [o.transcript for o in again] == [o.transcript for o in outputs]
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(again, outputs, strict=True))


def test_full_duplex_answers_when_the_predictor_decides_and_goes_on(model, question):
    decided = minmo.full_duplex(model, stream(question, 16_000), SHORT, threshold=0.0)
    assert sum(o.final for o in decided) == -(-len(question) // 16_000)


@pytest.mark.parametrize(
    "sound,message",
    [
        (np.zeros(0, np.float32), "empty"),
        (np.full(100, np.nan, np.float32), "NaN"),
        (np.zeros((2, 100), np.float32), "one-dimensional"),
        (np.zeros(100, np.int16), "float array"),
    ],
)
def test_bad_sound_is_one_clear_sentence(model, sound, message):
    with pytest.raises(minmo.AudioError, match=message):
        minmo.talk(model, sound)


def test_one_sample_and_silence_are_turns_too(model):
    for sound in (np.zeros(1, np.float32), np.zeros(20_000, np.float32)):
        reply = minmo.talk(model, sound, minmo.Settings(max_text_tokens=2, max_speech_ratio=4))
        assert np.isfinite(reply.audio).all()


def test_a_context_that_is_too_short_says_so(model, question):
    with pytest.raises(ValueError, match="positions"):
        list(minmo.full_duplex(model, stream(question), SHORT, max_positions=40))


def test_sixteen_bit_weights_talk_too(question):
    reply = minmo.talk(minmo.load("nano", dtype=torch.bfloat16), question, SHORT)
    assert np.isfinite(reply.audio).all() and len(reply.audio) > 0
