"""Estimators of the KL: published tables and counterexamples, tiny policies, and the page."""

import json

import jax
import numpy as np
import pytest

from experiments import estimators, sft
from experiments.lab import estimators_page, papers
from klrl.errors import UserError
from klrl.models import save_policy
from klrl.tasks import arithmetic

NUM_SAMPLES = 100_000


@pytest.fixture(scope="module")
def laboratory():
  """The figures that need no model, by title."""
  return estimators.laboratory_figures(0, num_samples=NUM_SAMPLES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Two directories with tiny random decoders of the embedded task, near each other."""
  directory, tokenizer = tmp_path_factory.mktemp("models"), arithmetic.make_tokenizer()
  config, reference = sft.fresh_decoder(sft.Config(width=8, num_layers=1), tokenizer)
  _, other = sft.fresh_decoder(sft.Config(width=8, num_layers=1, init_seed=1), tokenizer)
  for name, params in (("reference", reference), ("policy", other)):
    save_policy(directory / name, config, params, tokenizer)
  wider = sft.fresh_decoder(sft.Config(width=16, num_layers=1), tokenizer)
  save_policy(directory / "wider", *wider, tokenizer)
  return directory


@pytest.fixture(scope="module")
def settings(models):
  return {
    "policy": str(models / "policy"),
    "reference": str(models / "reference"),
    "completions_per_prompt": 4,
  }


def of_title(laboratory, title):
  (case,) = (case for case in laboratory["cases"] if case["title"] == title)
  return case


def over_true(case, name):
  x = case["estimators"][name]
  return (x["mean"] - case["true"]) / case["true"], x["std"] / case["true"]


# Facts AF01 and AF02, computed apart from this code.
@pytest.mark.parametrize(
  ("title", "true", "expected"),
  [
    (
      "Schulman, \u03bc = 0.1",
      0.005,
      {"k1": (0.0, 20.0), "k2": (0.0025, 1.417745), "k3": (0.0, 1.416575)},
    ),
    ("Schulman, \u03bc = 1", 0.5, {"k1": (0.0, 2.0), "k2": (0.25, 1.732051), "k3": (0.0, 1.69503)}),
  ],
)
def test_af01_af02_schulmans_tables(laboratory, title, true, expected):
  case = of_title(laboratory, title)
  assert case["true"] == pytest.approx(true, abs=1e-12)
  for name, figures in expected.items():
    assert over_true(case, name) == pytest.approx(figures, abs=1e-5), name
    x = case["estimators"][name]
    assert x["sample_mean"] == pytest.approx(x["mean"], abs=5 * x["std"] / np.sqrt(NUM_SAMPLES)), (
      name
    )
    assert x["sample_std"] == pytest.approx(x["std"], rel=0.02), name


def test_af03_categorical(laboratory):
  case = of_title(laboratory, "skewed")
  assert case["true"] == pytest.approx(0.3733860445374205, abs=1e-6)
  swapped = estimators.categorical("", (0.3, 0.3, 0.4), (0.7, 0.2, 0.1))
  assert swapped.true == pytest.approx(0.42196791876424444, abs=1e-6)
  for name, expected in (
    ("k1", (0.3733860445374205, 0.7669315634672538)),
    ("k2", (0.36380058064881343, 0.22700128236885792)),
    ("k3", (0.37338604453742064, 0.4195801770942292)),
    ("max(k1, 0)", (0.5931085022710425, 0.38828065813984863)),
  ):
    x = case["estimators"][name]
    assert (x["mean"], x["std"]) == pytest.approx(expected, abs=1e-6), name


def test_s1_k3_of_a_small_log_ratio_in_float32(laboratory):
  small = laboratory["float32"]
  assert small["true"] == pytest.approx(4.999833337496554e-09, rel=1e-9)
  assert small["ops"] == pytest.approx(4.999833337496554e-09, rel=0.01)
  assert small["textbook"] < 0


def test_s2_top_2_sampling_makes_the_mean_of_k1_negative(laboratory):
  truncated = laboratory["truncated"]
  assert truncated["true"] == pytest.approx(0.047468657715011756, abs=1e-6)
  assert truncated["k1"] == pytest.approx(-0.11395097299622162, abs=1e-6)
  assert truncated["k3"] == pytest.approx(0.011049027003778352, abs=1e-6)


def test_s3_heavy_tail_of_k3(laboratory):
  case = of_title(laboratory, "heavy tail")
  for name, std in (("k1", 0.512308), ("k2", 0.314582), ("k3", 19.912107)):
    assert case["estimators"][name]["std"] == pytest.approx(std, abs=1e-4), name
  # Var(u) = chi2(ref || pi), and u = 1 + k3 - k1.
  heavy = laboratory["heavy"]
  values = {name: np.array(x) for name, x in heavy["estimates"].items()}
  _, std = estimators.moments(np.array(heavy["probs"]), values["k3"] - values["k1"])
  assert std**2 == pytest.approx(400.1787, abs=1e-3)


def test_best_control_variate_of_the_mirrored_categorical(laboratory):
  case = of_title(laboratory, "mirrored")
  found = case["control_variate"]
  assert found["best_c"] == pytest.approx(0.7555, abs=5e-5)
  assert found["best_std"] / case["true"] == pytest.approx(0.8346, abs=5e-5)
  assert over_true(case, "k3")[1] == pytest.approx(1.0215, abs=5e-5)
  assert over_true(case, "k1")[1] == pytest.approx(2.0017, abs=5e-5)


def test_control_variate_keeps_the_mean_and_no_c_is_better(laboratory):
  for case, figures in zip(estimators.cases(), laboratory["cases"], strict=True):
    probs, values = case.points.probs, estimators.estimates(case.points)
    for c in (-1.0, 0.3, 2.0):
      mean, _ = estimators.moments(probs, estimators.with_control_variate(values, c))
      assert mean == pytest.approx(case.true, rel=1e-9)
    found = figures["control_variate"]
    assert min(found["stds"]) >= found["best_std"] * (1 - 1e-12)
    stds = dict(zip(np.round(found["c"], 6), found["stds"], strict=True))
    for c, name in ((0.0, "k1"), (1.0, "k3")):
      assert stds[c] == pytest.approx(figures["estimators"][name]["std"], rel=1e-9)


def test_running_means_end_at_the_mean_of_all_samples(laboratory):
  means = laboratory["heavy"]["running_means"]
  x = of_title(laboratory, "heavy tail")["estimators"]
  assert means["num"][-1] == NUM_SAMPLES
  for name in ("k1", "k2", "k3"):
    assert means[name][-1] == pytest.approx(x[name]["sample_mean"], rel=1e-9)


@pytest.fixture(scope="module")
def policies(models, settings):
  return estimators.measure_policies(
    estimators.Config(**settings), str(models / "policy"), str(models / "reference")
  )


@pytest.mark.parametrize("name", papers.of("estimators"))
def test_what_papers_say_of_estimators_is_found(laboratory, policies, name):
  agrees, figure = papers.PAPERS[name].found({**laboratory, "policies": policies})
  assert agrees and figure


def test_kl_grows_along_the_line(policies):
  kls = [policy["kl"] for policy in policies]
  assert [policy["step"] for policy in policies] == list(estimators.STEPS)
  assert 0 < kls[0] < kls[3] < kls[-1]
  # The KL is of second order in the step: between 0.1 and 0.2 it grows fourfold.
  assert kls[1] / kls[0] == pytest.approx(4, rel=0.3)


def test_k1_and_k3_agree_with_the_exact_kl(policies):
  for policy in policies:
    assert policy["num_completions"] == 4 * 250
    for name in ("k1", "k3"):
      x = policy["estimators"][name]
      assert abs(x["bias"]) < 5 * x["bias_stderr"]
      assert x["mean"] == pytest.approx(policy["kl"] + x["bias"], abs=1e-6)
      assert 0 < x["largest_share"] < 1


def test_exact_kl_has_the_least_spread_near_the_reference(policies):
  stds = {name: x["std"] for name, x in policies[0]["estimators"].items()}
  assert stds["exact"] < min(stds["k1"], stds["k2"], stds["k3"])
  assert policies[0]["estimators"]["exact"]["bias"] == 0
  # Near the reference the variance of k1 is twice the KL.
  assert stds["k1"] ** 2 == pytest.approx(2 * policies[0]["kl"], rel=0.25)


def test_another_seed_draws_other_completions(policies, models, settings, monkeypatch):
  monkeypatch.setattr(estimators, "STEPS", estimators.STEPS[:1])
  (other,) = estimators.measure_policies(
    estimators.Config(**settings, seed=1), str(models / "policy"), str(models / "reference")
  )
  assert other["kl"] != policies[0]["kl"]
  assert other["kl"] == pytest.approx(policies[0]["kl"], rel=0.1)


def test_padding_is_not_counted():
  rollout = type("Rollout", (), {"completion_mask": np.array([[True, False], [True, True]])})
  log_probs = np.array([[-1.0, np.nan], [-1.0, -2.0]])
  evaluated = type(
    "Evaluation",
    (),
    {
      "rollout": rollout,
      "log_probs": log_probs,
      "ref_log_probs": np.array([[-2.0, 5.0], [-2.0, -1.0]]),
      "kl_exact": np.array([[0.5, np.nan], [0.5, 1.5]]),
    },
  )
  found = estimators.sequence_figures(evaluated)
  assert found["kl"] == pytest.approx((0.5 + 2.0) / 2)
  assert found["estimators"]["k1"]["mean"] == pytest.approx((1.0 + 0.0) / 2)
  assert found["estimators"]["k2"]["mean"] == pytest.approx((0.5 + 1.0) / 2)


@pytest.fixture(scope="module")
def workdir(settings, tmp_path_factory):
  directory = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(estimators, "NUM_SAMPLES", 1000)
    return estimators.main(estimators.Config(**settings), root=str(directory))


def test_leaves_figures_and_a_page(workdir, policies):
  results = json.loads((workdir / "estimators.json").read_text())
  assert results["policies"] == policies  # the same seed, the same completions
  text = (workdir / "report.html").read_text()
  assert text.count("<svg") == 4 and "nan" not in text.lower()
  assert (workdir / "config.json").exists() and (workdir / "flags.txt").exists()


def test_a_finished_run_is_shown_and_not_run_again(workdir, settings, monkeypatch, capsys):
  before = [(workdir / name).read_bytes() for name in ("estimators.json", "report.html")]
  monkeypatch.setattr(estimators, "laboratory_figures", None)
  capsys.readouterr()
  estimators.main(estimators.Config(**settings), root=str(workdir.parent))
  output = capsys.readouterr().out
  assert "finished before" in output and "heavy tail" in output
  after = [(workdir / name).read_bytes() for name in ("estimators.json", "report.html")]
  assert before == after


def test_page_escapes_what_the_figures_hold(workdir):
  results = json.loads((workdir / "estimators.json").read_text())
  results["cases"][0]["title"] = results["truncated"]["name"] = "<script>&"
  text = estimators_page.report(results)
  assert "<script" not in text and "&lt;script&gt;&amp;" in text


def test_verdict_names_the_turn_only_where_there_is_one():
  def policy(kl, k1, k3):
    stds = {"k1": k1, "k2": 1.0, "k3": k3, "exact": 0.1}
    return {"kl": kl, "estimators": {name: {"std": std * kl} for name, std in stds.items()}}

  turning = [policy(0.1, 4, 1), policy(0.2, 3, 2), policy(0.4, 2, 5)]
  assert "k3 beats k1 up to a KL of 0.2 nats; from 0.4 on" in estimators_page.verdict(turning)
  for policies in (turning[:2], turning[2:], [*turning, policy(0.8, 3, 2)]):
    assert "beats" not in estimators_page.verdict(policies)


@pytest.mark.parametrize("one", ["policy", "reference"])
def test_one_model_alone_is_refused(one):
  with pytest.raises(UserError, match="go together"):
    estimators.Config(**{one: "somewhere"})


def test_models_of_different_shape_are_refused(models, settings, tmp_path):
  config = estimators.Config(**{**settings, "policy": str(models / "wider")})
  with pytest.raises(UserError, match="no straight line"):
    estimators.main(config, root=str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_without_models_the_embedded_run_is_used(monkeypatch):
  monkeypatch.setattr(estimators.ppo, "main", lambda config, root: f"{root}/ppo")
  monkeypatch.setattr(
    estimators.training, "model_directories", lambda config: {"policy": "sft", "reward_model": "r"}
  )
  assert estimators.model_directories(estimators.Config(), root="r") == ("r/ppo", "sft")


def test_line_runs_through_both_models():
  ends = {"w": np.zeros(2)}, {"w": np.ones(2)}
  for step in (0.0, 0.5, 1.0, 1.5):
    np.testing.assert_allclose(jax.tree.leaves(estimators.on_line(*ends, step))[0], step)
