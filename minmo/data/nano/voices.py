"""Synthetic voices that Debian packages: who speaks, in which language, under which licence, and how.

flite, pico, RHVoice, espeak-ng, festival and mbrola are called by their command lines. The assistant speaks as
RHVoice's slt, the clearest of them at 24 kHz. Voices whose licence forbids derived or sold works are for tests alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
import soundfile as sf

CMU, APACHE, LGPL, GPL2, GPL3 = "CMU BSD-like", "Apache-2.0", "LGPL-2.1+", "GPL-2", "GPL-3 (program)"
NON_FREE = "not for derived or sold works: tests only"


@dataclass(frozen=True)
class Voice:
    """engine: the program; name: its name for the voice; package: Debian's; test: never trained on."""

    engine: str
    name: str
    language: str
    licence: str
    package: str
    test: bool = False

    @property
    def id(self) -> str:
        return f"{self.engine}-{self.name}".replace("+", "-").replace(":", "-")


def _voices(engine: str, names: str, language: str, licence: str, package: str, test: bool = False) -> list[Voice]:
    return [Voice(engine, name, language, licence, package, test) for name in names.split()]


VOICES = [
    *_voices("flite", "slt rms awb kal16", "en", CMU, "flite"),
    *_voices("pico", "en-US en-GB", "en", APACHE, "libttspico-utils"),
    *_voices("rhvoice", "alan bdl clb slt", "en", LGPL, "rhvoice-english"),
    *_voices("espeak", "en-us en-gb en-us+f3 en-us+klatt4 en-us+m3", "en", GPL3, "espeak-ng"),
    *_voices("festival", "kal_diphone", "en", CMU, "festvox-kallpc16k"),
    *_voices("festival", "ked_diphone", "en", CMU, "festvox-kdlpc16k", test=True),
    *_voices("festival", "cmu_us_slt_arctic_hts", "en", CMU, "festvox-us-slt-hts", test=True),
    *_voices("rhvoice", "evgeniy-eng lyubov", "en", NON_FREE, "rhvoice-english", test=True),
    *_voices("mbrola", "us1", "en", NON_FREE, "mbrola-us1", test=True),
    *_voices("mbrola", "us3", "en", NON_FREE, "mbrola-us3", test=True),
    *_voices("mbrola", "en1", "en", NON_FREE, "mbrola-en1", test=True),
    *_voices("pico", "es-ES", "es", APACHE, "libttspico-utils"),
    *_voices("espeak", "es es-419 es+f3 es-419+m3", "es", GPL3, "espeak-ng"),
    *_voices("festival", "el_diphone", "es", "festvox-ellpc11k's own, free with conditions", "festvox-ellpc11k"),
    *_voices("pico", "fr-FR", "fr", APACHE, "libttspico-utils"),
    *_voices("espeak", "fr fr-be fr+f3 fr-ch+m3", "fr", GPL3, "espeak-ng"),
    *_voices("mbrola", "fr1", "fr", NON_FREE, "mbrola-fr1", test=True),
    *_voices("mbrola", "fr4", "fr", NON_FREE, "mbrola-fr4", test=True),
    *_voices("pico", "it-IT", "it", APACHE, "libttspico-utils"),
    *_voices("espeak", "it it+f3 it+m3", "it", GPL3, "espeak-ng"),
    *_voices("festival", "pc_diphone", "it", GPL2, "festvox-itapc16k"),
    *_voices("festival", "lp_diphone", "it", GPL2, "festvox-italp16k"),
    *_voices("mbrola", "it3", "it", NON_FREE, "mbrola-it3", test=True),
    *_voices("mbrola", "it4", "it", NON_FREE, "mbrola-it4", test=True),
    *_voices("rhvoice", "anna elena irina aleksandr", "ru", LGPL, "rhvoice-russian"),
    *_voices("espeak", "ru ru+f3 ru+m3", "ru", GPL3, "espeak-ng"),
    *_voices("festival", "msu_ru_nsh_clunits", "ru", CMU, "festvox-ru"),
]
ASSISTANT = next(v for v in VOICES if v.id == "rhvoice-slt")
PROGRAMS = {
    "flite": "flite", "pico": "pico2wave", "rhvoice": "RHVoice-test", "espeak": "espeak-ng", "festival": "festival",
    "mbrola": "mbrola",
}  # fmt: skip


class SynthesisError(ValueError):
    """A voice that does not speak: its program is missing or gave no sound."""


def missing_packages(voices: list[Voice]) -> list[str]:
    """Debian packages that must be installed before these voices speak (mbrola, RHVoice's and pico's are non-free)."""
    programs = {"rhvoice": "rhvoice", "festival": "festival", "mbrola": "mbrola", "espeak": "espeak-ng"}
    wanted = {v.package for v in voices} | {programs[v.engine] for v in voices if v.engine in programs}
    if any(v.engine == "mbrola" for v in voices):
        wanted.add("espeak-ng")
    return sorted(p for p in wanted if not _installed(p))


def _installed(package: str) -> bool:
    if shutil.which("dpkg-query") is None:
        raise SynthesisError(
            "the synthetic voices come as Debian packages and dpkg-query is missing: use a Debian system"
        )
    query = subprocess.run(["dpkg-query", "-W", "-f", "${Status}", package], capture_output=True, text=True)
    return query.stdout.endswith("ok installed")


def synthesise(voice: Voice, text: str, speed: float = 1.0, pitch: float = 1.0) -> tuple[np.ndarray, int]:
    """Mono float32 sound and its rate. speed, pitch: 1 = the voice's own.

    Raises SynthesisError where the program is missing, or says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "speech.wav")
        command, spoken = _command(voice, text, path, speed, pitch)
        try:
            done = subprocess.run(command, input=spoken, capture_output=True, timeout=60)
        except FileNotFoundError:
            raise SynthesisError(f"{command[0]} is not installed: apt-get install {voice.package}") from None
        try:
            sound, rate = sf.read(path, dtype="float32", always_2d=True)
        except sf.LibsndfileError:
            sound, rate = np.zeros((0, 1), np.float32), 0
        if not np.abs(sound).max(initial=0) > 0.001:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise SynthesisError(f"{voice.id} did not say {text!r} ({said[-1] if said else 'no message'})")
    return sound[:, 0], rate


def _command(voice: Voice, text: str, path: str, speed: float, pitch: float) -> tuple[list[str], bytes | None]:
    program = PROGRAMS[voice.engine]
    if voice.engine == "flite":
        return [
            program,
            "-voice",
            voice.name,
            "--setf",
            f"duration_stretch={1 / speed:.3f}",
            "-t",
            text,
            "-o",
            path,
        ], None
    if voice.engine == "pico":
        levels = f"<speed level='{100 * speed:.0f}'><pitch level='{100 * pitch:.0f}'>{escape(text)}</pitch></speed>"
        return [program, "-l", voice.name, "-w", path, levels], None
    if voice.engine == "rhvoice":
        rate, tone = f"{100 * speed:.0f}", f"{100 * pitch:.0f}"
        return [program, "-p", voice.name, "-r", rate, "-t", tone, "-o", path], (text + "\n").encode()
    if voice.engine in ("espeak", "mbrola"):
        name = f"mb-{voice.name}" if voice.engine == "mbrola" else voice.name
        return ["espeak-ng", "-v", name, "-s", f"{160 * speed:.0f}", "-p", f"{50 * pitch:.0f}", "-w", path, text], None
    said = text.replace('"', "")
    script = (
        f"(voice_{voice.name})(Parameter.set 'Duration_Stretch {1 / speed:.3f})"
        f'(utt.save.wave (utt.synth (Utterance Text "{said}")) "{path}" \'riff)\n'
    )
    return [program, "--pipe"], script.encode("utf-8" if voice.language == "ru" else "latin-1", errors="replace")
