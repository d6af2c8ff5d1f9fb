"""A conversation with a person at this machine: its microphone and its loudspeaker, in real time (extra `mic`).

The sound card's thread only copies samples, 10 ms at a time; all work is done in the thread that called. The microphone
hears the loudspeaker: wear headphones, or let echo control stand before the conversation (`front`).
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import numpy as np

from minmo.audio import Resampler
from minmo.config import TICK
from minmo.conversation.client import Loudspeaker, Player
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Event, Fault, Interrupted, Sound, TurnTaken
from minmo.conversation.front import Front, as_it_is, installed

BLOCK_SECONDS = 0.01
BEHIND_SECONDS, SILENT_SECONDS, FORGET_SECONDS = 2, 5, 10
"""The microphone's sound that may wait before a machine counts as too slow; how long none may come before it counts as
gone; and how long what was played is kept."""


def converse(
    conversation: Conversation,
    on_events: Callable[[list[Event]], None],
    *,
    front: Front = as_it_is,
    seconds: float | None = None,
) -> None:
    """Talks until interrupted (Ctrl-C), or for so many seconds of sound; `on_events` is told what happens.

    The card runs at the replies' rate for both. Raises ValueError where there is no sound card or sounddevice, and
    where the machine falls 2 s behind; FloatingPointError where the conversation breaks off.
    """
    cards = installed("sounddevice", "a microphone", "mic")
    rate = conversation.rate
    player, resampler = Player(rate), Resampler(rate)
    loudspeaker = Loudspeaker(player)
    recorded: queue.Queue[np.ndarray] = queue.Queue()
    clock, reply = 0, -1  # samples of the card, which its thread alone counts; the newest reply

    def on_block(heard: np.ndarray, played: np.ndarray, frames: int, time: Any, status: Any) -> None:
        nonlocal clock
        played[:, 0] = player.window(clock, clock + frames)
        clock += frames
        recorded.put(heard[:, 0].copy())

    def receive(events: list[Event]) -> None:
        nonlocal reply
        for event in events:
            if isinstance(event, Fault):
                raise FloatingPointError(event.why)
            if isinstance(event, TurnTaken):
                reply = event.reply
                player.forget(clock - FORGET_SECONDS * rate)
            elif isinstance(event, Sound):
                player.receive(clock, event.reply, event.audio)
            elif isinstance(event, Interrupted):
                player.stop(clock)
        on_events(events)

    try:
        stream = cards.Stream(
            samplerate=rate, blocksize=round(BLOCK_SECONDS * rate), channels=1, dtype="float32", latency="low",
            callback=on_block,
        )  # fmt: skip
    except (cards.PortAudioError, ValueError) as error:
        raise ValueError(f"the sound card gives no microphone and loudspeaker at {rate} Hz: {error}") from None
    waiting = np.zeros(0, np.float32)
    with stream:
        while seconds is None or conversation.now_ms < 1e3 * seconds:
            while len(waiting) < TICK:
                if conversation.next_step and recorded.empty():
                    receive(conversation.step())
                    continue
                try:
                    block = recorded.get(timeout=SILENT_SECONDS)
                except queue.Empty:
                    raise ValueError(
                        f"the microphone has given nothing for {SILENT_SECONDS} s: is it still there?"
                    ) from None
                waiting = np.concatenate([waiting, resampler.push(block)])
            if recorded.qsize() * BLOCK_SECONDS > BEHIND_SECONDS:
                raise ValueError(f"this machine is {BEHIND_SECONDS} s behind the microphone: end what else it does")
            near, waiting = np.clip(waiting[:TICK], -1, 1), waiting[TICK:]
            if reply >= 0:
                conversation.played(reply, 1e3 * player.played(reply, clock) / rate)
            receive(conversation.tick(front(near, loudspeaker.tick())))
