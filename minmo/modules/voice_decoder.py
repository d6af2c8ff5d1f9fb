"""The voice decoder: output projector and voice token LM, from the LLM's states to speech tokens (25 Hz).

Every sequence that the LM sees, in training, in generation and under a teacher, is written by one operation,
`minmo_kernels.mix_semantic_speech` (within a block of speech, where a drawn token's own embedding follows it, by the
embedding alone): blocks of 5 semantic vectors and 15 speech tokens, then the rest of the text, turn of speech, and
speech to its end. Sources: arXiv 2501.06282, section 3.2; ids, targets and sampling as in CosyVoice 2's
LM (arXiv 2412.10117).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import VoiceDecoderConfig
from minmo.modules.backbone import Backbone, BackboneState, initialise
from minmo.state import (
    Buffer,
    Lengths,
    State,
    active_lengths,
    all_rows,
    buffer,
    join,
    masked,
    may_look,
    nobody,
    read_rows,
    take,
    valid,
    write_rows,
)
from minmo_kernels.ops.mix_semantic_speech.schedule import (
    UNKNOWN_LENGTH,
    is_bistream,
    slot_of_speech,
    total_slots,
)

SPEECH_STREAM = 2
"""Random stream of speech tokens; the index within it is the token's number in the reply."""
REPETITION_WINDOW = 10
"""Speech tokens back in which a drawn token counts as a repetition."""

Vectors = tuple[Tensor, Tensor]
"""Hidden states after the LLM's final norm and input embeddings, (batch, n, llm_dim) each; a text token's embedding
pairs with the state that predicted it."""


@dataclass
class VoiceDecoderState(State):
    """One reply a session; a row a session. `lm.lengths` counts the slots that the LM has seen."""

    lm: BackboneState
    waiting: Buffer
    """Vectors of the incomplete block, [hidden ; embedding]."""
    query: Tensor
    text: Tensor
    speech: Tensor
    """Semantic vectors of the query and of the text given to the LM (int32); speech tokens chosen so far (int64)."""
    recent: Tensor
    """(sessions, REPETITION_WINDOW) int32: the newest speech tokens, the last one last; -1 = none."""
    started: Tensor
    turned: Tensor
    finished: Tensor
    failed: Tensor
    """bool: a reply has been started; turn of speech was given; end of speech was reached; NaN came up."""
    bistream: Tensor
    seeds: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_ratio: Tensor
    max_ratio: Tensor


@dataclass
class _Voice:
    """The settings of each entry during a round, (batch,) like `VoiceDecoderState`'s, and the bounds of its speech."""

    head: nn.Module
    seeds: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    turned: Tensor
    least: Tensor
    most: Tensor
    no_speech: Tensor
    """(ids,) int32: ids that are no speech tokens."""
    end_of_speech: int
    repetition_limit: int

    def choose(self, hidden: Tensor, talks: Tensor, spoken: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """The next speech token, or end of speech, of each entry that talks (batch,) bool -> (batch,) int32, and whose
        logits are NaN (batch,) bool."""
        logits = self.head(hidden)
        broken = talks & logits.isnan().any(dim=1)
        talks = talks & ~broken
        may_end = self.turned & (spoken >= self.least)
        allowed = may_end[:, None] & (self.no_speech == self.end_of_speech)
        entries = torch.where(talks, all_rows(len(talks), talks.device), -1).to(torch.int32)
        token = mk.sample_token(
            logits, entries, self.seeds, spoken, self.temperature, self.top_k, self.top_p, recent,
            torch.where(allowed, -1, self.no_speech).to(torch.int32), stream=SPEECH_STREAM,
            repetition_limit=self.repetition_limit,
        )  # fmt: skip
        return torch.where(self.turned & (spoken >= self.most) & talks, self.end_of_speech, token), broken


@dataclass
class Speech:
    """A round under way: who talks, what `VoiceDecoderState` will hold of each entry, and the tokens chosen so far,
    pieces of (batch, n) int32, 0 where there is none."""

    talks: Tensor
    spoken: Tensor
    recent: Tensor
    finished: Tensor
    failed: Tensor
    tokens: list[Tensor] = field(default_factory=list)

    def take(self, token: Tensor, broken: Tensor, end_of_speech: int) -> None:
        """The next token of each entry (batch,) int32, and whose logits were NaN (batch,) bool."""
        ended = broken | (token == end_of_speech)
        self.finished, self.failed = self.finished | (self.talks & ended), self.failed | broken
        self.talks = self.talks & ~ended
        self.tokens.append(torch.where(self.talks, token, 0).to(torch.int32)[:, None])
        self.spoken = self.spoken + self.talks
        newest = torch.cat([self.recent[:, 1:], token[:, None]], dim=1)
        self.recent = torch.where(self.talks[:, None], newest, self.recent)

    def take_all(self, tokens: Tensor, broken: int, end_of_speech: int) -> None:
        """The next tokens of each entry (batch, n) int32 at once: -1 from where it ended, at `broken` or the end."""
        bad = (tokens == broken).any(dim=1)
        ended = bad | (tokens == end_of_speech).any(dim=1)
        self.finished, self.failed = self.finished | ended, self.failed | bad
        self.talks = self.talks & ~ended
        given = (tokens >= 0) & (tokens != end_of_speech)
        self.tokens.append(torch.where(given, tokens, 0).to(torch.int32))
        count = given.sum(dim=1)
        self.spoken = self.spoken + count
        self.recent = take(torch.cat([self.recent, tokens], dim=1), count, self.recent.shape[1])


@dataclass
class _Teacher:
    """Speech tokens to choose instead of drawn ones, and what the LM made of each slot on the way."""

    speech: Tensor
    lengths: Lengths
    end_of_speech: int
    seen: list[tuple[Tensor, Lengths, Tensor]] = field(default_factory=list)
    """(first slot, slots, hidden states) of each call of the LM, entries in the order of the sessions."""

    def choose(self, hidden: Tensor, talks: Tensor, spoken: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        token = take(F.pad(self.speech, (0, 1)), spoken, 1)[:, 0]
        token = torch.where(spoken < self.lengths, token, self.end_of_speech).to(torch.int32)
        return token, torch.zeros_like(talks)


class VoiceDecoder(nn.Module):
    """Output projector, speech embedding, marker table (sos, turn of speech), LM body and head."""

    def __init__(self, config: VoiceDecoderConfig) -> None:
        super().__init__()
        if config.order not in ("hidden,embedding", "embedding,hidden"):
            raise ValueError(f"voice_decoder.order is 'hidden,embedding' or 'embedding,hidden', got {config.order!r}")
        if not (config.codes <= config.end_of_speech < config.vocab and config.codes <= config.fill < config.vocab):
            raise ValueError("voice_decoder.end_of_speech and fill must lie in codes .. vocab - 1")
        self.config = config
        dim = config.lm.dim
        self.output_projector = nn.Linear(2 * config.llm_dim, dim)
        self.speech_embedding = nn.Embedding(config.vocab, dim)
        self.markers = nn.Embedding(max(config.start_marker, config.turn_of_speech_marker) + 1, dim)
        self.lm = Backbone(config.lm)
        self.head = nn.Linear(dim, config.vocab)
        for part in (self.output_projector, self.speech_embedding, self.markers, self.head):
            initialise(part)

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor,
        query_lengths: Lengths,
        text_lengths: Lengths,
        speech: Tensor,
        speech_lengths: Lengths,
        bistream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing, differentiable: logits (batch, N + 2 + M, vocab) and their targets, -100 where none.

        hidden, embedding (batch, N, llm_dim): the query's vectors, then directly the text's, lengths (batch,) int32;
        query lengths are 0 where there is no query, as in text to speech. speech (batch, M) int: speech tokens.
        bistream (batch,) bool: the layout, by default blocks where speech / text > 15 / 5.
        """
        inputs, targets = self._mix(
            (hidden, embedding), query_lengths, text_lengths, speech, speech_lengths, bistream=bistream,
            rows=all_rows(hidden.shape[0], hidden.device), slots=hidden.shape[1] + 2 + speech.shape[1],
        )  # fmt: skip
        lengths = total_slots(query_lengths, text_lengths, speech_lengths).to(torch.int32)
        return self.head(self.lm(inputs, lengths)), targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the targets of a batch, in fp32; shapes as `forward` returns them."""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def initial_state(self, sessions: int, capacity: int) -> VoiceDecoderState:
        """capacity: slots that a reply may have, 1 + query + text + 1 + speech tokens."""
        like = self.output_projector.weight.detach()

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((sessions, *shape), dtype=dtype, device=like.device)

        return VoiceDecoderState(
            lm=self.lm.initial_state(sessions, capacity),
            waiting=buffer(sessions, self.config.semantic_block - 1, (2 * self.config.llm_dim,), like),
            query=empty(torch.int32),
            text=empty(torch.int32),
            speech=empty(torch.int64),
            recent=empty(torch.int32, REPETITION_WINDOW),
            started=empty(torch.bool),
            turned=empty(torch.bool),
            finished=empty(torch.bool),
            failed=empty(torch.bool),
            bistream=empty(torch.bool),
            seeds=empty(torch.int64),
            temperature=empty(torch.float32),
            top_k=empty(torch.int32),
            top_p=empty(torch.float32),
            min_ratio=empty(torch.float32),
            max_ratio=empty(torch.float32),
        )

    @torch.no_grad()
    def start(
        self,
        state: VoiceDecoderState,
        rows: Tensor,
        seeds: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 25,
        top_p: float | Tensor = 0.8,
        min_ratio: float | Tensor = 2.0,
        max_ratio: float | Tensor = 20.0,
        query: tuple[Tensor, Tensor, Lengths] | None = None,
        bistream: bool | Tensor = True,
    ) -> VoiceDecoderState:
        """Begins a new reply in the sessions `rows` (batch,), whatever they did before.

        seeds (batch,) int64. The settings are one number for all or (batch,): sampling as in `mk.sample_token`; a reply
        has at least min_ratio and at most max_ratio speech tokens a text token (CosyVoice 2's 2 and 20), and never more
        than the state's capacity holds. query: hidden states and embeddings (batch, n, llm_dim) of the user's turn and
        their lengths, put after sos; dropped where the configuration says `query: false`. bistream: speak while text
        comes, block by block; otherwise only once it is complete.
        """
        state.reset(rows)
        batch, device = rows.shape[0], rows.device
        settings = (
            (state.seeds, seeds),
            (state.temperature, temperature),
            (state.top_k, top_k),
            (state.top_p, top_p),
            (state.min_ratio, min_ratio),
            (state.max_ratio, max_ratio),
            (state.bistream, bistream),
            (state.started, True),
        )
        for own, value in settings:
            write_rows(own, rows, torch.as_tensor(value, dtype=own.dtype, device=device).expand(batch))
        write_rows(state.recent, rows, state.recent.new_full((batch, REPETITION_WINDOW), -1))
        if query is not None and self.config.query and query[0].shape[1] > 0:
            hidden, embedding, lengths = query
            lengths = active_lengths(lengths, rows)
            write_rows(state.query, rows, lengths)
            # Without a query, sos goes to the LM together with the first block.
            asked = torch.where(lengths > 0, rows, -1).to(torch.int32)
            vectors = self._paired((hidden, embedding))
            self._feed(vectors, torch.zeros_like(lengths), 1 + lengths, asked, state, hidden.shape[1] + 1, None)
        return state

    @torch.no_grad()
    def step(
        self, x: Vectors, x_lengths: Lengths, state: VoiceDecoderState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, VoiceDecoderState]:
        """Takes the semantic vectors' halves of new text tokens; gives the speech tokens that they allow.

        x: hidden states and embeddings (batch, n, llm_dim), n >= 0. Each block of 5 vectors gives 15 tokens. `final`
        (batch,) bool: the text is complete; the incomplete block and turn of speech follow, then up to 15 tokens a
        call, this one included, until `state.finished`: call again with x_lengths 0. Returns tokens (batch,
        15 ((n + 4) // 5 + 1)) int32, 0 beyond their lengths. Raises ValueError for sessions that were not started, for
        vectors after `final`, and where a reply outgrows the capacity before its text is complete.
        """
        return self._advance(x, x_lengths, state, rows, final, None)

    @torch.no_grad()
    def forced(
        self,
        hidden: Tensor,
        embedding: Tensor,
        query_lengths: Lengths,
        text_lengths: Lengths,
        speech: Tensor,
        speech_lengths: Lengths,
        bistream: Tensor | None = None,
    ) -> Tensor:
        """The logits of `forward`, computed by the machinery of `step` with these speech tokens in place of drawn ones.

        Arguments as `forward`. Raises ValueError where the speech ends before its last block.
        """
        config, device = self.config, hidden.device
        if bistream is None:
            bistream = is_bistream(text_lengths, speech_lengths, config.semantic_block, config.speech_block)
        blocks = torch.where(bistream, torch.div(text_lengths, config.semantic_block, rounding_mode="floor"), 0)
        if bool((speech_lengths < config.speech_block * blocks).any()):
            raise ValueError("forced decoding in blocks needs 15 speech tokens for every 5 text tokens")
        batch, slots = hidden.shape[0], hidden.shape[1] + 2 + speech.shape[1]
        rows = all_rows(batch, device)
        state = self.initial_state(batch, slots)
        teacher = _Teacher(speech, speech_lengths, config.end_of_speech)

        vectors = F.pad(self._paired((hidden, embedding)), (0, 0, 0, 1))
        asked, told = int(query_lengths.max()), int(text_lengths.max())
        self.start(state, rows, torch.zeros(batch, dtype=torch.int64, device=device), bistream=bistream)
        write_rows(state.query, rows, query_lengths)
        if asked:
            some = torch.where(query_lengths > 0, rows, -1).to(torch.int32)
            zero = torch.zeros_like(query_lengths)
            self._feed(vectors[:, :asked], zero, 1 + query_lengths, some, state, asked + 1, teacher)
        x = take(vectors, query_lengths, told).chunk(2, dim=2)
        final = torch.ones(batch, dtype=torch.bool, device=device)
        self._advance((x[0], x[1]), text_lengths, state, rows, final, teacher)
        while not bool(state.finished.all()):
            self._advance((x[0][:, :0], x[1][:, :0]), torch.zeros_like(rows), state, rows, final, teacher)

        out = vectors.new_zeros(batch, slots, config.lm.dim)
        for start, count, states in teacher.seen:
            entry, item = torch.nonzero(valid(count, states.shape[1]), as_tuple=True)
            out[entry, start[entry].long() + item] = states[entry, item]
        total = total_slots(query_lengths, text_lengths, speech_lengths)
        return masked(self.head(out), total.to(torch.int32))

    def _advance(
        self,
        x: Vectors,
        x_lengths: Lengths,
        state: VoiceDecoderState,
        rows: Tensor,
        final: Tensor,
        teacher: _Teacher | None,
    ) -> tuple[Tensor, Lengths, VoiceDecoderState]:
        """`step`, with or without a teacher: rounds of at most one block or one piece of the tail an entry."""
        block = self.config.semantic_block
        pairs = self._paired(x)
        active = rows >= 0
        turned = read_rows(state.turned, rows)
        lengths = active_lengths(x_lengths, rows)
        if may_look(rows) and bool((active & ~read_rows(state.started, rows)).any()):
            raise ValueError("the voice decoder was not started for this reply: call start(state, rows, seeds) first")
        if may_look(rows) and bool((turned & (lengths > 0)).any()):
            raise ValueError("semantic vectors arrived after `final`: call start(...) to begin a new reply")
        waiting, count = read_rows(state.waiting.data, rows), read_rows(state.waiting.count, rows)
        vectors, total = join(waiting, count, pairs, lengths)
        final = active & (final | turned)

        rounds = vectors.shape[1] // block + 1
        # Rounds have one shape however the vectors arrived, so that the same numbers come out bit for bit.
        vectors = F.pad(vectors, (0, 0, 0, rounds * block - vectors.shape[1]))
        tokens = torch.zeros(len(rows), 0, dtype=torch.int32, device=rows.device)
        counts = torch.zeros_like(total)
        for i in range(rounds):
            left = total - i * block
            tail = final & (left >= 0) & (left < block)
            works = active & ((left >= block) | tail) & ~read_rows(state.finished, rows)
            if nobody(works):
                break
            piece = vectors[:, i * block : (i + 1) * block]
            working = torch.where(works, rows, -1).to(torch.int32)
            new, new_counts = self._round(piece, left.clamp(0, block), tail, state, working, teacher)
            tokens, counts = join(tokens, counts, new, new_counts)

        tokens = F.pad(tokens, (0, rounds * self.config.speech_block - tokens.shape[1]))
        rest = torch.where(final, 0, total % block)
        write_rows(state.waiting.data, rows, masked(take(vectors, total - rest, block - 1), rest))
        write_rows(state.waiting.count, rows, rest)
        return tokens, counts, state

    def _round(
        self,
        vectors: Tensor,
        given: Lengths,
        tail: Tensor,
        state: VoiceDecoderState,
        rows: Tensor,
        teacher: _Teacher | None,
    ) -> tuple[Tensor, Lengths]:
        """Gives the LM up to 5 vectors (batch, 5, 2 llm_dim) an entry, and turn of speech where `tail` begins.

        Then chooses up to 15 tokens an entry -> tokens (batch, 15) int32, 0 beyond their counts (batch,) int32.
        """
        config = self.config
        query, told = read_rows(state.query, rows), read_rows(state.text, rows)
        turned = read_rows(state.turned, rows) | tail
        write_rows(state.text, rows, told + given)
        write_rows(state.turned, rows, turned)
        layout = read_rows(state.bistream, rows)
        # The slot that predicts the next token is the last one to feed: at most a pending token (or sos) and 5 more.
        end = slot_of_speech(
            read_rows(state.speech, rows), query, torch.where(turned, told + given, UNKNOWN_LENGTH), layout,
            config.semantic_block, config.speech_block,
        )  # fmt: skip
        speaks = turned | layout
        end = torch.where(speaks, end, 1 + query + told + given)
        feed = (end - read_rows(state.lm.lengths, rows)).to(torch.int32)
        hidden = self._feed(vectors, query + told, feed, rows, state, config.semantic_block + 1, teacher)
        last = take(hidden, (feed - 1).clamp(min=0), 1)

        chooser = self._voice(state, rows, turned, told + given, query) if teacher is None else teacher
        spoken, recent = read_rows(state.speech, rows), read_rows(state.recent, rows)
        finished, failed = read_rows(state.finished, rows), read_rows(state.failed, rows)
        talks = speaks & (rows >= 0)
        speech = Speech(talks, spoken, recent, finished, failed)
        self._speak(last, chooser, speech, state, rows, teacher)
        write_rows(state.speech, rows, speech.spoken)
        write_rows(state.recent, rows, speech.recent)
        write_rows(state.finished, rows, speech.finished)
        write_rows(state.failed, rows, speech.failed)
        tokens = torch.cat(speech.tokens, dim=1) if speech.tokens else vectors.new_zeros(len(rows), 0).int()
        return F.pad(tokens, (0, config.speech_block - tokens.shape[1])), (speech.spoken - spoken).to(torch.int32)

    def _speak(
        self,
        last: Tensor,
        chooser: _Voice | _Teacher,
        speech: Speech,
        state: VoiceDecoderState,
        rows: Tensor,
        teacher: _Teacher | None,
    ) -> None:
        """Chooses up to 15 tokens an entry; last (batch, 1, dim): the state that predicts the first."""
        for i in range(self.config.speech_block):
            if nobody(speech.talks):
                break
            if i > 0:  # within a block a token's own embedding follows it
                inputs = self.speech_embedding(speech.recent[:, -1:].clamp(min=0).long())
                rows = torch.where(speech.talks, rows, -1).to(torch.int32)
                last = self._append(inputs, speech.talks.to(torch.int32), state, rows, teacher)
            token, broken = chooser.choose(last[:, 0], speech.talks, speech.spoken, speech.recent)
            speech.take(token, broken, self.config.end_of_speech)

    def _feed(
        self,
        vectors: Tensor,
        vector_starts: Tensor,
        lengths: Lengths,
        rows: Tensor,
        state: VoiceDecoderState,
        slots: int,
        teacher: _Teacher | None,
    ) -> Tensor:
        """Gives the LM each entry's next `lengths` (batch,) of at most `slots` slots -> hidden (batch, slots, dim)."""
        spoken, text = read_rows(state.speech, rows), read_rows(state.text, rows)
        starts = read_rows(state.lm.lengths, rows)
        hidden, embedding = (half.contiguous() for half in vectors.chunk(2, dim=2))
        inputs, _ = self._mix(
            (hidden, embedding),
            read_rows(state.query, rows),
            torch.where(read_rows(state.turned, rows), text, UNKNOWN_LENGTH).to(torch.int32),
            read_rows(state.recent, rows)[:, -1:].contiguous(),
            spoken.to(torch.int32),
            starts=starts,
            vector_starts=vector_starts,
            speech_starts=(spoken - 1).to(torch.int32),
            bistream=read_rows(state.bistream, rows),
            rows=rows,
            slots=slots,
        )
        return self._append(inputs, lengths, state, rows, teacher)

    def _append(
        self, inputs: Tensor, lengths: Lengths, state: VoiceDecoderState, rows: Tensor, teacher: _Teacher | None
    ) -> Tensor:
        """Gives the LM each entry's next slots (batch, slots, dim) -> hidden states, same shape."""
        starts = read_rows(state.lm.lengths, rows) if teacher is not None else None
        hidden, count, _ = self.lm.step(inputs, lengths, state.lm, rows)
        if teacher is not None and starts is not None:
            teacher.seen.append((starts, count, hidden))
        return hidden

    def _mix(
        self,
        vectors: Vectors,
        query_lengths: Lengths,
        text_lengths: Lengths,
        speech: Tensor,
        speech_lengths: Lengths,
        *,
        rows: Tensor,
        slots: int,
        bistream: Tensor | None,
        starts: Tensor | None = None,
        vector_starts: Tensor | None = None,
        speech_starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`mk.mix_semantic_speech` with this decoder's weights and ids."""
        config = self.config
        hidden, embedding = (part.to(self.output_projector.weight.dtype) for part in vectors)
        return mk.mix_semantic_speech(
            hidden, embedding, self.output_projector.weight, self.output_projector.bias, speech,
            self.speech_embedding.weight, self.markers.weight, rows, query_lengths, text_lengths,
            speech_lengths, starts, vector_starts, speech_starts, bistream, slots=slots, fill=config.fill,
            end_of_speech=config.end_of_speech, semantic_block=config.semantic_block, speech_block=config.speech_block,
            hidden_first=config.order.startswith("hidden"), start_marker=config.start_marker,
            turn_marker=config.turn_of_speech_marker,
        )  # fmt: skip

    def _voice(self, state: VoiceDecoderState, rows: Tensor, turned: Tensor, text: Tensor, query: Tensor) -> _Voice:
        """How the entries of a round draw; text: semantic vectors given, this round's included."""
        config = self.config
        room = state.lm.capacity - 2 - query - text
        return _Voice(
            self.head,
            read_rows(state.seeds, rows),
            read_rows(state.temperature, rows),
            read_rows(state.top_k, rows),
            read_rows(state.top_p, rows),
            turned,
            read_rows(state.min_ratio, rows) * text,
            torch.minimum((read_rows(state.max_ratio, rows) * text).long(), room.long()),
            torch.arange(config.codes, config.vocab, dtype=torch.int32, device=rows.device),
            config.end_of_speech,
            config.repetition_limit,
        )

    def _paired(self, x: Vectors) -> Tensor:
        """Both halves as one tensor (batch, n, 2 llm_dim) in the weights' dtype."""
        hidden, embedding = x
        expected = self.config.llm_dim
        if hidden.shape != embedding.shape or hidden.dim() != 3 or hidden.shape[2] != expected:
            raise ValueError(
                f"hidden states and embeddings must both be (batch, n, {expected}), got {tuple(hidden.shape)} and"
                f" {tuple(embedding.shape)}"
            )
        return torch.cat([hidden, embedding], dim=2).to(self.output_projector.weight.dtype)
