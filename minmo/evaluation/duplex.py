"""Full duplex, measured in conversations: a simulated user hears the assistant and reacts (`minmo.data.reactive`).

`held` runs one conversation and gives the facts of it as plain data: what the user did and when, to the sample, and
what the assistant did. `evaluate_duplex` runs many, keeps each one's facts and sound as soon as it is over, goes on
where it was stopped, and scores the facts (`duplex_scores`).

The clock is simulated: work between ticks takes no time, so that every machine finds the same; `realtime` counts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

import minmo
from minmo.clock import percentile
from minmo.config import SAMPLE_RATE
from minmo.conversation.client import Recording, simulate
from minmo.conversation.conversation import Conversation
from minmo.conversation.front import FRONTS
from minmo.conversation.settings import Settings
from minmo.conversation.turn_taking import eagerness
from minmo.data.duplex import USER_TURNS
from minmo.data.nano.dialogues import TURNS, ambiguous, material_of
from minmo.data.reactive import LIVE, ReactiveUser
from minmo.data.simulator import Conditions
from minmo.data.utterances import voiced
from minmo.evaluation import records
from minmo.evaluation.duplex_report import draw, markdown
from minmo.evaluation.duplex_scores import live_rows, predictor_rows
from minmo.evaluation.judges import JudgeError
from minmo.evaluation.material import manifests_of, read_set
from minmo.evaluation.results import Results, made_with
from minmo.evaluation.voices import Silero
from minmo.model import MinMo

DIALOGUES = 40
LONGEST_REPLY = 32
"""Text tokens: more than any sentence of the nano domain has."""
HEARD_DB = -20.0
"""From here on, relative to its loudest 10 ms, a reply counts as heard: nano's vocoder hums at -30 around its voice,
and a judge of voices does not take that for one."""
Facts = dict[str, Any]


def held(model: MinMo, user: ReactiveUser, settings: Settings, about: Facts) -> tuple[Facts, Recording]:
    """One conversation -> its facts, times in milliseconds of its clock, and its recording.

    taken, ended, sent: [reply, when] of turns that the assistant took, of replies that were sent whole, and of each
    reply's first sound. cuts: where the predictor stopped a reply: when, when sound was last sent, and when the last
    sound was played. text: of each reply; expected: of each turn's answer. voices: [reply, first sound, last sound] of
    what was played, without what is too faint to be heard (HEARD_DB). judged: a judge's spans of voice, once there are
    some.
    """
    conversation = Conversation(model, settings, eagerness(about["eagerness"]))
    try:
        found = simulate(conversation, user, realtime=about["realtime"], front=FRONTS[about["front"]]())
    finally:
        conversation.close()
    last_sent: dict[int, float] = {}
    facts: Facts = {"name": user.name, "snr_db": user.snr_db, "echo_db": user.echo_db, "text": {}}
    facts |= {"taken": [], "ended": [], "cuts": [], "sent": [], "judged": None}
    ends = {reply: 1e3 * end / found.rate for reply, _, end in found.spans}
    for entry in found.log:
        when, reply = entry["at_ms"] + entry.get("lag_ms", 0.0), entry.get("reply", -1)
        if entry["event"] == "TurnTaken":
            facts["taken"].append([reply, when])
        elif entry["event"] == "ReplyDone":
            facts["ended"].append([reply, when])
        elif entry["event"] == "TextDelta":
            facts["text"][str(reply)] = facts["text"].get(str(reply), "") + entry["text"]
        elif entry["event"] == "Sound":
            if reply not in last_sent:
                facts["sent"].append([reply, when])
            last_sent[reply] = when
        elif entry["event"] == "Interrupted":
            cut = {"reply": reply, "at": when, "last_sent": last_sent.get(reply), "last_played": ends.get(reply)}
            facts["cuts"].append(cut)
    facts["expected"] = user.answers
    facts["events"] = [asdict(event) for event in user.events]
    facts["ambiguous"] = [ambiguous(event.text) for event in user.events if event.kind in USER_TURNS]
    facts["voices"] = _voices(found)
    facts["seconds"] = len(found.user) / SAMPLE_RATE
    facts["tick_ms"] = {f"p{p}": percentile(found.tick_ms, p) for p in (50, 95, 99)}
    return facts, found


def _voices(found: Recording) -> list[list[float]]:
    """[reply, first sound, last sound] of each span that was played. Too faint is what is faint in the whole reply:
    where a machine that is late leaves a gap behind a voice's lead-in, that lead-in is not loud for being alone."""
    voices = []
    for reply, group in itertools.groupby(found.spans, lambda span: span[0]):
        spans = [(begin, end) for _, begin, end in group]
        sound = np.concatenate([found.assistant[begin:end] for begin, end in spans])
        if not np.any(sound):
            continue
        (first, last), before = voiced(sound, HEARD_DB), 0
        for begin, end in spans:
            starts, stops = max(begin, begin + first - before), min(end, begin + last - before)
            if starts < stops:
                voices.append([reply, 1e3 * starts / found.rate, 1e3 * stops / found.rate])
            before += end - begin
    return voices


def evaluate_duplex(
    checkpoint: str | Path = "nano",
    data: str | Path = "nano-corpus",
    out: str | Path = "duplex",
    limit: int | None = None,
    *,
    seed: int = 0,
    realtime: bool = False,
    eager: str = "auto",
    front: str = "none",
    progress: Callable[[str], None] = lambda name: None,
) -> Results:
    """Conversations with a checkpoint (directory or preset) about a corpus that `minmo data nano` wrote, scored.

    out: a folder: dialogues.jsonl (the facts, a line each), sound/NAME.flac (left the user, right the assistant),
    duplex.json, duplex.md, latency.png, example.png. Started again with the same settings it goes on where it was.
    limit: dialogues (40). eager: a name of EAGERNESS. front: a name of FRONTS. Raises ValueError for settings that
    cannot be, and where the folder holds a run with others; FloatingPointError for weights whose numbers break.
    """
    if front not in FRONTS:
        raise ValueError(f"front must be one of {', '.join(FRONTS)}, got {front!r}")
    eagerness(eager)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    manifests_of(data := Path(data))
    spoken = material_of(data, "test")
    if spoken is None:
        raise ValueError(f"{data} holds no spoken exchanges to test with; give the folder that `minmo data nano` wrote")
    judge, left_out = _judge()
    model = minmo.load(checkpoint)
    about = made_with(model, [judge.name] if judge else [], seed=seed, data=data)
    about |= {"realtime": realtime, "eagerness": eager, "front": front}
    folder = Path(out)
    (folder / "sound").mkdir(parents=True, exist_ok=True)
    path = folder / "dialogues.jsonl"
    kept = records.kept(path, about, key="name")
    engine = minmo.FastMinMo(model, rows=2, keep_model=True)
    for index in range(limit or DIALOGUES):
        user = ReactiveUser(spoken, _conditions(index), seed, index)
        if user.name in kept:
            continue
        progress(user.name)
        settings = Settings(seed=seed + index, temperature=0.0, max_text_tokens=LONGEST_REPLY)
        facts, found = held(engine, user, settings, about)
        sound = folder / "sound" / f"{user.name}.flac"
        minmo.save_audio(sound, found.stereo(), found.rate)
        if judge is not None:
            facts["judged"] = judge(sound)
        kept[user.name] = facts
        records.append(path, [facts])
    progress("the predictor, position by position")
    dialogues = [kept[name] for name in sorted(kept, key=lambda name: int(name.rsplit("-", 1)[1]))]
    positions = data / "test-duplex.jsonl.gz"
    lines = read_set(positions, limit, seed, root=data).lines if positions.is_file() else []
    left_out += [] if lines else [f"the predictor, position by position: there is no {positions}"]
    rows = live_rows(dialogues, seed) + predictor_rows(model, lines, seed)
    results = Results(about | {"limit": limit}, rows, left_out=left_out)
    results.write(folder / "duplex.json")
    (folder / "duplex.md").write_text(markdown(results, dialogues), encoding="utf-8")
    draw(dialogues, about, folder)
    return results


def _conditions(index: int) -> Conditions:
    return replace(LIVE, turns=TURNS[index % len(TURNS)])


def _judge() -> tuple[Silero | None, list[str]]:
    try:
        return Silero(), []
    except JudgeError as error:
        return None, [f"silero-vad's times: {error}"]
