"""What a token must cost on a GPU, from the operations' specs: launches, bytes, flops, floor, and a prediction.

    python profiling/roofline.py minmo-8b --gpu a100|h100|h200|l20 [--rows 1] [--context 1024] [--weights bf16]
                                 [--persistent]

floor: bytes over the memory's bandwidth. Predicted: the slower of memory and arithmetic for each launch, and the cost
of a launch within a graph (one more a layer from three rows on is left out). These are PREDICTIONS; the last line is
what `make gpu STAGE=steps` measured on such a GPU, where benchmarks/results holds it.

--persistent: the same token as one launch (`decoder_step`): its barriers' cost and its bytes over the bandwidth. While
a block waits it asks for the next weights, so what a barrier really costs lies between none and all of it; both are
shown.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minmo.config import MinMoConfig, load_config
from minmo.fast.layer import MOST_FUSED_ROWS, PARTS
from minmo.info import kernel_dims
from minmo_kernels.ops.decoder_step.schedule import Shape, Tiles, barriers, program
from minmo_kernels.spec import load_all

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LAUNCH = 1.3e-6
"""Seconds that a kernel costs within a captured graph, boundaries included (quoted: Hazy Research, on an H100)."""
BARRIER = 1.3e-6
"""Seconds of a barrier of a grid, an assumption: no more than the boundary of two kernels, whose drain and refill it
has (an atomic to the level-2 cache and back, and the last block's lateness)."""
FORMATS = {"bf16": "full", "int8": "int8", "int4": "int4 g32"}


@dataclass(frozen=True)
class GPU:
    """bandwidth: bytes a second, the maker's; flops: of dense bf16 products, the maker's."""

    bandwidth: float
    flops: float


GPUS = {
    "a100": GPU(2.04e12, 312e12),
    "h100": GPU(3.35e12, 989e12),
    "h200": GPU(4.8e12, 989e12),
    "l20": GPU(0.864e12, 119.5e12),
}


@dataclass(frozen=True)
class Launches:
    """Alike launches of a token."""

    operation: str
    count: int
    bytes: int
    flops: int

    def seconds(self, gpu: GPU) -> float:
        return self.count * (max(self.bytes / gpu.bandwidth, self.flops / gpu.flops) + LAUNCH)


def token(config: MinMoConfig, part: str, rows: int, context: int, weights: str) -> list[Launches]:
    """Every launch of one token of a decoder: its layers, final norm, head and choice."""
    dims = {**kernel_dims(config)[part], "capacity": context}
    layers = (config.llm if part == "LLM" else config.voice_decoder.lm).layers
    specs = load_all()

    def launches(operation: str, count: int, wanted: dict[str, Any]) -> Launches:
        spec = specs[operation]
        base = next(
            c for _, c in spec.cases_of({part: dims}) if all(c[k] == v for k, v in wanted.items() if k in KINDS)
        )
        case = {**base, **wanted, "batch": rows}
        return Launches(operation, count, spec.bytes(case), spec.flops(case))

    full = {"weights": FORMATS[weights]}
    return [
        launches("rms_norm_qkv_rope_append", layers, full),
        launches("streaming_attention", layers, {"queries": 1, "int8": False}),
        launches("merge_linear_residual", layers, {**full, "partials": PARTS}),
        launches("gate_up_swiglu", layers, full),
        launches("linear_residual", layers, {**full, "residual": True}),
        launches("rms_norm", 1, {"items": 0}),
        launches("linear_residual", 1, {**full, "residual": False}),
        launches("sample_token", 1, {}),
    ]


@dataclass(frozen=True)
class Persistent:
    """A token as one launch."""

    instructions: int
    barriers: int
    bytes: int
    flops: int

    def seconds(self, gpu: GPU, hidden: bool) -> float:
        """hidden: barriers cost nothing, since the memory works through them."""
        moving = max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)
        return moving + LAUNCH + (0.0 if hidden else self.barriers * BARRIER)


def persistent(config: MinMoConfig, part: str, rows: int, context: int, weights: str) -> Persistent:
    """The same token as `token`, by the instruction list that a launch would take."""
    dims = {**kernel_dims(config)[part], "capacity": context + 1}
    spec = load_all()["decoder_step"]
    base = next(c for _, c in spec.cases_of({part: dims}) if c["weights"] == FORMATS[weights])
    case = {**base, "batch": rows, "vocab": dims["vocab"], "steps": 1}
    heads, kv_heads = case["heads"]
    shape = Shape(
        rows, dims["layers"], dims["dim"], heads, kv_heads, dims["head_dim"], dims["ffn"], dims["vocab"], parts=PARTS,
        merges_ahead=rows > 2 or (weights == "int8" and rows > 1),
    )  # fmt: skip
    listed = program(shape, Tiles(qkv=8, out=8, gate_up=8, down=8, head=8), 1)
    return Persistent(len(listed), barriers(listed), spec.bytes(case), spec.flops(case))


KINDS = ("residual", "queries", "items", "int8")
"""What tells an operation's cases of one decoder apart, but formats and sizes."""


def measured(gpu: str, step: str, rows: int, context: int, weights: str) -> float | None:
    """The median that a results file of such a GPU holds."""
    for path in sorted(RESULTS.glob("*-steps.json")):
        if gpu in path.name.lower():
            for entry in json.loads(path.read_text()).values():
                key = tuple(entry.get(name) for name in ("step", "rows", "context", "weights"))
                if key == (step, rows, context, weights):
                    return float(entry["p50"])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--rows", type=int, default=1, choices=range(1, MOST_FUSED_ROWS + 1), metavar="1..8")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--weights", choices=sorted(FORMATS), default="bf16")
    parser.add_argument("--persistent", action="store_true", help="also as one launch a token; bf16 and int8")
    options = parser.parse_args()
    config, gpu, console = load_config(options.preset), GPUS[options.gpu], Console(width=140)
    where = f"{options.preset}, {options.rows} rows, context {options.context}, {options.weights}"
    for part, step in (("LLM", "llm"), ("voice token LM", "voice_lm")):
        found = token(config, part, options.rows, options.context, options.weights)
        table = Table("operation", "launches", "MB", "MFLOP", "floor µs", "predicted µs")
        table.title = f"PREDICTION, nothing ran: a token of the {part} on {options.gpu.upper()} ({where})"
        for line in found:
            table.add_row(
                line.operation, str(line.count), f"{line.count * line.bytes / 1e6:.2f}",
                f"{line.count * line.flops / 1e6:.1f}", f"{1e6 * line.count * line.bytes / gpu.bandwidth:.1f}",
                f"{1e6 * line.seconds(gpu):.1f}",
            )  # fmt: skip
        total = sum(line.count * line.bytes for line in found)
        table.add_section()
        table.add_row(
            "a token", str(sum(line.count for line in found)), f"{total / 1e6:.1f}",
            f"{sum(line.count * line.flops for line in found) / 1e6:.1f}", f"{1e6 * total / gpu.bandwidth:.1f}",
            f"{1e6 * sum(line.seconds(gpu) for line in found):.1f}",
        )  # fmt: skip
        console.print(table)
        if options.persistent:
            if options.weights == "int4":
                raise ValueError("--persistent takes bf16 and int8 weights: one launch serves no others")
            one = persistent(config, part, options.rows, options.context, options.weights)
            launched = sum(line.seconds(gpu) for line in found)
            least, most = (1e6 * one.seconds(gpu, hidden) for hidden in (True, False))
            console.print(
                f"  PREDICTION, as one launch: {one.bytes / 1e6:.1f} MB in {1e6 * one.bytes / gpu.bandwidth:.1f} µs,"
                f" and {one.barriers} barriers of {1e6 * BARRIER:.1f} µs: {most:.1f} µs, or {least:.1f} µs where\n"
                f"  prefetching hides them all; layer by layer {1e6 * launched:.1f} µs"
            )
        real = measured(options.gpu, step, options.rows, options.context, options.weights)
        console.print(
            "  not measured: benchmarks/results has no such line (make gpu STAGE=steps)"
            if real is None
            else f"  MEASURED: {1e6 * real:.1f} µs"
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
