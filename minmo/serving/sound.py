"""Sound on the wire: base64 of 16-bit PCM at 24 kHz, or of G.711 at 8 kHz, from and to float32 samples."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import soundfile

from minmo.audio import Resampler
from minmo.serving.protocol import ProtocolError

FORMATS = {"audio/pcm": ("PCM_16", 24_000, 2), "audio/pcmu": ("ULAW", 8_000, 1), "audio/pcma": ("ALAW", 8_000, 1)}
"""libsndfile's name, samples a second, bytes a sample."""


class Encoding:
    """One direction of one session: keeps the resampler, whose output never depends on how the stream was cut.

    name: a key of FORMATS. inside: the rate of float32 samples on our side. to_wire: the direction.
    """

    def __init__(self, name: str, inside: int, *, to_wire: bool) -> None:
        self.name = name
        _, self.rate, self.width = FORMATS[name]
        self._resampler = Resampler(inside, self.rate) if to_wire else Resampler(self.rate, inside)

    def bytes_of(self, text: str) -> bytes:
        """Base64 -> whole samples' bytes. Raises ProtocolError for what is no base64, and for half samples."""
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ProtocolError("audio is not base64; send base64 of raw samples", "invalid_audio", "audio") from None
        if len(data) % self.width:
            raise ProtocolError(
                f"audio holds {len(data)} bytes, and a sample of {self.name} takes {self.width}: cut between samples",
                "invalid_audio",
                "audio",
            )
        return data

    def ms(self, data: bytes) -> float:
        """How long they sound."""
        return 1e3 * len(data) / self.width / self.rate

    def decode(self, data: bytes) -> np.ndarray:
        """Bytes of whole samples -> samples at our rate, (n,), of which the resampler keeps back a few."""
        if not data:
            return np.zeros(0, np.float32)
        endian = {"endian": "LITTLE"} if self.width > 1 else {}
        kind: Any = {"samplerate": self.rate, "format": "RAW", "subtype": FORMATS[self.name][0], **endian}
        sound, _ = soundfile.read(io.BytesIO(data), dtype="float32", channels=1, **kind)
        return self._resampler.push(sound)

    def flush(self) -> np.ndarray:
        """What the resampler kept back, at the rate of the output; the stream begins anew."""
        return self._resampler.push(np.zeros(0, np.float32), final=True)

    def encode(self, sound: np.ndarray, final: bool = False) -> bytes:
        """Samples at our rate -> bytes of the wire, `final` with the rest of a reply's. Louder ones are clipped."""
        out, sound = io.BytesIO(), self._resampler.push(sound, final=final)
        if not len(sound):
            return b""
        endian = {"endian": "LITTLE"} if self.width > 1 else {}
        soundfile.write(out, np.clip(sound, -1, 1), self.rate, format="RAW", subtype=FORMATS[self.name][0], **endian)
        return out.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
