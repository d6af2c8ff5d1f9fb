"""What full duplex is like, for people: a Markdown page beside the paper's Table 22, and two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from minmo.config import SAMPLE_RATE
from minmo.evaluation.duplex_scores import AGREES_MS, LIVE, offsets, user_turns
from minmo.evaluation.paper import turn_taking
from minmo.evaluation.report import cells
from minmo.evaluation.results import Results
from minmo.evaluation.turns import SCORED
from minmo.fast.profile import figures

Facts = dict[str, Any]
COLOURS = {"user": "tab:green", "barge_in": "tab:red", "backchannel": "tab:orange", "noise": "tab:brown"}


def markdown(results: Results, dialogues: Sequence[Facts]) -> str:
    about = results.about
    clock = "real time" if about["realtime"] else "simulated: work takes no time, so compute is not in the latencies"
    seconds = sum(facts["seconds"] for facts in dialogues)
    lines = [
        "# Full duplex",
        "",
        f"{about['model']}: {about['weights']}{'' if about['trained'] else ' (UNTRAINED: the scores mean nothing)'}; "
        f"{len(dialogues)} conversations, {seconds / 60:.1f} minutes, seed {about['seed']}, eagerness "
        f"{about['eagerness']}, front {about['front']}. Clock: {clock}. Intervals: 95 %, bootstrap over conversations.",
        "",
    ]
    if about["realtime"]:
        ticks = [facts["tick_ms"] for facts in dialogues]
        worst = max(t["p99"] for t in ticks)
        median = float(np.median([t["p50"] for t in ticks]))
        lines += [f"A tick of 80 ms took {median:.1f} ms (median), p99 of the worst {worst:.1f} ms.", ""]
    for material in dict.fromkeys(row.material for row in results.rows):
        lines += [f"## {material[0].upper()}{material[1:]}", "", "| measure | score | 95 % | conversations | of |"]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {row.measure} | {cells(row.score)} | {row.score.n} | {row.score.of} |"
            for row in results.rows
            if row.material == material
        ]
        lines += [""]
    return "\n".join(lines + _paper(results) + _judged(dialogues) + [f"Left out: {x}" for x in results.left_out]) + "\n"


def _paper(results: Results) -> list[str]:
    """The three measures beside the paper's."""
    found = {(row.material == LIVE, row.measure): row.score.value for row in results.rows}

    def scores(live: bool, name: str) -> str:
        values = [found.get((live, f"{name}, F1@{k}")) for k in SCORED]
        return " / ".join("-" if v is None else f"{v:.4f}" for v in values)

    passed, stopped = found.get((False, "back-channels let pass")), found.get((True, "false barge-in, back-channel"))
    accuracies = ["-" if passed is None else f"{passed:.4f}", "-" if stopped is None else f"{1 - stopped:.4f}"]
    answer, stop = (scores(True, name) for name in ("assistant's turn-taking", "user's turn-taking (barge-in)"))
    lines = ["## Beside the paper's Table 22", ""]
    lines += ["| | assistant's turn-taking F1@1/5/10 | user's turn-taking F1@1/5/10 | back-channel accuracy |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| predictor, position by position | {scores(False, 'end of turn')} | {scores(False, 'barge-in')} | "
        f"{accuracies[0]} |",
        f"| live conversations (barge-ins alone) | {answer} | {stop} | {accuracies[1]} |",
    ]
    for name, (answers, stops, accuracy) in turn_taking().items():
        cells = (" / ".join(f"{v:.4f}" for v in values) for values in (answers, stops))
        lines += [f"| MinMo 8B, {name} (quoted) | {' | '.join(cells)} | {'-' if accuracy is None else accuracy} |"]
    return [*lines, "", "Quoted figures: arXiv 2501.06282, other data and a model of 8 billion parameters.", ""]


def _judged(dialogues: Sequence[Facts]) -> list[str]:
    """Whether silero-vad, from the recorded sound, agrees with the times that the scores rest on."""
    lines = ["## The times, judged by silero-vad from the recorded sound", ""]
    found = offsets(dialogues)
    if not found:
        return [*lines, "Not judged.", ""]
    lines += ["| what | n | silero-vad minus ours, median ms | 95 % of differences within, ms | median within 100 ms |"]
    lines += ["|---|---|---|---|---|"]
    for name, (n, median, spread) in found.items():
        verdict = "yes" if abs(median) <= AGREES_MS else "NO"
        lines += [f"| {name} | {n} | {median:+.0f} | {spread:.0f} | {verdict} |"]
    return [*lines, ""]


def draw(dialogues: Sequence[Facts], about: dict[str, Any], folder: Path) -> None:
    """Writes latency.png and example.png, of the conversation in which most happened."""
    figure = figures().Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    answers: dict[str, list[float]] = {"decision": [], "first sound heard": []}
    stops: list[float] = []
    for facts in dialogues:
        first = {reply: begin for reply, begin, _ in reversed(facts["voices"])}
        starts = [e["start"] * 1e3 / SAMPLE_RATE for e in facts["events"] if e["kind"] == "barge_in"]
        for turn in user_turns(facts):
            if turn.early is None and turn.answers:
                reply, when = turn.answers[0]
                answers["decision"].append(when - turn.end)
                if reply in first:
                    answers["first sound heard"].append(first[reply] - turn.end)
        for cut in facts["cuts"]:
            before = [s for s in starts if s < cut["at"] <= s + 2_000]
            if before and cut["last_played"] is not None:
                stops.append(cut["last_played"] - before[-1])
    for name, values in (*((f"end of turn to {n}", v) for n, v in answers.items()), ("barge-in to last sound", stops)):
        if values:
            at = np.sort(values)
            axes.step(at, np.arange(1, len(at) + 1) / len(at), where="post", label=f"{name} (n = {len(at)})")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of turns")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{about['model']}, {'real time' if about['realtime'] else 'simulated clock, without compute'}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(folder / "latency.png", dpi=120)
    if dialogues:
        _example(max(dialogues, key=lambda facts: (len(facts["cuts"]) > 0, len(facts["events"]))), folder)


def _example(facts: Facts, folder: Path) -> None:
    """Both channels as spectrograms, with what happened."""
    sound, rate = soundfile.read(folder / "sound" / f"{facts['name']}.flac", dtype="float32", always_2d=True)
    sound += 1e-6 * np.random.default_rng(0).standard_normal(sound.shape)  # silence has no decibels
    figure = figures().Figure(figsize=(14, 6), layout="constrained")
    for place, (axes, name) in enumerate(zip(figure.subplots(2, sharex=True), ("user", "assistant"), strict=True)):
        axes.specgram(sound[:, place], NFFT=512, noverlap=256, Fs=rate, vmin=-140, vmax=-30, cmap="magma")
        axes.set_ylim(0, 8_000)
        axes.set_ylabel(f"{name}, Hz")
    user, assistant = figure.axes
    shown = [event for event in facts["events"] if event["kind"] in COLOURS]
    for n, event in enumerate(shown):
        begin, end = event["start"] / SAMPLE_RATE, event["end"] / SAMPLE_RATE
        user.axvspan(begin, end, ymin=0.94, color=COLOURS[event["kind"]])
        user.text(begin, 6_900 - n % 2 * 500, f"{event['kind']} {event['text']}", color="white", fontsize=7)
    for reply, when in facts["taken"]:
        assistant.axvline(when / 1e3, color="tab:green")
        assistant.text(
            when / 1e3, 7_400 - reply % 2 * 500, facts["text"].get(str(reply), ""), color="white", fontsize=7
        )
    for cut in facts["cuts"]:
        assistant.axvline(cut["at"] / 1e3, color="tab:red", linestyle="--")
    assistant.set_xlabel("seconds; green: turn taken, red: reply stopped")
    user.set_title(f"{facts['name']}: noise {_level(facts['snr_db'])}, echo {_level(facts['echo_db'])}")
    figure.savefig(folder / "example.png", dpi=110)


def _level(db: float | None) -> str:
    return "none" if db is None else f"{db:g} dB"
