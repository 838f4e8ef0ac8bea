"""The PEFT tuner: puts BitFit layers around the modules whose biases are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fusetune.methods._tuner import MethodTuner
from fusetune.methods.bitfit.config import BitFitConfig
from fusetune.methods.bitfit.layer import BitFitLayer
from fusetune.methods.bitfit.select import selected
from fusetune.nn.adapter_rows import check_rows, heads_by_row, rows_named


class BitFitModel(MethodTuner):
    """BitFit adapters in a model, by PEFT's interface.

    `adapter_names` of forward and generate gives each row of a batch its own, in training too.
    """

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's; raises ValueError for names that PEFT could not tell from modules'."""
        _check_name(adapter_name, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(
        self, peft_config: Any, model_config: dict[str, Any]
    ) -> BitFitConfig:
        config: BitFitConfig = peft_config
        return config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Chooses the modules; all that may be wrong is found here."""
        self._selected = frozenset(selected(model, peft_config))

    def _targets(self) -> frozenset[str]:
        return self._selected

    def _new_layer(self, target: nn.Module, parent: nn.Module, key: str) -> BitFitLayer:
        return BitFitLayer(target)

    def _add_adapter(self, layer: Any, adapter_name: str, peft_config: Any) -> None:
        layer.update_layer(adapter_name, inference_mode=peft_config.inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT does a forward or a generation in."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_rows(names, self.peft_config, args, kwargs)
        layers = [m for m in self.modules() if isinstance(m, BitFitLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError("adapter_names: an adapter is merged; call unmerge_adapter() first")
        with rows_named(self, layers, tuple(names)), heads_by_row(self, names):
            yield


def _check_name(name: str, model: nn.Module) -> None:
    """PEFT tells adapters apart by parts of parameters' names; some names cannot be told."""
    layers = [m for m in model.modules() if isinstance(m, BitFitLayer)]
    own = {adapter for layer in layers for adapter in layer.bitfit_bias}
    parts = {part for key, _ in model.named_parameters() for part in key.split(".")} - own
    reserved = {"bitfit_bias", "base_layer", "modules_to_save", "original_module", "__base__"}
    if not name or "." in name or name in parts | reserved or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"adapter_name: {name!r} is empty, has a dot or is the name of a module or a "
            "parameter, so that PEFT could not tell whose weights are the adapter's"
        )
