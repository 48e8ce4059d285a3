"""Every flag of the laboratory and of best-of-n changes what its figures are made from.

What takes time is replaced by something that writes down how it was called: a figure is a function
of these calls alone, so two equal records are two equal runs.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from small_decoders import arithmetic_decoder

from experiments import (
  best_of_n,
  diversity,
  estimators,
  evaluate,
  kl_audit,
  kl_directions,
  kl_variance,
  mismatch,
  mode_seeking,
  over_optimisation,
  paper,
  ppo,
  reinforce,
  reward_model,
  sft,
  sweep,
)
from experiments.lab import laboratory, papers
from klrl import judging
from klrl.models import policy_model, save_policy, save_scalar, scalar_model
from klrl.run.workdir import find_workdir
from klrl.sampling import Rollout
from klrl.tasks import arithmetic

MODULES = (
  kl_audit, mode_seeking, kl_directions, estimators, best_of_n, evaluate, kl_variance, mismatch,
  paper, over_optimisation, diversity,
)  # fmt: skip
LANGUAGE = functools.cache(mode_seeking.make_language)  # as no flag changes it
EXPERIMENTS = {module.__name__.split(".")[-1]: module for module in MODULES}


class Case(NamedTuple):
  """A change of one flag: its new value and the settings around it."""

  value: Any
  given: Mapping[str, Any] = types.MappingProxyType({})


OWN_MODELS = {"policy": "policy", "reference": "other"}
OWN_POLICY = {
  "policy": "policy",
  "prompts": "own.jsonl",
  "reward": "reward.py:length",
  "num_prompts": 3,
  "completions_per_prompt": 8,
  "n": "1,2",
  "max_completion_len": 3,
}
OWN_SCORER = OWN_POLICY | {"reward": "", "reward_model": "reward_model"}
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.content }}"
  "{{ eos_token if m.role == 'assistant' else '+' }}{% endfor %}"
)


def chat_cases(given) -> dict[str, Case]:
  """Returns the cases of `ChatFields`."""
  return {
    "chat": Case(True, given),
    "chat_template": Case("other.jinja", given | {"chat": True}),
    "system_prompt": Case("1", given | {"chat": True}),
    "stop_tokens": Case("7", given),
  }


JUDGED = {
  "policy": "policy",
  "reference": "policy",
  "prompts": "own.jsonl",
  "reward": "reward.py:length",
  "max_completion_len": 3,
  "num_eval_rows": 4,
}
MEASURED = OWN_MODELS | {"prompts": "own.jsonl", "max_completion_len": 3, "num_completions": 4}
CASES = {
  "over_optimisation": {
    "seed": Case(1),
    "widths": Case("8,16"),
    "preferences": Case("8,9"),
    "reward_model_iterations": Case(9),
    "sft_iterations": Case(9),
    "num_iterations": Case(9),
    "seeds": Case(1),
    "n": Case("1,2"),
    "num_prompts": Case(9),
    "completions_per_prompt": Case(99),
    "num_completions": Case(99),
    "resamplings": Case(11),
  },
  "diversity": {
    "seed": Case(1),
    "gain": Case(0.5),
    "k": Case(2),
    "num_steps": Case(9),
    "learning_rate": Case(0.1),
    "num_iterations": Case(9),
    "betas": Case("1,2"),
  },
  "paper": {"seed": Case(1, {"name": "one"}), "name": Case("two", {"name": "one"})},
  "kl_variance": {
    "seed": Case(1, MEASURED),
    "task": Case("tree"),
    "policy": Case("third", MEASURED),
    "reference": Case("third", MEASURED),
    "prompts": Case("other.jsonl", MEASURED),
    "prompt_template": Case("{prompt}{prompt}", MEASURED),
    "max_prompt_len": Case(5, MEASURED),
    "max_completion_len": Case(2, MEASURED),
    "num_completions": Case(6, MEASURED),
    **chat_cases(MEASURED),
  },
  "mismatch": {"seed": Case(1), "num_iterations": Case(9), "seeds": Case(1)},
  "kl_audit": {"seed": Case(1), "beta": Case(0.25), "num_trees": Case(3)},
  "mode_seeking": {"seed": Case(1), "num_steps": Case(9), "learning_rate": Case(0.5)},
  "kl_directions": {
    "seed": Case(1),
    "num_iterations": Case(9),
    "beta": Case(0.25),
    "trust_region_beta": Case(0.5),
    "epochs": Case("1,2"),
  },
  "estimators": {
    "seed": Case(1),
    "policy": Case("third", OWN_MODELS),
    "reference": Case("third", OWN_MODELS),
    "completions_per_prompt": Case(2, OWN_MODELS),
  },
  "best_of_n": {
    "sft_iterations": Case(9),
    "reward_model_iterations": Case(9),
    "init_seed": Case(1),
    "task": Case("tree", {"num_prompts": 2, "completions_per_prompt": 8, "n": "1,2"}),
    "seed": Case(1, OWN_POLICY),
    "policy": Case("other", OWN_POLICY),
    "prompts": Case("other.jsonl", OWN_POLICY),
    "prompt_template": Case("{prompt}{prompt}", OWN_POLICY),
    "max_prompt_len": Case(5, OWN_POLICY),
    "reward": Case("reward.py:sevens", OWN_POLICY),
    "reward_model": Case("other_reward_model", OWN_SCORER),
    "max_completion_len": Case(2, OWN_POLICY),
    "n": Case("1,3", OWN_POLICY),
    "completions_per_prompt": Case(4, OWN_POLICY),
    "num_prompts": Case(2, OWN_POLICY),
    "num_enumerated": Case(0, OWN_POLICY),
    "data_seed": Case(1, OWN_POLICY),
    "temperature": Case(0.25, OWN_POLICY),
    "mesh": Case("data=2", OWN_POLICY),
    "eval_batch_size": Case(4, OWN_POLICY),
    "compare": Case("run", OWN_POLICY),
    **chat_cases(OWN_POLICY),
  },
  "evaluate": {
    "sft_iterations": Case(9),
    "reward_model_iterations": Case(9),
    "init_seed": Case(1),
    "task": Case("tree"),
    "seed": Case(1, JUDGED),
    "policy": Case("other", JUDGED),
    "reference": Case("other", JUDGED),
    "prompts": Case("other.jsonl", JUDGED),
    "prompt_template": Case("{prompt}{prompt}", JUDGED),
    "max_prompt_len": Case(5, JUDGED),
    "held_out": Case(True, JUDGED),
    "reward": Case("reward.py:sevens", JUDGED),
    "reward_model": Case("other_reward_model", JUDGED | {"reward": ""}),
    "max_completion_len": Case(2, JUDGED),
    "num_eval_rows": Case(6, JUDGED),
    "eval_batch_size": Case(3, JUDGED),
    "eval_completions": Case(2, JUDGED),
    "num_samples": Case(1, JUDGED),
    "data_seed": Case(1, JUDGED | {"held_out": True}),
    "temperature": Case(0.25, JUDGED),
    "dtype": Case("bfloat16", JUDGED),
    "mesh": Case("data=2", JUDGED),
    **chat_cases(JUDGED),
  },
}
for experiment, cases in CASES.items():
  given = {
    "best_of_n": OWN_POLICY,
    "estimators": OWN_MODELS,
    "evaluate": JUDGED,
    "kl_variance": MEASURED,
    "paper": {"name": "one"},
  }.get(experiment, {})
  cases["workdir"] = Case("elsewhere", given)


def fields_of(experiment) -> list[str]:
  return [field.name for field in dataclasses.fields(EXPERIMENTS[experiment].Config)]


class Enough(Exception):
  """All has been written down that is."""


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
  """A folder with models, prompts, rewards and a finished run."""
  with contextlib.chdir(tmp_path_factory.mktemp("flags")):
    tokenizer = arithmetic.make_tokenizer()
    config = arithmetic_decoder(num_heads=1, mlp_dim=8, max_len=24)
    for make, save, names in (
      (policy_model, save_policy, ("policy", "other", "third")),
      (scalar_model, save_scalar, ("reward_model", "other_reward_model")),
    ):
      shapes = jax.eval_shape(make(config).init, jax.random.key(0))
      for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        params = jax.tree.map(lambda x, rng=rng: np.float32(rng.normal(size=x.shape)), shapes)
        save(pathlib.Path(name), config, params, tokenizer)
    pathlib.Path("policy/chat_template.jinja").write_text(TEMPLATE)
    pathlib.Path("other.jinja").write_text(TEMPLATE.replace("+", "="))
    for name, first in (("own", 0), ("other", 10)):
      prompts = [f"{'7' * (i % 3)}{i}+1=" for i in range(first, first + 60)]
      lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
      pathlib.Path(f"{name}.jsonl").write_text(lines)
    pathlib.Path("reward.py").write_text(
      "def length(prompts, completions, **columns):\n"
      "  return [float(sum(map(ord, str(p) + str(c)))) for p, c in zip(prompts, completions)]\n"
      "def sevens(prompts, completions, **columns):\n"
      "  return [float(c.count('7')) for c in completions]\n"
    )
    pathlib.Path("run").mkdir()
    figures = dict.fromkeys(("score_before", "score_after", "kl_ref_exact"), 1.0)
    pathlib.Path("run/summary.json").write_text(json.dumps(figures | {"kl_ref_exact_stderr": 0.1}))
    yield


def plain(x) -> str:
  """Returns text that is the same for the same arrays and settings."""
  if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if isinstance(x, np.ndarray | jax.Array):
    return repr(np.asarray(x).tolist())
  if isinstance(x, dict):
    return repr({str(key): plain(value) for key, value in x.items()})
  if isinstance(x, list | tuple):
    return repr([plain(value) for value in x])
  return re.sub(r" at 0x[0-9a-f]+", "", repr(x))


def record_of(experiment, settings) -> list[str]:
  """Returns the folder of a run, and all calls that its figures are made from."""
  module, calls = EXPERIMENTS[experiment], []

  def noted(*arguments, returns=None, **more):
    calls.append(plain([arguments, {k: v for k, v in more.items() if k != "root"}]))
    if isinstance(returns, type) and issubclass(returns, Exception):
      raise returns
    return returns

  def computed(config, name, file, compute, *_, root):
    workdir = find_workdir(name, config, root=root)
    if config.workdir:
      calls.append(str(workdir))
    with contextlib.suppress(Enough):
      calls.append(plain(compute(workdir)))
    return workdir

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(laboratory, "conduct", computed)
    replacements[experiment](patch, functools.partial(functools.partial, noted))
    module.main(module.Config(**settings))
  return calls


def replace_in_kl_audit(patch, noted):
  for name in ("figures", "ends", "describe_tree"):
    returns = Enough if name == "describe_tree" else []
    patch.setattr(kl_audit.kl_figures, name, noted(returns=returns))
  # The figures are asked for by row; without rows there are none to take apart.
  for name in ("_penalties", "_refreshed", "_capped", "_whole", "_peers"):
    patch.setattr(kl_audit, name, list)
  patch.setattr(kl_audit, "_divergences", lambda *_: [])
  patch.setattr(kl_audit.kl_figures, "ends_on_bandit", lambda _: [])
  patch.setattr(kl_audit.kl_peers_summary, "write", lambda *_: None)


def replace_in_mode_seeking(patch, noted):
  patch.setattr(mode_seeking, "make_language", LANGUAGE)
  patch.setattr(mode_seeking, "gaussian_results", dict)
  patch.setattr(mode_seeking, "three_tokens", dict)
  patch.setattr(mode_seeking, "make_descent", lambda loss: noted(returns=Enough))


def leave_pictures_out(patch, module):
  """Reads and draws no figures that were kept, for none are."""
  patch.setattr(module, "schema", types.SimpleNamespace(read=lambda _: {}))
  for name in ("write_passes", "write_noise"):
    patch.setattr(module.note_pictures, name, lambda *_: None)


def replace_in_kl_directions(patch, noted):
  patch.setattr(kl_directions, "create_workdir", lambda *_: None)
  patch.setattr(kl_directions, "exact_studies", dict)
  patch.setattr(ppo, "main", noted(returns=pathlib.Path("run")))
  patch.setattr(kl_directions, "read_lines", lambda _: [])
  patch.setattr(kl_directions, "read_summary", lambda _: collections.defaultdict(float))
  leave_pictures_out(patch, kl_directions)


def replace_in_estimators(patch, noted):
  patch.setattr(ppo, "main", noted(returns=pathlib.Path("policy")))
  patch.setattr(sft, "main", noted(returns=pathlib.Path("other")))
  patch.setattr(reward_model, "main", noted(returns=pathlib.Path("reward_model")))
  patch.setattr(estimators, "laboratory_figures", noted(returns={}))
  patch.setattr(estimators, "measure_line", noted(returns=[]))


def replace_in_best_of_n(patch, noted):
  patch.setattr(sft, "main", noted(returns=pathlib.Path("policy")))
  patch.setattr(reward_model, "main", noted(returns=Enough))  # the last stage
  patch.setattr(best_of_n, "_CHUNK", 8)
  patch.setattr(best_of_n, "_CHUNK_OF_POLICY", 8)
  patch.setattr(judging, "make_sample_fn", make_fake_sample_fn)
  make_programs = judging.make_judge_programs

  def programs_on(mesh, *more):
    noted()(str(mesh))
    return make_programs(mesh, *more)

  patch.setattr(judging, "make_judge_programs", programs_on)
  patch.setattr(best_of_n, "bandit_figures", lambda _: [])
  patch.setattr(best_of_n, "enumerable", lambda *_: True)
  patch.setattr(best_of_n, "exact_figures", noted(returns={}))
  patch.setattr(best_of_n, "best_of_pool", lambda *arguments: list(arguments))


def replace_in_evaluate(patch, noted):
  patch.setattr(ppo, "main", noted(returns=pathlib.Path("other")))
  patch.setattr(sft, "main", noted(returns=pathlib.Path("policy")))
  patch.setattr(reward_model, "main", noted(returns=Enough))

  def numbers(params):
    return [float(np.asarray(x).sum()) for x in jax.tree.leaves(params)]

  def make_judge(config, mesh, policy, reference, params, tokenizer, prompts, **more):
    names = ("seed", "num_eval_rows", "eval_completions", "num_samples")
    told = [getattr(config, name) for name in names]
    told += [str(mesh), str(policy.config.dtype), prompts.tokens, prompts.records]
    told += [more["max_completion_len"], more["temperature"], more["score"], tokenizer.eos_ids]
    told += [more["drawn_at_once"], more["read_at_once"]]

    def judge(judged, *, when):
      noted(returns=Enough)(told, numbers(params), numbers(judged), when)

    return judging.Judge(judge, None)

  def score_fn(mesh, rewards, model, params, *, rows_at_once):
    del rows_at_once
    return [reward.fn(["1+1="], ["27"]) for reward in rewards], numbers(params)

  patch.setattr(judging, "make_judge", make_judge)
  patch.setattr(judging, "make_completion_score_fn", score_fn)


def replace_in_kl_variance(patch, noted):
  patch.setattr(ppo, "main", noted(returns=Enough))
  patch.setattr(kl_variance, "on_trees", noted(returns={}))

  def make_sampler(policy, **more):
    noted()(more["eos_id"])
    return make_fake_sample_fn(policy, **more)

  patch.setattr(kl_variance, "make_sample_fn", make_sampler)

  def noise(evaluate, params, old_params, ref_params, rollout):
    sums = [[float(x.sum()) for x in jax.tree.leaves(p)] for p in (params, old_params, ref_params)]
    return noted(returns={})(sums, list(rollout))

  patch.setattr(kl_variance, "_noise", noise)
  leave_pictures_out(patch, kl_variance)


def replace_in_mismatch(patch, noted):
  patch.setattr(mismatch, "create_workdir", lambda *_: None)
  patch.setattr(sweep, "main", noted(returns=pathlib.Path("run")))
  patch.setattr(mismatch, "of_members", noted(returns={}))


def replace_in_over_optimisation(patch, noted):
  def stage(name_of):
    def main(config, *, root):
      noted()(config)
      return pathlib.Path(name_of(config))

    return main

  patch.setattr(over_optimisation, "create_workdir", lambda *_: None)
  patch.setattr(sft, "main", stage(lambda config: f"sft-{config.width}"))
  named = stage(lambda config: f"{config.policy.replace('/', '-')}-{config.num_preferences}")
  patch.setattr(reward_model, "main", named)
  patch.setattr(sweep, "main", noted(returns=pathlib.Path("run")))
  patch.setattr(over_optimisation, "read_summary", lambda _: collections.defaultdict(float))
  patch.setattr(over_optimisation, "read_lines", lambda _: [])
  patch.setattr(over_optimisation, "law", noted(returns={}))
  patch.setattr(over_optimisation, "tails", noted(returns={}))
  patch.setattr(best_of_n, "loaded", noted(returns=()))
  patch.setattr(best_of_n, "draw_pool", noted(returns=(np.arange(6.0).reshape(2, 3),) * 2))
  figures = dict.fromkeys(("kl", "score", "gold"), np.arange(2.0))
  patch.setattr(best_of_n, "best_of_prompts", noted(returns=figures))


def replace_in_diversity(patch, noted):
  patch.setattr(diversity, "create_workdir", lambda *_: None)
  patch.setattr(sweep, "main", noted(returns=pathlib.Path("run")))
  patch.setattr(diversity, "read_summary", lambda _: collections.defaultdict(float))
  patch.setattr(diversity, "read_lines", lambda _: [])
  language = diversity.Language(np.log([0.5, 0.25, 0.25]), np.arange(3.0), np.array([1]))
  patch.setattr(diversity, "LANGUAGES", {"three": lambda: language})
  best = 1.0, np.array([0.25, 0.25, 0.5])
  patch.setattr(diversity, "equal_beta", noted(returns=best))
  patch.setattr(diversity, "make_descent", lambda loss: noted(returns=[np.zeros(3), np.ones(3)]))


def replace_in_paper(patch, noted):
  one = papers.Paper("someone", "something", "reinforce", lambda _: papers.Finding(True, "so"))
  patch.setattr(paper, "PAPERS", {"one": one, "two": one._replace(experiment="ppo")})
  for module in (ppo, reinforce):
    patch.setattr(module, "main", noted(returns=pathlib.Path("run")))
  patch.setattr(paper, "create_workdir", noted())
  patch.setattr(paper, "write_text", noted())


replacements = {
  "over_optimisation": replace_in_over_optimisation,
  "diversity": replace_in_diversity,
  "kl_variance": replace_in_kl_variance,
  "mismatch": replace_in_mismatch,
  "paper": replace_in_paper,
  "evaluate": replace_in_evaluate,
  "kl_audit": replace_in_kl_audit,
  "mode_seeking": replace_in_mode_seeking,
  "kl_directions": replace_in_kl_directions,
  "estimators": replace_in_estimators,
  "best_of_n": replace_in_best_of_n,
}


def make_fake_sample_fn(policy, *, max_completion_len, eos_id, pad_id, given=None):
  del eos_id, pad_id, given
  return fake_sampler(policy.config.vocab_size, max_completion_len)


@functools.cache
def fake_sampler(vocab_size, max_completion_len):
  """Returns a sampler that compiles fast, once, and draws each token alone."""

  def sample(params, prompts, mask, key, *, temperature):
    shape = len(prompts), max_completion_len
    size = sum(abs(leaf).mean() for leaf in jax.tree.leaves(params))
    logits = size * jax.numpy.arange(vocab_size) / temperature / 20
    drawn = jax.random.categorical(key, logits, shape=shape)
    ones, zeros = jax.numpy.ones(shape, bool), jax.numpy.zeros(shape)
    tokens = jax.numpy.concatenate([prompts, drawn], axis=1)
    return Rollout(tokens, mask, ones, ones[:, 0], zeros, zeros)

  return sample


@functools.cache
def base_record(experiment, settings: frozenset) -> list[str]:
  return record_of(experiment, dict(settings))


@pytest.mark.parametrize(
  ("experiment", "field"),
  [
    (name, field)
    for name in EXPERIMENTS
    for field in fields_of(name)
    # They are in fingerprints_test.py, compilation_test.py and reward_patience_test.py.
    if field
    not in ("accept_changed_inputs", "compilation_cache", "reward_timeout", "reward_retries")
  ],
)
def test_a_changed_flag_changes_a_call(experiment, field):
  case = CASES[experiment].get(field)
  assert case is not None, (
    f"--{field} of experiments.{experiment} has no case: add one to CASES that says what changes "
    "with it. A flag that changes nothing must go."
  )
  record = record_of(experiment, dict(case.given) | {field: case.value})
  assert record != base_record(experiment, frozenset(case.given.items()))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_same_flags_change_no_call(experiment):
  given = CASES[experiment]["workdir"].given
  assert record_of(experiment, given) == base_record(experiment, frozenset(given.items()))
