"""Adapters on tiny copies of the public layouts, beside lhotse's own recipes where it has one; what lacks is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile as sf

pytest.importorskip("lhotse", reason="manifests need lhotse: pip install 'minmo[eval]'")

from lhotse.recipes import prepare_librispeech  # noqa: E402

from minmo.data import public  # noqa: E402
from minmo.data.manifest import load_sound, read_manifest  # noqa: E402
from minmo.data.schema import DataError  # noqa: E402


def sound(path, seconds=0.5, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.1 * np.sin(np.arange(round(16_000 * seconds)) / 9), 16_000, **how)


def table(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def librispeech(folder):
    sound(folder / "test-clean/61/70968/61-70968-0000.flac")
    table(folder / "test-clean/61/70968/61-70968.trans.txt", "61-70968-0000 HE BEGAN A CONFUSED COMPLAINT")


def fleurs(folder):
    for home, name, text in (
        ("fr_fr", "7.wav", "Bonjour."),
        ("en_us", "9.wav", "Hello."),
        ("cmn_hans_cn", "8.wav", "你好"),
    ):
        sound(folder / home / "audio/test" / name)
        table(folder / home / "test.tsv", f"1\t{name}\t{text}\t{text.lower()}\tb | o\t8000\tFEMALE")
    sound(folder / "fr_fr/audio/test/5.wav")
    with (folder / "fr_fr/test.tsv").open("a") as file:
        file.write(
            '2\t5.wav\tIl dit "non" seul.\til dit non seul\to\t8000\tMALE\n'
        )  # a quote that nothing closes or opens


def commonvoice(folder):
    sound(folder / "en/clips/common_voice_en_1.mp3", format="MP3")
    sound(folder / "en/clips/common_voice_en_2.mp3", format="MP3")
    table(
        folder / "en/test.tsv", "client_id\tpath\tsentence\tage\tgender",
        "a\tcommon_voice_en_1.mp3\tIt is late.\tthirties\tfemale", "b\tcommon_voice_en_2.mp3\tGo home.\t\t",
    )  # fmt: skip


def covost2(folder):
    sound(folder / "de/clips/common_voice_de_1.mp3", format="MP3")
    table(
        folder / "de/covost_v2.de_en.tsv", "path\ttranslation\tsplit",
        "common_voice_de_1.mp3\tIt is late.\ttest", "common_voice_de_2.mp3\tNo.\ttrain",
    )  # fmt: skip


def aishell2(folder):
    sound(folder / "iOS/test/wav/S1/IT0011W0001.wav")
    table(folder / "iOS/test/wav.scp", "IT0011W0001\twav/S1/IT0011W0001.wav")
    table(folder / "iOS/test/trans.txt", "IT0011W0001\t换一首歌")


def wenetspeech(folder):
    sound(folder / "audio/test_net/B00000/T1.opus", 2.0, format="OGG", subtype="OPUS")
    segments = [
        {"sid": "T1_S0", "begin_time": 0.25, "end_time": 1.25, "text": "你好", "subsets": ["TEST_NET"]},
        {"sid": "T1_S1", "begin_time": 1.25, "end_time": 1.75, "text": "好", "subsets": ["DEV"]},
    ]
    audios = [{"aid": "T1", "path": "audio/test_net/B00000/T1.opus", "segments": segments}]
    table(folder / "WenetSpeech.json", json.dumps({"audios": audios}))


def meld(folder):
    sound(folder / "output_repeated_splits_test/dia0_utt0.wav")
    table(
        folder / "test_sent_emo.csv", "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID",
        '1,"Why, what?",Mark,surprise,positive,0,0',
    )  # fmt: skip


def iemocap(folder):
    sound(folder / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav")
    table(
        folder / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "% [START_TIME - END_TIME] TURN_NAME EMOTION",
        "[6.2901 - 8.2357]\tSes01F_impro01_F000\texc\t[2.5000, 2.5000, 2.5000]",
        "[8.2901 - 9.2357]\tSes01F_impro01_F001\txxx\t[2.5000, 2.5000, 2.5000]",
    )  # fmt: skip


def vocalsound(folder):
    for name in ("f0003_0_cough.wav", "m0004_0_throatclearing.wav"):
        sound(folder / "audio_16k" / name)
    table(folder / "datafiles/te.json", json.dumps({"data": [{"wav": "/x/f0003_0_cough.wav", "labels": "/m/0"}]}))


def seed_tts(folder):
    sound(folder / "en/wavs/one-two.wav")
    table(folder / "en/meta.lst", "one-two|Some people|prompt-wavs/one.wav|We asked over twenty people.")


def by_name(path):
    return lambda folder: sound(folder / path)


COPIES = {
    "librispeech": (librispeech, {}, "HE BEGAN A CONFUSED COMPLAINT", "en", "Speech Transcription"),
    "fleurs": (fleurs, {"task": "s2tt", "language": "fr"}, "Hello.", "fr", "Translate French into English"),
    "commonvoice": (commonvoice, {"task": "age"}, "thirties", "en", "Speaker Age"),
    "covost2": (covost2, {}, "It is late.", "de", "Translate German into English"),
    "aishell2": (aishell2, {}, "换一首歌", "zh", "Speech Transcription"),
    "wenetspeech": (wenetspeech, {}, "你好", "zh", "Speech Transcription"),
    "meld": (meld, {}, "surprise", "en", "Speech Emotion Recognition"),
    "iemocap": (iemocap, {}, "happy", "en", "Speech Emotion Recognition"),
    "crema-d": (by_name("AudioWAV/1001_DFA_ANG_XX.wav"), {}, "angry", "en", "Speech Emotion Recognition"),
    "emodb": (by_name("wav/03a01Fa.wav"), {}, "happy", "de", "Speech Emotion Recognition"),
    "esd": (by_name("0011/Surprise/test/0011_001.wav"), {}, "surprised", "en", "Speech Emotion Recognition"),
    "vocalsound": (vocalsound, {}, "cough", "en", "Sound Event Detection"),
    "seed-tts-eval": (seed_tts, {}, "We asked over twenty people.", "en", None),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_tiny_copy_becomes_a_manifest(name, tmp_path):
    write, asked, text, language, instruction = COPIES[name]
    write(tmp_path / "copy")
    out = tmp_path / "lines.jsonl.gz"
    assert public.write_public(name, tmp_path / "copy", out, **asked) == 1
    (cut,) = read_manifest(out)
    assert (cut.custom["text"], cut.custom["language"], cut.custom["dataset"]) == (text, language, name)
    assert cut.custom.get("instruction") == instruction
    assert len(load_sound(cut, "target_recording" if name == "seed-tts-eval" else "recording")) == 16_000 * cut.duration
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["lines.jsonl.gz"]


def test_every_dataset_has_a_copy_here():
    assert set(COPIES) == set(public.DATASETS)


def test_other_tasks_of_the_same_copy(tmp_path):
    fleurs(tmp_path)
    assert public.write_public("fleurs", tmp_path, tmp_path / "asr.jsonl", language="fr") == 2
    assert [cut.custom["text"] for cut in read_manifest(tmp_path / "asr.jsonl")][1] == 'Il dit "non" seul.'
    public.write_public("fleurs", tmp_path, tmp_path / "lid.jsonl", task="lid", language="zh")
    assert [cut.custom["text"] for cut in read_manifest(tmp_path / "lid.jsonl")] == ["Chinese"]
    commonvoice(tmp_path)
    assert public.write_public("commonvoice", tmp_path, tmp_path / "cv.jsonl") == 2


def test_librispeech_as_lhotse_reads_it(tmp_path):
    librispeech(tmp_path)
    public.write_public("librispeech", tmp_path, tmp_path / "lines.jsonl")
    (cut,) = read_manifest(tmp_path / "lines.jsonl")
    theirs = prepare_librispeech(tmp_path, "test-clean")["test-clean"]
    (supervision,), (recording,) = theirs["supervisions"], theirs["recordings"]
    assert (cut.custom["text"], cut.duration) == (supervision.text, supervision.duration)
    assert cut.id == f"librispeech-{supervision.id}"
    assert np.array_equal(load_sound(cut), recording.load_audio()[0])


def broken(what, folder):
    if what == "column":
        table(folder / "en/test.tsv", "client_id\tpath\ttext", "a\tb.mp3\tIt is late.")
    elif what == "sound":
        (folder / "en/clips/common_voice_en_1.mp3").unlink()
    elif what == "table":
        (folder / "en/test.tsv").unlink()
    elif what == "row":
        table(folder / "en/test.tsv", "client_id\tpath\tsentence", "a\tcommon_voice_en_1.mp3")
    elif what == "noise":
        (folder / "en/clips/common_voice_en_1.mp3").write_bytes(b"no sound")
    elif what == "text":
        table(folder / "en/test.tsv", "client_id\tpath\tsentence", "a\tcommon_voice_en_1.mp3\t ")


@pytest.mark.parametrize(
    "what,asked,message",
    [
        ("column", {}, r"test\.tsv has no column sentence"),
        ("sound", {}, r"common_voice_en_1: there is no sound .*common_voice_en_1\.mp3"),
        ("table", {}, r"there is no table .*test\.tsv; check the folder, the language and the split"),
        ("row", {}, r"test\.tsv, line 2: has too few columns"),
        ("noise", {}, "common_voice_en_1.mp3 cannot be read"),
        ("text", {}, "text is empty"),
        ("", {"task": "ser"}, "commonvoice has no lines for ser, only for asr, lid, age, gender"),
        ("", {"language": "xq"}, "there is no language 'xq'; use a code such as en, zh or yue"),
        ("", {"language": "en-US"}, "did you mean en"),
        ("", {"split": "dev"}, r"there is no table .*dev\.tsv"),
    ],
)
def test_what_lacks_is_told_in_a_sentence_and_nothing_is_written(what, asked, message, tmp_path):
    commonvoice(tmp_path / "copy")
    broken(what, tmp_path / "copy")
    with pytest.raises((DataError, ValueError), match=message) as told:
        public.write_public("commonvoice", tmp_path / "copy", tmp_path / "lines.jsonl", **asked)
    assert "\n" not in str(told.value) and not (tmp_path / "lines.jsonl").exists()


def test_what_no_dataset_is(tmp_path):
    with pytest.raises(ValueError, match="there is no dataset tedlium; there are librispeech, fleurs"):
        public.write_public("tedlium", tmp_path, tmp_path / "lines.jsonl")
    with pytest.raises(DataError, match="is laid out as test_sent_emo.csv"):
        public.write_public("meld", tmp_path / "none", tmp_path / "lines.jsonl")
    with pytest.raises(DataError, match=r"holds nothing of test; crema-d is laid out as AudioWAV"):
        public.write_public("crema-d", tmp_path, tmp_path / "lines.jsonl")
    meld(tmp_path)
    (tmp_path / "output_repeated_splits_test/dia0_utt0.wav").unlink()
    with pytest.raises(DataError, match=r"dia0_utt0\.wav .*ffmpeg -i"):
        public.write_public("meld", tmp_path, tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match="aishell2 has no split test, only ios-test"):
        public.write_public("aishell2", tmp_path, tmp_path / "lines.jsonl", split="test")
