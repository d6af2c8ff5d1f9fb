"""The training loop: what a step minimises, what a killed run loses, what is kept, refused and said.

Children are forked, so that they do not import PyTorch again; the two-process runs share one launch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from minmo.training import checkpoints
from minmo.training.checkpoints import best, load_trained, whole
from minmo.training.loop import LoopSettings, Objective, TrainingError, fit, processes
from minmo.training.records import read_log
from minmo.training.spikes import ENOUGH, SpikeGuard

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint read here by one process
]

ITEMS, BATCH = 24, 8
DIM = 6
POISON = 5
"""The item that some data makes harmful."""


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """Every run and fork collects garbage: not through all of PyTorch's modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Items(torch.utils.data.Dataset):
    """Item i has i % 3 + 1 targets for one loss, and one for the other if i is odd. worst: gain of item POISON's."""

    def __init__(self, worst=1.0, deadly=False):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ITEMS, DIM, generator=generator)
        self.gain = torch.ones(ITEMS)
        self.gain[POISON] = worst
        self.deadly = deadly

    def __getitem__(self, i):
        if self.deadly and i == POISON and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return i, self.x[i], self.gain[i]


class Slices:
    """Batches of all processes in an order drawn from the epoch; a process takes its slice of each."""

    def __init__(self, size, rank=0, world=1):
        self.size, self.rank, self.world = size, rank, world
        self.epoch = self.position = 0

    def __iter__(self):
        order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < ITEMS // self.size:
            start = self.position * self.size
            self.position += 1
            yield order[start : start + self.size][self.rank :: self.world]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


def collate(items):
    index, x, gain = zip(*items, strict=True)
    batch = {"index": torch.tensor(index), "x": torch.stack(x), "gain": torch.stack(gain)}
    return batch, [f"item-{i}" for i in index]


def loader(items=None, accumulate=1, workers=0, rank=0, world=1):
    slices = Slices(BATCH // accumulate, rank, world)
    return StatefulDataLoader(items or Items(), batch_sampler=slices, collate_fn=collate, num_workers=workers)


class Toy(Objective):
    """A frozen layer, two trained ones, two losses with different numbers of targets."""

    def __init__(self, dropout=0.0, width=8, act=None):
        super().__init__()
        torch.manual_seed(1)
        self.weights = {"even": 1.0, "odd": 0.3}
        self.frozen = nn.Sequential(nn.Linear(DIM, width), nn.Dropout(0.5)).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.head = nn.Linear(width, 2)
        self.act, self.calls = act, 0

    def counts(self, batch):
        index = batch["index"]
        return {"even": float((index % 3 + 1).sum()), "odd": float((index % 2).sum())}

    def forward(self, batch):
        self.calls += 1
        if self.act and self.training:
            self.act(self.calls)
        y = self.frozen(batch["x"])
        for layer in self.layers:
            y = layer(y)
        error = (self.head(y).float() - 1) ** 2 * batch["gain"][:, None]
        index = batch["index"]
        return {"even": (error[:, 0] * (index % 3 + 1)).sum(), "odd": (error[:, 1] * (index % 2)).sum()}

    def to_device(self, batch, device):
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def blocks(self):
        return list(self.layers)


def settings(**changes):
    return LoopSettings(**{"steps": 8, "lr": 0.02, "log_every": 1, "save_every": 2, "validate_every": 100, **changes})


def losses(out):
    """Everything of a run's log that is not of the clock."""
    clock = ("seconds", "items_per_second")
    return [{k: v for k, v in record.items() if k not in clock} for record in read_log(out)]


def tensors(checkpoint):
    """All tensors of a checkpoint by name."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size) for name, entry in stored.items()}
    dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


def close(run, reference, rel=1e-4):
    assert [record["step"] for record in run] == [record["step"] for record in reference]
    for one, two in zip(run, reference, strict=True):
        assert {k: v for k, v in one.items() if k != "kind"} == pytest.approx(
            {k: v for k, v in two.items() if k != "kind"}, rel=rel
        )


def forked(target, *args):
    """Exit code of a child process; the processes that it leaves behind when it is killed end with it."""

    def alone():
        gc.freeze()  # what the parent left is not the child's to end: threads that it would wait for are not here
        os.setsid()
        target(*args)

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    child.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.exitcode


class Interrupted(Exception):
    pass


def interrupt_at(call):
    def act(calls):
        if calls == call:
            raise Interrupted

    return act


# --- what a step minimises -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """Eight steps of the definition, written out: each loss over all its targets of a step, added by weight."""
    toy, items, batches = Toy().eval(), Items(), iter(())
    slices = Slices(BATCH)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in toy.parameters() if p.requires_grad and p.dim() > 1]},
            {"params": [p for p in toy.parameters() if p.requires_grad and p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.02, betas=(0.9, 0.95), weight_decay=0.01,
    )  # fmt: skip
    records = []
    for step in range(1, 9):
        chosen = next(batches, None)
        if chosen is None:
            batches = iter(slices)
            chosen = next(batches)
        batch, _ = collate([items[i] for i in chosen])
        sums, counts = toy(batch), toy.counts(batch)
        means = {name: sums[name] / counts[name] for name in sums}
        loss = means["even"] + 0.3 * means["odd"]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        lr = 0.02 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        records.append(
            {"step": step, "loss": loss.item(), "loss/even": means["even"].item(), "loss/odd": means["odd"].item()}
            | {"gradient_norm": norm.item(), "lr": lr}
        )
    return records


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_the_mean_over_all_targets(tmp_path, reference, accumulate):
    """Micro-batches of two items hold 3 to 5 targets of one loss and 0 to 2 of the other."""
    fit(Toy(), loader(accumulate=accumulate), settings(accumulate=accumulate), tmp_path)
    close(losses(tmp_path), reference, rel=1e-5)


def in_two_processes(out):
    """All that is asked of two processes, one run after the other."""
    gc.freeze()  # as in `forked`
    out = Path(out)
    with processes() as here:
        mine = {"rank": here.rank, "world": here.world}
        told = {}

        def refused(name, kind, *args, **kwargs):
            with pytest.raises(kind) as error:
                fit(*args, **kwargs)
            told[name] = here.of_all(str(error.value))

        toy = Toy()
        batch, _ = collate([Items()[i] for i in range(ITEMS)])

        def validate():
            return {"score": float(sum(toy(batch).values()))}

        many = settings(shard=True, accumulate=2, validate_every=3)
        fit(toy, loader(**mine, accumulate=2), many, out / "two", validate=validate)
        fit(Toy(), loader(**mine), settings(shard=True), out / "one-then-two")
        with pytest.raises(Interrupted):
            fit(Toy(act=interrupt_at(6)), loader(**mine), settings(shard=True), out / "two-then-one")
        bf16 = settings(shard=True, precision="bf16", checkpoint_activations=True)
        fit(Toy(), loader(**mine), bf16, out / "bf16")

        refused("plain", ValueError, Toy(), loader(**mine), settings(), out / "plain")
        nan = loader(Items(math.nan), **mine)
        refused("nan", TrainingError, Toy(), nan, settings(shard=True, patience=1), out / "nan")
        act = None
        if here.rank == 1:

            def act(calls):
                while calls == 4 and not (out / "full" / "step-000002").exists():
                    time.sleep(0.01)
                if calls == 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

        refused("full", TrainingError, Toy(act=act), loader(**mine), settings(shard=True), out / "full")
        if here.rank == 0:
            (out / "told.json").write_text(json.dumps(told))


def test_two_processes(tmp_path, reference):
    with pytest.raises(Interrupted):
        fit(Toy(act=interrupt_at(6)), loader(), settings(), tmp_path / "one-then-two")
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
        start_method="fork", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(launch, in_two_processes)(str(tmp_path))
    two = losses(tmp_path / "two")
    close([r for r in two if r["kind"] == "train"], reference)
    scores = {r["step"]: r["score"] for r in two if r["kind"] == "validation"}
    assert scores.keys() == {3, 6, 8} and best(tmp_path / "two").score == min(scores.values())
    close(losses(tmp_path / "one-then-two"), reference)
    fit(Toy(), loader(), settings(), tmp_path / "two-then-one")
    close(losses(tmp_path / "two-then-one"), reference)
    for run in ("one-then-two", "two-then-one"):
        states = tensors(tmp_path / run / "step-000008")
        for name, tensor in tensors(tmp_path / "two" / "step-000008").items():
            torch.testing.assert_close(states[name], tensor, rtol=1e-3, atol=1e-5)

    rough, exact = ([r["loss"] for r in records] for records in (losses(tmp_path / "bf16"), reference))
    assert rough == pytest.approx(exact, rel=0.05) and rough != pytest.approx(exact, rel=1e-5)

    told = json.loads((tmp_path / "told.json").read_text())
    assert all("2 processes were launched, but shard is false" in text for text in told["plain"])
    poisoned = next(batch for batch in Slices(BATCH) if POISON in batch)
    assert all(f"item-{i}" in text for i in poisoned for text in told["nan"])
    assert all("step-000004 could not be written" in text for text in told["full"])
    assert [path.name for path in whole(tmp_path / "full")] == ["step-000002"]


# --- killed and continued --------------------------------------------------------------------------------------------


def whole_run(out, act=None, **changes):
    """A run with dropout, a poisonous item in each epoch, and a process that reads."""
    data = loader(Items(math.nan), workers=1)
    return fit(Toy(dropout=0.3, act=act), data, settings(**{"steps": 10, "save_every": 3, **changes}), out)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return out, whole_run(out)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_step(out, call):
    whole_run(out, act=lambda calls: calls == call and kill())


def killed_in_a_save(out, name, count):
    """At the count-th time that the saving threads call os.`name`."""
    real, left = getattr(os, name), [count]

    def deadly(*args):
        left[0] -= 1
        return real(*args) if left[0] else kill()

    setattr(os, name, deadly)
    whole_run(out)


DEATHS = {
    "in a step": (killed_in_a_step, random.Random(7).randrange(4, 10)),
    "with the tensors written": (killed_in_a_save, "fsync", 6),
    "before the new name": (killed_in_a_save, "rename", 3),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, unbroken, death):
    target, *args = DEATHS[death]
    assert forked(target, tmp_path, *args) == -signal.SIGKILL
    before = losses(tmp_path)
    torn = sorted(path.name for path in tmp_path.glob("*.tmp"))
    assert (death == "in a step") or torn
    out, expected = unbroken
    assert before[-1]["step"] < 10 and expected.skipped  # it died on the way, and the guard has something to remember
    result = whole_run(tmp_path)
    assert result.skipped == expected.skipped
    assert losses(tmp_path) == losses(out)
    assert not list(tmp_path.glob("*.tmp"))
    states = tensors(result.last)
    for name, tensor in tensors(expected.last).items():
        assert torch.equal(states[name], tensor), name


def test_a_process_of_the_loader_that_dies_is_named(tmp_path, reference):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):  # two epochs of peace
        fit(Toy(act=interrupt_at(6)), loader(workers=1), settings(), out)
    with pytest.raises(TrainingError, match=r"data loader died .* last whole checkpoint is step-000004: start again"):
        fit(Toy(), loader(Items(deadly=True), workers=1), settings(), out)
    fit(Toy(), loader(workers=1), settings(), out)
    close(losses(out), reference)


def fills_the_disk(out, limit):
    """The kernel refuses to write files beyond a limit, in bytes, from the fourth step on."""

    def act(calls):
        if calls == 4:
            while not (out / "step-000002").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    with pytest.raises(TrainingError, match=r"could not be written to .* the last whole checkpoint is step-000002"):
        fit(Toy(act=act), loader(), settings(), out)
    os._exit(0)


@pytest.mark.parametrize("limit", [4096, 64], ids=["the checkpoint", "the log"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, reference, limit):
    assert forked(fills_the_disk, tmp_path, limit) == 0
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000002"]
    fit(Toy(), loader(), settings(), tmp_path)
    close(losses(tmp_path), reference)


def test_no_space_left_is_told_before_the_next_save(tmp_path, monkeypatch):
    """The error of a full disk itself, put in the place of the new name of step 3; the next save would be at step 6."""

    def full(*args):
        raise OSError(28, "No space left on device")

    saves, save = [], checkpoints.Checkpoints.save

    def noted(self, *args, **options):
        save(self, *args, **options)
        saves.append(self._pending)

    def until_it_failed(calls):
        if calls == 4:
            wait(saves)

    monkeypatch.setattr(checkpoints.os, "rename", full)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", noted)
    toy = Toy(act=until_it_failed)
    with pytest.raises(TrainingError, match=r"MB are free there; \[Errno 28\] No space left .* is none: make room"):
        fit(toy, loader(), settings(save_every=3), tmp_path)
    assert toy.calls < 6 and not list(tmp_path.glob("step-*"))


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_best_and_newest_stay(tmp_path):
    toy = Toy()
    scores, seen = iter([3.0, 1.0, math.nan, 2.0]), []

    def validate():
        seen.append({name: p.detach().clone() for name, p in toy.named_parameters() if p.requires_grad})
        assert not any(module.training for module in toy.modules())
        return {"score": next(scores), "wer": 0.5}

    tone = np.sin(np.arange(1600) / 8).astype(np.float32)
    result = fit(
        toy, loader(), settings(keep=1, save_every=1, validate_every=2), tmp_path,
        validate=validate, samples=lambda: {"hello": (tone, 16_000)},
    )  # fmt: skip
    assert [path.name for path in whole(tmp_path)] == ["step-000004", "step-000008"]
    assert result.best == tmp_path / "step-000004" and result.score == 1.0 and result.last.name == "step-000008"
    assert best(tmp_path) == checkpoints.Best(result.best, 1.0)

    frozen = {name: p for name, p in Toy().named_parameters() if name.startswith("frozen")}
    for name, parameter in toy.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    again = Toy()
    load_trained(result.best, again)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, frozen[name] if name in frozen else seen[1][name])
    states = {f"optimizer.{name}.{key}" for name in seen[0] for key in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors(result.last).keys() == {f"parameters.{name}" for name in seen[0]} | states
    with pytest.raises(TrainingError, match="which this module has not"):
        load_trained(result.best, Toy(width=7))

    assert imread(tmp_path / "loss.png").shape[2] == 4
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    scalars = {f"train/{n}" for n in ("loss", "loss/even", "gradient_norm", "lr", "items_per_second", "seconds")}
    assert scalars | {"validation/score", "validation/wer"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))
    assert board.Tags()["audio"] == ["hello"]
    assert len([r for r in read_log(tmp_path) if r["kind"] == "validation"]) == 4


def test_frozen_parts_run_as_at_inference(tmp_path):
    modes = set()
    toy = Toy(dropout=0.1, act=lambda calls: modes.add((toy.frozen.training, toy.layers[0][2].training)))
    fit(toy, loader(), settings(steps=2), tmp_path)
    assert modes == {(False, True)}


def test_another_run_is_refused(tmp_path):
    fit(Toy(), loader(), settings(steps=2), tmp_path)
    for toy, changes, text in (
        (Toy(), {"lr": 0.03}, "the setting lr was 0.02 there and is 0.03 here"),
        (Toy(width=7), {}, r"the parameter head.weight was \[2, 8\] there and is \[2, 7\] here"),
        (Toy().requires_grad_(True), {}, "the parameter frozen.0.bias was absent there"),
    ):
        with pytest.raises(TrainingError, match=text):
            fit(toy, loader(), settings(**{"steps": 2, **changes}), tmp_path)
    assert fit(Toy(), loader(), settings(steps=2, log_every=5, keep=1), tmp_path).step == 2
    (tmp_path / "step-000002" / "__0_0.distcp").unlink()
    with pytest.raises(TrainingError, match="step-000002 cannot be read"):
        fit(Toy(), loader(), settings(steps=2), tmp_path)


# --- spikes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("worst", "known_after"), [(math.nan, 0), (1e4, ENOUGH)])
def test_a_spike_is_skipped_and_counted(tmp_path, capsys, worst, known_after):
    """One item spoils a step of each epoch; a loss that is merely high is known as such when enough has been seen."""
    result = fit(Toy(), loader(Items(worst)), settings(steps=18), tmp_path)
    assert result.skipped == [step for step in range(known_after + 1, 19) if POISON in batch_of(step)]
    assert len(result.skipped) == (6 if known_after == 0 else 2)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(result.last).values())
    assert f"{len(result.skipped)} skipped ({', '.join(map(str, result.skipped))})" in capsys.readouterr().out
    told = [r["why"] for r in read_log(tmp_path) if r["kind"] == "skipped"]
    assert len(told) == len(result.skipped) and all("the loss is" in why for why in told)


def batch_of(step):
    """Items of a step of one process."""
    slices = Slices(BATCH)
    slices.epoch = (step - 1) // 3
    return list(slices)[(step - 1) % 3]


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(TrainingError, match=r"another process trains in .*: wait for it, or end it"):
            fit(Toy(), loader(), settings(), tmp_path)
        other.communicate(b"\n")
    assert fit(Toy(), loader(), settings(), tmp_path).step == settings().steps


def test_too_many_spikes_stop_the_run(tmp_path):
    items = Items()
    items.gain[:] = math.inf
    with pytest.raises(TrainingError, match=r"stopped at step 3: 3 in a row were skipped") as error:
        fit(Toy(), loader(items), settings(patience=3), tmp_path)
    assert f" and {ITEMS - 20} more; all are in log.jsonl)" in str(error.value)
    assert [path.name for path in whole(tmp_path)] == ["step-000002"]
    skipped = [r["items"].split() for r in read_log(tmp_path) if r["kind"] == "skipped"]
    assert sorted(i for ids in skipped for i in ids) == sorted(f"item-{i}" for i in range(ITEMS))


def test_a_message_names_few_of_many_items():
    guard = SpikeGuard(10.0, 2)
    guard.skip(1, "why", ["first"])
    with pytest.raises(TrainingError, match=r"\(n0, .*, n19 and 6 more; all are in log\.jsonl\)") as error:
        guard.skip(2, "why", [f"n{i}" for i in range(25)])
    assert "first" not in str(error.value)


# --- settings --------------------------------------------------------------------------------------------------------


def test_schedule():
    cosine = settings(steps=100, lr=1.0, warmup=10, final_lr=0.2)
    assert [cosine.lr_at(step) for step in (1, 5, 10, 55, 100)] == pytest.approx([0.1, 0.5, 1.0, 0.6, 0.2])
    constant = settings(steps=100, lr=1.0, warmup=10, schedule="constant")
    assert [constant.lr_at(step) for step in (5, 11, 100)] == [0.5, 1.0, 1.0]


def test_learning_rates_by_name(tmp_path):
    """A first AdamW step moves every parameter by its learning rate; what to_save names begins there."""
    toy = Toy()
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    scale = {"0.": 0.5, "0.0.bias": 0.1}
    with pytest.raises(ValueError, match="to_save lacks 2 of the 6 trained parameters"):
        fit(toy, loader(), settings(steps=1), tmp_path, to_save=toy.layers)
    toy.head.requires_grad_(False)
    fit(toy, loader(), settings(steps=1, lr_scale=scale, weight_decay=0.0, final_lr=1.0), tmp_path, to_save=toy.layers)
    moved = {name: (p - before[name]).abs().max().item() for name, p in toy.named_parameters()}
    expected = {"layers.0.0.weight": 0.01, "layers.0.0.bias": 0.002, "layers.1.0.weight": 0.02, "layers.1.0.bias": 0.02}
    assert {name: by for name, by in moved.items() if by} == pytest.approx(expected, rel=1e-3)
    with pytest.raises(
        ValueError, match="lr_scale names 'encoder.', with which no trained parameter begins; there are"
    ):
        fit(Toy(), loader(), settings(lr_scale={"encoder.": 0.4}), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
        ({"warmup": 9}, r"warmup must be no more than steps \(8\), got 9"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16"),
        ({"betas": (0.9, 1.5)}, "betas must be two from 0 to 1"),
        ({"spike": 1.0}, "spike must be a number above 1"),
        ({"lr_scale": {"a": "b"}}, "lr_scale must be positive numbers by prefix"),
    ],
)
def test_settings_that_make_no_sense(changes, text):
    with pytest.raises(ValueError, match=text):
        settings(**changes)


def test_what_cannot_begin_is_named(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the objective requires a gradient"):
        fit(Toy().requires_grad_(False), loader(), settings(), tmp_path)
    with pytest.raises(ValueError, match="head.weight trains, so it must be float32"):
        toy = Toy()
        toy.head.bfloat16()
        fit(toy, loader(), settings(), tmp_path)
    with pytest.raises(TrainingError, match="the loader gives no micro-batch"):
        fit(Toy(), StatefulDataLoader([]), settings(), tmp_path)
    with pytest.raises(ValueError, match='validate must give a "score"'):
        fit(Toy(), loader(), settings(validate_every=1), tmp_path, validate=lambda: {"wer": 1.0})
