"""What a sampler of lower precision does to a run, all else equal.

    python -m experiments.mismatch

PPO on the embedded task, trained in float32, with a sampler that computes in float32, bfloat16 or
float16, each with and without weights that correct for it (`--sampler_correction=token`). Samples
of such a sampler are not samples of the policy that is trained: KL(sampler || policy) says by how
much, in nats per sequence, measured in each iteration before its first step. Penghui Qi et al.,
"Defeating the Training-Inference Mismatch via FP16", 2025, blame the 8 bits that bfloat16 has for
a number where float16 has 11. Its range is smaller, of which a sampler needs little: it has no
gradients, so nothing is scaled here.

Without weights the log-probs of the sampler are those of the old policy, and the loss's own ratio
holds the difference; with them old log-probs are computed again as they are trained.

A third way takes off what the sampler expects of each score (`--trust_region=centred`). What that
does to gradients, beside the plain score and the ratio of each token, is enumerated on a tree of
three tokens, for samplers ever farther from the policy.

WORKDIR has mismatch.json, report.html, and the runs in `runs`, a sweep.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments import sweep
from experiments.lab import laboratory
from experiments.settings import common
from experiments.settings.common import setting
from klrl import ops
from klrl.exact import oracle
from klrl.figures import KL, digits, shown
from klrl.report.page import element, figure, grid, note, page, paragraph, table
from klrl.report.plots import SERIES, plot
from klrl.run import progress
from klrl.run.metrics import read_lines
from klrl.run.summary import read_summary
from klrl.run.workdir import create_workdir

DTYPES = "float32", "bfloat16", "float16"
CORRECTIONS = "none", "token"
COLUMNS = "sampler", "weights", "KL to the sampler", "Score", "Gold", "KL(π‖ref)"
_JUDGED = "score", "gold", KL
SCORES = {"plain": "plain score", "ratio": "ratio of each token", "centred": "centred score"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the runs."""

  num_iterations: int = setting(60, "iterations of each run", minimum=1)
  seeds: int = setting(2, "seeds of each, from --seed on", minimum=1)


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(workdir):
    create_workdir(workdir, "mismatch", config)
    runs = sweep.config_class("ppo")(
      sweep=f"sampler_dtype={','.join(DTYPES)};sampler_correction={','.join(CORRECTIONS)}",
      seed=config.seed,
      seeds=config.seeds,
      num_iterations=config.num_iterations,
      eval_every=0,
      best_of_n=False,
      workdir=str(workdir / "runs"),
    )
    members = sweep.members_of(runs)
    folder = sweep.main(runs, root=root)
    rows = [
      of_members([x.folder(folder) for x in members if {**x.values, **values} == x.values], values)
      for dtype in DTYPES
      for correction in CORRECTIONS
      if (values := {"sampler_dtype": dtype, "sampler_correction": correction})
    ]
    return {
      "num_iterations": config.num_iterations,
      "seeds": config.seeds,
      "rows": rows,
      "scores": scores_of_samplers(),
    }

  return laboratory.conduct(config, "mismatch", "mismatch.json", compute, report, show, root=root)


def of_members(folders: list[pathlib.Path], values: dict) -> dict:
  """Returns `values` and the figures of the runs in some folders, their means over seeds.

  `kl` are the KLs to the sampler of all iterations, nats per sequence; the figures of the judge
  have as `_stderr` what one would have of that many completions more.
  """
  kls = [[line["kl/sampler_k3"] for line in read_lines(x / "metrics.jsonl")] for x in folders]
  summaries = [read_summary(folder) for folder in folders]
  judged = {name: np.mean([x[f"{name}_after"] for x in summaries]) for name in _JUDGED}
  for name in _JUDGED:
    stderrs = np.array([x[f"{name}_after_stderr"] for x in summaries])
    judged[f"{name}_stderr"] = np.sqrt((stderrs**2).sum()) / len(summaries)
  return {**values, "kl": np.mean(kls, axis=0).tolist(), **{k: float(x) for k, x in judged.items()}}


def scores_of_samplers() -> dict:
  """Returns what three policy gradients are on completions of ever farther samplers, enumerated.

  `kl` [samplers] is KL(sampler || policy), nats. Each of `SCORES` has `variance`, the trace of the
  covariance of one completion's gradient; `drift`, how far 1 that is added to all scores moves the
  expected gradient, over the norm of the sampler's own gradient of its expected score; and `error`,
  the distance from that gradient, over the same norm. The first sampler is the policy itself.
  """
  tree, rng = oracle.make_tree(3, 3, eos_id=2), np.random.default_rng(0)
  drawn = rng.standard_normal((2, len(tree.depths), tree.vocab_size))
  scores = rng.standard_normal(len(tree.tokens))

  def of(size, policy, direction):
    sampler = policy + size * direction
    probs, drawn = jnp.exp(oracle.log_probs(tree, sampler)), oracle.token_log_probs(tree, sampler)

    def gradients(scores):
      """Returns {name: [N, S, V]}, the gradient that each completion gives."""
      advantages = jnp.broadcast_to(scores[:, None], tree.tokens.shape)

      def losses(logits):
        log_probs = oracle.token_log_probs(tree, logits)
        means = ops.mean_under(*map(ops.vocab_log_probs, (logits, sampler)))[tree.states]
        unclipped = {"clip_eps_low": 1.0, "clip_eps_high": jnp.inf, "dual_clip": jnp.inf}
        return {
          "plain": ops.reinforce_loss(log_probs, advantages, tree.mask).sum(axis=1),
          "ratio": ops.clipped_policy_loss(
            log_probs, drawn, advantages, tree.mask, **unclipped
          ).sum(axis=1),
          "centred": ops.centred_policy_loss(log_probs, means, advantages, tree.mask).sum(axis=1),
        }

      return jax.jacobian(losses)(policy)

    own = -jax.grad(lambda x: oracle.expected_score(tree, x, scores))(sampler)
    size_of_own = jnp.linalg.norm(own)
    found, constant = gradients(jnp.asarray(scores)), gradients(jnp.ones(len(scores)))
    by_name = {}
    for name in SCORES:
      mean, drift = (jnp.tensordot(probs, x[name], 1) for x in (found, constant))
      by_name[name] = {
        "variance": probs @ (found[name] ** 2).sum(axis=(1, 2)) - (mean**2).sum(),
        "drift": jnp.linalg.norm(drift) / size_of_own,
        "error": jnp.linalg.norm(mean - own) / size_of_own,
      }
    return {"kl": oracle.sequence_kl(tree, sampler, policy), **by_name}

  with jax.enable_x64(True):
    policy, direction = map(jnp.asarray, drawn)
    found = jax.lax.map(lambda size: of(size, policy, direction), jnp.linspace(0.0, 2.0, 21))
  return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def cells(row: dict) -> tuple[str, ...]:
  """Returns the cells of `COLUMNS`."""
  return (
    row["sampler_dtype"],
    row["sampler_correction"],
    digits(float(np.mean(row["kl"]))),
    *(shown(name, row[name], row[f"{name}_stderr"]) for name in _JUDGED),
  )


def of_dtype(results: dict, dtype: str, correction: str = "none") -> dict:
  """Returns the row of a sampler."""
  wanted = dtype, correction
  (row,) = (
    row for row in results["rows"] if (row["sampler_dtype"], row["sampler_correction"]) == wanted
  )
  return row


def verdict(results: dict) -> str:
  """Returns what came out, in two sentences."""
  kl = {dtype: float(np.mean(of_dtype(results, dtype)["kl"])) for dtype in DTYPES}
  gold = {dtype: of_dtype(results, dtype)["gold"] for dtype in DTYPES}
  golds = ", ".join(f"{100 * gold[dtype]:.1f}% with {dtype}" for dtype in DTYPES)
  return (
    f"KL(sampler \u2016 policy) is {digits(kl['bfloat16'])} nats per sequence with bfloat16 and "
    f"{digits(kl['float16'])} with float16, {kl['bfloat16'] / kl['float16']:.0f} times less. "
    f"Gold accuracy without weights ends at {golds}."
  )


def report(results: dict) -> str:
  """Returns the page."""

  def draw(axes):
    for dtype, colour in zip(DTYPES, SERIES, strict=False):
      # In float32 sampler and trainer differ by the order of their sums.
      axes.plot(np.maximum(of_dtype(results, dtype)["kl"], 1e-14), color=colour, linewidth=1.5)

  scores = results["scores"]

  def picture(name, title, unit):
    def draw(axes):
      for score, colour in zip(SCORES, SERIES, strict=False):
        axes.plot(scores["kl"], scores[score][name], color=colour, linewidth=1.5)

    return figure(title, unit, plot(draw, "KL(sampler \u2016 policy), nats"), SCORES.values())

  return page(
    "A sampler of lower precision",
    element("h1", "What does a sampler of lower precision do to a run?"),
    element("p", verdict(results), class_="verdict"),
    paragraph(
      "One task, one trainer in float32 and the same seeds; the sampler alone computes in another "
      "precision. Its completions are then not samples of the policy that learns from them."
    ),
    figure(
      "KL(sampler \u2016 policy), without weights",
      "nats per sequence, before the first step of an iteration",
      plot(draw, "iteration", yscale="log"),
      DTYPES,
    ),
    table(COLUMNS, [cells(row) for row in results["rows"]]),
    note(
      f"Means over {results['seeds']} seeds of {results['num_iterations']} iterations, and "
      "standard errors of the held-out completions. KL to the sampler by k3, the mean over all "
      "iterations; weights are those of each token, truncated at 2."
    ),
    element("h2", "What the sampler expects of a score"),
    paragraph(
      "Under another sampler the score of the policy has a mean, so that whatever is added to all "
      "rewards moves the policy. A ratio of each token mends that and has a variance of its own. "
      "A centred score is less its mean under the sampler. Its gradient is the one that the "
      "sampler would follow, and not the policy\u2019s."
    ),
    grid(
      picture("variance", "Noise", "trace of the covariance of one completion\u2019s gradient"),
      picture("drift", "Moved by 1 added to all scores", "of the norm of the gradient"),
      picture("error", "From the gradient at the sampler", "of its norm"),
    ),
    note("Enumerated on a tree of three tokens, with random policies and scores, without a clip."),
  )


def show(results: dict) -> None:
  """Prints the table."""
  found = Table(title="A sampler of lower precision", title_justify="left")
  for name in COLUMNS:
    found.add_column(name, justify="left" if name in COLUMNS[:2] else "right")
  for row in results["rows"]:
    found.add_row(*cells(row))
  progress.console.print(found)
  progress.console.print(verdict(results), soft_wrap=True, markup=False)


if __name__ == "__main__":
  common.launch(main, Config)
