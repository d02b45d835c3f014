"""Small models for tests of the estimate, and their traced passes."""

from transformers import LlamaConfig
from trl import ModelConfig

from sapo import SAPOConfig
from sapo.estimate.passes import Lengths, trace_passes
from sapo.weights.footprint import Strategy, build_run_models
from tests.unit.test_shared_prefix import ARCHITECTURES, SMALL

LENGTHS = Lengths(prompt=20, before=4, segment=8, after=8)
# Layers are alike, and each takes its time to trace.
MODELS = ARCHITECTURES | {"llama": LlamaConfig(**SMALL | {"num_hidden_layers": 2}), "deep": ARCHITECTURES["llama"]}


def options(**more):
    given = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "gradient_checkpointing": False}
    return SAPOConfig(**given | {"per_device_train_batch_size": 4} | more)


TRACED = {}


def passes(
    name="llama", *, model=None, strategy=None, pairs=4, rows=4, fused=False, lengths=LENGTHS, on_gpu=False, **more
):
    """Traced once for all tests."""
    strategy = strategy or Strategy()
    key = repr((name, model, strategy, pairs, rows, fused, lengths, on_gpu, more))
    if key not in TRACED:
        args = options(**more)
        roles = build_run_models(MODELS[name], ModelConfig(**(model or {})), args, strategy)
        TRACED[key] = trace_passes(roles, lengths, pairs=pairs, rows=rows, fused_lm_head=fused, on_gpu=on_gpu)
    return TRACED[key]
