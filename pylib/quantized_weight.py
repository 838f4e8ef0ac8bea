"""A 4-bit weight and its statistics, in bitsandbytes' layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusetune.reference.codebook import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES, codebook

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A tensor quantised to 4 bits in blocks of consecutive (row-major) elements.

    packed: uint8 [ceil(n / 2)], two codes a byte, the earlier one in the high nibble.
    absmax: fp32 [ceil(n / blocksize)], the largest magnitude of each block. When nested ("double
        quantisation"), its 8-bit codes instead, uint8, with
        absmax[i] = nested_code[codes[i]] * nested_absmax[i // nested_blocksize] + nested_offset.
    quant_type: "nf4" or "fp4". blocksize: 32 to 4096, a power of two.
    shape, dtype: of the weight before quantisation; dtype is what it dequantises to by default.
    nested_code: fp32 [256]; nested_absmax: fp32 [ceil(blocks / nested_blocksize)];
    nested_offset: fp32 []. All three or none.

    The tensors are checked once, here, and must not be resized or re-pointed afterwards: kernels
    read their addresses. Raises ValueError or TypeError that names the field at fault.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    quant_type: str
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        self.validate()

    @property
    def nested(self) -> bool:
        """Whether absmax itself is quantised."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self._tensors().values())

    def numel(self) -> int:
        """Elements of the weight, not of the packed tensor."""
        return math.prod(self.shape)

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def __repr__(self) -> str:
        nested = ", nested" if self.nested else ""
        return (
            f"QuantizedWeight({self.quant_type}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}{nested}, device={self.device})"
        )

    # --- checks -------------------------------------------------------------------------------

    @classmethod
    def unchecked(cls, **fields: object) -> QuantizedWeight:
        """From fields that have been checked before: all of them, by name."""
        self = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    def validate(self) -> None:
        """Checks sizes, dtypes, devices and values. Raises ValueError naming the field."""
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {self.quant_type!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize!r}")
        if self.dtype not in _DTYPES.values():
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")
        nested = [self.nested_absmax, self.nested_code, self.nested_offset]
        if any(t is None for t in nested) and any(t is not None for t in nested):
            raise ValueError(
                "nested_absmax, nested_code and nested_offset go together: all or none"
            )
        numel = self.numel()
        blocks = -(-numel // self.blocksize)
        self._expect("packed", torch.uint8, (-(-numel // 2),))
        self._expect("absmax", torch.uint8 if self.nested else torch.float32, (blocks,))
        if self.nested:
            if self.nested_blocksize < 1:
                raise ValueError(f"nested_blocksize must be positive, got {self.nested_blocksize}")
            self._expect("nested_absmax", torch.float32, (-(-blocks // self.nested_blocksize),))
            self._expect("nested_code", torch.float32, (256,))
            self._expect("nested_offset", torch.float32, ())
        for name, tensor in self._tensors().items():
            if tensor.is_floating_point() and not _finite(tensor):
                raise ValueError(f"{name} holds NaN or infinity: the quantised weight is corrupt")

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        tensor = getattr(self, name)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of a weight of shape {tuple(self.shape)} in blocks of {self.blocksize} "
                f"must have shape {shape}, got {tuple(tensor.shape)}"
            )
        if tensor.device != self.packed.device:
            raise ValueError(f"{name} is on {tensor.device}, packed on {self.packed.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")

    # --- moving and storing -------------------------------------------------------------------

    def to(self, device: torch.device | str | int) -> QuantizedWeight:
        """The same weight on `device`; itself where it is there already."""
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        moved = {name: tensor.to(target) for name, tensor in self._tensors().items()}
        return self._replace(moved)

    def _replace(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return QuantizedWeight(**{**fields, **tensors})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors under the keys that bitsandbytes' Linear4bit gives them in a state dict.

        "weight" is the packed tensor [ceil(n / 2), 1]; the rest are "weight.absmax",
        "weight.quant_map", the nested ones, and the plain values as JSON in uint8.
        """
        plain: dict[str, object] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": tuple(self.shape),
        }
        state = {
            "weight": self.packed.view(-1, 1),
            "weight.absmax": self.absmax,
            "weight.quant_map": codebook(self.quant_type, self.device).clone(),
        }
        if self.nested_absmax is not None and self.nested_code is not None:
            assert self.nested_offset is not None
            state["weight.nested_absmax"] = self.nested_absmax
            state["weight.nested_quant_map"] = self.nested_code
            plain["nested_blocksize"] = self.nested_blocksize
            plain["nested_dtype"] = "float32"
            plain["nested_offset"] = self.nested_offset.item()
        text = json.dumps(plain).encode()
        key = f"weight.quant_state.bitsandbytes__{self.quant_type}"
        state[key] = torch.tensor(list(text), dtype=torch.uint8)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """Reads what `state_dict`, or bitsandbytes' Linear4bit, wrote. Shares the tensors.

        Raises ValueError where a key is missing or the codebook is not the named one.
        """
        keys = [k for k in state if k.startswith("weight.quant_state.bitsandbytes__")]
        missing = [k for k in ("weight", "weight.absmax") if k not in state]
        if len(keys) != 1 or missing:
            raise ValueError(
                "a 4-bit weight needs 'weight', 'weight.absmax' and one "
                f"'weight.quant_state.bitsandbytes__*', got {sorted(state)}"
            )
        plain = json.loads(bytes(state[keys[0]].tolist()))
        packed = state["weight"]
        quant_map = state.get("weight.quant_map")
        if quant_map is not None:
            _check_codebook(quant_map, plain["quant_type"])
        offset = plain.get("nested_offset")
        return cls(
            packed=packed.view(torch.uint8).view(-1),
            absmax=state["weight.absmax"],
            quant_type=plain["quant_type"],
            blocksize=plain["blocksize"],
            shape=torch.Size(plain["shape"]),
            dtype=_DTYPES[plain["dtype"]],
            nested_absmax=state.get("weight.nested_absmax"),
            nested_code=state.get("weight.nested_quant_map"),
            nested_offset=None if offset is None else torch.tensor(offset, device=packed.device),
            nested_blocksize=plain.get("nested_blocksize", NESTED_BLOCKSIZE),
        )

    # --- bitsandbytes -------------------------------------------------------------------------

    @classmethod
    def from_bnb(cls, param: Params4bit) -> QuantizedWeight:
        """Wraps a quantised bitsandbytes Params4bit. Shares its storage; nothing is copied.

        Raises ValueError where the parameter is not quantised yet, or has been repacked by
        bitsandbytes for its own CPU kernel (which it does at inference on AVX512-BF16, and
        `fusetune.fuse` undoes).
        """
        state = getattr(param, "quant_state", None)
        if state is None:
            raise ValueError(
                "param is not quantised: it has no quant_state. Move its layer to a device first"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "param has been repacked by bitsandbytes for its CPU kernel "
                "(quant_state.packing_format_for_cpu): this layout is not supported"
            )
        _check_codebook(state.code, state.quant_type)
        nested = state.state2 if state.nested else None
        return cls(
            packed=param.data.view(torch.uint8).view(-1),
            absmax=state.absmax,
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            shape=state.shape,
            dtype=state.dtype,
            nested_absmax=nested.absmax if nested else None,
            nested_code=nested.code if nested else None,
            nested_offset=state.offset if nested else None,
            nested_blocksize=nested.blocksize if nested else NESTED_BLOCKSIZE,
        )

    def to_bnb(self, quant_storage: torch.dtype = torch.uint8) -> Params4bit:
        """The same weight as a bitsandbytes Params4bit. Shares the storage."""
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        nested = None
        if self.nested:
            nested = QuantState(
                absmax=self.nested_absmax,
                code=self.nested_code,
                blocksize=self.nested_blocksize,
                dtype=torch.float32,
            )
        state = QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=codebook(self.quant_type, self.device).clone(),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.nested_offset,
            state2=nested,
        )
        return Params4bit(
            self.packed.view(quant_storage).view(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
            quant_storage=quant_storage,
            bnb_quantized=True,
        )


def _finite(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


def _check_codebook(values: torch.Tensor, quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    if not torch.equal(values, codebook(quant_type, values.device)):
        raise ValueError(f"quant_map differs from the codebook of {quant_type}: {values.tolist()}")
