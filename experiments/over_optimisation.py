"""Laws of over-optimisation: how gold falls while a reward model is optimised, by size and by data.

    python -m experiments.over_optimisation

Reward models of several widths, each trained on several numbers of pairs, are optimised on the
embedded task in two ways: by best-of-n, from one pool of draws for each, and by RL without a KL
penalty. What came of the true score is put over the square root d of the KL to the policy at the
start, and the laws of Leo Gao, John Schulman and Jacob Hilton, "Scaling Laws for Reward Model
Overoptimization", 2022, are fitted to it, with intervals of 90% by bootstrap:

    best of n   gain = d (alpha - beta d)          RL   gain = d (alpha - beta log d)

Then what the tail of the reward's error decides: many completions with a true score and an
independent error, whose tail is light or heavy, and the best policy for each KL, exactly (Thomas
Kwa, Drake Thomas and Adria Garriga-Alonso, "Catastrophic Goodhart", 2024). About seven minutes
on 2 cores after the SFT stage.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import best_of_n, reward_model, sft, sweep
from experiments.lab import laboratory
from experiments.lab.over_optimisation_page import report, show
from experiments.settings import common
from experiments.settings.common import setting
from klrl import ops
from klrl.errors import UserError
from klrl.exact import bandits
from klrl.figures import KL
from klrl.run.metrics import read_lines
from klrl.run.summary import read_summary
from klrl.run.workdir import create_workdir

# The error of a reward, drawn for N completions. Half of each lies within 0.67 of 0.
ERRORS = {
  "normal": lambda rng, size: rng.standard_normal(size),
  "Laplace": lambda rng, size: rng.laplace(scale=0.973, size=size),
  "Student's t, 2 degrees of freedom": lambda rng, size: 0.826 * rng.standard_t(2, size),
}
TAIL_KLS = np.array([0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0])
_EVALUATIONS = 15  # of a run of RL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the experiment."""

  widths: str = setting("16,64", "widths of the reward models' decoders")
  preferences: str = setting("4000,60000", "embedded pairs that a reward model learns from")
  reward_model_iterations: int = setting(1000, "iterations of each reward model", minimum=1)
  sft_iterations: int = setting(700, "iterations of the SFT stage of each width", minimum=1)
  num_iterations: int = setting(120, "iterations of RL", minimum=1)
  seeds: int = setting(2, "runs of RL for each reward model", minimum=1)
  n: str = setting("1,2,4,8,16,32,64", "draws of which the best is kept")
  num_prompts: int = setting(100, "held-out prompts of best-of-n, at most", minimum=2)
  completions_per_prompt: int = setting(256, "size of the pool of each prompt", minimum=2)
  num_completions: int = setting(
    2**13, "completions of the study of tails, drawn anew for each of four seeds", minimum=2
  )
  resamplings: int = setting(200, "of the bootstrap", minimum=10)

  def __post_init__(self):
    super().__post_init__()
    for name, what in (("widths", "multiples of 8"), ("preferences", "integers from 2 on")):
      parts = getattr(self, name).split(",")
      least, step = (8, 8) if name == "widths" else (2, 1)
      if not all(x.isdigit() and int(x) >= least and int(x) % step == 0 for x in parts):
        raise UserError(f"--{name}={getattr(self, name)}: give {what}, with commas between.")
    self.best_of_n_config("")

  def best_of_n_config(self, scorer: str) -> best_of_n.Config:
    """Returns the settings of best-of-n by the reward model in the folder `scorer`."""
    names = ("seed", "sft_iterations", "n", "num_prompts", "completions_per_prompt")
    return best_of_n.Config(
      reward_model=scorer, num_enumerated=0, **{name: getattr(self, name) for name in names}
    )


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(workdir):
    create_workdir(workdir, "over_optimisation", config)
    models = [
      {"width": int(width), "preferences": int(pairs), **trained(config, int(width), int(pairs))}
      for width in config.widths.split(",")
      for pairs in config.preferences.split(",")
    ]
    paths = reinforced(config, [model["directory"] for model in models], workdir, root)
    for model in models:
      directory = model.pop("directory")
      path = paths[directory]
      model["rl"] = path | {"law": fitted_to_points(config, path)}
      model["best_of_n"] = pooled(config, directory)
    return {"models": models, "tails": tails(config.seed, config.num_completions)}

  return laboratory.conduct(
    config, "over_optimisation", "over_optimisation.json", compute, report, show, root=root
  )


def trained(config: Config, width: int, num_preferences: int) -> dict:
  """Returns the folder of a reward model, trained if need be, and how good it is."""
  stage = sft.main(
    sft.Config(num_iterations=config.sft_iterations, width=width), root=common.STAGES
  )
  folder = reward_model.main(
    reward_model.Config(
      policy=str(stage / "model"),
      learning_rate=1e-3,
      num_iterations=config.reward_model_iterations,
      num_preferences=num_preferences,
    ),
    root=common.STAGES,
  )
  accuracy = read_summary(folder)["held_out_accuracy"]
  return {"directory": str(folder / "model"), "accuracy": accuracy}


def reinforced(config: Config, directories: list[str], workdir, root: str) -> dict[str, dict]:
  """Returns what RL against each reward model reached: {directory: {"kl", "score", "gold"}}.

  Each is a list of lists, with the evaluations of each seed from the start on, on held-out prompts.
  """
  settings = sweep.config_class("grpo")(
    sweep=f"reward_model={','.join(directories)}",
    seeds=config.seeds,
    seed=config.seed,
    sft_iterations=config.sft_iterations,
    num_iterations=config.num_iterations,
    kl_placement="none",
    eval_every=max(1, config.num_iterations // _EVALUATIONS),
    num_samples=0,
    best_of_n=False,
    workdir=str(workdir / "rl"),
  )
  folder = sweep.main(settings, root=root)
  found = {directory: {"kl": [], "score": [], "gold": []} for directory in directories}
  for member in sweep.members_of(settings):
    member_folder = member.folder(folder)
    summary, lines = read_summary(member_folder), read_lines(member_folder / "evaluations.jsonl")
    for name, key in (("kl", KL), ("score", "score"), ("gold", "gold")):
      path = [summary[f"{key}_before"], *(line[key] for line in lines)]
      found[member.values["reward_model"]][name].append(path)
  return found


def pooled(config: Config, scorer: str) -> dict:
  """Returns the figures of best-of-n by a reward model, and the law that fits them."""
  settings = config.best_of_n_config(scorer)
  scores, gold = best_of_n.draw_pool(settings, *best_of_n.loaded(settings))
  each = [best_of_n.best_of_prompts(scores, gold, n) for n in settings.sizes]
  kl, score, gold = (np.stack([x[name] for x in each]) for name in ("kl", "score", "gold"))
  rng = np.random.default_rng(config.seed)

  def means(rows):
    return kl[:, rows].mean(axis=1), (gold[:, rows] - gold[:1, rows]).mean(axis=1)

  everything = np.arange(kl.shape[1])
  drawn = [rng.choice(everything, len(everything)) for _ in range(config.resamplings)]
  return {
    "n": settings.sizes,
    **{name: x.mean(axis=1).tolist() for name, x in (("kl", kl), ("score", score), ("gold", gold))},
    "law": law("best_of_n", [means(rows) for rows in (everything, *drawn)]),
  }


def fitted_to_points(config: Config, path: dict) -> dict:
  """Returns the law of RL that fits the evaluations of all seeds; they are what is drawn again."""
  kl = np.concatenate(path["kl"])
  gold = np.concatenate([np.array(of_seed) - of_seed[0] for of_seed in path["gold"]])
  rng = np.random.default_rng(config.seed)
  drawn = [rng.choice(len(kl), len(kl)) for _ in range(config.resamplings)]
  return law("rl", [(kl[rows], gold[rows]) for rows in (np.arange(len(kl)), *drawn)])


def law(name: str, samples: list[tuple[np.ndarray, np.ndarray]]) -> dict:
  """Returns the law of `bandits.GOLD_LAWS` fitted to (KLs, gains), the first of several samples.

  `alpha` and `slope` are [middle, least, most], of which the last two hold 90% of the samples;
  `peak_kl` is the KL in nats where the law has most gold, or None in samples without a peak; and
  `peaks` is the share of samples that have one.
  """
  with jax.enable_x64(True):
    fit = jax.jit(lambda d, gains: jnp.stack(bandits.fitted_gold_law(name, d, gains)))
    found = np.array([fit(np.sqrt(np.maximum(kl, 0)), gains) for kl, gains in samples])
    peaks = bandits.GOLD_LAWS[name].peak(*jnp.asarray(found.T)) ** 2
  # A law that turns beyond e^20 nats does not turn.
  has_peak = (found[:, 1] > 0) & np.isfinite(peaks) & (np.asarray(peaks) < np.exp(20))
  peaks = np.asarray(peaks)

  def interval(first, rest):
    return [float(first), *np.quantile(rest, (0.05, 0.95)).tolist()]

  among = peaks[1:][has_peak[1:]]
  return {
    "alpha": interval(found[0, 0], found[1:, 0]),
    "slope": interval(found[0, 1], found[1:, 1]),
    "peak_kl": interval(peaks[0], among) if has_peak[0] and len(among) else None,
    "peaks": float(has_peak[1:].mean()),
  }


def tails(seed: int, size: int) -> dict:
  """Returns gold and score of the best policies by KL, and of best-of-n, for each of `ERRORS`.

  All `size` completions are equally likely, their true score is normal with deviation 1, and the
  reward is that plus an independent error. The figures are exact for completions that were drawn,
  means over four draws; `best` has them at `kl`, and `best_of_n` at each n with its KL.
  """
  rng = np.random.default_rng(seed)
  draws = np.array([2.0**k for k in range(int(np.log2(size)))])

  @jax.jit
  def figures(gold, scores):
    ref = jnp.full_like(gold, 1 / size)

    def of(probs):
      kl = ops.exact_kl(jnp.log(probs), jnp.log(ref))
      return {"gold": probs @ gold, "score": probs @ scores, "kl": kl}

    best = jax.lax.map(
      lambda kl: of(bandits.optimal_within(ref, scores, max_kl=kl)[0]), jnp.asarray(TAIL_KLS)
    )
    best_of = jax.lax.map(lambda n: of(bandits.best_of_n(ref, scores, n)), jnp.asarray(draws))
    return {"best": best, "best_of_n": best_of}

  found = {}
  for name, draw in ERRORS.items():
    pairs = [(rng.standard_normal(size), draw(rng, size)) for _ in range(4)]
    with jax.enable_x64(True):
      each = [figures(gold, gold + error) for gold, error in pairs]
    found[name] = jax.tree.map(lambda *x: np.mean(x, axis=0).tolist(), *each)
  return {"n": draws.tolist(), "num_completions": size, "errors": found}


if __name__ == "__main__":
  common.launch(main, Config)
