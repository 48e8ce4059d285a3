"""What a right gradient of the KL costs in noise, as completions grow and the sampler gets older.

    python -m experiments.kl_variance
    python -m experiments.kl_variance --policy=DIR --reference=DIR --prompts=FILE.jsonl

Several penalties have the gradient of KL(pi || ref) of whole completions in expectation, some of
them on the completions of an older policy too. They differ in variance. It is counted here in
completions: that many give a gradient whose standard error is as large as the gradient itself,
tr Cov(g) / |E g|^2 (a signal-to-noise ratio of one).

1. Trees of two tokens and 2 to 10 positions, with random policies, by enumeration: nothing is
   sampled. Beside the noise stands the error of what is not exact, as a fraction of the gradient.
2. A trained policy and its reference, by the gradients of single completions in all parameters.
   Without flags they are the embedded PPO policy and its SFT policy.

The older policy is, in 1, the policy and noise in its logits; in 2, the point at OLD_STEP of the
straight line through the parameters of reference (0) and policy (1). WORKDIR has
kl_variance.json, report.html and kl_noise.png. About two minutes on 2 cores after the embedded PPO
run.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments import ppo
from experiments.estimators import on_line
from experiments.lab import kl_variance_page, laboratory, note_pictures
from experiments.settings import common, rl, training
from experiments.settings.common import setting
from klrl import evaluation, inputs, ops, schema
from klrl.algorithm import kl_terms
from klrl.algorithm.kl_terms import TokenTerms
from klrl.algorithm.objective import KLPenalty
from klrl.devices import unread
from klrl.errors import UserError
from klrl.exact import oracle
from klrl.figures import digits
from klrl.run import progress
from klrl.sampling import make_sample_fn

PENALTIES = {
  str(penalty): penalty
  for penalty in (
    KLPenalty("reward", "k1"),
    KLPenalty("both", "k3"),
    KLPenalty("both", "exact"),
    KLPenalty("loss", "k1", "prefix", "sequence"),
    KLPenalty("loss", "k3", "prefix", "sequence"),
    KLPenalty("loss", "exact", "prefix", "sequence"),
    KLPenalty("loss", "k3", "token", "token"),
    KLPenalty("reward", "k1", credit="token"),
    KLPenalty("reward", "centred", credit="token"),
  )
}
BASELINES = tuple(PENALTIES)[-2:]  # k1 as it is, and less the KL of its prefix (vOPD)
HORIZONS = (2, 3, 4, 6, 8, 10)
NUM_POLICIES = 32  # on each tree
OLD_NOISE = 0.3  # standard deviation, of the logits of the older policy about those of the policy
OLD_STEP = 0.9
_CHUNK = 16  # completions whose gradients are there at a time, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig, common.PromptFields):
  """Settings of the experiment."""

  policy: str = setting("", "model directory of pi; default: the default PPO run")
  reference: str = setting("", "model directory of ref; default: the embedded SFT stage")
  num_completions: int = setting(1024, "completions drawn by each sampler", minimum=2)

  def __post_init__(self):
    super().__post_init__()
    if bool(self.policy) != bool(self.reference):
      raise UserError("Give both --policy and --reference, or neither.")
    if bool(self.policy) != bool(self.prompts):
      raise UserError("A --policy of yours needs --prompts of yours, and they need it.")


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(_):
    return {
      "trees": [on_trees(horizon, config.seed) for horizon in HORIZONS],
      "decoder": on_decoder(config, root),
    }

  workdir = laboratory.conduct(
    config, "kl_variance", "kl_variance.json", compute, kl_variance_page.report, show, root=root
  )
  note_pictures.write_noise(schema.read(workdir / "kl_variance.json"), workdir)
  return workdir


def show(results: dict) -> None:
  """Prints completions needed, on the longest tree and for the decoder."""
  longest, decoder = results["trees"][-1], results["decoder"]
  columns = {
    f"{longest['horizon']} tokens": longest["on_policy"],
    "older policy": longest["off_policy"],
    "decoder": decoder["on_policy"],
    "its older policy": decoder["off_policy"],
  }
  table = Table(
    title="Completions for a signal-to-noise ratio of one", box=None, title_justify="left"
  )
  table.add_column("penalty", overflow="fold", min_width=25)
  for name in columns:
    table.add_column(name, justify="right")
  for name in PENALTIES:
    table.add_row(name, *(digits(found[name]["completions"]) for found in columns.values()))
  progress.console.print(table)
  progress.console.print(kl_variance_page.verdict(results), soft_wrap=True)


def on_trees(horizon: int, seed: int) -> dict:
  """Returns noise and error of each penalty on a tree of two tokens, medians over policies.

  `baseline` has, on-policy, the median variance of `BASELINES[1]` over that of `BASELINES[0]`, and
  for how many policies it is less.
  """
  tree = oracle.make_tree(2, horizon)
  drawn = np.random.default_rng((seed, horizon)).normal(
    size=(3, NUM_POLICIES, len(tree.depths), tree.vocab_size)
  )
  surrogates = [kl_terms.surrogate(penalty) for penalty in PENALTIES.values()]

  def of_one(logits, noise, ref_logits):
    exact = jax.grad(lambda x: oracle.sequence_kl(tree, x, ref_logits))(logits)
    size = (exact**2).sum()

    def against(old_logits):
      means, traces = oracle.gradient_moments(
        tree, surrogates, logits, ref_logits, old_logits=old_logits
      )
      return traces / size, jnp.sqrt(((means - exact[None]) ** 2).sum(axis=(1, 2)) / size)

    kl = oracle.sequence_kl(tree, logits, ref_logits)
    old = logits + OLD_NOISE * noise
    return kl, oracle.sequence_kl(tree, logits, old), against(logits), against(old)

  with jax.enable_x64(True):
    found = jax.jit(jax.vmap(of_one))(*drawn)
    kl, old_kl, on_policy, off_policy = jax.tree.map(lambda x: np.median(x, axis=0), found)
    without, less_kl = (found[2][0][:, list(PENALTIES).index(x)] for x in BASELINES)
  return {
    "horizon": horizon,
    "kl": float(kl),
    "old_kl": float(old_kl),
    "on_policy": _by_name(*on_policy),
    "off_policy": _by_name(*off_policy),
    "baseline": {
      "variance": float(np.median(less_kl / without)),
      "less": int((less_kl < without).sum()),
      "policies": NUM_POLICIES,
    },
  }


def _by_name(completions, errors) -> dict:
  rows = zip(PENALTIES, completions.tolist(), errors.tolist(), strict=True)
  return {name: {"completions": x, "error": error} for name, x, error in rows}


def on_decoder(config: Config, root: str) -> dict:
  """Returns the noise of each penalty for a policy and its reference, by single completions."""
  sources = _sources(config, root)
  inputs.check_inputs(sources)
  models = inputs.load_models(sources, policy=sources.policy, reward_model="")
  task = inputs.load_task(sources, models)
  params, ref_params = unread.read((models.policy_params, models.reference_params))
  old_params = on_line(ref_params, params, OLD_STEP)
  sample = jax.jit(
    make_sample_fn(
      models.policy,
      max_completion_len=task.max_completion_len,
      eos_id=models.tokenizer.eos_ids,
      pad_id=models.tokenizer.pad_id,
    )
  )
  evaluate = evaluation.make_evaluate_fn(models.policy, models.policy)
  rows = np.arange(config.num_completions) % len(task.held_out.tokens)
  found = {}
  for name, sampler in (("on_policy", params), ("off_policy", old_params)):
    tokens, mask = task.held_out.tokens[rows], task.held_out.mask[rows]
    rollout = sample(sampler, tokens, mask, jax.random.key(config.seed), temperature=1.0)
    found[name] = _noise(evaluate, params, sampler, ref_params, rollout)
  return found | {"num_completions": config.num_completions, "tokens": task.max_completion_len}


def _sources(config: Config, root: str) -> inputs.Sources:
  """Returns where policy, reference and prompts come from; the embedded PPO is run if need be."""
  names = {field.name for field in dataclasses.fields(common.PromptFields)}
  kind = rl.PolicyConfig if config.prompts else rl.RLConfig  # An embedded task may have scores.
  settings = kind(policy=config.policy, **{name: getattr(config, name) for name in sorted(names)})
  policy, reference = config.policy, config.reference
  if not policy:
    embedded = ppo.Config(task=config.task)
    policy = str(ppo.main(embedded, root=root))
    reference = training.model_directories(embedded)["policy"]
  return dataclasses.replace(
    settings.sources(), policy=policy, reference=reference, has_reference=True, enumerated=False
  )


def _noise(evaluate, params, old_params, ref_params, rollout) -> dict:
  """Returns for each penalty the completions for a signal-to-noise ratio of one.

  |E g|^2 is estimated without bias, by products of different completions, for the penalty of least
  noise among those with the gradient of KL(pi || ref): these have all the same.
  """

  def terms(params, row, old_exact_kl=None):
    of_old = evaluate(params, ref_params, row, temperature=1.0)
    return TokenTerms(
      of_old.log_probs,
      row.old_log_probs,
      of_old.ref_log_probs,
      row.completion_mask,
      of_old.kl_exact,
      old_exact_kl,
    )

  def loss(params, penalty, row):
    old_exact_kl = terms(old_params, row).exact_kl
    per_token = kl_terms.surrogate(penalty)(terms(params, row, old_exact_kl))
    return ops.zero_padding(per_token, row.completion_mask).sum()

  @functools.partial(jax.jit, static_argnames="penalty")
  def moments(penalty, rows):
    """Returns (sum of gradients, sum of their squared norms) over the completions."""

    def add(sums, chunk):
      gradients = jax.vmap(lambda row: jax.grad(loss)(params, penalty, _alone(row)))(chunk)
      total, squares = sums
      total = jax.tree.map(lambda x, g: x + g.sum(axis=0), total, gradients)
      return (total, squares + _squared_norm(gradients)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, (zeros, jnp.zeros(())), rows)[0]

  num = len(rollout.completion_mask)
  size = math.gcd(_CHUNK, num)
  rows = jax.tree.map(lambda x: x.reshape(num // size, size, *x.shape[1:]), rollout)
  by_name = {name: moments(penalty, rows) for name, penalty in PENALTIES.items()}
  traces, signals = {}, {}
  for name, (total, squares) in by_name.items():
    of_sum = _squared_norm(total)
    signals[name] = float((of_sum - squares) / (num * (num - 1)))
    traces[name] = float((squares - of_sum / num) / (num - 1))
  exact = [name for name, penalty in PENALTIES.items() if penalty.credit == "sequence"]
  least = min(exact, key=traces.get)
  return {name: {"completions": trace / signals[least]} for name, trace in traces.items()}


def _alone(row):
  return jax.tree.map(lambda x: x[None], row)


def _squared_norm(tree):
  return sum((x**2).sum() for x in jax.tree.leaves(tree))


if __name__ == "__main__":
  common.launch(main, Config)
