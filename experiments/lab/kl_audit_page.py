"""The audit as one page: a picture of what each penalty does, then every figure behind it."""

from collections.abc import Callable
from typing import Any

from experiments.lab import kl_audit_pictures
from experiments.lab.kl_audit_pictures import VERDICTS, behaviours
from klrl.algorithm import objective
from klrl.figures import ABSENT, digits
from klrl.report.page import Html, element, page

Audit = dict[str, Any]
Column = tuple[str, str, Callable[[dict], str]]  # head, small head, cell of a row
SMALL = 1e-9


def percent(fraction: float) -> str:
  """Returns a relative error as text; 0 where nothing but rounding is left."""
  if abs(fraction) < SMALL:
    return "0"
  text = f"{100 * fraction:.1f}%" if abs(fraction) < 0.995 else f"{100 * fraction:.0f}%"
  return text.replace("-", "\N{MINUS SIGN}")


def audit_page(audit: Audit) -> str:
  """Returns the page of an audit, as `make_audit` returned it."""
  sections = [
    *_top(audit, behaviours(audit)),
    *_own(audit),
    *_variants(audit),
    *_peers(audit),
    element("h2", "How it was computed"),
    element("p", _how(audit)),
  ]
  return page("KL audit", *sections)


def _typeset(name: object) -> str:
  return str(name).replace("pi", "π").replace("||", "‖").replace(" - ", " \N{MINUS SIGN} ")


def _note(*children: object) -> Html:
  return element("p", *children, class_="note")


def _code(text: object) -> Html:
  return element("code", text)


def _verdict(row) -> Html:
  sign, colour, *_ = VERDICTS[row["verdict"]]
  style = f"color: var({colour}); white-space: nowrap"
  return element("span", f"{sign} {row['verdict']}", style=style)


def _top(audit: Audit, kept) -> list[Html]:
  """Returns what a newcomer reads: the finding, the two pictures, and what their letters are."""
  gradients = [row["on_policy"]["gradient"] for row in audit["penalties"]]
  whole, token, other = (
    gradients.count(name) for name in (objective.SEQUENCE, objective.TOKEN, objective.TOKEN_FORWARD)
  )
  rest = len(gradients) - whole - token - other
  agreement = (
    f"All {audit['num_claims']} claims of objective.audit agree with what was found."
    if not audit["num_differing"]
    else f"{audit['num_differing']} of {audit['num_claims']} claims of objective.audit differ from "
    "what was found; they are marked below."
  )
  shown = {behaviour["verdict"]: behaviour for behaviour in kept}
  return [
    element("h1", "KL audit"),
    element(
      "p",
      f"Of {len(gradients)} ways to penalise KL(π‖ref), {whole} have its gradient, {token} have it "
      f"token by token, {other} has that of KL(ref‖π), and {rest} do nothing or pull elsewhere.",
      class_="verdict",
    ),
    _note(agreement),
    element(
      "div",
      _figure(
        kl_audit_pictures.pulls(kept),
        "The pull to the reference",
        "1: that of KL(π‖ref); 0: none; below 0: away from it",
        "The component of the expected gradient along the true one. Dot: the fixed tree; line: "
        f"lowest to highest of {audit['constants']['trees']} trees. A dot at 1 without a line is "
        "right on all of them.",
      ),
      _figure(
        kl_audit_pictures.ends(audit, kept),
        "Where training ends",
        "expected score over KL(π‖ref) in nats",
        f"Exact ascent with each penalty, all at β = {digits(audit['config']['beta'])}. Line: the "
        "most score that any policy has at this KL; star: the policy that should be reached.",
      ),
      class_="pair",
    ),
    _note(*(element("span", _verdict(b), f" {VERDICTS[v][4]}.  ") for v, b in shown.items())),
    element(
      "p",
      "The same β and the same estimator do different things in different places: k1 taken off the "
      "reward is right, k1 as a loss has no pull at all; k3 as a loss pulls to the other "
      "divergence, k3 taken off the reward to none.",
    ),
    element("h2", "What the letters stand for"),
    _note("Penalties of klrl are placement/estimator/correction/credit."),
    *(line for behaviour in kept for line in _behaviour(behaviour)),
  ]


def _figure(svg: str, title: str, unit: str, text: str) -> Html:
  caption = element("figcaption", element("b", title), " ", element("span", unit))
  return element("figure", caption, Html(svg), _note(text))


def _behaviour(behaviour) -> list[Html]:
  gradient = behaviour["first"]["on_policy"]["gradient_unclamped"]
  of = {
    objective.NO_DIVERGENCE: "no divergence's gradient",
    objective.ZERO: "no gradient, only noise",
  }.get(gradient, f"the gradient of {_typeset(gradient)}")
  lines = [element("p", element("b", behaviour["letter"]), " ", _verdict(behaviour), f": {of}")]
  if behaviour["own"]:
    lines.append(_note(_code(", ".join(row["name"] for row in behaviour["own"]))))
  theirs = [f"{row['name']} ({row['status']})" for row in behaviour["defaults"]]
  return [*lines, _note("; ".join(theirs))] if theirs else lines


def _table(caption: str, columns: list[Column], rows) -> Html:
  small = {"style": "display: block; margin: 0"}
  head = [
    element("th", a, element("span", b or "\N{NO-BREAK SPACE}", **small), style=_style(b))
    for a, b, _ in columns
  ]
  body = [
    element(
      "tr", *(element("td", x, style=_style(x)) for _, _, cell in columns for x in [cell(row)])
    )
    for row in rows
  ]
  head = element("tr", *head)
  table = element("table", element("caption", caption), head, *body, style="font-size: .86rem")
  return element("div", table, class_="wide", style="margin-top: 1.5rem")


def _style(cell: str) -> str:
  text = cell.strip("\N{MINUS SIGN}")
  is_number = not isinstance(cell, Html) and (text[:1].isdigit() or text == ABSENT)
  side = "right" if is_number else "left"
  return f"white-space: nowrap; padding-right: 1rem; text-align: {side}"


def _agreement(row) -> Html | str:
  differing = [
    f"{claim['what']}: claimed {_typeset(claim['claimed'])}, found {_typeset(claim['found'])}"
    for claim in row["claims"]
    if not claim["agrees"]
  ]
  if differing:
    return element("b", f"\N{BALLOT X} differs: {'; '.join(differing)}", style="color: var(--warn)")
  return "\N{CHECK MARK} agrees"


def _gradient(regime: str) -> Column:
  def cell(row):
    found, unclamped = row[regime]["gradient"], row[regime]["gradient_unclamped"]
    return _typeset(unclamped) + ("" if found == unclamped else ", until the clamp bites")

  return ("gradient of", "", cell)


def _figures_columns(regime: str) -> list[Column]:
  return [
    _gradient(regime),
    ("error", "whole", lambda row: percent(row[regime]["error_sequence"])),
    ("error", "token", lambda row: percent(row[regime]["error_token"])),
    ("cosine", "whole", lambda row: _cosine(row[regime]["cosine_sequence"])),
    ("cosine", "token", lambda row: _cosine(row[regime]["cosine_token"])),
    ("variance", "trace", lambda row: digits(row[regime]["trace_covariance"])),
    ("value bias", "nats", lambda row: _small(row[regime]["value_bias"])),
    ("value bias", "of the KL", lambda row: percent(row[regime]["value_bias_relative"])),
  ]


def _cosine(x: float | None) -> str:
  return ABSENT if x is None else f"{x:.3f}".replace("-", "\N{MINUS SIGN}")


def _small(x: float) -> str:
  return "0" if abs(x) < SMALL else digits(x)


END: list[Column] = [
  ("score", "", lambda row: digits(row["end"]["score"])),
  ("KL(π‖ref)", "nats", lambda row: digits(row["end"]["kl"])),
  ("score \N{MINUS SIGN} β KL", "", lambda row: digits(row["end"]["objective"])),
  ("from π*", "total variation", lambda row: _small(row["end"]["distance_to_optimum"])),
  ("moved since half-way", "total variation", lambda row: _small(row["end"]["moved"])),
  ("leads to", "with one token", lambda row: _typeset(row["end_at_horizon_1"]["leads_to"])),
]
PENALTY: Column = ("penalty", "", lambda row: _code(row["name"]))
_WRAPPED = "display: inline-block; vertical-align: top; width: 17rem; white-space: normal"
SETTING: Column = ("setting", "", lambda row: element("span", row["setting"], style=_WRAPPED))
AUDIT: Column = ("audit", "claims", _agreement)


def _tables(rows, name: Column, *more: Column) -> list[Html]:
  own = [name, ("verdict", "", _verdict), *more, *_figures_columns("on_policy")]
  return [
    _table("Samples of the policy itself.", own, rows),
    _table("Samples of an older policy.", [name, *_figures_columns("off_policy")], rows),
    _table("Where ascent ends.", [name, *END], rows),
  ]


def _own(audit: Audit) -> list[Html]:
  sections = [
    element("h2", "Every penalty of klrl"),
    element(
      "p",
      "Errors are those of the expected gradient, as a fraction of the true one, on the fixed "
      "tree: “whole” against KL(π‖ref) of whole completions, “token” against the token KL, for "
      "which the prefixes count as given. A gradient has a name where it has it on all trees. "
      "Claims are those of objective.audit: gradient and value in both cases, verdict, end.",
    ),
  ]
  for placement in objective.PLACEMENTS[:-1]:
    rows = [row for row in audit["penalties"] if row["placement"] == placement]
    title = {"reward": "In the reward", "loss": "As a loss"}.get(
      placement, "As a loss and in the reward"
    )
    sections += [element("h3", title), *_tables(rows, PENALTY, AUDIT)]
  return sections


def _variants(audit: Audit) -> list[Html]:
  undefined = audit["undefined"]
  _, *figures = _figures_columns("off_policy")
  spread = ("error", "whole, all trees", _spread)
  columns = [figures[0], spread, figures[-2], figures[-1]]
  fresh = [PENALTY, _gradient("off_policy"), *columns, AUDIT]
  cap = ("--prefix_cap", "", lambda row: digits(row["prefix_cap"]))
  return [
    element("h2", "What has no row"),
    element(
      "p",
      f"{undefined['without_meaning']} of {undefined['cells']} cells of the product have no "
      "meaning of their own. For each reason one example:",
    ),
    element("ul", *(element("li", message) for message in undefined["examples"])),
    element("h2", "Stale or fresh KL in the reward"),
    element(
      "p",
      "With --kl_refresh=minibatch the reward has the KL of the present policy instead of that of "
      "the policy that drew the samples.",
    ),
    _table("Samples of an older policy.", fresh, audit["refreshed"]),
    element("h2", "A cap on the prefix weight"),
    element(
      "p",
      "--prefix_cap bounds the weight of a prefix; where it bites it biases gradient and value.",
    ),
    _table("Samples of an older policy.", [PENALTY, cap, *columns], audit["capped"]),
  ]


def _spread(row) -> str:
  figures = row["off_policy"]
  low, high = (percent(figures[f"error_sequence_{end}"]) for end in ("lowest", "highest"))
  return low if low == high else f"{low} to {high}"


def _peers(audit: Audit) -> list[Html]:
  sections = [
    element("h2", "Other frameworks"),
    element(
      "p",
      "Formulas as published at the version named, written down here and not run there; only the "
      "KL term differs between rows. “Default if on”: the project leaves the KL out by default. "
      "“Until the clamp bites”: on trees where no token's log-ratio is beyond "
      f"{digits(audit['constants']['clamps_idle_below'])}; further out the clamped term has no "
      "gradient.",
    ),
  ]
  for project in dict.fromkeys(row["project"] for row in audit["peers"]):
    rows = [row for row in audit["peers"] if row["project"] == project]
    sources = [SETTING, *(_plain(field) for field in ("version", "source"))]
    sections += [
      element("h3", project),
      *_tables(rows, SETTING, ("status", "", _status)),
      _table("Where the formula is from.", sources, rows),
    ]
  return sections


def _plain(field: str) -> Column:
  return (field, "", lambda row: element("span", row[field]))


def _status(row) -> Html:
  return element("b" if row["status"].startswith("default") else "span", row["status"])


def _how(audit: Audit) -> str:
  tree, constants = audit["tree"], audit["constants"]
  return (
    f"The fixed tree has {tree['tokens']} tokens, one of which ends a completion, and at most "
    f"{tree['horizon']} of them: {tree['completions']} completions, all enumerated in float64. "
    f"KL(π‖ref) = {digits(tree['kl_pi_ref'])} nats, KL(ref‖π) = {digits(tree['kl_ref_pi'])}, "
    f"KL(π‖old) = {digits(tree['kl_pi_old'])}. {constants['trees'] - 1} more trees have random "
    f"policies (seed {audit['config']['seed']}). A gradient has a name where it equals that one to "
    f"{constants['exact_below']:.0e} of the true gradient's norm on every tree. What is "
    "differentiated is what training differentiates (kl_terms.kl_loss, reward_kl, "
    "penalised_advantages), with no clip, no baseline and gamma = gae_lambda = 1. Ascent follows "
    "the exact gradient of the expected score less β times the penalty's expected gradient, from "
    f"the reference, in {constants['steps_of_ascent']} natural-gradient steps. A penalty that is "
    "no divergence can have several resting points, and which one is reached depends on the path. "
    "The variance is the trace of the covariance of one completion's gradient. All figures, with "
    "their units: audit.json beside this page."
  )
