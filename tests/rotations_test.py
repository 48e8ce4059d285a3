"""Rotations: what they keep, and what the ways to stretch them divide by."""

import jax.numpy as jnp
import numpy as np
import pytest

from klrl.models import rotations
from klrl.models.rotations import Rotation

HEAD_DIM = 8


def turned(x, position, rotation, row_len=10):
  """Returns the vector `x` [H] as it is at a position."""
  cos, sin = rotations.cos_sin(
    rotation, jnp.array([[position]]), head_dim=len(x), dtype="float32", row_len=row_len
  )
  return np.asarray(rotations.rotate(jnp.asarray(x, jnp.float32)[None, None, None], cos, sin))[
    0, 0, 0
  ]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_products_depend_on_the_distance_of_positions_alone(share):
  rotation = Rotation(theta=50.0, share=share)
  query, key = np.random.default_rng(0).normal(size=(2, HEAD_DIM))
  products = [turned(query, 5 + t, rotation) @ turned(key, 2 + t, rotation) for t in (0, 7, 90)]
  np.testing.assert_allclose(products, products[0], rtol=1e-4)
  assert abs(products[0] - query @ key) > 0.01
  np.testing.assert_allclose(turned(query, 0, rotation), query, rtol=1e-6)
  rest = rotation.rotated_dim(HEAD_DIM)
  np.testing.assert_array_equal(turned(query, 5, rotation)[rest:], np.float32(query[rest:]))


def test_divisors_slow_each_pair_and_an_amplitude_scales_it():
  x = np.array([1.0, 2.0, 0.0, 0.0])  # pairs (0, 2) and (1, 3)
  plain = Rotation(theta=100.0)  # frequencies 1 and 1/10
  np.testing.assert_allclose(
    turned(x, 3, plain), [np.cos(3), 2 * np.cos(0.3), np.sin(3), 2 * np.sin(0.3)], rtol=1e-5
  )
  slow = Rotation(theta=100.0, divisors=(3.0, 0.1), amplitude=1.5)
  expected = 1.5 * np.array([np.cos(1), 2 * np.cos(3), np.sin(1), 2 * np.sin(3)])
  np.testing.assert_allclose(turned(x, 3, slow), expected, rtol=1e-5)


def test_rows_longer_than_the_short_ones_are_divided_otherwise():
  x = np.array([1.0, 0.0])
  rotation = Rotation(divisors=(2.0,), long_divisors=(4.0,), short_len=10)
  np.testing.assert_allclose(turned(x, 4, rotation, 10), [np.cos(2), np.sin(2)], rtol=1e-5)
  np.testing.assert_allclose(turned(x, 4, rotation, 11), [np.cos(1), np.sin(1)], rtol=1e-5)


def test_llama3_divides_slow_pairs_by_the_factor_and_fast_ones_by_one():
  divisors = np.array(
    rotations.llama3_divisors(
      500000.0,
      64,
      factor=32.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
    )
  )
  turns = 8192 * 500000.0 ** (-np.arange(32) / 32) / (2 * np.pi)
  np.testing.assert_allclose(divisors[turns >= 4], 1.0)
  np.testing.assert_allclose(divisors[turns <= 1], 32.0)
  between = divisors[(turns > 1) & (turns < 4)]
  assert len(between) >= 2
  assert (np.diff(divisors) >= 0).all()
  assert (between > 1).all()
  assert (between < 32).all()


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_divides_slow_pairs_by_the_factor_and_fast_ones_by_one(truncate):
  divisors = np.array(
    rotations.yarn_divisors(
      1e6, 128, factor=4.0, original_max_position_embeddings=32768, truncate=truncate
    )
  )
  turns = 32768 * 1e6 ** (-np.arange(64) / 64) / (2 * np.pi)
  np.testing.assert_allclose(divisors[turns > 1.1 * 32], 1.0, rtol=2e-2)
  np.testing.assert_allclose(divisors[turns < 0.7], 4.0, rtol=2e-2)
  assert (np.diff(divisors) >= 0).all()
  assert divisors[0] == 1.0
  assert divisors[-1] == 4.0


def test_amplitudes_are_those_of_the_papers():
  assert rotations.yarn_amplitude(1.0) == 1.0
  assert rotations.yarn_amplitude(4.0) == pytest.approx(0.1 * np.log(4) + 1)
  assert rotations.yarn_amplitude(40.0, 1.0, 1.0) == 1.0
  assert rotations.yarn_amplitude(40.0, 1.0, 0.5) == pytest.approx(1.36889 / 1.18444, rel=1e-5)
  assert rotations.longrope_amplitude(0.5, 4096) == 1.0
  assert rotations.longrope_amplitude(32.0, 4096) == pytest.approx(np.sqrt(1 + 5 / 12))
