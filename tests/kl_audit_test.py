"""The audit against the facts, its claims against enumeration, and the page that shows both."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kl_audit
from experiments.lab import kl_audit_page, kl_figures, kl_peers, kl_peers_summary, papers
from klrl.algorithm import objective
from klrl.algorithm.kl_terms import TokenTerms
from klrl.algorithm.objective import KLPenalty
from klrl.exact import oracle
from klrl.run.workdir import find_workdir

FACTS = pathlib.Path(__file__).parents[2] / "shared" / "facts" / "kl_facts.json"
TUNIX = "Tunix GRPO, kl_loss_mode="
VERL = "verl use_kl_loss, kl_loss_type="
ALPACA = "AlpacaFarm max(k1, 0) in the reward"
IN_ADVANCE = "verl use_kl_in_reward, kl_penalty="


@pytest.fixture(scope="module")
def facts():
  if not FACTS.exists():
    pytest.skip("needs shared/facts/kl_facts.json beside the checkout")
  return json.loads(FACTS.read_text())


@pytest.fixture(scope="module")
def audit():
  return json.loads(json.dumps(kl_audit.make_audit(kl_audit.Config(num_trees=4))))


@pytest.fixture(scope="module")
def rows(audit):
  return {row["name"]: row for group in ("penalties", "peers") for row in audit[group]}


def _peer(name):
  (peer,) = [peer for peer in kl_peers.PEERS if f"{peer.project} {peer.setting}" == name]
  return peer


def test_every_claim_of_the_audit_is_what_enumeration_finds(audit):
  differing = [
    (row["name"], claim)
    for group in ("penalties", "refreshed")
    for row in audit[group]
    for claim in row["claims"]
    if not claim["agrees"]
  ]
  assert not differing
  assert audit["num_differing"] == 0
  assert audit["num_claims"] == 6 * len(objective.DEFINED) + len(audit["refreshed"])
  assert len(audit["penalties"]) == len(objective.DEFINED)


@pytest.mark.parametrize("name", papers.of("kl_audit"))
def test_what_is_said_of_papers_is_what_enumeration_finds(audit, name):
  agrees, figure = papers.PAPERS[name].found(audit)
  assert agrees == (name != "alpaca_farm_2023") and figure
  undefined = audit["undefined"]
  assert undefined["cells"] - undefined["without_meaning"] == len(objective.DEFINED)


def test_every_claim_of_other_divergences_is_what_enumeration_finds(audit):
  rows = audit["divergences"]
  assert [row["name"] for row in rows] == [str(x) for x in objective.DEFINED_OF_OTHERS]
  assert not [row["name"] for row in rows if not all(x["agrees"] for x in row["claims"])]
  assert all(row["on_policy"]["pull_of_kl"] for row in rows if row["verdict"] == "exact")


def test_of_completions_taken_as_one_choice_k2_has_the_gradient_and_off_policy_its_ratio(audit):
  found = {row["name"]: (row["on_policy"], row["off_policy"]) for row in audit["whole"]}
  exact = {
    name: tuple(figures["gradient"] == objective.SEQUENCE for figures in both)
    for name, both in found.items()
  }
  assert exact == {
    "k2 as a loss": (True, False),
    "k3 as a loss": (False, False),
    "k1 times the ratio": (True, True),
    "k2 times the stopped ratio": (True, True),
    "k3 times the ratio": (True, True),
    "k1 of the older policy times the ratio": (True, False),
  }


def test_af05_errors_cosines_and_variances_on_policy(facts, audit, rows):
  fact = facts["AF05"]["expected"]
  names = {
    "k1 reward-to-go": IN_ADVANCE + "kl",
    "k2 reward-to-go": "reward/k2/none/sequence",
    "k3 reward-to-go": "TRL PPO, kl_estimator=k3",
    "clamp(k1,0) reward-to-go": ALPACA,
    "RB full-vocab KL reward-to-go": "AlpacaFarm exact KL in the reward",
    "k1 loss (token sum)": VERL + "kl",
    "k2 loss (token sum)": VERL + "k3+",
    "k3 loss (token sum)": VERL + "low_var_kl",
    "RB full-vocab KL loss": "loss/exact/none/token",
    "k3 reward-to-go + k3 loss": "both/k3/none/sequence",
    "RB loss + future RB in reward": "both/exact/none/sequence",
    "k2 loss seq-mean (1/|y|)": TUNIX + "mse_kl",
    "k1 loss seq-mean (1/|y|)": TUNIX + "kl",
  }
  for fact_name, name in names.items():
    expected, found = fact["rows"][fact_name], rows[name]["on_policy"]
    assert found["error_sequence"] == pytest.approx(expected["rel_err"], abs=1e-5), name
    assert found["trace_covariance"] == pytest.approx(expected["trCov"], abs=1e-5), name
    if expected["cos"] is not None:
      assert found["cosine_sequence"] == pytest.approx(expected["cos"], abs=1e-5), name
  assert rows[VERL + "kl"]["on_policy"]["cosine_sequence"] is None
  # What only THEORY.md's table has.
  assert rows[IN_ADVANCE + "abs"]["on_policy"]["error_sequence"] == pytest.approx(1.943, abs=1e-3)
  assert rows[VERL + "abs"]["on_policy"]["error_sequence"] == pytest.approx(1.652, abs=1e-3)
  assert rows[ALPACA]["on_policy"]["value_bias_relative"] == pytest.approx(0.767, abs=1e-3)
  assert audit["tree"]["kl_pi_ref"] == pytest.approx(fact["KL"], abs=1e-9)
  assert audit["tree"]["kl_ref_pi"] == pytest.approx(fact["KL_fwd"], abs=1e-9)


def test_af06_errors_and_variances_on_an_older_policys_samples(facts, audit, rows):
  fact = facts["AF06"]["expected"]
  truncated = (
    "verl use_kl_in_reward, kl_penalty=kl, adv_estimator=rloo, rollout_is=sequence, threshold 2"
  )
  names = {
    "rho_1:t(diff)*k1_t": "loss/k1/prefix/sequence",
    "rho_1:t(diff)*k3_t": "loss/k3/prefix/sequence",
    "rho_1:t-1(diff)*RB_t": "loss/exact/prefix/sequence",
    "w_t(diff)*k3_t (DeepSeek-V3.2)": "TRL GRPO, use_bias_correction_kl=True",
    "sg(w_t)*k2_t": "OpenRLHF kl.use_loss, kl.estimator=k3, kl.unbiased_gradient",
    "no-IS k2_t loss": "NeMo-RL GRPO, reference_policy_kl_type=k3",
    "no-IS k3_t loss": "TRL GRPO, use_bias_correction_kl=False",
    "no-IS k1_t loss": VERL + "kl",
    "no-IS RB loss": "loss/exact/none/token",
    "stale k1 in reward * seq ratio": "TRL RLOO",
    "TIS min(W,2) k1": truncated,
  }
  for fact_name, name in names.items():
    expected, found = fact["rows"][fact_name], rows[name]["off_policy"]
    assert found["error_sequence"] == pytest.approx(expected["rel_err_seq"], abs=1e-5), name
    assert found["error_token"] == pytest.approx(expected["rel_err_token"], abs=1e-5), name
    assert found["trace_covariance"] == pytest.approx(expected["trCov"], abs=1e-5), name
  assert audit["tree"]["kl_pi_old"] == pytest.approx(fact["KL_pi_old"], abs=1e-9)
  # THEORY.md: the ratio of the whole sequence's mean, times k3.
  mean_ratio = rows["TRL GRPO, use_bias_correction_kl=True, importance_sampling_level=sequence"]
  assert mean_ratio["off_policy"]["error_sequence"] == pytest.approx(0.563, abs=1e-3)


@pytest.mark.parametrize(
  ("name", "own"),
  [
    (IN_ADVANCE + "kl", "reward/k1/none/sequence"),
    (IN_ADVANCE + "low_var_kl", "reward/k3/none/sequence"),
    ("OpenRLHF kl.estimator=k1 in the reward", "reward/k1/none/sequence"),
    ("NeMo-RL Reinforce++, use_kl_in_reward, k3", "reward/k3/none/token"),
    ("TRL GRPO, use_bias_correction_kl=True", "loss/k3/token/token"),
    ("NeMo-RL GRPO, k3, use_on_policy_kl_approximation", "loss/k3/token/token"),
    (VERL + "low_var_kl", "loss/k3/none/token"),
    ("AlpacaFarm exact KL in the reward", "reward/exact/none/sequence"),
  ],
)
def test_a_formula_that_is_a_penalty_of_klrl_has_its_figures(rows, name, own):
  for regime in ("on_policy", "off_policy"):
    for figure in ("error_sequence", "error_token", "trace_covariance", "value_bias"):
      expected = pytest.approx(rows[own][regime][figure], abs=1e-12)
      assert rows[name][regime][figure] == expected, (regime, figure)


def test_af08_k1_averaged_per_sequence_only_lengthens(facts, rows):
  assert rows[TUNIX + "kl"]["on_policy"]["gradient"] == kl_figures.LENGTH
  tree, policies, _ = kl_figures.tree_a()
  lengths = tree.mask.sum(axis=-1)
  with jax.enable_x64(True):
    logits = jnp.asarray(policies.logits[0])
    inverse = oracle.expected_score(tree, logits, 1.0 / lengths)
    mean = oracle.expected_length(tree, logits)
  expected = facts["AF08"]["expected"]
  assert float(inverse) == pytest.approx(expected["E_inv_len"], abs=1e-6)
  assert float(mean) == pytest.approx(expected["E_len"], abs=1e-6)


def test_af10_ends_on_the_bandit(facts, rows):
  fact = facts["AF10"]["expected"]
  expected = {
    ALPACA: fact["clamp"],
    VERL + "kl": fact["onehot"],
    TUNIX + "kl": fact["onehot"],
    "AlpacaFarm exact KL in the reward": fact["onehot"],
    VERL + "low_var_kl": fact["k3_loss"],
    TUNIX + "low_var_kl": fact["k3_loss"],
    IN_ADVANCE + "kl": facts["AF09"]["expected"]["pi"],
    VERL + "mse": facts["AF09"]["expected"]["pi"],
    "TRL GRPO, use_bias_correction_kl=True": facts["AF09"]["expected"]["pi"],
  }
  for name, probs in expected.items():
    distance = np.abs(np.array(rows[name]["end_at_horizon_1"]["probs"]) - probs).sum() / 2
    assert distance < 1e-4, name
  assert rows[ALPACA]["end_at_horizon_1"]["leads_to"] == kl_figures.CUT


def test_af12_objective_at_the_end_on_the_tree(facts, rows):
  fact = facts["AF12"]["expected"]
  for name, key, tolerance in (
    (IN_ADVANCE + "kl", "k1_reward", 1e-5),
    (VERL + "mse", "k2_token_loss", 1e-5),
    ("loss/exact/none/token", "rb_token_loss", 1e-5),
    (VERL + "low_var_kl", "k3_token_loss", 1e-5),
    (TUNIX + "mse_kl", "k2_loss_seqmean", 1e-3),
    ("AlpacaFarm exact KL in the reward", "rb_in_reward", 1e-3),
  ):
    assert rows[name]["end"]["objective"] == pytest.approx(fact[key], abs=tolerance), name
  assert max(rows["AlpacaFarm exact KL in the reward"]["end"]["probs"]) > 0.999
  # AF11: what the right penalty reaches is the optimum.
  assert rows[IN_ADVANCE + "kl"]["end"]["distance_to_optimum"] < 1e-9
  assert facts["AF11"]["expected"]["KL"] == pytest.approx(
    rows[IN_ADVANCE + "kl"]["end"]["kl"], abs=1e-6
  )


def test_af04_gradients_on_a_choice(facts):
  inputs, expected = facts["AF04"]["inputs"], facts["AF04"]["expected"]
  tree = oracle.make_tree(4, 1)
  names = (
    (VERL + "kl", "k1_loss"),
    (VERL + "mse", "k2_loss"),
    (VERL + "k3+", "k2_loss"),
    (IN_ADVANCE + "kl", "k1_reward"),
    (VERL + "low_var_kl", "k3_loss"),
    (IN_ADVANCE + "low_var_kl", "k3_reward"),
    (ALPACA, "clamp_reward"),
  )

  @jax.jit
  def gradients(logits, ref):
    return [oracle.expected_gradient(tree, _peer(name).surrogate, logits, ref) for name, _ in names]

  with jax.enable_x64(True):
    found = gradients(*(jnp.log(jnp.asarray(inputs[x]))[None] for x in ("pi", "ref")))
  for (name, key), gradient in zip(names, found, strict=True):
    np.testing.assert_allclose(gradient[0], expected[key], atol=1e-6, err_msg=name)


def test_af07_the_reward_holds_the_kl_of_the_policy_that_drew(facts):
  pi, old = np.array([0.4, 0.3, 0.2, 0.1]), np.full(4, 0.25)
  with jax.enable_x64(True):
    logits, old_logits, ref = (jnp.log(jnp.asarray(x))[None] for x in (pi, old, pi[::-1]))
    found = oracle.expected_value(
      oracle.make_tree(4, 1),
      _peer(IN_ADVANCE + "kl").estimate,
      logits,
      ref,
      old_logits=old_logits,
      probs=jnp.asarray(pi),
    )
  assert float(found) == pytest.approx(facts["AF07"]["expected"]["lhs"], abs=1e-9)


def _terms(log_ratio, padding=0.0):
  """One completion of two tokens at `log_ratio` to the reference, and one token of padding."""
  log_probs = jnp.array([[-1.0, -1.0, padding]])
  ref = log_probs - jnp.array([[log_ratio, log_ratio, padding]])
  mask = jnp.array([[True, True, False]])
  kl = jnp.array([[0.3, 0.3, padding]])
  return TokenTerms(log_probs, log_probs - 0.1, ref, mask, kl, kl)


def _value_and_gradient(f, terms):
  def total(log_probs):
    return f(terms._replace(log_probs=log_probs)).sum()

  value, gradient = jax.value_and_grad(total)(terms.log_probs)
  return float(value), np.asarray(gradient[0])


def test_a_clamped_k3_has_no_gradient_far_from_the_reference():
  near, far = _terms(-2.5), _terms(-2.7)  # exp(2.6) - 1 - 2.6 is just below 10
  name = VERL + "low_var_kl"
  value, gradient = _value_and_gradient(_peer(name).surrogate, near)
  np.testing.assert_allclose(value, 2 * (np.exp(2.5) - 3.5), rtol=1e-5)
  np.testing.assert_allclose(gradient, [1 - np.exp(2.5)] * 2 + [0], rtol=1e-5)
  value, gradient = _value_and_gradient(_peer(name).surrogate, far)
  assert value == 20.0
  np.testing.assert_array_equal(gradient, 0.0)
  for nemo in ("GRPO, reference_policy_kl_type=k3", "GRPO, k3, use_on_policy_kl_approximation"):
    _, gradient = _value_and_gradient(_peer(f"NeMo-RL {nemo}").surrogate, far)
    np.testing.assert_array_equal(gradient, 0.0)
  # With the gradient of k2, the clamp is on the value alone.
  value, gradient = _value_and_gradient(_peer(VERL + "k3+").surrogate, far)
  np.testing.assert_allclose(value, 20.0, rtol=1e-5)
  np.testing.assert_allclose(gradient, [-2.7, -2.7, 0.0], rtol=1e-5)


@pytest.mark.parametrize("peer", kl_peers.PEERS, ids=lambda peer: f"{peer.project} {peer.setting}")
def test_padding_of_a_peer_reaches_neither_value_nor_gradient(peer):
  expected = _value_and_gradient(peer.surrogate, _terms(0.4))
  found = _value_and_gradient(peer.surrogate, _terms(0.4, padding=jnp.nan))
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_array_equal(found[1], expected[1])
  assert not peer.estimate(_terms(0.4, padding=jnp.nan))[0, 2]


def test_a_wrong_claim_is_marked(audit, monkeypatch):
  penalty = KLPenalty("loss", "k3", "none", "token")
  wrong = (objective.TOKEN, objective.NO_DIVERGENCE, True, False)
  monkeypatch.setitem(objective._ROWS, penalty, wrong)
  row = next(row for row in audit["penalties"] if row["name"] == str(penalty))
  claims = kl_audit.claims_beside(row)
  assert [claim["what"] for claim in claims if not claim["agrees"]] == [
    "verdict",
    "gradient",
    "end at horizon 1",
  ]
  changed = [row | {"claims": claims} if x is row else x for x in audit["penalties"]]
  page = kl_audit_page.audit_page(audit | {"penalties": changed, "num_differing": 3})
  assert "claimed token KL(π‖ref), found token KL(ref‖π)" in page
  assert "3 of" in page
  unchanged = kl_audit_page.audit_page(audit)
  assert "differs:" not in unchanged
  assert f"All {audit['num_claims']} claims" in unchanged


def test_the_page_escapes_and_shows_every_row(audit):
  peers = [audit["peers"][0] | {"setting": "<script>x</script>", "source": "a & b"}]
  page = kl_audit_page.audit_page(audit | {"peers": peers + audit["peers"][1:]})
  assert "<script" not in page
  assert "&lt;script&gt;" in page
  assert "a &amp; b" in page
  for row in (*audit["penalties"], *audit["refreshed"], *audit["capped"]):
    assert row["name"] in page
  assert page.count("<svg") == 2


def test_behaviours_gather_what_is_the_same(audit):
  kept = kl_audit_page.behaviours(audit)
  first = kept[0]
  assert first["verdict"] == "exact"
  assert {row["name"] for row in first["own"]} == {
    str(penalty)
    for penalty in objective.DEFINED
    if objective.audit(penalty).gradient == objective.SEQUENCE
  }
  assert len({b["letter"] for b in kept}) == len(kept)
  # Tunix's default and AlpacaFarm's do what no penalty of klrl does.
  assert [b["defaults"][0]["project"] for b in kept if not b["own"]] == ["Tunix", "AlpacaFarm"]


def test_main_writes_once_and_shows_the_finished_result(audit, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(kl_audit, "make_audit", lambda config: audit)
  config = kl_audit.Config(num_trees=4)
  workdir = kl_audit.main(config, root=str(tmp_path))
  written = json.loads((workdir / "audit.json").read_text())
  assert {name: written[name] for name in audit} == audit
  assert written["num_differing"] == 0 and written["versions"]["jax"]
  assert (workdir / "report.html").read_text().startswith("<!doctype html>")
  capsys.readouterr()
  monkeypatch.setattr(kl_audit, "make_audit", None)
  assert kl_audit.main(config, root=str(tmp_path)) == workdir
  assert "differ from what was found: 0 of" in capsys.readouterr().out
  other = dataclasses.replace(config, beta=1.0)
  assert find_workdir("kl_audit", other, root=str(tmp_path)) != workdir


def test_the_table_in_the_readme_is_what_the_audit_finds(audit, tmp_path):
  readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
  block = readme.split("<!-- peers table -->\n")[1].split("<!-- end -->")[0]
  assert block == kl_peers_summary.table(audit), (
    "Copy peers.md of `python -m experiments.kl_audit`."
  )
  kl_peers_summary.write_picture(audit, tmp_path / "peers.png")
  assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_every_default_of_the_projects_in_the_readme_has_a_row(audit):
  rows = kl_peers_summary.rows(audit)
  settings = {(framework, setting.split(", ")[0]) for framework, setting, _ in rows}
  for peer in kl_peers.PEERS:
    if peer.project in kl_peers_summary.PROJECTS and peer.status in ("default", "default if on"):
      assert (peer.project, peer.setting.split(", ")[0]) in settings
