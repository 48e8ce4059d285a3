"""The optimizer, the step of a supervised stage and a whole run, on problems of two numbers."""

import functools
import json
import types
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from small_decoders import arithmetic_decoder

from experiments import sft
from klrl.algorithm import optimizer
from klrl.algorithm.gradients import scalar
from klrl.models import policy_model
from klrl.run.workdir import create_workdir
from klrl.supervised import (
  init_supervised_state,
  make_supervised_step,
  train,
)
from klrl.tasks import data, widths

START = {"a": jnp.float32(0.5), "b": jnp.float32(-0.25)}


class Points(NamedTuple):
  x: np.ndarray
  y: np.ndarray


def line_loss(params, batch):
  x, y = batch
  squares = (params["a"] * x + params["b"] - y) ** 2
  return {"loss/square": 1.0}, {"loss/square": (squares.sum(), jnp.float32(len(x)))}


def slope_loss(params, batch):
  """A gradient that is always (3, -4): Adam then moves by its learning rate at each step."""
  loss = 3 * params["a"] - 4 * params["b"]
  return {"loss/slope": 1.0}, {"loss/slope": (loss, 1.0)}


@functools.cache
def compiled_step(loss_fn, num_iterations):
  config = sft.Config(num_iterations=num_iterations)
  return jax.jit(make_supervised_step(loss_fn, config))


def run(loss_fn, batch, *, num_iterations, learning_rate, max_grad_norm=1e3, num_steps=None):
  """Returns every state, the first included, and the metrics of every step."""
  config = types.SimpleNamespace(learning_rate=learning_rate, max_grad_norm=max_grad_norm)
  states, metrics = [init_supervised_state(START, config)], []
  for _ in range(num_steps or num_iterations):
    state, figures = compiled_step(loss_fn, num_iterations)(states[-1], {}, batch)
    states.append(state)
    metrics.append(figures)
  return states, metrics


def make_line():
  x = jnp.linspace(-1, 1, 16)
  return x, 2 * x - 1


def test_a_line_is_found():
  states, metrics = run(line_loss, make_line(), num_iterations=200, learning_rate=0.1)
  chex.assert_trees_all_close(
    states[-1].params, {"a": jnp.float32(2), "b": jnp.float32(-1)}, atol=1e-2
  )
  assert metrics[-1]["loss/square"][0] < 1e-3 < metrics[0]["loss/square"][0]
  assert int(states[-1].iteration) == 200


def test_a_run_takes_its_steps_once_and_is_judged_on_what_it_has_not_seen(tmp_path, capsys):
  config = sft.Config(num_iterations=5, batch_size=8, learning_rate=0.1, save_every=2, seed=3)
  training = Points(*(np.asarray(x) for x in make_line()))
  held_out = Points(np.float32([3, 5, 7]), np.float32([0, 0, 1]))
  create_workdir(tmp_path, "sft", config)
  saved = []

  def run_it():
    return train(
      config,
      tmp_path,
      line_loss,
      START,
      training,
      held_out,
      save=lambda directory, params: saved.append((directory, params)),
      summary={"held_out_square": "loss/square"},
      losses=("held_out_square",),
      title="Line",
      keys=(("loss/square", "square"),),
    )

  summary = run_it()
  state = init_supervised_state(START, config)
  for iteration in range(5):
    batch = data.take(training, data.batch_rows(3, iteration, 8, 16))
    state, _ = compiled_step(line_loss, 5)(state, {}, batch)
  ((directory, params),) = saved
  assert directory == tmp_path / "model"
  chex.assert_trees_all_close(params, jax.device_get(state.params), rtol=1e-6)
  squares = (params["a"] * held_out.x + params["b"] - held_out.y) ** 2
  before = (START["a"] * held_out.x + START["b"] - held_out.y) ** 2
  for name, x in (("", squares), ("_before", before), ("_change", squares - before)):
    if name != "_change":
      np.testing.assert_allclose(summary[f"held_out_square{name}"], x.mean(), rtol=1e-6)
    stderr = np.std(x, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(summary[f"held_out_square{name}_stderr"], stderr, rtol=1e-5)
  assert summary["held_out_examples"] == 3
  assert summary["held_out_square"] > summary["held_out_square_before"]
  said = capsys.readouterr().out
  assert "Line: 16 rows to train on, 3 held out; learning rate 0.1; results go to" in said
  assert "Training made the figure held_out_square worse" in said
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  assert (tmp_path / "report.html").exists()
  lines = (tmp_path / "metrics.jsonl").read_text()
  assert len(lines.splitlines()) == 5
  # A second time there is nothing left to do: the last checkpoint gives the same.
  assert run_it() == summary
  chex.assert_trees_all_equal(params, saved[1][1])
  assert (tmp_path / "metrics.jsonl").read_text() == lines


def test_learning_rate_0_moves_nothing():
  states, metrics = run(line_loss, make_line(), num_iterations=200, learning_rate=0.0, num_steps=3)
  chex.assert_trees_all_equal(states[-1].params, START)
  assert metrics[-1]["gradient/norm"][0] > 0


def test_learning_rate_falls_to_a_tenth_by_a_cosine():
  states, _ = run(slope_loss, None, num_iterations=10, learning_rate=0.1, num_steps=13)
  a, b = (np.array([state.params[name] for state in states]) for name in ("a", "b"))
  t = np.minimum(np.arange(13), 10)
  expected = 0.1 * (0.1 + 0.9 * (1 + np.cos(np.pi * t / 10)) / 2)
  np.testing.assert_allclose(-np.diff(a), expected, rtol=1e-4)
  np.testing.assert_allclose(np.diff(b), expected, rtol=1e-4)
  np.testing.assert_allclose([expected[0], expected[5], expected[10]], [0.1, 0.055, 0.01])


def test_gradient_norm_is_reported_before_clipping():
  _, metrics = run(
    slope_loss, None, num_iterations=10, learning_rate=0.1, max_grad_norm=0.1, num_steps=1
  )
  np.testing.assert_allclose(metrics[0]["gradient/norm"][0], 5, rtol=1e-6)


def adam(gradients, learning_rate, max_grad_norm):
  """Returns where Adam (Kingma and Ba, 2015, algorithm 1) goes from 0 along clipped `gradients`."""
  x, first, second = np.zeros(2), np.zeros(2), np.zeros(2)
  for t, gradient in enumerate(gradients, start=1):
    gradient = gradient * min(1, max_grad_norm / np.linalg.norm(gradient))
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    scaled = first / (1 - 0.9**t), second / (1 - 0.999**t)
    x = x - learning_rate * scaled[0] / (np.sqrt(scaled[1]) + 1e-8)
  return x


def test_steps_are_those_of_adam_behind_clipping_for_traced_coefficients():
  gradients = np.array([[30.0, 40.0], [0.3, -0.4], [-3.0, 0.1]])
  found, traces = [], []

  @jax.jit
  def step(*arguments, **coefficients):
    traces.append(coefficients)
    return optimizer.apply_gradients(*arguments, **coefficients)

  for learning_rate, max_grad_norm in ((0.1, 1.0), (0.1, 100.0), (0.02, 2.0)):
    params = {"x": jnp.zeros(()), "y": jnp.zeros(())}
    state = optimizer.init_optimizer(params)
    for x, y in gradients:
      params, state, norm = step(
        params,
        state,
        {"x": jnp.float32(x), "y": jnp.float32(y)},
        learning_rate=learning_rate,
        max_grad_norm=max_grad_norm,
      )
      np.testing.assert_allclose(norm, np.hypot(x, y), rtol=1e-6)
    found.append([float(params["x"]), float(params["y"])])
    np.testing.assert_allclose(
      found[-1], adam(gradients, learning_rate, max_grad_norm), rtol=1e-4, atol=1e-6
    )
  # Clipping joins the parameters: it changes where they go, not only how fast.
  assert not np.allclose(found[0], found[1], rtol=0.05)
  assert len(traces) == 1


def test_a_long_example_costs_its_own_batch_alone_and_changes_no_gradient():
  texts = [data.Encoded([1] * 4 + [2] * i, [False] * 4 + [True] * i) for i in (3, 9, 5, 250)]
  examples = data.examples_of(texts, pad_id=0)
  short = data.take(examples, np.arange(3))
  narrow = widths.without_padding(short, short_len=0)
  assert [x.shape for x in narrow] == [(3, 32)] * 4
  assert widths.without_padding(examples, short_len=0).tokens.shape == (4, 254)
  # Rows of more columns than that have other rotations, and so have they all, or none.
  assert widths.without_padding(short, short_len=100).tokens.shape == (3, 127)
  assert widths.without_padding(short, short_len=254).tokens.shape == (3, 32)
  policy = policy_model(arithmetic_decoder(num_heads=1, mlp_dim=8, max_len=256))
  params = policy.init(jax.random.key(0))
  loss = jax.jit(jax.value_and_grad(scalar(sft.make_cross_entropy_fn(policy)), has_aux=True))
  chex.assert_trees_all_close(loss(params, narrow), loss(params, short), rtol=1e-4, atol=1e-6)
  flops = [loss.lower(params, x).compile().cost_analysis()["flops"] for x in (narrow, short)]
  assert flops[0] < 0.15 * flops[1]


def test_a_run_reads_batches_without_their_padding(tmp_path):
  config = sft.Config(num_iterations=4, batch_size=4, learning_rate=0.1)
  texts = [data.Encoded([1] * n, [True] * n) for n in 7 * [9] + [200]]
  training, held_out = (data.examples_of(part, pad_id=0) for part in (texts, texts[:2]))
  create_workdir(tmp_path, "sft", config)
  widths = []

  def loss(params, batch):
    widths.append(batch.tokens.shape[1])
    return slope_loss(params, batch)

  train(
    config,
    tmp_path,
    loss,
    START,
    training,
    held_out,
    save=lambda directory, params: None,
    summary={},
    title="Widths",
    keys=(),
  )
  assert set(widths) == {9, 50, 200}
