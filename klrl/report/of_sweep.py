"""The page of a sweep, made from the files in its folder alone: which beta, and what it costs.

It reads frontier.json, config.json and, of each member, metrics.jsonl and samples.jsonl; best-of-n
and the best policies, as draws of the untrained policy tell them, from the run of best-of-n that
the sweep made. Members of an enumerated task have optimum.json, the exact frontier of the best
policies. The sweep's command, given again, makes the page anew.
"""

import pathlib

import numpy as np

from klrl import schema
from klrl.figures import ABSENT, digits
from klrl.report import sweep_pictures
from klrl.report.frontier import EXACT
from klrl.report.page import Html, element, note, page, paragraph, table
from klrl.report.sweep_answer import answer, exact_answer, standing
from klrl.report.sweep_pictures import BEST_OF_N, OPTIMUM, Setting
from klrl.run import metrics
from klrl.run.workdir import write_text

KL_NAMES = ("kl_ref_exact", "kl_ref_k1")
MAX_SAMPLES = 8
_TITLES = {"gold": "Gold score", "score": "Score"}
_EXACT_TITLES = {"objective_gap": "gap", "tv_to_optimum": "total variation"}
_KL_TEXTS = {"kl_ref_exact": "exact for each token", "kl_ref_k1": "estimated by k1"}
_CURVES = (
  ("score/mean", "Score", "mean per completion"),
  ("gold/mean", "Gold score", "mean per completion"),
  ("kl/ref_k1", "KL to the reference", "k1, nats per sequence"),
)
_GRID = "grid-template-columns: repeat(auto-fit, minmax(min(100%, {}rem), 1fr))"


def write_page(workdir: pathlib.Path, *, best_of_n: bool = False) -> pathlib.Path:
  """Returns the path of `report.html`, written into the folder of a sweep.

  `best_of_n` says whether the run of best-of-n in the folder belongs beside the members.
  """
  found, config = (schema.read(workdir / name) for name in ("frontier.json", "config.json"))
  names = [record["name"] for record in found["members"]]
  series, samples = (
    {name: metrics.read_lines(workdir / "members" / name / file) for name in names}
    for file in ("metrics.jsonl", "samples.jsonl")
  )
  path = workdir / "best_of_n" / "best_of_n.json"
  beside = schema.read(path) if best_of_n else None
  optimum = workdir / "members" / names[0] / "optimum.json"
  optimum = _read_optimum(optimum) if optimum.exists() else None
  if optimum:
    found["before"] |= {"score": optimum["score"][0], "score_stderr": None}
  path = workdir / "report.html"
  write_text(path, report(found, config["experiment"], series, samples, beside, optimum))
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
  for key in order:
    texts = [(_typeset(name), f"{x:g}" if isinstance(x, float) else str(x)) for name, x in key]
    settings.append(
      Setting(
        ", ".join(f"{name} = {text}" for name, text in texts) or "all flags alike",
        ", ".join(text for _, text in texts),
        firsts.index(key[0][1]) / max(1, len(firsts) - 1) if key else 1.0,
        [record for record in groups[key] if is_finite(record)],
        [record for record in groups[key] if not is_finite(record)],
      )
    )
  return settings


def kl_name_of(found: dict) -> str | None:
  """Returns the name of the KL that the members are placed by; None where none was measured."""
  return next((x for x in KL_NAMES if found["before"].get(x) is not None), None)


def _typeset(name: str) -> str:
  return {"beta": "β"}.get(name, name)


def report(
  found: dict,
  experiment: str,
  series: dict,
  samples: dict,
  best_of_n: dict | None,
  optimum: dict | None,
) -> str:
  """Returns the page.

  Args:
    found: what frontier.json holds.
    experiment: what was swept.
    series: member -> the objects of its metrics.jsonl.
    samples: member -> the objects of its samples.jsonl.
    best_of_n: what best_of_n.json holds, or None.
    optimum: {"kl", "score"} of the best policies, where the task is enumerated.
  """
  settings, gain, before = settings_of(found), found["gain"], found["before"]
  kl_name = kl_name_of(found)
  finite = [setting for setting in settings if setting.records]
  sentence, notes = exact_answer(finite) if optimum else answer(finite, gain, before, kl_name)
  num_seeds = max(len(x.records) + len(x.diverged) for x in settings)
  return page(
    f"Sweep of {experiment}",
    element("h1", f"Sweep of {experiment}: {len(found['members'])} members"),
    element("p", sentence, class_="verdict"),
    *map(paragraph, notes),
    *_frontier(finite, before, kl_name, best_of_n, optimum),
    element("h2", "Settings"),
    *_settings_table(settings, before, kl_name, num_seeds),
    element("h2", "Training"),
    *_training(finite, series),
    element("h2", "Members"),
    *_members_table(settings, before, gain, kl_name),
    *_samples(finite, gain, samples),
  )


def _frontier(settings, before, kl_name, best_of_n, optimum) -> list[Html]:
  if kl_name is None or not settings:
    return [note("No KL to a reference was measured: there is no frontier to draw.")]
  kinds = [name for name in ("gold", "score") if before.get(name) is not None]
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
  kl = "KL(π‖ref), nats per sequence"
  axes = [
    (name, *x) for name in kinds for x in ((kl_name, False, kl), (kl_name, True, f"√ of {kl}"))
  ]
  if "gold" not in kinds and before.get("nll") is not None and not optimum:
    axes.append(("score", "nll", False, "NLL under the reference, nats per token"))
  figures = []
  for name, x_name, root, text in axes:
    svg = sweep_pictures.frontier(
      settings, before, name, x_name,
      root=root, line=line,
      lines=[x for x in lines.values() if x_name == kl_name and x[0].get(name)],
    )  # fmt: skip
    caption = element(
      "figcaption", element("b", _TITLES[name]), " ", element("span", f"against {text}")
    )
    figures.append(element("figure", caption, Html(svg)))
  text = "A dot is a member after training, "
  text += "by enumeration. " if optimum else "judged on held-out prompts. "
  if max(len(setting.records) for setting in settings) > 1:
    text += "A cross is the mean over seeds, its box goes from the least to the most. "
  if line:
    text += f"The grey line joins the {'means' if 'cross' in text else 'dots'} in order. "
  kl_text = "exact" if optimum else _KL_TEXTS[kl_name]
  return [
    element("h2", "The frontier"),
    sweep_pictures.legend(settings, [(name, style[-1]) for name, (_, style) in lines.items()]),
    element("div", *figures, class_="curves", style=_GRID.format(26)),
    note(f"{text}The ring is the untrained policy. The KL is {kl_text}."),
    *(_best_of_n_notes(best_of_n, optimum) if best_of_n else []),
  ]


def _best_of_n_notes(best_of_n, optimum) -> list[Html]:
  pool = f"{best_of_n['completions_per_prompt']} draws of the untrained policy for each prompt"
  notes = [
    f"Best of n, up to n = {best_of_n['rows'][-1]['n']}, is no training but a choice among draws: "
    f"of {pool}, to which its KL is."
  ]
  if not optimum:
    notes.append(
      "The best policies, ref · exp(score/β)/Z, have the most score that any policy has at its KL, "
      "and what gold they have is the score's doing and not the training's. They are estimated by "
      f"weights of the same draws.{_turn(best_of_n['frontier'])}"
    )
  return [note(" ".join(notes))]


def _turn(frontier: dict) -> str:
  """Returns where the best policies have the most gold, if that is before their end."""
  kl, gold = frontier["kl"], frontier["gold"]
  top = int(np.argmax(gold)) if gold else -1
  if top in (-1, len(kl) - 1):
    return ""
  return (
    f" They have the most gold, {digits(gold[top])}, at {digits(kl[top])} nats; beyond, more score "
    f"is less gold, down to {digits(gold[-1])} at {digits(kl[-1])} nats: what is left to gain are "
    "the reward model's errors."
  )


def _range(setting: Setting, name: str | None) -> str:
  x = setting.each(name) if name else np.array([np.nan])
  if not len(x) or not np.isfinite(x).all():
    return ABSENT
  if len(x) == 1:
    return digits(x[0])
  return f"{digits(x.mean())} ({digits(x.min())} to {digits(x.max())})"


def _settings_table(settings, before, kl_name, num_seeds) -> list[Html]:
  kinds = [name for name in ("gold", "score") if before.get(name) is not None]
  columns = ["", *(_TITLES[name] for name in kinds), "KL(π‖ref)", "entropy", ""]
  measured = (before.get(name) for name in (*kinds, kl_name, "entropy"))
  rows = [["untrained", *(ABSENT if x is None else digits(x) for x in measured), ""]]
  for setting in settings:
    figures = [*kinds, kl_name, "entropy"]
    diverged = f"{len(setting.diverged)} of {len(setting.records + setting.diverged)} diverged"
    rows.append(
      [setting.name, *(_range(setting, x) for x in figures), diverged if setting.diverged else ""]
    )
  text = "KL in nats per sequence, entropy in nats per token."
  if num_seeds > 1:
    text = f"Means over seeds, and in brackets the least and the most. {text}"
  return [table(columns, rows), note(text)]


def _training(settings, series) -> list[Html]:
  figures = []
  for name, title, unit in _CURVES:
    svg = sweep_pictures.curves(settings, series, name)
    if svg is not None:
      caption = element("figcaption", element("b", title), " ", element("span", unit))
      figures.append(element("figure", caption, Html(svg)))
  if not figures:
    return [note("No iteration was recorded.")]
  return [
    sweep_pictures.legend(settings),
    element("div", *figures, class_="curves"),
    note(
      "Over the iterations, on the prompts that were trained on. Lines are means over seeds, bands "
      "go from the least seed to the most; long runs are drawn as means of 40 stretches."
    ),
  ]


def _members_table(settings, before, gain, kl_name) -> list[Html]:
  kinds = [name for name in ("gold", "score") if before.get(name) is not None]
  of_optimum = [x for x in EXACT if any(r.get(x) is not None for y in settings for r in y.records)]
  names = [*kinds, *filter(None, [kl_name]), "entropy", "length", *of_optimum]
  columns = ["", "seed", *(_TITLES[name] for name in kinds), *(["KL(π‖ref)"] if kl_name else [])]
  columns += ["entropy", "length", *(_EXACT_TITLES[x] for x in of_optimum), ""]

  def cells(record):
    return [digits(record.get(name), record.get(f"{name}_stderr") or None) for name in names]

  rows = [["untrained", "", *cells(before), ""]]
  for setting in settings:
    for record in [*setting.records, *setting.diverged]:
      mark = "Pareto-optimal" if record["pareto"] else ""
      if record["diverged_at"]:
        mark = f"diverged at iteration {record['diverged_at']}"
      rows.append([setting.name, str(record["values"]["seed"]), *cells(record), mark])
  word = "gold score" if gain == "gold" else "score"
  return [
    table(columns, rows),
    note(
      f"Pareto-optimal: no other member has more {word} at no more KL, nor as much at less. "
      "A diverged member has the figures of its last finite parameters. ± is one standard error "
      "over prompts. The folder of a member is members/NAME; its own report is made by its "
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


def _samples(settings, gain, samples) -> list[Html]:
  shown = three_of(settings, gain)
  sources = [(x.name, x.records[0]["name"], "after") for x in shown]
  if sources:
    sources.insert(0, ("Untrained", sources[0][1], "before"))
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
  for i in indices[:MAX_SAMPLES]:
    texts = [_sample(title, of[i]) for title, of in columns]
    prompt = element("p", columns[0][1][i]["prompt"], class_="prompt text")
    parts.append(element("div", prompt, *texts, class_="pair", style=_GRID.format(13)))
  return parts


def _sample(title: str, sample: dict) -> Html:
  facts = [f"{x} {digits(sample[x])}" for x in ("score", "gold") if sample.get(x) is not None]
  if sample.get("kl_ref"):
    facts.append(f"KL {digits(sum(sample['kl_ref']))}")
  heading = element("b", title), " ", element("span", ", ".join(facts), class_="note")
  return element("div", *heading, element("p", sample["completion"], class_="text"))
