"""Plants typical faults into copies of the kernels, one at a time, and shows that the tests catch every one.

    python tests/minmo_kernels/mutants.py [NAME ...]

The tests are those of `make test`, as many examples too, and pass on a copy without a fault. A fault that no test
notices is a hole in the tests: the script then ends with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """In `file` (below minmo_kernels), the text `old` becomes `new`; the tests of `operation` should notice."""

    name: str
    operation: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "length off by one", "streaming_attention", "ops/streaming_attention/kernel.py",
        "high = tl.minimum(low + width, high)", "high = tl.minimum(low + width, high) + 1",
    ),
    Mutant(
        "wrong head group", "streaming_attention", "ops/streaming_attention/kernel.py",
        "place = (entry.to(tl.int64) * queries + t) * HEADS + kv_head * group + m % group\n    d",
        "place = (entry.to(tl.int64) * queries + t) * HEADS + kv_head + m % group\n    d",
    ),
    Mutant(
        "missing rescale", "streaming_attention", "ops/streaming_attention/kernel.py",
        "out = tl.dot(weight.to(q.dtype), v, out * shrink[:, None]", "out = tl.dot(weight.to(q.dtype), v, out",
    ),
    Mutant(
        "ring wrap", "streaming_attention", "ops/streaming_attention/kernel.py",
        "key = end - 1 - (end - 1 - slot + capacity) % capacity", "key = end - 1 - (end - slot + capacity) % capacity",
    ),
    Mutant(
        "natural and binary logarithms mixed", "streaming_attention", "ops/streaming_attention/kernel.py",
        "top * 0.6931471805599453", "top",
    ),
    Mutant(
        "slot of the wrong row", "append_kv", "ops/append_kv/kernel.py",
        "at = (row.to(tl.int64) * capacity + slot) * KV_HEADS + head",
        "at = ((row ^ 1).to(tl.int64) * capacity + slot) * KV_HEADS + head",
    ),
    Mutant(
        "rotation the wrong way", "append_kv", "tiles.py",
        "tl.where(odd, -sin, cos), tl.where(odd, cos, sin)", "tl.where(odd, sin, cos), tl.where(odd, cos, sin)",
    ),
    Mutant(
        "dropped tail", "linear_residual", "tiles.py",
        "for start in range(0, DIM, BLOCK_K):\n            k = start + columns\n            if",
        "for start in range(0, DIM - BLOCK_K + 1, BLOCK_K):\n            k = start + columns\n            if",
    ),
    Mutant(
        "transposed scale", "gate_up_swiglu", "tiles.py",
        "tl.load(scale_ptr + n, mask=n < DIM_OUT, other=0.0)[None, :]",
        "tl.load(scale_ptr + (n ^ 1), mask=n < DIM_OUT, other=0.0)[None, :]",
    ),
    Mutant(
        "nibbles swapped", "linear_residual", "tiles.py",
        "place = tl.arange(0, 8)[None", "place = (tl.arange(0, 8) ^ 1)[None",
    ),
    Mutant(
        "sign of half the numbers lost", "linear_residual", "operands.py",
        "words & 0x00800080", "words & 0x00000080",
    ),
    Mutant(
        "inputs not in the weight's order", "linear_residual", "operands.py",
        "(2, 0, 1, 7, 5, 3, 6, 4)", "(2, 0, 1, 7, 6, 3, 5, 4)",
    ),
    Mutant(
        "scale of the wrong vector", "streaming_attention", "ops/streaming_attention/kernel.py",
        "tl.load(v_scale_ptr + vector, mask", "tl.load(v_scale_ptr + vector // KV_HEADS, mask",
    ),
    Mutant(
        "padding read", "rms_norm", "ops/rms_norm/kernel.py",
        "active = tl.load(rows_ptr + vector // each) >= 0", "active = tl.load(rows_ptr + vector // each) >= -1",
    ),
    Mutant(
        "carry off by an item", "fsmn", "ops/fsmn/kernel.py",
        "s = count + slot - LEFT\n", "s = count + slot - LEFT + 1\n",
    ),
    Mutant(
        "fill token off by a slot", "mix_semantic_speech", "ops/mix_semantic_speech/kernel.py",
        "last = offset == cycle - 1", "last = offset == cycle - 2",
    ),
    Mutant(
        "digit off by one", "fsq_encode", "ops/fsq_encode/kernel.py",
        "half.to(tl.float32)[None, :] + 12582912.0) - 12582912.0",
        "half.to(tl.float32)[None, :] + 12582913.0) - 12582912.0",
    ),
    Mutant(
        "ties by the wrong end", "sample_token", "ops/sample_token/kernel.py",
        "earlier = ties + tl.cumsum(tied.to(tl.int32), axis=0) - tied.to(tl.int32)",
        "earlier = ties + tl.cumsum(tied.to(tl.int32), axis=0)",
    ),
    Mutant(
        "sum of squares of the last block alone", "gate_up_swiglu", "tiles.py",
        "squares += x * x", "squares = x * x",
    ),
    Mutant(
        "id within its block", "sample_token", "ops/sample_token/kernel.py",
        "drawn = tl.where(here > best, start + place, drawn)", "drawn = tl.where(here > best, place, drawn)",
    ),
    Mutant(
        "ties counted by block", "sample_token", "ops/sample_token/kernel.py",
        "ties += tl.sum(tied.to(tl.int32), axis=0)", "ties = tl.sum(tied.to(tl.int32), axis=0)",
    ),
    Mutant(
        "infinite temperature", "sample_token", "ops/sample_token/kernel.py",
        'return tl.where(below > float("-inf"), below / temperature, float("-inf"))', "return below / temperature",
    ),
    Mutant(
        "part that saw nothing read", "merge_linear_residual", "tiles.py",
        "(read & (share > 0.0))[:, :, :, None]", "read[:, :, :, None]",
    ),
    Mutant(
        "next token does not see the last", "decoder_step", "ops/decoder_step/kernel.py",
        "tl.store(ends_ptr + sessions + row, length + 2)", "tl.store(ends_ptr + sessions + row, length + 1)",
    ),
    Mutant(
        "every layer in the first one's cache", "decoder_step", "ops/decoder_step/kernel.py",
        "return ptr + layer * sessions * capacity", "return ptr + layer * 0 * sessions * capacity",
    ),
    Mutant(
        "an end that comes too early", "decoder_step", "ops/decoder_step/kernel.py",
        "tl.where(early, end, -1)", "tl.where(early, -1, -1)",
    ),
    Mutant(
        "carry not kept", "log_mel", "ops/log_mel/kernel.py",
        "j = length + slot - left", "j = slot - left",
    ),
]  # fmt: skip


def passes(operation: str, mutant: Mutant | None) -> bool:
    """Whether the operation's tests pass on a copy of the package, with the fault in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("minmo_kernels", "minmo", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            path = copy / "minmo_kernels" / mutant.file
            source = path.read_text()
            if mutant.old not in source:
                raise SystemExit(f"{mutant.name}: its text is no longer in {mutant.file}; write the mutant anew")
            path.write_text(source.replace(mutant.old, mutant.new, 1))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "tests/minmo_kernels/test_triton.py", "-k"]
        chosen = f"reference[{operation}] or laws[{operation}-"
        done = subprocess.run([*command, chosen], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode in (2, 3, 4, 5):  # pytest itself went wrong; anything else below 0 is a crash of the kernel
            raise SystemExit(done.stdout + done.stderr)
        return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(m.name for m in MUTANTS))
    names = parser.parse_args().names
    if unknown := set(names) - {m.name for m in MUTANTS}:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}; -h lists them")
    chosen = [m for m in MUTANTS if not names or m.name in names]
    operations, missed = list(dict.fromkeys(m.operation for m in chosen)), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for operation, fine in zip(operations, pool.map(lambda o: passes(o, None), operations), strict=True):
            if not fine:
                raise SystemExit(f"the tests of {operation} fail without any fault; mend that first")
            print(f"{'passes':7} {operation:28} without a fault", flush=True)
        for mutant, fine in zip(chosen, pool.map(lambda m: passes(m.operation, m), chosen), strict=True):
            print(f"{'MISSED' if fine else 'caught':7} {mutant.operation:28} {mutant.name}", flush=True)
            missed += [mutant.name] if fine else []
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
