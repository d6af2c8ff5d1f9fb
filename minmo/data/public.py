"""Public datasets in their own layouts, from a local copy, to manifests (`minmo data public NAME FOLDER`).

Nothing is downloaded. An adapter walks the files as a dataset's publishers lay them out and gives lines of a task;
what a copy lacks is told in one sentence. Instructions are the tasks' own (`minmo/tokenizer/text.py`).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lhotse import CutSet, MonoCut, Recording

from minmo.data.languages import name_of
from minmo.data.manifest import validate
from minmo.data.schema import TASKS, DataError
from minmo.tokenizer.text import AGE, EMOTION, GENDER, LANGUAGE, SOUND, TRANSCRIBE, translation


@dataclass(frozen=True)
class Asked:
    """What is wanted of a dataset: a task, the language that is heard, one to translate into, a split."""

    task: str
    language: str
    into: str
    split: str


@dataclass(frozen=True)
class Item:
    """One recording: `sound`, of which [start, start + seconds] where it is a part; custom: fields of its line."""

    id: str
    sound: Path
    custom: dict[str, Any]
    start: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Dataset:
    """layout: what lies in the folder. tasks: what can be asked. items: all of it."""

    layout: str
    tasks: tuple[str, ...]
    items: Callable[[Path, Asked], Iterator[Item]]
    language: str = "en"
    split: str = "test"
    splits: tuple[str, ...] = field(default=())


def write_public(
    name: str, folder: Path, out: Path, *, task: str = "", language: str = "", into: str = "en", split: str = ""
) -> int:
    """Writes a manifest of a dataset (of DATASETS) that lies in `folder` -> its number of lines.

    task, language, split: by default the dataset's first. into: for s2tt. Raises DataError or ValueError, one sentence,
    for what is not there or not known.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no dataset {name}; there are {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    task, language, split = task or dataset.tasks[0], language or dataset.language, split or dataset.split
    if task not in dataset.tasks:
        raise ValueError(f"{name} has no lines for {task}, only for {', '.join(dataset.tasks)}")
    if dataset.splits and split not in dataset.splits:
        raise ValueError(f"{name} has no split {split}, only {', '.join(dataset.splits)}")
    name_of(language), name_of(into)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {name} is laid out as {dataset.layout}", "missing folder")
    cuts = [_cut(name, item, task) for item in dataset.items(folder, Asked(task, language, into, split))]
    if not cuts:
        raise DataError(f"{folder} holds nothing of {split}; {name} is laid out as {dataset.layout}", "empty dataset")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"unfinished-{out.name}")  # lhotse tells a format by how a name ends
    CutSet.from_cuts(cuts).to_file(unfinished)
    unfinished.replace(out)
    return len(cuts)


def _cut(name: str, item: Item, task: str) -> MonoCut:
    if not item.sound.is_file():
        raise DataError(f"{name}, {item.id}: there is no sound {item.sound}; unpack it there", "missing file")
    try:
        recording = Recording.from_file(item.sound.resolve(), recording_id=f"{name}-{item.sound.stem}")
    except Exception as error:  # every backend of lhotse's raises its own
        raise DataError(f"{name}, {item.id}: {item.sound} cannot be read ({error!r:.80})", "unreadable sound") from None
    custom = {"task": task, "dataset": name, **item.custom}
    cut = MonoCut(f"{name}-{item.id}", item.start, item.seconds or recording.duration, 0, recording=recording)
    if task == "tts":
        custom["target_recording"], cut.recording = recording, None
    cut.custom = custom
    validate(cut)
    return cut


def _rows(path: Path, columns: tuple[str, ...], delimiter: str = "\t", header: bool = True) -> Iterator[dict[str, str]]:
    """The rows of a table; without a header its columns are these."""
    if not path.is_file():
        raise DataError(f"there is no table {path}; check the folder, the language and the split", "missing table")
    with path.open(encoding="utf-8-sig", newline="") as file:
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        reader = csv.DictReader(file, None if header else columns, delimiter=delimiter, quoting=quoting)
        if lacking := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(f"{path} has no column {', '.join(lacking)}; give the publishers' own file", "no column")
        for number, row in enumerate(reader, 1 + header):
            if any(row[name] is None for name in columns):
                raise DataError(f"{path}, line {number}: has too few columns; download it again", "short row")
            yield row


def _said(asked: Asked, text: str) -> dict[str, Any]:
    """The fields of a line about a sound whose words are `text`."""
    about = {"language": asked.language}
    if asked.task == "lid":
        return {**about, "instruction": LANGUAGE, "text": name_of(asked.language), "source_text": text}
    return {**about, "instruction": TRANSCRIBE, "text": text}


def _labelled(asked: Asked, label: str) -> dict[str, Any]:
    instruction = {"ser": EMOTION, "aed": SOUND, "age": AGE, "gender": GENDER}[asked.task]
    return {"language": asked.language, "instruction": instruction, "text": label}


def _translated(asked: Asked, text: str, said: str = "") -> dict[str, Any]:
    instruction = translation(name_of(asked.language), name_of(asked.into))
    return {"language": asked.language, "instruction": instruction, "text": text} | (
        {"source_text": said} if said else {}
    )


def _fleurs(folder: Path, asked: Asked) -> Iterator[Item]:
    columns = ("id", "file", "raw", "text", "characters", "samples", "gender")

    def table(language: str) -> tuple[Path, list[dict[str, str]]]:
        code = {"zh": "cmn_hans_cn", "yue": "yue_hant_hk"}.get(language)
        homes = [p for p in folder.iterdir() if p.is_dir() and (p.name == code or p.name.startswith(f"{language}_"))]
        if not homes:
            raise DataError(f"{folder} has no folder of {name_of(language)}, such as {language}_xx", "no language")
        home = sorted(homes)[0]
        return home, list(_rows(home / f"{asked.split}.tsv", columns, header=False))

    home, rows = table(asked.language)
    sounds = home / "audio" / asked.split
    into = {row["id"]: row["raw"] for row in table(asked.into)[1]} if asked.task == "s2tt" else {}
    for row in rows:
        if asked.task == "s2tt" and row["id"] not in into:
            continue  # the sentence was not recorded in the other language
        custom = _translated(asked, into[row["id"]], row["raw"]) if into else _said(asked, row["raw"])
        yield Item(f"{asked.language}-{Path(row['file']).stem}", sounds / row["file"], custom)


def _common_voice(folder: Path, asked: Asked) -> Iterator[Item]:
    home = folder / {"zh": "zh-CN"}.get(asked.language, asked.language)
    column = {"age": "age", "gender": "gender"}.get(asked.task)
    for row in _rows(home / f"{asked.split}.tsv", ("path", "sentence", *([column] if column else []))):
        if column and not row[column]:
            continue  # few speakers told
        custom = _labelled(asked, row[column]) if column else _said(asked, row["sentence"])
        yield Item(Path(row["path"]).stem, home / "clips" / row["path"], custom)


def _covost(folder: Path, asked: Asked) -> Iterator[Item]:
    home = folder / asked.language if (folder / asked.language).is_dir() else folder
    name = {"zh": "zh-CN"}
    pair = f"{name.get(asked.language, asked.language)}_{name.get(asked.into, asked.into)}"
    whole, part = home / f"covost_v2.{pair}.tsv", home / f"covost_v2.{pair}.{asked.split}.tsv"
    of_split = part.is_file()
    for row in _rows(part if of_split else whole, ("path", "translation", *(() if of_split else ("split",)))):
        if of_split or row["split"] == asked.split:
            custom = _translated(asked, row["translation"], row.get("sentence") or "")
            yield Item(f"{pair}-{Path(row['path']).stem}", home / "clips" / row["path"], custom)


def _librispeech(folder: Path, asked: Asked) -> Iterator[Item]:
    home = folder / asked.split
    for listing in sorted(home.glob("*/*/*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield Item(name, listing.parent / f"{name}.flac", _said(asked, text))


def _aishell2(folder: Path, asked: Asked) -> Iterator[Item]:
    device, _, part = asked.split.partition("-")
    homes = [p for p in folder.iterdir() if p.is_dir() and p.name.lower() == device]
    home = (homes[0] if homes else folder / device) / part
    texts = {row["id"]: row["text"] for row in _rows(home / "trans.txt", ("id", "text"), header=False)}
    for row in _rows(home / "wav.scp", ("id", "path"), header=False):
        if row["id"] not in texts:
            raise DataError(f"{home / 'trans.txt'} has no text of {row['id']}; download it again", "no text")
        yield Item(f"{device}-{row['id']}", home / row["path"], _said(asked, texts[row["id"]]))


def _wenetspeech(folder: Path, asked: Asked) -> Iterator[Item]:
    path = folder / "WenetSpeech.json"
    if not path.is_file():
        raise DataError(f"there is no {path}; give the folder that holds it and audio/", "missing table")
    subset = asked.split.upper().replace("-", "_")
    for audio in json.loads(path.read_text(encoding="utf-8"))["audios"]:
        for part in audio["segments"]:
            if subset in part["subsets"]:
                begin, end = part["begin_time"], part["end_time"]
                yield Item(part["sid"], folder / audio["path"], _said(asked, part["text"]), begin, end - begin)


def _meld(folder: Path, asked: Asked) -> Iterator[Item]:
    sounds = folder / {"test": "output_repeated_splits_test", "dev": "dev_splits_complete"}[asked.split]
    columns = ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID")
    for row in _rows(folder / f"{asked.split}_sent_emo.csv", columns, ","):
        name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        films = sounds / f"{name}.mp4"
        sound = next((p for end in ("wav", "flac") if (p := sounds / f"{name}.{end}").is_file()), None)
        if sound is None:
            fix = f"write it from {films.name}: ffmpeg -i {films} -ac 1 -ar 16000 {films.with_suffix('.wav')}"
            raise DataError(f"meld, {name}: there is no {name}.wav in {sounds}; {fix}", "missing file")
        yield Item(name, sound, {**_labelled(asked, row["Emotion"]), "source_text": row["Utterance"]})


def _by_name(pattern: str, form: str, labels: dict[str, str]) -> Callable[[Path, Asked], Iterator[Item]]:
    """Sounds (a glob) whose names hold their label (group 1 of `form`); what has another label is left out."""

    def items(folder: Path, asked: Asked) -> Iterator[Item]:
        for path in sorted(folder.glob(pattern)):
            found = re.search(form, path.relative_to(folder).as_posix())
            if found and (label := labels.get(found[1].lower())):
                yield Item(path.stem, path, _labelled(asked, label))

    return items


def _vocalsound(folder: Path, asked: Asked) -> Iterator[Item]:
    """Six sounds that are no words; the split is named by datafiles/te.json, where the copy has it."""
    listing = folder / "datafiles" / {"test": "te.json", "dev": "val.json"}[asked.split]
    of_split = None
    if listing.is_file():
        of_split = {Path(entry["wav"]).name for entry in json.loads(listing.read_text(encoding="utf-8"))["data"]}
    for item in _by_name("audio_16k/*.wav", r"_\d+_(\w+)\.wav$", SOUNDS)(folder, asked):
        if of_split is None or item.sound.name in of_split:
            yield item


def _iemocap(folder: Path, asked: Asked) -> Iterator[Item]:
    """Four classes, excitement counted as happiness, as EmoBox has them."""
    labels = {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
    for listing in sorted(folder.glob("Session*/dialog/EmoEvaluation/*.txt")):
        sounds = listing.parents[2] / "sentences" / "wav" / listing.stem
        for line in listing.read_text(encoding="utf-8").splitlines():
            found = re.match(r"\[[\d. -]+\]\t(\w+)\t(\w+)\t", line)
            if found and found[2] in labels:
                yield Item(found[1], sounds / f"{found[1]}.wav", _labelled(asked, labels[found[2]]))


def _seed_tts(folder: Path, asked: Asked) -> Iterator[Item]:
    home = folder / asked.language
    for row in _rows(home / "meta.lst", ("id", "prompt", "prompt_sound", "text"), "|", header=False):
        custom = {"language": asked.language, "text": row["text"]}
        yield Item(row["id"], home / "wavs" / f"{row['id']}.wav", custom)


EMOTIONS = {"ang": "angry", "dis": "disgusted", "fea": "fearful", "hap": "happy", "neu": "neutral", "sad": "sad"}
EMODB = {"w": "angry", "l": "bored", "e": "disgusted", "a": "fearful", "f": "happy", "t": "sad", "n": "neutral"}
ESD = {"angry": "angry", "happy": "happy", "neutral": "neutral", "sad": "sad", "surprise": "surprised"}
SOUNDS = {"cough": "cough", "laughter": "laughter", "sigh": "sigh", "sneeze": "sneeze", "sniff": "sniff",
          "throatclearing": "throat clearing"}  # fmt: skip
_DEVICES = tuple(f"{device}-{part}" for device in ("ios", "android", "mic") for part in ("test", "dev"))
_ASR = ("asr", "lid")

DATASETS: dict[str, Dataset] = {
    "librispeech": Dataset("test-clean/SPEAKER/CHAPTER/*.flac, *.trans.txt", _ASR, _librispeech, split="test-clean"),
    "fleurs": Dataset("en_us/test.tsv, en_us/audio/test/*.wav", (*_ASR, "s2tt"), _fleurs),
    "commonvoice": Dataset("en/test.tsv, en/clips/*.mp3", (*_ASR, "age", "gender"), _common_voice),
    "covost2": Dataset("de/covost_v2.de_en.tsv, de/clips/*.mp3", ("s2tt",), _covost, language="de"),
    "aishell2": Dataset(
        "iOS/test/wav.scp, trans.txt, wav/", _ASR, _aishell2, language="zh", split="ios-test", splits=_DEVICES
    ),
    "wenetspeech": Dataset("WenetSpeech.json, audio/", _ASR, _wenetspeech, language="zh", split="test-net"),
    "meld": Dataset(
        "test_sent_emo.csv, output_repeated_splits_test/dia0_utt0.wav", ("ser",), _meld, splits=("test", "dev")
    ),
    "iemocap": Dataset("Session1/dialog/EmoEvaluation/*.txt, Session1/sentences/wav/", ("ser",), _iemocap),
    "crema-d": Dataset(
        "AudioWAV/1001_DFA_ANG_XX.wav", ("ser",), _by_name("AudioWAV/*.wav", r"_([A-Z]{3})_[A-Z]{2}\.wav$", EMOTIONS)
    ),
    "emodb": Dataset("wav/03a01Fa.wav", ("ser",), _by_name("wav/*.wav", r"(\w)\w\.wav$", EMODB), language="de"),
    "esd": Dataset("0011/Angry/test/0011_000371.wav", ("ser",), _by_name("*/*/test/*.wav", r"/(\w+)/test/", ESD)),
    "vocalsound": Dataset(
        "audio_16k/f0003_0_cough.wav, datafiles/te.json", ("aed",), _vocalsound, splits=("test", "dev")
    ),
    "seed-tts-eval": Dataset("en/meta.lst, en/wavs/*.wav", ("tts",), _seed_tts),
}
assert {task for dataset in DATASETS.values() for task in dataset.tasks} <= set(TASKS)
