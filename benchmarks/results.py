"""The measurements on record, one JSON file each, and the table of what they found.

    python -m benchmarks.results

A file `benchmarks/results/NAME.json` has

* `title`: what was measured, and on what;
* `date`, `command`, `machine`: when, how and where;
* `figures`: {row: {column: figure}}, where a figure is a number or [middle, least, most];
* `finding`: what the figures say, in one line that refers to them: "{figures[ROW][COLUMN]} s";
* `note`, in some files: what a reader must know of the figures.

The command writes the table, `benchmarks/results/README.md`, from these files. A benchmark that is
run with `--record` writes its figures into its file, and then the table.
"""

import datetime
import json
import os
import pathlib
import sys

import jax

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


def record(name: str, figures: dict[str, dict]) -> None:
  """Writes the figures of a benchmark that has just run into its file, and the table anew."""
  path, device = FOLDER / f"{name}.json", jax.devices()[0]
  is_cpu = device.platform == "cpu"
  result = json.loads(path.read_text()) | {
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python -m benchmarks." + name, *sys.argv[1:]]),
    "machine": f"{os.cpu_count()} CPU cores" if is_cpu else device.device_kind,
  }
  texts = {key: json.dumps(value, ensure_ascii=False) for key, value in result.items()}
  rows = [
    f"    {json.dumps(row, ensure_ascii=False)}: {json.dumps(columns, ensure_ascii=False)}"
    for row, columns in figures.items()
  ]
  texts["figures"] = "{\n" + ",\n".join(rows) + "\n  }"
  lines = [f'  "{key}": {text}' for key, text in texts.items()]
  path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
  TABLE.write_text(table())


if __name__ == "__main__":
  TABLE.write_text(table())
