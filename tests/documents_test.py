"""The pages of the repository name files that are there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PATH = re.compile(r"`((?:klrl|experiments|tests|docs|benchmarks)/[\w/.-]*)`")
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_files_that_are_there(page):
  text = page.read_text()
  paths = [ROOT / name for name in PATH.findall(text)]
  paths += [page.parent / name for name in LINK.findall(text)]
  assert not [str(path.relative_to(ROOT)) for path in paths if not path.exists()]


def test_the_way_of_a_rollout_names_functions_where_they_are():
  rows = re.findall(
    r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.M
  )
  checked = 0
  for functions, files in rows:
    source = "".join((ROOT / name).read_text() for name in PATH.findall(files))
    for name in re.findall(r"`(?:Config\.)?([a-z_]+)(?:\(\))?`", functions):
      if name != "advantages":  # It is of an experiment.
        assert f"def {name}(" in source, f"{name} is not in {files}"
        checked += 1
  assert checked > 15
