"""The report of a run: one HTML file with its pictures inside, which opens offline.

`write_report` is a function of the files that a run leaves in its folder, and of nothing else: the
same files give the same bytes. Any of them may be missing, cut short or hold null and NaN, as an
interrupted run leaves them; the page then says so and shows the rest.

Prompts, completions, settings and names of figures come from models and from people: all markup is
made by `page.element`, which escapes them.

KL is KL(policy || reference), in nats: per sequence where nothing else is said. Figures are means
over completions; an error is one standard error in text, two in the curves.
"""

import json
import math
import pathlib

import numpy as np

from klrl import schema
from klrl.errors import UserError
from klrl.report.figures_table import figures_table
from klrl.report.page import Html, digits, duration, element, note, number, page
from klrl.report.plots import INK, MAX_POINTS, SERIES, Line, curves
from klrl.run import fingerprints
from klrl.run.workdir import write_text

MAX_SAMPLES = 10

# Small multiples: title, unit, and the figures of metrics.jsonl or timing.jsonl that share the axes
# as (name, label, colour, style).
FIRST, SECOND, DOTS = (SERIES[0], "-"), (SERIES[1], "--"), (INK, "o")
PANELS = (
  ("Score", "mean per completion", (("score/mean", "", *FIRST),)),
  ("Gold score", "mean per completion", (("gold/mean", "", *FIRST),)),
  ("KL to the reference", "nats per sequence", (
    ("kl/ref_k1", "k1", *FIRST), ("kl/ref_k3", "k3", *SECOND), ("kl/ref_exact", "exact", *DOTS),
  )),
  ("KL to the reference", "nats per token", (
    ("kl/ref_k1_per_token", "k1", *FIRST), ("kl/ref_k3_per_token", "k3", *SECOND),
    ("kl/ref_exact_per_token", "exact", *DOTS),
  )),
  ("KL to the old policy", "nats per sequence", (
    ("kl/old_k1", "k1", *FIRST), ("kl/old_k3", "k3", *SECOND),
  )),
  ("Cross-entropy", "nats per token", (
    ("loss/cross_entropy", "", *FIRST), ("policy/pretraining_loss", "pretraining", *SECOND),
  )),
  ("Bradley-Terry loss", "nats per pair", (("loss/bradley_terry", "", *FIRST),)),
  ("Preference loss", "per pair", (("loss/dpo", "DPO", *FIRST), ("loss/ipo", "IPO", *SECOND))),
  ("Agreement with labels", "fraction of pairs", (
    ("loss/accuracy", "", *FIRST), ("preference/accuracy", "", *FIRST),
  )),
  ("Implicit reward margin", "reward", (("preference/margin", "", *FIRST),)),
  ("Log-probability of the pair", "nats per completion", (
    ("preference/chosen_log_prob", "chosen", *FIRST),
    ("preference/rejected_log_prob", "rejected", *SECOND),
  )),
  ("Entropy", "nats per token", (("policy/entropy", "", *FIRST),)),
  ("Clip fraction", "fraction of tokens", (
    ("policy/clip_fraction", "policy", *FIRST), ("value/clip_fraction", "value", *SECOND),
  )),
  ("Value loss", "squared reward", (("value/loss", "", *FIRST),)),
  ("Explained variance", "of the returns", (
    ("value/explained_variance", "", *FIRST),
  )),
  ("Beta", "reward per nat", (("controller/beta", "", *FIRST),)),
  ("Length", "tokens per completion", (("rollout/length", "", *FIRST),)),
  ("Speed", "tokens per second", (("tokens_per_second", "", *FIRST),)),
)  # fmt: skip


def _has_beta(config: dict) -> bool:
  return config.get("beta") is not None and config.get("kl_placement") != "none"


def _read_text(path: pathlib.Path, gaps: list[str]) -> str | None:
  try:
    return path.read_text("utf-8", "replace")
  except FileNotFoundError:
    gaps.append(f"{path.name} is missing.")
  except OSError as error:
    gaps.append(f"{path.name} cannot be read: {error.strerror}.")
  return None


def _parsed(text: str) -> dict | None:
  """Returns the JSON object in `text`, None where there is none; half characters may be in it."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) and not schema.is_deep(value, text) else None


def _read_object(path: pathlib.Path, gaps: list[str]) -> dict:
  text = _read_text(path, gaps)
  value = {} if text is None else _parsed(text)
  if value is None:
    gaps.append(f"{path.name} holds no JSON object; it is left out.")
  return value or {}


def _read_lines(path: pathlib.Path, gaps: list[str]) -> list[dict]:
  text = _read_text(path, gaps)
  if text is None:
    return []
  lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
  records = {i: _parsed(line) for i, line in lines}
  bad = [str(i) for i, record in records.items() if record is None]
  if bad:
    shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    gaps.append(f"{path.name}: left out what is no JSON object, in line {shown}.")
  elif not records:
    gaps.append(f"{path.name} is empty.")
  return [record for record in records.values() if record is not None]


def _read_accepted(workdir: pathlib.Path, gaps: list[str]) -> list[str]:
  try:
    return [f"{text}." for text in fingerprints.read(workdir)["accepted"]]
  except UserError as error:
    gaps.append(str(error))
    return []


def _series(records: list[dict]) -> dict[str, dict[float, float]]:
  """Returns name -> iteration -> value; what is null was not measured, and is left out."""
  series: dict[str, dict[float, float]] = {}
  for position, record in enumerate(records):
    iteration = number(record.get("iteration"))
    if iteration is None or not math.isfinite(iteration):
      iteration = float(position)
    for name, value in record.items():
      x = number(value)
      if name != "iteration" and x is not None:
        series.setdefault(name, {})[iteration] = x
  return series


def _flat(record: dict, prefix: str = "") -> dict[str, object]:
  flat = {}
  for key, value in record.items():
    name = prefix + key.replace("/", "_")
    flat.update(_flat(value, name + "_") if isinstance(value, dict) else {name: value})
  return flat


FACTS = (
  ("num_iterations", lambda n: f"{n:,.0f} iterations"),
  ("wall_seconds", duration),
  ("tokens_per_second", lambda n: f"{n:,.0f} tokens per second"),
)
# What a run is judged by, the first two that it has: words, name in the summary, in the metrics.
CHANGES = (
  ("the score", "score", "score/mean"),
  ("the gold score", "gold", "gold/mean"),
  ("the cross-entropy", "loss_cross_entropy", "loss/cross_entropy"),
  ("the Bradley-Terry loss", "loss_bradley_terry", "loss/bradley_terry"),
)


def _sentence(figures: dict[str, object]) -> str:
  changes = []
  for words, name, _ in CHANGES:
    before, after = (number(figures.get(f"{name}_{when}")) for when in ("before", "after"))
    if before is not None and after is not None:
      verb = "rose" if after > before else "fell" if after < before else "went"
      changes.append(f"{words} {verb} from {digits(before)} to {digits(after)}")
  if not changes:
    return ""
  sentence = " and ".join(changes[:2])
  for estimator in ("exact", "k1", "k3"):
    name = f"kl_ref_{estimator}"
    if number(figures.get(name)) is not None:
      kl = digits(figures[name], figures.get(f"{name}_stderr"))
      return f"{sentence}, at {kl} nats per sequence of KL from the reference ({estimator})."
  return f"{sentence}."


def _verdict(figures: dict[str, object], series: dict) -> str:
  """Returns the run in one sentence; without a summary, from its first and last iteration."""
  sentence = _sentence(figures)
  if not sentence:
    last = {name.replace("/", "_"): list(values.values())[-1] for name, values in series.items()}
    for _, name, metric in CHANGES:
      if metric in series:
        values = list(series[metric].values())
        last |= {f"{name}_before": values[0], f"{name}_after": values[-1]}
    sentence = _sentence(last)
    sentence = sentence and f"in training, {sentence}"
  return sentence[:1].upper() + sentence[1:] if sentence else "This run left no figures to judge."


def _panel(title: str, unit: str, lines: tuple, series: dict) -> Html:
  drawn, legend = [], []
  for name, label, colour, style in lines:
    if name in series:
      iterations, values = np.array([*series[name]]), np.array([*series[name].values()])
      errors = series.get(f"{name}_stderr")
      stderrs = errors and np.array([errors.get(i, math.nan) for i in iterations])
      if np.isfinite(values).any():
        drawn.append(Line(iterations, values, stderrs, colour, style))
      mark = element("i", class_={"--": "second", "o": "dots"}.get(style, "first"))
      last = element("b", digits(values[-1]))
      legend.append(element("span", mark, f"{label} ", last) if label else element("span", last))
  legend = element("div", *legend, class_="legend")
  caption = element("figcaption", element("b", title), " ", element("span", unit), legend)
  return element("figure", caption, Html(curves(drawn) if drawn else ""))


def _curves(series: dict) -> list[Html]:
  if not series:
    return [note("No iteration was recorded.")]
  # A picture of its own for every figure that no panel has.
  placed = {name for *_, lines in PANELS for name, *_ in lines}
  placed |= {f"{name}_stderr" for name in series}
  rest = [(name, "", ((name, "", *FIRST),)) for name in sorted(series) if name not in placed]
  present = [panel for panel in PANELS if any(name in series for name, *_ in panel[2])]
  grids = [
    element("div", *(_panel(*panel, series) for panel in panels), class_="curves")
    for panels in (present, rest)
  ]
  about = "Over the iterations; the figure in each heading is the last one. Bands and bars are two "
  about += "standard errors wide on either side."
  if max(map(len, series.values())) > MAX_POINTS:
    about += (
      f" A line of more than {MAX_POINTS} points is drawn as the means of as many stretches, "
    )
    about += "its band from their lowest to their highest value."
  fold = element("details", element("summary", "All metrics that are not above"), grids[1])
  return [note(about), grids[0], *([fold] if rest else [])]


def _tokens(sample: dict, most: float) -> Html:
  tokens, kl, log_probs = (sample.get(name) for name in ("tokens", "kl_ref", "log_prob"))
  if not isinstance(tokens, list) or not isinstance(kl, list) or len(tokens) != len(kl):
    return element("p", sample.get("completion", ""), class_="text")
  if not isinstance(log_probs, list) or len(log_probs) != len(tokens):
    log_probs = [None] * len(tokens)
  spans = []
  for token, nats, log_prob in zip(tokens, kl, log_probs, strict=True):
    x = number(nats)
    share = min(max(x / most, 0.0), 1.0) if x is not None and math.isfinite(x) and most else 0.0
    quoted = json.dumps(token, ensure_ascii=False)
    title = f"{quoted}: KL {digits(nats)} nats, log-probability {digits(log_prob)}"
    text = str(token).replace("\n", "\u21b5\n") or "\u25af"
    spans.append(element("span", text, class_="t", style=f"--k:{0.75 * share:.2f}", title=title))
  return element("p", *spans, class_="text")


def _nats(sample: dict) -> list[float]:
  kl = sample.get("kl_ref")
  numbers = [number(x) for x in kl] if isinstance(kl, list) else []
  return [x for x in numbers if x is not None and math.isfinite(x)]


def _samples(records: list[dict]) -> list[Html]:
  pairs: dict[str, dict[str, dict]] = {}
  for position, record in enumerate(records):
    index = str(record.get("index", f"line {position}"))
    pairs.setdefault(index, {})[str(record.get("when"))] = record
  if not pairs:
    return [note("No samples were kept.")]
  shown = list(pairs.values())[:MAX_SAMPLES]
  nats = [x for pair in shown for sample in pair.values() for x in _nats(sample) if x > 1e-12]
  most = 0.0
  if nats:
    # One outlier would leave everything else pale.
    high = float(np.quantile(nats, 0.98))
    step = 10.0 ** math.floor(math.log10(high)) / 2
    most = math.ceil(high / step) * step
  count = f"{len(shown)} of {len(pairs)} prompts" if len(shown) < len(pairs) else "The same prompts"
  parts = [
    note(
      f"{count}, before and after training. A token's background is the exact KL to the reference "
      "at its position; point at it for the figures."
    )
  ]
  if most:
    scale = "0", element("i"), f"{digits(most)} nats and more"
    parts.append(element("div", *scale, class_="scale note"))
  for pair in shown:
    columns = []
    for when in ("before", "after"):
      sample = pair.get(when, {})
      known = [name for name in ("score", "gold") if number(sample.get(name)) is not None]
      facts = [f"{name} {digits(sample[name])}" for name in known]
      if kl := _nats(sample):
        facts.append(f"KL {digits(sum(kl))} nats in {len(kl)} tokens")
      title = element("b", when.capitalize())
      beside = element("span", ", ".join(facts), class_="note")
      text = _tokens(sample, most) if sample else note("No sample.")
      columns.append(element("div", title, " ", beside, text))
    prompt = element("p", next(iter(pair.values())).get("prompt", ""), class_="prompt text")
    parts.append(element("div", prompt, *columns, class_="pair"))
  return parts


def _notices(title: str, lines: list, class_: str) -> list[Html]:
  listed = element("ul", *(element("li", line) for line in lines))
  return [element("div", element("b", title), listed, class_=class_)] if lines else []


def _settings(record: dict) -> Html:
  entries = []
  for key, value in record.items():
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    entries.append(element("div", element("dt", key), element("dd", text)))
  return element("dl", *entries, class_="settings")


def _run(config: dict, figures: dict, versions: dict, flags: str) -> list[Html]:
  parts = []
  if flags:
    again = f"python -m experiments.{config.get('experiment', 'EXPERIMENT')} --flagfile=flags.txt"
    parts += [
      element("p", "The same run again:"), element("pre", again),
      element("p", "where flags.txt is"), element("pre", flags),
    ]  # fmt: skip
  for title, record in (("Settings", config), ("Versions", versions), ("All figures", figures)):
    if record:
      parts += [element("h3", title), _settings(record)]
  return parts


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the path of `report.html`, written into `workdir` from the files that a run left there.

  Reads config.json, flags.txt, metrics.jsonl, timing.jsonl, samples.jsonl and summary.json; what is
  missing or broken is named on the page. A report that is there already is replaced whole.
  """
  gaps: list[str] = []
  config = _read_object(workdir / "config.json", gaps)
  summary = _read_object(workdir / "summary.json", gaps)
  series = _series(_read_lines(workdir / "metrics.jsonl", gaps))
  timing = _series(_read_lines(workdir / "timing.jsonl", gaps))
  supervised = config.get("experiment") in ("sft", "reward_model")  # These draw no samples.
  samples = [] if supervised else _read_lines(workdir / "samples.jsonl", gaps)
  flags = (_read_text(workdir / "flags.txt", []) or "").strip()
  for name, values in series.items():
    if bad := [i for i in values if not math.isfinite(values[i])]:
      gaps.append(f"{name} is not finite in {len(bad)} iterations, first in {bad[0]:g}.")
  series |= {name: timing[name] for name in ("tokens_per_second",) if name in timing}

  warnings = summary.pop("warnings", None) or []
  warnings = warnings if isinstance(warnings, list) else [warnings]
  warnings = warnings + _read_accepted(workdir, gaps)
  versions, penalty = summary.pop("versions", None), summary.pop("kl_penalty", "")
  figures = _flat(summary)
  facts = [text(x) for name, text in FACTS if (x := number(figures.get(name))) and math.isfinite(x)]
  facts += [str(figures["device"])] if "device" in figures else []
  beta = f", beta {config['beta']}" if _has_beta(config) else ""
  title = f"{config.get('experiment', 'A run')}{beta}"

  body = [
    element("h1", title), element("p", _verdict(figures, series), class_="verdict"),
    note(" \u00b7 ".join(facts)), *([note(str(penalty))] if penalty else []),
    *_notices("Warnings", warnings, "warnings"), *_notices("Not complete", gaps, "missing"),
    element("h2", "Before and after"), figures_table(figures),
    element("h2", "Curves"), *_curves(series),
    element("h2", "Samples"), *_samples(samples),
    element("h2", "The run"),
    *_run(config, figures, versions if isinstance(versions, dict) else {}, flags),
  ]  # fmt: skip
  path = workdir / "report.html"
  text = page(title, *body).encode("utf-8", "replace").decode()  # a model may emit half a character
  try:
    write_text(path, text)
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror}.") from error
  return path
