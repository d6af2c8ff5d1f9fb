"""Compiles a recorded launch for a GPU that need not be there, and reads its machine code: what the compile gate and
the static report stand on.

Triton brings NVIDIA's assembler and disassembler along, so all of this runs on any machine.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minmo_kernels.launch import Launch

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Loop:
    """Instructions of a loop: its own, and those of loops inside it."""

    own: tuple[str, ...]
    nested: tuple[str, ...]


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. stack: bytes a thread keeps in memory, spilled registers and local arrays alike; shared:
    bytes a block; instructions: mnemonics with their suffixes, counted over the whole program."""

    registers: int
    stack: int
    shared: int
    warps: int
    instructions: Counter[str]
    listing: tuple[tuple[int, str], ...]
    """(address, instruction) in order."""

    def count(self, prefix: str) -> int:
        """Instructions whose mnemonic starts with `prefix`, such as "LDG.E.128" or "HGMMA"."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    @property
    def wide_loads(self) -> int:
        """Global loads of 16 bytes a thread, into registers or shared memory."""
        wide = re.compile(r"(LDG|LDGSTS)\b.*\.128")
        return sum(n for name, n in self.instructions.items() if wide.match(name))

    def loops(self) -> list[Loop]:
        """Every loop, in order of address."""
        where = {address: i for i, (address, _) in enumerate(self.listing)}
        spans = []
        for i, (address, text) in enumerate(self.listing):
            target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address and int(target[1], 16) in where:
                spans.append((where[int(target[1], 16)], i))
        found = []
        for first, last in spans:
            inner = {
                i for a, b in spans if (a, b) != (first, last) and first <= a and b <= last for i in range(a, b + 1)
            }
            body = [(i in inner, self.listing[i][1]) for i in range(first, last + 1)]
            own, nested = (tuple(text for within, text in body if within is wanted) for wanted in (False, True))
            found.append(Loop(own, nested))
        return found


def compiled(launch: Launch, sm: int) -> Binary:
    """The binary of a recorded launch for compute capability `sm` (80 = 8.0). Cached by Triton on disk."""
    import triton
    from triton.backends.compiler import GPUTarget

    target, options = GPUTarget("cuda", sm, 32), dict(launch.options)
    kernel = triton.compile(_source(launch), target=target, options=options)
    return read(kernel.asm["cubin"], kernel.metadata.shared, kernel.metadata.num_warps)


def fingerprint(launch: Launch, sm: int) -> str:
    """Changes with everything that decides what a launch compiles to: source, dtypes, constants, options, compiler."""
    import triton

    whole = f"{_source(launch).hash()} {sorted(launch.options.items())} {sm} {triton.__version__}"
    return hashlib.sha256(whole.encode()).hexdigest()


def _source(launch: Launch) -> Any:
    """The launch as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(names, (*launch.arguments, *launch.constants.values()), strict=True)):
        if i >= len(launch.arguments) or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def read(cubin: bytes, shared: int, warps: int) -> Binary:
    """What a cubin says of itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    listing = tuple(
        (int(address, 16), text.strip())
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    )
    names = Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in listing)
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    stack = int(resources["STACK"]) + int(resources["LOCAL"])
    return Binary(int(resources["REG"]), stack, shared, warps, names, listing)


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
