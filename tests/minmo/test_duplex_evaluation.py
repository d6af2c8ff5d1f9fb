"""Full duplex, measured: scores of a conversation that was written by hand, and of one that nano really held."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources, util

import numpy as np
import pytest
import soundfile as sf
import torch

import minmo
from minmo.config import TICK
from minmo.conversation import client, steps
from minmo.conversation.client import Recording
from minmo.data.duplex import ANSWER_GAP
from minmo.data.reactive import LIVE, ReactiveUser
from minmo.data.simulator import Material
from minmo.data.utterances import Utterance
from minmo.evaluation import duplex, records
from minmo.evaluation.duplex_report import draw, markdown
from minmo.evaluation.duplex_scores import agreement, live_rows, offsets, user_turns
from minmo.evaluation.results import Results
from minmo.evaluation.scores import quantile
from minmo.evaluation.voices import Silero

ASSETS = resources.files("minmo") / "assets"
ABOUT = {"model": "nano", "weights": "w", "trained": True, "seed": 0, "realtime": False, "eagerness": "auto"}
ABOUT |= {"front": "none", "judges": [], "limit": None}
silero = pytest.mark.skipif(util.find_spec("silero_vad") is None, reason="silero-vad is absent: minmo[eval]")


def event(kind, begin, end, text=""):
    return {"kind": kind, "start": round(16 * begin), "end": round(16 * end), "text": text}


FACTS = {
    "name": "by-hand-0-0",
    "snr_db": None,
    "echo_db": None,
    "events": [
        event("user", 1_000, 4_000, "one plus two"),
        event("pause", 2_000, 2_900),
        event("backchannel", 5_000, 5_300, "yes"),
        event("user", 8_000, 9_000, "three"),
        event("barge_in", 10_000, 11_000, "four"),
        event("user", 14_000, 15_000, "five"),
        event("user", 20_000, 22_000, "six"),
        event("pause", 20_500, 21_500),
    ],
    "ambiguous": [False, False, True, False, True],
    # Answered, answered and interrupted, answered twice, missed, answered too early and again at the end.
    "taken": [[0, 4_160], [1, 9_080], [2, 11_080], [3, 13_000], [4, 21_040], [5, 22_080]],
    "ended": [],
    "sent": [[0, 4_240], [1, 9_160], [2, 11_160], [3, 13_080], [4, 21_120], [5, 22_160]],
    "cuts": [{"reply": 1, "at": 10_480, "last_sent": 10_400, "last_played": 10_470},
             {"reply": 4, "at": 21_840, "last_sent": 21_760, "last_played": 21_840}],
    "voices": [[0, 4_300, 6_500], [1, 9_200, 10_470], [2, 11_200, 12_000], [3, 13_100, 13_400], [4, 21_200, 21_840],
               [5, 22_200, 24_000]],
    "text": {"0": "It is 3.", "1": "three", "2": "five"}, "expected": ["it is three", "three", "four", "five", "six"],
    "seconds": 25.0, "tick_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0}, "judged": None,
}  # fmt: skip


def scores(*facts):
    return {row.measure: row.score for row in live_rows(facts, 0)}


def test_a_conversation_written_by_hand_is_scored_as_by_hand():
    found = scores(FACTS)
    assert found["end of turn to decision, p50, s"].value == pytest.approx(0.08)  # 160, 80, 80
    assert found["end of turn to decision, p95, s"].value == pytest.approx(0.152)
    assert found["end of turn to first sound heard, p50, s"].of == 3
    assert found["missed turns"].value == 1 / 5 and found["answered again though nothing was said"].value == 1 / 5
    assert found["false take-over: answered before the turn's end"].value == 1 / 5
    assert found["false take-over, ambiguous turns"].value == 1 / 2
    assert found["false take-over in a pause, unambiguous turns"].value == 0
    assert found["false take-over in a pause of 1 - 2 s"].value == 1
    # The first turn's answer is right, the barge-in's wrong; the others' were cut, too late, or never came.
    assert found["answered rightly, first turns"].value == 1 and found["answered rightly, first turns"].of == 1
    assert found["answered rightly, later turns"].value == 0 and found["answered rightly, later turns"].of == 1
    assert found["barge-in success"].value == 1
    stops = [found[f"barge-in to {what}, p50, s"].value for what in ("decision", "last byte sent", "last sound played")]
    assert stops == pytest.approx([0.48, 0.4, 0.47])
    assert found["false barge-in, back-channel"].value == 0
    # Nothing happened during replies 2, 3 and 5; reply 4 was cut, but while the user spoke on.
    assert found["false barge-in, no echo, nothing else"].value == 0
    assert found["false barge-in, no echo, nothing else"].of == 3
    assert found["assistant's turn-taking, F1@1"].value == pytest.approx(2 * 3 / 9)  # of 4 decisions and 5 events
    assert found["user's turn-taking (barge-in), F1@1"].value == 0
    assert found["user's turn-taking (barge-in), F1@10"].value == 1


def test_what_goes_wrong_shows():
    """The back-channel and the echo stop replies; the interruption stops nothing."""
    wrong = FACTS | {
        "echo_db": -10.0,
        "cuts": [{"reply": 0, "at": 5_360, "last_sent": 5_300, "last_played": 5_360},
                 {"reply": 2, "at": 11_900, "last_sent": 11_800, "last_played": 11_900}],
        "voices": [[0, 4_300, 5_360], [1, 9_200, 11_060], [2, 11_200, 11_900]],
        "taken": FACTS["taken"][:3],
    }  # fmt: skip
    found = scores(wrong)
    assert found["false barge-in, back-channel"].value == 1 and found["barge-in success"].value == 0
    assert found["false barge-in, echo at -10 dB, nothing else"].value == 1
    assert "barge-in to decision, p50, s" not in found
    assert found["missed turns"].value == 2 / 5
    # An interruption of what ends by itself soon after says nothing of either.
    short = wrong | {"voices": [[0, 4_300, 5_360], [1, 9_200, 10_600], [2, 11_200, 11_900]]}
    assert "barge-in success" not in scores(short)


def test_turns_are_the_users_with_their_pauses():
    turns = user_turns(FACTS)
    assert [(t.kind, t.begin, t.end) for t in turns[:2]] == [("user", 1_000, 4_000), ("user", 8_000, 9_000)]
    assert [len(t.pauses) for t in turns] == [1, 0, 0, 0, 1] and turns[-1].until == float("inf")


def test_a_quantile_has_an_interval_over_conversations():
    values = list(np.random.default_rng(0).normal(1, 0.2, 400))
    score = quantile(values, 0.5)
    assert score.low < score.value < score.high and (score.n, score.of) == (400, 400)
    assert score.high - score.low == pytest.approx(2 * 1.96 * 1.2533 * 0.2 / 20, rel=0.3)  # of a normal's median
    together = quantile(values, 0.5, [n % 4 for n in range(400)])
    assert together.n == 4 and together.of == 400
    assert quantile([], 0.5).value is None


def test_the_report_stands_beside_the_paper(tmp_path):
    (tmp_path / "sound").mkdir()
    sf.write(
        tmp_path / "sound" / "by-hand-0-0.flac", 0.01 * np.random.default_rng(0).standard_normal((240_000, 2)), 24_000
    )
    text = markdown(Results(ABOUT, live_rows([FACTS], 0), left_out=["something"]), [FACTS])
    assert "| MinMo 8B, Fisher (quoted) | 0.6682 / 0.8372 / 0.8813 | 0.4271 / 0.9455 / 0.9994 | 0.8123 |" in text
    assert "| barge-in success | 1.000 |" in text and "Not judged." in text and "Left out: something" in text
    draw([FACTS], ABOUT, tmp_path)
    assert (tmp_path / "latency.png").stat().st_size > 10_000 and (tmp_path / "example.png").stat().st_size > 10_000


class Oracle:
    """Decides as it should: to answer from where a turn has ended, to stop 160 ms after one has begun."""

    def __init__(self, user):
        self.user, self.decide = user, steps.decide

    def __call__(self, model, state, rows, hidden, counts):
        self.decide(model, state, rows, hidden, counts)
        now, turns = self.user._now, [e for e in self.user.events if e.kind in ("user", "barge_in")]
        answer = any(e.end <= now < e.end + ANSWER_GAP for e in turns[-1:])
        stop = any(e.start + 2 * TICK <= now < e.end for e in turns)
        return torch.tensor([float(answer), float(stop)]).expand(len(rows), 1, 2)


@pytest.fixture(scope="module")
def conversation(tmp_path_factory):
    """nano answers twice, and is interrupted in its first answer -> facts and a file. When it speaks is given."""
    question = Utterance(minmo.load_audio(ASSETS / "question.wav"), "two plus three")
    conditions = replace(LIVE, turns=2, pause=0, barge_in=1, backchannel=0, burst=0, snr_db=(None,), echo_db=(None,),
                         lead_seconds=(0.3, 0.3), tail_seconds=(0.1, 0.1))  # fmt: skip
    user = ReactiveUser(Material([(question, question)]), conditions, 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "decide", Oracle(user))
        patch.setattr(client, "TAIL_MS", 0.0)
        settings = minmo.Settings(temperature=0.0, max_text_tokens=8)
        facts, found = duplex.held(minmo.load("nano", "cpu"), user, settings, ABOUT)
    file = tmp_path_factory.mktemp("duplex") / "both.flac"
    minmo.save_audio(file, found.stereo(), found.rate)
    return facts, file


def test_a_conversation_is_held_with_a_user_who_interrupts(conversation):
    facts, file = conversation
    assert [e["kind"] for e in facts["events"]] == ["user", "barge_in"] and len(facts["taken"]) == 2
    begun = facts["events"][1]["start"] / 16
    first = facts["voices"][0]
    assert first[0] == 0 and first[1] < begun < first[2], "while the assistant really sounds"
    found = scores(facts)
    assert found["end of turn to decision, p95, s"].value <= 0.16 and found["missed turns"].value == 0
    assert found["barge-in success"].value == 1
    decided, played = (found[f"barge-in to {what}, p50, s"].value for what in ("decision", "last sound played"))
    assert 0.16 <= decided <= 0.32 and decided - 0.08 <= played <= decided
    assert json.loads(json.dumps(facts)) == facts
    sound, rate = sf.read(file, always_2d=True)
    assert sound.shape[1] == 2 and len(sound) / rate == pytest.approx(facts["seconds"], abs=0.1)


def test_a_faint_lead_in_is_not_heard_for_being_alone():
    """Of a reply that was played with a gap behind its first 70 ms; one that is cut, and one that is silent."""
    assistant = np.zeros(4 * 24_000, np.float32)
    assistant[24_000:25_680] = 0.001
    assistant[28_000:40_000] = np.r_[np.full(2400, 0.001), np.full(9600, 0.3)]
    assistant[60_000:62_400] = 0.2
    spans = [(0, 24_000, 25_680), (0, 28_000, 40_000), (1, 60_000, 62_400), (2, 70_000, 71_000)]
    recording = Recording(np.zeros(4 * 16_000, np.float32), assistant, 24_000, spans, [], [])
    (one, *times), (other, *brief) = duplex._voices(recording)
    assert (one, other) == (0, 1) and times == pytest.approx([30_400 / 24, 40_000 / 24], abs=10)
    assert brief == pytest.approx([2500, 2600], abs=10)


@silero
def test_silero_finds_the_times_that_are_known(conversation):
    """From the recorded file alone, within 100 ms: what the scores rest on."""
    facts, file = conversation
    facts = facts | {"judged": Silero()(file)}
    found = offsets([facts])
    # Not the assistant's last sound: of a reply that is cut in mid-voice silero hears on for a while.
    for name in ("user's first sound", "user's last sound", "assistant's first sound"):
        count, median, _ = found[name]
        assert count >= 2 and abs(median) <= 100, name
    broken = facts | {"voices": [[r, a - 150, b - 150] for r, a, b in facts["voices"]]}
    assert any(abs(ours - judged) > 100 for _, ours, judged in agreement(broken)), "another time would be noticed"


def test_a_run_goes_on_where_it_was_stopped_and_refuses_another(tmp_path, monkeypatch):
    path = tmp_path / "dialogues.jsonl"
    assert records.kept(path, ABOUT, "name") == {}
    with path.open("a") as lines:
        lines.write(json.dumps(FACTS) + "\n" + json.dumps(FACTS)[:50])  # killed in the midst of a line
    assert list(records.kept(path, ABOUT, "name")) == ["by-hand-0-0"]
    assert path.read_text().count("\n") == 2 and path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="eagerness differ"):
        records.kept(path, ABOUT | {"eagerness": "low"}, "name")


def test_an_evaluation_keeps_what_it_has_and_writes_all_of_it(tmp_path, monkeypatch):
    """Conversations are given, and the third breaks off in the first run."""
    question = Utterance((0.1 * np.random.default_rng(0).standard_normal(8_000)).astype(np.float32), "two")
    monkeypatch.setattr(duplex, "manifests_of", lambda *_: [])
    monkeypatch.setattr(duplex, "material_of", lambda *_: Material([(question, question)], [question]))
    monkeypatch.setattr(duplex, "predictor_rows", lambda *_: [])
    monkeypatch.setattr(duplex, "_judge", lambda: (None, ["no judge"]))
    held, broken = [], ["reactive-0-2"]

    def hold(model, user, settings, about):
        if user.name in broken:
            raise FloatingPointError("it broke off")
        held.append(user.name)
        silence = Recording(np.zeros(16_000, np.float32), np.zeros(24_000, np.float32), 24_000, [], [], [])
        return FACTS | {"name": user.name}, silence

    monkeypatch.setattr(duplex, "held", hold)
    with pytest.raises(FloatingPointError):
        duplex.evaluate_duplex("nano", tmp_path, tmp_path / "out", 3)
    broken.clear()
    results = duplex.evaluate_duplex("nano", tmp_path, tmp_path / "out", 3)
    assert held == ["reactive-0-0", "reactive-0-1", "reactive-0-2"], "none twice"
    assert {row.measure: row.score for row in results.rows}["barge-in success"].n == 3
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"dialogues.jsonl", "duplex.json", "duplex.md", "latency.png", "example.png", "sound"}
    assert len(list((tmp_path / "out" / "sound").iterdir())) == 3 and any(
        "test-duplex" in what for what in results.left_out
    )
    with pytest.raises(ValueError, match="front must be one of"):
        duplex.evaluate_duplex("nano", tmp_path, tmp_path / "out", 3, front="wall")
