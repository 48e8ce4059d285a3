"""Lists the experiments of a checkout and their presets, from the first lines of their files.

    python -m klrl

Nothing is imported of them, so that the list is there at once.
"""

import ast
import pathlib
import sys

from klrl import __version__

_FOLDER = pathlib.Path("experiments")


def listing(folder: pathlib.Path) -> str:
  """Returns the programs in `folder` with a line each, and the presets in `folder`/presets."""
  programs = {}
  for path in sorted(folder.glob("*.py")):
    source = path.read_text(encoding="utf-8")
    if 'if __name__ == "__main__":' in source:
      programs[path.stem] = ast.get_docstring(ast.parse(source)).splitlines()[0]
  presets = {
    str(path): path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    for path in sorted((folder / "presets").glob("*.flags"))
  }
  return "\n".join(
    (
      f"klrl {__version__}. To run one of these: python -m experiments.NAME [--flag=value ...]",
      "Without flags it needs no data. Its --help lists the flags, the important ones first.",
      "",
      *_columns(programs),
      "",
      "A preset is a file of flags of one of them: python -m experiments.NAME --flagfile=FILE",
      "",
      *_columns(presets),
    )
  )


def _columns(rows: dict[str, str]) -> list[str]:
  width = max(map(len, rows), default=0)
  return [f"  {name:{width}}  {about}" for name, about in rows.items()]


def main() -> int:
  """Prints the list; returns the exit status, 1 outside of a checkout."""
  if not _FOLDER.is_dir():
    print(
      f"klrl {__version__}: the experiments are in a checkout of the project and not in the "
      "installed package. Run this command in the checkout's folder."
    )
    return 1
  print(listing(_FOLDER))
  return 0


if __name__ == "__main__":
  sys.exit(main())
