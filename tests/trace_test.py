"""The table of a trace has the operations of its programs, each without what is inside it."""

import jax
import jax.numpy as jnp
import pytest

from klrl.run import progress, trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the trace of three calls of a program with a loop of five steps."""

  @jax.jit
  def looping(x):
    return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sort(y @ x), x)

  x = jnp.ones((200, 200))
  looping(x).block_until_ready()
  folder = tmp_path_factory.mktemp("profile")
  jax.profiler.start_trace(str(folder))
  for _ in range(3):
    looping(x).block_until_ready()
  jax.profiler.stop_trace()
  return folder


def test_an_operation_counts_as_often_as_it_ran(folder):
  found = {x.name: x for x in trace.operations(folder) if x.program == "looping"}
  of_body = [x for name, x in found.items() if "sort" in name]
  loop = next(x for name, x in found.items() if name.startswith("while"))
  assert loop.calls == 3
  assert of_body and all(x.calls % 15 == 0 for x in of_body)  # A sort may be several events.
  # Of the loop is left what it takes to begin a step.
  assert 0 <= loop.seconds < sum(x.seconds for x in of_body)
  seconds = [x.seconds for x in trace.operations(folder)]
  assert seconds == sorted(seconds, reverse=True)


def test_what_is_inside_counts_once():
  events = [(0, 100, "loop"), (10, 40, "body"), (20, 30, "part"), (50, 60, "body"), (100, 110, "x")]
  own = {}
  for key, seconds in trace._alone(reversed(events)):
    own[key] = own.get(key, 0) + round(seconds * 1e9)
  assert own == {"loop": 60, "body": 30, "part": 10, "x": 10}


def test_the_table_is_shown(folder, capsys, monkeypatch):
  monkeypatch.setattr(progress.console, "_width", 200)
  trace.show(folder, num_iterations=3)
  printed = capsys.readouterr().out
  assert "What took longest in 3 iterations" in printed
  assert "looping" in printed and "sort" in printed and "100.0%" in printed


def test_a_folder_without_a_trace_is_said_to_be_empty(tmp_path, capsys):
  trace.show(tmp_path, num_iterations=1)
  assert "has no operation of a program" in capsys.readouterr().out.replace("\n", " ")
