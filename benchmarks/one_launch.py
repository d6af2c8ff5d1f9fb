"""One launch a step (`minmo_kernels.decoder_step`) on this machine's GPU: is it right, and is it faster?

    python benchmarks/one_launch.py PART WEIGHTS ROWS [--preset minmo-8b] [--context 1024] [--replays 10000]
                                    [--share 1.0]

PART: LLM (a position) or "speech block" (all tokens of a block). The step is captured twice, by the layers' launches
and as one, and replayed; every replay must give what the first gave to the bit, no error word may be set, and hidden
states must be the layers' to bf16's rounding. Prints a line of JSON. A kernel that hangs cannot be stopped from inside
its process, so `make gpu STAGE=steps` runs this under a watchdog and notes that it had to.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from minmo.config import load_config
from minmo.fast import profile
from minmo.fast.graphs import CudaCapture
from minmo.fast.one_launch import Limits, Stack, in_backbone, in_voice_decoder, sizes
from minmo.state import all_rows, full_lengths
from minmo_kernels.testing import timing

PARTS = {"LLM": "llm", "speech block": "voice_decoder"}
LOOKED_AT = 500
"""Replays between two looks at the error word, which a spoilt launch leaves set."""
ROUNDING = 0.05
"""How far hidden states may be apart, as a share of the largest: bf16 through all layers."""


def llm(model: Any, rows: int, context: int, limits: Limits) -> tuple[Stack, Any]:
    """The stack, and a call of the step that always begins at the same context."""
    part = model.llm
    device = part.norm.weight.device
    state, entries = profile._context(part, rows, context, 1), all_rows(rows, device)
    x, one = torch.randn(rows, 1, part.config.dim, device=device).to(part.norm.weight.dtype), torch.ones_like(entries)

    def call() -> torch.Tensor:
        state.lengths.fill_(context)
        return part.step(x, one, state, entries)[0]

    return in_backbone(part, limits), call


def speech_block(model: Any, rows: int, context: int, limits: Limits) -> tuple[Stack, Any]:
    part = model.voice_decoder
    c, device = part.config, part.lm.norm.weight.device
    room = 2 * (c.semantic_block + c.speech_block)
    state = part.initial_state(rows, context + room)
    state.lm = profile._context(part.lm, rows, context, room)
    entries = all_rows(rows, device)
    part.start(state, entries, torch.arange(rows, device=device))
    state.query.fill_(context - 1)
    vectors = torch.randn(rows, c.semantic_block, 2 * c.llm_dim, device=device).to(part.lm.norm.weight.dtype)
    counts, open_ended = full_lengths(vectors), torch.zeros(rows, dtype=torch.bool, device=device)

    def call() -> torch.Tensor:
        for number in (state.text, state.speech):
            number.zero_()
        state.recent.fill_(-1)
        state.lm.lengths.fill_(context)
        return part._round(vectors, counts, open_ended, state, entries, None)[0]

    return in_voice_decoder(part, limits), call


@torch.no_grad()
def measured(
    preset: str, part: str, weights: str, rows: int, context: int, replays: int, share: float
) -> dict[str, Any]:
    device = torch.device("cuda")
    model = profile.random_model(load_config(preset), (PARTS[part],), weights, device)
    stack, call = (llm if part == "LLM" else speech_block)(model, rows, context, Limits(share))
    layered, expected = CudaCapture()(call)
    layered()
    expected = expected.clone()
    stack.on = True
    single, output = CudaCapture()(call)
    single()
    first, wrong, faults = output.clone(), torch.zeros((), dtype=torch.int64, device=device), 0
    for i in range(replays):
        single()
        wrong += ~(output == first).all()
        if i % LOOKED_AT == 0 or i + 1 == replays:
            faults += int(stack.sync[2]) > 0
            stack.sync.zero_()
    found: dict[str, Any] = {"replays": replays, "faults": faults, "wrong": int(wrong), "context": context}
    found |= {"share": share, "sizes": sizes(getattr(model, PARTS[part]))}
    if part == "LLM":
        apart = float((first.float() - expected.float()).abs().max() / expected.float().abs().max())
        found |= {"apart": apart, "wrong": found["wrong"] + (not apart <= ROUNDING) * replays}
    else:  # of random weights, whose close choices may fall either way
        found["alike"] = float((first == expected).float().mean())
    for name, replay in (("seconds", single), ("layers", layered)):
        found[name] = statistics.median(timing.event_times(replay, 200))
    return {**found, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "driver": timing.driver()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("weights", choices=["bf16", "int8"])
    parser.add_argument("rows", type=int)
    parser.add_argument("--preset", default="minmo-8b")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=1.0, help="of the GPU's multiprocessors")
    o = parser.parse_args()
    print(json.dumps(measured(o.preset, o.part, o.weights, o.rows, o.context, o.replays, o.share)))


if __name__ == "__main__":
    main()
