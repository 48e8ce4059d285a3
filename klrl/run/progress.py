"""Shows the progress of a run: a bar on a terminal, and a line now and then in a log."""

import contextlib
import functools
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from klrl.figures import shown


class _Console(Console):
  """Shows every string as it is: brackets and colons are no markup, and escapes have no effect."""

  def render_str(self, text, **settings):
    return super().render_str(visible(text), **settings)

  def on_broken_pipe(self):
    """Ends the program; whoever read what it prints, such as `head`, has gone."""
    message = "Nobody reads what is printed any more, so this ends. The same command goes on."
    print(message, file=sys.stderr)
    super().on_broken_pipe()


console = _Console(highlight=False, markup=False, emoji=False)


def visible(text: str) -> str:
  r"""Returns `text` with control characters and halves of characters written out, as in \x1b."""
  control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
  return re.sub(control, lambda found: found[0].encode("unicode_escape").decode(), text)


def warn(message: str) -> None:
  """Says what a person should know of a run that goes on."""
  _say("Warning:", "bold yellow", message)


@functools.cache
def say_once(message: str) -> None:
  """Prints a message, unless the same was printed before."""
  console.print(message, soft_wrap=True)


@functools.cache
def warn_once(message: str) -> None:
  """Warns, unless the same was said before."""
  warn(message)


def fail(message: str) -> None:
  """Says why a run ends."""
  try:
    _say("Error:", "bold red", message)
  except OSError:  # What is printed goes to a full disk.
    print(f"Error: {visible(message)}", file=sys.stderr)


def _say(label: str, style: str, message: str) -> None:
  console.print(Text.assemble((label, style), f" {visible(message)}"), soft_wrap=True)


def watch(
  iterations: Generator,
  state,
  *,
  title: str,
  start: int,
  total: int,
  keys: Sequence[tuple[str, str]],
):
  """Runs `iterations` to their end, shows the figures named in `keys`, returns the last state.

  The iterations are closed, and so what they write is whole, where nothing can be shown any more.

  Args:
    iterations: what `loop.iterate` returns.
    state: what to return where nothing is left to do.
    title: what is running.
    start: iterations done before.
    total: iterations in all.
    keys: (metric key, label) of the figures that matter.
  """
  show = _bar if console.is_terminal else _lines
  with contextlib.closing(iterations), show(title, start, total) as update:
    before = None  # The first iteration compiles, and says nothing of the speed.
    for done, state, figures in iterations:  # noqa: B007
      now = time.monotonic()
      update(done, _figures_line(figures, keys, before and now - before))
      before = now
  return state


def warned(iterations: Generator, key: str, largest: float, message: Callable) -> Generator:
  """Yields what `iterations` yield; warns once where the figure `key` is larger than `largest`.

  `message(iterations done, figure)` is what is said.
  """
  said = False
  with contextlib.closing(iterations):
    for done, state, figures in iterations:
      value = figures.get(key)
      if not said and value is not None and value > largest:
        said = True
        warn(message(done, value))
      yield done, state, figures


def _figures_line(figures: Mapping, keys: Sequence[tuple[str, str]], seconds: float | None) -> str:
  parts = [
    f"{label} {shown(key, figures[key])}" for key, label in keys if figures.get(key) is not None
  ]
  if seconds and figures.get("rollout/tokens"):
    parts.append(f"{figures['rollout/tokens'] / seconds:,.0f} tokens/s")
  return "  ".join(parts)


@contextlib.contextmanager
def _lines(title: str, start: int, total: int):
  """Yields update(done, text), which prints a line for about every tenth of the iterations."""
  every = max(1, total // 10)
  began = time.monotonic()
  compiled = None

  def update(done, text):
    nonlocal compiled
    now = time.monotonic()
    if compiled is None:  # The first iteration compiles, and says nothing of the time of others.
      compiled = now
      clock = f"first iteration {now - began:.0f} s, most of it compilation"
    elif done % every and done != total:
      return
    else:
      seconds = (now - compiled) / (done - start - 1)
      clock = f"{(total - done) * seconds:.0f} s left"
    console.print(f"{title} {done}/{total}  {text}  {clock}", soft_wrap=True)

  if start < total:
    console.print(f"{title}: compiling ...", soft_wrap=True)
  yield update


class _Progress(Progress):
  """A bar, and the figures on a line below it, so that neither takes the other's place."""

  def get_renderables(self):
    yield self.make_tasks_table(self.tasks)
    yield from (Text(f"  {visible(task.fields['figures'])}") for task in self.tasks)


@contextlib.contextmanager
def _bar(title: str, start: int, total: int):
  """Yields update(done, text), which moves a bar on the terminal."""
  with _Progress(
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeRemainingColumn(compact=True),
    console=console,
    speed_estimate_period=600,
  ) as bar:
    task = bar.add_task(title, total=total, completed=start, figures="compiling ...")
    yield lambda done, text: bar.update(task, completed=done, figures=text)
