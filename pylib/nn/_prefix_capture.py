"""What a model's attention is given: keys and values, as a prefix would have to hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fusetune.nn._prefix_interface import Pair, stock_attention, stock_name
from fusetune.nn._prefix_layout import stacks

Tensor = torch.Tensor
_NAME = "captured_"
_PLACE = "_fusetune_captured"  # in an attention module: (place, layer), and where to put them


@contextmanager
def captured(model: Any) -> Iterator[dict[tuple[str, int], tuple[Tensor, Tensor]]]:
    """Within the with block forward passes leave their keys and values in the dictionary.

    Yields (place, layer) -> key, value [B, Hkv, S, D] of the last pass, positions applied. The
    model must not be attached (nn.prefix_attention).
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
    before: list[tuple[Any, Any]] = []
    modules: list[Any] = []
    try:
        for stack in stacks(model):
            stock = stock_name(stack.module)
            if _NAME + stock not in ALL_ATTENTION_FUNCTIONS:
                ALL_ATTENTION_FUNCTIONS.register(_NAME + stock, _capturing(stock))
                mask = ALL_MASK_ATTENTION_FUNCTIONS[stock]
                ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME + stock, mask)
            for inside, place in stack.attention.items():
                module = stack.module.get_submodule(inside)
                module.__dict__[_PLACE] = (place, found)
                modules.append(module)
            for config in {id(m.config): m.config for m in (stack.module, *modules)}.values():
                if not str(config._attn_implementation).startswith(_NAME):
                    before.append((config, config._attn_implementation_internal))
                    config._attn_implementation_internal = _NAME + stock
        yield found
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for module in modules:
            module.__dict__.pop(_PLACE, None)


def _capturing(name: str) -> Any:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        place, found = module.__dict__[_PLACE]
        found[place] = (key, value)
        return stock_attention(module, name)(module, query, key, value, *args, **kwargs)

    return attention
