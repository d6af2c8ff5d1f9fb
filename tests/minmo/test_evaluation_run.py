"""Runs: every task by a small random model, going on after a kill, two runs compared, reports, and bad manifests."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources

import numpy as np
import pytest
from rich.console import Console

import minmo
from minmo import weights
from minmo.conversation.timings import Timings
from minmo.conversation.verbs import Reply

lhotse = pytest.importorskip("lhotse", reason="manifests need lhotse: pip install 'minmo[eval]'")
for package in ("jiwer", "sacrebleu", "whisper_normalizer", "pyworld", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is absent: pip install 'minmo[eval]'")

from minmo.data.schema import DataError  # noqa: E402
from minmo.evaluation import run, speech, tasks  # noqa: E402
from minmo.evaluation.compare import compare  # noqa: E402
from minmo.evaluation.listener import Listener  # noqa: E402
from minmo.evaluation.material import SHIPPED, manifests_of, read_set  # noqa: E402
from minmo.evaluation.paper import quoted, turn_taking  # noqa: E402
from minmo.evaluation.records import append, keep_batches, kept, read  # noqa: E402
from minmo.evaluation.results import tables  # noqa: E402
from minmo.evaluation.tasks import EVALUATIONS  # noqa: E402

ASSETS = resources.files("minmo") / "assets"
HEARD = {
    "asr": {"text": "two plus three"},
    "s2tt": {"instruction": "Translate English into French", "text": "deux", "source_text": "two plus three"},
    "lid": {"instruction": "Language Identification", "text": "English"},
    "ser": {"instruction": "Speech Emotion Recognition", "text": "happy"},
    "aed": {"instruction": "Sound Event Detection", "text": "cough"},
    "age": {"instruction": "Speaker Age", "text": "thirties"},
    "gender": {"instruction": "Speaker Gender", "text": "female"},
    "qa": {"text": "two plus three is five", "answers": ["five"], "source_text": "two plus three"},
    "s2s": {"text": "two plus three is five", "source_text": "two plus three"},
    "duplex": {"events": [{"kind": "user", "start": 800, "end": 3200, "text": "two"},
                          {"kind": "assistant", "start": 4800, "end": 7200, "text": "five"}]},
}  # fmt: skip
SPOKEN = {
    "tts": {"text": "two"},
    "instruct-tts": {"instruction": "Please speak very fast", "source_text": "two", "text": "(Fast speaking rate) two"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two lines of every task, on the beginning of the question that ships."""
    folder = tmp_path_factory.mktemp("corpus")
    question = minmo.load_audio(ASSETS / "question.wav")
    for name in ("one", "two"):
        minmo.save_audio(folder / f"{name}.flac", question[3000 : 11_000 if name == "one" else 12_000], 16_000)
    for task, custom in (HEARD | SPOKEN).items():
        cuts = []
        for name in ("one", "two"):
            recording = lhotse.Recording.from_file(folder / f"{name}.flac", recording_id=name)
            recording.sources[0].source = f"{name}.flac"
            cut = recording.to_cut()
            cut.id, cut.custom = f"{name}-{task}", {"task": task, **custom}
            if task in SPOKEN or task == "s2s":
                cut.custom["target_recording"] = recording
                cut.custom |= {"target_recording_unaligned": True} if task == "s2s" else {}
                cut.recording = recording if task == "s2s" else None
            cuts.append(cut)
        lhotse.CutSet.from_cuts(cuts).to_file(folder / f"test-{task}.jsonl.gz")
    return folder


class Hearing:
    """Ears that cost nothing: real ones are heard in test_evaluation.py."""

    names, missing = ["somebody"], ["Resemblyzer: absent"]

    def judge(self, line, sound):
        return {"judged": {"somebody": "two"}, "floor": {"somebody": "two"}, "seconds": len(sound) / 16_000}


@pytest.fixture(scope="module")
def random_run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.minmo, "load", lambda name: weights.untrained(name))
        patch.setattr(run, "Ears", Hearing)
        results = run.evaluate_model("all", "nano", out=out, data=corpus, transcribe=True, longest=1)
    return out, results


def test_every_task_runs_on_random_weights_and_says_that_they_are(random_run):
    out, results = random_run
    assert {row.task for row in results.rows} == set(EVALUATIONS)
    page = (out / "report.md").read_text(encoding="utf-8")
    assert "The weights are random" in page and "What this model was taught is not recorded" in page
    assert "| Fleurs | 67.09 | - |" in page and "they are no error rates" in page.lower()
    assert "| fleurs | test | en | 4.11 | 5.12 | 3.79 |" in page and "MinMo (quoted)" in page
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert stored["about"]["trained"] is False and len(stored["about"]["sha256_of_tensors"]) == 64
    assert len(stored["rows"]) == len(results.rows) and set(results.confusions) >= {"test-lid", "test-ser", "test-aed"}
    for name in (*(f"test-{task}" for task in HEARD | SPOKEN), "latency-test-s2s"):
        about, records = read(out / f"{name}.jsonl")
        assert about["set"] in name and sorted(r["utterance"] for r in records)
        assert len({record["id"] for record in records}) == len(records) == 2
    assert not list(out.glob("*.part"))


def test_a_run_that_is_over_is_not_done_again(random_run, corpus, monkeypatch):
    out, results = random_run
    before = (out / "test-asr.jsonl").read_bytes()
    monkeypatch.setattr(run.minmo, "load", lambda name: weights.untrained(name))
    monkeypatch.setattr(Listener, "answers", lambda *_, **__: pytest.fail("it was answered already"))
    again = run.evaluate_model("asr", "nano", out=out, data=corpus, transcribe=True, longest=1)
    assert (out / "test-asr.jsonl").read_bytes() == before
    assert again.rows == [row for row in results.rows if row.task == "asr"]
    with pytest.raises(ValueError, match=r"test-asr\.jsonl is of another run \(seed differ\): name another folder"):
        run.evaluate_model("asr", "nano", out=out, data=corpus, seed=1, transcribe=True, longest=1)


CHILD = """
import dataclasses, sys
from pathlib import Path
from minmo.evaluation import run, tasks
tasks.EVALUATIONS["asr"] = dataclasses.replace(tasks.EVALUATIONS["asr"], batch=2)
run.evaluate_model("asr", "nano", [Path(sys.argv[1])], out=Path(sys.argv[2]), limit=6)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    manifest = lines_of("test-people-digits-en", tmp_path)
    monkeypatch.setitem(tasks.EVALUATIONS, "asr", dataclasses.replace(EVALUATIONS["asr"], batch=2))
    whole = run.evaluate_model("asr", "nano", [manifest], out=tmp_path / "whole", limit=6)
    file = tmp_path / "killed" / "digits.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, manifest, tmp_path / "killed"], env=environment)
    try:
        end = time.monotonic() + 300
        while child.poll() is None and not (file.is_file() and file.read_text().count("\n") >= 3):
            assert time.monotonic() < end, "the child wrote nothing"
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.wait()
    left = file.read_text().count("\n") - 1
    assert 2 <= left < 6, "it was killed in the middle"
    with file.open("a") as torn:
        torn.write('{"id": "half a li')
    made = []
    records = tasks.EVALUATIONS["asr"].records
    watched = dataclasses.replace(
        tasks.EVALUATIONS["asr"], records=lambda bench, lines: made.extend(lines) or records(bench, lines)
    )
    monkeypatch.setitem(tasks.EVALUATIONS, "asr", watched)
    resumed = run.evaluate_model("asr", "nano", [manifest], out=tmp_path / "killed", limit=6)
    assert len(made) == 6 - left - (left % 2)  # whole batches are kept, none is made twice
    assert file.read_text() == (tmp_path / "whole" / "digits.jsonl").read_text()
    assert resumed.rows == whole.rows


def test_a_batch_that_is_not_whole_is_made_again(tmp_path):
    path, about = tmp_path / "set.jsonl", {"seed": 0}
    assert kept(path, about) == {}
    append(path, [{"id": name} for name in "abc"])
    assert list(keep_batches(path, about, ["ab", "cd"])) == ["a", "b"]
    assert path.read_text().count("\n") == 3 and list(kept(path, about)) == ["a", "b"]
    append(path, [{"id": "c", "answer": "a\u2028b"}])  # a line separator within a text
    assert kept(path, about)["c"]["answer"] == "a\u2028b"
    with pytest.raises(ValueError, match="there is no .*none.jsonl"):
        read(tmp_path / "none.jsonl")
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="set.jsonl does not begin with what it was made with"):
        read(path)


def test_records_survive_a_kill_within_a_character_and_nothing_else_is_overwritten(tmp_path):
    path, about = tmp_path / "set.jsonl", {"seed": 0}
    kept(path, about)
    append(path, [{"id": "a", "answer": "où"}, {"id": "b", "answer": "où"}])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex("ù".encode()) + 1])
    assert list(kept(path, about)) == ["a"] and path.read_text(encoding="utf-8").count("\n") == 2
    for line, message in (("5", "no record"), ('{"answer": "x"}', "no record"), ("\xff", "is damaged")):
        path.write_bytes(data + line.encode("latin-1") + b"\n")
        with pytest.raises(ValueError, match=message):
            kept(path, about)
    manifest = tmp_path / "mine.jsonl"
    for text in ('{"id": "a cut of mine"}', '{"id": "a cut of mine"}\n'):  # -o the manifest's own folder
        manifest.write_text(text)
        with pytest.raises(ValueError, match="mine.jsonl is no file of a run: name another folder"):
            kept(manifest, about)
        assert manifest.read_text() == text


def test_texts_of_others_are_no_markup(tmp_path, monkeypatch, corpus):
    evil = "[/red]|<img src=x> $\\bad$ \x1b[2J"
    manifest = tmp_path / "[x]$\\y$.jsonl"
    cuts = [line.cut for line in read_set(corpus / "test-ser.jsonl.gz", root=corpus).lines]
    for cut, text in zip(cuts, (evil, "sad"), strict=True):
        cut.custom["text"] = text
    lhotse.CutSet.from_cuts(cuts).to_file(manifest)
    for name, known in (("one", ()), ("other", [cuts[0].id])):
        monkeypatch.setattr(Listener, "answers", knows_all_but(known))
        results = run.evaluate_model("ser", "nano", [manifest], out=tmp_path / name)
    console = Console(file=io.StringIO(), width=300)
    for table in tables(results):
        console.print(table)
    page = compare(tmp_path / "one", tmp_path / "other")[1]
    report = (tmp_path / "other" / "report.md").read_text()
    assert "[/red]|<img src=x>" in console.file.getvalue() and "\x1b" not in console.file.getvalue()
    for text in (page, report):
        assert "\\|\\<img src=x\\>" in text and "<img" not in text.replace("\\<img", "") and "\x1b" not in text


def lines_of(name, folder):
    """A shipped manifest, with sounds in full, in another place."""
    chosen = read_set(SHIPPED / f"{name}.jsonl.gz", root=SHIPPED)
    manifest = folder / f"{name.split('-')[2]}.jsonl"
    lhotse.CutSet.from_cuts(line.cut for line in chosen.lines).to_file(manifest)
    return manifest


def knows_all_but(wrong):
    def answers(self, lines, speak=False):
        return [Reply("nothing" if x.id in wrong else x.text, np.zeros(0, np.float32), Timings()) for x in lines]

    return answers


def test_two_runs_are_told_apart_item_by_item(corpus, tmp_path, monkeypatch):
    manifest = lines_of("test-people-digits-en", tmp_path)
    wrong = [line.id for line in read_set(manifest).lines][:9]
    for name, known in (("good", ()), ("bad", wrong)):
        monkeypatch.setattr(Listener, "answers", knows_all_but(known))
        results = run.evaluate_model("asr", "nano", [manifest], out=tmp_path / name)
        assert results.rows[0].score.value == pytest.approx(len(known) / 28)
    changes, page = compare(tmp_path / "good", tmp_path / "bad")
    assert changes[0].difference.value == pytest.approx(9 / 28) and changes[0].verdict == "worse"
    assert "## digits: answered worse by the second" in page and page.count("| nothing |") == 9
    changes, page = compare(tmp_path / "good", tmp_path / "good")
    assert {change.verdict for change in changes} == {"not told apart"}
    with pytest.raises(ValueError, match="hold no item that both were asked"):
        compare(tmp_path / "good", corpus)


def test_what_ships_is_whole_small_and_heard(tmp_path):
    sets = [read_set(path, root=SHIPPED) for path in manifests_of(SHIPPED)]
    assert {s.task for s in sets} == {"asr", "s2tt", "lid", "qa", "s2s", "tts", "duplex"}
    lines = [line for s in sets for line in s.lines]
    assert len(lines) > 500 and sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 5_000_000
    for line in [line for s in sets for line in s.lines[:2]]:
        sound = line.sound() if line.sound else line.spoken()
        assert len(sound) == pytest.approx(16_000 * line.seconds, abs=2)
    assert {line.language for s in sets if s.name == "test-people-lid" for line in s.lines} == set(
        "en es fr it ru".split()
    )
    licences = (ASSETS / "LICENSES.md").read_text(encoding="utf-8")
    assert "`eval/`" in licences and "Paola Dal Zot" in licences


def test_nano_hears_people_of_what_ships(tmp_path):
    """The card has the word error rate of a person's joined words: .19."""
    manifest = lines_of("test-people-joined-en", tmp_path)
    results = run.evaluate_model("asr", "nano", [manifest], out=tmp_path / "out", limit=12)
    row = next(row for row in results.rows if row.measure == "WER (words as said)")
    assert row.score.value < 0.35 and row.score.n == 12


def test_missing_judges_leave_columns_empty_and_say_why(monkeypatch):
    for name in ("moonshine_voice", "pocketsphinx", "speechmos.dnsmos", "resemblyzer"):
        monkeypatch.setitem(sys.modules, name, None)
    ears = speech.Ears()
    assert ears.names == [] and len(ears.missing) == 4
    assert any("moonshine_voice" in what and "pip install" in what for what in ears.missing)


def test_papers_figures_are_data():
    assert turn_taking()["Fisher"] == ((0.6682, 0.8372, 0.8813), (0.4271, 0.9455, 0.9994), 0.8123)
    for task in EVALUATIONS:
        for table in quoted(task):
            assert table.source.startswith("arXiv") and all(len(row) == 3 + len(table.systems) for row in table.rows)
    average = [row for row in quoted("asr")[0].rows if row[:3] == ["fleurs", "test", "average"]][0]
    by_language = [row for row in quoted("asr")[0].rows if row[0] == "fleurs" and row[2] != "average"]
    for column in (3, 4, 5):
        assert np.mean([row[column] for row in by_language]) == pytest.approx(average[column], abs=0.3)


def bad(cut, what):
    if what == "file":
        cut["recording"]["sources"][0]["source"] = "/none/two.flac"
    elif what == "text":
        cut["custom"]["text"] = " "
    elif what == "language":
        cut["custom"]["language"] = "english"
    elif what == "task":
        cut["custom"]["task"] = "asrr"
    elif what == "into":
        cut["custom"] |= {"task": "s2tt", "instruction": "Translate English into Klingon"}
    elif what == "mixed":
        cut["custom"] |= {"task": "lid", "instruction": "Language Identification"}
    elif what == "id":
        cut["id"] = "asterisk-en-digits-1"
    return cut


@pytest.mark.parametrize(
    "what,message",
    [
        ("file", r"line 2: cut two: recording names the file /none/two\.flac, which is not there; correct the path"),
        ("text", r"line 2: cut two: text is empty; write what is said, or leave the line out"),
        ("language", r"line 2: there is no language 'english'; use a code such as en, zh or yue \(did you mean en\?\)"),
        ("task", r"line 2: cut two: task is 'asrr'; set it to one of asr, s2tt"),
        ("into", r"line 2: the instruction 'Translate English into Klingon' names no language"),
        ("mixed", r"holds lines of asr, lid; write a manifest for each task"),
        ("id", r"line 2: there is an id asterisk-en-digits-1 already; give each line its own"),
    ],
)
def test_bad_lines_are_one_sentence_and_nothing_is_begun(what, message, tmp_path):
    manifest = lines_of("test-people-digits-en", tmp_path)
    cuts = [json.loads(line) for line in manifest.read_text().splitlines()][:2]
    cuts[0]["id"], cuts[1]["id"] = "asterisk-en-digits-1", "two"
    manifest.write_text("".join(json.dumps(cut) + "\n" for cut in (cuts[0], bad(cuts[1], what))))
    with pytest.raises(DataError, match=message) as told:
        run.evaluate_model("asr", "nano", [manifest], out=tmp_path / "out")
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()


def test_bad_settings_are_one_sentence(corpus, tmp_path):
    manifest = lines_of("test-people-digits-en", tmp_path)
    for asked, message in (
        ({"task": "asrr"}, "there is no task asrr; use all, asr, s2tt"),
        ({"task": "ser"}, "no manifest here holds lines for ser, which takes lines of ser"),
        ({"task": "asr", "seed": -1}, "seed must lie between"),
        ({"task": "asr", "limit": 0}, "limit must be at least 1"),
        ({"task": "asr", "manifests": [manifest, manifest]}, "two manifests are named digits: rename one"),
        ({"task": "asr", "manifests": [tmp_path / "no.jsonl"]}, "there is no manifest at .*no.jsonl"),
        ({"task": "asr", "manifests": []}, "give either manifests, or the folder of a corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            run.evaluate_model(**{"manifests": [manifest], "out": tmp_path / "out", **asked})
    with pytest.raises(DataError, match="holds no manifests test-"):
        run.evaluate_model("asr", out=tmp_path / "out", data=tmp_path)
    assert not (tmp_path / "out").exists()
