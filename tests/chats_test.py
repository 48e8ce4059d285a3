"""Tests of chats: what templates write, which tokens are the assistant's, and what is refused."""

import dataclasses
import json
import pathlib

import pytest
from chat_templates import CHATML, GEMMA, MARKED, QWEN3, TEMPLATES, write_tokenizer

from klrl import inputs
from klrl.errors import UserError
from klrl.models import chat, load_tokenizer
from klrl.run import progress
from klrl.tasks import chats, data


@pytest.fixture(autouse=True)
def says_everything_again():
  progress.warn_once.cache_clear()


USER, ANSWER = {"role": "user", "content": "Hé? "}, {"role": "assistant", "content": "Yes."}
MORE, LAST = {"role": "user", "content": "Why"}, {"role": "assistant", "content": "So 中"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module", params=TEMPLATES)
def told(request, tmp_path_factory):
  """A tokenizer with a template, here and in transformers."""
  transformers = pytest.importorskip("transformers")
  directory = write_tokenizer(tmp_path_factory.mktemp("model"), TEMPLATES[request.param])
  return (
    request.param,
    load_tokenizer(directory),
    transformers.AutoTokenizer.from_pretrained(directory),
  )


def test_prompts_have_the_ids_that_transformers_gives_them(told):
  name, info, theirs = told
  conversations = [[USER], [USER, ANSWER, MORE]]
  if name != "gemma":  # It refuses the role.
    conversations.append([SYSTEM, USER])
  tool = {"role": "assistant", "content": "", "tool_calls": [{"name": "é", "arguments": {"x": 1}}]}
  if name == "qwen3":
    conversations.append([USER, tool, {"role": "tool", "content": "<3"}])
  expected = [
    theirs.apply_chat_template(c, add_generation_prompt=True, return_dict=False)
    for c in conversations
  ]
  assert data.encode_prompt_texts(conversations, info) == expected


def test_examples_have_the_ids_that_transformers_gives_them_up_to_the_end_of_the_turn(told):
  name, info, theirs = told
  chat_of = [USER, ANSWER] if name == "qwen3" else [USER, ANSWER, MORE, LAST]
  info = chat.with_end_of_turn(info)
  (example,) = data.encode_texts([([], chat_of)], info)
  expected = theirs.apply_chat_template(chat_of, return_dict=False)
  assert example.tokens == expected[: len(example.tokens)]
  assert example.tokens[-1] in info.eos_ids
  assert theirs.decode(expected[len(example.tokens) :]).strip() in ("", "<eos>")


def learnt(example, info):
  """Returns the stretches of tokens that count, as text."""
  stretches, before = [], False
  for token, counts in zip(*example, strict=True):
    if counts and not before:
      stretches.append([])
    if counts:
      stretches[-1].append(token)
    before = counts
  return [info.decode_marked(stretch) for stretch in stretches]


@pytest.mark.parametrize(
  ("name", "turns"),
  [
    ("chatml", ["Yes.<|im_end|>", "So 中<|im_end|>"]),
    ("llama3", ["Yes.<|eot|>", "So 中<|eot|>"]),
    ("gemma", ["Yes.<end_of_turn>", "So 中<end_of_turn>"]),
    ("mistral", [" Yes.<eos>", " So 中<eos>"]),
    ("marked", ["Yes.<|im_end|>", "So 中<|im_end|>"]),
    ("phi3", ["Yes.<|end|>", "So 中<|end|>"]),
    ("phi3_marked", ["Yes.<|end|>", "So 中<|end|>"]),
  ],
)
def test_the_loss_counts_the_turns_of_the_assistant_alone(tmp_path, name, turns):
  info = chat.with_end_of_turn(load_tokenizer(write_tokenizer(tmp_path, TEMPLATES[name])))
  whole, part = data.encode_texts(
    [([], [USER, ANSWER, MORE, LAST]), ([USER, ANSWER, MORE], [LAST])], info
  )
  assert learnt(whole, info) == turns
  # Turns of the prompt are context, and the tokens are the same.
  assert learnt(part, info) == turns[1:]
  assert part.tokens == whole.tokens
  # A conversation that goes on after the last turn ends for the model where that ends.
  (longer,) = data.encode_texts([([], [USER, ANSWER, MORE])], info)
  assert learnt(longer, info) == turns[:1] and longer.tokens == whole.tokens[: len(longer.tokens)]


def test_generation_blocks_are_those_of_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  info = load_tokenizer(write_tokenizer(tmp_path, MARKED))
  conversation = [USER, ANSWER, MORE, LAST]
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
    conversation, return_dict=True, return_assistant_tokens_mask=True
  )
  (example,) = data.encode_texts([([], conversation)], chat.with_end_of_turn(info))
  mask = [bool(x) for x in theirs["assistant_masks"]][: len(example.tokens)]
  assert example.in_completion == mask and sum(mask) == sum(theirs["assistant_masks"])


def test_a_block_that_leaves_the_end_of_turn_out_is_taken_with_it(tmp_path):
  template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
  info = chat.with_end_of_turn(load_tokenizer(write_tokenizer(tmp_path, template)))
  (example,) = data.encode_texts([([USER], [ANSWER])], info)
  assert learnt(example, info) == ["Yes.<|im_end|>"]


def test_a_turn_ends_with_the_first_of_the_tokens_that_end_it(tmp_path):
  info = load_tokenizer(write_tokenizer(tmp_path, CHATML))
  info = chat.with_end_of_turn(chat.with_stop_tokens(info, "\\n"))
  lines = {"role": "assistant", "content": "One\ntwo"}
  ended = {"role": "assistant", "content": "Three\n"}
  (example,) = data.encode_texts([([], [USER, lines, MORE, ended])], info)
  assert learnt(example, info) == ["One\ntwo<|im_end|>", "Three\n"]
  assert example.tokens[-1] == info.tokenizer.token_to_id("Ċ")


def test_a_turn_that_a_template_leaves_out_is_one_clear_error(tmp_path):
  block = "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
  for template, message in (
    (
      MARKED.replace(block, "{% generation %}{% endgeneration %}"),
      "leaves the assistant message of",
    ),
    (
      MARKED.replace(block, "{% generation %}{% endgeneration %}{{ message.content }}"),
      "writes nothing for a turn of the assistant in chat 1",
    ),
    # Templates of models that read images want content in parts, and write nothing of a text.
    (CHATML.replace("+ message['content'] +", "+"), "leaves the user message of chat 1 out, 'Hé"),
  ):
    info = load_tokenizer(write_tokenizer(tmp_path, template))
    with pytest.raises(UserError, match=message):
      data.encode_texts([([USER], [ANSWER])], info)
    if "user" in message:
      with pytest.raises(UserError, match=message):
        data.encode_prompt_texts([[USER]], info)


def test_a_template_that_leaves_the_call_of_a_tool_out_is_refused(tmp_path):
  call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
  reply = {"role": "tool", "content": "4"}
  info = load_tokenizer(write_tokenizer(tmp_path, CHATML))
  with pytest.raises(UserError, match="leaves the call of the tool 'add' of chat 1 out"):
    data.encode_texts([([USER], [call])], info)
  with pytest.raises(UserError, match="leaves the call of the tool 'add' of chat 1 out"):
    data.encode_prompt_texts([[USER, call, reply]], info)
  info = load_tokenizer(write_tokenizer(tmp_path, QWEN3))
  (example,) = data.encode_texts([([USER], [call])], info)
  assert '"add"' in info.decode(example.tokens)


def test_turns_of_a_prompt_are_context_whatever_marks_them(tmp_path):
  before_header = MARKED.replace("<|im_start|>assistant\n{% generation %}", "{% generation %}A:")
  before_header = before_header.replace("<|im_start|>assistant\n{% endif %}", "A:{% endif %}")
  info = chat.with_end_of_turn(load_tokenizer(write_tokenizer(tmp_path, before_header)))
  (example,) = data.encode_texts([([USER, ANSWER, MORE], [LAST])], info)
  assert learnt(example, info) == ["So 中<|im_end|>"]  # "A:" is how the assistant is asked.
  info = load_tokenizer(
    write_tokenizer(tmp_path, MARKED.replace("{{ message.role }}", "{{ loop.revindex }}"))
  )
  with pytest.raises(UserError, match="prompt of chat 1 differently once an answer follows"):
    data.encode_texts([([USER], [LAST])], info)


def test_blocks_that_begin_before_or_behind_what_asks_the_assistant(tmp_path, capsys):
  header = "<|im_start|>assistant\n"
  in_block = MARKED.replace(header + "{% generation %}", "{% generation %}" + header)
  for template, turns, is_said in (
    (in_block, ["Yes.<|im_end|>", "So 中<|im_end|>"], False),
    (MARKED.replace(header + "{% endif %}", "{% endif %}"), ["Yes.<|im_end|>"] * 2, True),
    (MARKED.replace(header + "{% endif %}", header + "<think>{% endif %}"), ["Yes."], True),
  ):
    progress.warn_once.cache_clear()
    info = chat.with_end_of_turn(load_tokenizer(write_tokenizer(tmp_path, template)))
    (example,) = data.encode_texts([([], [USER, ANSWER, MORE, LAST])], info)
    assert learnt(example, info)[0].startswith(turns[0])
    assert ("is then asked otherwise" in " ".join(capsys.readouterr().out.split())) == is_said


def test_a_turn_that_no_token_ends_is_closed_with_the_eos(tmp_path):
  template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  template += "{% if add_generation_prompt %}assistant:{% endif %}"
  info = chat.with_end_of_turn(load_tokenizer(write_tokenizer(tmp_path, template)))
  assert info.eos_ids == (257,)
  (example,) = data.encode_texts([([USER], [ANSWER])], info)
  assert learnt(example, info) == [" Yes.\n<eos>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several(tmp_path):
  info = load_tokenizer(write_tokenizer(tmp_path, QWEN3))
  with pytest.raises(UserError, match=r"in chat 1 differently once others follow .*End each chat"):
    data.encode_texts([([], [USER, ANSWER, MORE, LAST])], info)
  thinking = {**LAST, "reasoning_content": "Hm"}
  (example,) = data.encode_texts([([], [USER, thinking])], chat.with_end_of_turn(info))
  assert learnt(example, info) == ["<think>\nHm\n</think>\n\nSo 中<|im_end|>"]
  template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
  info = load_tokenizer(write_tokenizer(tmp_path, template))
  with pytest.raises(UserError, match=r"asks the assistant to go on with .*but writes its turn in"):
    data.encode_texts([([], [USER, ANSWER])], info)


def test_what_ends_a_turn_ends_a_completion_and_is_said_and_saved(tmp_path, capsys):
  info = load_tokenizer(write_tokenizer(tmp_path, GEMMA))
  ended = chat.with_end_of_turn(info)
  assert ended.eos_id == 257
  assert [ended.tokenizer.id_to_token(i) for i in ended.eos_ids] == ["<eos>", "<end_of_turn>"]
  said = " ".join(capsys.readouterr().out.split())
  assert "ends a turn with <end_of_turn>, which the model's files do not call" in said
  assert json.loads(ended.files["generation_config.json"])["eos_token_id"] == [*ended.eos_ids]
  # Files that say so need no message, and stay as they are.
  (tmp_path / "generation_config.json").write_bytes(ended.files["generation_config.json"])
  again = load_tokenizer(tmp_path)
  assert chat.with_end_of_turn(again) is again
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ("given", "names"),
  [
    ("<|eot|>", ["<|eot|>"]),
    ("<|eot|>, 266,<eos>", ["<|eot|>", "<think>"]),
    ("\\n", ["Ċ"]),
    ("7,é", None),
    ("", None),
    ("<|eot|>,", None),
    ("9999", None),
    ("No token", None),
  ],
)
def test_stop_tokens_are_texts_or_ids(tmp_path, given, names):
  info = load_tokenizer(write_tokenizer(tmp_path))
  if names is None:
    with pytest.raises(UserError, match="--stop_tokens"):
      chat.with_stop_tokens(info, given)
    return
  ended = chat.with_stop_tokens(info, given)
  assert [ended.tokenizer.id_to_token(i) for i in ended.eos_ids] == ["<eos>", *names]
  saved = json.loads(ended.files["generation_config.json"])
  assert saved == {"eos_token_id": [*ended.eos_ids]}  # pad_token_id: -1 is none


def test_what_ends_a_turn_is_found_where_a_template_asks_for_a_system_prompt(tmp_path):
  strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
  info = load_tokenizer(write_tokenizer(tmp_path, strict + CHATML))
  assert [info.name(i) for i in chat.with_end_of_turn(info).eos_ids] == ["<eos>", "<|im_end|>"]


def test_the_templates_of_a_directory_are_found_where_transformers_finds_them(tmp_path):
  named = [{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]
  write_tokenizer(tmp_path, chat_template=named)
  assert load_tokenizer(tmp_path).chat_templates == {"default": "one", "tools": "two"}
  (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
  write_tokenizer(tmp_path, chat_template="one")
  assert load_tokenizer(tmp_path).chat_templates == {"default": "one"}
  (tmp_path / "chat_template.jinja").write_text("file")
  (tmp_path / "additional_chat_templates").mkdir()
  (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more")
  info = load_tokenizer(tmp_path)
  assert info.chat_templates == {"default": "file", "rag": "more"}
  assert info.files["additional_chat_templates/rag.jinja"] == b"more"
  write_tokenizer(tmp_path, chat_template=7)
  with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is 7, but must be"):
    load_tokenizer(tmp_path)


def test_a_template_of_the_user_takes_the_place_of_the_models_and_is_saved(tmp_path):
  info = load_tokenizer(write_tokenizer(tmp_path / "model", CHATML))
  (tmp_path / "mine.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
  mine = chat.with_template(info, str(tmp_path / "mine.jinja"))
  assert data.encode_prompt_texts([[USER]], mine) == [[256, *info.encode("Hé? ")[1:]]]
  assert mine.files["chat_template.jinja"] == (tmp_path / "mine.jinja").read_bytes()
  several = {"default": "x", "rag": "y"}
  named = chat.with_template(dataclasses.replace(info, chat_templates=several), "rag")
  assert chat.template_of(named) == "y"
  with pytest.raises(UserError, match=r"--chat_template=no: there is no such file\. .*are default"):
    chat.with_template(info, "no")
  (tmp_path / "mine.jinja").write_bytes(b"\xff")
  with pytest.raises(UserError, match="cannot be read"):
    chat.with_template(info, str(tmp_path / "mine.jinja"))
  with pytest.raises(UserError, match="templates named rag, and none named default; choose one"):
    chat.template_of(dataclasses.replace(info, chat_templates={"rag": "y"}))


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (None, "The data are chats .*but the model has no chat template. Give one by"),
    ("{% for %}", "chat template cannot be used: line 1: "),
    ("{{ raise_exception('only tools') }}", "cannot render chat 1: only tools. The chat begins"),
    ("{{ messages[7].content }}", "cannot render chat 1: UndefinedError: "),
    ("{{ messages + 1 }}", "cannot render chat 1: TypeError: "),
    ("{{ ''.__class__.__mro__ }}", "cannot render chat 1: SecurityError: "),
    ("{% set _ = messages.append(1) %}", "cannot render chat 1: SecurityError: "),
    ("{{ 'a' * 5000000 }}", "it makes a text of 5000000 characters"),
    ("{{ 'a' * 90000000000 }}", "(cannot be used|cannot render chat 1): MemoryError"),
    ("{% set a = 'a' * 9999 %}{{ a.center(90000000000) }}", "cannot render chat 1: MemoryError"),
    ("{{ cycler }}{% include 'x' %}", "cannot render chat 1: "),
    (
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "takes more than 1 seconds of processor time; it may never end",
    ),
  ],
)
def test_a_template_that_cannot_be_rendered_is_one_clear_error(
  tmp_path, monkeypatch, template, message
):
  monkeypatch.setattr(chat, "_SECONDS", 1.0)
  info = load_tokenizer(write_tokenizer(tmp_path, template))
  with pytest.raises(UserError, match=message):
    data.encode_prompt_texts([[USER]], info)


def test_a_template_that_drops_or_refuses_the_system_prompt_is_refused(tmp_path):
  template = CHATML.replace("in messages", "in messages if message.role != 'system'")
  info = load_tokenizer(write_tokenizer(tmp_path, template))
  for texts in ([[SYSTEM, USER]], [[USER], [SYSTEM, USER]]):
    with pytest.raises(
      UserError, match=rf"leaves the system message of chat {len(texts)} out, 'Be brief\.'\. Put it"
    ):
      data.encode_prompt_texts(texts, info)
  with pytest.raises(UserError, match="leaves the system message of chat 1 out"):
    data.encode_texts([([SYSTEM, USER], [ANSWER])], info)
  info = load_tokenizer(write_tokenizer(tmp_path, GEMMA))
  with pytest.raises(UserError, match=r"chat 1: System role not supported\. The chat"):
    data.encode_prompt_texts([[SYSTEM, USER]], info)


def test_a_template_without_bos_is_said(tmp_path, capsys):
  info = load_tokenizer(write_tokenizer(tmp_path, CHATML))
  assert data.encode_prompt_texts([[USER]], info)[0][0] != 256
  assert "The chat template writes no <bos>, with which this tokenizer" in " ".join(
    capsys.readouterr().out.split()
  )
  info = load_tokenizer(write_tokenizer(tmp_path, "{{ bos_token }}" + CHATML))
  (row,) = data.encode_prompt_texts([[USER]], info)
  assert row.count(256) == 1 and not capsys.readouterr().out


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("hi", "column is 'hi', and no list of messages"),
    ([], r"column is \[\], and no list of messages"),
    (["hi"], "column, message 1 is 'hi', which has no role"),
    ([USER, {"content": "x"}], "column, message 2 is {'content': 'x'}, which has no role"),
    ([{"role": 3, "content": "x"}], "which has no role"),
    ([{"role": "human", "content": "x"}], "has the role 'human'; roles are system"),
    ([{"role": "user"}], "has no text as content"),
    ([{"role": "user", "content": 3}], "has no text as content"),
    ([{"role": "user", "content": {"text": "x"}}], "has no text as content"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "other content than text"),
    ([{"role": "user", "content": "\U0010fffe"}], r"holds U\+10FFFE or U\+10FFFF"),
  ],
)
def test_messages_of_an_unknown_form_are_one_clear_error(value, message):
  with pytest.raises(UserError, match=message):
    chats.messages(value, "column")


def test_parts_of_a_message_are_one_text_and_empty_fields_are_left_out():
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  assert chats.messages([{"role": "user", "content": parts, "name": None}], "x") == [
    {"role": "user", "content": "ab"}
  ]
  call = {"role": "assistant", "content": None, "tool_calls": [1]}
  assert chats.messages([call], "x") == [{**call, "content": ""}]


def test_sharegpt_and_hh_dialogues_are_chats():
  turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]
  turns.append({"from": "gpt", "value": "b"})
  assert chats.from_sharegpt(turns, "x") == [
    {"role": role, "content": text}
    for role, text in zip(("system", "user", "assistant"), "sab", strict=True)
  ]
  for wrong, message in (
    ([{"from": "narrator", "value": "x"}], "turn 1 is from 'narrator'; known are"),
    ([{"from": "human"}], "has no text as content"),
    ("text", "and no list of turns"),
  ):
    with pytest.raises(UserError, match=message):
      chats.from_sharegpt(wrong, "x")
  text = "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d"
  assert chats.from_hh(text, "x") == [
    {"role": "user", "content": "a\nb"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
  ]
  with pytest.raises(UserError, match="is no dialogue of HH-RLHF"):
    chats.from_hh("no dialogue", "x")


def test_a_template_that_no_data_need_is_refused_or_said(tmp_path, capsys):
  info = load_tokenizer(write_tokenizer(tmp_path / "model", CHATML))
  sources = inputs.Sources(chat_template="default")
  with pytest.raises(UserError, match=r"--chat_template is set, but nothing reads it: "):
    inputs.reading(sources, data.TEXT, info)
  chatting = inputs.Sources(chat=True)
  assert len(inputs.reading(chatting, data.TEXT, info).eos_ids) == 2
  assert not capsys.readouterr().out.count("--chat")
  assert inputs.reading(inputs.Sources(), data.TEXT, info) is info
  assert "has a chat template, which it does not see without --chat" in " ".join(
    capsys.readouterr().out.split()
  )


@pytest.mark.parametrize(
  ("name", "begins", "turns"),
  [
    ("plain", "<bos>Be brief.\n\nUser: Hé? \n\nAssistant: Yes.", [" Yes.<eos>", " So 中<eos>"]),
    ("chatml", "<bos><|im_start|>system\nBe brief.<|im_end|>\n", ["Yes.<|im_end|>", None]),
    ("gemma", "<bos><start_of_turn>user\nBe brief.\n\nHé? <end", ["Yes.<end_of_turn>", None]),
  ],
)
def test_the_templates_that_come_with_the_experiments_mark_the_assistants_turns(
  tmp_path, name, begins, turns
):
  info = load_tokenizer(write_tokenizer(tmp_path))
  path = pathlib.Path(__file__).parents[1] / "experiments" / "templates" / f"{name}.jinja"
  info = chat.with_end_of_turn(chat.with_template(info, str(path)))
  conversation = [SYSTEM, USER, ANSWER, MORE, LAST]
  (example,) = data.encode_texts([([], conversation)], info)
  assert info.decode_marked(example.tokens).startswith(begins)
  assert learnt(example, info) == [turns[0], turns[1] or turns[0].replace("Yes.", "So 中")]
  # What is asked is how the answered text goes on.
  (asked,) = data.encode_prompt_texts([conversation[:4]], info)
  assert asked == example.tokens[: len(asked)] and example.in_completion[len(asked)]
  assert not any(example.in_completion[len(asked) - 5 : len(asked)])
