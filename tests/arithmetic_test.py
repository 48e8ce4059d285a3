"""Tests of the embedded task: its tokenizer, its parts, its imperfections and its verifier."""

import jax
import numpy as np
import pytest

from klrl.errors import UserError
from klrl.tasks import arithmetic
from klrl.tasks.verifier import accuracy, answer_tokens

TOKENIZER = arithmetic.make_tokenizer()
PAD, EOS = TOKENIZER.pad_id, TOKENIZER.eos_id


def right_answer(prompt):
  a, b = prompt.removesuffix("=").split("+")
  return f"{int(a) + int(b):02d}"


def test_tokenizer_gives_one_token_per_character_and_back():
  text = "0123456789+="
  encoded = TOKENIZER.tokenizer.encode(text)
  assert encoded.tokens == ["<s>", *text]
  assert encoded.ids[0] == TOKENIZER.bos_id
  assert TOKENIZER.tokenizer.decode(encoded.ids) == text
  assert TOKENIZER.tokenizer.decode([*encoded.ids, EOS, PAD]) == text
  assert [TOKENIZER.tokenizer.id_to_token(i) for i in (PAD, TOKENIZER.bos_id, EOS)] == [
    "<pad>",
    "<s>",
    "</s>",
  ]


def test_every_problem_is_in_one_part_and_a_tenth_is_held_out():
  training, held_out = (
    {tuple(pair) for pair in arithmetic.problems(held_out=part).tolist()} for part in (False, True)
  )
  assert not training & held_out
  assert training | held_out == {(a, b) for a in range(50) for b in range(50)}
  assert len(held_out) == 250


def test_prompts_and_answers_have_two_digits_each():
  assert arithmetic.prompt(3, 7) == "03+07="
  assert arithmetic.answer(3, 4) == "07"
  assert arithmetic.answer(49, 49) == "98"
  for held_out in (False, True):
    for record in arithmetic.prompt_records(held_out=held_out):
      assert len(record["prompt"]) == 6
      assert record["answer"] == right_answer(record["prompt"])


@pytest.mark.parametrize("quality", [0.0, 0.5, 0.9, 1.0])
def test_demonstrations_are_right_as_often_as_asked(quality):
  num = 4000
  texts = arithmetic.demonstrations(0, num, quality=quality)
  right = np.mean([completion == right_answer(prompt) for prompt, completion in texts])
  assert len(texts) == num
  # Five standard errors; slips are never right, so 0 and 1 are exact.
  assert abs(right - quality) <= 5 * np.sqrt(quality * (1 - quality) / num)


def test_slips_have_two_digits_and_are_near_the_answer():
  texts = arithmetic.demonstrations(1, 4000, quality=0.0)
  assert all(len(completion) == 2 and completion.isdigit() for _, completion in texts)
  distances = [abs(int(completion) - int(right_answer(prompt))) for prompt, completion in texts]
  # At least one in three is off by one, and as many by a carry, unless they are out of range.
  for distance in (1, 10):
    assert distances.count(distance) > 0.3 * len(texts), distance
  assert min(distances) == 1


@pytest.mark.parametrize("label_noise", [0.0, 0.05, 1.0])
def test_preferences_set_right_against_wrong_with_some_labels_swapped(label_noise):
  num = 4000
  triples = arithmetic.preferences(0, num, label_noise=label_noise)
  assert len(triples) == num
  right = [right_answer(prompt) for prompt, _, _ in triples]
  chosen_right = np.array([c == r for (_, c, _), r in zip(triples, right, strict=True)])
  rejected_right = np.array([x == r for (_, _, x), r in zip(triples, right, strict=True)])
  assert np.all(chosen_right != rejected_right)
  assert abs(rejected_right.mean() - label_noise) <= 5 * np.sqrt(
    label_noise * (1 - label_noise) / num
  )
  assert all(len(c) == len(x) == 2 and (c + x).isdigit() for _, c, x in triples)


def test_no_held_out_problem_is_ever_shown():
  held_out = {record["prompt"] for record in arithmetic.prompt_records(held_out=True)}
  shown = {prompt for prompt, _ in arithmetic.demonstrations(0, 20_000, quality=0.5)}
  shown |= {prompt for prompt, _, _ in arithmetic.preferences(0, 20_000, label_noise=0.0)}
  assert not shown & held_out
  assert len(shown) == 2250  # All the others are.


def test_draws_depend_on_the_seed_alone():
  first = arithmetic.demonstrations(3, 50, quality=0.5)
  assert first == arithmetic.demonstrations(3, 50, quality=0.5)
  assert first != arithmetic.demonstrations(4, 50, quality=0.5)
  first = arithmetic.preferences(3, 50, label_noise=0.5)
  assert first == arithmetic.preferences(3, 50, label_noise=0.5)
  assert first != arithmetic.preferences(4, 50, label_noise=0.5)


def test_answer_tokens_end_with_the_end_of_sequence():
  tokens = answer_tokens([{"answer": "07"}, {"answer": "98"}], TOKENIZER, max_completion_len=4)
  # Digit d has id d + 3.
  np.testing.assert_array_equal(tokens, [[3, 10, EOS, PAD], [12, 11, EOS, PAD]])


@pytest.mark.parametrize(
  ("completion", "expected"),
  [
    ([4, 5, EOS], 1),
    ([4, 6, EOS], 0),
    ([5, 4, EOS], 0),
    ([4, 5, 5, EOS], 0),
    ([4, 5, 5, 5], 0),
    ([4, EOS], 0),
    ([EOS], 0),
    ([3, 4, 5, EOS], 0),
    # Cut off before the end: the length limit, not the model, ended it.
    ([4, 5], 0),
    ([4, 5, EOS, EOS], 0),
  ],
)
def test_only_the_exact_answer_counts(completion, expected):
  answers = answer_tokens([{"answer": "12"}], TOKENIZER, max_completion_len=4)
  # What stands behind the end is not part of the completion.
  row = np.full((1, 4), 9, np.int32)
  row[0, : len(completion)] = completion
  mask = np.arange(4)[None] < len(completion)
  returned = jax.jit(accuracy, static_argnames="pad_id")(row, mask, answers, pad_id=PAD)
  np.testing.assert_array_equal(returned, np.float32([expected]))


def test_a_completion_too_short_for_an_answer_is_refused():
  with pytest.raises(UserError, match="the embedded task needs 3"):
    answer_tokens([{"answer": "12"}], TOKENIZER, max_completion_len=2)


def test_the_verifier_reads_what_accuracy_reads_from_the_text():
  answer_of, is_right = arithmetic.VERIFIER
  assert is_right("07", {"answer": "07"})
  assert not any(is_right(text, {"answer": "07"}) for text in ("7", "70", "007", "07=", ""))
  assert answer_of("07") == "07"
  assert answer_of("0=") is None and answer_of("") is None
