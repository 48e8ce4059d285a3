import json
import os

import pytest

from klrl import schema
from klrl.errors import UserError

RULES = {
  "width": schema.integer(1, 10**6),
  "theta": schema.number(0.0),
  "name": schema.text(10),
  "tied": schema.boolean(),
  "ends": schema.either(schema.integer(0), schema.list_of(schema.integer(0), min_len=1)),
  "files": schema.object_of(schema.text()),
  "window": schema.optional(schema.integer(1)),
}


@pytest.mark.parametrize(
  "field",
  [
    {"width": 1},
    {"theta": 3},
    {"theta": 0.5},
    {"name": "ten letter"},
    {"tied": False},
    {"ends": 2},
    {"ends": [2, 0]},
    {"files": {"x": "y"}},
    {"window": None},
    {"window": 4},
    {"unknown": object},
  ],
)
def test_what_a_rule_allows_passes(field):
  assert schema.check(field, RULES, "config.json") is field


@pytest.mark.parametrize(
  "field",
  [
    *({"width": bad} for bad in ("5", 5.0, True, None, [5], {}, 0, -1, 10**19, float("nan"))),
    *({"theta": bad} for bad in ("1", True, float("inf"), float("nan"), -1.0, 10**400)),
    *({"name": bad} for bad in (3, "eleven char", None, ["a"])),
    *({"tied": bad} for bad in ("false", 0, 1, None)),
    *({"ends": bad} for bad in ([], [True], ["2"], -1, "2")),
    *({"files": bad} for bad in (None, [], {"x": 1}, {"x": None})),
    {"window": 0},
  ],
)
def test_what_a_rule_forbids_is_named_with_file_and_field(field):
  (name,) = field
  with pytest.raises(UserError, match=rf"^config\.json: {name} is .*, but must be "):
    schema.check(field, RULES, "config.json")


@pytest.mark.parametrize("value", [[], "x", None, 3])
def test_something_else_than_an_object_is_refused(value):
  with pytest.raises(UserError, match=r"config\.json is .*; it must be an object"):
    schema.check(value, RULES, "config.json")


def test_a_required_name_may_not_be_absent():
  with pytest.raises(UserError, match="has no width; it must be a whole number"):
    schema.check({"theta": 1.0}, RULES, "config.json", required=("width",))


def test_a_long_value_is_shown_in_short():
  with pytest.raises(UserError) as caught:
    schema.check({"width": "9" * 10**6}, RULES, "config.json")
  assert len(str(caught.value)) < 250


@pytest.mark.parametrize("content", ["", "{", b"\xff\xff", "nothing", "1" * 5000, '{"a": 1} {}'])
def test_a_text_that_is_no_json_is_refused(content):
  with pytest.raises(UserError, match="the file is not JSON"):
    schema.parse(content, "the file")


@pytest.mark.parametrize("depth", [101, 5000, 200_000])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused(opens, closes, depth):
  with pytest.raises(UserError, match="nested deeper than 100"):
    schema.parse(opens * depth + "1" + closes * depth, "the file")


def test_many_values_side_by_side_are_not_deep():
  value = {str(i): [i, {"x": [i]}] for i in range(1000)}
  assert schema.parse(json.dumps(value), "the file") == value
  assert schema.parse("[" * 100 + "]" * 100, "the file")


def test_half_a_character_is_refused_and_a_whole_one_is_not():
  with pytest.raises(UserError, match="half a character"):
    schema.parse('{"prompt": "a\\uD800"}', "line 3")
  assert schema.parse('{"prompt": "\\ud83d\\ude00"}', "line 3") == {"prompt": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_json_knows_are_read(encoding, tmp_path):
  path = tmp_path / "file.json"
  path.write_bytes('{"name": "é"}'.encode(encoding))
  assert schema.read(path) == {"name": "é"}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  loop = tmp_path / "loop.json"
  loop.symlink_to(loop)
  with pytest.raises(UserError, match=r"absent\.json' does not exist"):
    schema.read(tmp_path / "absent.json")
  for path in (tmp_path, loop):
    with pytest.raises(UserError, match="is no file that can be read"):
      schema.read(path)
  with pytest.raises(UserError, match="cannot be read"):
    schema.read(tmp_path / ("x" * 5000))
  os.mkfifo(tmp_path / "pipe.json")  # Opening it would wait for ever.
  with pytest.raises(UserError, match="is no file that can be read"):
    schema.read(tmp_path / "pipe.json")


def test_a_file_of_gigabytes_is_not_read_to_its_end(tmp_path):
  path = tmp_path / "large.json"
  with path.open("wb") as file:
    file.truncate(2**34)
  with pytest.raises(UserError, match="larger than 16777216 bytes"):
    schema.read(path)
