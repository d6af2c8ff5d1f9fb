"""Speech tokens of the assistant's sound, written into a manifest once (`minmo tokenize`), for flow and voice stages.

Work is cut into shares of lines, a process each; a share that is there is not done again, so a run that was stopped
goes on where it was, as long as manifest and model are what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lhotse.serialization import open_best
from rich.progress import track

from minmo import weights
from minmo.data.manifest import describe_skipped, load_sound, read_manifest
from minmo.data.schema import DataError
from minmo.model import MinMo
from minmo.training.batches import padded

SHARE, BATCH = 256, 16
"""Lines of a share, and of a pass through the tokenizer."""


def tokenize(manifest: Path, out: Path, model: str, *, jobs: int = 1) -> Counter[str]:
    """Writes the lines of `manifest` with `speech_tokens` of their `target_recording` to `out` (JSONL, .gz or not).

    model: a preset or a model's folder, whose speech tokenizer serves. Returns how many lines were left out, by reason:
    those whose sound cannot be used; a line that has its tokens already stays as it is. Raises DataError for a manifest
    that cannot be read, ValueError where it is `out` itself.
    """
    if out.resolve() == manifest.resolve():
        raise ValueError(f"{out} is the manifest that is read: write to another file")
    shares = out.with_name(f"{out.name}.{_state_of(manifest, Path(model))}.shares")
    shares.mkdir(parents=True, exist_ok=True)
    todo = [(n, lines, shares, model) for n, lines in enumerate(_shares(manifest))]
    with ExitStack() as stack:
        work: Iterator[Path] = map(_share, todo)
        if jobs > 1:  # spawned: a forked process would inherit the threads of a PyTorch that has already computed
            pool = stack.enter_context(ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)))
            work = pool.map(_share, todo)
        done = list(track(work, "tokenizing", len(todo), transient=True))
    unfinished = out.with_name(f"{out.name}.part{''.join(out.suffixes)}")
    with open_best(unfinished, "w") as file:
        for path in done:
            print(path.read_text(encoding="utf-8"), end="", file=file)
    unfinished.replace(out)
    skipped: Counter[str] = Counter()
    for path in done:
        skipped.update(json.loads(path.with_suffix(".skipped").read_text(encoding="utf-8")))
        path.unlink()
        path.with_suffix(".skipped").unlink()
    shares.rmdir()
    print(describe_skipped(skipped))
    return skipped


def _state_of(*paths: Path) -> str:
    """Changes with any file of these: what was begun with others is not gone on with."""
    files = sorted(f for path in paths for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((paths, stats)).encode()).hexdigest()[:12]


def _shares(manifest: Path) -> Iterator[list[Any]]:
    cuts = iter(read_manifest(manifest))
    while lines := list(islice(cuts, SHARE)):
        yield lines


_MODELS: dict[str, MinMo] = {}


def _share(task: tuple[int, list[Any], Path, str]) -> Path:
    number, cuts, folder, name = task
    path = folder / f"{number:06}.jsonl"
    if path.is_file():
        return path
    if name not in _MODELS:
        _MODELS[name] = weights.load(name, device="cpu")
    skipped: Counter[str] = Counter()
    lines = []
    for start in range(0, len(cuts), BATCH):
        lines += _tokens(cuts[start : start + BATCH], _MODELS[name], skipped)
    path.with_suffix(".skipped").write_text(json.dumps(skipped), encoding="utf-8")
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)
    return path


@torch.inference_mode()
def _tokens(cuts: Sequence[Any], model: MinMo, skipped: Counter[str]) -> list[dict[str, Any]]:
    sounds, kept = [], []
    for cut in cuts:
        if cut.custom.get("speech_tokens"):
            continue
        try:
            sounds.append(torch.from_numpy(load_sound(cut, "target_recording")))
            kept.append(cut)
        except DataError as error:
            skipped[error.reason] += 1
    if kept:
        ids, counts = model.speech_tokenizer.encode(*model.frontend(*padded(sounds)))
        for cut, tokens, count in zip(kept, ids.tolist(), counts.tolist(), strict=True):
            cut.custom["speech_tokens"] = tokens[:count]
    return [cut.to_dict() for cut in cuts if cut.custom.get("speech_tokens")]
