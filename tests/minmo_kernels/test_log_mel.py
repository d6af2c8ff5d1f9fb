"""log_mel beyond its declaration: the filter bank, the frames' positions, and what is refused."""

from __future__ import annotations

import pytest
import torch

import minmo_kernels as mk
from minmo_kernels.ops.log_mel import mel_filters

ROW = torch.zeros(1, dtype=torch.int32)
FILTERS, WINDOW = mel_filters(16_000, 400, 80).float(), torch.hann_window(400)


@pytest.mark.parametrize(
    "rate,n_fft,n_mels,high", [(16_000, 400, 128, 8_000), (16_000, 400, 80, 8_000), (24_000, 1920, 80, 8_000)]
)
def test_parity_of_the_filters_with_transformers(rate, n_fft, n_mels, high):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    theirs = audio_utils.mel_filter_bank(
        n_fft // 2 + 1, n_mels, 0.0, high, rate, norm="slaney", mel_scale="slaney", triangularize_in_mel_space=False
    )
    torch.testing.assert_close(
        mel_filters(rate, n_fft, n_mels, high=high), torch.from_numpy(theirs).T, rtol=1e-9, atol=0
    )


def test_parity_of_the_whisper_rule_with_torch_stft():
    """Batched with different lengths: each utterance as if alone."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4000, 201, 0, 3219], dtype=torch.int32)
    audio = torch.randn(4, 4000, generator=g)
    mel = mk.log_mel(audio, lengths, None, torch.arange(4, dtype=torch.int32), FILTERS, WINDOW, rule="whisper")
    assert mel.shape == (4, 25, 80)
    for b, n in enumerate(lengths.tolist()):
        assert (mel[b, n // 160 :] == 0).all()
        if n:
            spectrum = torch.stft(audio[b, :n], 400, 160, window=WINDOW, return_complex=True)[:, :-1]
            expected = (FILTERS @ spectrum.abs().square()).clamp(min=1e-10).log10()
            expected = (torch.maximum(expected, expected.max() - 8) + 4) / 4
            torch.testing.assert_close(mel[b, : n // 160].T, expected, rtol=1e-5, atol=1e-5)


def test_a_stream_frame_spans_its_400_samples_and_no_later_one():
    """Frame m sees samples 160m-240 .. 160m+159 (its window's first weight is 0)."""
    audio = torch.randn(1, 1280, generator=torch.Generator().manual_seed(1))

    def frames(x):
        return mk.log_mel(x, ROW + 1280, None, ROW, FILTERS, WINDOW)[0]

    before = frames(audio)
    for sample in (0, 159, 160, 700, 1279):
        changed = audio.clone()
        changed[0, sample] += 5.0
        moved = (frames(changed) != before).any(dim=1).nonzero()[:, 0].tolist()
        assert moved == [m for m in range(8) if 160 * m - 240 < sample <= 160 * m + 159]


def test_silence_lies_on_the_lower_bound():
    silence = torch.zeros(1, 1280)
    assert (mk.log_mel(silence, ROW + 1280, None, ROW, FILTERS, WINDOW, floor=-6.0) == -0.5).all()
    assert (mk.log_mel(silence, ROW + 1280, None, ROW, FILTERS, WINDOW, rule="whisper") == -1.5).all()


def test_gradients_reach_the_sound():
    audio = torch.randn(1, 160, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(2))
    filters, window = mel_filters(16_000, 400, 5), torch.hann_window(400, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: mk.log_mel(a, ROW + 160, None, ROW, filters, window), audio)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lengths": ROW + 100}, "multiples of 160"),
        ({"lengths": ROW + 200, "rule": "whisper"}, "at least 201"),
        ({"carry": torch.zeros(1, 240), "rule": "whisper"}, "carry=None"),
        ({"carry": torch.zeros(1, 200)}, "200 samples, not 240"),
        ({"rule": "centred"}, "stream, whisper"),
        ({"filters": torch.zeros(80, 200)}, "200 bins"),
        ({"audio": torch.zeros(1, 320, dtype=torch.int16)}, "floating point"),
        ({"hop": 0}, "hop"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "3 entries"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"audio": torch.zeros(1, 320), "lengths": ROW + 320, "carry": None, "rows": ROW}
    with pytest.raises(ValueError, match=message):
        mk.log_mel(**{**arguments, "filters": FILTERS, "window": WINDOW, **change})


def test_a_band_beyond_half_the_rate_is_refused():
    with pytest.raises(ValueError, match="8000.0 Hz"):
        mel_filters(16_000, 400, 80, high=9_000)
