"""The audit as one page: a picture of what each penalty does, then the figures behind it."""

from collections.abc import Callable
from typing import Any

from experiments.lab import kl_audit_pictures
from experiments.lab.kl_audit_pictures import VERDICTS, behaviours
from klrl.algorithm import objective
from klrl.figures import digits
from klrl.report.page import Html, element, figure, fold, grid, note, page, paragraph, table

Audit = dict[str, Any]
Column = tuple[str, Callable[[dict], object]]  # name, as `table` takes it; cell of a row
SMALL = 1e-9


def percent(fraction: float) -> str:
  """Returns a relative error as text; 0 where nothing but rounding is left."""
  if abs(fraction) < SMALL:
    return "0"
  text = f"{100 * fraction:.1f}%" if abs(fraction) < 0.995 else f"{100 * fraction:.0f}%"
  return text.replace("-", "\N{MINUS SIGN}")


def _typeset(name: object) -> str:
  return str(name).replace("pi", "π").replace("||", "‖").replace(" - ", " \N{MINUS SIGN} ")


def _code(text: object) -> Html:
  return element("code", text)


def _verdict(row) -> Html:
  sign, colour, *_ = VERDICTS[row["verdict"]]
  style = f"color: var({colour}); white-space: nowrap"
  return element("span", f"{sign} {row['verdict']}", style=style)


def _claims(row) -> Html | str:
  differing = [
    f"{claim['what']}: claimed {_typeset(claim['claimed'])}, found {_typeset(claim['found'])}"
    for claim in row["claims"]
    if not claim["agrees"]
  ]
  if differing:
    return element("b", f"\N{BALLOT X} differs: {'; '.join(differing)}", style="color: var(--warn)")
  return "\N{CHECK MARK}\N{NO-BREAK SPACE}agrees"


def _gradient(regime: str, samples: str) -> Column:
  def cell(row):
    found, unclamped = row[regime]["gradient"], row[regime]["gradient_unclamped"]
    return _typeset(unclamped) + ("" if found == unclamped else ", until the clamp bites")

  return f"gradient of\n{samples}", cell


def _figure(name: str, regime: str, key: str, show: Callable[[float], str] = percent) -> Column:
  return name, lambda row: show(row[regime][key])


def _small(x: float) -> str:
  return "0" if abs(x) < SMALL else digits(x)


def _spread(row) -> str:
  low, high = (percent(row["off_policy"][f"error_sequence_{end}"]) for end in ("lowest", "highest"))
  return low if low == high else f"{low} to {high}"


OWN, OLDER = _gradient("on_policy", "own samples"), _gradient("off_policy", "older samples")
ERRORS = (
  _figure("error, whole\nown", "on_policy", "error_sequence"),
  _figure("token\nown", "on_policy", "error_token"),
  _figure("whole\nolder", "off_policy", "error_sequence"),
  _figure("token\nolder", "off_policy", "error_token"),
)
BIAS = _figure("bias of value\nof the KL, older", "off_policy", "value_bias_relative")
COSTS: tuple[Column, ...] = (
  ("leads to\nwith one token", lambda row: _typeset(row["end_at_horizon_1"]["leads_to"])),
  _figure("variance\nown", "on_policy", "trace_covariance", digits),
  _figure("bias of value\nof the KL, own", "on_policy", "value_bias_relative"),
  BIAS,
  ("score\nat the end", lambda row: digits(row["end"]["score"])),
  ("KL(π‖ref)\nat the end", lambda row: digits(row["end"]["kl"])),
  ("from π*\ntotal variation", lambda row: _small(row["end"]["distance_to_optimum"])),
)
CLAIMS: Column = ("claims", _claims)
PENALTY: Column = ("penalty", lambda row: _code(row["name"]))
SETTING: Column = ("setting", lambda row: f"{row['project']} {row['setting']}")


def _table(columns: tuple[Column, ...], rows, *, words: int) -> Html:
  names, cells = zip(*columns, strict=True)
  return table(names, [[cell(row) for cell in cells] for row in rows], words=words)


def audit_page(audit: Audit) -> str:
  """Returns the page of an audit, as `make_audit` returned it."""
  return page(
    "KL audit",
    *_top(audit, behaviours(audit)),
    *_own(audit),
    *_divergences(audit),
    *_guides(audit),
    *_variants(audit),
    *_peers(audit),
    element("h2", "How it was computed"),
    paragraph(_how(audit)),
  )


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
  signs = {
    x["verdict"]: element("span", _verdict(x), f" {VERDICTS[x['verdict']][4]}.  ") for x in kept
  }
  return [
    element("h1", "KL audit"),
    element(
      "p",
      f"Of {len(gradients)} ways to penalise KL(π‖ref), {whole} have its gradient, {token} have it "
      f"token by token, {other} has that of KL(ref‖π), and {rest} do nothing or pull elsewhere.",
      class_="verdict",
    ),
    note(agreement),
    grid(
      figure(
        "The pull to the reference", "1: that of KL(π‖ref); 0: none; below 0: away from it",
        kl_audit_pictures.pulls(kept),
        below="The component of the expected gradient along the true one. Mark: the fixed tree; "
        f"line: lowest to highest of {audit['constants']['trees']} trees. A mark at 1 without a "
        "line is right on all of them.",
      ),
      figure(
        "Where training ends", "expected score against KL(π‖ref)",
        kl_audit_pictures.ends(audit, kept),
        below=f"Exact ascent with each penalty, all at β = {digits(audit['config']['beta'])}. "
        "Line: the highest score that any policy has at this KL; star: the policy that should be "
        "reached. Letters beside one another end within a hair's breadth.",
      ),
      least=28,
    ),
    element("p", *signs.values(), class_="note"),
    paragraph(
      "The same β and the same estimator do different things in different places: k1 taken off "
      "the reward is right, k1 as a loss has no pull at all; k3 as a loss pulls to the other "
      "divergence, k3 taken off the reward to none."
    ),
    note("The letters. Penalties of klrl are placement/estimator/correction/credit."),
    _table(
      (
        ("", lambda x: x["letter"]),
        ("verdict", _verdict),
        ("gradient of", lambda x: _typeset(x["first"]["on_policy"]["gradient_unclamped"])),
        ("penalties of klrl", lambda x: _code(", ".join(row["name"] for row in x["own"]))),
        (
          "other frameworks",
          lambda x: "; ".join(f"{row['name']} ({row['status']})" for row in x["defaults"]),
        ),
      ),
      kept,
      words=5,
    ),
  ]  # fmt: skip


def _own(audit: Audit) -> list[Html]:
  rows = audit["penalties"]
  return [
    element("h2", "Every penalty of klrl"),
    paragraph(
      "The samples are the policy's own, or an older policy's. Errors are those of the expected "
      "gradient, as a fraction of the true one, on the fixed tree: “whole” against KL(π‖ref) of "
      "whole completions, “token” against the token KL, for which the prefixes count as given. A "
      "gradient has a name where it has it on all trees."
    ),
    _table((PENALTY, ("verdict", _verdict), CLAIMS, OWN, OLDER, *ERRORS), rows, words=5),
    fold("What each costs, and where ascent ends", _table((PENALTY, *COSTS), rows, words=2)),
  ]


def _divergences(audit: Audit) -> list[Html]:
  gradients = (
    (f"gradient of\n{samples}", lambda row, x=regime: _typeset(row[x]["gradient"]))
    for regime, samples in (("on_policy", "own samples"), ("off_policy", "older samples"))
  )
  pull = ("what it does for KL(π‖ref)\nown", lambda row: digits(row["on_policy"]["pull_of_kl"]))
  return [
    element("h2", "Other divergences"),
    paragraph(
      "The same places with another divergence, which is named last. “Token”: of the next-token "
      "distributions at given prefixes; “sum of token”: for the prefixes tokens answer too; else "
      "that of whole completions. The last column is the pull along the gradient of KL(π‖ref), of "
      "which 1 is that of the KL itself. A k1 in the reward is the derivative of f at the ratio."
    ),
    _table(
      (PENALTY, ("verdict", _verdict), CLAIMS, *gradients, pull), audit["divergences"], words=5
    ),
  ]


def _guides(audit: Audit) -> list[Html]:
  spread = ("all trees", lambda row: f"{percent(row['lowest'])} to {percent(row['highest'])}")
  return [
    element("h2", "A guide in the reference"),
    paragraph(
      "A reference that is reshaped by a guide, ref\u2009exp(g)\u2009/\u2009Z over completions "
      "(SAGE), is the reference itself and β\u2009g as another reward. A product that is "
      "normalised at each prefix is another policy. And a guide that does not read the token is no "
      "other reference: in k3 as a loss it is a weight, and the gradient is that of KL(ref‖π) "
      f"times q at each prefix (found to {digits(audit['guides'][-1]['error_weighted'])} on all "
      "trees)."
    ),
    _table(
      (
        ("guide", lambda row: row["name"]),
        ("error, against\nKL(π‖ref exp(g) / Z)", lambda row: percent(row["error"])),
        spread,
      ),
      audit["guides"],
      words=1,
    ),
  ]


def _variants(audit: Audit) -> list[Html]:
  undefined = audit["undefined"]
  spread = ("error, whole\nall trees", _spread)
  cap = ("--prefix_cap", lambda row: digits(row["prefix_cap"]))
  return [
    element("h2", "Variants"),
    fold(
      f"{undefined['without_meaning']} of {undefined['cells']} combinations have no meaning of "
      "their own; one example for each reason",
      element("ul", *(element("li", message) for message in undefined["examples"])),
    ),
    fold(
      "Stale or fresh KL in the reward: --kl_refresh=minibatch takes that of the present policy "
      "instead of the one that drew the samples",
      _table((PENALTY, CLAIMS, OLDER, ERRORS[2], spread, BIAS), audit["refreshed"], words=3),
    ),
    fold(
      "A completion taken as one choice: the estimate of its whole log-ratio, at once",
      _table(
        (("estimate", lambda row: row["name"]), OWN, OLDER, *ERRORS, *COSTS[1:3], BIAS),
        audit["whole"],
        words=3,
      ),
    ),
    fold(
      "--prefix_cap bounds the weight of a prefix; where it bites it biases gradient and value",
      _table((PENALTY, cap, ERRORS[2], spread, BIAS), audit["capped"], words=1),
    ),
  ]


def _peers(audit: Audit) -> list[Html]:
  rows = audit["peers"]
  sources = (SETTING, *((x, lambda row, x=x: row[x]) for x in ("status", "version", "source")))
  return [
    element("h2", "Other frameworks"),
    paragraph(
      "Formulas as published at the version named, written down here and not run there; only the "
      "KL term differs between rows. “Default if on”: the project leaves the KL out by default. "
      "“Until the clamp bites”: on trees where no token's log-ratio is beyond "
      f"{digits(audit['constants']['clamps_idle_below'])}; further out the clamped term has no "
      "gradient."
    ),
    _table((SETTING, ("verdict", _verdict), OWN, OLDER, *ERRORS), rows, words=4),
    fold("What each costs, and where ascent ends", _table((SETTING, *COSTS), rows, words=2)),
    fold(
      "Where each formula is from, and whether it is the default", _table(sources, rows, words=4)
    ),
  ]


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
    "The variance is the trace of the covariance of one completion's gradient. Cosines, biases in "
    "nats and what moved in the second half of the ascent are in audit.json beside this page, "
    "with their units."
  )
