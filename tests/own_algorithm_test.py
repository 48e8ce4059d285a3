"""Tests that an algorithm is changed where it is shown, by the example that README gives."""

import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoders import BAG, bag_params

from experiments import reinforce
from experiments.settings import training
from klrl.algorithm import Hypers, learner
from klrl.algorithm.terms import Experience
from klrl.errors import UserError
from klrl.run.summary import write_summary
from klrl.sampling import Rollout

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {"batch_size": 4, "kl_placement": "none", "kl_every": 0, "learning_rate": 0.1}
SCORES = jnp.array([1.0, 0.0, 0.0, 1.0])


def changed_source() -> str:
  """Returns experiments/reinforce.py with the change that README shows."""
  (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
  source = (ROOT / "experiments/reinforce.py").read_text("utf-8")
  before, after = (
    "".join(f"{line[1:]}\n" for line in block.splitlines() if line[0] == sign) for sign in "-+"
  )
  assert source.count(before) == 1, "README changes lines that experiments/reinforce.py has not"
  return source.replace(before, after)


def advantages(module):
  mask, zeros = jnp.ones((4, 2), bool), jnp.zeros((4, 2))
  algorithm = module.Config(**SETTINGS).algorithm()
  return algorithm.advantage(
    Experience(SCORES, zeros, zeros, mask, 0.0), algorithm, Hypers()
  ).advantages[:, 0]


def trained(module):
  """Returns the policy after one update on completions of one token."""
  params, config = bag_params(7, seed=0), module.Config(**SETTINGS)
  state = learner.init_state(
    config.algorithm(), config.hypers(), {"policy": params}, jax.random.key(0)
  )
  tokens, mask, zeros = jnp.arange(8).reshape(4, 2) % 7, jnp.ones((4, 1), bool), jnp.zeros((4, 1))
  rollout = Rollout(tokens, mask, mask, mask[:, 0], zeros, zeros)
  update = jax.jit(learner.make_update_fn(config.algorithm(), BAG, None, BAG))
  state, _ = update(state, {"reference": params, "base": {}}, rollout, SCORES)
  return state.params["policy"]


def test_the_change_that_readme_shows_makes_another_algorithm_that_trains():
  own = types.ModuleType("own")
  own.__dict__["__name__"] = "experiments.own"  # dataclasses look the module up
  exec(compile(changed_source(), "own.py", "exec"), own.__dict__)
  np.testing.assert_allclose(advantages(reinforce), np.array([2, -2, -2, 2]) / 3, rtol=1e-6)
  np.testing.assert_allclose(advantages(own), np.array([2, 0, 0, 2]) / 3, rtol=1e-6)
  start, usual, changed = bag_params(7, seed=0), trained(reinforce), trained(own)
  for other in (start, usual):
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), changed, other)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-3


def test_a_copy_has_a_folder_of_its_own_and_no_old_run_is_shown_after_an_edit(
  tmp_path, monkeypatch
):
  def finished(config, workdir, *_, **__):
    return write_summary(workdir, {}, config.num_iterations)

  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(training.rlhf, "train_policy", finished)
  path = tmp_path / "own_copy.py"
  path.write_text(changed_source(), "utf-8")
  import own_copy  # pyright: ignore[reportMissingImports]

  try:
    config = own_copy.Config(task="tree")
    assert own_copy.main(config).name.startswith("own_copy-")
    own_copy.main(config)  # The same code again is shown.
    path.write_text(changed_source().replace("0.0)", "0.1)"), "utf-8")
    with pytest.raises(UserError, match=r"own_copy\.py is not what it was"):
      own_copy.main(config)
  finally:
    del sys.modules["own_copy"]
