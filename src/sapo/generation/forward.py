"""What a forward pass outside training asks of a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrapped(model: nn.Module) -> Any:
    """The model within the wrappers of DistributedDataParallel, DeepSpeed and torch.compile, if any.

    accelerate's function looks at every module for compiled parts: 9 ms a call for an adapter on 32 layers.
    """
    while True:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            return model
        model = inner


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """No gradients, and evaluation mode; afterwards each module's training flag is restored.

    Evaluation mode also disables gradient checkpointing: a transformers layer checks `training` first.
    `no_grad`, not `inference_mode`: under FSDP2, parameters first gathered in inference mode
    broke later training.
    """
    training = [module for module in model.modules() if module.training]
    try:
        # Module by module, because eval() and train() also set the flags of all children.
        for module in training:
            module.training = False
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


def without_router_logits(model: nn.Module) -> dict[str, bool]:
    """Arguments that disable the router loss of a mixture of experts, which scoring and decoding do not use.

    A configuration may enable it for every call. transformers then needs an attention mask of all tokens, which does
    not exist while decoding or with shared prefixes.
    """
    config = getattr(model, "config", None)
    return {"output_router_logits": False} if getattr(config, "output_router_logits", False) else {}
