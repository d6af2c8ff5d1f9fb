"""A MinMo put together from public parts, tensor by tensor: no model is ever whole in memory.

Its sizes are those of the parts. What no file holds is drawn at random from one seed: input and output projector,
full-duplex predictor, and speech tokenizer and speaker where none are given. The manifest says so, part by part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minmo.config import (
    FrontendConfig,
    MinMoConfig,
    ProjectorConfig,
    from_fields,
)
from minmo.model import NothingDrawn, Origin, shapes
from minmo.modules.backbone import initialise
from minmo.modules.duplex import DuplexPredictor
from minmo.modules.projector import Projector
from minmo.tokenizer.speech import SpeechTokenizer
from minmo.tokenizer.text import TextTokenizer
from minmo.weights import manifest
from minmo.weights.importers.frame import Part, check
from minmo.weights.importers.table import IMPORTERS
from minmo.weights.manifest import Stamp
from minmo.weights.parts import FILE, full, open_parts, origin
from minmo.weights.stored import CheckpointError, Weight
from minmo.weights.written import SHARD, bar, total_bytes, whole, write

WANTED = {
    "llm": ("llm",),
    "cosyvoice": ("voice_decoder", "flow", "vocoder"),
    "encoder": ("encoder",),
    "speech_tokenizer": ("speech_tokenizer",),
    "speaker": ("speaker",),
}
"""What `minmo assemble` is given, and the parts that it takes from each."""


def find(source: Path, given: str) -> list[Part]:
    """The parts that are wanted of what was given (a key of WANTED): from a folder that `minmo import` wrote, or from
    public files, by the importer that recognises them. Raises CheckpointError where there are none."""
    wanted = WANTED[given]
    if not source.exists():
        raise CheckpointError(f"there is no {source}: give --{given.replace('_', '-')} a folder or file that is there")
    if (source / FILE).is_file():
        parts = open_parts(source)
    else:
        able = [i for i in IMPORTERS.values() if set(wanted) & set(i.gives) and i.recognises(source)]
        if not able:
            reads = "; ".join(f"{i.reads} ({i.name})" for i in IMPORTERS.values() if set(wanted) & set(i.gives))
            raise CheckpointError(
                f"{source} holds nothing that gives {', '.join(wanted)}: give an imported folder, or {reads}"
            )
        parts = able[0].open(source)
    found = [part for part in parts if part.name in wanted]
    if lacking := [name for name in wanted if name not in {part.name for part in found}]:
        raise CheckpointError(f"{source} has no {lacking[0]}, which --{given.replace('_', '-')} gives")
    return found


def assemble(
    parts: list[Part], out: Path, dtype: torch.dtype | None = None, *, seed: int = 0, shard: int = SHARD
) -> dict[str, Origin]:
    """Writes a MinMo of these parts into a new folder that `minmo.load` reads -> where each part's weights come from.

    dtype: None keeps each tensor's own. seed: of what is drawn. Raises CheckpointError, in one sentence, for parts that
    do not fit each other, and as `save_parts` does.
    """
    by_name = {part.name: part for part in parts}
    llm = by_name["llm"]
    if llm.tokenizer is None:
        raise CheckpointError(f"{llm.files[0].parent} has no tokenizer.json, which a MinMo needs: put the LLM's there")
    tokenizer = TextTokenizer(llm.tokenizer, f"the tokenizer.json of {llm.files[0].parent}")
    for part in parts:
        check(part)
    config = config_of(by_name, out.name)
    weights = {full(part.name, name): weight for part in parts for name, weight in part.tensors.items()}
    origins = {part.name: origin(part, dtype) for part in parts}
    for name, drawn in _drawn(config, by_name, seed).items():
        weights |= drawn
        origins[name] = Origin("random", made_by=manifest.made_by(), seed=seed)
    ours = {name: tuple(tensor.shape) for name, tensor in shapes(config).state_dict().items()}
    for name, shape in ours.items():
        if name not in weights or weights[name].shape != shape:
            had = weights[name].shape if name in weights else "nothing"
            raise CheckpointError(f"the parts do not fit: {name!r} must have the shape {shape}, and they give {had}")
    with whole(out) as folder, bar("assembling", total_bytes(weights, dtype)) as told:
        files = write({name: weights[name] for name in ours}, folder, dtype, shard=shard, told=told)
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        tokenizer.save(folder / "tokenizer.json")
        for name in ("config.json", "tokenizer.json"):
            files[name] = Stamp.of(folder / name)
        manifest.write(folder, origins, files)
    return origins


def config_of(parts: Mapping[str, Part], name: str) -> MinMoConfig:
    """A MinMo whose sizes are those of its parts; what lies between them has the paper's proportions. Raises
    CheckpointError where they do not fit each other."""
    encoder, llm = dict(parts["encoder"].config), dict(parts["llm"].config)
    flow = dict(parts["flow"].config)
    dim, head = llm["dim"], llm["head_dim"]
    heads, kv_heads = max(1, llm["heads"] // 4), max(1, llm["kv_heads"] // 4)
    wide = 128 if dim % 128 == 0 else 64
    if dim % wide:
        raise CheckpointError(f"the LLM is {dim} wide, and its projector needs heads of 64 or 128: take another size")
    quarter = {
        "dim": dim // 4, "layers": 1, "heads": heads, "kv_heads": kv_heads if heads % kv_heads == 0 else 1,
        "head_dim": head, "ffn": llm["ffn"] // 4, "rope_theta": llm["rope_theta"], "norm_eps": llm["norm_eps"],
    }  # fmt: skip
    tokenizer = parts["speech_tokenizer"].config if "speech_tokenizer" in parts else _tokenizer(encoder, flow["codes"])
    fields: dict[str, Any] = {
        "name": name if name.isprintable() and len(name) <= 100 else "assembled",
        "frontend": dataclasses.asdict(FrontendConfig(n_mels=encoder["n_mels"])),
        "encoder": encoder,
        "projector": dataclasses.asdict(ProjectorConfig(encoder["dim"], dim, dim // wide, dim)),
        "llm": llm,
        "voice_decoder": {**parts["voice_decoder"].config, "llm_dim": dim},
        "duplex": {"input_dim": dim, "layer": quarter},
        "speech_tokenizer": dict(tokenizer),
        "flow": flow,
        "vocoder": dict(parts["vocoder"].config),
    }
    speaker = parts["speaker"].tensors[""].shape[0] if "speaker" in parts else flow["speaker_dim"]
    if speaker != flow["speaker_dim"]:
        raise CheckpointError(f"the speaker has {speaker} numbers, and the flow wants {flow['speaker_dim']}")
    try:
        config: MinMoConfig = from_fields(MinMoConfig, fields, "the assembled model")
    except ValueError as error:
        raise CheckpointError(f"the parts do not fit each other: {error}") from None
    return config


def _tokenizer(encoder: Mapping[str, Any], codes: int) -> dict[str, Any]:
    """A speech tokenizer as wide as the encoder, with CosyVoice 2's six blocks and levels of three."""
    levels = 0
    while 3**levels < codes:
        levels += 1
    if 3**levels != codes:
        raise CheckpointError(
            f"the flow reads {codes} speech tokens, no power of three as CosyVoice 2's: give --speech-tokenizer its own"
        )
    blocks = min(6, encoder["blocks"])
    return {"encoder": {**encoder, "blocks": blocks, "final_norm": False}, "levels": [3] * levels}


def _drawn(config: MinMoConfig, parts: Mapping[str, Part], seed: int) -> dict[str, dict[str, Weight]]:
    """Random weights of what is in no file, by origin and full name; drawn when the first of a part is read."""
    voice = config.voice_decoder

    def projector() -> nn.Module:
        made = nn.Linear(2 * voice.llm_dim, voice.lm.dim)
        initialise(made)
        return made

    makers: dict[str, Callable[[], nn.Module]] = {
        "projector": lambda: Projector(config.projector),
        "voice_decoder.output_projector": projector,
        "duplex": lambda: DuplexPredictor(config.duplex),
    }
    if "speech_tokenizer" not in parts:
        makers["speech_tokenizer"] = lambda: SpeechTokenizer(config.speech_tokenizer)
    out = {name: _random(name, make, seed) for name, make in makers.items()}
    if "speaker" not in parts:
        size = config.flow.speaker_dim
        out["speaker"] = {"speaker": Weight((size,), torch.float32, lambda: _seeded(seed, lambda: torch.randn(size)))}
    return out


def _random(name: str, make: Callable[[], nn.Module], seed: int) -> dict[str, Weight]:
    drawn: list[nn.Module] = []

    def read(key: str) -> torch.Tensor:
        if not drawn:
            drawn.append(_seeded(seed, make))
        return drawn[0].state_dict()[key]

    with torch.device("meta"), NothingDrawn():
        state = make().state_dict()
    return {
        f"{name}.{key}": Weight(tuple(t.shape), torch.float32, lambda key=key: read(key))  # type: ignore[misc]
        for key, t in state.items()
    }


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()
