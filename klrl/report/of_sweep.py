"""The page of a sweep, made from the files in its folder alone: which beta, and what it costs.

It reads frontier.json, config.json and, of each member, metrics.jsonl, evaluations.jsonl and
samples.jsonl; best-of-n and the best policies, as draws of the policy at the start tell them, from
the run of best-of-n that the sweep made. Members of an enumerated task have optimum.json, the exact
frontier of the best policies. The sweep's command, given again, makes the page anew.
"""

import pathlib

import numpy as np

from klrl import schema
from klrl.figures import KLS, digits, find, of_summary, shown
from klrl.report import sweep_pictures
from klrl.report.frontier import EXACT
from klrl.report.page import Html, element, figure, grid, note, page, paragraph, table
from klrl.report.samples import column, side_by_side
from klrl.report.sweep_answer import answer, exact_answer, standing
from klrl.report.sweep_pictures import BEST_OF_N, OPTIMUM, Setting
from klrl.run import metrics
from klrl.run.evaluations import FILE
from klrl.run.workdir import write_text

MAX_SAMPLES = 8
_CURVES = "score/mean", "gold/mean", "kl/ref_k1"


def write_page(workdir: pathlib.Path, *, best_of_n: bool = False) -> pathlib.Path:
  """Returns the path of `report.html`, written into the folder of a sweep.

  `best_of_n` says whether the run of best-of-n in the folder belongs beside the members.
  """
  found, config = (schema.read(workdir / name) for name in ("frontier.json", "config.json"))
  names = [record["name"] for record in found["members"]]
  series, evaluations, samples = (
    {name: metrics.read_lines(workdir / "members" / name / file) for name in names}
    for file in ("metrics.jsonl", FILE, "samples.jsonl")
  )
  path = workdir / "best_of_n" / "best_of_n.json"
  beside = schema.read(path) if best_of_n else None
  optimum = workdir / "members" / names[0] / "optimum.json"
  optimum = _read_optimum(optimum) if optimum.exists() else None
  if optimum:
    found["before"] |= {"score": optimum["score"][0], "score_stderr": None}
  settings, gain, before = settings_of(found), found["gain"], found["before"]
  kl_name, start = kl_name_of(found), start_of(config)
  finite = [setting for setting in settings if setting.records]
  sentence, notes = (
    exact_answer(finite) if optimum else answer(finite, gain, before, kl_name, start)
  )
  title = f"Sweep of {config['experiment']}"
  text = page(
    title,
    element("h1", f"{title}: {len(found['members'])} members"),
    element("p", sentence, class_="verdict"),
    *map(paragraph, notes),
    *_frontier(finite, before, kl_name, beside, optimum, start),
    *_paths(finite, evaluations, kl_name, start),
    element("h2", "Members"),
    *_members(settings, before, gain, kl_name, start),
    element("h2", "Training"),
    *_training(finite, series),
    *_samples(finite, gain, samples, start),
  )
  path = workdir / "report.html"
  write_text(path, text)
  return path


def _read_optimum(path: pathlib.Path) -> dict:
  numbers = schema.list_of(schema.number(), min_len=1)
  rules = {"kl": numbers, "score": numbers}
  return schema.check(schema.read(path), rules, path, required=rules)


def settings_of(found: dict) -> list[Setting]:
  """Returns the settings of a sweep in the order of their values, the first swept one first.

  A member without a finite gain or KL counts with those that diverged.
  """
  needed = [x for x in (found["gain"], kl_name_of(found)) if found["before"].get(x) is not None]

  def is_finite(record):
    return not record["diverged_at"] and all(record.get(x) is not None for x in needed)

  groups: dict[tuple, list[dict]] = {}
  for record in found["members"]:
    values = {name: x for name, x in record["values"].items() if name != "seed"}
    groups.setdefault(tuple(values.items()), []).append(record)
  order = sorted(groups, key=lambda key: [(str(x) if isinstance(x, str) else x) for _, x in key])
  firsts = sorted({key[0][1] for key in order if key})
  settings = []
  for position, key in enumerate(order):
    texts = [
      ("β" if name == "beta" else name, f"{x:g}" if isinstance(x, float) else str(x))
      for name, x in key
    ]
    settings.append(
      Setting(
        ", ".join(f"{name} = {text}" for name, text in texts) or "all flags alike",
        ", ".join(text for _, text in texts),
        position,
        firsts.index(key[0][1]) / max(1, len(firsts) - 1) if key else 1.0,
        [record for record in groups[key] if is_finite(record)],
        [record for record in groups[key] if not is_finite(record)],
      )
    )
  return settings


def kl_name_of(found: dict) -> str | None:
  """Returns the name of the KL that the members are placed by; None where none was measured."""
  return next((x for x in KLS[:2] if found["before"].get(x) is not None), None)


def start_of(config: dict) -> str:
  """Returns what the policy is called that all members begin with."""
  own = config.get("policy") or config.get("task") == "tree"
  return "the policy at the start" if own else "the SFT policy"


def _kinds(before: dict) -> list[str]:
  return [name for name in ("gold", "score") if before.get(name) is not None]


def _frontier(settings, before, kl_name, best_of_n, optimum, start) -> list[Html]:
  if kl_name is None or not settings:
    return [note("No KL to a reference was measured: there is no frontier to draw.")]
  kinds = _kinds(before)
  line = not optimum and all("," not in setting.label for setting in settings)
  lines = {}
  if best_of_n:
    rows = best_of_n["rows"]
    # What is gold to the members need not be to best-of-n.
    drawn = {
      name: [row[name] for row in rows] for name in ("kl", *kinds) if rows[0][name] is not None
    }
    lines = {"best of n": (drawn, BEST_OF_N), "best policies": (best_of_n["frontier"], OPTIMUM)}
  if optimum:
    lines["best policies"] = (optimum, OPTIMUM)
  kl = f"{find(kl_name).label}, {find(kl_name).unit}"
  roots = (False, kl), (True, f"√ of {kl}")
  axes = [(name, kl_name, *root) for name in kinds for root in roots]
  if "gold" not in kinds and before.get("nll") is not None and not optimum:
    axes.append(("score", "nll", False, f"{find('nll').label}, {find('nll').unit}"))
  figures = []
  for name, x_name, root, text in axes:
    svg = sweep_pictures.frontier(
      settings, before, name, x_name, text,
      root=root, line=line,
      lines=[x for x in lines.values() if x_name == kl_name and x[0].get(name)],
    )  # fmt: skip
    figures.append(figure(find(name).label, find(name).unit, svg))
  text = "A mark is a member after training, "
  text += "by enumeration. " if optimum else "judged on held-out prompts. "
  if max(len(setting.records) for setting in settings) > 1:
    text += "A cross is the mean over seeds, its box goes from the least to the most. "
  else:
    text += "There is one seed of each, so that nothing shows how much seeds differ. "
  if not optimum and min(len(setting.records) for setting in settings) == 1:
    text += "The bar of a single seed is two standard errors over prompts on either side. "
  if line:
    text += f"The grey line joins the {'means' if 'cross' in text else 'members'} in order. "
  return [
    element("h2", "The frontier"),
    sweep_pictures.legend(settings, [(name, style[-1]) for name, (_, style) in lines.items()]),
    grid(*figures, least=26),
    note(f"{text}The ring is {start}."),
    *(_best_of_n_notes(best_of_n, optimum, start) if best_of_n else []),
  ]


def _best_of_n_notes(best_of_n, optimum, start) -> list[Html]:
  text = (
    f"Best of n, up to n = {best_of_n['rows'][-1]['n']}, is no training: it keeps the draw with "
    f"the highest score, from {best_of_n['completions_per_prompt']} draws of {start} for each "
    "prompt. Its KL is the one to a draw from this pool."
  )
  if not optimum:
    text += (
      " The best policies, ref · exp(score/β)/Z, have the highest score that any policy has at "
      "its KL. They are estimated by weights of the same draws, and no training is in them."
    )
    text += _turn(best_of_n["frontier"])
  return [note(text)]


def _paths(settings, evaluations, kl_name, start) -> list[Html]:
  """Returns the pictures of the way of each setting, from the evaluations while it trained."""
  if kl_name is None:
    return []
  kl = f"{find(kl_name).label}, {find(kl_name).unit}"
  drawn = (
    (name, sweep_pictures.paths(settings, evaluations, name, kl_name, kl))
    for name in ("gold", "score")
  )
  figures = [figure(find(x).label, find(x).unit, svg) for x, svg in drawn if svg is not None]
  if not figures:
    return []
  return [
    element("h2", "The way there"),
    sweep_pictures.legend(settings),
    grid(*figures, least=26),
    note(
      f"The first seed of each, judged on held-out prompts while it trained: from the ring, "
      f"{start}, to the large mark, where it ended. Errors are left out; they are as "
      "large as those above."
    ),
  ]


def _turn(frontier: dict) -> str:
  """Returns where the best policies have the most gold, if that is before their end."""
  kl, gold = frontier["kl"], frontier["gold"]
  top = int(np.argmax(gold)) if gold else -1
  if top in (-1, len(kl) - 1):
    return ""
  return (
    f" Their gold accuracy is highest at {digits(kl[top])} nats, {shown('gold', gold[top])}. "
    f"Further away the score still rises and the gold accuracy falls, to {shown('gold', gold[-1])} "
    f"at {digits(kl[-1])} nats: what is gained there are the errors of the reward model."
  )


def _training(settings, series) -> list[Html]:
  drawn = ((name, sweep_pictures.curves(settings, series, name)) for name in _CURVES)
  figures = [figure(find(x).label, find(x).unit, svg) for x, svg in drawn if svg is not None]
  if not figures:
    return [note("No iteration was recorded.")]
  return [
    sweep_pictures.legend(settings),
    grid(*figures),
    note(
      "On the prompts that were trained on. Lines are means over seeds, bands go from the least "
      "seed to the most; long runs are drawn as means of 40 stretches."
    ),
  ]


def _members(settings, before, gain, kl_name, start) -> list[Html]:
  of_optimum = [x for x in EXACT if any(r.get(x) is not None for y in settings for r in y.records)]
  names = [*_kinds(before), *filter(None, [kl_name]), "entropy", "length", *of_optimum]
  columns = ["", "seed", *(f"{find(x).label}\n{find(x).per}" for x in names), ""]

  def mean(setting, name):
    x = setting.each(name)
    return shown(name, float(x.mean())) if np.isfinite(x).all() else shown(name, None)

  rows = [[start.removeprefix("the "), "", *(of_summary(before, name) for name in names), ""]]
  for setting in settings:
    if len(setting.records) > 1:
      rows.append([setting.name, "mean", *(mean(setting, name) for name in names), ""])
    for record in [*setting.records, *setting.diverged]:
      mark = "Pareto-optimal" if record["pareto"] else ""
      if record["diverged_at"]:
        mark = f"diverged at iteration {record['diverged_at']}"
      cells = (of_summary(record, name) for name in names)
      rows.append([setting.name, str(record["values"]["seed"]), *cells, mark])
  word = find(gain).label.lower()
  return [
    table(columns, rows),
    note(
      f"Pareto-optimal: no other member has a higher {word} at no more KL, nor as high a one at "
      "less. A diverged member has the figures of its last finite parameters. ± is one standard "
      "error over prompts. The folder of a member is members/NAME; its own report is made by its "
      "experiment with --flagfile=members/NAME/flags.txt --workdir=members/NAME."
    ),
  ]


def three_of(settings: list[Setting], gain: str) -> list[Setting]:
  """Returns the first, the last and the best setting, or the middle one where that is the best."""
  if len(settings) <= 3:
    return settings
  best = max(range(len(settings)), key=lambda i: standing(settings[i], gain)[0])
  if best in (0, len(settings) - 1):
    best = len(settings) // 2
  return [settings[0], settings[best], settings[-1]]


def _samples(settings, gain, samples, start) -> list[Html]:
  sources = [(x.name, x.records[0]["name"], "after") for x in three_of(settings, gain)]
  if sources:
    sources.insert(0, (start.removeprefix("the "), sources[0][1], "before"))
  columns = [
    (title, {x["index"]: x for x in samples[name] if x["when"] == when})
    for title, name, when in sources
  ]
  indices = [i for i in (columns[0][1] if columns else ()) if all(i in x for _, x in columns)]
  if not indices:
    return []
  parts = [
    element("h2", "Samples"),
    note("The same held-out prompts at the first seed of each; drawn, not the most likely."),
  ]
  style = "grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr))"
  for i in indices[:MAX_SAMPLES]:
    texts = [
      column(title, of[i], element("p", of[i]["completion"], class_="text"))
      for title, of in columns
    ]
    parts.append(side_by_side(columns[0][1][i]["prompt"], *texts, style=style))
  return parts
