"""Scores by hand-made examples, judges on sound whose words are known, and a whole evaluation of two utterances."""

import dataclasses
import json
import sys
from importlib import resources, util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch

import minmo
from minmo import weights
from minmo.conversation.timings import Timings
from minmo.conversation.verbs import Reply
from minmo.data import duplex
from minmo.data.duplex import Event
from minmo.data.schema import DataError
from minmo.evaluation import listener, nano
from minmo.evaluation.judges import JudgeError, Moonshine, PocketSphinx
from minmo.evaluation.listener import Listener
from minmo.evaluation.material import Line, Material, joined, trimmed
from minmo.evaluation.results import tables
from minmo.evaluation.scores import confusion, ratio, right_rate, word_error_rate, word_errors
from minmo.evaluation.turns import Turns, _count
from minmo.evaluation.words import spoken
from minmo.modules.duplex import BARGE_IN, TURN_TAKING

lhotse = pytest.importorskip("lhotse", reason="manifests need lhotse: pip install 'minmo[eval]'")
pytest.importorskip("jiwer", reason="word errors need jiwer: pip install 'minmo[eval]'")

ASSETS = resources.files("minmo") / "assets"
LACKING = [name for name in ("moonshine_voice", "pocketsphinx") if util.find_spec(name) is None]
judged = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}; see the extra eval")


@pytest.mark.parametrize(
    "written,said",
    [
        ("Eight.", "eight"),
        ("8 + 5 = 13", "eight plus five is thirteen"),
        ("19 minus 1 is 18.", "nineteen minus one is eighteen"),
        ("56789", "five six seven eight nine"),
        ("You said 0-1-3-0-9-6.", "you said zero one three zero nine six"),
        ("Four eight-five.", "four eight five"),
        ("12 - 5, -3", "twelve minus five minus three"),
        ("07", "zero seven"),
        ("3x4, 3 × 4, 8/2", "three times four three times four eight divided by two"),
        ("One hundred and five", "one hundred five"),
        ("100", "one hundred"),
        ("1,234", "one two three four"),
        ("49.99", "forty nine ninety nine"),
        ("I’m fine, what's 2?", "i am fine what is two"),
        ("Quatre-vingt-dix, МИНУС", "quatre vingt dix минус"),
        ("7d", "seven d"),
        ("", ""),
    ],
)
def test_words_are_as_they_are_said(written, said):
    assert spoken(written) == said.split()


def test_homophones_are_forgiven_when_asked():
    assert spoken("A to a, for won!") == "a to a for won".split()
    assert spoken("You ate too for two won", forgive=True) == "you eight two four two one".split()


def test_word_errors_count_what_jiwer_counts():
    assert word_errors("two plus three".split(), "two plus three".split()) == 0
    assert word_errors("two plus three".split(), "too plus".split()) == 2  # substituted, deleted
    assert word_errors(["two"], "two two two".split()) == 2  # inserted
    assert word_errors("two plus".split(), []) == 2
    with pytest.raises(ValueError, match="reference is empty"):
        word_errors([], ["two"])


def test_word_error_rate_weighs_words_not_utterances():
    score = word_error_rate([["one"], "a b c d e f g h i".split()], [["two"], "a b c d e f g h i".split()])
    assert score.value == pytest.approx(0.1) and (score.n, score.of) == (2, 10)


def test_intervals_hold_the_value_are_seeded_and_shrink_with_the_utterances():
    errors = [0, 1, 0, 2, 0, 0, 1, 0] * 4
    score = ratio(errors, [4] * 32)
    assert score.low < score.value == 4 * 4 / 128 < score.high
    uneven = range(3, 35)
    assert ratio(errors, uneven) == ratio(errors, uneven) != ratio(errors, uneven, seed=1)
    more = ratio(errors * 16, [4] * 32 * 16)
    assert (more.high - more.low) / (score.high - score.low) == pytest.approx(1 / 4, rel=0.3)
    # By hand: a rate of 1/2 over 400 has a standard error of 1/40.
    half = ratio([0, 1] * 200, [1] * 400)
    assert (half.low, half.high) == pytest.approx((0.5 - 1.96 / 40, 0.5 + 1.96 / 40), abs=0.01)


def test_what_shares_an_utterance_is_no_more_evidence():
    counted = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1]
    once = ratio(counted, [1] * 10)
    fourfold = ratio(counted * 4, [1] * 40, list(range(10)) * 4)
    assert (fourfold.low, fourfold.high) == (once.low, once.high)
    assert (fourfold.n, fourfold.of) == (10, 40)


def test_unanimity_is_not_certainty():
    none, every = right_rate([False] * 28), right_rate([True] * 28)
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(3 / 28))
    assert (every.value, every.low, every.high) == (1, pytest.approx(1 - 3 / 28), 1)


def test_a_rate_counts_only_what_was_heard_right():
    score = right_rate([True, False, True, True], given=[True, True, False, False])
    assert (score.value, score.n, score.of) == (0.5, 2, 2)
    nothing = right_rate([True, False], given=[False, False])
    assert nothing.value is None and nothing.n == 0 and str(nothing) == "nothing to count"
    with pytest.raises(ValueError, match="entry each"):
        ratio([1], [1, 1])


def test_confusions_are_counted_by_the_truth():
    counts = confusion(["en", "en", "es", "es"], ["en", "es", "es", "hm"], ["en", "es"])
    assert counts == {"en": {"en": 1, "es": 1, "other": 0}, "es": {"en": 0, "es": 1, "other": 1}}


@judged
def test_judges_hear_the_sentences_that_ship():
    question, sentence = (minmo.load_audio(ASSETS / name) for name in ("question.wav", "sentence.wav"))
    moonshine = Moonshine()
    assert spoken(moonshine(question)) == "two plus three".split()
    said = spoken("Which folder should I save the message to?")
    assert word_errors(said, spoken(moonshine(sentence))) <= 2
    sphinx, grammar = PocketSphinx(), PocketSphinx(grammar=True)
    assert word_errors(said, sphinx(sentence).split()) <= 5
    # Bound to number words it inserts some, but those that were said are there, in order.
    first = grammar(question)
    assert [word for word in first.split() if word in ("two", "plus", "three")] == ["two", "plus", "three"]
    assert set(grammar(sentence).split()) <= grammar.vocabulary
    assert grammar(question) == first  # whatever was judged in between
    assert isinstance(moonshine(np.zeros(0, np.float32)), str)  # a reply may hold no sound


@pytest.mark.parametrize("judge,module", [(Moonshine, "moonshine_voice"), (PocketSphinx, "pocketsphinx")])
def test_a_missing_judge_says_what_to_type(judge, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(JudgeError, match=r"pip install 'minmo\[eval\]' && pip install --no-deps moonshine-voice"):
        judge()


def line(name, seconds, instruction="", text="two"):
    sound = np.full(round(16_000 * seconds), 0.01, np.float32)
    return Line(name, name, "en", seconds, lambda: sound, text, text, instruction)


def test_replies_come_in_the_order_of_the_lines_and_a_sound_is_transcribed_once(monkeypatch):
    calls = []

    def talk(model, sounds, settings, instruction):
        calls.append((instruction, len(sounds)))
        assert len(settings.seed) == len(sounds) and settings.temperature == 0
        return [Reply(f"{instruction} {len(s)}", s, Timings()) for s in sounds]

    monkeypatch.setattr(minmo, "talk", talk)
    monkeypatch.setattr(listener, "BATCH", 2)
    lines = [line(str(i), seconds, ask) for i, (seconds, ask) in enumerate([(3, "b"), (1, "a"), (2, "b"), (1.5, "b")])]
    model = Listener(None)
    assert [r.text for r in model.answers(lines)] == ["b 48000", "a 16000", "b 32000", "b 24000"]
    assert calls == [("a", 1), ("b", 2), ("b", 1)]
    heard = model.transcripts(lines)
    assert heard == [f"Speech Transcription {n}" for n in (48000, 16000, 32000, 24000)]
    calls.clear()
    assert model.transcripts(lines[::-1]) == heard[::-1] and not calls


def test_a_reply_that_broke_off_stops_the_evaluation(monkeypatch):
    broken = Reply("", np.zeros(0, np.float32), Timings(), fault="the LLM's state became NaN")
    monkeypatch.setattr(minmo, "talk", lambda model, sounds, settings, instruction: [broken] * len(sounds))
    with pytest.raises(FloatingPointError, match="seven: the LLM's state"):
        Listener(None).answers([line("seven", 1)])


def test_words_are_trimmed_and_joined_as_the_seed_draws():
    word = np.pad(np.full(1600, 0.5, np.float32), 8000)
    assert len(trimmed(word)) == 1600 + 2 * 480
    sounds = dict.fromkeys((*NUMBERS.split(), "minus"), word[8000:9600])
    lines = joined(sounds, 8)
    assert [x.said for x in lines] == [x.said for x in joined(sounds, 8)] != [x.said for x in joined(sounds, 8, 1)]
    for n, x in enumerate(lines):
        assert ("minus" in x.said) == bool(n % 2) and x.text == x.said
        words, sound = len(x.said.split()), x.sound()
        assert np.count_nonzero(sound) == 1600 * words and 0.28 <= x.seconds - words * 0.1 <= 0.2 + 0.2 * words


NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two utterances in every manifest, beginnings of the shipped question; the whole of it is what is answered."""
    folder = tmp_path_factory.mktemp("corpus")
    whole = minmo.load_audio(ASSETS / "question.wav")
    sf.write(folder / "answer.flac", whole, 16_000)
    answer = lhotse.Recording.from_file(folder / "answer.flac")
    manifests = {}
    for name, samples in (("longer", 12_000), ("shorter", 8000)):
        sf.write(folder / f"{name}.flac", whole[:samples], 16_000)
        recording = lhotse.Recording.from_file(folder / f"{name}.flac", recording_id=name)
        about = {"source_text": "two plus three", "language": "en"}
        reply = {"text": "two plus three is five", **about}
        target = {"target_recording": answer, "target_recording_unaligned": True}
        for manifest, task in {
            "test-seen-asr-en": {"task": "asr", **about, "text": "two plus three"},
            "test-people-digits-en": {"task": "asr", "text": {"longer": "two", "shorter": "A.M."}[name]},
            "test-seen-lid-en": {"task": "lid", **about, "instruction": "Language Identification", "text": "English"},
            "test-seen-qa-en": {"task": "qa", **reply},
            "test-seen-s2tt-en": {
                "task": "s2tt", **about, "instruction": "Translate English into French", "text": "deux plus trois",
            },
            "test-seen-s2s": {"task": "s2s", **reply, **target},
            "valid-tts": {"task": "tts", "text": "two", "target_recording": answer},
        }.items():  # fmt: skip
            cut = recording.to_cut()
            cut.id, cut.custom = f"{name}-{manifest}", task
            if manifest == "test-people-digits-en":
                cut.recording = dataclasses.replace(recording, id=f"{name}-word")
            if task["task"] == "tts":
                cut.recording, cut.duration = None, answer.duration
            manifests.setdefault(manifest, []).append(cut)
    for manifest, cuts in manifests.items():
        lhotse.CutSet.from_cuts(cuts).to_file(folder / f"{manifest}.jsonl.gz")
    return folder


def test_material_is_drawn_by_the_seed_and_says_what_it_lacks(corpus, tmp_path):
    material = Material(corpus)
    (asked,) = (x for x in material.lines("test-seen-s2s") if x.utterance == "longer")
    assert (asked.said, asked.text, asked.instruction) == ("two plus three", "two plus three is five", "")
    assert len(asked.sound()) == 12_000 == 16_000 * asked.seconds and len(asked.spoken()) > 32_000
    first = {Material(corpus, 1, seed).lines("test-seen-asr-en")[0].id for seed in range(9)}
    assert len(first) == 2  # another seed may choose another
    assert [x.said for x in material.single_words("en")] == ["two"]
    assert material.joined_words() == [] and "no recording of eight" in material.left_out[-1]
    assert material.by_language("test-unseen-asr") == {} and "test-unseen-asr" in material.left_out[-1]
    with pytest.raises(DataError, match="minmo data nano"):
        Material(tmp_path)
    with pytest.raises(ValueError, match="limit"):
        Material(corpus, 0)


@judged
def test_an_evaluation_runs_and_says_that_the_weights_are_random(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(nano.minmo, "load", lambda name: weights.untrained(name))
    monkeypatch.setattr(listener, "LONGEST", 1)  # random weights speak for as long as they may
    monkeypatch.setattr(Material, "unseen_people", lambda self: {})
    tasks = []
    results = nano.evaluate_nano("nano", corpus, 2, tmp_path / "scores.json", progress=tasks.append)
    assert tasks == list(nano.TASKS) and not (tmp_path / "scores.json.part").exists()
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(results)))
    assert stored["about"]["trained"] is False and "random" in stored["about"]["weights"]
    assert len(stored["about"]["sha256_of_tensors"]) == 64 and stored["about"]["limit"] == 2
    assert "UNTRAINED" in tables(results)[0].title and tables(results)[0].row_count == len(results.rows)
    assert {row.task for row in results.rows} == set(nano.TASKS) - {"turn-taking"}
    assert any("test-duplex" in what for what in results.left_out)
    assert score(results, "hearing", "seen voices, en").n == 2
    # The floor is the original recording, which says other words than the answer in this corpus.
    assert score(results, "speaking", f"held-out sentences, {nano.FLOOR}", "moonshine").value == 2
    assert score(results, "speech-to-speech", f"seen voices, en, {nano.FLOOR}", "moonshine").value == 0


def test_the_result_of_a_sum_is_what_stands_after_is():
    texts = ["two plus three is five"] * 4
    heard = ["To plus tree is 5.", "two plus three is twenty five", "five", "two plus three is"]
    assert nano._results_alike(texts, heard) == [True, False, False, False]


def score(results, task, material, by="the model", measure=""):
    rows = [r for r in results.rows if (r.task, r.material) == (task, material) and r.by.startswith(by)]
    return next(r.score for r in rows if r.measure.startswith(measure))


class Oracle(Listener):
    """Knows every answer but one, and its speech is understood."""

    def answers(self, lines, speak=False):
        texts = ["wrong" if x.instruction == "" and x.utterance == "shorter" else x.text for x in lines]
        return [Reply(text, np.full(16, i, np.float32), Timings()) for i, text in enumerate(texts)]

    def says(self, texts):
        return [np.zeros(16, np.float32) for _ in texts]


class Understanding:
    """A judge that hears one sentence in everything."""

    name, vocabulary = "judge", None

    def __init__(self, **_):
        pass

    def __call__(self, sound):
        return "Two plus 3 is five."


def test_every_task_scores_its_answers_against_its_own_lines(corpus, monkeypatch):
    monkeypatch.setattr(nano, "Listener", Oracle)
    monkeypatch.setattr(nano, "Moonshine", Understanding)
    monkeypatch.setattr(nano, "PocketSphinx", Understanding)
    monkeypatch.setattr(Material, "unseen_people", lambda self: {})
    results = nano.evaluate_nano("nano", corpus)
    assert score(results, "hearing", "seen voices, en").value == 0
    assert score(results, "hearing", "people, single words (development), en", "judge").value == 4
    assert score(results, "answering", "seen voices, en", measure="arithmetic heard right").value == 1
    assert score(results, "answering", "seen voices, en", measure="arithmetic right, of those").value == 0.5
    assert score(results, "answering", "seen voices, en", measure="other answers right").value is None
    assert score(results, "languages", "seen voices", measure="language right").value == 1
    assert score(results, "languages", "seen voices", measure="English taken for Spanish").value == 0
    assert results.confusions["seen voices"]["English"]["English"] == 2
    assert score(results, "translating", "seen voices, from en").value == 1
    assert score(results, "speaking", "held-out sentences", "judge").value == 4
    assert score(results, "speech-to-speech", "seen voices, en", "judge").value == 1
    assert any("test-unseen-qa-en" in what for what in results.left_out)


@judged
def test_where_nothing_can_be_written_nothing_is_begun(corpus, tmp_path):
    tasks = []
    with pytest.raises(ValueError, match="cannot be written"):
        nano.evaluate_nano("nano", corpus, 1, tmp_path / "none" / "scores.json", progress=tasks.append)
    assert not tasks
    with pytest.raises(ValueError, match="seed"):
        nano.evaluate_nano("nano", corpus, seed=-1)


@pytest.mark.skipif(
    not Path("/usr/share/pocketsphinx/test/data").is_dir(), reason="pocketsphinx-testdata not installed"
)
def test_people_of_other_packages_come_with_their_words(corpus):
    sets = Material(corpus).unseen_people()
    (digits,) = [x for x in sets["people, numbers"] if "2934z" in x.id]
    assert digits.said == "two nine three four zero" and len(digits.sound()) == 16_000 * digits.seconds == 38_400
    cards = sets["people, playing cards (words not taught)"]
    assert len(cards) == 5 and "ten of clubs" in [x.said for x in cards]


def test_turns_are_counted_by_hand():
    """A turn of two seconds with a pause, an answer with a back-channel, a barge-in, an answer; positions of 80 ms."""
    tick = 1280
    events = [
        Event("user", 0, 25 * tick, "twenty one"),
        Event("pause", 10 * tick, 15 * tick, "twenty"),
        Event("assistant", 30 * tick, 70 * tick, "one"),
        Event("backchannel", 40 * tick, 42 * tick),
        Event("barge_in", 60 * tick, 80 * tick, "two"),
        Event("assistant", 90 * tick, 100 * tick, "two"),
    ]
    events = sorted(events, key=lambda e: e.start)
    kept = duplex.samples("d", events, 100 * tick)
    custom = {"task": "duplex", "events": [dataclasses.asdict(e) for e in events], "ambiguous": [True, False]}
    cut = SimpleNamespace(recording=SimpleNamespace(id="d"), custom=custom)
    turns = Turns()
    yes = torch.zeros(len(kept), 100, 2)
    for n, sample in enumerate(kept):
        for place, labels in ((TURN_TAKING, sample.turn_taking), (BARGE_IN, sample.barge_in)):
            if (labels == 1).any():
                due = int(np.flatnonzero(labels == 1)[0])
                due += 2 if place == TURN_TAKING else 0  # late, and at once
                yes[n, due : due + 2, place] = 0.9  # for two positions, as a session wants of some decisions
    _count(turns, cut, kept, yes)
    scores = turns.scores(0)
    assert scores["end of turn, F1@1"].value == 0 and scores["end of turn, F1@5"].value == 1
    assert scores["end of turn, ambiguous turns, F1@5"].of == 2, "one decision and one event"
    assert scores["end of turn, unambiguous turns, F1@1"].value == 0
    assert scores["barge-in, F1@1"].value == 1
    assert scores["pauses of a turn waited through"].value == 1 and scores["back-channels let pass"].value == 1
    first, listening = kept[0], next(s for s in kept if (s.barge_in == 1).any())
    yes[0, 12 - first.open.start : 14 - first.open.start, TURN_TAKING] = 0.9  # in the pause
    murmur = 40 - listening.open.start
    yes[kept.index(listening), murmur : murmur + 2, BARGE_IN] = 0.9  # at the back-channel
    _count(turns := Turns(), cut, kept, yes)
    scores = turns.scores(0)
    assert scores["pauses of a turn waited through"].value == 0 and scores["back-channels let pass"].value == 0
    assert scores["end of turn, ambiguous turns, F1@5"].value == 0 and scores["barge-in, F1@5"].value == 0
