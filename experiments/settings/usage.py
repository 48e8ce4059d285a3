"""What `--help` prints, and what is said of a flag that does not exist.

Flags stand in the groups of the classes that declare them, under the first sentence of these; the
ones that a first run needs come first.
"""

import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap

# What most runs set; the others follow in their groups.
ESSENTIAL = (
  *("experiment", "sweep", "seeds", "task", "policy", "teacher", "data", "prompts", "reward"),
  *("reward_model", "reference", "beta", "learning_rate", "num_iterations", "batch_size"),
  *("max_completion_len", "mesh", "workdir", "seed"),
)
_NUM_SUGGESTIONS = 5


def group_of(config_class: type, name: str) -> str:
  """Returns the first sentence of the class that first declares the field, without its period."""
  field = config_class.__dataclass_fields__[name]
  if "group" in field.metadata:
    return field.metadata["group"]
  declaring = [x for x in config_class.__mro__ if name in inspect.get_annotations(x)]
  return _title(declaring[-1])


def _title(config_class: type) -> str:
  sentence = re.match(r"[^.:;]*", inspect.getdoc(config_class) or "")[0]
  return " ".join(sentence.split())


def text(config_class: type, about: str) -> str:
  """Returns the help of an experiment whose module says `about`, as wide as the terminal."""
  # An experiment's own flags come before those that it shares with others.
  groups = {"The flags that most runs set": []}
  groups |= {_title(x): [] for x in config_class.__mro__ if dataclasses.is_dataclass(x)}
  essential = sorted(
    (x for x in dataclasses.fields(config_class) if x.name in ESSENTIAL),
    key=lambda field: ESSENTIAL.index(field.name),
  )
  for field in (*essential, *dataclasses.fields(config_class)):
    is_essential = field.name in ESSENTIAL
    title = next(iter(groups)) if is_essential else group_of(config_class, field.name)
    if field not in groups.setdefault(title, []):
      groups[title].append(field)
  parts = [about.strip()]
  for title, members in groups.items():
    if members:
      parts.append("\n".join((f"{title}:", *map(_entry, members))))
  return "\n\n".join(parts) + "\n"


def _entry(field: dataclasses.Field) -> str:
  """Returns `--name=default` and beside it, or below where it is long, what the flag is."""
  default, about = field.default, field.metadata["help"]
  if isinstance(default, bool):
    head = f"--[no]{field.name}"
  else:
    head = f"--{field.name}={f'{default:g}' if isinstance(default, float) else default}"
  if isinstance(default, bool) and default:
    about += " (on by default)"
  if field.metadata["choices"]:
    about += f" ({', '.join(map(str, field.metadata['choices']))})"
  if field.metadata["read_when"]:
    other, values = field.metadata["read_when"]
    given = "|".join(map(str, values))
    about += f"; read with --{other}={given}" if given else f"; read without --{other}"
  width, indent = shutil.get_terminal_size((100, 24)).columns, 34
  lines = textwrap.wrap(about, max(30, width - indent), break_on_hyphens=False)
  first = f"  {head:{indent - 2}}"
  if len(first) > indent:
    lines.insert(0, "")
  return "\n".join((first + lines[0], *(" " * indent + line for line in lines[1:]))).rstrip()


def unknown(config_class: type, name: str) -> str:
  """Returns the message of a flag that does not exist, with those that are probably meant."""
  fields = dataclasses.fields(config_class)
  close = difflib.get_close_matches(name, [field.name for field in fields], n=2, cutoff=0.7)
  rank = {name: place for place, name in enumerate((*close, *ESSENTIAL))}
  word = name.removesuffix("s").lower()
  found = [x for x in fields if x.name in close or word in f"{x.name} {x.metadata['help']}".lower()]
  found = sorted(found, key=lambda x: rank.get(x.name, len(rank)))[:_NUM_SUGGESTIONS]
  listed = "".join("\n" + _entry(field) for field in found)
  meant = f" Perhaps one of these is meant:{listed}" if found else ""
  return f"There is no flag --{name}; --help lists all.{meant}"
