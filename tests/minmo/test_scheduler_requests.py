"""What is asked of a conversation among many: it comes in its place, breaks nothing of others', or is refused."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from opened_lines import CHEAP, NAN, NEITHER, TAKE, TEXT, WAIT_S, Client, sound

import minmo
from minmo.config import TICK
from minmo.conversation import transcripts
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Decision, Fault, ReplyDone, TextDelta, TurnTaken, UserText
from minmo.conversation.line import Tick
from minmo.conversation.scheduler import Line, Refused, Scheduler
from minmo.conversation.turn_taking import BY_REQUEST


def test_requests_keep_their_order_and_clearing_what_was_asked_for():
    scheduler = object.__new__(Scheduler)
    scheduler._wake, scheduler._calls, ran = threading.Condition(threading.RLock()), [], []
    scheduler._act = lambda line, action: ran.append(action)
    conversation = SimpleNamespace(opened=False, next_step=None)
    line = Line(scheduler, conversation, print, False)
    line.hear(sound(1))
    line.do("first")
    conversation.opened = True  # meanwhile, and nobody has looked yet
    line.do("second")
    for call in scheduler._calls:
        call()
    while (call := scheduler._asked_now(line)) is not None:
        call()
    assert ran == ["first", "second"] and len(line._inbox) == 1
    line._paced = paced = time.perf_counter() + 1e3
    line.do("take", after_sound=True)
    line.hear(sound(2)[1:])
    line.clear()
    assert [isinstance(item, Tick) for item in line._inbox] == [True, False, False], (
        "what was asked for hears its sound"
    )
    assert line._paced == pytest.approx(paced, abs=0.01), "and clearing wins no time: sound still comes in real time"


def test_who_asks_without_end_keeps_nobody_waiting(scheduler):
    asking, talking = Client(scheduler, TEXT), Client(scheduler, TEXT)
    enough = threading.Event()

    def again(_=None):
        if not enough.is_set():
            asking.line.do(lambda c: time.sleep(0.01) or [], after_sound=True).add_done_callback(again)

    again()
    talking.line.hear(sound(2))
    talking.line.do(lambda c: enough.set() or [], after_sound=True).result(WAIT_S)
    assert len(talking.of(Decision)) == 2


def test_what_an_action_breaks_is_its_own(scheduler, decisions):
    """One that leaves the thread changes nothing; one that closes its conversation, or keeps its fault for itself, ends
    its line before that shares another step."""
    clients = [Client(scheduler, TEXT) for _ in range(3)]
    good, closing, silent = clients
    with pytest.raises(SystemExit):
        good.line.do(lambda c: sys.exit("enough")).result(WAIT_S)
    with pytest.raises(TypeError):
        closing.line.do(Conversation.close).result(WAIT_S)
    decisions.plan(silent.conversation, [NAN])
    with pytest.raises(ZeroDivisionError):
        silent.line.do(lambda c: c.tick(sound(1)) and 1 / 0).result(WAIT_S)
    assert [len(c.of(Fault)) for c in clients] == [0, 1, 1] and scheduler.statistics().sessions == 1
    good.line.hear(sound(2))
    good.settle()
    assert len(good.of(Decision)) == 2


def test_transcripts_do_not_wait_for_sound_ahead_of_time(engine, scheduler, decisions, monkeypatch):
    monkeypatch.setattr(transcripts, "LONGEST", 6)
    fast, slow = Client(scheduler, TEXT), Client(scheduler, TEXT, transcribe=True)
    decisions.plan(slow.conversation, [NEITHER, TAKE])
    fast.line._paced = time.perf_counter() + 1e6
    fast.line.hear(sound(200))
    slow.line.hear(sound(2, 1))
    told = threading.Event()
    kept, slow.line._on_events = slow.receive, lambda e: (kept(e), slow.of(UserText) and told.set())
    assert told.wait(WAIT_S) and len(fast.of(Decision)) < 200
    assert fast.line._heard <= time.perf_counter(), "what is measured from there is never negative"


def test_few_turns_of_one_owner_wait_for_transcripts(engine):
    transcriber, told = transcripts.Transcriber(engine), []
    for owner in (1, 2):
        for _ in range(transcripts.MOST_WAITING + owner):
            transcriber.add(owner, torch.zeros(2, engine.config.llm.dim), lambda text, why: told.append(why))
    assert len(transcriber) == 2 * transcripts.MOST_WAITING and len(told) == 3 and "wait" in told[0]
    transcriber.close()


def test_closing_while_replies_run(engine, scheduler, decisions):
    """No event comes after, whatever waits is refused, and the rows are free at once."""
    clients = [Client(scheduler) for _ in range(3)]
    for client in clients:
        decisions.plan(client.conversation, [NEITHER, TAKE])
        client.line.hear(sound(4, 1))
    clients[0].until(lambda: clients[0].of(TextDelta))
    waiting = clients[0].line.do(lambda c: time.sleep(0.2) or [])
    refused = clients[1].line.do(Conversation.stop)
    counts = []
    for client in clients:
        client.line.close()
        client.line.close()
        counts.append(len(client.events))
        with pytest.raises(RuntimeError, match="was closed"):
            client.line.hear(sound(1))
        with pytest.raises(RuntimeError, match="was closed"):
            client.line.do(Conversation.clear).result(WAIT_S)
    again = [Client(scheduler) for _ in range(3)]
    again[0].line.hear(sound(2))
    again[0].settle()
    assert counts == [len(client.events) for client in clients] and not clients[0].of(ReplyDone)
    with pytest.raises(RuntimeError, match="was closed"):
        refused.result(WAIT_S)
    waiting.exception(WAIT_S)  # done, or refused where it had not begun


def test_requests_come_in_their_place(scheduler, decisions):
    """After the sound that was given before, the last tick of it filled up with silence; or at once. An error is the
    asker's alone."""
    client = Client(scheduler, TEXT, BY_REQUEST)
    with pytest.raises(ValueError, match="nothing to answer"):
        client.line.do(Conversation.take_turn).result(WAIT_S)
    with pytest.raises(RuntimeError, match="would wait for itself"):
        client.line.do(lambda c: scheduler.open(print)).result(WAIT_S)
    client.line.hear(sound(3, 1)[:-700])
    (taken,) = client.line.do(Conversation.take_turn, after_sound=True).result(WAIT_S)
    assert isinstance(taken, TurnTaken) and taken.at_ms == 240.0
    client.settle()
    assert len(client.of(Decision)) == 3 and len(client.of(ReplyDone)) == 1 and taken in client.events
    client.line.hear(sound(1, 2)[:-1])
    client.line.clear().result(WAIT_S)
    client.line.hear(sound(1, 2)[:1])
    client.settle()
    assert len(client.of(Decision)) == 4, "what was cleared was not heard"


def test_users_are_transcribed_when_asked_for(engine, decisions, monkeypatch):
    """As `minmo.transcribe` does, of the very same sound; of what was typed there is none."""
    monkeypatch.setattr(transcripts, "LONGEST", 6)
    samples = sound(5, 7)
    with Scheduler(engine, budget=CHEAP) as scheduler:
        clients = [Client(scheduler, TEXT, transcribe=wanted) for wanted in (True, False)]
        assert len(engine._seated) == 5
        for client in clients:
            decisions.plan(client.conversation, [NEITHER] * 4 + [TAKE])
            client.line.hear(samples)
        for client in clients:
            client.settle()
        client = clients[0]
        client.line.do(lambda c: c.typed("two plus three")).result(WAIT_S)
        client.line.do(Conversation.take_turn).result(WAIT_S)
        client.until(lambda: client.of(UserText) and len(client.of(ReplyDone)) == 2)
        assert not scheduler.statistics().waiting["transcribe"]
        (said,) = client.of(UserText)
        assert not clients[1].of(UserText) and len(client.of(TurnTaken)) == 2
        clients[1].line.transcribe(True).result(WAIT_S)
        decisions.plan(clients[1].conversation, [TAKE])
        clients[1].line.hear(samples[:TICK])
        clients[1].until(lambda: clients[1].of(UserText))
        with monkeypatch.context() as patch:
            patch.setattr(transcripts, "read_pieces", lambda *_: 1 / 0)
            decisions.plan(clients[1].conversation, [TAKE])
            clients[1].line.hear(samples[:TICK])
            clients[1].until(lambda: len(clients[1].of(UserText)) == 2)
        assert "ZeroDivisionError" in clients[1].of(UserText)[1].fault and not clients[1].of(Fault)
        client.line.transcribe(False).result(WAIT_S)
    settings = minmo.Settings(temperature=0.0, max_text_tokens=6, speak=False)
    assert said.text == minmo.transcribe(engine, samples, settings).text and said.text and said.reply == 0


def test_too_much_sound_is_refused_and_bad_sound_too(scheduler):
    client = Client(scheduler, TEXT)
    with pytest.raises(Refused, match=r"61\.0 s of sound would wait"):
        client.line.hear(np.zeros(61 * 16_000, np.float32))
    with pytest.raises(minmo.AudioError, match="NaN"):
        client.line.hear(np.full(3, np.nan, np.float32))
    with pytest.raises(minmo.AudioError, match="float"):
        client.line.hear(np.zeros(3, np.int16))
    client.line.hear(np.zeros(0, np.float32))
    used = sound(1)[:600]
    client.line.hear(used)
    used[:] = np.nan  # a recorder may use its buffer again
    client.line.hear(sound(1)[600:])
    client.settle()
    assert len(client.of(Decision)) == 1, "nothing of what was refused was heard"


def test_a_history_of_texts_is_as_if_typed(engine, scheduler):
    first = Client(scheduler, TEXT, BY_REQUEST)
    first.line.do(lambda c: c.typed("two plus three")).result(WAIT_S)
    first.line.do(Conversation.take_turn).result(WAIT_S)
    first.settle()
    resumed = Client(scheduler, TEXT, BY_REQUEST, history=[("two plus three", "five")])
    opened = []
    resumed.line.do(lambda c: opened.append(c.opened) or []).result(WAIT_S)
    assert opened == [True], "its history was read first, piece by piece"
    (typed,), given = first.conversation.history.exchanges, resumed.conversation.history.exchanges[0]
    assert torch.equal(typed.user, given.user) and given.reply == engine.tokenizer.encode("five")
    assert first.conversation.heard_replies() == {0: engine.tokenizer.decode(typed.reply)}
    assert resumed.conversation.heard_replies() == {0: "five"}
    resumed.line.do(lambda c: c.typed("seven")).result(WAIT_S)
    (taken,) = resumed.line.do(Conversation.take_turn).result(WAIT_S)
    assert taken.reply == 1
    with pytest.raises(ValueError, match="empty"):
        scheduler.open(print, TEXT, history=[("", "five")])
    unheard = Client(scheduler, TEXT, BY_REQUEST, history=[(None, "five")])
    unheard.settle()
    assert len(unheard.conversation.history.exchanges[0].user) == 0
    assert unheard.conversation.heard_replies() == {0: "five"}


def test_the_row_of_transcripts_comes_back(engine, scheduler):
    """Once nobody wants them any more, by asking for none or by going."""
    first, second = (Client(scheduler, TEXT, transcribe=True) for _ in range(2))
    assert len(engine._seated) == 5
    first.line.transcribe(False).result(WAIT_S)
    assert len(engine._seated) == 5
    second.line.close()
    first.settle()
    assert len(engine._seated) == 2
    first.line.transcribe(True).result(WAIT_S)
    assert len(engine._seated) == 3
    first.line.transcribe(False).result(WAIT_S)
    assert len(engine._seated) == 2


def test_many_that_open_at_once_let_others_be_heard(scheduler, monkeypatch):
    """What opens is as bounded as any other work between two batches."""
    talking, order = Client(scheduler, TEXT), []
    talking.settle()
    monkeypatch.setattr(scheduler, "_begin", lambda *_: time.sleep(0.05) or order.append("open"))
    monkeypatch.setattr(scheduler, "_hear", lambda lines, hear=scheduler._hear: (order.append("tick"), hear(lines)))
    held = threading.Event()
    blocking = talking.line._ask(lambda: held.wait(WAIT_S))
    opening = [threading.Thread(target=scheduler.open, args=(print,)) for _ in range(4)]
    for thread in opening:
        thread.start()
    while len(scheduler._calls) < 4:
        time.sleep(0.01)
    talking.line.hear(sound(1))
    held.set()
    blocking.result(WAIT_S)
    for thread in opening:
        thread.join(WAIT_S)
    assert order.index("tick") <= 1 and order.count("open") == 4


def test_a_turn_waits_for_context_piece_by_piece(scheduler, monkeypatch):
    """What is to be read anew is read in steps, between which others are served, and not at once by who asks."""
    client = Client(scheduler, TEXT, BY_REQUEST, history=[("two plus three", "five")])
    client.line.do(lambda c: c.typed("seven"), after_sound=True).result(WAIT_S)
    at_once = []
    monkeypatch.setattr(Conversation, "_finish_reading", lambda c: at_once.append(c.next_step))
    client.line.do(lambda c: c._branches.reread() or []).result(WAIT_S)
    client.line.do(Conversation.take_turn, after_sound=True).result(WAIT_S)
    assert at_once == [None]
