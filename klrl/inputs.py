"""What a run of reinforcement learning starts from: models, prompts and how completions are scored.

check_inputs -> load_models -> load_task
"""

from typing import NamedTuple

import numpy as np

from klrl.epochs import Texts
from klrl.errors import UserError
from klrl.models import (
  Policy,
  ScalarModel,
  TokenizerInfo,
  check_tokenizer,
  load_policy,
  load_scalar,
  load_tokenizer,
  policy_model,
  scalar_model,
  scalar_params_from,
)
from klrl.tasks import arithmetic, data, rewards

_HELD_OUT_SHARE = 0.1


class Models(NamedTuple):
  """The models of a run, pure functions and parameters; absent ones are None."""

  tokenizer: TokenizerInfo
  policy: Policy
  policy_params: dict
  reference: Policy | None
  reference_params: dict | None
  value_model: ScalarModel | None
  value_params: dict | None
  reward_model: ScalarModel | None
  reward_params: dict | None


class Task(NamedTuple):
  """Prompts to train on and to judge by, and how completions are scored."""

  training: data.Prompts
  held_out: data.Prompts
  max_completion_len: int
  reward_fn: rewards.RewardFn | None  # None: the reward model scores on the device
  pretraining: Texts | None  # mixed into the loss


def check_inputs(config) -> None:
  """Raises UserError where a directory, file or function that the config names cannot be used."""
  for name in ("policy", "reference", "reward_model", "value_model"):
    if getattr(config, name):
      load_tokenizer(getattr(config, name))
  if config.prompts:
    data.read_records(config.prompts, ("prompt",))
  if config.reward:
    rewards.load_reward_fn(config.reward)


def load_models(config, *, policy: str, reward_model: str) -> Models:
  """Returns the models in the directories `policy` and `reward_model` ("" for none).

  The reference is `config.reference`, else the policy as it starts; it is left out when nothing
  measures or penalises a KL to it. The value model, where the advantage has a use for one, is
  `config.value_model`, else it starts as a copy of the reward model, else of the policy's trunk
  with a zero head.

  Raises:
    UserError: a directory that does not hold what it should, or tokenizers that differ.
  """
  policy_config, policy_params = load_policy(policy)
  tokenizer = load_tokenizer(policy)
  check_tokenizer(tokenizer, policy_config)
  reference = reference_params = scorer = reward_params = None
  if config.kl_placement != "none" or config.kl_every:
    reference_config, reference_params = policy_config, policy_params
    if config.reference:
      reference_config, reference_params = load_policy(config.reference)
      _check_fits(tokenizer, policy_config, config.reference, reference_config, "--reference")
    reference = policy_model(reference_config)
  if reward_model:
    reward_config, reward_params = load_scalar(reward_model)
    _check_fits(tokenizer, policy_config, reward_model, reward_config, "--reward_model")
    scorer = scalar_model(reward_config)
  value_model = value_params = None
  if config.advantage == "gae":
    if config.value_model:
      value_config, value_params = load_scalar(config.value_model)
      _check_fits(tokenizer, policy_config, config.value_model, value_config, "--value_model")
    elif reward_model:
      value_config, value_params = reward_config, reward_params
    else:
      value_config, value_params = policy_config, scalar_params_from(policy_params)
    value_model = scalar_model(value_config)
  return Models(
    tokenizer,
    policy_model(policy_config),
    policy_params,
    reference,
    reference_params,
    value_model,
    value_params,
    scorer,
    reward_params,
  )


def _check_fits(tokenizer: TokenizerInfo, policy_config, directory, config, flag: str) -> None:
  same_tokens = load_tokenizer(directory).tokenizer.get_vocab() == tokenizer.tokenizer.get_vocab()
  if not same_tokens or config.vocab_size != policy_config.vocab_size:
    raise UserError(
      f"{flag}={directory} has another vocabulary than the policy; all models of a run read the "
      "same tokens."
    )


def load_task(config, models: Models) -> Task:
  """Returns the embedded arithmetic task, or the prompts and the reward that the config names.

  Raises:
    UserError: a prompt file or reward function that cannot be used.
  """
  reward_fn = rewards.load_reward_fn(config.reward) if config.reward else None
  if config.prompts:
    max_completion_len = config.max_completion_len or 64
    records = data.read_records(config.prompts, ("prompt",))
    if len(records) < 2:
      raise UserError(f"{config.prompts} has one prompt; at least one more is needed to hold out.")
    order = np.random.default_rng((config.data_seed, 3)).permutation(len(records))
    num_held_out = max(1, int(_HELD_OUT_SHARE * len(records)))
    parts = [records[i] for i in order[num_held_out:]], [records[i] for i in order[:num_held_out]]
  else:
    max_completion_len = config.max_completion_len or arithmetic.MAX_COMPLETION_LEN
    parts = tuple(arithmetic.prompt_records(held_out=held_out) for held_out in (False, True))
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
  training, held_out = (
    data.encode_prompts(part, models.tokenizer, max_prompt_len=context - max_completion_len)
    for part in parts
  )
  if not config.prompts:
    training, held_out = (
      part._replace(
        answers=arithmetic.answer_tokens(
          part.records, models.tokenizer, max_completion_len=max_completion_len
        )
      )
      for part in (training, held_out)
    )
  pretraining = None
  if config.pretrain_data:
    examples = data.encode_examples(
      [("", record["text"]) for record in data.read_records(config.pretrain_data, ("text",))],
      models.tokenizer,
      max_len=models.policy.config.max_len,
    )
    pretraining = Texts(examples.tokens, examples.mask)
  return Task(training, held_out, max_completion_len, reward_fn, pretraining)
