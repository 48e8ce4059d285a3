"""What a run says of itself where it went wrong: once, with figures, and with what to change."""

import json

import numpy as np
import pytest

from klrl.run import metrics, symptoms


def records_of(scores, kls=None, *, beta=0.5, **figures):
  kls = np.zeros(len(scores)) if kls is None else kls
  return [
    {"iteration": i, "score/mean": float(x), "kl/ref_k1": float(kl), "controller/beta": beta}
    | {name.replace("__", "/"): values[i] for name, values in figures.items()}
    for i, (x, kl) in enumerate(zip(scores, kls, strict=True))
  ]


def noise(seed, n=80):
  return np.random.default_rng(seed).normal(size=n)


def test_noise_alone_is_no_fall_of_the_objective():
  found = [symptoms.falling_objective(records_of(noise(seed))) for seed in range(400)]
  assert sum(map(bool, found)) <= 8  # 2% at most


def test_a_fall_beyond_the_noise_is_told_with_its_figures():
  text = symptoms.falling_objective(records_of(np.linspace(2, -1, 80) + 0.1 * noise(0)))
  assert text.startswith("The objective, the score less 0.5 times the KL to the reference, fell")
  assert "in the first 8 iterations" in text and "in the last 8." in text
  assert "--learning_rate" in text
  assert not symptoms.falling_objective(records_of(np.linspace(-1, 2, 80) + 0.1 * noise(0)))


def test_a_kl_that_costs_more_than_the_score_gains_is_a_fall_too():
  scores, kls = np.linspace(0, 1, 80), np.linspace(0, 10, 80)
  assert symptoms.falling_objective(records_of(scores, kls))
  assert not symptoms.falling_objective(records_of(scores, kls, beta=0.01))


def test_a_beta_that_rises_is_no_fall():
  scores, kls = np.linspace(0, 1, 80), np.full(80, 5.0)
  assert not symptoms.falling_objective(records_of(scores, kls, controller__beta=[*range(80)]))


def test_where_the_kl_is_not_always_measured_the_score_is_the_objective():
  records = records_of(np.linspace(1, 0, 80), np.full(80, 5.0))
  for record in records[1::2]:
    record["kl/ref_k1"] = None
  assert "The objective, the score, fell" in symptoms.falling_objective(records)


@pytest.mark.parametrize(
  "records",
  [
    [],
    records_of(np.linspace(1, 0, 9)),
    [{"iteration": i} for i in range(50)],
    [{"iteration": i, "score/mean": None, "kl/ref_k1": "x"} for i in range(50)],
  ],
)
def test_too_little_is_no_fall(records):
  assert symptoms.falling_objective(records) == ""


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ([0.2, 1.0, None, 0.3], ""),
    ([0.2, 1.5, 0.3, 0.1], "In iteration 2 the steps took the policy far"),
    (
      [0.2, 1.5, 3.25, 0.1],
      "In 2 of 4 measured iterations, first in iteration 2, the steps took the policy far",
    ),
    (
      [1.25, None, 2.25, None],
      "In 2 of 2 measured iterations, first in iteration 1, the steps took the policy far",
    ),
  ],
)
def test_a_step_beyond_a_nat_is_told_once_for_the_run(tmp_path, values, said):
  for record in records_of(np.zeros(4), kl__old_k1=values):
    metrics.append_line(tmp_path / "metrics.jsonl", json.loads(json.dumps(record)))
  far, fell = symptoms.of_run(tmp_path)
  assert fell == "" and bool(far) == bool(said) and said in far
  if said:
    assert f"{max(x or 0 for x in values):.3g} nats per sequence" in far
  assert symptoms.far_step(2, 1.5).startswith("In iteration 2 the steps took the policy far")
