"""CosyVoice 2's `speech_tokenizer_v2.onnx` -> speech tokenizer, and its six blocks as the start of an encoder.

Its initialisers are mapped by what they are in the graph, in its order: convolutions, layer norms, and products with
the biases added to them. Names are not asked, as exporters invent most of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minmo.config import EncoderConfig, SpeechTokenizerConfig
from minmo.weights.importers.frame import Importer, Made, Part, fields, lazily, stacked
from minmo.weights.importers.s3tokenizer import key_table
from minmo.weights.stored import CheckpointError, Weight, Weights

NAME = "speech-tokenizer"
BLOCKS, HEAD_DIM, DIGITS = 6, 64, 8
"""Of version 2: blocks, width of a head, digits of a speech token (3 levels each)."""
START = "its blocks are the first six of another encoder, trained around a quantiser"
_LINEAR = ("attn.query", "attn.key", "attn.value", "attn.out", "mlp.0", "mlp.2")
_OTHER = "it is no speech_tokenizer_v2.onnx of CosyVoice 2, but another version or model"


def open_onnx(path: Path) -> list[Part]:
    """The speech tokenizer, and an encoder's start. Raises CheckpointError for another model, or another version."""
    released, epsilons = released_names(path)
    where = str(path)
    dim, n_mels, _ = released["encoder.conv1.weight"].shape
    if dim % HEAD_DIM:
        raise CheckpointError(f"{where}: its width {dim} is not in heads of {HEAD_DIM}: {_OTHER}")
    encoder = EncoderConfig(
        n_mels=n_mels,
        dim=dim,
        heads=dim // HEAD_DIM,
        ffn=released["encoder.blocks.0.mlp.0.weight"].shape[0],
        blocks=BLOCKS,
        fsmn_kernel=released["encoder.blocks.0.attn.fsmn_block.weight"].shape[2],
        attention_norm_eps=epsilons[0],
        mlp_norm_eps=epsilons[1],
        final_norm=False,
    )
    config = SpeechTokenizerConfig(encoder)
    table = {ours: Made(sources, stacked) for ours, sources in key_table(config).items()}
    tensors = lazily(table, released, where)
    prefix = "encoder."
    of_encoder = {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
    return [
        Part("speech_tokenizer", fields(config), tensors, (path,), NAME),
        Part(
            "encoder", fields(encoder), of_encoder, (path,), NAME, start=START,
            notes=("six blocks without a final norm, where MinMo's encoder has 32 and one",),
        ),
    ]  # fmt: skip


def recognises(path: Path) -> bool:
    return path.suffix == ".onnx" and path.name.startswith("speech_tokenizer")


IMPORTER = Importer(
    NAME, ("speech_tokenizer", "encoder"), "CosyVoice 2's speech_tokenizer_v2.onnx", open_onnx, recognises
)


def released_names(path: Path) -> tuple[dict[str, Weight], tuple[float, float]]:
    """The initialisers under the names of the public `s3tokenizer` package, and the epsilons of a block's two norms.
    Raises CheckpointError, see `open_onnx`."""
    graph = _graph(path)
    found = {kind: list(_parameters(graph, kind, str(path))) for kind in ("Conv", "LayerNormalization", "MatMul")}
    counts = {"Conv": 2 + BLOCKS, "LayerNormalization": 2 * BLOCKS, "MatMul": len(_LINEAR) * BLOCKS + 1}
    for kind, wanted in counts.items():
        if len(found[kind]) != wanted:
            raise CheckpointError(f"{path} has {len(found[kind])} nodes {kind} with weights, not {wanted}: {_OTHER}")
    names: dict[str, Weight] = {}

    def name(parameters: _Parameters, released: str, biased: bool = True) -> None:
        names[f"{released}.weight"] = parameters.weight
        if (parameters.bias is not None) != biased:
            raise CheckpointError(f"{path}: {parameters.node} {'lacks' if biased else 'has'} a bias: {_OTHER}")
        if parameters.bias is not None:
            names[f"{released}.bias"] = parameters.bias

    convolutions, norms, products = (iter(found[kind]) for kind in counts)
    for i in (1, 2):
        name(next(convolutions), f"encoder.conv{i}")
    for n in range(BLOCKS):
        block = f"encoder.blocks.{n}"
        name(next(convolutions), f"{block}.attn.fsmn_block", biased=False)
        for norm in ("attn_ln", "mlp_ln"):
            name(next(norms), f"{block}.{norm}")
        for part in _LINEAR:
            name(next(products), f"{block}.{part}", biased=part != "attn.key")
    name(next(products), "quantizer._codebook.project_down")
    _check(names, path)
    epsilons = [norm.epsilon for norm in found["LayerNormalization"]]
    if epsilons != epsilons[:2] * BLOCKS:
        raise CheckpointError(f"{path}: the epsilons of its norms differ from block to block: {_OTHER}")
    return names, (epsilons[0], epsilons[1])


@dataclass(frozen=True)
class _Parameters:
    """Of one node, the weight as PyTorch has it."""

    node: str
    weight: Weight
    bias: Weight | None
    epsilon: float = 1e-5
    """Of a norm; this where the file does not say (ONNX's default)."""


def _check(names: Weights, path: Path) -> None:
    """Raises CheckpointError where a shape is not that of version 2 at the file's own width."""
    dim, n_mels = names["encoder.conv1.weight"].shape[:2]
    ffn, kernel = (
        names["encoder.blocks.0.mlp.0.weight"].shape[0],
        names["encoder.blocks.0.attn.fsmn_block.weight"].shape[-1],
    )
    inner = {"mlp.0": (ffn, dim), "mlp.2": (dim, ffn), "attn.fsmn_block": (dim, 1, kernel)}
    for released, weight in names.items():
        where, _, kind = released.rpartition(".")
        part = where.partition(".blocks.")[2].partition(".")[2]
        if where == "quantizer._codebook.project_down":
            shape: tuple[int, ...] = (DIGITS, dim)
        elif not part:
            shape = (dim, n_mels if where.endswith("conv1") else dim, 3)
        else:
            shape = (dim,) if part.endswith("_ln") else inner.get(part, (dim, dim))
        if weight.shape != (shape if kind == "weight" else shape[:1]):
            raise CheckpointError(f"{path}: what stands for {released!r} has the shape {weight.shape}: {_OTHER}")


def _graph(path: Path) -> Any:
    try:
        import onnx
    except ImportError:
        raise CheckpointError("onnx files are read by the onnx package: pip install 'minmo[import]'") from None
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give a speech_tokenizer_v2.onnx")
    try:
        return onnx.load(path).graph
    except Exception as error:  # protobuf's own, and onnx's for tensors that lie in files beside it
        first = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is cut, or no onnx file ({first:.100}): fetch it again") from None


def _parameters(graph: Any, kind: str, where: str) -> Iterator[_Parameters]:
    """The nodes of one kind that have weights, in the graph's order."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    # Exporters store equal tensors once, and let nodes pass them on.
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    added = {}
    for node in graph.node:
        if node.op_type == "Add":
            for one, other in (node.input, reversed(node.input)):
                if one in stored:
                    added[other] = stored[one]
    for node in graph.node:
        product = kind == "MatMul" and node.op_type in ("MatMul", "Gemm")
        if not (product or node.op_type == kind) or len(node.input) < 2 or node.input[1] not in stored:
            continue
        transposed = product and not any(a.name == "transB" and a.i for a in node.attribute)
        bias = stored.get(node.input[2]) if len(node.input) > 2 else added.get(node.output[0]) if product else None
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        yield _Parameters(
            node.name or kind,
            _weight(stored[node.input[1]], transposed, where),
            None if bias is None else _weight(bias, False, where),
            float(f"{epsilon:.6g}"),  # stored in single precision
        )


def _weight(tensor: Any, transposed: bool, where: str) -> Weight:
    from onnx import helper, numpy_helper

    kind = torch.from_numpy(helper.tensor_dtype_to_np_dtype(tensor.data_type).type([])).dtype
    shape = tuple(tensor.dims)

    def read() -> Tensor:
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        return values.T.contiguous() if transposed else values

    return Weight(shape[::-1] if transposed else shape, kind, read, where)
