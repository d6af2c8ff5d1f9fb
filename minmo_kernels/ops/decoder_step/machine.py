"""`decoder_step` in plain PyTorch: a machine that executes the instruction list, tile by tile, with the operations'
references.

Its blocks take turns as they may, by the same counters as the kernel's (`control.py`), so that a list whose barriers
are wrong does not compute a decoder here either. Memory between phases is not initialised: a tile that reads too early
finds NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minmo_kernels.dispatch import compute_dtype
from minmo_kernels.ops.append_kv.reference import rotate
from minmo_kernels.ops.decoder_step.control import Block, Counters, Stage, Tile, advance
from minmo_kernels.ops.decoder_step.schedule import Instruction, Program, Shape, Tiles, program
from minmo_kernels.ops.gate_up_swiglu.reference import reference as gate_up_swiglu
from minmo_kernels.ops.linear_residual.reference import dequantised
from minmo_kernels.ops.linear_residual.reference import reference as linear_residual
from minmo_kernels.ops.merge_linear_residual.reference import reference as merge_linear_residual
from minmo_kernels.ops.rms_norm.reference import normalise
from minmo_kernels.ops.rms_norm.reference import reference as rms_norm
from minmo_kernels.ops.sample_token.reference import reference as sample_token
from minmo_kernels.ops.streaming_attention.reference import reference as streaming_attention

BROKEN = -2
"""The token of an entry whose logits hold NaN."""
BLOCKS, PARTS = 2, 2
"""Blocks of the machine's grid, and parts of attention."""


@dataclass
class Arguments:
    """`decoder_step`'s, in schema order."""

    x: Tensor
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: Tensor
    lengths: Tensor
    sync: Tensor
    final_norm: Tensor | None
    qkv_scale: Tensor | None
    out_scale: Tensor | None
    gate_up_scale: Tensor | None
    down_scale: Tensor | None
    head: Tensor | None
    head_scale: Tensor | None
    head_bias: Tensor | None
    embedding: Tensor | None
    seeds: Tensor | None
    positions: Tensor | None
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    history: Tensor | None
    banned: Tensor | None
    least: Tensor | None
    most: Tensor | None
    heads: int
    kv_heads: int
    eps: float
    rope_theta: float
    window: int
    ring: bool
    end: int
    stream: int
    repetition_limit: int
    steps: int
    share: float
    spins: int

    def shape(self, parts: int, merges_ahead: bool) -> Shape:
        """What decides the instruction list."""
        layers, dim, ffn = len(self.qkv), self.x.shape[1], self.down.shape[2]
        return Shape(
            batch=len(self.x), layers=layers, dim=dim, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.k_cache.shape[4], ffn=ffn, vocab=0 if self.head is None else len(self.head), steps=self.steps,
            norm=self.final_norm is not None, parts=parts, merges_ahead=merges_ahead,
        )  # fmt: skip


def reference(*arguments: object) -> tuple[Tensor, Tensor]:
    given = Arguments(*arguments)
    shape = given.shape(PARTS, merges_ahead=False)
    if shape.batch == 0:
        return torch.empty_like(given.x), given.x.new_empty((0, shape.steps * bool(shape.vocab)), dtype=torch.int32)
    half, head = max(2, -(-shape.dim // 2)), max(1, -(-shape.vocab // 2))  # two tiles of each, a head's rows for qkv
    tiles = Tiles(qkv=shape.head_dim, out=half, gate_up=2 * max(1, shape.ffn // 2), down=half, head=head)
    return Machine(given, shape, tiles).run(program(shape, tiles, BLOCKS), BLOCKS)


class Machine:
    """Memory of a step, and what each phase does to it."""

    def __init__(self, given: Arguments, shape: Shape, tiles: Tiles) -> None:
        self.given, self.shape, self.tiles = given, shape, tiles
        x, batch, kind = given.x, shape.batch, compute_dtype(given.x.dtype)
        width = shape.heads * shape.head_dim

        def fresh(*size: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.full(size, torch.nan, dtype=dtype, device=x.device)

        self.x, self.q, self.inner = fresh(batch, shape.dim), fresh(batch, width), fresh(batch, shape.ffn)
        self.parts = fresh(batch, shape.parts, shape.heads, shape.head_dim, dtype=kind)
        self.lse = fresh(batch, shape.parts, shape.heads, dtype=kind)
        self.logits = fresh(batch, shape.vocab)
        self.hidden = fresh(batch, shape.dim)
        self.tokens = torch.full((batch, shape.steps * bool(shape.vocab)), -1, dtype=torch.int32, device=x.device)
        # Each entry's own numbers, as they are once its tiles have put them there.
        self.alive = torch.full_like(given.rows, -1)
        self.lengths = given.lengths.clone()
        self.positions = None if given.positions is None else given.positions.clone()
        self.history = None if given.history is None else given.history.clone()

    def run(self, listed: Program, blocks: int) -> tuple[Tensor, Tensor]:
        """Executes the list; blocks take turns, and the one that may go on goes on."""
        standing, counters = [Block() for _ in range(blocks)], Counters()
        while any(block.stage != Stage.DONE for block in standing):
            moved = False
            for me, block in enumerate(standing):
                while (step := advance(listed, blocks, me, block, counters)) is not None:
                    tile, block, counters, _ = step
                    if tile is not None:
                        self._compute(listed[tile.at], tile)
                    moved = True
                standing[me] = block
            if not moved:
                raise RuntimeError(f"decoder_step: the list has a deadlock, its blocks stand at {standing}")
        if counters != Counters():
            raise RuntimeError(f"decoder_step: after a launch its counters are {counters}, not zero")
        return self.hidden if self.given.final_norm is not None else self._masked(self.x), self.tokens

    def _masked(self, x: Tensor) -> Tensor:
        return torch.where((self.alive >= 0)[:, None], x, 0.0)

    def _compute(self, instruction: Instruction, tile: Tile) -> None:
        getattr(self, "_" + instruction.phase.name.lower())(instruction, tile.tile)

    def _embed(self, one: Instruction, entry: int) -> None:
        self.alive[entry] = self.given.rows[entry]
        self.x[entry] = self.given.x[entry]

    def _qkv(self, one: Instruction, head: int) -> None:
        """A tile is a packed head here."""
        given, dim, layer = self.given, self.shape.head_dim, one.layer
        rows = slice(head * dim, (head + 1) * dim)
        normed = normalise(self._masked(self.x), given.input_norm[layer], given.eps)
        y = normed @ _weight(given.qkv, given.qkv_scale, layer, rows, normed.dtype).T
        if given.qkv_bias is not None:
            y = y + given.qkv_bias[layer, rows]
        live = self.alive >= 0
        row = self.alive[live].long()
        if head < self.shape.heads + self.shape.kv_heads:
            position = self.lengths[self.alive.clamp(min=0).long()]
            y = rotate(y[:, None, None], position[:, None], given.rope_theta)[:, 0, 0]
        if head < self.shape.heads:
            self.q[:, rows] = torch.where(live[:, None], y, 0.0).to(self.q.dtype)
            return
        which, cached = divmod(head - self.shape.heads, self.shape.kv_heads)
        cache = (given.k_cache, given.v_cache)[which][layer]
        slot = self.lengths[row] % cache.shape[1] if given.ring else self.lengths[row]
        cache[row, slot.long(), cached] = y[live].to(cache.dtype)

    def _attend(self, one: Instruction, tile: int) -> None:
        shape, given = self.shape, self.given
        entry, rest = divmod(tile, shape.kv_heads * shape.parts)
        head, part = divmod(rest, shape.parts)
        group = shape.heads // shape.kv_heads
        mine, cached = slice(head * group, (head + 1) * group), slice(head, head + 1)
        q = self.q[entry : entry + 1].unflatten(1, (-1, shape.head_dim))[:, None, mine]
        out, lse = streaming_attention(
            q, given.k_cache[one.layer][:, :, cached], given.v_cache[one.layer][:, :, cached],
            self.alive[entry : entry + 1], self.lengths + 1, None, None, None, "causal", given.window, 0, -1, 0,
            given.ring, shape.head_dim**-0.5, shape.parts, True,
        )  # fmt: skip
        self.parts[entry, part, mine], self.lse[entry, part, mine] = out[0, part, 0], lse[0, part, 0]

    def _out(self, one: Instruction, tile: int) -> None:
        mine = self._columns(tile, self.tiles.out, self.shape.dim)
        scale = self.given.out_scale
        self.x[:, mine] = merge_linear_residual(
            self.parts, self.lse, self.given.out[one.layer, mine], self.x[:, mine], self.alive,
            None if scale is None else scale[one.layer, mine], None,
        )  # fmt: skip

    def _gate_up(self, one: Instruction, tile: int) -> None:
        wide = self._columns(tile, self.tiles.gate_up, 2 * self.shape.ffn)
        scale = self.given.gate_up_scale
        self.inner[:, wide.start // 2 : wide.stop // 2] = gate_up_swiglu(
            self.x, self.given.post_norm[one.layer], self.given.gate_up[one.layer, wide], self.alive,
            None if scale is None else scale[one.layer, wide], None, self.given.eps,
        )  # fmt: skip

    def _down(self, one: Instruction, tile: int) -> None:
        mine = self._columns(tile, self.tiles.down, self.shape.dim)
        scale = self.given.down_scale
        self.x[:, mine] = linear_residual(
            self.inner, self.given.down[one.layer, mine], self.x[:, mine], self.alive,
            None if scale is None else scale[one.layer, mine], None,
        )  # fmt: skip

    def _norm(self, one: Instruction, entry: int) -> None:
        assert self.given.final_norm is not None
        mine = slice(entry, entry + 1)
        self.hidden[mine] = rms_norm(self.x[mine], self.given.final_norm, self.alive[mine], self.given.eps)

    def _head(self, one: Instruction, tile: int) -> None:
        given, mine = self.given, self._columns(tile, self.tiles.head, self.shape.vocab)
        assert given.head is not None and given.final_norm is not None
        normed = normalise(self._masked(self.x), given.final_norm, given.eps)
        scale = None if given.head_scale is None else given.head_scale[mine]
        logits = normed @ dequantised(given.head[mine], scale, None, normed.dtype).T
        if given.head_bias is not None:
            logits = logits + given.head_bias[mine]
        self.logits[:, mine] = logits.to(self.logits.dtype)

    def _sample(self, one: Instruction, entry: int) -> None:
        given, row = self.given, int(self.alive[entry])
        if row < 0:
            return
        assert self.positions is not None
        assert given.seeds is not None and given.temperature is not None and given.top_k is not None
        position, mine = int(self.positions[row]), slice(entry, entry + 1)
        banned = given.x.new_zeros((1, 0), dtype=torch.int32) if given.banned is None else given.banned[mine]
        if given.least is not None and position < given.least[entry]:
            banned = torch.cat([banned, banned.new_full((1, 1), given.end)], dim=1)
        if self.logits[entry].isnan().any():
            token = BROKEN
        else:
            token = int(
                sample_token(
                    self.logits[mine], self.alive[mine], given.seeds, self.positions, given.temperature, given.top_k,
                    given.top_p, self.history, banned, given.stream, given.repetition_limit,
                )
            )  # fmt: skip
            if given.most is not None and position >= given.most[entry]:
                token = given.end
        self.tokens[entry, one.step] = token
        self.lengths[row] += 1
        self.positions[row] += 1
        if token == BROKEN or token == given.end:
            self.alive[entry] = -1
            return
        if self.history is not None and self.history.shape[1]:
            self.history[row] = torch.cat([self.history[row, 1:], self.history.new_tensor([token])])
        if given.embedding is not None:
            self.x[entry] = given.embedding[token]

    @staticmethod
    def _columns(tile: int, size: int, whole: int) -> slice:
        return slice(tile * size, min((tile + 1) * size, whole))


def _weight(weight: Tensor, scale: Tensor | None, layer: int, rows: slice, kind: torch.dtype) -> Tensor:
    return dequantised(weight[layer, rows], None if scale is None else scale[layer, rows], None, kind)
