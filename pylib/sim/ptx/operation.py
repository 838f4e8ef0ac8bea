"""What the makers of instructions work with: modifiers taken one by one, operands as closures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.machine import Machine
from fusetune.sim.ptx.syntax import Instruction, Variable
from fusetune.sim.ptx.threads import SPECIAL
from fusetune.sim.ptx.types import DTYPES, UNSIGNED, Array, Value, literal

CARRY = "%carry"  # the register that add.cc sets; no PTX name is like it
Read = Callable[[], Value]
Write = Callable[[Value], None]

_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$")


class Modifiers:
    """The modifiers of an instruction. Those that nobody has asked for are an error."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._left = list(names)

    def last_type(self, allowed: set[str] | frozenset[str] | Mapping[str, Any]) -> str:
        """Takes the last modifier, which must be one of these types."""
        if not self._left or self._left[-1] not in allowed:
            raise UnknownInstruction("unknown type")
        return self._left.pop()

    def one_of(self, *names: str) -> str | None:
        """Takes the one of these names that is there."""
        for name in names:
            if self.flag(name):
                return name
        return None

    def required(self, *names: str) -> str:
        """Takes the one of these names that must be there."""
        found = self.one_of(*names)
        if found is None:
            raise UnknownInstruction(f"needs one of {', '.join('.' + name for name in names)}")
        return found

    def flag(self, name: str) -> bool:
        """Takes a modifier; whether it was there."""
        if name in self._left:
            self._left.remove(name)
            return True
        return False

    def ignore(self, *names: str) -> None:
        """Takes modifiers that change nothing here."""
        for name in names:
            self.flag(name)

    def matching(self, pattern: str) -> str | None:
        """Takes the first modifier that matches the whole pattern."""
        for name in self._left:
            if re.fullmatch(pattern, name):
                self._left.remove(name)
                return name
        return None

    def raise_if_any(self) -> None:
        if self._left:
            raise UnknownInstruction(f"unknown modifier .{' .'.join(self._left)}")


class Operation:
    """An instruction that is being made executable."""

    def __init__(
        self,
        instruction: Instruction,
        machine: Machine,
        registers: Mapping[str, tuple[int, str]],  # name -> (index, type)
        symbols: Mapping[str, int],  # addresses of variables
        params: Mapping[str, tuple[int, Variable]],  # name -> (offset, parameter)
        labels: Mapping[str, int],
    ) -> None:
        self.instruction = instruction
        self.mnemonic = instruction.mnemonic
        self.modifiers = Modifiers(instruction.modifiers)
        self.machine = machine
        self.params = params
        self.labels = labels
        self._registers = registers
        self._symbols = symbols

    def operands(self, *counts: int) -> tuple[str, ...]:
        """The operands, which must be as many as one of these counts."""
        operands = self.instruction.operands
        if len(operands) not in counts:
            raise UnknownInstruction(f"has {len(operands)} operands")
        return operands

    def is_register(self, operand: str) -> bool:
        return operand in self._registers

    def register(self, operand: str) -> tuple[int, str]:
        """(index, type) of a register."""
        if operand not in self._registers:
            raise UnknownInstruction(f"{operand!r} is not a register")
        return self._registers[operand]

    def read(self, operand: str, kind: str) -> Read:
        """A closure that gives the operand's value in the dtype of a PTX type."""
        dtype = DTYPES[kind]
        if operand.startswith("!"):
            positive = self.read(operand[1:], kind)
            return lambda: ~positive()
        if operand in self._registers:
            return self._read_register(operand, dtype)
        m = self.machine
        if operand.startswith("%"):
            if operand not in SPECIAL:
                raise UnknownInstruction(f"special register {operand}")
            return lambda: m.special(operand).astype(dtype)
        if operand in self._symbols:
            size = dtype.itemsize
            address = UNSIGNED[size].type(self._symbols[operand] & ((1 << 8 * size) - 1))
            return lambda: address
        if operand == "WARP_SZ":
            return lambda: dtype.type(32)
        try:
            constant = literal(operand, kind)
        except ValueError:
            raise UnknownInstruction(f"operand {operand!r}") from None
        return lambda: constant

    def _read_register(self, name: str, dtype: np.dtype[Any]) -> Read:
        m = self.machine
        index, kind = self._registers[name]
        have = DTYPES[kind]
        same_size = have.itemsize == dtype.itemsize
        narrow = UNSIGNED[dtype.itemsize] if dtype != np.bool_ else dtype
        if (kind == "pred") != (dtype == np.bool_):
            raise UnknownInstruction(f"{name} is a .{kind} register")

        def read() -> Value:
            value = m.regs[index]
            if value is None or m.is_partly(index):
                m.raise_unless_written(index)
                value = m.regs[index]
                assert value is not None
            if value.dtype is dtype:
                return value
            if same_size:
                return value.view(dtype)
            return value.view(UNSIGNED[value.dtype.itemsize]).astype(narrow).view(dtype)

        return read

    def write(self, operand: str, kind: str) -> Write:
        """A closure that writes a value in the dtype of a PTX type; wider registers extend it."""
        if operand == "_":
            return lambda _value: None
        m = self.machine
        index, have = self.register(operand)
        if (have == "pred") != (kind == "pred"):
            raise UnknownInstruction(f"{operand} is a .{have} register")
        size = DTYPES[have].itemsize
        dtype = DTYPES[kind]
        if dtype.itemsize == size:
            return lambda value: m.put(index, value)
        if dtype.itemsize > size:
            raise UnknownInstruction(f"{operand} is a .{have} register, too small for .{kind}")
        if dtype.kind == "f":
            dtype = UNSIGNED[dtype.itemsize]
        wide = np.dtype(f"{dtype.kind}{size}")  # signed types extend their sign
        return lambda value: m.put(index, value.view(dtype).astype(wide))

    def pair(self, operand: str) -> tuple[str, str | None]:
        """d|p: a destination and its second one."""
        first, _, second = operand.partition("|")
        return first.strip(), second.strip() or None

    def vector(self, operand: str) -> list[str]:
        """The registers of {a, b, ...}, or the one."""
        if operand.startswith("{"):
            return [piece.strip() for piece in operand.strip("{} ").split(",")]
        return [operand]

    def address(self, operand: str) -> Callable[[], Array]:
        """A closure that gives [register + offset] as int64 for each thread."""
        match = _ADDRESS.match(operand)
        if match is None:
            raise UnknownInstruction(f"address {operand!r}")
        base, sign, number = match.groups()
        offset = int(number or "0", 0) * (-1 if sign == "-" else 1)
        m = self.machine
        if base in self._registers:
            read = self._read_register(base, UNSIGNED[DTYPES[self._registers[base][1]].itemsize])

            def at() -> Array:
                value = read().astype(np.int64)
                if offset:
                    value = value + offset
                return value if value.ndim else np.full(m.lanes, value)

            return at
        constant = self._symbols[base] if base in self._symbols else self.constant(base)
        return lambda: np.full(m.lanes, constant + offset, np.int64)

    def constant(self, operand: str) -> int:
        """An operand that must be a number."""
        try:
            return int(operand.rstrip("U"), 0)
        except ValueError:
            raise UnknownInstruction(f"operand {operand!r} must be a constant") from None
