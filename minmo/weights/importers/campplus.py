"""A prompt voice: the speaker embedding of a recording by CosyVoice 2's `campplus.onnx` -> a MinMo's `speaker`."""

from __future__ import annotations

from pathlib import Path

from minmo.audio import load_audio
from minmo.token2wav.speaker import LONGEST, SpeakerEncoder
from minmo.weights.importers.frame import Part
from minmo.weights.stored import CheckpointError, Weight

NAME = "campplus"


def open_voice(network: Path, sound: Path) -> list[Part]:
    """The voice in a sound file, as a part. Raises ValueError, in one sentence, for another network, and for sound that
    is missing, too short, too long or silent."""
    encoder = SpeakerEncoder(network)
    try:
        vector = encoder(load_audio(sound, max_seconds=LONGEST))
    except ValueError as error:
        raise CheckpointError(f"{sound}: {error}") from None
    return [Part("speaker", {}, {"": Weight.of(vector, str(sound))}, (network, sound), NAME)]
