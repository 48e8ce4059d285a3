"""The inputs of a run of reinforcement learning: its models, prompts and rewards.

check_inputs -> load_models -> load_task
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from klrl.algorithm.terms import Texts, texts_of
from klrl.devices import processes, unread
from klrl.devices.unread import stored_as
from klrl.errors import UserError
from klrl.models import (
  Policy,
  ScalarModel,
  TokenizerInfo,
  add_lora,
  chat,
  check_tokenizer,
  difference,
  load_tokenizer,
  open_policy,
  open_scalar,
  policy_model,
  product_policy,
  scalar_model,
  scalar_params_from,
  shared_tokens,
  uniform_policy,
)
from klrl.run import checkpoint, progress
from klrl.tasks import data, math_answers, rewards
from klrl.tasks.registry import TASKS
from klrl.tasks.verifier import Verifier, answer_tokens

EMBEDDED = "embedded"  # stands for the model of a stage that is not run
UNIFORM, START = "uniform", "start"  # references that need no directory
_HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
  """Where models, prompts and scores of a run come from; "" is a source that it does without.

  `policy`, `reward_model` and `value_model` are model directories.
  """

  policy: str = ""
  """What the user gave; a stage may leave another one in its place."""
  reference: str = ""
  """As `factors_of` takes it; else the policy as it starts."""
  reward_model: str = ""
  value_model: str = ""
  value_init: str = "reward_model"
  """What a value model without a directory starts as: `reward_model` or `policy`."""
  has_reference: bool = True
  has_value_model: bool = False
  shared_trunk: bool = False
  """Whether the value model is a head on the policy."""
  task: str = "arithmetic"
  """The embedded task, where there are no `prompts`."""
  prompts: str = ""
  prompt_template: str = "{prompt}"
  chat: bool = False
  """Whether prompts that are text are what the user says in a chat."""
  chat_template: str = ""
  """A file, or the name of one of the policy's templates; else its default."""
  system_prompt: str = ""
  stop_tokens: str = ""
  """What ends a completion beside the policy's EOS, see `chat.with_stop_tokens`."""
  reward: str = ""
  """As `rewards.load_rewards` takes it; else the reward model scores."""
  reward_timeout: float = 0.0
  reward_retries: int = 0
  pretrain_data: str = ""
  """A file of texts; "" where there are none, and where the reference writes them."""
  max_prompt_len: int = 0
  max_completion_len: int = 0
  prefill: str = ""
  """What every completion begins with, given and not learnt."""
  enumerated: bool = False
  """Whether all completions are, beside what the objective is worth at its best."""
  lora_rank: int = 0
  dtype: str = "float32"
  param_dtype: str = "float32"
  frozen_dtype: str = "file"
  remat: str = "none"
  sampler_dtype: str = "trainer"
  init_seed: int = 0
  data_seed: int = 0


class Models(NamedTuple):
  """The models of a run, as pure functions and parameters; those that it lacks are None.

  `policy_params` and `value_params` are trained. If they are adapters, `base` has the other
  parameters of both, {"policy": ..., "value": ...}, which the reference shares.
  """

  tokenizer: TokenizerInfo
  policy: Policy
  policy_params: dict
  base: dict
  sampler: Policy  # the policy in the sampler's arithmetic
  reference: Policy | None
  reference_params: dict | None
  value_model: ScalarModel | None
  value_params: dict | None
  reward_model: ScalarModel | None
  reward_params: dict | None
  policy_path: str = ""  # where the policy was, as its user names it


class Task(NamedTuple):
  """The prompts to train on and to judge by, and the scores of completions."""

  training: data.Prompts
  held_out: data.Prompts
  max_completion_len: int
  rewards: list[rewards.Reward]  # if empty, the reward model scores on the device
  verifier: Verifier | None
  pretraining: Texts | None  # mixed into the loss
  prefill: tuple[int, ...] = ()  # tokens with which every completion begins
  exact: Any = None  # a `tree.Exact` where all completions are enumerated


@processes.together
def check_inputs(sources: Sources) -> None:
  """Raises UserError if a directory, file or function that is named cannot be used."""
  directories = (sources.policy, *references_of(sources), sources.reward_model, sources.value_model)
  named = dict.fromkeys(x for x in directories if x not in ("", EMBEDDED))
  tokenizers = {directory: load_tokenizer(directory) for directory in named}
  if sources.prompts:
    records = data.read_prompts(sources.prompts, sources.prompt_template, asking(sources))
    if sources.policy in tokenizers:
      tokenizer = reading(sources, _kind(sources), tokenizers[sources.policy])
      data.encode_prompt_texts([records[0]["prompt"]], tokenizer)
  else:
    records = TASKS[sources.task].prompts(held_out=True)
  if sources.reward:
    rewards.check_rewards(sources.reward, records, patience_of(sources))
  if sources.pretrain_data:
    _pretraining_texts(sources.pretrain_data)


def factors_of(reference: str) -> list[tuple[float, str]]:
  """Returns the powers and the names of the factors of a reference, `[POWER*]NAME,...`.

  A name is a model directory, a checkpoint as `checkpoint.named` takes it, `uniform`, or `start`,
  which is the policy at the start. One name without a power is that model itself; see
  `product_policy` for several.

  Raises:
    UserError: a power is 0 or not finite, or a name is empty or there twice.
  """
  if not reference:
    return []
  factors = [rewards.weighted(item, "In the reference, ", "DIR") for item in reference.split(",")]
  names = [name for _, name in factors]
  if "" in names or len({*names}) < len(names):
    raise UserError(
      f"In the reference {reference} each factor needs a name of its own: 0.5*start,0.5*DIR."
    )
  return factors


def references_of(sources: Sources) -> list[str]:
  """Returns the directories of models that the reference is made of, beside the policy's."""
  names = (name for _, name in factors_of(sources.reference))
  return [name for name in names if name not in (UNIFORM, START) and not checkpoint.named(name)]


def patience_of(sources: Sources) -> rewards.Patience:
  """Returns how long a reward function may take, and how often one that failed is called again."""
  return rewards.Patience(sources.reward_timeout, sources.reward_retries)


class Loaders(NamedTuple):
  """The functions that read a model directory; each takes its path.

  `checkpoint` takes the folder of a checkpoint and params that are like those of its policy.
  """

  policy: Callable = open_policy
  scalar: Callable = open_scalar
  tokenizer: Callable = load_tokenizer
  checkpoint: Callable = checkpoint.policy_params


FROM_DISK = Loaders()


@processes.together
def load_models(
  sources: Sources, *, policy: str, reward_model: str, loaders: Loaders = FROM_DISK
) -> Models:
  """Returns the models in the directories `policy` and `reward_model` ("" for none).

  The reference is that of `factors_of`, or else the policy at the start. A value model starts as
  `sources.value_model`, or else as a copy of the reward model, or else as a copy of the policy's
  trunk with a zero head; with a shared trunk it is a zero head on the policy. Parameters are left
  in their files, to be read by `parallel.put`. `loaders` may return models that have no files.

  Raises:
    UserError: a directory does not hold such a model, or the tokenizers differ.
  """
  others = (*references_of(sources), reward_model, sources.value_model)
  tokenizer, num_tokens = _vocabulary(policy, others, loaders.tokenizer)
  kind = _kind(sources)
  tokenizer = reading(sources, kind, tokenizer)
  if _are_chats(sources, kind):
    _say_other_templates(tokenizer, others, loaders.tokenizer)

  def loaded(load, directory):
    model_config, params = load(directory)
    if model_config.vocab_size < num_tokens:
      raise UserError(
        f"The model in {directory} has vocab_size={model_config.vocab_size}, but the tokenizer's "
        f"ids go up to {num_tokens - 1}: this tokenizer belongs to another model."
      )
    return computing(sources, (model_config, params), num_tokens)

  def frozen(load, directory):
    model_config, params = loaded(load, directory)
    return model_config, stored_as(params, sources.frozen_dtype)

  base_config, params = loaded(loaders.policy, policy)
  factors = factors_of(sources.reference) or [(1.0, START)]
  shares_start = sources.has_reference and START in (name for _, name in factors)
  base_params = start_params(sources, params, has_frozen=shares_start or sources.lora_rank > 0)
  check_tokenizer(tokenizer, base_config)
  policy_key, value_key = jax.random.split(jax.random.key(sources.init_seed))
  policy_config, policy_params, policy_base = add_lora(
    base_config, base_params, policy_key, rank=sources.lora_rank
  )
  policy_params = stored_as(policy_params, sources.param_dtype)
  base = {"policy": policy_base} if policy_base else {}
  reference = reference_params = scorer = reward_params = value_model = value_params = None

  def factor(name):
    if name == UNIFORM:
      return uniform_policy(num_tokens, base_config.max_len), {}
    if name == START:
      return policy_model(base_config), base_params
    if folder := checkpoint.named(name):
      saved = loaders.checkpoint(folder, params)
      return policy_model(base_config), stored_as(saved, sources.frozen_dtype)
    model_config, own = frozen(loaders.policy, name)
    return policy_model(model_config), own

  if sources.has_reference:
    powers, names = zip(*factors, strict=True)
    models, params_of_factors = zip(*map(factor, names), strict=True)
    if powers == (1.0,):
      (reference,), (reference_params,) = models, params_of_factors
    else:
      reference, reference_params = product_policy(models, powers), params_of_factors
  if reward_model:
    reward_config, reward_params = frozen(loaders.scalar, reward_model)
    scorer = scalar_model(reward_config)
  if sources.has_value_model:
    if sources.shared_trunk:
      value_config = policy_config
      head = {"head": scalar_params_from(base_params)["head"]}
      value_params = stored_as(head, sources.param_dtype)
    else:
      if sources.value_model:
        load = frozen if sources.lora_rank else loaded
        start = load(loaders.scalar, sources.value_model)
      elif reward_model and sources.value_init == "reward_model":
        start = reward_config, reward_params
      else:
        start = base_config, scalar_params_from(base_params)
      value_config, value_params, value_base = add_lora(*start, value_key, rank=sources.lora_rank)
      value_params = stored_as(value_params, sources.param_dtype)
      base |= {"value": value_base} if value_base else {}
    value_model = scalar_model(value_config)
  if scorer_of := TASKS[sources.task].scorer:
    scorer, reward_params = scorer_of(policy_config)
  sampler_dtype = sources.dtype if sources.sampler_dtype == "trainer" else sources.sampler_dtype
  return Models(
    tokenizer,
    policy_model(policy_config),
    policy_params,
    base,
    policy_model(dataclasses.replace(policy_config, dtype=sampler_dtype)),
    reference,
    reference_params,
    value_model,
    value_params,
    scorer,
    reward_params,
    policy,
  )


def _vocabulary(policy, others, load) -> tuple[TokenizerInfo, int]:
  """Returns the policy's tokenizer, and how many of its tokens all models of the run have.

  Raises:
    UserError: another model has another vocabulary.
  """
  tokenizer = load(policy)
  num_tokens = tokenizer.num_tokens
  for directory in others:
    if directory in ("", policy):
      continue
    other = load(directory)
    num_shared = shared_tokens(tokenizer, other)
    if num_shared is None:
      raise UserError(
        f"The model in {directory} has another vocabulary than the policy: "
        f"{difference(tokenizer, other)}; all models of a run read the same tokens."
      )
    num_tokens = min(num_tokens, num_shared)
  if tokenizer.pad_id >= num_tokens:
    # Padding is always masked, so any token serves for which all models have a row.
    tokenizer = dataclasses.replace(tokenizer, pad_id=tokenizer.eos_id or 0)
  return tokenizer, num_tokens


def computing(config, model, num_tokens: int):
  """Returns (config of the model with the dtypes and `remat` of the run's `config`, params).

  Rows beyond `num_tokens`, which only fill a vocabulary up, are never predicted.
  """
  model_config, params = model
  names = ("dtype", "param_dtype", "remat")
  settings = {name: getattr(config, name) for name in names} | {"num_tokens": num_tokens}
  return dataclasses.replace(model_config, **settings), params


def start_params(config, params, *, has_frozen: bool):
  """Returns the params of a policy's file as the run starts from them, and as its reference is.

  The policy and a reference that it starts as hold the same numbers, so that their KL is 0: they
  are rounded to the dtype of either.

  Args:
    config: its `lora_rank`, `param_dtype` and `frozen_dtype` are read.
    params: of the policy.
    has_frozen: whether a frozen model, the reference or LoRA's base, shares them.
  """
  if has_frozen:
    params = stored_as(params, config.frozen_dtype)
  is_rounded = not config.lora_rank and config.param_dtype == "bfloat16"
  return stored_as(params, "bfloat16") if is_rounded else params


def asking(config) -> data.Asking:
  """Returns what the fields `chat` and `system_prompt` of a config add to the data."""
  return data.Asking(config.chat, config.system_prompt)


def _kind(sources: Sources) -> str:
  """Returns what the prompts of a run are, see `columns.kind_of`; "" for the embedded task's."""
  if not sources.prompts:
    return ""
  return data.kind_of(sources.prompts, data.read_prompts, sources.prompt_template)


def _are_chats(config, kind: str) -> bool:
  return bool(kind) and (config.chat or kind == data.CHATS)


def _say_other_templates(tokenizer: TokenizerInfo, others, load) -> None:
  """Says which other models have learnt chats in another form than they get in this run."""
  ours = chat.template_of(tokenizer)
  for directory in dict.fromkeys(others):
    theirs = load(directory).chat_templates if directory else {}
    if theirs and ours not in theirs.values():
      progress.warn_once(
        f"The model in {directory} has another chat template than the one that writes the prompts "
        "of this run, so it may read chats in a form that it has not learnt. --chat_template takes "
        "its chat_template.jinja for all."
      )


def reading(config, kind: str, tokenizer: TokenizerInfo) -> TokenizerInfo:
  """Returns the tokenizer as a run reads its data by it: with its chat template and all its EOS.

  Args:
    config: its `chat`, `chat_template` and `stop_tokens` are read.
    kind: of the data, see `columns.kind_of`; "" for those of the embedded task. Where they are
      chats, what ends a turn of the template is an EOS.
    tokenizer: that of the model.

  Raises:
    UserError: the template or a token does not exist, chats have no template, or a template has
      no chats.
  """
  are_chats = _are_chats(config, kind)
  if config.chat_template and not are_chats:
    raise UserError(
      "--chat_template is set, but nothing reads it: the data are text. Add --chat, which makes "
      "prompts what the user says."
    )
  if config.chat_template:
    tokenizer = chat.with_template(tokenizer, config.chat_template)
  if config.stop_tokens:
    tokenizer = chat.with_stop_tokens(tokenizer, config.stop_tokens)
  if are_chats:
    return chat.with_end_of_turn(tokenizer)
  if kind == data.TEXT and tokenizer.chat_templates:
    progress.warn_once(
      "The data are text, and the model has a chat template, which it does not see without --chat. "
      "With that, prompts are what the user says."
    )
  return tokenizer


def load_start(
  config,
  directory: str,
  reader: Callable,
  *,
  has_reference: bool = False,
  loaders: Loaders = FROM_DISK,
):
  """Returns the config, params and tokenizer of the language model that a stage starts from.

  The params are unread, and as `start_params` returns them. `reader` is what reads `config.data`.
  `loaders` may return a model that has no files.

  Raises:
    UserError: the directory does not hold such a model, or `reading` refuses.
  """
  (model_config, params), tokenizer = loaders.policy(directory), loaders.tokenizer(directory)
  kind = data.kind_of(config.data, reader) if config.data else ""
  tokenizer = reading(config, kind, tokenizer)
  check_tokenizer(tokenizer, model_config)
  params = start_params(config, params, has_frozen=has_reference or config.lora_rank > 0)
  return *computing(config, (model_config, params), tokenizer.num_tokens), tokenizer


@processes.together
def _prefill(text: str, tokenizer: TokenizerInfo, max_completion_len: int) -> tuple[int, ...]:
  """Returns the tokens of what completions begin with."""
  ids = tuple(tokenizer.encode_bare([text])[0].ids) if text else ()
  if len(ids) >= max_completion_len:
    raise UserError(
      f"--prefill={text} has {len(ids)} tokens, which leaves nothing of --max_completion_len="
      f"{max_completion_len} to the policy."
    )
  return ids


def load_task(sources: Sources, models: Models) -> Task:
  """Returns the embedded task, or the prompts and the reward, that are named.

  Raises:
    UserError: the prompt file or the reward function cannot be used.
  """
  embedded = None if sources.prompts else TASKS[sources.task]
  if embedded is None:
    max_completion_len = sources.max_completion_len or 64
    records = data.read_prompts(sources.prompts, sources.prompt_template, asking(sources))
    if sources.max_prompt_len:
      kept = data.short_prompts(records, models.tokenizer, max_prompt_len=sources.max_prompt_len)
      progress.console.print(f"{len(kept)} of {len(records)} prompts are short enough")
      records = kept
    if len(records) < 2:
      raise UserError(f"{sources.prompts} has one prompt; at least one more is needed to hold out.")
    order = np.random.default_rng((sources.data_seed, 3)).permutation(len(records))
    num_held_out = max(1, int(_HELD_OUT_SHARE * len(records)))
    parts = [records[i] for i in order[num_held_out:]], [records[i] for i in order[:num_held_out]]
    data.warn_of_shared_prompts(*([record["prompt"] for record in part] for part in parts))
  else:
    max_completion_len = sources.max_completion_len or embedded.max_completion_len
    parts = tuple(embedded.prompts(held_out=held_out) for held_out in (False, True))
  context = min(
    model.config.max_len
    for model in (models.policy, models.reference, models.value_model, models.reward_model)
    if model
  )
  if max_completion_len >= context:
    raise UserError(
      f"--max_completion_len={max_completion_len} leaves no room for a prompt: the smallest "
      f"context of the models holds {context} tokens."
    )
  if sources.prefill and any(record.get(data.PREFILL) for part in parts for record in part):
    raise UserError(
      f"--prefill={sources.prefill} is set, and {sources.prompts} has a column {data.PREFILL}, "
      "which begins the answer to each row. Leave one of them out."
    )
  prefill = _prefill(sources.prefill, models.tokenizer, max_completion_len)
  training, held_out = (
    data.encode_prompts(part, models.tokenizer, max_prompt_len=context - max_completion_len)
    for part in parts
  )
  for part in (training, held_out):
    _check_tokens(part.tokens, models, sources.prompts)
  if embedded and embedded.has_one_answer:
    training, held_out = (
      part._replace(
        answers=answer_tokens(part.records, models.tokenizer, max_completion_len=max_completion_len)
      )
      for part in (training, held_out)
    )
  row_len = training.tokens.shape[1] + max_completion_len
  pretraining = sources.pretrain_data and _pretraining(
    sources.pretrain_data, models.tokenizer, row_len
  )
  if pretraining:
    _check_tokens(pretraining.tokens, models, sources.pretrain_data)
  patience = patience_of(sources)
  weighted = rewards.load_rewards(sources.reward, patience) if sources.reward else []
  if weighted and data.is_chat(training.records[0]["prompt"]):
    progress.console.print(
      'Prompts are chats: a reward function gets each completion as [{"role": "assistant", '
      '"content": ...}].',
      soft_wrap=True,
    )
  verifier = embedded.verifier if embedded else None
  if any(reward.name == rewards.MATH for reward in weighted):
    verifier = math_answers.VERIFIER
  return Task(
    training,
    held_out,
    max_completion_len,
    weighted,
    verifier,
    pretraining or None,
    prefill,
    embedded.exact(models.policy, models.reference, unread.read(models.reference_params))
    if embedded and sources.enumerated
    else None,
  )


def _check_tokens(tokens, models: Models, source: str) -> None:
  num_tokens = models.policy.config.num_tokens
  if tokens.max() >= num_tokens > 0:
    raise UserError(
      f"{source}: a text holds a token that only the policy has; its id is {num_tokens} or more, "
      "and another model has no row for it."
    )


def _pretraining_texts(path: str) -> list[str]:
  if data.is_text(path):
    return data.read_documents(path)
  return [record["text"] for record in data.read_records(path, ("text",))]


def _pretraining(path: str, tokenizer: TokenizerInfo, row_len: int) -> Texts:
  """Returns the pretraining texts, cut to `row_len` tokens, the length of a rollout's rows."""
  texts = [("", text) for text in _pretraining_texts(path)]
  encoded = data.windows(data.encode_texts(texts, tokenizer), row_len)
  examples = data.examples_of(encoded, tokenizer.pad_id)
  return texts_of(examples.tokens, examples.mask)
