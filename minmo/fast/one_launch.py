"""A decoder's step as one launch (`minmo_kernels.decoder_step`), in the place of its layers' launches.

A decoder's weights are stacked once, layers' own parameters becoming views, so that both ways of computing a step share
one memory. Where a launch says that a barrier was waited for in vain, its results are discarded, the numbers of the
state restored, and the step is done layer by layer, from then on always.

The LLM's head and its choice of a token stay launches of their own, a token at a time: the voice decoder needs the
state before every token of a block, of which a launch of several tokens gives the last; the first token is to be heard
of before the fifth is drawn; and a teacher's text takes the place of what would be drawn.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minmo_kernels as mk
from minmo.fast.graphs import BUCKETS, Graphed
from minmo.fast.layer import MOST_FUSED_ROWS, GPULayer
from minmo.fast.linear import KernelLinear
from minmo.model import MinMo, MinMoState
from minmo.modules.backbone import Backbone
from minmo.modules.duplex import DuplexPredictor
from minmo.modules.voice_decoder import SPEECH_STREAM, Speech, VoiceDecoder
from minmo.state import KVCache, State, advanced, nobody, unlooking, write_rows
from minmo_kernels import launch
from minmo_kernels.dispatch import as_usual
from minmo_kernels.ops.decoder_step import BROKEN, SPINS, new_sync
from minmo_kernels.ops.decoder_step.grid import misfit_of
from minmo_kernels.tuning import bucket_of

log = logging.getLogger(__name__)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""Where a checkout keeps what was measured."""
ONE_LAUNCH = ("auto", "on", "off")
PROJECTIONS = {"qkv": "qkv", "out": "o", "gate_up": "gate_up", "down": "down"}
"""Names of `decoder_step`, and of a DecoderLayer's parts."""
NEVER = 1 << 62


@dataclass(frozen=True)
class Limits:
    """Of every single launch. share: of the GPU's multiprocessors, above 0 up to 1; spins: looks at a barrier, about a
    microsecond each, after which a launch gives up."""

    share: float = 1.0
    spins: int = SPINS

    @property
    def overlap(self) -> bool:
        """Whether two launches are on the GPU at once, as where text is written while the block before it is spoken.
        Launches that are not would hold a part of the multiprocessors each and wait for the rest."""
        return self.share <= 0.5


DEFAULT = Limits()


@dataclass(frozen=True)
class Verdict:
    """Whether steps of a part, weights and bucket of rows are single launches, and why."""

    part: str
    rows: int
    chosen: bool
    reason: str

    def __str__(self) -> str:
        way = "one launch" if self.chosen else "layer by layer"
        return f"{self.part}, {self.rows} rows: {way}, {self.reason}"


def sizes(part: Any) -> Any:
    """What a results file's line holds for: the configuration of a part that decodes, as JSON gives it back."""
    return json.loads(json.dumps(asdict(part.config)))


def verdict(
    gpu: str, name: str, part: nn.Module, rows: int, weights: str, share: float, folder: Path | None = None
) -> Verdict:
    """What the results file of a GPU says: one launch where it was measured right and faster there, with a decoder of
    these sizes and this share of the multiprocessors."""
    folder = RESULTS if folder is None else folder
    path = folder / f"{gpu.lower().replace(' ', '-')}-one-launch.json"
    if not path.is_file():
        return Verdict(name, rows, False, f"there is no {path.name} in {folder} (make gpu STAGE=steps)")
    found = json.loads(path.read_text()).get(f"{name} {weights} {rows}")
    if found is None:
        return Verdict(name, rows, False, f"{path.name} has no line for it with {weights} weights")
    if found["wrong"] or found["faults"]:
        return Verdict(name, rows, False, f"{path.name}: {found['wrong']} wrong, {found['faults']} faults")
    if found["sizes"] != sizes(part) or found["share"] != share:
        return Verdict(name, rows, False, f"{path.name} has it of other sizes, or of another share of the GPU")
    gain = found["layers"] / found["seconds"]
    return Verdict(name, rows, gain > 1, f"{path.name}: {gain:.2f} times as fast in {found['replays']} replays")


class Stack:
    """The weights of a decoder's layers, as `decoder_step` takes them."""

    def __init__(self, modules: Sequence[nn.Module], limits: Limits = DEFAULT) -> None:
        layers = [layer for layer in modules if isinstance(layer, GPULayer)]
        if len(layers) < len(modules):
            raise ValueError("one launch a step needs a GPU: on a CPU a layer's operations are PyTorch's")
        for name in PROJECTIONS.values():
            for layer in layers:
                if getattr(getattr(layer, name), "zero", None) is not None:
                    raise ValueError("one launch a step takes bf16 and int8 weights, not int4: choose other weights")
        c = layers[0].config
        self.weights: dict[str, Any] = {
            "input_norm": _stacked([layer.input_norm for layer in layers], "weight"),
            "post_norm": _stacked([layer.post_norm for layer in layers], "weight"),
            "qkv_bias": _stacked([layer.qkv for layer in layers], "bias"),
        }
        for label, name in PROJECTIONS.items():
            linears = [getattr(layer, name) for layer in layers]
            self.weights[label] = _stacked(linears, "weight")
            if isinstance(linears[0], KernelLinear):
                self.weights[f"{label}_scale"] = _stacked(linears, "scale")
        self.weights |= {
            "heads": c.heads, "kv_heads": c.kv_heads, "eps": c.norm_eps, "rope_theta": c.rope_theta, **asdict(limits)
        }  # fmt: skip
        self.sync = new_sync(self.weights["input_norm"].device)
        self.on = False
        """Whether steps are single launches now."""

    def step(self, x: Tensor, cache: KVCache, rows: Tensor, lengths: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """`mk.decoder_step` on a cache (layers, ...) -> hidden, tokens."""
        return mk.decoder_step(
            x, k_cache=cache.k, v_cache=cache.v, rows=rows, lengths=lengths, sync=self.sync, **self.weights, **more
        )


def _stacked(modules: Sequence[nn.Module], name: str) -> Tensor:
    """One tensor (layers, ...) of an attribute of each, which then are views of it: for a while that attribute alone is
    held twice."""
    first = getattr(modules[0], name)
    whole = torch.empty((len(modules), *first.shape), dtype=first.dtype, device=first.device)
    for own, module in zip(whole, modules, strict=True):
        value = getattr(module, name)
        own.copy_(value.detach())
        setattr(module, name, nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own)
    return whole


class OneLaunch:
    """A step of a part, one launch where it may be: not where a backend is forced or error words are kept, which is
    asked of a layer's operations.

    stack: of the part's layers. single, layered: the step with the stack on and off, graphed or not; signature: theirs.
    state: the step's own. chooses: rows of a call -> whether they go in one launch. fits: as of `graphs.Graphed`.
    """

    def __init__(
        self,
        name: str,
        stack: Stack,
        single: Callable[..., Any],
        layered: Callable[..., Any],
        signature: inspect.Signature,
        state: State,
        chooses: Callable[[int], bool],
        fits: Callable[..., bool],
    ) -> None:
        self.name, self.single, self.layered, self.chooses = name, single, layered, chooses
        self._stack, self._signature, self._fits, self._state = stack, signature, fits, state
        self._numbers = list(_numbers(state))
        with torch.inference_mode(False):
            self._kept = [torch.empty_like(number) for number in self._numbers]
        self.failed = False
        """Whether a launch has given up, after which there is none any more."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        bound = self._signature.bind(*positional, **named)
        rows, arguments = bound.arguments["rows"], bound.args
        own = any(a is self._state for a in arguments) and as_usual()
        if self.failed or not own or not self._fits(*arguments) or not self.chooses(len(rows)):
            return self.layered(*arguments)
        for kept, number in zip(self._kept, self._numbers, strict=True):
            kept.copy_(number)
        with _on(self._stack):
            outputs = self.single(*arguments)
        if not (fault := int(self._stack.sync[2])):
            return outputs
        for kept, number in zip(self._kept, self._numbers, strict=True):
            number.copy_(kept)
        self._stack.sync.zero_()
        self.failed = True
        log.error(
            "%s: a block of the single launch waited in vain at instruction %d; its step is done again layer by layer,"
            " as all that follow are",
            self.name, fault - 1,
        )  # fmt: skip
        return self.layered(*arguments)


@contextlib.contextmanager
def _on(stack: Stack) -> Iterator[None]:
    stack.on = True
    try:
        yield
    finally:
        stack.on = False


def _numbers(state: State) -> Iterator[Tensor]:
    """The tensors of a state but its caches, of which nothing beyond a length is ever read."""
    for part in state._parts():
        if isinstance(part, Tensor):
            yield part
        elif not isinstance(part, KVCache):
            yield from _numbers(part)


def one_position(x: Tensor, *_: Any) -> bool:
    """Whether a call of a backbone's or the predictor's `step` is of single positions."""
    return x.shape[1] == 1


def always(*_: Any) -> bool:
    return True


def in_backbone(backbone: Backbone, limits: Limits = DEFAULT) -> Stack:
    """Puts single launches in a Backbone's place for its layers and last norm, where its stack is on."""
    stack, layers = Stack(list(backbone.layers), limits), backbone._through

    def through(x: Tensor, lengths: Tensor, state: Any, rows: Tensor, ends: Tensor) -> Tensor:
        if not stack.on or x.shape[1] != 1 or len(x) > MOST_FUSED_ROWS:
            return layers(x, lengths, state, rows, ends)
        hidden, _ = stack.step(
            x[:, 0], state.cache, rows, state.lengths, final_norm=backbone.norm.weight
        )  # fmt: skip
        return hidden[:, None]

    object.__setattr__(backbone, "_through", through)
    return stack


def in_predictor(duplex: DuplexPredictor, limits: Limits = DEFAULT) -> Stack:
    """Puts a single launch in the place of the predictor's layer, where its stack is on."""
    stack, layer, window = Stack([duplex.layer], limits), duplex._through, duplex.config.window

    def through(x: Tensor, counts: Tensor, state: Any, rows: Tensor, ends: Tensor) -> Tensor:
        if not stack.on or x.shape[1] != 1 or len(x) > MOST_FUSED_ROWS:
            return layer(x, counts, state, rows, ends)
        cache = KVCache(state.cache.k[None], state.cache.v[None])
        return stack.step(x[:, 0], cache, rows, state.lengths, window=window, ring=True)[0][:, None]

    object.__setattr__(duplex, "_through", through)
    return stack


def in_voice_decoder(decoder: VoiceDecoder, limits: Limits = DEFAULT) -> Stack:
    """Puts one launch in the place of all tokens of a block after the first, where its stack is on."""
    stack, loop, c = Stack(list(decoder.lm.layers), limits), decoder._speak, decoder.config
    device = stack.sync.device
    others = [id for id in range(c.codes, c.vocab) if id != c.end_of_speech]
    banned = torch.tensor([others] * MOST_FUSED_ROWS, dtype=torch.int32, device=device)
    packed: nn.Module = decoder.head
    head: dict[str, Any] = {"head": packed.weight, "head_bias": packed.bias}
    if isinstance(packed, KernelLinear):
        head["head_scale"] = packed.scale

    def speak(last: Tensor, chooser: Any, speech: Speech, state: Any, rows: Tensor, teacher: Any) -> None:
        if not stack.on or teacher is not None or len(rows) > MOST_FUSED_ROWS or nobody(speech.talks):
            loop(last, chooser, speech, state, rows, teacher)
            return
        token, broken = chooser.choose(last[:, 0], speech.talks, speech.spoken, speech.recent)
        speech.take(token, broken, c.end_of_speech)
        # The launch reads each session's numbers, so what the first token has changed goes there.
        write_rows(state.speech, rows, speech.spoken)
        write_rows(state.recent, rows, speech.recent)
        rows = torch.where(speech.talks, rows, -1).to(torch.int32)
        inputs = decoder.speech_embedding(speech.recent[:, -1].clamp(min=0).long())
        _, tokens = stack.step(
            inputs, state.lm.cache, rows, state.lm.lengths, final_norm=decoder.lm.norm.weight, **head,
            embedding=decoder.speech_embedding.weight, seeds=state.seeds, positions=state.speech,
            temperature=state.temperature, top_k=state.top_k, top_p=state.top_p, history=state.recent,
            banned=banned[: len(rows)], least=torch.where(chooser.turned, chooser.least.ceil().long(), NEVER),
            most=torch.where(chooser.turned, chooser.most, NEVER), end=c.end_of_speech, stream=SPEECH_STREAM,
            repetition_limit=c.repetition_limit, steps=c.speech_block - 1,
        )  # fmt: skip
        fed = (tokens != -1).sum(dim=1).to(torch.int32)
        state.lm.lengths.copy_(advanced(state.lm.lengths, rows, fed))
        speech.take_all(tokens, BROKEN, c.end_of_speech)

    object.__setattr__(decoder, "_speak", speak)
    return stack


@dataclass(frozen=True)
class Step:
    """A step of a part that decodes. build: puts single launches in its place. example: arguments of the step for so
    many rows."""

    name: str
    part: nn.Module
    method: str
    state: State
    build: Callable[[Any, Limits], Stack]
    fits: Callable[..., bool]
    example: Callable[[int], tuple[Any, ...]]


def decoder_steps(model: MinMo, state: MinMoState) -> tuple[Step, ...]:
    """Those of a model: the LLM's positions, the voice token LM's blocks, the full-duplex predictor's decisions."""
    voice, c, kind = state.speaking.decoder, model.config.voice_decoder, model.llm.norm.weight.dtype

    def ones(rows: int, *more: int, dtype: torch.dtype) -> Tensor:
        return torch.ones((rows, *more), dtype=dtype, device=model.device)

    def one_each(part: State, dim: int) -> Callable[[int], tuple[Any, ...]]:
        def example(rows: int) -> tuple[Any, ...]:
            x, count = ones(rows, 1, dim, dtype=kind), ones(rows, dtype=torch.int32)
            return x, count, part, count

        return example

    def block(rows: int) -> tuple[Any, ...]:
        vectors = ones(rows, c.semantic_block, 2 * c.llm_dim, dtype=kind)
        count = ones(rows, dtype=torch.int32)
        return vectors, count, ones(rows, dtype=torch.bool), voice, count, None

    llm, duplex = one_each(state.llm, model.config.llm.dim), one_each(state.duplex, model.config.duplex.input_dim)
    return (
        Step("LLM", model.llm, "step", state.llm, in_backbone, one_position, llm),
        Step("speech block", model.voice_decoder, "_round", voice, in_voice_decoder, always, block),
        Step("predictor", model.duplex, "step", state.duplex, in_predictor, one_position, duplex),
    )


def plan(
    steps: Sequence[Step], wanted: str, gpu: str, sm: int, weights: str, rows: int, limits: Limits
) -> list[Verdict]:
    """Which steps are to be single launches, by bucket of up to `rows` rows: all ("on"), none ("off"), or what a
    results file of `gpu`, of compute capability `sm`, has shown ("auto").

    steps: of shapes alone, on the meta device, so that nothing is taken from a model before it is known. Compiles the
    kernels of those that are wanted. Raises ValueError where one that must be ("on") cannot be.
    """
    verdicts = []
    for step in steps:
        stack: Stack | None = None
        for bucket in (b for b in BUCKETS if b <= min(bucket_of(rows), MOST_FUSED_ROWS)):
            one = Verdict(step.name, bucket, wanted == "on", f'one_launch is "{wanted}"')
            if wanted == "auto":
                one = verdict(gpu, step.name, step.part, bucket, weights, limits.share)
            if one.chosen:
                stack = stack or step.build(step.part, limits)
                if (reason := refusal(step, stack, bucket, sm, limits.share)) is not None:
                    if wanted == "on":
                        raise ValueError(f"the {step.name} cannot be one launch a step: {reason}")
                    one = Verdict(step.name, bucket, False, f"which cannot be: {reason}")
            verdicts.append(one)
    return verdicts


def refusal(step: Step, stack: Stack, rows: int, sm: int, share: float) -> str | None:
    """Why a step of so many rows cannot be one launch on the current GPU, of capability `sm`; None where it can.
    Compiles what the step, whose part is on the meta device, would launch."""
    try:
        with launch.recording(sm) as records, mk.use_backend("triton"), unlooking(), torch.no_grad(), _on(stack):
            getattr(step.part, step.method)(*step.example(rows))
    except mk.dispatch.BackendError as error:
        return str(error)
    (record,) = (record for record in records if record.name == "decoder_step")
    return misfit_of(record, sm, share)


def install(steps: Sequence[Step], verdicts: Sequence[Verdict], limits: Limits) -> list[OneLaunch]:
    """Makes single launches of the steps and rows that a plan has chosen, graphed where the step is."""
    made = []
    for step in steps:
        chosen = frozenset(one.rows for one in verdicts if one.part == step.name and one.chosen)
        if chosen:
            made.append(put(step, step.build(step.part, limits), chosen))
    return made


def put(step: Step, stack: Stack, chosen: frozenset[int]) -> OneLaunch:
    """Puts single launches for these buckets of rows in the place of a part's step."""
    layered = getattr(step.part, step.method)
    single = layered.twin() if isinstance(layered, Graphed) else layered
    signature = inspect.signature(getattr(type(step.part), step.method).__get__(step.part))
    one = OneLaunch(
        step.name, stack, single, layered, signature, step.state, lambda rows: bucket_of(rows) in chosen, step.fits
    )
    object.__setattr__(step.part, step.method, one)
    return one
