"""How many conversations a machine can hold: what a step costs for a batch, and what all of them need in 80 ms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minmo.config import SAMPLE_RATE, TICK
from minmo.fast.engine import FastMinMo

TICK_MS = 1e3 * TICK / SAMPLE_RATE
SPEECH_TOKEN_MS = 40.0
WORDS = 1 / 3
"""Text tokens of a transcript for each 80 ms that the user speaks."""
PARTS = {
    "tick": ("encoder", "listen"),
    "read": ("prefill",),
    "write": ("text token",),
    "speak": ("speech block",),
    "flow": ("flow",),
    "sound": ("first sound",),
    "end": ("end of sound",),
}
"""The parts of `FastMinMo.rehearse` that make a step; of text tokens a block has several, and "sound" is the longest
piece of one."""


@dataclass(frozen=True)
class Budget:
    """What steps cost, in milliseconds by batch size, and what sessions do.

    tick: 80 ms of sound are heard; read: `prefill` positions of context; write: a block of text; speak: the tokens of a
    block of speech, of `block_ms`; flow: their mel frames; sound: one of the `pieces` of their sound; end: what the
    vocoder holds back. prefill: positions of a read; block_tokens: text tokens of a block. speaking: share of the time
    that a session's assistant speaks.

    usable: share of the time that may be planned for; the rest is for what steps do beside computing, and for chance.
    Measured with nano on two cores of an AMD EPYC, sockets and users on the same: four users, who needed about .58, had
    0 of 1,493 ticks late in two runs and 6 in a third; six, who needed .68, had 20 of 2,243.
    """

    tick: Mapping[int, float]
    read: Mapping[int, float]
    write: Mapping[int, float]
    speak: Mapping[int, float]
    flow: Mapping[int, float]
    sound: Mapping[int, float]
    end: Mapping[int, float]
    block_ms: float = 600.0
    pieces: int = 2
    block_tokens: int = 5
    prefill: int = 64
    speaking: float = 0.5
    usable: float = 0.65

    @classmethod
    def measure(cls, model: FastMinMo, most: int, repeats: int = 3) -> Budget:
        """Measures an engine in which nobody sits, for up to `most` sessions: the least of some rounds after a first
        one, at batch sizes 1, 2, 4, … until ticks alone would take all the time."""
        c = model.config.voice_decoder
        found: dict[str, dict[int, float]] = {step: {} for step in PARTS}
        size = 1
        while True:
            rounds = [dict(model.rehearse(size)) for _ in range(1 + repeats)][1:]
            for step, parts in PARTS.items():
                seconds = min(sum(r[part] for part in parts) for r in rounds)
                found[step][size] = 1e3 * seconds * (c.semantic_block if step == "write" else 1)
            if size >= most or found["tick"][size] > TICK_MS:
                break
            size = min(2 * size, most)
        return cls(
            *(found["tick"], found["read"], found["write"]),
            *(found["speak"], found["flow"], found["sound"], found["end"]),
            block_ms=c.speech_block * SPEECH_TOKEN_MS,
            pieces=math.ceil(2 * model.config.flow.chunk / model.config.flow.first_frames),
            block_tokens=c.semantic_block,
            prefill=model.prefill,
        )

    def cost(self, step: str, size: int) -> float:
        """Milliseconds of a step for a batch: between the sizes that were measured by linear interpolation, beyond them
        in proportion."""
        costs: Mapping[int, float] = getattr(self, step)
        below = max((s for s in costs if s <= size), default=min(costs))
        above = min((s for s in costs if s >= size), default=None)
        if above is None:
            return costs[below] * size / below
        if above == below:
            return costs[below]
        if below > size:
            return costs[below]
        return costs[below] + (costs[above] - costs[below]) * (size - below) / (above - below)

    def most(self, step: str, within_ms: float, wanted: int) -> int:
        """The largest batch, of so many that want it, whose step takes no longer than that; one at least."""
        size = 1
        while size < wanted and self.cost(step, size + 1) <= within_ms:
            size += 1
        return size

    def needed(self, sessions: int, transcribed: int = 0) -> dict[str, float]:
        """Milliseconds in every 80 that so many sessions need, by step, where some have their users transcribed."""
        blocks = sessions * self.speaking * TICK_MS / self.block_ms
        batch = max(1, math.ceil(blocks))
        block = self.cost("speak", batch) + self.cost("flow", batch) + self.pieces * self.cost("sound", batch)
        heard = transcribed * (1 - self.speaking)
        return {
            "ticks": self.cost("tick", sessions) if sessions else 0.0,
            "speech": blocks * block / batch,
            "text": blocks * self.cost("write", batch) / batch,
            "context": sessions * self.speaking * self.cost("read", 1) / self.prefill,
            "transcripts": heard
            * (self.cost("read", 1) / self.prefill + WORDS * self.cost("write", 1) / self.block_tokens),
        }

    def shortage(self, sessions: int, transcribed: int = 0) -> str:
        """What so many sessions would need that there is not, the empty text where they can be served in time."""
        needed = self.needed(sessions, transcribed)
        total, room = sum(needed.values()), self.usable * TICK_MS
        if total <= room:
            return ""
        parts = ", ".join(f"{name} {ms:.0f}" for name, ms in needed.items() if ms >= 0.5)
        return f"{total:.0f} ms of every {TICK_MS:.0f} ms ({parts}), of which {room:.0f} may be planned for"
