"""The registry of figures: one name, one label and one way to write each."""

import math
import pathlib

import pytest

from klrl import figures

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "figures.md"


@pytest.mark.parametrize(
  ("name", "value", "stderr", "text"),
  [
    ("gold", 0.4977, None, "49.8%"),
    ("gold/mean", 0.4977, 0.021, "49.8 ± 2.1%"),
    ("gold/mean_median", 0.5, None, "50.0%"),
    ("objective_gap", -1e-9, None, "0.0%"),
    ("kl/ref_k1", -6.985e-09, None, "0.000"),
    ("kl_ref_exact_before", 1.2e-9, 3e-9, "0.000 ± 0.000"),
    ("held_out_margin_before", -7.9e-8, 7.1e-8, "0.000 ± 0.000"),
    ("kl_ref_k1_per_token", 0.16853, None, "0.169"),
    ("kl_ref_k1", -0.0002, 0.012, "0.000 ± 0.012"),
    ("score", 0.20912, 0.0703, "0.209 ± 0.070"),
    ("policy/entropy", 0.615475614865621, None, "0.615"),
    ("held_out_loss", 0.6931477, 4.5e-6, "0.693 ± 0.000"),
    ("score", 0.00012, 0.00003, "0.000120 ± 0.000030"),
    ("gradient/norm", 1.5e-05, None, "1.5e\N{MINUS SIGN}05"),
    ("score", None, None, figures.ABSENT),
    ("gold", math.nan, None, "not finite"),
    ("mine/own", 0.5, None, "0.5"),
  ],
)
def test_a_figure_is_written_in_one_way(name, value, stderr, text):
  assert figures.shown(name, value, stderr) == text


def test_parts_of_a_name_that_a_run_chooses_are_found():
  assert figures.find("pass_at_8_after").label == "pass@8"
  assert figures.find("majority_at_4").scale == 100
  assert figures.find("score/length").key == "score/length"
  assert figures.find("score/most_after_noon").key == "score/most_after_noon"
  assert figures.find("kl/ref_exact_per_token").unit == figures.PER_TOKEN
  assert figures.find("mine/own_figure").label == "mine/own figure"


def test_the_table_has_what_was_judged_at_the_end_alone_and_what_nobody_registered():
  summary = {
    "gold_before": 0.5, "gold_after": 0.75, "gold_after_stderr": 0.01,
    "pass_at_4_before": 0.5, "pass_at_4_after": 1.0,
    "held_out_accuracy": 0.9, "score_greedy_after": 1.0, "mine_before": None, "mine_after": 2.0,
  }  # fmt: skip
  rows = [(figure.label, *texts) for figure, *texts in figures.before_and_after(summary)]
  assert rows == [
    ("Gold accuracy", "50.0%", "75.0 ± 1.0%"),
    ("pass@4", "50.0%", "100.0%"),
    ("Agreement with labels", figures.ABSENT, "90.0%"),
    ("mine", figures.ABSENT, "2"),
  ]


def test_every_figure_has_a_key_of_its_own_and_a_meaning_in_one_sentence():
  listed = (*figures.JUDGED, *figures.MORE, *figures.TRAINING)
  assert len(figures.FIGURES) == len(listed)
  assert all(figure.meaning.endswith(".") and "|" not in figure.meaning for figure in listed)


def test_the_list_in_the_docs_is_the_registry():
  head, _, rest = DOCS.read_text().partition("<!-- figures -->\n")
  written, _, _ = rest.partition("<!-- end -->")
  assert head and written == figures.markdown(), "write klrl.figures.markdown() between the marks"


@pytest.mark.parametrize(
  ("value", "stderr", "text"),
  [
    (None, None, "\u2013"),
    ("word", None, "\u2013"),
    (True, None, "\u2013"),
    (math.nan, 0.1, "not finite"),
    (0.1, None, "0.1"),
    (15.98, None, "16.0"),
    (-123.4, None, "\u2212123"),
    (12345.6, None, "12,346"),
    (1e300, None, "1e+300"),
    (4.0213, 0.0312, "4.021 ± 0.031"),
    (4.0213, 12.3, "4 ± 12"),
    (4.0213, math.nan, "4.02"),
    (0.0, 0.0, "0"),
  ],
)
def test_digits(value, stderr, text):
  assert figures.digits(value, stderr) == text
