"""What every KL penalty does in expectation, by enumeration: its gradient, its value, its end.

    python -m experiments.kl_audit

All completions of a small language are listed, so that nothing is sampled. For each row of
`objective.DEFINED`, and for the formulas of other frameworks (`kl_peers`), the expected gradient of
what training differentiates is held against the gradients of KL(pi || ref), on samples of the
policy itself and of an older one, and ascent is followed to where it ends. Penalties with another
divergence are held against its gradients, and ways to put a guide into the reference against that
of KL(pi || ref * exp(guide) / Z). What `objective.audit` claims stands beside what was
found. A fixed tree is joined by random ones, so that what is called exact is exact on all of them.
WORKDIR has audit.json, report.html, and a table and a picture of what other frameworks do.

It takes about 30 s on 2 cores, and finds that 17 of the 25 penalties of klrl descend the KL.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from experiments.lab import kl_audit_page, kl_figures, kl_peers_summary, laboratory
from experiments.lab.kl_peers import PEERS
from experiments.settings import common
from experiments.settings.common import setting
from klrl.algorithm import kl_terms, objective
from klrl.algorithm.objective import KLPenalty
from klrl.errors import UserError
from klrl.exact import bandits
from klrl.run import progress

PREFIX_CAPS = (1.2, 2.0)
UNITS = {
  "kl, value_bias": "nats per completion; value_bias_worst over all trees",
  "value_bias_relative": "fraction of KL(pi||ref)",
  "gradient": "what the expected gradient g is of, on every tree; gradient_unclamped: on the trees "
  "where no peer's clamp bites",
  "error_sequence": "|g - gradient of KL(pi||ref)| / |gradient of KL(pi||ref)|",
  "error_token": "the same against the token KL at the prefixes of the policy that draws",
  "pull_of_kl": "of a penalty with another divergence: component of g along the gradient of "
  "KL(pi||ref), as a fraction of its norm, on the fixed tree",
  "pull": "component of g along the gradient of KL(pi||ref), as a fraction of its norm",
  "trace_covariance": "squared norm, of the gradient that one completion gives",
  "score, objective": "reward; objective = score - beta * kl",
  "distance_to_optimum, moved": "total variation; moved: from half-way to the end of the ascent",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the audit."""

  seed: int = setting(0, "seed of the random trees", minimum=0)
  beta: float = setting(0.5, "reward per nat of the ascent on the fixed tree", minimum=0.1)
  num_trees: int = setting(8, "random trees beside the fixed one", minimum=1)


class Row(NamedTuple):
  """One penalty to audit."""

  group: str  # the key of audit.json that lists it
  about: dict[str, Any]
  surrogate: Callable
  estimate: Callable
  trained: bool = False  # whether ascent is followed


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the audit and returns its folder; a finished one is shown, not computed again."""

  def compute(_):
    progress.console.print("KL audit: enumerating ...")
    return make_audit(config)

  workdir = laboratory.conduct(
    config, "kl_audit", "audit.json", compute, kl_audit_page.audit_page, show, root=root
  )
  kl_peers_summary.write(workdir / "audit.json", workdir)
  return workdir


def make_audit(config: Config) -> dict[str, Any]:
  """Returns all figures, as they stand in audit.json."""
  tree, fixed, scores = kl_figures.tree_a()
  policies = kl_figures.with_random(fixed, config.num_trees, config.seed)
  rows = [*_penalties(), *_refreshed(), *_capped(), *_whole(), *_peers()]
  found = kl_figures.figures(
    tree, [row.surrogate for row in rows], [row.estimate for row in rows], policies
  )
  trained = [i for i, row in enumerate(rows) if row.trained]
  surrogates = [rows[i].surrogate for i in trained]
  on_tree = kl_figures.ends(tree, surrogates, fixed.ref_logits[0], scores, config.beta)
  on_bandit = kl_figures.ends_on_bandit(surrogates)
  for i, end, at_horizon_1 in zip(trained, on_tree, on_bandit, strict=True):
    found[i] |= {"end": end, "end_at_horizon_1": at_horizon_1}

  groups = {group: [] for group in ("penalties", "refreshed", "capped", "whole", "peers")}
  for row, figures in zip(rows, found, strict=True):
    groups[row.group].append(row.about | figures)
  for figures in groups["penalties"]:
    figures["claims"] = claims_beside(figures)
  for figures in groups["refreshed"]:
    claimed = objective.audit(_penalty(figures), kl_refresh="minibatch").off_policy_gradient
    figures["claims"] = [_claim("gradient off-policy", claimed, figures["off_policy"]["gradient"])]
  for figures in groups["peers"]:
    verdict = _verdict_of(figures["on_policy"]["gradient_unclamped"])
    figures["verdict"] = "neither" if verdict == "refused" else verdict
  claims = [
    x for group in ("penalties", "refreshed") for row in groups[group] for x in row["claims"]
  ]
  return {
    "config": dataclasses.asdict(config),
    "units": UNITS,
    "constants": {
      "trees": len(policies.logits),
      "clamps_idle_below": kl_figures.MILD,
      "exact_below": kl_figures.EXACT,
      "same_policy_below": kl_figures.SAME_POLICY,
      "steps_of_ascent": kl_figures.NUM_STEPS,
    },
    "tree": kl_figures.describe_tree(tree, fixed, scores, config.beta),
    "num_claims": len(claims),
    "num_differing": sum(not claim["agrees"] for claim in claims),
    **groups,
    "divergences": _divergences(tree, policies),
    "guides": kl_figures.of_guides(tree, policies),
    "undefined": _undefined(),
  }


def _penalty(about: dict) -> KLPenalty:
  return KLPenalty(*(about[field] for field in KLPenalty._fields))


def _penalty_row(group, penalty: KLPenalty, *, trained=False, **options) -> Row:
  about = {
    "name": str(penalty),
    **penalty._asdict(),
    **options,
    "verdict": objective.audit(penalty).verdict,
  }
  surrogate = kl_terms.surrogate(penalty, **options)
  return Row(group, about, surrogate, kl_terms.estimate(penalty, **options), trained)


def _penalties() -> list[Row]:
  return [_penalty_row("penalties", penalty, trained=True) for penalty in objective.DEFINED]


def _refreshed() -> list[Row]:
  return [
    _penalty_row("refreshed", penalty, kl_refresh="minibatch")
    for penalty in objective.DEFINED
    if penalty.in_reward
  ]


def _capped() -> list[Row]:
  return [
    _penalty_row("capped", penalty, prefix_cap=cap)
    for penalty in objective.DEFINED
    if penalty.correction == "prefix"
    for cap in PREFIX_CAPS
  ]


def _whole() -> list[Row]:
  """Returns rows that take a completion as one choice, with the log-ratio of the whole."""
  choices = {
    "k2 as a loss": ("k2", "none"),
    "k3 as a loss": ("k3", "none"),
    "k1 times the ratio": ("k1", "ratio"),
    "k2 times the stopped ratio": ("k2", "stopped_ratio"),
    "k3 times the ratio": ("k3", "ratio"),
    "k1 of the older policy times the ratio": ("stale_k1", "ratio"),
  }
  surrogates = {name: bandits.sequence_surrogate(*choice) for name, choice in choices.items()}
  return [Row("whole", {"name": name}, f, f) for name, f in surrogates.items()]


def _peers() -> list[Row]:
  fields = ("project", "setting", "status", "version", "source")
  return [
    Row(
      "peers",
      {"name": f"{peer.project} {peer.setting}"} | {x: getattr(peer, x) for x in fields},
      peer.surrogate,
      peer.estimate,
      trained=True,
    )
    for peer in PEERS
  ]


def _claim(what: str, claimed, found) -> dict[str, Any]:
  return {"what": what, "claimed": claimed, "found": found, "agrees": bool(claimed == found)}


def claims_beside(figures: dict) -> list[dict[str, Any]]:
  """Returns what `objective.audit` says of a penalty, each beside what was found."""
  claim = objective.audit(_penalty(figures))
  on, off = figures["on_policy"], figures["off_policy"]
  # Beyond the semicolon an end speaks of longer horizons.
  end, found_end = claim.fixed_point.split(";")[0], figures["end_at_horizon_1"]["leads_to"]
  tilts = (kl_figures.TILT, kl_figures.FORWARD_TILT)
  if end not in (*tilts, kl_figures.BEST):  # "not a tilt"
    found_end = end if found_end not in tilts else found_end
  return [
    _claim("verdict", claim.verdict, _verdict_of(on["gradient"])),
    _claim("gradient", claim.gradient, on["gradient"]),
    _claim("gradient off-policy", claim.off_policy_gradient, off["gradient"]),
    _claim("value unbiased", claim.unbiased_value, on["value_unbiased"]),
    _claim("value unbiased off-policy", claim.off_policy_unbiased_value, off["value_unbiased"]),
    _claim("end at horizon 1", end, found_end),
  ]


def _verdict_of(gradient: str) -> str:
  """Returns the verdict that a gradient on samples of the policy itself deserves."""
  if gradient in objective.KL_GRADIENTS:
    return "exact"
  return "other" if gradient in (objective.TOKEN_FORWARD, kl_figures.FORWARD) else "refused"


def _divergences(tree, policies) -> list[dict[str, Any]]:
  """Returns the penalties of other divergences, with what the audit claims of them."""
  rows = []
  for penalty, on, off in kl_figures.of_divergences(tree, policies):
    claim = objective.audit(penalty)
    claims = [
      _claim("gradient", claim.gradient, on["gradient"]),
      _claim("gradient off-policy", claim.off_policy_gradient, off["gradient"]),
    ]
    about = {"name": str(penalty), **penalty._asdict(), "verdict": claim.verdict}
    rows.append(about | {"on_policy": on, "off_policy": off, "claims": claims})
  return rows


def _undefined() -> dict[str, Any]:
  """Returns how many cells of the product have no row, and one message for each reason."""
  cells = itertools.product(
    objective.PLACEMENTS[:-1], objective.ESTIMATORS, objective.CORRECTIONS, objective.CREDITS
  )
  messages = {}
  penalties = [KLPenalty(*cell) for cell in cells]
  for penalty in penalties:
    try:
      objective.audit(penalty)
    except UserError as error:
      messages[str(penalty)] = str(error).split(". ")[0] + "."
  by_reason = {message.split(": ", 1)[1]: message for message in messages.values()}
  return {
    "cells": len(penalties),
    "without_meaning": len(messages),
    "examples": list(by_reason.values()),
  }


def show(audit: dict[str, Any]) -> None:
  """Prints the table and what follows from it."""
  for title, group in (("klrl", "penalties"), ("other frameworks: formulas, not run", "peers")):
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("penalty", overflow="fold", min_width=29)
    table.add_column("verdict")
    for column in ("own", "token", "older", "token"):
      table.add_column(column, justify="right")
    if group == "penalties":
      table.add_column("audit")
    for row in audit[group]:
      errors = [
        kl_audit_page.percent(row[regime][f"error_{target}"])
        for regime in ("on_policy", "off_policy")
        for target in ("sequence", "token")
      ]
      claims = row.get("claims", [])
      agrees = "agrees" if all(claim["agrees"] for claim in claims) else Text("DIFFERS", "bold red")
      table.add_row(row["name"], row["verdict"], *errors, *([agrees] if claims else []))
    progress.console.print(table)
    progress.console.print()
  progress.console.print(
    "Error of the expected gradient against that of KL(pi||ref) of whole completions, and of the "
    "token KL: on the policy's own samples, and on an older one's. Claims of the audit that "
    f"differ from what was found: {audit['num_differing']} of {audit['num_claims']}.",
    soft_wrap=True,
  )


if __name__ == "__main__":
  common.launch(main, Config)
