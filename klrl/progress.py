"""What a person sees while a run works: a bar on a terminal, a line now and then in a log."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False)


def show(
  iterations: Iterable, *, title: str, start: int, total: int, keys: Sequence[tuple[str, str]]
) -> Iterator:
  """Yields the (done, state, figures) of `iterations` and shows the figures named in `keys`.

  Args:
    iterations: what `loop.run` yields.
    title: what is running.
    start: iterations done before.
    total: iterations in all.
    keys: (metric key, label) of the figures that matter.
  """

  def line(figures) -> str:
    parts = [f"{label} {figures[key]:.4g}" for key, label in keys if figures.get(key) is not None]
    return "  ".join(parts)

  if not console.is_terminal:
    every = max(1, total // 10)
    for done, state, figures in iterations:
      if done == start + 1 or done % every == 0 or done == total:
        console.print(f"{title} {done}/{total}  {line(figures)}", markup=False)
      yield done, state, figures
    return
  with Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeRemainingColumn(compact=True),
    TextColumn("{task.fields[figures]}", markup=False),
    console=console,
  ) as bar:
    task = bar.add_task(title, total=total, completed=start, figures="compiling ...")
    for done, state, figures in iterations:
      bar.update(task, completed=done, figures=line(figures))
      yield done, state, figures
