"""Laws of the built-in demo: its rows, its tokenizer, and the checkpoint that is shipped."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo.demo.build import MODEL_FOLDER
from sapo.demo.score import ScoreReport, answers, score, wilson_interval
from sapo.demo.tasks import (
    ALPHABET,
    MAX_PROMPT_TOKENS,
    MAX_REPLY_TOKENS,
    TRAIN_ROWS,
    answer_of,
    build_tokenizer,
    correct,
    corrupt,
    heldout_rows,
    is_heldout,
    make_rows,
    prompt_of,
)

ROWS = make_rows(900, seed=11)
TOKENIZER = build_tokenizer()

texts = st.text(alphabet=ALPHABET, max_size=60)


def rows_of(task, rows=ROWS):
    return [row for row in rows if row["task"] == task]


def shipped():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), AutoTokenizer.from_pretrained(MODEL_FOLDER)


def render(messages, **options):
    return TOKENIZER.apply_chat_template(messages, return_dict=False, **options)


# Questions and answers.


def test_sorted_digits_rise_and_are_the_same_digits():
    for row in rows_of("sort"):
        digits = re.fullmatch(r"sort (\d{5,9})", prompt_of(row))[1]
        answer = answer_of(row)
        assert Counter(answer) == Counter(digits)
        assert all(left <= right for left, right in pairwise(answer))


def test_counted_letters_rebuild_the_question_up_to_order():
    for row in rows_of("count"):
        word = re.fullmatch(r"count ([abc]{5,9})", prompt_of(row))[1]
        counts = re.fullmatch(r"a(\d),b(\d),c(\d)", answer_of(row)).groups()
        rebuilt = "".join(letter * int(times) for letter, times in zip("abc", counts, strict=True))
        assert Counter(rebuilt) == Counter(word)


def test_sums_are_sums_and_each_column_is_right():
    lengths = set()
    for row in rows_of("add"):
        left, right = re.fullmatch(r"add (\d{2,4})\+(\d{2,4})", prompt_of(row)).groups()
        columns, result = answer_of(row).split(">")
        assert int(result) == int(left) + int(right)
        lengths.add(len(left))
        for place, column in enumerate(columns.split(";")):
            upper, lower, carry, total = map(int, re.fullmatch(r"(\d)\+(\d)\+([01])=(\d+)", column).groups())
            # The carry into a column, from the numbers themselves rather than from the column before.
            assert carry == (int(left) % 10**place + int(right) % 10**place) // 10**place
            assert (upper, lower) == (int(left) // 10**place % 10, int(right) // 10**place % 10)
            assert total == upper + lower + carry
    assert lengths == {2, 3, 4}


def test_only_the_exact_answer_is_correct():
    row = rows_of("add")[0]
    assert correct(row, answer_of(row))
    for wrong in ("", answer_of(row)[:-1], answer_of(row) + " ", answer_of(row).split(">")[1]):
        assert not correct(row, wrong)


def test_correct_asks_the_question_not_the_recorded_answer():
    row = rows_of("sort")[0]
    spoiled = {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "nonsense"}]}
    assert correct(spoiled, answer_of(row))
    assert not correct(spoiled, "nonsense")


# Which rows there are.


def test_rows_are_distinct_and_the_tasks_take_turns():
    assert len({prompt_of(row) for row in ROWS}) == len(ROWS)
    assert [row["task"] for row in ROWS[:6]] == ["sort", "count", "add"] * 2


def test_rows_depend_on_the_seed_alone_and_shorter_lists_are_prefixes():
    assert make_rows(300, seed=11) == ROWS[:300]
    assert make_rows(300, seed=12) != ROWS[:300]


def test_excluded_prompts_do_not_occur():
    excluded = {prompt_of(row) for row in ROWS}
    assert not excluded & {prompt_of(row) for row in make_rows(900, seed=11, exclude=excluded)}


def test_train_and_heldout_rows_share_no_prompt():
    train = {prompt_of(row) for row in TRAIN_ROWS} | {prompt_of(row) for row in make_rows(23_000, seed=1)}
    heldout = {prompt_of(row) for row in heldout_rows(2000)}
    assert len(TRAIN_ROWS) == 600
    assert len(heldout) == 2000
    assert not train & heldout
    assert all(map(is_heldout, heldout))
    assert not any(map(is_heldout, train))


def test_training_rows_are_clean():
    assert all(correct(row, answer_of(row)) for row in TRAIN_ROWS)


# Corruption.


def looks_off_mode(row):
    question, answer = prompt_of(row).split(" ")[1], answer_of(row)
    if row["task"] == "sort":
        return answer == "".join(sorted(question))[::-1]
    if row["task"] == "count":
        return re.fullmatch(r"\da,\db,\dc", answer) is not None
    return all(column.split("=")[0].endswith("+0") for column in answer.split(">")[0].split(";"))


def test_mixed_quality_has_the_promised_shares():
    rng = random.Random(0)
    clean = make_rows(9000, seed=21)
    mixed = [corrupt(row, rng) for row in clean]
    kinds = Counter()
    for before, after in zip(clean, mixed, strict=True):
        assert prompt_of(after) == prompt_of(before)
        # A sum without carries has no off-mode of its own, so the shares are counted on the two other tasks.
        if before["task"] == "add":
            continue
        if after == before:
            kinds["right"] += 1
        elif looks_off_mode(after):
            kinds["off-mode"] += 1
        else:
            kinds["slip"] += 1
    total = sum(kinds.values())
    assert kinds["right"] / total == pytest.approx(0.35, abs=0.02)
    assert kinds["off-mode"] / total == pytest.approx(0.45, abs=0.02)
    assert kinds["slip"] / total == pytest.approx(0.20, abs=0.02)


def drawing(low, high):
    """A generator whose first number lies between the bounds: that number decides what becomes of a row."""
    return random.Random(next(seed for seed in range(1000) if low <= random.Random(seed).random() < high))


def test_the_off_mode_of_sums_forgets_carries_and_nothing_else():
    wrong = 0
    for row in rows_of("add"):
        left, right = prompt_of(row).split(" ")[1].split("+")
        after = corrupt(row, drawing(0.35, 0.80))
        columns, result = answer_of(after).split(">")
        sums = [int(upper) + int(lower) for upper, lower in zip(left, right, strict=True)]
        assert [int(column.split("=")[1]) for column in columns.split(";")] == sums[::-1]
        assert result == str(sums[0]) + "".join(str(total % 10) for total in sums[1:])
        carry_was_due = any(total > 9 for total in sums[1:])
        assert correct(row, answer_of(after)) != carry_was_due
        wrong += carry_was_due
    assert wrong > 150


def test_a_slip_changes_one_digit_and_nothing_else():
    for row in ROWS:
        before, after = answer_of(row), answer_of(corrupt(row, drawing(0.80, 1.0)))
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert len(changed) == 1
        assert all(character.isdigit() for character in changed[0])


def test_corruption_leaves_its_row_alone():
    row = rows_of("sort")[0]
    copy = {"messages": [dict(message) for message in row["messages"]], "task": row["task"]}
    for seed in range(20):
        corrupt(row, random.Random(seed))
    assert row == copy


# Tokenizer and template.


@given(texts)
def test_text_survives_the_tokenizer(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


@given(texts, texts)
def test_the_generation_prompt_is_a_prefix_of_the_conversation(question, reply):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    prompt = render(messages[:1], add_generation_prompt=True)
    whole = render(messages)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [*TOKENIZER.encode(reply), TOKENIZER.eos_token_id]


def test_the_generation_marks_cover_the_reply_and_its_end():
    row = TRAIN_ROWS[0]
    marked = TOKENIZER.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    reply = [token for token, inside in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if inside]
    assert TOKENIZER.decode(reply) == f"{answer_of(row)}<eos>"


def test_a_foreign_character_becomes_the_unknown_token_and_a_foreign_role_is_refused():
    assert TOKENIZER.encode("aé") == [TOKENIZER.encode("a")[0], TOKENIZER.unk_token_id]
    with pytest.raises(Exception, match="user and assistant only"):
        render([{"role": "system", "content": "be good"}])


def test_every_row_fits_the_lengths_that_the_demo_trains_with():
    for row in [*TRAIN_ROWS, *heldout_rows(1000)]:
        prompt = render(row["messages"][:1], add_generation_prompt=True)
        assert len(prompt) <= MAX_PROMPT_TOKENS
        assert len(render(row["messages"])) - len(prompt) <= MAX_REPLY_TOKENS


# Score.


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes, total, low, high):
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=6e-5)


def test_wilson_bounds_solve_the_score_equation():
    share, total, z = 0.79, 1000, 1.959964
    for bound in wilson_interval(790, total):
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / total, rel=1e-9)


def test_only_a_reply_that_ends_once_and_at_its_end_is_right():
    row = rows_of("sort")[0]
    reply, end = TOKENIZER.encode(answer_of(row)), TOKENIZER.eos_token_id
    assert answers(row, [*reply, end], TOKENIZER)
    for wrong in ([], [end], reply, [*reply, end, end], [TOKENIZER.pad_token_id, *reply, end]):
        assert not answers(row, wrong, TOKENIZER)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no trials"):
        wilson_interval(0, 0)


def test_report_gives_share_and_interval():
    report = ScoreReport(right=3, total=4, by_task={"sort": 0.75})
    assert report.accuracy == 0.75
    assert report.interval == wilson_interval(3, 4)


# The checkpoint in the package.


def test_shipped_tokenizer_is_the_one_that_the_script_makes():
    _, tokenizer = shipped()
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.special_tokens_map == TOKENIZER.special_tokens_map
    for row in TRAIN_ROWS[:30]:
        assert tokenizer.apply_chat_template(row["messages"], return_dict=False) == render(row["messages"])


def test_shipped_model_is_small_float32_and_fits_its_tokenizer():
    model, tokenizer = shipped()
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) < 300_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= MAX_PROMPT_TOKENS + MAX_REPLY_TOKENS
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_shipped_model_answers_as_recorded_and_leaves_room_to_improve():
    model, tokenizer = shipped()
    report = score(model, tokenizer, heldout_rows(400))
    assert report.total == 400
    assert set(report.by_task) == {"sort", "count", "add"}
    assert 0.75 < report.accuracy < 0.88


def test_score_does_not_depend_on_the_batch():
    model, tokenizer = shipped()
    rows = heldout_rows(60)
    assert score(model, tokenizer, rows, batch_size=7) == score(model, tokenizer, rows, batch_size=60)
