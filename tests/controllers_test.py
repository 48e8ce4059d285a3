import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from klrl import ops

SCHEDULE = {"initial": 1.0, "final": 0.2, "num_iterations": 4}
# (rule, coefficients, measured KLs, beta after each, starting from 1)
CASES = {
  "fixed": (ops.fixed, {}, [0.0, 100.0], [1, 1]),
  # Halved below 4, doubled above 9, else kept; both bounds belong to the middle.
  "doubling": (ops.doubling, {"target_kl": 6.0}, [3.9, 4.0, 9.0, 9.1, 9.1], [0.5, 0.5, 0.5, 1, 2]),
  # Errors 1 -> .2, -.1, -1 -> -.2, times 5/10.
  "proportional": (
    ops.proportional,
    {"target_kl": 10.0, "num_samples": 5, "horizon": 10},
    [20.0, 9.0, 0.0],
    [1.1, 1.1 * 0.95, 1.1 * 0.95 * 0.9],
  ),
  # Leaves zero again.
  "dual_ascent": (
    ops.dual_ascent,
    {"target_kl": 5.0, "step_size": 0.2},
    [7.0, 0.0, 0.0, 6.0],
    [1.4, 0.4, 0, 0.2],
  ),
  "linear_schedule": (ops.linear_schedule, SCHEDULE, [0.0] * 5, [0.8, 0.6, 0.4, 0.2, 0.2]),
  # .6 + .4 cos(pi k / 4)
  "cosine_schedule": (
    ops.cosine_schedule,
    SCHEDULE,
    [0.0] * 5,
    [0.6 + 0.2 * np.sqrt(2), 0.6, 0.6 - 0.2 * np.sqrt(2), 0.2, 0.2],
  ),
}


def _start(beta=1.0):
  return ops.ControllerState(jnp.float32(beta), jnp.int32(0))


class ControllersTest(chex.TestCase):
  @parameterized.named_parameters((name, *case) for name, case in CASES.items())
  def test_golden(self, rule, coefficients, measured_kls, expected):
    names = list(coefficients)
    step = jax.jit(
      lambda state, kl, *values: rule(state, kl, **dict(zip(names, values, strict=True)))
    )
    state, betas = _start(), []
    for kl in measured_kls:
      state = step(state, jnp.float32(kl), *map(jnp.float32, coefficients.values()))
      betas.append(state.beta)
    np.testing.assert_allclose(betas, expected, rtol=1e-6, atol=1e-6)
    self.assertEqual(state.iteration, len(measured_kls))

  @parameterized.named_parameters((name, *case[:2]) for name, case in CASES.items())
  def test_the_state_keeps_its_types_and_can_be_scanned(self, rule, coefficients):
    step = lambda state, kl: (rule(state, kl, **coefficients), state.beta)  # noqa: E731
    state, _ = jax.lax.scan(step, _start(), jnp.ones(3))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, _start())

  @parameterized.named_parameters((name, *case[:2]) for name, case in CASES.items())
  def test_members_of_a_sweep_move_on_their_own(self, rule, coefficients):
    betas, kls = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.0, 6.0, 50.0])
    states = ops.ControllerState(betas, jnp.zeros(3, jnp.int32))
    swept = jax.vmap(functools.partial(rule, **coefficients))(states, kls)
    for index, (beta, kl) in enumerate(zip(betas, kls, strict=True)):
      alone = rule(_start(beta), kl, **coefficients)
      np.testing.assert_allclose(swept.beta[index], alone.beta, rtol=1e-6)

  def test_no_rule_leaves_its_bounds_and_each_comes_back_at_once(self):
    bounds = {"minimum": 0.01, "maximum": 50.0}
    rules = {
      "doubling": functools.partial(ops.doubling, target_kl=6.0, **bounds),
      # A horizon this short takes more than all of beta in one step.
      "proportional": functools.partial(
        ops.proportional, target_kl=6.0, num_samples=128, horizon=10.0, **bounds
      ),
      "proportional, slow": functools.partial(
        ops.proportional, target_kl=6.0, num_samples=128, horizon=200.0, **bounds
      ),
      "dual_ascent": functools.partial(
        ops.dual_ascent, target_kl=6.0, step_size=1.0, maximum=bounds["maximum"]
      ),
      "by default": functools.partial(ops.doubling, target_kl=6.0),
    }
    for name, rule in rules.items():
      lowest = {"dual_ascent": 0.0, "by default": 1e-4}.get(name, 0.01)
      highest = 1e4 if name == "by default" else 50.0
      step = jax.jit(lambda state, kl, rule=rule: (rule(state, kl), state.beta))
      for kl, bound, other in ((1e4, highest, 0.0), (0.0, lowest, 1e4)):
        state, betas = jax.lax.scan(step, _start(), jnp.full(3000, kl))
        self.assertEqual(state.beta, np.float32(bound), name)
        self.assertTrue((betas > 0).all() or name == "dual_ascent", name)
        held = functools.partial(ops.at_bound, minimum=lowest, maximum=highest)
        self.assertTrue(held(state), name)
        # Nothing was wound up: the first measurement on the other side takes it off the bound.
        back = rule(state, jnp.float32(other)).beta
        if name != "proportional":
          self.assertNotEqual(back, state.beta, name)
          self.assertEqual(held(state._replace(beta=back)), name == "dual_ascent" and kl == 0, name)

  def test_dual_ascent_finds_the_multiplier_of_a_budget(self):
    # Bandit ref * exp(r / beta): the KL at the beta that is found is the budget.
    ref, scores = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.arange(4.0)

    def step(state, _):
      policy = jax.nn.softmax(jnp.log(ref) + scores / state.beta)
      kl = (policy * jnp.log(policy / ref)).sum()
      return ops.dual_ascent(state, kl, target_kl=0.3, step_size=1.0), kl

    _, kls = jax.lax.scan(step, _start(2.0), length=400)
    np.testing.assert_allclose(kls[-1], 0.3, rtol=1e-4)


def _held(gain=4.0, *, at_once=True):
  """Returns 400 KLs, measured with noise, of a policy that an optimizer with momentum trains.

  It is ref * exp(x * scores), which a beta of 1 / x would lead to. Its steps have a largest size.
  """
  ref, scores = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.arange(4.0)

  def step(carry, noise):
    state, x, pace = carry
    kl = ops.exact_kl(jnp.log(ref) + x * scores, jnp.log(ref))
    answered = ops.budget(state, kl * (1 + 0.1 * noise), target_kl=0.3, gain=gain)
    beta = (answered if at_once else state).beta
    pace += (jnp.clip(1 - beta * x, -1.0, 1.0) - pace) / 5
    return (answered, jnp.maximum(x + 0.1 * pace, 0.0), pace), kl

  start = (ops.budget_state(0.5), jnp.float32(0.0), jnp.float32(0.0))
  return jax.lax.scan(step, start, jax.random.normal(jax.random.key(0), 400))[1]


def test_a_budget_is_held_where_the_policy_is_late_and_by_the_multiplier_alone_it_is_not():
  held, late, alone = (
    np.asarray(kls)[50:] / 0.3 for kls in (_held(), _held(at_once=False), _held(gain=0.0))
  )
  np.testing.assert_allclose(held[:50].mean(), 1.0, atol=0.05)
  np.testing.assert_allclose(held.mean(), 1.0, atol=0.02)
  assert held.std() < 0.12 < 2 * 0.12 < min(late.std(), alone.std())


def test_the_multiplier_of_a_budget_sums_up_the_errors_as_they_are():
  """So their mean over a window is small if the multiplier is where it was."""
  kls = 2.0 * jnp.array([1.0, 1.9, 0.4, 0.6, 1.5, 0.3])
  state = ops.budget_state(jnp.float32(1.0))
  last, _ = jax.lax.scan(lambda state, kl: (ops.budget(state, kl, target_kl=2.0), None), state, kls)
  expected = jnp.log(last.multiplier / state.multiplier) / (0.8 * len(kls))
  np.testing.assert_allclose(kls.mean() / 2.0 - 1, expected, atol=1e-6)


def test_a_budget_that_cannot_be_kept_or_does_not_bind_winds_nothing_up():
  start = ops.budget_state(jnp.float32(1.0))
  rule = functools.partial(ops.budget, target_kl=1.0, minimum=0.01, maximum=50.0)
  # The multiplier falls slowly until the budget is reached.
  np.testing.assert_allclose(rule(start, 0.0).multiplier, np.exp(-0.8 / 20), rtol=1e-6)
  np.testing.assert_allclose(rule(rule(start, 1.0), 0.0).multiplier, np.exp(-0.8), rtol=1e-6)
  for kl, bound in ((1e4, 50.0), (0.0, 0.01)):
    state, _ = jax.lax.scan(lambda state, kl: (rule(state, kl), None), start, jnp.full(500, kl))
    assert state.beta == state.multiplier == np.float32(bound)
    assert rule(state, 1.0).beta == state.beta == rule(state, jnp.nan).beta
    other = rule(state, 0.9 if kl else 1.1)
    assert 0.01 < other.multiplier < 50.0 and 0.01 < other.beta < 50.0


@pytest.mark.parametrize("measured", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
  "rule",
  [
    lambda state, kl: ops.doubling(state, kl, target_kl=1.0),
    lambda state, kl: ops.proportional(state, kl, target_kl=1.0, num_samples=8, horizon=100.0),
    lambda state, kl: ops.dual_ascent(state, kl, target_kl=1.0, step_size=0.1),
  ],
)
def test_a_measurement_that_is_no_number_leaves_beta_one(rule, measured):
  state = rule(ops.ControllerState(jnp.float32(0.5), jnp.int32(0)), jnp.float32(measured))
  assert 0 <= float(state.beta) < float("inf")
  if measured != measured:
    assert float(state.beta) == 0.5


if __name__ == "__main__":
  absltest.main()
