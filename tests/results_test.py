"""The measurements on record are complete, and their table is made from them."""

import datetime
import json
import shutil

import pytest

from benchmarks import results

RESULTS = results.load()


def test_the_table_is_made_from_the_files():
  assert results.TABLE.read_text() == results.table(), "run `python -m benchmarks.results`"


def test_a_benchmark_records_its_figures_and_the_table(tmp_path, monkeypatch):
  shutil.copy(results.FOLDER / "oracle_bench.json", tmp_path)
  monkeypatch.setattr(results, "FOLDER", tmp_path)
  monkeypatch.setattr(results, "TABLE", tmp_path / "README.md")
  figures = {"10 tokens x 6": {"seconds": 1.25, "range": [1.0, 0.5, 2.0]}}
  results.record("oracle_bench", figures)
  written = json.loads((tmp_path / "oracle_bench.json").read_text())
  before = RESULTS["oracle_bench"]
  assert written["figures"] == figures
  assert written["date"] == datetime.date.today().isoformat()
  assert [written[key] for key in ("title", "finding")] == [before["title"], before["finding"]]
  assert "are enumerated in 1.25 s" in results.TABLE.read_text()


@pytest.mark.parametrize("name", RESULTS)
def test_a_measurement_says_when_where_and_how_it_was_made(name):
  result = RESULTS[name]
  fields = {"title", "date", "command", "machine", "finding", "figures"}
  assert fields <= set(result) <= fields | {"note"}
  datetime.date.fromisoformat(result["date"])
  assert all(result.values())
  for row in result["figures"].values():
    assert row
    for figure in row.values():
      assert isinstance(figure, (int, float)) or (len(figure) == 3 and figure[1] <= figure[2])
