"""Lines of a scheduler as tests use them: clients that keep what they are told, and decisions as a test gives them."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

import minmo
from minmo.config import TICK
from minmo.conversation import steps
from minmo.conversation.budget import Budget
from minmo.conversation.events import Fault
from minmo.conversation.turn_taking import TurnTaking

GREEDY = minmo.Settings(temperature=0.0, max_text_tokens=12, max_speech_ratio=4, seed=3)
DRAWN = minmo.Settings(temperature=1.0, max_text_tokens=12, max_speech_ratio=4, seed=5)
TEXT = minmo.Settings(temperature=0.0, max_text_tokens=6, max_speech_ratio=4, speak=False)
AT_ONCE = TurnTaking(answer_ticks=1, stop=0.5, stop_ticks=1)
TAKE, STOP, NEITHER, NAN = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (float("nan"), 0.0)
DECIDE = steps.decide
CHEAP = Budget(*[{1: 1.0}] * 7)
WAIT_S = 600.0
"""How long a test waits for what must come: machines may be slow, and none may hang."""


class Decisions:
    """The predictor's, by the row of a conversation: one a tick, neither once they are used up."""

    def __init__(self):
        self.plans = {}

    def plan(self, conversation, decisions):
        self.plans[conversation._branches.own] = list(decisions)

    def __call__(self, model, state, rows, hidden, counts):
        DECIDE(model, state, rows, hidden, counts)
        plans = [self.plans.get(row) for row in rows.tolist()]
        return torch.tensor([[plan.pop(0) if plan else NEITHER] for plan in plans])


class Client:
    """Opens a line and keeps what it is told."""

    def __init__(self, scheduler, settings=GREEDY, turn_taking=AT_ONCE, **options):
        self.events = []
        self.ended = threading.Event()
        self.line = scheduler.open(self.receive, settings, turn_taking, **options)

    def receive(self, events):
        self.events += events
        if any(isinstance(event, Fault) for event in events):
            self.ended.set()

    @property
    def conversation(self):
        return self.line._conversation

    def settle(self):
        """Until all that was given has been heard, and no work is due."""
        due = ["?"]
        while due[-1]:
            self.line.do(lambda c: due.append(c.next_step) or [], after_sound=True).result(WAIT_S)

    def until(self, condition):
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < WAIT_S, "it never came"
            self.settle()

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def sound(ticks, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal(ticks * TICK)).astype(np.float32)
