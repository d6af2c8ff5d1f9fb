"""The conversation simulator: utterances to two-channel dialogues whose event times are known, for training and tests.

A dialogue is the user's channel (voice, noise, the assistant's echo) and the assistant's, 16 kHz. Everything is a
function of (material, conditions, seed, index): each random choice has numbers of its own (`draws`), so that changing
one condition leaves what does not depend on it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from minmo.config import SAMPLE_RATE
from minmo.data.draws import draws
from minmo.data.duplex import Event, turn_delay
from minmo.data.utterances import FRAME, Utterance, heard, trimmed, voiced, with_pause

T = TypeVar("T")
Placed = list[tuple[int, np.ndarray]]
"""Sounds and the sample at which each begins."""

BACKCHANNEL_MARGIN = SAMPLE_RATE // 2
"""Samples that a back-channel leaves before the reply's end or a barge-in."""


@dataclass(frozen=True, eq=False)
class Material:
    """What dialogues are made from: exchanges (user's turn, assistant's), back-channels ("uh-huh", "yes", "okay"),
    noises and short bursts (coughs, knocks), (n,) float32 16 kHz. Without noises and bursts, both are synthetic."""

    exchanges: Sequence[tuple[Utterance, Utterance]]
    backchannels: Sequence[Utterance] = ()
    noises: Sequence[np.ndarray] = ()
    bursts: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Conditions:
    """How dialogues are. Chances are per turn, times are drawn evenly between two bounds, levels from a list.

    snr_db: the user's voice over the noise. echo_db: the assistant's echo in the user's channel, relative to the
    assistant. burst_db: a burst relative to the user's voice. None in a list: none at all.
    """

    turns: int = 3
    pause: float = 0.5
    backchannel: float = 0.4
    barge_in: float = 0.3
    burst: float = 0.3
    pause_seconds: tuple[float, float] = (0.4, 2.0)
    reply_seconds: tuple[float, float] = (0.7, 1.2)
    """From the user's end to the assistant's first sound."""
    stop_seconds: tuple[float, float] = (0.2, 0.6)
    """From the beginning of a barge-in to where the assistant's turn is cut off."""
    lead_seconds: tuple[float, float] = (0.3, 1.5)
    tail_seconds: tuple[float, float] = (1.0, 4.0)
    """The user's silence before the first turn, and after all voices."""
    snr_db: tuple[float | None, ...] = (None, 30.0, 20.0, 10.0)
    echo_db: tuple[float | None, ...] = (None, -30.0, -20.0, -10.0)
    burst_db: tuple[float, ...] = (-6.0, 0.0, 6.0)

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"a dialogue has at least one turn, got turns={self.turns}")
        for name in ("pause", "backchannel", "barge_in", "burst"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a chance and must lie between 0 and 1, got {getattr(self, name)}")
        for name in (f.name for f in fields(self) if f.name.endswith("_seconds")):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive bounds in order, got {(low, high)}")
        for name in ("snr_db", "echo_db", "burst_db"):
            if not getattr(self, name):
                raise ValueError(f"{name} must list at least one level")


@dataclass(frozen=True, eq=False)
class Dialogue:
    """Two channels (n,) float32 and what happens in them, sorted by start (`minmo.data.duplex`); the drawn levels."""

    name: str
    user: np.ndarray
    assistant: np.ndarray
    events: tuple[Event, ...]
    snr_db: float | None
    echo_db: float | None


def simulate(material: Material, conditions: Conditions, seed: int, index: int) -> Dialogue:
    """Dialogue `index` of a seed; its user takes each turn back `turn_delay` after the assistant's end, or barges in.

    Raises ValueError for material that is empty, silent, not finite or not (n,).
    """
    if not material.exchanges:
        raise ValueError("the simulator needs at least one exchange, a user's utterance and the assistant's")
    name = f"simulated-{seed}-{index}"
    events, voices, replies = _timeline(material, conditions, name)
    length = max(e.end for e in events) + seconds(conditions.tail_seconds, name, "tail")
    user, assistant = _placed(voices, length), _placed(replies, length)
    voice = power(np.concatenate([sound for _, sound in voices]))
    for turn in range(conditions.turns):
        if draws(name, "burst", turn).random() < conditions.burst:
            level = voice * 10 ** (drawn(conditions.burst_db, name, "burst level", turn) / 10)
            sound = burst(material, name, turn)
            event = _in_silence(events, len(sound), length, draws(name, "burst place", turn))
            if event:
                user[event.start : event.end] += scaled(sound, level)
                events.append(event)
    snr_db = drawn(conditions.snr_db, name, "snr")
    if snr_db is not None:
        user += scaled(noise(material, length, name), voice / 10 ** (snr_db / 10))
    echo_db = drawn(conditions.echo_db, name, "echo level")
    if echo_db is not None:
        user += scaled(_echo(assistant, name), power(assistant) * 10 ** (echo_db / 10))
    events.sort(key=lambda event: (event.start, -event.end))
    scale = max(1.0, float(np.abs(user).max()), float(np.abs(assistant).max()))  # of both, so that levels stay
    user, assistant = (user / scale).astype(np.float32), (assistant / scale).astype(np.float32)
    return Dialogue(name, user, assistant, tuple(events), snr_db, echo_db)


def _timeline(material: Material, conditions: Conditions, name: str) -> tuple[list[Event], Placed, Placed]:
    """The voices' events, the user's voices without their pauses, and the assistant's, each with its first sample."""
    events: list[Event] = []
    voices: Placed = []
    replies: Placed = []
    now, kind = seconds(conditions.lead_seconds, name, "lead"), "user"
    for turn in range(conditions.turns):
        question, answer = map(trimmed, drawn(material.exchanges, name, "exchange", turn))
        said, pauses = question, list[Event]()
        if draws(name, "pause", turn).random() < conditions.pause:
            length = seconds(conditions.pause_seconds, name, "pause length", turn)
            said, pauses = with_pause(question, length, draws(name, "pause place", turn))
        end = now + len(said.samples)
        events.append(Event(kind, now, end, said.text))
        events += [replace(p, start=now + p.start, end=now + p.end) for p in pauses]
        cuts = [0, *(t for p in pauses for t in (p.start, p.end)), len(said.samples)]
        voices += [(now + a, said.samples[a:b]) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]

        start = end + seconds(conditions.reply_seconds, name, "reply", turn)
        barges = turn + 1 < conditions.turns and draws(name, "barge-in", turn).random() < conditions.barge_in
        if barges:
            now = start + round(len(answer.samples) * draws(name, "barge-in place", turn).uniform(0.2, 0.8))
            answer = heard(answer, now - start + seconds(conditions.stop_seconds, name, "stop", turn))
        stop = start + len(answer.samples)
        events.append(Event("assistant", start, stop, answer.text))
        replies.append((start, answer.samples))

        if material.backchannels and draws(name, "back-channel", turn).random() < conditions.backchannel:
            murmur = trimmed(drawn(material.backchannels, name, "back-channel text", turn))
            space = (now if barges else stop) - start - len(murmur.samples) - BACKCHANNEL_MARGIN
            if space > 0:
                at = start + int(draws(name, "back-channel place", turn).integers(space))
                events.append(Event("backchannel", at, at + len(murmur.samples), murmur.text))
                voices.append((at, murmur.samples))
        kind = "barge_in" if barges else "user"
        if not barges:
            now = stop + turn_delay(name, turn + 1)
    return events, voices, replies


def drawn(choices: Sequence[T], *name: str | int) -> T:
    return choices[int(draws(*name).integers(len(choices)))]


def seconds(bounds: tuple[float, float], *name: str | int) -> int:
    return round(SAMPLE_RATE * draws(*name).uniform(*bounds))


def power(sound: np.ndarray) -> float:
    return float(np.mean(sound.astype(np.float64) ** 2))


def scaled(sound: np.ndarray, to: float) -> np.ndarray:
    """With a power of `to`."""
    if not power(sound) > 0:
        raise ValueError("a noise of the material is silent over a whole dialogue; leave it out")
    return sound * np.sqrt(to / power(sound))


def _placed(voices: Placed, length: int) -> np.ndarray:
    channel = np.zeros(length)
    for start, sound in voices:
        channel[start : start + len(sound)] += sound
    return channel


def _in_silence(events: list[Event], size: int, length: int, generator: np.random.Generator) -> Event | None:
    """A place for a noise where the user's channel has none and no voice; None where there is no room."""
    taken = sorted((e.start, e.end) for e in events if e.kind not in ("assistant", "pause"))
    places, free_from = list[int](), 0
    for start, end in [*taken, (length, length)]:
        places += range(free_from, start - size, FRAME)
        free_from = max(free_from, end)
    if not places:
        return None
    at = places[int(generator.integers(len(places)))]
    return Event("noise", at, at + size)


def burst(material: Material, name: str, turn: int) -> np.ndarray:
    if material.bursts:
        sound = drawn(material.bursts, name, "burst sound", turn)
        start, end = voiced(sound)
        return sound[start:end]
    generator = draws(name, "burst sound", turn)
    size = int(generator.integers(SAMPLE_RATE // 20, SAMPLE_RATE // 4))
    return generator.standard_normal(size) * np.exp(-4 * np.arange(size) / size)


def _fast(size: int) -> int:
    """A size of Fourier transform that is as long and quick: the next power of two."""
    return 1 << (size - 1).bit_length()


def noise(material: Material, length: int, name: str) -> np.ndarray:
    """(length,): a recorded noise from a drawn place on, over and over, or pink noise."""
    generator = draws(name, "noise")
    if material.noises:
        sound = material.noises[int(generator.integers(len(material.noises)))]
        voiced(sound)
        return np.resize(np.roll(sound, -int(generator.integers(len(sound)))), length).astype(np.float64)
    spectrum = np.fft.rfft(generator.standard_normal(_fast(length)))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)))[:length]


def room(*name: str | int) -> np.ndarray:
    """From a loudspeaker to a microphone: an impulse response of 10 to 60 ms of way and a tail of 50 ms."""
    generator = draws(*name, "echo")
    tail = generator.standard_normal(5 * FRAME) * np.exp(-6 * np.arange(5 * FRAME) / (5 * FRAME))
    tail[0] = 4.0
    return np.concatenate([np.zeros(int(generator.integers(FRAME, 6 * FRAME))), tail])


def _echo(assistant: np.ndarray, name: str) -> np.ndarray:
    """The assistant through a room."""
    response = room(name)
    size = _fast(len(assistant) + len(response))
    return np.fft.irfft(np.fft.rfft(assistant, size) * np.fft.rfft(response, size), size)[: len(assistant)]
