"""The table "Before and after" of a report, from the figures of summary.json."""

from klrl.report.page import ABSENT, Html, digits, element, note

# Label, unit, name. A figure without `_before` is one of the trained policy.
ROWS = (
  ("Gold score", "per completion", "gold"),
  ("Gold score, greedy", "per prompt", "gold_greedy"),
  ("Score", "per completion", "score"),
  ("KL k1", "nats per sequence", "kl_ref_k1"),
  ("KL k3", "nats per sequence", "kl_ref_k3"),
  ("KL exact", "nats per sequence", "kl_ref_exact"),
  ("KL forward", "nats per sequence", "kl_ref_forward"),
  ("KL k1", "nats per token", "kl_ref_k1_per_token"),
  ("KL k3", "nats per token", "kl_ref_k3_per_token"),
  ("KL exact", "nats per token", "kl_ref_exact_per_token"),
  ("Entropy", "nats per token", "entropy"),
  ("Length", "tokens", "length"),
  ("NLL under the reference", "nats per token", "nll"),
  ("Distinct-2", "share of bigrams", "distinct_2"),
)
# Found among all figures only, so that the table stays short.
UNLISTED = {"score_greedy", "kl_ref_forward_per_token", "distinct_1", "distinct_3"}
# Of k completions for each prompt; k is in the name.
REPEATED = {"pass_at_": "pass@", "majority_at_": "maj@"}


def repeated_rows(figures: dict[str, object]) -> list[tuple[str, str]]:
  """Returns label and name of the figures of several completions for each prompt."""
  names = [name.removesuffix("_after") for name in figures if name.endswith("_after")]
  return [
    (label + name.removeprefix(prefix), name)
    for prefix, label in REPEATED.items()
    for name in names
    if name.startswith(prefix)
  ]


def figures_table(figures: dict[str, object]) -> Html:
  """Returns the table of a summary's figures before and after."""
  repeated = [(label, "per prompt", name) for label, name in repeated_rows(figures)]
  listed = (*ROWS[:2], *repeated, *ROWS[2:])
  known = {name for *_, name in listed} | UNLISTED
  others = {name.removesuffix("_after") for name in figures if name.endswith("_after")} - known
  rows = []
  for label, unit, name in (
    *listed,
    *((name.replace("_", " "), "", name) for name in sorted(others)),
  ):
    keys = f"{name}_before", f"{name}_after" if f"{name}_after" in figures else name
    cells = [digits(figures.get(key), figures.get(f"{key}_stderr")) for key in keys]
    if cells != [ABSENT, ABSENT]:
      heading = element("th", label, element("span", unit), scope="row")
      rows.append(element("tr", heading, *(element("td", cell) for cell in cells)))
  if not rows:
    return note("No figures before and after.")
  head = element("tr", *(element("th", text, scope="col") for text in ("", "Before", "After")))
  kl = "KL is KL(policy \u2016 reference)"
  if "kl_ref_forward" in figures:
    kl += ", forward is KL(reference \u2016 policy), exact"
  about = element("caption", f"{kl}; \u00b1 is one standard error.")
  table = element("table", about, element("thead", head), element("tbody", *rows), class_="figures")
  return element("div", table, class_="wide")
