"""Cuts to batches: sound is read, turned to features and augmented, text to ids in the layout of a conversation.

One method of `Builder` a kind of batch; `minmo/training/run.py` says which stage takes which. All drawing is seeded by
(seed, epoch, cut), so that what a cut becomes depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minmo.config import TICK, MinMoConfig
from minmo.data.dialogues import duplex_samples
from minmo.data.draws import draws
from minmo.data.duplex import SOUND, UNSUPERVISED, Sample, begun_turns, listening_context
from minmo.data.manifest import load_sound
from minmo.data.schema import DataError, events_of, layout
from minmo.state import Lengths
from minmo.token2wav.mel import HOP, RATE, mel_spectrogram
from minmo.tokenizer.frontend import FRAMES, Frontend
from minmo.tokenizer.text import TextTokenizer
from minmo.training.augment import Augment
from minmo.training.objectives.duplex import DuplexBatch
from minmo.training.objectives.recognition import SpeechBatch, Symbols
from minmo.training.objectives.sound import FlowBatch, SoundBatch
from minmo.training.objectives.text import TextBatch
from minmo.training.objectives.tokens import TokenBatch
from minmo.training.objectives.voice import VoiceBatch
from minmo.training.recipe import FlowOptions

CROP = 40
"""Mel frames of sound that the vocoder learns from at a time (0.8 s)."""
MOST_TURNS = 32
"""Samples of open turns in a batch of dialogues: each is read in a context of its own. More are drawn from."""


@dataclass
class Builder:
    """What the batches of a stage are made with.

    augment: how sound is varied, None = as it is. chunks: sizes of the encoder's chunk, of which each batch draws one;
    empty = the session's. Others as in `Recipe`.
    """

    config: MinMoConfig
    tokenizer: TextTokenizer
    augment: Augment | None = None
    seed: int = 0
    symbols: Symbols | None = None
    chunks: tuple[int, ...] = ()
    bistream_share: float = 1.0
    flow_options: FlowOptions | None = None
    epoch: int = 0
    frontend: Frontend = field(init=False)

    def __post_init__(self) -> None:
        self.frontend = Frontend(self.config.frontend)

    def generator(self, name: str) -> np.random.Generator:
        """Draws for this cut, or this batch by its first cut, in this epoch, and for no other."""
        return draws(self.seed, self.epoch, name)

    def text(self, cuts: Sequence[Any]) -> TextBatch:
        """Turns whose assistant's text is learned: spoken ones where the cuts have recordings, else typed ones."""
        layouts = [layout(cut, self.tokenizer) for cut in cuts]
        if len({cut.has_recording for cut in cuts}) > 1:
            raise DataError(
                f"{cuts[0].id} and others of its batch: some are typed, some spoken; put typed lines into "
                "data.rehearse, whose batches are their own",
                "typed and spoken",
            )
        before = [torch.tensor([*line.prefix, *(line.content or [])]) for line in layouts]
        after = [torch.tensor([*line.suffix, *line.reply]) for line in layouts]
        asked = torch.tensor([len(line.suffix) for line in layouts], dtype=torch.int32)
        mel, frames = self._features(cuts) if cuts[0].has_recording else (None, None)
        ids, lengths = padded(before)
        shared = int((ids == ids[:1]).all(dim=0)[: int(lengths.min())].cumprod(dim=0).sum())
        return TextBatch(ids, lengths, *padded(after), asked, mel, frames, self._chunk(cuts), shared)

    def speech(self, cuts: Sequence[Any]) -> SpeechBatch:
        """What was said, for recognition."""
        assert self.symbols is not None, "recognition needs the corpus's symbols"
        pairs = [self.symbols.encode(cut.custom["text"]) for cut in cuts]
        words, characters = (padded([torch.tensor(pair[i]) for pair in pairs]) for i in (0, 1))
        return SpeechBatch(*self._features(cuts), *words, *characters, self._chunk(cuts))

    def tokens(self, cuts: Sequence[Any]) -> TokenBatch:
        """Speech of users and of the assistant, the assistant's with its mel frames."""
        voiced = [cut.recording is None for cut in cuts]
        frames = [
            self._spectrogram(cut) if own else torch.zeros(0, self.config.flow.n_mels)
            for cut, own in zip(cuts, voiced, strict=True)
        ]
        return TokenBatch(self.speech(cuts), torch.tensor(voiced), padded(frames)[0])

    def voice(self, cuts: Sequence[Any]) -> VoiceBatch:
        """Conversations whose assistant's text is spoken."""
        layouts = [layout(cut, self.tokenizer) for cut in cuts]
        draws = [self.generator(cut.id).random() < self.bistream_share for cut in cuts]
        speech = padded([_speech_tokens(cut) for cut in cuts])
        prefix = torch.tensor([len(line.prefix) for line in layouts], dtype=torch.int32)
        return VoiceBatch(self.text(cuts), prefix, *speech, torch.tensor(draws))

    def flow(self, cuts: Sequence[Any]) -> FlowBatch:
        """Speech tokens of the assistant and their mel frames, with everything that is drawn."""
        assert self.flow_options is not None, "the flow's batches need its options"
        rng, o = self.generator(cuts[0].id), self.flow_options
        tokens, lengths = padded([_speech_tokens(cut) for cut in cuts])
        size = 2 * tokens.shape[1]
        mel = torch.stack([_fitted(self._spectrogram(cut), size) for cut in cuts])
        batch = len(cuts)
        longest = 2 * lengths.numpy() * o.prompt_longest * rng.random(batch)
        prompt = np.where(rng.random(batch) < o.prompt_share, longest, 0).astype(np.int32)
        noise, time = rng.standard_normal(mel.shape, dtype=np.float32), rng.random(batch, dtype=np.float32)
        drop = torch.from_numpy(rng.random(batch) < o.guidance_drop)
        streamed = bool(rng.random() < o.session_mask_share)
        given = (torch.from_numpy(noise), torch.from_numpy(time), drop, torch.from_numpy(prompt))
        return FlowBatch(tokens, lengths, mel, *given, streamed)

    def sound(self, cuts: Sequence[Any]) -> SoundBatch:
        """Crops of the assistant's sound, with its pitch."""
        crops = [self._crop(load_sound(cut, "target_recording", RATE), self.generator(cut.id)) for cut in cuts]
        audio, f0 = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
        seeds = torch.from_numpy(self.generator(cuts[0].id).integers(0, 2**62, len(cuts)))
        return SoundBatch(audio, f0, seeds)

    def duplex(self, cuts: Sequence[Any]) -> DuplexBatch:
        """Open user turns of dialogues, at most MOST_TURNS samples, with what a session has heard and said before them.

        Raises ValueError where sound would be augmented: labels are times of the sound as it is.
        """
        if self.augment is not None:
            raise ValueError("the times of a dialogue's events do not bear augmentation: remove `augment`")
        sounds = [load_sound(cut) for cut in cuts]
        turns = [(n, sample) for n, cut in enumerate(cuts) for sample in self.open_turns(cut, sounds[n])]
        if len(turns) > MOST_TURNS:
            drawn = self.generator(f"{cuts[0].id} turns").choice(len(turns), MOST_TURNS, replace=False)
            turns = [turns[i] for i in sorted(drawn)]
        return self.listened(sounds, turns)

    def listened(self, sounds: Sequence[np.ndarray], turns: Sequence[tuple[int, Sample]]) -> DuplexBatch:
        """sounds: the users' channels of dialogues, (n,) float32 16 kHz; turns: samples, each with its dialogue's
        place."""
        heard: dict[tuple[int, int], int] = {}
        """Of each stream of the encoder, a dialogue and where it began: the position where nobody needs more of it."""
        for n, sample in turns:
            spans = [*(user for user, _ in sample.closed), sample.open]
            for since, span in zip(sample.since, spans, strict=True):
                heard[n, since] = max(heard.get((n, since), 0), span.stop)
        streams = {key: place for place, key in enumerate(heard)}
        contexts = [self._context(sample, n, streams) for n, sample in turns]
        (ids, lengths), (positions, _), (stream, _) = (
            padded([torch.tensor(line) for line in lines]) for lines in zip(*contexts, strict=True)
        )
        pieces = [torch.from_numpy(sounds[n][TICK * since : TICK * stop]) for (n, since), stop in heard.items()]
        turn_taking, opened = padded([torch.from_numpy(s.turn_taking) for _, s in turns], UNSUPERVISED)
        barge_in, _ = padded([torch.from_numpy(s.barge_in) for _, s in turns], UNSUPERVISED)
        mel, frames = self.frontend(*padded(pieces))
        return DuplexBatch(mel, frames, ids, positions, stream, lengths, opened, turn_taking, barge_in)

    def open_turns(self, cut: Any, sound: np.ndarray) -> list[Sample]:
        """The samples of a dialogue whose user's channel is `sound`, as far as this model remembers exchanges."""
        mel, _ = self.frontend(*padded([torch.from_numpy(sound)]))
        complete = len(sound) // TICK
        bands = mel[0, : complete * FRAMES].unflatten(0, (complete, FRAMES)).mean(dim=1).numpy()
        begun = begun_turns(bands, events_of(cut), len(sound))
        most, found = self.config.remembered, []
        for sample in duplex_samples(cut, begun):
            # The one whose reply is running counts among those that are remembered only where there are any.
            kept = most + sample.replying if most else 0
            gone = max(0, len(sample.closed) - kept)
            found.append(replace(sample, closed=sample.closed[gone:], since=sample.since[gone:]))
        return found

    def _context(
        self, sample: Sample, dialogue: int, streams: dict[tuple[int, int], int]
    ) -> tuple[list[int], list[int], list[int]]:
        """What the LLM has read -> ids; and where there is sound, its position in its stream, and that one's place."""
        ids, positions = listening_context(self.tokenizer, sample.closed, sample.open)
        spans = [*(user for user, _ in sample.closed), sample.open]
        since = {p: begun for begun, span in zip(sample.since, spans, strict=True) for p in span}
        places = [0 if p == SOUND else streams[dialogue, since[p]] for p in positions]
        return ids, [p if p == SOUND else p - since[p] for p in positions], places

    def _chunk(self, cuts: Sequence[Any]) -> int | None:
        return int(self.generator(f"{cuts[0].id} chunk").choice(self.chunks)) if self.chunks else None

    def _features(self, cuts: Sequence[Any]) -> tuple[Tensor, Lengths]:
        """Log-mel frames of what is said, the user's or else the assistant's -> (batch, frames, n_mels), lengths."""
        mel, counts = self._mel(cuts)
        if self.augment is None or self.epoch < self.augment.from_epoch:
            return mel, counts
        silence = (self.config.frontend.floor + 4) / 4
        varied = [
            # The assistant's voice stays as it is: its mel frames must be rebuilt from its tokens, in step.
            m[:n] if cut.recording is None else self.augment(m[:n], silence, self.generator(cut.id))
            for m, n, cut in zip(mel, counts, cuts, strict=True)
        ]
        return padded(varied)

    def _mel(self, cuts: Sequence[Any]) -> tuple[Tensor, Lengths]:
        """Of the sound as it is."""
        sounds = [load_sound(cut, "target_recording" if cut.recording is None else "recording") for cut in cuts]
        return self.frontend(*padded([torch.from_numpy(sound) for sound in sounds]))

    def _spectrogram(self, cut: Any) -> Tensor:
        """Of the assistant's sound, (frames, n_mels), an even number of frames: two a speech token."""
        sound = torch.from_numpy(load_sound(cut, "target_recording", RATE))
        return mel_spectrogram(
            torch.nn.functional.pad(sound, (0, -len(sound) % (4 * HOP)))[None], self.config.flow.n_mels
        )[0]

    def _crop(self, sound: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        import pyworld

        sound = np.pad(sound, (0, max(0, (CROP + 1) * HOP - len(sound))))
        first = int(rng.integers(0, len(sound) // HOP - CROP))
        piece = sound[first * HOP : (first + CROP) * HOP]
        wide = piece.astype(np.float64)
        f0, times = pyworld.dio(wide, RATE, frame_period=1000 * HOP / RATE)
        return piece, pyworld.stonemask(wide, f0, times, RATE)[:CROP].astype(np.float32)


def padded(items: Sequence[Tensor], fill: float = 0) -> tuple[Tensor, Lengths]:
    """Tensors (n_i, ...) -> (batch, max n_i, ...), `fill` beyond, and the lengths int32."""
    lengths = torch.tensor([len(item) for item in items], dtype=torch.int32)
    return pad_sequence(list(items), batch_first=True, padding_value=fill), lengths


def _speech_tokens(cut: Any) -> Tensor:
    if not cut.custom.get("speech_tokens"):
        fix = "minmo tokenize MANIFEST OUTPUT --preset MODEL writes them"
        raise DataError(f"cut {cut.id}: speech_tokens are missing; {fix}", "missing speech_tokens")
    return torch.tensor(cut.custom["speech_tokens"], dtype=torch.int32)


def _fitted(mel: Tensor, frames: int) -> Tensor:
    return torch.nn.functional.pad(mel[:frames], (0, 0, 0, max(0, frames - len(mel))))
