"""The report of a run, from small made-up run folders."""

import html.parser
import json
import math
import time
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from klrl.report import page, plots
from klrl.report.of_run import write_report
from klrl.report.samples import MAX_SAMPLES

HOSTILE = "<script>alert('x')</script>&\"'"


def write_run(workdir, *, num_iterations=5, **files):
  """Writes a complete PPO run; a keyword replaces the content of a file, None leaves it out."""
  config = {"experiment": "ppo", "beta": 0.125, "reward": "happy.py:score"}
  metrics = [
    {
      "iteration": i,
      "score/mean": 0.1 * i,
      "gold/mean": None,
      "kl/ref_k1": 1.0 * i,
      "kl/ref_k1_stderr": 0.25,
      "kl/ref_exact": 1.1 * i if i % 2 == 0 else None,
      "policy/entropy": 2.0 - 0.1 * i,
    }
    for i in range(num_iterations)
  ]
  timing = [{"iteration": i, "tokens_per_second": 4321.0 + i} for i in range(num_iterations)]
  samples = [
    {
      "when": when,
      "index": 7,
      "prompt": "Once upon",
      "completion": " a time",
      "tokens": [" a", " time"],
      "kl_ref": kl,
      "log_prob": [-0.5, -1.25],
      "score": 0.75,
      "gold": None,
    }
    for when, kl in (("before", [0.0, 0.0]), ("after", [0.25, 2.0]))
  ]
  summary = {
    "score_before": 0.5,
    "score_before_stderr": 0.1,
    "score_after": 1.75,
    "score_after_stderr": 0.2,
    "gold_before": None,
    "gold_after": None,
    "kl_ref_k1": 4.02,
    "kl_ref_k1_stderr": 0.31,
    "kl_ref_exact": 3.977,
    "kl_ref_exact_stderr": 0.12,
    "wall_seconds": 151.0,
    "num_iterations": num_iterations,
    "versions": {"jax": "0.10.2"},
    "warnings": ["the gradient is biased"],
  }
  content = {
    "config.json": json.dumps(config),
    "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in metrics),
    "timing.jsonl": "".join(json.dumps(record) + "\n" for record in timing),
    "samples.jsonl": "".join(json.dumps(record) + "\n" for record in samples),
    "summary.json": json.dumps(summary),
    "flags.txt": "--beta=0.125\n",
  }
  content |= {name.replace("__", "."): text for name, text in files.items()}
  for name, text in content.items():
    if text is not None:
      (workdir / name).write_text(text)
  return workdir


class Page(html.parser.HTMLParser):
  """What a reader gets: tags with attributes, text, and whether every tag is closed in order."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.open, self.words = [], [], []
    self.source = path.read_text("utf-8")
    self.feed(self.source)
    self.text = " ".join(" ".join(self.words).split())
    assert not self.open, f"left open: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag != "meta":
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.words.append(data)

  def count(self, tag):
    return sum(name == tag for name, _ in self.tags)


def test_shows_the_figures_of_a_run(tmp_path):
  path = write_report(write_run(tmp_path))
  assert path == tmp_path / "report.html"
  shown = Page(path)
  verdict = (
    "On held-out prompts, the score rose from 0.50 ± 0.10 to 1.75 ± 0.20, at 3.98 ± 0.12 nats"
  )
  assert verdict + " per sequence of KL from the reference (exact)." in shown.text
  assert "5 iterations · 2 min 31 s" in shown.text
  assert "KL(π‖ref), k1 nats per sequence \u2013 4.02 ± 0.31" in shown.text
  assert "Warnings the gradient is biased" in shown.text
  # Settings are there once.
  assert shown.text.count("happy.py:score") == 1 and "--flagfile=FOLDER/flags.txt" in shown.text
  assert "jax 0.10.2" in shown.text
  assert "Not complete" not in shown.text
  # No gold score anywhere, so neither a row nor a curve for it.
  assert "Gold" not in shown.text
  # Score, KL per sequence, entropy, speed.
  assert shown.count("svg") == 4
  assert "k1 4 exact 4.4" in shown.text


def test_samples_carry_the_kl_of_each_token(tmp_path):
  shown = Page(write_report(write_run(tmp_path)))
  tokens = [attributes for _, attributes in shown.tags if attributes.get("class") == "t"]
  assert [token["title"] for token in tokens[2:]] == [
    '" a": KL 0.25 nats, log-probability \u22120.5',
    '" time": KL 2 nats, log-probability \u22121.25',
  ]
  # The scale ends at 2 nats, where the colour is at its strongest, 0.75.
  assert "2 nats and more" in shown.text
  shades = [token["style"] for token in tokens]
  assert shades == ["--k:0.00", "--k:0.00", f"--k:{0.75 / 8:.2f}", "--k:0.75"]
  assert "After score 0.75, KL 2.25 nats in 2 tokens" in shown.text


def test_tokens_whose_kl_is_next_to_nothing_are_pale(tmp_path):
  sample = {"when": "after", "index": 1, "tokens": ["a"], "kl_ref": [4e-5], "log_prob": [-1.0]}
  shown = Page(write_report(write_run(tmp_path, samples__jsonl=json.dumps(sample))))
  assert "0.01 nats and more" in shown.text
  assert [x["style"] for _, x in shown.tags if x.get("class") == "t"] == ["--k:0.00"]


def test_same_files_give_the_same_bytes(tmp_path):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
  first = write_report(write_run(tmp_path / "one")).read_bytes()
  with matplotlib.rc_context({"axes.ymargin": 0.3, "svg.hashsalt": "other"}):
    second = write_report(write_run(tmp_path / "two")).read_bytes()
  assert first == second
  assert write_report(tmp_path / "one").read_bytes() == first


def test_fetches_nothing_and_runs_nothing(tmp_path):
  shown = Page(write_report(write_run(tmp_path)))
  assert "http://" not in shown.source
  assert "https://" not in shown.source
  assert shown.count("script") == shown.count("link") == shown.count("img") == 0
  policy = [a["content"] for _, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
  assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
  # Pictures take the colours of the page and do not all name the same groups.
  assert "var(--first)" in shown.source
  assert not any(colour in shown.source for colour in plots.PAGE_COLOURS)
  assert "figure_1" not in shown.source


def test_everything_from_outside_is_escaped(tmp_path):
  sample = {"when": HOSTILE, "index": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE}
  other = {"when": "after", "index": 1, "tokens": [HOSTILE], "kl_ref": [1.0], "log_prob": [-1.0]}
  files = {
    "config__json": json.dumps({"experiment": HOSTILE, "beta": HOSTILE, HOSTILE: HOSTILE}),
    "metrics__jsonl": json.dumps({"iteration": 0, HOSTILE: 1.0, "$\\frac{": 2.0}),
    "samples__jsonl": "\n".join(
      json.dumps(record)
      for record in (sample, sample | {"when": "before"}, other, other | {"prompt": HOSTILE})
    ),
    "summary__json": json.dumps(
      {
        f"{HOSTILE}_after": 1.0,
        "device": HOSTILE,
        "warnings": [HOSTILE],
        "versions": {HOSTILE: HOSTILE},
      }
    ),
    "flags__txt": HOSTILE,
  }
  shown = Page(write_report(write_run(tmp_path, **files)))
  assert shown.count("script") == 0
  assert "<script" not in shown.source
  titles = [a["title"] for _, a in shown.tags if a.get("class") == "t"]
  assert titles and all("<script>" in title for title in titles)
  # Twice the device and the rest, at least: shown as text, not swallowed.
  assert shown.text.count("<script>alert('x')</script>") >= 10


@pytest.mark.parametrize(
  "missing", ["config.json", "summary.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl"]
)
def test_a_missing_file_is_named_and_the_rest_is_shown(tmp_path, missing):
  shown = Page(write_report(write_run(tmp_path, **{missing.replace(".", "__"): None})))
  assert f"Not complete {missing} is missing." in shown.text
  assert ("ppo, beta 0.125" in shown.text) == (missing != "config.json")
  assert ("score 0.75" in shown.text) == (missing != "samples.jsonl")
  assert shown.count("svg") == {"metrics.jsonl": 1, "timing.jsonl": 3}.get(missing, 4)


def test_an_empty_folder_gives_a_page(tmp_path):
  shown = Page(write_report(tmp_path))
  assert "This run left no figures to judge." in shown.text
  assert shown.text.count("is missing.") == 5
  assert shown.count("svg") == 0


def test_broken_files_are_named(tmp_path):
  files = {
    "config__json": "[1, 2]",
    "summary__json": '{"score_before": 1',
    "metrics__jsonl": '{"iteration": 0, "score/mean": 1.0}\n\n[3]\n{"iteration": 1, "sco',
    "samples__jsonl": "\n",
    "timing__jsonl": "\0\0\0",
  }
  shown = Page(write_report(write_run(tmp_path, **files)))
  for words in (
    "config.json holds no JSON object",
    "summary.json holds no JSON object",
    "metrics.jsonl: left out what is no JSON object, in line 3, 4.",
    "samples.jsonl is empty.",
    "timing.jsonl: left out what is no JSON object, in line 1.",
  ):
    assert words in shown.text


def test_iterations_that_are_there_twice_or_missing_are_named(tmp_path):
  def lines(*iterations):
    return "".join(f'{{"iteration": {i}, "score/mean": {i}.0}}\n' for i in iterations)

  files = {"metrics__jsonl": lines(0, 1, 1, 2, 2, 5), "timing__jsonl": lines(0, 1, 2)}
  shown = Page(write_report(write_run(tmp_path, **files)))
  assert (
    "metrics.jsonl: several records of iteration 1, 2, of which the last is shown." in shown.text
  )
  assert "metrics.jsonl: 2 of the iterations before its last one are missing." in shown.text
  assert "timing.jsonl" not in shown.text.partition("Not complete")[2][:400]


KINDS = {
  "empty": "",
  "zeros": "\0" * 99,
  "deep": "[" * 200_000,
  "deep object": '{"a": ' * 500 + "1" + "}" * 500,
  "other types": '{"iteration": {}, "score/mean": "x", "experiment": [1], "beta": {}, '
  '"warnings": 3, "versions": [], "index": {}, "tokens": [[]], "kl_ref": [{}], "when": []}',
  "many digits": f'{{"iteration": {10**400}, "score/mean": {10**400}, "num_iterations": {10**400},'
  f' "score_before": -{10**400}, "score_after": 1e400, "kl_ref": [{10**400}], "tokens": [1]}}',
  "too many digits": f'{{"score/mean": {"9" * 5000}}}',
}
FILES = ("config.json", "summary.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl")
FILES += ("inputs.json", "flags.txt")


@pytest.mark.parametrize("kind", [*KINDS, "a directory", "a loop"])
def test_whatever_a_file_holds_the_report_is_written(tmp_path, kind):
  write_run(tmp_path)
  for name in FILES:
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "a directory":
      path.mkdir()
    elif kind == "a loop":
      path.symlink_to(name)
    else:
      path.write_text(KINDS[kind])
    shown = Page(write_report(tmp_path))
    if kind != "other types" and name not in ("flags.txt", "inputs.json"):
      assert ("Not complete" in shown.text and name in shown.text) or "digits" in kind


def test_inputs_that_were_changed_during_a_run_are_warned_of(tmp_path):
  write_run(tmp_path)
  accepted = {"files": {}, "accepted": ["r.py was changed after the run had begun"]}
  (tmp_path / "inputs.json").write_text(json.dumps(accepted))
  assert "r.py was changed after the run had begun." in Page(write_report(tmp_path)).text


def test_an_interrupted_run_is_judged_by_its_iterations(tmp_path):
  shown = Page(write_report(write_run(tmp_path, summary__json=None)))
  verdict = "In training, the score went from 0 to 0.4, at 4.4 nats per sequence of KL"
  assert verdict in shown.text


def test_supervised_run_with_only_a_loss(tmp_path):
  records = [{"iteration": i, "loss/cross_entropy": 3.0 - i} for i in range(3)]
  text = "\n".join(map(json.dumps, records))
  nothing = dict.fromkeys(("summary__json", "samples__jsonl", "timing__jsonl"))
  shown = Page(write_report(write_run(tmp_path, metrics__jsonl=text, **nothing)))
  assert "In training, the cross-entropy went from 3 to 1." in shown.text
  assert shown.count("svg") == 1


@pytest.mark.parametrize("num_iterations", [0, 1])
def test_runs_too_short_for_a_line(tmp_path, num_iterations):
  shown = Page(write_report(write_run(tmp_path, num_iterations=num_iterations)))
  assert shown.count("svg") == 4 * num_iterations
  # A single value is a dot.
  assert shown.count("circle") >= 4 * num_iterations
  assert ("metrics.jsonl is empty." in shown.text) == (num_iterations == 0)


def test_null_and_not_finite_are_told_apart(tmp_path):
  values = [1.0, None, math.nan, 2.0, math.inf, 3.0, -1e308, 1e308]
  records = [
    {"iteration": i, "policy/entropy": x, "policy/entropy_stderr": x} for i, x in enumerate(values)
  ]
  records += [{"iteration": 8, "value/loss": math.nan, "gold/mean": None}]
  text = "\n".join(map(json.dumps, records))
  summary = json.dumps({"score_before": math.nan, "score_after": 1.0, "gold_after": None})
  shown = Page(write_report(write_run(tmp_path, metrics__jsonl=text, summary__json=summary)))
  assert "policy/entropy is not finite in 2 iterations, first in 2." in shown.text
  assert "value/loss is not finite in 1 iterations, first in 8." in shown.text
  assert "Value loss squared reward not finite" in shown.text
  assert "Score per completion not finite 1" in shown.text
  assert "Gold" not in shown.text


def test_unknown_metrics_are_drawn_under_a_fold(tmp_path):
  record = {"iteration": 0, "mine/own": 1.0, "mine/own_stderr": 0.5, "mine/word": "text"}
  record |= {"mine/flag": True, "loss/accuracy": 0.5}
  shown = Page(write_report(write_run(tmp_path, metrics__jsonl=json.dumps(record))))
  assert "All metrics that are not above mine/own 1" in shown.text
  assert "mine/own_stderr" not in shown.text
  assert "mine/word" not in shown.text
  assert "mine/flag" not in shown.text
  # Accuracy, speed and the unknown one.
  assert shown.count("svg") == 3
  assert "50.0%" in shown.text


def test_what_stays_the_same_is_said_and_not_drawn(tmp_path):
  lines = [{"iteration": i, "controller/beta": 0.5, "score/mean": 1.0 * i} for i in range(3)]
  text = "\n".join(map(json.dumps, lines))
  shown = Page(write_report(write_run(tmp_path, metrics__jsonl=text)))
  assert "The same in every iteration, and not drawn: Beta 0.5." in shown.text
  assert shown.count("svg") == 2  # score and speed


HEADLINES = {
  "noise": (
    {"score_before": -1.89, "score_before_stderr": 0.09, "score_after": -1.8}
    | {"score_after_stderr": 0.08, "gold_before": 0.5, "gold_before_stderr": 0.02}
    | {"gold_after": 0.75, "gold_after_stderr": 0.02},
    "On held-out prompts, the score did not change beyond its error, from \u22121.890 ± 0.090 to "
    "\u22121.800 ± 0.080; the gold accuracy rose from 50.0 ± 2.0% to 75.0 ± 2.0%.",
  ),
  "pairs": (
    {"held_out_examples": 300, "held_out_accuracy": 2 / 3, "held_out_accuracy_stderr": 0.03}
    | {"kl_ref_exact": 0.25},
    "the policy agrees with the labels of 66.7 ± 3.0% of 300 pairs, at 0.25 nats",
  ),
  "chance": (
    {"held_out_examples": 40, "held_out_accuracy": 0.6, "held_out_accuracy_stderr": 0.08},
    "the policy agrees with the labels of 60.0 ± 8.0% of 40 pairs, no more than chance.",
  ),
  "the same examples": (
    {"held_out_examples": 40, "held_out_cross_entropy": 1.0, "held_out_cross_entropy_stderr": 0.2}
    | {"held_out_cross_entropy_before": 1.1, "held_out_cross_entropy_before_stderr": 0.2}
    | {"held_out_cross_entropy_change_stderr": 0.01},
    "On held-out examples, the cross-entropy fell from 1.10 ± 0.20 to 1.00 ± 0.20.",
  ),
  "the same in three digits": (
    {"score_before": 0.5, "score_before_stderr": 0.1, "score_after": 0.5}
    | {"score_after_stderr": 0.1},
    "the score stayed at 0.50 ± 0.10.",
  ),
  "enumerated": (
    {"objective_gap": 0.1234, "tv_to_optimum": 0.3, "score_before": 0.0, "score_after": 1.0},
    "The policy lacks 12.3% of what the best policy for this beta gains, at a total variation of "
    "0.3 from it; the score went from 0 to 1.",
  ),
}


@pytest.mark.parametrize("case", HEADLINES)
def test_the_headline_weighs_the_error_and_is_there_for_every_experiment(tmp_path, case):
  summary, sentence = HEADLINES[case]
  assert sentence in Page(write_report(write_run(tmp_path, summary__json=json.dumps(summary)))).text


@pytest.mark.parametrize("kl", [[0.0, 0.5, 2.0], [0.0, "x", None], 3])
def test_an_enumerated_run_is_drawn_below_the_best_policies(tmp_path, kl):
  summary = {"exact_kl": 0.5, "exact_score": 0.25, "score_after": 0.25}
  write_run(tmp_path, summary__json=json.dumps(summary))
  without = Page(write_report(tmp_path)).count("svg")
  (tmp_path / "optimum.json").write_text(json.dumps({"kl": kl, "score": [0.0, 0.5, 1.0]}))
  assert Page(write_report(tmp_path)).count("svg") == without + (kl == [0.0, 0.5, 2.0])


def test_unknown_and_nested_summary_figures_are_shown(tmp_path):
  summary = {"kl": {"ref_k3": 2.5}, "style": {"before": 1, "after": 2.0}, "compile_seconds": 38.5}
  shown = Page(write_report(write_run(tmp_path, summary__json=json.dumps(summary))))
  assert "KL(π‖ref), k3 nats per sequence \u2013 2.5" in shown.text
  assert "style 1 2" in shown.text
  assert "compile_seconds 38.5" in shown.text


def test_figures_of_several_completions_stand_beside_the_gold_score(tmp_path):
  figures = {"gold": 0.5, "gold_greedy": 0.75, "pass_at_4": 0.9, "majority_at_4": 0.6}
  figures |= {"score": 1.5, "score_greedy": 1.75, "kl_ref_forward": 0.125, "distinct_3": 0.01}
  summary = {f"{name}_{when}": x for name, x in figures.items() for when in ("before", "after")}
  summary["kl_ref_forward"] = 0.125
  shown = Page(write_report(write_run(tmp_path, summary__json=json.dumps(summary))))
  table = (
    "Gold accuracy of completions 50.0% 50.0% Gold accuracy, greedy of prompts 75.0% 75.0% "
    "pass@4 of prompts 90.0% 90.0% maj@4 of prompts 60.0% 60.0% Score per completion 1.5 1.5 "
    "KL(ref‖π), exact nats per sequence 0.125 0.125 Curves"
  )
  assert table in shown.text
  # What is in no table is among all figures.
  assert "score_greedy_after 1.75" in shown.text and "distinct_3_after 1.0%" in shown.text


def test_odd_samples_are_shown_as_far_as_they_go(tmp_path):
  samples = [
    {"when": "after", "index": 0, "completion": "plain", "tokens": ["a", "b"], "kl_ref": [1.0]},
    {"when": "after", "index": 1, "prompt": "\ud83d", "tokens": ["\ud83d", "\n", ""]}
    | {"kl_ref": [None, math.nan, -1e-7]},
    {},
  ]
  text = "\n".join(map(json.dumps, samples))
  shown = Page(write_report(write_run(tmp_path, samples__jsonl=text)))
  assert "plain" in shown.text
  assert "? ↵ ▯" in shown.text
  assert shown.text.count("No sample.") == 4


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path):
  names = [f"group/{i}" for i in range(20)] + ["score/mean", "kl/ref_k1", "kl/ref_k1_stderr"]
  rng = np.random.default_rng(0)
  records = [
    json.dumps({"iteration": i} | dict(zip(names, rng.normal(size=len(names)), strict=True)))
    for i in range(10_000)
  ]
  many = "\n".join(json.dumps({"when": "after", "index": i}) for i in range(MAX_SAMPLES + 5))
  path = write_report(write_run(tmp_path, metrics__jsonl="\n".join(records), samples__jsonl=many))
  assert path.stat().st_size < 1_000_000
  shown = Page(path)
  assert "more than 300 points" in shown.text
  assert f"{MAX_SAMPLES} of {MAX_SAMPLES + 5} prompts" in shown.text


def test_a_thousand_figures_are_drawn_in_two_seconds(tmp_path):
  names = [f"group/{i}" for i in range(1000)]
  rows = np.random.default_rng(0).normal(size=(60, len(names)))
  records = [
    json.dumps({"iteration": i} | dict(zip(names, row.tolist(), strict=True)))
    for i, row in enumerate(rows)
  ]
  began = time.process_time()
  path = write_report(write_run(tmp_path, metrics__jsonl="\n".join(records)))
  assert time.process_time() - began < 2
  assert Page(path).count("svg") == 1001


def test_a_curve_has_gaps_lone_dots_dashes_and_bars():
  x, y = np.arange(6.0), np.array([0.0, 1.0, np.nan, 5.0, np.nan, -1e300])
  svg = plots.curves(
    [
      plots.Line(x, y, np.array([0.5, np.nan, 1, 1, 1, 1]), plots.SERIES[0], "-"),
      plots.Line(x, y[::-1], None, plots.SERIES[1], "--"),
      plots.Line(x, y, np.full(6, 2.0), plots.INK, "o"),
    ]
  )
  root = ElementTree.fromstring(svg)
  paths = [path for path in root if "var(--first)" in path.get("style")]
  line = next(path for path in paths if "stroke: var" in path.get("style") and path.get("d"))
  assert line.get("d").count("M") == 2 and line.get("d").count("L") == 1
  dots = [mark for mark in root if mark.tag == "circle"]
  assert [mark.get("style").split(": ")[1] for mark in dots].count("currentColor") == 3
  assert any("dasharray" in path.get("style") for path in root)
  bars = next(path for path in root if "V" in path.get("d", ""))
  assert bars.get("d").count("V") == 3


def test_stretches():
  x, y = np.arange(8.0), np.array([1.0, 3.0, 5.0, np.nan, np.nan, np.inf, -7.0, 9.0])
  place, mean, low, high = plots.stretches(x, y, 4)
  np.testing.assert_array_equal(place, [0.5, 2.5, 4.5, 6.5])
  np.testing.assert_array_equal(mean, [2.0, 5.0, np.nan, 1.0])
  np.testing.assert_array_equal(low, [1.0, 5.0, np.nan, -7.0])
  np.testing.assert_array_equal(high, [3.0, 5.0, np.nan, 9.0])


def test_band_is_two_standard_errors_on_either_side():
  x = np.arange(2.0)
  # The axes reach as far as what is drawn.
  wide = plots.curves([plots.Line(x, np.zeros(2), np.full(2, 0.5))])
  line = plots.curves([plots.Line(x, np.array([-1.0, 1.0]))])

  def labels(svg):
    return [part.split(">")[-1] for part in svg.split("</text>")[:-1]]

  assert labels(wide) == labels(line) == ["0", "1", "\u22121", "0", "1", "iteration"]


def test_duration():
  assert [page.duration(s) for s in (5.4, 65, 3725)] == ["5 s", "1 min 5 s", "1 h 2 min"]


def evaluated(n=5, **changes):
  """Returns the lines of the evaluations of a run in which only few figures change."""
  lines = [
    {
      "iteration": 2 * i,
      "score": 1.0 + 0.1 * i, "score_stderr": 0.05,
      "gold": 0.5 + 0.05 * i, "gold_stderr": 0.02,
      "kl_ref_exact": 0.3 * i, "kl_ref_exact_stderr": 0.02,
      "kl_ref_forward": 0.4 * i, "nll": 2.0 - 0.1 * i, "finished_fraction": 1.0,
      **changes,
    }
    for i in range(n)
  ]  # fmt: skip
  return "".join(json.dumps(line) + "\n" for line in lines)


def test_what_was_gained_against_the_kl_on_the_way_comes_first(tmp_path):
  shown = Page(write_report(write_run(tmp_path, evaluations__jsonl=evaluated())))
  places = [
    shown.text.index(part)
    for part in (
      "Gained against KL, on held-out prompts",
      "Gold accuracy % of completions, against KL(π‖ref)",
      "Score per completion, against KL(π‖ref)",
      "Bars are two standard errors",
      "Before and after",
      "Held-out prompts, while it trained",
      "KL(π‖ref) nats per sequence KL(π‖ref) 1.2 KL(ref‖π) 1.6",
      "Curves",
    )
  ]
  assert places == sorted(places)
  assert "model_best" not in shown.text and "Ended by itself 100.0%" in shown.text


def test_the_best_model_is_named_with_its_iteration_and_figure(tmp_path):
  write_run(tmp_path, evaluations__jsonl=evaluated())
  summary = json.loads((tmp_path / "summary.json").read_text())
  summary |= {"best_iteration": 6, "gold_best": 0.65, "gold_best_stderr": 0.02}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  shown = Page(write_report(tmp_path))
  assert "The model after 6 iterations is kept in model_best." in shown.text
  assert "the highest gold accuracy, 65.0 ± 2.0%; the best of many looks better" in shown.text


@pytest.mark.parametrize(
  "lines",
  [
    "",
    "[" * 10**5 + "\n{}\n",
    evaluated(1),
    evaluated(gold=None, score=None),
    evaluated(kl_ref_exact=None),
    evaluated(score=0.0, gold=math.nan),
    evaluated(score=HOSTILE, gold=math.inf, kl_ref_exact="x"),
    '{"iteration": null, "score": 1}\n',
  ],
)
def test_without_figures_on_the_way_there_is_no_picture_of_it(tmp_path, lines):
  shown = Page(write_report(write_run(tmp_path, evaluations__jsonl=lines)))
  assert "Gained against KL" not in shown.text
  assert "Before and after" in shown.text


def test_errors_that_are_not_known_leave_the_points_of_the_way(tmp_path):
  shown = Page(
    write_report(write_run(tmp_path, evaluations__jsonl=evaluated(gold_stderr=None, score=1.0)))
  )
  assert "Gold accuracy % of completions, against" in shown.text
  assert "Score per completion, against" not in shown.text  # It stayed the same.
