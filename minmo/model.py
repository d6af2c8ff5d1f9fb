"""MinMo: the boxes of the paper's Figure 1 composed, and nothing else (arXiv 2501.06282, section 3.1).

Sound -> log-mel -> voice encoder (25 Hz) -> input projector (12.5 Hz) -> LLM -> text; the LLM's hidden states and text
embeddings -> output projector and voice token LM (5 semantic vectors : 15 speech tokens) -> flow matching (50 Hz mel)
-> vocoder (24 kHz); the full-duplex predictor reads the LLM's hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minmo.config import MinMoConfig
from minmo.modules.backbone import Backbone, BackboneState
from minmo.modules.duplex import DuplexPredictor, DuplexState
from minmo.modules.encoder import Encoder, EncoderState
from minmo.modules.projector import Projector, ProjectorState
from minmo.modules.voice_decoder import VoiceDecoder, VoiceDecoderState
from minmo.state import Lengths, State, all_rows
from minmo.token2wav.flow import Flow, FlowState
from minmo.token2wav.vocoder import ExactState, FastState, Vocoder
from minmo.tokenizer.frontend import Frontend, FrontendState
from minmo.tokenizer.speech import SpeechTokenizer
from minmo.tokenizer.text import TextTokenizer

PREFILL = 64
"""Positions of a prompt that the LLM reads at once."""
MAX_POSITIONS = 4096
"""LLM context of a conversation, by default."""
MOST_POSITIONS = 1 << 22


@dataclass(frozen=True)
class Origin:
    """Where the weights of one part come from; a checkpoint's manifest keeps it."""

    state: str
    """`imported` (a public model's own), `start` (a public model's, a start for training), `random` or `trained`."""
    importer: str = ""
    made_by: str = ""
    """Program and version that imported, drew or trained it."""
    sources: tuple[dict[str, Any], ...] = ()
    """The public files: file, bytes, sha256."""
    dtype: str = ""
    start: str = ""
    """Why it is only a start, in a sentence."""
    notes: tuple[str, ...] = ()
    """What is not a faithful copy, in sentences."""
    dropped: tuple[str, ...] = ()
    """Public tensors without a place here."""
    zeroed: tuple[str, ...] = ()
    """Tensors that the files do not have, set to zero."""
    seed: int | None = None
    """Of random weights."""


def concerns(origins: Mapping[str, Origin]) -> list[str]:
    """What to know of a model's weights before trusting it, a line each: what is random, what is only a start."""
    random = [part for part, origin in origins.items() if origin.state == "random"]
    lines = [f"random: {', '.join(random)}"] if random else []
    return lines + [f"{part}: {origin.start}" for part, origin in origins.items() if origin.state == "start"]


@dataclass
class HearingState(State):
    """Front end, encoder and projector of every session."""

    frontend: FrontendState
    encoder: EncoderState
    projector: ProjectorState


@dataclass
class SpeakingState(State):
    """Voice decoder, flow and vocoder of every session; reset before each reply."""

    decoder: VoiceDecoderState
    flow: FlowState
    vocoder: ExactState | FastState


@dataclass
class MinMoState(State):
    """Everything that a batch of sessions remembers."""

    hearing: HearingState
    llm: BackboneState
    duplex: DuplexState
    speaking: SpeakingState


class Seats:
    """Rows of a state that a batch of sessions holds until it leaves: entry b of its calls is row rows[b]."""

    def __init__(self, state: MinMoState, rows: Tensor) -> None:
        self._state, self.rows = state, rows

    @property
    def state(self) -> MinMoState:
        return self._state

    def check(self) -> None:
        """Raises RuntimeError where the seats must not be used from this thread."""

    def leave(self) -> None:
        """Gives the rows back; the seats must not be used again."""


class MinMo(nn.Module):
    """All modules of one configuration.

    trained: whether the weights came from a checkpoint; provenance: where from, in words; origins: the same
    part by part (`voice_decoder.output_projector` is one of its own), where a checkpoint says so. speaker: the
    assistant's voice, a vector for the flow's conditioning, (speaker_dim,).
    """

    speaker: Tensor
    given: tuple[str, ...] = ()
    """Names of parts that now belong to a FastMinMo."""
    prefill, max_positions = PREFILL, MAX_POSITIONS
    """Positions of a prompt that are read at once; LLM context of a conversation that does not ask for another."""
    overlaps = True
    """Whether, on a GPU, one stream of kernels may run beside another."""

    def __init__(self, config: MinMoConfig) -> None:
        super().__init__()
        self.config = config
        self.frontend = Frontend(config.frontend)
        self.encoder = Encoder(config.encoder)
        self.projector = Projector(config.projector)
        self.llm = Backbone(config.llm)
        self.voice_decoder = VoiceDecoder(config.voice_decoder)
        self.duplex = DuplexPredictor(config.duplex)
        self.speech_tokenizer = SpeechTokenizer(config.speech_tokenizer)
        self.flow = Flow(config.flow)
        self.vocoder = Vocoder(config.vocoder)
        self.register_buffer("speaker", torch.randn(config.flow.speaker_dim))
        self.tokenizer: TextTokenizer | None = None
        self.trained = False
        self.provenance = "no weights"
        self.origins: dict[str, Origin] = {}

    def mark_trained(self, prefixes: tuple[str, ...], by: str) -> None:
        """Notes that the parts whose tensors begin so were trained; what was random or a start no longer is."""
        for part in self.origins:
            if f"{part}.".startswith(prefixes):
                self.origins[part] = Origin("trained", made_by=by)

    def give_up(self) -> list[tuple[str, nn.Module]]:
        """Hands the parts over, by name; this model raises AttributeError for them from then on."""
        parts = list(self.named_children())
        self.given = tuple(name for name, _ in parts)
        self._modules.clear()
        return parts

    def __getattr__(self, name: str) -> Any:
        if name in self.given:
            raise AttributeError(
                f"this model's {name} was given to a FastMinMo: use that, or make it with keep_model=True"
            )
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        return self.speaker.device

    @property
    def dtype(self) -> torch.dtype:
        return self.speaker.dtype

    def initial_state(self, sessions: int, max_positions: int, max_voice_positions: int) -> MinMoState:
        """Empty states; max_positions: LLM context a session, max_voice_positions: voice token LM context a reply."""
        return MinMoState(
            hearing=HearingState(
                self.frontend.initial_state(sessions, like=self.speaker),
                self.encoder.initial_state(sessions),
                self.projector.initial_state(sessions),
            ),
            llm=self.llm.initial_state(sessions, max_positions),
            duplex=self.duplex.initial_state(sessions),
            speaking=SpeakingState(
                self.voice_decoder.initial_state(sessions, max_voice_positions),
                self.flow.initial_state(sessions),
                self.vocoder.initial_state(sessions),
            ),
        )

    def join(self, sessions: int, max_positions: int, max_voice_positions: int) -> Seats:
        """New, empty sessions. Raises ValueError, with the setting to change, where there is no room for them."""
        try:
            state = self.initial_state(sessions, max_positions, max_voice_positions)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"a context of {max_positions} positions and {max_voice_positions} of speech for {sessions} rows does "
                f"not fit in memory ({str(error):.80}…); lower rows, max_positions or the longest speech "
                "(max_voice_positions; max_text_tokens, max_speech_ratio)"
            ) from None
        return Seats(state, all_rows(sessions, self.device))

    def embed_audio(self, audio: Tensor, lengths: Lengths) -> tuple[Tensor, Lengths]:
        """One shot under the session mask: audio (batch, samples) 16 kHz -> LLM positions (batch, n, dim), 12.5 Hz."""
        mel, lengths = self.frontend(audio, lengths)
        frames, lengths = self.encoder(mel.to(self.dtype), lengths)
        return self.projector(frames, lengths)


def shapes(config: MinMoConfig) -> MinMo:
    """A MinMo on the meta device: every name and shape, no memory. Raises ValueError for sizes that do not fit."""
    try:
        with torch.device("meta"), NothingDrawn():
            return MinMo(config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the configuration {config.name} does not build: {error}") from None


class NothingDrawn(TorchFunctionMode):
    """Leaves out initial weights: on the meta device there is nothing to draw, and PyTorch would load its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
