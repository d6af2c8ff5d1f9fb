"""Recipes: what one run of a stage trains on and how, read strictly from YAML.

A recipe that ships with the package is named by its place, `minmo-8b/pre-align`; any other by its path. Whatever is
misspelt, missing or of the wrong kind is refused in one sentence that names the file and the field.

minmo-8b has recipes for the paper's stages, and for flow, vocoder and voice-lm as far as CosyVoice 2 publishes them;
its encoder, LLM and speech tokenizer come trained, and how is not published.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from minmo.config import presets
from minmo.training.augment import Augment
from minmo.training.lora import LoRA
from minmo.training.settings import LoopSettings
from minmo.training.stages import STAGES, Stage

T = TypeVar("T")
_MOST = 1e30
"""Largest number in a recipe."""
SHIPPED = Path(__file__).parent / "recipes"
OPTIONS = {
    "chunks": ("encoder", "full-align"),
    "trainable": ("sft",),
    "bistream_share": ("voice-lm",),
    "flow": ("flow",),
}
"""Options and the stages that need them; no other stage reads them."""


@dataclass(frozen=True)
class Corpus:
    """A part of the data. hours of sound, or samples where only their number is known; source: where they come from or
    what they are; quoted: the amount is published, and not this project's."""

    task: str
    source: str
    quoted: bool
    hours: float | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        if (self.hours is None) == (self.samples is None):
            raise ValueError("needs either hours or samples")
        if not 0 < (self.hours or self.samples or 0) <= 1e15:
            raise ValueError("hours or samples must be positive")


def _check_seconds(seconds: float) -> None:
    if not 0.1 <= seconds <= 1e7:
        raise ValueError(f"max_seconds must lie in 0.1 .. 1e7, got {seconds:g}")


@dataclass(frozen=True)
class Rehearsal:
    """What an earlier stage learned and this one must not forget: its batches come in turn with the stage's own, and
    `loop.accumulate` is even, so that a step takes as many of each."""

    train: tuple[str, ...]
    max_seconds: float

    def __post_init__(self) -> None:
        _check_seconds(self.max_seconds)


@dataclass(frozen=True)
class Data:
    """Manifests and batches. max_seconds: sound in one batch of all GPUs together (a step takes `loop.accumulate` of
    them); train, valid: manifests, where the recipe knows them; all their lines are read."""

    max_seconds: float
    buckets: int
    workers: int
    train: tuple[str, ...] | None = None
    valid: tuple[str, ...] | None = None
    rehearse: Rehearsal | None = None

    def __post_init__(self) -> None:
        _check_seconds(self.max_seconds)
        if not (1 <= self.buckets <= 1000 and 0 <= self.workers <= 1000):
            raise ValueError("buckets must lie in 1 .. 1000, workers in 0 .. 1000")

    @property
    def manifests(self) -> tuple[str, ...]:
        """All that it names."""
        return (*(self.train or ()), *(self.valid or ()), *(self.rehearse.train if self.rehearse else ()))


@dataclass(frozen=True)
class FlowOptions:
    """How flow matching is shown its data; each share is a probability.

    session_mask_share: the chunk mask instead of full context. guidance_drop: no condition at all. prompt_share: the
    first frames are given, up to prompt_longest of the length.
    """

    session_mask_share: float
    guidance_drop: float
    prompt_share: float
    prompt_longest: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0 .. 1, got {value}")


@dataclass(frozen=True)
class Recipe:
    """One run of a stage.

    augment: how what users say is varied; left out, it is heard as it is. chunks: sizes of the encoder's chunk, in
    frames of 40 ms, of which each batch draws one; 0 = all frames. bistream_share: how often the voice token LM gets
    its text in blocks, where the speech is long enough.
    """

    stage: str
    preset: str
    corpora: tuple[Corpus, ...]
    data: Data
    loop: LoopSettings
    augment: Augment | None = None
    chunks: tuple[int, ...] | None = None
    trainable: Literal["lora", "full"] | None = None
    lora: LoRA | None = None
    bistream_share: float | None = None
    flow: FlowOptions | None = None

    def as_run(self) -> Stage:
        """The stage, with what trains under this recipe."""
        stage = STAGES[self.stage]
        return dataclasses.replace(stage, trains=stage.whole) if self.trainable == "full" else stage

    def to_yaml(self) -> str:
        """What `load_recipe` reads as this recipe: JSON, which is YAML."""

        def given(fields: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: value for name, value in fields if value is not None}

        return json.dumps(dataclasses.asdict(self, dict_factory=given), indent=1) + "\n"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.preset not in presets() and not (Path(self.preset) / "config.json").is_file():
            known = ", ".join(presets())
            raise ValueError(f"preset must be one of {known}, or a directory with a config.json, got {self.preset!r}")
        tasks = STAGES[self.stage].tasks
        for i, corpus in enumerate(self.corpora):
            if corpus.task not in tasks:
                raise ValueError(
                    f"corpora[{i}].task must be one of {', '.join(tasks)} in {self.stage}, got {corpus.task!r}"
                )
        needs = [(n, self.stage in stages, f"the stage {' or '.join(stages)}") for n, stages in OPTIONS.items()]
        needs.append(("lora", self.trainable == "lora", "trainable: lora"))
        for name, needed, where in needs:
            given = getattr(self, name) is not None
            if given and not needed:
                raise ValueError(f"{name} belongs to {where}, remove it")
            if needed and not given:
                raise ValueError(f"lacks the field {name!r}")
        if self.data.rehearse is not None and self.loop.accumulate % 2:
            raise ValueError(
                "data.rehearse gives every second batch, and losses of steps must be comparable: "
                "set loop.accumulate to 2, so that every step takes one of each"
            )
        if self.chunks is not None and min(self.chunks) < 0:
            raise ValueError(f"chunks must be numbers of frames, 0 for all, got {list(self.chunks)}")
        if self.bistream_share is not None and not 0 <= self.bistream_share <= 1:
            raise ValueError(f"bistream_share must lie in 0 .. 1, got {self.bistream_share}")


def recipes() -> list[str]:
    """Names of the recipes that ship with the package, `PRESET/STAGE`, in the order of the stages."""
    names = (f"{folder.name}/{stage}" for folder in sorted(SHIPPED.iterdir()) for stage in STAGES)
    return [name for name in names if _file(name).is_file()]


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by its name in the package or by its path.

    Raises FileNotFoundError where there is none, ValueError that names file and field for what it must not say, and
    ImportError without PyYAML.
    """
    name = str(name_or_path)
    path = _file(name) if name in recipes() else Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"{name[:100]!r} is neither a recipe file nor one of {', '.join(recipes())}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    return build(Recipe, parse(text, name), name)


def parse(text: str, where: str) -> Any:
    """YAML as YAML 1.2 reads it: 1e-4 is a number, `no` a word, a key stands once. Raises ValueError with the line."""
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes need PyYAML: pip install 'minmo[train]'") from None

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them stand for gigabytes
                raise yaml.MarkedYAMLError(
                    None, None, "write values out, aliases are not read", self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys: list[Any] = []
            for key, _ in node.value:
                keys.append(self.construct_object(key, deep=True))
                if keys[-1] in keys[:-1]:
                    raise yaml.MarkedYAMLError(None, None, f"{keys[-1]!r} stands twice", key.start_mark)
            return super().construct_mapping(node, deep)

    for tag, form, first in (
        ("null", r"~|null|", ["~", "n", ""]),
        ("bool", r"true|false", ["t", "f"]),
        ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{form})$"), first)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{where} is not a recipe in YAML: line {line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is not a recipe in YAML: {str(error).splitlines()[0]:.100}") from None


def build(cls: type[T], data: Any, where: str) -> T:
    """A dataclass from a mapping. Raises ValueError for unknown, missing and mistyped fields, and with the dataclass's
    own objections; `where` is the file, or the file and the field that holds the mapping."""
    return typing.cast(T, _build(cls, data, where, ""))


def _build(cls: Any, data: Any, where: str, prefix: str) -> Any:
    at = f"{where}: {prefix.rstrip('.')}" if prefix else where
    if not isinstance(data, dict):
        raise ValueError(f"{at} must hold fields and their values, got {data!r:.60}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := [k for k in data if k not in fields]:
        raise ValueError(f"{at} has the unknown field {unknown[0]!r:.60}; known: {', '.join(fields)}")
    optional = (
        f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING for f in fields.values()
    )
    if missing := [name for name, given in zip(fields, optional, strict=True) if not given and name not in data]:
        raise ValueError(f"{at} lacks the field {missing[0]!r}")
    hints = typing.get_type_hints(cls)
    values = {k: _convert(hints[k], v, where, f"{prefix}{k}") for k, v in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _convert(kind: Any, value: Any, where: str, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where, f"{name}.")
    if origin in (typing.Union, types.UnionType):  # X | None is the only union here; None is said by leaving it out
        return _convert(arguments[0], value, where, name)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list) and value:
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(
                _convert(k, v, where, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
    if origin is dict and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _convert(arguments[1], v, where, f"{name}.{k}") for k, v in value.items()}
    if kind is float and type(value) in (int, float) and -_MOST <= value <= _MOST:
        return float(value)
    if kind is bool and type(value) is bool or kind is int and type(value) is int and -_MOST <= value <= _MOST:
        return value
    if kind is str and isinstance(value, str) and value.strip():
        return value
    raise ValueError(f"{where}: {name} must be {_words(kind)}, got {value!r:.60}")


def _words(kind: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return "a list that is not empty" if arguments[1:] == (...,) else f"a list of {len(arguments)}"
    return simple.get(kind, "a mapping of names")


def _file(name: str) -> Path:
    preset, _, stage = name.partition("/")
    return SHIPPED / preset / f"{stage}.yaml"
