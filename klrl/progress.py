"""What a person sees while a run works: a bar on a terminal, a line now and then in a log."""

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

  def line(figures) -> str:
    return "  ".join(
      f"{label} {figures[key]:.4g}" for key, label in keys if figures.get(key) is not None
    )

  if not console.is_terminal:
    every = max(1, total // 10)
    for done, state, figures in iterations:  # noqa: B007
      if done == start + 1 or done % every == 0 or done == total:
        console.print(f"{title} {done}/{total}  {line(figures)}", markup=False, soft_wrap=True)
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
