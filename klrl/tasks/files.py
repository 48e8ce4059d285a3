"""Reads the rows of data files: JSON lines, Parquet, Arrow folders and data sets of the hub.

A file whose name ends in .gz is decompressed. Nothing of a data set is run as a program, and files
are read where they are; only what comes from the hub is written, into the cache of `datasets`.
"""

import contextlib
import functools
import gzip
import importlib
import itertools
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from klrl import schema
from klrl.errors import UserError
from klrl.run import progress

MAX_LINE = 2**20  # A line of 10 MB took a tokenizer 1.4 GiB.
MAX_TEXT = 2**28
# How files begin that people take for JSON lines.
_NO_LINES = {
  b"[": "is a JSON array. Write its objects as lines, one on each.",
  b"PAR1": "is a Parquet file; its name has to end in .parquet.",
  b"\xff\xfe": "is UTF-16. Save it as UTF-8.",
  b"\xfe\xff": "is UTF-16. Save it as UTF-8.",
}
_HUB_NAME = r"[\w][\w.-]*/[\w][\w.-]*"
_SUFFIXES = (".jsonl", ".json", ".gz", ".txt", ".parquet", ".csv", ".py")
_INSTALL = "Install what reads it: pip install 'klrl[data]'."
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # of a folder that `save_to_disk` has written
_TEXT_OR_NUMBER = (str, int, float)


class Row(NamedTuple):
  """One object of a file, and its place for messages."""

  where: str
  record: dict[str, Any]


def read_rows(source: str | pathlib.Path, what: str) -> list[Row]:
  """Returns the rows of `source`, in which messages expect `what`.

  `source` is a file of JSON lines; a Parquet file or a folder of them; a folder that
  `datasets.Dataset.save_to_disk` wrote; or a data set of the hub, OWNER/NAME. The last three may
  end in :SPLIT, and the last one in :CONFIG:SPLIT. Values are plain Python's.

  Raises:
    UserError: there is no such file or data set, it has no row, cannot be read, or a row has more
      than `MAX_LINE` bytes or is no object. The message names the row.
  """
  rows = list(_rows(str(source), what))
  if not rows:
    raise UserError(f"{source} is empty; expected {what}.")
  return rows


def first_row(source: str | pathlib.Path, what: str) -> Row:
  """Returns the first of `read_rows`."""
  row = next(iter(_rows(str(source), what)), None)
  if row is None:
    raise UserError(f"{source} is empty; expected {what}.")
  return row


def read_records(path: str | pathlib.Path, required: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the objects of `read_rows`, each with the `required` columns as text.

  Raises:
    UserError: as `read_rows`, or a row lacks a column.
  """
  rows = read_rows(path, f"JSON lines with {', '.join(required)}")
  for row in rows:
    check_columns(row, required)
  return [row.record for row in rows]


def check_columns(row: Row, required: Sequence[str], *, numbers: bool = False) -> None:
  """Raises UserError if a column of the row is missing, or no text (or number, if `numbers`)."""
  kinds = _TEXT_OR_NUMBER if numbers else str
  for column in required:
    if not isinstance(row.record.get(column), kinds):
      has = f"; it has {', '.join(map(str, row.record))}" if row.record else ""
      raise UserError(f"{row.where} has no text column {column!r}{has}.")


def _rows(source: str, what: str) -> Iterator[Row]:
  path, split = pathlib.Path(source), ""
  try:
    if not path.exists() and ":" in source:
      path, _, split = source.rpartition(":")
      path = pathlib.Path(path)
    is_folder, is_file = path.is_dir(), path.is_file()
  except (OSError, ValueError) as error:
    raise UserError(f"{source[:300]} cannot be read: {error}"[:400] + ".") from error
  if is_folder:
    return _tables_as_rows(source, _folder_tables(path, split))
  if is_file and path.suffix == ".parquet" and not split:
    return _tables_as_rows(source, _parquet_tables([path]))
  is_name = re.fullmatch(f"{_HUB_NAME}(:[^:/]+){{0,2}}", source)
  if is_name and not is_file and not source.endswith(_SUFFIXES):
    return _tables_as_rows(source, _from_hub(source).with_format("arrow").iter(1000))
  return _json_rows(pathlib.Path(source), what)


def _json_rows(path: pathlib.Path, what: str) -> Iterator[Row]:
  with _opened(path, what) as file:
    for number, line in _lines(file, path):
      where = f"{path} line {number}"
      record = schema.parse(line, where)
      if not isinstance(record, dict):
        raise UserError(f"{where} is {schema.show(record)}, and no object; expected {what}.")
      yield Row(where, record)


def _tables_as_rows(source: str, tables: Iterator) -> Iterator[Row]:
  number = 0
  try:
    for table in tables:
      for record in table.to_pylist():
        number += 1
        yield Row(f"{source} row {number}", _plain(record, f"{source} row {number}"))
  except UserError:
    raise
  except Exception as error:  # pyarrow's errors of broken files have no class of their own
    raise UserError(f"{source} cannot be read: {str(error).splitlines()[0][:300]}") from error


def _plain(value, where: str):
  """Returns a value of Arrow as one of Python's own types."""
  if isinstance(value, dict):
    return {key: _plain(item, where) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item, where) for item in value]
  if isinstance(value, str | bytes) and len(value) > MAX_LINE:
    raise UserError(f"{where} has more than {MAX_LINE} bytes, more than any model reads. Cut it.")
  for name in ("to_pydatetime", "to_pytimedelta"):  # Times in nanoseconds are those of pandas.
    if hasattr(value, name):
      return getattr(value, name)()
  return value


def _imported(name: str, source):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(f"{source} needs a package that is not installed. {_INSTALL}") from error


def _parquet_tables(paths: Sequence[pathlib.Path]) -> Iterator:
  parquet = _imported("pyarrow.parquet", paths[0])
  for path in paths:
    with parquet.ParquetFile(path) as file:
      yield from file.iter_batches(1000)


def _folder_tables(folder: pathlib.Path, split: str) -> Iterator:
  if (folder / _SPLITS).is_file():
    rule = {"splits": schema.list_of(schema.text(200), min_len=1)}
    file = folder / _SPLITS
    splits = schema.check(schema.read(file), rule, file, required=rule)["splits"]
    split = split or ("train" if "train" in splits else splits[0])
    if split not in splits:
      raise UserError(f"{folder} has no split {split}; it has {', '.join(splits)}.")
    progress.console.print(f"{folder}: the split {split} of {', '.join(splits)}", soft_wrap=True)
    return _arrow_tables(folder / pathlib.PurePath(split).name)
  if (folder / _STATE).is_file():
    if split:
      raise UserError(f"{folder} is one data set without splits; leave :{split} out.")
    return _arrow_tables(folder)
  return _parquet_tables(_parquet_files(folder, split))


def _parquet_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  files = sorted(folder.rglob("*.parquet"))
  if not files:
    raise UserError(
      f"{folder} holds no Parquet file, and is no folder that save_to_disk of datasets has written."
    )

  def of(name):
    return [f for f in files if re.split(r"[-.]", f.name)[0] == name or f.parent.name == name]

  if split and not of(split):
    raise UserError(f"{folder} has no Parquet file of a split {split}: {files[0].name}, ...")
  return of(split or "train") or files


def _arrow_tables(folder: pathlib.Path) -> Iterator:
  ipc = _imported("pyarrow.ipc", folder)
  file = folder / _STATE
  rule = {"_data_files": schema.list_of(schema.object_of(schema.text(500)))}
  state = schema.check(schema.read(file), rule, file, required=rule)
  for entry in state["_data_files"]:
    # A name with folders would leave this one.
    with (folder / pathlib.PurePath(entry.get("filename", "")).name).open("rb") as stream:
      yield from ipc.open_stream(stream)


@functools.cache  # The hub is asked once in a run.
def _from_hub(source: str):
  name, *parts = source.split(":")
  datasets = _imported("datasets", source)
  # Before version 4 a data set could bring a program of its own.
  if int(datasets.__version__.split(".")[0]) < 4:
    raise UserError(f"{source}: datasets {datasets.__version__} is too old. {_INSTALL}")
  config, split = (parts[0] if len(parts) == 2 else None), (parts[-1] if parts else "train")
  progress.console.print(f"{source} is no file here; it is looked for on the hub", soft_wrap=True)
  try:
    return datasets.load_dataset(name, config, split=split)
  except Exception as error:  # of the network, of the hub, of the data
    said = " ".join(str(error).split())[:500].rstrip(".")
    raise UserError(
      f"There is no file or folder {source}, and the data set cannot be loaded from the hub: "
      f"{said}. Write OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT."
    ) from error


def is_text(path: str) -> bool:
  """Returns whether a data file is plain text, packed or not, rather than rows."""
  return path.removesuffix(".gz").endswith(".txt")


def read_documents(path: str | pathlib.Path) -> list[str]:
  """Returns the documents of a plain text file, without the blank space around them.

  They are separated by `<|endoftext|>` if the file has it, and by blank lines otherwise.

  Raises:
    UserError: there is no such file, it is empty, has more than `MAX_TEXT` bytes, or is not UTF-8.
  """
  path = pathlib.Path(path)
  with _opened(path, "plain text") as file:
    content = file.read(MAX_TEXT + 1)
  if len(content) > MAX_TEXT:
    raise UserError(f"{path} holds more than {MAX_TEXT} bytes of text; take a part of it.")
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8: {error}.") from error
  separator = re.escape("<|endoftext|>") if "<|endoftext|>" in text else r"\n\s*\n"
  documents = [document.strip() for document in re.split(separator, text)]
  documents = [document for document in documents if document]
  if not documents:
    raise UserError(f"{path} is empty; expected plain text.")
  return documents


@contextlib.contextmanager
def _opened(path: pathlib.Path, what: str) -> Iterator[BinaryIO]:
  """Yields the file, decompressed as it is read, since a small one may hold gigabytes of zeros."""
  try:
    if not path.is_file():
      raise UserError(f"There is no file {path}; expected {what}.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
      yield file
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path} cannot be read: {error}.") from error


def _lines(file: BinaryIO, path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields (number, line) of all lines that are not blank."""
  for number in itertools.count(1):
    line = file.readline(MAX_LINE + 1)
    if not line:
      return
    if number == 1:
      for beginning, advice in _NO_LINES.items():
        if line.lstrip().startswith(beginning):
          raise UserError(f"{path} {advice}")
    if len(line) > MAX_LINE:
      raise UserError(
        f"{path} line {number} has more than {MAX_LINE} bytes, more than any model reads. Cut it."
      )
    if line.strip():
      yield number, line
