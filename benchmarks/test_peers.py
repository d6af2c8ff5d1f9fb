"""Whole steps beside what people use today: same random weights, same run, same threads, turn by turn.

    pytest benchmarks/ --benchmark-only -k peer [--preset minmo-8b] [--benchmark-json FILE]

Every round runs each contender once, so that what slows the machine slows them all; figures are medians of the rounds,
ratios are to the first contender. Results are compared before anything is timed, but for those into which other noise
is drawn (streamed flow, vocoder: the tests hold them against golden tensors).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from results import Results
from torch import Tensor

from minmo.clock import now, percentile
from minmo.config import BackboneConfig, load_config
from minmo.fast.engine import free_memory, optimised
from minmo.fast.linear import WEIGHTS
from minmo.fast.profile import filled
from minmo.model import NothingDrawn
from minmo.modules.backbone import Backbone
from minmo.state import all_rows, full_lengths
from minmo.token2wav.flow import Flow
from minmo.token2wav.vocoder import Vocoder
from minmo.tokenizer.frontend import Frontend
from minmo.tokenizer.speech import SpeechTokenizer
from minmo.weights.importers.qwen2 import to_hf

CONTEXT = 128
TEACHER = 32
"""Tokens over which quantised weights are compared with full ones."""
SECONDS = 4
"""Of sound, for the front end and the speech tokenizer."""

Contenders = dict[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def _kept(request: pytest.FixtureRequest, results: Results, benchmark: Any):
    """What was measured already is skipped, as the operations' cases are; what is measured now is kept."""
    name = request.node.name
    if name in results.kept:
        pytest.skip("measured already, in the results file")
    yield
    if "peers" in benchmark.extra_info:
        results.keep(name, benchmark.extra_info)


def contest(
    benchmark: Any, operation: str, part: str, machine: dict[str, Any], contenders: Contenders, rounds: int, **more: Any
) -> None:
    """Times all contenders in turn and keeps medians, 95th percentiles and ratios to the first one."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def one_round() -> None:
        for name, call in contenders.items():
            start = now(device)
            call()
            times[name].append(now(device) - start)

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=2)
    found = {name: percentile(seconds[2:], 50) for name, seconds in times.items()}
    peers = {
        name: {
            "seconds": seconds,
            "p95": percentile(times[name][2:], 95),
            # Of each round's pair, not of the medians: what slowed both cancels out.
            "ratio": percentile([a / b for a, b in zip(times[name], next(iter(times.values())), strict=True)][2:], 50),
        }
        for name, seconds in found.items()
    }
    benchmark.extra_info.update({"operation": operation, "part": part, "peers": peers, **more, **machine})
    print(f"\n{operation}, {part}")
    for name, peer in peers.items():
        print(f"  {name:44s} {1e3 * peer['seconds']:9.2f} ms  p95 {1e3 * peer['p95']:9.2f}  x {peer['ratio']:.2f}")


@pytest.mark.parametrize("part", ["voice token LM", "LLM"])
def test_peer_decoder_token(
    benchmark: Any,
    request: pytest.FixtureRequest,
    part: str,
    device: torch.device,
    machine: dict[str, Any],
    capsys: Any,
) -> None:
    """One token of a decoder, hidden state to choice: transformers (eager with a dynamic cache; compiled with a static
    one) and this engine's formats.

    The voice token LM always has the paper's size, the LLM the preset's.
    """
    transformers = pytest.importorskip("transformers")
    preset = load_config("minmo-8b" if part == "voice token LM" else request.config.getoption("preset"))
    voice = preset.voice_decoder
    config = preset.llm if part == "LLM" else dataclasses.replace(voice.lm, vocab=voice.vocab, tied=False)
    parameters = 12 * config.layers * config.dim**2 + 3 * config.layers * config.dim * config.ffn
    if 12 * parameters > free_memory(device):
        pytest.skip(f"{part} of {preset.name}: the peers' weights together do not fit in memory")
    with torch.device("meta"), NothingDrawn():
        full = Backbone(config)
    filled(full, torch.float32, device)
    ids = torch.randint(0, config.vocab, (1, CONTEXT + TEACHER), device=device)

    theirs = hf_model(transformers, full)
    eager = "transformers bf16, eager"
    logits, contenders = {}, {eager: hf_token(theirs, transformers.DynamicCache(), ids)}
    static = transformers.StaticCache(config=theirs.config, max_cache_len=CONTEXT + 1)
    contenders["transformers bf16, static cache, compiled"] = hf_token(
        theirs, static, ids, torch.compile(theirs, dynamic=False)
    )
    for weights in WEIGHTS:
        ours = optimised(copy.deepcopy(full), weights)
        logits[weights] = teacher_forced(ours, ids)
        contenders[f"FastMinMo {weights}"] = our_token(ours, ids)
    for name in list(contenders)[:2]:
        error = (contenders[name]() - logits["bf16"][0]).norm() / logits["bf16"][0].norm()
        assert error < 0.05, f"{name} computes something else: {error:.1%} away"
    quality = {w: agreement(logits["fp32"], x) for w, x in logits.items()}
    with capsys.disabled():
        contest(
            benchmark,
            "a token",
            f"{part} of {preset.name}, context {CONTEXT}",
            machine,
            contenders,
            15,
            quality=quality,
        )
        for weights, (divergence, same) in quality.items():
            print(f"  {weights}: KL to fp32 {divergence:.2e} nats, greedy tokens alike {same:.0%} (random weights)")


def hf_model(transformers: Any, full: Backbone) -> Any:
    """transformers' Qwen2 on the same weights in bf16."""
    c: BackboneConfig = full.config
    settings = transformers.Qwen2Config(
            hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim, intermediate_size=c.ffn, vocab_size=c.vocab, rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tied,
            max_position_embeddings=32768, use_sliding_window=False,
    )  # fmt: skip
    with torch.device("meta"), NothingDrawn():
        theirs = transformers.Qwen2ForCausalLM(settings)
    tensors = {name: tensor.bfloat16() for name, tensor in to_hf(full.state_dict(), c).items()}
    theirs.load_state_dict(tensors, strict=False, assign=True)
    theirs.tie_weights()
    device = full.norm.weight.device
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(settings).to(device)  # computed, not stored
    return theirs.eval()


def hf_token(theirs: Any, cache: Any, ids: Tensor, token: Any = None) -> Callable[[], Tensor]:
    """A call that gives the logits of one token after a context; token: what computes it in theirs' place."""
    token = theirs if token is None else token
    theirs(ids[:, :CONTEXT], past_key_values=cache, use_cache=True)

    def call() -> Tensor:
        out = token(ids[:, CONTEXT : CONTEXT + 1], past_key_values=cache, use_cache=True).logits[0, 0]
        for layer in cache.layers:  # as before the token
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(CONTEXT)
            else:
                layer.crop(-1)
        out.argmax()
        return out.float()

    return call


def our_token(model: Backbone, ids: Tensor) -> Callable[[], Tensor]:
    rows, one = all_rows(1, ids.device), torch.ones(1, dtype=torch.int32, device=ids.device)
    state = model.initial_state(1, CONTEXT + 1)
    x = model.embed(ids[:, :CONTEXT])
    model.step(x, full_lengths(x), state, rows)

    def call() -> Tensor:
        state.lengths.fill_(CONTEXT)
        hidden, _, _ = model.step(model.embed(ids[:, CONTEXT : CONTEXT + 1]), one, state, rows)
        out = model.logits(hidden)[0, 0]
        out.argmax()
        return out.float()

    return call


def teacher_forced(model: Backbone, ids: Tensor) -> Tensor:
    """Logits (TEACHER, vocab) of single steps after the context, whatever the model would have chosen."""
    rows, one = all_rows(1, ids.device), torch.ones(1, dtype=torch.int32, device=ids.device)
    state = model.initial_state(1, ids.shape[1])
    x = model.embed(ids[:, :CONTEXT])
    model.step(x, full_lengths(x), state, rows)
    steps = [model.step(model.embed(ids[:, i : i + 1]), one, state, rows)[0] for i in range(CONTEXT, ids.shape[1])]
    return model.logits(torch.cat(steps, dim=1))[0].float()


def agreement(full: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean KL divergence from the full model's distribution, and the share of equal greedy tokens."""
    divergence = F.kl_div(other.log_softmax(-1), full.log_softmax(-1), reduction="batchmean", log_target=True)
    return float(divergence), float((full.argmax(-1) == other.argmax(-1)).float().mean())


def test_peer_log_mel(benchmark: Any, machine: dict[str, Any], capsys: Any) -> None:
    """Whisper's log-mel of a few seconds: transformers' extractor beside the front end's same rule."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    config = dataclasses.replace(load_config("minmo-8b").frontend, rule="whisper")
    frontend, sound = Frontend(config), 0.1 * torch.randn(1, 16_000 * SECONDS)
    lengths, samples = full_lengths(sound), sound[0].numpy()

    def theirs() -> Tensor:
        options = {"sampling_rate": 16_000, "padding": "longest", "return_tensors": "pt"}
        return extractor(samples, **options).input_features[0].T

    torch.testing.assert_close(frontend(sound, lengths)[0][0], theirs(), rtol=0, atol=2e-4)
    contenders: Contenders = {"transformers' Whisper features": theirs, "front end": lambda: frontend(sound, lengths)}
    with capsys.disabled():
        contest(benchmark, "log-mel", f"{SECONDS} s of sound", machine, contenders, 30)


def test_peer_speech_tokenizer(
    benchmark: Any, request: pytest.FixtureRequest, machine: dict[str, Any], monkeypatch: Any, capsys: Any
) -> None:
    """The speech tokenizer of the paper's size: the public package, whole; ours whole, in the session form and in
    chunks of 400 ms."""
    for name in ("torchaudio", "onnx"):  # its file readers, which are not needed
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    pytest.importorskip("s3tokenizer.model_v2")
    public, package = importlib.import_module("s3tokenizer.model_v2"), importlib.import_module("s3tokenizer")
    convert = importlib.import_module("minmo.weights.importers.s3tokenizer").convert
    torch.manual_seed(0)
    theirs = public.S3TokenizerV2("speech_tokenizer_v2_25hz").eval().requires_grad_(False)
    ours = SpeechTokenizer(load_config("minmo-8b").speech_tokenizer).eval().requires_grad_(False)
    ours.load_state_dict(convert(theirs.state_dict(), ours.config))
    mel = 0.5 * torch.randn(1, 100 * SECONDS, 128)
    lengths, rows, more = full_lengths(mel), all_rows(1), torch.zeros(1, dtype=torch.bool)
    batch, counts = package.padding([mel[0].T])

    def chunked(piece: int) -> None:
        state = ours.initial_state(1)
        for start in range(0, mel.shape[1], piece):
            ours.step(mel[:, start : start + piece], torch.full((1,), piece, dtype=torch.int32), state, rows, more)

    same = (theirs(batch, counts)[0] == ours.encode(mel, lengths)[0]).float().mean()
    assert same > 0.99, f"only {same:.1%} of the tokens are the package's"
    contenders: Contenders = {
        "s3tokenizer, whole": lambda: theirs(batch, counts),
        "whole": lambda: ours.encode(mel, lengths),
        "session form, one shot": lambda: ours(mel, lengths),
        "chunks of 400 ms": lambda: chunked(40),
        "chunks of 2 s": lambda: chunked(200),
    }
    with capsys.disabled():
        contest(benchmark, "speech tokenizer, fp32", f"{SECONDS} s of sound", machine, contenders, 10)


@pytest.mark.skipif("MINMO_COSYVOICE" not in os.environ, reason="MINMO_COSYVOICE names no checkout of CosyVoice")
@pytest.mark.parametrize("what", ["flow, whole", "flow, streamed", "vocoder"])
def test_peer_token2wav(benchmark: Any, what: str, device: torch.device, machine: dict[str, Any], capsys: Any) -> None:
    """CosyVoice 2's flow and vocoder of the released size: speech tokens to sound, streamed and whole.

    Streamed, the public class takes hops of 25 tokens and computes every hop from the beginning; ours takes chunks of
    15 with what it remembers. Both give all frames.
    """
    import peer_cosyvoice

    from minmo.weights.importers import cosyvoice_flow, cosyvoice_hift

    config, hop = load_config("minmo-8b"), 25
    torch.manual_seed(0)
    their_flow, their_hift = peer_cosyvoice.modules(Path(os.environ["MINMO_COSYVOICE"]))
    flow, vocoder = Flow(config.flow).eval().to(device), Vocoder(config.vocoder).eval().to(device)
    flow.load_state_dict(cosyvoice_flow.convert(their_flow.state_dict(), config.flow))
    vocoder.load_state_dict(cosyvoice_hift.convert(their_hift.state_dict(), config.vocoder))
    their_flow, their_hift = their_flow.to(device), their_hift.to(device)
    tokens = torch.randint(0, config.flow.codes, (1, 2 * hop + config.flow.lookahead), device=device)
    speaker, seeds = torch.randn(1, config.flow.speaker_dim, device=device), torch.zeros(1).long().to(device)

    def theirs(given: Tensor, final: bool) -> Tensor:
        no, none = given[:, :0], torch.zeros(1, dtype=torch.int32, device=device)
        mel, _ = their_flow.inference(
            token=given.int(), token_len=full_lengths(given), prompt_token=no.int(), prompt_token_len=none,
            prompt_feat=torch.zeros(1, 0, config.flow.n_mels, device=device), prompt_feat_len=none, embedding=speaker,
            streaming=not final, finalize=final,
        )  # fmt: skip
        return mel

    def streamed() -> None:
        for end in range(hop, tokens.shape[1] - hop, hop):
            theirs(tokens[:, : end + config.flow.lookahead], final=False)
        theirs(tokens, final=True)

    def ours() -> int:
        rows, frames = all_rows(1, device), 0
        state = flow.start(flow.initial_state(1), rows, speaker, seeds)
        pieces = tokens.split(config.flow.chunk, dim=1)
        for i, piece in enumerate(pieces):
            last = torch.tensor([i == len(pieces) - 1], device=device)
            frames += int(flow.step(piece, full_lengths(piece), state, rows, last)[1])
        return frames

    mel = theirs(tokens, final=True)
    noise = their_flow.decoder.rand_noise[:, :, : mel.shape[2]].transpose(1, 2).to(device)
    own, _ = flow(tokens, None, speaker, seeds, noise=noise, mask="full")
    torch.testing.assert_close(own.transpose(1, 2), mel, rtol=1e-3, atol=1e-3)
    assert ours() == mel.shape[2]
    contenders: dict[str, Contenders] = {
        "flow, whole": {
            "CosyVoice 2": lambda: theirs(tokens, final=True),
            "ours": lambda: flow(tokens, None, speaker, seeds, mask="full"),
        },
        "flow, streamed": {"CosyVoice 2, hops of 25": streamed, "ours, chunks of 15": ours},
        "vocoder": {
            "CosyVoice 2": lambda: their_hift.inference(speech_feat=mel),
            "ours": lambda: vocoder(own, None, seeds),
        },
    }
    with capsys.disabled():
        part = f"{tokens.shape[1]} speech tokens, {mel.shape[2]} mel frames"
        contest(benchmark, f"{what}, fp32", part, machine, contenders[what], 3)


def test_peer_nano_turn(benchmark: Any, machine: dict[str, Any], capsys: Any) -> None:
    """A whole spoken turn of nano: the readable model and the engine; seconds of computing a second of sound."""
    import minmo

    sound = minmo.load_audio(Path(minmo.__file__).parent / "assets" / "question.wav")
    settings = minmo.Settings(max_text_tokens=10, max_speech_ratio=6, seed=1)
    model = minmo.load("nano", "cpu")
    models = {"MinMo fp32": model} | {
        f"FastMinMo {w}": minmo.FastMinMo(model, weights=w, keep_model=True) for w in ("fp32", "int8")
    }
    replies: dict[str, Any] = {}

    def turn(name: str) -> None:
        replies[name] = minmo.talk(models[name], sound, settings)

    contenders: Contenders = {name: lambda name=name: turn(name) for name in models}
    with capsys.disabled():
        contest(benchmark, "a spoken turn", f"nano, {len(sound) / 16_000:.1f} s asked", machine, contenders, 7)
        for name, reply in replies.items():
            stages = {stage: p50 for stage, _, p50, _ in reply.timings.table()}
            seconds = len(sound) / 16_000 + len(reply.audio) / reply.sample_rate
            took = benchmark.extra_info["peers"][name]["seconds"]
            first = stages["end of input -> first audio chunk"]
            print(f"  {name}: {took / seconds:.2f} s a second of turn; first sound {first:.0f} ms after its end (last)")
