"""The duplex stage from data to loss: nano's dialogues, batches of open turns, what is learned and what stays as it is.

The training layout must be the serving layout: a Session that reads and hears the same comes to the same hidden states.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording

import minmo
from minmo.config import SAMPLE_RATE, TICK
from minmo.conversation import steps
from minmo.conversation.conversation import Conversation
from minmo.conversation.turn_taking import Phase, TurnTaking
from minmo.data import duplex
from minmo.data.dialogues import dialogue_cut
from minmo.data.duplex import UNSUPERVISED, Event, position
from minmo.data.manifest import read_manifest, validate
from minmo.data.nano.build import BACKCHANNELS, plan
from minmo.data.nano.dialogues import DIALOGUES, ambiguous, build_dialogues, complete
from minmo.data.simulator import Dialogue
from minmo.training.augment import Augment
from minmo.training.batches import MOST_TURNS, Builder
from minmo.training.objectives.duplex import DuplexObjective
from minmo.training.recipe import load_recipe
from minmo.training.records import read_log
from minmo.training.run import make_objective, run

NO = UNSUPERVISED
DELAY = 3 * TICK
"""From the assistant's end to the user's turn, in place of a drawn one."""


def ticks(kind, start, end, text=""):
    return Event(kind, round(start * TICK), round(end * TICK), text)


EVENTS = (
    ticks("user", 2.5, 6.5, "two plus two"),
    ticks("assistant", 16, 24, "it is four"),
    ticks("backchannel", 18, 20, "yes"),
    ticks("barge_in", 22.5, 30, "hello"),
    ticks("assistant", 40, 44, "hello"),
)
LENGTH = 52 * TICK + 700
"""Samples; the last position never becomes complete."""


def dialogue(name="one", seed=0, events=EVENTS):
    """Loud noise where the user speaks, faint noise elsewhere."""
    rng = np.random.default_rng(seed)
    user = 0.01 * rng.standard_normal(LENGTH)
    for event in events:
        if event.kind != "assistant":
            user[event.start : event.end] += 0.2 * rng.standard_normal(event.end - event.start)
    return Dialogue(name, user.astype(np.float32), np.zeros(LENGTH, np.float32), events, None, None)


@pytest.fixture(autouse=True)
def no_drawn_delay(request, monkeypatch):
    monkeypatch.setattr(duplex, "turn_delay", lambda dialogue, turn: DELAY)


@pytest.fixture(scope="module")
def model():
    model = minmo.load("nano", device="cpu").float()
    model.requires_grad_(False)
    model.duplex.requires_grad_(True)
    return model


@pytest.fixture
def builder(model):
    return Builder(model.config, model.tokenizer)


@pytest.fixture
def remembering(model):
    """A builder for a model that remembers exchanges."""
    return Builder(dataclasses.replace(model.config, remembered=100), model.tokenizer)


def runs(labels):
    return [(label, len(list(group))) for label, group in itertools.groupby(labels.tolist())]


def test_a_batch_by_hand(remembering):
    """The contexts in the order of the dialogue, and the streams of sound in them: one from its beginning, in which the
    first turn is noticed, and one from four positions before the next voice."""
    batch = remembering.duplex([dialogue_cut(dialogue())])
    tokenizer = remembering.tokenizer
    begin, between = tokenizer.turn("")[0], [*tokenizer.turn("")[1], *tokenizer.turn("", first=False)[0]]
    middle = [*tokenizer.turn("")[1], *tokenizer.encode("it is four"), *tokenizer.turn("", first=False)[0]]
    last = [*tokenizer.turn("")[1], *tokenizer.encode("hello"), *tokenizer.turn("", first=False)[0]]
    first, second = [(0, p) for p in range(7)], [(1, p - 14) for p in range(14, 31)]
    assert batch.mel_lengths.tolist() == [8 * 20, 8 * (52 - 14)]
    for n, (before, opened, turn_taking, barge_in) in enumerate([
        ([begin], [(0, p) for p in range(4)], [(0, 4)], [(NO, 4)]),
        ([begin], [(0, p) for p in range(14)], [(NO, 4), (0, 2), (1, 8)], [(NO, 14)]),
        # Under the running reply: what precedes the murmur, then it and the turn that begins before it is over.
        ([begin, first, between], [(0, p) for p in range(7, 20)], [(NO, 13)], [(0, 13)]),
        ([begin, first, between], [(1, p - 14) for p in range(14, 30)], [(NO, 16)], [(NO, 6), (0, 2), (1, 8)]),
        ([begin, first, middle], [(1, p - 14) for p in range(14, 38)], [(NO, 10), (0, 6), (1, 8)], [(NO, 24)]),
        ([begin, first, middle, second, between], [(1, p - 14) for p in range(31, 44)], [(NO, 13)], [(0, 13)]),
        ([begin, first, middle, second, last], [(1, p - 14) for p in range(31, 52)], [(NO, 13), (0, 8)], [(NO, 21)]),
    ]):  # fmt: skip
        read = [entry for part in [*before, opened] for entry in part]
        sound = [entry if isinstance(entry, tuple) else (0, -1) for entry in read]
        length, m = int(batch.lengths[n]), int(batch.open_lengths[n])
        found = zip(batch.stream[n, :length].tolist(), batch.positions[n, :length].tolist(), strict=True)
        assert list(found) == sound, n
        assert batch.ids[n, :length].tolist() == [-1 if isinstance(entry, tuple) else entry for entry in read], n
        assert (runs(batch.turn_taking[n, :m]), runs(batch.barge_in[n, :m])) == (turn_taking, barge_in), n
        assert (batch.turn_taking[n, m:] == NO).all() and (batch.barge_in[n, m:] == NO).all()
    assert len(batch.lengths) == 7


def test_what_a_model_does_not_remember_precedes_no_turn(builder):
    batch = builder.duplex([dialogue_cut(dialogue())])
    begin = builder.tokenizer.turn("")[0]
    assert batch.lengths.tolist() == [len(begin) + m for m in batch.open_lengths.tolist()]
    assert all(row[: len(begin)].tolist() == begin for row in batch.ids)


@torch.no_grad()
def test_the_losses_are_sums_over_supervised_positions(model, builder):
    objective, batch = DuplexObjective(model), builder.duplex([dialogue_cut(dialogue())])
    logits, losses = objective.logits(batch), objective(batch)
    for place, name in enumerate(("turn_taking", "barge_in")):
        labels, total = getattr(batch, name), 0.0
        for n, t in torch.nonzero(labels >= 0).tolist():
            total -= float(torch.log_softmax(logits[n, t, place], -1)[labels[n, t]])
        assert float(losses[name]) == pytest.approx(total, rel=1e-4)


UNTOLD = tuple(dataclasses.replace(event, text="") for event in EVENTS)
ECHOING = (
    ticks("user", 2.5, 6.5),
    ticks("assistant", 8, 26),
    ticks("barge_in", 24.5, 30),
    ticks("assistant", 32, 48),
)


@pytest.mark.parametrize(("remembered", "events", "echo"), [(0, UNTOLD, 0.0), (100, UNTOLD, 0.0), (0, ECHOING, 0.1)])
def test_training_decides_what_a_conversation_decides(model, monkeypatch, remembered, events, echo):
    """A conversation hears the channel tick by tick, takes turns where the dialogue does, is cut where that cuts it and
    heard to its end elsewhere; its predictor's decisions at every tick are those that training computes."""
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, remembered=remembered))
    spoken = dialogue("one", 1, events)
    for event in events:
        if event.kind == "assistant":
            size = event.end - event.start
            spoken.user[event.start : event.end] += echo * np.random.default_rng(2).standard_normal(size)
    cut = dialogue_cut(spoken)
    channel, decide, live = cut.load_audio()[0].astype(np.float32), steps.decide, []
    take = {position(e.end) for e in events if e.kind in ("user", "barge_in")}
    over = {position(e.end) for e in events if e.kind == "assistant"}
    stop = {p for p in over if any(e.kind == "barge_in" and position(e.start) <= p <= position(e.end) for e in events)}

    def scripted(*given):
        live.append(decide(*given)[0, 0].tolist())
        return torch.tensor([[[float(len(live) - 1 in take), float(len(live) - 1 in stop)]]])

    monkeypatch.setattr(steps, "decide", scripted)
    settings = minmo.Settings(max_text_tokens=1, max_speech_ratio=3)
    conversation = Conversation(model, settings, TurnTaking(0.5, 1, 0.5, 1), max_positions=1000)
    replying = []
    for samples in channel[: len(channel) // TICK * TICK].reshape(-1, TICK):
        replying.append(conversation.phase is not Phase.LISTENING)
        conversation.tick(samples)
        if len(live) - 1 in over - stop:
            conversation._finished(conversation._answer)
        while conversation.next_step == "read":  # nothing of the reply is written
            conversation.step()
    conversation.close()
    builder, objective = Builder(model.config, model.tokenizer), DuplexObjective(model).eval()
    with torch.no_grad():
        probabilities = objective.logits(batch := builder.duplex([cut])).softmax(-1)[..., 1]
    samples = builder.open_turns(cut, channel)
    compared = {True: 0, False: 0}
    decided = torch.maximum(batch.turn_taking, batch.barge_in).tolist()
    for sample, row, labels in zip(samples, probabilities.tolist(), decided, strict=True):
        for p, ours, label in zip(sample.open, row, labels, strict=False):
            if label != UNSUPERVISED and sample.replying == replying[p]:
                compared[sample.replying] += 1
                assert ours == pytest.approx(live[p], abs=1e-4), (sample, p)
    assert compared[True] >= 30 and compared[False] >= 12


def test_a_batch_is_bounded_and_its_turns_are_drawn(builder):
    cuts = [dialogue_cut(dialogue(f"d{n}", n)) for n in range(5)]
    first, again = builder.duplex(cuts), builder.duplex(cuts)
    assert len(first.lengths) == MOST_TURNS < 35 and torch.equal(first.stream, again.stream)
    assert torch.equal(first.turn_taking, again.turn_taking)
    builder.epoch = 1
    other = builder.duplex(cuts)
    assert not torch.equal(first.lengths, other.lengths), "the next epoch draws others"


def test_times_do_not_bear_augmentation(model):
    with pytest.raises(ValueError, match="remove `augment`"):
        Builder(model.config, model.tokenizer, Augment()).duplex([dialogue_cut(dialogue())])


def test_one_batch_is_learned_by_heart(builder, monkeypatch):
    torch.manual_seed(0)
    model = minmo.load("nano", device="cpu").float()
    objective = make_objective(load_recipe("nano/duplex"), model, None, None)
    batch = builder.duplex([dialogue_cut(dialogue())])
    hidden = objective.hidden(batch)
    assert not hidden.requires_grad
    monkeypatch.setattr(objective, "hidden", lambda batch: hidden)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    counts = objective.counts(batch)
    for _ in range(60):
        loss = sum(value / counts[name] for name, value in objective(batch).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    scores = objective.scores(objective.tally(batch))
    assert scores == {f"{name}/f1@{k}": 1.0 for name in ("turn_taking", "barge_in") for k in (1, 5)}


def test_scores_count_first_decisions(model, builder, monkeypatch):
    """Of three samples with an event and four without: a hit, one three positions late, one missed, one false alarm."""
    objective, batch = DuplexObjective(model), builder.duplex([dialogue_cut(dialogue())])
    logits = torch.zeros(*batch.turn_taking.shape, 2, 2)
    logits[..., 0] = 1.0
    for turn, at in ((1, 6), (4, 19), (6, 15)):  # due: 6, 16, none
        logits[turn, at:, 0, 1] = 2.0
    logits[3, 3, 0, 1] = 2.0  # not supervised: no decision
    monkeypatch.setattr(objective, "logits", lambda batch: logits)
    found = objective.tally(batch)
    assert tuple(found) == objective.tallied
    assert [found[f"turn_taking/1/{p}"] for p in ("hits", "decisions", "events")] == [1, 3, 2]
    assert [found[f"turn_taking/5/{p}"] for p in ("hits", "decisions", "events")] == [2, 3, 2]
    scores = objective.scores(found)
    assert scores == {"turn_taking/f1@1": 0.4, "turn_taking/f1@5": 0.8, "barge_in/f1@1": 0.0, "barge_in/f1@5": 0.0}
    assert objective.scores(dict.fromkeys(objective.tallied, 0.0)) == {}, "nothing was due: there is no score"


def test_a_run_changes_the_predictor_alone(model, tmp_path):
    """Two steps of the shipped recipe on files: every other weight is bit-equal, validation tells F1."""
    minmo.weights.save(model, tmp_path / "start")
    (tmp_path / "sound").mkdir()
    cuts = [dialogue_cut(dialogue(f"d{n}", n), tmp_path / "sound") for n in range(3)]
    CutSet.from_cuts(cuts).to_file(tmp_path / "dialogues.jsonl.gz")
    recipe = load_recipe("nano/duplex")
    data = dataclasses.replace(
        recipe.data, max_seconds=9.0, buckets=2, train=["dialogues.jsonl.gz"], valid=["dialogues.jsonl.gz"]
    )
    loop = dataclasses.replace(recipe.loop, steps=2, warmup=1, validate_every=2, save_every=2)
    recipe = dataclasses.replace(recipe, data=data, loop=loop)
    run(recipe, tmp_path / "start", tmp_path, tmp_path / "out")
    before = minmo.load(tmp_path / "start", device="cpu").state_dict()
    after = minmo.load(tmp_path / "out" / "model", device="cpu").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("duplex.")}
    (validation,) = [r for r in read_log(tmp_path / "out" / "checkpoints") if r["kind"] == "validation"]
    assert {"turn_taking", "barge_in", "score", "turn_taking/f1@1", "barge_in/f1@5"} <= set(validation)
    assert math.isclose(validation["score"], validation["turn_taking"] + validation["barge_in"])


def test_sentences_whose_first_words_are_sentences():
    for said in ("seven", "twenty one", "what is two plus two", "eight divided by two", "repeat after me one two",
                 "say ninety in french", "what comes after forty two", "good morning", "one hundred"):  # fmt: skip
        assert complete(said), said
    for said in ("", "one hundred and", "what is", "what is two plus", "repeat after me", "say ninety", "good", "seve"):
        assert not complete(said), said
    for said, yes in (
        ("what is two plus two", False),
        ("what is two plus twenty two", True),
        ("what is twenty two plus two", False),
        ("twenty two plus two", True),
        ("one", False),
        ("one two three", True),
        ("repeat after me one two", True),
        ("say twenty one in french", False),
        ("how are you", False),
    ):
        assert ambiguous(said) == yes, said


def test_every_english_voice_says_the_back_channels():
    """Voices of tests are for tests; nothing else of the corpus is drawn from the same numbers."""
    said = plan(0.01).backchannels
    assert len(said) == len({u.id for u in said}) and {u.voice.language for u in said} == {"en"}
    assert {u.text for u in said} == set(BACKCHANNELS)
    assert 24 <= sum(not u.voice.test for u in said) <= 60


def tone(folder, name, seconds, pitch, rate=SAMPLE_RATE):
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(folder / f"{name}.flac", 0.3 * np.sin(2 * np.pi * pitch * time), rate)
    return Recording.from_file(folder / f"{name}.flac", recording_id=name)


def small_corpus(out):
    """Questions of tones, without a sentence to validate on."""
    out.mkdir()
    reply = tone(out, "reply", 1.5, 300, 24_000)

    def cut(name, recording, **custom):
        cut = recording.to_cut()
        cut.id, cut.custom = name, custom
        return cut

    for part in ("train", "test"):
        said = ["what is two plus two", "one two three", "twenty one"]
        cuts = [
            cut(f"{part}{n}", tone(out, f"{part}{n}", 1 + 0.3 * n, 150 + 40 * n), task="s2s", text="it is four",
                source_text=text, target_recording=reply, target_recording_unaligned=True)
            for n, text in enumerate(said)
        ]  # fmt: skip
        CutSet.from_cuts(cuts).to_file(out / f"{'test-seen' if part == 'test' else part}-s2s.jsonl.gz")
        murmur = cut(f"{part}-yes", tone(out, f"{part}-yes", 0.3, 500), task="asr", text="yes")
        CutSet.from_cuts([murmur]).to_file(out / f"{part}-backchannels.jsonl.gz")


def test_the_corpus_of_dialogues(tmp_path, monkeypatch):
    """Small ones of every set that has sentences, valid lines, marked turns, and the same again."""
    monkeypatch.undo()  # turns are taken back at the drawn delay
    small_corpus(tmp_path / "a")
    small_corpus(tmp_path / "b")
    counts, again = (build_dialogues(tmp_path / name, 0.02, 3) for name in "ab")
    assert counts == again and set(counts) == {"train-duplex", "test-duplex"}
    assert counts["train-duplex"][0] == round(0.02 * DIALOGUES["train"]) and counts["test-duplex"][0] == 2
    assert not (tmp_path / "a" / "valid-duplex.jsonl.gz").exists()
    kinds, marks = set(), {}
    for name, (number, seconds) in counts.items():
        cuts = list(read_manifest(tmp_path / "a" / f"{name}.jsonl.gz"))
        assert len(cuts) == number and sum(c.duration for c in cuts) == pytest.approx(seconds)
        for cut, twin in zip(cuts, read_manifest(tmp_path / "b" / f"{name}.jsonl.gz"), strict=True):
            validate(cut)
            assert cut.custom["events"] == twin.custom["events"] and np.array_equal(cut.load_audio(), twin.load_audio())
            turns = [e for e in cut.custom["events"] if e["kind"] in ("user", "barge_in")]
            kinds |= {e["kind"] for e in cut.custom["events"]}
            marks |= {e["text"]: mark for e, mark in zip(turns, cut.custom["ambiguous"], strict=True)}
            assert position(turns[0]["end"]) < cut.duration * SAMPLE_RATE / TICK
    assert marks == {"what is two plus two": False, "one two three": True, "twenty one": True}
    assert {"user", "barge_in", "assistant", "backchannel", "pause", "noise"} == kinds
    names = [{c.recording.id for c in read_manifest(tmp_path / "a" / f"{n}.jsonl.gz")} for n in counts]
    assert not names[0] & names[1], "a dialogue's name draws its delays: sets share none"
