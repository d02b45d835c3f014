"""Small things that many tests need."""

from sapo.config import HAS_ACTIVATION_CHECKPOINTING


def enable_checkpointing(model, *, use_reentrant=False):
    """Recompute activations in the backward pass, under the name that this version of transformers has for it."""
    options = {"use_reentrant": use_reentrant}
    if HAS_ACTIVATION_CHECKPOINTING:
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
