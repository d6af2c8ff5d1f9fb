"""Many conversations at once in real time, without a network: do ticks keep their deadline, as the budget says?

    python profiling/sessions.py [--preset nano] [--weights fp32] [--sessions 1 2 4 8] [--seconds 30]

Each session asks the question of the package, a second and a half after another, and is silent while an answer may
last. Sessions beyond the measured budget run here all the same, so that its figures can be checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import minmo
from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation import BY_REQUEST, Budget, Conversation, Scheduler, Statistics
from minmo.conversation.budget import TICK_MS
from minmo.doctor import machine
from minmo.fast.linear import WEIGHTS

SOUND = Path(minmo.__file__).parent / "assets" / "question.wav"
SILENCE_S, APART_S = 5.0, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--weights", choices=WEIGHTS)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    if min(options.sessions) < 1 or options.seconds < 1:
        parser.error("--sessions and --seconds must be at least 1")
    most = max(options.sessions)
    model = minmo.FastMinMo.from_pretrained(options.preset, rows=2 * most, max_positions=2048, weights=options.weights)
    question = np.asarray(minmo.load_audio(SOUND))
    budget = Budget.measure(model, most)
    table = Table(
        *("sessions", "budget, ms of 80", "busy, ms of 80", "ticks", "tick p50/p95/p99 ms", "misses"),
        "first sound p50/p95 ms",
        title="conversations in real time",
    )
    for sessions in options.sessions:
        with Scheduler(model, budget=dataclasses.replace(budget, usable=1e9)) as scheduler:
            hold(scheduler, sessions, question, options.seconds)
            found: Statistics = scheduler.statistics()
        needed = budget.needed(sessions)
        tick, first = found.tick_ms, found.first_audio_ms
        table.add_row(
            str(sessions),
            f"{sum(needed.values()):.0f} ({', '.join(f'{name} {ms:.0f}' for name, ms in needed.items() if ms >= 1)})",
            f"{found.busy_s / options.seconds * TICK_MS:.0f}",
            str(found.ticks),
            f"{tick.p50:.0f}/{tick.p95:.0f}/{tick.p99:.0f}",
            str(found.deadline_misses),
            f"{first.p50:.0f}/{first.p95:.0f}",
        )
    console = Console(width=160)
    console.print(table)
    console.print(
        f"machine: {machine(model.device)}; weights: {model.config.name}, {model.provenance}, {model.weights}; the "
        f"budget supposes that assistants speak {budget.speaking:.0%} of the time"
    )


def hold(scheduler: Scheduler, sessions: int, question: np.ndarray, seconds: float) -> None:
    """Holds so many conversations for so long, 80 ms of sound at a time."""
    lines = [scheduler.open(lambda events: None, minmo.Settings(), BY_REQUEST) for _ in range(sessions)]
    asked = -(-len(question) // TICK)
    period = asked + round(SILENCE_S * SAMPLE_RATE / TICK)
    padded = np.pad(question, (0, period * TICK - len(question)))
    began = time.perf_counter()
    for tick in range(round(seconds * SAMPLE_RATE / TICK)):
        time.sleep(max(0.0, began + (tick + 1) * TICK / SAMPLE_RATE - time.perf_counter()))
        for number, line in enumerate(lines):
            at = (tick - round(number * APART_S * SAMPLE_RATE / TICK)) % period
            line.hear(padded[at * TICK : (at + 1) * TICK])
            if at == asked:
                line.do(stop_and_answer)


def stop_and_answer(conversation: Conversation) -> list[minmo.conversation.events.Event]:
    """The turn is over: whatever runs is cut, and the turn answered."""
    cut = conversation.stop() if conversation.speaks else []
    return [*cut, *conversation.take_turn()]


if __name__ == "__main__":
    main()
