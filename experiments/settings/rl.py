"""What RL experiments share: their settings, and the algorithm that these describe.

`PolicyConfig` is any algorithm that learns from the policy's own completions; `RLConfig` adds what
scores them and the reference; `SurrogateFields` add several gradient steps on each rollout, with
what holds the policy near the one that sampled. `algorithm()` says what is compiled, `hypers()` has
its coefficients, and `sources()` says where models and prompts come from; an experiment replaces in
them what is its own.
"""

import dataclasses

from experiments.settings.common import (
  DryRunFields,
  EvaluationFields,
  PromptFields,
  ScoreFields,
  SftStageFields,
  StageFields,
  again,
  setting,
)
from experiments.settings.penalty import KLConfig
from klrl import inputs, ops
from klrl.algorithm import (
  Algorithm,
  Hypers,
  beta_rules,
  kl_terms,
  memory,
  objective,
  policy_losses,
)
from klrl.algorithm.optimizer import make_schedule
from klrl.errors import UserError
from klrl.sampling import SAMPLER_MESHES
from klrl.tasks.registry import TASKS
from klrl.tasks.rewards import reads_model

_KL_TRUST_REGIONS = ("kl_old_new", "kl_new_old", "k2", "regression")
LIKELIHOOD, REFERENCE = "likelihood", "reference"
_SIZED = ("tv_mask", "kl_mask", "smooth")
_CLIPPED = ("clip", "sequence_clip")
# What a task with a policy of its own, and one with scores of its own, has no use for.
_STAGES = ("sft_iterations", "reward_model_iterations")
_SCORES = ("reward", "reward_model", "max_completion_len")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(KLConfig, PromptFields, EvaluationFields, SftStageFields, DryRunFields):
  """Policy, sampling and optimizer."""

  num_iterations: int = again(KLConfig, "num_iterations", default=80)
  batch_size: int = setting(128, "completions per iteration", minimum=1)
  policy: str = setting(
    "",
    "model to train: its directory, its name on the Hugging Face hub, or adapters of PEFT; "
    "default: the embedded SFT stage",
  )
  prefill: str = setting(
    "",
    "text with which every completion begins; rewards read it, and nothing is learnt from it; a "
    "column `prefill` of the prompts gives one to each row",
  )
  temperature: float = setting(1.0, "of sampling, and of every log-prob", minimum=1e-3)
  missing_eos_penalty: float = setting(
    0.0, "taken off the score of a completion that was cut off at the limit", minimum=0.0
  )
  length_penalty: float = setting(0.0, "taken off the score for each token", minimum=0.0)
  sampler_dtype: str = setting(
    "trainer",
    "what the sampler computes in; float16 rounds 8 times finer than bfloat16, and overflows at "
    "65504",
    choices=("trainer", "float32", "bfloat16", "float16"),
  )
  sampler_mesh: str = setting(
    "auto",
    "where the weights that fsdp splits are while completions are drawn: gathered once for all of "
    "them, or split as they are, so that rows move to them; auto: what should take less time",
    choices=SAMPLER_MESHES,
  )
  sampler_correction: str = setting(
    "none",
    "weights for a sampler that differs from the trainer: truncated, per token or per completion; "
    "or as a mask, 0 where the ratio is out of bounds",
    choices=ops.SAMPLER_CORRECTIONS,
  )
  sampler_cap: float = setting(
    2.0,
    "largest such weight, or largest ratio that is kept",
    minimum=1.0,
    read_when=("sampler_correction", ops.SAMPLER_CORRECTIONS[1:]),
  )
  sampler_floor: float = setting(
    0.5,
    "smallest ratio that is kept",
    minimum=0.0,
    maximum=1.0,
    read_when=("sampler_correction", ops.SAMPLER_MASKS),
  )
  learning_rate_schedule: str = again(KLConfig, "learning_rate_schedule", default="constant")
  entropy_coef: float = setting(0.0, "weight of the entropy bonus", minimum=0.0)

  def __post_init__(self):
    super().__post_init__()
    self.choose_learning_rate(embedded=5e-4)
    self.check_evaluations()
    if self.keep_best == "score" and not self.reads_scores():
      raise UserError("--keep_best=score: nothing scores completions here.")
    if self.policy and (missing := self.missing_inputs()):
      raise UserError(f"--policy, a model of yours, needs {', and '.join(missing)}.")
    if self.prompts and not self.policy:
      raise UserError("--prompts of yours need a model of yours: --policy=DIR.")
    for name, default in (("prompt_template", "{prompt}"), ("max_prompt_len", 0)):
      if getattr(self, name) != default and not self.prompts:
        raise UserError(f"--{name} is set, but nothing reads it without --prompts.")
    self.check_chat("prompts")
    self.check_task()

  def missing_inputs(self) -> list[str]:
    """Returns the flags that a model of the user's takes and that are not given."""
    return [] if self.prompts else ["prompts: --prompts=FILE.jsonl"]

  def check_task(self) -> None:
    """Raises UserError where the experiment cannot be run on the embedded task."""
    if TASKS[self.task].scorer:
      raise UserError(f"--task={self.task} is a table of scores, and this experiment reads none.")

  def reads_scores(self) -> bool:
    """Returns whether anything scores completions; else every score is 0."""
    return False

  def reads_reward_model(self) -> bool:
    """Returns whether a reward model does."""
    return False

  def algorithm(self) -> Algorithm:
    """Returns what is compiled."""
    return Algorithm(
      batch_size=self.batch_size,
      num_iterations=self.num_iterations,
      aggregation=ops.AGGREGATIONS[self.loss_aggregation],
      penalty=self.penalty(),
      kl_every=self.kl_every,
      controller=beta_rules.RULES[self.beta_rule()],
      accumulation=self.accumulation,
      learning_rate_factor=make_schedule(
        self.learning_rate_schedule,
        num_iterations=self.num_iterations,
        warmup_iterations=self.warmup_iterations,
      ),
      sampler_correction=self.sampler_correction,
    )

  def hypers(self) -> Hypers:
    """Returns the coefficients."""
    return Hypers(
      learning_rate=self.learning_rate,
      max_grad_norm=self.max_grad_norm,
      temperature=self.temperature,
      beta=self.beta,
      beta_min=self.beta_min,
      beta_max=self.beta_max,
      beta_final=self.beta_final,
      kl_target=self.kl_budget or self.kl_target,
      kl_horizon=self.kl_horizon,
      kl_step_size=self.kl_step_size,
      jsd_weight=self.jsd_weight,
      kl_alpha=self.kl_alpha,
      kl_weight_power=self.kl_weight_power,
      entropy_coef=self.entropy_coef,
      missing_eos_penalty=self.missing_eos_penalty,
      length_penalty=self.length_penalty,
      sampler_cap=self.sampler_cap,
      sampler_floor=self.sampler_floor,
    )

  def sources(self) -> inputs.Sources:
    """Returns where models and prompts come from."""
    return inputs.Sources(
      policy=self.policy,
      has_reference=self.kl_placement != "none" or self.kl_every > 0,
      task=self.task,
      prompts=self.prompts,
      prompt_template=self.prompt_template,
      chat=self.chat,
      chat_template=self.chat_template,
      system_prompt=self.system_prompt,
      stop_tokens=self.stop_tokens,
      max_prompt_len=self.max_prompt_len,
      max_completion_len=self.max_completion_len,
      prefill=self.prefill,
      lora_rank=self.lora_rank,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      frozen_dtype=self.frozen_dtype,
      remat=self.remat,
      sampler_dtype=self.sampler_dtype,
      init_seed=self.init_seed,
      data_seed=self.data_seed,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFields:
  """Texts that the policy has not written and is to stay near; to be mixed into a config."""

  pretrain_data: str = setting(
    "",
    "texts whose loss is mixed in: JSON lines with text, or plain text (.txt); or `reference`: "
    "what pi_ref writes to the prompts of each iteration",
  )
  ptx_coef: float = setting(0.0, "weight of that loss, per nat", minimum=0.0)
  ptx_divergence: str = setting(
    LIKELIHOOD,
    "that loss: minus the log-likelihood of the texts, or a divergence from pi_ref of the next "
    "token at their prefixes",
    choices=(LIKELIHOOD, *objective.DIVERGENCES),
  )

  def check_texts(self) -> None:
    """Raises UserError where one of these is set without the others that it needs."""
    if bool(self.pretrain_data) != bool(self.ptx_coef):
      raise UserError("--pretrain_data and --ptx_coef go together: texts, and what they weigh.")
    if self.ptx_divergence != LIKELIHOOD and not self.pretrain_data:
      raise UserError("--ptx_divergence is set, but nothing reads it without --pretrain_data.")

  @property
  def rehearses(self) -> bool:
    """Whether the reference writes the texts."""
    return self.pretrain_data == REFERENCE

  @property
  def texts_read_reference(self) -> bool:
    """Whether the loss of the texts needs a reference."""
    return self.rehearses or self.ptx_divergence != LIKELIHOOD


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(PolicyConfig, ScoreFields, StageFields, TextFields):
  """The reference, and what scores completions."""

  reference: str = setting(
    "",
    "model directory of pi_ref, a run's too; or a checkpoint of a run that began with the same "
    "model, as RUN/checkpoints/40; or `uniform`, the KL to which is minus the entropy up to a "
    "constant; or a product as 0.7*start,0.3*DIR; default: `start`, the policy at the start",
  )
  reference_update: str = setting(
    "frozen",
    "how pi_ref follows the policy; held-out figures are against the first one",
    choices=tuple(memory.REFERENCE_RULES),
  )
  reference_decay: float = setting(
    0.99,
    "share of itself that pi_ref keeps each iteration",
    minimum=0.0,
    maximum=1.0,
    read_when=("reference_update", ("ema",)),
  )
  reference_every: int = setting(
    20, "iterations between resets of pi_ref", minimum=1, read_when=("reference_update", ("reset",))
  )
  reset_optimizer: bool = setting(
    False,
    "whether a reset of pi_ref makes the optimizer forget its moments",
    read_when=("reference_update", ("reset",)),
  )
  normalise_scores: bool = setting(
    False, "take off the mean of all scores so far and divide by their deviation"
  )

  def __post_init__(self):
    super().__post_init__()
    self.check_scores()
    self.check_texts()
    if self.reward and self.reward_model and not reads_model(self.reward):
      raise UserError(
        "--reward and --reward_model both score; give one of them, or a sum that names `model`, "
        f"e.g. --reward=model,{self.reward}."
      )
    is_read = self.kl_placement != "none" or self.texts_read_reference
    if self.reference and not (is_read or self.kl_every):
      raise UserError("--reference is set, but nothing reads it: no KL is penalised or measured.")
    if self.reference_update != "frozen":
      if self.reference:
        raise UserError(
          f"--reference_update={self.reference_update} starts at the policy; leave --reference out."
        )
      if not is_read:
        raise UserError("--reference_update moves a reference that no KL is penalised to.")

  def missing_inputs(self) -> list[str]:
    missing = super().missing_inputs()
    if self.reads_reward_model() and not self.reward_model:
      missing.append(
        "something to score with: --reward=FILE.py:FUNCTION, or --reward_model=DIR, which `model` "
        "in --reward stands for"
      )
    return missing

  def check_task(self) -> None:
    task = TASKS[self.task]
    unread = (_STAGES if task.write_policy else ()) + (_SCORES if task.scorer else ())
    for field in dataclasses.fields(self):
      if field.name in unread and getattr(self, field.name) != field.default:
        raise UserError(f"--{field.name} is set, but nothing reads it with --task={self.task}.")
    has_scores = task.scorer or self.reward_model or not self.reads_reward_model()
    if task.write_policy and not has_scores:
      raise UserError(f"--task={self.task} has no reward model: add --reward=FILE.py:FUNCTION.")

  def reads_scores(self) -> bool:
    return True

  def reads_reward_model(self) -> bool:
    return not self.reward or reads_model(self.reward)

  def algorithm(self) -> Algorithm:
    return dataclasses.replace(
      super().algorithm(),
      normalise_scores=self.normalise_scores,
      reference_rule=memory.REFERENCE_RULES[self.reference_update],
      reference_every=self.reference_every,
      reset_optimizer=self.reset_optimizer,
      rehearses=self.rehearses,
      text_divergence=None
      if self.ptx_divergence == LIKELIHOOD
      else kl_terms.DIVERGENCES[self.ptx_divergence].exact,
    )

  def hypers(self) -> Hypers:
    return super().hypers()._replace(reference_decay=self.reference_decay, ptx_coef=self.ptx_coef)

  def sources(self) -> inputs.Sources:
    # What the objective is worth at its best is known where beta and reference are.
    is_known = (
      self.kl_placement != "none"
      and self.kl_divergence == "reverse"
      and self.kl_weight == "none"
      and self.beta_rule() in ("fixed", "linear", "cosine")
      and self.reference_update == "frozen"
      and not self.normalise_scores
      and not self.ptx_coef
      and not self.prefill
    )
    sources = super().sources()
    return dataclasses.replace(
      sources,
      reference=self.reference,
      has_reference=sources.has_reference or self.texts_read_reference,
      pretrain_data="" if self.rehearses else self.pretrain_data,
      reward_model=self.reward_model,
      reward=self.reward,
      reward_timeout=self.reward_timeout,
      reward_retries=self.reward_retries,
      enumerated=TASKS[self.task].exact is not None and is_known,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateFields:
  """Several gradient steps on each rollout; to be mixed into a `PolicyConfig`, before it."""

  num_epochs: int = setting(2, "passes over a rollout", minimum=1)
  num_minibatches: int = setting(4, "gradient steps per pass", minimum=1)
  staleness: int = setting(0, "iterations that a rollout waits before it is trained on", minimum=0)
  prefix_cap: float = setting(
    float("inf"),
    "largest weight of a prefix; below inf the KL's gradient is biased",
    minimum=1.0,
    read_when=("kl_correction", ("prefix",)),
  )
  trust_region: str = setting(
    "clip",
    "what holds the policy near the one that sampled",
    choices=tuple(policy_losses.POLICY_LOSSES),
  )
  clip_eps_low: float = setting(
    0.2,
    "ratio may fall to 1 - this",
    minimum=0.0,
    maximum=1.0,
    read_when=("trust_region", _CLIPPED),
  )
  clip_eps_high: float = setting(
    0.2,
    "ratio may rise to 1 + this",
    minimum=0.0,
    read_when=("trust_region", (*_CLIPPED, "truncated")),
  )
  trust_region_size: float = setting(
    0.15,
    "shift in the probability of a token at which the trust region ends; of kl_mask, nats",
    minimum=1e-6,
    read_when=("trust_region", _SIZED),
  )
  trust_region_beta: float = setting(
    1.0,
    "coefficient of the KL to the old policy, per nat and token; regression: per nat of KL(pi || "
    "old), that to pi_ref included",
    minimum=0.0,
    read_when=("trust_region", _KL_TRUST_REGIONS),
  )
  trust_region_adaptive: bool = setting(
    False,
    "double or halve trust_region_beta by PPO's rule, within {:g} and {:g}".format(
      *ops.BETA_BOUNDS
    ),
    read_when=("trust_region", _KL_TRUST_REGIONS),
  )
  trust_region_target: float = setting(
    0.05,
    "KL(old || pi) to steer to, nats per sequence",
    minimum=1e-6,
    read_when=("trust_region_adaptive", (True,)),
  )
  max_kl_old: float = setting(
    float("inf"), "KL(old || pi), nats per sequence, that ends an iteration's epochs", minimum=0.0
  )

  def __post_init__(self):
    super().__post_init__()
    self.check_divides("num_minibatches", self.batch_size, "--batch_size")
    rows = self.batch_size // self.num_minibatches
    self.check_divides("accumulation", rows, "--batch_size / --num_minibatches")
    if self.trust_region == "regression" and not self.trust_region_beta:
      raise UserError("--trust_region=regression divides by --trust_region_beta, so it is not 0.")
    lowest, highest = ops.BETA_BOUNDS
    if self.trust_region == "centred" and self.staleness:
      raise UserError(
        f"--staleness={self.staleness}: --trust_region=centred reads the distributions that the "
        "sampler drew from, which a late rollout has not kept. Leave one of them out."
      )
    if self.trust_region == "centred" and self.sampler_correction != "none":
      raise UserError(
        f"--sampler_correction={self.sampler_correction}: --trust_region=centred takes off what "
        "the sampler expects of the score without weights. Leave one of them out."
      )
    if self.trust_region_adaptive and not lowest <= self.trust_region_beta <= highest:
      raise UserError(
        f"--trust_region_beta={self.trust_region_beta}: --trust_region_adaptive keeps it from "
        f"{lowest:g} to {highest:g}. Write a value in between."
      )

  def algorithm(self) -> Algorithm:
    return dataclasses.replace(
      super().algorithm(),
      loss=policy_losses.without_critic(policy_losses.POLICY_LOSSES[self.trust_region]),
      adapts_trust_region=self.trust_region_adaptive,
      reads_sampler=self.trust_region == "centred",
      num_epochs=self.num_epochs,
      num_minibatches=self.num_minibatches,
      staleness=self.staleness,
    )

  def hypers(self) -> Hypers:
    return (
      super()
      .hypers()
      ._replace(
        prefix_cap=self.prefix_cap,
        clip_eps_low=self.clip_eps_low,
        clip_eps_high=self.clip_eps_high,
        trust_region_size=self.trust_region_size,
        trust_region_beta=self.trust_region_beta,
        trust_region_target=self.trust_region_target,
        max_kl_old=self.max_kl_old,
      )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurrogateConfig(SurrogateFields, RLConfig):
  """Several gradient steps on each rollout; those of scored ones."""

  kl_refresh: str = setting(
    "iteration",
    "when the KL in the reward is computed anew",
    choices=objective.REFRESHES,
    read_when=("kl_placement", ("reward", "both")),
  )

  def algorithm(self) -> Algorithm:
    return dataclasses.replace(super().algorithm(), kl_refresh=self.kl_refresh)
