"""A scheduler whose conversations are scripted, for tests of what stands between it and a client: no model computes.

Its conversations hear by loudness: they answer when a voice has ended with a tone of some seconds, sent tick by tick on
the clock of the sound that they hear, and stop when a voice returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

TICK, RATE, PIECE = 1280, 24_000, 1920
LOUD, QUIET_TICKS, STOP_TICKS = 0.02, 5, 3


class ScriptedConversation:
    """What a `Line`'s actions may ask of a conversation."""

    def __init__(self, line, settings, turn_taking, history):
        from minmo.conversation import Exchange, History, Phase

        self.line, self.turn_taking, self.most = line, turn_taking, settings.max_text_tokens
        self._settings, self.phase = settings, Phase.LISTENING
        self.history = history if isinstance(history, History) else History()
        self.given_texts = history if isinstance(history, list) else []
        self.history.exchanges += [Exchange(None, []) for _ in self.given_texts]
        self.replies = self.history.number()
        self.heard = 0  # ticks since the last turn
        self.acknowledged, self.typed_texts, self.removed = [], [], []
        self.voiced = True

    @property
    def settings(self):
        return self._settings

    @settings.setter
    def settings(self, settings):
        assert settings.max_text_tokens <= self.most
        self._settings = settings

    def take_turn(self):
        from minmo.conversation import Phase

        if self.phase is not Phase.LISTENING:
            raise RuntimeError("the assistant is speaking: it cannot do this from there")
        if not self.heard and not self.typed_texts:
            raise ValueError("nothing was heard since the last turn: there is nothing to answer")
        return self.line.take()

    def stop(self):
        from minmo.conversation import Phase

        if self.phase not in (Phase.TAKING, Phase.SPEAKING):
            raise RuntimeError("the assistant is listening: it cannot do this from there")
        return self.line.cut(by_user=False)

    def typed(self, text):
        if not text.strip():
            raise ValueError("the text is empty; give it some words")
        self.typed_texts.append(text)
        return []

    def clear(self):
        self.heard = 0
        return []

    def remove(self, number):
        self.history.remove(number)
        self.removed.append(number)
        return []

    def heard_replies(self):
        return {exchange.number: "three and four" for exchange in self.history.exchanges}

    def played(self, reply, ms, last=False):
        self.acknowledged.append((reply, ms))


class ScriptedLine:
    """One conversation, which computes at once, in the thread that asks."""

    def __init__(self, scheduler, on_events, settings, turn_taking, history, transcribe):
        self.scheduler, self.on_events, self.transcribed = scheduler, on_events, transcribe
        self.conversation = ScriptedConversation(self, settings, turn_taking, history)
        self.samples, self.ticks, self.closed, self.heard_samples = np.zeros(0, np.float32), 0, False, 0
        self.voice, self.loud, self.quiet, self.fault = False, 0, 0, ""
        self.reply, self.sent, self.dropped_ms = None, 0, 0.0

    # The scheduler's face.

    def hear(self, samples):
        from minmo.conversation.scheduler import Refused

        assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()
        if self.closed:
            raise RuntimeError("this conversation was closed: open another")
        if len(samples) > 60 * 16_000:
            raise Refused(f"{len(samples) / 16_000:.1f} s of sound would wait to be heard, and 60 s may")
        self.heard_samples += len(samples)
        self.samples = np.concatenate([self.samples, samples])
        while len(self.samples) >= TICK and not self.closed:
            tick, self.samples = self.samples[:TICK], self.samples[TICK:]
            self.tell(self.tick(float(np.sqrt(np.mean(tick**2)))))

    def do(self, action, *, after_sound=False):
        future = Future()
        if self.closed:
            future.set_exception(RuntimeError("this conversation was closed: open another"))
            return future
        if after_sound and len(self.samples):
            self.hear(np.zeros(-len(self.samples) % TICK, np.float32))
        try:
            events = action(self.conversation)
            self.tell(events)
            future.set_result(events)
        except Exception as error:
            future.set_exception(error)
        return future

    def clear(self):
        self.dropped_ms += len(self.samples) / 16
        self.samples = self.samples[:0]
        return self.do(lambda conversation: conversation.clear())

    def transcribe(self, wanted):
        self.transcribed = wanted
        future = Future()
        future.set_result(None)
        return future

    def close(self):
        if not self.closed:
            self.closed = True
            self.scheduler.lines.remove(self)

    # The script.

    @property
    def now_ms(self):
        return 80.0 * self.ticks

    def tell(self, events):
        from minmo.conversation.events import Fault

        if events:
            self.on_events(events)
        if any(isinstance(event, Fault) for event in events):
            self.close()

    def tick(self, level):
        from minmo.conversation import Phase
        from minmo.conversation import events as E

        c, events = self.conversation, []
        phase = c.phase
        self.ticks += 1
        c.heard += 1
        if self.scheduler.fault:
            return [E.Fault(self.now_ms, self.scheduler.fault)]
        self.loud = self.loud + 1 if level > LOUD else 0
        self.quiet = 0 if level > LOUD else self.quiet + 1
        if self.loud == 2 and not self.voice:
            self.voice = True
            events.append(E.SpeechStarted(self.now_ms, self.now_ms - 160))
        answer, stop = float(self.voice and self.quiet >= QUIET_TICKS), float(self.loud >= STOP_TICKS)
        if self.voice and self.quiet >= QUIET_TICKS:
            self.voice = False
            events.append(E.SpeechStopped(self.now_ms, self.now_ms - 80 * QUIET_TICKS))
            if c.phase is Phase.LISTENING and c.turn_taking.answer is not None:
                events += self.take()
        elif stop and c.phase is not Phase.LISTENING and c.turn_taking.stop is not None:
            events += self.cut(by_user=True)
        elif self.reply is not None and c.settings.speak:
            c.phase = Phase.SPEAKING
            tone = 0.3 * np.sin(2 * np.pi * 440 / RATE * np.arange(self.sent, self.sent + PIECE))
            events.append(E.Sound(self.now_ms, self.reply, self.sent, tone.astype(np.float32)))
            self.sent += PIECE
            if self.sent >= self.scheduler.reply_s * RATE:
                events += self.done()
        return [E.Decision(self.now_ms, answer, stop, phase), *events]

    def take(self):
        from minmo.conversation import Phase
        from minmo.conversation import events as E
        from minmo.conversation.history import Exchange

        c = self.conversation
        self.reply, self.sent = c.replies, 0
        c.replies += 1
        c.phase = Phase.TAKING
        c.history.exchanges.append(Exchange(None, [], self.reply))
        events = [
            E.TurnTaken(self.now_ms, self.reply, self.now_ms - 80 * self.quiet),
            E.TextDelta(self.now_ms, self.reply, "three and "),
        ]
        events.append(E.TextDelta(self.now_ms, self.reply, "four"))
        if self.transcribed and not c.typed_texts:
            events.append(E.UserText(self.now_ms, self.reply, "what is it"))
        c.heard, c.typed_texts = 0, []
        return events if c.settings.speak else [*events, *self.done()]

    def done(self):
        from minmo.conversation import Phase
        from minmo.conversation import events as E

        number, self.reply, self.conversation.phase = self.reply, None, Phase.LISTENING
        return [E.ReplyDone(self.now_ms, number, "three and four")]

    def cut(self, by_user):
        from minmo.conversation import Phase
        from minmo.conversation import events as E

        number, self.reply, self.conversation.phase = self.reply, None, Phase.LISTENING
        heard = 1e3 * self.sent / RATE
        return [E.Interrupted(self.now_ms, number, by_user, "three and ", heard, 240.0, 240.0, 440.0)]


class ScriptedScheduler:
    """reply_s: how long replies sound. fault: breaks every conversation at its next tick. rooms: for how many there is
    time."""

    def __init__(self, reply_s=1.0, rooms=100):
        self.reply_s, self.rooms, self.fault, self.lines, self.opened = reply_s, rooms, "", [], []
        self.alive = True
        self.model = SimpleNamespace(config=SimpleNamespace(vocoder=SimpleNamespace(sample_rate=RATE)))

    def open(self, on_events, settings, turn_taking, *, history=None, transcribe=False):
        from minmo.conversation.scheduler import Refused

        if len(self.lines) >= self.rooms:
            raise Refused(f"{len(self.lines)} sessions run, and there is time for no more: end one")
        line = ScriptedLine(self, on_events, settings, turn_taking, history, transcribe)
        self.lines.append(line)
        self.opened.append(line)
        return line

    def statistics(self):
        from minmo.conversation.statistics import Meter

        return Meter().statistics(len(self.lines), 0.0, {"tick": 0})


@dataclasses.dataclass
class Running:
    """A server on loopback, in a thread of its own."""

    port: int
    server: object
    scheduler: object
    uvicorn: object
    tls: bool = False

    @property
    def url(self):
        return f"http{'s' * self.tls}://127.0.0.1:{self.port}"

    def ws(self, query=""):
        return f"ws{'s' * self.tls}://127.0.0.1:{self.port}/v1/realtime{query}"


@pytest.fixture
def scripted():
    return ScriptedScheduler


@pytest.fixture
def serve():
    """serve(scheduler, tls=(certificate, key), **settings of Server) -> Running; ended after the test."""
    running = []

    def start(scheduler, tls=(), **settings):
        pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")
        from minmo.serving.app import Server
        from minmo.serving.run import Draining, config

        server = Server(scheduler, "nano", **settings)
        runner = Draining(config(server.app(), "127.0.0.1", 0, *tls), server.hall, 0.0)
        thread = threading.Thread(target=runner.run, daemon=True)
        thread.start()
        for _ in range(6000):
            if runner.started:
                break
            thread.join(0.01)
        assert runner.started
        port = runner.servers[0].sockets[0].getsockname()[1]
        running.append((Running(port, server, scheduler, runner, bool(tls)), thread))
        return running[-1][0]

    yield start
    for one, thread in running:
        one.uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def client():
    """client(running, query, **options of websockets) -> a Client, that has been greeted; closed after the test."""
    from realtime_client import Client

    with contextlib.ExitStack() as stack:

        def start(running, query="", greeted=True, **options):
            one = Client(running.ws(query), **options)
            stack.callback(one.socket.close)
            if greeted:
                one.greeting = one.read()
            return one

        yield start


@pytest.fixture(scope="module")
def engine():
    """An untrained nano whose texts have some length, and depend on what was said."""
    import torch

    import minmo
    from minmo import weights

    torch.manual_seed(5)
    model = weights.untrained("nano", "cpu")
    model.config = dataclasses.replace(model.config, remembered=100)
    with torch.no_grad():
        for parameter in model.llm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return minmo.FastMinMo(model, rows=7, max_positions=300, max_voice_positions=400)


@pytest.fixture
def decisions(monkeypatch):
    """The predictor's decisions, as a test gives them."""
    from opened_lines import Decisions

    from minmo.conversation import steps

    given = Decisions()
    monkeypatch.setattr(steps, "decide", given)
    return given


@pytest.fixture
def scheduler(engine):
    from opened_lines import CHEAP

    from minmo.conversation.scheduler import Scheduler

    with Scheduler(engine, budget=CHEAP) as scheduler:
        yield scheduler
    assert not engine._seated, "every row is free again"
