"""The dry run of a training stage: its sizes, memory and arithmetic, computed on the meta device.

Everything is counted from the names and shapes of the model's parameters and a table of how often each part runs in a
second of sound; nothing is measured, and so there are no hours of any machine here.

Memory of a GPU under FSDP2, in bytes: what a stage runs is sharded evenly. A frozen parameter takes its precision's 2
or 4; one that trains takes 4 (fp32), 4 for its gradient and 8 for AdamW's two states. A block is gathered whole in the
precision of the arithmetic while it runs, with its gradient where it trains; parameters outside of numbered blocks are
one block a part. A second block that is fetched ahead, temporary buffers and the allocator's waste are not counted.

Activations, in elements a position, where a gradient passes: each weight matrix keeps its input and its output. With
checkpointing each block keeps its input, and the largest block is computed again and kept whole. Logits come on top,
in the arithmetic's precision and once more in fp32. Attention is taken to keep no scores.

Arithmetic, in FLOPs a parameter and position: 2 forward; 2 more where a gradient passes to what lies before; 2 more for
the gradient of what trains: 6 N for what trains, 4 N for what is frozen behind it, 2 N for what is frozen before it.
Checkpointing adds 2 N wherever a gradient passes. Tables that are only looked up count nothing, and neither does the
LLM's head where no loss is on text; attention scores are left out, and every position is taken through the heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minmo.config import load_config
from minmo.model import NothingDrawn, shapes
from minmo.training.counting import (
    OUTPUT_PROJECTOR,
    PROMPT,
    RUNS,
    SAMPLE_SECONDS,
    TEXT_RATE,
    TOKENS,
    Weight,
    does_train,
    weights_of,
)
from minmo.training.lora import attach
from minmo.training.recipe import Corpus, Recipe, load_recipe, recipes
from minmo.training.stages import STAGES, Stage

GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU of `gpus`."""

    gpus: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    block: int

    @property
    def all(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.block


@dataclass(frozen=True)
class Plan:
    """What `show` prints. sizes: of each part of the model by its prefix, parameters and those of them that train (the
    output projector is no part of `voice_decoder.` here); weights: of the parts that the stage runs. seconds: sound of
    one optimizer step; hours: of the corpora."""

    recipe: Recipe
    stage: Stage
    sizes: dict[str, tuple[int, int]]
    weights: tuple[Weight, ...]
    seconds: float
    hours: float

    @property
    def trained(self) -> int:
        return sum(w.numel for w in self.weights if w.trains)

    @property
    def steps(self) -> int:
        """Optimizer steps of one pass over the corpora."""
        return math.ceil(self.hours * 3600 / self.seconds)

    @property
    def flops(self) -> float:
        """Of one second of sound."""
        again = 2 * self.recipe.loop.checkpoint_activations
        return sum(w.numel * w.rate * (2 + (2 + again) * w.passes + 2 * w.trains) for w in self.weights if not w.idle)

    def memory(self, gpus: int) -> Memory:
        """The module's docstring says what is counted."""
        shards = gpus if self.recipe.loop.shard else 1
        width = self.width
        trained, frozen = self.trained, sum(w.numel for w in self.weights if not w.trains)
        blocks = _sums(self.weights, lambda w: w.numel * width * (1 + w.trains))
        return Memory(
            gpus,
            parameters=math.ceil((4 * trained + width * frozen) / shards),
            gradients=math.ceil(4 * trained / shards),
            optimizer=math.ceil(8 * trained / shards),
            activations=math.ceil(self.activations * self.recipe.data.max_seconds / gpus),
            block=max(blocks.values()) if shards > 1 else 0,
        )

    @property
    def activations(self) -> float:
        """Bytes that a second of sound keeps until its gradient."""
        through = [w for w in self.weights if w.passes and not w.logits]
        whole = _sums(through, lambda w: w.rate * (w.inputs + w.outputs))
        kept = sum(whole.values())
        if self.recipe.loop.checkpoint_activations and whole:
            first: dict[str, float] = {}
            for w in through:
                if w.inputs:
                    first.setdefault(w.block, w.rate * w.inputs)
            kept = sum(first.values()) + max(whole.values())
        logits = sum(w.rate * w.outputs for w in self.weights if w.passes and w.logits)
        return kept * self.width + logits * (self.width + 4)

    @property
    def width(self) -> int:
        """Bytes of a number in the arithmetic."""
        return {"fp32": 4, "bf16": 2}[self.recipe.loop.precision]

    @property
    def run_steps(self) -> int:
        """Optimizer steps that the recipe asks for."""
        return self.recipe.loop.steps


def plan(recipe: Recipe) -> Plan:
    """What a recipe asks for, from names and shapes alone."""
    model, stage = shapes(load_config(recipe.preset)), recipe.as_run()
    if recipe.lora is not None:
        with torch.device("meta"), NothingDrawn():
            attach(model.llm, recipe.lora)
    sizes: dict[str, tuple[int, int]] = {}
    for name, p in model.named_parameters():
        part = OUTPUT_PROJECTOR if name.startswith(OUTPUT_PROJECTOR) else f"{name.partition('.')[0]}."
        size, trains = sizes.get(part, (0, 0))
        sizes[part] = (size + p.numel(), trains + p.numel() * does_train(name, p, stage))
    hours = sum(c.hours if c.hours is not None else (c.samples or 0) * SAMPLE_SECONDS / 3600 for c in recipe.corpora)
    seconds = recipe.data.max_seconds * recipe.loop.accumulate / (2 if recipe.data.rehearse else 1)
    return Plan(recipe, stage, sizes, tuple(weights_of(model, stage)), seconds, hours)


def _sums(weights: Any, of: Callable[[Weight], float]) -> dict[str, Any]:
    """By block."""
    sums: dict[str, Any] = {}
    for w in weights:
        sums[w.block] = sums.get(w.block, 0) + of(w)
    return sums


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    recipe, stage = plan.recipe, plan.stage
    losses = ", ".join(stage.losses)
    console.print(f"{stage.name} of {recipe.preset}: {stage.goal} ({stage.source}); losses: {losses}. Nothing was run.")
    table = Table("module", "parameters", "train", "share", "positions a second of sound")
    rates = dict(RUNS[stage.name])
    for part, (size, trains) in plan.sizes.items():
        name = "voice_decoder (the rest)" if part == TOKENS else part.rstrip(".")
        share = f"{trains / size:.2%}" if trains else "-"
        table.add_row(name, f"{size:,}", f"{trains:,}", share, f"{rates[part]:g}" if part in rates else "not run")
    size, trains = sum(size for size, _ in plan.sizes.values()), plan.trained
    table.add_row("all", f"{size:,}", f"{trains:,}", f"{trains / size:.2%}", "")
    _right(table, console)

    table = Table(
        "GPUs", "parameters", "gradients", "AdamW", "activations", "largest block", "all of a GPU", "its sound"
    )
    for gpus in GPUS:
        m = plan.memory(gpus)
        sizes = (m.parameters, m.gradients, m.optimizer, m.activations, m.block, m.all)
        table.add_row(str(gpus), *(_bytes(n) for n in sizes), f"{recipe.data.max_seconds / gpus:g} s")
    _right(table, console)

    table = Table("corpus", "amount", "source")
    for corpus in recipe.corpora:
        table.add_row(corpus.task, _amount(corpus), corpus.source + (" (quoted)" if corpus.quoted else ""))
    _right(table, console)

    asked = plan.run_steps
    rate = sum({w.part: rates[w.part] for w in plan.weights}.values())
    console.print(
        f"A step: {plan.seconds:,g} s of sound ({plan.seconds / 3600:.3g} h), {plan.seconds * rate:,.0f} positions in "
        f"all parts, {plan.flops * plan.seconds:.3g} FLOPs.\n"
        f"One pass over {_hours(plan.hours)} h: {plan.steps:,} steps, {plan.flops * plan.hours * 3600:.3g} FLOPs. "
        f"The recipe: {asked:,} steps, {asked / plan.steps:.3g} passes, {plan.flops * plan.seconds * asked:.3g} FLOPs."
    )
    console.print(
        "FLOPs: 6 N a position for what trains, 4 N for what is frozen behind it, 2 N for what is frozen before it"
        f"{'; 2 N more for what is computed again' if recipe.loop.checkpoint_activations else ''}. Taken: "
        f"{SAMPLE_SECONDS:g} s a sample, {TEXT_RATE:g} text tokens a second of speech, {PROMPT} positions of ChatML a "
        "sample. Networks that only the loss needs (discriminators, heads of recognisers) are not counted."
    )


def show_stages(console: Console) -> None:
    """Prints the stages in their order, with what the recipe for minmo-8b says where there is one."""
    shipped = recipes()
    for stage in STAGES.values():
        console.print(f"[bold]{stage.name}[/]: {stage.goal} ({stage.source})")
        trains = ", ".join(prefix.rstrip(".") for prefix in stage.trains)
        after = f", after {', '.join(stage.after)}" if stage.after else ""
        losses = ", ".join(stage.losses)
        console.print(f"  trains {trains}{after}; all else is frozen. losses: {losses}", highlight=False)
        if (name := f"minmo-8b/{stage.name}") not in shipped:
            console.print(f"  data: {', '.join(stage.tasks)}; no recipe for minmo-8b: unpublished", highlight=False)
            continue
        recipe = load_recipe(name)
        corpora = "; ".join(f"{c.task} {_amount(c)}" for c in recipe.corpora)
        rate = (
            f"{recipe.loop.lr:g}, {recipe.loop.schedule}, warm-up {recipe.loop.warmup:,} of {recipe.loop.steps:,} steps"
        )
        console.print(f"  minmo-8b: {corpora}\n  learning rate {rate}", highlight=False)


def _amount(corpus: Corpus) -> str:
    return f"{corpus.samples:,} samples" if corpus.hours is None else f"{_hours(corpus.hours)} h"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _right(table: Table, console: Console) -> None:
    for column in table.columns:
        column.overflow = "fold"  # a name that was cut short would be another's
    for column in table.columns[1:-1]:
        column.justify = "right"
    console.print(table)


def _bytes(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"
