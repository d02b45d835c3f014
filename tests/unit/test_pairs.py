"""Laws of `sapo.preference.pairs`: which pairs are made, stored and drawn."""

import dataclasses
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.examples import Example, Turn
from sapo.generation.scripted import ScriptedGenerator
from sapo.preference.pairs import Pair, PairedData, paired
from sapo.preference.replay_buffer import ReplayBuffer
from sapo.preference.segments import Segment
from sapo.preference.self_play import SelfPlay, SelfPlaySettings

EOS = 1
PROMPT = (4, 5)
laws = settings(derandomize=True, deadline=None)


def example(row, length=9, turns=1):
    # Tokens name their place, so that the fakes below know what they are to replace.
    response = (*range(10, 9 + length), EOS)
    return Example(row, tuple(Turn(index, PROMPT * (index + 1), response) for index in range(turns)))


def new_tokens(contexts, budgets, seeds):
    """Depends on the seed alone, as a real opponent does given the context; never the original."""
    return [
        [random.Random(seed + place).randrange(200, 300) for place in range(budget)]
        for budget, seed in zip(budgets, seeds, strict=True)
    ]


def same_tokens(contexts, budgets, seeds):
    written = []
    for context, budget in zip(contexts, budgets, strict=True):
        start = 10 + len(context) - len(PROMPT)
        written.append(list(range(start, start + budget)))
    return written


def self_play(script=new_tokens, *, capacity=100, batch_size=2, seed=0, process=0, record=None, **options):
    generator = ScriptedGenerator(script)
    extra = {} if record is None else {"record": record}
    source = SelfPlay(
        generator,
        ReplayBuffer(capacity),
        SelfPlaySettings(**({"segment_length": 3} | options)),
        eos_ids={EOS},
        seed=seed,
        batch_size=batch_size,
        process=process,
        **extra,
    )
    return source, generator


def stored(source):
    return [entry.item for entry in source.buffer.entries()]


@laws
@given(st.integers(1, 40), st.sampled_from([None, 0.4, 1, 5, 100]), st.sampled_from(["keep", "drop", "mask"]))
def test_a_pair_shares_everything_before_the_segment_and_after_it_if_kept(length, segment_length, suffix):
    source, generator = self_play(segment_length=segment_length, suffix=suffix)
    (pair,) = source.regenerate([example(7, length)], epoch=0)
    written = new_tokens(**vars_of(generator.calls[-1]))[0]
    assert (pair.row, pair.turn, pair.prompt_ids) == (7, 0, PROMPT)
    assert pair.segment.start == pair.rewritten.start
    assert pair.rejected_ids[: pair.segment.start] == pair.chosen_ids[: pair.segment.start]
    assert list(pair.rejected_ids[pair.rewritten.start : pair.rewritten.stop]) == written
    after = () if suffix == "drop" else pair.chosen_ids[pair.segment.stop :]
    assert pair.rejected_ids[pair.rewritten.stop :] == after


def vars_of(call):
    return {"contexts": call.contexts, "budgets": call.max_new_tokens, "seeds": call.seeds}


def test_the_opponent_continues_the_prompt_and_what_comes_before_the_segment_for_as_many_tokens():
    source, generator = self_play()
    (pair,) = source.regenerate([example(0, 30)], epoch=0)
    call = generator.calls[0]
    assert call.contexts == [[*PROMPT, *pair.chosen_ids[: pair.segment.start]]]
    assert call.max_new_tokens == [3]


def test_an_opponent_with_its_own_system_message_generates_from_its_own_prompt_and_the_pair_has_the_rows():
    source, generator = self_play(segment_length=None, max_new_tokens=50, max_length=44)
    plain = example(0, 30)
    turn = dataclasses.replace(plain.turns[0], opponent_prompt_ids=(5, 6, 7, *PROMPT))
    (pair,) = source.regenerate([Example(0, (turn,))], epoch=0)
    call = generator.calls[0]
    assert call.contexts == [[5, 6, 7, *PROMPT]]
    assert call.max_new_tokens == [44 - 3 - len(PROMPT)]
    assert pair.prompt_ids == PROMPT
    source.regenerate([plain], epoch=0)
    assert generator.calls[1].contexts == [[*PROMPT]]
    assert generator.calls[1].seeds == call.seeds


def test_a_replacement_that_ends_the_response_loses_what_follows_its_end_token():
    source, _ = self_play(lambda contexts, budgets, seeds: [[99, EOS]] * len(contexts))
    (pair,) = source.regenerate([example(0, 30)], epoch=0)
    assert pair.rejected_ids == (*pair.chosen_ids[: pair.segment.start], 99, EOS)
    assert pair.rewritten == Segment(pair.segment.start, pair.segment.start + 2)


@pytest.mark.parametrize("written", [[99, EOS, 98], [99, 97, 98, 96, 95]])
def test_what_a_generator_writes_beyond_its_budget_or_an_end_token_is_cut(written):
    class Careless:
        def generate(self, contexts, max_new_tokens, seeds):
            return [written] * len(contexts)

    settings = SelfPlaySettings(segment_length=3)
    source = SelfPlay(Careless(), ReplayBuffer(1), settings, eos_ids={EOS}, seed=0, batch_size=1)
    (pair,) = source.regenerate([example(0, 30)], epoch=0)
    kept = written[:2] if EOS in written else written[:3]
    after = () if EOS in written else pair.chosen_ids[pair.segment.stop :]
    assert pair.rejected_ids == (*pair.chosen_ids[: pair.segment.start], *kept, *after)
    assert len(pair.rewritten) == len(kept)


def test_identical_compares_the_segments_only():
    pair = Pair(0, 0, (4,), (10, 11, 12), (10, 11), Segment(1, 2), Segment(1, 2))
    assert pair.identical
    assert not Pair(0, 0, (4,), (10, 11, 12), (10, 9, 12), Segment(1, 2), Segment(1, 2)).identical


def test_identical_pairs_are_not_stored():
    replies = iter([new_tokens, same_tokens, same_tokens])
    source, _ = self_play(lambda *request: next(replies)(*request))
    for step in range(3):
        assert source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
    assert [pair.row for pair in stored(source)] == [0]


def test_an_empty_buffer_takes_identical_pairs_so_that_a_step_always_has_some():
    source, _ = self_play(same_tokens)
    drawn = source.pairs([example(0), example(1)], epoch=0, step=0, micro_batch=0)
    assert len(drawn) == 2
    assert all(pair.identical for pair in drawn)
    assert [pair.row for pair in stored(source)] == [0, 1]
    # It is no longer empty, though nothing in it carries a signal.
    assert source.pairs([example(2)], epoch=0, step=1, micro_batch=0)
    assert [pair.row for pair in stored(source)] == [0, 1]


def test_a_pair_that_differs_keeps_the_identical_ones_out_of_an_empty_buffer():
    def half(contexts, budgets, seeds):
        same = same_tokens(contexts, budgets, seeds)
        return [same[0], *new_tokens(contexts, budgets, seeds)[1:]]

    source, _ = self_play(half)
    source.pairs([example(0), example(1)], epoch=0, step=0, micro_batch=0)
    assert [pair.row for pair in stored(source)] == [1]


def test_identical_pairs_are_stored_if_nobody_skips_them():
    source, _ = self_play(same_tokens, skip_identical=False)
    for step in range(3):
        source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
    assert [pair.row for pair in stored(source)] == [0, 1, 2]


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_opponent_writes_at_every_interval_th_step_and_in_all_its_micro_batches(interval):
    source, generator = self_play(generation_interval=interval)
    wrote = []
    for step in range(7):
        for micro_batch in range(2):
            before = len(generator.calls)
            assert len(source.pairs([example(step)], epoch=0, step=step, micro_batch=micro_batch)) > 0
            if len(generator.calls) > before:
                wrote.append((step, micro_batch))
    assert wrote == [(step, micro_batch) for step in range(0, 7, interval) for micro_batch in range(2)]


def test_an_empty_buffer_is_filled_out_of_turn():
    source, generator = self_play(generation_interval=4)
    for step in range(1, 6):
        assert source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
    assert len(generator.calls) == 2
    assert [entry.step for entry in source.buffer.entries()] == [1, 4]


@pytest.mark.parametrize("count", [1, 3])
def test_each_example_is_rewritten_num_generations_times_with_draws_of_their_own(count):
    source, generator = self_play(num_generations=count)
    pairs = source.regenerate([example(row, 60) for row in range(20)], epoch=0)
    assert [pair.row for pair in pairs] == [row for row in range(20) for _ in range(count)]
    assert len(generator.calls) == 1
    assert len(set(generator.calls[0].seeds)) == len(pairs)
    if count > 1:
        assert any(len({p.segment for p in pairs[i : i + count]}) > 1 for i in range(0, len(pairs), count))


def test_the_first_generation_is_the_same_however_many_follow():
    one, three = (self_play(num_generations=n)[0].regenerate([example(5, 60)], epoch=2) for n in (1, 3))
    assert three[0] == one[0]


@laws
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), st.integers(0, 3), st.randoms())
def test_an_example_gets_the_same_segment_and_seed_in_any_batch(rows, epoch, rng):
    seen = defaultdict(set)
    orders = [rows, rng.sample(rows, len(rows))]
    for batches in [*([order] for order in orders), [[row] for row in rows]]:
        source, generator = self_play()
        for batch in batches:
            pairs = source.regenerate([example(row, 40) for row in batch], epoch=epoch)
            for pair, seed in zip(pairs, generator.calls[-1].seeds, strict=True):
                seen[pair.row].add((pair.segment, seed, pair))
    assert all(len(kinds) == 1 for kinds in seen.values())


def test_processes_and_earlier_steps_do_not_change_what_an_example_gets():
    one, _ = self_play(process=0)
    other, _ = self_play(process=3)
    for step in range(5):
        other.pairs([example(step)], epoch=0, step=step, micro_batch=0)
    assert one.regenerate([example(9, 40)], epoch=1) == other.regenerate([example(9, 40)], epoch=1)


def test_another_epoch_row_or_run_seed_draws_anew():
    draws = [
        self_play(seed=seed)[0].regenerate([example(row, 400)], epoch=epoch)[0].segment.start
        for seed, row, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("age", [0, 1, 3])
def test_nothing_older_than_replay_max_age_is_held_or_drawn(age):
    source, _ = self_play(replay_max_age=age)
    for step in range(8):
        drawn = source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
        expected = list(range(max(0, step - age), step + 1))
        assert [entry.step for entry in source.buffer.entries()] == expected
        assert {pair.row for pair in drawn} <= set(expected)


def test_a_buffer_emptied_by_age_is_filled_out_of_turn():
    source, generator = self_play(generation_interval=5, replay_max_age=1)
    for step in range(5):
        assert source.pairs([example(step)], epoch=0, step=step, micro_batch=0)
    assert [entry.step for entry in source.buffer.entries()] == [4]
    assert len(generator.calls) == 3


def test_a_draw_depends_on_step_micro_batch_and_process_and_repeats_with_them():
    def drawn(step, micro_batch, process):
        source, _ = self_play(process=process, batch_size=8)
        source.pairs([example(row) for row in range(40)], epoch=0, step=0, micro_batch=0)
        source.buffer.restore([type(e)(e.item, e.step, 0) for e in source.buffer.entries()])
        source._settings = SelfPlaySettings(generation_interval=1000)
        return tuple(pair.row for pair in source.pairs([], epoch=0, step=step, micro_batch=micro_batch))

    places = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    assert len({drawn(*place) for place in places}) == 4
    assert [drawn(*place) for place in places] == [drawn(*place) for place in places]


def test_one_turn_is_drawn_per_epoch_and_every_turn_in_time():
    source, _ = self_play()
    turns = [source.regenerate([example(3, 20, turns=3)], epoch=epoch)[0].turn for epoch in range(40)]
    assert set(turns) == {0, 1, 2}
    assert turns == [source.regenerate([example(3, 20, turns=3)], epoch=epoch)[0].turn for epoch in range(40)]


def test_metrics_tell_what_was_written_and_what_is_held():
    seen = defaultdict(list)
    replies = iter([[[99, EOS], [98]], []])
    source, _ = self_play(
        lambda *request: next(replies), record=lambda name, value: seen[name].append(value), segment_length=4
    )
    source.pairs([example(0, 20), example(1, 20)], epoch=0, step=0, micro_batch=0)
    assert seen["self_play/identical_fraction"] == [0, 0]
    assert seen["self_play/eos_fraction"] == [1, 0]
    assert seen["self_play/segment_length"] == [4, 4]
    assert seen["self_play/rejected_length"] == [len(pair.rejected_ids) for pair in stored(source)]
    assert seen["replay/size"] == [2]
    assert seen["replay/mean_age"] == [0]
    assert seen["replay/mean_draws"] == [1]


tokens = st.lists(st.integers(0, 2), max_size=8)


@laws
@given(tokens, tokens, st.integers(0, 99))
def test_paired_data_gives_its_own_responses_and_the_spans_after_their_common_prefix(chosen, rejected, row):
    data = Example(row, (Turn(2, PROMPT, tuple(chosen), tuple(rejected)),))
    (pair,) = PairedData().pairs([data], epoch=0, step=0, micro_batch=0)
    assert (pair.row, pair.turn, pair.prompt_ids) == (row, 2, PROMPT)
    assert (pair.chosen_ids, pair.rejected_ids) == (tuple(chosen), tuple(rejected))
    shared = pair.segment.start
    assert chosen[:shared] == rejected[:shared]
    assert chosen == rejected or chosen[shared : shared + 1] != rejected[shared : shared + 1]
    assert pair.segment == Segment(shared, len(chosen))
    assert pair.rewritten == Segment(shared, len(rejected))
    assert pair.identical == (chosen == rejected)


def test_a_row_without_a_rejected_response_is_no_pair():
    with pytest.raises(ValueError, match="row 6 has no rejected"):
        paired(example(6))
