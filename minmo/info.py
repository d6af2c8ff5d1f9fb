"""A preset's sizes beside the paper's, counted on the meta device: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from minmo.config import BackboneConfig, MinMoConfig, load_config
from minmo.fast.engine import LANGUAGE
from minmo.model import shapes


def rows(preset_or_dir: str | Path) -> Iterator[tuple[str, str, int, str]]:
    """(module, what it is, parameters, the paper's Table 1 as quoted or "-")."""
    c = load_config(preset_or_dir)
    model = shapes(c)
    e, p, llm, v = c.encoder, c.projector, c.llm, c.voice_decoder
    projector = count(model.voice_decoder.output_projector)
    yield "voice encoder", f"{e.n_mels} mels, {e.blocks} x {e.dim}, 25 Hz", count(model.encoder), "636M"
    yield "input projector", f"conv /2 + {p.layers} x {p.dim}, 12.5 Hz", count(model.projector), "170M"
    yield "LLM", f"{llm.layers} x {llm.dim}, vocabulary {llm.vocab}", count(model.llm), "7B"
    yield "output projector", f"{2 * v.llm_dim} -> {v.lm.dim} ({v.order})", projector, "6M"
    yield (
        "voice token LM",
        f"{v.lm.layers} x {v.lm.dim}, {v.codes} codes",
        count(model.voice_decoder) - projector,
        "370M",
    )
    yield "full-duplex predictor", f"1 x {c.duplex.layer.dim}, two heads", count(model.duplex), "18M"
    yield (
        "speech tokenizer",
        f"{c.speech_tokenizer.encoder.blocks} blocks + FSQ {c.speech_tokenizer.levels}",
        count(model.speech_tokenizer),
        "-",
    )
    yield "token2wav: flow", f"{c.flow.steps} Euler steps, CFG {c.flow.guidance}", count(model.flow), "-"
    yield "token2wav: vocoder", f"HiFT, {c.vocoder.sample_rate} Hz", count(model.vocoder), "-"
    yield "all", "", count(model), "8B"


def state_rows(preset_or_dir: str | Path) -> Iterator[tuple[str, str, int]]:
    """(state, what it holds, bytes of one session) in float32."""
    c = load_config(preset_or_dir)
    model = shapes(c)
    with torch.device("meta"):
        minute = model.initial_state(1, 750, 750)
    yield "hearing", "front end, encoder, projector: bounded", minute.hearing.nbytes
    yield "LLM", "linear cache, per minute of sound (750 positions)", minute.llm.nbytes
    yield "duplex", f"ring of {c.duplex.window} positions: bounded", minute.duplex.nbytes
    yield "voice token LM", "linear cache, per 750 positions of a reply", minute.speaking.decoder.nbytes
    yield "flow", f"{c.flow.steps} Euler steps, {c.flow.left_context} mel frames: bounded", minute.speaking.flow.nbytes
    yield "vocoder", f"{c.vocoder.streaming}: bounded", minute.speaking.vocoder.nbytes


def engine_rows(
    preset_or_dir: str | Path, rows: int, max_positions: int, max_voice_positions: int
) -> Iterator[tuple[str, int, int]]:
    """(state, bytes with fp32 activations, with bf16) of a FastMinMo with so many rows, and their sum."""
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = shapes(load_config(preset_or_dir))
        for part in LANGUAGE:
            getattr(model, part).to(dtype)
        with torch.device("meta"):
            state = model.initial_state(rows, max_positions, max_voice_positions)
        speaking = state.speaking
        parts = {
            "hearing": state.hearing, "LLM": state.llm, "duplex": state.duplex, "voice token LM": speaking.decoder,
            "flow": speaking.flow, "vocoder": speaking.vocoder, "all": state,
        }  # fmt: skip
        sizes.append({name: part.nbytes for name, part in parts.items()})
    yield from ((name, wide, sizes[1][name]) for name, wide in sizes[0].items())


def kernel_dims(config: MinMoConfig, capacity: int = 4096) -> dict[str, dict[str, int]]:
    """The sizes of each part that decodes or listens, by the names that `OpSpec.cases` takes; capacity: of a cache."""

    def decoder(c: BackboneConfig, **more: int) -> dict[str, int]:
        sizes = {"layers": c.layers, "dim": c.dim, "ffn": c.ffn, "heads": c.heads}
        sizes |= {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        return {**sizes, "capacity": capacity, **more}

    voice = config.voice_decoder
    ratio = {"semantic_block": voice.semantic_block, "speech_block": voice.speech_block}
    return {
        "LLM": decoder(config.llm, vocab=config.llm.vocab),
        "voice token LM": decoder(voice.lm, vocab=voice.vocab, llm_dim=voice.llm_dim, **ratio),
        "encoder": {"encoder_dim": config.encoder.dim, "fsmn_kernel": config.encoder.fsmn_kernel},
        "front end": {"n_mels": config.frontend.n_mels},
        "speech tokenizer": {"tokenizer_dim": config.speech_tokenizer.encoder.dim},
    }


def count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())
