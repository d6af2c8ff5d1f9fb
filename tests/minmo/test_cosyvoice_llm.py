"""The table from CosyVoice 2's `llm.pt` to the voice token LM, complete both ways at the released size."""

import pytest
import torch

from minmo.config import load_config
from minmo.modules.voice_decoder import VoiceDecoder
from minmo.weights.importers.cosyvoice_llm import DROPPED, convert


def released_shapes():
    """Names and shapes of the released file (CosyVoice 2: Qwen2.5-0.5B body, 6564 speech rows)."""
    shapes = {
        "llm_embedding.weight": (2, 896),
        "llm_decoder.weight": (6564, 896),
        "llm_decoder.bias": (6564,),
        "speech_embedding.weight": (6564, 896),
        "llm.model.model.norm.weight": (896,),
        **dict.fromkeys(DROPPED, (151936, 896)),
    }
    layer = {
        "input_layernorm.weight": (896,),
        "post_attention_layernorm.weight": (896,),
        "self_attn.q_proj.weight": (896, 896),
        "self_attn.q_proj.bias": (896,),
        "self_attn.k_proj.weight": (128, 896),
        "self_attn.k_proj.bias": (128,),
        "self_attn.v_proj.weight": (128, 896),
        "self_attn.v_proj.bias": (128,),
        "self_attn.o_proj.weight": (896, 896),
        "mlp.gate_proj.weight": (4864, 896),
        "mlp.up_proj.weight": (4864, 896),
        "mlp.down_proj.weight": (896, 4864),
    }
    return shapes | {f"llm.model.model.layers.{i}.{k}": v for i in range(24) for k, v in layer.items()}


def test_llm_key_table_is_complete_both_ways():
    config = load_config("minmo-8b").voice_decoder
    released = {name: torch.empty(shape, device="meta") for name, shape in released_shapes().items()}
    assert sum(t.numel() for n, t in released.items() if n != DROPPED[1]) == 505_803_812
    with torch.device("meta"):
        ours = {n: t.shape for n, t in VoiceDecoder(config).state_dict().items()}
    converted = {n: t.shape for n, t in convert(released, config).items()}
    assert converted == {n: s for n, s in ours.items() if not n.startswith("output_projector.")}
    with pytest.raises(ValueError, match="lacks the tensor 'llm_decoder.bias'"):
        convert({k: v for k, v in released.items() if k != "llm_decoder.bias"}, config)
    with pytest.raises(ValueError, match="'strange'"):
        convert({**released, "strange": torch.empty(1)}, config)
    with pytest.raises(ValueError, match="k_proj"):
        convert({k: v for k, v in released.items() if not k.endswith("layers.3.self_attn.k_proj.bias")}, config)
