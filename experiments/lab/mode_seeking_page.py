"""The page and the words of `experiments.mode_seeking`, a function of its results alone."""

import numpy as np

from klrl.figures import digits
from klrl.report.page import Html, element, figure, grid, note, page, paragraph, table
from klrl.report.plots import INK, SERIES, bare, picture

FORWARD, REVERSE = SERIES[0], SERIES[1]
FIT_COLUMNS = (
  "Decoder", "Objective", "KL(p ‖ π)", "KL(π ‖ p)", "emit", "time", "between",
  "Entropy", "Gap",
)  # fmt: skip


def verdict(results: dict) -> str:
  """Returns what came out, in a sentence or two."""
  sft, rl = _fit(results, True, None), _fit(results, True, 1.0)
  blind_sft, blind_rl = _fit(results, False, None), _fit(results, False, 1.0)
  best = int(np.argmax(blind_rl["words"]))
  return (
    "Covering and picking are about what a policy can hold, not about SFT and RL. A decoder that "
    f"can hold both words ends {sft['kl_from_data']:.3f} nats from the data by SFT and "
    f"{rl['kl_to_data']:.3f} by RL. One that cannot gives {_share(blind_sft['between'])} of its "
    f"completions to strings between them by SFT, and {_share(blind_rl['words'][best])} to "
    f"“{results['language']['words'][best]}” by RL."
  )


def _sft_is_forward(results):
  x, gauss = results["three_tokens"], results["gaussian"]["unequal"]["points"]["forward_right"]
  return (
    f"E_p[\u2212log π] is the entropy of the data plus KL(p ‖ π): {x['cross_entropy']:.4f} = "
    f"{x['data_entropy']:.4f} + {x['forward_kl']:.4f} nats on three tokens. Where the policy "
    f"cannot hold both modes it covers: one Gaussian becomes {_normal(gauss)}."
  )


def _rl_is_reverse(results):
  x = results["three_tokens"]
  return (
    "With reward log p and the entropy of π as bonus, the objective is \u2212KL(π ‖ p): "
    f"\u2212{digits(-x['rl'])} nats on the same three tokens. For any other reward r and weight "
    "\u03b1 of the entropy the target is exp(r / \u03b1) / Z, which is the data only where r is "
    "\u03b1 log p and a constant."
  )


def _maximum_entropy(results):
  x = results["three_tokens"]
  return (
    "E[\u2212log π] is the entropy. It is largest at the uniform policy, "
    f"{x['entropy_at_uniform']:.4f} nats, and zero for a single token. Added to the reward log p it"
    f" makes π = p the best policy, with {digits(abs(x['rl_at_data']))}; the likeliest token alone "
    f"has {digits(x['rl_at_one_hot'])}. Only the reward without the entropy asks for one token: "
    f"{digits(x['reward_at_one_hot'])} against {digits(x['reward_at_data'])} at p."
  )


def _mode_seeking(results):
  gauss = results["gaussian"]["equal"]["points"]
  full = _fit(results, True, 1.0)
  cold = _fit(results, True, 0.25, "sft")
  middle = gauss["reverse_middle"]
  overlapping = results["gaussian"]["overlapping"]["points"]["reverse_right"]
  return (
    "It takes a policy that cannot hold both, or a small β. A decoder that can hold both words "
    f"keeps both, {_share(full['words'][0])} and {_share(full['words'][1])} at β = 1 over uniform; "
    f"at β = 0.25 over the SFT policy “emit” takes {_share(cold['words'][0])} instead of "
    f"{_share(results['data']['words'][0])}. Even a single Gaussian need not pick: to equal modes "
    f"the reverse KL has a third, shallow minimum that covers, {_normal(middle)} at "
    f"{middle['kl']:.3f} nats, and where the modes overlap it covers from either side, "
    f"{_normal(overlapping)}."
  )


def _tilted(results):
  fits = [_fit(results, True, beta, "sft") for beta in (4.0, 1.0, 0.25)]
  got = ", ".join(f"{_share(fit['words'][0])} at β = {fit['beta']:g}" for fit in fits)
  want = ", ".join(_share(fit["optimum"]["words"][0]) for fit in fits)
  return (
    "RL minimises KL(π ‖ p*) with p* = ref · exp(r / β) / Z. From the SFT policy, which is the "
    f"data already, with the same reward log p, it goes past the data: “emit” gets {got}; p* has "
    f"{want}. Over uniform it is β = 1 alone that makes p* the data."
  )


# What is often said of the two directions, a judgement, and why, from the results.
CLAIMS = (
  ("SFT is forward KL, and covers the modes.", "Right.", _sft_is_forward),
  ("RL is reverse KL to the data.", "Right for one reward.", _rl_is_reverse),
  ("To maximise \u2212log π takes a 0/1 distribution.", "Wrong.", _maximum_entropy),
  ("RL therefore picks a mode.", "Not by itself.", _mode_seeking),
  ("A KL to the reference keeps RL near the data.", "Near the reference.", _tilted),
)

SOURCES = (
  "The two directions of the KL and their modes: Christopher Bishop, “Pattern Recognition and "
  "Machine Learning”, 2006, section 10.1.2. The target of RL with a reference: Tomasz Korbak and "
  "others, “RL with KL penalties is better viewed as Bayesian inference”, 2022. That the target "
  "decides about modes, and not the direction: Anthony GX-Chen and others, “KL-Regularized "
  "Reinforcement Learning is Designed to Mode Collapse”, 2025."
)


def fit_cells(fit: dict) -> list[str]:
  """Returns the texts of a fit under FIT_COLUMNS."""
  figures = [fit["kl_from_data"], fit["kl_to_data"], *fit["words"], fit["between"]]
  return [
    "sees" if fit["sees_prefix"] else "blind",
    _objective(fit),
    *map(_decimals, (*figures, fit["entropy"], fit["gap"])),
  ]


def _objective(fit: dict) -> str:
  if fit["beta"] is None:
    return "SFT"
  if not fit["beta"]:
    return "log p alone, from SFT"
  return f"RL, β {fit['beta']:g} over {'SFT' if fit['reference'] == 'sft' else 'uniform'}"


def _fit(results, sees_prefix, beta, reference="uniform") -> dict:
  wanted = (sees_prefix, beta, "none" if beta is None else reference)
  (found,) = (
    fit for fit in results["fits"]
    if (fit["sees_prefix"], fit["beta"], fit["reference"]) == wanted
  )  # fmt: skip
  return found


def _decimals(x: float) -> str:
  """Returns a figure with three decimals, which never is minus nothing."""
  return f"{round(x, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")


def _share(probability: float) -> str:
  return f"{digits(100 * probability)}%"


def _normal(point: dict) -> str:
  mean = f"{point['mean']:.2f}" if abs(point["mean"]) > 5e-3 else "0"
  return f"N({mean}, {point['sigma']:.2f}²)".replace("-", "\N{MINUS SIGN}")


# Pictures: rows from top to bottom on one axis, each with a label and a figure.

ROW_HEIGHT = 0.62  # inches


def _strips(rows: list[tuple[str, str]], draw, *, width: float, foot: float = 0.3) -> Html:
  """Returns a picture of one strip for each (label, figure); `draw(axes, row, is_last)`."""
  height = ROW_HEIGHT * len(rows) + foot

  def whole(figure):
    for row, (label, figure_text) in enumerate(rows):
      bottom = (foot + ROW_HEIGHT * (len(rows) - 1 - row)) / height
      axes = figure.add_axes((0.3 / width, bottom, 0.98 - 0.3 / width, 0.9 * ROW_HEIGHT / height))
      draw(axes, row, row == len(rows) - 1)
      bare(axes)
      axes.grid(visible=False)
      axes.tick_params(axis="y", labelsize=6.5)
      for x, text, side in ((0.0, label, "left"), (1.0, figure_text, "right")):
        place = {"transform": axes.transAxes, "ha": side, "va": "top"}
        axes.text(x, 0.98, text, size=8, color=INK, **place)

  return Html(picture(whole, width=width, height=height))


def _after(step: int) -> str:
  return f"{step} steps" if step else "start"


def _densities(gaussian: dict, fit: str, colour: str) -> Html:
  target, x = gaussian["unequal"]["target"], np.linspace(-6, 6, 301)
  path = gaussian["unequal"]["paths"][fit]

  def normal(mean, sigma):
    return np.exp(-0.5 * ((x - mean) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))

  data = sum(
    weight * normal(mean, target["sigma"])
    for mean, weight in zip(target["means"], target["weights"], strict=True)
  )

  def draw(axes, row, is_last):
    axes.fill_between(x, data, color=INK, alpha=0.16, linewidth=0)
    axes.plot(x, normal(*path[row][:2]), color=colour, linewidth=1.5)
    axes.set_xlim(-6, 6)
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.5])
    axes.set_xticks([-4, -2, 0, 2, 4] if is_last else [])

  rows = [
    (_after(step), f"{kl:.3f} nats") for step, (*_, kl) in zip(gaussian["steps"], path, strict=True)
  ]
  return _strips(rows, draw, width=3.4)


def _bars(results: dict, rows: list[tuple], colour: str, *, width: float) -> Html:
  """Returns a strip for each (label, figure, probabilities, those of the target) of the blends."""
  names = [*results["language"]["blends"], "others"]
  places = np.arange(len(names)) + 0.8 * (np.arange(len(names)) == len(names) - 1)

  def with_others(probs):
    return [*probs, max(0.0, 1 - sum(probs))]

  def draw(axes, row, is_last):
    *_, probs, target = rows[row]
    axes.bar(places, with_others(target), 0.92, color=INK, alpha=0.16, linewidth=0)
    axes.bar(places, with_others(probs), 0.5, color=colour, linewidth=0)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set_ylim(0, 1.45)
    axes.set_yticks([0, 1])
    axes.set_xticks(places if is_last else [])
    if is_last:
      # `bare` has a formatter for numbers; a name is a text of the axes.
      below = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top", "ha": "center"}
      for place, name in zip(places, names, strict=True):
        axes.text(place, -0.08, name, size=7.5, color=INK, **below)
      axes.set_xticks([])

  return _strips([row[:2] for row in rows], draw, width=width, foot=0.5)


def _gaussian_part(gaussian: dict) -> list[Html]:
  fits = (
    ("Forward, as SFT", "from the right: ends between the modes", "forward_right", FORWARD),
    ("Reverse, as RL", "from the left: ends on the larger mode", "reverse_left", REVERSE),
    ("Reverse, as RL", "from the right: ends on the smaller mode", "reverse_right", REVERSE),
  )
  figures = [
    figure(title, about, _densities(gaussian, fit, colour)) for title, about, fit, colour in fits
  ]
  return [
    element("h2", "One Gaussian for two modes"),
    paragraph(
      "A Gaussian cannot have two modes: whatever it does, something is lost. Forward KL punishes "
      "data without policy, so it stretches over both; reverse KL punishes policy without data, "
      "so it settles on one. Grey is the data, the line the fit after so many steps of Adam, and "
      "the figure the KL that is minimised.",
    ),
    grid(*figures),
  ]  # fmt: skip


def _decoder_part(results: dict) -> list[Html]:
  steps = results["fits"][0]["steps"]
  parts = [
    element("h2", "The decoder, on a language of two words"),
    paragraph(
      "The data: “emit” seven times in ten, else “time”, each letter wrong once in a hundred; "
      f"{results['language']['completions']:,} completions in all. The bars are the strings whose "
      "every letter is that of one word or the other, from “emit” to “time”. Grey is the data, in "
      "colour the policy; the figure is the KL that is minimised.",
    ),
  ]  # fmt: skip
  for sees, title in (
    (True, "It sees what it has written: both directions reach the data"),
    (False, "It does not see what it has written: SFT blends, RL picks"),
  ):
    figures = []
    for beta, name, colour in (
      (None, "SFT", FORWARD),
      (1.0, "RL with reward log p plus entropy", REVERSE),
    ):
      fit = _fit(results, sees, beta)
      rows = [
        (_after(step), f"{kl:.3f} nats", probs, results["data"]["blends"])
        for step, kl, probs in zip(steps, fit["path_kls"], fit["path"], strict=True)
      ]
      about = "minimises KL(p ‖ π)" if beta is None else "minimises KL(π ‖ p)"
      figures.append(figure(name, about, _bars(results, rows, colour, width=5.2)))
    parts += [element("h3", title), grid(*figures, least=24)]
  return parts


def _beta_part(results: dict) -> list[Html]:
  groups = (
    ("Over uniform", "sees its prefix", True, "uniform", (4.0, 1.0, 0.25)),
    ("Over uniform", "blind", False, "uniform", (4.0, 1.0, 0.25)),
    ("Over the SFT policy", "sees its prefix", True, "sft", (4.0, 1.0, 0.25, 0.0)),
  )
  figures = []
  for title, about, sees, reference, betas in groups:
    fits = [_fit(results, sees, beta, reference) for beta in betas]
    rows = [
      (f"β = {fit['beta']:g}", f"gap {fit['gap']:.3f}", fit["blends"],
       fit["optimum"]["blends"])
      for fit in fits
    ]  # fmt: skip
    figures.append(figure(title, about, _bars(results, rows, REVERSE, width=3.4)))
  return [
    element("h2", "KL-regularised RL: the target is not the data"),
    paragraph(
      "RL that maximises E[log p] \u2212 β KL(π ‖ ref) goes to ref · exp(log p / β) / Z, in grey: "
      "flat for large β, a single word as β falls. The gap is what the objective lacks of its "
      "best, in nats; the blind decoder cannot close it.",
    ),
    grid(*figures),
  ]  # fmt: skip


def _tables(results: dict) -> list[Html]:
  data = results["data"]
  figures = (0.0, 0.0, *data["words"], data["between"], data["entropy"])
  fits = [
    ["", "the data", *map(_decimals, figures), ""],
    *(fit_cells(fit) for fit in results["fits"]),
  ]
  about = (
    "The decoders. One that sees has its own prefix before it. “Between” is all that is neither "
    "word. Gap: how far the objective is from its best over all policies. KLs, entropy and gap in "
    "nats per completion."
  )
  ends = [
    [name, fit.replace("_", ", from the "), point["kind"],
     *(_decimals(point[key]) for key in ("mean", "sigma", "kl"))]
    for name in ("equal", "unequal", "overlapping")
    for fit, point in results["gaussian"][name]["points"].items()
  ]  # fmt: skip
  where = (
    "Where the Gaussians end, by Newton's method. Equal: weights 0.5 and 0.5 at \u22122 and 2, "
    "\u03c3 0.5; unequal: 0.7 and 0.3 there; overlapping: 0.5 and 0.5 at \u22121 and 1, \u03c3 1."
  )
  head = ("Data", "Direction", "Kind", "Mean", "\u03c3", "KL, nats")
  return [
    element("h2", "All figures"),
    table(FIT_COLUMNS, fits, caption=about, words=2),
    table(head, ends, caption=where, words=3),
  ]


def report(results: dict) -> str:
  """Returns the page."""
  claims = [
    element("div", element("p", claim, " ", element("b", judgement)),
            element("p", reason(results)), style="margin: 1.1rem 0")
    for claim, judgement, reason in CLAIMS
  ]  # fmt: skip
  return page(
    "mode_seeking",
    element("h1", "Is SFT mean-seeking and RL mode-seeking?"),
    element("p", verdict(results), class_="verdict"),
    *_gaussian_part(results["gaussian"]),
    *_decoder_part(results),
    *_beta_part(results),
    element("h2", "What is often said, and how far it is right"),
    *claims,
    note(SOURCES),
    *_tables(results),
    note(
      "Nothing here is sampled: all figures are sums over every completion. Made in "
      f"{results['seconds']:.0f} s by python -m experiments.mode_seeking; every number is in "
      "mode_seeking.json."
    ),
  )  # fmt: skip
