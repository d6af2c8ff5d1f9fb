"""A batch of sessions on one model and its 80 ms clock: read text, hear sound, answer with text and sound.

Each entry of the batch is one session with its own row of every state; entries may start, end and fall silent at
different times, and none changes another's output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import minmo_kernels as mk
from minmo.clock import now
from minmo.config import TICK, is_real, is_whole
from minmo.conversation import timings as T
from minmo.conversation.beside import beside
from minmo.conversation.timings import Clock, Timings
from minmo.model import MOST_POSITIONS, MinMo, MinMoState, SpeakingState
from minmo.state import all_rows, join_all, read_rows, take, valid, write_rows
from minmo.tokenizer.text import TextStream

TEXT_STREAM = 1
"""Random stream of text sampling (the voice decoder and token2wav have their own)."""


@dataclass(frozen=True)
class Settings:
    """How a reply is drawn and how long it may get.

    temperature 0 is greedy. max_text_tokens bounds the reply's text, max_speech_ratio its speech: speech tokens (40 ms)
    a text token, CosyVoice 2's 20 by default. seed: all randomness of a session: one for every entry of a batch, or one
    each. Raises ValueError for values of the wrong type or out of range.
    """

    seed: int | tuple[int, ...] = 0
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    voice_temperature: float = 1.0
    voice_top_k: int = 25
    voice_top_p: float = 0.8
    max_text_tokens: int = 128
    max_speech_ratio: int = 20
    speak: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.speak, bool):
            raise ValueError(f"speak must be True or False, got {self.speak!r}")
        seeds = self.seed if isinstance(self.seed, (tuple, list)) else (self.seed,)
        if not all(is_whole(s) and -(2**63) <= s < 2**63 for s in seeds):
            raise ValueError(f"seed must be a 64-bit integer, or one for each entry, got {self.seed!r}")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("voice_temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("voice_top_p", 0.0, 1.0),
            ("top_k", 0, 2**31 - 1),
            ("voice_top_k", 0, 2**31 - 1),
            ("max_text_tokens", 1, 100_000),
            ("max_speech_ratio", 3, 1_000),
        ):
            value: Any = getattr(self, name)
            kind = type(low)
            if not (is_whole(value) if kind is int else is_real(value)):
                raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'}, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
            object.__setattr__(self, name, kind(value))

    def seeds(self, batch: int) -> list[int]:
        """A seed for each entry. Raises ValueError where seeds were given for another number of entries."""
        seeds = list(self.seed) if isinstance(self.seed, (tuple, list)) else [self.seed] * batch
        if len(seeds) != batch:
            raise ValueError(f"there are {len(seeds)} seeds for a batch of {batch}; give one, or one for each entry")
        return seeds


@dataclass(frozen=True, eq=False)
class Piece:
    """What one round of answering gave one entry: new text, new sound (24 kHz, float32), and whether it is complete.

    fault: why the entry ended before its time, where it did; its session has been made new again.
    """

    text: str
    audio: np.ndarray
    done: bool
    fault: str = ""


class Session:
    """`batch` sessions in step with one another's calls, each in its own row.

    max_positions: LLM context of a session (prompt + 12.5 positions a second of sound + reply text). A `read` or `hear`
    that would exceed it raises ValueError before anything is changed; `open_turn` makes room.
    """

    def __init__(self, model: MinMo, batch: int, settings: Settings, max_positions: int) -> None:
        if model.tokenizer is None:
            raise ValueError(f"{model.config.name} has no tokenizer.json; load a checkpoint directory that holds one")
        if not isinstance(settings, Settings):
            raise ValueError(f"settings must be a minmo.Settings, got {type(settings).__name__}")
        if model.device.type == "meta":
            raise ValueError("this model holds shapes only (device 'meta'); load it on cpu or cuda to use it")
        if not is_whole(max_positions) or not 0 < max_positions <= MOST_POSITIONS:
            raise ValueError(f"max_positions must lie between 1 and {MOST_POSITIONS}, got {max_positions!r}")
        self.model, self.settings, self.max_positions = model, settings, max_positions
        self.tokenizer = model.tokenizer
        self.batch, self.device = batch, model.device
        self._entries = all_rows(batch, self.device)
        self.timings = Timings()
        # A reply's voice context: sos, the query, its text, turn of speech, its speech tokens.
        voice_positions = 2 + max_positions + (1 + settings.max_speech_ratio) * settings.max_text_tokens
        self._seats = model.join(batch, max_positions, voice_positions)
        self.rows = self._seats.rows
        self._last = torch.zeros(batch, model.config.llm.dim, device=self.device, dtype=model.dtype)
        self._query: list[tuple[Tensor, Tensor, Tensor]] = []
        self._turns: list[list[tuple[Tensor, Tensor]]] = [[]]
        """What the LLM was given: embeddings (batch, n, dim) and lengths; first before all turns, then turn by turn."""
        self._drawn = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._replies = 0
        self._seeds = torch.tensor(settings.seeds(batch), dtype=torch.int64, device=self.device)
        self._sampling = (
            torch.full((batch,), settings.temperature, dtype=torch.float32, device=self.device),
            self._ints([settings.top_k] * batch),
            torch.full((batch,), settings.top_p, dtype=torch.float32, device=self.device),
        )
        # Of the control tokens a reply may only draw the one that ends it.
        control = [i for i in self.tokenizer.special_ids if i != self.tokenizer.end_of_turn]
        self._banned = self._ints(control).expand(batch, -1)

    @property
    def _state(self) -> MinMoState:
        return self._seats.state

    @property
    def state_bytes(self) -> int:
        """Memory of the state that these sessions sit in."""
        return self._state.nbytes

    def check(self) -> None:
        """Raises RuntimeError where an engine's session is used from another thread than its own."""
        self._seats.check()

    def close(self) -> None:
        """Gives the sessions' rows back to the model; the session has then ended."""
        self._seats.leave()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, ids: Sequence[Sequence[int]], *, query: bool = False) -> None:
        """Prefills text, one list of token ids an entry (lists may differ in length, or be empty).

        query: these are the user's own words (a typed turn), which the voice decoder gets as query embeddings.
        """
        for _ in self.reading(ids, query=query):
            pass

    @torch.inference_mode()
    def reading(self, ids: Sequence[Sequence[int]], *, query: bool = False) -> Iterator[None]:
        """`read` in pieces of `model.prefill` positions, between which other sessions of an engine may go on."""
        x, lengths = self._embedded(ids)
        self._check_room(lengths)
        self._turns[-1].append((x, lengths))
        for piece, count in self._pieces(x, lengths):
            with self.timings.measure(T.PREFILL, self.device):
                self._think(piece, count, query)
            yield

    @torch.inference_mode()
    def open_turn(self, before: Sequence[Sequence[int]], opening: Sequence[Sequence[int]]) -> None:
        """A turn of the user's begins; at least half of the context is free then.

        For that the oldest turns are forgotten where need be, and what is left is read again; what preceded the first
        turn stays. before: text that ends what came before, opening: text that the turn begins with, a list an entry.
        Raises ValueError, with nothing changed, where even so there is no room for them.
        """
        closing, fresh = self._embedded(before), self._embedded(opening)
        turns = [*self._turns[:-1], [*self._turns[-1], closing]]
        have, room = read_rows(self._state.llm.lengths, self.rows), self.max_positions // 2
        new = [closing, fresh]
        again = int((have + closing[1]).max()) > room
        if again:
            while len(turns) > 1 and int(torch.stack([n for _, n in _flat(turns)]).sum(dim=0).max()) > room:
                del turns[1]
            have, new = torch.zeros_like(have), [*_flat(turns), fresh]
        x, lengths = join_all(new)
        self._check_room(lengths, have)
        if again:
            write_rows(self._state.llm.lengths, self.rows, have)
        self._turns = [*turns, [fresh]]
        for piece, count in self._pieces(x, lengths):
            with self.timings.measure(T.PREFILL, self.device):
                self._step(piece, count)

    def _embedded(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Embeddings (batch, n, dim) of a list of token ids an entry, and their lengths (batch,)."""
        padded = torch.zeros(self.batch, max(map(len, ids)), dtype=torch.int64)
        for entry, sequence in enumerate(ids):
            padded[entry, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.int64)
        return self.model.llm.embed(padded.to(self.device)), self._ints([len(i) for i in ids])

    def _pieces(self, x: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of one width, so that how much the others read does not change the shape of an entry's sums."""
        size = self.model.prefill
        x = torch.nn.functional.pad(x, [0, 0, 0, -x.shape[1] % size])
        for start in range(0, x.shape[1], size):
            yield x[:, start : start + size], (lengths - start).clamp(min=0, max=size)

    @torch.inference_mode()
    def hear(self, audio: Tensor, lengths: Tensor, final: Tensor) -> Tensor:
        """Sound of the user's turn: audio (batch, samples) 16 kHz, lengths (batch,) int32, final (batch,) bool.

        Returns the full-duplex predictor's probabilities (batch, n, 2), turn taking and barge-in, for the n positions
        that became complete; NaN where an entry has fewer.
        """
        model, state = self.model, self._state.hearing
        samples = read_rows(state.frontend.waiting.count, self.rows) + lengths
        self._check_room(torch.where(final, -(-samples // TICK), samples // TICK))
        with self.timings.measure(T.ENCODER, self.device):
            mel, counts, _ = model.frontend.step(audio, lengths, state.frontend, self.rows, final)
            frames, counts, _ = model.encoder.step(mel.to(model.dtype), counts, state.encoder, self.rows, final)
        with self.timings.measure(T.PROJECTOR, self.device):
            positions, counts, _ = model.projector.step(frames, counts, state.projector, self.rows, final)
        positions = positions[:, : int(counts.max())]
        self._turns[-1].append((positions, counts))
        with self.timings.measure(T.LISTEN, self.device):
            hidden = self._think(positions, counts, query=True)
            logits, _, _ = model.duplex.step(hidden, counts, self._state.duplex, self.rows)
        state.reset(torch.where(final, self.rows, -1))
        decisions = torch.softmax(logits.float(), dim=-1)[..., 1]
        return torch.where(valid(counts, decisions.shape[1])[..., None], decisions, torch.nan)

    @torch.inference_mode()
    def answer(self, forced: Sequence[Sequence[int]] | None = None) -> Iterator[list[Piece]]:
        """Answers the open turn; yields each round's pieces: up to 5 text tokens and 15 speech tokens' sound an entry.

        forced: the reply's text, token by token, instead of sampling it: text to speech, which has no query (the user
        said nothing). The speaking states start anew; the query is used up.
        """
        if forced is None:
            self._check_room(torch.full_like(self.rows, self.settings.max_text_tokens))
        clock = Clock(self.timings, self.device)
        texts = [TextStream(self.tokenizer) for _ in range(self.batch)]
        writing = torch.ones(self.batch, dtype=torch.bool, device=self.device)
        speaking = torch.full_like(writing, self.settings.speak)
        if self.settings.speak:
            self._start_speaking(with_query=forced is None)
        self._query.clear()
        written, faults, dropped = 0, [""] * self.batch, set[int]()
        ahead, first = None, True
        with beside(self.device) as begin:
            while bool((writing | speaking).any()):
                block = ahead or self._write(writing, written, forced, clock, faults)
                hidden, embedding, counts, ids = block
                written += hidden.shape[1]
                self._drop(faults, dropped, writing, speaking)
                ids = [[] if entry in dropped else new for entry, new in enumerate(ids)]
                deltas = [text.push(new) for text, new in zip(texts, ids, strict=True)]
                sound, ahead = [np.zeros(0, np.float32)] * self.batch, None
                if self.settings.speak:
                    spoken = begin(
                        functools.partial(
                            self._speak, self._state.speaking, hidden, embedding, counts, ~writing, speaking, clock,
                            faults,
                        )
                    )  # fmt: skip
                    if not first and bool(writing.any()):  # the first sound waits for nothing
                        ahead = self._write(writing, written, forced, clock, faults)
                    sound, finished = spoken()
                    speaking &= ~finished
                    self._drop(faults, dropped, writing, speaking)
                first = False
                done = (~writing & ~speaking).tolist()
                deltas = [d + (t.flush() if end else "") for d, t, end in zip(deltas, texts, done, strict=True)]
                yield [Piece(*piece) for piece in zip(deltas, sound, done, faults, strict=True)]
        clock.mark(T.TOTAL)

    def _check_room(self, more: Tensor, have: Tensor | None = None) -> None:
        """Raises ValueError where a context that holds `have` (as it does now) cannot take so many more, (batch,)."""
        have = read_rows(self._state.llm.lengths, self.rows) if have is None else have
        need = int((have + more).max())
        if need > self.max_positions:
            raise ValueError(
                f"the conversation would take {need} positions, but its context holds {self.max_positions}: start a "
                "new one, or raise max_positions"
            )

    def _think(self, x: Tensor, lengths: Tensor, query: bool) -> Tensor:
        """Runs the LLM over new positions x (batch, T, dim), remembers each entry's last state -> hidden states."""
        hidden = self._step(x, lengths)
        if query:
            self._query.append((hidden, x, lengths))
        return hidden

    def _step(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden, _, _ = self.model.llm.step(x, lengths, self._state.llm, self.rows)
        if hidden.shape[1]:
            newest = take(hidden, (lengths - 1).clamp(min=0), 1)[:, 0]
            self._last = torch.where((lengths > 0)[:, None], newest, self._last)
        return hidden

    def _drop(self, faults: Sequence[str], dropped: set[int], *busy: Tensor) -> None:
        """Ends entries with a fault, in the masks (batch,) of who is busy; those not yet `dropped` are made new."""
        for entry in [entry for entry, fault in enumerate(faults) if fault]:
            if entry not in dropped:
                dropped.add(entry)
                self._state.reset(self.rows[entry : entry + 1])
                self._last[entry] = 0
                gone = torch.arange(self.batch, device=self.device) == entry
                self._turns = [[(x, torch.where(gone, 0, n)) for x, n in turn] for turn in self._turns]
            for mask in busy:
                mask[entry] = False

    def _write(
        self,
        writing: Tensor,
        written: int,
        forced: Sequence[Sequence[int]] | None,
        clock: Clock,
        faults: list[str],
    ) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
        """Draws the next block of text: states and embeddings (batch, block, dim), counts (batch,), ids an entry.

        A token pairs with the state that predicted it. Entries that end leave `writing`, in place, and those whose
        states are NaN are named in `faults`.
        """
        began = now(self.device)
        block = self.model.config.voice_decoder.semantic_block
        states, embeddings, ids = [], [], [list[int]() for _ in range(self.batch)]
        counts, broken = torch.zeros_like(self._entries), torch.zeros_like(writing)
        for i in range(block):
            if written + i >= self.settings.max_text_tokens and forced is None:
                writing[:] = False
            token, bad = self._next_token(written + i, writing, forced)
            broken |= bad
            writing &= ~bad
            writing &= token != self.tokenizer.end_of_turn
            token = torch.where(writing, token, 0)
            embedding = self.model.llm.embed(token.long()[:, None])
            states.append(self._last)
            embeddings.append(embedding[:, 0])
            counts += writing.to(torch.int32)
            for entry in torch.nonzero(writing)[:, 0].tolist():
                ids[entry].append(int(token[entry]))
            if not bool(writing.any()):
                break
            clock.mark(T.TO_TEXT)
            self._turns[-1].append((embedding, writing.to(torch.int32)))
            self._think(*self._turns[-1][-1], query=False)
            if i == 0 and written == 0:
                self.timings.add(T.FIRST_TEXT, now(self.device) - began)
        for entry in torch.nonzero(broken)[:, 0].tolist():
            faults[entry] = "the LLM's state became NaN: its weights or what it was given are broken"
        if int(counts.max()) == block:
            self.timings.add(T.FIVE_TEXT, now(self.device) - began)
        short = [0, 0, 0, block - len(states)]
        pad = torch.nn.functional.pad
        return pad(torch.stack(states, 1), short), pad(torch.stack(embeddings, 1), short), counts, ids

    def _next_token(self, index: int, writing: Tensor, forced: Sequence[Sequence[int]] | None) -> tuple[Tensor, Tensor]:
        """(batch,) token ids, the forced text's or drawn for the entries that write; whose states are NaN, (batch,)."""
        if forced is not None:
            end = self.tokenizer.end_of_turn
            bad = writing & self._last.isnan().any(dim=1)
            return self._ints([ids[index] if index < len(ids) else end for ids in forced]), bad
        self._drawn += 1
        logits = self.model.llm.logits(self._last)
        bad = writing & logits.isnan().any(dim=1)
        token = mk.sample_token(
            logits,
            torch.where(writing & ~bad, self._entries, -1).to(torch.int32),
            self._seeds,
            self._drawn,
            *self._sampling,
            banned=self._banned,
            stream=TEXT_STREAM,
        )
        return token, bad

    def _start_speaking(self, with_query: bool) -> None:
        """New speaking states, one voice for all, and the turn's query embeddings."""
        model, state, settings = self.model, self._state.speaking, self.settings
        speaker = model.speaker.expand(self.batch, -1)
        # Speech tokens, mel frames and samples count from 0 in every reply, so each reply has a seed of its own.
        seeds = self._seeds + (self._replies << 32)
        self._replies += 1
        model.flow.start(state.flow, self.rows, speaker, seeds)
        model.vocoder.start(state.vocoder, self.rows, seeds)
        query = None
        if with_query and self._query:
            hidden, lengths = join_all([(hidden, count) for hidden, _, count in self._query])
            embedding, _ = join_all([(embedding, count) for _, embedding, count in self._query])
            query = (hidden, embedding, lengths)
        model.voice_decoder.start(
            state.decoder,
            self.rows,
            seeds,
            temperature=settings.voice_temperature,
            top_k=settings.voice_top_k,
            top_p=settings.voice_top_p,
            max_ratio=settings.max_speech_ratio,
            query=query,
        )

    def _speak(
        self,
        state: SpeakingState,
        hidden: Tensor,
        embedding: Tensor,
        counts: Tensor,
        text_done: Tensor,
        speaking: Tensor,
        clock: Clock,
        faults: list[str],
    ) -> tuple[list[np.ndarray], Tensor]:
        """Semantic vectors -> speech tokens -> mel -> sound of each entry, and which entries have finished.

        Entries whose states or sound are NaN are named in `faults`; they give no more sound.
        """
        model = self.model
        rows = torch.where(speaking, self.rows, -1).to(torch.int32)
        clock.skip()
        tokens, token_counts, _ = model.voice_decoder.step((hidden, embedding), counts, state.decoder, rows, text_done)
        finished = read_rows(state.decoder.finished, self.rows) & speaking
        failed = read_rows(state.decoder.failed, self.rows) & speaking
        for entry in torch.nonzero(failed)[:, 0].tolist():
            faults[entry] = "the voice decoder's state became NaN: its weights or the LLM's are broken"
        rows = torch.where(failed, -1, rows).to(torch.int32)
        if int(token_counts.max()) > 0:
            clock.lap(T.SPEECH_BLOCK)
            clock.mark(T.TO_SPEECH)
        tokens = tokens[:, : int(token_counts.max())]
        mel, frames, _ = model.flow.step(tokens, token_counts, state.flow, rows, finished)
        if int(frames.max()) > 0:
            clock.lap(T.FLOW)
        mel = mel[:, : int(frames.max())]
        audio, samples, _ = model.vocoder.step(mel, frames, state.vocoder, rows, finished)
        if int(samples.max()) > 0:
            clock.lap(T.VOCODER)
            clock.mark(T.TO_AUDIO)
        sound = audio.float().cpu().numpy()
        pieces = [sound[entry, :n] for entry, n in enumerate(samples.tolist())]
        for entry, piece in enumerate(pieces):
            if not np.isfinite(piece).all():
                faults[entry] = "the vocoder gave NaN or infinite sound: the weights of flow or vocoder are broken"
                pieces[entry] = piece[:0]
        return pieces, finished

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


def _flat(turns: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    return [piece for turn in turns for piece in turn]
