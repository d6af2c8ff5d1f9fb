"""`FastMinMo`: a MinMo for serving. The same parts with the same steps, weights packed once, a state allocated once.

It is built from a readable `MinMo`, whose weights it takes over, and serves wherever that does. Parts that hear, read
and speak (encoder, projector, LLM, voice decoder, full-duplex predictor) take the asked format; the front end, flow and
vocoder keep theirs.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minmo.config import is_whole
from minmo.fast.layer import CPULayer, GPULayer, Turns
from minmo.fast.linear import WEIGHTS, activations, packed
from minmo.model import MinMo, MinMoState, Seats
from minmo.modules.backbone import Backbone, DecoderLayer
from minmo.weights import load

LANGUAGE = ("encoder", "projector", "llm", "voice_decoder", "duplex")
"""Parts whose weights are packed."""
MAX_POSITIONS, MAX_VOICE_POSITIONS = 4096, 8192
"""Contexts of a row, by default: the LLM's and the voice token LM's."""


class FastMinMo(MinMo):
    """A MinMo for inference alone.

    model: taken over, so that nothing is held twice: its parts raise when they are used again. keep_model: copied
    instead. rows: sessions at once; max_positions: LLM context of each; max_voice_positions: voice token LM context of
    a reply (query, text and speech tokens). weights: "fp32", "bf16", "int8" (a scale an output) or "int4" (a scale and
    a zero point for 32 inputs), by default the model's own dtype. Raises ValueError for an unknown format and for a
    state that does not fit in memory.

    One thread at a time: while sessions sit in an engine, a call from a thread other than theirs raises.
    """

    def __init__(
        self,
        model: MinMo,
        *,
        rows: int = 8,
        max_positions: int = MAX_POSITIONS,
        max_voice_positions: int = MAX_VOICE_POSITIONS,
        weights: str | None = None,
        keep_model: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # the parts exist
        if isinstance(model, FastMinMo):
            raise ValueError("this is a FastMinMo already; build another from a MinMo (minmo.load)")
        if model.device.type == "meta":
            raise ValueError("this model holds shapes only (device 'meta'); load it on cpu or cuda to serve it")
        if model.given:
            raise ValueError("this model's weights were given to a FastMinMo before: use that, or load it again")
        if weights is None:
            weights = "fp32" if model.dtype == torch.float32 else "bf16"
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        sizes = {"rows": rows, "max_positions": max_positions, "max_voice_positions": max_voice_positions}
        for name, size in sizes.items():
            if not is_whole(size) or size < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {size!r}")
        self.weights, self.capacity = weights, rows
        self.max_positions, self.max_voice_positions = max_positions, max_voice_positions
        self.config, self.tokenizer = model.config, model.tokenizer
        self.trained, self.provenance = model.trained, model.provenance
        self.register_buffer("speaker", model.speaker)
        parts = copy.deepcopy(list(model.named_children())) if keep_model else model.give_up()
        for name, part in parts:
            self.add_module(name, optimised(part, weights) if name in LANGUAGE else part)
        self.requires_grad_(False).eval()
        self._state = super().join(rows, max_positions, max_voice_positions).state
        self._seated: weakref.WeakValueDictionary[int, FastSeats] = weakref.WeakValueDictionary()
        self._thread = 0

    @classmethod
    def from_pretrained(cls, preset_or_dir: str | Path = "nano", **settings: Any) -> FastMinMo:
        """From a preset or a checkpoint directory; settings and errors as of FastMinMo and `minmo.load`."""
        return cls(load(preset_or_dir), **settings)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language parts' activations."""
        return activations(self.weights)

    def join(self, sessions: int, max_positions: int, max_voice_positions: int) -> FastSeats:
        """New, empty sessions in free rows of this engine's state; those that sit in it go on unharmed."""
        if self._seated:
            self.check_thread()
        free = [row for row in range(self.capacity) if row not in self._seated]
        if len(free) < sessions:
            raise ValueError(
                f"{sessions} more do not fit: {self.capacity - len(free)} of {self.capacity} rows are taken; end a "
                "session, or make the FastMinMo with more rows"
            )
        for name, wanted in (("max_positions", max_positions), ("max_voice_positions", max_voice_positions)):
            if wanted > getattr(self, name):
                raise ValueError(
                    f"these sessions need {name} {wanted}, the FastMinMo was made with {getattr(self, name)}: make it "
                    f"with more, or ask for shorter turns (max_positions, max_text_tokens, max_speech_ratio)"
                )
        self._thread = threading.get_ident()
        rows = torch.tensor(free[:sessions], dtype=torch.int32, device=self.device)
        self._state.reset(rows)
        seats = FastSeats(self, self._state, rows)
        self._seated.update(dict.fromkeys(free[:sessions], seats))
        return seats

    def check_thread(self) -> None:
        """Raises RuntimeError in a thread other than the one that joined."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("this FastMinMo is used by another thread: serve all its sessions from one thread")


class FastSeats(Seats):
    """Rows of an engine's state; rows that nobody holds any more are free again."""

    def __init__(self, engine: FastMinMo, state: MinMoState, rows: Tensor) -> None:
        super().__init__(state, rows)
        self._engine: FastMinMo | None = engine

    @property
    def state(self) -> MinMoState:
        if self._engine is None:
            raise ValueError("this session has left its FastMinMo: open another")
        self._engine.check_thread()
        return self._state

    def leave(self) -> None:
        if self._engine is not None:
            for row in self.rows.tolist():
                del self._engine._seated[row]
            self._engine = None


def optimised(part: nn.Module, weights: str, prepare: Callable[[nn.Module], object] = lambda module: None) -> nn.Module:
    """A part with its linear layers packed and everything else in the format's activations, in place.

    prepare: gives a module its weights before it is packed, layer by layer.
    """
    for module in part.modules():
        if isinstance(module, Backbone) and module.embedding is not None and module.head is None:  # tied
            vocab, dim = module.embedding.weight.shape
            module.head = nn.Linear(dim, vocab, bias=False, device="meta")
            module.head.weight = module.embedding.weight
    _pack(part, weights, {}, prepare)
    prepare(part)
    return part.to(activations(weights))


def _pack(
    module: nn.Module,
    weights: str,
    turns: dict[tuple[int, float], Turns],
    prepare: Callable[[nn.Module], object],
) -> None:
    """Exchanges the layers within a module; turns: by head dimension and base, shared by layers of one step."""
    for name, child in module.named_children():
        if isinstance(child, DecoderLayer):
            prepare(child)
            c = child.config
            if child.qkv.weight.is_cpu:
                own = turns.setdefault((c.head_dim, c.rope_theta), Turns(c.head_dim, c.rope_theta))
                setattr(module, name, CPULayer(child, weights, own))
            else:
                setattr(module, name, GPULayer(child, weights))
        elif isinstance(child, nn.Linear) and name != "output_projector":  # `mix_semantic_speech` takes that as it is
            prepare(child)
            setattr(module, name, packed(child, weights))
        else:
            _pack(child, weights, turns, prepare)
