"""How replies are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minmo.config import is_real, is_whole


@dataclass(frozen=True)
class Settings:
    """How a reply is drawn and how long it may get.

    temperature 0 is greedy. max_text_tokens bounds the reply's text, max_speech_ratio its speech: speech tokens (40 ms)
    a text token, CosyVoice 2's 20 by default. seed: all randomness of a session: one for every entry of a batch, or one
    each. Raises ValueError for values of the wrong type or out of range.
    """

    seed: int | tuple[int, ...] = 0
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    voice_temperature: float = 1.0
    voice_top_k: int = 25
    voice_top_p: float = 0.8
    max_text_tokens: int = 128
    max_speech_ratio: int = 20
    speak: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.speak, bool):
            raise ValueError(f"speak must be True or False, got {self.speak!r}")
        seeds = self.seed if isinstance(self.seed, (tuple, list)) else (self.seed,)
        if not all(is_whole(s) and -(2**63) <= s < 2**63 for s in seeds):
            raise ValueError(f"seed must be a 64-bit integer, or one for each entry, got {self.seed!r}")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("voice_temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("voice_top_p", 0.0, 1.0),
            ("top_k", 0, 2**31 - 1),
            ("voice_top_k", 0, 2**31 - 1),
            ("max_text_tokens", 1, 100_000),
            ("max_speech_ratio", 3, 1_000),
        ):
            value: Any = getattr(self, name)
            kind = type(low)
            if not (is_whole(value) if kind is int else is_real(value)):
                raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'}, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
            object.__setattr__(self, name, kind(value))

    def seeds(self, batch: int) -> list[int]:
        """A seed for each entry. Raises ValueError where seeds were given for another number of entries."""
        seeds = list(self.seed) if isinstance(self.seed, (tuple, list)) else [self.seed] * batch
        if len(seeds) != batch:
            raise ValueError(f"there are {len(seeds)} seeds for a batch of {batch}; give one, or one for each entry")
        return seeds
