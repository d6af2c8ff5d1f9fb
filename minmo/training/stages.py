"""The training stages as data: what each one trains, by which loss, on which tasks (arXiv 2501.06282, section 3.4).

The paper's MinMo starts from trained parts: an encoder, an LLM, a text-to-speech decoder with its speech tokenizer,
flow and vocoder. Its own stages align them: pre-align, full-align and sft (speech to text), t2s-projector and t2s (text
to speech), s2s (speech to speech), duplex. A model without such parts is first given them by the stages before those:
text-lm, encoder, speech-tokenizer, vocoder, flow, and voice-lm.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage. Everything that it does not name under `trains` is frozen, bit for bit.

    trains: prefixes of parameter names in MinMo (`minmo/model.py`). losses: names of what is minimised, as logged
    (`minmo/training/objectives/`). tasks: what its data may be (`minmo/data/schema.py`). source: where it comes from.
    """

    name: str
    trains: tuple[str, ...]
    losses: tuple[str, ...]
    tasks: tuple[str, ...]
    goal: str
    source: str
    paper: bool = True
    whole: tuple[str, ...] = ()
    """As `trains`, under a recipe's `trainable: full`."""
    after: tuple[str, ...] = ()
    """Stages on whose parts it builds when a model is trained from nothing: what it reads, what lets it be heard."""


OWN = "this project"
UNDERSTANDING = ("asr", "s2tt", "lid", "ser", "aed", "age", "gender", "qa")
"""Tasks from speech to text."""

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "text-lm", ("llm.",), ("text",), ("text",),
            "the LLM reads and writes the domain's text", OWN, paper=False,
        ),
        Stage(
            "encoder", ("encoder.",), ("word_ctc", "character_ctc"), ("asr",),
            "the encoder hears words and letters; clean sound first, then augmented", OWN, paper=False,
        ),
        Stage(
            "speech-tokenizer", ("speech_tokenizer.",), ("word_ctc", "character_ctc", "mel"), ("asr", "tts"),
            "speech tokens from which a recogniser still hears the words (supervised FSQ)",
            "CosyVoice 2 (arXiv 2412.10117)", paper=False,
            after=("encoder",),
        ),
        Stage(
            "vocoder", ("vocoder.",), ("spectrum", "mel", "pitch"), ("tts",),
            "mel frames to sound", "HiFT (arXiv 2309.09493)", paper=False,
        ),
        Stage(
            "flow", ("flow.",), ("flow",), ("tts",),
            "speech tokens to mel frames by flow matching, streamed and whole", "CosyVoice 2", paper=False,
            after=("speech-tokenizer", "vocoder"),
        ),
        Stage(
            "voice-lm", ("voice_decoder.",), ("speech",), ("tts",),
            "text to speech tokens: half in blocks of 5:15, half at once", "CosyVoice 2", paper=False,
            after=("text-lm", "speech-tokenizer", "flow"),
        ),
        Stage(
            "pre-align", ("projector.",), ("text",), UNDERSTANDING,
            "the projector speaks the LLM's language", "paper 3.4, stage 1",
            after=("text-lm", "encoder"),
        ),
        Stage(
            "full-align", ("projector.", "encoder."), ("text",), UNDERSTANDING,
            "encoder and projector together, at drawn chunk sizes", "paper 3.4, stage 1",
            after=("pre-align",),
        ),
        Stage(
            "sft", ("llm.",), ("text",), (*UNDERSTANDING, "text"),
            "the LLM follows spoken instructions: LoRA on its queries and values, or all that hears and reads",
            "paper 3.4, stage 1", whole=("llm.", "projector.", "encoder."),
            after=("full-align",),
        ),
        Stage(
            "t2s-projector", ("voice_decoder.output_projector.",), ("speech",), ("tts",),
            "the output projector alone", "paper 3.4, stage 2",
            after=("sft", "voice-lm"),
        ),
        Stage(
            "t2s", ("voice_decoder.",), ("speech",), ("tts", "instruct-tts"),
            "output projector and voice token LM", "paper 3.4, stage 2",
            after=("t2s-projector",),
        ),
        Stage(
            "s2s", ("voice_decoder.",), ("speech",), ("s2s", "tts"),
            "the same two, on spoken turns: the query embeddings tell how to speak", "paper 3.4, stage 3",
            after=("t2s",),
        ),
        Stage(
            "duplex", ("duplex.",), ("turn_taking", "barge_in"), ("duplex",),
            "when to speak and when to stop", "paper 3.4, stage 4",
            after=("sft",),
        ),
    )
}  # fmt: skip
"""In the order in which a model is trained from nothing."""
