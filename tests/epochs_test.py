"""Tests of the order in which the inner epochs read a rollout, and of whose prompts it has."""

import jax
import numpy as np
import pytest

from klrl import programs
from klrl.algorithm import Algorithm, epochs


def test_every_epoch_reads_each_row_once_in_an_order_of_its_own():
  algorithm = Algorithm(batch_size=24, num_iterations=1, num_epochs=3, num_minibatches=4)
  rows = epochs.minibatch_rows(algorithm, 24, 1, jax.random.key(0))
  assert rows.shape == (12, 6)
  orders = rows.reshape(3, 24)
  np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(24), (3, 1)))
  in_turn = np.arange(24)
  different = [
    *orders,
    epochs.minibatch_rows(algorithm, 24, 1, jax.random.key(1)).reshape(3, 24)[0],
  ]
  for i, order in enumerate(different):
    assert not np.array_equal(order, in_turn)
    assert not any(np.array_equal(order, other) for other in different[:i])


@pytest.mark.parametrize(("num_parts", "together"), [(1, 3), (2, 3), (3, 1)])
def test_each_part_of_a_minibatch_keeps_groups_together(num_parts, together):
  algorithm = Algorithm(
    batch_size=24, num_iterations=1, group_size=3, num_epochs=2, num_minibatches=2
  )
  rows = np.asarray(epochs.minibatch_rows(algorithm, 24, num_parts, jax.random.key(0)))
  assert rows.shape == (4, 12)
  assert (np.sort(rows.reshape(2, 24)) == np.arange(24)).all()
  # As `gradients_of` takes parts.
  parts = rows.reshape(4, -1, num_parts).swapaxes(1, 2)
  first = parts.reshape(-1, together)[:, :1]
  np.testing.assert_array_equal(parts.reshape(-1, together), first + np.arange(together))
  assert (first % together == 0).all() and not np.array_equal(first, np.sort(first, axis=0))


def test_the_completions_of_a_prompt_stand_side_by_side():
  algorithm = Algorithm(batch_size=12, num_iterations=1, group_size=4, oversampling=2)
  groups = programs.prompt_rows(algorithm, 0, 50, seed=0).reshape(-1, 4)
  assert (groups == groups[:, :1]).all()
  assert len(set(groups[:, 0].tolist())) == 6
  assert not np.array_equal(groups, programs.prompt_rows(algorithm, 1, 50, seed=0).reshape(-1, 4))
