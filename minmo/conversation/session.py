"""A batch of sessions on one model and its 80 ms clock: read text, hear sound, answer with text and sound.

Each entry of the batch is one session with its own row of every state; entries may start, end and fall silent at
different times, and none changes another's output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minmo.clock import now
from minmo.config import TICK
from minmo.conversation import steps
from minmo.conversation import timings as T
from minmo.conversation.beside import beside
from minmo.conversation.settings import Settings
from minmo.conversation.timings import Clock, Timings
from minmo.model import MinMo, MinMoState, SpeakingState
from minmo.state import join_all, read_rows, take, write_rows
from minmo.tokenizer.text import TextStream


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
        self.tokenizer = steps.check(model, settings, max_positions)
        self.model, self.settings, self.max_positions = model, settings, max_positions
        self.batch, self.device = batch, model.device
        self.timings = Timings()
        # A reply's voice context: sos, the query, its text, turn of speech, its speech tokens.
        voice_positions = 2 + max_positions + (1 + settings.max_speech_ratio) * settings.max_text_tokens
        self._seats = model.join(batch, max_positions, voice_positions)
        self.rows = self._seats.rows
        self._last = torch.zeros(batch, model.config.llm.dim, device=self.device, dtype=model.dtype)
        self._query: list[tuple[Tensor, Tensor, Tensor]] = []
        self._turns: list[list[tuple[Tensor, Tensor]]] = [[]]
        """What the LLM was given: embeddings (batch, n, dim) and lengths; first before all turns, then turn by turn."""
        self._replies = 0
        self._seeds = torch.tensor(settings.seeds(batch), dtype=torch.int64, device=self.device)
        drawn = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._sampling = steps.sampling(self.tokenizer, [settings] * batch, self._seeds, drawn)

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
        positions, counts, _ = steps.hear(model, state, self.rows, audio, lengths, final, self.timings)
        self._turns[-1].append((positions, counts))
        with self.timings.measure(T.LISTEN, self.device):
            hidden = self._think(positions, counts, query=True)
            decisions = steps.decide(model, self._state.duplex, self.rows, hidden, counts)
        state.reset(torch.where(final, self.rows, -1))
        return decisions

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
        with beside(self.device, self.model.overlaps) as begin:
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

        Entries that end leave `writing`, in place, and those whose states are NaN are named in `faults`.
        """
        began, first = now(self.device), written == 0
        size = self.model.config.voice_decoder.semantic_block

        def on_token() -> None:
            nonlocal first
            clock.mark(T.TO_TEXT)
            if first:
                self.timings.add(T.FIRST_TEXT, now(self.device) - began)
            first = False

        block = steps.write(
            self.model,
            self._state.llm,
            torch.where(writing, self.rows, -1).to(torch.int32),
            self._last,
            self._sampling,
            [self.settings.max_text_tokens - written] * self.batch if forced is None else [size] * self.batch,
            None if forced is None else [ids[written : written + size] for ids in forced],
            on_token,
        )
        self._last = block.last
        writing &= ~torch.tensor(block.ended, device=self.device)
        for entry, broken in enumerate(block.broken):
            if broken:
                faults[entry] = steps.TEXT_FAULT
        counts = self._ints(block.counts)
        self._turns[-1].append((block.vectors[1], counts))
        if max(block.counts) == size:
            self.timings.add(T.FIVE_TEXT, now(self.device) - began)
        return (*block.vectors, counts, block.ids)

    def _start_speaking(self, with_query: bool) -> None:
        """New speaking states, one voice for all, and the turn's query embeddings."""
        # Speech tokens, mel frames and samples count from 0 in every reply, so each reply has a seed of its own.
        seeds = self._seeds + (self._replies << 32)
        self._replies += 1
        query = None
        if with_query and self._query:
            hidden, lengths = join_all([(hidden, count) for hidden, _, count in self._query])
            embedding, _ = join_all([(embedding, count) for _, embedding, count in self._query])
            query = (hidden, embedding, lengths)
        steps.start_speaking(self.model, self._state.speaking, self.rows, seeds, self.settings, query)

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
        rows = torch.where(speaking, self.rows, -1).to(torch.int32)
        tokens, spoken, finished, failed = steps.speak(
            self.model, state, rows, (hidden, embedding), counts, text_done, clock
        )
        for entry in failed:
            rows[entry] = -1
        mel, frames = steps.flow(self.model, state, rows, tokens, spoken, finished, clock, whole=True)
        pieces, unheard = steps.sound(self.model, state, rows, mel, frames, finished, clock)
        for entry, why in (unheard | failed).items():
            faults[entry] = why
        return pieces, finished

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)


def _flat(turns: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    return [piece for turn in turns for piece in turn]
