"""Tests of what a run reads: its models and their dtypes, chats or text, what ends a completion."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_templates import CHATML, MARKED, NUM_TOKENS, write_tokenizer
from hf_test import LLAMA, random_params, tiny_tokenizer

from experiments import dpo, grpo, reward_model, sft
from experiments.lab import dpo_pairs
from klrl import inputs
from klrl.devices import parallel, unread
from klrl.errors import UserError
from klrl.models import DecoderConfig, load_tokenizer, policy_model, save_policy
from klrl.run import checkpoint, fingerprints, progress
from klrl.tasks import data

TINY = DecoderConfig(
  vocab_size=NUM_TOKENS,
  width=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=16,
  max_len=256,
)
CHATS = [
  [
    {"role": "user", "content": f"Question {i}"},
    {"role": "assistant", "content": f"Answer {i}"},
  ]
  for i in range(12)
]


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a model whose template ends turns with no EOS of its files, and with data."""
  folder = tmp_path_factory.mktemp("place")
  params = policy_model(TINY).init(jax.random.key(0))
  for name, template in (("chatty", "{{ bos_token }}" + CHATML), ("plain", None)):
    info = load_tokenizer(write_tokenizer(folder / f"{name}-tokenizer", template))
    save_policy(folder / name, TINY, params, info)
  (folder / "marked.jinja").write_text(MARKED)
  write_rows(
    folder / "messages.jsonl", [{"messages": chat, "n": i} for i, chat in enumerate(CHATS)]
  )
  write_rows(folder / "text.jsonl", [{"prompt": chat[0]["content"]} for chat in CHATS])
  pairs = [
    {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "No"}]}
    for chat in CHATS
  ]
  write_rows(folder / "pairs.jsonl", pairs)
  return folder


@pytest.fixture(autouse=True)
def says_everything_again():
  progress.warn_once.cache_clear()


def loaded(place, **settings):
  sources = inputs.Sources(policy=str(place / "chatty"), has_reference=False, **settings)
  inputs.check_inputs(sources)
  models = inputs.load_models(sources, policy=sources.policy, reward_model="")
  return models, inputs.load_task(sources, models)


@pytest.mark.parametrize(("source", "chat"), [("messages", False), ("text", True)])
def test_prompts_are_what_the_user_says_and_end_where_the_answer_begins(place, source, chat):
  models, task = loaded(
    place, prompts=str(place / f"{source}.jsonl"), chat=chat, system_prompt="Be brief."
  )
  info = models.tokenizer
  row = task.training.tokens[0][task.training.mask[0]].tolist()
  user = task.training.records[0]["prompt"][-1]["content"]
  assert info.decode_marked(row) == (
    f"<bos><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  assert row.count(info.bos_id) == 1
  assert [info.name(i) for i in info.eos_ids] == ["<eos>", "<|im_end|>"]
  assert len(task.training.tokens) + len(task.held_out.tokens) == len(CHATS)
  if source == "messages":
    assert all(isinstance(record["n"], int) for record in task.training.records)


def test_text_without_chat_stays_text(place, capsys):
  models, task = loaded(place, prompts=str(place / "text.jsonl"), stop_tokens="\\n")
  row = task.training.tokens[0][task.training.mask[0]].tolist()
  assert models.tokenizer.decode_marked(row).startswith("<bos>Question ")
  assert [models.tokenizer.name(i) for i in models.tokenizer.eos_ids] == ["<eos>", "Ċ"]
  assert "which it does not see without --chat" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_asked_is_told_before_models_are_read(place):
  settings = {"prompts": str(place / "messages.jsonl"), "has_reference": False}
  with pytest.raises(UserError, match=r"the model has no chat template\. Give one by"):
    inputs.check_inputs(inputs.Sources(policy=str(place / "plain"), **settings))
  inputs.check_inputs(
    inputs.Sources(
      policy=str(place / "plain"), chat_template=str(place / "marked.jinja"), **settings
    )
  )
  (place / "broken.jinja").write_text("{{ raise_exception('not today') }}")
  with pytest.raises(UserError, match="cannot render chat 1: not today"):
    inputs.check_inputs(
      inputs.Sources(
        policy=str(place / "chatty"), chat_template=str(place / "broken.jinja"), **settings
      )
    )


@pytest.mark.parametrize(("template", "is_said"), [("marked", True), ("chatml", False)])
def test_a_model_that_has_learnt_chats_in_another_form_is_named(place, capsys, template, is_said):
  (place / "chatml.jinja").write_text("{{ bos_token }}" + CHATML)
  sources = inputs.Sources(
    policy=str(place / "plain"),
    reference=str(place / "chatty"),
    prompts=str(place / "messages.jsonl"),
    chat_template=str(place / f"{template}.jinja"),
  )
  inputs.load_models(sources, policy=sources.policy, reward_model="")
  said = " ".join(capsys.readouterr().out.split())
  assert ("chatty has another chat template" in said) == is_said


@pytest.mark.parametrize("module", [sft, dpo, reward_model, grpo])
@pytest.mark.parametrize(
  "setting", [{"chat": True}, {"chat_template": "x"}, {"system_prompt": "x"}, {"stop_tokens": "x"}]
)
def test_flags_of_chats_need_data_of_the_users(module, setting):
  (name,) = setting
  with pytest.raises(UserError, match=f"--{name} is set, but nothing reads it without --"):
    module.Config(**setting)


def test_pairs_of_chats_are_told_apart_and_judged_by_their_prompts(place, monkeypatch):
  monkeypatch.setattr(
    dpo_pairs,
    "make_pairs",
    lambda config, policy, params, arrays: dpo_pairs.Pairs(*arrays, np.zeros(arrays[0].shape[:2])),
  )
  config = dpo.Config(
    policy=str(place / "chatty"), data=str(place / "pairs.jsonl"), max_completion_len=8
  )
  start = dpo_pairs.own_start(config)
  texts = {
    start.tokenizer.decode_marked(tokens[mask])
    for pair in zip(start.training.tokens, start.training.completion_mask, strict=True)
    for tokens, mask in zip(*pair, strict=True)
  }
  assert "No<|im_end|>" in texts
  assert texts - {"No<|im_end|>"} <= {f"Answer {i}<|im_end|>" for i in range(12)}
  (prompt,) = start.prompts.tokens
  shown = start.tokenizer.decode_marked(prompt)
  assert shown.startswith("<bos><|im_start|>user\nQuestion ")
  assert shown.endswith("<|im_end|>\n<|im_start|>assistant\n")
  training, held_out = reward_model._pairs(
    reward_model.Config(policy=config.policy, data=config.data), start.tokenizer, 256
  )
  for tokens, mask in zip(training.tokens[:, 1], training.mask[:, 1], strict=True):
    # It is scored at the token that ends the turn, as a completion is.
    assert start.tokenizer.name(tokens[mask][-1]) == "<|im_end|>"
  assert len(held_out.tokens) == 1


def test_a_model_that_learns_a_template_is_saved_with_it_and_with_what_ends_its_turns(
  place, tmp_path, capsys
):
  transformers = pytest.importorskip("transformers")
  config = sft.Config(
    policy=str(place / "plain"),
    data=write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in CHATS + CHATS[:1]]),
    chat_template=str(place / "marked.jinja"),
    workdir=str(tmp_path / "run"),
    num_iterations=1,
    batch_size=4,
    max_len=200,
  )
  sft.main(config)
  said = " ".join(capsys.readouterr().out.split())
  assert "ends a turn with <|im_end|>, which the model's files do not call an end" in said
  saved = tmp_path / "run" / "model"
  assert (saved / "chat_template.jinja").read_text() == MARKED
  assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [257, 260]
  theirs = transformers.AutoTokenizer.from_pretrained(saved)
  info = load_tokenizer(saved)
  asked = CHATS[0][:1]
  assert data.encode_prompt_texts([asked], info) == [
    theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
  ]
  assert [info.name(i) for i in info.eos_ids] == ["<eos>", "<|im_end|>"]
  assert dataclasses.replace(info, files={}).config_ids["pad_token_id"] == -1


def test_all_tokens_count_where_the_loss_is_on_all(place):
  chatty = inputs.reading(inputs.Sources(), data.CHATS, load_tokenizer(place / "chatty"))
  (whole,) = data.encode_whole([([], CHATS[0])], chatty)
  (turns,) = data.encode_texts([([], CHATS[0])], chatty)
  assert whole.tokens == turns.tokens and all(whole.in_completion)
  assert sum(turns.in_completion) == len("Answer 0") + 1


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """Folders of one random model, saved in several dtypes."""
  folder = tmp_path_factory.mktemp("stored")
  for dtype in ("float32", "bfloat16"):
    params = random_params(policy_model(LLAMA))
    save_policy(folder / dtype, LLAMA, params, tiny_tokenizer(), dtype=dtype)
  return folder


def dtypes_in(params):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


@pytest.mark.parametrize(
  ("in_file", "settings", "of_policy", "of_reference"),
  [
    ("bfloat16", {}, "float32", "bfloat16"),
    ("bfloat16", {"dtype": "bfloat16"}, "float32", "bfloat16"),
    ("bfloat16", {"frozen_dtype": "float32"}, "float32", "float32"),
    ("bfloat16", {"param_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
    ("float32", {}, "float32", "float32"),
    ("float32", {"frozen_dtype": "bfloat16"}, "float32", "bfloat16"),
    ("float32", {"param_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
  ],
)
def test_a_policy_has_no_kl_to_the_reference_that_it_starts_as(
  in_file, settings, of_policy, of_reference, stored
):
  sources = inputs.Sources(**settings)
  models = inputs.load_models(sources, policy=str(stored / in_file), reward_model="")
  assert dtypes_in(models.policy_params) == {of_policy}
  assert dtypes_in(models.reference_params) == {of_reference}
  mesh = parallel.make_mesh("data=1")
  own, frozen = parallel.put_own(mesh, models.policy_params), models.reference_params
  tokens = np.random.default_rng(1).integers(0, 11, (4, 9))

  def log_probs(model, params):
    def apply(params):
      logits = model.hidden(params, tokens, tokens >= 0) @ model.unembedding(params)
      return jax.nn.log_softmax(logits.astype(np.float32))

    return jax.jit(apply)(params)

  ours = log_probs(models.policy, own)
  theirs = log_probs(models.reference, parallel.put_once(mesh, frozen))
  np.testing.assert_array_equal(ours, theirs)


def test_adapters_share_a_base_in_the_dtype_of_its_file(stored):
  sources = inputs.Sources(lora_rank=2, has_value_model=True)
  models = inputs.load_models(sources, policy=str(stored / "bfloat16"), reward_model="")
  assert dtypes_in(models.policy_params) == dtypes_in(models.value_params) == {"float32"}
  assert dtypes_in(models.base) == {"bfloat16"}
  kernels = (x["decoder"]["layers"]["mlp"]["up"]["kernel"] for x in models.base.values())
  reference = models.reference_params["decoder"]["layers"]["mlp"]["up"]["kernel"]
  assert all(kernel is reference for kernel in kernels)


def test_a_policy_with_another_reference_starts_from_its_file_as_it_is(stored):
  sources = inputs.Sources(reference=str(stored / "bfloat16"), frozen_dtype="bfloat16")
  models = inputs.load_models(sources, policy=str(stored / "float32"), reward_model="")
  expected = random_params(policy_model(LLAMA))
  jax.tree.map(np.testing.assert_array_equal, unread.read(models.policy_params), expected)


def test_factors_of_a_reference_are_read_with_their_powers(stored):
  wide = str(stored / "float32")
  assert inputs.factors_of("start, 0.5*a/b,-0.5*uniform") == [
    (1.0, "start"),
    (0.5, "a/b"),
    (-0.5, "uniform"),
  ]
  sources = inputs.Sources(reference=f"0.7*start,0.3*{wide}", frozen_dtype="bfloat16")
  assert fingerprints.paths_of(sources) == [wide]
  models = inputs.load_models(sources, policy=wide, reward_model="")
  assert models.reference.config.width == 2 * models.policy.config.width
  # The policy at the start is rounded as its reference is.
  for own, reference in zip(
    jax.tree.leaves(unread.read(models.policy_params)),
    jax.tree.leaves(unread.read(models.reference_params[0])),
    strict=True,
  ):
    assert reference.dtype == "bfloat16"
    np.testing.assert_array_equal(own, reference.astype(np.float32))


@pytest.mark.parametrize(
  ("reference", "message"),
  [
    ("0*start", "the weight '0' is no finite number other than 0; write e.g. 0.5\\*DIR"),
    ("0.5*start,", "each factor needs a name of its own"),
    ("0.5*start,start", "each factor needs a name of its own"),
    ("0.5*start,0.5*running", "--keep_best=score leaves its best model so far in model_best"),
    ("running/checkpoints/3", "Checkpoints hold the state of training"),
  ],
)
def test_a_reference_that_cannot_be_read_is_told(reference, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "running/checkpoints/3").mkdir(parents=True)
  with pytest.raises(UserError, match=message):
    inputs.check_inputs(inputs.Sources(reference=reference))


def test_a_beginning_of_the_answer_in_the_prompts_follows_the_template_and_excludes_the_flag(
  place, tmp_path
):
  rows = [{"prompt": chat[:1], "prefill": "Answer"} for chat in CHATS]
  prompts = write_rows(tmp_path / "prompts.jsonl", rows)
  models, task = loaded(place, prompts=prompts)
  row = task.training.tokens[0][task.training.mask[0]].tolist()
  assert models.tokenizer.decode_marked(row).endswith("<|im_start|>assistant\nAnswer")
  with pytest.raises(UserError, match=r"--prefill=So is set, and .*jsonl has a column prefill"):
    loaded(place, prompts=prompts, prefill="So")


@pytest.fixture
def stopped(tmp_path):
  """The folder of a run that was stopped after two checkpoints, and the policies in them."""
  first = jax.jit(policy_model(TINY).init)(jax.random.key(1))
  saved = {1: first, 2: jax.tree.map(lambda x: jax.device_put(np.asarray(x) + 1), first)}
  with contextlib.closing(checkpoint.Checkpoints(tmp_path / "run/checkpoints", keep=3)) as writer:
    for n, params in saved.items():
      state = {"params": {"policy": params, "value": {"x": jnp.ones(2)}}, "key": jax.random.key(n)}
      writer.save(n, state | {"opt_state": [jnp.zeros(3)]})
  return tmp_path / "run", saved


def with_reference(place, reference, **settings):
  sources = inputs.Sources(policy=str(place / "chatty"), reference=str(reference), **settings)
  inputs.check_inputs(sources)
  return inputs.load_models(sources, policy=sources.policy, reward_model="")


def test_the_policy_in_a_checkpoint_is_a_reference(place, stopped):
  run, saved = stopped
  for name, n in ((run, 2), (run / "checkpoints/1", 1)):
    models = with_reference(place, name)
    jax.tree.map(np.testing.assert_array_equal, models.reference_params, saved[n])
  both = with_reference(place, f"0.5*start,0.5*{run}", frozen_dtype="bfloat16").reference_params
  assert {x.dtype.name for x in jax.tree.leaves(both)} == {"bfloat16"}
  # A run whose reference has gone on is not resumed with another one.
  before = fingerprints.digests([str(run)])
  shutil.copytree(run / "checkpoints/1", run / "checkpoints/3")
  assert fingerprints.differing(before, fingerprints.digests([str(run)]))


def test_a_checkpoint_of_another_model_or_with_damage_is_no_reference(place, stopped):
  run, saved = stopped
  name = run / "checkpoints/1"
  metadata = name / "_CHECKPOINT_METADATA"
  wide = dataclasses.replace(TINY, mlp_dim=32)
  with pytest.raises(UserError, match=r"is not like the one .* is \[.*\] there and \[.*\] here"):
    checkpoint.policy_params(name, jax.eval_shape(policy_model(wide).init, jax.random.key(0)))
  with pytest.raises(UserError, match=r"is absent there and \[.*trained all of it \(--lora_rank=0"):
    checkpoint.policy_params(name, saved[1] | {"more": {"x": np.ones(2)}})
  record = json.loads(metadata.read_text())
  digests = record["custom_metadata"]["digests"]
  digests.update(dict.fromkeys((x for x in digests if x.startswith("params/policy")), "0" * 16))
  metadata.write_text(json.dumps(record))
  with pytest.raises(UserError, match=r"checkpoint .*/1 is damaged: params/policy.* Name another"):
    with_reference(place, name)


def said_of_shared(run, capsys):
  run()
  return "have a prompt that is trained on too" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("num_prompts", [1, 8])
def test_a_prompt_on_both_sides_of_the_split_is_said_by_all(
  place, tmp_path, capsys, monkeypatch, num_prompts
):
  monkeypatch.setattr(
    dpo_pairs,
    "make_pairs",
    lambda config, policy, params, arrays: dpo_pairs.Pairs(*arrays, np.zeros(arrays[0].shape[:2])),
  )
  rows = [
    {"prompt": f"{i % num_prompts}", "completion": "a", "chosen": "b", "rejected": "c"}
    for i in range(8)
  ]
  policy, path = str(place / "plain"), write_rows(tmp_path / "rows.jsonl", rows)
  info = load_tokenizer(policy)
  of_model = {"policy": policy, "data": path}
  sources = inputs.Sources(policy=policy, prompts=path, has_reference=False)
  models = inputs.load_models(sources, policy=policy, reward_model="")
  for run in (
    lambda: inputs.load_task(sources, models),
    lambda: sft._examples(sft.Config(**of_model), models.policy, info),
    lambda: reward_model._pairs(reward_model.Config(**of_model), info, 256),
    lambda: dpo_pairs.own_start(dpo.Config(**of_model, max_completion_len=8)),
  ):
    assert said_of_shared(run, capsys) == (num_prompts == 1)
