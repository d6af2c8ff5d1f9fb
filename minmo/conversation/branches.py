"""One conversation's two rows of LLM context: the branch that listens, and beside it, the branch of a reply.

Both begin with the same prefix. The listening branch goes on from an empty assistant turn with the user's sound, the
reply branch with the reply's text. A reply that is over is cut back to what was heard of it, reads the user's sound
since it began, and becomes the listening branch. What is read again are kept projector outputs: the encoder runs again
for the beginning of a turn alone (`Conversation._begin_turn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minmo.conversation.history import Exchange, History
from minmo.model import MinMo, MinMoState, Seats
from minmo.modules.backbone import BackboneState, copy_prefix, truncate
from minmo.state import full_lengths
from minmo.tokenizer.text import CHAT, TextTokenizer


@dataclass
class Reading:
    """What the spare row has yet to read: `before` (n, dim), then the open turn. at: positions read; hidden: states of
    those of the open turn."""

    before: Tensor
    at: int = 0
    hidden: list[Tensor] = field(default_factory=list)


class Branches:
    """The two rows of one conversation, and its history.

    room: positions that may precede the open turn. hidden: the LLM's state (1, dim) at each position of the open turn.
    reading: what is being read in the spare row, None where the listening branch is as it should be.
    """

    def __init__(self, model: MinMo, tokenizer: TextTokenizer, seats: Seats, history: History, room: int) -> None:
        self.model, self.history, self.room = model, history, room
        self.hidden: list[Tensor] = []
        self.reading: Reading | None = None
        self.opened = False
        """Whether the listening row holds what precedes the open turn, as from the first reading on."""
        self._tokenizer, self._seats = tokenizer, seats
        self._rows: list[int] = seats.rows.tolist()
        self._listens = 0
        self._opening, self._ending = tokenizer.turn(CHAT)
        self._between, _ = tokenizer.turn(CHAT, first=False)
        self.reread()

    @property
    def state(self) -> MinMoState:
        return self._seats.state

    @property
    def own(self) -> int:
        """The row of all states but the LLM's."""
        return self._rows[0]

    @property
    def listening(self) -> int:
        """The LLM's row that listens."""
        return self._rows[self._listens]

    @property
    def spare(self) -> int:
        """The LLM's other row: a reply's while one runs, else where context is read again."""
        return self._rows[1 - self._listens]

    def hear(self, position: Tensor, hidden: Tensor) -> None:
        """The listening row has read one more position of the open turn; both (1, dim)."""
        self.history.open.append(position)
        self.hidden.append(hidden)

    def type(self, ids: list[int]) -> None:
        """Text goes on with the open turn, and is read at once."""
        x = self._embed(ids)
        hidden = self._read(self.listening, x)
        self.history.open += x.split(1)
        self.history.typed = True
        self.hidden += hidden.split(1)
        rows = self._seats.rows[:1]
        self.model.duplex.step(hidden[None], full_lengths(hidden[None]), self.state.duplex, rows)

    def clear(self) -> None:
        """Forgets the open turn."""
        llm, reading = self.state.llm, self.reading
        if self.opened:
            truncate(llm, self.listening, int(llm.lengths[self.listening]) - len(self.hidden))
        if reading is not None and (more := reading.at - len(reading.before)) > 0:
            truncate(llm, self.spare, int(llm.lengths[self.spare]) - more)
            reading.at, reading.hidden = len(reading.before), []
        self.history.open, self.history.typed, self.hidden = [], False, []
        self._predict_anew()

    def trim(self, keep: int) -> None:
        """Forgets all but the last `keep` positions of the open turn, and reads those again; keep: 1 or more."""
        if len(self.history.open) > keep:
            self.replace(torch.cat(self.history.open[-keep:]))

    def replace(self, positions: Tensor) -> None:
        """The open turn consists of these positions (n, dim) and of no others, and they are read; n: 1 or more."""
        llm = self.state.llm
        truncate(llm, self.listening, int(llm.lengths[self.listening]) - len(self.history.open))
        self.history.open = list(positions.split(1))
        self.hidden = list(self._read(self.listening, positions).split(1))
        self._predict_anew()

    def part(self, number: int) -> tuple[Exchange, int, Tensor]:
        """The open turn is to be answered by the reply of that number, and the branches part -> its exchange, the reply
        row's positions before the reply's text, and the state (1, dim) that predicts its first token."""
        llm, ending = self.state.llm, len(self._ending)
        begins = int(llm.lengths[self.listening]) + ending
        hidden = self._read(self.listening, self._embed([*self._ending, *self._between]))
        copy_prefix(llm, self.listening, self.spare, begins)
        if not self.model.config.remembered:
            # A turn follows on no exchange, nor does one that is said while this is answered.
            truncate(llm, self.listening, 0)
            self._read(self.listening, self._embed(self._opening))
        self.hidden = []
        self._predict_anew()
        return self.history.close(number), begins, hidden[ending - 1][None]

    def rejoin(self, positions: int) -> None:
        """The reply is over, and the first `positions` of its row were heard: it is to become the listening row, where
        its exchange is remembered."""
        if len(self.history.exchanges) > self.model.config.remembered:
            self.reread()
            return
        truncate(self.state.llm, self.spare, positions)
        self.reading = Reading(self._embed(self._between))

    @torch.inference_mode()
    def reread(self, room: int | None = None) -> None:
        """All that is remembered is to be read anew, of which at most `room` positions precede the open turn."""
        most = self.model.config.remembered
        self.history.forget(self._tokenizer, self.room if room is None else room, most)
        truncate(self.state.llm, self.spare, 0)
        self.reading = Reading(self.history.embeddings(self.model, self._tokenizer))

    def next_piece(self, reading: Reading) -> Tensor:
        """What the spare row reads next, (n, dim)."""
        size = self.model.prefill
        rest = reading.before[reading.at : reading.at + size]
        opened = max(0, reading.at - len(reading.before))
        return torch.cat([rest, *self.history.open[opened : opened + size - len(rest)]])

    def has_read(self, reading: Reading, hidden: Tensor) -> bool:
        """hidden (n, dim): the states of the next piece -> whether nothing is left to read, and the rows have changed
        places. Where too much precedes the open turn then, the oldest exchanges are forgotten and the rest is read."""
        of_open = hidden[max(0, len(reading.before) - reading.at) :]
        reading.hidden += of_open.split(1) if len(of_open) else []
        reading.at += len(hidden)
        if reading.at < len(reading.before) + len(self.history.open):
            return False
        self._listens, self.reading, self.hidden = 1 - self._listens, None, reading.hidden
        self.opened = True
        self._predict_anew()
        if int(self.state.llm.lengths[self.listening]) - len(self.hidden) > self.room:
            self.reread(self.room // 2)  # half, so that not every turn from now on forgets another
        return self.reading is None

    def _predict_anew(self) -> None:
        """The predictor sees an open turn from its beginning, and nothing else."""
        rows, duplex = self._seats.rows[:1], self.state.duplex
        duplex.reset(rows)
        if self.hidden:
            hidden = torch.cat(self.hidden)[None]
            self.model.duplex.step(hidden, full_lengths(hidden), duplex, rows)

    def _read(self, row: int, x: Tensor) -> Tensor:
        """Reads x (n, dim) at once -> hidden states (n, dim)."""
        rows = torch.tensor([row], dtype=torch.int32, device=x.device)
        return torch.cat([read_pieces(self.model, self.state.llm, rows, [p])[0] for p in x.split(self.model.prefill)])

    def _embed(self, ids: list[int]) -> Tensor:
        return self.model.llm.embed(torch.tensor(ids, device=self.model.device))


def read_pieces(model: MinMo, state: BackboneState, rows: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    """One piece (n, dim) of at most `model.prefill` positions an entry -> hidden states (n, dim) of each.

    Pieces have one width, so that how much the others read does not change the shape of an entry's sums.
    """
    x = torch.stack([torch.nn.functional.pad(p, [0, 0, 0, model.prefill - len(p)]) for p in pieces])
    lengths = torch.tensor([len(p) for p in pieces], dtype=torch.int32, device=x.device)
    hidden, _, _ = model.llm.step(x, lengths, state, rows)
    return [hidden[n, : len(p)].clone() for n, p in enumerate(pieces)]
