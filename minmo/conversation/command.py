"""`minmo talk --duplex` and `--mic`: one conversation, with a file or with whoever sits at this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from minmo.audio import save_audio
from minmo.clock import percentile
from minmo.conversation.client import simulate
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Interrupted, ReplyDone, TextDelta
from minmo.conversation.front import FRONTS
from minmo.conversation.settings import Settings
from minmo.conversation.soundcard import converse
from minmo.conversation.turn_taking import TurnTaking
from minmo.model import MinMo

out = Console()
TOLD = ("SpeechStarted", "SpeechStopped", "TurnTaken", "ReplyDone", "Interrupted")
"""Events of a conversation that are printed."""


def with_a_file(
    load: Callable[[], MinMo],
    heard: np.ndarray,
    output: Path,
    settings: Settings,
    turn_taking: TurnTaking,
    front: str,
    *,
    realtime: bool,
) -> None:
    """A conversation with a user's sound, (n,) at 16 kHz, written as stereo sound (left the user, right the assistant)
    and a log of all events beside it."""
    conversation = Conversation(load(), settings, turn_taking)
    found = simulate(conversation, heard, realtime=realtime, front=FRONTS[front]())
    save_audio(output, found.stereo(), found.rate)
    log = output.with_suffix(".jsonl")
    log.write_text(found.json_lines(), encoding="utf-8")
    for entry in found.log:
        if entry["event"] in TOLD:
            told = ", ".join(f"{k} {v!r}" for k, v in entry.items() if k not in ("event", "at_ms") and v is not None)
            out.print(f"{entry['at_ms'] / 1e3:7.2f} s  {entry['event']}: {told}", highlight=False, markup=False)
    p50, p95 = (percentile(found.tick_ms, p) for p in (50, 95))
    out.print(
        f"tick of 80 ms: p50 {p50:.1f} ms, p95 {p95:.1f} ms, longest {max(found.tick_ms):.1f} ms", highlight=False
    )
    out.print(f"written: {output}, {log}", highlight=False, markup=False, soft_wrap=True)


def with_the_microphone(load: Callable[[], MinMo], settings: Settings, turn_taking: TurnTaking, front: str) -> None:
    """A conversation by this machine's microphone and loudspeaker, until Ctrl-C."""
    heard = FRONTS[front]()  # before the model is loaded: what it needs may be missing
    conversation = Conversation(load(), settings, turn_taking)

    def show(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, (ReplyDone, Interrupted)):
                print(" [interrupted]" if isinstance(event, Interrupted) else "", flush=True)

    out.print("listening; Ctrl-C ends it", highlight=False)
    converse(conversation, show, front=heard)
