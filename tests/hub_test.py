"""Models by their names on the hub: the cache, what is fetched, and what is said when it cannot."""

import pathlib
import shutil
import types

import pytest
from hf_test import assert_trees_equal, saved

from klrl.errors import UserError
from klrl.models import directory, hf, hub, load_tokenizer
from klrl.run import fingerprints

library = pytest.importorskip("huggingface_hub")
for part in ("constants", "errors", "utils"):  # which it imports when they are asked for
  pytest.importorskip(f"huggingface_hub.{part}")
NAME, REVISION = "some-owner/A.model-1", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A cache of the hub that is empty, and no network."""
  folder = tmp_path / "hub"
  monkeypatch.setattr(library.constants, "HF_HUB_CACHE", str(folder))
  monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.chdir(tmp_path)
  hub.snapshot.cache_clear()
  yield folder / "models--some-owner--A.model-1"
  hub.snapshot.cache_clear()


def fill(cache, ref="main"):
  """Puts a model into the cache, as the library does, and returns its folder."""
  (cache / "refs").mkdir(parents=True, exist_ok=True)
  (cache / "refs" / ref).write_text(REVISION)
  saved(cache / "snapshots" / REVISION)
  return cache / "snapshots" / REVISION


def test_a_model_in_the_cache_is_found_by_its_name_without_a_network(cache, capsys):
  folder = fill(cache)
  assert_trees_equal(hf.load_policy(NAME)[1], hf.load_policy(folder)[1])
  assert load_tokenizer(NAME).eos_id == 2
  said = capsys.readouterr().out.replace("\n", "")
  assert said.count(f"revision {REVISION}, from the cache") == 1
  fill(cache, "v1")
  assert directory.model_dir(f"{NAME}@v1") == folder
  assert directory.model_dir(f"{NAME}@{REVISION}") == folder
  with pytest.raises(UserError, match="no folder here, is not whole in the hub's cache"):
    directory.model_dir(f"{NAME}@v2")


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_of_which_the_cache_has_a_part_is_fetched(missing, cache):
  (fill(cache) / missing).unlink()
  assert hub.cached(NAME) is None
  with pytest.raises(UserError, match=rf"{missing} is not in the hub's cache .* copy the model's"):
    hf.load_policy(NAME)


def test_a_folder_comes_before_a_name(cache, tmp_path):
  saved(tmp_path / NAME)
  assert directory.model_dir(NAME) == pathlib.Path(NAME)
  shutil.rmtree(tmp_path / NAME)
  with pytest.raises(UserError, match=f"{NAME} does not exist"):  # The owner's folder is there.
    directory.model_dir(NAME)
  for path in ("../a", "a/b/c", "/a/b", "./a", "a/..", "", "a/b@../c", "-a b/c"):
    assert not hub.is_name(path), path


def test_no_pickle_and_no_code_is_fetched(cache, monkeypatch):
  asked = {}

  def download(repository, **options):
    asked.update(options, repository=repository)
    if options.get("local_files_only"):
      raise library.errors.LocalEntryNotFoundError("nothing")
    return str(fill(cache))

  fake = types.SimpleNamespace(snapshot_download=download, errors=library.errors)
  monkeypatch.setattr(hub, "_library", lambda: fake)
  assert hub.snapshot(f"{NAME}@v1").name == REVISION
  assert (asked["repository"], asked["revision"]) == (NAME, "v1")
  files = [
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json",
    "pytorch_model.bin", "modeling.py", "model.pt", "training_args.bin", "original/model.pth",
    "tokenizer.pkl", "flax_model.msgpack",
  ]  # fmt: skip
  fetched = list(library.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
  assert fetched == files[:4]


def failing(error):
  """Returns a library that finds nothing in its cache and fails at the network."""

  def download(repository, **options):
    if options.get("local_files_only"):
      raise library.errors.LocalEntryNotFoundError("nothing")
    raise error

  return types.SimpleNamespace(snapshot_download=download, errors=library.errors)


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("RepositoryNotFoundError", "neither a folder here nor a model on the hub.* OWNER/NAME"),
    ("GatedRepoError", "is gated on the hub: accept its terms"),
    ("RevisionNotFoundError", f"no such revision of {NAME}"),
    (None, r"cannot be fetched \(no route\)\. Where there is no network"),
  ],
)
def test_what_the_hub_says_becomes_one_message(kind, message, monkeypatch):
  error = OSError("no route\nmore lines")
  if kind:
    kind = getattr(library.errors, kind)
    error = kind.__new__(kind)
  monkeypatch.setattr(hub, "_library", lambda: failing(error))
  with pytest.raises(UserError, match=message):
    hub.snapshot(NAME)


def test_inputs_of_the_hub_have_fingerprints(cache):
  folder = fill(cache)
  found = fingerprints.digests([NAME])[NAME]
  assert found == fingerprints.digests([str(folder)])[str(folder)] and "model.safetensors" in found
  assert fingerprints.paths_of(types.SimpleNamespace(policy=NAME, reference="not/there")) == [NAME]
