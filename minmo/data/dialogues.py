"""Between lhotse cuts and dialogues: utterances out of cuts, simulated dialogues into cuts, samples out of those."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
from lhotse import MonoCut, Recording
from lhotse.cut import Cut

from minmo.config import SAMPLE_RATE
from minmo.data.duplex import Begun, Sample, samples
from minmo.data.manifest import load_sound
from minmo.data.schema import TASKS, events_of
from minmo.data.simulator import Dialogue
from minmo.data.utterances import Utterance


def utterance(cut: Cut) -> Utterance:
    """What a line of any task but duplex lets hear: its recording, or its target where it hears nothing.

    Word times come from the first supervision's `word` alignment, where there is one. Raises DataError as `load_sound`.
    """
    task = TASKS[cut.custom["task"]]
    if "recording" not in task.required:
        return Utterance(load_sound(cut, "target_recording"), cut.custom["text"])
    said = "text" if cut.custom["task"] == "asr" else "source_text"
    alignment = (cut.supervisions[0].alignment or {}) if cut.supervisions else {}
    words = tuple(
        (item.symbol, round(item.start * SAMPLE_RATE), round(item.end * SAMPLE_RATE))
        for item in alignment.get("word", [])
    )
    return Utterance(load_sound(cut), cut.custom.get(said) or "", words)


def exchange(cut: Cut) -> tuple[Utterance, Utterance]:
    """The two utterances of an s2s line: the spoken question and its spoken answer."""
    return utterance(cut), Utterance(load_sound(cut, "target_recording"), cut.custom["text"])


def dialogue_cut(dialogue: Dialogue, folder: Path | None = None) -> MonoCut:
    """A line of the task duplex, its channels 16-bit FLAC: files in a folder, or in memory, for CutSet.to_shar."""
    user = _recording(dialogue.name, dialogue.user, folder)
    assistant = _recording(f"{dialogue.name}-assistant", dialogue.assistant, folder)
    custom = {
        "task": "duplex",
        "events": [asdict(event) for event in dialogue.events],
        "target_recording": assistant,
        "snr_db": dialogue.snr_db,
        "echo_db": dialogue.echo_db,
    }
    return MonoCut(dialogue.name, 0, user.duration, 0, recording=user, custom=custom)


def duplex_samples(cut: Cut, begun: Sequence[Begun] = ()) -> list[Sample]:
    """The training samples of a duplex line; its recording's id names the dialogue, since a cut's own may change.
    begun: where its turns were noticed."""
    return samples(cut.recording.id, events_of(cut), round(cut.duration * SAMPLE_RATE), begun)


def _recording(name: str, channel: np.ndarray, folder: Path | None) -> Recording:
    file = io.BytesIO()
    soundfile.write(file, channel, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    if folder is None:
        return Recording.from_bytes(file.getvalue(), recording_id=name)
    path = folder / f"{name}.flac"
    path.write_bytes(file.getvalue())
    return Recording.from_file(path, recording_id=name)
