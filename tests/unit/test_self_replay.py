import random
from collections import Counter

import pytest
import torch

from sapo import SAPOConfig
from sapo.errors import ConfigurationError
from sapo.preference.batches import collate_pairs
from sapo.preference.pair_loss import pair_loss
from sapo.preference.pairs import Pair, PairSource
from sapo.preference.scoring import PairScores, score
from sapo.preference.segments import Segment
from sapo.preference.self_replay import SelfReplay, is_replayed, replayed_pair
from sapo.preference.shared_prefix import use_shared_attention
from tests.tiny import tiny_llama

REPLIES = [((3, 4, place + 5), (6, 7, 1)) for place in range(7)]


class Own(PairSource):
    """The pairs of the data: two in each micro-batch."""

    def __init__(self):
        self.seen = []

    def pairs(self, examples, *, epoch, step, micro_batch):
        self.seen.append((step, micro_batch))
        return [pair(row) for row in range(2)]


def pair(row):
    return Pair(row, 0, (3, 4), (5, 6, 7, 1), (5, 8, 9, 1), Segment(1, 3), Segment(1, 3))


def replay(share, *, process=(0, 1), micro_batches=2, batch_size=2, record=lambda *_: None):
    source = SelfReplay(
        Own(), lambda _: REPLIES, share=share, batch_size=batch_size, micro_batches=micro_batches, seed=3,
        process=process, record=record,
    )  # fmt: skip
    source.begin(0)
    return source


def drawn(source, steps, micro_batches=2):
    return [
        source.pairs([], epoch=0, step=step, micro_batch=micro)
        for step in range(steps)
        for micro in range(micro_batches)
    ]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_share_of_replay_is_what_was_asked_for(share):
    batches = drawn(replay(share), 100)
    replayed, own = (sum(is_replayed(one) is kind for batch in batches for one in batch) for kind in (True, False))
    assert own == 400
    assert abs(replayed - 400 * share / (1 - share)) <= 1
    # Evenly: no batch has more than one more than another.
    sizes = {len(batch) for batch in batches}
    assert max(sizes) - min(sizes) <= 1


def test_every_reply_is_used_equally_often_by_all_processes_together():
    batches = [batch for process in (0, 1) for batch in drawn(replay(0.5, process=(process, 2)), 7)]
    uses = Counter(one.row for batch in batches for one in batch if is_replayed(one))
    assert len(uses) == len(REPLIES)
    assert len(set(uses.values())) == 1


def test_a_resumed_run_replays_the_same_replies():
    whole = drawn(replay(0.3), 10)
    again = replay(0.3)
    assert [again.pairs([], epoch=0, step=step, micro_batch=m) for step in (6, 7) for m in (0, 1)] == whole[12:16]


def test_a_replayed_reply_has_no_rejected_side_and_no_row():
    one = replayed_pair(2, REPLIES[2])
    assert is_replayed(one)
    assert one.is_sft
    assert (one.prompt_ids, one.chosen_ids) == REPLIES[2]
    assert not is_replayed(pair(0))


def test_the_share_of_each_batch_is_recorded():
    found = []
    drawn(replay(0.5, record=lambda name, value: found.append((name, value))), 3)
    assert found == [("self_replay/share", 0.5)] * 6


def arguments(**options):
    return SAPOConfig("out", use_cpu=True, report_to="none", replay_share=0.1, **options)


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("score_shared", [True, False])
def test_replayed_replies_are_scored_whole_in_both_layouts(layout, score_shared):
    torch.manual_seed(0)
    model = tiny_llama().eval()
    use_shared_attention(model)
    pairs = [pair(0), replayed_pair(0, REPLIES[0])]
    with torch.no_grad():
        scores = score(model, collate_pairs(pairs, pad_token_id=0, layout=layout, score_shared=score_shared))
        logits = model(input_ids=torch.tensor([[3, 4, 5, 6, 7, 1]])).logits[0].log_softmax(-1)
    expected = sum(logits[place + 2, token] for place, token in enumerate((6, 7, 1)))
    assert float(scores.chosen_logps[1]) == pytest.approx(float(expected), rel=1e-4)
    assert int(scores.chosen_lengths[1]) == 3


@pytest.mark.parametrize(
    ("options", "weight"),
    [({}, 1.0), ({"chosen_nll_weight": 10.0}, 10.0), ({"objective": "orpo"}, 1.0), ({"loss_type": "nce"}, 1.0)],
)
def test_the_loss_of_a_replayed_reply_is_its_likelihood_alone(options, weight):
    chosen = torch.tensor([-6.0, -9.0], requires_grad=True)
    rejected = torch.tensor([-8.0, -3.0], requires_grad=True)
    lengths = torch.tensor([4, 3])
    args = arguments(**options)
    found = pair_loss(PairScores(chosen, rejected, lengths, lengths), None, args, [False, True])
    alone = pair_loss(PairScores(chosen[:1], rejected[:1], lengths[:1], lengths[:1]), None, args)
    assert found.losses[1] == pytest.approx(weight * 9 / 3)
    assert found.losses[0] == pytest.approx(alone.losses[0])
    assert float(found.loss.detach()) == pytest.approx(sum(found.losses) / 2)
    assert found.metrics["self_replay/nll_loss"] == 3.0
    for name in ("rewards/margins", "logps/chosen", "logps/rejected"):
        assert found.metrics[name] == pytest.approx(alone.metrics[name])
    found.loss.backward()
    assert rejected.grad[1] == 0
    assert chosen.grad[1] == pytest.approx(-weight / 3 / 2)


def test_a_batch_of_replay_alone_has_a_loss():
    one, two = torch.tensor([-9.0]), torch.tensor([3])
    assert pair_loss(PairScores(one, one, two, two), None, arguments(), [True]).losses == [3.0]


def test_layouts_agree_on_a_mixed_batch():
    rng = random.Random(0)
    model = tiny_llama().eval()
    use_shared_attention(model)
    pairs = [pair(0), replayed_pair(1, REPLIES[1]), pair(1)]
    rng.shuffle(pairs)
    args = arguments(chosen_nll_weight=1.0)
    losses = []
    for layout in ("plain", "shared"):
        with torch.no_grad():
            scores = score(model, collate_pairs(pairs, pad_token_id=0, layout=layout))
        losses.append(pair_loss(scores, None, args, [is_replayed(one) for one in pairs]).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replay_share": 0.95}, "replay_share"),
        ({"replay_dataset_name": "x.jsonl"}, "without replay_share"),
        ({"replay_share": 0.1, "objective": "orpo", "nll_scope": "all"}, "nll_scope=all"),
        ({"replay_share": 0.1, "num_rounds": 2, "ema_decay": 1.0}, "num_rounds"),
    ],
)
def test_what_self_replay_cannot_be_combined_with_is_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        SAPOConfig("out", use_cpu=True, report_to="none", **options)
