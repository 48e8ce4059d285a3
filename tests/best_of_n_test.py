"""Best-of-n from a pool against brute force and enumeration; the page, runs and refusals."""

import itertools
import json

import jax
import numpy as np
import pytest

from experiments import best_of_n, sft
from experiments.lab import best_of_n_page
from klrl import inputs, judging
from klrl.errors import UserError
from klrl.exact import bandits
from klrl.models import save_policy, save_scalar, scalar_params_from
from klrl.tasks import arithmetic

POOLS = {
  "all different": np.array([0.3, -1.0, 2.0, 0.5, 0.1]),
  "two ties": np.array([1.0, 0.0, 1.0, 0.0, 0.5]),
  "all alike": np.zeros(5),
}


def by_hand(scores, n):
  """Returns the chance of each draw to be the best of n drawn without replacement."""
  chances, subsets = np.zeros(len(scores)), list(itertools.combinations(range(len(scores)), n))
  for subset in subsets:
    best = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
    chances[best] += 1 / len(best) / len(subsets)
  return chances


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_weights_of_a_pool_are_those_of_all_its_subsets(name, n):
  scores = POOLS[name]
  weights = best_of_n.pool_weights(scores, n)
  assert weights @ scores == pytest.approx(by_hand(scores, n) @ scores, abs=1e-12)
  for score in set(scores):
    tied = scores == score
    assert weights[tied].sum() == pytest.approx(by_hand(scores, n)[tied].sum(), abs=1e-12)
    assert np.ptp(weights[tied]) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_win_rate_is_that_of_all_splits_of_the_pool(name, n):
  scores, wins = POOLS[name], []
  for subset in itertools.combinations(range(5), n):
    best = max(scores[i] for i in subset)
    others = [scores[i] for i in range(5) if i not in subset]
    wins += [(best > x) + (best == x) / 2 for x in others]
  assert best_of_n.win_rate(scores, n) == pytest.approx(np.mean(wins), abs=1e-12)
  if name == "all different":
    assert best_of_n.win_rate(scores, n) == pytest.approx(n / (n + 1), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_estimate_has_no_bias(n):
  """Over all pools of four that a policy with three choices draws, two of the same score."""
  probs, scores = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.0])
  gold = np.array([0.2, 0.9, 0.1])
  mean = 0.0
  for pool in itertools.product(range(3), repeat=4):
    pool = list(pool)
    mean += probs[pool].prod() * (best_of_n.pool_weights(scores[pool], n) @ gold[pool])
  with jax.enable_x64(True):
    exact = bandits.best_of_n(probs, scores, float(n)) @ gold
  assert mean == pytest.approx(float(exact), abs=1e-12)


def test_figures_of_pools_do_not_depend_on_the_order_of_draws_or_prompts():
  rng = np.random.default_rng(0)
  scores = rng.integers(4, size=(6, 9)).astype(float)
  gold = rng.random((6, 9))
  rows, columns = rng.permutation(6), rng.permutation(9)
  found = best_of_n.best_of_pool(scores, gold, 3)
  moved = best_of_n.best_of_pool(scores[rows][:, columns], gold[rows][:, columns], 3)
  assert found == pytest.approx(moved, rel=1e-9)
  assert 0 < found["kl"] < found["kl_bound"] == pytest.approx(np.log(3) - 2 / 3, rel=1e-6)
  assert best_of_n.best_of_pool(scores, None, 3)["gold"] is None
  one = best_of_n.best_of_pool(scores, gold, 1)
  assert one["gold"] == pytest.approx(gold.mean()) and one["kl"] == pytest.approx(0, abs=1e-12)


def test_the_kl_of_a_large_pool_tends_to_the_bound_where_nothing_ties():
  scores = np.random.default_rng(0).normal(size=(2, 1000))
  found = best_of_n.best_of_pool(scores, None, 4)
  assert found["kl"] == pytest.approx(0.636294, abs=2e-3)


def test_the_best_policies_of_a_pool_with_two_scores():
  scores, gold = np.array([[0.0, 1.0], [5.0, 5.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
  found = best_of_n.frontier_of_pool(scores, gold, 64)
  p = 1 / (1 + np.exp(-1 / best_of_n.BETAS))
  kl = (p * np.log(2 * p) + (1 - p) * np.log(np.maximum(2 * (1 - p), 1e-300))) / 2
  np.testing.assert_allclose(found["kl"], kl, atol=1e-12)
  np.testing.assert_allclose(found["score"], (p + 5) / 2, atol=1e-12)
  np.testing.assert_allclose(found["gold"], (p + 0.5) / 2, atol=1e-12)
  near = best_of_n.frontier_of_pool(scores, None, 2)
  assert near["gold"] is None
  assert 0.17 < near["kl"][-1] < np.log(2) - 0.5 < max(found["kl"])
  assert near["kl"] == found["kl"][: len(near["kl"])]


def test_af14_four_choices():
  first, four = best_of_n.bandit_figures([1, 4])
  assert four["probs"] == pytest.approx([0.0256, 0.2145, 0.416, 0.3439], abs=1e-9)
  assert four["kl"] == pytest.approx(0.587114, abs=1e-6)
  assert four["kl_bound"] == pytest.approx(0.636294, abs=1e-6)
  assert four["score"] == pytest.approx(2.0782, abs=1e-9) and four["score"] < four["best_score"]
  assert first["score"] == first["best_score"] == pytest.approx(1.0)
  # BOND's reward leads to best-of-n; the quantile alone does so only where nothing ties.
  assert four["tv_reward"] < 1e-6 and first["tv_quantile"] < 1e-12 < 0.05 < four["tv_quantile"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Directories of a tiny policy and a reward model of random parameters, and the models."""
  directory, tokenizer = tmp_path_factory.mktemp("models"), arithmetic.make_tokenizer()
  config, params = sft.fresh_decoder(sft.Config(width=8, num_layers=1), tokenizer)
  # So that it ends soon now and then, and completions come up twice.
  params = jax.tree.map(lambda x: x, params)
  params["decoder"]["embed"]["embedding"] *= 20
  scalar = scalar_params_from(params)
  scalar["head"] = jax.random.normal(jax.random.key(1), scalar["head"].shape)
  save_policy(directory / "policy", config, params, tokenizer)
  save_scalar(directory / "reward", config, scalar, tokenizer)
  directories = {"policy": str(directory / "policy"), "reward_model": str(directory / "reward")}
  return directory, inputs.load_models(best_of_n.Config().rl_config().sources(), **directories)


def test_a_pool_agrees_with_all_completions_of_its_problems(models):
  _, models = models
  config = best_of_n.Config(n="1,3,8", completions_per_prompt=600, max_completion_len=3)
  task = inputs.load_task(config.rl_config().sources(), models)
  prompts = best_of_n.first_prompts(task.held_out, 4)
  assert best_of_n.enumerable(models, task)
  scores, gold = best_of_n.draw_pool(config, models, task, prompts)
  assert scores.shape == gold.shape == (4, 600)
  # What is drawn for a prompt, and its score, do not depend on what other prompts there are.
  alone, _ = best_of_n.draw_pool(config, models, task, best_of_n.first_prompts(prompts, 1))
  np.testing.assert_allclose(alone[0], scores[0], rtol=1e-4, atol=1e-5)
  exact = best_of_n.exact_figures(config, models, prompts, task.max_completion_len)
  assert exact["num_completions"] == 14 * (14 * 15 + 1) + 1 and exact["num_problems"] == 4
  for i, n in enumerate(config.sizes):
    row = best_of_n.best_of_pool(scores, gold, n)
    spread = (best_of_n.pool_weights(scores, n) * (scores - row["score"]) ** 2).sum(axis=1).mean()
    error = np.sqrt(n * spread / scores.size)
    assert abs(row["score"] - exact["best_of_n"]["score"][i]) < 5 * error
    assert row["kl"] == pytest.approx(exact["best_of_n"]["kl"][i], abs=0.1)
    # At most the bound, and no policy of this KL has more.
    kl, score = (exact["best_of_n"][name][i] for name in ("kl", "score"))
    assert kl <= exact["kl_bounds"][i] + 1e-6
    assert score <= best_of_n_page.best_score_at(exact, kl) + 1e-3
  assert exact["best_of_n"]["kl"][0] == pytest.approx(0, abs=1e-6)
  drawn = best_of_n.frontier_of_pool(scores, gold, 8)
  for name, tolerance in (("score", 0.15 * scores.std()), ("gold", 0.05)):
    expected = np.interp(drawn["kl"], exact["frontier"]["kl"], exact["frontier"][name])
    np.testing.assert_allclose(drawn[name], expected, atol=tolerance)
  assert exact["frontier"]["kl"][0] == pytest.approx(0, abs=1e-9)
  assert exact["frontier"]["score"][0] == pytest.approx(exact["best_of_n"]["score"][0], abs=1e-6)


@pytest.mark.parametrize(
  ("settings", "at_once"),
  [({"policy": "p"}, 512), ({"eval_batch_size": 20}, 20), ({"eval_batch_size": 7}, 7)],
)
def test_a_pool_is_drawn_in_parts_on_the_mesh_that_is_given(settings, at_once, models, monkeypatch):
  _, models = models
  own = {} if "policy" not in settings else {"prompts": "p.jsonl", "reward": "r.py:f"}
  config = best_of_n.Config(
    n="1", completions_per_prompt=10, max_completion_len=3, mesh="fsdp=2", **own, **settings
  )
  task = inputs.load_task(best_of_n.Config(max_completion_len=3).rl_config().sources(), models)
  make_programs, seen = judging.make_judge_programs, set()

  def make(mesh, *more):
    programs = make_programs(mesh, *more)

    def sample(params, prompts, *rest, **named):
      seen.add((len(prompts), mesh.shape["fsdp"], mesh.shape["data"]))
      return programs.sample(params, prompts, *rest, **named)

    return programs._replace(sample=sample)

  monkeypatch.setattr(judging, "make_judge_programs", make)
  scores, _ = best_of_n.draw_pool(config, models, task, best_of_n.first_prompts(task.held_out, 4))
  assert scores.shape == (4, 10) and seen == {(at_once, 2, 1)}


@pytest.fixture
def own(models, tmp_path):
  """Settings of a run on prompts and with a reward of one's own."""
  directory, _ = models
  with (tmp_path / "prompts.jsonl").open("w") as file:
    for record in arithmetic.prompt_records(held_out=False)[:40]:
      file.write(json.dumps(record) + "\n")
  (tmp_path / "reward.py").write_text(
    "def sevens(prompts, completions, **columns):\n  return [x.count('7') for x in completions]\n"
  )
  return {
    "n": "1,2",
    "completions_per_prompt": 8,
    "policy": str(directory / "policy"),
    "prompts": str(tmp_path / "prompts.jsonl"),
    "reward": f"{tmp_path / 'reward.py'}:sevens",
    "max_completion_len": 3,
    "workdir": str(tmp_path / "run"),
  }


def finished_run(directory, **figures):
  """Returns the folder of a run with this summary."""
  directory.mkdir()
  found = {"score_before": 0.1, "score_after": 0.5, "gold_after": None, "kl_ref_exact": 0.3}
  found |= {"kl_ref_exact_stderr": 0.01, "score_after_stderr": 0.05, **figures}
  (directory / "summary.json").write_text(json.dumps(found))
  return str(directory)


def test_own_prompts_and_reward_beside_a_run_and_not_drawn_twice(own, tmp_path, capsys):
  compare = finished_run(tmp_path / "<i>ppo")
  config = best_of_n.Config(**own, compare=compare)
  workdir = best_of_n.main(config)
  results = json.loads((workdir / "best_of_n.json").read_text())
  assert results["exact"] is None and results["num_prompts"] == 4
  assert [row["n"] for row in results["rows"]] == [1, 2]
  assert results["rows"][1]["score"] > results["rows"][0]["score"]
  assert results["compared"][0]["kl"] == 0.3
  text = (workdir / "report.html").read_text()
  assert "&lt;i&gt;ppo" in text and "<i>ppo" not in text and "<script" not in text
  assert text.count("<svg") == 1
  before = (workdir / "best_of_n.json").stat().st_mtime_ns
  best_of_n.main(config)
  assert "finished before" in capsys.readouterr().out
  assert (workdir / "best_of_n.json").stat().st_mtime_ns == before


def test_the_page_says_where_the_gold_score_turns():
  def row(n, gold):
    figures = {"n": n, "kl_bound": 0.1 * n, "kl": 0.1 * n, "score": 0.1 * n, "gold": gold}
    return figures | {"win_rate": 0.5} | {f"{x}_stderr": 0.01 for x in ("kl", "score", "gold")}

  results = {"num_prompts": 2, "completions_per_prompt": 8, "compared": [], "exact": None}
  results |= {"bandit": best_of_n.bandit_figures([2])}
  turning = results | {"rows": [row(1, 0.5), row(2, 0.8), row(4, 0.6)]}
  rising = results | {"rows": [row(1, 0.5), row(2, 0.6), row(4, 0.8)]}
  assert "highest at n = 2 with 80.0 ± 1.0%" in best_of_n_page.verdict(turning)
  assert "highest at" not in best_of_n_page.verdict(rising)
  assert best_of_n_page.report(turning).count("<svg") == 2
  assert best_of_n_page.best_of_n_at(turning["rows"], 0.3, "gold") == pytest.approx(0.7)
  assert best_of_n_page.best_of_n_at(turning["rows"], 0.5, "gold") is None
  assert best_of_n_page.pool_table(turning["rows"])["gold"][1] == "80.0 ± 1.0%"
  assert "gold" not in best_of_n_page.pool_table([row(1, None)])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"n": "1,0"}, "--n=1,0"),
    ({"n": "one"}, "--n=one"),
    ({"n": ""}, "--n="),
    ({"n": "8", "completions_per_prompt": 8}, "a pool of more than 8"),
    ({"policy": "somewhere"}, "needs prompts: --prompts=FILE.jsonl, and something to score with"),
    ({"prompts": "file"}, "--prompts of yours need a model of yours"),
    ({"reward": "f.py:f", "reward_model": "d"}, "give one of them"),
    ({"policy": "p", "sft_iterations": 3}, "--sft_iterations is set"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    best_of_n.Config(**settings)


def test_what_cannot_be_compared_is_refused(own, tmp_path):
  for figures in ({"score_after": None}, {"kl_ref_exact": None}):
    directory = finished_run(tmp_path / next(iter(figures)), **figures)
    with pytest.raises(UserError, match="no finished run with a score"):
      best_of_n.main(best_of_n.Config(**own, compare=directory))
  with pytest.raises(UserError, match="no finished run with a score"):
    best_of_n.main(best_of_n.Config(**own, compare=str(tmp_path / "nowhere")))
  assert not (tmp_path / "run").exists()
