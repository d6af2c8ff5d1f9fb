"""What an importer is: a public checkpoint, opened, as parts of a MinMo whose tensors are read when they are written.

To add one: a file here with a function that opens the public files and gives `Part`s, and its line in `table.py`. The
usual way is a key table (our name -> `Made` of released names) that `lazily` holds against the names and shapes of the
files, all of them, before the first tensor is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minmo.config import (
    BackboneConfig,
    EncoderConfig,
    FlowConfig,
    SpeechTokenizerConfig,
    VocoderConfig,
    VoiceDecoderConfig,
    from_fields,
)
from minmo.model import NothingDrawn, Origin
from minmo.modules.backbone import Backbone
from minmo.modules.encoder import Encoder
from minmo.modules.voice_decoder import VoiceDecoder
from minmo.token2wav.flow import Flow
from minmo.token2wav.vocoder import Vocoder
from minmo.tokenizer.speech import SpeechTokenizer
from minmo.weights.stored import CheckpointError, Weight, Weights

KINDS: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "encoder": (EncoderConfig, Encoder),
    "llm": (BackboneConfig, Backbone),
    "voice_decoder": (VoiceDecoderConfig, VoiceDecoder),
    "speech_tokenizer": (SpeechTokenizerConfig, SpeechTokenizer),
    "flow": (FlowConfig, Flow),
    "vocoder": (VocoderConfig, Vocoder),
}
"""Parts of a MinMo that come from elsewhere, by their names in it. One more is `speaker`, a vector without a module."""
PROJECTOR = "output_projector."
"""What a voice decoder lacks where its config does not say `llm_dim`."""


@dataclass(frozen=True)
class Part:
    """One part of a MinMo, not read yet. Its tensors are complete, but for a voice decoder's output projector."""

    name: str
    """One of KINDS, or `speaker`."""
    config: Mapping[str, Any]
    """Fields of the part's configuration (`minmo.config`), as JSON has them; a voice decoder's without `llm_dim`."""
    tensors: Weights
    """By the names of the part's own state dict; a speaker's one tensor is called ""."""
    files: tuple[Path, ...]
    """All that was read, for the manifest."""
    importer: str
    tokenizer: str | None = None
    """An LLM's tokenizer.json, its text."""
    chat_template: str | None = None
    """An LLM's own way to lay out a conversation, in Jinja; without one it is MinMo's."""
    start: str = ""
    """Why it is no trained part of a MinMo, where it is only a start for training ("… is Whisper's, …"); else empty."""
    notes: tuple[str, ...] = ()
    """What is not a faithful copy, in sentences."""
    dropped: tuple[str, ...] = ()
    """Released tensors without a place here."""
    zeroed: tuple[str, ...] = ()
    """Tensors of ours that the files do not have, set to zero (or to what makes them do nothing)."""
    origin: Origin | None = None
    """What a manifest said of it, where it comes from a folder of parts."""


@dataclass(frozen=True)
class Importer:
    """Opens one kind of public checkpoint. open: raises CheckpointError or ValueError, in one sentence that names file
    and key, for what is not that; nothing big is read. recognises: whether a path looks like it, never raising."""

    name: str
    gives: tuple[str, ...]
    reads: str
    """The files, in words."""
    open: Callable[[Path], list[Part]]
    recognises: Callable[[Path], bool]


@dataclass(frozen=True)
class Made:
    """How one tensor of ours is made of released ones, or of none: join(one tensor for each source). It runs on meta
    tensors first, which tells the shape. shapes: those of the sources, where the joined one alone would not show a
    wrong one."""

    sources: tuple[str, ...]
    join: Callable[..., Tensor] = field(default=lambda tensor: tensor)
    shapes: tuple[tuple[int, ...], ...] | None = None


def stacked(*tensors: Tensor) -> Tensor:
    """Made of rows one below the other."""
    return torch.cat(tensors)


def lazily(
    table: Mapping[str, Made],
    stored: Weights,
    where: str,
    dropped: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Weight]:
    """Ours by a key table, each made when it is read. where: the file or folder, for messages.

    Every stored tensor is used or dropped by name; raises CheckpointError that names one that is missing, left over or
    misshaped. `dropped` ones may be absent. shapes: those of ours, as `expected` gives them.
    """
    wanted = {source for made in table.values() for source in made.sources}
    if missing := [source for made in table.values() for source in made.sources if source not in stored]:
        raise CheckpointError(
            f"{where} lacks the tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing): "
            "it is of another size or kind"
        )
    if unknown := sorted(set(stored) - wanted - set(dropped)):
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that this size has no place for, such as {unknown[0]!r}"
        )
    return {ours: _made(ours, made, stored, where, (shapes or {}).get(ours)) for ours, made in table.items()}


def applied(
    table: Mapping[str, Made], released: Mapping[str, Tensor], where: str, dropped: Iterable[str] = ()
) -> dict[str, Tensor]:
    """As `lazily`, on tensors in memory."""
    found = lazily(table, {name: Weight.of(tensor) for name, tensor in released.items()}, where, dropped)
    return {name: weight.read() for name, weight in found.items()}


def check(part: Part) -> None:
    """Holds a part's names and shapes against its module's. Raises CheckpointError that names the first misfit."""
    where = ", ".join(str(path) for path in part.files[:1]) or part.importer
    if part.name == "speaker":
        if set(part.tensors) != {""} or len(part.tensors[""].shape) != 1:
            raise CheckpointError(f"{where}: a speaker is one vector")
        return
    ours = expected(part.name, part.config)
    for name, shape in ours.items():
        if name not in part.tensors:
            raise CheckpointError(f"{where} lacks the tensor {name!r} of {part.name}, of shape {shape}")
    for name, weight in part.tensors.items():
        if name not in ours:
            raise CheckpointError(f"{where} has the tensor {name!r}, which {part.name} of this size does not know")
        if weight.shape != ours[name]:
            raise CheckpointError(
                f"{where}: {name!r} of {part.name} has the shape {weight.shape}, and its size wants {ours[name]}"
            )


def expected(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's tensors. Raises ValueError for a config that does not build."""
    without = part == "voice_decoder" and "llm_dim" not in config
    with torch.device("meta"), NothingDrawn():
        state = module(part, {**config, "llm_dim": 1} if without else config).state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if not (without and n.startswith(PROJECTOR))}


def module(part: str, config: Mapping[str, Any]) -> nn.Module:
    """A part's module, as PyTorch draws it. Raises ValueError that names the field for a config that does not fit."""
    kind, make = KINDS[part]
    return make(from_fields(kind, dict(config), part))


def built(kind: type, given: Mapping[str, Any], path: Path) -> Any:
    """A configuration of sizes that a file's tensors show. Raises CheckpointError that names the file for bad ones."""
    try:
        return from_fields(kind, dict(given), kind.__name__)
    except ValueError as error:
        raise CheckpointError(f"{path} has sizes that do not go together: {error}") from None


def count(stored: Iterable[str], prefix: str) -> int:
    """How many numbered groups stand under a prefix: 3 for `prefix0.…` to `prefix2.…`."""
    return len({name[len(prefix) :].partition(".")[0] for name in stored if name.startswith(prefix)})


def fields(config: Any) -> dict[str, Any]:
    """A configuration's fields, as `Part` has them."""
    return dataclasses.asdict(config)


def _made(ours: str, made: Made, stored: Weights, where: str, wanted: tuple[int, ...] | None) -> Weight:
    sources = [stored[name] for name in made.sources]
    for name, weight, shape in zip(made.sources, sources, made.shapes or [w.shape for w in sources], strict=True):
        if weight.shape != shape:
            raise CheckpointError(f"{where}: {name!r} has the shape {weight.shape}, and its size wants {shape}")
    try:
        whole = made.join(*(torch.empty(w.shape, dtype=w.dtype, device="meta") for w in sources))
    except RuntimeError:
        shapes = ", ".join(f"{name!r} {weight.shape}" for name, weight in zip(made.sources, sources, strict=True))
        raise CheckpointError(f"{where}: {shapes} do not go together, so they make no {ours!r}") from None
    if wanted is not None and tuple(whole.shape) != wanted:
        raise CheckpointError(
            f"{where}: {made.sources[0]!r} has the shape {sources[0].shape}, which makes {ours!r} "
            f"{tuple(whole.shape)}, and its size wants {wanted}"
        )
    file = sources[0].where if sources else where
    return Weight(tuple(whole.shape), whole.dtype, lambda: made.join(*(w.read() for w in sources)), file)
