"""All importers, by name."""

from __future__ import annotations

from minmo.weights.importers import cosyvoice, qwen2
from minmo.weights.importers.frame import Importer

IMPORTERS: dict[str, Importer] = {importer.name: importer for importer in (qwen2.IMPORTER, cosyvoice.IMPORTER)}
