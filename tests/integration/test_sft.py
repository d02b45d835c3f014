"""Laws of `objective: sft`: continued SFT on the same trainer, for comparison at equal steps."""

import pytest
import torch

from sapo.data.examples import collate_examples
from sapo.errors import ConfigurationError
from sapo.preference.batches import collate_pairs
from tests.tiny import tiny_llama, tiny_rows


@pytest.mark.parametrize("layout", ["shared", "plain"])
def test_sft_loss_is_the_likelihood_of_the_responses(layout, make_trainer):
    trainer = make_trainer(objective="sft", layout=layout)
    examples = collate_examples([trainer.train_dataset[row] for row in range(3)])["examples"]
    pairs = trainer.source.pairs(examples, epoch=0, step=0, micro_batch=0)
    batch = trainer._scorer.collate(pairs)
    loss = trainer.compute_loss(trainer.model, {"batch": batch, "pairs": pairs, "share": 1.0, "reference": None})
    expected = []
    for example in examples:
        turn = example.turns[0]
        ids = torch.tensor([[*turn.prompt_ids, *turn.response_ids]])
        labels = torch.tensor([[-100] * len(turn.prompt_ids) + list(turn.response_ids)])
        expected.append(trainer.model(input_ids=ids, labels=labels).loss)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)


def test_a_response_alone_takes_one_row():
    from sapo.data.examples import Example, Turn
    from sapo.preference.pairs import sft_pair

    turn = Turn(0, (5, 6), (7, 8, 1))
    pairs = [sft_pair(Example(0, (turn,)), turn)] * 2
    assert collate_pairs(pairs, pad_token_id=0, layout="plain").input_ids.shape == (2, 5)


def test_sft_takes_the_batches_that_self_play_takes(make_trainer):
    seen = {}
    for objective in ("sft", "orpo"):
        trainer = make_trainer(objective, objective=objective, num_train_epochs=2, max_steps=-1)
        source, rows = trainer.source, []
        original = source.pairs

        def noting(examples, *, original=original, rows=rows, **place):
            rows.append([example.row for example in examples])
            return original(examples, **place)

        source.pairs = noting
        trainer.train()
        seen[objective] = rows
    assert seen["sft"] == seen["orpo"]


def test_sft_resumes_bit_for_bit(make_trainer):
    options = {"objective": "sft", "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer("whole", **options)
    whole.train()
    again = make_trainer("again", **options)
    again.train(resume_from_checkpoint=str(whole.run_folder.path / "checkpoint-2"))
    pairs = zip(again.policy().parameters(), whole.policy().parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert whole.opponent is None is whole.reference


def test_sft_evaluates(make_trainer):
    trainer = make_trainer(objective="sft", eval_rows=tiny_rows(5, seed=5), model=tiny_llama())
    assert trainer.evaluate()["eval_nll_loss"] > 0


def test_sft_with_pairs_is_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="sft trains on responses alone"):
        make_trainer(objective="sft", pair_source="paired")
    with pytest.raises(ConfigurationError, match="Leave pair_source out"):
        make_trainer(pair_source="none")
