"""`minmo import`: public weights as parts of a MinMo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from minmo.weights.importers.frame import Importer, Part
from minmo.weights.importers.table import IMPORTERS
from minmo.weights.parts import save_parts

out = Console()
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip

Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16; each tensor's own without it.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="A folder that is not there yet.")]


def import_(
    name: Annotated[str, typer.Argument(help=f"What the files are: {', '.join(IMPORTERS)}.")],
    source: Annotated[Path, typer.Argument(help="Where they lie: a folder, or a file.")],
    output: Output,
    dtype: Dtype = "",
) -> None:
    """Reads a public checkpoint and writes what it holds as parts of a MinMo."""
    parts = importer(name).open(source)
    save_parts(parts, output, dtype_of(dtype))
    tell(parts)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    out.print(f"written: {output} ({size:.1f} MB)", highlight=False, markup=False, soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Puts the commands beside others."""
    app.command("import")(import_)


def importer(name: str) -> Importer:
    """By name. Raises ValueError that lists them for another."""
    if name not in IMPORTERS:
        known = "; ".join(f"{i.name} ({i.reads})" for i in IMPORTERS.values())
        raise ValueError(f"there is no importer {name!r:.60}; there are {known}")
    return IMPORTERS[name]


def dtype_of(name: str) -> torch.dtype | None:
    """By its long or short name; None for "". Raises ValueError for another."""
    if name and name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r:.60}")
    return DTYPES.get(name)


def tell(parts: list[Part]) -> None:
    """What the parts are, and all that is not a faithful copy."""
    for part in parts:
        lines = [f"{part.name}: {len(part.tensors)} tensors by {part.importer}"]
        lines += [f"{part.name} is only a start: {part.start}"] if part.start else []
        lines += [f"{part.name}: {note}" for note in part.notes]
        lines += [f"{part.name}: dropped {', '.join(part.dropped)}"] if part.dropped else []
        lines += [f"{part.name}: zero are {', '.join(part.zeroed)}"] if part.zeroed else []
        for line in lines:
            out.print(line, highlight=False, markup=False, soft_wrap=True)
