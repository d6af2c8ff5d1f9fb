"""A folder of CosyVoice 2 as parts: `llm.pt`, `flow.pt` and `hift.pt`, and `CosyVoice-BlankEN/config.json` if it is
there."""

from __future__ import annotations

from pathlib import Path

from minmo.weights.importers import cosyvoice_flow, cosyvoice_hift, cosyvoice_llm
from minmo.weights.importers.frame import Importer, Part

FILES = ("llm.pt", "flow.pt", "hift.pt")


def open_folder(folder: Path) -> list[Part]:
    """Voice decoder (without output projector), flow and vocoder."""
    body = folder / "CosyVoice-BlankEN" / "config.json"
    return [
        cosyvoice_llm.open_file(folder / "llm.pt", body if body.is_file() else None),
        cosyvoice_flow.open_file(folder / "flow.pt"),
        cosyvoice_hift.open_file(folder / "hift.pt"),
    ]


def recognises(path: Path) -> bool:
    """Whether one of the files lies in a folder."""
    return any((path / name).is_file() for name in FILES)


IMPORTER = Importer(
    "cosyvoice2", ("voice_decoder", "flow", "vocoder"), "a folder with CosyVoice 2's llm.pt, flow.pt and hift.pt",
    open_folder, recognises,
)  # fmt: skip
