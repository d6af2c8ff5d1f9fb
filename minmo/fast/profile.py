"""`minmo profile`: how long each step of the engine takes, beside what the memory's bandwidth allows.

A step runs on parts with random weights of a preset's sizes (a step's time does not depend on what weights say), at a
fixed context, over and over. Bytes are what a step must read once: its weights, and the keys and values in its context.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.clock import now, percentile
from minmo.config import TICK, MinMoConfig
from minmo.fast.engine import LANGUAGE, free_memory, optimised
from minmo.fast.graphs import CudaCapture, replay
from minmo.fast.linear import activations
from minmo.model import PREFILL, MinMo, shapes
from minmo.modules.backbone import Backbone, BackboneState
from minmo.state import State, all_rows, full_lengths
from minmo_kernels.testing import timing

WARMUP, FEWEST = 5, 10
"""Calls before those that are counted, the very first of which is reported by itself; calls that are counted at least.
"""


@dataclass(frozen=True)
class Step:
    """Something that the engine does over and over. units: tokens that a call gives, by which its time is divided."""

    parts: tuple[str, ...]
    unit: str
    units: int
    prepare: Callable[[MinMo, int, int], Callable[[], object]]
    """(model, rows, context) -> one call of the step."""
    moves: Callable[[MinMo, int, int], int]
    """(model, rows, context) -> bytes that a call must read."""


@dataclass(frozen=True)
class Measured:
    """One line of the table; seconds are of one unit."""

    step: str
    unit: str
    rows: int
    context: int
    weights: str
    backend: str
    first: float
    p50: float
    p95: float
    p99: float
    bytes: float
    bandwidth: float
    """Bytes a second of a plain copy in the same run."""
    energy: float | None = None
    """Joules a unit."""
    clocks: Mapping[str, Any] | None = None

    @property
    def floor(self) -> float:
        """Seconds that reading the bytes takes."""
        return self.bytes / self.bandwidth

    @property
    def rate(self) -> float:
        """Units a second of all rows together."""
        return self.rows / self.p50


def profile(
    config: MinMoConfig,
    steps: Sequence[str],
    *,
    weights: str,
    contexts: Sequence[int],
    rows: Sequence[int],
    tokens: int,
    device: torch.device,
    backend: str | None = None,
) -> Iterator[Measured | str]:
    """Measures each step in each context and for each number of rows; yields lines, or why there is none."""
    bandwidth = copy_bandwidth(device)
    load = timing.load_of(device) if device.type == "cuda" else dict
    energy = energy_counter(device)
    for name in steps:
        step = STEPS[name]
        needs, free = sum(stored_bytes(config, part, weights) for part in step.parts), free_memory(device)
        if needs > free:
            yield f"{name}: its {weights} weights take {needs / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
            continue
        model = random_model(config, step.parts, weights, device)
        for context in contexts if "llm" in step.parts or "voice_decoder" in step.parts else contexts[:1]:
            for batch in rows:
                with torch.inference_mode(), mk.use_backend(backend) if backend else nullcontext():
                    try:
                        with torch.inference_mode(False), torch.no_grad():  # states that may be written in either mode
                            call = step.prepare(model, batch, context)
                        times, joules = _times(call, -(-tokens // step.units), device, energy)
                    except (RuntimeError, MemoryError) as error:  # of memory, of a backend that does not serve
                        yield f"{name}, {batch} rows, context {context}: {str(error):.100}"
                        continue
                    first, *rest = [seconds / step.units for seconds in times]
                    p50, p95, p99 = (percentile(rest, p) for p in (50, 95, 99))
                    yield Measured(
                        name, step.unit, batch, context, weights, backend or "auto", first, p50, p95, p99,
                        bytes=step.moves(model, batch, context) / step.units, bandwidth=bandwidth,
                        energy=None if joules is None else joules / len(rest) / step.units, clocks=load() or None,
                    )  # fmt: skip
        del model


def _times(
    call: Callable[[], object], count: int, device: torch.device, energy: Callable[[], float] | None
) -> tuple[list[float], float | None]:
    """Seconds of the first call and of `count` after the warm-up, and the joules of these."""
    times = []
    for i in range(1 + WARMUP + max(FEWEST, count)):
        if i == 1 + WARMUP and energy is not None:
            began = energy()
        start = now(device)
        call()
        times.append(now(device) - start)
    return [times[0], *times[1 + WARMUP :]], None if energy is None else energy() - began


def random_model(config: MinMoConfig, parts: Iterable[str], weights: str, device: torch.device) -> MinMo:
    """A model of which only some parts hold weights, random ones in a format; built layer by layer, so that nothing is
    held in full precision. The other parts stay shapes."""
    model = shapes(config)
    for name in parts:
        if name in LANGUAGE:
            give = partial(filled, dtype=activations(weights), device=device)
            part = optimised(getattr(model, name), weights, give)
        else:
            part = type(getattr(model, name))(getattr(config, name)).to(device).requires_grad_(False)
        setattr(model, name, part.eval())
    model.speaker = torch.randn(config.flow.speaker_dim, device=device)
    return model


def filled(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Gives every parameter that is only a shape random numbers (a block of them, repeated), in place."""
    block = torch.randn(1 << 20, device=device)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                numbers = (block * (parameter.numel() // parameter.shape[0]) ** -0.5).to(dtype)
                for piece in value.view(-1).split(len(block)):  # in place: fresh memory is slow to come by
                    piece.copy_(numbers[: len(piece)])
            else:
                value.fill_(name == "weight")
            setattr(part, name, nn.Parameter(value, requires_grad=False))


def stored_bytes(config: MinMoConfig, part: str, weights: str) -> int:
    """Bytes of a part's weights in a format, embeddings in full; an upper bound."""
    module = getattr(shapes(config), part)
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 5}[weights] if part in LANGUAGE else 32
    wide = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding))
    narrow = sum(p.numel() for p in module.parameters())
    return int(narrow * bits // 8 + wide * activations(weights).itemsize)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of everything that modules hold, packed weights included, but tables of which a step reads a row."""
    total = 0
    for module in modules:
        for part in module.modules():
            if not isinstance(part, nn.Embedding):
                held = [*vars(part).values(), *part._parameters.values(), *part._buffers.values()]
                total += sum(_size(t) for t in held if isinstance(t, Tensor))
    return total


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor, oneDNN's included, which have no storage to ask."""
    return tensor.numel() * tensor.element_size()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy reads and writes, both counted."""
    if device.type == "cuda":
        return timing.copy_bandwidth(device)
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    target = torch.zeros_like(source)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / percentile(times, 50)


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules that the GPU has used so far; None where nobody counts."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def _context(backbone: Backbone, rows: int, context: int, room: int) -> BackboneState:
    """A state of which every row holds `context` positions, with `room` for more."""
    state = backbone.initial_state(rows, context + room)
    for cache in state.layers:
        cache.k.normal_()
        cache.v.normal_()
    state.lengths.fill_(context)
    return state


def _cache_bytes(backbone: Backbone, rows: int, context: int) -> int:
    """Keys and values of a context."""
    c = backbone.config
    return rows * context * c.layers * 2 * c.kv_heads * c.head_dim * backbone.norm.weight.element_size()


def _sampler(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """Draws a token an entry, with the settings of a conversation."""
    rows, device = len(logits), logits.device
    entries, ones = all_rows(rows, device), torch.ones(rows, device=device)
    long = torch.zeros(rows, dtype=torch.int64, device=device)
    return lambda x: mk.sample_token(x, entries, long, long, ones, 25 * torch.ones_like(entries), 0.8 * ones)


def _replayed(part: nn.Module, method: str, state: State, rows: int) -> None:
    """On a GPU a part's method is replayed as a graph, as in the engine."""
    if next(part.parameters()).is_cuda:
        replay(part, method, state, CudaCapture(), rows)


def _llm(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    llm, device = model.llm, model.llm.norm.weight.device
    state, entries = _context(llm, rows, context, 1), all_rows(rows, device)
    _replayed(llm, "step", state, rows)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    one = torch.ones_like(entries)
    draw = _sampler(llm.logits(llm.embed(ids))[:, 0])

    def call() -> Tensor:
        state.lengths.fill_(context)
        hidden, _, _ = llm.step(llm.embedding(ids), one, state, entries)  # type: ignore[misc]
        return draw(llm.logits(hidden)[:, 0])

    return call


def _prefill(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    llm = model.llm
    state, entries = _context(llm, rows, context, PREFILL), all_rows(rows, llm.norm.weight.device)
    _replayed(llm, "step", state, rows)
    x = llm.norm.weight.new_ones(rows, PREFILL, llm.config.dim)
    counts = full_lengths(x)

    def call() -> object:
        state.lengths.fill_(context)
        return llm.step(x, counts, state, entries)

    return call


def _voice_lm(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    decoder = model.voice_decoder
    device = decoder.lm.norm.weight.device
    state, entries = _context(decoder.lm, rows, context, 1), all_rows(rows, device)
    _replayed(decoder.lm, "step", state, rows)
    token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    one = torch.ones_like(entries)
    draw = _sampler(decoder.head(decoder.speech_embedding(token))[:, 0])

    def call() -> Tensor:
        state.lengths.fill_(context)
        hidden, _, _ = decoder.lm.step(decoder.speech_embedding(token), one, state, entries)
        return draw(decoder.head(hidden[:, 0]))

    return call


def _speech_block(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    decoder = model.voice_decoder
    c, device = decoder.config, decoder.lm.norm.weight.device
    state = decoder.initial_state(rows, context + 2 * (c.semantic_block + c.speech_block))
    state.lm = _context(decoder.lm, rows, context, 2 * (c.semantic_block + c.speech_block))
    entries = all_rows(rows, device)
    x = decoder.lm.norm.weight.new_ones(rows, c.semantic_block, c.llm_dim)
    counts, seeds = full_lengths(x), torch.zeros(rows, dtype=torch.int64, device=device)
    open_ended = torch.zeros(rows, dtype=torch.bool, device=device)

    decoder.start(state, entries, seeds)
    state.query.fill_(context - 1)  # a long query has been given
    _replayed(decoder, "_round", state, rows)

    def call() -> object:
        for number in (state.text, state.speech):
            number.zero_()
        state.lm.lengths.fill_(context)
        return decoder.step((x, x), counts, state, entries, open_ended)

    return call


def _encoder(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    frontend, encoder, device = model.frontend, model.encoder, model.encoder.conv1.weight.device
    dtype = encoder.conv1.weight.dtype
    heard, states = frontend.initial_state(rows, like=torch.zeros(1, device=device)), encoder.initial_state(rows)
    _replayed(encoder, "_piece", states, rows)
    audio, entries = 0.1 * torch.randn(rows, TICK, device=device), all_rows(rows, device)
    counts, more = full_lengths(audio), torch.zeros(rows, dtype=torch.bool, device=device)

    def call() -> object:
        mel, lengths, _ = frontend.step(audio, counts, heard, entries, more)
        return encoder.step(mel.to(dtype), lengths, states, entries, more)

    return call


def _listen(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    projector, llm, duplex = model.projector, model.llm, model.duplex
    device = llm.norm.weight.device
    waiting, decided = projector.initial_state(rows), duplex.initial_state(rows)
    state, entries = _context(llm, rows, context, 1), all_rows(rows, device)
    for part, method, own in ((projector, "_piece", waiting), (llm, "step", state), (duplex, "step", decided)):
        _replayed(part, method, own, rows)
    frames = llm.norm.weight.new_ones(rows, 2, model.config.projector.input_dim)
    counts, more = full_lengths(frames), torch.zeros(rows, dtype=torch.bool, device=device)

    def call() -> object:
        state.lengths.fill_(context)
        positions, lengths, _ = projector.step(frames, counts, waiting, entries, more)
        hidden, _, _ = llm.step(positions[:, :1], lengths, state, entries)
        return duplex.step(hidden, lengths, decided, entries)

    return call


def _flow(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    flow, c, device = model.flow, model.config.flow, model.speaker.device
    entries, seeds = all_rows(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
    state = flow.start(flow.initial_state(rows), entries, model.speaker.expand(rows, -1), seeds)
    _replayed(flow, "_chunk", state, rows)
    tokens = torch.zeros(rows, c.chunk, dtype=torch.int64, device=device)
    counts, more = full_lengths(tokens), torch.zeros(rows, dtype=torch.bool, device=device)
    return lambda: flow.step(tokens, counts, state, entries, more)


def _vocoder(model: MinMo, rows: int, context: int) -> Callable[[], object]:
    vocoder, c, device = model.vocoder, model.config, model.speaker.device
    entries, seeds = all_rows(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
    state = vocoder.start(vocoder.initial_state(rows), entries, seeds)
    _replayed(vocoder, "_advance" if c.vocoder.streaming == "exact" else "_unit", state, rows)
    mel = torch.zeros(rows, 2 * c.flow.chunk, c.vocoder.n_mels, device=device)
    counts, more = full_lengths(mel), torch.zeros(rows, dtype=torch.bool, device=device)
    return lambda: vocoder.step(mel, counts, state, entries, more)


def _llm_bytes(model: MinMo, rows: int, context: int) -> int:
    return weight_bytes(model.llm) + _cache_bytes(model.llm, rows, context)


def _layers_bytes(model: MinMo, rows: int, context: int) -> int:
    return weight_bytes(model.llm.layers) + _cache_bytes(model.llm, rows, context)


def _voice_bytes(model: MinMo, rows: int, context: int) -> int:
    decoder = model.voice_decoder
    return weight_bytes(decoder.lm, decoder.head) + _cache_bytes(decoder.lm, rows, context)


def _block_bytes(model: MinMo, rows: int, context: int) -> int:
    decoder = model.voice_decoder
    return weight_bytes(decoder.output_projector) + decoder.config.speech_block * _voice_bytes(model, rows, context)


STEPS: dict[str, Step] = {
    "llm": Step(("llm",), "text token", 1, _llm, _llm_bytes),
    "voice_lm": Step(("voice_decoder",), "speech token", 1, _voice_lm, _voice_bytes),
    "speech_block": Step(("voice_decoder",), "speech token (of 15)", 15, _speech_block, _block_bytes),
    "encoder": Step(
        ("frontend", "encoder"), "80 ms heard", 1, _encoder, lambda m, rows, _: weight_bytes(m.frontend, m.encoder)
    ),
    "listen": Step(
        ("projector", "llm", "duplex"), "80 ms heard", 1, _listen,
        lambda m, rows, context: weight_bytes(m.projector, m.duplex) + _layers_bytes(m, rows, context),
    ),
    "prefill": Step(("llm",), f"{PREFILL} positions", 1, _prefill, _layers_bytes),
    "flow": Step(
        ("flow",), "15 speech tokens", 1, _flow,
        lambda m, rows, _: weight_bytes(m.flow) + (m.config.flow.steps - 1) * weight_bytes(m.flow.estimator),
    ),
    "vocoder": Step(("vocoder",), "30 mel frames", 1, _vocoder, lambda m, rows, _: weight_bytes(m.vocoder)),
}  # fmt: skip
"""Every step of a conversation, by name."""


def as_json(lines: Iterable[Measured], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, with what it was measured on."""
    return {"machine": dict(machine), "steps": [{**asdict(m), "floor": m.floor} for m in lines]}


def figures() -> Any:
    """matplotlib's module of figures. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'minmo[bench]'") from None


def plot(lines: Sequence[Measured], title: str, folder: Path) -> list[Path]:
    """PNGs: each step's latency against the context (fewest rows) and the rows (shortest context), floors dashed."""
    written = []
    for axis, other in (("context", "rows"), ("rows", "context")):
        fixed = {m.step: min(getattr(o, other) for o in lines if o.step == m.step) for m in lines}
        shown = [m for m in lines if getattr(m, other) == fixed[m.step]]
        if len({getattr(m, axis) for m in shown}) < 2:
            continue
        figure = figures().Figure(figsize=(9, 6), layout="constrained")
        axes = figure.subplots()
        for name, weights in dict.fromkeys((m.step, m.weights) for m in shown):
            own = sorted((m for m in shown if (m.step, m.weights) == (name, weights)), key=lambda m: getattr(m, axis))
            at = [getattr(m, axis) for m in own]
            (line,) = axes.plot(at, [1e3 * m.p50 for m in own], "o-", label=f"{name}, {weights}: {own[0].unit}")
            axes.plot(at, [1e3 * m.floor for m in own], "--", color=line.get_color(), linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms, median (dashed: what the memory allows)")
        ticks = sorted({getattr(m, axis) for m in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{title}\n{other}: the fewest, {min(fixed.values())}", fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        path = folder / f"latency_by_{axis}.png"
        figure.savefig(path, dpi=130)
        written.append(path)
    return written
