"""The weights that a training stage runs: how often in a second of sound, and how gradients pass through them.

Known from the names and shapes of a model on the meta device and from `RUNS`; `minmo/training/plan.py` adds them up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from minmo.config import MinMoConfig
from minmo.model import MinMo
from minmo.training.lora import adapters
from minmo.training.stages import Stage

SAMPLE_SECONDS, TEXT_RATE, PROMPT = 10.0, 4.0, 20
"""Taken for a plan: sound of one sample, text tokens in a second of speech, positions of ChatML in a sample. In a
spoken turn (s2s) half of the sound is the user's and half the reply's."""
READ = TEXT_RATE + PROMPT / SAMPLE_SECONDS
"""Text positions of the LLM in a second."""

LLM, OUTPUT_PROJECTOR, TOKENS = "llm.", "voice_decoder.output_projector.", "voice_decoder."
HEAR = (("encoder.", 25.0), ("projector.", 12.5))
SAY = ((LLM, READ), (OUTPUT_PROJECTOR, TEXT_RATE), (TOKENS, 25 + TEXT_RATE + 2 / SAMPLE_SECONDS))
RUNS: dict[str, tuple[tuple[str, float], ...]] = {
    "text-lm": ((LLM, TEXT_RATE),),
    "encoder": (("encoder.", 25.0),),
    "speech-tokenizer": (("speech_tokenizer.", 25.0),),
    "pre-align": (*HEAR, (LLM, 12.5 + READ)),
    "full-align": (*HEAR, (LLM, 12.5 + READ)),
    "sft": (*HEAR, (LLM, 12.5 + READ)),
    "flow": (("flow.", 50.0),),
    "vocoder": (("vocoder.", 50.0),),
    "voice-lm": SAY,
    "t2s-projector": SAY,
    "t2s": SAY,
    "s2s": (
        *((part, rate / 2) for part, rate in HEAR),
        (LLM, (12.5 + TEXT_RATE) / 2 + PROMPT / SAMPLE_SECONDS),
        (OUTPUT_PROJECTOR, (12.5 + TEXT_RATE) / 2),
        (TOKENS, (25 + 12.5 + TEXT_RATE) / 2 + 2 / SAMPLE_SECONDS),
    ),
    "duplex": (*HEAR, (LLM, 12.5 + PROMPT / SAMPLE_SECONDS), ("duplex.", 12.5)),
}
"""The parts of MinMo that a stage runs, in the order of the data's flow, and their positions in a second of sound."""


@dataclass(frozen=True)
class Weight:
    """One parameter. rate: its positions in a second; inputs, outputs: elements of its matrix a position, 0 for what
    is none; passes: whether gradients pass through it; idle: whether it multiplies nothing; logits: whether its outputs
    are such."""

    name: str
    part: str
    block: str
    numel: int
    rate: float
    inputs: int
    outputs: int
    trains: bool
    passes: bool
    idle: bool
    logits: bool


def weights_of(model: MinMo, stage: Stage) -> list[Weight]:
    """Every parameter of the parts that a stage runs."""
    config = model.config
    rates = dict(RUNS[stage.name])
    order, prefixes = list(rates), sorted(rates, key=len, reverse=True)
    matrices, tables = _matrices(model)
    head = "llm.embedding.weight" if config.llm.tied else "llm.head.weight"
    logits = {"voice_decoder.head.weight"}
    if "text" in stage.losses:
        logits.add(head)
        tables.discard(head)
        matrices[head] = (config.llm.dim, config.llm.vocab)
    elif not config.llm.tied:
        tables.add(head)
    named = [(name, p, part) for name, p in model.named_parameters() if (part := _part(name, prefixes))]
    first = min(order.index(part) for name, p, part in named if does_train(name, p, stage))
    found = []
    for name, p, part in named:
        block = re.match(r".*?\.\d+(?=\.)", name)
        inputs, outputs = matrices.get(name, (0, 0))
        found.append(
            Weight(
                name, part, block[0] if block else part, p.numel(), _rate(name, rates[part], config), inputs, outputs,
                trains=does_train(name, p, stage), passes=order.index(part) >= first, idle=name in tables,
                logits=name in logits,
            )
        )  # fmt: skip
    return found


def _matrices(model: MinMo) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Elements in and out of each matrix a position, by name, and the names of tables."""
    matrices, tables = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            matrices[f"{name}.weight"] = (module.in_features, module.out_features)
        elif isinstance(module, nn.ConvTranspose1d):
            matrices[f"{name}.weight"] = (module.in_channels, module.out_channels * module.stride[0])
        elif isinstance(module, nn.Conv1d):
            matrices[f"{name}.weight"] = (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Embedding):
            tables.add(f"{name}.weight")
    matrices |= {name: (p.shape[1], p.shape[0]) for name, p in adapters(model).items()}
    return matrices, tables


def _part(name: str, prefixes: Iterable[str]) -> str | None:
    return next((prefix for prefix in prefixes if name.startswith(prefix)), None)


def does_train(name: str, parameter: nn.Parameter, stage: Stage) -> bool:
    """Whether a stage trains a parameter of a model to which its adapters, if any, are attached."""
    return parameter.requires_grad and name.startswith(stage.trains)


def _rate(name: str, rate: float, config: MinMoConfig) -> float:
    """Positions of a parameter in a second, where they are not its part's: the encoder halves its own, the flow's
    encoder reads tokens before it doubles them, the vocoder's stages run ever faster."""
    if name.startswith(("encoder.conv1.", "speech_tokenizer.encoder.conv1.")):
        return 2 * rate
    if name.startswith("flow.encoder.") and not name.startswith(("flow.encoder.up", "flow.encoder.norm")):
        return rate / 2
    if re.match(r"flow\.(speaker_projection|estimator\.time_mlp)\.|.*\.resnet\.time\.", name):
        return 1 / SAMPLE_SECONDS
    if stage := re.match(r"vocoder\.(ups|blocks|source_blocks|source_downs)\.(\d+)\.", name):
        into = stage[1] == "ups"  # a transposed convolution multiplies at its input's rate
        return rate * math.prod(config.vocoder.upsample_rates[: int(stage[2]) + (not into)])
    if name.startswith("vocoder.post."):
        return rate * math.prod(config.vocoder.upsample_rates)
    if name.startswith("vocoder.source."):
        return float(config.vocoder.sample_rate)
    return rate
