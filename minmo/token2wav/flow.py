"""Flow matching from speech tokens (25 Hz) to mel frames (50 Hz), whole utterances or chunk by chunk.

MinMo's Token2wav is CosyVoice 2's (arXiv 2501.06282, section 3.2; arXiv 2412.10117): an encoder turns the tokens into
mu, and an ordinary differential equation carries noise to a mel spectrogram under mu, a speaker vector and condition
frames. In the session form all attention is bounded to the left, so that a chunk of a stream costs the same however
long the utterance is, and the stream equals the one-shot call under the same mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.config import FlowConfig
from minmo.state import (
    Lengths,
    State,
    active_lengths,
    full_lengths,
    join,
    masked,
    nobody,
    read_rows,
    take,
    write_rows,
)
from minmo.token2wav.causal import ChunkMask, Span, continued, whole
from minmo.token2wav.conformer import EncoderState, UpsampleEncoder
from minmo.token2wav.estimator import Estimator, EstimatorState

NOISE_STREAM = 0x464C4F57
"""Random stream of the flow's initial noise ("FLOW"); the index is the mel frame, prompt frames included."""


@dataclass
class FlowState(State):
    """A row per session.

    tokens (sessions, chunk + lookahead - 1) int32 wait for their chunk, `waiting` (sessions,) of them; done (sessions,)
    int32: tokens already turned into mel. speaker (sessions, n_mels): projected; seeds (sessions,) int64.
    condition (sessions, 2 lookahead, n_mels) and drop (sessions,) int32: condition frames at the head of the next
    chunk, and how many of its frames belong to the prompt. estimator: one state an Euler step.
    """

    tokens: Tensor
    waiting: Tensor
    done: Tensor
    speaker: Tensor
    seeds: Tensor
    condition: Tensor
    drop: Tensor
    encoder: EncoderState
    estimator: list[EstimatorState]


class Flow(nn.Module):
    """Causal flow matching with classifier-free guidance.

    Chunk grid of the session form, in tokens: chunk - lookahead, chunk, chunk, ...: a chunk runs as soon as its
    look-ahead has arrived, that is after `chunk`, 2 `chunk`, ... tokens.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        frames = 2 * config.chunk
        if not 0 < config.lookahead < config.chunk:
            raise ValueError(f"flow.lookahead must lie in 1 .. chunk - 1 = {config.chunk - 1}, got {config.lookahead}")
        if config.left_context != -1 and (config.left_context < 0 or config.left_context % frames):
            raise ValueError(
                f"flow.left_context must be a multiple of 2 * chunk = {frames} mel frames, or -1,"
                f" got {config.left_context}"
            )
        self.config = config
        self.session_mask = ChunkMask(
            config.chunk, config.lookahead, -1 if config.left_context == -1 else config.left_context // frames
        )
        self.token_embedding = nn.Embedding(config.codes, config.dim)
        self.speaker_projection = nn.Linear(config.speaker_dim, config.n_mels)
        self.encoder = UpsampleEncoder(
            config.dim, config.heads, config.ffn, config.blocks, config.up_blocks, config.lookahead
        )
        self.mu_projection = nn.Linear(config.dim, config.n_mels)
        self.estimator = Estimator(
            config.n_mels,
            config.estimator_dim,
            config.estimator_heads,
            config.estimator_head_dim,
            config.estimator_mid_blocks,
            config.estimator_transformers,
        )

    def forward(
        self,
        tokens: Tensor,
        lengths: Lengths | None,
        speaker: Tensor,
        seeds: Tensor,
        prompt_tokens: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        prompt_lengths: Lengths | None = None,
        *,
        mask: str | ChunkMask = "session",
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Lengths]:
        """One shot. -> mel (batch, 2 T, n_mels), zeros beyond each length, and lengths (batch,) int32 = 2 x tokens.

        tokens (batch, T) int, lengths (batch,) or None = all; speaker (batch, speaker_dim), of any length; seeds
        (batch,) int64. The prompt is a sample of the voice: prompt_tokens (batch, P) and their mel frames prompt_mel
        (batch, 2 P, n_mels), prompt_lengths (batch,) tokens or None = all; its own frames are not returned. mask:
        "session" (what `step` computes), "full", or a ChunkMask of the tokens. noise (batch, 2 (P + T), n_mels) takes
        the place of the seeds' noise.

        Raises ValueError for shapes and dtypes that do not fit, token ids that do not exist, and, under the session
        mask, a prompt that is no multiple of `chunk` tokens (the reply's chunk grid would move).
        """
        self._check_voice(speaker, seeds, len(tokens))
        tokens, lengths = self._check_tokens("tokens", tokens, lengths)
        skip = torch.zeros_like(lengths)
        condition = speaker.new_zeros(len(tokens), 0, self.config.n_mels)
        size = tokens.shape[1]
        if prompt_tokens is not None:
            prompt_tokens, skip = self._check_tokens("prompt_tokens", prompt_tokens, prompt_lengths)
            condition = masked(self._check_prompt(prompt_tokens, prompt_mel), 2 * skip)
            if mask == "session":
                self._check_grid(skip)
            tokens, lengths = join(prompt_tokens, skip, tokens, lengths)
        frames = 2 * tokens.shape[1]
        if frames == 0:
            return condition.to(self._output_dtype), lengths
        span = whole(lengths, self._mask(mask))
        mu = self.encode(nn.functional.pad(tokens, [0, self.config.lookahead]), lengths, span)
        if noise is None:
            noise = self._noise(seeds, torch.zeros_like(lengths), frames)
        condition = nn.functional.pad(condition, [0, 0, 0, frames - condition.shape[1]])
        mel = self.solve(noise, mu, self._project(speaker), condition, span.scaled(2))
        lengths = 2 * (lengths - skip)
        return masked(take(mel, 2 * skip, 2 * size), lengths), lengths.to(torch.int32)

    def encode(self, tokens: Tensor, available: Tensor, span: Span, state: EncoderState | None = None) -> Tensor:
        """tokens (batch, T + lookahead), of which `available` exist -> mu (batch, 2 T, n_mels). span: of the tokens."""
        return self.mu_projection(self.encoder(self.token_embedding(tokens), available, span, state))

    def solve(
        self,
        noise: Tensor,
        mu: Tensor,
        speaker: Tensor,
        condition: Tensor,
        span: Span,
        states: list[EstimatorState] | None = None,
    ) -> Tensor:
        """Euler steps on a cosine schedule from noise to mel, with guidance. -> (batch, frames, n_mels), >= fp32.

        noise, mu, condition (batch, frames, n_mels), speaker (batch, n_mels) projected. span: of the mel frames.
        """
        steps, guidance = self.config.steps, self.config.guidance
        times = [1 - math.cos(0.5 * math.pi * step / steps) for step in range(steps + 1)]
        dtype = mu.dtype
        x = masked(noise.to(torch.promote_types(dtype, torch.float32)), span.lengths)
        span = span.doubled()
        mu, speaker, condition = (_with_and_without(c.to(dtype)) for c in (mu, speaker, condition))
        for step in range(steps):
            t = torch.full((len(mu),), times[step], device=mu.device)
            state = None if states is None else states[step]
            velocity = self.estimator(x.to(dtype).repeat_interleave(2, dim=0), mu, speaker, condition, t, span, state)
            given, free = velocity.to(x.dtype).unflatten(0, (-1, 2)).unbind(1)
            x = x + (times[step + 1] - times[step]) * ((1 + guidance) * given - guidance * free)
        return x

    def initial_state(self, sessions: int) -> FlowState:
        """New sessions, on the module's device and in its dtype; `start` gives each a voice. `nbytes` says the memory.

        Raises ValueError where the left context is unbounded.
        """
        c, mask = self.config, self.session_mask
        if mask.left < 0:
            raise ValueError("a flow with left_context -1 cannot stream; set left_context to a multiple of 2 * chunk")
        like = self.mu_projection.weight.detach()
        counts = torch.zeros((4, sessions), dtype=torch.int32, device=like.device)
        return FlowState(
            tokens=counts.new_zeros(sessions, c.chunk + c.lookahead - 1),
            waiting=counts[0].clone(),
            done=counts[1].clone(),
            speaker=like.new_zeros(sessions, c.n_mels),
            seeds=counts[2].long(),
            condition=like.new_zeros(sessions, 2 * c.lookahead, c.n_mels),
            drop=counts[3].clone(),
            encoder=self.encoder.initial_state(sessions, mask),
            estimator=[self.estimator.initial_state(sessions, mask.scaled(2)) for _ in range(c.steps)],
        )

    def start(
        self,
        state: FlowState,
        rows: Tensor,
        speaker: Tensor,
        seeds: Tensor,
        prompt_tokens: Tensor | None = None,
        prompt_mel: Tensor | None = None,
    ) -> FlowState:
        """Resets the named sessions and gives them a voice, and a prompt that is run through here and now.

        rows (n,) int32, -1 = padding; speaker (n, speaker_dim); seeds (n,) int64; prompt_tokens (n, P), P a multiple of
        `chunk`, and prompt_mel (n, 2 P, n_mels).
        """
        c = self.config
        self._check_voice(speaker, seeds, len(rows))
        state.reset(rows)
        write_rows(state.speaker, rows, self._project(speaker))
        write_rows(state.seeds, rows, seeds)
        if prompt_tokens is None or prompt_tokens.shape[1] == 0:
            return state
        prompt_tokens, _ = self._check_tokens("prompt_tokens", prompt_tokens, None)
        prompt_mel = self._check_prompt(prompt_tokens, prompt_mel)
        self._check_grid(full_lengths(prompt_tokens))
        begin, width = 0, c.chunk + c.lookahead
        for end in range(c.chunk - c.lookahead, prompt_tokens.shape[1], c.chunk):
            window = nn.functional.pad(prompt_tokens[:, begin : begin + width], [0, width])[:, :width]
            size = torch.full_like(rows, end - begin)
            condition = prompt_mel[:, 2 * begin : 2 * end]
            condition = nn.functional.pad(condition, [0, 0, 0, 2 * c.chunk - condition.shape[1]])
            self._chunk(window, size, size + c.lookahead, condition, state, rows)
            begin = end
        # The prompt's last tokens share a chunk with the reply's first ones.
        left = prompt_tokens.shape[1] - begin
        write_rows(state.tokens, rows, nn.functional.pad(prompt_tokens[:, begin:], [0, state.tokens.shape[1] - left]))
        write_rows(state.waiting, rows, torch.full_like(rows, left))
        write_rows(state.condition, rows, prompt_mel[:, 2 * begin :])
        write_rows(state.drop, rows, torch.full_like(rows, 2 * left))
        return state

    def step(
        self, tokens: Tensor, lengths: Lengths, state: FlowState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, FlowState]:
        """Adds tokens and gives the mel frames of all chunks that became complete.

        tokens (batch, T) int, lengths (batch,) int32, rows (batch,) int32, final (batch,) bool: no more tokens will
        come, so give the rest too (the session then needs `start` before its next utterance). -> mel
        (batch, 2 (T + chunk + lookahead - 1), n_mels), zeros beyond each length, and lengths (batch,) int32.
        """
        c = self.config
        longest = 2 * (tokens.shape[1] + state.tokens.shape[1])
        lengths = active_lengths(lengths, rows)
        mel = state.speaker.new_zeros((len(tokens), 0, c.n_mels), dtype=self._output_dtype)
        mel_lengths, more = torch.zeros_like(lengths), torch.zeros_like(final)
        for begin in range(0, tokens.shape[1], c.chunk):
            piece = tokens[:, begin : begin + c.chunk]
            count = (lengths - begin).clamp(0, piece.shape[1])
            mel, mel_lengths = join(mel, mel_lengths, *self.chunk(piece, count, state, rows, more)[:2])
        for _ in range(2):  # what waits then is less than two chunks
            if nobody(final & (rows >= 0)):
                break
            none = tokens[:, :0], torch.zeros_like(lengths)
            mel, mel_lengths = join(mel, mel_lengths, *self.chunk(*none, state, rows, final)[:2])
        mel = nn.functional.pad(mel[:, :longest], [0, 0, 0, max(0, longest - mel.shape[1])])
        return mel, mel_lengths.to(torch.int32), state

    def chunk(
        self, tokens: Tensor, lengths: Lengths, state: FlowState, rows: Tensor, final: Tensor
    ) -> tuple[Tensor, Lengths, FlowState]:
        """As `step`, of at most `chunk` tokens, but gives the next chunk alone, where it is complete. Where `final` is
        said, a session has given all once state.waiting is 0: call again, without tokens.

        -> mel (batch, 2 chunk, n_mels), zeros beyond each length, and lengths (batch,) int32.
        """
        c = self.config
        if tokens.shape[1] > c.chunk:
            raise ValueError(f"tokens must be at most {c.chunk}, a chunk, got {tokens.shape[1]}")
        tokens, lengths = self._check_tokens("tokens", tokens, active_lengths(lengths, rows))
        pending, total = join(read_rows(state.tokens, rows), read_rows(state.waiting, rows), tokens, lengths)
        # Room for one more window, so that it never runs out of the tensor.
        pending = nn.functional.pad(pending, [0, c.chunk + c.lookahead])
        size = c.chunk - (read_rows(state.done, rows) + c.lookahead) % c.chunk
        rest = torch.where(final, torch.minimum(size, total), 0)
        size = torch.where(total >= size + c.lookahead, size, rest)
        size = torch.where(rows >= 0, size, 0).to(torch.int32)
        if nobody(size > 0):
            mel = state.speaker.new_zeros((len(tokens), 2 * c.chunk, c.n_mels), dtype=self._output_dtype)
            mel_lengths = torch.zeros_like(lengths)
        else:
            active = torch.where(size > 0, rows, -1)
            condition = nn.functional.pad(read_rows(state.condition, active), [0, 0, 0, 2 * (c.chunk - c.lookahead)])
            drop = torch.minimum(read_rows(state.drop, active), 2 * size)
            available = torch.minimum(total, size + c.lookahead)
            mel = self._chunk(pending[:, : c.chunk + c.lookahead], size, available, condition, state, active)
            write_rows(state.condition, active, torch.zeros_like(condition[:, : 2 * c.lookahead]))
            write_rows(state.drop, active, torch.zeros_like(drop))
            mel_lengths = (2 * size - drop).to(torch.int32)
            mel = masked(take(mel, drop, 2 * c.chunk), mel_lengths)
            pending = masked(take(pending, size, pending.shape[1]), total - size)
        write_rows(state.tokens, rows, pending[:, : state.tokens.shape[1]])
        write_rows(state.waiting, rows, total - size)
        return mel, mel_lengths, state

    def _chunk(
        self, tokens: Tensor, size: Tensor, available: Tensor, condition: Tensor, state: FlowState, rows: Tensor
    ) -> Tensor:
        """One chunk of each entry, at fixed shapes and without reading the device.

        tokens (batch, chunk + lookahead), of which `available` exist and `size` are new; condition and the result
        (batch, 2 chunk, n_mels).
        """
        span = continued(state.done, size, rows, self.session_mask)
        mu = self.encode(masked(tokens, available), available, span, state.encoder)
        noise = self._noise(read_rows(state.seeds, rows), 2 * read_rows(state.done, rows), mu.shape[1])
        mel = self.solve(noise, mu, read_rows(state.speaker, rows), condition, span.scaled(2), state.estimator)
        state.done.copy_(span.after)
        return mel

    def _noise(self, seeds: Tensor, first: Tensor, frames: int) -> Tensor:
        """Noise of mel frames first[b] .. first[b] + frames - 1. -> (batch, frames, n_mels) fp32"""
        index = first[:, None].long() + torch.arange(frames, device=first.device)
        return mk.philox_normal(seeds, NOISE_STREAM, index, self.config.n_mels)

    def _project(self, speaker: Tensor) -> Tensor:
        speaker = nn.functional.normalize(speaker.to(self.speaker_projection.weight.dtype), dim=1)
        return self.speaker_projection(speaker)

    @property
    def _output_dtype(self) -> torch.dtype:
        return torch.promote_types(self.mu_projection.weight.dtype, torch.float32)

    def _mask(self, mask: str | ChunkMask) -> ChunkMask | None:
        if isinstance(mask, ChunkMask):
            return mask
        if mask not in ("session", "full"):
            raise ValueError(f"mask must be 'session', 'full' or a ChunkMask, got {mask!r}")
        return self.session_mask if mask == "session" else None

    def _check_tokens(self, name: str, tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Lengths]:
        """The tokens with 0 beyond their lengths, and the lengths as int32."""
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(
                f"{name} must be integers of shape (batch, items), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        lengths = full_lengths(tokens) if lengths is None else lengths.to(torch.int32)
        tokens = masked(tokens, lengths).to(torch.int32)
        # Only where reading a value does not stop a queue of GPU work.
        if tokens.device.type == "cpu" and ((tokens < 0) | (tokens >= self.config.codes)).any():
            bad = tokens[(tokens < 0) | (tokens >= self.config.codes)][0].item()
            raise ValueError(f"{name} must be speech tokens 0 .. {self.config.codes - 1}, got {bad}")
        return tokens, lengths

    def _check_voice(self, speaker: Tensor, seeds: Tensor, batch: int) -> None:
        if speaker.shape != (batch, self.config.speaker_dim):
            raise ValueError(
                f"speaker must have the shape ({batch}, {self.config.speaker_dim}), got {tuple(speaker.shape)}"
            )
        if seeds.shape != (batch,) or seeds.is_floating_point():
            raise ValueError(
                f"seeds must be integers of shape ({batch},), got {seeds.dtype} of shape {tuple(seeds.shape)}"
            )

    def _check_prompt(self, prompt_tokens: Tensor, prompt_mel: Tensor | None) -> Tensor:
        wanted = (len(prompt_tokens), 2 * prompt_tokens.shape[1], self.config.n_mels)
        if prompt_mel is None or prompt_mel.shape != wanted:
            got = "nothing" if prompt_mel is None else str(tuple(prompt_mel.shape))
            raise ValueError(f"prompt_mel must have two frames a prompt token, the shape {wanted}, got {got}")
        return prompt_mel.to(self.mu_projection.weight.dtype)

    def _check_grid(self, prompt_lengths: Tensor) -> None:
        chunk = self.config.chunk
        if (prompt_lengths % chunk).any():
            raise ValueError(
                f"under the session mask a prompt must be a multiple of {chunk} tokens, got {prompt_lengths.tolist()}:"
                " drop its first tokens and twice as many mel frames"
            )


def _with_and_without(x: Tensor) -> Tensor:
    """Entries 2b = x[b] and 2b + 1 = zeros: the two halves of classifier-free guidance."""
    return torch.stack([x, torch.zeros_like(x)], dim=1).flatten(0, 1)
