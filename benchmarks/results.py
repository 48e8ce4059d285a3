"""The measurements on record, one JSON file each, and the table of what they found.

    python -m benchmarks.results

A file `benchmarks/results/NAME.json` has

* `title`: what was measured, and on what;
* `date`, `command`, `machine`: when, how and where;
* `figures`: {row: {column: figure}}, where a figure is a number or [middle, least, most];
* `finding`: what the figures say, in one line that refers to them: "{figures[ROW][COLUMN]} s";
* `note`, in some files: what a reader must know of the figures.

The command writes the table, `benchmarks/results/README.md`, from these files.
"""

import json
import pathlib

FOLDER = pathlib.Path(__file__).parent / "results"
TABLE = FOLDER / "README.md"


def load() -> dict[str, dict]:
  """Returns {name: what its file holds}, newest first."""
  results = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
  return dict(sorted(results.items(), key=lambda item: item[1]["date"], reverse=True))


def table() -> str:
  """Returns the table of all findings, in Markdown."""
  rows = [
    f"| {result['date']} | [{name}]({name}.json) | {result['title']} "
    f"| {result['finding'].format(figures=result['figures'])} |"
    for name, result in load().items()
  ]
  head = "# Measurements\n\nMade by `python -m benchmarks.results` from the files beside it.\n"
  return "\n".join([head, "| date | file | what | finding |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
  TABLE.write_text(table())
