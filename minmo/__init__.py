"""MinMo: an open full-duplex voice language model (arXiv 2501.06282).

>>> model = minmo.load("nano")
>>> reply = minmo.talk(model, minmo.load_audio("sum.wav"))
>>> print(reply.text); minmo.save_audio("reply.wav", reply.audio, reply.sample_rate)
"""

from minmo.audio import AudioError, load_audio, save_audio
from minmo.conversation import (
    Reply,
    Settings,
    VoiceInput,
    VoiceOutput,
    ask,
    full_duplex,
    latency,
    say,
    talk,
    transcribe,
    translate,
)
from minmo.fast import FastMinMo
from minmo.model import MinMo
from minmo.weights import CheckpointError, load, save

__version__ = "0.1.0"

__all__ = [
    "AudioError",
    "CheckpointError",
    "FastMinMo",
    "MinMo",
    "Reply",
    "Settings",
    "VoiceInput",
    "VoiceOutput",
    "ask",
    "full_duplex",
    "latency",
    "load",
    "load_audio",
    "save",
    "save_audio",
    "say",
    "talk",
    "transcribe",
    "translate",
]
