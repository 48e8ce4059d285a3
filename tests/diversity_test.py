"""Tests of experiments.diversity; a run with all its stages is made by hand."""

import numpy as np
import pytest

from experiments import diversity, sweep
from experiments.lab import diversity_page, papers
from klrl.errors import UserError
from klrl.tasks import tree

LANGUAGE = diversity.Language(
  np.log([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 0.5, 1.0, 0.9]), np.array([2, 3])
)


@pytest.fixture(scope="module")
def found():
  return diversity.enumerated(diversity.Config(k=4, num_steps=300, gain=0.7), LANGUAGE)


def test_every_divergence_has_the_same_score_at_its_beta_and_training_ends_there(found):
  for name, x in found["divergences"].items():
    assert x["best"]["score"] == pytest.approx(found["score"], abs=2e-3), name
    if name != diversity.NONE:
      assert x["path"]["score"][-1] == pytest.approx(found["score"], abs=0.02), name
      assert x["path"]["found_k"][-1] == pytest.approx(x["best"]["found_k"], abs=0.02), name
  start = found["divergences"]["forward"]["path"]
  assert start["kl"][0] == pytest.approx(0, abs=1e-6) and start["entropy"][0] > 1.2


def test_the_reverse_kl_has_the_least_kl_of_all_at_equal_score(found):
  kls = {name: x["best"]["kl"] for name, x in found["divergences"].items()}
  assert min(kls, key=kls.get) == "reverse"


def test_figures_count_the_modes_among_draws():
  figures = diversity.figures_of(LANGUAGE, np.array([0.0, 0.0, 0.75, 0.25]), 2)
  assert figures["found_1"] == pytest.approx(0.5)
  assert figures["found_k"] == pytest.approx((1 - 0.25**2 + 1 - 0.75**2) / 2)
  assert figures["entropy"] == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def test_a_figure_is_read_where_another_first_reaches_a_value():
  assert diversity.at(0.5, [0.0, 1.0, 0.2], [10.0, 20.0, 99.0]) == pytest.approx(15.0)
  assert diversity.at(2.0, [0.0, 1.0], [10.0, 20.0]) == 20.0
  assert diversity.at(-1.0, [0.0, 1.0], [10.0, 20.0]) == 10.0


def test_the_modes_of_the_tree_are_four_and_the_best_completion_is_one_of_them():
  modes, scores = tree.modes(), tree.completion_scores()
  assert len(set(modes)) == 4 and scores.argmax() in modes


def results(found):
  figures = {"gold": 0.8, "entropy": 0.4, "kl": 0.2, "pass_at_4": 0.95}
  curves = {key: [0.1] * 7 for key in ("gold/mean", "policy/entropy")}
  runs = [{"beta": beta, "curves": curves, **figures} for beta in (0.1, 1.0)]
  names = diversity.DIVERGENCES
  arithmetic = {"start": figures, "gold": 0.8}
  arithmetic |= {"members": dict.fromkeys(names, runs), "equal": dict.fromkeys(names, figures)}
  languages = {"tree": found, "two words": found}
  return {"k": 4, "gain": 0.7, "languages": languages, "arithmetic": arithmetic}


def test_the_page_is_made_of_the_figures_alone(found):
  text = diversity_page.report(results(found))
  assert text.count("<svg") == 6 and "<script" not in text
  assert "none, stopped there" in text and "pass@4" in text
  diversity_page.show(results(found))
  assert papers.PAPERS["dph_rl_2025"].found(results(found)).figure


def test_grpo_takes_every_divergence():
  config = sweep.config_class("grpo")(
    sweep=f"kl_divergence={','.join(diversity.DIVERGENCES)}",
    kl_estimator="exact",
    kl_correction="none",
  )
  assert len(sweep.members_of(config)) == len(diversity.DIVERGENCES)


@pytest.mark.parametrize("betas", ["0.1,0", "0.1,", "x"])
def test_betas_must_be_positive(betas):
  with pytest.raises(UserError, match=f"--betas={betas}: give positive numbers"):
    diversity.Config(betas=betas)
