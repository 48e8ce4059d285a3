"""Special tokens and vocabularies: what ends, what begins, what is kept, and which models agree."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from hf_test import LLAMA, edit_config, random_params, saved, tiny_tokenizer

from klrl import inputs
from klrl.devices import unread
from klrl.errors import UserError
from klrl.models import (
  TokenizerInfo,
  chat,
  difference,
  hf,
  load_tokenizer,
  policy_model,
  scalar_model,
  shared_tokens,
)
from klrl.sampling import make_greedy_fn, make_sample_fn
from klrl.tasks import data

SHARED = pathlib.Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models" / "stories260K"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared model")
FIXED = {"strategy": {"Fixed": 60}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}


@pytest.fixture
def stories(tmp_path):
  """Returns a copy of the shared model that may be changed."""
  if not SHARED.is_dir():
    pytest.skip("needs the shared model")
  directory = tmp_path / "stories"
  directory.mkdir()
  for file in STORIES.iterdir():
    shutil.copyfile(file, directory / file.name)
  return directory


def edit(file, **changes):
  before = json.loads(file.read_text()) if file.is_file() else {}
  file.write_text(json.dumps(before | changes))


@pytest.mark.parametrize(
  ("name", "section"),
  [
    (
      "truncation",
      {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0},
    ),
    ("padding", FIXED | {"pad_type_id": 0, "pad_token": "<unk>"}),
    ("dropout", 0.5),
  ],
)
def test_what_cuts_pads_or_shakes_texts_is_switched_off_and_said_once(
  name, section, stories, capsys
):
  text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
  expected = load_tokenizer(STORIES).encode(text)
  content = json.loads((stories / "tokenizer.json").read_text())
  if name == "dropout":
    content["model"][name] = section
  else:
    content[name] = section
  (stories / "tokenizer.json").write_text(json.dumps(content))
  tokenizer = load_tokenizer(stories)
  load_tokenizer(stories)
  said = capsys.readouterr().out
  assert said.count("switched off") == 1 and name in said
  prompts = data.encode_prompts([{"prompt": text}], tokenizer, max_prompt_len=448)
  assert prompts.tokens[0].tolist() == expected
  (example,) = data.encode_texts([(text, " The end.")], tokenizer)
  assert example.tokens[: len(expected)] == expected


def test_whatever_names_an_eos_ends_a_completion(tmp_path):
  saved(tmp_path)
  edit_config(tmp_path, eos_token_id=[9, 2])
  edit(tmp_path / "generation_config.json", eos_token_id=[4, 9])
  edit(tmp_path / "tokenizer_config.json", eos_token="w7")
  info = load_tokenizer(tmp_path)
  assert (info.eos_id, info.eos_ids) == (7, (7, 9, 2, 4))
  (example,) = data.encode_texts([("w5", " w3")], info)
  assert example == ([5, 3, 7], [False, True, True])
  # Any of them closes a text that ends with it.
  (example,) = data.encode_texts([("w5", " w3 w9")], info)
  assert example == ([5, 3, 9], [False, True, True])
  # A prompt's last word closes nothing.
  (example,) = data.encode_texts([("w5 w9", "")], info)
  assert example == ([5, 9, 7], [False, False, True])


@needs_shared
def test_greedy_completions_end_where_generate_ends(stories):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  edit(stories / "generation_config.json", eos_token_id=[2, 410, 431])
  tokenizer = load_tokenizer(stories)
  model = transformers.AutoModelForCausalLM.from_pretrained(stories)
  rows = [tokenizer.encode(text) for text in ("Once upon a time", "Lily", "The dog")]
  expected = [
    len(model.generate(torch.tensor([row]), max_new_tokens=20, do_sample=False)[0]) - len(row)
    for row in rows
  ]
  assert min(expected) < 20
  config, params = hf.load_policy(stories)
  limits = {"max_completion_len": 20, "eos_id": tokenizer.eos_ids, "pad_id": tokenizer.pad_id}
  tokens, mask = data.pad(rows, tokenizer.pad_id, left=True)
  rollout = jax.jit(make_greedy_fn(policy_model(config), **limits))(params, tokens, mask)
  assert rollout.completion_mask.sum(axis=1).tolist() == expected
  ends = [
    rollout.tokens[i, tokens.shape[1] + n - 1] in (2, 410, 431) for i, n in enumerate(expected)
  ]
  assert rollout.finished.tolist() == ends


def test_a_text_that_brings_its_bos_has_it_once(tmp_path):
  saved(tmp_path)
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  template = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
  )
  content["post_processor"] = json.loads(template.__getstate__())
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  info = load_tokenizer(tmp_path)
  # No EOS of the tokenizer's own either: there would be nothing to complete.
  assert info.encode("w5 w3") == info.encode("<s> w5 w3") == [1, 5, 3]
  assert info.encode("w5 <s>") == [1, 5, 1]
  assert info.encode("") == [1]
  assert data.encode_texts([("<s> w5", " w3 </s>"), ("w5", " w3")], info) == [
    ([1, 5, 3, 2], [False, False, True, True]),
    ([1, 5, 3, 2], [False, False, True, True]),
  ]


def test_what_is_put_around_a_text_is_known_where_a_letter_has_no_token():
  for model in (
    tokenizers.models.WordLevel({"one": 0, "<s>": 1, "</s>": 2}, unk_token="nowhere"),
    tokenizers.models.BPE({"o": 0, "<s>": 1, "</s>": 2}, []),
  ):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    info = TokenizerInfo(tokenizer, 1, 2, 0)
    assert info.encode("one" if "one" in tokenizer.get_vocab() else "o") == [1, 0]
    assert info.encode("") == [1]


def test_a_prompt_with_other_tokens_alone_is_named(capsys):
  tokenizer = tiny_tokenizer()
  data.encode_texts([("w5", " w3"), ("w4 ", "w5")], tokenizer)
  assert not capsys.readouterr().out
  data.encode_texts([("w5", " w3"), ("one w", "3")], tokenizer)
  said = capsys.readouterr().out
  assert "1 of 2 prompts" in said and "'one w'" in said


def test_special_tokens_that_only_their_names_mark_are_no_text(tmp_path):
  saved(tmp_path)
  assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"] == []
  info = load_tokenizer(tmp_path)
  assert info.decode([1, 5, 2]) == "w5"
  assert data.decode_continuation(info, [1, 5], [3, 2]) == " w3"


def test_a_token_named_beyond_the_vocabulary_takes_a_row_that_fills_it_up(tmp_path):
  saved(tmp_path, dataclasses.replace(LLAMA, vocab_size=13))
  edit(tmp_path / "tokenizer_config.json", pad_token="<fill>", extra_special_tokens=["a", "b"])
  info = load_tokenizer(tmp_path)
  # There are two rows.
  assert (info.pad_id, info.num_tokens, info.tokenizer.token_to_id("b")) == (11, 13, None)


def test_an_id_without_a_token_may_end_a_completion_and_is_said(tmp_path, capsys):
  saved(tmp_path, dataclasses.replace(LLAMA, vocab_size=16))
  edit_config(tmp_path, eos_token_id=13)
  edit(tmp_path / "tokenizer_config.json", eos_token=None)
  info = load_tokenizer(tmp_path)
  assert (info.eos_ids, info.num_tokens) == ((13,), 14)
  assert "3 of the ids below 14 have no token" in " ".join(capsys.readouterr().out.split())


KEPT = {
  "generation_config.json": b'{"eos_token_id": [2, 9],\n "temperature": 0.6}',
  "chat_template.jinja": b"{% for message in messages %}{{ message }}{% endfor %}\n",
  "special_tokens_map.json": b'{"eos_token": "</s>"}',
}


def test_saving_keeps_the_files_and_the_ids_as_they_were(tmp_path):
  old, new = tmp_path / "old", tmp_path / "new"
  params = saved(old)
  for name, content in KEPT.items():
    (old / name).write_bytes(content)
  edit_config(old, bos_token_id=None, eos_token_id=[2, 9], pad_token_id=-1)
  edit(old / "tokenizer_config.json", model_max_length=7, pad_token=None, bos_token=None)
  info = load_tokenizer(old)
  assert (info.bos_id, info.eos_ids, info.pad_id) == (None, (2, 9), 2)
  hf.save_policy(new, LLAMA, params, info)
  names = {file.name for file in old.iterdir()}
  assert names == {file.name for file in new.iterdir()}
  for name in names - {"config.json"}:
    assert (new / name).read_bytes() == (old / name).read_bytes(), name
  ids = [json.loads((d / "config.json").read_text()) for d in (old, new)]
  ids = [{k: v for k, v in config.items() if k.endswith("token_id")} for config in ids]
  assert ids[0] == ids[1] == {"eos_token_id": [2, 9], "pad_token_id": -1}
  again = load_tokenizer(new)
  assert again.eos_ids == info.eos_ids and again.encode("w5 w3") == [5, 3]


def test_a_saved_reward_model_pads_with_what_is_no_eos(tmp_path):
  saved(tmp_path)
  edit_config(tmp_path, pad_token_id=None)
  params = random_params(scalar_model(LLAMA))
  for pad, expected in (("<pad>", 0), (None, None)):
    edit(tmp_path / "tokenizer_config.json", pad_token=pad)
    hf.save_scalar(tmp_path / "reward", LLAMA, params, load_tokenizer(tmp_path))
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config.get("pad_token_id") == expected


def byte_level():
  """Returns a tokenizer whose tokens are bytes, with one that ends inside of a character."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"Ġä": 256, "</s>": 257}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ġ", "ä")]))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(["</s>"])
  return TokenizerInfo(tokenizer, None, 257, 257)


def with_byte_tokens():
  """Returns a tokenizer with a token for each byte and few others, as SentencePiece makes them."""
  vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "a": 257, "</s>": 258}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
  decoders = tokenizers.decoders
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.add_special_tokens(["</s>"])
  return TokenizerInfo(tokenizer, None, 258, 258)


@pytest.mark.parametrize("make_tokenizer", [byte_level, with_byte_tokens])
@pytest.mark.parametrize("text", ["a 中国", "a\ufffd 🤖", "é 中a"])
def test_what_is_decoded_never_ends_in_half_a_character(make_tokenizer, text):
  info = make_tokenizer()
  ids = info.tokenizer.encode(text).ids
  assert len(ids) > len(text) and info.decode(ids) == text
  shown = [info.decode(ids[:n]) for n in range(len(ids) + 1)]
  assert all(text.startswith(some) for some in shown)
  # Nothing whole is left out: every character is there as soon as its last byte is.
  assert len(set(shown)) == len(text) + 1
  for n in range(len(ids)):
    assert info.decode([*ids[:n], info.eos_id]) == shown[n]
  # A completion goes on inside of a character, and the pieces make the whole.
  pieces = [data.decode_continuation(info, ids[:n], [ids[n]]) for n in range(len(ids))]
  assert "".join(pieces) == text


def test_a_stop_token_is_what_it_spells():
  info = with_byte_tokens()  # "a" alone would be two tokens where a blank were put before it.
  for text, token_id in (("a", 257), ("\\n", 10), ("</s>", 258)):
    assert chat.with_stop_tokens(info, text).eos_ids[-1] == token_id
  info = byte_level()
  assert chat.with_stop_tokens(info, "a").eos_ids[-1] == info.tokenizer.token_to_id("a")
  for wrong in ("é", "Ġ", "aa"):  # the names of bytes, and two tokens
    with pytest.raises(UserError, match="is no token of the model; it is made of"):
      chat.with_stop_tokens(info, wrong)


@pytest.mark.parametrize("make_tokenizer", [byte_level, with_byte_tokens])
def test_bytes_that_are_no_character_are_shown_as_such(make_tokenizer):
  info = make_tokenizer()
  *_, last = info.tokenizer.encode("中").ids
  a = info.tokenizer.encode("a").ids
  assert info.decode([*a, last, *a]) == info.tokenizer.decode([*a, last, *a]) == "a\ufffda"
  assert info.name(last) == "<0xAD>"
  assert info.name(a[0]) == "a" and info.name(info.eos_id) == "</s>" and info.name(999) == "<999>"
  if make_tokenizer is byte_level:
    assert info.name(256) == "<0x20><0xE4>" and info.decode([*a, 256]) == "a "


def with_tokens(*added, num_tokens=11):
  info = tiny_tokenizer(num_tokens)
  info.tokenizer.add_special_tokens(list(added))
  return info


def test_vocabularies_that_differ_in_what_never_occurs_are_the_same():
  ours = with_tokens()
  assert shared_tokens(ours, with_tokens()) == 11
  assert shared_tokens(ours, with_tokens("<fill>", "<x>")) == 11
  padded = dataclasses.replace(with_tokens("<fill>"), pad_id=11)
  assert shared_tokens(padded, with_tokens()) == 11
  # One pad token in place of another, whatever they are called.
  named_otherwise = dataclasses.replace(with_tokens("<pad-of-theirs>"), pad_id=11)
  assert shared_tokens(padded, named_otherwise) == 11
  assert shared_tokens(padded, with_tokens("<y>")) is None
  assert difference(padded, named_otherwise) == (
    "id 11 is '<pad-of-theirs>' there, and '<fill>' in the policy"
  )
  assert shared_tokens(dataclasses.replace(padded, pad_id=0), named_otherwise) is None
  assert difference(ours, with_tokens("<y>")) == (
    "id 11 is '<y>' there, and no token in the policy"
  )
  # Its own tokens must have rows in the other model, and words are no padding.
  assert shared_tokens(with_tokens("<x>"), with_tokens()) is None
  assert shared_tokens(dataclasses.replace(padded, eos_id=11), with_tokens()) is None
  assert shared_tokens(ours, with_tokens(num_tokens=12)) is None
  other = tokenizers.models.WordLevel({f"x{i}": i for i in range(11)}, unk_token="x0")
  renamed = dataclasses.replace(ours, tokenizer=tokenizers.Tokenizer(other))
  assert shared_tokens(ours, renamed) is None


def test_models_of_one_run_predict_the_tokens_that_all_of_them_know(tmp_path):
  def save(name, save_model, make_model, vocab_size, info):
    config = dataclasses.replace(LLAMA, vocab_size=vocab_size)
    save_model(tmp_path / name, config, random_params(make_model(config)), info)
    return str(tmp_path / name)

  padded = dataclasses.replace(with_tokens("<fill>"), pad_id=11)
  policy = save("policy", hf.save_policy, policy_model, 16, padded)
  reward = save("reward", hf.save_scalar, scalar_model, 11, with_tokens())
  reference = save("reference", hf.save_policy, policy_model, 12, with_tokens("<y>"))
  sources = inputs.Sources(reference=reference, has_value_model=True)
  with pytest.raises(UserError, match="reference has another vocabulary than the policy"):
    inputs.load_models(sources, policy=policy, reward_model=reward)
  reference = save("reference", hf.save_policy, policy_model, 13, with_tokens("<fill>", "<y>"))
  sources = dataclasses.replace(sources, reference=reference)
  models = inputs.load_models(sources, policy=policy, reward_model=reward)
  for model, params in (
    (models.policy, models.policy_params),
    (models.reference, models.reference_params),
    (models.sampler, models.policy_params),
  ):
    assert model.unembedding(unread.read(params)).shape == (12, 11)
  assert models.tokenizer.pad_id == 2  # The reward model has no row for the pad token.
  assert models.policy.config.vocab_size == 16
  assert models.policy_params["decoder"]["embed"]["embedding"].shape == (16, 12)


def test_only_tokens_are_drawn_and_their_probabilities_sum_to_one():
  config = dataclasses.replace(LLAMA, vocab_size=16, num_tokens=5, num_layers=1)
  policy, params = policy_model(config), random_params(policy_model(config))
  sample = make_sample_fn(policy, max_completion_len=20, eos_id=None, pad_id=0)
  prompts = np.full((64, 1), 3)
  rollout = jax.jit(sample)(params, prompts, prompts > 0, jax.random.key(0), temperature=1.0)
  assert set(np.unique(rollout.tokens)) == set(range(5))

  @jax.jit
  def score(params, tokens):
    return policy.hidden(params, tokens, tokens >= 0) @ policy.unembedding(params)

  log_probs = np.asarray(jax.nn.log_softmax(score(params, rollout.tokens)))
  assert log_probs.shape[-1] == 5
  expected = np.take_along_axis(log_probs[:, :-1], np.asarray(rollout.tokens)[:, 1:, None], 2)
  np.testing.assert_allclose(rollout.old_log_probs, expected[..., 0], atol=1e-4)
