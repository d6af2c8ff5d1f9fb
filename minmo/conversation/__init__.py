"""Conversations with a MinMo: a turn in, a turn out; and full duplex, 80 ms in, 80 ms out."""

from minmo.conversation.budget import Budget
from minmo.conversation.client import Recording, simulate
from minmo.conversation.conversation import Conversation
from minmo.conversation.history import Exchange, History
from minmo.conversation.scheduler import Line, Refused, Scheduler
from minmo.conversation.settings import Settings
from minmo.conversation.statistics import Statistics
from minmo.conversation.streams import VoiceInput, VoiceOutput, full_duplex, latency
from minmo.conversation.timings import Timings
from minmo.conversation.turn_taking import BY_REQUEST, EAGERNESS, Phase, TurnTaking, eagerness
from minmo.conversation.verbs import Reply, ask, say, talk, transcribe, translate

__all__ = [
    "BY_REQUEST",
    "EAGERNESS",
    "Budget",
    "Conversation",
    "Exchange",
    "History",
    "Line",
    "Phase",
    "Recording",
    "Refused",
    "Reply",
    "Scheduler",
    "Settings",
    "Statistics",
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
