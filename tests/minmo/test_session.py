"""Sessions over many turns: what is forgotten and what stays, prompts read in pieces, and memory over hours."""

from __future__ import annotations

import os
import resource
import threading

import numpy as np
import pytest
import torch

import minmo
import minmo.conversation.beside as beside_module
from minmo.config import TICK
from minmo.conversation.session import Session
from minmo.state import read_rows

TICKS = int(os.environ.get("MINMO_TICKS", "120"))
"""80 ms each, in the test of long sessions; 90000 are two hours."""
QUIET = minmo.Settings(max_text_tokens=5, max_speech_ratio=3, seed=3, temperature=0.9, speak=False)


@pytest.fixture(scope="module")
def model():
    return minmo.load("nano", device="cpu")


def hear(session, seed, ticks=1):
    g = torch.Generator().manual_seed(seed)
    for i in range(ticks):
        audio = 0.1 * torch.randn(session.batch, TICK, generator=g)
        counts = torch.full((session.batch,), TICK, dtype=torch.int32)
        session.hear(audio, counts, torch.tensor([i == ticks - 1] * session.batch))


def converse(session, turn, ticks=4):
    """One turn of every entry, each with words of its own."""
    closing = [[] if turn == 0 else [7, 8]] * session.batch
    session.open_turn(closing, [[20 + turn, *range(entry)] for entry in range(session.batch)])
    hear(session, turn, ticks)
    session.read([[9, 10]] * session.batch)
    return list(session.answer())


def context(session):
    """Lengths and keys of the LLM, beyond-length positions blanked."""
    state = session._state.llm
    lengths = read_rows(state.lengths, session.rows)
    valid = torch.arange(state.capacity) < lengths[:, None]
    keys = [torch.where(valid[..., None, None], read_rows(cache.k, session.rows), 0) for cache in state.layers]
    return lengths, torch.stack(keys)


@pytest.mark.parametrize("fast", [False, True])
def test_the_oldest_turns_are_forgotten_and_the_rest_is_as_if_it_were_all(model, fast):
    engine = minmo.FastMinMo(model, rows=2, max_positions=80, max_voice_positions=200, keep_model=True)
    with Session(engine if fast else model, 2, QUIET, 80) as session:
        session.read([[1, 2, 3], [4]])
        forgot = 0
        for turn in range(6):
            before = len(session._turns)
            converse(session, turn)
            forgot += len(session._turns) != before + 1
            assert int(read_rows(session._state.llm.lengths, session.rows).max()) <= 80
        assert 1 <= forgot < 5, "some turns are forgotten, not at every turn"
        session.open_turn([[]] * 2, [[5], [6]])
        kept = session._turns
        lengths, keys = context(session)
        assert kept[0][0][0].shape[1] and len(kept) > 2
        last = session._last.clone()
    with Session(model, 2, QUIET, 80) as fresh:
        fresh._turns = [[piece for turn in kept[:-1] for piece in turn]]
        fresh._state.llm.lengths += 79  # forgotten at once, so that all is read again
        fresh.open_turn([[]] * 2, [[5], [6]])
        assert torch.equal(context(fresh)[0], lengths)
        torch.testing.assert_close(context(fresh)[1], keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fresh._last, last, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_read_in_pieces_between_which_others_go_on(model):
    engine = minmo.FastMinMo(model, rows=2, max_positions=300, max_voice_positions=400, prefill=16, keep_model=True)
    prompt = [[i % 50 for i in range(100)]]

    def run(together):
        one, other = (Session(engine, 1, QUIET, 300) for _ in "ab")
        one.read([[1, 2, 3]])
        pieces = 0
        for _ in other.reading(prompt) if together else ():
            hear(one, pieces)
            pieces += 1
        if not together:
            for i in range(7):
                hear(one, i)
            other.read(prompt)
        texts = [[p.text for p in pieces] for s in (one, other) for pieces in s.answer()]
        found = [context(s)[1].clone() for s in (one, other)]
        one.close()
        other.close()
        return pieces, texts, found

    pieces, texts, found = run(True)
    assert pieces == 7  # 100 positions, 16 at once
    _, alone, expected = run(False)
    assert texts == alone and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_hours_take_no_more_memory_than_minutes(model):
    engine = minmo.FastMinMo(model, rows=1, max_positions=100, max_voice_positions=300, keep_model=True)
    with Session(engine, 1, QUIET, 100) as session:
        session.read([[1, 2, 3]])
        size, turns, peaks = session.state_bytes, max(12, TICKS // 10), []
        for turn in range(turns):
            converse(session, min(turn, 1), ticks=10)
            if turn in (turns // 3, turns - 1):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        assert session.state_bytes == size
        assert sum(x.shape[1] for turn in session._turns for x, _ in turn) <= session.max_positions
        assert peaks[1] - peaks[0] < 4096, "kilobytes of memory at most, more after all turns than after a third"


def test_text_that_is_written_beside_the_sound_changes_nothing(model, monkeypatch):
    settings = minmo.Settings(max_text_tokens=14, max_speech_ratio=3, seed=3)
    engine = minmo.FastMinMo(model, rows=2, max_positions=100, max_voice_positions=500, keep_model=True)
    apart = minmo.ask(engine, ["two plus three", "seven"], settings)
    threads = set()
    step = engine.vocoder.step
    monkeypatch.setattr(engine.vocoder, "step", lambda *a: (threads.add(threading.current_thread().name), step(*a))[1])
    monkeypatch.setattr(beside_module, "SPEAK_BESIDE", True)
    beside = minmo.ask(engine, ["two plus three", "seven"], settings)
    assert len(threads) == 1 and threads.pop().startswith("minmo-speech")
    for one, other in zip(apart, beside, strict=True):
        assert one.text == other.text and len(one.audio) and np.array_equal(one.audio, other.audio)
    engine.overlaps = False
    minmo.ask(engine, ["two plus three", "seven"], settings)
    assert threads == {threading.current_thread().name}, "in the caller's thread, and so on its stream"


def test_a_refused_turn_changes_nothing(model):
    with Session(model, 1, QUIET, 40) as session:
        session.read([[1, 2, 3]])
        converse(session, 0)
        before, turns = context(session), [list(turn) for turn in session._turns]
        with pytest.raises(ValueError, match="context holds 40"):
            session.open_turn([[7]], [list(range(50))])
        assert torch.equal(context(session)[1], before[1]) and len(session._turns) == len(turns)
        assert [len(turn) for turn in session._turns] == [len(turn) for turn in turns]
        session.open_turn([[7]], [[5]])


def test_a_session_without_sound_is_new_after_a_fault(model):
    with Session(model, 2, QUIET, 60) as session:
        session.read([[1, 2, 3], [4, 5]])
        for cache in session._state.llm.layers:
            cache.v[0] = torch.nan
        session.read([[6], [7]])
        pieces = list(session.answer())
        assert pieces[-1][0].fault and not pieces[-1][1].fault and not pieces[-1][0].text
        assert session._state.llm.lengths[0] == 0 and session._state.llm.lengths[1] > 0
        session.read([[1, 2, 3], [4, 5]])
        assert not any(piece.fault for pieces in session.answer() for piece in pieces)


@pytest.mark.parametrize("part", ["voice decoder", "predictor"])
def test_broken_heads_are_named(part):
    broken = minmo.load("nano", device="cpu")
    with torch.no_grad():
        (broken.duplex.turn_taking if part == "predictor" else broken.voice_decoder.head).bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=part):
        if part == "predictor":
            sound = torch.full((3 * TICK,), 1e-3).numpy()
            list(minmo.full_duplex(broken, [minmo.VoiceInput(sound, 0.0)], QUIET))
        else:
            minmo.ask(broken, "seven", minmo.Settings(max_text_tokens=7, max_speech_ratio=3))
