"""A simulated user who hears the assistant: asks, waits for the answer, interrupts or murmurs while it really sounds.

What is said, with which pauses, noise and echo is drawn as the simulator draws it, before the conversation begins; when
things happen depends on what the assistant does, and is known to the sample afterwards (`events`, as in
`minmo.data.duplex`). Everything is a function of (material, conditions, seed, index) and of what was played.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from minmo.config import SAMPLE_RATE, TICK
from minmo.data.draws import draws
from minmo.data.duplex import Event, turn_delay
from minmo.data.simulator import Conditions, Material, burst, drawn, noise, power, room, scaled, seconds
from minmo.data.utterances import FRAME, Utterance, trimmed, with_pause

LIVE = Conditions(barge_in=0.45, backchannel=0.2, burst=0.15)
"""One thing at most happens in a reply, so that what stops it is known: here in four of five."""
PATIENCE = 4 * SAMPLE_RATE
"""Samples that a user waits for an answer before asking something else."""
TURN_SILENCE = 2 * SAMPLE_RATE // 5
"""Samples of the assistant's silence from which a reply counts as over, at least."""
AUDIBLE = 1e-3
"""Root mean square of a frame of 10 ms from which the assistant sounds: -60 dB of full scale."""
BARGE_IN_AFTER, MURMUR_AFTER = (0.2, 0.7), (0.2, 0.7)
"""Seconds of a reply that are heard before it is interrupted, and before a murmur or a noise."""
STOP_WITHIN_MS, OUTLASTS_MS = 2_000.0, 1_000.0
"""An interruption has succeeded where it stops the reply within the first; it did not have to where the reply ends by
itself within the second."""
NOISE_SECONDS = 30


class _Doing(Enum):
    WAITING = "waits for its time to speak"
    SPEAKING = "speaks"
    EXPECTING = "expects an answer"
    HEARING = "hears the answer"
    OVER = "has nothing more to say"


@dataclass(frozen=True, eq=False)
class _Turn:
    """said: with its pauses (events from its own begin). during: what happens in the reply, and sound, its samples;
    after: samples of the reply that are heard before. delay: from the reply's end to the next turn."""

    said: Utterance
    pauses: list[Event]
    during: str
    after: int
    sound: np.ndarray
    murmur: str
    delay: int


class ReactiveUser:
    """Called with what the loudspeaker plays in the next 80 ms, gives the microphone's sound, (TICK,) float32, 16 kHz;
    None once all is said and answered, or waited for.

    events: what happened, sorted by start; a turn that was interrupted by nothing is kind "user", one that interrupts
    "barge_in". answers: what each turn in its order should be answered. snr_db, echo_db: what was drawn.
    """

    def __init__(self, material: Material, conditions: Conditions, seed: int, index: int) -> None:
        if conditions.barge_in + conditions.backchannel + conditions.burst > 1:
            raise ValueError("one thing at most happens in a reply: barge_in + backchannel + burst must not exceed 1")
        self.name = f"reactive-{seed}-{index}"
        exchanges = [drawn(material.exchanges, self.name, "exchange", n) for n in range(conditions.turns)]
        questions, self.answers = [trimmed(asked) for asked, _ in exchanges], [answer.text for _, answer in exchanges]
        level = power(np.concatenate([q.samples for q in questions]))
        self._turns = [self._planned(q, n, level, material, conditions) for n, q in enumerate(questions)]
        self.snr_db = drawn(conditions.snr_db, self.name, "snr")
        self.echo_db = drawn(conditions.echo_db, self.name, "echo level")
        self._noise = np.zeros(NOISE_SECONDS * SAMPLE_RATE)
        if self.snr_db is not None:
            self._noise = scaled(noise(material, len(self._noise), self.name), level / 10 ** (self.snr_db / 10))
        self._room = np.zeros(1)
        if self.echo_db is not None:
            voice = trimmed(exchanges[0][1]).samples
            response = room(self.name)
            gain = power(np.convolve(voice, response)[: len(voice)]) / power(voice)
            self._room = response * np.sqrt(10 ** (self.echo_db / 10) / gain)
        self._heard = np.zeros(len(self._room) - 1 + TICK)
        self._tail = seconds(conditions.tail_seconds, self.name, "tail")
        self.events: list[Event] = []
        self._placed: list[tuple[int, np.ndarray]] = []
        self._now, self._turn, self._doing = 0, 0, _Doing.WAITING
        self._kind, self._until = "user", seconds(conditions.lead_seconds, self.name, "lead")
        self._sounds, self._reply_began, self._silent_since, self._happened = False, 0, 0, False

    def _planned(
        self, question: Utterance, turn: int, level: float, material: Material, conditions: Conditions
    ) -> _Turn:
        said, pauses, name = question, list[Event](), self.name
        if draws(name, "pause", turn).random() < conditions.pause:
            length = seconds(conditions.pause_seconds, name, "pause length", turn)
            said, pauses = with_pause(question, length, draws(name, "pause place", turn))
        chance, during = draws(name, "during", turn).random(), ""
        for kind, share in (
            ("barge_in", conditions.barge_in if turn + 1 < conditions.turns else 0.0),
            ("backchannel", conditions.backchannel if material.backchannels else 0.0),
            ("noise", conditions.burst),
        ):
            if not during and chance < share:
                during = kind
            chance -= share
        sound, murmur = np.zeros(0), ""
        if during == "backchannel":
            utterance = trimmed(drawn(material.backchannels, name, "back-channel text", turn))
            sound, murmur = utterance.samples, utterance.text
        elif during == "noise":
            loudness = level * 10 ** (drawn(conditions.burst_db, name, "burst level", turn) / 10)
            sound = scaled(burst(material, name, turn), loudness)
        after = seconds(BARGE_IN_AFTER if during == "barge_in" else MURMUR_AFTER, name, "after", turn)
        return _Turn(said, pauses, during, after, sound, murmur, turn_delay(name, turn + 1))

    def __call__(self, played: np.ndarray) -> np.ndarray | None:
        begin = self._now
        for frame in played.reshape(-1, FRAME):
            self._hear(float(np.sqrt(np.mean(frame.astype(np.float64) ** 2))) >= AUDIBLE)
            self._act()
            self._now += FRAME
        if self._doing is _Doing.OVER and self._now >= self._until:
            return None
        channel = np.take(self._noise, np.arange(begin, begin + TICK), mode="wrap")
        for start, sound in self._placed:
            piece = sound[max(0, begin - start) : max(0, begin + TICK - start)]
            at = max(0, start - begin)
            channel[at : at + len(piece)] += piece
        self._placed = [(start, sound) for start, sound in self._placed if start + len(sound) > begin + TICK]
        self._heard = np.concatenate([self._heard[TICK:], played])
        if self.echo_db is not None:
            channel += np.convolve(self._heard, self._room, mode="valid")
        return np.clip(channel, -1, 1).astype(np.float32)

    def _hear(self, sounds: bool) -> None:
        """Whether the assistant sounds in this frame."""
        if self._sounds and not sounds:
            self._silent_since = self._now
        self._sounds = sounds

    def _act(self) -> None:
        turn, now = self._turns[min(self._turn, len(self._turns) - 1)], self._now
        if self._doing is _Doing.WAITING and now >= self._until:
            self._say(turn)
        elif self._doing is _Doing.SPEAKING and now >= self._until:
            self._doing, self._until = _Doing.EXPECTING, now + PATIENCE
        elif self._doing is _Doing.EXPECTING:
            if self._sounds:
                self._doing, self._reply_began, self._happened = _Doing.HEARING, now, False
            elif now >= self._until:
                self._next(now)
        elif self._doing is _Doing.HEARING:
            if self._sounds and turn.during and not self._happened and now - self._reply_began >= turn.after:
                self._happen(turn)
            elif not self._sounds and now - self._silent_since >= max(TURN_SILENCE, turn.delay):
                self._next(now)

    def _say(self, turn: _Turn) -> None:
        now, said = self._now, turn.said
        self.events.append(Event(self._kind, now, now + len(said.samples), said.text))
        self.events += [replace(p, start=now + p.start, end=now + p.end) for p in turn.pauses]
        self._placed.append((now, said.samples))
        self._doing, self._until = _Doing.SPEAKING, now + len(said.samples)

    def _happen(self, turn: _Turn) -> None:
        """What was planned for this reply happens now."""
        self._happened = True
        if turn.during == "barge_in":
            self._next(self._now, "barge_in")
            self._act()
            return
        self.events.append(Event(turn.during, self._now, self._now + len(turn.sound), turn.murmur))
        self._placed.append((self._now, turn.sound))

    def _next(self, at: int, kind: str = "user") -> None:
        """The next turn is due at a sample, or all is said."""
        self._turn, self._kind = self._turn + 1, kind
        over = self._turn >= len(self._turns)
        self._doing, self._until = (_Doing.OVER, at + self._tail) if over else (_Doing.WAITING, at)
