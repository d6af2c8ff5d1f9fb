"""CosyVoice 2's `flow.pt` -> `Flow`: the released names beside ours. Shapes and values stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from minmo.config import FlowConfig
from minmo.weights.importers.frame import Made, Part, applied, built, count, expected, fields, lazily
from minmo.weights.stored import CheckpointError, Weights, pickled


def key_table(config: FlowConfig) -> dict[str, str]:
    """Every released key and the key of `Flow(config).state_dict()` that it becomes; one to one, complete both ways."""
    return dict(_pairs(config))


def convert(released: Mapping[str, Tensor], config: FlowConfig) -> dict[str, Tensor]:
    """A released state dict under our names. Raises CheckpointError that names a missing or an unknown tensor."""
    return applied(_table(config), released, "flow.pt")


def open_file(path: Path) -> Part:
    """`flow.pt` as a part; its sizes are those of its tensors, heads of 64 in the estimator."""
    stored = pickled(path)
    config = _config(stored, path)
    tensors = lazily(_table(config), stored, str(path), shapes=expected("flow", fields(config)))
    note = f"the released flow learned with chunks of 25 speech tokens, and runs here with {config.chunk}"
    return Part("flow", fields(config), tensors, (path,), "cosyvoice2", notes=(note,))


def _config(stored: Weights, path: Path) -> FlowConfig:
    def size(name: str, axis: int) -> int:
        if name not in stored or len(stored[name].shape) <= axis:
            raise CheckpointError(f"{path} lacks the tensor {name!r} of a CosyVoice 2 flow: use its flow.pt")
        return stored[name].shape[axis]

    estimator, default = "decoder.estimator", FlowConfig()
    inner = size(f"{estimator}.down_blocks.0.1.0.attn1.to_q.weight", 0)
    given = {
        "codes": size("input_embedding.weight", 0),
        "dim": size("input_embedding.weight", 1),
        "heads": size("encoder.encoders.0.self_attn.pos_bias_u", 0),
        "ffn": size("encoder.encoders.0.feed_forward.w_1.weight", 0),
        "blocks": count(stored, "encoder.encoders."),
        "up_blocks": count(stored, "encoder.up_encoders."),
        "lookahead": size("encoder.pre_lookahead_layer.conv1.weight", 2) - 1,
        "n_mels": size("encoder_proj.weight", 0),
        "speaker_dim": size("spk_embed_affine_layer.weight", 1),
        "estimator_dim": size(f"{estimator}.final_proj.weight", 1),
        "estimator_heads": max(1, inner // default.estimator_head_dim),
        "estimator_mid_blocks": count(stored, f"{estimator}.mid_blocks."),
        "estimator_transformers": count(stored, f"{estimator}.down_blocks.0.1."),
    }
    return built(FlowConfig, given, path)


def _table(config: FlowConfig) -> dict[str, Made]:
    return {ours: Made((theirs,)) for theirs, ours in key_table(config).items()}


def _pairs(config: FlowConfig) -> Iterator[tuple[str, str]]:
    yield "input_embedding.weight", "token_embedding.weight"
    yield from _both("spk_embed_affine_layer", "speaker_projection")
    yield from _both("encoder_proj", "mu_projection")

    yield from _both("encoder.pre_lookahead_layer.conv1", "encoder.lookahead.right")
    yield from _both("encoder.pre_lookahead_layer.conv2", "encoder.lookahead.left")
    yield from _both("encoder.up_layer.conv", "encoder.up_conv")
    yield from _both("encoder.after_norm", "encoder.norm")
    for name in ("embed", "up_embed"):
        yield from _both(f"encoder.{name}.out.0", f"encoder.{name}.linear")
        yield from _both(f"encoder.{name}.out.1", f"encoder.{name}.norm")
    for n in range(config.blocks):
        yield from _conformer_block(f"encoder.encoders.{n}", f"encoder.blocks.{n}")
    for n in range(config.up_blocks):
        yield from _conformer_block(f"encoder.up_encoders.{n}", f"encoder.up_blocks.{n}")

    theirs = "decoder.estimator"
    yield from _both(f"{theirs}.time_mlp.linear_1", "estimator.time_mlp.0")
    yield from _both(f"{theirs}.time_mlp.linear_2", "estimator.time_mlp.2")
    groups = [("down_blocks.0", "down"), *((f"mid_blocks.{n}", f"mid.{n}") for n in range(config.estimator_mid_blocks))]
    for released, group in (*groups, ("up_blocks.0", "up")):
        yield from _group(f"{theirs}.{released}", f"estimator.{group}", config.estimator_transformers)
    yield from _both(f"{theirs}.down_blocks.0.2", "estimator.down_conv")
    yield from _both(f"{theirs}.up_blocks.0.2", "estimator.up_conv")
    yield from _both(f"{theirs}.final_block.block.0", "estimator.final_conv")
    yield from _both(f"{theirs}.final_block.block.2", "estimator.final_norm")
    yield from _both(f"{theirs}.final_proj", "estimator.out")


def _conformer_block(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for released, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        yield from _both(f"{theirs}.self_attn.linear_{released}", f"{ours}.attention.{name}")
    yield f"{theirs}.self_attn.linear_pos.weight", f"{ours}.attention.position.weight"
    yield f"{theirs}.self_attn.pos_bias_u", f"{ours}.attention.content_bias"
    yield f"{theirs}.self_attn.pos_bias_v", f"{ours}.attention.position_bias"
    yield from _both(f"{theirs}.norm_mha", f"{ours}.attention_norm")
    yield from _both(f"{theirs}.feed_forward.w_1", f"{ours}.mlp.0")
    yield from _both(f"{theirs}.feed_forward.w_2", f"{ours}.mlp.2")
    yield from _both(f"{theirs}.norm_ff", f"{ours}.mlp_norm")


def _group(theirs: str, ours: str, transformers: int) -> Iterator[tuple[str, str]]:
    for n in (1, 2):
        yield from _both(f"{theirs}.0.block{n}.block.0", f"{ours}.resnet.conv{n}")
        yield from _both(f"{theirs}.0.block{n}.block.2", f"{ours}.resnet.norm{n}")
    yield from _both(f"{theirs}.0.mlp.1", f"{ours}.resnet.time")
    yield from _both(f"{theirs}.0.res_conv", f"{ours}.resnet.residual")
    for n in range(transformers):
        block, mine = f"{theirs}.1.{n}", f"{ours}.transformers.{n}"
        yield from _both(f"{block}.norm1", f"{mine}.attention_norm")
        for released, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            yield f"{block}.attn1.{released}.weight", f"{mine}.{name}.weight"
        yield from _both(f"{block}.attn1.to_out.0", f"{mine}.out")
        yield from _both(f"{block}.norm3", f"{mine}.mlp_norm")
        yield from _both(f"{block}.ff.net.0.proj", f"{mine}.mlp.0")
        yield from _both(f"{block}.ff.net.2", f"{mine}.mlp.2")


def _both(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for end in ("weight", "bias"):
        yield f"{theirs}.{end}", f"{ours}.{end}"
