"""Who may speak, decided from sequences of probabilities made by hand."""

from __future__ import annotations

import pytest

from minmo.conversation.turn_taking import BY_REQUEST, EAGERNESS, Floor, Phase, TurnTaking, eagerness

L, T, S, Y = Phase.LISTENING, Phase.TAKING, Phase.SPEAKING, Phase.YIELDING


def phases(floor, answers=(), stops=()):
    """Phases after ticks whose other probability would decide at once if it counted."""
    found = []
    for value in answers:
        floor.hear(value, 1.0)
        found.append(floor.phase)
    for value in stops:
        floor.hear(1.0, value)
        found.append(floor.phase)
    return found


def test_a_turn_from_its_beginning_to_its_end():
    floor = Floor(TurnTaking(answer=0.5, answer_ticks=1, stop=0.5, stop_ticks=2))
    assert floor.phase is L
    assert phases(floor, [0.1, 0.49, 0.5]) == [L, L, T]
    assert phases(floor, stops=[0.2]) == [T]
    floor.speak()
    assert phases(floor, stops=[0.9, 0.1, 0.9]) == [S, S, S], "two in a row, not two in all"
    assert phases(floor, stops=[0.9]) == [Y]
    assert phases(floor, [1.0]) == [Y], "nothing is decided until what was heard has been taken in"
    floor.listen()
    assert phases(floor, [0.9]) == [T]
    floor.give_way()
    assert floor.phase is Y


def test_by_request_alone():
    floor = Floor(BY_REQUEST)
    assert phases(floor, [1.0, 1.0]) == [L, L]
    floor.take()
    floor.speak()
    assert phases(floor, stops=[1.0, 1.0]) == [S, S]
    floor.change(TurnTaking(answer_ticks=1, stop=0.5, stop_ticks=1))
    assert phases(floor, stops=[1.0]) == [Y]


def test_the_user_goes_on_before_the_first_sound():
    floor = Floor(TurnTaking(answer_ticks=1, stop=0.5, stop_ticks=2))
    assert phases(floor, [0.9], [0.8, 0.8]) == [T, T, Y]


def test_an_interruption_that_began_before_the_first_sound_counts_on():
    floor = Floor(TurnTaking(answer_ticks=1, stop=0.5, stop_ticks=3))
    assert phases(floor, [0.9], [0.8, 0.8]) == [T, T, T]
    floor.speak()
    assert phases(floor, stops=[0.8]) == [Y]


@pytest.mark.parametrize(
    "values,taken",
    [
        ([0.6, 0.6, 0.6], True),
        ([0.6, 0.55, 0.6, 0.6], True),  # within the hysteresis: it counts nothing, and breaks nothing
        ([0.6, 0.6, 0.55], False),
        ([0.6, 0.6, 0.49, 0.6, 0.6], False),  # below it: the run begins anew
        ([0.59] * 20, False),
    ],
)
def test_hysteresis(values, taken):
    floor = Floor(TurnTaking(answer=0.6, answer_ticks=3, hysteresis=0.1))
    assert (phases(floor, values)[-1] is T) == taken


def test_eagerness_orders_how_soon_it_speaks_and_gives_way():
    sure = {
        name: next(n for n in range(1, 20) if phases(Floor(s), [0.75] * n)[-1] is T) for name, s in EAGERNESS.items()
    }
    assert sure == {"low": 6, "medium": 3, "high": 1, "auto": 2}

    def stops(settings, value):
        floor = Floor(settings)
        floor.take()
        return phases(floor, stops=[value] * 5)

    assert [stops(EAGERNESS[name], 0.65)[-1] for name in ("low", "medium", "high", "auto")] == [Y, Y, T, T]
    assert stops(EAGERNESS["medium"], 0.65) == [T, Y, Y, Y, Y], "one tick that is wrong stops nobody"
    assert stops(EAGERNESS["auto"], 0.85)[0] is Y, "a sure one stops at once"
    assert eagerness("low") is EAGERNESS["low"]
    with pytest.raises(ValueError, match="one of low, medium, high, auto"):
        eagerness("eager")


def test_moves_that_a_phase_does_not_allow():
    floor = Floor(TurnTaking(answer_ticks=1, stop=0.5, stop_ticks=2))
    for move in (floor.speak, floor.give_way, floor.listen):
        with pytest.raises(RuntimeError, match="is listening"):
            move()
    floor.take()
    with pytest.raises(RuntimeError, match="is taking"):
        floor.take()


@pytest.mark.parametrize(
    "wrong", [{"answer": 1.5}, {"stop": "a"}, {"answer_ticks": 0}, {"stop_ticks": 1.5}, {"hysteresis": -0.1}]
)
def test_settings_name_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TurnTaking(**wrong)
