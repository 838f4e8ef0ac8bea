"""The PEFT layer of one location: base_layer gives h, the active composition makes h' of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fusetune.methods.bottleneck.adapter import BottleneckAdapter
from fusetune.methods.bottleneck.architectures import Place
from fusetune.methods.bottleneck.composition import Node, adapters_in, first
from fusetune.methods.bottleneck.config import AdapterConfig, BottleneckConfig
from fusetune.methods.bottleneck.evaluate import Site, State, evaluate

Tensor = torch.Tensor


class Active:
    """The active composition of a model, one object that all its layers look at."""

    def __init__(self) -> None:
        self.tree: Node | None = None
        self.enabled = True
        # Active, but not to be trained, whatever PEFT enables again.
        self.frozen: tuple[str, ...] = ()


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module that returns h [B, T, H], with the adapters of its location.

    bn_adapters: BottleneckAdapter by name; bn_fusions: fusions by name; bn_couplings: the
    invertible blocks, in the first layer's only. `layer` is the transformer layer this is in.
    """

    adapter_layer_names = ("bn_adapters", "bn_fusions", "bn_couplings")
    calls_base_layer = True  # and never reads its weight: `fuse` may fuse it by itself

    def __init__(
        self, base_layer: nn.Module, place: Place, layer: nn.Module, active: Active
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.active = active
        self.bn_adapters: Any = nn.ModuleDict()
        self.bn_fusions: Any = nn.ModuleDict()
        self.bn_couplings: Any = nn.ModuleDict()
        self.query_before_norm: dict[str, bool] = {}
        # In a tuple, so that it is no submodule of its own part.
        self._layer = (layer,)
        self._stream: Tensor | None = None
        self._final: Tensor | None = None
        self._handles: list[Any] = []
        self._active_adapter = []

    def update_layer(self, name: str, config: AdapterConfig, hidden_size: int) -> None:
        """Adds what a config asks for at this place, on this layer's device and in its dtype."""
        self.query_before_norm.pop(name, None)
        fusion = config.make_fusion(hidden_size)
        if fusion is not None:
            self.bn_fusions[name] = fusion
            self.query_before_norm[name] = bool(getattr(config, "query_before_ln", False))
        elif isinstance(config, BottleneckConfig) and is_wanted(config, self.place):
            size = config.bottleneck_size(hidden_size, self.place.layer)
            with _seeded(config.init_weights_seed, self.place.key):
                self.bn_adapters[name] = BottleneckAdapter(hidden_size, size, config)
        if self.place.layer == 0 and self.place.kind == "attention":
            coupling = config.make_coupling(hidden_size)
            if coupling is not None:
                self.bn_couplings[name] = coupling
        self._place_new(name)

    def _place_new(self, name: str) -> None:
        """To the device and the dtype of the layer's weights; PEFT widens 16 bits afterwards."""
        like = next((p for p in self._layer[0].parameters() if p.is_floating_point()), None)
        if like is None or like.device.type == "meta":
            return
        for attribute in self.adapter_layer_names:
            modules = getattr(self, attribute)
            if name in modules and not any(p.is_meta for p in modules[name].parameters()):
                modules[name].to(device=like.device, dtype=like.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.base_layer(*args, **kwargs)
        stream, self._stream, self._final = self._stream, None, None
        tree = self.active_tree()
        if tree is None:
            return hidden
        norm = None if self.place.location.norm is None else self._apply_norm
        site = Site(self.bn_adapters, self.bn_fusions, self.query_before_norm, norm)
        if not site.has(tree):
            return hidden
        needed = [site.adapters[name].config.needs_residual for name in site.present(tree)]
        if any(needed) and stream is None:
            raise RuntimeError(f"{self.place.key} was called before its residual input was known")
        state = evaluate(tree, State(hidden, hidden, stream), site)
        if site.adapters[state.last].config.original_ln_after:
            return state.hidden
        assert stream is not None  # the config needs it
        return self._ended(state.hidden, stream)

    def _ended(self, result: Tensor, stream: Tensor) -> Tensor:
        """What to return so that the sub-layer ends with `result`, whatever the model adds."""
        location = self.place.location
        if location.norm is None:
            return result - stream
        if location.norm_on_branch:
            self._final = result - stream
        else:
            self._final = result
        return result

    def present(self, tree: Node) -> list[str]:
        """The adapters of a composition that are here."""
        return [name for name in adapters_in(tree) if name in self.bn_adapters]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer around this: that of its norms, where weights are quantised."""
        own = {id(p) for p in self.bn_adapters.parameters()}
        weights = (p for p in self._layer[0].parameters() if id(p) not in own)
        return next((p.dtype for p in weights if p.is_floating_point()), torch.float32)

    def active_tree(self) -> Node | None:
        """The composition to evaluate; None where there is none or adapters are disabled."""
        return None if self._disable_adapters else self.active.tree

    # --- what is around the layer: read by hooks ------------------------------------------------

    def install(self) -> None:
        """Puts the hooks in place that this layer's adapters need. `remove` undoes it."""
        configs = [adapter.config for adapter in self.bn_adapters.values()]
        location = self.place.location
        if any(config.needs_residual for config in configs):
            source = self._layer[0].get_submodule(location.residual)
            self._handles.append(
                source.register_forward_pre_hook(self._read_stream, with_kwargs=True)
            )
        if location.norm is not None and not all(c.original_ln_after for c in configs):
            norm = self._layer[0].get_submodule(location.norm)
            self._handles.append(norm.register_forward_hook(self._replace_norm))
        if self.bn_couplings:
            self._handles.append(
                self._layer[0].register_forward_pre_hook(self._embed, with_kwargs=True)
            )

    def install_output(self, embedding: nn.Module) -> None:
        """The inverse of the invertible block, before the output embedding."""
        self._handles.append(embedding.register_forward_pre_hook(self._unembed))

    def remove(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _apply_norm(self, x: Tensor) -> Tensor:
        # Looked up anew: PEFT may have put a trained copy in its place.
        normed: Tensor = self._layer[0].get_submodule(str(self.place.location.norm))(x)
        return normed

    def _read_stream(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.active_tree() is not None:
            argument = self.place.location.argument
            self._stream = args[argument] if isinstance(argument, int) else kwargs[argument]

    def _replace_norm(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        final, self._final = self._final, None
        return output if final is None else final

    def coupling(self) -> Any:
        """The invertible block of the composition's first adapter, or None."""
        tree = self.active_tree()
        if tree is None or first(tree) not in self.bn_couplings:
            return None
        return self.bn_couplings[first(tree)]

    def _embed(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        coupling = self.coupling()
        if coupling is None:
            return None
        if args:
            return (coupling(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": coupling(kwargs["hidden_states"])}

    def _unembed(self, _: nn.Module, args: Any) -> Any:
        coupling = self.coupling()
        return None if coupling is None else (coupling.inverse(args[0]), *args[1:])

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if enabled and self.active.frozen:
            self.set_requires_grad(self.active.frozen, False)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.query_before_norm.pop(adapter_name, None)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a bottleneck adapter is not linear: it cannot be merged into the model")


def is_wanted(config: BottleneckConfig, place: Place) -> bool:
    """Whether a config puts an adapter at a place."""
    on = {
        "attention": config.mh_adapter,
        "ffn": config.output_adapter,
        "cross": config.cross_adapter,
    }
    return on[place.kind] and place.layer not in config.leave_out


@contextmanager
def _seeded(seed: int | None, key: str) -> Iterator[None]:
    """A seed of its own for each place; torch's generator is as it was afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + zlib.crc32(key.encode()))
        yield
