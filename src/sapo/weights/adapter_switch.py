"""Computing with another adapter than the policy's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


class AdapterSwitch:
    """Computes with another adapter, or with none, for a while.

    It sets the two attributes that PEFT's layers read in their forward pass, and nothing else: `set_adapter` and
    `disable_adapter` also move `requires_grad` and look at every module several times, most of 0.1 s a step for an
    adapter on 32 layers.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self._layers: list[Any] = []

    @contextmanager
    def to(self, adapter: str | None) -> Iterator[PeftModel]:
        """Yield the model, which computes with `adapter`, None for the base model; then as before."""
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = self._layers or [layer for layer in self._model.modules() if isinstance(layer, kinds)]
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = adapter is None
                if adapter is not None:
                    layer._active_adapter = [adapter]
            yield self._model
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled
