"""The page of `experiments.kl_variance`, a function of kl_variance.json alone."""

from klrl.figures import digits
from klrl.report.page import element, figure, note, page, paragraph, table
from klrl.report.plots import INK, SERIES, plot

# Those of the pictures, and how they are called there.
SHOWN = {
  "reward/k1/none/sequence": "k1 in the reward",
  "loss/k1/prefix/sequence": "k1, ratio of the prefix",
  "loss/k3/prefix/sequence": "k3, ratio of the prefix",
  "loss/exact/prefix/sequence": "exact KL, ratio of the prefix",
}
STYLES = "-", "--", "-", "-"
TICKS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


def verdict(results: dict) -> str:
  """Returns what came out, in two sentences."""
  longest, decoder = results["trees"][-1], results["decoder"]
  off, own = longest["off_policy"], decoder["on_policy"]

  def needed(found, name):
    return f"{found[name]['completions']:,.0f}"

  return (
    f"On completions of an older policy, {longest['horizon']} tokens long, the exact KL with the "
    f"ratio of the prefix needs {needed(off, 'loss/exact/prefix/sequence')} completions where k1 "
    f"with it needs {needed(off, 'loss/k1/prefix/sequence')}, and both are right; k1 in the reward "
    f"is off by {_share(off['reward/k1/none/sequence']['error'])} of the gradient. On the "
    f"decoder\u2019s own completions the exact KL needs "
    f"{needed(own, 'loss/exact/prefix/sequence')}, and k1 in the reward "
    f"{needed(own, 'reward/k1/none/sequence')}."
  )


def baseline_on_decoder(results: dict) -> str:
  """Returns what the baseline of vOPD does to the variance of the decoder, a sentence."""
  own = results["decoder"]["on_policy"]
  k1, centred = (own[f"reward/{name}/none/token"]["completions"] for name in ("k1", "centred"))
  return f"On the decoder it has {digits(centred / k1)} times the variance."


def report(results: dict) -> str:
  """Returns the page."""
  trees, decoder = results["trees"], results["decoder"]
  columns = ("penalty", "own", "older", "error\nown", "error\nolder", "decoder", "decoder\nolder")
  longest = trees[-1]
  rows = [
    (
      name,
      *(digits(longest[regime][name]["completions"]) for regime in ("on_policy", "off_policy")),
      *(_share(longest[regime][name]["error"]) for regime in ("on_policy", "off_policy")),
      *(digits(decoder[regime][name]["completions"]) for regime in ("on_policy", "off_policy")),
    )
    for name in longest["on_policy"]
  ]
  pictures = [
    figure(
      title,
      "completions for a signal-to-noise ratio of one",
      plot(
        lambda axes, regime=regime: _draw(axes, trees, regime),
        "tokens of a completion",
        y_ticks=TICKS,
      ),
      tuple(SHOWN.values()),
    )
    for title, regime in (
      ("On the policy\u2019s own completions", "on_policy"),
      ("On those of an older policy", "off_policy"),
    )
  ]
  return page(
    "The noise of a KL gradient",
    element("h1", "What does a right gradient of the KL cost?"),
    element("p", verdict(results), class_="verdict"),
    paragraph(
      "A penalty with the right expected gradient may need many completions to show it. Counted "
      "here is tr Cov(g) / |E g|\u00b2: the completions whose mean gradient has a standard error "
      "as large as the gradient."
    ),
    element("div", *pictures, class_="curves"),
    table(columns, rows, caption=f"Trees of {longest['horizon']} tokens, and the decoder"),
    element("h2", "k1 less its mean at each prefix"),
    paragraph(
      "vOPD takes the KL of the prefix off k1, which leaves the expected gradient as it is. It is "
      "not always a good baseline: the best one weighs each token by the square of its score, "
      "which is small for the likely tokens that make up most of the KL. "
      + baseline_on_decoder(results)
    ),
    table(
      ("tokens", "variance over\nthat of k1, median", "policies\nwith less"),
      [
        (
          tree["horizon"],
          digits(tree["baseline"]["variance"]),
          f"{tree['baseline']['less']} of {tree['baseline']['policies']}",
        )
        for tree in trees
      ],
    ),
    note(
      f"Trees: two tokens, medians over random policies, enumerated; KL(\u03c0 \u2016 ref) is "
      f"{digits(longest['kl'])} nats at {longest['horizon']} tokens and KL(\u03c0 \u2016 old) "
      f"{digits(longest['old_kl'])}. Error: of the expected gradient, as a fraction of that of "
      f"KL(\u03c0 \u2016 ref). Decoder: {decoder['num_completions']:,} completions of at most "
      f"{decoder['tokens']} tokens, in all parameters; off-policy, noise counts against the "
      "gradient of the least noisy penalty."
    ),
  )


def _share(error: float) -> str:
  return "0" if error < 1e-9 else f"{100 * error:.0f}%"


def _draw(axes, trees, regime: str) -> None:
  horizons = [tree["horizon"] for tree in trees]
  for name, colour, style in zip(SHOWN, SERIES, STYLES, strict=False):
    values = [tree[regime][name]["completions"] for tree in trees]
    axes.plot(horizons, values, style, color=colour, linewidth=1.6)
  axes.axhline(1, color=INK, linewidth=0.7, alpha=0.45)
