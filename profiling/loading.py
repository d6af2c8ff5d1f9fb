"""Memory of importing, assembling and loading a model of 1.5 billion parameters: python profiling/loading.py [FOLDER]

It writes a random Qwen2.5-1.5B in Hugging Face's layout (bf16, 3.1 GB, in two files), imports it, assembles a MinMo of
it and nano's other parts, and loads that, each in a process of its own, whose peak of resident memory (mapped files
included) is printed beside the model's size. It needs 10 GB in FOLDER (default: a temporary one), and removes them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import minmo
from minmo.config import BackboneConfig
from minmo.weights.importers.frame import Part, fields
from minmo.weights.importers.qwen2 import key_table
from minmo.weights.parts import save_parts
from minmo.weights.stored import Weight
from minmo.weights.written import write

LLM = BackboneConfig(1536, 28, 12, 2, 128, 8960, vocab=151_936, tied=True)
HF = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_936, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
STEPS = {
    "only import minmo": "",
    "minmo import": "from minmo.weights.importers.table import IMPORTERS; from minmo.weights.parts import save_parts; "
    "save_parts(IMPORTERS['qwen2'].open(F / 'qwen'), F / 'imported')",
    "minmo assemble": "from minmo.weights.assemble import *; "
    "assemble([*find(F / 'imported', 'llm'), *find(F / 'others', 'cosyvoice'), *find(F / 'others', 'encoder'), "
    "*find(F / 'others', 'speech_tokenizer')], F / 'minmo', torch.bfloat16)",
    "minmo.load, bf16": "minmo.load(F / 'minmo', 'cpu', 'bfloat16')",
    "minmo.load, as fp32": "minmo.load(F / 'minmo', 'cpu')",
    "load, then save": "minmo.save(minmo.load(F / 'minmo', 'cpu', 'bfloat16'), F / 'again')",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        folder = Path(name)
        public(folder)
        for step, code in STEPS.items():
            start = time.perf_counter()
            peak = peak_of(f"from pathlib import Path; import torch, minmo; F = Path({name!r}); {code}")
            size = sum(f.stat().st_size for f in (folder / "qwen").iterdir() if f.suffix == ".safetensors")
            size *= 2 if "fp32" in step else 1
            print(
                f"{step:20} {time.perf_counter() - start:6.1f} s, peak {peak / 1e9:5.2f} GB"
                f" = {peak / size:.2f} x {size / 1e9:.2f} GB",
                flush=True,
            )
            if step == "minmo assemble":
                shutil.rmtree(folder / "imported")
        same = subprocess.run(
            ["cmp", folder / "minmo" / "model.safetensors", folder / "again" / "model.safetensors"], check=False
        )
        print("saved again: the same bytes" if same.returncode == 0 else "saved again: OTHER BYTES")


def public(folder: Path) -> None:
    """A random Qwen2.5-1.5B, and nano's other parts as a folder of parts."""
    (folder / "qwen").mkdir()
    weights = {
        name: Weight(
            shape, torch.bfloat16, lambda shape=shape: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        )
        for made in key_table(LLM).values()
        for name, shape in zip(made.sources, made.shapes or (), strict=True)
    }
    write(weights, folder / "qwen", shard=2 << 30)
    (folder / "qwen" / "config.json").write_text(json.dumps(HF))
    nano = minmo.load("nano", "cpu")
    assert nano.tokenizer is not None
    nano.tokenizer.save(folder / "qwen" / "tokenizer.json")
    parts = []
    for name in ("encoder", "speech_tokenizer", "voice_decoder", "flow", "vocoder"):
        config = {k: v for k, v in fields(getattr(nano.config, name)).items() if k != "llm_dim"}
        state = getattr(nano, name).state_dict()
        tensors = {k: Weight.of(v) for k, v in state.items() if not k.startswith("output_projector.")}
        parts.append(Part(name, config, tensors, (), "nano"))
    save_parts(parts, folder / "others", torch.bfloat16)


def peak_of(code: str) -> int:
    """Runs code in a new process -> bytes that were resident at most."""
    told = "\nprint(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    run = subprocess.run([sys.executable, "-c", code + told], check=True, capture_output=True, text=True)
    return 1024 * int(run.stdout.split()[-1])


if __name__ == "__main__":
    main()
