"""What each divergence from the reference keeps of its diversity, at equal gold.

    python -m experiments.diversity

Two policies that gained the same need not have kept the same. On two languages all of whose
completions are enumerated, the task `tree` and the two words of `experiments.mode_seeking`, beta is
chosen for each divergence so that the best policy has the same expected score, and a table of
logits is trained to it, by exact gradients. Entropy, and how many of the modes are among k draws,
are shown over training; no KL at all, stopped when it has that score, is there too. On the embedded
task GRPO is trained with each divergence and several betas, as one sweep, and pass@k and entropy
are compared where gold accuracy is the same. Most of its time is that of these 15 runs.

Sources: Long Li et al., "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse
in RL with Verifiable Reward" (DPH-RL), 2025, who take the divergences on samples of the reference.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import mode_seeking, sweep
from experiments.lab import laboratory
from experiments.lab.diversity_page import report, show
from experiments.lab.mode_seeking_gaussian import make_descent
from experiments.settings import common
from experiments.settings.common import setting
from klrl.algorithm import kl_terms, objective
from klrl.errors import UserError
from klrl.exact import bandits, oracle
from klrl.figures import KL
from klrl.models import policy_model
from klrl.run.metrics import read_lines
from klrl.run.summary import read_summary
from klrl.run.workdir import create_workdir
from klrl.tasks import tree

# At its default --kl_alpha the alpha-divergence is Hellinger's.
DIVERGENCES = tuple(name for name in objective.DIVERGENCES if name != "alpha")
NONE = "none"
# Of the second language: one word is worth this much more than the other.
PREFERENCE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the experiment."""

  gain: float = setting(
    0.8, "share of what score can be gained at most that all have", minimum=0.01, maximum=0.99
  )
  k: int = setting(8, "draws among which a mode or a right answer is looked for", minimum=1)
  num_steps: int = setting(600, "steps of Adam on a table of logits", minimum=1)
  learning_rate: float = setting(0.05, "of these", minimum=0.0)
  num_iterations: int = setting(60, "iterations of GRPO", minimum=1)
  betas: str = setting("0.01,0.1,1", "of the divergences, in GRPO")

  def __post_init__(self):
    super().__post_init__()
    try:
      positive = all(float(beta) > 0 for beta in self.betas.split(","))
    except ValueError:
      positive = False
    if not positive:
      raise UserError(f"--betas={self.betas}: give positive numbers, as in 0.01,0.1,1.")


class Language(NamedTuple):
  """Completions as one choice among N, in float64."""

  ref: np.ndarray  # [N] log-probs of the reference
  scores: np.ndarray  # [N]
  modes: np.ndarray  # rows of the completions that are looked for


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(workdir):
    create_workdir(workdir, "diversity", config)
    return {
      "k": config.k,
      "gain": config.gain,
      "languages": {name: enumerated(config, make()) for name, make in LANGUAGES.items()},
      "arithmetic": trained(config, workdir, root),
    }

  return laboratory.conduct(config, "diversity", "diversity.json", compute, report, show, root=root)


def tree_language() -> Language:
  """Returns the task `tree`, with the policy that its runs start from."""
  model_config, params = tree.fresh_policy(0)
  with jax.enable_x64(True):
    logits = oracle.decoder_logits(policy_model(model_config), params, tree.TREE, [0])
    ref = np.asarray(oracle.log_probs(tree.TREE, np.asarray(logits, np.float64)))
  return Language(ref, tree.completion_scores(), tree.modes())


def two_words() -> Language:
  """Returns the language of two words, whose reference writes both with many errors.

  It is the language's own distribution at temperature 2. The score is the share of letters that are
  right for the nearer word, and a little more for the commoner word.
  """
  language = mode_seeking.make_language()
  words = language.tree.tokens[language.words]
  right = (language.tree.tokens == words[:, None]).mean(axis=-1)
  right[0] += PREFERENCE
  with jax.enable_x64(True):
    ref = np.asarray(jax.nn.log_softmax(language.scores / 2))
  return Language(ref, right.max(axis=0), np.array(language.words))


LANGUAGES = {"tree": tree_language, "two words": two_words}


def figures_of(language: Language, probs, k: int) -> dict:
  """Returns score, KL to the reference, entropy, and the share of modes in one and in k draws."""
  probs = np.asarray(probs, np.float64)
  surprise = -np.log(probs, where=probs > 0, out=np.zeros_like(probs))
  of_modes = probs[language.modes]
  return {
    "score": float(probs @ language.scores),
    "kl": max(0.0, float(probs @ (-surprise - language.ref))),  # Rounding may be below 0.
    "entropy": float(probs @ surprise),
    "found_1": float(of_modes.mean()),
    "found_k": float((1 - (1 - of_modes) ** k).mean()),
  }


def equal_beta(language: Language, divergence: str, score: float) -> tuple[float, np.ndarray]:
  """Returns (beta, probs [N]) of the best policy under a divergence whose score is `score`."""
  slope = kl_terms.slope_of(objective.KLPenalty(divergence=divergence))

  @jax.jit
  def found(ref, scores):
    def policy(log_beta):
      return bandits.optimal_under_slope(slope, ref, scores, beta=jnp.exp(log_beta))[0]

    def halve(_, bounds):
      low, high = bounds
      middle = (low + high) / 2
      too_good = policy(middle) @ scores > score
      return jnp.where(too_good, middle, low), jnp.where(too_good, high, middle)

    low, high = jax.lax.fori_loop(0, 24, halve, (jnp.log(1e-4), jnp.log(1e3)))
    return jnp.exp((low + high) / 2), policy((low + high) / 2)

  with jax.enable_x64(True):
    beta, probs = found(jnp.exp(language.ref), jnp.asarray(language.scores))
    return float(beta), np.asarray(probs)


def enumerated(config: Config, language: Language) -> dict:
  """Returns what each divergence keeps, of its best policy and over training, at equal score."""
  ref = np.exp(language.ref)
  lowest = ref @ language.scores
  score = lowest + config.gain * (language.scores.max() - lowest)
  steps = np.unique(np.linspace(0, config.num_steps, 41).astype(int)).tolist()
  scores, start = (jnp.asarray(x, jnp.float32) for x in (language.scores, language.ref))

  def path_of(divergence, beta):
    def loss(logits, ref_log_probs, beta):
      log_probs = jax.nn.log_softmax(logits)
      if divergence == NONE:
        return -jnp.exp(log_probs) @ scores
      exact = kl_terms.DIVERGENCES[divergence].exact
      cost = exact(log_probs, ref_log_probs, kl_terms.SHAPE)
      return beta * cost - jnp.exp(log_probs) @ scores

    path = make_descent(loss)(start, steps, config.learning_rate, start, jnp.float32(beta))
    each = [figures_of(language, jax.nn.softmax(logits), config.k) for logits in path]
    return {"steps": steps, **{name: [x[name] for x in each] for name in each[0]}}

  found = {}
  for divergence in DIVERGENCES:
    beta, probs = equal_beta(language, divergence, score)
    best = {"beta": beta, **figures_of(language, probs, config.k)}
    found[divergence] = {"best": best, "path": path_of(divergence, beta)}
  path = path_of(NONE, 0.0)
  stopped = {name: at(score, path["score"], path[name]) for name in path if name != "steps"}
  found[NONE] = {"best": {"beta": 0.0, **stopped}, "path": path}
  return {"start": figures_of(language, ref, config.k), "score": score, "divergences": found}


def at(value: float, values: list[float], others: list[float]) -> float:
  """Returns the figure `others` where `values` first reach `value`, between neighbouring points."""
  values, others = np.array(values, float), np.array(others, float)
  beyond = np.flatnonzero(values >= value)
  i = beyond[0] if len(beyond) else len(values) - 1
  if i == 0 or not len(beyond):
    return float(others[i])
  share = (value - values[i - 1]) / (values[i] - values[i - 1])
  return float(others[i - 1] + share * (others[i] - others[i - 1]))


def trained(config: Config, workdir: pathlib.Path, root: str) -> dict:
  """Returns what GRPO reached under each divergence and beta, and what it has at equal gold.

  Equal gold is the largest that all divergences reach with some beta.
  """
  settings = sweep.config_class("grpo")(
    sweep=f"kl_divergence={','.join(DIVERGENCES)};beta={config.betas}",
    seed=config.seed,
    num_iterations=config.num_iterations,
    kl_estimator="exact",
    kl_correction="none",
    num_eval_rows=1024,
    eval_completions=config.k,
    eval_every=0,
    num_samples=0,
    best_of_n=False,
    workdir=str(workdir / "grpo"),
  )
  folder = sweep.main(settings, root=root)
  names = {
    "gold": "gold", "entropy": "entropy", "kl": KL, f"pass_at_{config.k}": f"pass_at_{config.k}"
  }  # fmt: skip
  members, start = {divergence: [] for divergence in DIVERGENCES}, {}
  for member in sweep.members_of(settings):
    own = member.folder(folder)
    summary, lines = read_summary(own), read_lines(own / "metrics.jsonl")
    start = {name: summary[f"{key}_before"] for name, key in names.items()}
    members[member.values["kl_divergence"]].append(
      {
        "beta": member.values["beta"],
        **{name: summary[f"{key}_after"] for name, key in names.items()},
        "curves": {key: [x[key] for x in lines] for key in ("gold/mean", "policy/entropy")},
      }
    )
  gold = min(max(run["gold"] for run in runs) for runs in members.values())
  equal = {}
  for divergence, runs in members.items():
    points = sorted([start, *runs], key=lambda x: x["gold"])
    equal[divergence] = {
      name: at(gold, [x["gold"] for x in points], [x[name] for x in points]) for name in names
    }
  return {"start": start, "gold": gold, "members": members, "equal": equal}


if __name__ == "__main__":
  common.launch(main, Config)
