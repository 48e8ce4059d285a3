"""What is printed is shown as it is, whoever wrote it."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from klrl.run import progress

NASTY = [
  r"ValueError: cannot parse \[x+1\] (reward.py line 3)",
  r"cannot parse \[/x] and [/b], [bold]bold[/bold], [link=x]",
  "results go to runs/a[/b]/[red]",
  "100% of {braces} :smile:",
]


@pytest.fixture
def printed(monkeypatch):
  monkeypatch.setattr(progress.console, "_file", io.StringIO())
  return progress.console.file.getvalue


@pytest.mark.parametrize("text", NASTY)
def test_brackets_of_messages_and_folders_are_no_markup(text, printed):
  progress.console.print(text, soft_wrap=True)
  progress.fail(text)
  progress.warn(text)
  assert printed() == f"{text}\nError: {text}\nWarning: {text}\n"


@pytest.mark.parametrize("text", NASTY)
def test_brackets_in_a_table_are_no_markup(text, printed):
  table = Table(text, title=text)
  table.add_row(text)
  progress.console.print(table, width=200)
  assert printed().count(text) == 3


def test_a_terminal_obeys_no_text_and_half_a_character_can_be_printed(printed):
  text = "bad \x1b[2J\x1b]0;gone\x07 \x9b1m \ud800 \r over\ttab \N{GRINNING FACE} é\nline"
  shown = r"bad \x1b[2J\x1b]0;gone\x07 \x9b1m \ud800 \r over"
  assert progress.visible(text) == shown + "\ttab \N{GRINNING FACE} é\nline"
  progress.console.print(text, soft_wrap=True)
  progress.fail(text)
  assert printed().count(shown) == 2
  assert "\x1b" not in printed()


KEYS = (("score/mean", "score [x]"), ("kl/ref_k1", "KL to reference, nats/sequence"))
FIGURES = {"score/mean": 1.0, "kl/ref_k1": -6.985e-09, "rollout/tokens": 1000.0}


def watched(clock, monkeypatch, *, title="PPO [/b]", total=5):
  """Watches `total` iterations, each at its second of `clock`."""
  now = iter([0.0, *(x for second in clock for x in (second, second))])
  monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
  steps = ((done, f"state {done}", FIGURES) for done in range(1, total + 1))
  return progress.watch(steps, None, title=title, start=0, total=total, keys=KEYS)


def test_in_a_log_the_time_left_leaves_out_the_first_iteration_which_compiles(printed, monkeypatch):
  assert watched((60, 62, 64, 66, 68), monkeypatch) == "state 5"
  lines = printed().splitlines()
  assert lines[0] == "PPO [/b]: compiling ..."
  assert lines[1].endswith("sequence 0.000  first iteration 60 s, most of it compilation")
  assert [line.split("  ")[-1] for line in lines[2:]] == [
    *("6 s left", "4 s left", "2 s left", "0 s left")
  ]
  assert "PPO [/b] 2/5  score [x] 1  KL to reference, nats/sequence 0.000  500 tokens/s" in lines[2]


def test_nothing_is_said_of_a_run_without_anything_left_to_do(printed):
  steps = (step for step in ())
  done = progress.watch(steps, "state", title="PPO", start=5, total=5, keys=KEYS)
  assert (done, printed()) == ("state", "")


def test_in_eighty_columns_bar_count_and_time_stay_and_figures_have_a_line_below(
  printed, monkeypatch
):
  monkeypatch.setattr(progress.console, "_force_terminal", True)
  monkeypatch.setattr(progress.console, "_width", 80)
  many = tuple((f"score/{i}", f"a figure with a name of some length [{i}]") for i in range(4))
  steps = ((i, i, {key: i / 7 for key, _ in many}) for i in (1, 2, 3))
  progress.watch(steps, None, title="PPO [/b]", start=0, total=3, keys=many)
  text = Text.from_ansi(printed()).plain
  assert "PPO [/b] " in text and "3/3" in text and "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 20 in text
  assert "0:00" in text or "00:00" in text
  for _, label in many:
    assert label.split()[-1] in text


def test_a_figure_that_is_too_large_is_told_once(printed):
  closed = []

  def iterations():
    try:
      for done, value in enumerate((None, 5.0, 18.7, 30.0), start=1):
        yield done, "state", {"kl/old_k1": value}
    finally:
      closed.append(True)

  warned = progress.warned(iterations(), "kl/old_k1", 5.0, "After {} it is {}.".format)
  assert [done for done, _, _ in warned] == [1, 2, 3, 4]
  assert printed() == "Warning: After 3 it is 18.7.\n"
  left = progress.warned(iterations(), "kl/old_k1", 5.0, "{}{}".format)
  next(left)
  left.close()
  assert closed == [True, True]
