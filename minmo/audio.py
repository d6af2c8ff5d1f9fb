"""Sound files and sample rates: any file to the 16 kHz mono samples that MinMo hears, and replies to files.

Sound is a one-dimensional float32 array within -1 .. 1. What cannot be heard or written raises AudioError with one
sentence that says what to do.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from minmo.config import SAMPLE_RATE, is_whole

MAX_SECONDS = 600.0
"""Longest sound that `load_audio` takes by default; 10 minutes of 16 kHz float32 are 38 MB."""

SUFFIXES = frozenset(
    ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .rf64 .sph .nist .voc .gsm .raw .pcm"
    " .m4a .mp4 .aac .wma .webm .amr".split()
)
"""File name endings that mean a sound file, readable or not."""

_OUTPUT = {".wav": "WAV", ".flac": "FLAC"}
_RATES = (1_000, 768_000)
_BLOCK = 1 << 16
LOUDEST = 16.0
"""Samples beyond this (24 dB over full scale) are no sound in -1 .. 1; most often integers that were not scaled."""


class AudioError(ValueError):
    """Sound that cannot be heard, or a file that cannot be read or written."""


def load_audio(path: str | os.PathLike[str], *, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """The samples of a sound file, (n,) float32: channels averaged, resampled to 16 kHz.

    Any format of libsndfile (WAV, FLAC, OGG, MP3, AIFF, …), sample width, rate and channel count. Read block by block,
    so memory is bounded by `max_seconds` of 16 kHz sound. Silence and clipping are sound; see `concerns`.

    Raises AudioError for a file that is missing, a directory, no sound, damaged, empty, longer than `max_seconds`, or
    that holds NaN, infinite or unscaled samples.
    """
    file = _path(path)
    if not max_seconds > 0:
        raise AudioError(f"max_seconds must be positive, got {max_seconds!r}")
    if not os.path.exists(file):
        raise AudioError(f"{file} does not exist; check the path")
    if not file.is_file():
        raise AudioError(f"{file} is not a file; give the path of a sound file")
    try:
        reader = soundfile.SoundFile(str(file))
    except (soundfile.SoundFileError, TypeError, OSError):
        raise AudioError(_why_unreadable(file)) from None
    with reader:
        return _read(reader, file, max_seconds)


def save_audio(path: str | os.PathLike[str], samples: Any, sample_rate: int) -> None:
    """Writes sound within -1 .. 1, mono (n,) or stereo (n, 2), as 16-bit PCM, WAV or FLAC by its ending; louder samples
    are clipped.

    The file appears whole or not at all. Raises AudioError for NaN or infinite samples, another shape, and for what
    `check_output` refuses.
    """
    file = check_output(path)
    if not is_whole(sample_rate) or not _RATES[0] <= sample_rate <= _RATES[1]:
        raise AudioError(f"sample_rate must be an integer in {_RATES[0]} .. {_RATES[1]} Hz, got {sample_rate!r}")
    sound = np.asarray(samples)
    if (sound.ndim != 1 and sound.shape[1:] != (2,)) or sound.dtype.kind != "f":
        raise AudioError(
            f"sound to save must be floats of the shape (samples,) or (samples, 2), got {sound.dtype} {sound.shape}"
        )
    if not np.isfinite(sound).all():
        raise AudioError(
            f"the sound for {file} holds NaN or infinite samples and was not written; check the model's weights"
        )
    whole = np.clip(np.round(sound.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    try:
        # A directory of our own next to the target: same file system, so the rename is atomic.
        with tempfile.TemporaryDirectory(prefix=".minmo-", dir=file.parent) as folder:
            part = Path(folder) / file.name
            soundfile.write(part, whole, sample_rate, subtype="PCM_16", format=_OUTPUT[file.suffix.lower()])
            os.replace(part, file)
    except (OSError, soundfile.SoundFileError) as error:
        why = getattr(error, "strerror", None) or error
        raise AudioError(f"{file} cannot be written ({why}); choose another place") from None


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if `save_audio` could write there; raises AudioError otherwise. Ask before long work."""
    file = _path(path)
    if file.suffix.lower() not in _OUTPUT:
        raise AudioError(f"{file} must end in {' or '.join(_OUTPUT)}")
    if file.is_dir():
        raise AudioError(f"{file} is a directory; give the path of a file in it")
    if not file.parent.is_dir():
        raise AudioError(f"the directory {file.parent} does not exist; create it first")
    if os.path.lexists(file) and not (file.is_file() and not file.is_symlink()):
        raise AudioError(f"{file} exists and is no ordinary file; choose another name")
    try:  # permissions alone do not say it: a file system may be read-only, or no real one
        with tempfile.TemporaryDirectory(prefix=".minmo-", dir=file.parent):
            pass
    except OSError as error:
        raise AudioError(f"{file.parent} cannot be written to ({error.strerror}); choose another place") from None
    return file


def _path(path: str | os.PathLike[str]) -> Path:
    """A path that the system can take."""
    try:
        name = os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        raise AudioError(f"a path must be a file name, got {path!r:.60}") from None
    if b"\0" in name or max(map(len, name.split(b"/"))) > 255 or len(name) > 4095:
        raise AudioError(f"{os.fsdecode(name)[:60]!r}… is no possible file name; use a shorter one without NUL")
    return Path(os.fsdecode(name))


def concerns(samples: np.ndarray, sample_rate: int = SAMPLE_RATE) -> list[str]:
    """What a listener would notice about valid sound, one sentence each: too short, silent, clipped. May be empty."""
    found = []
    if len(samples) < sample_rate // 10:
        found.append(f"the sound lasts only {1e3 * len(samples) / sample_rate:.1f} ms")
    peak = float(np.abs(samples).max(initial=0.0))
    if peak < 1e-4:
        found.append("the sound is silent; check the microphone or the channel")
    clipped = float(np.mean(np.abs(samples) >= 0.999)) if len(samples) else 0.0
    if clipped > 1e-3:
        found.append(f"{100 * clipped:.1f} % of the samples are at full scale (clipped); lower the recording level")
    return found


class Resampler:
    """Changes the sample rate of one stream of mono sound, piece by piece (soxr, high quality).

    How the stream was cut never changes the output: the pieces' outputs, put together, are the one-shot output.
    """

    def __init__(self, from_rate: int, to_rate: int = SAMPLE_RATE) -> None:
        low, high = _RATES
        if not (low <= from_rate <= high and low <= to_rate <= high):
            raise AudioError(
                f"sample rates must be in {low} .. {high} Hz, got {from_rate} and {to_rate}; convert first"
            )
        self.from_rate, self.to_rate = from_rate, to_rate
        self._stream = None if from_rate == to_rate else soxr.ResampleStream(from_rate, to_rate, 1, "float32", "HQ")

    def push(self, samples: np.ndarray, final: bool = False) -> np.ndarray:
        """Adds samples (n,) at `from_rate`; returns what is ready at `to_rate`, (m,) float32.

        `final` gives out the rest, round(n to_rate / from_rate) samples altogether, and makes the resampler new again.
        """
        piece = np.ascontiguousarray(samples, dtype=np.float32)
        if self._stream is None:
            return piece.copy()
        out = self._stream.resample_chunk(piece, last=final)
        if final:
            self._stream.clear()
        return out

    @property
    def delay_ms(self) -> float:
        """Sound that was pushed and is not out yet, in milliseconds: it waits for the filter's right context."""
        return 0.0 if self._stream is None else 1e3 * self._stream.delay() / self.to_rate


def resampling_delay_ms(path: str | os.PathLike[str]) -> float:
    """How far a live stream at this file's rate would lag behind at 16 kHz, in milliseconds."""
    resampler = Resampler(soundfile.info(os.fspath(path)).samplerate)
    resampler.push(np.zeros(resampler.from_rate, np.float32))
    return resampler.delay_ms


def resample(samples: np.ndarray, from_rate: int, to_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Whole mono sound (n,) at another sample rate, float32."""
    return Resampler(from_rate, to_rate).push(samples, final=True)


def _read(reader: soundfile.SoundFile, file: Path, max_seconds: float) -> np.ndarray:
    rate = reader.samplerate
    if not _RATES[0] <= rate <= _RATES[1]:
        raise AudioError(
            f"{file} says {rate} Hz; rates in {_RATES[0]} .. {_RATES[1]} Hz can be heard: convert it first"
        )
    limit = max_seconds * rate
    _check_whole(reader, file)
    if reader.frames > limit:
        raise AudioError(_too_long(file, reader.frames / rate, max_seconds))
    resampler, pieces, heard = Resampler(rate), [], 0
    while True:
        try:
            block = reader.read(_BLOCK, dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            raise AudioError(f"{file} is damaged after {heard / rate:.2f} s; export it again") from None
        if not len(block):
            break
        if not np.isfinite(block).all():
            raise AudioError(f"{file} holds NaN or infinite samples; export it again from its source")
        peak = float(np.abs(block).max())
        if peak > LOUDEST:
            raise AudioError(f"{file} has samples as large as {peak:.3g}; scale them to -1 .. 1")
        heard += len(block)
        if heard > limit:
            raise AudioError(_too_long(file, heard / rate, max_seconds))
        pieces.append(resampler.push(block.mean(axis=1)))
    pieces.append(resampler.push(np.zeros(0, np.float32), final=True))
    sound = np.concatenate(pieces)
    if not len(sound):
        raise AudioError(f"{file} is empty: it holds {heard} samples at {rate} Hz; record again")
    return sound


def _check_whole(reader: soundfile.SoundFile, file: Path) -> None:
    """Refuses a WAV whose header promises more than the file holds; a stream's open end (0, or all ones) is no promise.

    libsndfile shortens such a file without a word, and says so in its log alone.
    """
    promise = re.search(r"^data : (\d+) \(should be (\d+)\)", reader.extra_info, re.MULTILINE)
    if promise and int(promise[2]) < int(promise[1]) < 0x7FFFF000:
        share = int(promise[2]) / int(promise[1])
        raise AudioError(f"{file} is cut short: {100 * share:.1f} % of its sound is there; export it again")


def _why_unreadable(file: Path) -> str:
    if not os.access(file, os.R_OK):
        return f"{file} cannot be read (permission denied); change its permissions"
    if file.stat().st_size == 0:
        return f"{file} is empty: it holds 0 bytes; record again"
    return (
        f"{file} is not sound in a format that can be read (WAV, FLAC, OGG, MP3, AIFF, …); "
        "convert it, for example with: ffmpeg -i IN OUT.wav"
    )


def _too_long(file: Path, seconds: float, limit: float) -> str:
    return (
        f"{file} lasts {int(seconds) // 60} min {int(seconds) % 60} s, longer than the limit of {limit:g} s; "
        "cut it into pieces"
    )
