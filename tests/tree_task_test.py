"""The tree: its scores by look-up and by enumeration, figures of known policies, whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import best_of_n, distill, grpo, reinforce, sweep
from klrl import inputs
from klrl.errors import UserError
from klrl.exact import bandits, oracle
from klrl.models import load_policy, policy_model
from klrl.tasks import tree

TREE, SCORES = tree.TREE, tree.completion_scores()


@pytest.fixture(scope="module")
def start():
  """Returns the policy as it starts, its parameters and its exact task."""
  config, params = tree.fresh_policy(0)
  policy = policy_model(config)
  return policy, params, tree.Exact(policy, policy, params)


def probs_of(policy, params):
  return np.exp(oracle.log_probs(TREE, oracle.decoder_logits(policy, params, TREE, [0])))


def test_scores_are_fixed_and_have_several_modes():
  assert len(SCORES) == 341
  np.testing.assert_allclose((SCORES.mean(), SCORES.std()), (0, 1), atol=1e-12)
  np.testing.assert_array_equal(SCORES, tree.completion_scores())
  assert not np.array_equal(SCORES, tree.completion_scores(1))
  assert len(set(SCORES)) == len(SCORES)
  distances = (TREE.tokens[:, None] != TREE.tokens[None]).sum(axis=-1)
  higher = (SCORES[None] > SCORES[:, None]) & (distances == 1)
  peaks = [i for i in np.argsort(-SCORES)[:20] if not higher[i].any()]
  assert len(peaks) >= 3


def test_every_completion_has_its_own_score_by_look_up(start):
  model, params = tree.scorer(start[0].config)
  # What is in the padding is no part of a completion.
  tokens = np.where(TREE.mask, TREE.tokens, 3)
  tokens = np.concatenate([np.zeros((341, 1), int), tokens], axis=1)
  mask = np.concatenate([np.ones((341, 1), bool), TREE.mask], axis=1)
  np.testing.assert_array_equal(model.scores(params, tokens, mask), SCORES.astype(np.float32))


def test_the_start_prefers_some_completions_and_depends_on_its_seed(start):
  policy, params, _ = start
  probs = probs_of(policy, params)
  assert probs.sum() == pytest.approx(1, abs=1e-5)
  assert 0.05 < probs.max() < 0.5
  assert not np.allclose(probs, probs_of(policy, tree.fresh_policy(1)[1]))


def test_the_start_has_gained_nothing(start):
  _, params, exact = start
  found = exact.figures(params, beta=0.5, temperature=1.0)
  assert found["exact_kl"] == 0
  assert found["objective_gap"] == pytest.approx(1, abs=1e-12)
  assert found["exact_score"] == pytest.approx(probs_of(*start[:2]) @ SCORES, abs=1e-5)


@pytest.mark.parametrize(
  ("beta", "temperature", "best_of"),
  [(0.3, 1.0, None), (1.0, 0.5, None), (0.0, 1.0, None), (1.0, 0.5, 4.0)],
)
def test_figures_are_those_of_the_definition(start, beta, temperature, best_of):
  """Another decoder as the policy; probabilities by softmax over whole completions."""
  policy, params, exact = start
  other = tree.fresh_policy(1)[1]
  found = exact.figures(other, beta=beta, temperature=temperature, best_of=best_of)

  # Compiled as a whole, as there: operation by operation float32 is rounded otherwise.
  logits_of = jax.jit(lambda params: oracle.decoder_logits(policy, params, TREE, [0]))

  def log_probs(params):
    logits = np.asarray(logits_of(params), float) / temperature
    with jax.enable_x64(True):
      return np.asarray(oracle.log_probs(TREE, jnp.asarray(logits)))

  log_ref, log_pi = log_probs(params), log_probs(other)
  ref, pi = np.exp(log_ref), np.exp(log_pi)
  rewards = SCORES
  if best_of:
    with jax.enable_x64(True):
      rewards = np.log(np.asarray(bandits.best_of_n(ref, SCORES, best_of))) - log_ref
    np.testing.assert_allclose((ref * np.exp(rewards)).sum(), 1.0)
  best = ref * np.exp(rewards / beta) if beta else np.eye(341)[SCORES.argmax()]
  best = best / best.sum()

  def objective(probs):
    log_ratio = np.log(np.where(probs > 0, probs, 1)) - np.where(probs > 0, log_ref, 0)
    return probs @ rewards - beta * (probs @ log_ratio)

  expected = {
    "exact_score": pi @ SCORES,
    "exact_kl": pi @ (log_pi - log_ref),
    "objective": objective(pi),
    "optimal_objective": objective(best),
    "objective_gap": (objective(best) - objective(pi)) / (objective(best) - objective(ref)),
    "tv_to_optimum": np.abs(pi - best).sum() / 2,
  }
  assert found == pytest.approx(expected, abs=1e-9)


def test_frontier_begins_at_the_reference_and_is_concave(start):
  _, params, exact = start
  found = exact.frontier(temperature=1.0)
  kls, scores = np.array(found["kl"]), np.array(found["score"])
  assert kls[0] == 0
  assert scores[0] == pytest.approx(exact.figures(params, beta=1.0, temperature=1.0)["exact_score"])
  slopes = np.diff(scores) / np.diff(kls)
  assert (np.diff(kls) > 0).all()
  assert (np.diff(slopes) < 0).all()
  assert scores[-1] == pytest.approx(SCORES.max(), abs=1e-3)


RUN = {"task": "tree", "num_iterations": 2, "batch_size": 32, "num_eval_rows": 16, "mesh": "data=1"}

BOND = {"advantage": "best_of_n", "best_of": 3.0, "beta": 2.0, "kl_placement": "reward"}
BOND |= {"kl_estimator": "k1", "kl_correction": "none", "kl_credit": "sequence"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_a_run_leaves_the_exact_figures_of_its_model(workplace):
  workdir = grpo.main(grpo.Config(**BOND, **RUN))
  summary = json.loads((workdir / "summary.json").read_text())
  model_config, params = load_policy(workdir / "model")
  reference = policy_model(model_config)
  exact = tree.Exact(reference, reference, tree.fresh_policy(0)[1])
  found = exact.figures(params, beta=2.0, temperature=1.0, best_of=3.0)
  assert {name: summary[name] for name in found} == pytest.approx(found, rel=1e-6)
  assert summary["exact_kl"] > 0
  assert summary["gold_after"] is None
  frontier = json.loads((workdir / "optimum.json").read_text())
  assert frontier == exact.frontier(temperature=1.0)


def test_a_schedule_is_held_against_the_beta_that_it_ends_with(workplace):
  config = sweep.config_class("reinforce")(
    controller="cosine", beta=2.0, sweep="beta_final=0.5,1", **RUN
  )
  html = (sweep.main(config) / "report.html").read_text()
  assert "best policies" in html
  values = {}
  for path in workplace.glob("runs/sweep-*/members/*"):
    summary = json.loads((path / "summary.json").read_text())
    values[path.name] = summary["optimal_objective"]
  exact = tree.Exact(*[policy_model(tree.fresh_policy(0)[0])] * 2, tree.fresh_policy(0)[1])
  for beta in (0.5, 1.0):
    found = exact.figures(tree.fresh_policy(0)[1], beta=beta, temperature=1.0)
    assert values[f"beta_final={beta:g},seed=0"] == pytest.approx(found["optimal_objective"])


@pytest.mark.parametrize(
  "given",
  [{"controller": "dual_ascent"}, {"reference_update": "ema"}, {"normalise_scores": True}],
)
def test_a_moving_objective_has_no_optimum(workplace, given):
  config = reinforce.Config(**RUN, **given)
  directory = str(tree.write_policy(workplace, 0))
  models = inputs.load_models(config.sources(), policy=directory, reward_model="")
  assert inputs.load_task(config.sources(), models).exact is None


def test_the_best_of_one_draw_gains_nothing_and_has_no_figures():
  known = [grpo.Config(**BOND | {"best_of": n}, **RUN).sources().enumerated for n in (1.0, 1.5)]
  assert known == [False, True]


@pytest.mark.parametrize(
  ("config", "given", "said"),
  [
    (reinforce.Config, {"policy": "DIR", "prompts": "FILE", "reward_model": "DIR"}, "--task"),
    (reinforce.Config, {"reward": "FILE.py:f"}, "--reward"),
    (reinforce.Config, {"max_completion_len": 3}, "--max_completion_len"),
    (reinforce.Config, {"sft_iterations": 3}, "--sft_iterations"),
    (best_of_n.Config, {"reward_model_iterations": 3}, "--reward_model_iterations"),
    (distill.Config, {}, "--task=tree"),
  ],
)
def test_what_the_tree_does_not_read_is_refused(config, given, said):
  with pytest.raises(UserError, match=said):
    config(task="tree", **given)
