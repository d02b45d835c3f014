"""trl's fused head as its Triton kernels compute it, in Triton's interpreter on CPU tensors, against the gathered head.

    TRITON_INTERPRET=1 python -m tests.gpu_without_gpu.interpreted

prints the largest differences as JSON: of kernel and log-softmax, and of both heads through `score` in both layouts.
"""

from __future__ import annotations

import copy
import json

import torch
import trl.kernels.chunked_logprob as kernels
import trl.trainer.utils as trainer_utils
from trl.trainer.utils import add_fused_lm_head

from sapo.preference.batches import collate_pairs
from sapo.preference.scoring import heads_disagree, prepare_shared_layout, score
from tests.gpu_without_gpu.fake_cuda import pairs
from tests.tiny import tiny_llama

HIDDEN, ROWS = 32, 7


def alone(dtype: torch.dtype, vocabulary: int, chunk: int) -> dict[str, float]:
    """The kernel against log-softmax: nats, and gradients relative to the largest."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, HIDDEN) * 0.3).to(dtype).requires_grad_()
    targets, upstream = torch.randint(vocabulary, (ROWS,)), torch.randn(ROWS)
    given = (hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",))
    logps = kernels.ChunkedLogProbFunction.apply(*given)[0]
    (logps * upstream).sum().backward()
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.log_softmax(exact[0] @ exact[1].T, -1).gather(-1, targets[:, None])[:, 0]
    (expected * upstream).sum().backward()
    return {
        "logps": float((logps - expected).abs().max()),
        "gradients": max(_relative(a.grad, b.grad) for a, b in zip((hidden, weight), exact, strict=True)),
    }


def through_score(layout: str, tied: bool) -> dict[str, float]:
    """Both heads on the same rows: nats of the sums, and gradients relative to the largest."""
    gathered = tiny_llama(vocab_size=1100, tie_word_embeddings=tied)
    fused = copy.deepcopy(gathered)
    add_fused_lm_head(fused)
    assert heads_disagree(fused) is None
    if layout == "shared":
        assert prepare_shared_layout(gathered) is None
        assert prepare_shared_layout(fused, fused_lm_head=True) is None
    rows, sums = collate_pairs(pairs(), pad_token_id=0, layout=layout), []
    for model, head in ((gathered, False), (fused, True)):
        found = score(model, rows, fused_lm_head=head)
        sums.append(torch.cat([found.chosen_logps, found.rejected_logps]))
        (sums[-1] * torch.arange(1, len(sums[-1]) + 1)).sum().backward()
    weights = zip(fused.parameters(), gathered.parameters(), strict=True)
    return {
        "logps": float((sums[0] - sums[1]).abs().max()),
        "gradients": max(_relative(ours.grad, own.grad) for ours, own in weights),
    }


def _relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).abs().max() / expected.float().abs().max())


def main() -> None:
    assert type(kernels._forward_kernel).__name__ == "InterpretedFunction", "set TRITON_INTERPRET=1"
    kernels._use_triton = trainer_utils._use_triton = lambda device: True
    found = {
        "float32": alone(torch.float32, 1500, 512),
        "float32, larger tiles": alone(torch.float32, 3000, 1024),
        "bfloat16": alone(torch.bfloat16, 1500, 512),
    }
    for layout in ("plain", "shared"):
        for tied in (False, True):
            found[f"{layout}, {'tied' if tied else 'untied'}"] = through_score(layout, tied)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
