"""Two directions and two anchors of KL: to the reference or to the old policy, forward or back.

    python -m experiments.kl_directions

Exact studies of one choice among few: which moves KL(new||old) and KL(old||new) permit, how large
the first can be when the second is known, that to second order they are one, that a local KL sets
the pace and not the end, where a regression to what lies between both anchors leads, and what value
targets of a late rollout are those of. Then PPO on
the embedded task with a KL to the reference (global), a KL to the policy that sampled (local, in
either direction), both, and none; and KL in the reward against KL as a loss of its own, when a
rollout is used for 1, 4 and 16 passes. About eight minutes on 2 CPU cores, stages included. WORKDIR
has kl_directions.json, report.html and kl_passes.png.

Sources: John Schulman et al., "Proximal Policy Optimization Algorithms", 2017, eq. 8, for the local
penalty; Long Ouyang et al. (InstructGPT), 2022, eq. 2, for the global one; Igal Sason and Sergio
Verdu, "f-Divergence Inequalities", 2016, for the method of the bound.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments import ppo
from experiments.lab import laboratory, note_pictures
from experiments.lab.kl_directions_page import final_figures, report
from experiments.settings import common
from experiments.settings.common import setting
from klrl import ops, schema
from klrl.errors import UserError
from klrl.exact import bandits, oracle
from klrl.figures import KL
from klrl.run import progress
from klrl.run.metrics import read_lines
from klrl.run.summary import read_summary
from klrl.run.workdir import create_workdir

DIRECTIONS = ("kl_old_new", "kl_new_old")
ETAS, NUM_STEPS = (0.25, 1.0, 4.0), 21  # of the study of pace
BETA, LOCAL_BETA, NUM_REGRESSIONS = 0.5, 1.5, 41  # of the study of a regression
# Changes to PPO's defaults.
ANCHORS = {
  "none": {"kl_placement": "none", "trust_region": "none"},
  "global": {"trust_region": "none"},
  "local KL(old||new)": {"kl_placement": "none", "trust_region": "kl_old_new"},
  "local KL(new||old)": {"kl_placement": "none", "trust_region": "kl_new_old"},
  "global and local KL(old||new)": {"trust_region": "kl_old_new"},
  "global and local KL(new||old)": {"trust_region": "kl_new_old"},
}
PENALTIES = {
  "k1 in the reward, stale": {},
  "k1 in the reward, fresh": {"kl_refresh": "minibatch"},
  "exact KL as a loss, corrected": {
    "kl_placement": "loss",
    "kl_estimator": "exact",
    "kl_correction": "prefix",
  },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the two studies of PPO; the exact ones have none."""

  num_iterations: int = setting(80, "iterations of each PPO run", minimum=1)
  beta: float = setting(0.5, "of the global KL, reward per nat of sequence KL", minimum=1e-6)
  trust_region_beta: float = setting(1.0, "of the local KL, per nat and token", minimum=0.0)
  epochs: str = setting("1,4,16", "passes over a rollout that are compared")

  def __post_init__(self):
    super().__post_init__()
    if not all(part.isdigit() and int(part) for part in self.epochs.split(",")):
      raise UserError(f"--epochs={self.epochs}: give positive integers, as in 1,4,16.")


def kl(probs, other_probs) -> jax.Array:
  """Returns KL(probs || other_probs) [...] of distributions [..., V], nats."""
  probs, other_probs = jnp.broadcast_arrays(jnp.asarray(probs), jnp.asarray(other_probs))
  return ops.exact_kl(jnp.log(probs), jnp.log(other_probs))


def kappa(t) -> jax.Array:
  """Returns `(t ln t - t + 1) / (t - 1 - ln t)`, about ln t - 1 for large t; t > 1.

  The largest ratio of KL(new||old) to KL(old||new) when no probability grows more than t-fold: the
  ratio of the two generators of f-divergence, which increases with t.
  """
  t = jnp.asarray(t)
  log_t = jnp.log(t)
  return (t * log_t - t + 1) / (t - 1 - log_t)


class Bounds(NamedTuple):
  """Upper bounds of KL(new||old), nats, from delta = KL(old||new) and the least old probability."""

  sharp: jax.Array  # kappa(1 / p_min) * delta
  log: jax.Array  # log(1 + delta / p_min), through the chi-square divergence
  linear: jax.Array  # delta / p_min


def new_old_bounds(delta, p_min) -> Bounds:
  """Returns bounds of KL(new||old) [...] for delta [...] and p_min [...]."""
  return Bounds(kappa(1 / p_min) * delta, jnp.log1p(delta / p_min), delta / p_min)


def farthest(p, radius, direction: str, *, up: bool, num_steps: int = 200) -> jax.Array:
  """Returns the largest (`up`) or least probability that an action of probability `p` may get.

  The rest of the mass keeps its proportions, so that two outcomes tell all.

  Args:
    p: [...] old probability.
    radius: [...] of the KL ball, nats.
    direction: `kl_old_new` or `kl_new_old`, the KL that is held below the radius.
    up: which way the action moves.
    num_steps: of the bisection.
  """

  def distance(new):
    old = jnp.stack([p, 1 - p], axis=-1)
    new = jnp.stack([new, 1 - new], axis=-1)
    return kl(old, new) if direction == "kl_old_new" else kl(new, old)

  p, radius = jnp.broadcast_arrays(jnp.asarray(p), jnp.asarray(radius))
  inside, outside = p, jnp.full_like(p, 1.0 if up else 0.0)
  for _ in range(num_steps):
    middle = (inside + outside) / 2
    fits = distance(middle) <= radius
    inside, outside = jnp.where(fits, middle, inside), jnp.where(fits, outside, middle)
  return inside


class SecondOrder(NamedTuple):
  """How two KLs of a small move compare with half the Fisher form of it."""

  fisher: jax.Array  # d' F d, for the direction d in logits
  kappa3: jax.Array  # third central moment of d under the old policy
  old_new: jax.Array  # KL(old||new) / (eps^2 d'Fd / 2)
  new_old: jax.Array
  third: jax.Array  # (KL(new||old) - KL(old||new)) / (eps^3 kappa3 / 6); 1 as eps -> 0


def second_order(probs, direction, eps) -> SecondOrder:
  """Returns the agreement of both KLs when the logits of `probs` [V] move by `eps * direction`."""
  probs, direction = jnp.asarray(probs), jnp.asarray(direction)
  centred = direction - (probs * direction).sum()
  fisher, kappa3 = ((probs * centred**power).sum() for power in (2, 3))
  logits = jnp.log(probs)
  moved = logits + eps * direction
  old_new, new_old = ops.exact_kl(logits, moved), ops.exact_kl(moved, logits)
  half = eps**2 * fisher / 2
  return SecondOrder(
    fisher, kappa3, old_new / half, new_old / half, (new_old - old_new) / (eps**3 * kappa3 / 6)
  )


def pace() -> dict:
  """Returns KL(pi || optimum) over the steps of a policy that both a global and a local KL hold.

  There are four choices, beta is 1, and each step is the best one, `bandits.mirror_step`. `eta` is
  one over the coefficient of the local KL; `kl` has [steps] for each.
  """
  ref, scores = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), jnp.arange(4.0)
  optimum = jax.nn.log_softmax(ref + scores)

  def path(eta):
    def step(log_probs, _):
      after = bandits.mirror_step(ref, log_probs, scores, beta=1.0, eta=eta)
      return after, ops.exact_kl(log_probs, optimum)

    return jax.lax.scan(step, ref, length=NUM_STEPS)[1]

  return {"eta": list(ETAS), "kl": [path(eta) for eta in ETAS]}


def regressions() -> dict:
  """Returns where DAR's regression leads on a tree, when each iteration samples from the last end.

  What both KLs lead to, with `beta` and `trust_region_beta`, is the best policy for one KL to
  ref^w old^(1 - w) / Z, w = beta / (beta + trust_region_beta). Over the iterations, the first of
  which samples from the reference, `between` is the largest total variation of the two; `residual`
  the largest gradient of the regression's loss there, over that at the policy that sampled; and
  `distance` [iterations] the total variation of the sampler and ref * exp(score / beta) / Z. Li He
  et al., "Unifying Stable Optimization and Reference Regularization in RLHF", 2026 (DAR).
  """
  tree, rng = oracle.make_tree(3, 3), np.random.default_rng(0)
  ref_logits = jnp.asarray(rng.standard_normal((len(tree.depths), tree.vocab_size)))
  scores = jnp.asarray(rng.standard_normal(len(tree.tokens)))
  scale = BETA + LOCAL_BETA
  share = BETA / scale
  ref = oracle.log_probs(tree, ref_logits)
  optimum = jax.nn.softmax(ref + scores / BETA)

  def iteration(logits, _):
    old = oracle.log_probs(tree, logits)
    totals = scores - BETA * (old - ref)
    ahead = jnp.broadcast_to((totals - jnp.exp(old) @ totals)[:, None], tree.tokens.shape)
    weights = ops.exponential_weights(ahead, temperature=scale)

    def loss(logits):
      per_token = ops.reinforce_loss(oracle.token_log_probs(tree, logits), weights, tree.mask)
      return jnp.exp(old) @ per_token.sum(axis=1)

    end = oracle.optimal_policy(tree, logits, totals, beta=scale).logits
    between = jax.nn.softmax(share * ref + (1 - share) * old + scores / scale)
    at_end, at_old = (jnp.linalg.norm(jax.grad(loss)(x)) for x in (end, logits))
    return end, {
      "between": bandits.total_variation(jnp.exp(oracle.log_probs(tree, end)), between),
      "residual": at_end,
      "start": at_old,
      "distance": bandits.total_variation(jnp.exp(old), optimum),
    }

  found = jax.lax.scan(iteration, ref_logits, length=NUM_REGRESSIONS)[1]
  return {
    "beta": BETA,
    "trust_region_beta": LOCAL_BETA,
    "between": found["between"].max(),
    "residual": found["residual"].max() / found["start"][0],
    "distance": found["distance"],
  }


def late_values() -> dict:
  """Returns the expected value target of the first token, on completions of an older policy.

  GAE's is the value of the older policy, whatever the present one is. V-trace's is corrected to the
  present one, `exact` without a cap of the ratios and `capped` at 1 as published. The policies are
  random ones on a tree, ever farther apart: `kl` is KL(pi || old), nats, and `value` what pi has.
  """
  tree, rng = oracle.make_tree(3, 3), np.random.default_rng(0)
  shape = len(tree.depths), tree.vocab_size
  old, direction = jnp.asarray(rng.standard_normal((2, *shape)))
  scores = jnp.asarray(rng.standard_normal(len(tree.tokens)))
  rewards = jnp.zeros(tree.tokens.shape).at[:, -1].set(scores)
  values, drawn = jnp.zeros_like(rewards), jnp.exp(oracle.log_probs(tree, old))

  def of(size):
    logits = old + size * direction
    log_probs, old_log_probs = (oracle.token_log_probs(tree, x) for x in (logits, old))

    def target(**more):
      of_tokens = (log_probs, old_log_probs, rewards, values, tree.mask)
      return drawn @ ops.vtrace(*of_tokens, gamma=1.0, **more)[1][:, 0]

    return {
      "kl": oracle.sequence_kl(tree, logits, old),
      "value": oracle.expected_score(tree, logits, scores),
      "gae": drawn @ ops.gae(rewards, values, tree.mask, gamma=1.0, gae_lambda=1.0)[1][:, 0],
      "capped": target(),
      "exact": target(max_ratio=jnp.inf),
    }

  return jax.lax.map(of, jnp.linspace(0.0, 2.0, 21))


def exact_studies() -> dict:
  """Returns the figures of the studies without sampling, plain numbers."""
  with jax.enable_x64(True):
    radii = jnp.geomspace(1e-3, 1.0, 31)
    moves = {
      name: {
        direction: farthest(jnp.float64(p), radii, direction, up=up) for direction in DIRECTIONS
      }
      for name, p, up in (("rare, raised", 1e-4, True), ("common, lowered", 0.5, False))
    }
    old = jnp.float64(1e-3)
    new = jnp.geomspace(2e-3, 0.9, 31)
    pairs = jnp.stack([new, 1 - new], axis=-1), jnp.array([old, 1 - old])
    delta = kl(pairs[1], pairs[0])
    eps = jnp.geomspace(1e-3, 3.0, 31)
    agreement = jax.vmap(lambda e: second_order([0.5, 0.3, 0.2], [1.0, -2.0, 0.5], e))(eps)
    figures = {
      "pace": pace(),
      "regressions": regressions(),
      "late": late_values(),
      "moves": {"radius": radii, **moves},
      "bounds": {
        "p_min": old,
        "new_probability": new,
        "kl_old_new": delta,
        "kl_new_old": kl(*pairs),
        **new_old_bounds(delta, old)._asdict(),
      },
      "second_order": {"eps": eps, **agreement._asdict()},
    }
    return jax.tree.map(lambda x: np.asarray(x).tolist(), figures)


def run_ppo(config: Config, root: str, name: str, changes: dict) -> dict:
  """Returns the curves and the final figures of one PPO run, which is kept under `root`."""
  settings = {
    "num_iterations": config.num_iterations,
    "seed": config.seed,
    "kl_every": 1,
    "save_every": config.num_iterations,
    "eval_every": 0,
    # Many steps on few completions: there it matters what holds the policy.
    "batch_size": 128,
    "num_epochs": 2,
    "learning_rate": 5e-4,
    "learning_rate_schedule": "constant",
    **changes,
  }
  if settings.get("kl_placement") != "none":
    settings["beta"] = config.beta
  if settings.get("trust_region") in DIRECTIONS:
    settings["trust_region_beta"] = config.trust_region_beta
  progress.console.print(name, style="bold", soft_wrap=True)
  workdir = ppo.main(ppo.Config(**settings), root=root)
  lines, summary = read_lines(workdir / "metrics.jsonl"), read_summary(workdir)
  keys = ("score/mean", "gold/mean", "kl/ref_exact", "kl/ref_exact_stderr", "kl/old_k3")
  names = ("score", "gold", KL, "entropy")
  return {
    "name": name,
    "changes": changes,
    "curves": {key: [line[key] for line in lines] for key in keys},
    **{f"{key}_after": summary[f"{key}_after"] for key in names},
    **{f"{key}_stderr": summary[f"{key}_after_stderr"] for key in names[:3]},
  }


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(workdir):
    create_workdir(workdir, "kl_directions", config)
    return {
      "beta": config.beta,
      **exact_studies(),
      "anchors": [run_ppo(config, str(workdir / "runs"), *item) for item in ANCHORS.items()],
      "epochs": compare_epochs(config, str(workdir / "runs")),
    }

  workdir = laboratory.conduct(
    config, "kl_directions", "kl_directions.json", compute, report, show, root=root
  )
  note_pictures.write_passes(schema.read(workdir / "kl_directions.json"), workdir)
  return workdir


def compare_epochs(config: Config, root: str) -> list[dict]:
  """Returns a PPO run for each number of passes over a rollout and each of PENALTIES."""
  runs = []
  for epochs in config.epochs.split(","):
    for penalty, changes in PENALTIES.items():
      name = f"{penalty}, {epochs} {'pass' if epochs == '1' else 'passes'}"
      settings = {**changes, "num_epochs": int(epochs), "trust_region": "none"}
      run = run_ppo(config, root, name, settings)
      runs.append({"num_epochs": int(epochs), "penalty": penalty, **run})
  return runs


def show(results: dict) -> None:
  """Prints the tables of both studies of PPO."""
  for title, study in (
    ("Which KL holds the policy", "anchors"),
    ("A rollout used for several passes, no trust region", "epochs"),
  ):
    table = Table(title=title, title_justify="left")
    table.add_column("KL")
    for column in ("score", "gold", "KL(pi||ref), nats", "score - beta KL", "entropy, nats/token"):
      table.add_column(column, justify="right")
    for run in results[study]:
      table.add_row(run["name"], *final_figures(run, results["beta"]))
    progress.console.print(table)


if __name__ == "__main__":
  common.launch(main, Config)
