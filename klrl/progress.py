"""What a person sees while a run works: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False)


def watch(
  iterations: Iterable,
  state,
  *,
  title: str,
  start: int,
  total: int,
  keys: Sequence[tuple[str, str]],
):
  """Runs `iterations` to their end, shows the figures named in `keys`, returns the last state.

  Args:
    iterations: what `loop.run` yields.
    state: what to return where nothing is left to do.
    title: what is running.
    start: iterations done before.
    total: iterations in all.
    keys: (metric key, label) of the figures that matter.
  """

  began = before = time.monotonic()

  def line(figures) -> str:
    nonlocal before
    now = time.monotonic()
    seconds, before = now - before, now
    parts = [f"{label} {figures[key]:.4g}" for key, label in keys if figures.get(key) is not None]
    if figures.get("rollout/tokens"):
      parts.append(f"{figures['rollout/tokens'] / seconds:,.0f} tokens/s")
    return "  ".join(parts)

  if not console.is_terminal:
    every = max(1, total // 10)
    for done, state, figures in iterations:  # noqa: B007
      text = line(figures)
      if done == start + 1 or done % every == 0 or done == total:
        left = (total - done) * (time.monotonic() - began) / (done - start)
        console.print(
          f"{title} {done}/{total}  {text}  {left:.0f} s left", markup=False, soft_wrap=True
        )
    return state
  with Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeRemainingColumn(compact=True),
    TextColumn("{task.fields[figures]}", markup=False),
    console=console,
  ) as bar:
    task = bar.add_task(title, total=total, completed=start, figures="compiling ...")
    for done, state, figures in iterations:  # noqa: B007
      bar.update(task, completed=done, figures=line(figures))
  return state
