"""Every flag of every experiment that trains changes something, or the change is refused.

A case says what a field is changed to, on which other settings, and where that must show. No model
is trained: `main` runs up to its first iteration, which is traced. What training does is then the
program of an iteration without all that no parameter ever depends on, and the values of the inputs
that are left: a coefficient that the program drops is dead, however it got into the state.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import tempfile
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from small_decoders import arithmetic_decoder

from experiments import distill, dpo, grpo, ppo, reinforce, reward_model, sft
from experiments.lab import dpo_pairs
from klrl import evaluation, judging, programs, supervised
from klrl.algorithm import Algorithm, epochs, learner
from klrl.algorithm.optimizer import apply_gradients
from klrl.cost import dry_run
from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import decoder, policy_model, save_policy, save_scalar, scalar_model
from klrl.models.attention import Fork
from klrl.run import loop
from klrl.sampling import SAMPLER_MESHES, Rollout
from klrl.tasks import arithmetic

MODULES = (sft, reward_model, reinforce, ppo, grpo, dpo, distill)
ALGORITHM_FIELDS = dataclasses.fields(Algorithm)
EXPERIMENTS = {module.__name__.split(".")[-1]: module for module in MODULES}
MAINS = {name: module.main for name, module in EXPERIMENTS.items()}  # before they are patched
APPLY_GRADIENTS = jax.jit(apply_gradients)  # traced once for each shape
LOOP = loop.iterate
STAGES = {sft: "policy", reward_model: "reward_model", ppo: "other"}  # and what they leave


class Case(NamedTuple):
  """A change of one flag: its new value, the settings around it, and where it must show."""

  value: Any
  given: Mapping[str, Any] = types.MappingProxyType({})
  shows_in: str = "training"


EMBEDDED = {
  **dict.fromkeys(("policy", "prompts", "reward_model", "data", "teacher"), ""),
  **dict.fromkeys(("num_demonstrations", "num_preferences", "num_pairs"), 100),
  "width": 8,
  "num_layers": 1,
}
RUN = {
  "workdir": Case("elsewhere", shows_in="workdir"),
  "init_seed": Case(1, EMBEDDED, "stages"),
  "data_seed": Case(1),
  "num_iterations": Case(3, shows_in="files"),
  "batch_size": Case(16),
  "accumulation": Case(2),
  "max_grad_norm": Case(0.5),
  "learning_rate": Case(0.125),
  "learning_rate_schedule": Case("linear", {"learning_rate_schedule": "constant"}),
  "warmup_iterations": Case(2),
  "dtype": Case("bfloat16"),
  "param_dtype": Case("bfloat16"),
  "frozen_dtype": Case("bfloat16"),
  "remat": Case("dots"),
  "lora_rank": Case(2),
  "mesh": Case("data=2"),
  "save_every": Case(1, shows_in="files"),
  "keep": Case(1, shows_in="files"),
  "accept_changed_inputs": Case(True),  # edited inputs are in fingerprints_test.py
  "save_dtype": Case("bfloat16"),  # saved models are in hf_test.py
  "compilation_cache": Case("none"),  # compiled programs are in compilation_test.py
  "profile": Case(True, shows_in="files"),
  "tensorboard": Case(True, shows_in="loop"),
  "wandb_project": Case("mine", shows_in="loop"),
  "policy": Case("other"),
}
CHAT = {
  "chat": Case(True),
  "chat_template": Case("other.jinja", {"chat": True}),
  "system_prompt": Case("1", {"chat": True}),
}
EVALUATION = {
  "num_eval_rows": Case(6, EMBEDDED, "judgement"),
  "eval_completions": Case(3, EMBEDDED, "judgement"),
  "eval_batch_size": Case(3, EMBEDDED, "judgement"),
  "num_samples": Case(1, EMBEDDED, "judgement"),
  "eval_every": Case(2, shows_in="evaluations"),
  "num_interim_rows": Case(3, shows_in="judgement"),
  "keep_best": Case("score", shows_in="evaluations"),
}
LOSS_K1 = {
  "kl_placement": "loss",
  "kl_estimator": "k1",
  "kl_correction": "none",
  "kl_credit": "token",
}
LOSS_K3 = LOSS_K1 | {"kl_estimator": "k3", "kl_correction": "token"}
LOSS_EXACT = LOSS_K1 | {"kl_estimator": "exact"}
REWARD_K1 = {"kl_placement": "reward", "kl_estimator": "k1", "kl_correction": "none"}
BOND = REWARD_K1 | {"advantage": "best_of_n", "kl_credit": "sequence"}
BOTH_K2 = {
  "kl_placement": "both",
  "kl_estimator": "k2",
  "kl_correction": "none",
  "kl_credit": "sequence",
}
PRETRAINED = {"pretrain_data": "texts.jsonl", "ptx_coef": 0.5}
DRY_RUN = {
  "dry_run": Case(True, shows_in="dry run"),
  "topology": Case("v5e:2x2", {"dry_run": True}, "dry run"),
}
RL = {
  **RUN,
  **CHAT,
  **EVALUATION,
  **DRY_RUN,
  "seed": Case(1),
  "stop_tokens": Case("7", shows_in="judgement"),
  "sft_iterations": Case(9, EMBEDDED, "stages"),
  "reward_model_iterations": Case(9, EMBEDDED, "stages"),
  "task": Case("tree", EMBEDDED | {"max_completion_len": 0}),
  "reward_model": Case("other_reward_model"),
  "prompts": Case("other.jsonl"),
  "prompt_template": Case("{prompt}{prompt}"),
  "max_prompt_len": Case(6),
  "reward": Case("reward.py:twos", {"reward": "reward.py:ones", "reward_model": ""}, "scores"),
  "reward_timeout": Case(5.0, {"reward": "reward.py:ones", "reward_model": ""}, "told"),
  "reward_retries": Case(2, {"reward": "reward.py:ones", "reward_model": ""}, "told"),
  "max_completion_len": Case(2),
  "beta": Case(0.125),
  "kl_placement": Case("none"),
  "kl_estimator": Case("exact", BOTH_K2),
  "kl_correction": Case("prefix", LOSS_K3),
  "kl_credit": Case("sequence", LOSS_K3 | {"kl_correction": "prefix"}),
  "kl_divergence": Case("forward", LOSS_EXACT),
  "jsd_weight": Case(0.25, LOSS_EXACT | {"kl_divergence": "jensen_shannon"}),
  "kl_alpha": Case(0.25, LOSS_EXACT | {"kl_divergence": "alpha"}),
  "kl_weight": Case("certainty"),
  "kl_weight_power": Case(2.0, {"kl_weight": "position"}),
  "allow_biased_kl": Case(True, LOSS_K1, "refusal"),
  "kl_every": Case(3, shows_in="metrics"),
  "loss_aggregation": Case("constant"),
  "controller": Case("doubling"),
  "kl_budget": Case(0.25),
  "kl_target": Case(3.0, {"controller": "doubling"}),
  "kl_horizon": Case(5.0, {"controller": "proportional"}),
  "kl_step_size": Case(0.5, {"controller": "dual_ascent"}),
  "beta_min": Case(0.01, {"controller": "doubling"}),
  "beta_max": Case(2.0, {"controller": "doubling"}),
  "beta_final": Case(0.25, {"controller": "linear"}),
  "reference": Case("other"),
  "reference_update": Case("ema"),
  "reference_decay": Case(0.5, {"reference_update": "ema"}),
  "reset_optimizer": Case(True, {"reference_update": "reset"}),
  "reference_every": Case(3, {"reference_update": "reset"}),
  "pretrain_data": Case("reference", PRETRAINED),
  "ptx_coef": Case(0.25, PRETRAINED),
  "ptx_divergence": Case("jensen_shannon", PRETRAINED),
  "prefill": Case("1"),
  "temperature": Case(0.5),
  "missing_eos_penalty": Case(1.0),
  "length_penalty": Case(1.0),
  "normalise_scores": Case(True),
  "sampler_dtype": Case("bfloat16"),
  "sampler_mesh": Case("split"),
  "sampler_correction": Case("token"),
  "sampler_cap": Case(3.0, {"sampler_correction": "token"}),
  "sampler_floor": Case(0.25, {"sampler_correction": "token_mask"}),
  "entropy_coef": Case(0.5),
}
KL_OLD = {"trust_region": "kl_old_new"}
SURROGATE = {
  **RL,
  "num_epochs": Case(3),
  "num_minibatches": Case(4),
  "staleness": Case(1),
  "prefix_cap": Case(2.0, LOSS_K3 | {"kl_correction": "prefix"}),
  "kl_refresh": Case("minibatch", REWARD_K1),
  "trust_region": Case("none"),
  "clip_eps_low": Case(0.5),
  "clip_eps_high": Case(0.5),
  "trust_region_size": Case(0.5, {"trust_region": "tv_mask"}),
  "trust_region_beta": Case(0.5, KL_OLD),
  "trust_region_adaptive": Case(True, KL_OLD),
  "trust_region_target": Case(0.5, KL_OLD | {"trust_region_adaptive": True}),
  "max_kl_old": Case(0.5),
}
CASES = {
  "sft": {
    **RUN,
    **CHAT,
    **DRY_RUN,
    "stop_tokens": Case("5"),  # the id of 2, which ends completions already
    "seed": Case(1),
    "init_seed": Case(1, EMBEDDED),
    "frozen_dtype": Case("bfloat16", {"lora_rank": 2}),
    "data": Case("other.jsonl"),
    "loss_on": Case("all"),
    "packing": Case(True),
    "max_len": Case(9),
    "num_demonstrations": Case(99, EMBEDDED),
    "demonstration_quality": Case(0.25, EMBEDDED),
    "width": Case(16, EMBEDDED),
    "num_layers": Case(2, EMBEDDED),
  },
  "reward_model": {
    **RUN,
    **CHAT,
    "stop_tokens": Case("7"),
    "seed": Case(1),
    "frozen_dtype": Case("bfloat16", {"lora_rank": 2}),
    "data": Case("other.jsonl"),
    "max_len": Case(9),
    "margin": Case(0.5),
    "label_smoothing": Case(0.25),
    "centring_coef": Case(0.5),
    "num_preferences": Case(99, EMBEDDED),
    "label_noise": Case(0.5, EMBEDDED),
    "sft_iterations": Case(9, EMBEDDED, "stages"),
  },
  "reinforce": RL,
  "ppo": {
    **SURROGATE,
    "value_trunk": Case("shared"),
    "value_model": Case("other_reward_model"),
    "value_init": Case("policy"),
    "gamma": Case(0.5),
    "gae_lambda": Case(0.5),
    "whiten_advantages": Case(False),
    "value_clip_eps": Case(0.5),
    "vf_coef": Case(0.25),
    "dual_clip": Case(3.0),
  },
  "grpo": {
    **SURROGATE,
    "advantage": Case("leave_one_out"),
    "group_size": Case(2),
    "best_of": Case(2.0, BOND),
    "forward_share": Case(0.5, BOND),
    "oversampling": Case(2),
    "overlong_buffer": Case(1),
    "whiten_advantages": Case(True, {"advantage": "returns"}),
    "kl_refresh": Case("minibatch", REWARD_K1 | {"advantage": "returns"}),
  },
  "dpo": {
    **RUN,
    **CHAT,
    **EVALUATION,
    **DRY_RUN,
    "stop_tokens": Case("7"),
    "seed": Case(1, EMBEDDED),
    "sft_iterations": Case(9, EMBEDDED, "stages"),
    "reward_model_iterations": Case(9, EMBEDDED, "stages"),
    "loss": Case("ipo"),
    "beta": Case(0.25),
    "label_smoothing": Case(0.25),
    "data": Case("other.jsonl"),
    "max_len": Case(9),
    "num_pairs": Case(99, EMBEDDED),
    "max_completion_len": Case(4, EMBEDDED),
  },
  "distill": {
    **SURROGATE,
    "task": Case("tree", {"policy": "", "prompts": ""}, "refusal"),
    "teacher": Case("policy"),
    "kl_placement": Case("both", shows_in="refusal"),
    "keep_best": Case("score", shows_in="refusal"),
  },
}
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.content }}"
  "{{ eos_token if m.role == 'assistant' else '+' }}{% endfor %}"
)
SMALL = {"batch_size": 8, "num_iterations": 4, "save_every": 2, "mesh": "data=1"}
JUDGED = {"num_eval_rows": 4, "num_samples": 2}
OWN_RL = SMALL | JUDGED | {"policy": "policy", "prompts": "own.jsonl", "max_completion_len": 3}
OWN_DATA = SMALL | {"policy": "policy", "data": "own.jsonl"}
BASES = {
  "sft": OWN_DATA,
  "reward_model": OWN_DATA,
  "reinforce": OWN_RL | {"reward_model": "reward_model"},
  "ppo": OWN_RL | {"reward_model": "reward_model", "num_epochs": 1, "num_minibatches": 2},
  "grpo": OWN_RL | {"reward_model": "reward_model", "group_size": 4},
  "dpo": OWN_DATA | JUDGED | {"max_completion_len": 3},
  "distill": OWN_RL | {"teacher": "other", "num_epochs": 1, "num_minibatches": 2},
}


def fields_of(experiment) -> list[str]:
  return [field.name for field in dataclasses.fields(EXPERIMENTS[experiment].Config)]


ALL = [
  (experiment, field)
  for experiment in EXPERIMENTS
  for field in fields_of(experiment)
  if field not in ("accept_changed_inputs", "save_dtype", "compilation_cache")
]


def home_of(experiment, field) -> type:
  """Returns the class that a flag is declared in."""
  classes = EXPERIMENTS[experiment].Config.__mro__
  return next(x for x in classes if field in vars(x).get("__annotations__", ()))


def told_as_another(experiment, field) -> bool:
  """Returns whether a flag that trains is told to the library where it is declared, for several.

  What the library makes of `reward_timeout` is in reward_patience_test.py.
  """
  shows_in = CASES[experiment].get(field, Case(None)).shows_in
  if shows_in not in ("training", "metrics", "scores"):
    return shows_in == "told"
  named = [x for x in RL_EXPERIMENTS if field in fields_of(x)]
  alike = [x for x in named if home_of(x, field) is home_of(experiment, field)]
  return experiment in alike and experiment != alike[-1]


RL_EXPERIMENTS = ("distill", "grpo", "reinforce", "ppo")
TOLD = [pair for pair in ALL if told_as_another(*pair)]
WALK = [pair for pair in ALL if pair not in TOLD]


@dataclasses.dataclass(eq=False)
class Run:
  """A run up to its first iteration."""

  stages: list = dataclasses.field(default_factory=list)  # configs of what ran before
  error: str = ""  # of a run that was refused
  dry_run: Any = None  # devices that it was costed for; None are those that are there
  judge: Any = None  # arguments of `judging.make_judge`
  step: Any = None
  state: Any = None
  settings: Any = None  # other arguments of `loop.iterate`


class Started(Exception):
  """What `loop.iterate` was given."""


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
  """A folder with models and data, and experiments that stop where training would begin."""
  directory = tmp_path_factory.mktemp("flags")
  with pytest.MonkeyPatch.context() as patch, contextlib.chdir(directory):

    def started(step, state, **settings):
      raise Started(step, state, settings)

    patch.setattr(loop, "iterate", started)
    patch.setattr(evaluation, "step_zero_checks", lambda *_, **__: None)
    patch.setattr(
      decoder, "_decoder", functools.cache(functools.partial(traced_once, decoder._decoder))
    )
    for module in (epochs, supervised):
      patch.setattr(module, "apply_gradients", APPLY_GRADIENTS)
    write_inputs()
    patch.setattr(programs, "make_sample_fn", make_fake_sample_fn)
    # Most programs are traced and never run, so none is compiled ahead.
    not_ahead = programs._Ahead()
    patch.setattr(programs, "_Ahead", lambda *_: not_ahead)
    # Log-probs of the reference take a compilation, and no flag chooses how they are made.
    patch.setattr(
      dpo_pairs,
      "make_pairs",
      lambda config, policy, params, arrays: dpo_pairs.Pairs(
        *arrays, np.zeros(arrays[0].shape[:2])
      ),
    )
    yield patch
  for cached in (base_run, base_program):
    cached.cache_clear()


def write_inputs():
  tokenizer = arithmetic.make_tokenizer()
  config = arithmetic_decoder(num_heads=1, mlp_dim=8, max_len=24)
  for seed, names in enumerate((("policy", "reward_model"), ("other", "other_reward_model"))):
    for model, save, name in zip(
      (policy_model(config), scalar_model(config)), (save_policy, save_scalar), names, strict=True
    ):
      save(pathlib.Path(name), config, model.init(jax.random.key(seed)), tokenizer)
    pathlib.Path(names[0], "chat_template.jinja").write_text(TEMPLATE)
  pathlib.Path("other.jinja").write_text(TEMPLATE.replace("+", "="))
  texts = [f"{'7' * (i % 5)}{i}+{i + 1}=" for i in range(24)]
  for name, rows in (("own", texts[:16]), ("other", texts[8:]), ("texts", texts[:12])):
    lines = [
      {"prompt": x, "text": x, "completion": "12", "chosen": "13", "rejected": "4"} for x in rows
    ]
    pathlib.Path(f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  pathlib.Path("reward.py").write_text(
    "def ones(prompts, completions, **columns): return [1.0] * len(prompts)\n"
    "def twos(prompts, completions, **columns): return [2.0] * len(prompts)\n"
  )


def traced_once(make_decoder, config):
  """Returns the decoder, of which all runs share the traces, and fresh params that compile fast."""
  made = make_decoder(config)

  def init(key):
    shapes, value = jax.eval_shape(made.init, key), jax.random.uniform(key)
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)

  # A `Fork` is static, and a `Packed` has arrays.
  traced = {True: jax.jit(made.hidden, static_argnums=3), False: jax.jit(made.hidden)}

  def hidden(params, tokens, mask, fork=None):
    return traced[isinstance(fork, Fork)](params, tokens, mask, fork)

  return made._replace(init=init, hidden=hidden)


def make_fake_sample_fn(
  policy, *, max_completion_len, eos_id, pad_id, group_size, sampler_mesh, given
):
  """Returns a sampler that compiles fast and draws any token, by the key alone.

  Its log-probs tell how it would lay out weights, and its mask whether the first token is given.
  """
  del eos_id, pad_id, group_size

  def sample(params, prompts, mask, key, *, temperature):
    del params, temperature
    shape = len(prompts), max_completion_len
    drawn = jax.random.randint(key, shape, 3, policy.config.vocab_size)
    tokens = jnp.concatenate([prompts, drawn], axis=1)
    told = jnp.full(shape, SAMPLER_MESHES.index(sampler_mesh), policy.config.dtype)
    finished = jnp.ones(len(prompts), bool)
    chosen = jnp.ones(shape, bool).at[:, 0].set(given is None)
    return Rollout(tokens, mask, chosen, finished, told, told)

  return sample


def started_run(experiment, settings: dict) -> Run:
  module, run = EXPERIMENTS[experiment], Run()

  def stage(config, *, root, left):
    del root
    run.stages.append(repr(config))
    return pathlib.Path(left)

  def cost_of_run(config, *shapes, **more):
    run.dry_run = ("costed", dry_run.devices_of(config))
    return []

  def make_judge(*arguments, **more):
    run.judge = arguments, more
    judgement = types.SimpleNamespace(evaluation=None, figures={"score": 0.0})
    return judging.Judge(lambda params, *, when: judgement, lambda params: judgement.figures)

  with pytest.MonkeyPatch.context() as patch:
    for stage_module, left in STAGES.items():
      patch.setattr(stage_module, "main", functools.partial(stage, left=left))
    patch.setattr(judging, "make_judge", make_judge)
    patch.setattr(dry_run, "of_run", cost_of_run)
    patch.setattr(dry_run, "of_supervised", cost_of_run)
    patch.setattr(parallel, "topology_devices", lambda name: [name])
    try:
      MAINS[experiment](module.Config(**settings))
    except UserError as error:
      run.error = str(error)
    except Started as started:
      run.step, run.state, run.settings = started.args
  return run


@functools.cache
def base_run(experiment, settings: frozenset) -> Run:
  return started_run(experiment, dict(settings))


def settings_of(experiment, changes) -> dict:
  """Returns the base settings of an experiment with the changes that it has flags for."""
  names = fields_of(experiment)
  merged = BASES[experiment] | changes
  return {name: value for name, value in merged.items() if name in names}


def values_of(leaves) -> list[bytes]:
  """Returns the bytes of each array, those of keys included."""
  is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
  return [
    np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()
    for leaf, key in zip(leaves, is_key, strict=True)
  ]


def live_program(run: Run, metrics: bool):
  """Returns (text of an iteration, values of its constants, which leaves of the state it reads).

  All is left out on which neither the parameters depend, after any number of iterations, nor
  `metrics`, where these count.
  """
  traced, shapes = jax.make_jaxpr(lambda state: run.step(state, 0), return_shape=True)(run.state)
  num_params, num_leaves = (len(jax.tree.leaves(x)) for x in (run.state.params, run.state))
  assert jax.tree.leaves(run.state)[0] is jax.tree.leaves(run.state.params)[0]  # They come first.
  num_metrics = len(jax.tree.leaves(shapes)) - num_leaves
  jaxpr, num_consts = traced.jaxpr, len(traced.consts)
  jaxpr = jaxpr.replace(
    constvars=[],
    invars=[*jaxpr.constvars, *jaxpr.invars],
    debug_info=jaxpr.debug_info.with_unknown_names(),
  )
  read = [i < num_params for i in range(num_leaves)]
  while True:
    live, inputs = partial_eval.dce_jaxpr(jaxpr, read + [metrics] * num_metrics)
    consts, also_read = inputs[:num_consts], inputs[num_consts:]
    if not any(new and not old for new, old in zip(also_read, read, strict=True)):
      break
    read = [new or old for new, old in zip(also_read, read, strict=True)]
  text = re.sub(r" at 0x[0-9a-f]+", "", str(live))
  kept = [jnp.asarray(x) for x, used in zip(traced.consts, consts, strict=True) if used]
  return text, values_of(kept), read


base_program = functools.cache(live_program)


def training_differs(run: Run, other: Run, *, metrics: bool = False) -> bool:
  """Returns whether the parameters (or, with `metrics`, these too) become others."""
  text, consts, read = base_program(run, metrics)
  leaves, other_leaves = jax.tree.leaves(run.state), jax.tree.leaves(other.state)
  if jax.tree.map(jnp.shape, run.state) == jax.tree.map(jnp.shape, other.state):
    placed, other_placed = ([x.sharding for x in state] for state in (leaves, other_leaves))
    pairs = zip(
      zip(values_of(leaves), placed, strict=True),
      zip(values_of(other_leaves), other_placed, strict=True),
      strict=True,
    )
    # No second trace where it would tell nothing new.
    if any(used and x != y for used, (x, y) in zip(read, pairs, strict=True)):
      return True
  other_text, other_consts, _ = live_program(other, metrics)
  return (text, consts) != (other_text, other_consts)


def files_of(run: Run) -> list[str]:
  """Returns the files that the loop leaves behind around a step that does nothing."""
  not_here = ("workdir", "evaluations")
  return files_of_loop(frozenset((k, v) for k, v in run.settings.items() if k not in not_here))


@functools.cache
def files_of_loop(settings: frozenset) -> list[str]:
  with tempfile.TemporaryDirectory() as name:
    workdir, state = pathlib.Path(name), {"x": jnp.zeros(())}
    try:
      for _ in LOOP(lambda state, _: (state, {}), state, workdir=workdir, **dict(settings)):
        pass
    except UserError as error:
      return [str(error)]
    files = [*workdir.glob("*"), *workdir.glob("checkpoints/*")]
    return [
      *sorted(map(str, (x.relative_to(workdir) for x in files))),
      (workdir / "metrics.jsonl").read_text(),
    ]


def judgement_of(run: Run):
  """Returns what the judge is told; `judging_test` has what it makes of it."""
  (config, *_, tokenizer, held_out), more = run.judge
  names = ["seed", "num_eval_rows", "eval_completions", "num_samples"]
  prompts = [record["prompt"] for record in held_out.records]
  told = ("max_completion_len", "num_interim_rows", "drawn_at_once", "read_at_once", "prefill")
  told = *(more.get(name) for name in told), tokenizer.eos_ids
  return [getattr(config, name) for name in names], prompts, told


def evaluations_of(run: Run):
  """Returns what the evaluations are told; `evaluations_test` has what they make of it."""
  told = vars(run.settings["evaluations"])
  return [told[name] for name in ("_every", "_keep_best")]


def scores_of(run: Run):
  """Returns the metrics of an iteration of which sampler and update are taken out."""
  return jax.device_get(run.step(run.state, 0)[1])


def differs(shows_in: str, run: Run, other: Run) -> bool:
  """Returns whether two runs differ where a change must show."""
  if shows_in == "refusal":
    return bool(run.error) != bool(other.error)
  assert not (run.error or other.error), run.error or other.error
  if shows_in in ("training", "metrics"):
    return training_differs(run, other, metrics=shows_in == "metrics")
  look = {
    "stages": lambda run: run.stages,
    "workdir": lambda run: run.settings["workdir"],
    "dry run": lambda run: run.dry_run,
    "files": files_of,
    "judgement": judgement_of,
    "evaluations": evaluations_of,
    "loop": lambda run: {k: v for k, v in run.settings.items() if k != "evaluations"},
    "scores": scores_of,
  }[shows_in]
  return look(run) != look(other)


@pytest.mark.parametrize(("experiment", "field"), WALK)
def test_a_changed_flag_changes_something(experiment, field):
  case = CASES[experiment].get(field)
  assert case is not None, (
    f"--{field} of experiments.{experiment} has no case: add one to CASES that says what changes "
    "with it. A flag that changes nothing must go."
  )
  settings = settings_of(experiment, case.given)
  changed = settings | {field: case.value}
  assert settings.get(field) != case.value
  with no_update() if case.shows_in == "scores" else contextlib.nullcontext():
    base = base_run(experiment, frozenset(settings.items()))
    assert differs(case.shows_in, base, started_run(experiment, changed))


def told(config):
  """Returns what the library is told of a run of an experiment's."""
  algorithm = {x.name: known(getattr(config.algorithm(), x.name)) for x in ALGORITHM_FIELDS}
  # What a run reads itself.
  own = config.seed, config.mesh, config.sampler_mesh
  return algorithm, config.hypers(), config.sources(), *own


def known(x):
  """Returns what is equal for functions that are made of the same code and values."""
  if isinstance(x, functools.partial):
    return known(x.func), x.args, x.keywords
  if isinstance(x, tuple):
    return [known(part) for part in x]
  if not isinstance(x, types.FunctionType):
    return x
  cells = [known(cell.cell_contents) for cell in x.__closure__ or ()]
  return x.__module__, x.__qualname__, cells, x.__defaults__


@pytest.mark.parametrize(("experiment", "field"), TOLD)
def test_a_changed_flag_changes_what_the_library_is_told(experiment, field):
  """What that changes is the question above, to the last experiment whose flag is the same."""
  case, kind = CASES[experiment][field], EXPERIMENTS[experiment].Config
  settings = settings_of(experiment, case.given)
  assert told(kind(**settings)) == told(kind(**settings))
  assert told(kind(**settings)) != told(kind(**settings | {field: case.value}))


@contextlib.contextmanager
def no_update():
  """Puts in place of the update what compiles fast and shows the scores."""

  def make_update_fn(*_, **__):
    return lambda state, frozen, rollout, scores, pretraining: (state, {"score": scores.sum()})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(learner, "make_update_fn", make_update_fn)
    yield


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_same_flags_change_nothing(experiment):
  """Where this failed, no test of this file could."""
  settings = settings_of(experiment, {})
  run = base_run(experiment, frozenset(settings.items()))
  again = started_run(experiment, settings)
  for shows_in in ("training", "metrics", "stages", "workdir", "files"):
    assert not differs(shows_in, run, again), shows_in
  if run.judge:
    assert not differs("judgement", run, again)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_case_is_of_a_flag(experiment):
  assert set(CASES[experiment]) <= set(fields_of(experiment)) | set(SURROGATE)
