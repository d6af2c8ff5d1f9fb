"""The conversation simulator: known times, asked levels, the same bytes; its dialogues as lines of data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem

from minmo.config import SAMPLE_RATE
from minmo.data.dialogues import dialogue_cut, duplex_samples, exchange, utterance
from minmo.data.draws import draws
from minmo.data.duplex import samples, turn_delay
from minmo.data.manifest import DataError, read_manifest, validate
from minmo.data.simulator import Conditions, Dialogue, Material, simulate
from minmo.data.utterances import FRAME, Utterance, heard, trimmed, voiced, with_pause

SECOND = SAMPLE_RATE
QUIET = Conditions(pause=0, backchannel=0, barge_in=0, burst=0, snr_db=(None,), echo_db=(None,))
LIVELY = Conditions(turns=4, pause=0.7, backchannel=0.7, barge_in=0.5, burst=0.7)


def speech(text, word_times=True, around=0.0):
    """A hum of 0.25 s a word with 0.05 s between words, `around` seconds of silence at either end."""
    generator = draws("speech", text)
    pieces, words, now = [np.zeros(round(around * SECOND))], [], round(around * SECOND)
    for n, word in enumerate(text.split()):
        if n:
            pieces.append(np.zeros(SECOND // 20))
            now += SECOND // 20
        pieces.append(0.1 * generator.standard_normal(SECOND // 4))
        words.append((word, now, now + SECOND // 4))
        now += SECOND // 4
    sound = np.concatenate([*pieces, np.zeros(round(around * SECOND))]).astype(np.float32)
    return Utterance(sound, text, tuple(words) if word_times else ())


MATERIAL = Material(
    exchanges=[
        (speech("what is two plus three", around=0.3), speech("two plus three is five of course")),
        (speech("seven", around=0.1), speech("seven it is then and now you say a number", word_times=False)),
        (speech("count on from four please", word_times=False), speech("five six seven eight nine ten", around=0.2)),
    ],
    backchannels=[speech("yes", around=0.1), speech("okay")],
)


def power(sound):
    return float(np.mean(sound.astype(np.float64) ** 2))


def decibels(ratio):
    return 10 * np.log10(ratio)


@pytest.fixture(scope="module")
def lively():
    return [simulate(MATERIAL, LIVELY, 1, index) for index in range(20)]


def test_all_that_can_happen_happens(lively):
    kinds = [event.kind for dialogue in lively for event in dialogue.events]
    assert min(kinds.count(kind) for kind in ("pause", "backchannel", "barge_in", "noise")) >= 10
    assert kinds.count("user") + kinds.count("barge_in") == kinds.count("assistant") == 20 * LIVELY.turns


def test_events_lie_in_the_sound_and_are_a_dialogue(lively):
    for dialogue in lively:
        assert dialogue.user.dtype == dialogue.assistant.dtype == np.float32
        assert dialogue.user.shape == dialogue.assistant.shape
        assert max(np.abs(dialogue.user).max(), np.abs(dialogue.assistant).max()) <= 1
        assert all(0 <= e.start < e.end <= len(dialogue.user) for e in dialogue.events)
        assert samples(dialogue.name, dialogue.events, len(dialogue.user))


def test_same_seed_same_bytes_other_seed_other_bytes():
    def run(seed, index):
        dialogue = simulate(MATERIAL, LIVELY, seed, index)
        return dialogue.user.tobytes(), dialogue.assistant.tobytes(), dialogue.events

    first = run(3, 5)
    run(3, 4)
    assert run(3, 5) == first
    assert run(3, 6) != first and run(4, 5) != first


def test_voices_begin_and_end_where_the_events_say():
    """Nothing sounds outside the events, and every voice that is not cut off sounds in its first and last 10 ms."""
    quiet = replace(LIVELY, burst=0, snr_db=(None,), echo_db=(None,))
    for index in range(10):
        dialogue = simulate(MATERIAL, quiet, 2, index)
        users = ("user", "barge_in", "backchannel")
        for channel, kinds in ((dialogue.user, users), (dialogue.assistant, ("assistant",))):
            inside = np.zeros(len(channel), bool)
            for event in (e for e in dialogue.events if e.kind in kinds):
                inside[event.start : event.end] = True
                assert channel[event.start : event.start + FRAME].any()
                cut_off = any(e.kind == "barge_in" and event.start < e.start < event.end for e in dialogue.events)
                assert cut_off or channel[event.end - FRAME : event.end].any()
            assert not channel[~inside].any()
        for pause in (e for e in dialogue.events if e.kind == "pause"):
            assert not dialogue.user[pause.start : pause.end].any()


def test_turns_are_taken_back_as_the_labels_say(lively):
    """Where the user does not barge in, the turn begins `turn_delay` after the reply: sound and label agree."""
    for dialogue in lively:
        users = [e for e in dialogue.events if e.kind in ("user", "barge_in")]
        replies = [e for e in dialogue.events if e.kind == "assistant"]
        for turn, (user, reply) in enumerate(zip(users[1:], replies, strict=False), 1):
            if user.kind == "user":
                assert user.start == reply.end + turn_delay(dialogue.name, turn)
            else:
                assert reply.start < user.start < reply.end <= user.start + 0.6 * SECOND


def test_times_keep_to_their_bounds():
    conditions = replace(QUIET, turns=2, pause=1, pause_seconds=(0.5, 0.6), reply_seconds=(1.0, 1.1))
    for index in range(10):
        events = simulate(MATERIAL, conditions, 0, index).events
        users, replies = ([e for e in events if e.kind == kind] for kind in ("user", "assistant"))
        assert all(0.5 <= (e.end - e.start) / SECOND <= 0.6 for e in events if e.kind == "pause")
        assert all(1.0 <= (r.start - u.end) / SECOND <= 1.1 for u, r in zip(users, replies, strict=True))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("snr_db", [30.0, 10.0, 0.0])
def test_noise_is_as_loud_as_asked(snr_db, recorded):
    """By the difference to the same dialogue without noise; the voice's power is that of what the user says."""
    noises = [speech("a b c d e f").samples * 3] if recorded else []
    material = replace(MATERIAL, noises=noises)
    for index in range(3):
        clean = simulate(material, replace(QUIET, pause=1), 0, index)
        noisy = simulate(material, replace(QUIET, pause=1, snr_db=(snr_db,)), 0, index)
        assert noisy.snr_db == snr_db and noisy.events == clean.events
        voice = np.zeros(len(clean.user), bool)
        for event in clean.events:
            if event.kind in ("user", "pause"):
                voice[event.start : event.end] = event.kind == "user"
        measured = decibels(power(clean.user[voice]) / power(noisy.user - clean.user))
        assert measured == pytest.approx(snr_db, abs=0.5)


@pytest.mark.parametrize("echo_db", [-10.0, -20.0, -30.0])
def test_echo_is_as_loud_as_asked_and_late(echo_db):
    for index in range(3):
        clean = simulate(MATERIAL, QUIET, 0, index)
        echoed = simulate(MATERIAL, replace(QUIET, echo_db=(echo_db,)), 0, index)
        echo = echoed.user - clean.user
        assert decibels(power(echo) / power(clean.assistant)) == pytest.approx(echo_db, abs=0.5)
        first = next(e for e in clean.events if e.kind == "assistant").start
        begins = int(np.flatnonzero(np.abs(echo) > 1e-4)[0])
        assert first + 0.01 * SECOND <= begins <= first + 0.1 * SECOND


def test_levels_stay_where_the_mixture_would_clip():
    loud = [tuple(replace(part, samples=8 * part.samples) for part in both) for both in MATERIAL.exchanges]
    clean = simulate(Material(loud), QUIET, 0, 0)
    noisy = simulate(Material(loud), replace(QUIET, snr_db=(0.0,), echo_db=(-10.0,)), 0, 0)
    assert np.abs(noisy.user).max() == pytest.approx(1) or np.abs(noisy.assistant).max() == pytest.approx(1)
    mix = decibels(power(noisy.assistant) / power(clean.assistant))
    user = next(e for e in clean.events if e.kind == "user")
    part = slice(user.start, user.end)
    gain = np.dot(noisy.user[part], clean.user[part]) / np.dot(clean.user[part], clean.user[part])
    assert 20 * np.log10(gain) == pytest.approx(mix, abs=0.5)


def test_bursts_are_loud_where_nobody_of_the_users_speaks():
    clean = simulate(MATERIAL, QUIET, 0, 1)
    coughs = replace(MATERIAL, bursts=[speech("cough").samples])
    noisy = simulate(coughs, replace(QUIET, burst=1, burst_db=(0.0,)), 0, 1)
    bursts = [e for e in noisy.events if e.kind == "noise"]
    assert len(bursts) == QUIET.turns
    voice = power(np.concatenate([clean.user[e.start : e.end] for e in clean.events if e.kind == "user"]))
    for burst in bursts:
        part = slice(burst.start, burst.end)
        assert not clean.user[part].any()
        assert decibels(power(noisy.user[part]) / voice) == pytest.approx(0, abs=0.5)


def test_trimming_is_by_energy():
    said = speech("two words", around=0.25)
    assert voiced(said.samples) == (SECOND // 4, SECOND // 4 + len(speech("two words").samples))
    hum = said.samples + 1e-4 * draws("hum").standard_normal(len(said.samples)).astype(np.float32)  # 60 dB below
    assert voiced(hum) == voiced(said.samples)
    assert trimmed(said).words == speech("two words").words
    for wrong in (np.zeros(99, np.float32), np.zeros((2, 9)), np.array([np.nan]), np.zeros(0)):
        with pytest.raises(ValueError, match="must be finite samples"):
            voiced(wrong)


def test_a_pause_stands_between_two_words():
    said = speech("two plus three")
    places = set()
    for n in range(20):
        longer, (pause,) = with_pause(said, 999, draws("pause", n))
        places.add(pause.text)
        assert pause.end - pause.start == 999 and len(longer.samples) == len(said.samples) + 999
        cut = len(pause.text.split())
        assert said.words[cut - 1][2] <= pause.start <= said.words[cut][1]
        moved = [(w, a + 999 * (i >= cut), b + 999 * (i >= cut)) for i, (w, a, b) in enumerate(said.words)]
        assert list(longer.words) == moved
    assert places == {"two", "two plus"}


def test_without_word_times_a_pause_stands_where_the_voice_is_weakest():
    said = speech("two three", word_times=False)
    _, (pause,) = with_pause(said, 999, draws("any"))
    assert SECOND // 4 <= pause.start <= SECOND // 4 + SECOND // 20 and pause.text == ""
    for whole in (
        speech("seven"),
        speech("seven", word_times=False),
        Utterance(said.samples[: SECOND // 5], "two six"),
    ):
        assert with_pause(whole, 999, draws("any")) == (whole, [])


def test_what_is_heard_of_a_reply():
    """By word times where known (0.25 s a word, 0.05 s between), else by the share of the sound."""
    said = speech("one two three four")
    assert heard(said, round(0.6 * SECOND)).text == "one two"
    assert heard(said, round(0.5 * SECOND)).text == "one"
    untimed = speech("one two three four", word_times=False)
    assert heard(untimed, len(untimed.samples) // 2).text == "one two"
    assert heard(untimed, 10**9) is untimed
    assert len(heard(said, 4000).samples) == 4000


def test_dialogues_are_lines_of_data(tmp_path, lively):
    """Through Shar and back: what a line holds is the dialogue, to 16 bits, and its samples are the dialogue's."""
    cuts = [dialogue_cut(dialogue) for dialogue in lively[:4]]
    for cut in cuts:
        validate(cut)
    CutSet.from_cuts(cuts).to_shar(str(tmp_path), fields={"recording": "flac", "target_recording": "flac"})
    back = list(read_manifest(tmp_path))
    assert len(back) == 4
    for cut, dialogue in zip(back, lively, strict=False):
        np.testing.assert_allclose(cut.load_audio()[0], dialogue.user, atol=1 / 32000)
        np.testing.assert_allclose(cut.load_target_recording()[0], dialogue.assistant, atol=1 / 32000)
        expected = samples(dialogue.name, dialogue.events, len(dialogue.user))
        got = duplex_samples(replace(cut, id="another"))
        assert [s.open for s in got] == [s.open for s in expected]
        assert all((a.barge_in == b.barge_in).all() for a, b in zip(got, expected, strict=True))


def cut_of(name, sound, **custom):
    recording = dialogue_cut(Dialogue(name, sound, sound, (), None, None)).recording
    return MonoCut(name, 0, recording.duration, 0, recording=recording, custom=custom)


def test_utterances_come_from_cuts():
    said = speech("two plus three")
    cut = cut_of("a", said.samples, task="asr", text=said.text)
    words = [AlignmentItem(w, a / SECOND, (b - a) / SECOND) for w, a, b in said.words]
    cut.supervisions = [SupervisionSegment("a", "a", 0, cut.duration, alignment={"word": words})]
    got = utterance(cut)
    assert (got.text, got.words) == (said.text, said.words)
    np.testing.assert_allclose(got.samples, said.samples, atol=1 / 32000)
    spoken = cut_of("b", speech("five").samples).recording
    question, answer = exchange(
        cut_of("c", said.samples, task="s2s", source_text="two plus three", text="five", target_recording=spoken,
               target_recording_unaligned=True)
    )  # fmt: skip
    assert (question.text, answer.text) == ("two plus three", "five")
    assert len(answer.samples) == SECOND // 4 and len(question.samples) == len(said.samples)
    with pytest.raises(DataError, match="cut d: recording is silent"):
        utterance(cut_of("d", np.zeros(SECOND, np.float32), task="asr", text="nothing"))


@pytest.mark.parametrize(
    ("material", "conditions", "says"),
    [
        (Material([]), {}, "needs at least one exchange"),
        (MATERIAL, {"turns": 0}, "at least one turn"),
        (MATERIAL, {"pause": 1.5}, "pause is a chance"),
        (MATERIAL, {"tail_seconds": (2, 1)}, "tail_seconds must be two positive bounds"),
        (MATERIAL, {"snr_db": ()}, "snr_db must list at least one level"),
        (replace(MATERIAL, noises=[np.zeros(99, np.float32)]), {"snr_db": (10.0,)}, "not silent"),
    ],
)
def test_bad_settings_are_named(material, conditions, says):
    with pytest.raises(ValueError, match=says):
        simulate(material, replace(QUIET, **conditions), 0, 0)
