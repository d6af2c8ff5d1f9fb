"""A turn through every part: text, sound, timings; batches, seeds, streams."""

import asyncio
import dataclasses
from importlib import resources

import numpy as np
import pytest
import torch

import minmo
from minmo import weights
from minmo.conversation import timings as T
from minmo.conversation.session import Session

SHORT = minmo.Settings(max_text_tokens=6, max_speech_ratio=3)


@pytest.fixture(scope="module")
def model():
    """With random weights, whose replies are varied."""
    return weights.untrained("nano")


@pytest.fixture(scope="module")
def question():
    """Its first second: what a turn takes grows with its length, and what is tested does not."""
    return minmo.load_audio(resources.files("minmo") / "assets" / "question.wav")[:16_000]


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
    assert measured == set(T.STAGES) - {T.RESAMPLER}


def test_the_same_seed_gives_the_same_reply_and_another_a_different_one(model, question):
    first, again = (minmo.talk(model, question, SHORT) for _ in range(2))
    other = minmo.talk(model, question, minmo.Settings(max_text_tokens=6, max_speech_ratio=3, seed=1))
    assert first.text == again.text and np.array_equal(first.audio, again.audio)
    assert other.text != first.text


def test_a_batch_answers_each_entry_as_if_alone(model, question):
    turns = [question[: len(question) // 2], "what is two plus three", question[:9000]]
    settings = minmo.Settings(max_text_tokens=6, max_speech_ratio=3, seed=(3, 4, 5))
    together = minmo.talk(model, turns, settings)
    assert len({reply.text for reply in together}) == 3
    for turn, seed, reply in zip(turns, settings.seed, together, strict=True):
        alone = minmo.talk(model, turn, dataclasses.replace(settings, seed=seed))
        assert alone.text == reply.text
        # Another batch size multiplies other shapes: equal to rounding.
        np.testing.assert_allclose(alone.audio, reply.audio, atol=1e-4)


def test_neighbours_do_not_change_a_bit(model, question):
    settings = minmo.Settings(max_text_tokens=6, max_speech_ratio=3, seed=(3, 4))
    one = minmo.talk(model, ["two plus three", question[:9000]], settings)
    other = minmo.talk(model, ["two plus three", "a much longer text, of many more words: " * 8], settings)
    assert one[0].text == other[0].text and np.array_equal(one[0].audio, other[0].audio)
    assert one[1].text != other[1].text or not np.array_equal(one[1].audio, other[1].audio)


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
    outputs = list(minmo.full_duplex(model, inputs, SHORT, threshold=1.0))
    assert outputs[-1].final and sum(len(o.audio) for o in outputs) > 0
    assert minmo.latency(inputs[-1], outputs[0]) >= 0

    async def run():
        async def source():
            for item in inputs:
                yield item

        return [o async for o in minmo.full_duplex(model, source(), SHORT, threshold=1.0)]

    again = asyncio.run(run())
    assert [o.transcript for o in again] == [o.transcript for o in outputs]
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(again, outputs, strict=True))


def test_full_duplex_does_not_depend_on_how_the_stream_was_cut(model, question):
    sound = question[:12_000]

    def replies(piece, threshold):
        settings = minmo.Settings(max_text_tokens=2, speak=False)
        outputs = minmo.full_duplex(model, stream(sound, piece), settings, threshold=threshold)
        return [(o.transcript, o.final) for o in outputs]

    whole = replies(len(sound), 0.5)
    assert 1 < sum(final for _, final in whole)
    for piece in (320, 1280, 5000):
        assert replies(piece, 0.5) == whole
    ticks = -(-len(sound) // 1280)  # a predictor that always says yes answers after every second
    assert sum(final for _, final in replies(4000, 0.0)) == ticks // 2
    assert sum(final for _, final in replies(4000, 1.0)) == 1


def test_full_duplex_takes_pieces_of_no_sound_and_an_empty_stream(model, question):
    empty = minmo.VoiceInput(np.zeros(0, np.float32), 0.0)
    assert list(minmo.full_duplex(model, [empty], SHORT)) == []
    settings = minmo.Settings(max_text_tokens=2, speak=False)
    inputs = [empty, minmo.VoiceInput(question[:2000], 0.0), empty]
    assert list(minmo.full_duplex(model, inputs, settings, threshold=1.0))[-1].final


@pytest.mark.parametrize(
    "sound,message",
    [
        (np.zeros(0, np.float32), "empty"),
        (np.full(100, np.nan, np.float32), "NaN"),
        (np.zeros((2, 100), np.float32), "one-dimensional"),
        (np.zeros(100, np.int16), "float array"),
        (np.full(100, 1e18, np.float32), "scale them"),
        (np.full(100, 1e300), "scale them"),
        ([0.1, 0.2], "one-dimensional"),
    ],
)
def test_bad_sound_is_one_clear_sentence(model, sound, message):
    with pytest.raises(minmo.AudioError, match=message):
        minmo.talk(model, sound)


@pytest.mark.parametrize(
    "turn,message",
    [("", "empty"), ("ok.wav", "looks like a file name"), (None, "a turn is sound"), ("two " * 9000, "longer than")],
)
def test_bad_turns_are_one_clear_sentence(model, turn, message):
    with pytest.raises(ValueError, match=message):
        minmo.talk(model, turn, SHORT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "a"},
        {"max_text_tokens": 1.5},
        {"speak": None},
        {"seed": 1.5},
        {"top_p": 2},
        {"seed": (1, 2**64)},
    ],
)
def test_settings_name_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        minmo.Settings(**wrong)


def test_settings_take_whole_numbers_and_other_kinds_of_arrays(model, question):
    settings = minmo.Settings(temperature=0, top_p=1, max_text_tokens=2, max_speech_ratio=3, speak=False)
    sound = question[:4000]
    frozen = sound.copy()
    frozen.flags.writeable = False
    expected = minmo.talk(model, sound, settings).text
    for same in (torch.from_numpy(sound), frozen, sound[::-1].copy()[::-1]):
        assert minmo.talk(model, same, settings).text == expected


def test_one_sample_and_silence_are_turns_too(model):
    for sound in (np.zeros(1, np.float32), np.zeros(20_000, np.float32)):
        reply = minmo.talk(model, sound, minmo.Settings(max_text_tokens=2, max_speech_ratio=3))
        assert np.isfinite(reply.audio).all()


def test_a_context_that_is_too_short_says_so(model, question):
    with pytest.raises(ValueError, match="positions"):
        list(minmo.full_duplex(model, stream(question), SHORT, max_positions=30))


def test_sixteen_bit_weights_talk_too(question):
    reply = minmo.talk(minmo.load("nano", dtype=torch.bfloat16), question, SHORT)
    assert np.isfinite(reply.audio).all() and len(reply.audio) > 0


def poisoned(session, entry, part):
    """Makes what an entry remembers NaN, as broken numbers would."""
    row = int(session.rows[entry])
    if part == "LLM":
        for cache in session._state.llm.layers:
            cache.v[row] = torch.nan
    elif part == "voice decoder":
        for cache in session._state.speaking.decoder.lm.layers:
            cache.v[row] = torch.nan
    else:
        session._state.speaking.vocoder.memory[row] = torch.nan


@pytest.mark.parametrize("part,fast", [("LLM", True), ("voice decoder", False), ("vocoder", True)])
def test_a_session_that_breaks_ends_alone_and_is_new_again(model, part, fast):
    engine = minmo.FastMinMo(model, rows=3, max_positions=100, max_voice_positions=400, keep_model=True)
    settings = minmo.Settings(max_text_tokens=7, max_speech_ratio=3, seed=5, temperature=0.9)
    prompts = [[5, 6, 7, 8], [9, 10], [11]]

    def answers(broken):
        rounds = []
        with Session(engine if fast else model, 3, settings, 100) as session:
            for turn in range(2):
                session.read(prompts, query=True)
                for i, pieces in enumerate(session.answer()):
                    rounds.append(pieces)
                    if broken and turn == 0 and i == 0:
                        poisoned(session, 1, part)
        return [
            ("".join(p[e].text for p in rounds), np.concatenate([p[e].audio for p in rounds]), rounds[-1][e].fault)
            for e in range(3)
        ], [p[1] for p in rounds]

    healthy, _ = answers(False)
    found, pieces = answers(True)
    for entry in (0, 2):
        assert found[entry][0] == healthy[entry][0] and np.array_equal(found[entry][1], healthy[entry][1])
        assert found[entry][2] == ""
    faults = {p.fault for p in pieces if p.fault}
    assert len(faults) == 1 and part in faults.pop().replace("vocoder gave", "vocoder")
    assert np.isfinite(found[1][1]).all() and pieces[-1].done and not pieces[-1].fault


def test_a_single_turn_that_breaks_raises(question):
    broken = minmo.load("nano", device="cpu")
    with torch.no_grad():
        broken.llm.norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="LLM's state became NaN"):
        minmo.ask(broken, "seven", SHORT)
    replies = minmo.ask(broken, ["seven", "eight"], SHORT)
    assert all("NaN" in r.fault and r.text == "" for r in replies)
    with pytest.raises(FloatingPointError, match="NaN"):
        list(minmo.full_duplex(broken, stream(question[:3000]), SHORT, threshold=1.0))
