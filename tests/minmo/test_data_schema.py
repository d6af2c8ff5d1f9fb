"""Lines of data: what is valid, what is said about what is not, and how manifests are read."""

from __future__ import annotations

import copy
import gzip
import json
import pickle
import runpy
import sys
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from lhotse import CutSet
from lhotse.serialization import deserialize_item

import minmo
from minmo.data.duplex import Event
from minmo.data.manifest import DataError, Limits, describe_skipped, load_sound, read_manifest, validate
from minmo.data.schema import FIELDS, TASKS, describe_tasks, events_of, layout
from minmo.tokenizer.text import TextTokenizer
from minmo.training.stages import STAGES

NANO = Path(minmo.__file__).parent / "assets" / "nano" / "tokenizer.json"


def line(name, /, **custom):
    """The example line of a task, with other custom fields; None takes a field away."""
    example = copy.deepcopy(dict(TASKS[name].example))
    example["custom"] = {k: v for k, v in {**example["custom"], **custom}.items() if v is not None}
    return example


def event(start, end):
    return {"kind": "user", "start": start, "end": end}


def cut(example):
    return deserialize_item(copy.deepcopy(example))


SEVEN = line("asr")["recording"]


def sounding(kind, source):
    return {**SEVEN, "sources": [{"type": kind, "channels": [0], "source": source}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the sounds that the examples name."""
    (tmp_path / "audio").mkdir()
    for name, seconds, rate in (("seven", 2.5, 16), ("cough", 2.5, 16), ("answer", 1.6, 24), ("dialogue", 5, 16)):
        rate *= 1000
        sound = 0.1 * np.sin(np.arange(round(seconds * rate)) * 0.05)
        soundfile.write(tmp_path / "audio" / f"{name}.flac", sound, rate)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, *lines):
    path = folder / "lines.jsonl"
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in lines))
    return path


def test_the_stages_tasks_have_a_schema():
    assert set(TASKS) == {task for stage in STAGES.values() for task in stage.tasks}


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_valid_and_stay_what_they_are(task, folder):
    """Through lhotse and back the example is the same line; its fields are those of its schema."""
    example = cut(line(task))
    validate(example)
    assert json.loads(json.dumps(example.to_dict())) == line(task)
    schema = TASKS[task]
    known = {"task", "target_recording_unaligned", *schema.required, *schema.either, *schema.optional}
    assert set(example.custom) <= known <= {*FIELDS, "recording", "target_recording_unaligned"}
    if task != "text":
        assert load_sound(example, "recording" if "recording" in schema.required else "target_recording").size


@pytest.mark.parametrize("task", TASKS)
def test_each_required_field_is_missed(task, folder):
    for field in TASKS[task].required:
        example = line(task, **({} if field == "recording" else {field: None}))
        if field == "recording":
            del example["recording"]
        with pytest.raises(DataError, match=f"^cut {task}-1: {field} is missing, and every {task} line needs it"):
            validate(cut(example))
    if TASKS[task].either:
        with pytest.raises(DataError, match="target_recording or speech_tokens is missing"):
            validate(cut(line(task, target_recording=None, speech_tokens=None)))


@pytest.mark.parametrize(
    ("example", "says", "reason"),
    [
        (line("asr", task="asd"), "task is 'asd'; set it to one of asr", "unknown task"),
        (line("asr", task=["asr"]), r"task is \['asr'\]", "unknown task"),
        (line("asr", text=7), "text must be text, got 7", "wrong text"),
        (line("asr", text=" \n"), "text is empty", "empty text"),
        (line("tts", text=""), "text is empty", "empty text"),
        (line("asr", text="a\ud800"), "text holds half a character", "wrong text"),
        (line("asr", text="a" * 10_001), "text has 10001 characters, limit 10000", "long text"),
        ({**line("asr"), "duration": 0.05}, "duration is 0.05 s, less than the 0.1 s", "too short"),
        ({**line("asr"), "duration": 0.0}, "duration is 0 s", "too short"),
        ({**line("asr"), "duration": float("nan")}, "duration must be seconds, got nan", "wrong duration"),
        ({**line("asr"), "start": float("nan")}, "start must be seconds, got nan", "wrong start"),
        ({**line("asr"), "channel": 3}, "channel is 3, which its recording has not", "wrong channel"),
        ({**line("asr"), "recording": sounding("command", "touch PWNED")}, "is no file but command", "wrong recording"),
        ({**line("asr"), "recording": sounding("url", "https://a/b.wav")}, "is no file but url", "wrong recording"),
        ({**line("asr"), "recording": sounding("file", "pipe:touch PWNED")}, "is no file but file", "wrong recording"),
        ({**line("asr"), "recording": sounding("memory", "UklGRg")}, "is no file but memory", "wrong recording"),
        ({**line("asr"), "duration": "1"}, "duration must be seconds, got '1'", "wrong duration"),
        ({**line("asr"), "duration": 61.0}, "duration is 61 s, more than the 60 s", "too long"),
        ({**line("asr"), "duration": 3.0}, "recording ends at 2.5 s, the cut at 3 s", "short recording"),
        ({**line("text"), "recording": SEVEN}, "recording is there, but text hears", "unwanted recording"),
        ({**line("tts"), "recording": SEVEN}, "move the assistant's sound", "unwanted recording"),
        (line("s2s", target_recording_unaligned=None), "_unaligned to true", "aligned target_recording"),
        ({**line("tts"), "duration": 1.7}, "target_recording lasts 1.6 s, less than its cut", "short target_recording"),
        (line("tts", target_recording="a.wav"), "must be a lhotse Recording", "wrong target_recording"),
        (line("tts", speech_tokens=[]), "speech_tokens must be speech tokens", "wrong speech_tokens"),
        (line("tts", speech_tokens=[3, -1]), "speech_tokens must be speech tokens", "wrong speech_tokens"),
        (line("tts", speech_tokens=[3, 0.5]), "speech_tokens must be speech tokens", "wrong speech_tokens"),
        (line("qa", history=[{"user": "a"}]), "history must be a list of", "wrong history"),
        (line("qa", history=[{"user": "a", "assistant": ""}]), "is empty", "empty history[0].assistant"),
        (line("duplex", events=[{"kind": "user"}]), "events must be a list of objects", "wrong events"),
        (line("duplex", events=[event(0.5, 2)]), r"events\[0\] needs whole samples", "wrong events"),
        (line("duplex", events=[{**event(0, 9), "text": None}]), "text must be text", "wrong events[0].text"),
        (line("duplex", ambiguous=[True, False]), "ambiguous is .* for each of the 1 turns", "wrong ambiguous"),
        (line("duplex", ambiguous=["no"]), "write true or false for each", "wrong ambiguous"),
        (line("duplex", events=[event(5, 80_001)]), "within the 80000 samples", "wrong events"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(example, says, reason, folder):
    with pytest.raises(DataError, match=f"^cut {example['id']}: .*{says}") as error:
        validate(cut(example))
    assert error.value.reason == reason and "\n" not in str(error.value)


def test_other_tasks_are_refused_where_they_are_not_wanted(folder):
    path = write(folder, line("asr"), line("lid"))
    assert len(list(read_manifest(path, tasks=("asr", "lid")))) == 2
    with pytest.raises(DataError, match="line 2: cut .*: task is lid, and what is wanted here is asr, qa"):
        list(read_manifest(path, tasks=("asr", "qa")))


def test_limits_are_arguments(folder):
    with pytest.raises(DataError, match="duration is 2.5 s, more than the 2 s"):
        validate(cut(line("asr")), Limits(max_seconds=2))
    validate(cut({**line("asr"), "duration": 0.05}), Limits(min_seconds=0.01))
    with pytest.raises(DataError, match="duration is 5 s, more than the 4 s"):
        validate(cut(line("duplex")), Limits(max_dialogue_seconds=4))


def test_only_mono_cuts_are_lines(folder):
    mixed = cut(line("asr")).pad(duration=4)
    with pytest.raises(DataError, match="^cut .* is a MixedCut; only MonoCuts"):
        validate(mixed)


def test_a_manifest_is_read_lazily_and_stops_at_the_line(folder):
    path = write(folder, line("asr"), line("qa"), line("asr", text=None), line("asr"))
    cuts = read_manifest(path)
    assert cuts.is_lazy
    seen = []
    with pytest.raises(DataError, match=r"lines.jsonl, line 3: cut asr-1: text is missing") as error:
        seen += [c.custom["task"] for c in cuts]
    assert error.value.reason == "missing text"
    assert [c.id for c in read_manifest(write(folder, line("asr"), line("s2s")))] == ["asr-1", "s2s-1"]


def test_skipped_lines_are_counted_once_by_reason(folder):
    gone = line("asr")
    gone["recording"]["sources"][0]["source"] = "audio/gone.flac"
    path = write(
        folder, "{not json", line("asr"), "[]", '{"type": "MonoCut"}', '{"id": "x"}', line("asr", task="x"), gone,
        line("asr", text=""), line("asr", text=""), "", line("qa"),
    )  # fmt: skip
    skipped = Counter()
    cuts = read_manifest(path, on_error="skip", skipped=skipped)
    for _ in range(2):
        assert [c.custom["task"] for c in cuts] == ["asr", "qa"]
    assert skipped == {"no JSON": 2, "no cut": 3, "unknown task": 1, "missing file": 1, "empty text": 2}
    assert describe_skipped(skipped).startswith("9 lines were skipped: no cut 3, ")
    assert describe_skipped(Counter()) == "no line was skipped"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{not json", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("7", "line 2: no lhotse cut"),
        ('{"type": "MonoCut", "id": "a"}', "line 2: no lhotse cut"),
    ],
)
def test_lines_that_do_not_parse_are_named(bad, says, folder):
    with pytest.raises(DataError, match=says):
        list(read_manifest(write(folder, line("asr"), bad)))


def test_manifests_that_cannot_be_read_are_named(folder):
    with pytest.raises(DataError, match="there is no manifest at nowhere.jsonl"):
        read_manifest("nowhere.jsonl")
    with pytest.raises(DataError, match="without lhotse Shar"):
        read_manifest(folder)
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'skip'"):
        read_manifest(write(folder), on_error="ignore")
    with pytest.raises(DataError, match="no usable line among its 0"):
        list(read_manifest(write(folder)))
    with pytest.raises(DataError, match="no usable line among its 1"):
        list(read_manifest(write(folder, "{"), on_error="skip"))
    whole = gzip.compress((json.dumps(line("asr")) + "\n").encode() * 50)
    (folder / "cut.jsonl.gz").write_bytes(whole[:-9])
    (folder / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    for name in ("cut.jsonl.gz", "latin.jsonl"):
        with pytest.raises(DataError, match=f"{name} is damaged"):
            list(read_manifest(folder / name))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(task=st.sampled_from(list(TASKS)), data=st.data())
def test_no_line_whatever_raises_anything_else(task, data, folder):
    """Any field of a cut, of its recording or its custom fields may hold anything: it is read, or a DataError."""
    example = line(task)
    holder = data.draw(st.sampled_from([h for h in (example, example.get("recording"), example["custom"]) if h]))
    holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(values)
    path = write(folder, line("text"), example)
    assert 1 <= len(list(read_manifest(path, on_error="skip"))) <= 2


def test_sound_is_checked_when_it_is_loaded(folder):
    def write_sound(samples):
        soundfile.write("audio/seven.flac", samples, 16_000)

    assert load_sound(cut(line("asr"))).shape == (40_000,)
    spoken = cut(line("s2s"))
    assert load_sound(spoken, "target_recording", 24_000).shape == (38_400,)
    resampled = load_sound(spoken, "target_recording")
    assert resampled.shape == (25_600,) and resampled.dtype == np.float32
    with pytest.raises(DataError, match="cut asr-1: target_recording is missing"):
        load_sound(cut(line("asr")), "target_recording")
    write_sound(np.zeros(40_000))
    validate(cut(line("asr")))
    with pytest.raises(DataError, match="cut asr-1: recording is silent"):
        load_sound(cut(line("asr")))
    write_sound(np.full(20_000, 0.1))
    with pytest.raises(DataError, match="cut asr-1: recording cannot be read"):
        load_sound(cut(line("asr")))
    (folder / "audio" / "seven.flac").write_bytes(b"no sound at all")
    with pytest.raises(DataError, match="cut asr-1: recording cannot be read"):
        load_sound(cut(line("asr")))
    broken = line("asr")
    broken["recording"]["sources"][0]["source"] = "audio/nan.wav"
    soundfile.write("audio/nan.wav", np.full(40_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match="cut asr-1: recording holds NaN or infinite samples"):
        load_sound(cut(broken))


def test_shar_holds_the_same_lines(folder):
    """All tasks in one set; s2s keeps its speech tokens there, as the module's docstring says."""
    lines = [line(task) for task in TASKS if task != "s2s"] + [line("s2s", target_recording=None, speech_tokens=[5, 6])]
    (folder / "shar").mkdir()
    cuts = CutSet.from_cuts(map(cut, lines))
    cuts.to_shar(folder / "shar", fields={"recording": "flac", "target_recording": "flac"}, shard_size=4)
    back = {c.custom["task"]: c for c in read_manifest(folder / "shar")}
    assert set(back) == set(TASKS) and back["s2s"].speech_tokens == [5, 6]
    assert load_sound(back["asr"]).shape == (40_000,)
    assert load_sound(back["tts"], "target_recording").shape == (25_600,)
    tar = next((folder / "shar").glob("recording.*.tar"))
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(DataError, match="shar is damaged"):
        list(read_manifest(folder / "shar"))


def test_layout_is_instruction_then_sound(folder):
    tokenizer = TextTokenizer.from_file(NANO)
    end, encode = tokenizer.end_of_turn, tokenizer.encode
    asr = layout(cut(line("asr")), tokenizer)
    assert (asr.prefix, asr.suffix) == tokenizer.turn("Speech Transcription")
    assert asr.content is None and asr.reply == [*encode("seven plus five"), end]
    history = [{"user": "one plus one", "assistant": "two"}]
    qa = layout(cut(line("qa", history=history, instruction="Be brief")), tokenizer)
    assert qa.prefix == tokenizer.turn("Be brief", history=[("one plus one", "two")])[0]
    tts = layout(cut(line("tts")), tokenizer)
    assert (tts.prefix, tts.suffix) == tokenizer.turn("Read the following text aloud", typed=True)
    assert tts.content == encode("It is twelve.") and tts.reply == [*tts.content, end]
    asked = layout(cut(line("instruct-tts")), tokenizer)
    assert asked.content == encode("It is twelve.") and asked.reply == [
        *encode("(Fast speaking rate) It is twelve."),
        end,
    ]
    typed = layout(cut(line("text", instruction=None)), tokenizer)
    assert typed.content == encode("What is seven plus five?") and typed.reply == [*encode("Twelve."), end]


def test_events_of_a_line(folder):
    assert events_of(cut(line("duplex")))[2] == Event("backchannel", 56000, 60800, "uh-huh")


def test_tasks_are_described():
    text = describe_tasks()
    for name, task in TASKS.items():
        assert f"\n{name}: {task.meaning}\n" in text and json.dumps(task.example) in text
    assert all(f"  {name} " in text for name in FIELDS)


@pytest.mark.parametrize("name", ["schema", "draws", "duplex", "utterances", "simulator"])
def test_schemas_labels_and_simulator_need_no_lhotse(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    runpy.run_path(str(Path(minmo.__file__).parent / "data" / f"{name}.py"))


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(DataError("a sentence", "reason")))
    assert (str(error), error.reason) == ("a sentence", "reason")
