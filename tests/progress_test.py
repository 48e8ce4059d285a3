"""What is printed is shown as it is, whoever wrote it."""

import io

import pytest
from rich.table import Table

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


def test_a_running_bar_shows_its_title_as_it_is(printed, monkeypatch):
  monkeypatch.setattr(progress.console, "_force_terminal", True)
  title = "PPO [/b]"
  state = progress.watch(
    (step for step in [(1, "state", {"score/mean": 1.0})]),
    None,
    title=title,
    start=0,
    total=1,
    keys=(("score/mean", "score [x]"),),
  )
  assert state == "state"
  assert title in printed()
  assert "score [x]" in printed()
