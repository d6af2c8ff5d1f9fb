"""The backbone: streaming laws, conversation caches, and equality with transformers' Qwen2."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from minmo.config import BackboneConfig
from minmo.modules.backbone import Backbone, copy_prefix, truncate
from minmo.weights.importers.qwen2 import from_hf, to_hf

TINY = BackboneConfig(dim=24, layers=2, heads=3, kv_heads=1, head_dim=64, ffn=40, vocab=50, rope_theta=1e4)
SHAPES = {
    "gqa 3:1": TINY,
    "mha, tied": dataclasses.replace(TINY, heads=2, kv_heads=2, tied=True, rope_theta=1e6),
    "gqa 4:2, wide heads": dataclasses.replace(TINY, dim=32, layers=1, heads=4, kv_heads=2, head_dim=128, ffn=24),
    "gqa 7:1, three layers, tied": dataclasses.replace(TINY, layers=3, heads=7, tied=True),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def backbone(config=TINY, seed=0):
    """Random weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = Backbone(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5) + (parameter == 1))
    return model


def hugging_face(model):
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim, intermediate_size=c.ffn, vocab_size=c.vocab, rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tied,
            max_position_embeddings=512, use_sliding_window=False, attn_implementation="eager",
        )
    )  # fmt: skip
    missing, unexpected = theirs.load_state_dict(to_hf(model.state_dict(), c), strict=False)
    assert missing == (["lm_head.weight"] if c.tied else []) and unexpected == []
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_parity_with_qwen2(shape):
    """One shot; prefill whole and in pieces; then token by token with their cache. Row 1 of 3 is left alone."""
    model = backbone(SHAPES[shape])
    theirs = hugging_face(model)
    ids = torch.randint(model.config.vocab, (2, 19))
    expected = theirs(ids).logits
    torch.testing.assert_close(model.logits(model(model.embed(ids))), expected, **CLOSE)

    rows = int32(2, 0)
    for pieces in ([12], [1, 7, 4], [5, 5, 2]):
        state = model.initial_state(3, 24)
        start = 0
        for size in pieces + [1] * 7:
            x = model.embed(ids[:, start : start + size])
            hidden, lengths, state = model.step(x, int32(size, size), state, rows)
            torch.testing.assert_close(model.logits(hidden), expected[:, start : start + size], **CLOSE)
            start += size
        assert state.lengths.tolist() == [19, 0, 19]
        assert not state.layers[0].k[1].any()

    cached = theirs(ids[:, :12], use_cache=True)
    state = model.initial_state(2, 24)
    model.step(model.embed(ids[:, :12]), int32(12, 12), state, int32(0, 1))
    for t in range(12, 19):
        cached = theirs(ids[:, t : t + 1], past_key_values=cached.past_key_values, use_cache=True)
        hidden, _, _ = model.step(model.embed(ids[:, t : t + 1]), int32(1, 1), state, int32(0, 1))
        torch.testing.assert_close(model.logits(hidden), cached.logits, **CLOSE)


@torch.no_grad()
def test_parity_with_qwen2_padded_batch():
    """Right-padded sequences of different length, as transformers' attention mask sees them."""
    model = backbone()
    ids = torch.randint(model.config.vocab, (3, 11))
    lengths = int32(11, 4, 7)
    keep = torch.arange(11) < lengths[:, None]
    expected = hugging_face(model)(ids, attention_mask=keep.long()).logits
    x = torch.where(keep[..., None], model.embed(ids), torch.nan)
    hidden = model(x, lengths)
    torch.testing.assert_close(model.logits(hidden)[keep], expected[keep], **CLOSE)
    assert not hidden[~keep].any()


def test_parity_of_gradients_with_qwen2():
    model = backbone()
    theirs = hugging_face(model)
    ids = torch.randint(model.config.vocab, (2, 9))
    expected = theirs(ids, labels=ids).loss
    logits = model.logits(model(model.embed(ids)))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    ours = to_hf({name: p.grad for name, p in model.named_parameters()}, model.config)
    assert set(ours) == set(grads)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_parity_with_qwen2_bfloat16():
    """Rounding differs, so bf16 is held to the distance of transformers' own bf16 from fp32."""
    model = backbone()
    theirs = hugging_face(model)
    ids = torch.randint(model.config.vocab, (2, 16))
    exact = theirs(ids).logits
    bound = (theirs.to(torch.bfloat16)(ids).logits.float() - exact).abs().max()
    model.to(torch.bfloat16)
    whole = model.logits(model(model.embed(ids)))
    state = model.initial_state(2, 16)
    steps = [
        model.logits(model.step(model.embed(ids[:, t : t + 1]), int32(1, 1), state, int32(1, 0))[0]) for t in range(16)
    ]
    assert whole.dtype == state.layers[0].k.dtype == torch.bfloat16
    for actual in (whole, torch.cat(steps, 1)):
        assert (actual.float() - exact).abs().max() <= 2 * bound


@pytest.mark.parametrize("shape", SHAPES)
def test_parity_of_state_dicts(shape):
    """from_hf and to_hf are inverse, bit for bit, both starting from ours and from theirs."""
    config = SHAPES[shape]
    model = backbone(config)
    ours = model.state_dict()
    back = from_hf(to_hf(ours, config), config)
    assert set(back) == set(ours) and all(torch.equal(back[k], ours[k]) for k in ours)
    theirs = hugging_face(model).state_dict()
    assert ("lm_head.weight" in theirs) or config.tied
    imported = from_hf(theirs, config)
    assert all(torch.equal(imported[k], ours[k]) for k in ours)
    again = to_hf(imported, config)
    assert set(theirs) - set(again) <= {"lm_head.weight"}
    assert all(torch.equal(again[k], theirs[k]) for k in again)


def test_conversion_names_the_tensor_that_does_not_fit():
    model = backbone()
    ours = model.state_dict()
    for convert, source, name in (
        (from_hf, to_hf(ours, TINY), "model.layers.1.self_attn.k_proj.bias"),
        (to_hf, ours, "layers.1.gate_up.weight"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*missing"):
            convert({k: v for k, v in source.items() if k != name}, TINY)
        with pytest.raises(ValueError, match=f"{name}.*has the shape"):
            convert({**source, name: source[name][:-1]}, TINY)
        with pytest.raises(ValueError, match="no place for, such as 'stray.weight'"):
            convert({**source, "stray.weight": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match="set `tied` to false"):
        from_hf(to_hf(ours, TINY), dataclasses.replace(TINY, tied=True))
    with pytest.raises(ValueError, match="lacks the tensor 'lm_head.weight'"):
        from_hf({k: v for k, v in to_hf(ours, TINY).items() if k != "lm_head.weight"}, TINY)


def test_parameter_counts_of_the_paper():
    llm = BackboneConfig(3584, 28, 28, 4, 128, 18944, vocab=152064)
    body = BackboneConfig(896, 24, 14, 2, 64, 4864)
    tied = dataclasses.replace(TINY, tied=True)
    with torch.device("meta"):
        assert sum(p.numel() for p in Backbone(llm).parameters()) == 7_615_616_512
        assert sum(p.numel() for p in Backbone(body).parameters()) == 357_898_112
        untied_count = sum(p.numel() for p in Backbone(TINY).parameters())
        assert sum(p.numel() for p in Backbone(tied).parameters()) == untied_count - TINY.vocab * TINY.dim


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(0, 2**31 - 1), st.integers(1, 3))
@torch.no_grad()
def test_split_law(seed, batch):
    """Random cuts with empty steps, sessions out of step, padding entries and NaN beyond lengths equal one shot."""
    g = torch.Generator().manual_seed(seed)
    model = backbone(seed=seed)
    total = torch.randint(1, 14, (batch,), generator=g).tolist()
    x = torch.randn(batch, max(total), TINY.dim, generator=g)
    expected = model(x, int32(*total))
    sessions = batch + 1
    session = torch.randperm(sessions, generator=g)[:batch].tolist()
    state = model.initial_state(sessions, max(total))
    for cache in state.layers:
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    done = [0] * batch
    got = [[] for _ in range(batch)]
    while done != total:
        size = int(torch.randint(0, 5, (), generator=g))
        piece = torch.full((batch, size, TINY.dim), torch.nan)
        counts, rows = [0] * batch, [-1] * batch
        for b in range(batch):
            if torch.rand((), generator=g) < 0.8:
                rows[b] = session[b]
                counts[b] = int(torch.randint(0, min(size, total[b] - done[b]) + 1, (), generator=g))
                piece[b, : counts[b]] = x[b, done[b] : done[b] + counts[b]]
        given_counts = [size if row < 0 else count for row, count in zip(rows, counts, strict=True)]
        out, lengths, state = model.step(piece, int32(*given_counts), state, int32(*rows))
        assert lengths.tolist() == counts
        for b in range(batch):
            got[b].append(out[b, : counts[b]])
            done[b] += counts[b]
            assert not out[b, counts[b] :].any()
    for b in range(batch):
        torch.testing.assert_close(torch.cat(got[b]), expected[b, : total[b]], **CLOSE)


@torch.no_grad()
def test_neighbours_do_not_change_a_bit():
    model = backbone()
    x = torch.randn(3, 5, TINY.dim)

    def run(others, lengths, rows):
        state = model.initial_state(4, 10)
        first = torch.cat([x[:1], others[:2]])
        for _ in range(2):
            out, _, state = model.step(first, int32(4, *lengths), state, int32(1, *rows))
        return out[0]

    base = run(torch.randn(2, 5, TINY.dim), (5, 2), (0, 3))
    assert torch.equal(run(torch.full((2, 5, TINY.dim), torch.nan), (0, 0), (2, 0)), base)
    assert torch.equal(run(100 * torch.randn(2, 5, TINY.dim), (1, 5), (-1, 2)), base)
    assert torch.equal(model(x, int32(4, 5, 5))[0, :4], model(torch.cat([x[:1], -x[1:]]), int32(4, 1, 0))[0, :4])


@torch.no_grad()
def test_truncate_and_copy_prefix_branch_a_conversation():
    """A session cut back, or branched, continues as one that never held the rest."""
    model = backbone()
    x = torch.randn(1, 9, TINY.dim)
    other = torch.randn(1, 3, TINY.dim)
    expected = model(torch.cat([x[:, :4], other], 1))[:, 4:]
    state = model.initial_state(3, 12)
    model.step(x, int32(9), state, int32(0))

    copy_prefix(state, 0, 2, 4)
    assert state.lengths.tolist() == [9, 0, 4]
    out, _, _ = model.step(other, int32(3), state, int32(2))
    torch.testing.assert_close(out, expected, **CLOSE)

    truncate(state, int32(0, -1), 4)
    assert state.lengths.tolist() == [4, 0, 7]
    out, _, _ = model.step(other, int32(3), state, int32(0))
    torch.testing.assert_close(out, expected, **CLOSE)
    truncate(state, int32(2, 0), int32(5, 1))
    assert state.lengths.tolist() == [1, 0, 5]
    state.reset(int32(2, -1))
    assert state.lengths.tolist() == [1, 0, 0]

    with pytest.raises(ValueError, match="cannot truncate to"):
        truncate(state, 0, 2)
    with pytest.raises(ValueError, match="cannot copy 2 positions: session 0 holds 1"):
        copy_prefix(state, 0, 1, 2)
    with pytest.raises(ValueError, match="must lie in 0 .. 2"):
        copy_prefix(state, 0, 3, 1)


@torch.no_grad()
def test_overflow_is_refused_before_anything_changes():
    model = backbone()
    state = model.initial_state(2, 6)
    x = torch.randn(2, 4, TINY.dim)
    model.step(x, int32(4, 2), state, int32(0, 1))
    before = [cache.k.clone() for cache in state.layers]
    with pytest.raises(ValueError, match="grow to 8 positions, but a session holds at most 6: .* larger capacity"):
        model.step(x, int32(4, 4), state, int32(0, 1))
    assert state.lengths.tolist() == [4, 2]
    assert all(torch.equal(cache.k, k) for cache, k in zip(state.layers, before, strict=True))
    model.step(x, int32(2, 4), state, int32(0, 1))
    assert state.lengths.tolist() == [6, 6]


def test_bad_input_is_named():
    model = backbone()
    state = model.initial_state(1, 4)
    with pytest.raises(ValueError, match="token id 50 is outside the vocabulary 0 .. 49"):
        model.embed(torch.tensor([3, 50]))
    with pytest.raises(ValueError, match=r"x must have the shape \(batch, T, 24\)"):
        model(torch.zeros(1, 2, 23))
    with pytest.raises(ValueError, match="lengths must lie in 0 .. 2"):
        model.step(torch.zeros(1, 2, 24), int32(3), state, int32(0))
    body = Backbone(dataclasses.replace(TINY, vocab=0))
    with pytest.raises(ValueError, match="no token embedding"):
        body.embed(torch.tensor([1]))
    with pytest.raises(ValueError, match="no head"):
        body.logits(torch.zeros(1, 24))
