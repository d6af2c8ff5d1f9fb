"""Conversations with a MinMo: a turn in, a turn out."""

from minmo.conversation.session import Settings
from minmo.conversation.streams import VoiceInput, VoiceOutput, full_duplex, latency
from minmo.conversation.timings import Timings
from minmo.conversation.verbs import Reply, ask, say, talk, transcribe, translate

__all__ = [
    "Reply",
    "Settings",
    "Timings",
    "VoiceInput",
    "VoiceOutput",
    "ask",
    "full_duplex",
    "latency",
    "say",
    "talk",
    "transcribe",
    "translate",
]
