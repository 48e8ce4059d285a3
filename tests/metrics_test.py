"""Tests of figures on the host: division, the first bad one, files of lines."""

import math

import jax.numpy as jnp
import pytest

from klrl.errors import UserError
from klrl.run import metrics

INF, NAN = math.inf, math.nan


def test_a_figure_is_sum_over_count_and_null_where_nothing_was_counted():
  pairs = {
    "score/mean": (jnp.float32(3), jnp.float32(2)),
    "kl/ref_exact": (0.0, 0.0),
    "kl/old_k3": (jnp.float32(0), 4),
  }
  figures = metrics.finalise(pairs)
  assert figures == {"kl/old_k3": 0.0, "kl/ref_exact": None, "score/mean": 1.5}
  assert list(figures) == sorted(figures)
  assert type(figures["score/mean"]) is float


@pytest.mark.parametrize(
  ("figures", "first"),
  [
    ({"score/mean": 1.0, "kl/ref_exact": None, "policy/loss": -2.0}, None),
    ({}, None),
    ({"gradient/norm": NAN, "policy/loss": NAN, "score/mean": INF}, "score/mean"),
    ({"gradient/norm": NAN, "loss/value": -INF}, "loss/value"),
    ({"policy/loss": NAN, "value/explained": NAN, "kl/ref_k1": NAN}, "kl/ref_k1"),
    ({"controller/beta": NAN, "gradient/norm": NAN}, "gradient/norm"),
    ({"controller/beta": INF}, "controller/beta"),
    ({"kl/ref_k3": NAN, "kl/ref_k1": NAN}, "kl/ref_k1"),
  ],
)
def test_the_cause_is_named_before_its_consequences(figures, first):
  assert metrics.first_not_finite(figures) == first


def test_lines_are_appended_and_read_back(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert metrics.read_lines(path) == []
  records = [{"iteration": i, "score/mean": 0.1 * i, "kl/ref_exact": None} for i in range(3)]
  for record in records:
    metrics.append_line(path, record)
  assert metrics.read_lines(path) == records


def test_truncate_keeps_the_iterations_before_the_checkpoint(tmp_path):
  path = tmp_path / "metrics.jsonl"
  metrics.truncate(path, 2)
  assert not path.exists()
  for i in range(5):
    metrics.append_line(path, {"iteration": i})
  before = path.read_bytes()
  with path.open("a") as file:
    file.write('{"iteration": 1')  # Cut off while it was written.
  metrics.truncate(path, 5)
  assert path.read_bytes() == before
  metrics.truncate(path, 2)
  assert metrics.read_lines(path) == [{"iteration": 0}, {"iteration": 1}]
  metrics.truncate(path, 0)
  assert path.read_bytes() == b""
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_twice_missing_or_broken_is_told_and_mended(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  lines = [f'{{"iteration": {i}}}\n' for i in (0, 1, 1, 3, 2)]
  path.write_text("".join([*lines, "garbage\n", '{"a": 1}\n', "[" * 10**4 + "\n", '{"iter']))
  metrics.truncate(path, 5)
  assert metrics.read_lines(path) == [{"iteration": i} for i in range(4)]
  said = " ".join(capsys.readouterr().out.split())
  assert "5 iterations before: 3 broken, 1 there twice, 1 missing" in said


@pytest.mark.parametrize("content", [b"\0" * 40 + b"\n", b"\xff\n", b'{"iteration": 1e400}\n'])
def test_damaged_lines_end_in_no_traceback(tmp_path, content):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"iteration": 0}\n' + content)
  metrics.truncate(path, 2)
  assert metrics.read_lines(path) == [{"iteration": 0}]


def test_what_is_no_file_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").mkdir()
  (tmp_path / "timing.jsonl").symlink_to("timing.jsonl")
  for name in ("metrics.jsonl", "timing.jsonl"):
    with pytest.raises(UserError, match=f"{name} cannot be read.*Move it away"):
      metrics.truncate(tmp_path / name, 2)
