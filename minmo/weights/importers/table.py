"""All importers, by name."""

from __future__ import annotations

from minmo.weights.importers import cosyvoice, gguf, qwen2, speech_tokenizer_onnx, whisper
from minmo.weights.importers.frame import Importer

IMPORTERS: dict[str, Importer] = {
    importer.name: importer
    for importer in (
        qwen2.IMPORTER,
        gguf.IMPORTER,
        cosyvoice.IMPORTER,
        speech_tokenizer_onnx.IMPORTER,
        whisper.IMPORTER,
    )
}
