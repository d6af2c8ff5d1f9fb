"""Dependencies point one way: which part may import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down: a part imports parts of lower rows, and itself. Parts of one row do not know each other.
ROWS = [
    ["minmo.__main__"],
    ["minmo.cli"],
    ["minmo.doctor"],
    ["minmo.evaluation"],  # above training: turn taking is scored on the layout that the predictor learned with
    ["minmo.serving", "minmo.training", "minmo.info"],
    ["minmo"],
    ["minmo.conversation"],
    ["minmo.fast"],
    ["minmo.weights"],
    ["minmo.model"],
    ["minmo.data"],
    ["minmo.token2wav", "minmo.tokenizer"],
    ["minmo.modules"],
    ["minmo.state", "minmo.audio"],
    ["minmo.config", "minmo.clock", "minmo.console"],
    ["minmo_kernels"],
]
# Parts that may import less than all that lies below them.
ONLY = {
    "minmo.data": {"minmo.tokenizer", "minmo.config"},
    "minmo.training": {
        "minmo.model",
        "minmo.weights",
        "minmo.data",
        "minmo.token2wav",
        "minmo.tokenizer",
        "minmo.modules",
        "minmo.state",
        "minmo.config",
        "minmo.console",
        "minmo_kernels",
    },
}
# Weights and their families are the model's business; the operations know shapes.
CHECKPOINT_NAMES = ("minmo-8b", "cosyvoice", "sensevoice", "qwen", "s3tokenizer")

SOURCES = sorted(p for package in ("minmo", "minmo_kernels") for p in (ROOT / package).rglob("*.py"))


def part_of(module: str) -> str:
    """The part that a module belongs to: itself for `minmo`, else `minmo.<first name>`, or `minmo_kernels`."""
    names = module.split(".")
    return names[0] if names[0] == "minmo_kernels" else ".".join(names[:2])


def module_of(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module of ours that is imported anywhere in a file."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                names = module.split(".")
                base = ".".join([*names[: len(names) - node.level + is_package], *filter(None, [base])])
            members = [f"{base}.{alias.name}" for alias in node.names]
            found = [m if is_module(m) else base for m in members]
        yield from ((node.lineno, name) for name in found if name.split(".")[0] in ("minmo", "minmo_kernels"))


def allowed(part: str) -> set[str]:
    row = next((i for i, parts in enumerate(ROWS) if part in parts), None)
    if row is None:
        pytest.fail(f"{part} has no place in the order of imports: give it one in ROWS")
    below = {name for parts in ROWS[row + 1 :] for name in parts}
    return {part} | (below & ONLY.get(part, below))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    may = allowed(part_of(module))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"line {line} imports {name}"
        for line, name in imports(tree, module, path.name == "__init__.py")
        if part_of(name) not in may
    ]
    assert not wrong, f"{module} may import {', '.join(sorted(may))}, but {'; '.join(wrong)}"


def test_the_scan_sees_every_form_of_import() -> None:
    code = (
        "import minmo.cli\nfrom minmo import config, load\nfrom ..state import State\ndef f():\n from . import flow\n"
    )
    found = [name for _, name in imports(ast.parse(code), "minmo.token2wav.vocoder", is_package=False)]
    assert found == ["minmo.cli", "minmo.config", "minmo", "minmo.state", "minmo.token2wav.flow"]


def without_docstrings(tree: ast.Module) -> str:
    """The code alone: sources may be cited, but not depended on."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            texts = [s for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            node.body = [s for s in body if s not in texts]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def test_kernels_name_no_checkpoint() -> None:
    for path in (ROOT / "minmo_kernels").rglob("*.py"):
        code = without_docstrings(ast.parse(path.read_text(encoding="utf-8"))).lower()
        assert not [n for n in CHECKPOINT_NAMES if n in code], f"{path.relative_to(ROOT)} names a checkpoint"


def test_kernels_import_triton_lazily() -> None:
    """The package imports where there is no Triton: only `kernel.py` files, which backends load when asked, and the
    tiles that these share need it."""
    for path in (ROOT / "minmo_kernels").rglob("*.py"):
        if path.name in ("kernel.py", "tiles.py", "operands.py"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "triton"], f"{path.relative_to(ROOT)} imports triton"
            for shared in ("tiles", "operands"):
                where = path.relative_to(ROOT)
                assert f"minmo_kernels.{shared}" not in names, f"{where} imports {shared}.py, which needs triton"


def test_every_folder_with_code_is_a_package() -> None:
    """Else the wheel would leave it out."""
    lacking = {p.parent for p in SOURCES if not (p.parent / "__init__.py").is_file()}
    assert not lacking, f"no __init__.py in {sorted(str(p.relative_to(ROOT)) for p in lacking)}"
