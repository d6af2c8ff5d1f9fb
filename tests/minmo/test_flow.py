"""The flow: parameter counts, parity with the public class, the two streaming laws, the chunk grid, bad input."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minmo.config import FlowConfig, load_config
from minmo.state import KVCache, State
from minmo.token2wav.causal import ChunkMask
from minmo.token2wav.flow import Flow, FlowState
from minmo.weights.importers.cosyvoice_flow import convert, key_table

GOLDEN = Path(__file__).parent / "golden"
TINY = FlowConfig(
    codes=20,
    dim=16,
    heads=2,
    ffn=32,
    blocks=1,
    up_blocks=1,
    lookahead=2,
    n_mels=6,
    speaker_dim=5,
    estimator_dim=8,
    estimator_heads=2,
    estimator_head_dim=4,
    estimator_mid_blocks=1,
    estimator_transformers=1,
    steps=2,
    chunk=5,
    left_context=10,
)
LAW = settings(deadline=None, max_examples=6, derandomize=True)


@pytest.fixture(scope="module")
def tiny() -> Flow:
    return make(TINY)


def make(config: FlowConfig, seed: int = 0) -> Flow:
    torch.manual_seed(seed)
    flow = Flow(config).eval()
    with torch.no_grad():  # large enough weights that attention and carries matter for the output
        for parameter in flow.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)
    return flow.requires_grad_(False)


def voices(config: FlowConfig, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, config.speaker_dim, generator=generator), torch.arange(n) * 7 + 2**40 + seed


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poison(state: State) -> None:
    """What no session has written may hold anything."""
    if isinstance(state, KVCache):
        state.k.fill_(torch.nan)
        state.v.fill_(torch.nan)
    for part in state._parts():
        if isinstance(part, State):
            poison(part)


def stream(
    flow: Flow, state: FlowState, tokens: list[torch.Tensor], rows: list[int], seed: int, longest: int
) -> list[torch.Tensor]:
    """Feeds each utterance in random cuts, out of step with the others, among padding entries and rubbish."""
    draw = np.random.RandomState(seed)
    fed, finished = [0] * len(tokens), [False] * len(tokens)
    mel: list[list[torch.Tensor]] = [[] for _ in tokens]
    while not all(finished):
        entries = [i for i in range(len(tokens)) if not finished[i] and draw.rand() < 0.8]
        order = [*draw.permutation(entries).tolist(), *[-1] * (len(tokens) + 1 - len(entries))]
        x = torch.full((len(order), longest), 10**6, dtype=torch.int64)
        lengths, final = torch.zeros(len(order), dtype=torch.int32), torch.zeros(len(order), dtype=torch.bool)
        for entry, i in enumerate(order):
            if i < 0:
                lengths[entry], final[entry] = longest, True
                continue
            n = min(int(draw.randint(0, longest + 1)), len(tokens[i]) - fed[i])
            x[entry, :n] = tokens[i][fed[i] : fed[i] + n]
            fed[i] += n
            lengths[entry] = n
            finished[i] = bool(fed[i] == len(tokens[i]) and draw.rand() < 0.6)
            final[entry] = finished[i]
        entry_rows = int32(*[rows[i] if i >= 0 else -1 for i in order])
        y, y_lengths, state = flow.step(x, lengths, state, entry_rows, final)
        assert y.shape == (len(order), 2 * (longest + flow.config.chunk + flow.config.lookahead - 1), y.shape[2])
        for entry, i in enumerate(order):
            assert not y[entry, y_lengths[entry] :].any()
            if i >= 0:
                mel[i].append(y[entry, : y_lengths[entry]])
            else:
                assert y_lengths[entry] == 0
    return [torch.cat(parts) for parts in mel]


def assert_same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    if want.numel():
        error = (got - want).abs().max() / want.abs().max()
        assert error < tolerance, f"relative error {error:.2e}"


def one_by_one(flow: Flow, tokens: list[torch.Tensor], speaker: torch.Tensor, seeds: torch.Tensor, **prompt):
    """One-shot mel of a padded batch, cut to each length."""
    lengths = int32(*map(len, tokens))
    x = torch.full((len(tokens), int(lengths.max())), -7)
    for i, t in enumerate(tokens):
        x[i, : len(t)] = t
    y, y_lengths = flow(x, lengths, speaker, seeds, **prompt)
    assert y_lengths.tolist() == (2 * lengths).tolist() and y_lengths.dtype == torch.int32
    return [y[i, :n] for i, n in enumerate(y_lengths)]


# --- sizes and weights


def test_flow_has_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        flow = Flow(FlowConfig())
        state = flow.initial_state(2)
    assert sum(p.numel() for p in flow.parameters()) == 112_549_360
    # 14 groups of 4 blocks, 10 Euler steps, 2 halves, 90 frames of keys and values of 512 fp32 each: 413 MB a session.
    blocks = 14 * 4 * 10 * 2 * 90 * 2 * 512 * 4
    assert blocks < state.nbytes / 2 < 1.02 * blocks
    print(f"flow state at full size: {state.nbytes / 2e6:.1f} MB a session in fp32")


def test_flow_key_table_covers_the_released_checkpoint_both_ways() -> None:
    released = dict(line.split() for line in (GOLDEN / "flow_keys.txt").read_text().splitlines())
    with torch.device("meta"):
        ours = Flow(FlowConfig()).state_dict()
    table = key_table(FlowConfig())
    assert len(released) == 1121
    assert set(table) == set(released)
    assert sorted(table.values()) == sorted(ours)
    for theirs, mine in table.items():
        assert released[theirs] == "x".join(map(str, ours[mine].shape)), theirs


def test_flow_convert_names_what_does_not_fit(tiny: Flow) -> None:
    back = {theirs: tiny.state_dict()[mine] for theirs, mine in key_table(TINY).items()}
    tiny.load_state_dict(convert(back, TINY))
    with pytest.raises(ValueError, match="lacks the tensor 'encoder_proj.bias'"):
        convert({k: v for k, v in back.items() if k != "encoder_proj.bias"}, TINY)
    with pytest.raises(ValueError, match="'extra'"):
        convert({**back, "extra": back["encoder_proj.bias"]}, TINY)


def drawn(key: str, shape: torch.Size) -> torch.Tensor:
    """The weights of golden/README.md."""
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
    if len(shape) >= 2:
        return torch.from_numpy(x / np.sqrt(np.prod(shape[1:]))).float()
    scale = any(part in key for part in ("norm", ".out.1.", ".block.2.")) and key.endswith("weight")
    return torch.from_numpy(0.1 * x + (1.0 if scale else 0.0)).float()


def golden_flow(chunk: int = 15) -> Flow:
    config = FlowConfig(
        codes=50,
        dim=32,
        heads=2,
        ffn=64,
        blocks=2,
        speaker_dim=12,
        estimator_dim=32,
        estimator_heads=2,
        estimator_head_dim=16,
        estimator_mid_blocks=2,
        estimator_transformers=2,
        chunk=chunk,
        left_context=2 * chunk,
    )
    flow = Flow(config).eval().requires_grad_(False)
    ours = flow.state_dict()
    released = {theirs: drawn(theirs, ours[mine].shape) for theirs, mine in key_table(config).items()}
    flow.load_state_dict(convert(released, config))
    return flow


def golden_inputs() -> dict[str, torch.Tensor]:
    draw = np.random.RandomState(7)
    inputs = {"prompt_tokens": draw.randint(0, 50, (1, 20)), "tokens": draw.randint(0, 50, (1, 42))}
    for name, shape in (("speaker", (1, 12)), ("prompt_mel", (1, 40, 80)), ("noise", (1, 124, 80))):
        inputs[name] = draw.standard_normal(shape).astype(np.float32)
    return {k: torch.from_numpy(v) for k, v in inputs.items()}


@pytest.mark.parametrize("name, mask", [("full", "full"), ("chunked", ChunkMask(25))])
def test_flow_parity_with_cosyvoice_one_shot(name: str, mask: str | ChunkMask) -> None:
    x = golden_inputs()
    mel, _ = golden_flow()(lengths=None, seeds=torch.zeros(1, dtype=torch.int64), mask=mask, **x)
    want = torch.from_numpy(np.load(GOLDEN / "flow.npz")[name])
    assert_same(mel[0], want, 1e-5)


def test_flow_parity_with_cosyvoice_first_chunk_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 tokens and 3 of look-ahead are one chunk of the public class, and the first chunk of ours for chunk = 28."""
    x, flow = golden_inputs(), golden_flow(chunk=28)
    monkeypatch.setattr(flow, "_noise", lambda seeds, first, frames: x["noise"][:, :frames])
    state = flow.start(flow.initial_state(1), int32(0), x["speaker"], torch.zeros(1, dtype=torch.int64))
    mel, lengths, _ = flow.step(x["tokens"][:, :28], int32(28), state, int32(0), torch.tensor([False]))
    assert lengths.tolist() == [50]
    assert_same(mel[0, :50], torch.from_numpy(np.load(GOLDEN / "flow.npz")["first_chunk"]), 1e-5)


# --- law a: cuts


@LAW
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 24), min_size=1, max_size=3), st.integers(4, 13))
def test_flow_split_equals_one_shot(seed: int, lengths: list[int], longest: int) -> None:
    flow = make(TINY)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, TINY.codes, (n,), generator=generator) for n in lengths]
    speaker, seeds = voices(TINY, len(tokens), seed)
    state = flow.initial_state(4)
    poison(state)
    rows = np.random.RandomState(seed).permutation(4)[: len(tokens)].tolist()
    flow.start(state, int32(*rows), speaker, seeds)
    got = stream(flow, state, tokens, rows, seed, longest)
    for y, want in zip(got, one_by_one(flow, tokens, speaker, seeds), strict=True):
        assert_same(y, want)


def test_flow_split_equals_one_shot_nano() -> None:
    flow = make(load_config("nano").flow)
    tokens = [torch.randint(0, 625, (n,), generator=torch.Generator().manual_seed(n)) for n in (64, 33)]
    speaker, seeds = voices(flow.config, 2)
    state = flow.start(flow.initial_state(2), int32(1, 0), speaker, seeds)
    got = stream(flow, state, tokens, [1, 0], 3, 15)
    for y, want in zip(got, one_by_one(flow, tokens, speaker, seeds), strict=True):
        assert_same(y, want)


@pytest.mark.parametrize("pushed", [0, 5, 20])
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_flow_split_final_flush(tiny: Flow, pushed: int, last: int) -> None:
    tokens = torch.randint(0, TINY.codes, (1, pushed + last), generator=torch.Generator().manual_seed(last))
    speaker, seeds = voices(TINY, 1)
    state = tiny.start(tiny.initial_state(1), int32(0), speaker, seeds)
    first, n, _ = tiny.step(tokens[:, :pushed], int32(pushed), state, int32(0), torch.tensor([False]))
    rest, m, _ = tiny.step(tokens[:, pushed:], int32(last), state, int32(0), torch.tensor([True]))
    want, _ = tiny(tokens, None, speaker, seeds)
    assert n.tolist() == [max(0, 2 * (pushed - TINY.lookahead))]
    assert_same(torch.cat([first[0, :n], rest[0, :m]]), want[0])


@pytest.mark.parametrize("prompt, lengths", [(5, (11, 3)), (20, (0, 9))])
def test_flow_split_with_a_prompt(tiny: Flow, prompt: int, lengths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(prompt)
    tokens = [torch.randint(0, TINY.codes, (n,), generator=generator) for n in lengths]
    form = {
        "prompt_tokens": torch.randint(0, TINY.codes, (2, prompt), generator=generator),
        "prompt_mel": torch.randn(2, 2 * prompt, TINY.n_mels, generator=generator),
    }
    speaker, seeds = voices(TINY, 2)
    state = tiny.initial_state(3)
    poison(state)
    tiny.start(state, int32(2, 0), speaker, seeds, **form)
    got = stream(tiny, state, tokens, [2, 0], prompt, 7)
    want = one_by_one(tiny, tokens, speaker, seeds, **form)
    for y, expected in zip(got, want, strict=True):
        assert_same(y, expected)
    without = one_by_one(tiny, tokens, speaker, seeds)
    assert (without[1] - want[1]).abs().max() > 1e-3


def test_flow_split_rows_are_reused(tiny: Flow) -> None:
    tokens = torch.randint(0, TINY.codes, (1, 23), generator=torch.Generator().manual_seed(1))
    speaker, seeds = voices(TINY, 1)
    state, out = tiny.initial_state(1), []
    for text in (tokens, tokens.flip(1), tokens):
        tiny.start(state, int32(0), speaker, seeds)
        y, n, _ = tiny.step(text, int32(23), state, int32(0), torch.tensor([True]))
        out.append(y[0, :n])
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])


# --- law b: the batch, and seeds


def test_flow_batch_never_changes_a_row(tiny: Flow) -> None:
    """Bit for bit at a fixed batch shape, one shot and in a stream, next to other rows, NaN or padding."""
    tokens = torch.randint(0, TINY.codes, (3, 21), generator=torch.Generator().manual_seed(0))
    speaker, seeds = voices(TINY, 3)
    shots, streams = [], []
    for variant in range(3):
        x, s, d, rows = tokens.clone(), speaker.clone(), seeds.clone(), int32(0, 1, 2)
        lengths = int32(21, 21, 21)
        if variant == 1:
            x[1:], s[1:], d[1:], lengths[1:] = 3, torch.nan, 5, int32(4, 0)
        if variant == 2:
            x[1:], rows[1:] = -9, -1
            lengths[1:] = 0
        shots.append(tiny(x, lengths, s, d)[0][0])
        state = tiny.start(tiny.initial_state(3), rows, s, d)
        mel = []
        for i in range(0, 21, 7):
            n = (lengths - i).clamp(0, 7)
            y, y_lengths, _ = tiny.step(x[:, i : i + 7], n, state, rows, torch.tensor([i == 14, True, False]))
            mel.append(y[0, : y_lengths[0]])
        streams.append(torch.cat(mel))
    for variant in (1, 2):
        assert torch.equal(shots[0], shots[variant])
        assert torch.equal(streams[0], streams[variant])


def test_flow_mel_depends_on_seed_and_speaker_alone(tiny: Flow) -> None:
    tokens = torch.randint(0, TINY.codes, (1, 9)).expand(4, -1)
    speaker, _ = voices(TINY, 2)
    speaker = torch.stack([speaker[0], 3 * speaker[0], speaker[0], speaker[1]])
    mel, _ = tiny(tokens, None, speaker, torch.tensor([11, 11, 12, 11]))
    assert_same(mel[1], mel[0])  # only the direction of the speaker vector counts
    assert (mel[2] - mel[0]).abs().max() > 1e-2
    assert (mel[3] - mel[0]).abs().max() > 1e-2


def test_flow_random_weights_give_moderate_mel() -> None:
    torch.manual_seed(0)
    for config in (TINY, load_config("nano").flow):
        flow = Flow(config).eval().requires_grad_(False)
        for dtype in (torch.float32, torch.bfloat16):
            speaker, seeds = voices(config, 1)
            mel, _ = flow.to(dtype)(torch.arange(20)[None], None, speaker.to(dtype), seeds)
            assert mel.dtype == torch.float32 and mel.isfinite().all() and mel.abs().max() < 10


# --- the chunk grid and its cost


@LAW
@given(st.integers(0, 2**31 - 1), st.integers(0, 24))
def test_flow_chunk_by_chunk_equals_one_shot(seed: int, size: int) -> None:
    """One chunk a call and no more, also at the end, where two chunks may be left."""
    flow, draw = make(TINY), np.random.RandomState(seed)
    tokens = torch.from_numpy(draw.randint(0, TINY.codes, (1, size)))
    speaker, seeds = voices(TINY, 1, seed)
    state = flow.start(flow.initial_state(1), int32(0), speaker, seeds)
    mel, at, done = [], 0, False
    while not done:
        n = min(int(draw.randint(0, TINY.chunk + 1)), size - at)
        final = torch.tensor([at + n == size])
        y, count, state = flow.chunk(tokens[:, at : at + n], int32(n), state, int32(0), final)
        assert y.shape[1] == 2 * TINY.chunk and not y[:, int(count) :].any()
        mel.append(y[0, : int(count)])
        at, done = at + n, bool(final) and not state.waiting.item()
        assert len(mel) <= 200, "every call with `final` gives some"
    assert_same(torch.cat(mel), one_by_one(flow, [tokens[0]], speaker, seeds)[0])
    with pytest.raises(ValueError, match="at most 5, a chunk, got 6"):
        flow.chunk(torch.zeros(1, 6, dtype=torch.int64), int32(6), state, int32(0), torch.tensor([False]))


def test_flow_schedule_of_a_reply() -> None:
    """A block of 15 tokens: 12 + 3 of look-ahead first, 15 new ones from then on, as 24, 30, 30, ... mel frames."""
    flow = make(dataclasses.replace(TINY, chunk=15, lookahead=3, left_context=60))
    speaker, seeds = voices(TINY, 1)
    state = flow.start(flow.initial_state(1), int32(0), speaker, seeds)
    frames = []
    for i in range(0, 50, 5):
        tokens = torch.arange(5)[None]
        _, n, _ = flow.step(tokens, int32(5), state, int32(0), torch.tensor([i == 45]))
        frames.append(n.item())
    assert frames == [0, 0, 24, 0, 0, 30, 0, 0, 30, 16]


def test_flow_cost_of_a_chunk_is_constant(tiny: Flow) -> None:
    speaker, seeds = voices(TINY, 1)
    state = tiny.start(tiny.initial_state(1), int32(0), speaker, seeds)
    shapes = [tuple(t.shape) for t in tensors(state)]
    flops = []
    for _ in range(40):
        with FlopCounterMode(display=False) as counter:
            _, n, _ = tiny.step(torch.arange(5)[None], int32(5), state, int32(0), torch.tensor([False]))
        flops.append(counter.get_total_flops())
    assert n.tolist() == [10] and state.done.item() == 198
    assert flops[3] == flops[10] == flops[39]
    assert [tuple(t.shape) for t in tensors(state)] == shapes


def tensors(state: State) -> list[torch.Tensor]:
    parts = list(state._parts())
    return [t for part in parts for t in (tensors(part) if isinstance(part, State) else [part])]


def test_flow_deviation_from_full_context(tiny: Flow) -> None:
    tokens = torch.randint(0, TINY.codes, (1, 40), generator=torch.Generator().manual_seed(0))
    speaker, seeds = voices(TINY, 1)
    deviation = {}
    for length in (3, 40):
        full, _ = tiny(tokens[:, :length], None, speaker, seeds, mask="full")
        session, _ = tiny(tokens[:, :length], None, speaker, seeds)
        deviation[length] = ((session - full).norm() / full.norm()).item()
    print(f"relative deviation of the session form from full context, random weights: {deviation}")
    assert deviation[3] < 1e-5 < deviation[40]


# --- bad input


def test_flow_says_what_is_wrong_with_its_input(tiny: Flow) -> None:
    speaker, seeds = voices(TINY, 1)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    mel = torch.zeros(1, 8, TINY.n_mels)
    with pytest.raises(ValueError, match=r"tokens must be speech tokens 0 .. 19, got 20"):
        tiny(tokens + 20, None, speaker, seeds)
    with pytest.raises(ValueError, match="tokens must be integers"):
        tiny(tokens.float(), None, speaker, seeds)
    with pytest.raises(ValueError, match=r"speaker must have the shape \(1, 5\)"):
        tiny(tokens, None, speaker[:, 1:], seeds)
    with pytest.raises(ValueError, match="seeds must be integers"):
        tiny(tokens, None, speaker, seeds.float())
    with pytest.raises(ValueError, match="mask must be"):
        tiny(tokens, None, speaker, seeds, mask="chunk")
    with pytest.raises(ValueError, match="a prompt must be a multiple of 5 tokens"):
        tiny(tokens, None, speaker, seeds, tokens, mel)
    with pytest.raises(ValueError, match="a prompt must be a multiple of 5 tokens"):
        tiny.start(tiny.initial_state(1), int32(0), speaker, seeds, tokens, mel)
    with pytest.raises(ValueError, match="prompt_mel must have two frames a prompt token"):
        tiny(tokens, None, speaker, seeds, tokens, mel[:, :7])
    with pytest.raises(ValueError, match="left_context must be a multiple"):
        Flow(dataclasses.replace(TINY, left_context=7))
    with pytest.raises(ValueError, match="lookahead must lie in"):
        Flow(dataclasses.replace(TINY, lookahead=5))
    with pytest.raises(ValueError, match="cannot stream"):
        Flow(dataclasses.replace(TINY, left_context=-1)).initial_state(1)
