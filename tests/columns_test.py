"""Tests of the forms that prompts, pairs and texts to train on have in data files."""

import json

import pytest

from klrl.errors import UserError
from klrl.tasks import columns, data
from klrl.tasks.chats import Asking

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
MORE, LAST = {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}
SYSTEM = {"role": "system", "content": "s"}
ASKING = Asking(system_prompt="s")
AS_CHAT = Asking(as_chat=True, system_prompt="s")


@pytest.fixture
def rows(tmp_path):
  """Returns what writes rows into a file."""

  def write(*records):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

  return write


@pytest.mark.parametrize(
  ("record", "asking", "prompt"),
  [
    ({"prompt": [USER], "n": 1}, Asking(), [USER]),
    ({"prompt": [USER, ANSWER, MORE]}, ASKING, [SYSTEM, USER, ANSWER, MORE]),
    ({"prompt": [{"role": "system", "content": "own"}, USER]}, ASKING, None),
    ({"prompt": [USER, {"role": "system", "content": "own"}, MORE]}, ASKING, None),
    ({"messages": [USER, ANSWER, MORE, LAST]}, Asking(), [USER, ANSWER, MORE]),
    ({"conversations": [{"from": "human", "value": "a"}]}, Asking(), [USER]),
    ({"prompt": "a"}, AS_CHAT, [SYSTEM, USER]),
    ({"prompt": "a"}, Asking(), "a"),
  ],
)
def test_prompts_are_text_or_chats(rows, record, asking, prompt):
  (found,) = columns.read_prompts(rows(record), asking=asking)
  # A chat's own system message stays.
  assert found == {**record, "prompt": record["prompt"] if prompt is None else prompt}


def test_numbers_fill_a_template_and_make_what_the_user_says(rows):
  path = rows({"a": 3, "b": 0.5, "c": True, "d": "e"})
  assert columns.read_prompts(path, "{a} {b} {c} {d}")[0]["prompt"] == "3 0.5 True e"
  (found,) = columns.read_prompts(path, "{a}?", Asking(as_chat=True))
  assert found["prompt"] == [{"role": "user", "content": "3?"}]


@pytest.mark.parametrize(
  ("records", "template", "asking", "message"),
  [
    ([{"prompt": [USER, ANSWER]}], "{prompt}", Asking(), "line 1: prompt ends with a turn"),
    ([{"messages": [ANSWER]}], "{prompt}", Asking(), "line 1: the chat holds nothing that the"),
    ([{"messages": "a"}], "{prompt}", Asking(), "line 1: messages is 'a', and no list"),
    ([{"prompt": [USER]}, {"prompt": "a"}], "{prompt}", Asking(), "line 2 holds text, unlike the"),
    ([{"prompt": "a"}, {"prompt": [USER]}], "{prompt}", Asking(), "line 2 holds messages, unlike"),
    ([{"prompt": "a"}], "{prompt}", ASKING, "--system_prompt opens chats, and these prompts are"),
    ([{"prompt": [USER]}], "Q: {prompt}", Asking(), "line 1 has no text column 'prompt'"),
    ([{"prompt": None}], "{prompt}", Asking(), "line 1 has no text column 'prompt'"),
  ],
)
def test_prompts_that_cannot_be_asked_are_one_clear_error(rows, records, template, asking, message):
  with pytest.raises(UserError, match=message):
    columns.read_prompts(rows(*records), template, asking)


OTHER = {"role": "assistant", "content": "e"}


@pytest.mark.parametrize(
  ("record", "asking", "pair"),
  [
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, Asking(), ([USER], "b", "e")),
    ({"prompt": "a", "chosen": [ANSWER], "rejected": [OTHER]}, Asking(), ([USER], "b", "e")),
    ({"prompt": [USER], "chosen": "b", "rejected": "e"}, ASKING, ([SYSTEM, USER], "b", "e")),
    ({"prompt": "a", "chosen": "b", "rejected": "e"}, AS_CHAT, ([SYSTEM, USER], "b", "e")),
    # Whole dialogues, with and without the prompt beside them.
    ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, Asking(), ([USER], "b", "e")),
    (
      {"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
      Asking(),
      ([USER], "b", "e"),
    ),
    (
      {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: e"},
      Asking(as_chat=True),
      ([USER], "b", "e"),
    ),
  ],
)
def test_pairs_are_texts_or_chats(rows, record, asking, pair):
  prompt, *texts = pair
  texts = [[{"role": "assistant", "content": text}] for text in texts]
  assert columns.read_pairs(rows(record), asking) == [columns.Pair(prompt, *texts)]


def test_dialogues_that_differ_early_keep_all_that_follows(rows):
  longer = {"chosen": [USER, ANSWER, MORE, LAST], "rejected": [USER, OTHER]}
  assert columns.read_pairs(rows(longer)) == [columns.Pair([USER], [ANSWER, MORE, LAST], [OTHER])]
  # Where users go on differently, both are asked what comes before.
  users = {"chosen": [USER, ANSWER, MORE, LAST], "rejected": [USER, ANSWER, USER, OTHER]}
  assert columns.read_pairs(rows(users)) == [
    columns.Pair([USER], [ANSWER, MORE, LAST], [ANSWER, USER, OTHER])
  ]
  # One that ends where the other goes on has lost a turn of the assistant, not won a prompt.
  cut = {"chosen": [USER, ANSWER, OTHER], "rejected": [USER, ANSWER]}
  assert columns.read_pairs(rows(cut)) == [columns.Pair([USER], [ANSWER, OTHER], [ANSWER])]


@pytest.mark.parametrize(
  ("record", "asking", "message"),
  [
    ({"chosen": [USER, ANSWER], "rejected": "e"}, Asking(), "rejected is 'e', and no list of"),
    ({"chosen": [MORE, ANSWER], "rejected": [USER, OTHER]}, Asking(), "begin with different mess"),
    ({"chosen": [USER, MORE], "rejected": [USER, OTHER]}, Asking(), "no turn of the assistant"),
    (
      {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
      Asking(),
      "dialogues do not begin with the messages of its prompt",
    ),
    (
      {"prompt": [USER, ANSWER], "chosen": [ANSWER], "rejected": [OTHER]},
      Asking(),
      "pair 1: prompt ends with a turn of the assistant",
    ),
    ({"prompt": 3, "chosen": [ANSWER], "rejected": [OTHER]}, Asking(), "prompt is 3, and no list"),
    ({"chosen": "b", "rejected": "e"}, AS_CHAT, "pair 1: chosen has no prompt, and is no dialogue"),
    ({"prompt": "", "chosen": "b", "rejected": "e"}, ASKING, "--system_prompt opens chats, and"),
  ],
)
def test_pairs_of_chats_that_cannot_be_used_are_named(rows, record, asking, message):
  with pytest.raises(UserError, match=message):
    columns.read_pairs(rows(record), asking)


@pytest.mark.parametrize(
  ("record", "asking", "pair"),
  [
    ({"messages": [USER, ANSWER]}, Asking(), ([], [USER, ANSWER])),
    ({"messages": [USER, ANSWER], "prompt": "x", "completion": "y"}, Asking(), None),
    ({"messages": [USER, ANSWER]}, ASKING, ([], [SYSTEM, USER, ANSWER])),
    (
      {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
      Asking(),
      ([], [USER, ANSWER]),
    ),
    ({"conversations": [USER, ANSWER]}, Asking(), ([], [USER, ANSWER])),
    ({"prompt": "a", "completion": "b"}, Asking(), ("a", "b")),
    ({"prompt": "a", "completion": "b"}, AS_CHAT, ([SYSTEM, USER], [ANSWER])),
    ({"prompt": [USER], "completion": [ANSWER]}, Asking(), ([USER], [ANSWER])),
    ({"prompt": [USER], "completion": "b"}, Asking(), ([USER], [ANSWER])),
    ({"text": "a"}, Asking(), ("", "a")),
    (
      {"instruction": "a", "input": "c", "output": "b"},
      Asking(),
      ("### Instruction:\na\n\n### Input:\nc\n\n### Response:\n", "b"),
    ),
    (
      {"instruction": "a", "input": "", "output": "b"},
      Asking(),
      ("### Instruction:\na\n\n### Response:\n", "b"),
    ),
    (
      {"instruction": "a", "input": "c", "output": "b"},
      Asking(as_chat=True),
      ([{"role": "user", "content": "a\n\nc"}], [ANSWER]),
    ),
  ],
)
def test_texts_to_fine_tune_on_have_the_columns_that_people_publish(rows, record, asking, pair):
  texts = columns.read_texts(rows(record), asking)
  assert texts.pairs == [pair or ([], [USER, ANSWER])]
  assert texts.are_documents == ("text" in record)


@pytest.mark.parametrize(
  ("records", "asking", "message"),
  [
    ([{"prompt": "a", "answer": "b"}], Asking(), "has the columns prompt, answer; expected text;"),
    ([{"prompt": "a", "completion": 3}], Asking(), "no text column 'completion'"),
    ([{"text": "a"}, {"prompt": "a"}], Asking(), "line 2 has no text column 'text'"),
    ([{"messages": [USER, ANSWER]}, {"messages": []}], Asking(), "line 2: messages is"),
    ([{"messages": [USER, ANSWER]}, {"text": "a"}], Asking(), "line 2: messages is null"),
    ([{"instruction": "a", "input": 3, "output": "b"}], Asking(), "input is no text"),
    ([{"text": "a"}], Asking(as_chat=True), "--chat: the column text of"),
    ([{"text": "a"}], ASKING, "--system_prompt opens chats, and these texts are text"),
    (
      [{"prompt": [USER], "completion": "b"}, {"prompt": "a", "completion": "b"}],
      Asking(),
      "line 2 holds text, unlike the first",
    ),
  ],
)
def test_texts_that_cannot_be_used_are_one_clear_error(rows, records, asking, message):
  with pytest.raises(UserError, match=message):
    columns.read_texts(rows(*records), asking)


PROMPTS, TEXTS, PAIRS = columns.read_prompts, columns.read_texts, columns.read_pairs


@pytest.mark.parametrize(
  ("record", "reader", "expected"),
  [
    ({"prompt": "a"}, PROMPTS, data.TEXT),
    ({"question": "a", "tags": []}, PROMPTS, data.TEXT),
    ({"prompt": [USER]}, PROMPTS, data.CHATS),
    ({"messages": [USER]}, PROMPTS, data.CHATS),
    # As in UltraChat and UltraFeedback: each reader has columns of its own.
    ({"prompt": "a", "messages": [USER, ANSWER]}, PROMPTS, data.TEXT),
    ({"prompt": "a", "messages": [USER, ANSWER]}, TEXTS, data.CHATS),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [USER]}, PAIRS, data.TEXT),
    ({"prompt": "a", "chosen": [USER], "rejected": [USER]}, PAIRS, data.CHATS),
    ({"prompt": [USER], "chosen": "b", "rejected": "c"}, PAIRS, data.CHATS),
    ({"conversations": [USER]}, TEXTS, data.CHATS),
    ({"prompt": [USER], "completion": "a"}, TEXTS, data.CHATS),
    ({"text": "a", "tags": []}, TEXTS, data.DOCUMENTS),
    ({"instruction": "a", "output": "b", "text": "ab"}, TEXTS, data.TEXT),
  ],
)
def test_the_first_row_says_what_the_data_are(rows, record, reader, expected):
  path = str(rows(record, {"prompt": "a"}))
  assert columns.kind_of(path, reader) == expected
  if reader is PROMPTS:  # A template makes text of whatever there is.
    assert columns.kind_of(path, reader, "{prompt}?") == data.TEXT


def test_prompts_on_both_sides_of_the_split_are_counted_and_shown(capsys):
  data.warn_of_shared_prompts(["a", "b"], ["c", "d"])
  assert not capsys.readouterr().out
  data.warn_of_shared_prompts(["a", "b"], ["c", "b", "b"])
  said = " ".join(capsys.readouterr().out.split())
  assert "2 of 3 held-out rows have a prompt that is trained on too, such as 'b'" in said
  data.warn_of_shared_prompts([[SYSTEM, USER]], [[USER], [SYSTEM, USER]])
  assert "1 of 2 held-out rows" in capsys.readouterr().out


def test_what_a_text_asks_is_its_prompt_or_how_its_chat_begins():
  assert data.asked("a", "b") == "a"
  assert data.asked("", "document") == "document"
  assert data.asked([USER], [ANSWER]) == [USER]
  assert data.asked([], [SYSTEM, USER, ANSWER, MORE, LAST]) == [SYSTEM, USER]
