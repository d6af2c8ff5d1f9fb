"""What a person asks of a MinMo: talk, transcribe, translate, ask, say. One turn each, single or batched."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from minmo.audio import LOUDEST, SUFFIXES, AudioError
from minmo.config import TICK
from minmo.conversation.session import Piece, Session
from minmo.conversation.settings import Settings
from minmo.conversation.steps import readable
from minmo.conversation.timings import Timings
from minmo.model import MinMo
from minmo.tokenizer.text import CHAT, READ_ALOUD, TRANSCRIBE, TextTokenizer, translation

Sound = np.ndarray
"""Mono float32 samples, (n,): 16 kHz going in, 24 kHz coming out."""

Input = Sound | str
"""A user's turn: spoken (sound) or typed (text)."""


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer. audio: 24 kHz float32, empty where none was asked for. timings are shared by a batch's replies.

    fault: why one of a batch broke off, where it did; the others are not touched by it.
    """

    text: str
    audio: Sound
    timings: Timings
    sample_rate: int = 24_000
    fault: str = ""


OnPieces = Callable[[list[Piece]], None]
"""Called with each round's pieces, one a batch entry, as they come."""


def talk(
    model: MinMo,
    audio: Input | Sequence[Input],
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    instruction: str = CHAT,
    realtime: bool = False,
    on_pieces: OnPieces = lambda pieces: None,
) -> Any:
    """A spoken (or typed) turn in, a spoken turn out.

    audio: 16 kHz mono float32 samples, or a string for a typed turn, or a sequence of either for a batch (one reply
    each, in order). It is fed in ticks of 80 ms; realtime: at the speed of speech. instruction: put before the user's
    words. on_pieces: called with text and sound as they come. Raises ValueError (AudioError for sound) for input that
    cannot be heard, and FloatingPointError where a turn that is not of a batch breaks off.
    """
    return _turn(model, audio, settings, instruction, realtime, on_pieces)


def transcribe(
    model: MinMo,
    audio: Input | Sequence[Input],
    settings: Settings = Settings(speak=False, temperature=0.0),  # noqa: B008
    **options: Any,
) -> Any:
    """What was said, as text without sound: `Reply` or a list of them. Greedy by default. Options as `talk`."""
    return _turn(model, audio, _checked(settings, speak=False), **{"instruction": TRANSCRIBE, **options})


def translate(
    model: MinMo,
    audio: Input | Sequence[Input],
    source: str,
    target: str,
    settings: Settings = Settings(speak=False, temperature=0.0),  # noqa: B008
    **options: Any,
) -> Any:
    """What was said in one language, in another. source, target: names such as "English". Options as `talk`."""
    return _turn(model, audio, settings, **{"instruction": translation(source, target), **options})


def ask(
    model: MinMo,
    question: Input | Sequence[Input],
    settings: Settings = Settings(speak=False),  # noqa: B008
    **options: Any,
) -> Any:
    """A question, spoken or typed, answered in text (and sound where settings.speak). Options as `talk`."""
    return _turn(model, question, settings, **{"instruction": CHAT, **options})


def say(
    model: MinMo,
    text: str | Sequence[str],
    settings: Settings = Settings(),  # noqa: B008
    *,
    instruction: str = READ_ALOUD,
    on_pieces: OnPieces = lambda pieces: None,
) -> Any:
    """Reads text aloud: the reply's text is given, its sound is drawn. `Reply` or a list of them."""
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("there is nothing to say: give a text that is not empty")
    tokenizer = _tokenizer(model)
    forced = [readable(tokenizer, t) for t in texts]
    longest = max(map(len, forced))
    settings = _checked(settings, speak=True, max_text_tokens=longest)
    prefix, suffix = tokenizer.turn(instruction, typed=True)
    prompts = [prefix + ids + suffix for ids in forced]
    with Session(model, len(texts), settings, max(map(len, prompts)) + longest) as session:
        session.read(prompts)
        replies = _collect(session, forced, on_pieces)
    return _alone(replies) if isinstance(text, str) else replies


def check_sound(samples: Any) -> Sound:
    """A user's sound as float32, (n,); raises AudioError in one sentence for what cannot be heard."""
    if isinstance(samples, torch.Tensor):
        if samples.device.type == "meta":
            raise AudioError("the sound is a meta tensor, which holds no samples; give real ones")
        samples = samples.detach().cpu().double().numpy() if samples.is_floating_point() else samples.cpu().numpy()
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise AudioError(
            "sound must be a one-dimensional float array of mono 16 kHz samples, got "
            f"{samples.dtype} of shape {samples.shape}; minmo.load_audio reads any file"
        )
    if len(samples) == 0:
        raise AudioError("the sound is empty; give at least one sample")
    if not np.isfinite(samples).all():
        raise AudioError("the sound holds NaN or infinite samples; repair the recording")
    if (peak := float(np.abs(samples).max())) > LOUDEST:
        raise AudioError(f"the sound has samples as large as {peak:.3g}; scale them to -1 .. 1")
    # A copy where PyTorch could not wrap the array: negative strides, memory that must not be written.
    return np.require(samples, np.float32, ["C", "W", "A"])


def _turn(
    model: MinMo,
    turns: Any,
    settings: Settings,
    instruction: str,
    realtime: bool = False,
    on_pieces: OnPieces = lambda pieces: None,
) -> Any:
    settings = _checked(settings)
    single = isinstance(turns, (str, np.ndarray, torch.Tensor))
    if not single and not isinstance(turns, (list, tuple)):
        raise ValueError(
            f"a turn is sound (minmo.load_audio reads a file) or a text, a batch a list of either; got {turns!r:.60}"
        )
    batch: list[Any] = [turns] if single else list(turns)
    if not batch:
        raise ValueError("the batch is empty; give at least one turn")
    if not isinstance(instruction, str):
        raise ValueError(f"instruction must be a text, got {type(instruction).__name__}")
    tokenizer = _tokenizer(model)
    prefixes, suffixes = zip(*(tokenizer.turn(instruction, typed=isinstance(t, str)) for t in batch), strict=True)
    for text in batch:
        if isinstance(text, str) and len(text.split()) == 1 and PurePath(text).suffix.lower() in SUFFIXES:
            raise ValueError(f"{text!r:.200} looks like a file name; give its sound: minmo.load_audio({text!r:.200})")
    typed = [readable(tokenizer, t) if isinstance(t, str) else [] for t in batch]
    sounds = [np.zeros(0, np.float32) if isinstance(t, str) else check_sound(t) for t in batch]
    content = max(len(ids) - (-len(s) // TICK) for ids, s in zip(typed, sounds, strict=True))
    positions = max(map(len, prefixes)) + content + max(map(len, suffixes)) + settings.max_text_tokens
    with Session(model, len(batch), settings, positions) as session:
        session.read(prefixes)
        session.read(typed, query=True)
        _listen(session, sounds, realtime)
        session.read(suffixes)
        replies = _collect(session, None, on_pieces)
    return _alone(replies) if single else replies


def _listen(session: Session, sounds: list[Sound], realtime: bool) -> None:
    """Feeds sound tick by tick; an entry that has run out gets nothing more."""
    began = time.perf_counter()
    for tick in range(max(-(-len(s) // TICK) for s in sounds)):
        chunks = [torch.from_numpy(s[tick * TICK : (tick + 1) * TICK]) for s in sounds]
        audio = torch.zeros(len(sounds), TICK)
        for entry, chunk in enumerate(chunks):
            audio[entry, : len(chunk)] = chunk
        lengths = torch.tensor([len(c) for c in chunks], dtype=torch.int32, device=session.device)
        last = [0 < len(s) - tick * TICK <= TICK for s in sounds]
        if realtime:
            time.sleep(max(0.0, (tick + 1) * TICK / 16_000 - (time.perf_counter() - began)))
        session.hear(audio.to(session.device), lengths, torch.tensor(last, device=session.device))


def _collect(session: Session, forced: list[list[int]] | None, on_pieces: OnPieces) -> list[Reply]:
    texts, faults = [""] * session.batch, [""] * session.batch
    sounds: list[list[Sound]] = [[] for _ in range(session.batch)]
    for pieces in session.answer(forced):
        on_pieces(pieces)
        for entry, piece in enumerate(pieces):
            texts[entry] += piece.text
            sounds[entry].append(piece.audio)
            faults[entry] = piece.fault
    rate = session.model.config.vocoder.sample_rate
    return [
        Reply(text, np.concatenate(sound), session.timings, rate, fault)
        for text, sound, fault in zip(texts, sounds, faults, strict=True)
    ]


def _alone(replies: list[Reply]) -> Reply:
    if replies[0].fault:
        raise FloatingPointError(replies[0].fault)
    return replies[0]


def _checked(settings: Settings, **changes: Any) -> Settings:
    if not isinstance(settings, Settings):
        raise ValueError(f"settings must be a minmo.Settings, got {type(settings).__name__}")
    return replace(settings, **changes)


def _tokenizer(model: MinMo) -> TextTokenizer:
    if model.tokenizer is None:
        raise ValueError(f"{model.config.name} has no tokenizer.json; load a checkpoint directory that holds one")
    return model.tokenizer
