"""Tests of experiments.kl_directions; its numbers from elsewhere are in kl_facts_test.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kl_directions, ppo
from experiments.lab import papers
from experiments.lab.kl_directions_page import report
from klrl.errors import UserError

exact_studies = functools.cache(kl_directions.exact_studies)


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def test_bounds_hold_on_random_pairs_and_the_sharp_one_is_nearly_reached():
  keys = jax.random.split(jax.random.key(0), 2)
  old, new = (jax.random.dirichlet(key, 0.3 * jnp.ones(3), (20_000,)) + 1e-9 for key in keys)
  old, new = (x / x.sum(axis=-1, keepdims=True) for x in (old, new))
  actual, delta = kl_directions.kl(new, old), kl_directions.kl(old, new)
  bounds = kl_directions.new_old_bounds(delta, old.min(axis=-1))
  for name, bound in bounds._asdict().items():
    assert np.all(actual <= bound * (1 + 1e-9) + 1e-12), name
  assert np.max(actual / bounds.sharp) > 0.7
  assert np.all(bounds.log <= bounds.linear)


@pytest.mark.parametrize("direction", kl_directions.DIRECTIONS)
@pytest.mark.parametrize(("p", "up"), [(1e-4, True), (0.5, False), (0.3, True)])
def test_farthest_move_is_on_the_edge_of_the_ball(direction, p, up):
  new = kl_directions.farthest(p, 0.05, direction, up=up)
  pair = jnp.array([new, 1 - new]), jnp.array([p, 1 - p])
  moved = kl_directions.kl(*(pair if direction == "kl_new_old" else pair[::-1]))
  np.testing.assert_allclose(moved, 0.05, rtol=1e-6)
  assert (new > p) == up


def test_both_directions_agree_to_second_order_and_differ_in_the_third():
  small, large = (
    kl_directions.second_order([0.5, 0.3, 0.2], [1.0, -2.0, 0.5], eps) for eps in (1e-3, 1.0)
  )
  for found in (small.old_new, small.new_old, small.third):
    np.testing.assert_allclose(found, 1.0, atol=3e-3)
  assert abs(large.old_new - large.new_old) > 0.1


def test_a_local_kl_sets_the_pace_and_not_the_end():
  found = kl_directions.pace()
  kls = np.array(found["kl"])
  assert np.all(np.diff(kls[:, :5]) < 0) and np.all(np.diff(kls[:, 5], axis=0) < 0)
  assert np.all(kls[1:, -1] < 1e-9)


def test_a_target_of_a_late_rollout_is_the_value_of_one_policy_or_the_other():
  found = {name: np.asarray(x) for name, x in kl_directions.late_values().items()}
  np.testing.assert_allclose(found["exact"], found["value"], rtol=1e-9)
  np.testing.assert_allclose(found["gae"], found["value"][0], rtol=1e-9)
  assert abs(found["value"][-1] - found["gae"][-1]) > 0.1
  assert not np.allclose(found["capped"][1:], found["gae"][1:], rtol=1e-3)


@pytest.mark.parametrize("name", ["trpo_2015", "sason_verdu_2016", "dar_2026"])
def test_what_papers_say_of_the_directions_is_found(name):
  agrees, figure = papers.PAPERS[name].found(exact_studies())
  assert agrees and figure


def test_every_run_is_a_configuration_that_ppo_accepts():
  for changes in (*kl_directions.ANCHORS.values(), *kl_directions.PENALTIES.values()):
    ppo.Config(**changes)
  with pytest.raises(UserError, match="--epochs=1,0"):
    kl_directions.Config(epochs="1,0")


def test_page_is_made_of_figures_alone_and_escapes_names():
  def run(name, **more):
    keys = ("score/mean", "gold/mean", "kl/ref_exact", "kl/old_k3")
    names = ("score", "gold", "kl_ref_exact", "entropy")
    return {
      "name": name,
      "curves": {key: [0.0, 0.5, 1.0] for key in keys},
      **{f"{key}_after": 0.5 for key in names},
      **more,
    }

  results = {"beta": 0.5, **exact_studies()}
  results["anchors"] = [run(f"<{name}>") for name in kl_directions.ANCHORS]
  results["epochs"] = [
    run(f"{name}, {n} epochs", num_epochs=n, penalty=name)
    for n in (1, 4)
    for name in kl_directions.PENALTIES
  ]
  text = report(results)
  assert "<none>" not in text and "&lt;none&gt;" in text
  assert "<script" not in text and text.count("<svg") == 13
