"""CosyVoice 2's flow and vocoder out of a checkout of its public repository, as a peer: random weights, released sizes.

The checkout (FunAudioLLM/CosyVoice, with its submodule third_party/Matcha-TTS) and what these classes import
(diffusers 0.29, conformer, omegaconf, scipy) are the caller's; what only its training and its command line import is
left out.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from pathlib import Path
from typing import Any

UNUSED = {
    "cosyvoice.utils.onnx": ("SpeechTokenExtractor", "online_feature", "onnx_path"),
    "cosyvoice.llm.llm": ("TransformerLM", "Qwen2LM", "CosyVoice3LM"),
    "matcha.utils": (),  # its loggers and training tools
    "matcha.utils.pylogger": ("get_pylogger",),
    "cosyvoice.cli.model": ("CosyVoiceModel", "CosyVoice2Model", "CosyVoice3Model"),
}
"""Modules, and their names, that the files of the classes import and the classes do not use."""


def modules(checkout: Path) -> tuple[Any, Any]:
    """(flow, HiFT) as the released cosyvoice2.yaml builds them. Raises ImportError where something is missing."""
    stubs = {name: types.ModuleType(name) for name in UNUSED}
    for name, members in UNUSED.items():
        stubs[name].__dict__.update(dict.fromkeys(members, logging.getLogger))
    sys.path[:0] = [str(checkout), str(checkout / "third_party" / "Matcha-TTS")]
    sys.modules.update(stubs)
    names = (
        "flow.flow", "flow.flow_matching", "flow.decoder", "transformer.upsample_encoder", "hifigan.generator",
        "hifigan.f0_predictor",
    )  # fmt: skip
    try:
        part = {name: importlib.import_module(f"cosyvoice.{name}") for name in names}
    finally:
        del sys.path[:2]
        for name in stubs:
            del sys.modules[name]
    encoder = part["transformer.upsample_encoder"].UpsampleConformerEncoder(
        input_size=512, output_size=512, attention_heads=8, linear_units=2048, num_blocks=6, input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet", selfattention_layer_type="rel_selfattn", use_cnn_module=False,
        macaron_style=False, static_chunk_size=25,
    )  # fmt: skip
    estimator = part["flow.decoder"].CausalConditionalDecoder(
        in_channels=320, out_channels=80, channels=[256], dropout=0.0, attention_head_dim=64, n_blocks=4,
        num_mid_blocks=12, num_heads=8, act_fn="gelu", static_chunk_size=50, num_decoding_left_chunks=-1,
    )  # fmt: skip
    settings = types.SimpleNamespace(
        sigma_min=1e-6, solver="euler", t_scheduler="cosine", training_cfg_rate=0.2, inference_cfg_rate=0.7,
        reg_loss_type="l1",
    )  # fmt: skip
    decoder = part["flow.flow_matching"].CausalConditionalCFM(
        in_channels=240, cfm_params=settings, n_spks=1, spk_emb_dim=80, estimator=estimator
    )
    flow = part["flow.flow"].CausalMaskedDiffWithXvec(
        input_size=512, output_size=80, spk_embed_dim=192, vocab_size=6561, input_frame_rate=25, token_mel_ratio=2,
        pre_lookahead_len=3, encoder=encoder, decoder=decoder,
    )  # fmt: skip
    hift = part["hifigan.generator"].HiFTGenerator(
        sampling_rate=24_000, upsample_rates=[8, 5, 3], upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11], source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
        f0_predictor=part["hifigan.f0_predictor"].ConvRNNF0Predictor(),
    )  # fmt: skip
    return flow.eval().requires_grad_(False), hift.eval().requires_grad_(False)
