"""Which function makes which instruction executable."""

from __future__ import annotations

from collections.abc import Callable

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.machine import CONTROL
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import Step

Maker = Callable[[Operation], Step]
_MAKERS: dict[str, Maker] = {}


def instruction(*mnemonics: str) -> Callable[[Maker], Maker]:
    """Registers the maker of these mnemonics.

    A maker takes from the operation's modifiers all that it knows; what is left raises.
    """

    def register(maker: Maker) -> Maker:
        for mnemonic in mnemonics:
            _MAKERS[mnemonic] = maker
        return maker

    return register


def make(x: Operation) -> Step:
    """The instruction as a closure. Raises UnknownInstruction for what it does not know."""
    try:
        maker = _MAKERS.get(x.mnemonic)
        if maker is None:
            raise UnknownInstruction("unknown instruction")
        step = maker(x)
        x.modifiers.raise_if_any()
    except UnknownInstruction as error:
        line = f" at {x.instruction.line}" if x.instruction.line else ""
        raise UnknownInstruction(f"{error}; `{x.instruction.text}`{line}") from None
    if x.instruction.guard is None or x.mnemonic in CONTROL:
        return step
    guard, _ = x.register(x.instruction.guard)
    return x.machine.guarded(step, guard, x.instruction.negated)
