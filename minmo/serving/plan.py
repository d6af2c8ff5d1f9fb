"""What makes a server, as plain data that may be sent to another machine."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from minmo.console import err
from minmo.conversation import Settings
from minmo.conversation.budget import Budget
from minmo.conversation.scheduler import Scheduler
from minmo.fast import FastMinMo
from minmo.model import concerns
from minmo.serving.app import Server
from minmo.serving.guard import Guard, Limits
from minmo.serving.store import Store

NOTHING = {1: 0.001}
FREE = Budget(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)
"""As if steps cost nothing: as many sessions as asked for."""


@dataclass(frozen=True)
class Plan:
    """sessions: most at once. budget: what steps cost; measured by `server` where there is none. weights, device: as
    `FastMinMo.from_pretrained` takes them. keys, origins, local: a Guard's. record: where sessions are recorded."""

    preset: str
    sessions: int
    budget: Budget | None = None
    weights: str | None = None
    max_positions: int = 2048
    drawing: Settings = Settings(max_text_tokens=64)  # noqa: RUF009 (frozen)
    device: str | None = None
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    local: bool = True
    limits: Limits = Limits()  # noqa: RUF009 (frozen)
    record: Path | None = None

    def scheduler(self) -> Scheduler:
        """With the model loaded, and measured where there is no budget."""
        if "OMP_NUM_THREADS" not in os.environ:
            # A core is left to the sockets: with none of its own, what they do makes ticks late.
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        model = FastMinMo.from_pretrained(
            self.preset,
            self.device,
            rows=2 * self.sessions + 1,
            max_positions=self.max_positions,
            weights=self.weights,
        )
        if not model.trained:
            err.print(
                f"UNTRAINED: {model.config.name} has {model.provenance}; its replies mean nothing",
                style="yellow", highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        else:
            for concern in concerns(model.origins):
                err.print(f"{self.preset}: {concern}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        scheduler = Scheduler(model, budget=self.budget, max_sessions=self.sessions)
        gc.collect()
        gc.freeze()  # what is here stays: to look through it takes the collector longer than a tick has
        return scheduler

    def server(self, store: Store | None = None) -> Server:
        """store: where sessions wait for their clients; the server's own by default."""
        if self.record is not None:
            self.record.mkdir(parents=True, exist_ok=True)
        guard = Guard(self.keys, self.origins, local=self.local)
        name = Path(self.preset).name
        return Server(self.scheduler(), name, self.drawing, guard, self.limits, self.record, store)
