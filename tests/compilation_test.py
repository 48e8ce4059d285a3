"""The second start of a command reads what the first has compiled."""

import os
import time

import forked
import jax
import pytest

from klrl.devices import compilation
from klrl.errors import UserError

# It prints how many programs of this process were compiled, and how many were read.
PROGRAM = """
import jax, jax.numpy as jnp
from klrl.devices import compilation

compilation._SECONDS_WORTH_KEEPING = 0
compilation.keep("auto")
counts = {"/jax/compilation_cache/cache_misses": 0, "/jax/compilation_cache/cache_hits": 0}

def note(event, **_):
  counts[event] = counts.get(event, 0) + 1

jax.monitoring.register_event_listener(note)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(*[counts[f"/jax/compilation_cache/cache_{what}"] for what in ("misses", "hits")])
"""


def counts(home, **own):
  """Returns (compiled, read) of a process with its home there."""
  environment = {k: v for k, v in os.environ.items() if k not in compilation.OF_JAX}
  environment |= {"HOME": str(home), "JAX_PLATFORMS": "cpu", **own}
  environment.pop("XDG_CACHE_HOME", None)
  status, said = forked.Process(["-c", PROGRAM], home, environment).finished()
  assert status == 0, said
  return tuple(map(int, said.split()))


def test_the_second_start_compiles_nothing(tmp_path):
  compiled, read = counts(tmp_path)
  assert compiled and not read
  assert list((tmp_path / ".cache/klrl/compiled").glob("*-cache"))
  assert counts(tmp_path) == (0, compiled)


@pytest.fixture
def told(monkeypatch):
  """What `keep` tells JAX, which is not done."""
  found = {}
  monkeypatch.setattr(jax.config, "update", lambda name, value: found.update({name: value}))
  for name in compilation.OF_JAX:
    monkeypatch.delenv(name, raising=False)
  return found


def test_the_users_folder_is_in_the_users_cache(told, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  compilation.keep(compilation.AUTO)
  assert told["jax_compilation_cache_dir"] == str(tmp_path / "klrl/compiled")


@pytest.mark.parametrize("name", compilation.OF_JAX)
def test_a_variable_of_jax_decides_before_the_default_and_after_the_flag(
  told, tmp_path, monkeypatch, name
):
  monkeypatch.setenv(name, "true")
  compilation.keep(compilation.AUTO)
  assert not told
  compilation.keep(str(tmp_path / "own"))
  assert told["jax_compilation_cache_dir"] == str(tmp_path / "own")


def test_none_keeps_nothing(told):
  compilation.keep(compilation.NONE)
  assert not told


def test_a_folder_that_cannot_be_written_to_is_refused_where_it_is_named(
  told, tmp_path, monkeypatch
):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"--compilation_cache=.*file/x: no folder .* or none"):
    compilation.keep(str(tmp_path / "file/x"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  compilation.keep(compilation.AUTO)
  assert not told


def test_what_was_kept_long_ago_is_removed(told, tmp_path):
  for name, days in (("old-cache", 40), ("young-cache", 20), ("old-of-the-user", 40)):
    (tmp_path / name).touch()
    then = time.time() - days * 24 * 3600
    os.utime(tmp_path / name, (then, then))
  compilation.keep(str(tmp_path))
  assert {path.name for path in tmp_path.iterdir()} == {"young-cache", "old-of-the-user"}
