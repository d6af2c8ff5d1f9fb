"""The full-duplex predictor: from the LLM's hidden states, should the model speak now, and should it stop speaking.

A down projection, one decoder layer over a sliding window (a ring cache when streaming, so a conversation has no end)
and two 2-way heads, one decision every 80 ms. Source: arXiv 2501.06282, section 3.3 and Table 1 (~18M parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minmo.config import DuplexConfig
from minmo.modules.backbone import DecoderLayer, initialise, layer_cache
from minmo.state import (
    KVCache,
    Lengths,
    State,
    active_lengths,
    advanced,
    all_rows,
    check_lengths,
    full_lengths,
    masked,
)

TURN_TAKING, BARGE_IN = 0, 1
"""Places of the two decisions in the logits' third axis: "answer the user now", "stop speaking and listen"."""
PIECE = 32
"""Positions that a step handles at once; the ring holds the window and one piece."""


@dataclass
class DuplexState(State):
    """The last `window` positions of each session (a ring cache) and the positions heard, (sessions,) int32."""

    cache: KVCache
    lengths: Tensor


class DuplexPredictor(nn.Module):
    """Hidden states (batch, T, input_dim) -> logits (batch, T, 2 decisions, 2 = no and yes)."""

    def __init__(self, config: DuplexConfig) -> None:
        super().__init__()
        if config.layer.layers != 1 or config.layer.vocab != 0 or config.window < 1:
            raise ValueError("the duplex predictor is one layer without a vocabulary, with a window of at least 1")
        self.config = config
        self.down = nn.Linear(config.input_dim, config.layer.dim, bias=False)
        self.layer = DecoderLayer(config.layer)
        self.turn_taking = nn.Linear(config.layer.dim, 2)
        self.barge_in = nn.Linear(config.layer.dim, 2)
        initialise(self)

    def forward(self, hidden: Tensor, lengths: Lengths | None = None) -> Tensor:
        """One shot -> logits (batch, T, 2, 2), indexed by TURN_TAKING and BARGE_IN; zeros beyond the lengths."""
        lengths = full_lengths(hidden) if lengths is None else lengths
        self._check_input(hidden, lengths)
        if hidden.numel() == 0:
            return hidden.new_zeros((*hidden.shape[:2], 2, 2))
        x = self.down(masked(hidden, lengths))
        rows = all_rows(x.shape[0], x.device)
        x = self.layer(x, lengths, None, rows, torch.zeros_like(lengths), lengths, window=self.config.window)
        return self._decide(x, lengths)

    def initial_state(self, sessions: int) -> DuplexState:
        like = self.layer.input_norm.weight.detach()
        return DuplexState(
            layer_cache(self.config.layer, sessions, self.config.window - 1 + PIECE, like),
            torch.zeros(sessions, dtype=torch.int32, device=like.device),
        )

    def step(
        self, hidden: Tensor, x_lengths: Lengths, state: DuplexState, rows: Tensor, final: Tensor | None = None
    ) -> tuple[Tensor, Lengths, DuplexState]:
        """Hidden states (batch, T, input_dim) of the newest positions -> logits (batch, T, 2, 2), lengths, state.

        Every position is decided at once, so `final` has nothing to flush. Raises ValueError, with the state unchanged,
        where a length exceeds T.
        """
        lengths = active_lengths(x_lengths, rows)
        self._check_input(hidden, lengths)
        if hidden.numel() == 0:
            return hidden.new_zeros((*hidden.shape[:2], 2, 2)), lengths, state
        pieces = []
        for offset, piece in enumerate(self.down(masked(hidden, lengths)).split(PIECE, dim=1)):
            counts = (lengths - offset * PIECE).clamp(min=0, max=piece.shape[1])
            some = torch.where(counts > 0, rows, -1).to(torch.int32)
            ends = advanced(state.lengths, some, counts)
            pieces.append(self._through(piece, counts, state, some, ends))
            state.lengths.copy_(ends)
        return self._decide(torch.cat(pieces, dim=1), lengths), lengths, state

    def _through(self, x: Tensor, counts: Lengths, state: DuplexState, rows: Tensor, ends: Tensor) -> Tensor:
        """The layer; ends (sessions,): positions with the new ones."""
        return self.layer(x, counts, state.cache, rows, state.lengths, ends, window=self.config.window, ring=True)

    def _decide(self, x: Tensor, lengths: Lengths) -> Tensor:
        return masked(torch.stack([self.turn_taking(x), self.barge_in(x)], dim=2), lengths)

    def _check_input(self, hidden: Tensor, lengths: Lengths) -> None:
        if hidden.dim() != 3 or hidden.shape[2] != self.config.input_dim:
            raise ValueError(f"hidden must be (batch, T, {self.config.input_dim}), got {tuple(hidden.shape)}")
        check_lengths(hidden, lengths)
