"""Loaders on files that are changed at random: a clear refusal, or a right reading, soon and small.

`KLRL_FUZZ=N` tries N times as many; `hostile_models_test` has what was found before.
"""

import copy
import json
import os
import pathlib
import resource
import shutil
import time

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_test import saved
from hypothesis import strategies as st

from klrl import schema
from klrl.errors import UserError
from klrl.models import check_tokenizer, hf, load_tokenizer
from klrl.run import checkpoint, evaluations, loop, metrics, summary, workdir
from klrl.tasks import files

SECONDS, BYTES = 10, 2**30


def examples(number):
  return hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=number * int(os.environ.get("KLRL_FUZZ", "1")),
    suppress_health_check=list(hypothesis.HealthCheck),
  )


# What somebody may write into a file, by error or to do harm.
numbers = st.sampled_from(
  [0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**19, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan")]
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.just("\ud800"))
values = st.recursive(
  scalars,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
  max_leaves=5,
) | st.sampled_from([json.loads("[" * 200 + "]" * 200), "x" * 10**5, ["a"] * 10**4])


def places(value, path=()):
  """Returns the paths to all values within a value of JSON."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  found = []
  for key, item in items:
    found.append((*path, key))
    if isinstance(item, dict | list):
      found += places(item, (*path, key))
  return found


def changed_value(draw, value):
  """Returns a JSON value in which one or two values are others, gone, or new."""
  value = copy.deepcopy(value)
  for _ in range(draw(st.integers(1, 2))):
    all_places = places(value)
    if not all_places:
      return value
    *path, key = draw(st.sampled_from(all_places))
    holder = value
    for step in path:
      holder = holder[step]
    what = draw(st.sampled_from(("replace", "remove", "swap", "add")))
    if what == "remove":
      del holder[key]
    elif what == "swap":  # A value of the same file is more often plausible.
      other = value
      for step in draw(st.sampled_from(all_places)):
        other = other[step] if isinstance(other, dict | list) else other
      holder[key] = copy.deepcopy(other)
    elif what == "add" and isinstance(holder[key], list):
      holder[key].append(copy.deepcopy(draw(values)))
    else:
      holder[key] = copy.deepcopy(draw(values))
  return value


def changed_bytes(draw, data: bytes):
  """Returns bytes that are cut, garbled, repeated, or have one bit flipped."""
  at = draw(st.integers(0, max(len(data) - 1, 0)))
  what = draw(st.sampled_from(("flip", "cut", "garbage", "zeros", "twice", "nothing")))
  if what == "flip" and data:
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
  if what == "garbage":
    return data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at + 20 :]
  if what == "zeros":
    return data[:at] + bytes(min(len(data) - at, 64)) + data[at + 64 :]
  return {"cut": data[:at], "twice": data + data[at:]}.get(what, b"")


def tried(read):
  """Returns what `read()` returns, or None where it refuses, which it does soon and in one line."""
  began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  found = None
  try:
    found = read()
  except UserError as error:
    assert 10 < len(str(error)) < 2000 and "Traceback" not in str(error)
  assert time.process_time() - began < SECONDS
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < BYTES
  return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  directory = tmp_path_factory.mktemp("model")
  saved(directory)
  return directory


def load(directory):
  config, params = hf.load_policy(directory)
  info = load_tokenizer(directory)
  check_tokenizer(info, config)
  assert all(0 <= i < config.vocab_size for i in info.encode("w5 w3"))
  return params


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@examples(40)
@hypothesis.given(data=st.data())
def test_a_changed_file_of_a_model_is_read_rightly_or_refused(name, model, data):
  before = (model / name).read_bytes()
  if data.draw(st.integers(0, 3)):
    content = json.dumps(changed_value(data.draw, json.loads(before))).encode()
  else:
    content = changed_bytes(data.draw, before)
  (model / name).write_bytes(content)
  try:
    params = tried(lambda: load(model))
  finally:
    (model / name).write_bytes(before)
  assert params is None or all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@examples(50)
@hypothesis.given(data=st.data())
def test_a_changed_header_of_safetensors_is_read_rightly_or_refused(model, data):
  file = model / "model.safetensors"
  before = file.read_bytes()
  length = int.from_bytes(before[:8], "little")
  if data.draw(st.booleans()):
    header = json.dumps(changed_value(data.draw, json.loads(before[8 : 8 + length]))).encode()
  else:
    header = changed_bytes(data.draw, before[8 : 8 + length])
  size = data.draw(st.sampled_from([len(header)] * 5 + [0, 2**40, 2**64 - 1, len(header) + 1]))
  file.write_bytes(size.to_bytes(8, "little") + header + before[8 + length :])
  try:
    params = tried(lambda: hf.load_policy(model)[1])
  finally:
    file.write_bytes(before)
  assert params is None or all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@examples(100)
@hypothesis.given(data=st.data())
def test_changed_prompts_are_read_rightly_or_refused_by_their_line(tmp_path_factory, data):
  rows = [{"prompt": "1+1=", "answer": "2", "n": [1, {"a": None}]}, {"prompt": "\u00e9\n", "n": 3}]
  lines = [json.dumps(changed_value(data.draw, row) if data.draw(st.booleans()) else row)
           for row in rows]  # fmt: skip
  content = "\n".join(lines).encode()
  if data.draw(st.booleans()):
    content = changed_bytes(data.draw, content)
  path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
  path.write_bytes(content)
  found = tried(lambda: files.read_records(path, ["prompt"]))
  if found is not None:
    said = [json.loads(x) for x in content.decode("utf-8-sig").split("\n") if x.strip()]
    assert json.dumps(found) == json.dumps(said)
    assert all(isinstance(record["prompt"], str) for record in found)


STATE_FILES = {
  "summary.json": lambda folder: summary.read_summary(folder),
  "model_best/evaluation.json": evaluations.read_best,
  "metrics.jsonl": lambda folder: metrics.read_lines(folder / "metrics.jsonl"),
  "config.json": lambda folder: workdir._read_config(folder / "config.json") or {},
  "inputs.json": lambda folder: workdir.fingerprints.check(folder, accept=True),
}


@pytest.mark.parametrize("name", STATE_FILES)
@examples(30)
@hypothesis.given(data=st.data())
def test_a_changed_file_of_a_run_is_read_or_refused(name, tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp() / "run"
  (folder / "model_best").mkdir(parents=True, exist_ok=True)
  record = {"iteration": 3, "score_after": 0.5, "num_iterations": 3, "experiment": "ppo"}
  record |= {"digests": {"a": "0" * 64}, "changed": ["a"], "versions": {"jax": "1"}}
  if data.draw(st.booleans()):
    content = json.dumps(changed_value(data.draw, record)).encode() + b"\n"
  else:
    content = changed_bytes(data.draw, json.dumps(record).encode() + b"\n")
  (folder / name).write_bytes(content)
  try:
    found = tried(lambda: STATE_FILES[name](folder))
  finally:
    (folder / name).unlink()
  if name == "metrics.jsonl":
    assert all(schema.integer(0).holds(line.get("iteration", 0)) for line in found)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns the folder of a run with two checkpoints, and the states that they hold."""
  folder = tmp_path_factory.mktemp("checkpoints")
  states = {
    i: {"key": jax.random.key(i), "x": jnp.arange(4096.0) * i, "n": jnp.int32(i)} for i in (1, 2)
  }
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
  for i, state in states.items():
    checkpoints.save(i, state)
  checkpoints.close()
  return folder, states


@examples(12)
@hypothesis.given(data=st.data())
def test_a_changed_checkpoint_is_read_as_it_was_saved_or_the_one_before_is(run, data):
  whole, states = run
  folder = whole.with_name("copy")
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(whole, folder)
  newest = folder / "checkpoints/2"
  paths = sorted(path for path in newest.rglob("*") if path.is_file())
  path = data.draw(st.sampled_from(paths))
  path.write_bytes(changed_bytes(data.draw, path.read_bytes()))
  like = jax.tree.map(lambda x: x.copy(), states[2])  # It is freed.
  found = tried(lambda: loop.restore_or_init(pathlib.Path(folder), like, keep=2))
  if found is not None:
    done, state = found
    assert done in states
    assert checkpoint.digests(state) == checkpoint.digests(states[done])
