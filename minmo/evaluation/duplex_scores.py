"""From the facts of conversations (`minmo.evaluation.duplex`) to scores: who took the turn when, who stopped, and why.

Times are milliseconds of the conversation's clock. A user's turn lasts from its first sound to its last, its pauses
included, and is open until the next one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.data.duplex import USER_TURNS, position
from minmo.data.reactive import OUTLASTS_MS, STOP_WITHIN_MS
from minmo.evaluation.material import Line
from minmo.evaluation.results import Row
from minmo.evaluation.scores import quantile, right_rate
from minmo.evaluation.turns import SCORED, Turns, count_turns
from minmo.evaluation.words import spoken
from minmo.model import MinMo

Facts = dict[str, Any]
TICK_MS = 1e3 * TICK / SAMPLE_RATE
EARLY_MS = TICK_MS
"""A turn that is taken no more than one position before its end is not taken too early."""
AFTER_MS = 500.0
"""What stops a reply during a murmur or a noise, or within this after it, was the murmur or the noise."""
AGREES_MS = 100.0
"""A judge agrees where its times differ by no more, by the median."""
NEAR_MS, JUDGED_SNR_DB = 400.0, 20.0
"""Echo within this of a user's voice, and noise above this, are for a judge of voices part of it, or hide it."""
LIVE, POSITIONS = "live conversations", "simulated dialogues, position by position"


@dataclass
class _Tally:
    """An entry each: values in seconds, what was right, and whose dialogue the entry is."""

    values: dict[str, tuple[list[float], list[str]]] = field(default_factory=dict)
    rights: dict[str, tuple[list[bool], list[str]]] = field(default_factory=dict)

    def took(self, name: str, ms: float, dialogue: str) -> None:
        values, owners = self.values.setdefault(name, ([], []))
        values.append(ms / 1e3)
        owners.append(dialogue)

    def was(self, name: str, right: bool, dialogue: str) -> None:
        rights, owners = self.rights.setdefault(name, ([], []))
        rights.append(right)
        owners.append(dialogue)


def live_rows(dialogues: Sequence[Facts], seed: int) -> list[Row]:
    """The rows of all measures that there was anything to count for."""
    tally, turns = _Tally(), Turns()
    for facts in dialogues:
        _answers(facts, tally, turns)
        _stops(facts, tally, turns)
        for name, ours, judged in agreement(facts):
            tally.took(f"{name}: difference to silero-vad", abs(ours - judged), facts["name"])
            tally.was(f"{name}: within 100 ms of silero-vad", abs(ours - judged) <= AGREES_MS, facts["name"])
    rows = []
    for name, (values, owners) in sorted(tally.values.items()):
        for q in (0.5, 0.95):
            score = quantile(values, q, owners, seed)
            rows.append(Row("full duplex", LIVE, f"{name}, p{100 * q:.0f}, s", score, _by(name)))
    for name, (rights, owners) in sorted(tally.rights.items()):
        rows.append(Row("full duplex", LIVE, name, right_rate(rights, None, owners, seed), _by(name)))
    rows += [Row("full duplex", LIVE, name, score) for name, score in turns.scores(seed).items()]
    return rows


def predictor_rows(model: MinMo, lines: Sequence[Line], seed: int) -> list[Row]:
    """The paper's measures: the predictor alone, on dialogues that it does not change."""
    found = Turns()
    for line in lines:
        found.add(count_turns(model, line.cut))
    return [Row("full duplex", POSITIONS, name, score) for name, score in found.scores(seed).items()]


def _by(name: str) -> str:
    return "silero-vad" if "silero" in name else "the model"


def _ms(samples: int) -> float:
    return 1e3 * samples / SAMPLE_RATE


def _decided(ms: float) -> int:
    """The LLM position after which a decision of that time came."""
    return max(0, round(ms / TICK_MS) - 1)


@dataclass(frozen=True)
class _UserTurn:
    """begin, end, until: its first and last sound, and the next turn's first. taken: [reply, when] from then on."""

    kind: str
    begin: float
    end: float
    until: float
    pauses: list[tuple[float, float]]
    ambiguous: bool
    taken: list[list[float]]

    @property
    def early(self) -> list[float] | None:
        return next((t for t in self.taken if t[1] < self.end - EARLY_MS), None)

    @property
    def answers(self) -> list[list[float]]:
        return [t for t in self.taken if t[1] >= self.end - EARLY_MS]


def user_turns(facts: Facts) -> list[_UserTurn]:
    events = facts["events"]
    turns = [e for e in events if e["kind"] in USER_TURNS]
    starts = [_ms(e["start"]) for e in turns] + [float("inf")]
    found = []
    for n, event in enumerate(turns):
        begin, end, until = starts[n], _ms(event["end"]), starts[n + 1]
        pauses = [
            (_ms(e["start"]), _ms(e["end"]))
            for e in events
            if e["kind"] == "pause" and event["start"] <= e["start"] < event["end"]
        ]
        taken = [t for t in facts["taken"] if begin < t[1] <= until]
        found.append(_UserTurn(event["kind"], begin, end, until, pauses, facts["ambiguous"][n], taken))
    return found


def _answers(facts: Facts, tally: _Tally, turns: Turns) -> None:
    """When the user's turns were taken."""
    name = facts["name"]
    first = {reply: begin for reply, begin, _ in reversed(facts["voices"])}
    sent, user = dict(facts["sent"]), user_turns(facts)
    cut = {cut["reply"] for cut in facts["cuts"]}
    tally.was("answered before anything was said", any(t[1] <= user[0].begin for t in facts["taken"]), name)
    for number, turn in enumerate(user):
        kind = "ambiguous turns" if turn.ambiguous else "unambiguous turns"
        tally.was("false take-over: answered before the turn's end", turn.early is not None, name)
        tally.was(f"false take-over, {kind}", turn.early is not None, name)
        for begin, end in turn.pauses:
            over = any(begin < t[1] <= end for t in turn.taken)
            tally.was(f"false take-over in a pause, {kind}", over, name)
            length = "0.4 - 1 s" if end - begin < 1_000 else "1 - 2 s"
            tally.was(f"false take-over in a pause of {length}", over, name)
        tally.was("missed turns", not turn.taken, name)
        spare = len(turn.answers) - 1 if turn.answers else 0
        tally.was("answered again though nothing was said", spare > 0, name)
        if turn.early is None and turn.answers:
            reply, when = turn.answers[0]
            if reply not in cut:
                right = spoken(facts["text"].get(str(reply), "")) == spoken(facts["expected"][number])
                which = "later" if number else "first"
                tally.was(f"answered rightly, {which} turns", right, name)
            tally.took("end of turn to decision", when - turn.end, name)
            if reply in sent:
                tally.took("end of turn to first sound sent", sent[reply] - turn.end, name)
            if reply in first:
                tally.took("end of turn to first sound heard", first[reply] - turn.end, name)
        decision = _decided(turn.taken[0][1]) if turn.taken else None
        for k in SCORED:
            turns.mark(f"assistant's turn-taking, F1@{k}", name, decision, position(round(turn.end * 16)), k)


def _stops(facts: Facts, tally: _Tally, turns: Turns) -> None:
    """What stopped the replies, and what did not."""
    name = facts["name"]
    events = [(e["kind"], _ms(e["start"]), _ms(e["end"])) for e in facts["events"] if e["kind"] != "pause"]
    taken, cuts = dict(facts["taken"]), {cut["reply"]: cut for cut in facts["cuts"]}
    for reply in sorted(taken):
        spans = [(begin, end) for number, begin, end in facts["voices"] if number == reply]
        cut = cuts.get(reply)
        if not spans:
            continue
        until = max(spans[-1][1], cut["at"]) if cut else spans[-1][1]
        during = [event for event in events if event[1] < until and event[2] > taken[reply]]
        if not during:
            level = "no echo" if facts["echo_db"] is None else f"echo at {facts['echo_db']:.0f} dB"
            tally.was(f"false barge-in, {level}, nothing else", cut is not None, name)
        barge_in: float | None = None
        for kind, start, end in during:
            stopped = cut is not None and start < cut["at"]
            if kind == "barge_in" and taken[reply] <= start < until:
                if not stopped and until < start + OUTLASTS_MS:
                    continue
                barge_in = start
                success = cut is not None and stopped and cut["at"] <= start + STOP_WITHIN_MS
                tally.was("barge-in success", success, name)
                if cut is not None and success:
                    tally.took("barge-in to decision", cut["at"] - start, name)
                    tally.took("barge-in to last byte sent", cut["last_sent"] - start, name)
                    tally.took("barge-in to last sound played", cut["last_played"] - start, name)
            elif kind in ("backchannel", "noise"):
                what = "back-channel" if kind == "backchannel" else "noise"
                false = cut is not None and stopped and cut["at"] <= end + AFTER_MS
                tally.was(f"false barge-in, {what}", false, name)
        if barge_in is not None or all(kind != "user" for kind, *_ in during):
            event = None if barge_in is None else position(round(barge_in * 16))
            for k in SCORED:
                turns.mark(
                    f"user's turn-taking (barge-in), F1@{k}", name, _decided(cut["at"]) if cut else None, event, k
                )


def agreement(facts: Facts) -> list[tuple[str, float, float]]:
    """(what, our milliseconds, silero-vad's) of a conversation's boundaries, where it was judged.

    The user's channel is judged where neither strong noise nor the assistant's echo is near: a judge of voices would
    hear the assistant in it.
    """
    if facts["judged"] is None:
        return []
    user, assistant = facts["judged"]
    found = []
    for _, begin, end in facts["voices"]:
        if spans := _during(assistant, begin, end):
            found.append(("assistant's first sound", begin, spans[0][0]))
            found.append(("assistant's last sound", end, spans[-1][1]))
    if facts["snr_db"] is not None and facts["snr_db"] < JUDGED_SNR_DB:
        return found
    echo = [] if facts["echo_db"] is None else [(begin, end) for _, begin, end in facts["voices"]]
    for turn in user_turns(facts):
        spans = _during(user, turn.begin, turn.end)
        if not spans:
            continue
        if not _during(echo, turn.begin - NEAR_MS, turn.begin + NEAR_MS):
            found.append(("user's first sound", turn.begin, spans[0][0]))
        if not _during(echo, turn.end - NEAR_MS, turn.end + NEAR_MS):
            found.append(("user's last sound", turn.end, spans[-1][1]))
            after = [span for span in assistant if turn.end < span[0] < turn.until]
            ours = [begin for _, begin, _ in facts["voices"] if turn.end < begin < turn.until]
            if after and ours:
                found.append(("end of turn to first sound heard", ours[0] - turn.end, after[0][0] - spans[-1][1]))
    return found


def _during(spans: Sequence[Sequence[float]], begin: float, end: float) -> list[Sequence[float]]:
    """Those spans that overlap a time."""
    return [span for span in spans if span[0] < end and span[1] > begin]


def offsets(dialogues: Sequence[Facts]) -> dict[str, tuple[int, float, float]]:
    """By boundary: (n, median of silero-vad's time minus ours, 95th percentile of its distance), milliseconds."""
    pairs: dict[str, list[float]] = {}
    for facts in dialogues:
        for name, ours, judged in agreement(facts):
            pairs.setdefault(name, []).append(judged - ours)
    return {
        name: (len(d), float(np.median(d)), float(np.quantile(np.abs(d), 0.95))) for name, d in sorted(pairs.items())
    }
