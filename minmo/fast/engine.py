"""`FastMinMo`: a MinMo for serving. The same parts with the same steps, weights packed once, a state allocated once.

It is built from a readable `MinMo`, whose weights it takes over, and serves wherever that does. Parts that hear, read
and speak (encoder, projector, LLM, voice decoder, full-duplex predictor) take the asked format; the front end, flow and
vocoder keep theirs.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.clock import now
from minmo.config import TICK, MinMoConfig, is_real, is_whole
from minmo.fast.graphs import BUCKETS, Capture, CudaCapture, Graphed, bucket, replay
from minmo.fast.layer import CPULayer, GPULayer, Turns
from minmo.fast.linear import WEIGHTS, activations, packed
from minmo.fast.one_launch import ONE_LAUNCH, Limits, Step, Verdict, decoder_steps, install, plan
from minmo.model import MAX_POSITIONS, MOST_POSITIONS, PREFILL, MinMo, MinMoState, Seats, shapes
from minmo.modules.backbone import Backbone, DecoderLayer
from minmo.state import all_rows, full_lengths
from minmo.weights import load
from minmo_kernels.ops.decoder_step import MOST_SPINS, SPINS

LANGUAGE = ("encoder", "projector", "llm", "voice_decoder", "duplex")
"""Parts whose weights are packed."""
GRAPHS = ("auto", "off")
MAX_VOICE_POSITIONS = 8192
"""Voice token LM context of a row, by default."""
MOST_ROWS = 4096


class FastMinMo(MinMo):
    """A MinMo for inference alone.

    model: taken over, so that nothing is held twice: its parts raise when they are used again. keep_model: copied
    instead. rows: sessions at once; max_positions: LLM context of each; max_voice_positions: voice token LM context of
    a reply (query, text and speech tokens); prefill: positions of a prompt that are read at once, for which other
    sessions wait. weights: "fp32", "bf16", "int8" (a scale an output) or "int4" (a scale and
    a zero point for 32 inputs), by default the model's own dtype. graphs: "auto" replays steps as CUDA graphs on a GPU,
    "off" runs them launch by launch. one_launch: "auto" decodes in a single launch a step where a results file of this
    GPU shows it right and faster (`explain` says which), "on" always, for up to 8 rows, "off" never; one_launch_share:
    of the GPU's multiprocessors that such a launch takes, above 0 up to 1, and above a half text and speech take turns
    on the GPU; one_launch_spins: looks at a barrier, about a microsecond each, after which it gives up. Raises
    ValueError, with the model as it was, for a setting that cannot be, for a state that does not fit in memory, and
    where one_launch is "on" and cannot be.

    One thread at a time: while sessions sit in an engine, a call from a thread other than theirs raises.
    """

    def __init__(
        self,
        model: MinMo,
        *,
        rows: int = 8,
        max_positions: int = MAX_POSITIONS,
        max_voice_positions: int = MAX_VOICE_POSITIONS,
        prefill: int = PREFILL,
        weights: str | None = None,
        graphs: str = "auto",
        one_launch: str = "auto",
        one_launch_share: float = 1.0,
        one_launch_spins: int = SPINS,
        keep_model: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # the parts exist
        if not isinstance(model, MinMo):
            raise ValueError(
                f"a FastMinMo is made from a MinMo (minmo.load), got {type(model).__name__}; from a preset or a "
                "directory: FastMinMo.from_pretrained"
            )
        if isinstance(model, FastMinMo):
            raise ValueError("this is a FastMinMo already; build another from a MinMo (minmo.load)")
        if model.device.type == "meta":
            raise ValueError("this model holds shapes only (device 'meta'); load it on cpu or cuda to serve it")
        if model.given:
            raise ValueError("this model's weights were given to a FastMinMo before: use that, or load it again")
        if model.device.type == "cuda" and model.device.index not in (None, torch.cuda.current_device()):
            raise ValueError(
                f"the model is on {model.device} and the current device is another: call torch.cuda.set_device"
                f"({model.device.index}) first, or choose a GPU by CUDA_VISIBLE_DEVICES"
            )
        if weights is None:
            weights = "fp32" if model.dtype == torch.float32 else "bf16"
        _check_settings(
            rows=rows, max_positions=max_positions, max_voice_positions=max_voice_positions, prefill=prefill,
            weights=weights, graphs=graphs, one_launch=one_launch, one_launch_share=one_launch_share,
            one_launch_spins=one_launch_spins, keep_model=keep_model,
        )  # fmt: skip
        limits = Limits(one_launch_share, one_launch_spins)
        _check_room(model, weights, rows, max_positions, max_voice_positions)
        self._limits, self._verdicts = limits, _launches(model, one_launch, weights, rows, limits)
        self.weights, self.capacity, self.prefill = weights, rows, min(prefill, max_positions)
        self.max_positions, self.max_voice_positions = max_positions, max_voice_positions
        self.config, self.tokenizer = model.config, model.tokenizer
        self.trained, self.provenance, self.origins = model.trained, model.provenance, model.origins
        self.register_buffer("speaker", model.speaker)
        parts = copy.deepcopy(list(model.named_children())) if keep_model else model.give_up()
        for name, part in parts:
            self.add_module(name, optimised(part, weights) if name in LANGUAGE else part)
        self.requires_grad_(False).eval()
        with torch.inference_mode(False):  # a state that may be written in either mode
            self._state = super().join(rows, max_positions, max_voice_positions).state
        self._seated: weakref.WeakValueDictionary[int, FastSeats] = weakref.WeakValueDictionary()
        self._thread = 0
        self._graphed: list[Graphed] = []
        if graphs == "auto" and self.device.type == "cuda":
            self._replay_with(CudaCapture)
        self._single = install(decoder_steps(self, self._state), self._verdicts, limits)
        self._graphed += [one.single for one in self._single if isinstance(one.single, Graphed)]
        # Kernels of another stream may hold what a single launch needs, and it what they need.
        self.overlaps = limits.overlap or not any(one.chosen for one in self._verdicts)

    @classmethod
    def from_pretrained(
        cls, preset_or_dir: str | Path = "nano", device: str | torch.device | None = None, **settings: Any
    ) -> FastMinMo:
        """From a preset or a checkpoint directory; device as of `minmo.load`, settings as of FastMinMo, errors of both.
        Settings are checked before anything is loaded."""
        _check_settings(**settings)
        return cls(load(preset_or_dir, device), **settings)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language parts' activations."""
        return activations(self.weights)

    def _replay_with(self, lane: Callable[[], Capture]) -> None:
        """Puts graphs in the place of the steady steps. What speaks has a lane of its own, to run beside the rest."""
        hearing, speaking = self._state.hearing, self._state.speaking
        hear, speak, rows = lane(), lane(), self.capacity
        frames, positions = self._mel_frames, (1, self.prefill)
        self._graphed = [
            replay(self.encoder, "_piece", hearing.encoder, hear, rows),
            replay(self.projector, "_piece", hearing.projector, hear, rows),
            replay(self.llm, "step", self._state.llm, hear, rows, lambda x, *_: x.shape[1] in positions),
            replay(self.duplex, "step", self._state.duplex, hear, rows, lambda x, *_: x.shape[1] == 1),
            replay(self.voice_decoder, "_round", speaking.decoder, speak, rows),
            replay(self.flow, "_chunk", speaking.flow, speak, rows),
            replay(self.vocoder, "_unit", speaking.vocoder, speak, rows),
            replay(self.vocoder, "_advance", speaking.vocoder, speak, rows, lambda mel, *_: mel.shape[1] in frames),
        ]

    def explain(self) -> str:
        """How decoders take their steps, and by which results file, or that there is none; what has given up."""
        if self.device.type != "cuda":
            return "decoders step by PyTorch's operations: this engine is on a CPU"
        lines = [str(one) for one in self._verdicts]
        if any(one.chosen for one in self._verdicts):
            beside = "beside one another" if self.overlaps else "one after the other"
            lines.append(
                f"one launch takes {self._limits.share:.0%} of the multiprocessors and gives up after "
                f"{self._limits.spins:,} looks at a barrier; text and speech are computed {beside}"
            )
        lines += [
            f"{one.name}: a launch has given up, so all go layer by layer now" for one in self._single if one.failed
        ]
        return "\n".join(lines)

    @property
    def _mel_frames(self) -> tuple[int, ...]:
        """Mel frames that the vocoder takes at once: the first chunk's, the others', half of these, and a last pass of
        its own."""
        c = self.config.flow
        return c.first_frames, 2 * c.chunk, c.chunk, self.vocoder.holdback

    def warmup(self) -> dict[str, float]:
        """Runs every step once for each bucket of rows, which compiles and captures: afterwards the first request is as
        fast as any other. -> seconds of each, by "step, rows". Raises ValueError while sessions sit in the engine, and
        where memory runs out.
        """
        took: dict[str, float] = {}
        try:
            for rows in sorted({bucket(b, self.capacity) for b in BUCKETS}):
                for name, seconds in self.rehearse(rows):
                    took[f"{name}, {rows} rows"] = seconds
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"memory ran out while {rows} rows warmed up ({str(error):.80}…): make the FastMinMo with fewer rows, "
                "a smaller max_positions or max_voice_positions, or smaller weights"
            ) from None
        for step in self._graphed:
            step.complete = True
        return took

    @torch.inference_mode()
    def rehearse(self, batch: int) -> Iterator[tuple[str, float]]:
        """A turn of `batch` sessions, step by step, with how long each took."""
        seats = self.join(batch, self.max_positions, self.max_voice_positions)
        try:
            state, rows, c = seats.state, seats.rows, self.config
            more, start = torch.zeros(batch, dtype=torch.bool, device=self.device), now(self.device)

            def took(name: str) -> tuple[str, float]:
                nonlocal start
                last, start = start, now(self.device)
                return name, start - last

            ids = torch.zeros(batch, self.prefill, dtype=torch.int64, device=self.device)
            some = torch.full_like(rows, min(self.prefill, max(0, self.max_positions - 2)))
            self.llm.step(self.llm.embed(ids), some, state.llm, rows)
            yield took("prefill")
            audio, one = torch.zeros(batch, TICK, device=self.device), torch.ones_like(rows)
            mel, counts, _ = self.frontend.step(audio, full_lengths(audio), state.hearing.frontend, rows, more)
            frames, counts, _ = self.encoder.step(mel.to(self.dtype), counts, state.hearing.encoder, rows, more)
            yield took("encoder")
            positions, counts, _ = self.projector.step(frames, counts, state.hearing.projector, rows, more)
            hidden, _, _ = self.llm.step(positions[:, :1], counts, state.llm, rows)
            self.duplex.step(hidden, counts, state.duplex, rows)
            yield took("listen")
            seeds, level = torch.zeros_like(ids[:, 0]), torch.ones(batch, device=self.device)
            x = self.llm.embed(ids[:, :1])
            hidden, _, _ = self.llm.step(x, one, state.llm, rows)
            mk.sample_token(
                self.llm.logits(hidden[:, 0]), all_rows(batch, self.device), seeds, seeds, level, one, level
            )
            yield took("text token")
            speaking = state.speaking
            self.flow.start(speaking.flow, rows, self.speaker.expand(batch, -1), seeds)
            self.vocoder.start(speaking.vocoder, rows, seeds)
            self.voice_decoder.start(speaking.decoder, rows, seeds)
            hidden, x = (v.expand(-1, c.voice_decoder.semantic_block, -1) for v in (hidden, x))
            yield took("start of a reply")
            self.voice_decoder.step((hidden, x), full_lengths(x), speaking.decoder, rows, more)
            yield took("speech block")
            tokens = torch.zeros(batch, c.voice_decoder.speech_block, dtype=torch.int32, device=self.device)
            mel, _, _ = self.flow.step(tokens, full_lengths(tokens), speaking.flow, rows, more)
            yield took("flow")
            first, other, half, _ = self._mel_frames
            for name, size, final in (
                ("first sound", first, more),
                ("half a block's sound", half, more),
                ("a block's sound", other, more),
                ("end of sound", 0, ~more),
            ):
                piece = mel[:, :size]
                self.vocoder.step(piece, full_lengths(piece), speaking.vocoder, rows, final)
                yield took(name)
        finally:
            seats.leave()

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
                    "with more, or give it less: a shorter text or sound, max_text_tokens, max_speech_ratio"
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
        self.check()
        return self._state

    def check(self) -> None:
        if self._engine is not None:
            self._engine.check_thread()

    def leave(self) -> None:
        self.check()
        if self._engine is not None:
            for row in self.rows.tolist():
                del self._engine._seated[row]
            self._engine = None


def _check_settings(
    *,
    rows: int = 1,
    max_positions: int = MAX_POSITIONS,
    max_voice_positions: int = MAX_VOICE_POSITIONS,
    prefill: int = PREFILL,
    weights: str | None = None,
    graphs: str = "auto",
    one_launch: str = "auto",
    one_launch_share: float = 1.0,
    one_launch_spins: int = SPINS,
    keep_model: bool = False,
) -> None:
    """Raises ValueError for a setting of FastMinMo that cannot be."""
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if graphs not in GRAPHS:
        raise ValueError(f"graphs must be one of {', '.join(GRAPHS)}, got {graphs!r}")
    if one_launch not in ONE_LAUNCH:
        raise ValueError(f"one_launch must be one of {', '.join(ONE_LAUNCH)}, got {one_launch!r}")
    if not is_real(one_launch_share) or not 0 < one_launch_share <= 1:
        raise ValueError(f"one_launch_share must be a number above 0 and up to 1, got {one_launch_share!r}")
    if not isinstance(keep_model, bool):
        raise ValueError(f"keep_model must be True or False, got {keep_model!r}")
    for name, size, most in (
        ("rows", rows, MOST_ROWS),
        ("max_positions", max_positions, MOST_POSITIONS),
        ("max_voice_positions", max_voice_positions, MOST_POSITIONS),
        ("prefill", prefill, MOST_POSITIONS),
        ("one_launch_spins", one_launch_spins, MOST_SPINS),
    ):
        if not is_whole(size) or not 1 <= size <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {size!r}")


def _check_room(model: MinMo, weights: str, rows: int, max_positions: int, max_voice_positions: int) -> None:
    """Raises ValueError, before a weight is touched, where the state would not fit in the memory that is free."""
    planned = shapes(model.config)
    for name in LANGUAGE:
        getattr(planned, name).to(activations(weights))
    needed, free = planned.initial_state(rows, max_positions, max_voice_positions).nbytes, free_memory(model.device)
    if needed > free:
        raise ValueError(
            f"the state of {rows} rows, {max_positions} positions and {max_voice_positions} of speech takes "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: lower rows, max_positions or max_voice_positions"
        )


def _launches(model: MinMo, one_launch: str, weights: str, rows: int, limits: Limits) -> list[Verdict]:
    """Which steps of a model are to be single launches, before a weight is touched; none on a CPU. Errors of `plan`."""
    if model.device.type != "cuda":
        if one_launch == "on":
            raise ValueError('one_launch "on" needs a GPU: on a CPU leave it at "auto"')
        return []
    major, minor = torch.cuda.get_device_capability(model.device)
    gpu = torch.cuda.get_device_name(model.device)
    return plan(planned(model.config, weights), one_launch, gpu, 10 * major + minor, weights, rows, limits)


def planned(config: MinMoConfig, weights: str) -> tuple[Step, ...]:
    """The steps that decode, of an engine on the meta device."""
    model = shapes(config)
    for name in LANGUAGE:
        optimised(getattr(model, name), weights)
    return decoder_steps(model, model.initial_state(1, 1, 1))


def free_memory(device: torch.device) -> int:
    """Bytes that may be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62


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
