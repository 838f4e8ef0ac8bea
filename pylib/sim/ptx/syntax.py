"""Reads PTX text: kernels, their parameters, registers, variables and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fusetune.sim.errors import SimError
from fusetune.sim.ptx.types import DTYPES, literal


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `@guard mnemonic.modifiers operands`."""

    mnemonic: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool  # @!guard
    line: str  # "file:line" of the source, "" where it is not known
    text: str

    @property
    def opcode(self) -> str:
        return ".".join((self.mnemonic, *self.modifiers))


@dataclass(frozen=True)
class Variable:
    """Memory with a name: .global, .const, .shared or .local; also a kernel's parameter."""

    name: str
    size: int  # bytes; 0 for an array without bounds
    align: int
    content: bytes = b""


@dataclass
class Kernel:
    name: str
    params: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of an instruction
    # Registers that the compiler says may hold anything at some point.
    arbitrary: set[str] = field(default_factory=set)


@dataclass
class Module:
    kernels: dict[str, Kernel]
    variables: list[Variable]  # .global and .const
    shared: list[Variable]  # of the whole module; size 0: the dynamic ones


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{")
_VARIABLE = re.compile(
    r"\.(?P<space>global|const|shared|local)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>\s*\[\s*(?P<count>\d*)\s*\])?\s*(?:=\s*(?P<init>\{[^}]*\}|[^;]+))?;"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s+[^,]*?)?"
    r"(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?$"
)
_STATEMENT = re.compile(
    r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<implicit>//\s*implicit-def:[^\n]*)|(?P<skip>//[^\n]*)|"
    r"(?P<pragma>\.(?:pragma|file|section)\b[^\n]*)|"
    r"(?P<brace>[{}])|(?P<label>[$\w%.]+):(?!:)|(?P<code>[^;{}]*(?:\{[^{};]*\}[^;{}]*)*);)"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_CODE = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", re.S)
_NAME = re.compile(r"[%\w$]+")


def parse(text: str) -> Module:
    """Reads a module. Bodies of kernels are read here too; unknown instructions pass."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    kernels = {}
    outside = []
    position = 0
    for match in _ENTRY.finditer(text):
        outside.append(text[position : match.start()])
        position = _closing_brace(text, match.end())
        kernel = Kernel(match[1], _parameters(match[2]))
        _read_body(kernel, text[match.end() : position - 1], files)
        kernels[kernel.name] = kernel
    top = re.sub(r"//[^\n]*", "", "".join(outside))
    variables: list[Variable] = []
    shared: list[Variable] = []
    for match in _VARIABLE.finditer(top):
        (shared if match["space"] == "shared" else variables).append(_variable(match))
    return Module(kernels, variables, shared)


def _closing_brace(text: str, start: int) -> int:
    """Position after the brace that closes the block whose inside begins at start."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise SimError("PTX: a block is not closed")


def _parameters(text: str) -> list[Variable]:
    params = []
    for piece in re.sub(r"//[^\n]*", "", text).split(","):
        if not piece.strip():
            continue
        match = _PARAMETER.match(piece.strip())
        if match is None:
            raise SimError(f"PTX: cannot read the parameter {piece.strip()!r}")
        size = DTYPES[match["type"]].itemsize
        params.append(
            Variable(match["name"], size * int(match["count"] or 1), int(match["align"] or size))
        )
    return params


def _variable(match: re.Match[str]) -> Variable:
    dtype = DTYPES[match["type"]]
    count = int(match["count"] or 0) if match["array"] else 1
    content = b""
    if match["init"]:
        values = match["init"].strip("{} \n").split(",")
        content = b"".join(np.asarray(literal(v, match["type"])).tobytes() for v in values)
    return Variable(
        match["name"], count * dtype.itemsize, int(match["align"] or dtype.itemsize), content
    )


def _read_body(kernel: Kernel, body: str, files: dict[str, str]) -> None:
    line = ""
    scopes: list[dict[str, str]] = [{}]  # blocks in braces rename the registers they declare
    count = 0
    position = 0
    while match := _STATEMENT.match(body, position):
        position = match.end()
        if match["loc"]:
            _, file, number = match["loc"].split()[:3]
            line = f"{files.get(file, file)}:{number}"
        elif match["implicit"]:
            kernel.arbitrary.update(re.findall(r"%\w+", match["implicit"]))
        elif match["label"]:
            kernel.labels[match["label"]] = len(kernel.instructions)
        elif match["brace"] == "{":
            count += 1
            scopes.append(dict(scopes[-1]))
        elif match["brace"] == "}":
            scopes.pop()
        elif match["code"] and match["code"].strip():
            code = re.sub(r"//[^\n]*", "", match["code"]).strip()
            suffix = f"@{count}" if len(scopes) > 1 else ""
            if code:
                _read_statement(kernel, code, line, scopes[-1], suffix)
    if body[position:].strip():
        raise SimError(f"PTX: cannot read {body[position:].strip()[:80]!r} in {kernel.name}")


def _read_statement(
    kernel: Kernel, code: str, line: str, scope: dict[str, str], suffix: str
) -> None:
    registers = _REGISTERS.match(code)
    if registers:
        for name in _register_names(registers[2]):
            if suffix:
                scope[name] = name + suffix
            kernel.registers[name + suffix] = registers[1]
        return
    if code.startswith(".param"):  # belongs to a call, which is an unknown instruction
        return
    variable = _VARIABLE.match(code + ";")
    if variable:
        (kernel.shared if variable["space"] == "shared" else kernel.local).append(
            _variable(variable)
        )
        return
    match = _CODE.match(code)
    if match is None or code.startswith("."):
        raise SimError(f"PTX: cannot read {code!r} in {kernel.name}")
    bang, guard, opcode, rest = match.groups()
    if scope:
        rest = _NAME.sub(lambda name: scope.get(name[0], name[0]), rest)
        guard = scope.get(guard, guard)
    mnemonic, *modifiers = opcode.split(".")
    kernel.instructions.append(
        Instruction(
            mnemonic, tuple(modifiers), tuple(_operands(rest)), guard, bang == "!", line, code
        )
    )


def _register_names(text: str) -> Iterator[str]:
    for name in text.split(","):
        name = name.strip()
        numbered = re.match(r"([%\w$]+)<(\d+)>", name)
        if numbered:
            yield from (f"{numbered[1]}{i}" for i in range(int(numbered[2])))
        else:
            yield name


def _operands(text: str) -> Iterator[str]:
    """Splits at the commas that are in no brackets."""
    depth, start = 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    if text[start:].strip():
        yield text[start:].strip()
