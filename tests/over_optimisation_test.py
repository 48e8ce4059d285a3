"""Tests of experiments.over_optimisation; a run with all its stages is made by hand."""

import numpy as np
import pytest

from experiments import over_optimisation
from experiments.lab import over_optimisation_page, papers
from klrl.errors import UserError
from klrl.exact import bandits


@pytest.mark.parametrize(("name", "peak"), [("best_of_n", 1.0), ("rl", np.exp(1) ** 2)])
def test_a_law_is_found_with_its_peak_and_an_interval_around_it(name, peak):
  rng = np.random.default_rng(0)
  kl = np.linspace(0.0, 4.0, 30)
  exact = np.asarray(bandits.GOLD_LAWS[name].score(np.sqrt(kl), 0.5, 0.25), float)
  samples = [(kl, exact), *((kl, exact + 0.02 * rng.standard_normal(30)) for _ in range(40))]
  found = over_optimisation.law(name, samples)
  for key, expected in (("alpha", 0.5), ("slope", 0.25), ("peak_kl", peak)):
    middle, least, most = found[key]
    assert middle == pytest.approx(expected, rel=1e-5) and least < expected < most
  assert found["peaks"] == 1.0


def test_a_law_that_never_turns_has_no_peak():
  kl = np.linspace(0.0, 4.0, 9)
  found = over_optimisation.law("best_of_n", [(kl, np.sqrt(kl) + 0.1 * kl)] * 3)
  assert found["peak_kl"] is None and found["peaks"] == 0.0
  assert found["slope"] == pytest.approx([-0.1] * 3)


@pytest.fixture(scope="module")
def tails():
  return over_optimisation.tails(0, 2048)


def test_gold_is_the_root_of_the_kl_where_score_and_error_are_normal(tails):
  normal = tails["errors"]["normal"]["best"]
  near = np.array(normal["kl"]) < 1.5
  expected = np.sqrt(np.array(normal["kl"]))[near]
  np.testing.assert_allclose(np.array(normal["gold"])[near], expected, atol=0.15)


def test_with_a_heavy_tail_reward_rises_at_once_and_gold_does_not(tails):
  results = {"tails": tails}
  light, *_, heavy = over_optimisation.ERRORS
  at_kl = over_optimisation_page.at_kl
  assert at_kl(results, heavy, "score", 0.1) > 2 * at_kl(results, light, "score", 0.1)
  assert at_kl(results, heavy, "gold", 1.0) < at_kl(results, light, "gold", 1.0) / 2
  best_of_n = tails["errors"][heavy]["best_of_n"]
  assert max(best_of_n["gold"]) > best_of_n["gold"][-1] + 0.1


def results(tails):
  law = {"alpha": [0.5, 0.4, 0.6], "slope": [0.2, 0.1, 0.3], "peak_kl": [1.0, 0.5, 2.0], "peaks": 1}
  kl, rising, falling = [0.0, 0.5, 2.0], [0.5, 0.7, 0.9], [0.5, 0.8, 0.4]

  def model(width, gold):
    return {
      "width": width,
      "preferences": 1000,
      "accuracy": 0.9,
      "rl": {"kl": [kl, kl], "score": [gold, gold], "gold": [gold, gold], "law": law},
      "best_of_n": {"n": [1, 2, 4], "kl": kl, "score": gold, "gold": gold, "law": law},
    }

  models = [model(16, falling), model(64, rising)]
  return {"models": models, "tails": tails}


def test_the_page_is_made_of_the_figures_alone(tails):
  found = results(tails)
  found["models"][1]["rl"]["law"] = found["models"][1]["rl"]["law"] | {"peak_kl": None}
  text = over_optimisation_page.report(found)
  assert text.count("<svg") == 4 and "<script" not in text
  assert "Of 2 reward models gold falls again under 1 as best-of-n goes on, and under 1" in text
  assert "0.5 (0.4 to 0.6)" in text and "none" in text
  over_optimisation_page.show(found)


@pytest.mark.parametrize("name", papers.of("over_optimisation"))
def test_what_papers_say_of_over_optimisation_is_found(name, tails):
  agrees, figure = papers.PAPERS[name].found(results(tails))
  assert agrees and figure


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"widths": "16,20"}, "--widths=16,20: give multiples of 8"),
    ({"preferences": "1"}, "--preferences=1: give integers from 2 on"),
    ({"n": "1,999"}, "--n=1,999 needs a pool of more than 999"),
    ({"num_prompts": 1}, "--num_prompts=1"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    over_optimisation.Config(**settings)
