"""Tests of reading, encoding, padding, splitting and ordering data."""

import dataclasses
import gzip
import json
import pathlib
import tracemalloc

import numpy as np
import pytest
import tokenizers

from klrl.errors import UserError
from klrl.models import load_tokenizer
from klrl.sampling import Rollout
from klrl.tasks import arithmetic, data, files, packing

STORIES = pathlib.Path(__file__).parents[2] / "shared" / "models" / "stories260K"
TOKENIZER = arithmetic.make_tokenizer()


@pytest.fixture(scope="module")
def stories():
  if not STORIES.is_dir():
    pytest.skip("the stories260K model is not there")
  return load_tokenizer(STORIES)


def encoded(tokens, num_prompt_tokens):
  return data.Encoded(tokens, [i >= num_prompt_tokens for i in range(len(tokens))])


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_every_column_is_kept_and_blank_lines_are_skipped(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "é", "n": 1}\r\n\n  \n{"prompt": "", "x": [2]}')
  assert data.read_records(path, ("prompt",)) == [
    {"prompt": "é", "n": 1},
    {"prompt": "", "x": [2]},
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", r"a\.jsonl is empty; expected JSON lines with prompt, completion"),
    ("\n \n", "is empty"),
    ('{"prompt": "p", "completion": "c"}\n\n{"prompt": ', r"a\.jsonl line 3 is not JSON"),
    (
      '{"prompt": "p", "answer": 1}',
      "line 1 has no text column 'completion'; it has prompt, answer",
    ),
    ('{"prompt": "p", "completion": 3}', "line 1 has no text column 'completion'"),
    ('\n["prompt", "completion"]', r"line 2 is \['prompt', 'completion'\], and no object"),
    ('[{"prompt": "p"}]', r"a\.jsonl is a JSON array\. Write its objects as lines"),
    (b"PAR1\x15\x04", r"a\.jsonl is a Parquet file; its name has to end in \.parquet"),
    ('{"prompt": "p"}'.encode("utf-16"), r"a\.jsonl is UTF-16\. Save it as UTF-8"),
    ('{"prompt": "p", "completion": "\\ud83d"}', "line 1 holds half a character"),
    ('\n{"prompt": ' + "[" * 200_000, "line 2 is nested deeper than 100"),
    ('{"prompt": "' + "a" * 2**20 + '"}', "line 1 has more than 1048576 bytes"),
    ('{"prompt": "p", "completion": "c"}\n{"prompt": "\xe9"}'.encode("latin-1"), "line 2 is not"),
  ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, content, message):
  with pytest.raises(UserError, match=message):
    data.read_records(write(tmp_path / "a.jsonl", content), ("prompt", "completion"))


def test_gigabytes_that_a_small_file_unpacks_to_are_not_kept(tmp_path):
  zeros = b"\0" * 2**24
  path = tmp_path / "zeros.jsonl.gz"
  path.write_bytes(gzip.compress(zeros, 1))
  tracemalloc.start()
  with pytest.raises(UserError, match="line 1 has more than 1048576 bytes"):
    data.read_records(path, ("prompt",))
  assert tracemalloc.get_traced_memory()[1] < len(zeros) / 2
  tracemalloc.stop()


def test_more_plain_text_than_is_read_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "MAX_TEXT", 10)
  assert data.read_documents(write(tmp_path / "a.txt", "ten\n\nbytes")) == ["ten", "bytes"]
  with pytest.raises(UserError, match=r"b\.txt holds more than 10 bytes"):
    data.read_documents(write(tmp_path / "b.txt", "eleven\n\nbyte"))


def test_a_name_that_no_file_can_have_is_named(tmp_path):
  with pytest.raises(UserError, match=r"cannot be read: .*name too long"):
    data.read_records(tmp_path / ("x" * 5000), ("prompt",))


def test_a_missing_file_is_named_with_what_it_should_hold(tmp_path):
  with pytest.raises(UserError, match=r"no file .*absent\.jsonl; expected JSON lines with prompt"):
    data.read_records(tmp_path / "absent.jsonl", ("prompt",))


def test_prompts_are_a_template_filled_from_the_text_columns(tmp_path):
  path = write(
    tmp_path / "a.jsonl",
    '{"question": "1 {x} 2?", "answer": "3", "n": 1}\n\n{"question": "é", "prompt": "gone"}',
  )
  template = "{{Question}}: {question}\\nAnswer: "
  assert data.read_prompts(path, template) == [
    {"question": "1 {x} 2?", "answer": "3", "n": 1, "prompt": "{Question}: 1 {x} 2?\nAnswer: "},
    # A column that some lines lack is None there.
    {"question": "é", "answer": None, "n": None, "prompt": "{Question}: é\nAnswer: "},
  ]


def test_without_a_template_the_prompt_is_its_column(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "a\\\\nabla {b}", "n": 7}')
  assert data.read_prompts(path) == [{"prompt": "a\\nabla {b}", "n": 7}]
  with pytest.raises(UserError, match="line 1 has no text column 'question'"):
    data.read_prompts(path, "{question}")


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("no column", r"--prompt_template='no column' names no column\. Write e\.g\."),
    ("{q.__class__}", "only names may be in braces"),
    ("{q[0]}", "only names may be in braces"),
    ("{q!r}", "only names may be in braces"),
    ("{q:>9999999}", "only names may be in braces"),
    ("{q:{q}}", "only names may be in braces"),
    ("{}", "only names may be in braces"),
    ("{0}", "only names may be in braces"),
    ("{q", "expected '}' before end of string"),
    ("q}", "Single '}' encountered"),
    ("{n}", r"a\.jsonl line 3 has no text column 'n'"),
    ("{list}", r"a\.jsonl line 1 has no text column 'list'"),
    ("{q} {other}", r"a\.jsonl line 3 has no text column 'other'"),
  ],
)
def test_a_template_that_cannot_be_filled_is_one_clear_error(tmp_path, template, message):
  content = '{"q": "a", "n": 1, "other": "b", "list": [1]}\n\n{"q": "c"}'
  path = write(tmp_path / "a.jsonl", content)
  with pytest.raises(UserError, match=message):
    data.read_prompts(path, template)


def test_prompts_are_padded_on_the_left_and_examples_on_the_right():
  prompts = data.encode_prompts(
    [{"prompt": "1", "n": 7}, {"prompt": "+="}], TOKENIZER, max_prompt_len=3
  )
  # Ids: <pad> 0, <s> 1, </s> 2, digits from 3, + 13, = 14.
  np.testing.assert_array_equal(prompts.tokens, [[0, 1, 4], [1, 13, 14]])
  np.testing.assert_array_equal(prompts.mask, [[False, True, True], [True, True, True]])
  assert prompts.records[0] == {"prompt": "1", "n": 7}
  examples = data.encode_examples([("1", "2"), ("+=", "")], TOKENIZER, max_len=4)
  np.testing.assert_array_equal(examples.tokens, [[1, 4, 5, 2], [1, 13, 14, 2]])
  examples = data.encode_examples([("1", "23"), ("+", "")], TOKENIZER, max_len=5)
  np.testing.assert_array_equal(examples.tokens, [[1, 4, 5, 6, 2], [1, 13, 2, 0, 0]])
  np.testing.assert_array_equal(examples.mask, np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) > 0)
  # Exactly the completion with its end-of-sequence.
  np.testing.assert_array_equal(
    examples.completion_mask, np.array([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]) > 0
  )
  assert examples.tokens.dtype == prompts.tokens.dtype == np.int32
  assert examples.completion_mask.dtype == prompts.mask.dtype == bool


def test_a_column_gives_each_row_the_beginning_of_its_answer(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "1+2=", "prefill": "03"}\n{"prompt": "4"}')
  records = data.read_prompts(path)
  found = data.encode_prompts(records, TOKENIZER, max_prompt_len=8)
  whole = data.encode_prompts([{"prompt": "1+2=03"}, {"prompt": "4"}], TOKENIZER, max_prompt_len=8)
  np.testing.assert_array_equal(found.tokens, whole.tokens)
  np.testing.assert_array_equal(found.mask, whole.mask)
  assert data.with_prefill(["4", "5"], [*records, records[0]]) == ["034", "5"]
  length = int(whole.mask[0].sum())
  assert data.short_prompts(records, TOKENIZER, max_prompt_len=length - 1) == records[1:]
  path = write(tmp_path / "b.jsonl", '{"prompt": "1", "prefill": 3}')
  with pytest.raises(UserError, match="line 1: prefill, with which the answer begins, is no text"):
    data.read_prompts(path)


def test_prompts_and_examples_that_are_too_long_are_numbered():
  records = [{"prompt": "1"}, {"prompt": "12+34="}]
  with pytest.raises(
    UserError, match=r"Prompt 2 has 7 tokens; at most 6 fit.*--max_len.*begins '12\+34='"
  ):
    data.encode_prompts(records, TOKENIZER, max_prompt_len=6)
  data.encode_prompts(records, TOKENIZER, max_prompt_len=7)
  texts = [("1", "2"), ("1", "234")]
  with pytest.raises(
    UserError, match=r"Example 2 has 6 tokens, and the model's context holds 5.*--max_len=5"
  ):
    data.encode_examples(texts, TOKENIZER, max_len=5)
  data.encode_examples(texts, TOKENIZER, max_len=6)


def test_an_empty_prompt_needs_a_beginning_of_sequence():
  records = [{"prompt": "1"}, {"prompt": ""}]
  assert data.encode_prompts(records, TOKENIZER, max_prompt_len=2).tokens[1].tolist() == [0, 1]
  bare = arithmetic.make_tokenizer()
  bare.tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
  with pytest.raises(UserError, match="Prompt 2 is empty and the tokenizer adds no beginning"):
    data.encode_prompts(records, bare, max_prompt_len=2)


@pytest.mark.parametrize(
  ("prompt", "completion", "first_token"),
  [
    ("Once upon a time", " there was a cat.", "▁there"),
    ("Hi", "!", "!"),
    ("", "Once", "▁Once"),
    ("Once", " é", "▁"),
    # One token crosses the border: it is the model that writes it.
    ("Once up", "on a time", "▁upon"),
  ],
)
def test_a_real_tokenizer_is_split_where_the_completion_begins(
  stories, prompt, completion, first_token
):
  texts = [(prompt, completion), ("a longer prompt than the others", " and a longer completion")]
  examples = data.encode_examples(texts, stories, max_len=64)
  row, mask, completion_mask = (array[0] for array in examples[:3])
  whole = stories.tokenizer.encode(prompt + completion).ids
  assert row[mask].tolist() == [*whole, stories.eos_id]
  ids = row[completion_mask].tolist()
  assert stories.tokenizer.id_to_token(ids[0]) == first_token
  assert ids[-1] == stories.eos_id
  # One stretch up to the end of the text.
  assert whole[len(whole) + 1 - len(ids) :] == ids[:-1]


def test_completions_keep_their_leading_space(stories):
  prompts, completions = ["Once upon a time", "Hi"], [" there was", "!"]
  rows = [stories.tokenizer.encode(text).ids for text in prompts]
  tokens, prompt_mask = data.pad(rows, stories.pad_id, left=True)
  examples = data.encode_examples(list(zip(prompts, completions, strict=True)), stories, max_len=64)
  rows = [row[mask] for row, mask in zip(examples.tokens, examples.completion_mask, strict=True)]
  assert stories.tokenizer.decode(rows[0]) == "there was"  # What a careless decode would say.
  completion_tokens, mask = data.pad(rows, stories.pad_id, left=False)
  rollout = Rollout(
    np.concatenate([tokens, completion_tokens], axis=1), prompt_mask, mask, None, None, None
  )
  assert data.completion_texts(stories, rollout) == completions


def test_what_ends_a_completion_is_no_part_of_its_text():
  tokenizer = dataclasses.replace(TOKENIZER, other_eos_ids=(14,))  # It is written as "=".
  tokens = np.array([[1, 4, 5, 14], [1, 4, 14, 5], [1, 14, 5, 2]])
  mask = np.ones((3, 2), bool)
  rollout = Rollout(tokens, mask, mask, None, None, None)
  assert data.completion_texts(tokenizer, rollout) == ["2", "=2", "2"]


def test_padding_that_is_an_eos_hides_no_eos():
  tokenizer = dataclasses.replace(TOKENIZER, pad_id=2)
  examples = data.encode_examples([("1", "2"), ("1", "234")], tokenizer, max_len=9)
  assert examples.tokens[0].tolist() == [1, 4, 5, 2, 2, 2]
  assert examples.mask[0].tolist() == [True] * 4 + [False] * 2
  assert examples.completion_mask[0].tolist() == [False, False, True, True, False, False]
  packed = packing.pack(data.encode_texts([("1", "2")], tokenizer), 2, row_len=6)
  assert packed.completion_mask.tolist() == [[False, False, True, True, False, False]]
  prompts = data.encode_prompts([{"prompt": "1"}, {"prompt": "12"}], tokenizer, max_prompt_len=9)
  assert prompts.tokens[0].tolist() == [2, 1, 4] and prompts.mask[0].tolist() == [False, True, True]
  # A rollout's mask says where its EOS is, whatever fills the rest.
  completion_mask = np.array([[True, True, False]])
  rollout = Rollout(np.array([[1, 5, 2, 2]]), np.ones((1, 1), bool), completion_mask, *[None] * 3)
  assert data.token_ids(rollout) == ([[1]], [[5, 2]])
  # A text has what was given before the last choice, and nothing behind it.
  chosen = np.array([[False, True, False]])
  assert data.token_ids(rollout._replace(completion_mask=chosen)) == ([[1]], [[5, 2]])
  assert data.completion_texts(tokenizer, rollout) == ["2"]


def test_continuation_of_half_a_character_is_still_text(stories):
  *prompt, last = stories.tokenizer.encode("cat 中").ids
  assert stories.tokenizer.id_to_token(last).startswith("<0x")  # Bytes: not in the vocabulary.
  assert isinstance(data.decode_continuation(stories, prompt, [last]), str)
  assert data.decode_continuation(TOKENIZER, [1, 4], [5, 2]) == "2"
  assert data.decode_continuation(TOKENIZER, [1, 4], []) == ""


@pytest.mark.parametrize(("batch_size", "num_rows"), [(3, 7), (7, 7), (10, 4), (1, 5)])
def test_every_row_is_used_once_per_epoch_without_gaps(batch_size, num_rows):
  num_epochs = 3 * batch_size
  num_iterations = num_epochs * num_rows // batch_size
  walk = np.concatenate(
    [data.batch_rows(5, i, batch_size, num_rows) for i in range(num_iterations)]
  )
  epochs = walk.reshape(num_epochs, num_rows)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_rows), (num_epochs, 1)))
  assert len({tuple(epoch) for epoch in epochs}) > 1
  assert walk.dtype == np.int32


def test_order_is_a_function_of_seed_and_iteration():
  rows = data.batch_rows(0, 3, 8, 100)
  np.testing.assert_array_equal(rows, data.batch_rows(0, 3, 8, 100))
  assert np.any(rows != data.batch_rows(1, 3, 8, 100))
  assert np.any(rows != data.batch_rows(0, 4, 8, 100))


def numbered(num_rows):
  numbers = np.arange(num_rows)
  return data.Examples(numbers, 10 * numbers, 100 * numbers, numbers)


@pytest.mark.parametrize(
  ("num_rows", "num_held_out"), [(2, 1), (39, 1), (40, 2), (100, 5), (20_000, 512)]
)
def test_held_out_rows_are_a_random_part_of_their_own(num_rows, num_held_out):
  training, held_out = data.split_held_out(numbered(num_rows), 0)
  assert len(held_out.tokens) == num_held_out
  both = np.concatenate([training.tokens, held_out.tokens])
  np.testing.assert_array_equal(np.sort(both), np.arange(num_rows))
  for part in (training, held_out):
    np.testing.assert_array_equal(part.mask, 10 * part.tokens)
    np.testing.assert_array_equal(part.completion_mask, 100 * part.tokens)


def test_held_out_rows_depend_on_the_seed_and_need_two_rows():
  parts = [data.split_held_out(numbered(200), seed)[1].tokens for seed in (0, 0, 1)]
  np.testing.assert_array_equal(parts[0], parts[1])
  assert set(parts[0]) != set(parts[2])
  with pytest.raises(UserError, match="single row"):
    data.split_held_out(numbered(1), 0)


def dialogue(*turns):
  return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {t}" for i, t in enumerate(turns))


def pairs_in(tmp_path, *records):
  return data.read_pairs(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, records))))


def test_pairs_of_dialogues_share_their_prompt(tmp_path):
  start = "Hi", "Hello.", "Why?"
  pairs = pairs_in(
    tmp_path,
    {"chosen": dialogue(*start, "It is so."), "rejected": dialogue(*start, "It was so.")},
    # What both begin with is theirs; only turns before are the prompt.
    {"chosen": dialogue("Hi", "Yes", "A", "B"), "rejected": dialogue("Hi", "Yesterday")},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"prompt": "p", "chosen": "same", "rejected": "same"},
  )
  human = "\n\nHuman: Hi\n\nAssistant:"
  assert pairs == [
    data.Pair(human + " Hello.\n\nHuman: Why?\n\nAssistant:", " It is so.", " It was so."),
    data.Pair(human, " Yes\n\nHuman: A\n\nAssistant: B", " Yesterday"),
    data.Pair("p", "c", "r"),
  ]
  assert pairs[0].margin == 1.0


def test_pairs_may_have_margins(tmp_path):
  line = {"prompt": "p", "chosen": "c", "rejected": "r"}
  pairs = pairs_in(tmp_path, {**line, "margin": 3}, {**line, "margin": 0.5})
  assert [pair.margin for pair in pairs] == [3.0, 0.5]


@pytest.mark.parametrize(
  ("records", "message"),
  [
    ([{"chosen": "a b", "rejected": "a c"}], "pair 1 has no prompt, and what its dialogues share"),
    ([{"prompt": 3, "chosen": "a", "rejected": "b"}], "pair 1: the prompt is no text"),
    ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "no pair with two different completions"),
    ([{"prompt": "p", "chosen": "a"}], "line 1 has no text column 'rejected'"),
    (
      [{"chosen": "a", "rejected": "b", "prompt": "", "margin": x} for x in (1, "2")],
      "pair 2: margin is '2', but must be a finite number",
    ),
    (
      [{"chosen": "a", "rejected": "b", "prompt": "", "margin": 10**400}],
      "pair 1: margin is 1000.*, but must be a finite number",
    ),
    (
      [
        {"chosen": "a", "rejected": "b", "prompt": ""},
        {"chosen": "a", "rejected": "b", "prompt": "", "margin": 1},
      ],
      "pair 2: give every line a margin, or none",
    ),
  ],
)
def test_pairs_that_cannot_be_used_are_named(tmp_path, records, message):
  with pytest.raises(UserError, match=message):
    pairs_in(tmp_path, *records)


def test_a_compressed_file_reads_as_the_file(tmp_path):
  line = b'{"prompt": "p"}'
  # Two members, as `cat a.gz b.gz` makes them.
  path = write(tmp_path / "a.jsonl.gz", gzip.compress(line + b"\n") + gzip.compress(line))
  assert data.read_records(path, ("prompt",)) == [{"prompt": "p"}] * 2


@pytest.mark.parametrize(
  ("text", "documents"),
  [
    ("one\n\ntwo\nlines\r\n\r\n \n three ", ["one", "two\nlines", "three"]),
    ("one\n\nstill<|endoftext|>\ntwo<|endoftext|>", ["one\n\nstill", "two"]),
    ("alone", ["alone"]),
  ],
)
def test_documents_are_separated_as_the_file_does(tmp_path, text, documents):
  assert data.read_documents(write(tmp_path / "a.txt", text)) == documents


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_windows_predict_every_token_once(length):
  tokens = list(range(length))
  pieces = data.windows([encoded(tokens, 1)], 4)
  predicted = [token for piece in pieces for token in piece.tokens[1:]]
  assert predicted == tokens[1:]
  assert all(1 <= len(piece.tokens) <= 4 for piece in pieces)


def test_packing_keeps_every_text_whole_and_wastes_little():
  rng = np.random.default_rng(0)
  texts = [
    encoded(rng.integers(1, 100, n).tolist(), int(rng.integers(0, n)))
    for n in rng.integers(1, 21, 200)
  ]
  packed = packing.pack(texts, 0, row_len=20)
  found = []
  for tokens, mask, completion_mask, segment_ids in zip(*packed, strict=True):
    np.testing.assert_array_equal(mask, segment_ids > 0)
    assert not np.any(mask[1:] & ~mask[:-1])  # Padding is at the end.
    for segment in range(1, segment_ids.max() + 1):
      where = segment_ids == segment
      found.append((tokens[where].tolist(), completion_mask[where].tolist()))
  expected = [(text.tokens, [False, *text.in_completion[1:]]) for text in texts]
  assert sorted(found) == sorted(expected)
  assert packed.mask.mean() > 0.9
  with pytest.raises(ValueError, match="A text has 21 tokens, a row 20"):
    packing.pack([encoded([1] * 21, 0)], 0, row_len=20)
