"""Every figure that klrl shows: its key, its label, its unit, and what it means in one sentence.

The console, the pages and docs/figures.md read the tables of this module. `shown` is the one way
in which a figure is written: three digits, shares as per cent, a KL of nothing as 0.000. Keys with
a slash are those of `metrics.jsonl`. The others are held-out figures in `summary.json`, where
`_before`, `_after`, `_best` and `_stderr` follow the key; those of `evaluations.jsonl` are among
them, with `_stderr` alone.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

ABSENT = "\N{EN DASH}"
PER_SEQUENCE, PER_TOKEN = "nats per sequence", "nats per token"
# The KLs to the reference, the one to trust first.
KLS = ("kl_ref_exact", "kl_ref_k1", "kl_ref_k3")
KL = KLS[0]


class Figure(NamedTuple):
  """One figure; a comma in the label parts what it is from how it is measured."""

  key: str
  label: str
  unit: str
  meaning: str

  @property
  def title(self) -> str:
    """What it is, without how it is measured."""
    return self.label.partition(", ")[0]

  @property
  def per(self) -> str:
    """The unit beside a value that has its own sign of per cent."""
    return self.unit.removeprefix("%").strip()

  @property
  def scale(self) -> float:
    """What a value is multiplied by where it is shown: shares are kept from 0 to 1."""
    return 100.0 if self.unit.startswith("%") else 1.0


# Held out, in the order of the table "Before and after".
JUDGED = (
  Figure("gold", "Gold accuracy", "% of completions",
         "Share of completions that an exact check finds right; nothing is trained on it."),
  Figure("gold_greedy", "Gold accuracy, greedy", "% of prompts",
         "The same share among the most likely completions, one for each prompt."),
  Figure("pass_at_K", "pass@K", "% of prompts",
         "Share of prompts of which at least one of K completions is right."),
  Figure("majority_at_K", "maj@K", "% of prompts",
         "Share of prompts whose most frequent answer of K completions is right."),
  Figure("held_out_accuracy", "Agreement with labels", "% of pairs",
         "Share of pairs whose chosen completion the model prefers; chance has half."),
  Figure("score", "Score", "per completion",
         "Mean score of the completions, by what is trained on: a model or a function."),
  Figure("objective_gap", "Gap to the best policy", "% of what it gains",
         "How far `objective` is below the best policy's, as a share of what that gains (tree)."),
  Figure("tv_to_optimum", "Distance to the best policy", "total variation",
         "Half the sum of all differences from the best policy's probabilities (tree)."),
  Figure("kl_ref_exact", "KL(π‖ref), exact", PER_SEQUENCE,
         "KL(policy ‖ reference): that of each next token, summed along own completions."),
  Figure("kl_ref_k1", "KL(π‖ref), k1", PER_SEQUENCE,
         "The same KL, estimated by k1 = log π - log ref of the tokens drawn."),
  Figure("kl_ref_k3", "KL(π‖ref), k3", PER_SEQUENCE,
         "The same KL, estimated by k3 = ref/π - 1 + k1 of the tokens drawn."),
  Figure("kl_ref_forward", "KL(ref‖π), exact", PER_SEQUENCE,
         "KL(reference ‖ policy), the other direction, along completions of the reference."),
  Figure("kl_ref_exact_per_token", "KL(π‖ref), exact", PER_TOKEN, "The exact KL for each token."),
  Figure("kl_ref_k1_per_token", "KL(π‖ref), k1", PER_TOKEN, "k1 for each token."),
  Figure("kl_ref_k3_per_token", "KL(π‖ref), k3", PER_TOKEN, "k3 for each token."),
  Figure("held_out_cross_entropy", "Cross-entropy", PER_TOKEN,
         "Mean of -log π over the completion tokens of held-out examples."),
  Figure("held_out_forward_kl", "KL(data‖π)", PER_TOKEN,
         "KL from the known distribution of the embedded demonstrations to the policy."),
  Figure("held_out_loss", "Preference loss", "per pair",
         "Mean loss of held-out pairs: Bradley-Terry's, DPO's or IPO's."),
  Figure("held_out_margin", "Implicit reward margin", "reward",
         "beta * log(π/ref) of the chosen completion less that of the rejected one."),
  Figure("held_out_calibration_error", "Calibration error", "%",
         "Distance of the reward model's confidence from the share it has right."),
  Figure("entropy", "Entropy", PER_TOKEN, "Mean entropy of the policy's next-token distributions."),
  Figure("length", "Length", "tokens", "Mean number of tokens of a completion."),
  Figure("nll", "NLL under the reference", PER_TOKEN,
         "Mean of -log ref over the tokens that the policy draws."),
  Figure("distinct_2", "Distinct-2", "% of bigrams",
         "Share of different ones among neighbouring pairs of words."),
)  # fmt: skip
# Held out as well, but not in that table.
MORE = (
  Figure("score_greedy", "Score, greedy", "per prompt",
         "Mean score of the most likely completion of each prompt."),
  Figure("kl_ref_forward_per_token", "KL(ref‖π), exact", PER_TOKEN,
         "The other direction for each token."),
  Figure("finished_fraction", "Ended by itself", "% of completions",
         "Share of completions that ended before the limit of tokens."),
  Figure("distinct_1", "Distinct-1", "% of words", "Share of different words."),
  Figure("distinct_3", "Distinct-3", "% of trigrams",
         "Share of different ones among neighbouring triples of words."),
  Figure("held_out_entropy", "Entropy of the data", PER_TOKEN,
         "Entropy of the known distribution of the embedded demonstrations."),
  Figure("held_out_mean_score", "Mean score of a pair", "score",
         "Mean of the reward model's scores of both completions."),
  Figure("held_out_examples", "Held-out examples", "", "How many pairs or rows were held out."),
  Figure("learning_rate", "Learning rate", "",
         "The peak learning rate of Adam: --learning_rate, or what fits the size of the model."),
  Figure("best_iteration", "Iterations of the best model", "",
         "After how many iterations the model in model_best was the best one (--keep_best)."),
  Figure("exact_score", "Score, by enumeration", "per completion",
         "E[score] over all completions (tree)."),
  Figure("exact_kl", "KL(π‖ref), by enumeration", PER_SEQUENCE,
         "KL(policy ‖ reference) over all completions (tree)."),
  Figure("objective", "Score - β KL, by enumeration", "",
         "E[score] - beta * KL(policy ‖ reference); for BOND the log-ratio of best-of-n to the "
         "reference is in the place of the score (tree)."),
  Figure("optimal_objective", "Score - β KL, of the best policy", "",
         "The most that any policy has of it (tree)."),
)  # fmt: skip
# Of an iteration, in the order of the curves.
TRAINING = (
  Figure("score/mean", "Score", "per completion",
         "Mean score of the completions sampled in an iteration, before any penalty."),
  Figure("score/std", "Deviation of the scores", "per completion",
         "Standard deviation of these scores."),
  Figure("score/NAME", "Score of one reward", "per completion",
         "Mean of one of several rewards, by its name."),
  Figure("gold/mean", "Gold accuracy", "% of completions",
         "Share of these completions that an exact check finds right."),
  Figure("objective/mean", "Score - β KL", "per completion", "Mean of score - beta * k1."),
  Figure("kl/ref_k1", "KL to the reference, k1", PER_SEQUENCE,
         "Mean over completions of k1, summed over tokens."),
  Figure("kl/ref_k3", "KL to the reference, k3", PER_SEQUENCE,
         "Mean over completions of k3, summed over tokens."),
  Figure("kl/ref_exact", "KL to the reference, exact", PER_SEQUENCE,
         "Mean of the exact KL, summed over tokens; every --kl_every iterations."),
  Figure("kl/old_k1", "KL to the old policy, k1", PER_SEQUENCE,
         "KL(old ‖ new) by k1: how far the steps went from the policy that sampled; every "
         "--kl_every iterations, and always with --trust_region_adaptive."),
  Figure("kl/old_k3", "KL to the old policy, k3", PER_SEQUENCE, "The same by k3."),
  Figure("kl/sampler_k1", "KL to the sampler, k1", PER_SEQUENCE,
         "Distance of the sampler's log-probs from the trainer's: rounding, if all is well."),
  Figure("kl/sampler_k3", "KL to the sampler, k3", PER_SEQUENCE, "The same by k3."),
  Figure("kl/prefix_cap_fraction", "Capped prefix weights", "% of tokens",
         "Share of tokens whose prefix weight --prefix_cap bounds."),
  Figure("kl/prefix_cap_lost", "KL lost to the cap", PER_SEQUENCE,
         "What the bounded weights take off the KL."),
  Figure("loss/cross_entropy", "Cross-entropy", PER_TOKEN,
         "Mean of -log π over completion tokens."),
  Figure("policy/pretraining_loss", "Loss of others' texts", PER_TOKEN,
         "The same over the texts of --pretrain_data; or a divergence from the reference there."),
  Figure("loss/bradley_terry", "Preference loss, Bradley-Terry", "nats per pair",
         "-log sigmoid(chosen - rejected), without margin and smoothing."),
  Figure("loss/dpo", "Preference loss, DPO", "per pair", "What DPO minimises."),
  Figure("loss/ipo", "Preference loss, IPO", "per pair", "What IPO minimises."),
  Figure("loss/total", "Loss", "per pair", "What the reward model minimises, all terms together."),
  Figure("loss/accuracy", "Agreement with labels", "% of pairs",
         "Share of pairs whose chosen text has the higher score; ties do not count."),
  Figure("preference/accuracy", "Agreement with labels", "% of pairs",
         "Share of pairs whose margin is above 0; at the start all margins are 0."),
  Figure("loss/mean_score", "Mean score of a pair", "score",
         "Mean of the scores of both completions."),
  Figure("preference/margin", "Implicit reward margin", "reward",
         "beta * log(π/ref) of the chosen completion less that of the rejected one."),
  Figure("preference/chosen_log_prob", "Log-probability of the pair, chosen", "nats",
         "Mean log-probability of the chosen completions."),
  Figure("preference/rejected_log_prob", "Log-probability of the pair, rejected", "nats",
         "Mean log-probability of the rejected completions."),
  Figure("policy/loss", "Policy loss", "",
         "The policy's part of the loss that the steps minimise."),
  Figure("policy/kl_loss", "KL loss", PER_SEQUENCE,
         "The KL's own term of the loss, before beta; its value need not be a KL."),
  Figure("policy/entropy", "Entropy", PER_TOKEN, "Mean entropy of the next-token distributions."),
  Figure("policy/entropy_bonus", "Entropy bonus", "nats",
         "The same, aggregated as the loss is; --entropy_coef multiplies it."),
  Figure("policy/clip_fraction", "Clip fraction, policy", "% of tokens",
         "Share of tokens that the clip or the mask of the trust region leaves without gradient."),
  Figure("value/clip_fraction", "Clip fraction, value", "% of tokens",
         "Share of tokens whose value is clipped."),
  Figure("policy/ratio", "Importance ratio", "", "Mean of π/old over tokens."),
  Figure("policy/ratio_deviation", "Importance ratio from 1", "", "Mean distance of π/old from 1."),
  Figure("policy/sampler_weight", "Sampler weight", "",
         "Mean weight that corrects for the sampler."),
  Figure("policy/sampler_capped_fraction", "Capped sampler weights", "% of tokens",
         "Share of these weights that --sampler_cap bounds, or that a mask makes 0."),
  Figure("policy/num_updates", "Gradient steps", "per iteration", "Steps before --max_kl_old."),
  Figure("value/loss", "Value loss", "squared reward", "Half the squared error of the values."),
  Figure("value/explained_variance", "Explained variance", "of the returns",
         "1 - Var(returns - values) / Var(returns)."),
  Figure("controller/beta", "Beta", "reward per nat", "The coefficient of the KL."),
  Figure("controller/effective_beta", "Effective beta", "score per nat",
         "Beta in the unit of the scores as they came, if something divides these."),
  Figure("controller/at_bound", "Beta at a bound", "0 or 1",
         "Whether the controller is held at --beta_min or --beta_max."),
  Figure("controller/trust_region_beta", "Beta of the trust region", "per nat",
         "The coefficient of the KL to the old policy."),
  Figure("controller/trust_region_at_bound", "Beta of the trust region at a bound", "0 or 1",
         "Whether its rule is held at a bound."),
  Figure("rollout/length", "Length", "tokens per completion",
         "Mean number of tokens that the policy chose."),
  Figure("rollout/finished_fraction", "Ended by itself", "% of completions",
         "Share of completions that ended before the limit."),
  Figure("rollout/informative_groups", "Informative groups", "% of groups",
         "Share of the sampled groups whose scores differ (--oversampling)."),
  Figure("rollout/tokens", "Tokens", "per iteration", "Completion tokens sampled."),
  Figure("gradient/norm", "Gradient norm", "", "Before clipping."),
  Figure("sweep/diverged", "Diverged", "members", "How many are not finite any more."),
  Figure("tokens_per_second", "Speed", "tokens per second", "Completion tokens over all time."),
)  # fmt: skip

FIGURES = {figure.key: figure for figure in (*JUDGED, *MORE, *TRAINING)}
# Keys of which a part is chosen by the run.
_OPEN = {r"(pass_at_)(\d+)": "K", r"(majority_at_)(\d+)": "K", r"(score/)(.+)": "NAME"}
_SUFFIX = re.compile("(_(stderr|before|after|best|change|median|least|most))+$")


def find(name: str) -> Figure:
  """Returns the figure of a name in a file; one that nobody registered has its name for a label."""
  name = _SUFFIX.sub("", name)
  if name in FIGURES:
    return FIGURES[name]
  stem = name.removesuffix("_per_token")
  if stem in FIGURES:
    return FIGURES[stem]._replace(key=name, unit=PER_TOKEN)
  for pattern, letter in _OPEN.items():
    if found := re.fullmatch(pattern, name):
      figure = FIGURES[found[1] + letter]
      return figure._replace(key=name, label=figure.label.replace(letter, found[2]))
  return Figure(name, name.replace("_", " "), "", "")


def labels(*names: str) -> tuple[tuple[str, str], ...]:
  """Returns (key, what it is) of each, as `progress.watch` takes them."""
  titles = (find(name).title for name in names)
  lower = (x[:1].lower() + x[1:] if x[1:2].islower() else x for x in titles)
  return tuple(zip(names, lower, strict=True))


def number(value: object) -> float | None:
  """Returns a JSON number as float, NaN included; None for null and for all that is no number."""
  if not isinstance(value, int | float) or isinstance(value, bool):
    return None
  try:
    return float(value)
  except OverflowError:  # an integer of 400 digits
    return math.inf if value > 0 else -math.inf


def digits(value: object, stderr: object = None) -> str:
  """Returns a number as text, to the digits that its standard error leaves it; a dash for none."""
  x, error = number(value), number(stderr)
  if x is None:
    return ABSENT
  if not math.isfinite(x):
    return "not finite"
  if error and math.isfinite(error):
    decimals = max(0, 1 - math.floor(math.log10(abs(error))))
    text = f"{round(x, decimals) + 0.0:,.{decimals}f} \N{PLUS-MINUS SIGN} {error:,.{decimals}f}"
  elif 1e3 <= abs(x) < 1e9:
    text = f"{x:,.0f}"
  else:
    text = f"{x:.3g}"
    # Zeros at the end stay where they were rounded to, not where the figure ends.
    text = text if float(text) == x else f"{x:#.3g}".rstrip(".")
  return text.replace("-", "\N{MINUS SIGN}")


def shown(name: str, value: object, stderr: object = None) -> str:
  """Returns a figure as it is written everywhere, with its standard error where it has one."""
  figure, x, error = find(name), number(value), number(stderr)
  if x is None or not math.isfinite(x):
    return digits(x)
  known = error is not None and math.isfinite(error)
  if figure.scale != 1:
    about = f" \N{PLUS-MINUS SIGN} {100 * error:.1f}" if known else ""
    return f"{round(100 * x, 1) + 0.0:.1f}{about}%".replace("-", "\N{MINUS SIGN}")
  # What rounding leaves of a KL, or of a margin between equal policies, has either sign.
  if ("KL" in figure.label or "margin" in figure.label) and max(
    abs(x), error if known else 0.0
  ) < 5e-4:
    return "0.000 \N{PLUS-MINUS SIGN} 0.000" if known else "0.000"
  if known and error < 0.01 <= abs(x):
    about = f"{x:.3f} \N{PLUS-MINUS SIGN} {error:.3f}"
    return about.replace("-", "\N{MINUS SIGN}")
  return digits(x, error)


def of_summary(summary: dict[str, object], name: str) -> str:
  """Returns a figure of a summary as text, with its standard error where it has one."""
  return shown(name, summary.get(name), summary.get(f"{name}_stderr"))


def before_and_after(summary: dict[str, object]) -> list[tuple[Figure, str, str]]:
  """Returns the rows of the table "Before and after": figure, text before, text after.

  A figure that was judged at the end alone stands under "after". What nobody registered comes last.
  """
  names = [name.removesuffix("_after") for name in summary if name.endswith("_after")]
  listed = []
  for figure in JUDGED:
    prefix = figure.key.removesuffix("K")
    repeated = [x for x in names if x.startswith(prefix)] if figure.key.endswith("_K") else []
    listed += repeated or [figure.key]
  others = sorted({*names} - {*listed} - {figure.key for figure in MORE})
  rows = []
  for name in (*listed, *others):
    keys = f"{name}_before", f"{name}_after" if f"{name}_after" in summary else name
    cells = [of_summary(summary, key) for key in keys]
    if cells != [ABSENT, ABSENT]:
      rows.append((find(name), *cells))
  return rows


def markdown() -> str:
  """Returns all figures as the tables of docs/figures.md."""

  def table(title: str, figures: Iterable[Figure]) -> str:
    rows = [f"| `{x.key}` | {x.label} | {x.unit} | {x.meaning} |" for x in figures]
    head = f"## {title}\n\n| key | figure | unit | meaning |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"

  return "\n".join(
    (
      table("Held-out prompts or examples: `summary.json`, `evaluations.jsonl`", (*JUDGED, *MORE)),
      table("In an iteration: `metrics.jsonl`", TRAINING),
    )
  )
