"""The voice encoder: size, lengths, what each form sees, gradients, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minmo.config import EncoderConfig, load_config
from minmo.modules.encoder import Encoder, pieces

SMALL = EncoderConfig(n_mels=5, dim=64, heads=1, ffn=48, blocks=2, fsmn_kernel=5, chunk=2, left_context=4)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def small(**changes):
    torch.manual_seed(0)
    return Encoder(dataclasses.replace(SMALL, **changes))


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        encoder = Encoder(load_config("minmo-8b").encoder)
    assert sum(p.numel() for p in encoder.parameters()) == 636_318_720


@pytest.mark.parametrize("chunk", [None, 0, 4])
def test_lengths_follow_the_two_convolutions(chunk):
    encoder = small().requires_grad_(False)
    totals = list(range(18))
    y, counts = encoder(torch.randn(len(totals), 17, 5), ints(totals), chunk=chunk)
    assert y.shape == (len(totals), 5, 64)
    for n, count in zip(totals, counts.tolist(), strict=True):
        first = 1 + (n - 3 + 2) // 2
        assert count == 1 + (first - 3 + 2) // 2 == -(-n // 4)


@pytest.mark.parametrize("chunk", [None, 0, 4, 10])
def test_padding_never_matters(chunk):
    encoder = small().requires_grad_(False)
    mel = torch.randn(2, 61, 5)
    alone, count = encoder(mel[:1, :37], ints([37]), chunk=chunk)
    mel[0, 37:] = float("nan")
    beside, counts = encoder(mel, ints([37, 61]), chunk=chunk)
    assert counts.tolist() == [count[0], 16]
    torch.testing.assert_close(beside[0, : counts[0]], alone[0], rtol=1e-5, atol=1e-5)
    assert not beside[0, counts[0] :].any()


def reach(encoder, frame, frames, chunk):
    """First and last mel frame that an output frame depends on."""
    mel = torch.randn(1, 4 * frames, 5, requires_grad=True)
    y, _ = encoder(mel, ints([4 * frames]), chunk=chunk)
    y[0, frame].square().sum().backward()
    seen = mel.grad[0].abs().sum(dim=1).nonzero()[:, 0].tolist()
    return seen[0], seen[-1]


@pytest.mark.parametrize("chunk", [2, 4])
def test_session_form_sees_its_chunk_and_the_left_context(chunk):
    encoder = small(blocks=1, left_context=8)
    for frame in (12, 13, 15):
        own = frame // chunk * chunk
        # A frame's convolutions reach three mel frames to the left of its first.
        assert reach(encoder, frame, 24, chunk) == (4 * (own - 8) - 3, 4 * (own + chunk) - 1)


def test_bidirectional_form_sees_all():
    assert reach(small(blocks=1), 9, 24, 0) == (0, 95)


def test_fsmn_looks_ahead_in_the_bidirectional_form_alone():
    """With attention silenced, what remains is the convolutions and the FSMN."""
    encoder = small(blocks=1, left_context=8)
    torch.nn.init.zeros_(encoder.blocks[0].out.weight)
    assert reach(encoder, 12, 24, 0) == (4 * 10 - 3, 4 * 15 - 1)
    assert reach(encoder, 12, 24, 2) == (4 * 10 - 3, 4 * 13 - 1)


@pytest.mark.parametrize("chunk", [None, 0, 10])
def test_gradients_reach_every_parameter(chunk):
    encoder = small()
    y, counts = encoder(torch.randn(2, 40, 5), ints([40, 22]), chunk=chunk)
    y.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name.startswith("norm") or parameter.grad.abs().sum() > 0, name


def test_activations_stay_of_about_unit_size():
    config = dataclasses.replace(load_config("nano").encoder, blocks=32, final_norm=False)
    torch.manual_seed(0)
    encoder = Encoder(config).requires_grad_(False)
    y, _ = encoder(torch.randn(1, 200, config.n_mels) * 0.5, ints([200]))
    assert 0.1 < float(y.square().mean().sqrt()) < 10


def test_bfloat16_stays_close_to_float32():
    encoder = small().requires_grad_(False)
    mel = torch.randn(1, 80, 5)
    exact, _ = encoder(mel, ints([80]))
    rough, _ = encoder.bfloat16()(mel, ints([80]))
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).square().mean().sqrt()) < 0.03


def test_pieces_cover_everything_in_order():
    for units in range(1, 25):
        cuts = list(pieces(units * 8, 8, 10))
        assert cuts[0][0] == 0 and cuts[-1] == (units * 8 - 8, units * 8)
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
        assert all(0 < stop - start <= 80 for start, stop in cuts)


def test_wrong_input_is_named():
    encoder = small()
    with pytest.raises(ValueError, match=r"mel must be \(batch, frames, 5\), got \(1, 5, 20\)"):
        encoder(torch.zeros(1, 5, 20), ints([20]))
    with pytest.raises(ValueError, match="lengths must lie in 0 .. 20"):
        encoder(torch.zeros(1, 20, 5), ints([21]))
    with pytest.raises(ValueError, match="one for each entry"):
        encoder(torch.zeros(1, 20, 5), ints([20, 20]))
    with pytest.raises(ValueError, match="chunk must be 0"):
        encoder(torch.zeros(1, 20, 5), ints([20]), chunk=-2)
    with pytest.raises(ValueError, match="left_context 5 must be a multiple of chunk 2"):
        small(left_context=5)
    with pytest.raises(ValueError, match="odd FSMN kernel"):
        small(fsmn_kernel=4)
