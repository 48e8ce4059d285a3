"""Estimators of KL(pi || ref) from samples of pi: how far off one sample is, and when.

    python -m experiments.estimators
    python -m experiments.estimators --policy=DIR --reference=DIR

The tables of John Schulman's "Approximating KL Divergence" (2020) and a case in which k3 is far
worse, each by sums that are exact and by a million samples; k1 with a control variate; and the
policies of the embedded task, all through the functions that training calls. About 30 s on 2 cores,
and two minutes more where the embedded PPO run has not been made before.

A case is a distribution pi with a reference: `Points` with the probability, log pi and log ref of
every outcome. The sum over them is an expectation under pi, whether they are the outcomes of a
categorical, the nodes of a quadrature or samples of equal weight. Cases are computed in float64,
policies in float32. All KLs are in nats; for policies, per sequence.

The policies lie on the straight line theta_ref + step * (theta - theta_ref) through the parameters
of the reference (step 0) and of the trained policy (step 1): KLs of every size from two models.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments import ppo
from experiments.lab import laboratory
from experiments.lab.estimators_page import (
  CASE_COLUMNS,
  POLICY_COLUMNS,
  case_rows,
  policy_row,
  report,
  verdict,
)
from experiments.settings import common, training
from experiments.settings.common import setting
from klrl import evaluation, ops
from klrl.errors import UserError
from klrl.models import (
  check_tokenizer,
  load_policy,
  load_tokenizer,
  policy_model,
  shared_tokens,
)
from klrl.run import progress
from klrl.sampling import make_sample_fn, top_k_logits, top_p_logits
from klrl.tasks import arithmetic, data

NUM_NODES = 100  # of Gauss-Hermite quadrature: exact for the cases here to 13 digits
NUM_SAMPLES = 1_000_000
C_GRID = np.linspace(-0.25, 1.5, 141)
STEPS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the comparison of estimators."""

  policy: str = setting("", "model directory, embedded task; default: the default PPO run's")
  reference: str = setting("", "model directory of its reference; default: that run's SFT policy")
  completions_per_prompt: int = setting(64, "completions of each held-out problem", minimum=2)

  def __post_init__(self):
    super().__post_init__()
    if bool(self.policy) != bool(self.reference):
      raise UserError("--policy and --reference go together: the line runs from one to the other.")


class Points(NamedTuple):
  """Outcomes of pi, [N] each; expectations are sums weighted by `probs`."""

  probs: np.ndarray
  log_probs: np.ndarray
  ref_log_probs: np.ndarray


class Case(NamedTuple):
  """A distribution with its reference."""

  title: str
  name: str
  true: float  # KL(pi || ref)
  points: Points
  sample: Callable[[np.random.Generator, int], Points]


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(_):
    directories = model_directories(config, root=root)
    return {
      **laboratory_figures(config.seed, num_samples=NUM_SAMPLES),
      "policies": measure_policies(config, *directories),
    }

  return laboratory.conduct(
    config, "estimators", "estimators.json", compute, report, show, root=root
  )


def gaussian(mu: float) -> Case:
  """Returns pi = N(0, 1) with the reference N(mu, 1), by Gauss-Hermite quadrature."""

  def points(x, probs):
    # The constant of the two densities is the same, and every estimator reads their difference.
    return Points(probs, -(x**2) / 2, -((x - mu) ** 2) / 2)

  nodes, weights = np.polynomial.hermite_e.hermegauss(NUM_NODES)
  return Case(
    f"Schulman, \u03bc = {mu:g}",
    f"N(0, 1) against N({mu:g}, 1)",
    mu**2 / 2,
    points(nodes, weights / weights.sum()),
    lambda rng, num: points(rng.standard_normal(num), np.full(num, 1 / num)),
  )


def categorical(title: str, probs, ref_probs) -> Case:
  """Returns a case of finitely many outcomes."""
  probs, ref_probs = np.asarray(probs), np.asarray(ref_probs)
  points = Points(probs, np.log(probs), np.log(ref_probs))

  def sample(rng, num):
    chosen = rng.choice(len(probs), size=num, p=probs)
    return Points(np.full(num, 1 / num), points.log_probs[chosen], points.ref_log_probs[chosen])

  with jax.enable_x64(True):
    true = ops.exact_kl(jnp.asarray(points.log_probs), jnp.asarray(points.ref_log_probs))
  name = " against ".join(f"({', '.join(f'{p:g}' for p in x)})" for x in (probs, ref_probs))
  return Case(title, name, float(true), points, sample)


def cases() -> list[Case]:
  """Returns Schulman's two, two categoricals, and one in which k3 has a heavy tail."""
  return [
    gaussian(0.1),
    gaussian(1.0),
    categorical("mirrored", (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)),
    categorical("skewed", (0.7, 0.2, 0.1), (0.3, 0.3, 0.4)),
    categorical("heavy tail", (0.9, 0.0999, 0.0001), (0.5, 0.3, 0.2)),
  ]


def estimates(points: Points) -> dict[str, np.ndarray]:
  """Returns the value of every estimator at every outcome, [N] float64, nats.

  `max(k1, 0)` is what AlpacaFarm takes off its reward (Dubois et al., 2023, its code).
  """
  with jax.enable_x64(True):
    log_probs, ref_log_probs = jnp.asarray(points.log_probs), jnp.asarray(points.ref_log_probs)
    values = {
      name: np.asarray(estimator(log_probs, ref_log_probs))
      for name, estimator in ops.KL_ESTIMATORS.items()
    }
  return {**values, "max(k1, 0)": np.maximum(values["k1"], 0)}


def moments(probs: np.ndarray, values: np.ndarray) -> tuple[float, float]:
  """Returns the mean and the standard deviation of `values` [N] under `probs` [N]."""
  mean = (probs * values).sum()
  return float(mean), float(np.sqrt((probs * (values - mean) ** 2).sum()))


def with_control_variate(values: dict[str, np.ndarray], c: float) -> np.ndarray:
  """Returns k1 + c * (u - 1), u = ref / pi, which has the mean of k1 for every c.

  E[u] = 1 under pi, and k3 - k1 = u - 1: c = 0 is k1, c = 1 is k3.
  """
  return values["k1"] + c * (values["k3"] - values["k1"])


def best_c(probs: np.ndarray, values: dict[str, np.ndarray]) -> float:
  """Returns the c of least variance, -Cov(k1, u) / Var(u)."""
  k1, u_less_1 = values["k1"], values["k3"] - values["k1"]
  k1_mean, u_mean = (probs * k1).sum(), (probs * u_less_1).sum()
  covariance = (probs * (k1 - k1_mean) * (u_less_1 - u_mean)).sum()
  return float(-covariance / (probs * (u_less_1 - u_mean) ** 2).sum())


def measure(case: Case, sample: Points) -> dict:
  """Returns mean and deviation of all estimators of a case, exactly and over a sample, in nats.

  `control_variate` has the deviations of k1 + c * (u - 1) over `C_GRID`, and the best of all c.
  """
  probs, values, sampled = case.points.probs, estimates(case.points), estimates(sample)
  keys = ("mean", "std", "sample_mean", "sample_std")
  figures = {
    name: dict(zip(keys, (*moments(probs, x), *moments(sample.probs, sampled[name])), strict=True))
    for name, x in values.items()
  }
  c = best_c(probs, values)
  *stds, best_std = (
    moments(probs, with_control_variate(values, x))[1] for x in (*C_GRID.tolist(), c)
  )
  return {
    "title": case.title,
    "name": case.name,
    "true": case.true,
    "estimators": figures,
    "control_variate": {"best_c": c, "best_std": best_std, "c": C_GRID.tolist(), "stds": stds},
  }


def running_means(sample: Points) -> dict:
  """Returns the mean of the first n samples for k1, k2, k3, at values of n spaced by their logs."""
  num = np.unique(np.geomspace(100, len(sample.probs), 150).astype(int))
  values = estimates(sample)
  counts = np.arange(1, len(sample.probs) + 1)
  return {
    "num": num.tolist(),
    **{name: (np.cumsum(values[name]) / counts)[num - 1].tolist() for name in ops.KL_ESTIMATORS},
  }


TRUNCATED = (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)  # policy and reference


def truncated_sampling(sampler: str, cut: Callable, probs, ref_probs) -> dict:
  """Returns the means of k1 and k3 of full policies where the sampler drew from `cut(logits)`."""
  case = categorical("truncated", probs, ref_probs)
  with jax.enable_x64(True):
    kept = jax.nn.softmax(cut(jnp.asarray(case.points.log_probs)))
  values = estimates(case.points)
  k1, k3 = (moments(np.asarray(kept), values[name])[0] for name in ("k1", "k3"))
  return {"name": case.name, "true": case.true, "sampler": sampler, "k1": k1, "k3": k3}


def small_k3(log_ratio: float) -> dict:
  """Returns k3 at one log-ratio: in float64, by `ops.k3` in float32, by the usual formula there."""
  points = Points(np.ones(1), np.array([log_ratio]), np.zeros(1))
  x = np.float32(log_ratio)
  return {
    "log_ratio": log_ratio,
    "true": float(estimates(points)["k3"][0]),
    "ops": float(ops.k3(jnp.float32(x), jnp.float32(0))),
    "textbook": float(np.exp(-x) - np.float32(1) + x),
  }


def laboratory_figures(seed: int, *, num_samples: int) -> dict:
  """Returns the figures of all that needs no model."""
  all_cases = cases()
  samples = [
    case.sample(np.random.default_rng((seed, i)), num_samples) for i, case in enumerate(all_cases)
  ]
  heavy = all_cases[-1].points
  log_ratios = np.linspace(-2.5, 4, 131)
  curves = estimates(Points(np.ones_like(log_ratios), log_ratios, np.zeros_like(log_ratios)))
  return {
    "num_samples": num_samples,
    "curves": {
      "log_ratio": log_ratios.tolist(),
      **{name: curves[name].tolist() for name in ops.KL_ESTIMATORS},
    },
    "cases": [measure(*pair) for pair in zip(all_cases, samples, strict=True)],
    "heavy": {
      "probs": heavy.probs.tolist(),
      "ref_probs": np.exp(heavy.ref_log_probs).tolist(),
      "estimates": {name: x.tolist() for name, x in estimates(heavy).items()},
      "running_means": running_means(samples[-1]),
    },
    "truncated": truncated_sampling("top-2", lambda x: top_k_logits(x, 2), *TRUNCATED),
    "nucleus": truncated_sampling("top-p at 0.7", lambda x: top_p_logits(x, 0.7), *TRUNCATED),
    "float32": small_k3(1e-4),
  }


def model_directories(config: Config, *, root: str) -> tuple[str, str]:
  """Returns the directories of policy and reference, running the embedded PPO if need be."""
  if config.policy:
    return config.policy, config.reference
  embedded = ppo.Config()
  policy = ppo.main(embedded, root=root)
  return str(policy), training.model_directories(embedded)["policy"]


def measure_policies(config: Config, policy_dir: str, reference_dir: str) -> list[dict]:
  """Returns the figures of the policies on the line from the reference to the trained policy."""
  (model_config, params), (reference_config, reference_params) = (
    load_policy(directory) for directory in (policy_dir, reference_dir)
  )
  tokenizer = load_tokenizer(policy_dir)
  check_tokenizer(tokenizer, model_config)
  num_shared = shared_tokens(tokenizer, load_tokenizer(reference_dir))
  if model_config != reference_config or num_shared != tokenizer.num_tokens:
    raise UserError(
      f"{policy_dir} and {reference_dir} hold models of different shape or vocabulary; there is no "
      "straight line between their parameters."
    )
  prompts = data.encode_prompts(
    arithmetic.prompt_records(held_out=True),
    tokenizer,
    max_prompt_len=model_config.max_len - arithmetic.MAX_COMPLETION_LEN,
  )
  model = policy_model(dataclasses.replace(model_config, num_tokens=tokenizer.num_tokens))
  sample = make_sample_fn(
    model,
    max_completion_len=arithmetic.MAX_COMPLETION_LEN,
    eos_id=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )
  tokens, mask = (
    np.repeat(x, config.completions_per_prompt, axis=0) for x in (prompts.tokens, prompts.mask)
  )
  return measure_line(
    model, params, reference_params, sample, tokens, mask, key=jax.random.key(config.seed)
  )


def on_line(reference_params, params, step: float):
  """Returns the parameters at `step` from the reference (0) to the policy (1) or beyond."""
  return jax.tree.map(lambda ref, x: ref + step * (x - ref), reference_params, params)


def measure_line(model, params, reference_params, sample, tokens, mask, *, key) -> list[dict]:
  """Returns for each of `STEPS` the KL to the reference and what each estimator says of it.

  One completion is drawn for every row of the prompts `tokens`, `mask` [B, P]. Estimators are
  summed over a completion. The truth is the mean of the exact next-token KL, which is unbiased and
  whose own error is given; biases are of paired differences to it.
  """
  sample, evaluate = jax.jit(sample), jax.jit(evaluation.make_evaluate_fn(model, model))
  policies = []
  for i, step in enumerate(STEPS):
    moved = on_line(reference_params, params, step)
    rollout = sample(moved, tokens, mask, jax.random.fold_in(key, i), temperature=1.0)
    evaluated = evaluate(moved, reference_params, rollout, temperature=1.0)
    policies.append({"step": step, **sequence_figures(evaluated)})
  return policies


def sequence_figures(evaluated: evaluation.Evaluation) -> dict:
  """Returns KL(pi || ref) and mean, bias and deviation of each estimator, nats per sequence.

  `largest_share` is what the one completion farthest from the mean adds to the variance: near 1,
  the deviation is hardly known.
  """
  completions = np.asarray(evaluated.rollout.completion_mask)
  per_token = {
    name: estimator(evaluated.log_probs, evaluated.ref_log_probs)
    for name, estimator in ops.KL_ESTIMATORS.items()
  } | {"exact": evaluated.kl_exact}
  sums = {
    name: np.where(completions, np.asarray(x, np.float64), 0.0).sum(axis=1)
    for name, x in per_token.items()
  }
  root, exact = np.sqrt(len(completions)), sums["exact"]
  return {
    "kl": exact.mean(),
    "kl_stderr": exact.std() / root,
    "num_completions": len(completions),
    "estimators": {
      name: {
        "mean": x.mean(),
        "std": x.std(),
        "bias": (x - exact).mean(),
        "bias_stderr": (x - exact).std() / root,
        "largest_share": ((x - x.mean()) ** 2).max() / ((x - x.mean()) ** 2).sum(),
      }
      for name, x in sums.items()
    },
  }


def show(results: dict) -> None:
  """Prints the tables of the page."""
  cases = [row for case in results["cases"] for row in case_rows(case)]
  policies = [policy_row(policy) for policy in results["policies"]]
  for title, columns, rows in (
    ("Bias and deviation of one sample, over the KL", CASE_COLUMNS, cases),
    ("Deviation and bias of one completion, over the KL", POLICY_COLUMNS, policies),
  ):
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
      table.add_column(column, justify="right" if i else "left")
    for row in rows:
      table.add_row(*row)
    progress.console.print(table)
  progress.console.print(verdict(results["policies"]))


if __name__ == "__main__":
  common.launch(main, Config)
