"""Reads JSON and checks it against rules, with one message if a rule does not hold.

    config = schema.read(path)
    schema.check(config, {"hidden_size": integer(1, 10**6)}, path, required=("hidden_size",))

A rule is what a value must be, in words and as a test. Names without a rule may hold anything.
"""

import collections
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from klrl.errors import UserError

MAX_BYTES = 2**24
# Python's limit of recursion is 1,000, and to copy or write a value takes several levels for each.
MAX_DEPTH = 100
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxdict = 4
_SHORT.maxlevel = 2


class Rule(NamedTuple):
  """What a value must be."""

  what: str  # completes the sentence "it must be ..."
  holds: Callable[[Any], bool]


def integer(minimum: int = -(2**63), maximum: int = 2**63 - 1) -> Rule:
  """Returns the rule of a whole number within bounds; true and 1.0 do not count."""

  def holds(value):
    return type(value) is int and minimum <= value <= maximum

  return Rule(f"a whole number from {minimum} to {maximum}", holds)


def number(minimum: float = -math.inf, maximum: float = math.inf) -> Rule:
  """Returns the rule of a finite number within bounds; true does not count."""

  def holds(value):
    # An integer of 400 digits can be compared with a float, but not converted to one.
    return type(value) in (int, float) and minimum <= value <= maximum and _is_finite(value)

  return Rule(f"a finite number from {minimum} to {maximum}", holds)


def text(max_len: int = 10_000) -> Rule:
  """Returns the rule of a string of at most `max_len` characters."""
  return Rule(
    f"text of at most {max_len} characters",
    lambda value: isinstance(value, str) and len(value) <= max_len,
  )


def boolean() -> Rule:
  """Returns the rule of true and false; "false", 0 and 1 do not count."""
  return Rule("true or false", lambda value: isinstance(value, bool))


def null() -> Rule:
  """Returns the rule of null."""
  return Rule("null", lambda value: value is None)


def list_of(rule: Rule, *, min_len: int = 0) -> Rule:
  """Returns the rule of a list of at least `min_len` values that `rule` holds for."""
  some = f" at least {min_len}" if min_len else ""
  return Rule(
    f"a list of{some}, each {rule.what}",
    lambda value: isinstance(value, list) and len(value) >= min_len and all(map(rule.holds, value)),
  )


def object_of(rule: Rule) -> Rule:
  """Returns the rule of an object whose values, whatever their names, `rule` holds for."""
  return Rule(
    f"an object whose values are each {rule.what}",
    lambda value: isinstance(value, dict) and all(map(rule.holds, value.values())),
  )


def either(*rules: Rule) -> Rule:
  """Returns the rule of a value that one of `rules` holds for."""
  return Rule(
    " or ".join(rule.what for rule in rules),
    lambda value: any(rule.holds(value) for rule in rules),
  )


def optional(rule: Rule) -> Rule:
  """Returns `rule`, or null."""
  return either(rule, null())


def parse(content: str | bytes, where: str | pathlib.Path) -> Any:
  """Returns the value of a JSON text.

  Raises:
    UserError: the text is not JSON, is nested deeper than `MAX_DEPTH`, holds half a character, or
      names one field of an object twice. The message begins with `where`.
  """
  try:
    value = json.loads(content, object_pairs_hook=_object)
    if isinstance(content, bytes):  # Its first bytes tell UTF-8, UTF-16 and UTF-32 apart.
      content = content.decode(json.detect_encoding(content))
    if is_deep(value, content):
      raise RecursionError
    # Two escapes make a character beyond the first 65,536; one alone is no character.
    if "\\ud" in content.lower():
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError as error:
    raise UserError(f"{where} is nested deeper than {MAX_DEPTH} levels.") from error
  except UnicodeEncodeError as error:
    raise UserError(
      f"{where} holds half a character, a \\ud... escape without its partner. Remove it."
    ) from error
  except ValueError as error:  # of JSON, of an encoding, of a number of too many digits
    raise UserError(f"{where} is not JSON: {str(error).splitlines()[0]}.") from error
  return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns the object of these fields; ValueError where one of them occurs twice."""
  value = dict(pairs)
  if len(value) < len(pairs):
    ((name, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
    raise ValueError(f"the field {_SHORT.repr(name)} is there twice")
  return value


def read(path: str | pathlib.Path, *, max_bytes: int = MAX_BYTES) -> Any:
  """Returns the value of a JSON file.

  Raises:
    UserError: there is no such file, it cannot be read, it is larger than `max_bytes`, or `parse`
      refuses it.
  """
  path = pathlib.Path(path)
  try:
    if not path.is_file():
      what = "is no file that can be read" if os.path.lexists(path) else "does not exist"
      raise UserError(f"{show(str(path))} {what}.")
    with path.open("rb") as file:
      content = file.read(max_bytes + 1)
  except OSError as error:
    raise UserError(f"{show(str(path))} cannot be read: {error.strerror}.") from error
  if len(content) > max_bytes:
    raise UserError(f"{path} is larger than {max_bytes} bytes, which no such file has to be.")
  return parse(content, path)


def check(
  value: Any,
  rules: Mapping[str, Rule],
  where: str | pathlib.Path,
  *,
  required: Collection[str] = (),
) -> dict[str, Any]:
  """Returns `value`, an object, after checking the rules for the values of these names.

  Raises:
    UserError: `value` is no object, lacks a `required` name, or a rule does not hold; the message
      begins with `where` and names the field.
  """
  if not isinstance(value, dict):
    raise UserError(f"{where} is {show(value)}; it must be an object, {{...}}.")
  for name, rule in rules.items():
    if name not in value:
      if name in required:
        raise UserError(f"{where} has no {name}; it must be {rule.what}.")
    elif not rule.holds(value[name]):
      raise UserError(f"{where}: {name} is {show(value[name])}, but must be {rule.what}.")
  return value


def show(value: Any) -> str:
  """Returns a value for a message, in at most about a hundred characters."""
  if isinstance(value, bool) or value is None:  # as the file has it
    return json.dumps(value)
  return _SHORT.repr(value)


def _is_finite(value) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:
    return False


def is_deep(value, content: str) -> bool:
  """Returns whether the value of a JSON text is nested deeper than `MAX_DEPTH`."""
  level = [value] if content.count("[") + content.count("{") > MAX_DEPTH else []
  for _ in range(MAX_DEPTH):
    children = [item.values() if isinstance(item, dict) else item for item in level]
    level = [child for some in children for child in some if isinstance(child, dict | list)]
  return bool(level)
