"""A conversation on its 80 ms clock: two branches, barge-in, what stays of a cut reply, and it is as if from scratch.

The weights are random where decisions do not matter; where they do, the predictor's are given, tick by tick.
"""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minmo
from minmo import weights
from minmo.config import TICK
from minmo.conversation import batch, client, steps
from minmo.conversation.client import simulate
from minmo.conversation.conversation import Conversation
from minmo.conversation.events import (
    Decision,
    Interrupted,
    ReplyDone,
    Sound,
    SpeechStarted,
    TextDelta,
    TurnTaken,
)
from minmo.conversation.history import Exchange, History
from minmo.conversation.turn_taking import BY_REQUEST, Phase, TurnTaking

GREEDY = minmo.Settings(temperature=0.0, max_text_tokens=12, max_speech_ratio=4, seed=3)
AT_ONCE = TurnTaking(answer_ticks=1, stop=0.5, stop_ticks=1)
TAKE, STOP, NEITHER = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)
DECIDE = steps.decide


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    model = weights.untrained("nano", "cpu")  # its replies are long and varied
    model.config = dataclasses.replace(model.config, remembered=100)
    with torch.no_grad():  # of random weights: texts of some length, that depend on what was said
        for parameter in model.llm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def engine(model):
    return minmo.FastMinMo(model, rows=8, max_positions=300, max_voice_positions=400, keep_model=True)


class Script:
    """The predictor's decisions, one a tick; neither once they are used up."""

    def __init__(self, *decisions):
        self.decisions = list(decisions)

    def __call__(self, model, state, rows, hidden, counts):
        DECIDE(model, state, rows, hidden, counts)
        given = self.decisions.pop(0) if self.decisions else NEITHER
        return torch.tensor(given).expand(len(rows), 1, 2)


@pytest.fixture
def script(monkeypatch):
    def use(*decisions):
        monkeypatch.setattr(steps, "decide", Script(*decisions))

    return use


def sound(ticks, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal((ticks, TICK))).astype(np.float32)


def run(conversation, ticks, work=True):
    """Ticks and the work between them -> all events."""
    events = []
    for samples in ticks:
        events += conversation.tick(samples)
        while work and conversation.next_step:
            events += conversation.step()
    return events


def of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def context(conversation):
    """The listening row: keys and values of the LLM up to its length."""
    state, row = conversation._state.llm, conversation._branches.listening
    n = int(state.lengths[row])
    return torch.stack([torch.cat([cache.k[row, :n], cache.v[row, :n]]) for cache in state.layers])


def from_scratch(model, conversation, max_positions):
    """A conversation that has read the same history, and nothing else."""
    history = History()
    history.exchanges = [Exchange(e.user.clone(), list(e.reply)) for e in conversation.history.exchanges]
    history.open = [x.clone() for x in conversation.history.open]
    settings, turn_taking = conversation.settings, conversation.turn_taking
    fresh = Conversation(model, settings, turn_taking, history=history, max_positions=max_positions)
    fresh._finish_reading()
    return fresh


def greedy_reply(conversation):
    """What answers the turn as it stands."""
    conversation.settings = dataclasses.replace(conversation.settings, speak=False)
    events = conversation.take_turn()
    while conversation.phase is not Phase.LISTENING:
        events += conversation.step()
    return "".join(event.text for event in of(TextDelta, events))


def assert_as_from_scratch(model, conversation, max_positions=300):
    """Sequence and positions exactly; states, and what the predictor sees, to rounding; greedy text exactly."""
    conversation._finish_reading()
    fresh = from_scratch(model, conversation, max_positions)
    assert fresh.history.layout(fresh.tokenizer) == conversation.history.layout(fresh.tokenizer)
    one, other = context(conversation), context(fresh)
    assert one.shape == other.shape
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.cat(conversation._branches.hidden), torch.cat(fresh._branches.hidden), rtol=1e-4, atol=1e-4
    )
    for c in (conversation, fresh):
        c.heard = c._state.duplex.cache.k[c._branches.own, : int(c._state.duplex.lengths[c._branches.own])].clone()
    torch.testing.assert_close(conversation.heard, fresh.heard, rtol=1e-4, atol=1e-4)
    text = greedy_reply(conversation)
    assert text == greedy_reply(fresh)
    fresh.close()
    return text


def type_some(conversation):
    conversation.typed("two plus three")


def remove_one(conversation):
    running = conversation.phase in (Phase.TAKING, Phase.SPEAKING)
    numbers = [exchange.number for exchange in conversation.history.exchanges]
    for number in numbers[: len(numbers) - running][:1]:
        conversation.remove(number)


MOMENTS = [NEITHER, NEITHER, NEITHER, TAKE, STOP, NEITHER, TAKE, STOP, type_some, Conversation.clear, remove_one]
decisions = st.lists(st.sampled_from(MOMENTS), min_size=8, max_size=28)


@settings(max_examples=8)
@given(
    decisions=decisions,
    seed=st.integers(0, 99),
    fast=st.booleans(),
    step_every=st.integers(1, 3),
    remembered=st.sampled_from([0, 1, 100]),
)
def test_whatever_happened_the_state_is_as_if_from_scratch(
    model, engine, decisions, seed, fast, step_every, remembered
):
    """Turns are taken and replies cut at any time, text is typed, turns and exchanges removed, with work between all
    ticks or some: in the end the context is what a session would hold that had read the history alone."""
    with pytest.MonkeyPatch.context() as patch:
        decided = [NEITHER if callable(d) else d for d in decisions]
        patch.setattr(steps, "decide", Script(TAKE, *decided, STOP))
        used = engine if fast else model
        patch.setattr(used, "config", dataclasses.replace(used.config, remembered=remembered))
        conversation = Conversation(used, GREEDY, AT_ONCE, max_positions=300)
        for n, (samples, decision) in enumerate(zip(sound(len(decisions) + 2, seed), [0, *decisions, 0], strict=True)):
            if callable(decision):
                decision(conversation)
            run(conversation, [samples], work=n % step_every == 0)
        if conversation.phase not in (Phase.LISTENING, Phase.YIELDING):
            conversation.stop()
        assert_as_from_scratch(used, conversation)
        conversation.close()


def test_a_cut_reply_by_hand(model, script):
    """Stopped within the tick, text cut to what was sent, no sound afterwards, latencies from the voice's begin."""
    script(*[NEITHER] * 11, TAKE, *[NEITHER] * 9, STOP)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    quiet, loud = sound(40, 1, 1e-4), sound(40, 2)
    events = run(conversation, [*quiet[:4], *loud[4:10], *quiet[10:19], *loud[19:22]])
    (taken,), (cut,) = of(TurnTaken, events), of(Interrupted, events)
    sent = of(Sound, events)
    assert taken.at_ms == 960 and cut.at_ms == 22 * 80 and cut.by_user and cut.reply == taken.reply == 0
    assert sent[0].at_ms == 960 and sent[-1].at_ms == 21 * 80
    assert cut.heard_ms == sum(len(s.audio) for s in sent) / 24
    assert [s.start for s in sent] == np.cumsum([0, *(len(s.audio) for s in sent[:-1])]).tolist()
    starts = of(SpeechStarted, events)
    assert [s.audio_start_ms for s in starts] == [320, 19 * 80]
    assert (cut.decided_ms, cut.sent_ms, cut.played_ms) == (240, 160, 160 + 200)
    written = "".join(d.text for d in of(TextDelta, events))
    assert cut.text and written.startswith(cut.text) and len(cut.text) < len(written)
    assert not of(Sound, run(conversation, quiet[22:40])), "nothing of it is sent any more"
    assert_as_from_scratch(model, conversation)


def test_what_the_client_has_played_counts_and_not_what_was_sent(model, script):
    script(NEITHER, TAKE, *[NEITHER] * 9, STOP)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    run(conversation, sound(11, 1))
    conversation.played(0, 40.0)
    conversation.played(7, 1e9)  # of a reply that is not there
    with pytest.raises(ValueError, match="cannot have been played"):
        conversation.played(0, 1e6)
    (cut,) = of(Interrupted, run(conversation, sound(1)))
    assert cut.heard_ms == 40 and cut.text == "" and conversation.history.exchanges[0].reply == []
    assert_as_from_scratch(model, conversation)


def test_a_client_says_after_the_cut_how_much_it_had_played(model, script):
    script(NEITHER, TAKE, *[NEITHER] * 9, STOP)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    events = run(conversation, sound(14, 1))
    (cut,), reply = of(Interrupted, events), conversation.history.exchanges[0].reply
    assert conversation.phase is Phase.LISTENING and cut.text and cut.heard_ms > 500
    conversation.played(0, 500.0)
    assert conversation.phase is Phase.YIELDING and conversation.next_step == "read"
    assert 0 < len(conversation.history.exchanges[0].reply) < len(reply)
    assert_as_from_scratch(model, conversation)


def test_a_reply_that_ends_stays_whole_and_the_next_turn_follows(model, script):
    script(NEITHER, TAKE, *[NEITHER] * 60)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    events = run(conversation, sound(45, 1))
    (done,) = of(ReplyDone, events)
    sent = of(Sound, events)
    total = sum(len(s.audio) for s in sent) / 24
    assert done.text == "".join(d.text for d in of(TextDelta, events))
    assert done.whole == (len(conversation.history.exchanges[0].reply) < GREEDY.max_text_tokens)
    assert conversation.tokenizer.decode(conversation.history.exchanges[0].reply) == done.text
    phases = [(d.at_ms, d.phase) for d in of(Decision, events)]
    last = max(at for at, phase in phases if phase is Phase.SPEAKING)
    assert total <= last - sent[0].at_ms < total + 80, "it speaks for as long as the sound lasts"
    assert phases[-1][1] is Phase.LISTENING
    ahead = [sum(len(s.audio) / 24 for s in sent if s.at_ms <= at) - (at - sent[0].at_ms) for at, _ in phases]
    assert max(ahead) <= 200 and max(ahead) > 119, "paced: at most 200 ms ahead, and no less than can be"
    assert_as_from_scratch(model, conversation)


@pytest.mark.parametrize("asked", [Conversation.take_turn, lambda c: c.remove(0)])
def test_once_a_replys_end_is_told_all_may_be_asked_for(model, script, asked):
    """Its last 200 ms may still be on their way to the user's ear."""
    script(NEITHER, TAKE, *[NEITHER] * 60)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    while not of(ReplyDone, run(conversation, sound(1))):
        pass
    assert conversation.phase is Phase.SPEAKING and conversation.buffered_ms
    whole = list(conversation._answer.ids)
    type_some(conversation)
    asked(conversation)
    if conversation.phase is Phase.TAKING:
        first, second = conversation.history.exchanges
        assert first.reply == whole and second.typed
        run(conversation, sound(1))
        conversation.stop()
    else:
        assert not conversation.history.exchanges
    assert_as_from_scratch(model, conversation)


@pytest.mark.parametrize("later", [0, 10])
def test_the_last_that_was_played_counts_also_of_a_whole_reply(model, script, later):
    """A client truncates a reply whose end was told; what it acknowledges on the way to the end is not the last."""
    script(NEITHER, TAKE, *[NEITHER] * 60)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    while not of(ReplyDone, run(conversation, sound(1))):
        pass
    run(conversation, sound(later))
    conversation.played(0, 80.0)
    whole = len(conversation._answer.ids if conversation._answer else conversation.history.exchanges[0].reply)
    conversation.played(0, 500.0, last=True)
    run(conversation, sound(4))
    assert conversation.phase is Phase.LISTENING and 0 < len(conversation.history.exchanges[0].reply) < whole
    assert_as_from_scratch(model, conversation)


@pytest.mark.parametrize("said", [6, 60])
def test_by_request_all_that_is_said_during_a_reply_is_of_the_next_turn(model, said):
    """Whether the voice ends while it is heard, or goes on after it."""
    conversation = Conversation(model, GREEDY, BY_REQUEST, max_positions=400)
    conversation.typed("two plus two")
    conversation.take_turn()
    while not of(Sound, run(conversation, sound(1, level=1e-4))):
        pass
    heard = 0
    while conversation.phase is not Phase.LISTENING or heard < said:
        run(conversation, sound(1, heard, 0.1 if heard < said else 1e-4))
        heard += 1
    before = len(conversation.history.open)
    assert before >= said
    run(conversation, sound(4))
    assert len(conversation.history.open) == before + 4


def test_a_text_reply_is_over_once_it_is_written(model, script):
    script(NEITHER, TAKE)
    conversation = Conversation(model, dataclasses.replace(GREEDY, speak=False), AT_ONCE, max_positions=300)
    events = run(conversation, sound(3))
    assert len(of(ReplyDone, events)) == 1 and not of(Sound, events) and conversation.phase is Phase.LISTENING
    assert_as_from_scratch(model, conversation)


def test_ticks_are_heard_between_the_blocks_of_a_reply(model, script):
    """A reply is cut after its first block of text, whose sound is never made."""
    script(NEITHER, TAKE, NEITHER, STOP)
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    ticks = sound(5, 1)
    run(conversation, ticks[:2], work=False)
    assert conversation.next_step == "write" and conversation.phase is Phase.TAKING
    conversation.step()
    assert conversation.next_step == "speak"
    events = run(conversation, ticks[2:4], work=False)
    (cut,) = of(Interrupted, events)
    assert cut.text == "" and cut.heard_ms == 0 and conversation.next_step == "read"
    events = run(conversation, ticks[4:])
    assert of(Decision, events)[0].phase is Phase.YIELDING and conversation.phase is Phase.LISTENING
    assert len(conversation.history.open) == 3
    assert_as_from_scratch(model, conversation)


@pytest.mark.parametrize("seed", range(3))
def test_how_the_steps_cut_a_reply_is_not_heard(model, script, monkeypatch, seed):
    """Its sound is that of its speech tokens in one shot; no step flows more than a chunk, or gives more sound than the
    first chunk's mel frames."""
    tokens, seeds, sizes = [], [], []
    speak, start, sounds = steps.speak, steps.start_speaking, steps.sound

    def kept(*arguments):
        found = speak(*arguments)
        tokens.append(found[0][0, : int(found[1])])
        return found

    monkeypatch.setattr(steps, "speak", kept)
    monkeypatch.setattr(steps, "start_speaking", lambda *a: (seeds.append(a[3]), start(*a)))
    monkeypatch.setattr(steps, "sound", lambda *a: (sizes.append(a[3].shape[1]), sounds(*a))[1])
    script(NEITHER, TAKE)
    drawn = dataclasses.replace(GREEDY, temperature=1.0, seed=seed, max_text_tokens=11 + seed)
    conversation = Conversation(model, drawn, AT_ONCE, max_positions=300)
    events = run(conversation, sound(60, seed))
    assert len(of(ReplyDone, events)) == 1
    spoken, voice = torch.cat(tokens)[None], model.speaker[None]
    with torch.inference_mode():
        mel, _ = model.flow(spoken, None, voice, seeds[0])
        expected, _ = model.vocoder(mel, None, seeds[0])
    heard = np.concatenate([s.audio for s in of(Sound, events)])
    assert len(heard) == 960 * spoken.shape[1] > 960 * 30
    np.testing.assert_allclose(heard, expected[0].numpy(), atol=1e-3)
    assert sizes[0] == 24 and sizes[1:3] == [15, 15] and sizes[-1] == 0 and min(sizes[:-1]) > 0 and max(sizes) == 24


def test_a_cut_between_two_steps_of_a_block_leaves_nothing_behind(model, script):
    """Whichever step was next: the context is as from scratch, and the next reply sounds the same, byte for byte."""
    later = []
    for kind in ("write", "speak", "flow", "sound"):
        script(NEITHER, TAKE, STOP, NEITHER, NEITHER, TAKE)
        conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
        ticks = sound(30, 1)
        run(conversation, ticks[:1])
        events = run(conversation, ticks[1:2], work=False)
        while conversation.next_step != kind:
            events += conversation.step()
        events += run(conversation, ticks[2:3], work=False)
        assert len(of(Interrupted, events)) == 1 and not of(Sound, events) and conversation.next_step == "read"
        events = run(conversation, ticks[3:5])
        assert not of(Sound, events) and not of(TextDelta, events)
        events = run(conversation, ticks[5:])
        later.append(np.concatenate([s.audio for s in of(Sound, events)]))
        assert_as_from_scratch(model, conversation)
    assert len(later[0]) > 24_000 and all(np.array_equal(later[0], audio) for audio in later[1:])


def test_the_oldest_exchanges_are_forgotten_while_it_listens(model, script):
    text = dataclasses.replace(GREEDY, speak=False)
    script(*[NEITHER, NEITHER, TAKE] * 12)
    conversation = Conversation(model, text, AT_ONCE, max_positions=200)
    exchanges = []
    for samples in sound(37, 1):
        run(conversation, [samples])
        exchanges.append(len(conversation.history.exchanges))
        assert len(conversation.history.layout(conversation.tokenizer)[0]) <= conversation._branches.room
    assert 3 <= max(exchanges) < 12 and min(exchanges[6:]) >= 1
    assert_as_from_scratch(model, conversation, 200)


def test_a_typed_turn_is_answered_as_ask_answers_it(model):
    """Silence that was heard before it is no part of it; what is typed after it is, and a voice would be."""
    text = dataclasses.replace(GREEDY, speak=False)
    conversation = Conversation(model, text, BY_REQUEST, max_positions=300)
    run(conversation, sound(3, 1, 1e-4))
    conversation.typed("two plus")
    conversation.typed(" three")
    (taken,) = conversation.take_turn()
    events = []
    while conversation.next_step:
        events += conversation.step()
    (done,) = of(ReplyDone, events)
    assert done.text == minmo.ask(model, "two plus three", text).text and taken.reply == done.reply == 0
    run(conversation, sound(2, 1))
    assert_as_from_scratch(model, conversation)


def test_what_is_decided_and_how_replies_are_drawn_may_change(model, script):
    script(NEITHER, *[TAKE] * 4, *[NEITHER] * 5, TAKE)
    conversation = Conversation(model, GREEDY, BY_REQUEST, max_positions=300)
    heard = sound(20, 1)
    events = run(conversation, heard[:3])
    assert not of(TurnTaken, events) and of(Decision, events)[1].answer == 1, "the predictor is asked, and not obeyed"
    conversation.turn_taking = AT_ONCE
    assert of(TurnTaken, run(conversation, heard[3:4]))
    conversation.settings = dataclasses.replace(GREEDY, speak=False, max_text_tokens=2)
    events = run(conversation, heard[4:6])
    assert of(Sound, events), "the running reply keeps its own"
    conversation.stop()
    events = run(conversation, heard[6:12])
    (done,) = of(ReplyDone, events)
    assert not of(Sound, events) and len(conversation.history.exchanges[-1].reply) <= 2 and done.reply == 1
    with pytest.raises(ValueError, match="max_text_tokens may be at most 12"):
        conversation.settings = dataclasses.replace(GREEDY, max_text_tokens=13)
    assert_as_from_scratch(model, conversation)


def test_silence_is_trimmed_and_a_voice_keeps_what_precedes_it(model, script):
    script()
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=2000)
    quiet, loud = sound(130, 1, 1e-4), sound(10, 2)
    sizes = [(run(conversation, [q]), len(conversation.history.open))[1] for q in quiet]
    assert sizes[98:101] == [99, 13, 14] and max(sizes) == 99
    run(conversation, loud[:2])
    assert len(conversation.history.open) == 2 + 4 and conversation.voiced
    run(conversation, loud[2:])
    run(conversation, quiet[:95])
    assert len(conversation.history.open) == 109, "a voice keeps the silence after it"
    assert_as_from_scratch(model, conversation, 2000)


def test_a_turn_without_an_end_keeps_its_newer_half(model, script):
    script()
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=300)
    longest = conversation._longest
    loud = np.concatenate([sound(2, 1, 1e-4), sound(2 * longest, 2)])
    sizes = [(run(conversation, [x]), len(conversation.history.open))[1] for x in loud]
    assert max(sizes) == longest - 1 and sizes[-1] >= longest // 2
    assert_as_from_scratch(model, conversation)


def test_conversations_of_two_states_share_no_tick(model):
    pair = [Conversation(model, GREEDY, max_positions=300) for _ in range(2)]
    with pytest.raises(ValueError, match="of one FastMinMo share"):
        batch.tick(pair, [sound(1)[0]] * 2)


def test_conversations_that_share_their_steps_go_as_if_alone(engine, monkeypatch):
    """Out of step: one speaks while the other listens, reads or writes."""

    def decide(*plan):
        plan = [list(p) for p in plan]

        def given(model, state, rows, hidden, counts):
            DECIDE(model, state, rows, hidden, counts)
            return torch.tensor([[p.pop(0) if p else NEITHER] for p in plan])

        return given

    one, other = [NEITHER, TAKE, *[NEITHER] * 6, STOP], [NEITHER] * 4 + [TAKE]
    ticks = [sound(20, 1), sound(20, 2)]

    def texts(events):
        return ["".join(d.text for d in of(TextDelta, e)) for e in events], [
            np.concatenate([s.audio for s in of(Sound, e)]) for e in events
        ]

    monkeypatch.setattr(steps, "decide", decide(one, other))
    pair = [Conversation(engine, GREEDY, AT_ONCE, max_positions=300) for _ in range(2)]
    together = [[], []]
    for samples in zip(*ticks, strict=True):
        for n, events in enumerate(batch.tick(pair, samples)):
            together[n] += events
        for _ in range(30):
            for name, work in batch.STEPS.items():
                due = [n for n, c in enumerate(pair) if c.next_step == name]
                for n, events in zip(due, work([pair[n] for n in due]) if due else [], strict=True):
                    together[n] += events
    for c in pair:
        c.close()
    alone = []
    for plan, sounds in zip((one, other), ticks, strict=True):
        monkeypatch.setattr(steps, "decide", decide(plan))
        c = Conversation(engine, GREEDY, AT_ONCE, max_positions=300)
        alone.append(run(c, sounds))
        c.close()
    (text, audio), (expected_text, expected_audio) = texts(together), texts(alone)
    assert text == expected_text and all(text)
    for a, b in zip(audio, expected_audio, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_broken_model_ends_one_conversation_with_a_fault():
    broken = minmo.load("nano", device="cpu")
    with torch.no_grad():
        broken.duplex.turn_taking.bias[0] = torch.nan
    conversation = Conversation(broken, GREEDY, AT_ONCE, max_positions=300)
    (fault,) = conversation.tick(sound(1)[0])
    assert "predictor" in fault.why
    with pytest.raises(ValueError, match="has ended"):
        conversation.tick(sound(1)[0])


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda c: c.tick(np.zeros(100, np.float32)), ValueError, "1280 float32 samples"),
        (lambda c: c.tick(np.zeros(TICK)), ValueError, "float64"),
        (lambda c: c.tick([0.0] * TICK), ValueError, "an array"),
        (lambda c: c.tick(np.full(TICK, np.nan, np.float32)), ValueError, "NaN"),
        (lambda c: c.take_turn(), ValueError, "nothing to answer"),
        (lambda c: c.stop(), RuntimeError, "is listening"),
        (lambda c: c.typed(" "), ValueError, "give it some words"),
        (lambda c: c.typed("two " * 300), ValueError, "say less at once"),
        (lambda c: c.remove(0), ValueError, "is not remembered"),
    ],
)
def test_misuse_is_one_clear_sentence(model, call, error, message):
    with pytest.raises(error, match=message):
        call(Conversation(model, GREEDY, max_positions=300))


def test_settings_that_cannot_be(model):
    with pytest.raises(ValueError, match="raise max_positions"):
        Conversation(model, GREEDY, max_positions=40)
    with pytest.raises(ValueError, match="ahead_ms"):
        Conversation(model, GREEDY, ahead_ms=0)


def test_full_duplex_hears_on_while_it_speaks(model, script):
    """The stream is the clock of what goes out, and an interruption ends it."""
    script(NEITHER, TAKE, TAKE, *[NEITHER] * 9, STOP)
    stream = [minmo.VoiceInput(samples, 80.0 * n) for n, samples in enumerate(sound(14, 1))]
    outputs = list(minmo.full_duplex(model, stream, GREEDY, max_positions=300))
    (cut,) = (n for n, o in enumerate(outputs) if o.interrupted)
    assert outputs[cut].final and cut == len(outputs) - 1 and not any(o.final for o in outputs[:cut])
    assert sum(len(o.audio) for o in outputs) == (200 + 9 * 80) * 24
    script(NEITHER, TAKE, TAKE)
    (*rest, last) = minmo.full_duplex(model, stream, GREEDY, max_positions=300)
    assert last.final and not last.interrupted and not any(o.final for o in rest)
    spoken = sum(len(o.audio) for o in [*rest, last])
    assert spoken > (200 + 11 * 80) * 24 and len(last.audio) > 80 * 24, "what is left at the end comes at once"


@pytest.mark.parametrize("remembered", [0, 100])
def test_what_follows_the_only_turn_of_a_stream_is_none(model, script, monkeypatch, remembered):
    """Not even for a model that remembers no turn."""
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, remembered=remembered))
    script(*[NEITHER] * 6, TAKE, TAKE)
    ticks = np.concatenate([sound(2, level=1e-4), sound(4), sound(8, level=1e-4)])
    outputs = list(minmo.full_duplex(model, [minmo.VoiceInput(ticks.ravel(), 0.0)], GREEDY, max_positions=300))
    assert [o.final for o in outputs].count(True) == 1


def test_a_client_holds_a_conversation_with_a_recording(model, script):
    """Interrupted in its reply: what it plays stops then, and the log says what happened when."""
    script(*[NEITHER] * 11, TAKE, *[NEITHER] * 12, STOP)
    quiet, loud = sound(40, 1, 1e-4).ravel(), sound(40, 2).ravel()
    user = np.concatenate([quiet[: 4 * TICK], loud[: 6 * TICK], quiet[: 12 * TICK], loud[: 8 * TICK]])
    found = simulate(Conversation(model, GREEDY, AT_ONCE, max_positions=300), user[:-100], realtime=False)
    (cut,) = (entry for entry in found.log if entry["event"] == "Interrupted")
    assert (
        cut["at_ms"] == 25 * 80 and cut["decided_ms"] == cut["stopped_ms"] == 240 and cut["played_ms"] == 240 - 80 + 200
    )
    assert cut["heard_ms"] == 960, "what it had played when the tick began, not what was sent"
    assert found.rate == 24_000 and len(found.assistant) == len(found.user) * 3 // 2
    assert len(found.user) >= len(user) + 2 * 16_000 and np.array_equal(found.user[: len(user) - 100], user[:-100])
    heard = np.flatnonzero(found.assistant) / 24
    assert 960 <= heard[0] < 1000 and 1990 < heard[-1] < 2000
    lines = [json.loads(line) for line in found.json_lines().splitlines()]
    assert lines == json.loads(json.dumps(found.log)) and len(found.tick_ms) == len(found.user) // TICK
    assert sum(entry["event"] == "Decision" for entry in lines) == len(found.tick_ms)
    assert sum(entry["samples"] for entry in lines if entry["event"] == "Sound") >= len(heard)


def test_a_client_in_real_time_takes_as_long_as_the_sound(model, script, monkeypatch):
    script(NEITHER, TAKE)
    monkeypatch.setattr(client, "TAIL_MS", 0.0)
    began = time.perf_counter()
    text = dataclasses.replace(GREEDY, speak=False)
    found = simulate(Conversation(model, text, AT_ONCE, max_positions=300), sound(8).ravel())
    assert time.perf_counter() - began >= 0.64
    assert all(entry["lag_ms"] >= 0 for entry in found.log if entry["event"] == "Decision")
