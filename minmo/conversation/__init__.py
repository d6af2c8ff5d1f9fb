"""Conversations with a MinMo: a turn in, a turn out; and full duplex, 80 ms in, 80 ms out."""

from minmo.conversation.client import Recording, simulate
from minmo.conversation.conversation import Conversation
from minmo.conversation.history import Exchange, History
from minmo.conversation.settings import Settings
from minmo.conversation.streams import VoiceInput, VoiceOutput, full_duplex, latency
from minmo.conversation.timings import Timings
from minmo.conversation.turn_taking import EAGERNESS, Phase, TurnTaking, eagerness
from minmo.conversation.verbs import Reply, ask, say, talk, transcribe, translate

__all__ = [
    "EAGERNESS",
    "Conversation",
    "Exchange",
    "History",
    "Phase",
    "Recording",
    "Reply",
    "Settings",
    "Timings",
    "TurnTaking",
    "VoiceInput",
    "VoiceOutput",
    "ask",
    "eagerness",
    "full_duplex",
    "latency",
    "say",
    "simulate",
    "talk",
    "transcribe",
    "translate",
]
