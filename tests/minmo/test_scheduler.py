"""Many conversations on one engine: each goes as if alone, whoever shares its batches, however its sound arrives.

The weights are random and the predictor's decisions given; no test asserts a duration on the clock.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opened_lines import AT_ONCE, CHEAP, DRAWN, GREEDY, NAN, NEITHER, STOP, TAKE, TEXT, WAIT_S, Client, Decisions, sound

import minmo
from minmo.config import TICK
from minmo.conversation import batch, steps
from minmo.conversation import line as lines
from minmo.conversation.budget import PARTS, Budget
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import Decision, Fault, ReplyDone, Sound, TextDelta, TurnTaken
from minmo.conversation.history import Exchange, History
from minmo.conversation.scheduler import Line, Refused, Scheduler
from minmo.conversation.turn_taking import Phase


def alone(engine, decisions, plan, samples, settings):
    """The events of a conversation that shares nothing, with all work done between its ticks."""
    conversation = Conversation(engine, settings, AT_ONCE)
    decisions.plan(conversation, plan)
    events = []
    try:
        for tick in samples.reshape(-1, TICK):
            while conversation.next_step:
                events += conversation.step()
            events += conversation.tick(tick)
        while conversation.next_step:
            events += conversation.step()
    finally:
        conversation.close()
    return events


def assert_same(events, expected):
    def told(event):
        return (event.at_ms, event.reply, event.start, len(event.audio)) if isinstance(event, Sound) else event

    assert [told(e) for e in events] == [told(e) for e in expected]
    for a, b in zip(events, expected, strict=True):
        if isinstance(a, Sound):
            np.testing.assert_allclose(a.audio, b.audio, atol=1e-3)


def replies(events):
    """Text and sound of each reply, of which every sample must be there, in order."""
    texts, sounds = {}, {}
    for event in events:
        if isinstance(event, TextDelta):
            texts[event.reply] = texts.get(event.reply, "") + event.text
        elif isinstance(event, Sound):
            so_far = sounds.setdefault(event.reply, [])
            assert event.start == sum(map(len, so_far)), "nothing is lost, and no piece overtakes another"
            so_far.append(event.audio)
    return texts, {reply: np.concatenate(pieces) for reply, pieces in sounds.items()}


plans = st.lists(st.sampled_from([NEITHER, NEITHER, TAKE, TAKE, STOP]), min_size=6, max_size=10)


@settings(max_examples=3)
@given(plans=st.lists(plans, min_size=2, max_size=3), cut=st.sampled_from([16, 333, 700, TICK]), seed=st.integers(0, 9))
def test_each_goes_as_if_alone(engine, plans, cut, seed):
    """Out of step, in pieces of any length, each from a thread of its own: the same events at the same times, and the
    same sound. A conversation gets its next tick once the work of the last one is done, as the one alone."""
    with pytest.MonkeyPatch.context() as patch:
        decisions = Decisions()
        patch.setattr(steps, "decide", decisions)
        drawn = [DRAWN if n else GREEDY for n in range(len(plans))]
        sounds = [sound(len(plan), seed + n) for n, plan in enumerate(plans)]
        with Scheduler(engine, budget=CHEAP) as scheduler:
            clients = [Client(scheduler, s) for s in drawn]

            def talk(client, plan, samples):
                decisions.plan(client.conversation, plan)
                client.settle()
                for tick in samples.reshape(-1, TICK):
                    for start in range(0, TICK, cut):
                        client.line.hear(tick[start : start + cut])
                    client.settle()

            with ThreadPoolExecutor(len(clients)) as pool:
                list(pool.map(talk, clients, plans, sounds))
        for client, plan, samples, s in zip(clients, plans, sounds, drawn, strict=True):
            assert_same(client.events, alone(engine, decisions, plan, samples, s))


def test_what_shares_every_batch_changes_nothing(engine, decisions):
    """Each tick and each step of three at once, where the ones speak while others listen and read."""
    plans = [
        [NEITHER, TAKE, *[NEITHER] * 5, STOP, NEITHER],
        [NEITHER, TAKE, *[NEITHER] * 7],
        [*[NEITHER] * 4, TAKE, STOP, *[NEITHER] * 3],
    ]
    sounds, drawn = [sound(9, n) for n in range(3)], [DRAWN, GREEDY, DRAWN]
    together, events, shared = [Conversation(engine, s, AT_ONCE) for s in drawn], [[], [], []], set()

    def do(kind, step, members):
        shared.add((kind, len(members)))
        for n, told in zip(members, step([together[n] for n in members]), strict=True):
            events[n] += told

    for conversation, plan in zip(together, plans, strict=True):
        decisions.plan(conversation, plan)
    for tick in [*range(9), None]:
        while due := [(c.next_step, n) for n, c in enumerate(together) if c.next_step]:
            kind = min(due)[0]
            do(kind, batch.STEPS[kind], [n for k, n in due if k == kind])
        if tick is not None:
            pieces = [s[tick * TICK :][:TICK] for s in sounds]
            do("tick", lambda members, pieces=pieces: batch.tick(members, pieces), [0, 1, 2])
    for conversation in together:
        conversation.close()
    assert {("tick", 3), ("read", 3), ("write", 2), ("speak", 2), ("flow", 2), ("sound", 2)} <= shared
    for own, plan, samples, s in zip(events, plans, sounds, drawn, strict=True):
        assert_same(own, alone(engine, decisions, plan, samples, s))


def test_order_holds_under_backlog(engine, scheduler, decisions):
    """One gives all its sound at once, another in pieces of 1 ms, while both are answered."""
    plan = [NEITHER] * 3 + [TAKE]
    samples = [sound(124, 1), sound(6, 2)]
    clients = [Client(scheduler), Client(scheduler)]
    for client in clients:
        decisions.plan(client.conversation, plan)
    clients[0].line.hear(samples[0])
    for start in range(0, len(samples[1]), 16):
        clients[1].line.hear(samples[1][start : start + 16])
    for client in clients:
        client.settle()
    found = scheduler.statistics()
    assert (found.sessions, found.ticks, found.tick_ms.count, found.first_audio_ms.count) == (2, 130, 130, 2)
    assert found.lag_ms == 0 and not any(found.waiting.values()) and found.deadline_misses <= 130
    assert 124 <= found.steps["tick"] <= 130 and found.steps["speak"] >= 2 and found.busy_s > 0
    scheduler.close()
    for client, own in zip(clients, samples, strict=True):
        at = [d.at_ms for d in client.of(Decision)]
        assert at == [80.0 * (n + 1) for n in range(len(own) // TICK)], "all of it is heard, in order"
        texts, sounds = replies(client.events)
        expected_texts, expected = replies(alone(engine, decisions, plan, own[: 12 * TICK], GREEDY))
        n = min(len(sounds[0]), len(expected[0]))
        assert texts == expected_texts and n >= 200 * 24
        np.testing.assert_allclose(sounds[0][:n], expected[0][:n], atol=1e-3)
    assert len(clients[0].of(ReplyDone)) == 1


@pytest.mark.parametrize("fault", ["nan", "callback", "error"])
def test_a_fault_in_one_touches_no_other(engine, scheduler, decisions, monkeypatch, fault):
    bad, good = Client(scheduler), Client(scheduler)
    plan = [NEITHER, TAKE, NEITHER, NEITHER]
    decisions.plan(bad.conversation, [NEITHER, NAN] if fault == "nan" else plan)
    decisions.plan(good.conversation, plan)

    def broken(*_):
        raise RuntimeError("out of order")

    if fault == "callback":
        bad.line._on_events = broken
    elif fault == "error":
        monkeypatch.setattr(bad.conversation, "_heard_voice", broken)
    samples = sound(4, 1)
    for tick in samples.reshape(-1, TICK):
        good.line.hear(tick)
        if not bad.line._ended:
            bad.line.hear(tick)
        good.settle()
    assert "has ended" in bad.line._ended
    with pytest.raises(RuntimeError, match="has ended: .*; open another"):
        bad.line.hear(samples)
    with pytest.raises(RuntimeError, match="has ended"):
        bad.line.do(Conversation.clear).result(WAIT_S)
    assert fault == "callback" or isinstance(bad.events[-1], Fault)
    assert scheduler.statistics().sessions == 1 and len(engine._seated) == 2, "its rows are free"
    scheduler.open(lambda events: None, TEXT)
    scheduler.close()
    assert_same(good.events, alone(engine, decisions, plan, samples, GREEDY))


def test_a_step_that_fails_ends_those_who_shared_it(scheduler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(steps, "hear", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        clients = [Client(scheduler), Client(scheduler)]
        for client in clients:
            client.line.hear(sound(1))
        for client in clients:
            assert client.ended.wait(WAIT_S) and "MemoryError: no room" in client.of(Fault)[0].why
    later = Client(scheduler)
    later.line.hear(sound(2))
    later.settle()
    assert len(later.of(Decision)) == 2


def test_a_session_beyond_the_budget_is_refused_with_the_figures(engine):
    """Two fit: ticks 20, speech 2 x 0.5 x 80/600 x (40 + 60 + 2 x 25) = 20, text 4; a third takes 30 + 30 + 6 of 56."""
    budget = Budget(
        tick={1: 10.0, 4: 40.0},
        read={1: 0.0},
        write={1: 30.0},
        speak={1: 40.0},
        flow={1: 60.0},
        sound={1: 25.0},
        end={1: 0.0},
    )
    with Scheduler(engine, budget=budget) as scheduler:
        lines = [scheduler.open(lambda events: None, TEXT) for _ in range(2)]
        with pytest.raises(Refused, match=r"2 sessions run, which with one more would need 66 ms of every 80 ms \("):
            scheduler.open(lambda events: None, TEXT)
        lines[0].close()
        lines.append(scheduler.open(lambda events: None, TEXT))
        assert scheduler.statistics().sessions == 2
    with pytest.raises(RuntimeError, match="was closed"):
        scheduler.open(lambda events: None)
    with Scheduler(engine, budget=CHEAP) as scheduler:
        for _ in range(3):
            scheduler.open(lambda events: None, TEXT)
        with pytest.raises(Refused, match="7 rows have no room for one more"):
            scheduler.open(lambda events: None, TEXT)
    with Scheduler(engine, budget=CHEAP, max_sessions=1) as scheduler:
        scheduler.open(lambda events: None, TEXT)
        with pytest.raises(Refused, match="1 sessions run, and 1 may"):
            scheduler.open(lambda events: None, TEXT)
    with Scheduler(engine, budget=CHEAP) as scheduler, pytest.raises(ValueError, match="raise max_positions"):
        scheduler.open(lambda events: None, minmo.Settings(max_text_tokens=300))


def test_what_a_budget_says_of_batches():
    budget = Budget(
        tick={1: 10.0, 2: 12.0, 4: 20.0},
        read={1: 8.0},
        write={1: 20.0},
        speak={1: 60.0, 4: 90.0},
        flow={1: 0.0},
        sound={1: 0.0},
        end={1: 0.0},
    )
    assert [budget.cost("tick", n) for n in (1, 2, 3, 4, 8)] == [10, 12, 16, 20, 40]
    assert budget.most("tick", 16, 9) == 3 and budget.most("speak", 40, 9) == 1 and budget.most("speak", 70, 9) == 2
    assert budget.most("tick", 16, 2) == 2
    needed = budget.needed(4, transcribed=2)
    assert needed["ticks"] == 20 and needed["context"] == 4 * 0.5 * 8 / 64
    assert needed["speech"] == pytest.approx(4 * 0.5 * 80 / 600 * 60) and needed["transcripts"] > 0
    assert budget.needed(0)["ticks"] == 0 and not budget.shortage(4)


def test_a_budget_is_measured(engine):
    budget = Budget.measure(engine, 2, repeats=1)
    assert set(budget.tick) == set(budget.speak) <= {1, 2} and 1 in budget.tick and budget.block_ms == 600
    assert all(ms > 0 for step in PARTS for ms in getattr(budget, step).values()) and budget.pieces == 2
    assert not engine._seated


def test_a_tick_waits_for_one_step_at_most(scheduler, decisions, monkeypatch):
    """While another's reply is made, of which every step has such a tick come in meanwhile."""
    talking, listening, order = Client(scheduler), Client(scheduler, TEXT), []
    listening.settle()

    def meanwhile(kind, step):
        def computed(conversations):
            order.append(kind)
            listening.line._paced = 0.0  # long ago: it is due at once
            listening.line.hear(sound(1))
            return step(conversations)

        return computed

    hear = scheduler._hear
    monkeypatch.setattr(scheduler, "_hear", lambda own: (order.append("tick"), hear(own)))
    for kind, step in batch.STEPS.items():
        monkeypatch.setitem(batch.STEPS, kind, meanwhile(kind, step))
    decisions.plan(talking.conversation, [NEITHER, TAKE])
    for _ in range(40):
        talking.line._paced = 0.0
        talking.line.hear(sound(1, 1))
        talking.settle()
    assert len(talking.of(ReplyDone)) == 1 and set(batch.STEPS) <= set(order)
    assert all("tick" in pair for pair in zip(order, order[1:], strict=False))


def test_the_nearest_deadline_goes_first():
    """Least buffered sound first, whichever step that is; context that has waited long before sound that lasts."""
    scheduler = object.__new__(Scheduler)
    scheduler._wake = threading.Condition()
    scheduler.budget = Budget({1: 1.0}, {1: 10.0}, {1: 5.0}, {1: 30.0, 2: 36.0, 4: 80.0}, *[{1: 20.0}] * 3)
    now = time.perf_counter()

    def line(step, buffered_ms=0.0, waits_s=0.0, speaks=True, opened=True):
        conversation = SimpleNamespace(next_step=step, buffered_ms=buffered_ms, speaks=speaks, opened=opened)
        found = Line(scheduler, conversation, print, False)
        found._step, found._since = step, now - waits_s
        return found

    a, b, c, d = line("speak", 700), line("speak", 300), line("speak", 500), line("write", 900)
    scheduler._lines = [a, b, c, d, line(None)]
    assert scheduler._next_work() == ("speak", [b, c]), "as many as stay within the bound"
    first = line("write")
    scheduler._lines = [a, b, first, line("read")]
    assert scheduler._next_work() == ("write", [first]), "who has not been heard at all"
    begins = line("read", opened=False)
    scheduler._lines = [a, b, line("read"), begins]
    assert scheduler._next_work() == ("read", [begins, scheduler._lines[2]]), "its ticks wait for it; the other joins"
    late = line("read", waits_s=30.0)
    scheduler._lines = [a, first, late, line("write", speaks=False)]
    assert scheduler._next_work() == ("read", [late])
    scheduler._lines = [line(None)]
    assert scheduler._next_work() is None


def test_sound_that_comes_faster_than_real_time_is_due_in_real_time():
    """But for a second of it, which a network may have held back."""
    scheduler = object.__new__(Scheduler)
    scheduler._wake = threading.Condition()
    line = Line(scheduler, None, print, False)
    line.hear(sound(30)[:-1])
    dues = [tick.due - line._inbox[0].due for tick in line._inbox]
    assert dues == pytest.approx([max(0.0, 0.08 * n - 1.0) for n in range(29)], abs=0.01)
    line._paced = 0.0  # long ago
    line.hear(sound(1)[:1])
    assert line._inbox[-1].due > line._inbox[0].due and len(line._inbox) == 30
    np.testing.assert_array_equal(
        np.concatenate([tick.samples for tick in line._inbox]), np.append(sound(30)[:-1], sound(1)[:1])
    )


def test_a_client_whose_clock_is_fast_stays_in_real_time(monkeypatch):
    """By 90 ms in 100 s, for half an hour: its sound is due when it comes."""
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(lines, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    scheduler = object.__new__(Scheduler)
    scheduler._wake = threading.Condition()
    line, tick = Line(scheduler, None, print, False), sound(1)
    for _ in range(20_000):
        line.hear(tick)
        assert line._inbox.popleft().due == clock.now
        clock.now += 0.08 / 1.0009


def test_forgetting_is_of_the_oldest_alone(engine):
    """As few as need be, by the layout itself."""
    kept = [Exchange(torch.zeros(n, 4), [7] * (n // 2)) for n in (3, 9, 1, 20, 5)]
    history, sizes = History(), []
    for left in range(6):
        history.exchanges = kept[5 - left :]
        sizes.append(len(history.layout(engine.tokenizer)[0]))
    for room in range(sizes[-1] + 2):
        history.exchanges = list(kept)
        history.forget(engine.tokenizer, room, 100)
        left = max((n for n, size in enumerate(sizes) if size <= room), default=0)
        assert history.exchanges == kept[5 - left :]
    for most in range(7):
        history.exchanges = list(kept)
        history.forget(engine.tokenizer, sizes[4], most)
        assert history.exchanges == kept[5 - min(4, most) :]


def test_a_thread_that_fails_leaves_nobody_waiting(engine, monkeypatch):
    scheduler = Scheduler(engine, budget=CHEAP)
    client = Client(scheduler)
    client.settle()
    monkeypatch.setattr(scheduler, "_next_work", lambda: 1 / 0)
    client.line.hear(sound(1))
    assert client.ended.wait(WAIT_S) and "ZeroDivisionError" in client.of(Fault)[0].why
    scheduler._thread.join(WAIT_S)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        scheduler.open(print)
    scheduler.close()
    assert not engine._seated


@pytest.mark.parametrize("speak", [False, True])
def test_a_long_conversation_neither_grows_nor_drifts(scheduler, decisions, speak):
    """Of 16 s; `MINMO_SIMULATED_S=7200 pytest -k neither_grows` holds one of two hours, as fast as the machine can."""
    ticks = int(float(os.environ.get("MINMO_SIMULATED_S", "16")) * 12.5) // 100 * 100
    client = Client(scheduler, dataclasses.replace(TEXT, speak=speak))
    decisions.plan(client.conversation, ([NEITHER] * 3 + [TAKE] + [NEITHER] * 21) * (ticks // 25))
    heard, held, replies = 0, [], 0

    def cut(conversation):
        return conversation.stop() if conversation.phase in (Phase.TAKING, Phase.SPEAKING) else []

    def tensors():
        """Bytes, where no reply runs, beside the remembered turns: those come and go as the oldest are forgotten."""
        gc.collect()
        remembered = sum(exchange.user.nbytes for exchange in client.conversation.history.exchanges)
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor) - remembered

    for n in range(ticks // 25):
        client.line.hear(sound(25, n))
        client.settle()
        heard += sum(isinstance(e, Decision) for e in client.events)
        assert client.conversation.now_ms == heard * 80.0 == (n + 1) * 2_000.0
        client.line.do(cut).result(WAIT_S)
        client.settle()
        assert client.conversation.phase is Phase.LISTENING and len(client.conversation.history.open) == 21
        replies += len(client.of(TurnTaken))
        client.events.clear()
        if n % (ticks // 100) == ticks // 100 - 1:
            held.append(tensors())
    assert held[-1] <= held[0] + 4096 and replies == ticks // 25
