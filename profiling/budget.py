"""A turn's latency as the paper counts it, beside the paper's figures.

    python profiling/budget.py [--preset nano] [--weights fp32] [--repeat 5]

The paper's are quoted (arXiv 2501.06282, section 3.3): the model of 8B parameters in bf16 on an L20.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import minmo
from minmo.clock import percentile
from minmo.conversation.timings import FIVE_TEXT, FLOW, LISTEN, SPEECH_BLOCK, TO_AUDIO, VOCODER, Timings
from minmo.doctor import machine
from minmo.fast.linear import WEIGHTS

SOUND = Path(minmo.__file__).parent / "assets" / "question.wav"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--weights", choices=WEIGHTS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sound", default=SOUND, help="what is asked; the question of the package by default")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be at least 1")
    model = minmo.FastMinMo.from_pretrained(options.preset, weights=options.weights)
    sound = minmo.load_audio(options.sound)
    settings = minmo.Settings(max_text_tokens=10, max_speech_ratio=6)
    minmo.talk(model, sound, settings)
    timings = Timings()
    for _ in range(options.repeat):
        timings.merge(minmo.talk(model, sound, settings).timings)
    found = timings.samples
    first_chunk = [flow + sound for flow, sound in zip(found[FLOW], found[VOCODER], strict=False)]
    rows = [
        ("full-duplex predictor: 80 ms of prefill and the decision", found[LISTEN], "250 (the wait for the decision)"),
        ("5 text tokens", found[FIVE_TEXT], "95 to the first, 150"),
        ("15 speech tokens", found[SPEECH_BLOCK], "70"),
        ("token2wav, a chunk", first_chunk, "130"),
        ("end of the turn -> first sound, compute", found[TO_AUDIO], "600 in all, the 250 included"),
    ]
    table = Table("stage", "n", "p50 ms", "p95 ms", "paper, L20, 8B bf16 (quoted), ms", title="a turn's budget")
    for name, seconds, paper in rows:
        if seconds:
            p50, p95 = (f"{1e3 * percentile(seconds, p):.1f}" for p in (50, 95))
            table.add_row(name, str(len(seconds)), p50, p95, paper)
    console = Console(width=140)
    console.print(table)
    console.print(
        f"machine: {machine(model.device)}; weights: {model.config.name}, {model.provenance}, {model.weights}"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
