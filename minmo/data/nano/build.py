"""Builds the nano corpus: speech of many voices and a few people, and its manifests (`minmo data nano OUT`).

    OUT/sound/VOICE/ID.flac           what users say (16 kHz) and what the assistant says (24 kHz)
    OUT/{train,valid}-TASK.jsonl.gz   lhotse cuts, a manifest a task
    OUT/test-{seen,unseen}-TASK-LANGUAGE.jsonl.gz, OUT/test-people-*.jsonl.gz   held-out sentences and people
    OUT/{train,valid,test}-duplex.jsonl.gz, OUT/sound/duplex/   simulated dialogues (`minmo.data.nano.dialogues`)
    OUT/corpus.json                   seeds, counts, voices with their licences

Sound that is already there is kept, so a build that was stopped goes on; the same seed draws the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr
from rich.progress import track

from minmo.config import SAMPLE_RATE
from minmo.data.nano import human, strangers
from minmo.data.nano.sentences import SMALL_TALK, Sentence, draw, language_of, results_right, typed
from minmo.data.nano.voices import ASSISTANT, VOICES, SynthesisError, Voice, missing_packages, synthesise
from minmo.data.nano_tokenizer import OPERATIONS
from minmo.data.numbers import LANGUAGES, number_words
from minmo.data.utterances import voiced
from minmo.tokenizer.text import LANGUAGE

ASSISTANT_RATE = 24_000
SENTENCES = {"en": 14000, "es": 4500, "fr": 4500, "it": 4500, "ru": 4500}
JOINED = {"en": 4000, "es": 1000, "fr": 1000, "it": 1000, "ru": 1000}
"""Sentences whose words are spoken one by one, as people read numbers out and as telephone systems join prompts."""
GAPS = 0.0, 0.35
"""Seconds between such words."""
ANSWERS = 9000
"""Different sentences that the assistant says."""
TYPED = 4000
"""Drawn English sentences for the LLM's first reading; a quarter as many of each other language."""
MIXED = 12000
"""Lines of translation, and of language identification, beside transcripts and answers."""
PEOPLE = 5
"""Lines of training for each recording of a person: they are few among synthetic voices, and each line is augmented
anew."""
TESTS = 30
"""Held-out sentences of each voice."""
SLOW = {"rhvoice": 0.6, "festival": 0.4}
"""How often an engine is drawn, where its voices take longer to speak."""
JOINED_TESTS = 60
"""Utterances joined from a person's words."""
BACKCHANNELS = ("yes", "okay", "uh huh")
"""What users say while the assistant speaks, without taking over: each English voice says all."""
VALID = 40
"""One sentence in so many that are not held out validates."""


@dataclass(frozen=True)
class Utterance:
    """A sentence said by a voice; speed and pitch: 1 = the voice's own; joined: its words spoken one by one."""

    text: str
    voice: Voice
    rate: int
    speed: float = 1.0
    pitch: float = 1.0
    joined: bool = False

    @property
    def id(self) -> str:
        key = f"{self.voice.id}|{self.speed:.3f}|{self.pitch:.3f}|{self.rate}|{self.text}" + "|joined" * self.joined
        return f"{self.voice.id}-{hashlib.sha1(key.encode()).hexdigest()[:12]}"


@dataclass
class Corpus:
    """Everything that is to be said: users' sentences by set ("train", "valid", "test-seen", "test-unseen"), the
    assistant's answers by text, and users' back-channels."""

    users: dict[str, list[tuple[Sentence, Utterance]]] = field(default_factory=dict)
    answers: dict[str, Utterance] = field(default_factory=dict)
    backchannels: list[Utterance] = field(default_factory=list)


def plan(scale: float = 1.0, seed: int = 0) -> Corpus:
    """What a corpus of `scale` times the usual size says; nothing is spoken yet."""
    corpus = Corpus({name: [] for name in ("train", "valid", "test-seen", "test-unseen")})
    rng = random.Random(seed)
    for language in LANGUAGES:
        voices = [v for v in VOICES if v.language == language]
        seen = [v for v in voices if not v.test]
        weights = [SLOW.get(v.engine, 1.0) for v in seen]
        count = max(1, round(SENTENCES[language] * scale))
        for sentence in draw(language, count, seed):
            if sentence.held_out:
                continue
            voice = rng.choices(seen, weights)[0]
            part = "valid" if rng.randrange(VALID) == 0 else "train"
            corpus.users[part].append((sentence, _varied(sentence.said, voice, rng)))
        for sentence in _wordwise(language, round(JOINED[language] * scale), seed + 3):
            voice, pitch = rng.choices(seen, weights)[0], round(rng.choice((0.9, 1.0, 1.1)), 1)
            said = Utterance(sentence.said, voice, SAMPLE_RATE, pitch=pitch, joined=True)
            corpus.users["train"].append((sentence, said))
        tests = [s for s in draw(language, 40 * count, seed + 1) if s.held_out]
        for voice in voices:
            for sentence in rng.sample(tests, min(len(tests), max(1, round(TESTS * scale)))):
                part = "test-unseen" if voice.test else "test-seen"
                corpus.users[part].append((sentence, Utterance(sentence.said, voice, SAMPLE_RATE)))
    replies = [s.reply for s, _ in corpus.users["train"] if s.reply and s.language == "en"]
    for sentence in draw("en", round(20 * ANSWERS * scale) + 20, seed + 2):
        if sentence.reply:
            replies.append(sentence.reply)
    for text in [*SMALL_TALK.values(), *replies]:
        if len(corpus.answers) < max(len(SMALL_TALK), round(ANSWERS * scale)) and text.isascii():
            corpus.answers.setdefault(text, Utterance(text, ASSISTANT, ASSISTANT_RATE))
    speakers = [v for v in VOICES if v.language == "en"]
    corpus.backchannels = [Utterance(text, voice, SAMPLE_RATE) for voice in speakers for text in BACKCHANNELS]
    return corpus


def _wordwise(language: str, count: int, seed: int) -> list[Sentence]:
    """Numbers and sums of two words and more, without held-out ones."""
    words = {w for n in range(101) for w in number_words(n, language).split()}
    words |= {w for operation in OPERATIONS[language][:4] for w in operation.split()}
    drawn = (s for s in draw(language, 10 * count, seed) if not s.held_out and len(s.said.split()) > 1)
    return list(islice((s for s in drawn if words.issuperset(s.said.split())), count))


def build(out: Path, scale: float = 1.0, seed: int = 0, jobs: int = 2) -> dict[str, Any]:
    """Speaks the corpus and writes its manifests -> the contents of corpus.json.

    Raises SynthesisError, with the command to type, where packages are missing.
    """
    from minmo.data.nano.dialogues import build_dialogues  # of the extra `train`

    out = out.resolve()  # manifests name their sounds, wherever they are read from
    if missing := sorted({*missing_packages(VOICES), *human.missing_packages(), *strangers.missing_packages()}):
        raise SynthesisError(
            "the nano corpus needs Debian packages, some of them from contrib and non-free: apt-get install "
            + " ".join(missing)
        )
    corpus = plan(scale, seed)
    users = [utterance for part in corpus.users.values() for _, utterance in part]
    spoken = {u.id: u for u in [*users, *corpus.answers.values(), *corpus.backchannels]}
    joined = [u for u in spoken.values() if u.joined]
    words = {word.id: word for u in joined for word in _words(u)}
    whole = [u for u in spoken.values() if not u.joined]
    _in_parallel(lambda u: _speak(u, out), list({**words, **{u.id: u for u in whole}}.values()), jobs, "speaking")
    _in_parallel(lambda u: _join(u, out), joined, jobs, "joining")
    people = human.prompts()
    _in_parallel(lambda p: _record(p, out), people, jobs, "people")
    manifests = _manifests(corpus, people, out) | stranger_cuts(people, out, seed)
    counts = {name: _write(cuts, out / f"{name}.jsonl.gz") for name, cuts in manifests.items()}
    counts |= build_dialogues(out, scale, seed)
    summary = {
        "seed": seed,
        "scale": scale,
        "cuts": {name: count for name, (count, _) in counts.items()},
        "hours": {name: round(seconds / 3600, 3) for name, (_, seconds) in counts.items()},
        "voices": [asdict(v) for v in VOICES],
        "people": {
            lang: {"speaker": name, "licence": human.LICENCES[lang]} for lang, (_, name) in human.SPEAKERS.items()
        },
    }
    (out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _varied(text: str, voice: Voice, rng: random.Random) -> Utterance:
    return Utterance(text, voice, SAMPLE_RATE, round(rng.uniform(0.8, 1.2), 2), round(rng.uniform(0.85, 1.15), 2))


def _path(utterance: Utterance, out: Path) -> Path:
    return out / "sound" / utterance.voice.id / f"{utterance.id}.flac"


def _speak(utterance: Utterance, out: Path) -> None:
    path = _path(utterance, out)
    if not path.is_file():
        sound, rate = synthesise(utterance.voice, utterance.text, utterance.speed, utterance.pitch)
        _keep(soxr.resample(sound, rate, utterance.rate), utterance.rate, path)


def _words(utterance: Utterance) -> list[Utterance]:
    return [replace(utterance, text=word, joined=False) for word in utterance.text.split()]


def _join(utterance: Utterance, out: Path) -> None:
    """Its words, without the silence around them, one after the other with pauses drawn from its id."""
    path = _path(utterance, out)
    if path.is_file():
        return
    rng, pieces = random.Random(utterance.id), []
    for word in _words(utterance):
        sound, _ = sf.read(_path(word, out), dtype="float32")
        start, end = voiced(sound)
        pieces += [sound[start:end], np.zeros(round(rng.uniform(*GAPS) * utterance.rate), np.float32)]
    _keep(np.concatenate(pieces[:-1]), utterance.rate, path)


def _person(prompt: human.Prompt, out: Path) -> Path:
    return out / "sound" / f"asterisk-{prompt.language}" / f"{prompt.name.replace('/', '-')}.flac"


def _record(prompt: human.Prompt, out: Path) -> None:
    path = _person(prompt, out)
    if not path.is_file():
        _keep(human.decode(prompt), SAMPLE_RATE, path)


def _keep(sound: np.ndarray, rate: int, path: Path) -> None:
    """Written beside and renamed, so that a file with its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    sf.write(unfinished, np.clip(sound, -1, 1), rate, format="FLAC", subtype="PCM_16")
    unfinished.replace(path)


def _in_parallel(work: Callable[[Any], None], items: list[Any], jobs: int, what: str) -> None:
    with ThreadPool(jobs) as pool:
        for _ in track(pool.imap_unordered(work, items, chunksize=8), what, len(items), transient=True):
            pass


def _manifests(corpus: Corpus, people: list[human.Prompt], out: Path) -> dict[str, list[Any]]:
    """The cuts of each manifest, by its name."""
    manifests: dict[str, list[Any]] = {}

    def add(name: str, cut: Any) -> None:
        manifests.setdefault(name, []).append(cut)

    answers = {text: _recording(u.id, _path(u, out)) for text, u in corpus.answers.items()}
    kept = {text for n, text in enumerate(answers) if n % VALID == 0}  # no stage of the voice trains on these
    for part, said in corpus.users.items():
        for sentence, utterance in said:
            for cut in _asked(_recording(utterance.id, _path(utterance, out)), sentence, utterance.voice.id):
                task = cut.custom["task"]
                # Languages are told apart: those sentences are one set.
                languages = f"-{sentence.language}" if part.startswith("test") and task != "lid" else ""
                add(f"{part}-{task}{languages}", cut)
                # Whoever judges spoken answers in tests understands English.
                judged = not part.startswith("test") or language_of(sentence.reply) == "en"
                if task == "qa" and sentence.reply in answers and judged:
                    spoken = {"target_recording": answers[sentence.reply], "target_recording_unaligned": True}
                    role = part if part.startswith("test") else "valid" if sentence.reply in kept else "train"
                    add(f"{role}-s2s", _cut(cut.recording, f"{cut.id}-s2s", **{**cut.custom, **spoken, "task": "s2s"}))
    for n, (instruction, question, text) in enumerate(typed(TYPED)):
        custom = {"task": "text", "instruction": instruction, "source_text": question, "text": text}
        add(f"{'valid' if n % VALID == 0 else 'train'}-text", _typed(f"text-{n}", custom))
    for text, recording in answers.items():
        part = "valid" if text in kept else "train"
        spoken_in = language_of(text)
        cut = _cut(
            recording, f"{recording.id}-tts", task="tts", text=text, language=spoken_in, target_recording=recording
        )
        cut.recording = None  # nobody asks
        add(f"{part}-tts", cut)
    for u in corpus.backchannels:
        custom = {"task": "asr", "text": u.text, "language": "en", "voice": u.voice.id}
        name = "test-backchannels" if u.voice.test else "train-backchannels"
        add(name, _cut(_recording(u.id, _path(u, out)), u.id, **custom))
    for prompt in people:
        name = f"asterisk-{prompt.language}-{prompt.name.replace('/', '-')}"
        recording = _recording(name, _person(prompt, out))
        by = {"language": prompt.language, "voice": human.SPEAKERS[prompt.language][0]}
        if prompt.name.startswith("digits/"):
            if prompt.text not in number_set(prompt.language):
                continue  # "A.M.", "dollars": no numbers
            add(f"test-people-digits-{prompt.language}", _cut(recording, name, task="asr", text=prompt.text, **by))
        elif not prompt.name.startswith(human.TESTS_ONLY) and human.SHORTEST <= recording.duration <= human.LONGEST:
            label = {"instruction": LANGUAGE, "text": LANGUAGES[prompt.language]}
            for copy in range(1 if prompt.test else PEOPLE):
                cut = _cut(recording, f"{name}-lid" + f"-{copy}" * (copy > 0), task="lid", **label, **by)
                add("test-people-lid" if prompt.test else "train-lid", cut)
    rng = random.Random(0)
    for part, most in (("train", MIXED), ("valid", MIXED // VALID)):
        for task in ("s2tt", "lid"):
            cuts = manifests.get(f"{part}-{task}", [])
            # People are few and speak as people do: all of them.
            manifests.setdefault(f"{part}-mixed", []).extend(
                cut for cut in cuts if cut.id.startswith("asterisk") or rng.random() * len(cuts) < most
            )
    return manifests


def number_set(language: str) -> set[str]:
    """The numbers of the domain as a language says them."""
    return {number_words(n, language) for n in range(101)}


def stranger_cuts(people: list[human.Prompt], out: Path, seed: int) -> dict[str, list[Any]]:
    """The manifests of `strangers`, and of English words joined; their sounds are written."""
    words: dict[str, np.ndarray] = {}
    for prompt in people:
        if prompt.language == "en" and prompt.text in strangers.WORDS and prompt.name.startswith(human.TESTS_ONLY):
            words.setdefault(prompt.text, strangers.trimmed(human.decode(prompt)))
    joined = strangers.joined(words, JOINED_TESTS, seed)
    sounds = [("people-joined", "en", text, f"joined-{n}", sound) for n, (text, sound) in enumerate(joined)]
    for name, language, text, path in strangers.recordings():
        sounds.append((name, language, text, path.stem, strangers.load(path)))
    manifests: dict[str, list[Any]] = {}
    for kind, language, text, stem, sound in sounds:
        _keep(sound, SAMPLE_RATE, path := out / "sound" / kind / f"{stem}.flac")
        cut = _cut(_recording(f"{kind}-{stem}", path), f"{kind}-{stem}", task="asr", text=text, language=language)
        manifests.setdefault(f"test-{kind}-{language}", []).append(cut)
    return manifests


def _asked(recording: Any, sentence: Sentence, voice: str) -> Iterator[Any]:
    """A cut for each task that can be asked about a sound."""
    for task, instruction, text in sentence.tasks():
        name = f"{recording.id}-{task}" + (f"-{instruction.split()[-1]}" if task == "s2tt" else "")
        accepted = {"answers": right} if task == "qa" and (right := results_right(text)) else {}
        yield _cut(
            recording, name, task=task, instruction=instruction, text=text, source_text=sentence.said,
            language=sentence.language, voice=voice, **accepted,
        )  # fmt: skip


def _recording(name: str, path: Path) -> Any:
    from lhotse import Recording  # of the extra `train`

    return Recording.from_file(path, recording_id=name)


def _cut(recording: Any, name: str, **custom: Any) -> Any:
    cut = recording.to_cut()
    cut.id, cut.custom = name, custom
    return cut


def _typed(name: str, custom: dict[str, Any]) -> Any:
    """A cut without sound; its duration is its price in a batch."""
    from lhotse import MonoCut

    words = len(custom["source_text"].split()) + len(custom["text"].split())
    return MonoCut(id=name, start=0.0, duration=0.08 * (24 + 2 * words), channel=0, custom=custom)


def _write(cuts: Iterable[Any], path: Path) -> tuple[int, float]:
    from lhotse import CutSet

    from minmo.data.manifest import validate

    kept = list({cut.id: cut for cut in cuts}.values())
    for cut in kept:
        validate(cut)  # a line that training refuses would stop it, hours into it
    random.Random(path.name).shuffle(kept)  # training shuffles within a window of lines only
    CutSet.from_cuts(kept).to_file(path)
    return len(kept), sum(cut.duration for cut in kept)
