"""A later turn is heard as if it were the first: from its first voice on, without what was heard before."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from minmo import weights
from minmo.config import TICK
from minmo.conversation import Conversation, Settings, TurnTaking, steps
from minmo.conversation.events import Interrupted, TurnTaken
from minmo.conversation.turn_taking import Phase
from minmo.tokenizer.onset import MARGIN, Onset

GREEDY = Settings(temperature=0.0, max_text_tokens=6, max_speech_ratio=8)
"""Replies of two seconds at most."""
AT_ONCE = TurnTaking(answer=0.5, answer_ticks=1, stop=0.5, stop_ticks=1)
QUIET, LOUD = 1e-4, 0.1


@pytest.fixture(scope="module")
def model():
    return weights.untrained("nano", "cpu")


@pytest.fixture
def decide(monkeypatch):
    """The predictor's decisions at the ticks of those numbers, neither at all others."""
    of = steps.decide

    def use(**at):
        ticks = iter(range(10_000))

        def scripted(model, state, rows, hidden, counts):
            of(model, state, rows, hidden, counts)
            tick = next(ticks)
            given = float(tick in at.get("take", ())), float(tick in at.get("stop", ()))
            return torch.tensor(given).expand(len(rows), 1, 2)

        monkeypatch.setattr(steps, "decide", scripted)

    return use


def sound(*parts):
    """(ticks, level) each -> (ticks, 1280)."""
    rng = np.random.default_rng(7)
    return np.concatenate([level * rng.standard_normal((n, TICK)) for n, level in parts]).astype(np.float32)


def run(conversation, ticks):
    events = []
    for samples in ticks:
        events += conversation.tick(samples)
        while conversation.next_step:
            events += conversation.step()
    return events


def turn(conversation):
    return torch.cat(conversation.history.open)


def heard_alone(model, ticks):
    """What a conversation holds that hears these ticks and nothing before, none of it trimmed."""
    alone = Conversation(model, GREEDY, TurnTaking(answer=None, stop=None), max_positions=600)
    run(alone, ticks)
    found = turn(alone)
    alone.close()
    return found


def test_a_turn_after_a_reply_is_heard_like_a_first_one(model, decide):
    decide(take=[12])
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=600)
    ticks = sound((5, QUIET), (6, LOUD), (60, QUIET), (7, LOUD))
    events = run(conversation, ticks)
    assert [type(e) for e in events if isinstance(e, (TurnTaken, Interrupted))] == [TurnTaken]
    assert conversation.phase is Phase.LISTENING, "the reply was over when the second turn began"
    kept = len(conversation.history.open)
    assert kept == 7 + 4, "300 ms before the voice are kept"
    torch.testing.assert_close(turn(conversation), heard_alone(model, ticks[-kept:]), rtol=1e-4, atol=1e-4)


def test_a_turn_is_heard_again_as_it_was_though_the_callers_array_is_used_again(model, decide):
    ticks, used = sound((5, QUIET), (6, LOUD), (60, QUIET), (7, LOUD)), np.zeros(TICK, np.float32)
    kept = []
    for again in (True, False):
        decide(take=[12])
        conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=600)
        for samples in ticks:
            used[:] = samples
            run(conversation, [used if again else samples])
        kept.append(turn(conversation))
        conversation.close()
    assert torch.equal(*kept)


def test_a_turn_that_cuts_a_reply_keeps_its_first_words(model, decide):
    """The reply's cut drops nothing of the turn that brought it about."""
    decide(take=[12], stop=[20])
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=600)
    ticks = sound((5, QUIET), (6, LOUD), (5, QUIET), (9, LOUD))
    events = run(conversation, ticks)
    assert [type(e) for e in events if isinstance(e, (TurnTaken, Interrupted))] == [TurnTaken, Interrupted]
    kept = len(conversation.history.open)
    assert kept == 9 + 4 - 1, "what lay between the first turn's end and the cut would be one tick more"
    torch.testing.assert_close(turn(conversation), heard_alone(model, ticks[-kept:]), rtol=1e-4, atol=1e-4)


def test_a_voice_in_a_reply_is_heard_like_a_first_one_at_once(model, decide):
    """So that what an interruption says is understood while the reply still runs."""
    decide(take=[12])
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=600)
    ticks = sound((5, QUIET), (6, LOUD), (12, QUIET), (5, LOUD))
    events = run(conversation, ticks)
    assert [type(e) for e in events if isinstance(e, (TurnTaken, Interrupted))] == [TurnTaken]
    assert conversation.phase is Phase.SPEAKING
    kept = len(conversation.history.open)
    assert kept == 5 + 4, "300 ms before the voice are kept"
    torch.testing.assert_close(turn(conversation), heard_alone(model, ticks[-kept:]), rtol=1e-4, atol=1e-4)


def test_a_murmur_that_let_the_reply_go_on_is_no_part_of_the_next_turn(model, decide):
    decide(take=[12])
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=600)
    run(conversation, sound((5, QUIET), (6, LOUD), (3, QUIET), (2, LOUD), (60, QUIET)))
    assert conversation.phase is Phase.LISTENING and not conversation.voiced
    run(conversation, sound((5, LOUD)))
    assert len(conversation.history.open) == 5 + 4


def test_a_model_of_single_turns_remembers_none(model, decide):
    assert model.config.remembered == 0
    decide(take=[8])
    conversation = Conversation(model, GREEDY, AT_ONCE, max_positions=600)
    before = len(conversation.history.layout(conversation.tokenizer)[0])
    run(conversation, sound((4, QUIET), (4, LOUD), (70, QUIET)))
    assert conversation.phase is Phase.LISTENING and not conversation.history.exchanges
    branches = conversation._branches
    length = int(conversation._state.llm.lengths[branches.listening])
    assert length == before + len(conversation.history.open)


def test_a_voice_is_found_in_noise_that_hides_it_in_the_sum():
    """Noise in all of 80 bands, and a voice in eight of them that lifts their mean by less than a quarter of MARGIN."""
    rng, onset, found = np.random.default_rng(1), Onset(), []
    for tick in range(120):
        bands = (0.5 + 0.04 * rng.standard_normal(80)).astype(np.float32)
        if tick >= 100:
            bands[10:18] += 2.2 * MARGIN
        if onset.hear(bands):
            found.append((tick, onset.voice))
    assert 8 * 2.2 * MARGIN / 80 < MARGIN / 4 and found == [(101, True)] and onset.began == 100 * TICK


def test_a_turn_has_a_voice_of_its_own_though_it_goes_on():
    onset = Onset()
    quiet, loud = np.zeros(80, np.float32), np.full(80, 2 * MARGIN, np.float32)
    for bands in (quiet, quiet, loud, loud):
        onset.hear(bands)
    assert onset.voice and onset.began == onset.turn == 2 * TICK
    onset.new_turn()
    assert onset.turn is None and onset.voice
    onset.hear(loud)
    assert onset.turn is None, "one loud tick is none"
    onset.hear(loud)
    assert onset.turn == 4 * TICK and onset.began == 2 * TICK


def test_how_many_exchanges_are_remembered_is_the_models(model):
    from minmo.config import MinMoConfig, load_config

    config = dataclasses.replace(model.config, remembered=3)
    assert MinMoConfig.from_json(config.to_json()).remembered == 3
    assert load_config("minmo-8b").remembered > 1000
