"""The vocoder: mel spectrogram (50 frames a second) to 24 kHz sound, in one shot or as a stream.

HiFT, the vocoder of CosyVoice 2 (arXiv 2412.10117) that MinMo's Token2wav uses (arXiv 2501.06282, section 3.1;
design: HiFTNet, arXiv 2309.09493). A pitch predictor drives a harmonic source; transposed convolutions bring the mel to
the rate of a short inverse STFT, and the source's spectrum joins at each scale. Convolutions carry plain weights: the
weight norm of the released file is folded in when it is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minmo.config import VocoderConfig
from minmo.state import (
    Buffer,
    Lengths,
    State,
    active_lengths,
    buffer,
    full_lengths,
    join,
    masked,
    nobody,
    read_rows,
    take,
    valid,
    write_rows,
)
from minmo.token2wav.hift import PITCH_REACH, PitchPredictor, ResidualBlock
from minmo.token2wav.source import HarmonicSource
from minmo.token2wav.stft import inverse_stft, stft_weight, wide
from minmo.token2wav.streams import ENDLESS, Signal, Stream, Window

MEL_BOUND = 100.0
"""Log-mel values lie within -12 .. 8; what is beyond this bound is cut, so that no input overflows the network."""


@dataclass
class ExactState(State):
    """`exact` streaming. seeds (sessions,) int64; frames (sessions,) int64 received so far; phase (sessions,
    harmonics + 1) int64; memory (sessions, size): each convolution's left context."""

    seeds: Tensor
    frames: Tensor
    phase: Tensor
    memory: Tensor


@dataclass
class FastState(State):
    """`fast` streaming. seeds, frames, phase as in `ExactState`, done (sessions,) int64: frames through the network.

    waiting: frames of the incomplete grid unit; history (sessions, frames, n_mels) mel before it; tail (sessions,
    samples): sound of the held-back frames, to be faded out. lead: frames by which the first grid unit is short.
    """

    seeds: Tensor
    frames: Tensor
    done: Tensor
    phase: Tensor
    waiting: Buffer
    history: Tensor
    tail: Tensor
    lead: int

    def reset(self, rows: Tensor) -> None:
        super().reset(rows)
        lead = torch.full_like(rows, self.lead)
        write_rows(self.waiting.count, rows, lead)
        write_rows(self.done, rows, -lead)


class Vocoder(nn.Module):
    """mel (batch, frames, n_mels) -> sound (batch, frames * hop), within +-config.limit; hop = 480 samples."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        rates, channels = config.upsample_rates, config.base_channels
        self.hop = math.prod(rates) * config.istft_hop
        self.pitch = PitchPredictor(config.n_mels, config.f0_channels)
        self.source = HarmonicSource(config, self.hop)
        self.pre = nn.Conv1d(config.n_mels, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.source_downs = nn.ModuleList()
        self.source_blocks = nn.ModuleList()
        self.blocks = nn.ModuleList()
        spectrum = config.istft_n_fft + 2
        for i, (rate, kernel) in enumerate(zip(rates, config.upsample_kernels, strict=True)):
            self.ups.append(nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2))
            channels //= 2
            down = math.prod(rates[i + 1 :])
            width = 1 if down == 1 else 2 * down
            self.source_downs.append(nn.Conv1d(spectrum, channels, width, down, padding=down // 2 if down > 1 else 0))
            kernel = config.source_resblock_kernels[i]
            self.source_blocks.append(ResidualBlock(channels, kernel, config.resblock_dilations))
            self.blocks.append(
                nn.ModuleList(ResidualBlock(channels, k, config.resblock_dilations) for k in config.resblock_kernels)
            )
        self.post = nn.Conv1d(channels, spectrum, 7, padding=3)

    def forward(
        self, mel: Tensor, lengths: Lengths | None, seeds: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Lengths]:
        """One shot. mel (batch, frames, n_mels) natural-log mel; lengths (batch,) or None = all; seeds (batch,) int64.

        noise (batch, frames * hop, harmonics + 1), standard normal, takes the place of the seeds' noise. Returns sound
        (batch, frames * hop), fp32 or better, zeros beyond each length, and its lengths in samples.
        """
        audio, _, _, samples = self._one_shot(mel, lengths, seeds, noise)
        return masked(audio, samples), samples

    def sound_and_pitch(self, mel: Tensor, lengths: Lengths | None, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`'s sound, and f0 (batch, frames) in Hz with its gradient: what training compares."""
        audio, f0, _, samples = self._one_shot(mel, lengths, seeds, None)
        return masked(audio, samples), f0

    def excitation(
        self, mel: Tensor, lengths: Lengths | None, seeds: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What drives the filter: f0 (batch, frames) in Hz and the source signal (batch, frames * hop)."""
        _, f0, source, _ = self._one_shot(mel, lengths, seeds, noise)
        return f0, source

    @property
    def holdback(self) -> int:
        """Frames by which streamed sound lags behind the mel."""
        return _reach(self.config) if self.config.streaming == "exact" else self.config.fast_holdback

    def initial_state(self, sessions: int) -> ExactState | FastState:
        """New sessions on the module's device, for config.streaming; `start` gives each its seed."""
        c, like = self.config, self.post.weight
        count = torch.zeros(sessions, dtype=torch.int64, device=like.device)
        phase = count[:, None].repeat(1, c.harmonics + 1)
        if c.streaming == "exact":
            return ExactState(count, count.clone(), phase, like.new_zeros(sessions, _plan(c)[1]))
        state = FastState(
            seeds=count,
            frames=count.clone(),
            done=count.clone(),
            phase=phase,
            waiting=buffer(sessions, c.fast_chunk - 1, (c.n_mels,), like),
            history=like.new_zeros(sessions, self._history, c.n_mels),
            tail=torch.zeros(sessions, c.fast_holdback * self.hop, dtype=wide(like), device=like.device),
            lead=c.fast_chunk - c.fast_first_chunk,
        )
        state.reset(torch.arange(sessions, device=like.device))
        return state

    def start(self, state: ExactState | FastState, rows: Tensor, seeds: Tensor) -> ExactState | FastState:
        """Resets the named sessions and gives them their seeds. rows (n,) int32, -1 = padding; seeds (n,) int64."""
        self._check_seeds(seeds, len(rows))
        state.reset(rows)
        write_rows(state.seeds, rows, seeds)
        return state

    @torch.no_grad()
    def step(
        self, mel: Tensor, lengths: Lengths, state: ExactState | FastState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, ExactState | FastState]:
        """Adds mel frames and gives the sound that they complete; `final` gives the rest, so that hop samples come out
        for each frame.

        mel (batch, frames, n_mels); returns sound (batch, (frames + at most holdback or a grid unit) * hop).
        """
        self._check_mel(mel)
        lengths = active_lengths(lengths, rows)
        final = final & (rows >= 0)
        mel = masked(mel.to(self.post.weight.dtype), lengths)
        if isinstance(state, ExactState):
            return (*self._step_exact(mel, lengths, state, rows, final), state)
        return (*self._step_fast(mel, lengths, state, rows, final), state)

    def _step_exact(
        self, mel: Tensor, lengths: Lengths, state: ExactState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths]:
        batch, size = len(mel), self.holdback
        audio, samples = self._advance(mel, lengths, state, rows, torch.full_like(lengths, ENDLESS, dtype=torch.int64))
        rest, rest_samples = audio.new_zeros(batch, size * self.hop), torch.zeros_like(samples)
        if not nobody(final):
            silence = mel.new_zeros(batch, size, mel.shape[2])
            flushed = torch.where(final, size, 0).to(torch.int32)
            rest, rest_samples = self._advance(silence, flushed, state, rows, read_rows(state.frames, rows))
        return join(audio, samples, rest, rest_samples)

    def _advance(
        self, mel: Tensor, lengths: Lengths, state: ExactState, rows: Tensor, end: Tensor
    ) -> tuple[Tensor, Lengths]:
        """One pass of the streamed network: the sound of the frames before `end` that are now complete."""
        if not mel.shape[1]:
            return torch.zeros(len(mel), 0, dtype=wide(mel), device=mel.device), torch.zeros_like(lengths)
        frames, phase = read_rows(state.frames, rows), read_rows(state.phase, rows)
        stream = Stream(frames, end, lengths, mel.shape[1], read_rows(state.memory, rows))
        counted = valid(lengths, mel.shape[1])
        audio, _, _, advance = self._network(stream, mel, phase, counted, read_rows(state.seeds, rows))
        write_rows(state.memory, rows, stream.kept())
        write_rows(state.phase, rows, phase + (advance * counted[..., None]).sum(1))
        write_rows(state.frames, rows, frames + lengths)
        return _present(audio.data[:, 0], self.hop * frames - audio.delay, self.hop * lengths, self.hop * end)

    def _step_fast(
        self, mel: Tensor, lengths: Lengths, state: FastState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths]:
        unit, hold = self.config.fast_chunk, self.config.fast_holdback
        frames = read_rows(state.frames, rows) + lengths
        write_rows(state.frames, rows, frames)
        units, ready = state.waiting.push(mel, lengths, rows, final, unit)
        end = torch.where(final, frames, ENDLESS)
        audio = torch.zeros(len(mel), 0, dtype=wide(mel), device=mel.device)
        samples = torch.zeros_like(lengths)
        for offset in range(0, units.shape[1], unit):
            due = torch.where(ready > offset, rows, -1)
            if nobody(due >= 0):
                break
            first = read_rows(state.done, due) - hold
            sound = self._unit(units[:, offset : offset + unit], state, due, frames)
            size = torch.where(due >= 0, unit * self.hop, 0)
            audio, samples = join(audio, samples, *_present(sound, self.hop * first, size, self.hop * end))
        first = read_rows(state.done, rows) - hold
        size = torch.where(final, hold * self.hop, 0)
        tail = read_rows(state.tail, rows)
        return join(audio, samples, *_present(tail, self.hop * first, size, self.hop * end))

    def _unit(self, mel: Tensor, state: FastState, rows: Tensor, frames: Tensor) -> Tensor:
        """One grid unit of `fast`: the sound of the held-back frames and of this unit but its own held-back frames.

        It computes history and unit as if the utterance ended there, fades from the sound that the unit before gave to
        the held-back frames over to its own, and leaves the sound of its own in the state.
        """
        unit, past, held = mel.shape[1], self._history, self.config.fast_holdback * self.hop
        done, phase = read_rows(state.done, rows), read_rows(state.phase, rows)
        joined = torch.cat([read_rows(state.history, rows), mel], dim=1)
        window = Window(done - past, torch.minimum(done + unit, frames))
        # The pitch of the first frames lacks its left context: they stand before the kept phase.
        counted = torch.arange(past + unit + 1, device=mel.device)[None] >= PITCH_REACH
        padded = F.pad(joined, (0, 0, 0, 1))
        audio, _, _, advance = self._network(window, padded, phase, counted, read_rows(state.seeds, rows))
        sound = audio.data[:, 0, past * self.hop - held : (past + unit) * self.hop]
        ramp = (torch.arange(held, device=mel.device, dtype=sound.dtype) + 0.5) / held
        weight = torch.sin(0.5 * math.pi * ramp) ** 2
        faded = read_rows(state.tail, rows) * (1 - weight) + sound[:, :held] * weight
        write_rows(state.tail, rows, sound[:, -held:])
        write_rows(state.phase, rows, phase + advance[:, PITCH_REACH : PITCH_REACH + unit].sum(1))
        write_rows(state.history, rows, joined[:, unit:])
        write_rows(state.done, rows, done + unit)
        return torch.cat([faded, sound[:, held:-held]], dim=1)

    @property
    def _history(self) -> int:
        """Frames before a grid unit that `fast` computes again: the held-back ones and their left context."""
        return self.config.fast_holdback + _reach(self.config) + 1

    def _one_shot(
        self, mel: Tensor, lengths: Lengths | None, seeds: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Lengths]:
        self._check_mel(mel)
        self._check_seeds(seeds, len(mel))
        lengths = full_lengths(mel) if lengths is None else lengths
        batch, frames = mel.shape[:2]
        # One silent frame more: some signals hold an item more than their rate times the frames.
        mel = F.pad(masked(mel.to(self.post.weight.dtype), lengths), (0, 0, 0, 1))
        noise = None if noise is None else F.pad(noise, (0, 0, 0, self.hop))
        window = Window(torch.zeros_like(lengths, dtype=torch.int64), lengths.long())
        phase = torch.zeros(batch, self.config.harmonics + 1, dtype=torch.int64, device=mel.device)
        counted = torch.ones(batch, frames + 1, dtype=torch.bool, device=mel.device)
        audio, f0, source, _ = self._network(window, mel, phase, counted, seeds, noise)
        size = frames * self.hop
        samples = (lengths * self.hop).to(torch.int32)
        return audio.data[:, 0, :size], f0.data[:, 0, :frames], source.data[:, 0, :size], samples

    def _network(
        self,
        window: Window,
        mel: Tensor,
        phase: Tensor,
        counted: Tensor,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Signal, Signal, Signal, Tensor]:
        """mel (batch, frames, n_mels) -> sound, f0, source signal, and each frame's phase advance."""
        c = self.config
        x = Signal(mel.mT.clamp(-MEL_BOUND, MEL_BOUND), 1)
        f0 = self.pitch(window, x)
        source, advance = self.source(window, f0, phase, counted, seeds, noise)
        half = c.istft_n_fft // 2
        spectrum = window.convolve(window.reflect(source, half, half), stft_weight(c, mel), stride=c.istft_hop)
        x = window.conv(x, self.pre)
        for i in range(len(self.ups)):
            up = cast(nn.ConvTranspose1d, self.ups[i])
            down = cast(nn.Conv1d, self.source_downs[i])
            x = window.conv_transpose(x.map(lambda t: F.leaky_relu(t, c.lrelu_slope)), up)
            if i == len(self.ups) - 1:
                x = window.reflect(x, 1, 0)
            x = window.add(x, self.source_blocks[i](window, window.conv(spectrum, down)))
            branches = [block(window, x) for block in cast(nn.ModuleList, self.blocks[i])]
            x = reduce(window.add, branches).map(lambda t: t / len(c.resblock_kernels))
        x = window.conv(x.map(F.leaky_relu), self.post)
        return inverse_stft(window, x, c), f0, source, advance

    def _check_mel(self, mel: Tensor) -> None:
        if mel.dim() != 3 or mel.shape[2] != self.config.n_mels or not mel.is_floating_point():
            raise ValueError(
                f"mel must be floating point of shape (batch, frames, {self.config.n_mels}), "
                f"got {mel.dtype} of shape {tuple(mel.shape)}"
            )

    def _check_seeds(self, seeds: Tensor, batch: int) -> None:
        if seeds.shape != (batch,) or seeds.is_floating_point():
            raise ValueError(
                f"seeds must be integers of shape ({batch},), got {seeds.dtype} of shape {tuple(seeds.shape)}"
            )


def _present(audio: Tensor, first: Tensor, size: Tensor, end: Tensor) -> tuple[Tensor, Lengths]:
    """The part of `size` samples, at position `first`, that lies within 0 .. end, moved to the front."""
    skip = torch.minimum((-first).clamp(min=0), size)
    count = torch.minimum(first + size, end) - first - skip
    return take(audio, skip, audio.shape[1]), count.clamp(min=0).to(torch.int32)


def _reach(config: VocoderConfig) -> int:
    """Receptive field to the right, in whole frames."""
    delay, _ = _plan(config)
    return -(-delay // (math.prod(config.upsample_rates) * config.istft_hop))


@lru_cache(maxsize=16)
def _plan(config: VocoderConfig) -> tuple[int, int]:
    """(delay of the streamed sound in samples, items of memory a session), found by running a network without data."""
    with torch.device("meta"), torch.no_grad():
        vocoder = Vocoder(config)
        zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
        phase = torch.zeros(1, config.harmonics + 1, dtype=torch.int64)
        noise = torch.zeros(1, vocoder.hop, config.harmonics + 1)
        stream = Stream(zero, zero, one, 1, None)
        mel = torch.zeros(1, 1, config.n_mels)
        audio = vocoder._network(stream, mel, phase, torch.ones(1, 1, dtype=torch.bool), zero, noise)[0]
    return audio.delay, stream.size


def _check(config: VocoderConfig) -> None:
    stages = len(config.upsample_rates)
    if len(config.upsample_kernels) != stages or len(config.source_resblock_kernels) != stages:
        raise ValueError(
            f"upsample_rates, upsample_kernels and source_resblock_kernels must have the same length, "
            f"got {stages}, {len(config.upsample_kernels)} and {len(config.source_resblock_kernels)}"
        )
    for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
        if kernel < rate or (kernel - rate) % 2:
            raise ValueError(
                f"an upsample kernel must be its rate plus an even number, got kernel {kernel}, rate {rate}"
            )
    if config.istft_n_fft % (2 * config.istft_hop):
        raise ValueError(
            f"istft_n_fft must be a multiple of 2 * istft_hop, got {config.istft_n_fft} and {config.istft_hop}"
        )
    if config.streaming not in ("exact", "fast"):
        raise ValueError(f"streaming must be 'exact' or 'fast', got {config.streaming!r}")
    if not 0 < config.fast_holdback <= config.fast_chunk or not 0 < config.fast_first_chunk <= config.fast_chunk:
        raise ValueError(
            f"fast_holdback and fast_first_chunk must lie within 1 .. fast_chunk, got {config.fast_holdback}, "
            f"{config.fast_first_chunk} and {config.fast_chunk}"
        )
