"""`minmo import` and `minmo assemble`: public weights as parts of a MinMo, and as one; what a manifest says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minmo.weights import manifest
from minmo.weights.assemble import assemble, find
from minmo.weights.importers.campplus import open_voice
from minmo.weights.importers.frame import Importer
from minmo.weights.importers.table import IMPORTERS
from minmo.weights.parts import FILE, open_parts, save_parts

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
    kind = dtype_of(dtype)
    save_parts(importer(name).open(source), output, kind)
    show_parts(output)
    _written(output)


def assemble_(
    output: Output,
    llm: Annotated[Path, typer.Option(help="A Qwen2.5 or another LLM: a public folder or file, or an imported one.")],
    cosyvoice: Annotated[Path, typer.Option(help="CosyVoice 2: its folder, or an imported one.")],
    encoder: Annotated[Path, typer.Option(help="What the encoder starts from: public files, or an imported folder.")],
    speech_tokenizer: Annotated[
        Path | None, typer.Option(help="The speech tokenizer: public files, or an imported folder; else random.")
    ] = None,
    speaker: Annotated[
        Path | None, typer.Option(help="The assistant's voice: an imported folder; else random.")
    ] = None,
    dtype: Dtype = "",
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
) -> None:
    """Puts a MinMo together from public parts; what has no public weights is drawn at random, and marked so."""
    kind = dtype_of(dtype)
    given = {
        "llm": llm, "cosyvoice": cosyvoice, "encoder": encoder, "speech_tokenizer": speech_tokenizer,
        "speaker": speaker,
    }  # fmt: skip
    parts = [part for name, source in given.items() if source is not None for part in find(source, name)]
    assemble(parts, output, kind, seed=seed)
    show_origins(output)
    _written(output)


def voice(
    sound: Annotated[Path, typer.Argument(help="A sound file in which one person speaks, 1 to 120 s.")],
    network: Annotated[Path, typer.Option(help="CosyVoice 2's campplus.onnx.")],
    output: Output,
) -> None:
    """Takes the voice of a recording, for an assembled MinMo to speak with: its `--speaker`."""
    save_parts(open_voice(network, sound), output)
    show_parts(output)
    _written(output)


def add_to(app: typer.Typer) -> None:
    """Puts the commands beside others."""
    app.command("import")(import_)
    app.command("assemble")(assemble_)
    app.command()(voice)


def show_parts(folder: Path) -> bool:
    """Prints what a folder of parts holds; False where it is none."""
    if not (folder / FILE).is_file():
        return False
    table = Table("part", "tensors", "parameters", "stored as", title=f"{escape(str(folder))}: parts of a MinMo")
    for part in open_parts(folder):
        kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in part.tensors.values()})
        count = sum(weight.numel for weight in part.tensors.values())
        table.add_row(part.name, str(len(part.tensors)), f"{count:,}", ", ".join(kinds))
    out.print(table)
    show_origins(folder)
    return True


def show_origins(folder: Path) -> None:
    """Prints where each part's weights come from, where a folder has a manifest that says it."""
    origins, _ = manifest.read(folder)
    if not origins:
        return
    table = Table("part", "weights", "from", title="where the weights come from")
    for part, origin in origins.items():
        files = ", ".join(f"{source['file']} ({source['sha256'][:12]}…)" for source in origin.sources[:3])
        more = f" and {len(origin.sources) - 3} more" if len(origin.sources) > 3 else ""
        seed = "" if origin.seed is None else f"seed {origin.seed}"
        source = ": ".join(filter(None, [origin.importer or origin.made_by, files + more or seed]))
        state = {"random": "[bold yellow]random[/]", "start": "[yellow]only a start[/]"}.get(
            origin.state, escape(origin.state)
        )
        table.add_row(escape(part), state, escape(source))
    out.print(table)
    for part, origin in origins.items():
        lines = [origin.start, *origin.notes]
        lines += [f"left out: {', '.join(origin.dropped)}"] if origin.dropped else []
        lines += [f"zero: {', '.join(origin.zeroed)}"] if origin.zeroed else []
        for line in filter(None, lines):
            out.print(f"{part}: {line}", highlight=False, markup=False, soft_wrap=True)


def _written(output: Path) -> None:
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    out.print(f"written: {output} ({size:.1f} MB)", highlight=False, markup=False, soft_wrap=True)


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
