"""How sure models are of answers: entropy of the next token, and likelihood, at the tokens of held-out answers.

    python benchmarks/quality/entropy.py RUN RUN ...

The answers are of the built-in house style, to the first held-out questions of those that `keeping.py style` judges
replies to. A model whose entropy is above its nll samples worse at temperature 1 than its likelihood promises.
"""

import argparse
import statistics

import torch

from sapo.demo.house_style import heldout_rows
from sapo.weights.description import load_tokenizer
from sapo.weights.loading import load_frozen


def encoded(tokenizer, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row, in tokens."""
    found = []
    for *prompt, answer in (row.as_row()["messages"] for row in heldout_rows(count)):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        texts = (text, answer["content"] + tokenizer.eos_token)
        found.append(tuple(tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="runs, or folders of models")
    parser.add_argument("--rows", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        model, entropies, losses = load_frozen(name, dtype="float32", device="cpu"), [], []
        for prompt, answer in encoded(load_tokenizer(name), options.rows):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logps = logits.float().log_softmax(-1)
            entropies += (-(logps.exp() * logps).sum(-1)).tolist()
            losses += (-logps.gather(1, torch.tensor(answer)[:, None])[:, 0]).tolist()
        print(f"{name}: entropy {statistics.mean(entropies):.4f} nll {statistics.mean(losses):.4f}", flush=True)


if __name__ == "__main__":
    main()
