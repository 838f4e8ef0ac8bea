"""Tensor cores: mma.sync, and ldmatrix and stmatrix that feed them.

Fragments as in the PTX manual: with g = lane / 4 and t = lane % 4, register r of A holds row
g + 8 (r % 2), columns from (r / 2) * 4e + t e; of B rows from r * 4e + t e, column g; of C row
g + 8 (r / 2), column 2 t + r % 2; e is the number of elements in 32 bits. Products are exact, sums
are in float32, in numpy's order: hardware has another, and may round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx import traffic
from fusetune.sim.ptx.instructions.load_store import take_space
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.machine import Machine
from fusetune.sim.ptx.operation import Operation, Read
from fusetune.sim.ptx.threads import WARP, Step
from fusetune.sim.ptx.types import Array, bf16_to_f32, fp8_values, tf32_to_f32

_ALL = np.uint32(0xFFFFFFFF)
_ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}
# k of m16n8k, by type of A and B.
_SHAPES = {
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "s8": (16, 32),
    "u8": (16, 32),
    "e4m3": (16, 32),
    "e5m2": (16, 32),
}


def _numbers(bits: Array, kind: str) -> Array:
    """[..., elements] numbers in 32-bit words."""
    if kind == "bf16":
        return np.asarray(bf16_to_f32(bits.view(np.uint16)))
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return np.asarray(tf32_to_f32(bits))
    if kind in ("e4m3", "e5m2"):
        return fp8_values(kind)[bits.view(np.uint8)]
    return bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)


def _fragment_a(m: Machine, values: list[Array], kind: str) -> Array:
    """[warps, 16, K]"""
    e = _ELEMENTS[kind]
    words = np.empty((len(values) // 2, 2, m.lanes), np.uint32)
    for r, value in enumerate(values):
        words[r // 2, r % 2] = value
    numbers = _numbers(words.reshape(len(values) // 2, 2, -1, 8, 4, 1), kind)
    return numbers.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, len(values) * 2 * e)


def _fragment_b(m: Machine, values: list[Array], kind: str) -> Array:
    """[warps, K, 8]"""
    e = _ELEMENTS[kind]
    words = np.empty((len(values), m.lanes), np.uint32)
    for r, value in enumerate(values):
        words[r] = value
    numbers = _numbers(words.reshape(len(values), -1, 8, 4, 1), kind)
    return numbers.transpose(1, 0, 3, 4, 2).reshape(-1, len(values) * 4 * e, 8)


def _decoded(
    m: Machine, reads: list[Read], kind: str, fragment: Callable[[Machine, list[Array], str], Array]
) -> Array:
    """A fragment; it is kept for the block, for many mma share it. Registers are never written
    to in place, so that the same arrays are the same values."""
    values = [read() for read in reads]
    key = (fragment, *map(id, values))
    known = m.decoded.get(key)
    if known is None:
        known = m.decoded[key] = (fragment(m, values, kind), values)
    result: Array = known[0]
    return result


@instruction("mma")
def mma(x: Operation) -> Step:
    c_type = x.modifiers.last_type({"f32", "f16", "s32"})
    b_type = x.modifiers.last_type(_ELEMENTS)
    a_type = x.modifiers.last_type(_ELEMENTS)
    d_type = x.modifiers.last_type({"f32", "f16", "s32"})
    x.modifiers.required("sync")
    x.modifiers.required("aligned")
    if " row col " not in f" {' '.join(x.instruction.modifiers)} ":
        raise UnknownInstruction("other layouts than .row.col")
    x.modifiers.ignore("row", "col")
    x.modifiers.ignore("kind::f8f6f4")
    integral = a_type in ("s8", "u8")
    k = int(x.modifiers.required(*(f"m16n8k{k}" for k in _SHAPES[a_type]))[6:])
    if d_type != c_type or integral != (c_type == "s32") or (a_type != b_type and not integral):
        raise UnknownInstruction("types of mma")
    targets, a, b, c = (x.vector(operand) for operand in x.operands(4))
    words = k // _ELEMENTS[a_type] // 4
    half = c_type == "f16"
    if (len(a), len(b), len(c), len(targets)) != (2 * words, words, *(2 * [2 if half else 4])):
        raise UnknownInstruction("fragments of mma")
    word = "b32" if half else c_type
    reads_a, reads_b = ([x.read(register, "b32") for register in side] for side in (a, b))
    reads_c = [x.read(register, word) for register in c]
    writes = [x.write(register, word) for register in targets]
    m = x.machine
    flops = 2 * 16 * 8 * k

    def step() -> None:
        m.require_converged(_ALL)
        product = np.matmul(
            _decoded(m, reads_a, a_type, _fragment_a), _decoded(m, reads_b, b_type, _fragment_b)
        )
        m.counts.mma_flops += flops * m.warps
        # [register pair, register of it, thread]
        parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(2, 2, -1)
        if half:
            for upper, (read, write) in enumerate(zip(reads_c, writes, strict=True)):
                sums = m.spread(read()).view(np.float16).reshape(-1, 2) + parts[upper].T
                write(np.ascontiguousarray(sums, np.float16).view(np.uint32)[:, 0])
            return
        for r, (read, write) in enumerate(zip(reads_c, writes, strict=True)):
            part = parts[r // 2, r % 2]
            write(read() + (part.astype(np.int32) if integral else part))

    return step


def _take_matrix_form(x: Operation) -> tuple[int, bool]:
    """(number of 8x8 matrices, whether transposed)"""
    x.modifiers.last_type({"b16"})
    x.modifiers.required("sync")
    x.modifiers.required("aligned")
    x.modifiers.required("m8n8")
    count = int(x.modifiers.required("x1", "x2", "x4")[1:])
    transposed = x.modifiers.flag("trans")
    if take_space(x, "shared") != "shared":
        raise UnknownInstruction("a matrix outside shared memory")
    return count, transposed


class _Rows:
    """The rows that a warp names: of matrix i by its threads 8 i to 8 i + 7."""

    def __init__(self, m: Machine, address: Array, count: int, what: str) -> None:
        m.require_converged(_ALL)
        self.m = m
        self.naming = m.lane < 8 * count
        if m.mask is not None:
            self.naming &= m.mask
        self.outer = m.mask
        self.count = count
        m.mask = None if self.naming.all() else self.naming
        try:
            self.at = m.shared.rows(m, address, what)
            self._note(what)
        finally:
            m.mask = self.outer
        self.waves = self._waves()

    def _note(self, what: str) -> None:
        note = self.m.shared.note_load if what == "ldmatrix" else self.m.shared.note_store
        note(self.m, self.at, 16)

    def _waves(self) -> tuple[int, int]:
        """(requests, wavefronts): each matrix is served as a quarter-warp of 16-byte accesses."""
        mask = None if self.naming.all() else self.naming
        return traffic.wavefronts(self.at, 16, mask)


@instruction("ldmatrix")
def ldmatrix(x: Operation) -> Step:
    count, transposed = _take_matrix_form(x)
    targets, place = x.operands(2)
    registers = x.vector(targets)
    if len(registers) != count:
        raise UnknownInstruction(f"{len(registers)} registers")
    writes = [x.write(register, "b32") for register in registers]
    address, m = x.address(place), x.machine

    def step() -> None:
        rows = _Rows(m, address(), count, "ldmatrix")
        m.counts.shared_load_requests += rows.waves[0]
        m.counts.shared_load_wavefronts += rows.waves[1]
        at = rows.at.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        matrices = m.shared.read_rows(m, at).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        # Thread 4 row + col / 2 gets elements (row, col) and (row, col + 1).
        words = np.ascontiguousarray(matrices.swapaxes(0, 1)).view(np.uint32)
        for i, write in enumerate(writes):
            write(words[i].reshape(-1))

    return step


@instruction("stmatrix")
def stmatrix(x: Operation) -> Step:
    count, transposed = _take_matrix_form(x)
    place, sources = x.operands(2)
    registers = x.vector(sources)
    if len(registers) != count:
        raise UnknownInstruction(f"{len(registers)} registers")
    reads = [x.read(register, "b32") for register in registers]
    address, m = x.address(place), x.machine

    def step() -> None:
        rows = _Rows(m, address(), count, "stmatrix")
        m.counts.shared_store_requests += rows.waves[0]
        m.counts.shared_store_wavefronts += rows.waves[1]
        words = np.stack([m.spread(read()).reshape(-1, WARP) for read in reads], axis=1)
        matrices: Any = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        at = rows.at.reshape(-1, WARP)[:, : 8 * count]
        if m.mask is not None:
            taking_part = m.mask.reshape(-1, WARP).any(1)
            at, matrices = at[taking_part], matrices[taking_part]
        m.shared.write_rows(at.reshape(-1), np.ascontiguousarray(matrices).reshape(-1, 8))

    return step
