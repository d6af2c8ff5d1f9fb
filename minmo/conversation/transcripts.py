"""What users said, as text: closed turns are read again under the instruction to transcribe them.

One row of an engine serves all conversations, a turn after another, piece by piece: a transcript is never urgent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minmo.conversation import steps
from minmo.conversation.branches import read_pieces
from minmo.conversation.settings import Settings
from minmo.model import MinMo
from minmo.modules.backbone import truncate
from minmo.tokenizer.text import TRANSCRIBE

LONGEST = 400
"""Text tokens of a transcript."""
MOST_WAITING = 8
"""Turns of one owner that may wait, each of which is kept until then."""


@dataclass(eq=False)
class _Job:
    """x: what is still to be read, (n, dim); last (1, dim): the state that predicts the next token; room: tokens that
    it may still get."""

    owner: object
    x: Tensor
    room: int
    done: Callable[[str, str], None]
    last: Tensor | None = None
    ids: list[int] = field(default_factory=list)


class Transcriber:
    """Transcribes turns, the oldest first, greedily. Raises ValueError where the model has no tokenizer or row left."""

    def __init__(self, model: MinMo) -> None:
        self.model, self.tokenizer = model, steps.check(model, Settings(), model.max_positions)
        self._seats = model.join(1, model.max_positions, 1)
        self._jobs: deque[_Job] = deque()
        prefix, suffix = self.tokenizer.turn(TRANSCRIBE)
        self._prefix, self._suffix = (torch.tensor(ids, device=model.device) for ids in (prefix, suffix))

    def __len__(self) -> int:
        return len(self._jobs)

    @torch.inference_mode()
    def add(self, owner: object, turn: Tensor, done: Callable[[str, str], None]) -> None:
        """A turn's positions (n, dim); `done` gets its text, or the empty text and why there is none."""
        if sum(job.owner is owner for job in self._jobs) >= MOST_WAITING:
            done("", f"{MOST_WAITING} turns before it still wait for their transcripts")
            return
        embed = self.model.llm.embed
        x = torch.cat([embed(self._prefix), turn.to(self.model.dtype), embed(self._suffix)])
        room = min(LONGEST, self.model.max_positions - len(x))
        if room < 1:
            done("", f"a turn of {len(turn)} positions leaves no room for its transcript: raise max_positions")
            return
        self._jobs.append(_Job(owner, x, room, done))

    def drop(self, owner: object) -> None:
        """Forgets the turns of an owner."""
        self._jobs = deque(job for job in self._jobs if job.owner is not owner)

    @torch.inference_mode()
    def step(self) -> None:
        """Reads a piece of the oldest turn, or writes a block of its text."""
        job, rows, llm = self._jobs[0], self._seats.rows, self._seats.state.llm
        if len(job.x):
            if job.last is None:
                truncate(llm, int(rows[0]), 0)
            piece, job.x = job.x[: self.model.prefill], job.x[self.model.prefill :]
            job.last = read_pieces(self.model, llm, rows, [piece])[0][-1:]
            return
        assert job.last is not None
        zero = torch.zeros(1, dtype=torch.int64, device=rows.device)
        sampling = steps.sampling(self.tokenizer, [Settings(temperature=0.0)], zero, zero.clone())
        block = steps.write(self.model, llm, rows, job.last, sampling, [job.room - len(job.ids)])
        job.ids += block.ids[0]
        job.last = block.last
        if block.broken[0] or block.ended[0]:
            self._jobs.popleft()
            job.done(*(("", steps.TEXT_FAULT) if block.broken[0] else (self.tokenizer.decode(job.ids), "")))

    def give_up(self, why: str) -> None:
        """The oldest turn gets no text."""
        self._jobs.popleft().done("", why)

    def close(self) -> None:
        """The row is free."""
        self._seats.leave()
