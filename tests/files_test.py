"""Tests of Parquet files, Arrow folders and data sets of the hub; data_test.py has JSON lines."""

import datetime
import decimal
import json
import sys
import types

import pytest

from klrl.errors import UserError
from klrl.tasks import files

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
  "prompt": ["a", "b", "c"],
  "messages": [[{"role": "user", "content": "q"}]] * 3,
  "day": [datetime.date(2024, 1, 2)] * 3,
  "price": [decimal.Decimal("1.50")] * 3,
  "scores": [[1.5, 2.0], [], None],
  "n": [1, None, 3],
}
TIMES = pyarrow.array([0, 10**9, 2 * 10**9], pyarrow.timestamp("ns"))
TABLE = pyarrow.table({**COLUMNS, "at": TIMES, "lasts": TIMES.cast("int64").cast("duration[ns]")})


def write_arrow(folder, table):
  """Writes a folder as `datasets.Dataset.save_to_disk` does."""
  folder.mkdir(parents=True)
  name = "data-00000-of-00001.arrow"
  with (folder / name).open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
    stream.write_table(table)
  (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
  return folder


def listing(folder):
  return sorted((x, x.stat().st_mtime_ns) for x in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["file", "folder", "arrow", "splits"])
def test_every_column_arrives_as_values_of_python(tmp_path, kind):
  source = tmp_path / "data"
  if kind == "file":
    source = tmp_path / "data.parquet"
    parquet.write_table(TABLE, source)
  elif kind == "folder":
    (source / "data").mkdir(parents=True)
    parquet.write_table(TABLE, source / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(TABLE.slice(1), source / "data" / "test-00000-of-00001.parquet")
  elif kind == "arrow":
    write_arrow(source, TABLE)
  else:
    for split, table in (("test", TABLE.slice(1)), ("train", TABLE)):
      write_arrow(source / split, table)
    (source / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
  before = listing(tmp_path)
  rows = files.read_rows(source, "rows")
  assert [row.where for row in rows] == [f"{source} row {i}" for i in (1, 2, 3)]
  first, second = rows[0].record, rows[1].record
  assert first == {name: column[0] for name, column in COLUMNS.items()} | {
    "at": datetime.datetime(1970, 1, 1),
    "lasts": datetime.timedelta(0),
  }
  assert {type(value) for value in first.values()} == {
    *(str, list, datetime.date, decimal.Decimal, int, datetime.datetime, datetime.timedelta)
  }
  assert second["n"] is None and second["scores"] == []
  assert files.first_row(source, "rows") == rows[0]
  if kind in ("folder", "splits"):
    found = files.read_rows(f"{source}:test", "rows")
    assert [row.record["prompt"] for row in found] == ["b", "c"]
    with pytest.raises(UserError, match="split"):
      files.read_rows(f"{source}:validation", "rows")
  assert listing(tmp_path) == before  # Nothing is written beside the data.


def test_folders_and_files_that_cannot_be_read_are_one_clear_error(tmp_path):
  def message(source):
    with pytest.raises(UserError) as error:
      files.read_rows(source, "rows")
    return str(error.value)

  (tmp_path / "empty").mkdir()
  assert "holds no Parquet file, and is no folder that save_to_disk" in message(tmp_path / "empty")
  (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
  assert "broken.parquet cannot be read: " in message(tmp_path / "broken.parquet")
  folder = write_arrow(tmp_path / "arrow", TABLE)
  assert "is one data set without splits; leave :train out" in message(f"{folder}:train")
  (folder / "data-00000-of-00001.arrow").write_bytes(b"broken")
  assert "arrow cannot be read: " in message(folder)
  # A folder names only files in it.
  write_arrow(tmp_path / "other", TABLE)
  state = {"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}
  (folder / "state.json").write_text(json.dumps(state))
  assert "arrow cannot be read: " in message(folder)
  (folder / "state.json").write_text('{"_data_files": [3]}')
  assert "_data_files is [3], but must be" in message(folder)
  (tmp_path / "other" / "state.json").unlink()
  (tmp_path / "other" / "dataset_dict.json").write_text('{"splits": ["../arrow"]}')
  assert "arrow/state.json' does not exist" in message(tmp_path / "other")
  parquet.write_table(pyarrow.table({"prompt": ["a" * (2**20 + 1)]}), tmp_path / "long.parquet")
  assert "long.parquet row 1 has more than 1048576 bytes" in message(tmp_path / "long.parquet")
  parquet.write_table(TABLE.slice(3), tmp_path / "none.parquet")
  assert "none.parquet is empty; expected rows" in message(tmp_path / "none.parquet")


def test_a_program_in_a_folder_is_not_run(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  (folder / "data.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
  with pytest.raises(UserError, match="holds no Parquet file"):
    files.read_rows(folder, "rows")
  parquet.write_table(TABLE, folder / "train.parquet")
  assert len(files.read_rows(folder, "rows")) == 3
  assert not (tmp_path / "was_run").exists()


@pytest.fixture
def hub(monkeypatch):
  """A hub of one data set; returns what it was asked."""
  asked = []

  class Loaded:
    def with_format(self, name):
      assert name == "arrow"
      return self

    def iter(self, batch_size):
      return iter(TABLE.slice(i, batch_size) for i in range(0, len(TABLE), batch_size))

  def load_dataset(name, config, *, split):
    asked.append((name, config, split))
    if name != "owner/some-data":
      raise ValueError("No such data set.\nReally.")
    return Loaded()

  module = types.ModuleType("datasets")
  module.__version__, module.load_dataset = "5.2.0", load_dataset
  monkeypatch.setitem(sys.modules, "datasets", module)
  files._from_hub.cache_clear()
  yield asked
  files._from_hub.cache_clear()


@pytest.mark.parametrize(
  ("source", "asked"),
  [
    ("owner/some-data", ("owner/some-data", None, "train")),
    ("owner/some-data:test", ("owner/some-data", None, "test")),
    ("owner/some-data:main:test", ("owner/some-data", "main", "test")),
  ],
)
def test_data_sets_of_the_hub_are_asked_for_once(tmp_path, monkeypatch, hub, source, asked):
  monkeypatch.chdir(tmp_path)
  assert [row.record["prompt"] for row in files.read_rows(source, "rows")] == ["a", "b", "c"]
  assert files.first_row(source, "rows").where == f"{source} row 1"
  assert hub == [asked]


def test_what_the_hub_does_not_have_is_one_clear_error(tmp_path, monkeypatch, hub):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r"no file or folder a/b, .*: No such data set\. Really\."):
    files.read_rows("a/b", "rows")
  for name in ("a/b.jsonl", "a/b/c", "/a/b", "name", "a/b:c:d:e"):
    with pytest.raises(UserError, match="There is no file"):
      files.read_rows(name, "rows")
  assert len(hub) == 1
  sys.modules["datasets"].__version__ = "3.6.0"
  with pytest.raises(UserError, match=r"datasets 3\.6\.0 is too old.*pip install 'klrl\[data\]'"):
    files.read_rows("owner/some-data", "rows")


def test_a_package_that_is_missing_is_named_by_its_extra(tmp_path, monkeypatch):
  parquet.write_table(TABLE, tmp_path / "data.parquet")
  monkeypatch.chdir(tmp_path)
  files._from_hub.cache_clear()
  for name, source in (("pyarrow.parquet", "data.parquet"), ("datasets", "owner/name")):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{source} needs a package.*pip install 'klrl\[data\]'"):
      files.read_rows(source, "rows")
