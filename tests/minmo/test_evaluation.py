"""Scores by hand-made examples and by other people's counts, judges on sound whose words are known."""

from __future__ import annotations

import dataclasses
import sys
from importlib import resources, util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import minmo
from minmo.data import duplex
from minmo.data.duplex import Begun, Event
from minmo.data.nano.sentences import language_of, results_right
from minmo.evaluation import measures
from minmo.evaluation.compare import Change
from minmo.evaluation.judges import JudgeError, Moonshine, PocketSphinx
from minmo.evaluation.scores import OTHER, confusion, difference, estimate, quotient, ratio, right_rate, word_errors
from minmo.evaluation.speech import Ears, measured, pitch, wanted
from minmo.evaluation.turns import Turns, _count, _whole
from minmo.evaluation.words import holds, label_in, normalised, same, spoken
from minmo.modules.duplex import BARGE_IN, TURN_TAKING

jiwer = pytest.importorskip("jiwer", reason="word errors need jiwer: pip install 'minmo[eval]'")
sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu: pip install 'minmo[eval]'")
pytest.importorskip("whisper_normalizer", reason="words need whisper-normalizer: pip install 'minmo[eval]'")

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
    assert counts == {"en": {"en": 1, "es": 1, OTHER: 0}, "es": {"en": 0, "es": 1, OTHER: 1}}


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


def record(reference="", answer="", language="en", **more):
    name = f"{reference} {answer} {more}"
    return {"id": name, "utterance": name, "language": language, "reference": reference, "answer": answer, **more}


def found(kind, records):
    return {(m.name, m.by): m.score(records, 0) for m in kind(records)}


def test_whispers_normaliser_as_transformers_has_it():
    theirs = pytest.importorskip("transformers.models.whisper.english_normalizer")
    english, basic = theirs.EnglishTextNormalizer({}), theirs.BasicTextNormalizer()
    for text in ("Mr. Smith won't pay twenty-one dollars, uh, today!", "It's 3 p.m. (laughs) -- ten point five."):
        assert normalised(text, "en") == english(text).split()
    assert normalised("Où est-il ? «Là-bas»", "fr") == basic("Où est-il ? «Là-bas»").split()
    assert normalised("你好, 世界。", "zh") == list("你好世界") and normalised("?!", "en") == []


def test_word_errors_of_a_set_are_jiwers():
    pairs = [("he began a confused complaint", "he began confused complaints"), ("go home now", "go home"), ("yes", "")]
    score = found(measures.heard, [record(*pair) for pair in pairs])["WER (Whisper's normaliser)", "the model"]
    assert score.value == pytest.approx(jiwer.wer([r for r, _ in pairs], [a for _, a in pairs]))
    assert (score.n, score.of) == (3, 9)
    chinese = found(measures.heard, [record("换一首歌。", "换一首", "zh")])
    assert chinese["CER (Whisper's normaliser)", "the model"].value == 1 / 4 and len(chinese) == 1
    nothing = found(measures.heard, [record("Um.", "yes")])["WER (Whisper's normaliser)", "the model"]
    assert nothing.value is None  # no words are left to be heard


def test_bleu_is_sacrebleus_and_is_resampled():
    pairs = [
        ("The cat sat on the mat today .", "The cat sat on the mat"),
        ("We go home at seven .", "We go home at six ."),
        ("Nothing was said by anyone there .", "Nothing was ever said by anyone ."),
    ] * 4
    records = [{**record(r, a, "de", target="en"), "utterance": n} for n, (r, a) in enumerate(pairs)]
    scores = found(measures.translated, records)
    ((name, _), score), *_ = scores.items()
    theirs = sacrebleu.corpus_bleu([a for _, a in pairs], [[r for r, _ in pairs]])
    assert score.value == pytest.approx(theirs.score) and score.low < score.value < score.high
    assert name.startswith("BLEU nrefs:1|case:mixed") and "tok:13a" in name
    assert "tok:zh" in next(iter(found(measures.translated, [record("你好", "你好", target="zh")])))[0]


def test_bleu_of_references_without_four_words_is_no_score():
    """sacrebleu says 0 of the best answer."""
    few = [{**record("six by two", "six by two", "de", target="en"), "utterance": n} for n in range(3)]
    (_, score), *_ = found(measures.translated, few).items()
    assert score.value is None and score.n == 3
    assert sacrebleu.corpus_bleu(["six by two"], [["six by two"]]).score == 0
    longer = {**record("what is six by two", "six by two", "de", target="en"), "utterance": 3}
    (_, score), *_ = found(measures.translated, [*few, longer]).items()
    assert score.value is not None, "what is missed of it counts"


def test_classes_are_counted_as_by_hand():
    truth, answers = ["happy"] * 4 + ["sad"] * 2, ["happy"] * 3 + ["sad"] + ["sad", "I cannot tell"]
    records = [{**record(t, a), "utterance": n} for n, (t, a) in enumerate(zip(truth, answers, strict=True))]
    scores = {name: score.value for (name, _), score in found(measures.classified, records).items()}
    assert scores["accuracy (WA)"] == pytest.approx(4 / 6)
    assert scores["accuracy, mean over classes (UA)"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert scores["F1"] == pytest.approx((2 * 3 / (4 + 3) + 2 * 1 / (2 + 2)) / 2)


def test_no_answer_at_all_is_not_a_class_called_other():
    records = [record("other", "I cannot tell", n=1), record("other", "Other.", n=2), record("happy", "hm", n=3)]
    scores = {name: score.value for (name, _), score in found(measures.classified, records).items()}
    assert scores["accuracy (WA)"] == pytest.approx(1 / 3)
    answers = [measures.answer_label(r, ["happy", "other"]) for r in records]
    assert confusion(["other", "other", "happy"], answers, ["happy", "other"])["other"] == {
        "happy": 0, "other": 1, OTHER: 1,
    }  # fmt: skip


def test_answers_are_right_when_they_hold_one():
    assert holds("I think it was 1969, really.", ["nineteen sixty nine"]) and not holds("fourteen", ["four"])
    assert same("Twenty-one.", "21") and not same("twenty one", "twenty two")
    assert label_in("The speaker is Happy.", ["happy", "sad"]) == "happy"
    assert label_in("happy or sad", ["happy", "sad"]) == "happy or sad"
    assert label_in("not applicable", ["app"]) == "not applicable"
    said = {"said": "two plus three", "answers": ["is five"]}
    right = record("two plus three is five", "2 + 3 is 5", heard="two plus three", **said)
    wrong = record("two plus three is five", "two plus nine is eleven", heard="two plus nine", **said)
    scores = {name: s.value for (name, _), s in found(measures.answered, [right, wrong]).items()}
    assert scores["right (holds an answer)"] == scores["word for word"] == scores["heard right"] == 0.5
    assert scores["right (holds an answer), of those heard right"] == 1
    assert results_right("two plus three is five") == ["is five"] and results_right("my name is minmo") == []
    assert (language_of("trece"), language_of("thirteen"), language_of("you said six")) == ("es", "en", "en")


def test_a_column_of_a_judge_that_is_absent_is_empty_and_not_zero():
    alone = record("two", judged={"moonshine tiny-en": "Two."}, floor={"moonshine tiny-en": "To."}, seconds=1.0)
    scores = found(measures.read_aloud, [alone])
    assert {by for _, by in scores} == {"moonshine tiny-en"}
    assert all(score.value is not None for score in scores.values())
    assert found(measures.read_aloud, [record("two", judged={}, seconds=1.0)]) == {}


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 2, 400)  # most of what varies is the items themselves
    better = hard * (rng.random(400) < 0.9)
    first, second = (np.stack([errors, np.ones(400)], axis=1) for errors in (hard, better))
    apart = difference(first, second)
    assert apart.value == pytest.approx(better.mean() - hard.mean()) and apart.high < 0
    alone = [estimate(entries, quotient) for entries in (first, second)]
    assert apart.high - apart.low < 0.6 * max(score.high - score.low for score in alone)


def test_a_difference_on_a_single_item_shows_nothing_and_unanimity_is_not_certainty():
    measure = next(measures.answered([record("five", "five", answers=["five"])]))
    right = [{**record("five", "five", answers=["five"]), "utterance": n} for n in range(30)]
    wrong = [{**r, "answer": "six"} for r in right]
    for n, verdict in ((1, "not told apart"), (30, "better")):
        apart = measure.compared(wrong[:n], right[:n], 0)
        scores = measure.score(wrong[:n], 0), measure.score(right[:n], 0)
        assert apart.value == 1 and apart.low == max(-1, 1 - 3 / n) and apart.high == 1
        assert Change("set", measure.name, measure.by, *scores, apart, measure.less).verdict == verdict


def test_rate_pitch_and_level_are_measured_from_the_sound():
    pytest.importorskip("pyworld")
    time = np.arange(16_000) / 16_000
    voice = sum(np.sin(2 * np.pi * 150 * n * time) / n for n in range(1, 12)).astype(np.float32)
    assert pitch(0.1 * voice) == pytest.approx(150, rel=0.01) and pitch(np.zeros(16_000, np.float32)) is None
    about = measured(np.pad(0.1 * voice, 8000), "one two three four")
    assert about["rate"] == pytest.approx(4, rel=0.03)
    louder, softer = (measured(gain * voice, "one")["level"] for gain in (0.2, 0.1))
    assert louder - softer == pytest.approx(6.02, abs=0.01)
    assert measured(np.zeros(9, np.float32), "one") == {"rate": None, "pitch": None, "level": None}
    assert wanted("Please speak very fast") == ("rate", 1) and wanted("In a deep voice.") == ("pitch", -1)
    assert wanted("Speak sadly") is None


def test_manners_are_followed_or_not():
    plain = {"rate": 2.0, "pitch": 100.0, "level": -20.0}
    fast = record(wanted=["rate", 1], plain=plain, styled={**plain, "rate": 3.0})
    slow = record(wanted=["rate", -1], plain=plain, styled={**plain, "rate": 3.0})
    soft = record(wanted=["level", -1], plain=plain, styled={**plain, "level": -26.0})
    scores = {name: s.value for (name, _), s in found(measures.styled, [fast, slow, soft, record(wanted=None)]).items()}
    assert scores["words a second with it by without, asked for more"] == 1.5
    assert (scores["words a second: more, as asked"], scores["words a second: less, as asked"]) == (1, 0)
    assert scores["level, dB with it by without, asked for less"] == -6 and scores["level, dB: less, as asked"] == 1


def test_the_voice_and_its_quality_where_their_judges_are_installed():
    ears = Ears()
    sentence, question = (minmo.load_audio(ASSETS / name) for name in ("sentence.wav", "question.wav"))
    line = SimpleNamespace(language="en", text="two plus three", spoken=lambda: question)
    made = ears.judge(line, sentence)
    installed = all(util.find_spec(name) for name in ("resemblyzer", "speechmos"))
    if not installed:
        assert any("minmo[judges]" in what for what in ears.missing) and not {"mos", "voice", "likeness"} & set(made)
        pytest.skip("the judges of voices are absent: pip install 'minmo[judges]'")
    assert 2 < made["mos"] < 5 and len(made["voice"]) == 256
    assert made["likeness"] > 0.6  # one speaker, on two recordings


@pytest.mark.parametrize("begun", [(), (Begun(1, 0), Begun(41, 37), Begun(61, 57))])
def test_turns_are_counted_by_hand(begun):
    """A turn of two seconds with a pause, an answer with a back-channel, a barge-in, an answer; positions of 80 ms.
    What is counted is an open turn, also where it was begun anew: in the back-channel, and in the barge-in."""
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
    kept = duplex.samples("d", events, 100 * tick, begun)
    custom = {"task": "duplex", "events": [dataclasses.asdict(e) for e in events], "ambiguous": [True, False]}
    cut = SimpleNamespace(recording=SimpleNamespace(id="d"), custom=custom)

    def counted(marks):
        """marks: by decision, the positions at which the predictor is sure."""
        yes, turns = torch.zeros(len(kept), 100, 2), Turns()
        for n, sample in enumerate(kept):
            for place, positions in marks.items():
                for p in positions & set(sample.open):
                    yes[n, p - sample.open.start, place] = 0.9
        _count(turns, cut, _whole(kept, yes))
        return turns

    # Two positions each, as a session wants of some decisions: late, and at once.
    marks = {TURN_TAKING: {27, 28, 82, 83}, BARGE_IN: {60, 61}}
    turns = counted(marks)
    scores = turns.scores(0)
    assert scores["end of turn, F1@1"].value == 0 and scores["end of turn, F1@5"].value == 1
    assert scores["end of turn, ambiguous turns, F1@5"].of == 2, "one decision and one event"
    assert scores["end of turn, unambiguous turns, F1@1"].value == 0
    assert scores["barge-in, F1@1"].value == 1
    assert scores["pauses of a turn waited through"].value == 1 and scores["back-channels let pass"].value == 1
    turns = counted({TURN_TAKING: marks[TURN_TAKING] | {12, 13}, BARGE_IN: marks[BARGE_IN] | {40, 41}})
    scores = turns.scores(0)
    assert scores["pauses of a turn waited through"].value == 0 and scores["back-channels let pass"].value == 0
    assert scores["end of turn, ambiguous turns, F1@5"].value == 0 and scores["barge-in, F1@5"].value == 0
