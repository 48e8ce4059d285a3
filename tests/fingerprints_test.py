"""Tests of what a run was made from: which files count, and what is said of an edited one."""

import dataclasses
import json
import pathlib

import pytest

from klrl.errors import UserError
from klrl.run import fingerprints
from klrl.run.workdir import create_workdir, find_workdir


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields that are read here."""

  workdir: str = "run"
  policy: str = ""
  prompts: str = ""
  reward: str = ""
  accept_changed_inputs: bool = False


@pytest.fixture
def inputs(tmp_path, monkeypatch):
  """The config of a run that has begun, from files of its own."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("m/model").mkdir(parents=True)
  for name in ("config.json", "tokenizer.json", "model.safetensors", "notes.md"):
    pathlib.Path("m/model", name).write_text(json.dumps({"model_type": name}))
  pathlib.Path("p.jsonl").write_text("prompts")
  pathlib.Path("r.py").write_text("def f(): pass")
  config = Config(policy="m", prompts="p.jsonl", reward="math, 0.5*r.py:f,model")
  start(config)
  pathlib.Path("run/metrics.jsonl").write_text("")
  return config


def test_the_files_that_are_read_are_the_ones_that_count(inputs):
  # A model's own directory may have a folder of that name as well.
  pathlib.Path("m/config.json").write_text('{"model_type": "llama"}')
  assert fingerprints.digests(["m"])["m"].keys() == {"config.json"}
  pathlib.Path("m/config.json").write_text('{"experiment": "sft"}')
  assert "model.safetensors" in fingerprints.digests(["m"])["m"]


def test_of_a_folder_of_data_the_files_of_all_its_splits_count(inputs):
  for split in ("train", "test"):
    pathlib.Path("d", split).mkdir(parents=True)
    pathlib.Path("d", split, "data.arrow").write_text(split)
  pathlib.Path("d/dataset_dict.json").write_text("{}")
  config = Config(prompts="d:test")
  assert fingerprints.paths_of(config) == ["d"]
  digests = fingerprints.digests(["d"])
  assert digests["d"].keys() == {"dataset_dict.json", "train/data.arrow", "test/data.arrow"}
  pathlib.Path("d/test/data.arrow").write_text("other")
  changed = fingerprints.differing(digests, fingerprints.digests(["d"]))
  assert changed == ["d/test/data.arrow"]


def start(config, read=()):
  directory = find_workdir("ppo", config)
  create_workdir(directory, "ppo", config, read=read)


def test_every_path_that_a_flag_names_is_one(inputs):
  assert fingerprints.paths_of(inputs) == ["m", "p.jsonl", "r.py"]
  assert fingerprints.paths_of(Config(policy="uniform", reward="model")) == []


@pytest.mark.parametrize(
  ("file", "named"),
  [
    ("p.jsonl", "p.jsonl"),
    ("r.py", "r.py"),
    ("m/model/tokenizer.json", "m/tokenizer.json"),
    ("m/model/model.safetensors", "m/model.safetensors"),
    ("m/model/chat_template.jinja", "m/chat_template.jinja"),  # a new one
  ],
)
def test_an_edited_file_is_refused_by_name_and_accepted_by_a_flag(inputs, file, named, capsys):
  before = pathlib.Path(file).read_text() if pathlib.Path(file).exists() else None
  pathlib.Path(file).write_text("edited")
  with pytest.raises(UserError, match=rf"^{named} is not what it was.*--accept_changed_inputs"):
    start(inputs)
  accepting = dataclasses.replace(inputs, accept_changed_inputs=True)
  start(accepting)
  assert f"{named} is not what it was" in " ".join(capsys.readouterr().out.split())
  assert fingerprints.read(pathlib.Path("run"))["accepted"] == [
    f"{named} was changed after the run had begun"
  ]
  start(inputs)  # It is the run's from now on.
  if before is not None:
    pathlib.Path(file).write_text(before)
    with pytest.raises(UserError, match="is not what it was"):
      find_workdir("ppo", inputs)


def test_what_is_not_read_may_change_and_what_is_gone_is_for_others_to_miss(inputs):
  pathlib.Path("m/model/notes.md").write_text("edited")
  start(inputs)
  pathlib.Path("p.jsonl").unlink()
  find_workdir("ppo", inputs)


def test_what_else_was_read_is_held_too(inputs):
  pathlib.Path("stage").mkdir()
  pathlib.Path("stage/model.safetensors").write_text("weights")
  start(inputs, read=["stage"])
  start(inputs)  # The stages of a finished run are not asked for.
  pathlib.Path("stage/model.safetensors").write_text("other weights")
  with pytest.raises(UserError, match=r"stage/model\.safetensors is not what it was"):
    find_workdir("ppo", inputs)


def test_a_run_that_never_began_holds_nothing(inputs):
  pathlib.Path("run/metrics.jsonl").unlink()
  pathlib.Path("r.py").write_text("edited")
  start(inputs)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1, "accepted": []}', "[" * 10**5])
def test_a_damaged_record_is_named(inputs, content):
  pathlib.Path("run/inputs.json").write_text(content)
  with pytest.raises(UserError, match=r"run/inputs\.json"):
    find_workdir("ppo", inputs)
