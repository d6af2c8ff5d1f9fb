"""A chrome trace of one reply with the engine's steps as named ranges, and a table by operation.

    python profiling/timeline.py [--preset nano] [--weights fp32] [--text seven] [--output timeline.json]

Open the file in chrome://tracing or ui.perfetto.dev. On a GPU the table is by kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

import minmo
from minmo.fast.linear import WEIGHTS

PARTS = ("frontend", "encoder", "projector", "llm", "duplex", "voice_decoder", "flow", "vocoder")


def named(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return step(*args, **kwargs)

    return ranged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--weights", choices=WEIGHTS)
    parser.add_argument("--text", default="seven", help="a typed turn; the reply is spoken")
    parser.add_argument("--output", default="timeline.json")
    options = parser.parse_args()
    model = minmo.FastMinMo.from_pretrained(options.preset, weights=options.weights)
    for name in PARTS:
        part = getattr(model, name)
        part.step = named(f"step: {name}", part.step)
    settings = minmo.Settings(max_text_tokens=10, max_speech_ratio=6)
    minmo.talk(model, options.text, settings)
    gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        reply = minmo.talk(model, options.text, settings)
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print("summing up and writing the trace, which takes as long as a minute", file=sys.stderr)
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    found.export_chrome_trace(options.output)
    print(f"{len(reply.audio) / reply.sample_rate:.2f} s of sound; the trace: {options.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
