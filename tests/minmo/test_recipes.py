"""Recipes are read strictly, those that ship load and can be planned, and a plan's numbers are those done by hand."""

from __future__ import annotations

import dataclasses
from io import StringIO
from typing import Literal

import pytest
from rich.console import Console

from minmo.training.counting import RUNS
from minmo.training.plan import plan, show, show_stages
from minmo.training.recipe import SHIPPED, build, load_recipe, parse, recipes
from minmo.training.stages import STAGES

PAPER = ("pre-align", "full-align", "sft", "t2s-projector", "t2s", "s2s", "duplex")
RECIPE = """
stage: text-lm
preset: nano
corpora: [{task: text, samples: 3600, source: "sentences", quoted: false}]
data: {max_seconds: 100, buckets: 2, workers: 0, train: [a.jsonl]}
loop: {steps: 500, lr: 1e-3, accumulate: 2, precision: fp32, shard: false, checkpoint_activations: false}
"""


@dataclasses.dataclass(frozen=True)
class Loop:
    betas: tuple[float, float]
    schedule: Literal["cosine", "constant"]
    lr_scale: dict[str, float] = dataclasses.field(default_factory=dict)


def written(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def text_of(print_it, *arguments):
    console = Console(file=StringIO(), width=200)
    print_it(*arguments, console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_is_planned(name):
    preset, stage = name.split("/")
    recipe = load_recipe(name)
    assert (recipe.preset, recipe.stage) == (preset, stage)
    planned = plan(recipe)
    assert planned.trained > 0 and planned.flops > 0 and planned.steps > 0
    assert sum(trains for _, trains in planned.sizes.values()) == planned.trained, "a part that trains is not run"
    shown = text_of(show, planned)
    assert f"{planned.trained:,}" in shown and f"{planned.steps:,} steps" in shown
    assert ("quoted" in shown) == any(corpus.quoted for corpus in recipe.corpora)


def test_the_papers_stages_have_recipes():
    assert {f"minmo-8b/{stage}" for stage in PAPER} <= set(recipes())
    assert RUNS.keys() == STAGES.keys()
    shown = text_of(show_stages)
    for stage in STAGES:
        assert stage in shown
    assert "3e-05" in shown and "warm-up 10,000" in shown


@pytest.mark.parametrize("stage", [name.split("/")[1] for name in recipes() if name.startswith("minmo-8b/")])
def test_every_setting_of_minmo_8b_says_where_it_comes_from(stage):
    lines = (SHIPPED / "minmo-8b" / f"{stage}.yaml").read_text().splitlines()
    marks = ("[paper]", "[dev]", "[cosyvoice2]", "[own]")
    settings = [line for line in lines if line.startswith("  ") and not line.startswith("  - ")]
    assert len(settings) > 15
    assert not [line for line in settings if not line.partition("#")[2].strip().startswith(marks)]


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("stage: text-lm", "stage: text", "stage must be one of text-lm, encoder, .* got 'text'"),
        ("preset: nano", "preset: micro", "preset must be one of .*nano.* got 'micro'"),
        ("preset: nano", "", "lacks the field 'preset'"),
        ("stage:", "rate: 3\nstage:", "has the unknown field 'rate'; known: stage, preset"),
        ("stage:", "preset: nano\nstage:", "line 4: 'preset' stands twice"),
        ("buckets: 2", "buckets: two", "data.buckets must be a whole number, got 'two'"),
        ("buckets: 2", "buckets: 2.0", "data.buckets must be a whole number, got 2.0"),
        ("workers: 0", "worker: 0", "data has the unknown field 'worker'"),
        (", workers: 0", "", "data lacks the field 'workers'"),
        ("max_seconds: 100", "max_seconds: -1", "data: max_seconds must lie in 0.1 .. 1e7, got -1"),
        ("max_seconds: 100", "max_seconds: 1e-320", "data: max_seconds must lie in 0.1 .. 1e7, got"),
        ("buckets: 2", "buckets: 0", "data: buckets must lie in 1 .. 1000"),
        ("lr: 1e-3", "lr: 1" + "0" * 400, "loop.lr must be a number, got 1000"),
        ("lr: 1e-3", "lr: 1" + "0" * 5000, "is not a recipe in YAML: Exceeds the limit"),
        ("preset: nano", "preset: &a nano\nlora: *a", "line 4: write values out, aliases are not read"),
        ("max_seconds: 100", "max_seconds: .inf", "data.max_seconds must be a number, got '.inf'"),
        ("train: [a.jsonl]", "train:", "data.train must be a list that is not empty, got None"),
        ("quoted: false", "quoted: no", r"corpora\[0\].quoted must be true or false, got 'no'"),
        ("task: text", "task: asr", r"corpora\[0\].task must be one of text in text-lm, got 'asr'"),
        ("samples: 3600, ", "", r"corpora\[0\]: needs either hours or samples"),
        (
            "}\nloop: {steps: 500, lr: 1e-3, accumulate: 2,",
            ", rehearse: {train: [b.jsonl], max_seconds: 9}}\nloop: {steps: 500, lr: 1e-3,",
            "set loop.accumulate to 2",
        ),
        ("samples: 3600", "samples: 0", r"corpora\[0\]: hours or samples must be positive"),
        ("stage:", "chunks: [2, 0]\nstage:", "chunks belongs to the stage encoder or full-align, remove it"),
        ("stage: text-lm", "stage: text-lm\nlora: {rank: 1, alpha: 1, dropout: 0, targets: [q]}", "lora belongs to"),
        ("loop: {", "loop: [", "not a recipe in YAML: line"),
    ],
)
def test_wrong_fields_are_refused_in_one_sentence(tmp_path, old, new, sentence):
    assert RECIPE.count(old) == 1
    path = written(tmp_path, RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=sentence) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_options_of_stages_must_be_said(tmp_path):
    sft = RECIPE.replace("text-lm", "sft").replace("task: text", "task: qa")
    with pytest.raises(ValueError, match="lacks the field 'trainable'"):
        load_recipe(written(tmp_path, sft))
    with pytest.raises(ValueError, match="lacks the field 'lora'"):
        load_recipe(written(tmp_path, sft + "trainable: lora\n"))
    with pytest.raises(ValueError, match="trainable must be lora or full, got 'some'"):
        load_recipe(written(tmp_path, sft + "trainable: some\n"))
    lora = "lora: {rank: 4, alpha: 8, dropout: 0.0, targets: [q, o]}\n"
    with pytest.raises(ValueError, match="r.yaml: lora: targets must be some of q, k, v"):
        load_recipe(written(tmp_path, sft + "trainable: lora\n" + lora))
    with pytest.raises(ValueError, match="lora belongs to trainable: lora"):
        load_recipe(written(tmp_path, sft + "trainable: full\n" + lora.replace("o]", "v]")))
    assert plan(load_recipe(written(tmp_path, sft + "trainable: full\n"))).trained == 4_289_408


def test_a_recipe_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="'nowhere.yaml' is neither a recipe file nor one of .*minmo-8b/sft"):
        load_recipe("nowhere.yaml")


def test_a_mapping_becomes_its_dataclass():
    """How the loop's own settings are read."""

    data = parse("betas: [9e-1, 1]\nschedule: cosine\nlr_scale: {llm.: .5}", "f")
    assert build(Loop, data, "f: loop") == Loop((0.9, 1.0), "cosine", {"llm.": 0.5})
    with pytest.raises(ValueError, match="f: loop: betas must be a list of 2, got"):
        build(Loop, {**data, "betas": [0.9]}, "f: loop")
    with pytest.raises(ValueError, match="f: loop: lr_scale.llm. must be a number, got True"):
        build(Loop, {**data, "lr_scale": {"llm.": True}}, "f: loop")


def test_a_small_plan_by_hand(tmp_path):
    """nano's LLM: a layer has 192 x 320 + 320, 192 x 192, 192 x 1024, 512 x 192 and two norms of 192."""
    planned = plan(load_recipe(written(tmp_path, RECIPE)))
    layer = 61_440 + 320 + 36_864 + 196_608 + 98_304 + 384
    llm = 1024 * 192 + 4 * layer + 192
    assert planned.trained == llm == 1_772_480
    assert planned.flops == 6 * 4 * llm  # 4 tokens a second; the table is the head
    assert planned.seconds == 200 and planned.hours == 10 and planned.steps == 180  # 3600 samples of 10 s
    kept = 4 * (192 + 320 + 192 + 192 + 192 + 1024 + 512 + 192)
    assert planned.activations == 4 * (4 * kept + 8 * 1024)
    memory = planned.memory(8)  # not sharded: every GPU has all
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * llm, 4 * llm, 8 * llm)
    assert memory.block == 0 and memory.activations == planned.activations * 100 / 8
    assert "500 steps, 2.78 passes" in text_of(show, planned)


def test_pre_align_trains_the_projector_alone():
    planned = plan(load_recipe("minmo-8b/pre-align"))
    assert {part: trains for part, (_, trains) in planned.sizes.items() if trains} == {"projector.": 167_978_496}
    assert planned.steps == 88_482  # 125,840 h of 5,120 s
    memory = planned.memory(8)
    frozen = 636_318_720 + 7_615_616_512
    assert memory.parameters == (4 * 167_978_496 + 2 * frozen) // 8
    assert (memory.gradients, memory.optimizer) == (83_989_248, 167_978_496)
    assert memory.block == 2 * (2 * 152_064 * 3584 + 3584)  # embedding, head and norm in bf16
    assert memory.all > sum((memory.parameters, memory.gradients, memory.optimizer, memory.block))
    assert planned.memory(64).parameters == memory.parameters // 8
    # Encoder 2 N, with its first convolution twice as often; projector 6 N + 2 N; LLM 4 N + 2 N, its table never.
    encoder, llm = 636_318_720 + 492_800, 7_615_616_512 - 152_064 * 3584
    assert planned.flops == 25 * 2 * encoder + 12.5 * 8 * 167_978_496 + 18.5 * 6 * llm


def test_sft_trains_the_adapters_alone():
    planned = plan(load_recipe("minmo-8b/sft"))
    q, v = 16 * 3584 + 3584 * 16, 16 * 3584 + 512 * 16
    assert planned.trained == 28 * (q + v) == 5_046_272
    assert planned.sizes["llm."] == (7_615_616_512 + 5_046_272, 5_046_272)
    assert planned.memory(64).optimizer == 8 * 5_046_272 // 64


def test_duplex_by_hand():
    planned = plan(load_recipe("minmo-8b/duplex"))
    assert planned.trained == 17_783_172
    encoder, projector = 636_318_720 + 492_800, 167_978_496
    llm = 7_615_616_512 - 2 * 152_064 * 3584  # no loss on text: neither table nor head
    assert planned.flops == 25 * 2 * encoder + 12.5 * 2 * projector + 14.5 * 2 * llm + 12.5 * 8 * 17_783_172
    whole = (3584 + 896) + (896 + 1152) + (896 + 896) + (896 + 9472) + (4736 + 896) + 2 * (896 + 2)
    assert planned.activations == 12.5 * 2 * (3584 + whole)


def test_gradients_pass_through_what_lies_behind():
    """The output projector alone trains: the voice token LM costs 4 N (and 2 N again), the LLM before it 2 N."""
    weights = {w.name: w for w in plan(load_recipe("minmo-8b/t2s-projector")).weights}
    assert not weights["llm.layers.0.qkv.weight"].passes
    assert weights["voice_decoder.output_projector.weight"].trains
    head = weights["voice_decoder.head.weight"]
    assert head.passes and not head.trains and head.logits
    assert weights["voice_decoder.speech_embedding.weight"].idle


def test_a_plan_needs_its_settings(tmp_path):
    for name, wrong in (
        ("accumulate: 2", "accumulate: 2.5"),
        ("precision: fp32", "precision: fp8"),
        ("steps: 500, ", ""),
    ):
        with pytest.raises(ValueError, match=f"loop.*{name.split(':')[0]}"):
            plan(load_recipe(written(tmp_path, RECIPE.replace(name, wrong))))
