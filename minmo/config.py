"""Typed configurations: every size of a MinMo is data, read from a preset or a checkpoint's `config.json`.

One dataclass a box of the paper's Figure 1. A preset (`minmo/presets/*.json`) is one `MinMoConfig` written as JSON;
unknown or missing keys are errors, so a misspelt field never passes silently.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

SAMPLE_RATE = 16_000
"""Rate of the sound that MinMo hears, in Hz."""
TICK = 1280
"""Samples of it in one tick of 80 ms: 8 mel frames, 2 encoder frames, 1 LLM position."""

# What a field of a config.json may hold.
_MAY_BE_ZERO = (
    "vocab",
    "end_of_speech",
    "fill",
    "start_marker",
    "turn_of_speech_marker",
    "fast_holdback",
    "remembered",
)
_LAYERS = ("blocks", "layers", "up_blocks", "estimator_mid_blocks", "estimator_transformers", "steps", "harmonics")
_MOST_LAYERS, _MOST = 256, 1 << 18


@dataclass(frozen=True)
class FrontendConfig:
    """Log-mel features of 16 kHz sound (10 ms frames).

    rule: `stream` (frame m spans samples 160m-240 .. 160m+159, constant floor: causal) or `whisper` (centred frames,
    floor at the utterance's maximum - 8: one shot only).
    """

    n_mels: int = 128
    n_fft: int = 400
    hop: int = 160
    rule: str = "stream"
    floor: float = -6.0
    """Lower bound of log10 power under the `stream` rule."""


@dataclass(frozen=True)
class EncoderConfig:
    """SenseVoice-large shaped encoder: two stride-2 convolutions, then blocks of RoPE attention + FSMN on V + MLP."""

    n_mels: int
    dim: int
    heads: int
    ffn: int
    blocks: int
    fsmn_kernel: int = 31
    rope_theta: float = 10_000.0
    attention_norm_eps: float = 1e-5
    mlp_norm_eps: float = 1e-5
    final_norm: bool = True
    chunk: int = 2
    """Frames of 40 ms that see each other in the session form (2 = 80 ms)."""
    left_context: int = 250
    """Frames before the current chunk that stay visible in the session form; a multiple of `chunk`."""


@dataclass(frozen=True)
class ProjectorConfig:
    """Input projector: Conv1d (kernel 3, stride 2) to the LLM's width, then Transformer layers; 25 Hz -> 12.5 Hz."""

    input_dim: int
    dim: int
    heads: int
    ffn: int
    layers: int = 2
    left_context: int = 125
    """Positions before the current one that stay visible in the session form."""


@dataclass(frozen=True)
class BackboneConfig:
    """A Qwen2-shaped decoder. `vocab` 0 means that it has neither token embedding nor head of its own."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int = 0
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tied: bool = False


@dataclass(frozen=True)
class VoiceDecoderConfig:
    """Output projector and voice token LM (paper section 3.2; ids as in CosyVoice 2's LM)."""

    lm: BackboneConfig
    llm_dim: int
    order: str = "hidden,embedding"
    """Order of the two halves of the output projector's input: `hidden,embedding` or `embedding,hidden`."""
    semantic_block: int = 5
    speech_block: int = 15
    codes: int = 6561
    """Number of speech tokens; ids 0 .. codes-1."""
    vocab: int = 6564
    end_of_speech: int = 6561
    fill: int = 6563
    start_marker: int = 0
    """Row of the marker table that starts the sequence (sos)."""
    turn_of_speech_marker: int = 1
    """Row of the marker table that says "the text is complete"."""
    repetition_limit: int = 1
    """Times that a drawn token may stand among the last ten before another is drawn (CosyVoice 2: 1; 11 = never). Few
    codes repeat by nature: of nano's 625, two tokens of three stand among the ten before them."""
    query: bool = True
    """Whether the user's turn (query embeddings) is put before the first semantic vectors."""


@dataclass(frozen=True)
class DuplexConfig:
    """Full-duplex predictor: down projection, one decoder layer, two 2-way heads."""

    input_dim: int
    layer: BackboneConfig
    window: int = 750
    """Positions of 80 ms that stay visible, the current one included (750 = 60 s)."""


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """Supervised semantic speech tokenizer: an encoder's first blocks, then finite scalar quantisation."""

    encoder: EncoderConfig
    levels: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 3, 3)


@dataclass(frozen=True)
class FlowConfig:
    """Causal flow matching from speech tokens (25 Hz) to mel frames (50 Hz); CosyVoice 2's `flow.pt` shape."""

    codes: int = 6561
    dim: int = 512
    heads: int = 8
    ffn: int = 2048
    blocks: int = 6
    up_blocks: int = 4
    lookahead: int = 3
    """Speech tokens of right context."""
    n_mels: int = 80
    speaker_dim: int = 192
    estimator_dim: int = 256
    estimator_heads: int = 8
    estimator_head_dim: int = 64
    estimator_mid_blocks: int = 12
    estimator_transformers: int = 4
    steps: int = 10
    guidance: float = 0.7
    chunk: int = 15
    """Speech tokens a chunk; the first chunk of a reply holds `chunk - lookahead`."""
    left_context: int = 60
    """Mel frames before the current chunk that stay visible, a multiple of 2 * chunk; -1 = all (offline only)."""

    @property
    def first_frames(self) -> int:
        """Mel frames of a reply's first chunk, the shortest but for its last."""
        return 2 * (self.chunk - self.lookahead)


@dataclass(frozen=True)
class VocoderConfig:
    """HiFT: neural source-filter vocoder with an inverse STFT; mel (50 Hz) -> 24 kHz sound."""

    n_mels: int = 80
    sample_rate: int = 24_000
    base_channels: int = 512
    harmonics: int = 8
    source_amplitude: float = 0.1
    noise_amplitude: float = 0.003
    voiced_threshold: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernels: tuple[int, ...] = (16, 11, 7)
    istft_n_fft: int = 16
    istft_hop: int = 4
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[int, ...] = (1, 3, 5)
    source_resblock_kernels: tuple[int, ...] = (7, 7, 11)
    f0_channels: int = 512
    lrelu_slope: float = 0.1
    limit: float = 0.99
    streaming: str = "exact"
    """`exact`: holds back the receptive field, chunked == one shot; `fast`: `fast_holdback` frames, and cross-fades."""
    fast_holdback: int = 8
    fast_chunk: int = 30
    """Mel frames of a grid unit under `fast` (2 * flow.chunk); the first holds `fast_first_chunk`."""
    fast_first_chunk: int = 24


@dataclass(frozen=True)
class MinMoConfig:
    """All of a MinMo."""

    name: str
    frontend: FrontendConfig
    encoder: EncoderConfig
    projector: ProjectorConfig
    llm: BackboneConfig
    voice_decoder: VoiceDecoderConfig
    duplex: DuplexConfig
    speech_tokenizer: SpeechTokenizerConfig
    flow: FlowConfig
    vocoder: VocoderConfig
    remembered: int = 1 << 18
    """Exchanges of a conversation that precede a turn in the LLM's context, where there is room for them. 0 for a model
    that was trained on single turns: each stands alone."""

    def __post_init__(self) -> None:
        codes = math.prod(self.speech_tokenizer.levels)
        samples = math.prod(self.vocoder.upsample_rates) * self.vocoder.istft_hop
        for what, left, right in (
            ("frontend.n_mels and encoder.n_mels", self.frontend.n_mels, self.encoder.n_mels),
            ("encoder.dim and projector.input_dim", self.encoder.dim, self.projector.input_dim),
            ("projector.dim and llm.dim", self.projector.dim, self.llm.dim),
            ("llm.dim and voice_decoder.llm_dim", self.llm.dim, self.voice_decoder.llm_dim),
            ("llm.dim and duplex.input_dim", self.llm.dim, self.duplex.input_dim),
            ("voice_decoder.codes and flow.codes", self.voice_decoder.codes, self.flow.codes),
            ("flow.n_mels and vocoder.n_mels", self.flow.n_mels, self.vocoder.n_mels),
            ("frontend.n_mels and speech_tokenizer's", self.frontend.n_mels, self.speech_tokenizer.encoder.n_mels),
            ("the product of speech_tokenizer.levels and flow.codes", codes, self.flow.codes),
            ("frontend.hop and 10 ms of sound", self.frontend.hop, SAMPLE_RATE // 100),
            ("vocoder.sample_rate and 50 mel frames of sound", self.vocoder.sample_rate, 50 * samples),
        ):
            if left != right:
                raise ValueError(f"config {self.name}: {what} must be equal, got {left} and {right}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MinMoConfig:
        """Raises ValueError that names the field for a missing, unknown or mistyped one."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config is not JSON ({str(error):.80}); write it with minmo.save") from None
        return from_fields(cls, data, "config")


def is_whole(value: object) -> bool:
    """Whether a value is an integer of any library's kind (and no truth value)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a real number of any library's kind (and no truth value)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("minmo") / "presets"
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))


def load_config(preset_or_dir: str | Path) -> MinMoConfig:
    """The configuration of a preset by name, or of a checkpoint directory (its `config.json`)."""
    name = str(preset_or_dir)
    if name in presets():
        return MinMoConfig.from_json((resources.files("minmo") / "presets" / f"{name}.json").read_text("utf-8"))
    path = Path(preset_or_dir) / "config.json"
    if not os.path.isfile(path):
        if os.path.isfile(path.with_name("parts.json")):
            raise ValueError(f"{name} holds parts of a MinMo, not all of one: give it to minmo assemble")
        raise FileNotFoundError(
            f"{name[:100]!r} is neither a preset ({', '.join(presets())}) nor a directory with a config.json"
        )
    try:
        return MinMoConfig.from_json(path.read_text("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; write it with minmo.save") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_fields(cls: type, data: Any, where: str) -> Any:
    """A configuration of a class of this module from its fields as JSON has them. Raises ValueError that names the
    field for a missing, unknown or mistyped one; where: what to call it in messages."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - set(fields)):
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; known: {', '.join(fields)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(data)):
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_fields(typing.cast(type, kind), value, where)
    if isinstance(kind, types.GenericAlias):  # tuple[int, ...] is the only generic here
        if not isinstance(value, (list, tuple)) or not value or not all(type(v) is int for v in value):
            raise ValueError(f"{where} must be a list of integers, got {value!r:.60}")
        for number in value:
            _check_range(where, number)
        return tuple(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} must be of type {kind.__name__}, got {value!r:.60}")
    _check_range(where, value)
    return value


def _check_range(where: str, value: Any) -> None:
    """Sizes that could only come from a broken or hostile file."""
    name = where.rpartition(".")[2]
    if type(value) is int:
        low = -1 if name == "left_context" else 0 if name in _MAY_BE_ZERO else 1
        high = _MOST_LAYERS if name in _LAYERS else _MOST
        if not low <= value <= high:
            raise ValueError(f"{where} must lie between {low} and {high}, got {value!r:.60}")
    elif type(value) is float:
        positive = name.endswith("eps") or name in ("rope_theta", "limit")
        if not abs(value) <= 1e9 or (positive and value <= 0):
            raise ValueError(f"{where} must be {'positive' if positive else 'finite'}, got {value!r}")
    elif type(value) is str and not (0 < len(value) <= 100 and value.isprintable()):
        raise ValueError(f"{where} must be a short line of text, got {value!r:.60}")
