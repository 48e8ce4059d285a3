"""Best-of-n as a policy: draw n completions, keep the one that the reward model scores highest.

    python -m experiments.best_of_n
    python -m experiments.best_of_n --compare=RUN_DIR,RUN_DIR
    python -m experiments.best_of_n --policy=DIR --prompts=FILE.jsonl --reward=FILE.py:FUNCTION

No training: a policy is drawn from N times at each held-out prompt, and that one pool tells what
best-of-n scores for every n below N, without bias, by its order statistics. The KL to the policy
drawn from is at most log n - (n - 1) / n nats (Beirami et al., "Theoretical guarantees on the
best-of-n alignment policy", 2024); completions that come up again and again make it smaller. So
best-of-n lies on the axes of the score-versus-KL frontier of RL (Gao, Schulman and Hilton, "Scaling
Laws for Reward Model Overoptimization", 2022), and `--compare` puts finished runs on them; a sweep
draws it by itself. The same draws with the weights exp(score / beta) stand for the best policies.

On a few problems of the embedded task all completions are enumerated: score, gold score and KL of
best-of-n are then exact, and so is the best score that any policy has at that KL.

Without flags it draws from the embedded SFT policy and takes about a minute on 2 cores after the
stages. Gold accuracy rises, and falls where the reward model is fooled: 50, 95 and 86% at n = 1, 8
and 64 with a reward model that agrees with 92% of labels, and 50, 73 and 44% with one of 86%, which
the same command trains on another processor.
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.lab import laboratory
from experiments.lab.best_of_n_page import pool_table, report, verdict
from experiments.settings import common, rl, training
from experiments.settings.common import again, setting
from klrl import inputs, judging, ops, programs, schema
from klrl.algorithm import completions
from klrl.devices import parallel, unread
from klrl.errors import UserError
from klrl.exact import bandits, oracle
from klrl.figures import KL
from klrl.run import progress
from klrl.run.summary import read_summary
from klrl.tasks import data, verifier

MAX_ENUMERATED = 100_000  # completions of one problem
# Of the best policies, from the policy drawn from to where nothing but the highest score counts.
BETAS = np.array([np.inf, *np.geomspace(16.0, 5e-4, 90)])
# Completions that are drawn and scored at once, of the embedded task and of the user's model.
_CHUNK, _CHUNK_OF_POLICY = 2048, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig, common.PromptFields, common.ScoreFields, common.StageFields):
  """Settings of best-of-n."""

  n: str = setting("1,2,4,8,16,32,64", "draws of which the best is kept, below the pool's size")
  completions_per_prompt: int = setting(256, "size of the pool of each prompt", minimum=2)
  num_prompts: int = setting(250, "held-out prompts, at most", minimum=2)
  num_enumerated: int = setting(
    4, "problems of which all completions are enumerated, on the embedded task", minimum=0
  )
  compare: str = setting("", "folders of finished runs to show beside it, with commas between")
  policy: str = setting("", "model directory to draw from; default: the embedded SFT stage")
  temperature: float = setting(1.0, "of sampling", minimum=1e-3)
  mesh: str = again(common.RunConfig, "mesh", default="")
  eval_batch_size: int = setting(
    0,
    "completions that are drawn and scored at once; 0: 512 of --policy, and 2048 of the embedded "
    "task",
    minimum=0,
  )
  init_seed: int = setting(0, "seed of the stages before", minimum=0)
  data_seed: int = setting(0, "seed of what is held out", minimum=0)
  accept_changed_inputs: bool = common.ACCEPT_CHANGED_INPUTS

  def __post_init__(self):
    super().__post_init__()
    if not all(part.isdigit() and int(part) for part in self.n.split(",")):
      raise UserError(f"--n={self.n}: give positive integers, as in 1,4,16.")
    if max(self.sizes) >= self.completions_per_prompt:
      raise UserError(
        f"--n={self.n} needs a pool of more than {max(self.sizes)} completions; raise "
        f"--completions_per_prompt={self.completions_per_prompt}."
      )
    self.rl_config()

  @property
  def sizes(self) -> list[int]:
    """The values of n, each once, in order."""
    return sorted({int(part) for part in self.n.split(",")})

  def drawn_at_once(self) -> int:
    """Returns how many completions are drawn and scored at once."""
    return self.eval_batch_size or (_CHUNK_OF_POLICY if self.policy else _CHUNK)

  def rl_config(self) -> rl.RLConfig:
    """Returns the settings of models and prompts, checked as those of an RL run are."""
    names = {field.name for field in dataclasses.fields(rl.RLConfig)} - {"workdir"}
    shared = [field.name for field in dataclasses.fields(self) if field.name in names]
    return rl.RLConfig(**{name: getattr(self, name) for name in shared})


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(_):
    compared = [run_figures(directory) for directory in filter(None, config.compare.split(","))]
    models, task, prompts = loaded(config)
    scores, gold = draw_pool(config, models, task, prompts)
    exact = None
    if config.num_enumerated and enumerable(models, task):
      exact = exact_figures(config, models, prompts, task.max_completion_len)
    return {
      "num_prompts": len(scores),
      "completions_per_prompt": config.completions_per_prompt,
      "rows": [best_of_pool(scores, gold, n) for n in config.sizes],
      "frontier": frontier_of_pool(scores, gold, config.sizes[-1]),
      "compared": compared,
      "bandit": bandit_figures(config.sizes),
      "exact": exact,
    }

  return laboratory.conduct(config, "best_of_n", "best_of_n.json", compute, report, show, root=root)


def show(results: dict) -> None:
  """Prints the table and the verdict."""
  table = Table(title=f"Best of n on {results['num_prompts']} prompts", title_justify="left")
  columns = pool_table(results["rows"])
  for column in columns:
    table.add_column(column, justify="right")
  for cells in zip(*columns.values(), strict=True):
    table.add_row(*cells)
  progress.console.print(table)
  progress.console.print(verdict(results), soft_wrap=True)


def run_figures(directory: str) -> dict:
  """Returns the final figures of a finished run: score, gold, exact KL, with standard errors."""
  summary = read_summary(pathlib.Path(directory)) or {}
  if any(summary.get(name) is None for name in ("score_after", KL)):
    raise UserError(
      f"--compare={directory} is no finished run with a score and an exact KL in summary.json."
    )
  names = ("score_before", "score_after", "gold_after", KL)
  names += ("score_after_stderr", "gold_after_stderr", f"{KL}_stderr")
  rules = dict.fromkeys(names, schema.optional(schema.number()))
  schema.check(summary, rules, pathlib.Path(directory) / "summary.json")
  return {
    "name": pathlib.Path(directory).name,
    "score_before": summary.get("score_before"),
    "kl": summary[KL],
    "kl_stderr": summary.get(f"{KL}_stderr"),
    **{name: summary.get(f"{name}_after") for name in ("score", "gold")},
    **{f"{name}_stderr": summary.get(f"{name}_after_stderr") for name in ("score", "gold")},
  }


def loaded(config: Config) -> tuple[inputs.Models, inputs.Task, data.Prompts]:
  """Returns what is drawn from and scored by, after the stages, and the held-out prompts."""
  settings = config.rl_config()
  sources = settings.sources()
  inputs.check_inputs(sources)
  models = inputs.load_models(sources, **training.model_directories(settings))
  task = inputs.load_task(sources, models)
  return models, task, first_prompts(task.held_out, config.num_prompts)


def first_prompts(prompts: data.Prompts, num: int) -> data.Prompts:
  """Returns at most `num` of the prompts."""
  return data.Prompts(*(x if x is None else x[:num] for x in prompts))


def draw_pool(config: Config, models: inputs.Models, task: inputs.Task, prompts: data.Prompts):
  """Returns scores and gold scores [P, N] of N completions of each prompt; gold may be None."""
  mesh, at_once = parallel.make_mesh(config.mesh), config.drawn_at_once()
  judge = judging.make_judge_programs(
    mesh, models.policy, None, models.tokenizer, task.max_completion_len
  )
  params = parallel.put_once(mesh, models.policy_params)
  score = judging.make_completion_score_fn(
    mesh, task.rewards, models.reward_model, models.reward_params, rows_at_once=at_once
  )
  # Several processes share arrays only in compiled programs.
  gold = programs.make_gold_fn(prompts, models.tokenizer)
  gold, tokens_of = gold and jax.jit(gold), jax.jit(completions.completion_tokens)
  num_prompts, size = len(prompts.tokens), config.completions_per_prompt
  key = jax.random.key(config.seed)

  def chunk(rows):
    of = rows // size
    rollout = judge.sample(
      params,
      prompts.tokens[of],
      prompts.mask[of],
      jax.random.fold_in(key, rows[0]),
      temperature=config.temperature,
    )
    records = [prompts.records[i] for i in of]
    texts = task.rewards and data.with_prefill(
      data.completion_texts(models.tokenizer, jax.device_get(rollout)), records
    )
    scores = score(rollout, texts, records)
    if np.isnan(scores).any():
      raise UserError(
        "Every reward abstained from a completion, by None; best-of-n needs a score for each."
      )
    return tokens_of(rollout), scores, gold and gold(rollout, of)

  tokens, scores, gold_scores = parallel.in_chunks(chunk, num_prompts * size, at_once)
  if not task.rewards:
    # The same completion at another place of a batch may differ by rounding, and would not tie.
    rows = np.concatenate([np.arange(len(tokens))[:, None] // size, tokens], axis=1)
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    scores = scores[first][which.reshape(-1)]
  return tuple(None if x is None else x.reshape(num_prompts, size) for x in (scores, gold_scores))


def pool_weights(scores: np.ndarray, n: int) -> np.ndarray:
  """Returns [..., N], the chance of each of N draws to be the best of n drawn among them.

  Without replacement, so that a mean with these weights is an unbiased estimate of what the best of
  n fresh draws has. Draws of equal score share their chance.

  Args:
    scores: [..., N].
    n: at most N.
  """
  below, upto = _ranks(scores)
  chance = _chance_below(scores.shape[-1], n)
  return (chance[upto] - chance[below]) / (upto - below)


def win_rate(scores: np.ndarray, n: int) -> np.ndarray:
  """Returns [...], the chance of the best of n to beat one more draw, ties counted half; unbiased.

  It is n / (n + 1) without ties. `scores` are [..., N] with N above n.
  """
  below, upto = _ranks(scores)
  chance = _chance_below(scores.shape[-1] - 1, n)
  return 1 - ((chance[below] + chance[upto - 1]) / 2).mean(axis=-1)


def _ranks(scores):
  """Returns how many scores are below each, and how many are not above; [..., N] each."""
  scores = np.asarray(scores)
  below = (scores[..., None, :] < scores[..., None]).sum(axis=-1)
  upto = (scores[..., None, :] <= scores[..., None]).sum(axis=-1)
  return below, upto


def _chance_below(size: int, n: int) -> np.ndarray:
  """Returns [size + 1], the chance that n among `size` are all among the k lowest."""
  return np.array([math.comb(k, n) / math.comb(size, n) for k in range(size + 1)])


def best_of_prompts(scores: np.ndarray, gold: np.ndarray | None, n: int) -> dict:
  """Returns the figures of best-of-n at each prompt, [P] each, from pools [P, N] of scores.

  `kl` is that of best-of-n to a draw from the pool, which approaches that to the policy as N grows.
  """
  weights = pool_weights(scores, n)
  with jax.enable_x64(True):
    uniform = jnp.full(scores.shape[1], 1 / scores.shape[1], jnp.float64)
    kls = jax.lax.map(
      lambda x: ops.exact_kl(jnp.log(bandits.best_of_n(uniform, x, float(n))), jnp.log(uniform)),
      jnp.asarray(scores, jnp.float64),
    )
  return {
    "score": (weights * scores).sum(axis=1),
    "gold": None if gold is None else (weights * gold).sum(axis=1),
    "win_rate": win_rate(scores, n),
    "kl": np.asarray(kls),
  }


def best_of_pool(scores: np.ndarray, gold: np.ndarray | None, n: int) -> dict:
  """Returns the means of `best_of_prompts` over prompts, with their standard errors."""
  found = {"n": n, "kl_bound": float(bandits.best_of_n_kl_bound(float(n)))}
  for name, x in best_of_prompts(scores, gold, n).items():
    found[name] = None if x is None else float(x.mean())
    found[f"{name}_stderr"] = None if x is None else float(x.std(ddof=1) / np.sqrt(len(x)))
  return found


def frontier_of_pool(scores: np.ndarray, gold: np.ndarray | None, n: int) -> dict:
  """Returns {"kl", "score", "gold"} of the best policies, by pools [P, N] of scores; lists.

  They are `ref * exp(score / beta) / Z` at each of `BETAS`, whose means are those of the draws with
  the weights exp(score / beta), and the KL is that to a draw from the pool. A pool knows little of
  policies that are far from it: the list ends at the KL that best-of-n has at most.
  """
  above = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
  points = []
  for beta in BETAS:
    weights = np.exp(above / beta)
    weights /= weights.sum(axis=1, keepdims=True)
    surprise = np.log(weights * scores.shape[1], where=weights > 0, out=np.zeros_like(weights))
    means = (surprise, scores, gold)
    points.append([x if x is None else float((weights * x).sum(axis=1).mean()) for x in means])
  limit = float(bandits.best_of_n_kl_bound(float(n)))
  columns = zip(*(point for point in points if point[0] <= limit), strict=True)
  kl, score, gold = map(list, columns)
  return {"kl": kl, "score": score, "gold": None if None in gold else gold}


def bandit_figures(sizes: list[int]) -> list[dict]:
  """Returns exact figures for four choices of probability 0.4 to 0.1 and score 0 to 3.

  `best_score` is the most that any policy of the same KL has; `tv_reward` and `tv_quantile` are the
  total variations between best-of-n and the best policies for the rewards that BOND and variational
  best-of-n take.
  """
  with jax.enable_x64(True):
    ref, scores = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.arange(4.0)
    rows = []
    for n in sizes:
      probs = bandits.best_of_n(ref, scores, float(n))
      kl = ops.exact_kl(jnp.log(probs), jnp.log(ref))
      best = bandits.optimal_within(ref, scores, max_kl=kl)[0] if n > 1 else ref
      # RL at beta 1 leads to best-of-n by its log-ratio, and by the quantile where nothing ties.
      rewards = {
        "reward": bandits.best_of_n_reward(ref, scores, float(n)),
        "quantile": (n - 1) * jnp.log(jnp.cumsum(ref)),
      }
      distances = {
        f"tv_{name}": float(bandits.total_variation(jax.nn.softmax(jnp.log(ref) + reward), probs))
        for name, reward in rewards.items()
      }
      rows.append(
        {
          "n": n,
          "probs": probs.tolist(),
          "kl": float(kl),
          "kl_bound": float(bandits.best_of_n_kl_bound(float(n))),
          "score": float(probs @ scores),
          "best_score": float(best @ scores),
          **distances,
        }
      )
  return rows


def enumerable(models: inputs.Models, task: inputs.Task) -> bool:
  """Returns whether there are few enough completions, and a reward model and answers for all."""
  few = models.policy.config.num_tokens**task.max_completion_len <= MAX_ENUMERATED
  few &= len(models.tokenizer.eos_ids) == 1  # What a tree has.
  return few and models.reward_model is not None and task.held_out.answers is not None


def exact_figures(config: Config, models: inputs.Models, prompts: data.Prompts, horizon: int):
  """Returns score, gold score and KL of best-of-n and of the frontier, exact, means over problems.

  The frontier has the most score for its KL: `ref * exp(score / beta) / Z` at each of `BETAS`.
  """
  tree = oracle.make_tree(models.policy.config.num_tokens, horizon, eos_id=models.tokenizer.eos_id)
  params, reward_params = unread.read((models.policy_params, models.reward_params))
  logits_fn = jax.jit(lambda x: oracle.decoder_logits(models.policy, params, tree, x))
  score = jax.jit(models.reward_model.scores)
  gold_fn = jax.jit(verifier.accuracy, static_argnames="pad_id")
  pad_id = models.tokenizer.pad_id
  found = []
  for i in range(min(config.num_enumerated, len(prompts.tokens))):
    prompt = prompts.tokens[i][prompts.mask[i]]
    log_probs = oracle.log_probs(tree, logits_fn(prompt) / config.temperature)
    before = np.tile(prompt, (len(tree.tokens), 1))
    tokens = np.concatenate([before, np.where(tree.mask, tree.tokens, pad_id)], axis=1)
    mask = np.concatenate([np.ones(before.shape, bool), tree.mask], axis=1)
    scores = parallel.in_chunks(
      lambda rows, tokens=tokens, mask=mask: score(reward_params, tokens[rows], mask[rows]),
      len(tokens),
      _CHUNK,
    )
    answers = np.broadcast_to(prompts.answers[i], tree.tokens.shape)
    gold = gold_fn(tree.tokens, tree.mask, answers, pad_id=pad_id)
    with jax.enable_x64(True):
      exact = (jnp.asarray(np.asarray(x), float) for x in (log_probs, scores, gold))
      found.append(_exact_lines(*exact, config.sizes))
  means = jax.tree.map(lambda *x: np.mean(x, axis=0).tolist(), *found)
  bounds = [float(bandits.best_of_n_kl_bound(float(n))) for n in config.sizes]
  return {
    "num_problems": len(found),
    "num_completions": len(tree.tokens),
    "sizes": config.sizes,
    "kl_bounds": bounds,
    **means,
    "gold_laws": gold_laws(means),
  }


def gold_laws(lines: dict) -> dict:
  """Returns the laws of Gao et al. (2022) that are nearest to the gold score of the exact lines.

  Each has its coefficients `alpha` and `slope`, the largest `error` of a point, and `peak_kl`, the
  KL in nats at which the law has most gold; None where it has no peak.
  """
  found = {}
  for law, line in (("best_of_n", "best_of_n"), ("rl", "frontier")):
    kl, gold = (np.array(lines[line][name]) for name in ("kl", "gold"))
    with jax.enable_x64(True):
      distances = jnp.sqrt(jnp.maximum(jnp.asarray(kl), 0))
      gains = jnp.asarray(gold - lines["start"]["gold"])
      alpha, slope = bandits.fitted_gold_law(law, distances, gains)
      error = float(jnp.abs(bandits.GOLD_LAWS[law].score(distances, alpha, slope) - gains).max())
      peak = float(bandits.GOLD_LAWS[law].peak(alpha, slope)) ** 2 if slope > 0 else None
    found[law] = {"alpha": float(alpha), "slope": float(slope), "error": error, "peak_kl": peak}
  return found


def _exact_lines(log_probs, scores, gold, sizes: list[int]) -> dict:
  ref = jax.nn.log_softmax(log_probs)

  def figures(probs):
    return {"score": probs @ scores, "gold": probs @ gold, "kl": ops.exact_kl(jnp.log(probs), ref)}

  best_of = jax.lax.map(
    lambda n: figures(bandits.best_of_n(jnp.exp(ref), scores, n)), jnp.array(sizes, float)
  )
  frontier = jax.lax.map(
    lambda beta: figures(jax.nn.softmax(ref + scores / beta)), jnp.asarray(BETAS)
  )
  lines = {"start": figures(jnp.exp(ref)), "best_of_n": best_of, "frontier": frontier}
  return jax.tree.map(np.asarray, lines)


if __name__ == "__main__":
  common.launch(main, Config)
