"""The vocoder: sizes, parity with the public class, the laws of streaming in both settings, bounds of its sound."""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minmo.config import VocoderConfig, load_config
from minmo.token2wav.stft import inverse_stft, stft_weight
from minmo.token2wav.streams import Signal, Window
from minmo.token2wav.vocoder import Vocoder
from minmo.weights.importers.cosyvoice_hift import convert, key_table

GOLDEN = Path(__file__).parent / "golden"
SMALL = VocoderConfig(base_channels=16, f0_channels=8)
FAST = dataclasses.replace(SMALL, streaming="fast")
HOP = 480


def small_vocoder(config: VocoderConfig = SMALL, seed: int = 0) -> Vocoder:
    """Random weights with a pitch around 150 Hz and a sound that is neither silent nor cut."""
    torch.manual_seed(seed)
    vocoder = Vocoder(config).eval().requires_grad_(False)
    vocoder.post.weight.mul_(10)
    vocoder.pitch.out.weight.mul_(50)
    vocoder.pitch.out.bias.fill_(150)
    return vocoder


def smooth_mel(batch: int, frames: int, seed: int) -> torch.Tensor:
    """Random mel that changes slowly from frame to frame, as speech does."""
    x = torch.randn(batch, 80, frames // 4 + 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, scale_factor=4, mode="linear").mT[:, :frames] * 2 - 4


def run(vocoder: Vocoder, mel: torch.Tensor, cuts: list[int], seed: int = 5) -> tuple[torch.Tensor, list[int]]:
    """One utterance (1, frames, 80) through `step`; returns the sound and the samples of each step."""
    state, rows = vocoder.initial_state(1), torch.zeros(1, dtype=torch.int32)
    vocoder.start(state, rows, torch.tensor([seed]))
    pieces, at = [], 0
    for i, n in enumerate(cuts):
        final = torch.tensor([i == len(cuts) - 1])
        audio, samples, state = vocoder.step(
            mel[:, at : at + n], torch.tensor([n], dtype=torch.int32), state, rows, final
        )
        pieces.append(audio[0, : int(samples)])
        at += n
    return torch.cat(pieces), [len(p) for p in pieces]


def parameters(config: VocoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Vocoder(config).parameters())


def test_vocoder_parameters():
    assert parameters(VocoderConfig()) == 20_806_557
    assert parameters(load_config("minmo-8b").vocoder) == 20_806_557
    assert parameters(load_config("nano").vocoder) < 1_500_000


def released_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The rule by which the golden file's weights were drawn (tests/minmo/golden/README.md)."""
    x = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith(".alpha"):
        x = 1 + 0.2 * x
    elif key == "conv_post.parametrizations.weight.original0":
        x = 0.2 + 0.05 * x
    elif key.endswith(".original0"):
        x = 0.8 + 0.2 * x
    elif key == "f0_predictor.classifier.weight":
        x = 300 * x
    elif key.endswith(".bias"):
        x = 0.1 * x
    elif not key.endswith(".original1"):
        x = 0.5 * x
    return torch.from_numpy(x)


def released_shapes() -> dict[str, tuple[int, ...]]:
    lines = (line.split() for line in (GOLDEN / "hift_keys.txt").read_text().splitlines())
    return {key: tuple(int(n) for n in shape.split("x")) for key, shape in lines}


def test_vocoder_key_table_is_complete_both_ways():
    released = {key: torch.empty(shape, device="meta") for key, shape in released_shapes().items()}
    assert len(released) == 328
    config = VocoderConfig()
    with torch.device("meta"):
        ours = Vocoder(config).state_dict()
    used = [key for keys in key_table(config).values() for key in keys]
    assert sorted(used) == sorted(released)
    converted = convert({f"generator.{key}": value for key, value in released.items()}, config)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}
    with pytest.raises(ValueError, match="lacks the tensor 'conv_pre.bias'"):
        convert({k: v for k, v in released.items() if k != "conv_pre.bias"}, config)
    with pytest.raises(ValueError, match="1 tensors that this size.*extra"):
        convert({**released, "extra": torch.empty(1)}, config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vocoder_parity_with_public_hift(dtype: torch.dtype):
    small = Vocoder(SMALL).to(dtype)
    released = {}
    for ours, theirs in key_table(SMALL).items():
        shape = small.get_parameter(ours).shape
        for key in theirs:
            gain = key.endswith(".original0")
            released[key] = released_weight(key, (shape[0], 1, 1) if gain else tuple(shape)).to(dtype)
    small.load_state_dict(convert(released, SMALL))
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "vocoder.npz").items()}
    draw = np.random.RandomState(20250110)
    mel = torch.from_numpy((2 * draw.standard_normal((1, 10, 80)) - 4).astype(np.float32))
    noise = torch.from_numpy(draw.standard_normal((1, 10 * HOP, 9)).astype(np.float32))
    seeds = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        f0, source = small.excitation(mel.to(dtype), None, seeds, noise.to(dtype))
        audio, _ = small(mel.to(dtype), None, seeds, noise.to(dtype))
    voiced = golden["f0"] > 10
    assert voiced.any() and not voiced.all()
    f0_error = float((f0 - golden["f0"]).abs().max() / golden["f0"].abs().max())
    assert f0_error < 1e-6
    # A pitch error grows into a phase error over the cycles of the highest harmonic: 9 harmonics, 50 frames a second.
    phase_error = 2 * math.pi * 9 * float(golden["f0"].sum()) / 50 * f0_error
    for name, value in (("source", source), ("audio", audio)):
        error = float((value - golden[name]).abs().max() / golden[name].abs().max())
        assert error < 2e-6 + 2 * phase_error, f"{name}: {error:.1e}"


def test_vocoder_parity_with_torch_stft():
    x = torch.randn(2, 1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    window, like = torch.hann_window(16, dtype=torch.float64), x
    wanted = torch.stft(x[:, 0], 16, 4, window=window, return_complex=True)
    whole = Window(torch.zeros(2, dtype=torch.int64), torch.tensor([100, 100]))
    padded = whole.reflect(Signal(torch.nn.functional.pad(x, (0, 32)), 4), 8, 8)
    found = whole.convolve(padded, stft_weight(SMALL, like), stride=4)
    torch.testing.assert_close(found.data[..., :101], torch.cat([wanted.real, wanted.imag], 1))
    magnitude, angle = torch.rand(2, 9, 101, dtype=torch.float64), torch.randn(2, 9, 101, dtype=torch.float64)
    sound = torch.istft(torch.polar(magnitude, angle.sin()), 16, 4, window=window)
    spectrum = torch.nn.functional.pad(torch.cat([magnitude.log(), angle], 1), (0, 7))
    found = inverse_stft(whole, Signal(spectrum, 1, extra=1), SMALL)
    torch.testing.assert_close(found.data[:, 0, :400], sound.clamp(-0.99, 0.99))


def drive(vocoder: Vocoder, mel: torch.Tensor, lengths: list[int], seeds: torch.Tensor, draw: np.random.RandomState):
    """Utterances out of step through one state: random cuts, empty steps, padding entries, NaN beyond lengths."""
    sessions = len(lengths)
    state = vocoder.initial_state(sessions + 1)
    state.frames[-1] = 77
    vocoder.start(state, torch.arange(sessions, dtype=torch.int32), seeds)
    sound: list[list[torch.Tensor]] = [[] for _ in lengths]
    at, done = [0] * sessions, [False] * sessions
    while not all(done):
        order = [int(i) for i in draw.permutation(sessions + 1)]
        rows = [i if i < sessions and not done[i] else -1 for i in order]
        width = int(draw.choice([1, 9, 40]))
        x = torch.full((len(rows), width, 80), float("nan"))
        new, final = [width] * len(rows), [bool(draw.randint(2)) for _ in rows]
        for entry, row in enumerate(rows):
            if row < 0:
                continue
            n = int(draw.choice([0, width, draw.randint(width + 1)]))
            n = min(n, lengths[row] - at[row])
            x[entry, :n] = mel[row, at[row] : at[row] + n]
            at[row] += n
            # The end may be known with the last frames or only later.
            final[entry] = at[row] == lengths[row] and bool(draw.randint(2))
            new[entry] = n
        audio, samples, state = vocoder.step(
            x, torch.tensor(new, dtype=torch.int32), state, torch.tensor(rows, dtype=torch.int32), torch.tensor(final)
        )
        assert torch.isfinite(audio).all()
        for entry, row in enumerate(rows):
            if row < 0:
                assert int(samples[entry]) == 0
                continue
            sound[row].append(audio[entry, : int(samples[entry])])
            assert not audio[entry, int(samples[entry]) :].any()
            done[row] = final[entry]
    assert int(state.frames[-1]) == 77
    return [torch.cat(s) for s in sound]


@settings(deadline=None, max_examples=4, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), lengths=st.tuples(st.integers(0, 6), st.integers(7, 40), st.integers(41, 60)))
def test_vocoder_split_exact_equals_one_shot(seed: int, lengths: tuple[int, ...]):
    vocoder = small_vocoder()
    mel = smooth_mel(3, max(lengths), seed)
    seeds = torch.tensor([seed, 2, seed + 1])
    one_shot, samples = vocoder(mel, torch.tensor(lengths, dtype=torch.int32), seeds)
    assert samples.tolist() == [HOP * n for n in lengths]
    for row, sound in enumerate(drive(vocoder, mel, list(lengths), seeds, np.random.RandomState(seed))):
        assert len(sound) == HOP * lengths[row]
        torch.testing.assert_close(sound, one_shot[row, : len(sound)], atol=2e-4, rtol=0)


@settings(deadline=None, max_examples=2, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), lengths=st.tuples(st.integers(0, 9), st.integers(20, 50), st.integers(55, 90)))
def test_vocoder_split_fast_never_depends_on_the_cuts(seed: int, lengths: tuple[int, ...]):
    vocoder = small_vocoder(FAST)
    mel = smooth_mel(3, max(lengths), seed)
    seeds = torch.tensor([seed, 2, seed + 1])
    for row, sound in enumerate(drive(vocoder, mel, list(lengths), seeds, np.random.RandomState(seed))):
        whole, _ = run(vocoder, mel[row : row + 1, : lengths[row]], [lengths[row]], int(seeds[row]))
        assert len(sound) == len(whole) == HOP * lengths[row]
        torch.testing.assert_close(sound, whole, atol=2e-4, rtol=0)


def test_vocoder_holds_back_its_receptive_field():
    vocoder = small_vocoder()
    assert vocoder.holdback == 21
    mel = smooth_mel(1, 60, 3)
    _, samples = run(vocoder, mel, [20, 10, 10, 20])
    assert samples[0] == 0 and 0 < sum(samples[:2]) <= 10 * HOP and samples[2] == 10 * HOP
    other = mel.clone()
    other[:, 40:] += 3
    seeds = torch.zeros(1, dtype=torch.int64)
    (a, _), (b, _) = vocoder(mel, None, seeds), vocoder(other, None, seeds)
    first = int((a != b)[0].nonzero()[0])
    assert (40 - vocoder.holdback) * HOP <= first < 40 * HOP


def test_vocoder_fast_seams():
    config = dataclasses.replace(load_config("nano").vocoder, streaming="fast")
    vocoder = small_vocoder(config)
    frames = [24, 30, 30, 10]
    mel = smooth_mel(1, sum(frames), 11)
    exact = vocoder(mel, None, torch.tensor([5]))[0][0]
    sound, samples = run(vocoder, mel, frames)
    assert samples == [16 * HOP, 30 * HOP, 30 * HOP, 18 * HOP]
    seams = [16 * HOP, 46 * HOP, 76 * HOP]
    error = (sound - exact).abs()
    near = torch.zeros(len(sound), dtype=torch.bool)
    for seam in seams:
        near[seam - HOP : seam + HOP] = True
        # Beyond the fade and a receptive field before the unit's end, `fast` is exact: its left context is whole.
        assert error[seam + 8 * HOP : seam + 14 * HOP].max() < 2e-4
    assert error.max() > 1e-4
    assert error[near].mean() <= 2 * error[~near].mean()
    jump, usual = sound.diff(n=2).abs(), exact.diff(n=2).abs()
    assert max(jump[s - 3 : s + 3].max() for s in seams) <= usual.max()


@pytest.mark.parametrize("config", [SMALL, FAST], ids=["exact", "fast"])
def test_vocoder_row_does_not_depend_on_its_batch(config: VocoderConfig):
    vocoder = small_vocoder(config)
    rows = torch.tensor([1, 0, -1], dtype=torch.int32)
    out = []
    for other in (1, 2):
        mel = torch.cat([smooth_mel(1, 32, 1), smooth_mel(2, 32, other) * other])
        state = vocoder.start(vocoder.initial_state(2), rows[:2], torch.tensor([9, other]))
        for final in (False, True):
            lengths = torch.tensor([32, 16 * other, 3], dtype=torch.int32)
            audio, samples, state = vocoder.step(mel, lengths, state, rows, torch.tensor([final, other == 1, True]))
            out.append((audio[0], int(samples[0])))
    for first, second in zip(out[:2], out[2:], strict=True):
        assert first[1] == second[1] > 0
        assert torch.equal(first[0], second[0])


def test_vocoder_noise_follows_the_seed():
    vocoder, mel = small_vocoder(), smooth_mel(1, 6, 0).expand(3, -1, -1)
    audio, _ = vocoder(mel, None, torch.tensor([1, 2, 1]))
    assert torch.equal(audio[0], audio[2])
    assert (audio[0] - audio[1]).abs().max() > 1e-4


def test_vocoder_phase_keeps_its_precision_for_hours():
    vocoder = small_vocoder(dataclasses.replace(SMALL, noise_amplitude=0.0))
    mel, rows = smooth_mel(1, 60, 2), torch.zeros(1, dtype=torch.int32)
    final, n = torch.tensor([False]), torch.tensor([30], dtype=torch.int32)
    sound = []
    for hours in (0, 2):
        state = vocoder.start(vocoder.initial_state(1), rows, torch.tensor([0]))
        vocoder.step(mel[:, :30], n, state, rows, final)
        # Two hours of frames, and whole cycles far beyond what a float could count.
        state.frames += hours * 3600 * 50
        state.phase += hours * (2**62 // 2 + 2**40 * 720_000)
        sound.append(vocoder.step(mel[:, 30:], n, state, rows, final)[0])
    assert torch.equal(sound[0], sound[1])
    assert sound[0].std() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e38])
def test_vocoder_sound_is_finite_and_bounded(scale: float):
    torch.manual_seed(3)
    vocoder = Vocoder(SMALL).requires_grad_(False)
    sound, _ = vocoder((smooth_mel(2, 8, 4) * scale).clamp(-3e38, 3e38), None, torch.tensor([0, 1]))
    assert torch.isfinite(sound).all() and sound.abs().max() <= SMALL.limit
    if scale == 1.0:
        assert 0.003 < sound.std() < 0.4


def test_vocoder_gradients_reach_every_weight():
    vocoder = Vocoder(SMALL)
    vocoder(smooth_mel(1, 4, 0), None, torch.tensor([0]))[0].square().mean().backward()
    lost = [n for n, p in vocoder.named_parameters() if not n.startswith("pitch.") and p.grad is None]
    assert not lost


def test_vocoder_rejects_bad_input():
    vocoder, seeds = small_vocoder(), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mel must be .*\(batch, frames, 80\)"):
        vocoder(torch.zeros(1, 4, 79), None, seeds)
    with pytest.raises(ValueError, match="seeds must be integers"):
        vocoder(torch.zeros(1, 4, 80), None, torch.zeros(1))
    with pytest.raises(ValueError, match="'exact' or 'fast'"):
        Vocoder(dataclasses.replace(SMALL, streaming="none"))
    with pytest.raises(ValueError, match="upsample kernel"):
        Vocoder(dataclasses.replace(SMALL, upsample_kernels=(16, 10, 7)))
