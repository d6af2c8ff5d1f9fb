"""The front end: the two streaming laws, its grid, and equality with Whisper's feature extractor."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minmo.audio import load_audio
from minmo.config import FrontendConfig
from minmo.state import all_rows, full_lengths
from minmo.tokenizer.frontend import Frontend

STREAM = Frontend(FrontendConfig(n_mels=40))
WHISPER = Frontend(FrontendConfig(rule="whisper"))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def poisoned(samples, lengths):
    return torch.where(torch.arange(samples.shape[1]) < lengths[:, None], samples, torch.nan)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31 - 1), st.sampled_from([400, 1280, 3000]))
def test_split_of_the_sound_changes_nothing(seed, longest):
    """Three sessions out of step, empty steps, padding entries, NaN beyond lengths: the frames of one shot."""
    g = torch.Generator().manual_seed(seed)
    totals = torch.randint(0, 4000, (3,), generator=g).tolist()
    sounds = [torch.randn(n, generator=g) for n in totals]
    given_out = [[] for _ in sounds]
    position, done = [0, 0, 0], [False] * 3
    state = STREAM.initial_state(5)
    sessions = torch.randperm(5, generator=g)[:3].tolist()
    while not all(done):
        batch = [b for b in torch.randperm(3, generator=g).tolist() if not done[b]] + [-1]
        rows, lengths, final = ints(*(sessions[b] if b >= 0 else -1 for b in batch)), ints(*[0] * len(batch)), []
        audio = torch.full((len(batch), longest), torch.nan)
        for i, b in enumerate(batch):
            n = int(torch.randint(0, longest + 1, (1,), generator=g))
            piece = sounds[b][position[b] : position[b] + n] if b >= 0 else torch.randn(n, generator=g)
            audio[i, : len(piece)] = piece
            lengths[i] = len(piece)
            if b >= 0:
                position[b] += len(piece)
                done[b] = position[b] == totals[b]
            final.append(b < 0 or done[b])
        mel, counts, state = STREAM.step(audio, lengths, state, rows, torch.tensor(final))
        assert counts[-1] == 0 and (counts % 8 == 0).all()
        for i, b in enumerate(batch[:-1]):
            given_out[b].append(mel[i, : counts[i]])
            assert (mel[i, counts[i] :] == 0).all()
    padded = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)
    whole, lengths = STREAM(poisoned(padded, ints(*totals)), ints(*totals))
    assert lengths.tolist() == [8 * -(-n // 1280) for n in totals]
    for b in range(3):
        torch.testing.assert_close(torch.cat(given_out[b]), whole[b, : lengths[b]], rtol=1e-5, atol=1e-5)


def test_split_batch_neighbours_change_no_bit():
    g = torch.Generator().manual_seed(0)
    audio, rows, final = torch.randn(4, 2000, generator=g), ints(2, 0, -1, 1), torch.zeros(4, dtype=torch.bool)
    state, other = STREAM.initial_state(3), STREAM.initial_state(3)
    mel, _, _ = STREAM.step(audio, ints(2000, 1300, 5, 77), state, rows, final)
    alone, _, _ = STREAM.step(audio, ints(2000, 0, 0, 2000), other, ints(2, -1, -1, -1), final)
    assert torch.equal(mel[0], alone[0])
    assert torch.equal(state.carry[2], other.carry[2]) and torch.equal(state.waiting.data[2], other.waiting.data[2])


def test_eighty_milliseconds_are_eight_frames_at_once():
    state = STREAM.initial_state(1)
    no, yes = torch.tensor([False]), torch.tensor([True])
    _, count, _ = STREAM.step(torch.ones(1, 1279), ints(1279), state, ints(0), no)
    assert count == 0
    _, count, _ = STREAM.step(torch.ones(1, 1), ints(1), state, ints(0), no)
    assert count == 8
    _, count, _ = STREAM.step(torch.ones(1, 1), ints(1), state, ints(0), yes)
    assert count == 8
    _, count, _ = STREAM.step(torch.ones(1, 0), ints(0), state, ints(0), yes)
    assert count == 0


def test_reset_makes_a_session_new():
    audio, no = torch.randn(1, 2000, generator=torch.Generator().manual_seed(3)), torch.tensor([False])
    state = STREAM.initial_state(2)
    first, _, _ = STREAM.step(audio, ints(2000), state, ints(1), no)
    state.reset(ints(1, -1))
    again, _, _ = STREAM.step(audio, ints(2000), state, ints(1), no)
    assert torch.equal(first, again)
    assert state.nbytes == 2 * (4 * (1279 + 240) + 4)


def test_parity_with_whispers_feature_extractor():
    """transformers' extractor without padding, on noise and on speech."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    speech = torch.from_numpy(load_audio(resources.files("minmo") / "assets" / "question.wav"))
    noise = 0.1 * torch.randn(20_011, generator=torch.Generator().manual_seed(0))
    sounds = [speech, noise]
    mel, counts = WHISPER(
        torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True, padding_value=torch.nan), ints(*map(len, sounds))
    )
    for b, sound in enumerate(sounds):
        theirs = extractor(sound.numpy(), sampling_rate=16_000, padding="longest", return_tensors="pt").input_features
        assert counts[b] == len(sound) // 160 == theirs.shape[2]
        torch.testing.assert_close(mel[b, : counts[b]], theirs[0].T, rtol=0, atol=2e-4)


def test_the_whisper_rule_does_not_stream():
    with pytest.raises(ValueError, match="whole utterance"):
        WHISPER.step(torch.zeros(1, 1280), ints(1280), WHISPER.initial_state(1), ints(0), torch.tensor([False]))
    with pytest.raises(ValueError, match="at least 201"):
        WHISPER(torch.zeros(1, 200), ints(200))
    with pytest.raises(ValueError, match="rule"):
        Frontend(FrontendConfig(rule="centred"))


def test_it_is_built_on_the_meta_device_and_computes_in_fp32():
    with torch.device("meta"):
        built = Frontend(FrontendConfig(n_mels=40))
    audio = torch.randn(2, 2560, generator=torch.Generator().manual_seed(0))
    mel, _ = built(audio, full_lengths(audio))
    assert torch.equal(mel, STREAM(audio, full_lengths(audio))[0])
    assert built.initial_state(1, like=torch.zeros((), dtype=torch.bfloat16)).carry.dtype == torch.float32
    assert built(audio.double(), full_lengths(audio))[0].dtype == torch.float64
    half, _, _ = built.step(
        audio.half(), full_lengths(audio), built.initial_state(2), all_rows(2), torch.tensor([False, True])
    )
    torch.testing.assert_close(half[:, :16], mel, rtol=0, atol=1e-2)
    assert not list(built.parameters()) and not built.state_dict()
