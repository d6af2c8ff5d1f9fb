"""The voice decoder: training layout == forced decoding over the whole grid, free-running speech, the two laws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from minmo.config import BackboneConfig, VoiceDecoderConfig, load_config
from minmo.modules.voice_decoder import VoiceDecoder
from minmo.state import State, all_rows, read_rows, write_rows

LLM_DIM = 6
TINY = VoiceDecoderConfig(
    lm=BackboneConfig(dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=24, rope_theta=1e4),
    llm_dim=LLM_DIM,
    codes=20,
    vocab=23,
    end_of_speech=20,
    fill=22,
)


@pytest.fixture(scope="module")
def decoder():
    """Random weights large enough that tokens differ and speech ends now and then."""
    g = torch.Generator().manual_seed(5)
    made = VoiceDecoder(TINY)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return made


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(query, text, speech, vocab=20, seed=1):
    """Arguments of `forward`: random vectors and ids for lengths (batch,), NaN and -1 beyond them."""
    vectors, tokens = int((query + text).max()), int(speech.max())
    hidden, embedding = normal(seed, 2, len(query), vectors, LLM_DIM)
    beyond = torch.arange(vectors) >= (query + text)[:, None]
    ids = torch.randint(0, vocab, (len(query), tokens), generator=torch.Generator().manual_seed(seed))
    ids = torch.where(torch.arange(tokens) < speech[:, None], ids, -1)
    nan = float("nan")
    return (
        hidden.masked_fill(beyond[..., None], nan),
        embedding.masked_fill(beyond[..., None], nan),
        query,
        text,
        ids,
        speech,
    )


class Passing(nn.Module):
    """In the LM's place: gives back what it is given, so that outputs are the LM's inputs."""

    @dataclass
    class Seen(State):
        lengths: torch.Tensor

    def forward(self, x, lengths):
        return x

    def initial_state(self, sessions, capacity):
        return self.Seen(torch.zeros(sessions, dtype=torch.int32))

    def step(self, x, x_lengths, state, rows):
        assert (x_lengths[rows >= 0] > 0).all() and (x_lengths[rows >= 0] <= x.shape[1]).all()
        write_rows(state.lengths, rows, read_rows(state.lengths, rows) + x_lengths)
        return x, torch.where(rows >= 0, x_lengths, 0), state


def test_schedule_training_layout_equals_forced_decoding_over_the_grid():
    """The LM's inputs, slot by slot, for every text length 0..40 x speech length 0..120, with and without query.

    Layouts as the lengths ask for (blocks where speech > 3 x text). Integer weights: sums are exact in any order.
    """
    lm = replace(TINY.lm, dim=3, layers=0)
    made = VoiceDecoder(replace(TINY, lm=lm, codes=130, vocab=133, end_of_speech=130, fill=132))
    made.lm, made.head = Passing(), nn.Identity()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_((normal(2, *p.shape) * 10).round())
    grid = torch.cartesian_prod(torch.tensor([0, 3]), torch.arange(41), torch.arange(121)).to(torch.int32)
    assert len(grid) == 2 * 41 * 121
    # Pieces of like speech length: a row takes part until the longest of its piece ends.
    for piece in grid[grid[:, 2].argsort(stable=True)].split(902):
        query, text, speech = piece.unbind(1)
        arguments = list(packed(query, text, speech, vocab=130))
        arguments[:2] = [(10 * x).round() for x in arguments[:2]]
        trained, targets = made(*arguments)
        assert torch.equal(made.forced(*arguments), trained)
        # Every speech token and one end of speech are predicted once in each row, and fill once in each block.
        assert torch.equal(((targets >= 0) & (targets < 130)).sum(1), speech.long())
        assert ((targets == 130).sum(1) == 1).all()
        assert torch.equal((targets == 132).sum(1), torch.where(speech > 3 * text, text // 5, 0).long())


CORNERS = [
    (0, 0), (0, 1), (0, 40), (1, 0), (1, 3), (1, 4), (4, 12), (4, 13), (5, 15), (5, 16), (5, 31), (6, 19), (9, 28),
    (10, 30), (10, 31), (10, 60), (14, 43), (15, 46), (15, 45), (19, 120), (20, 17), (29, 88), (39, 118), (39, 120),
    (40, 0), (40, 1), (40, 119), (40, 120), (7, 100), (23, 70),
]  # fmt: skip


def test_schedule_forced_logits_equal_training_logits(decoder):
    made = VoiceDecoder(replace(TINY, order="embedding,hidden"))
    made.load_state_dict(decoder.state_dict())
    query = ints(*[(0, 3, 1)[i % 3] for i in range(len(CORNERS))])
    text, speech = (ints(*column) for column in zip(*CORNERS, strict=True))
    arguments = packed(query, text, speech)
    logits, targets = made(*arguments)
    forced = made.forced(*arguments)
    asked = targets != -100
    assert asked.sum() >= int(speech.sum()) + len(speech)
    torch.testing.assert_close(forced[asked], logits[asked], rtol=1e-4, atol=1e-4)


def test_loss_reaches_every_parameter(decoder):
    arguments = packed(ints(2, 0), ints(7, 3), ints(30, 5))
    logits, targets = decoder(*arguments)
    loss = decoder.loss(logits, targets)
    uniform = -torch.log_softmax(logits, -1)[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    torch.testing.assert_close(loss, uniform)
    gradients = torch.autograd.grad(loss, list(decoder.parameters()))
    for (name, _), gradient in zip(decoder.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def speak(
    decoder, hidden, embedding, lengths, rows, cut=None, query=None, seeds=None, sessions=4, capacity=400, **settings
):
    """Runs replies to their end -> a token list an entry (None for padding) and how many tokens each call gave.

    cut: a generator that draws how many vectors each entry gets a call; None gives all in the first.
    """
    batch = len(rows)
    state = decoder.initial_state(sessions, capacity)
    seeds = torch.arange(batch) + 7 if seeds is None else seeds
    decoder.start(state, rows, seeds, query=query, **{"max_ratio": 5.0, **settings})
    done = torch.zeros(batch, dtype=torch.int32)
    tokens, calls = [[] for _ in range(batch)], [[] for _ in range(batch)]
    for _ in range(400):
        count = lengths - done
        if cut is not None:
            count = torch.minimum(count, torch.randint(0, 8, (batch,), generator=cut, dtype=torch.int32))
        width = int(count.max())
        index = (done[:, None] + torch.arange(width)).clamp(max=hidden.shape[1] - 1).long()
        beyond = (torch.arange(width) >= count[:, None])[..., None]
        x = [
            half.gather(1, index[..., None].expand(-1, -1, LLM_DIM)).masked_fill(beyond, torch.nan)
            for half in (hidden, embedding)
        ]
        done = done + count
        out, given, _ = decoder.step((x[0], x[1]), count, state, rows, done == lengths)
        assert out.shape == (batch, 15 * ((width + 4) // 5 + 1)) and out.dtype == torch.int32
        for b in range(batch):
            tokens[b] += out[b, : int(given[b])].tolist()
            calls[b].append((int(done[b]), int(given[b])))
        finished = read_rows(state.finished, rows)
        assert not (finished & (done < lengths)).any()
        if (finished | (rows < 0)).all():
            return tokens, calls
    raise AssertionError("speech did not end")


ROWS, LENGTHS = ints(2, -1, 0, 3), ints(13, 6, 0, 10)
HIDDEN, EMBEDDING = normal(3, 2, 4, 13, LLM_DIM)
QUERY = (*normal(4, 2, 4, 5, LLM_DIM), ints(5, 2, 3, 0))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"bistream": False}])
def test_split_vectors_never_change_tokens(decoder, settings):
    whole, _ = speak(decoder, HIDDEN, EMBEDDING, LENGTHS, ROWS, query=QUERY, **settings)
    assert len(whole[0]) >= 26 and whole[1] == [] and whole[2] == []
    for seed in range(2):
        cut = torch.Generator().manual_seed(seed)
        again, _ = speak(decoder, HIDDEN, EMBEDDING, LENGTHS, ROWS, cut, query=QUERY, **settings)
        assert again == whole


def test_batch_neighbours_never_change_tokens(decoder):
    whole, _ = speak(decoder, HIDDEN, EMBEDDING, LENGTHS, ROWS, query=QUERY)
    alone = torch.where(ROWS == 3, ROWS, -1).to(torch.int32)
    assert speak(decoder, HIDDEN, EMBEDDING, LENGTHS, alone, query=QUERY)[0][3] == whole[3]
    other = normal(9, 2, 4, 13, LLM_DIM)
    hidden, embedding = torch.where(torch.arange(4)[:, None, None] == 3, torch.stack([HIDDEN, EMBEDDING]), other)
    moved = torch.where(ROWS >= 0, 3 - ROWS, -1).to(torch.int32)
    mixed, _ = speak(decoder, hidden, embedding, ints(4, 9, 11, 10), moved, query=QUERY)
    assert mixed[3] == whole[3] and mixed[0] != whole[0]


def test_free_running_speaks_15_tokens_for_5_vectors(decoder):
    state = decoder.initial_state(1, 200)
    row, more, end = all_rows(1), torch.tensor([False]), torch.tensor([True])
    # Many end-of-speech logits: only its ban keeps blocks complete.
    biased = VoiceDecoder(TINY)
    biased.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        biased.head.bias[TINY.codes :] = 50.0
    biased.start(state, row, torch.tensor([3]))
    given = []
    for n in range(12):
        x = (HIDDEN[:1, n : n + 1], EMBEDDING[:1, n : n + 1])
        tokens, count, _ = biased.step(x, ints(1), state, row, more)
        given.append(int(count))
        assert (tokens[0, : int(count)] < TINY.codes).all() and not state.finished[0]
    assert given == [0, 0, 0, 0, 15, 0, 0, 0, 0, 15, 0, 0]
    assert int(state.lm.lengths) == 1 + 10 + 2 * 15 - 1, "the last token waits for the next vectors"
    # Two vectors wait; end of speech is allowed at once, as 30 tokens are more than 2 x 12.
    nothing = HIDDEN[:1, :0]
    _, count, _ = biased.step((nothing, nothing), ints(0), state, row, end)
    assert int(count) == 0 and bool(state.finished) and int(state.lm.lengths) == 1 + 12 + 1 + 30
    _, count, _ = biased.step((nothing, nothing), ints(0), state, row, end)
    assert int(count) == 0


def test_free_running_ends_at_its_limits(decoder):
    rows = all_rows(4)
    lengths = ints(3, 1, 12, 0)
    no_end, all_end = VoiceDecoder(TINY), VoiceDecoder(TINY)
    for made, bias in ((no_end, -50.0), (all_end, 50.0)):
        made.load_state_dict(decoder.state_dict())
        with torch.no_grad():
            made.head.bias[TINY.end_of_speech] = bias
    longest, calls = speak(no_end, HIDDEN, EMBEDDING, lengths, rows, max_ratio=8.0)
    assert [len(t) for t in longest] == [24, 8, 96, 0]
    assert [n for _, n in calls[2]] == [45, 15, 15, 15, 6]
    shortest, _ = speak(all_end, HIDDEN, EMBEDDING, lengths, rows)
    assert [len(t) for t in shortest] == [6, 2, 30, 0]
    full, _ = speak(no_end, HIDDEN, EMBEDDING, lengths, rows, capacity=60, max_ratio=20.0)
    assert [len(t) for t in full] == [60 - 2 - 3, 20, 60 - 2 - 12, 0]


def test_free_running_equals_teacher_forcing_with_its_own_tokens(decoder):
    """Greedy tokens are the largest allowed logits of the training layout over the finished sequence."""
    tokens, _ = speak(decoder, HIDDEN, EMBEDDING, LENGTHS, ROWS, query=QUERY, temperature=0.0, min_ratio=4.0)
    query, text = int(QUERY[2][0]), int(LENGTHS[0])
    hidden, embedding = (
        torch.cat([q[:1, :query], x[:1, :text]], 1) for q, x in ((QUERY[0], HIDDEN), (QUERY[1], EMBEDDING))
    )
    speech = torch.tensor([tokens[0]])
    logits, targets = decoder(
        hidden, embedding, ints(query), ints(text), speech, ints(len(tokens[0])), torch.tensor([True])
    )
    asked = (targets >= 0) & (targets < TINY.codes)
    assert logits[asked][:, : TINY.codes].argmax(-1).tolist() == tokens[0]


def test_seeds_and_query_decide(decoder):
    rows, same = all_rows(4), torch.full((4,), 11)
    hidden, embedding = HIDDEN[:1].expand(4, -1, -1), EMBEDDING[:1].expand(4, -1, -1)
    lengths = ints(10, 10, 10, 10)
    tokens, _ = speak(decoder, hidden, embedding, lengths, rows, seeds=same)
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]
    assert speak(decoder, hidden, embedding, lengths, rows, seeds=same)[0] == tokens
    others, _ = speak(decoder, hidden, embedding, lengths, rows, seeds=torch.tensor([11, 12, 13, 14]))
    assert others[0] == tokens[0] and len({tuple(t) for t in others}) == 4
    asked, _ = speak(decoder, hidden, embedding, lengths, rows, seeds=same, query=QUERY)
    assert asked[0] != tokens[0] and asked[3] == tokens[3]
    made = VoiceDecoder(replace(TINY, query=False))
    made.load_state_dict(decoder.state_dict())
    assert speak(made, hidden, embedding, lengths, rows, seeds=same, query=QUERY)[0] == tokens


@pytest.mark.parametrize("limit,longest", [(1, 1), (3, 3), (11, 11)])
def test_the_limit_of_repetition_is_the_configurations(decoder, limit, longest):
    sure = VoiceDecoder(replace(TINY, repetition_limit=limit))
    sure.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        sure.head.bias[4], sure.head.bias[TINY.end_of_speech] = 50.0, -50.0  # says one token unless it may not
    (said,), _ = speak(sure, HIDDEN[:1, :5], EMBEDDING[:1, :5], ints(5), all_rows(1), max_ratio=8.0)
    assert max(said[max(0, i - 10) : i + 1].count(4) for i in range(len(said))) == longest
    assert len(said) == 40


def test_bad_use_is_named(decoder):
    row, x = all_rows(1), (HIDDEN[:1, :2], EMBEDDING[:1, :2])
    end = torch.tensor([True])
    state = decoder.initial_state(1, 100)
    with pytest.raises(ValueError, match=r"must both be \(batch, n, 6\)"):
        decoder.step((x[0], x[1][..., :3]), ints(2), state, row, end)
    with pytest.raises(ValueError, match="not started"):
        decoder.step(x, ints(2), state, row, end)
    decoder.start(state, row, torch.tensor([1]))
    decoder.step(x, ints(2), state, row, end)
    with pytest.raises(ValueError, match="after `final`"):
        decoder.step(x, ints(2), state, row, end)
    with pytest.raises(ValueError, match="15 speech tokens for every 5"):
        decoder.forced(*packed(ints(0), ints(5), ints(14)), bistream=torch.tensor([True]))
    with pytest.raises(ValueError, match="voice_decoder.order"):
        VoiceDecoder(replace(TINY, order="both"))


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        made = VoiceDecoder(load_config("minmo-8b").voice_decoder)
    projector = sum(p.numel() for p in made.output_projector.parameters())
    assert projector == 6_423_424
    assert sum(p.numel() for p in made.lm.parameters()) == 357_898_112
    assert sum(p.numel() for p in made.parameters()) - projector == 369_669_156
