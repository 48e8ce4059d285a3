"""The measurements on record are complete, and their table is made from them."""

import datetime

import pytest

from benchmarks import results

RESULTS = results.load()


def test_the_table_is_made_from_the_files():
  assert results.TABLE.read_text() == results.table(), "run `python -m benchmarks.results`"


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
