"""The noise of KL gradients: what is exact on trees, and a decoder's against single gradients."""

import json

import jax
import numpy as np
import pytest

from experiments import kl_variance, sft
from experiments.lab import kl_variance_page, papers
from klrl import ops
from klrl.algorithm import kl_terms
from klrl.errors import UserError
from klrl.models import save_policy
from klrl.tasks import arithmetic


@pytest.fixture(scope="module")
def tree():
  return kl_variance.on_trees(3, 0)


def test_the_ratio_of_the_prefix_is_exact_on_and_off_policy_and_the_exact_kl_has_least_noise(tree):
  off = tree["off_policy"]
  exact = [name for name in off if "/prefix/" in name]
  assert len(exact) == 3
  for regime in ("on_policy", "off_policy"):
    found = tree[regime]
    assert all(found[name]["error"] < 1e-9 for name in exact)
    assert found["loss/k3/token/token"]["error"] > 0.1
    noise = {name: found[name]["completions"] for name in exact}
    assert min(noise, key=noise.get) == "loss/exact/prefix/sequence"
    assert max(noise, key=noise.get) == "loss/k1/prefix/sequence"
  others = [name for name in off if name.endswith("/none/sequence")]
  assert all(tree["on_policy"][name]["error"] < 1e-9 for name in others)
  assert all(off[name]["error"] > 0.05 for name in others)


def test_the_two_ways_to_the_exact_gradient_are_one_on_policy(tree):
  both, prefix = (
    tree["on_policy"][name]["completions"]
    for name in ("both/exact/none/sequence", "loss/exact/prefix/sequence")
  )
  np.testing.assert_allclose(both, prefix, rtol=1e-9)


def test_the_kl_of_a_prefix_as_a_baseline_leaves_the_gradient_and_not_the_variance(tree):
  decoder = {name: {"completions": 3.0} for name in kl_variance.BASELINES}
  k1, centred = (tree["on_policy"][name] for name in kl_variance.BASELINES)
  np.testing.assert_allclose(k1["error"], centred["error"], rtol=1e-9)
  assert centred["completions"] > k1["completions"]
  results = {"trees": [tree], "decoder": {"on_policy": decoder}}
  agrees, figure = papers.PAPERS["vopd_2026"].found(results)
  assert not agrees and "less for 2 of 32 policies" in figure
  tree = tree | {"baseline": {"variance": 0.9, "less": 32, "policies": 32}}
  decoder[kl_variance.BASELINES[1]] = {"completions": 2.0}
  assert papers.PAPERS["vopd_2026"].found(results | {"trees": [tree]}).agrees


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """Settings of a run with tiny models of one's own."""
  folder, tokenizer = tmp_path_factory.mktemp("own"), arithmetic.make_tokenizer()
  for seed, name in enumerate(("policy", "reference")):
    config, params = sft.fresh_decoder(sft.Config(width=8, num_layers=1, init_seed=seed), tokenizer)
    save_policy(folder / name, config, params, tokenizer)
  records = arithmetic.prompt_records(held_out=True)[:30]
  prompts = "".join(json.dumps(record) + "\n" for record in records)
  (folder / "prompts.jsonl").write_text(prompts)
  return {
    "policy": str(folder / "policy"),
    "reference": str(folder / "reference"),
    "prompts": str(folder / "prompts.jsonl"),
    "max_completion_len": 2,
    "num_completions": 32,
    "workdir": str(folder / "run"),
  }


def test_a_decoder_has_the_noise_of_its_single_gradients(own, monkeypatch):
  penalties = {"loss/exact/prefix/sequence", "loss/k1/prefix/sequence"}
  chosen = {name: x for name, x in kl_variance.PENALTIES.items() if name in penalties}
  monkeypatch.setattr(kl_variance, "PENALTIES", chosen)
  caught = []
  noise = kl_variance._noise

  def spy(*arguments):
    caught.append((arguments, noise(*arguments)))
    return caught[-1][1]

  monkeypatch.setattr(kl_variance, "_noise", spy)
  kl_variance.on_decoder(kl_variance.Config(**own), "runs")
  (evaluate, params, old_params, ref_params, rollout), found = caught[1]
  assert old_params is not params

  @jax.jit
  def gradients(params):
    """Returns {penalty: [N, P]}, one row for each completion."""

    def losses(params):
      x = evaluate(params, ref_params, rollout, temperature=1.0)
      terms = kl_terms.TokenTerms(
        x.log_probs, rollout.old_log_probs, x.ref_log_probs, rollout.completion_mask, x.kl_exact
      )
      return {
        name: ops.zero_padding(kl_terms.surrogate(penalty)(terms), terms.mask).sum(axis=1)
        for name, penalty in chosen.items()
      }

    return jax.tree.map(lambda x: x.reshape(len(x), -1), jax.jacrev(losses)(params))

  for name, by_leaf in gradients(params).items():
    each = np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(by_leaf)], axis=1)
    trace = each.var(axis=0, ddof=1).sum()
    if name == "loss/exact/prefix/sequence":
      products = each @ each.T
      signal = (products.sum() - np.trace(products)) / (len(each) * (len(each) - 1))
    np.testing.assert_allclose(found[name]["completions"] * signal, trace, rtol=1e-3)


def test_a_run_leaves_figures_and_a_page_and_needs_models_in_pairs(own, tree, monkeypatch):
  monkeypatch.setattr(kl_variance, "on_trees", lambda horizon, seed: {**tree, "horizon": horizon})
  decoder = {name: {"completions": 3.0} for name in kl_variance.PENALTIES}
  both = {"on_policy": decoder, "off_policy": decoder, "num_completions": 32, "tokens": 2}
  monkeypatch.setattr(kl_variance, "on_decoder", lambda config, root: both)
  workdir = kl_variance.main(kl_variance.Config(**own))
  results = json.loads((workdir / "kl_variance.json").read_text())
  page = (workdir / "report.html").read_text()
  assert page == kl_variance_page.report(results) and page.count("<svg") == 2
  with pytest.raises(UserError, match="both --policy and --reference"):
    kl_variance.Config(policy="somewhere")
  with pytest.raises(UserError, match="needs --prompts"):
    kl_variance.Config(policy="somewhere", reference="elsewhere")
