"""DPO and IPO: where they lead on an enumerable population, what a pair counts, and whole runs."""

import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import dpo, sft
from experiments.lab import dpo_pairs
from experiments.lab.dpo_pairs import Pairs
from experiments.settings import training
from klrl.algorithm.gradients import scalar
from klrl.devices import parallel, unread
from klrl.errors import UserError
from klrl.exact import oracle
from klrl.models import (
  DecoderConfig,
  load_policy,
  policy_model,
  save_policy,
  save_scalar,
  scalar_params_from,
)
from klrl.tasks import arithmetic, data

CONFIG = DecoderConfig(
  vocab_size=4, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
  max_len=16, tie_embeddings=False,
)  # fmt: skip
POLICY = policy_model(CONFIG)
TREE = oracle.make_tree(4, 2, eos_id=0)  # 13 completions
PROMPT = jnp.array([1, 2])
SCORES = np.random.default_rng(0).normal(size=len(TREE.tokens))
BETA = 0.7


@pytest.fixture(scope="module")
def params():
  """Parameters of a decoder whose distribution is far from uniform."""
  params = POLICY.init(jax.random.key(0))
  return params | {"unembedding": 4 * params["unembedding"]}


def all_log_probs(params):
  return oracle.log_probs(TREE, oracle.decoder_logits(POLICY, params, TREE, PROMPT))


def population_loss(log_probs, ref_log_probs, scores, loss, beta):
  """The mean loss over pairs that the reference draws, with labels of the Bradley-Terry model."""
  ref = jnp.exp(ref_log_probs)
  weights = 2 * ref[:, None] * ref[None] * jax.nn.sigmoid(scores[:, None] - scores[None])
  chosen, rejected = jnp.meshgrid(*[jnp.arange(len(scores))] * 2, indexing="ij")
  x, y = log_probs, ref_log_probs
  losses = dpo.LOSSES[loss](x[chosen], x[rejected], y[chosen], y[rejected], beta=beta)
  return (weights * losses).sum()


def total_variation(log_probs, other):
  return np.abs(np.exp(log_probs) - np.exp(other)).sum() / 2


def train_on_population(params, loss, beta):
  """Returns the log-probs of the decoder that exact gradients of the population lead to."""
  ref, optimizer = all_log_probs(params), optax.adam(optax.cosine_decay_schedule(3e-3, 3000))

  @jax.jit
  def train(params):
    def step(_, state):
      gradients = jax.grad(
        lambda params: population_loss(all_log_probs(params), ref, SCORES, loss, beta)
      )(state[0])
      updates, moments = optimizer.update(gradients, state[1])
      return optax.apply_updates(state[0], updates), moments

    return all_log_probs(jax.lax.fori_loop(0, 3000, step, (params, optimizer.init(params)))[0])

  return train(params)


def optimum(params, scores, beta):
  ref_logits = oracle.decoder_logits(POLICY, params, TREE, PROMPT)
  return oracle.log_probs(TREE, oracle.optimal_policy(TREE, ref_logits, scores, beta=beta).logits)


def test_dpo_leads_the_decoder_to_the_optimum_of_rl(params):
  best = optimum(params, SCORES, BETA)
  assert total_variation(all_log_probs(params), best) > 0.2
  assert total_variation(train_on_population(params, "dpo", BETA), best) < 1e-3


def test_ipo_leads_the_decoder_to_the_optimum_for_win_rates_and_not_for_scores(params):
  ref = np.exp(all_log_probs(params))
  wins = jax.nn.sigmoid(SCORES[:, None] - SCORES) @ ref
  trained = train_on_population(params, "ipo", 0.2)
  assert total_variation(trained, optimum(params, wins, 0.2)) < 1e-3
  assert total_variation(trained, optimum(params, SCORES, 0.2)) > 0.1


@pytest.mark.parametrize(
  ("beta", "expected"),
  [(1.0, [0.325, 0.297, 0.240, 0.138]), (0.5, [0.254, 0.284, 0.277, 0.184])],
)
def test_ipo_on_four_choices(beta, expected):
  """ref * exp(p / beta) / Z by hand; where DPO's optimum is (.085, .173, .314, .427) at beta 1."""
  with jax.enable_x64(True):
    ref, scores = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), jnp.arange(4.0)
    gradient = jax.grad(lambda x: population_loss(jax.nn.log_softmax(x), ref, scores, "ipo", beta))
    logits = jax.lax.fori_loop(0, 2000, lambda _, x: x - 0.5 * gradient(x), ref)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=6e-4)


def pairs_of(rows, other_rows, ref=(0.0, 0.0)):
  """Returns the pairs of completions of the tree in these rows, right-padded."""
  chosen = np.stack([rows, other_rows], axis=1)
  prompt = np.broadcast_to(PROMPT, (*chosen.shape, len(PROMPT)))
  mask = TREE.mask[chosen]
  return Pairs(
    np.concatenate([prompt, TREE.tokens[chosen]], axis=-1).astype(np.int32),
    np.concatenate([np.ones_like(prompt, bool), mask], axis=-1),
    np.concatenate([np.zeros_like(prompt, bool), mask], axis=-1),
    np.broadcast_to(np.float32(ref), chosen.shape),
  )


BATCH = pairs_of([0, 3, 5, 12], [4, 1, 0, 7], ref=(-2.0, -2.5))


@pytest.fixture(scope="module")
def value_and_grad():
  """By loss: f(params, pairs, *, beta, label_smoothing) -> ((loss, metrics), gradient)."""
  return {
    loss: jax.jit(jax.value_and_grad(scalar(dpo.make_preference_fn(POLICY, loss)), has_aux=True))
    for loss in dpo.LOSSES
  }


def test_log_probs_are_those_of_whole_completions(params):
  found = dpo_pairs.completion_log_probs(POLICY, params, *BATCH[:3])
  expected = np.asarray(all_log_probs(params))[[[0, 4], [3, 1], [5, 0], [12, 7]]]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", dpo.LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss_and_figures_are_those_of_their_formulas(
  params, value_and_grad, loss, label_smoothing
):
  (value, metrics), _ = value_and_grad[loss](
    params, BATCH, beta=BETA, label_smoothing=label_smoothing
  )
  log_probs = np.asarray(all_log_probs(params), np.float64)
  chosen, rejected = log_probs[[0, 3, 5, 12]], log_probs[[4, 1, 0, 7]]
  margin = chosen - rejected - 0.5

  def losses(margin):
    return np.log1p(np.exp(-BETA * margin)) if loss == "dpo" else (margin - 1 / (2 * BETA)) ** 2

  expected = (1 - label_smoothing) * losses(margin) + label_smoothing * losses(-margin)
  means = {name: float(total / count) for name, (total, count) in metrics.items()}
  assert float(value) == pytest.approx(expected.mean(), rel=1e-5)
  assert means == pytest.approx(
    {
      f"loss/{loss}": expected.mean(),
      "preference/accuracy": (margin > 0).mean(),
      "preference/margin": BETA * margin.mean(),
      "preference/chosen_log_prob": chosen.mean(),
      "preference/rejected_log_prob": rejected.mean(),
    },
    rel=1e-4,
  )
  assert 0 < (margin > 0).mean() < 1


def test_at_the_reference_the_gradient_is_half_beta_of_each_log_prob(params, value_and_grad):
  at_reference = BATCH._replace(
    ref_log_probs=dpo_pairs.completion_log_probs(POLICY, params, *BATCH[:3])
  )
  (value, _), gradient = value_and_grad["dpo"](params, at_reference, beta=BETA, label_smoothing=0.0)
  expected = jax.grad(
    lambda params: (
      -BETA
      / 2
      * jnp.diff(-dpo_pairs.completion_log_probs(POLICY, params, *BATCH[:3]), axis=1).mean()
    )
  )(params)
  assert float(value) == pytest.approx(np.log(2), rel=1e-6)
  chex.assert_trees_all_close(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_the_reference_has_no_gradient(params, loss):
  loss_fn = scalar(dpo.make_preference_fn(POLICY, loss))

  def of_reference(ref_log_probs):
    pairs = BATCH._replace(ref_log_probs=ref_log_probs)
    return loss_fn(params, pairs, beta=BETA, label_smoothing=0.1)[0]

  value, gradient = jax.value_and_grad(of_reference)(jnp.asarray(BATCH.ref_log_probs))
  np.testing.assert_array_equal(gradient, np.zeros((4, 2)))
  assert value != of_reference(jnp.zeros((4, 2)))


def padded(pairs, left, right):
  def pad(x, value):
    return np.pad(x, ((0, 0), (0, 0), (left, right)), constant_values=value)

  tokens, mask, completion_mask = pairs[:3]
  return pairs._replace(
    tokens=pad(tokens, 3), mask=pad(mask, False), completion_mask=pad(completion_mask, False)
  )


@pytest.mark.parametrize("loss", dpo.LOSSES)
@pytest.mark.parametrize(
  "change",
  [lambda x: padded(x, 2, 1), lambda x: data.take(x, [2, 0, 3, 1])],
  ids=["padding on both sides", "another order"],
)
def test_padding_and_order_change_nothing(params, value_and_grad, loss, change):
  settings = {"beta": BETA, "label_smoothing": 0.1}
  (value, metrics), gradient = value_and_grad[loss](params, BATCH, **settings)
  (other_value, other_metrics), other = value_and_grad[loss](params, change(BATCH), **settings)
  np.testing.assert_allclose(value, other_value, rtol=1e-6)
  chex.assert_trees_all_close(metrics, other_metrics, rtol=1e-5)
  chex.assert_trees_all_close(gradient, other, atol=2e-6)


def test_drawn_pairs_differ_and_the_bradley_terry_model_labels_them():
  prompts = data.Prompts(np.full((3, 2), 7, np.int32), np.ones((3, 2), bool), [{}] * 3)

  def draw(tokens, mask, key):
    completions = jax.random.bernoulli(key, 0.5, (len(tokens), 1)).astype(np.int32)
    return types.SimpleNamespace(
      tokens=np.concatenate([tokens, completions], axis=1),
      prompt_mask=mask,
      completion_mask=np.ones((len(tokens), 1), bool),
    )

  tokens, mask, completion_mask = dpo_pairs.draw_pairs(
    prompts,
    draw,
    lambda rollout, texts, records: 2.0 * rollout.tokens[:, -1],
    num_pairs=5000,
    seed=0,
  )
  assert 2300 < len(tokens) < 2700 and mask.all()
  np.testing.assert_array_equal(completion_mask.any(axis=(0, 1)), [False, False, True])
  chosen, rejected = tokens[:, 0, -1], tokens[:, 1, -1]
  np.testing.assert_array_equal(chosen + rejected, np.ones(len(tokens)))
  assert chosen.mean() == pytest.approx(1 / (1 + np.exp(-2)), abs=0.04)


def test_chunks_are_all_alike_and_nothing_is_lost():
  seen = []

  def f(rows):
    seen.append(len(rows))
    return rows * 2, rows[:, None]

  doubled, column = parallel.in_chunks(f, 7, 3)
  np.testing.assert_array_equal(doubled, 2 * np.arange(7))
  assert column.shape == (7, 1) and seen == [3, 3, 3]


TINY = {
  "num_iterations": 3,
  "batch_size": 8,
  "num_eval_rows": 8,
  "num_samples": 2,
  "mesh": "data=1",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """Settings of a run with a model and pairs of one's own."""
  directory, tokenizer = tmp_path_factory.mktemp("own"), arithmetic.make_tokenizer()
  config, params = sft.fresh_decoder(sft.Config(width=8, num_layers=1), tokenizer)
  save_policy(directory / "policy", config, params, tokenizer)
  with (directory / "pairs.jsonl").open("w") as file:
    for prompt, chosen, rejected in arithmetic.preferences(0, 60, label_noise=0.0):
      record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
      file.write(json.dumps(record) + "\n")
  return {
    **TINY,
    "policy": str(directory / "policy"),
    "data": str(directory / "pairs.jsonl"),
    "max_completion_len": 3,
  }


def test_a_run_on_own_pairs_starts_at_the_reference_and_is_not_made_twice(own, tmp_path, capsys):
  config = dpo.Config(**own, loss="ipo", learning_rate=1e-2, workdir=str(tmp_path / "run"))
  workdir = dpo.main(config)
  summary = json.loads((workdir / "summary.json").read_text())
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert lines[0]["loss/ipo"] == pytest.approx(1 / (2 * config.beta) ** 2, rel=1e-5)
  assert lines[0]["preference/margin"] == 0 != lines[1]["preference/margin"]
  assert summary["score_after"] is None and summary["gold_after"] is None
  assert "pass_at_4_after" not in summary  # pairs of one's own come without answers
  assert abs(summary["kl_ref_exact_before"]) < 1e-5 < summary["kl_ref_exact"]
  assert 0 <= summary["held_out_accuracy"] <= 1
  assert len((workdir / "samples.jsonl").read_text().splitlines()) == 4
  assert (workdir / "report.html").exists()
  load_policy(workdir)
  before = (workdir / "timing.jsonl").read_bytes()
  dpo.main(config)
  assert "finished before" in capsys.readouterr().out
  assert (workdir / "timing.jsonl").read_bytes() == before


def test_embedded_run_is_judged_by_score_and_gold(own, tmp_path, monkeypatch):
  reward_model = str(tmp_path / "reward")
  config, params = load_policy(own["policy"])
  scalar = scalar_params_from(params)
  save_scalar(tmp_path / "reward", config, scalar, arithmetic.make_tokenizer())
  directories = {"policy": own["policy"], "reward_model": reward_model}
  monkeypatch.setattr(training, "model_directories", lambda config: directories)
  workdir = dpo.main(dpo.Config(**TINY, num_pairs=100, workdir=str(tmp_path / "run")))
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert lines[0]["loss/dpo"] == pytest.approx(np.log(2), rel=1e-5)
  summary = json.loads((workdir / "summary.json").read_text())
  named = ("score", "gold", "kl_ref_exact", "kl_ref_forward", "gold_greedy", "pass_at_4")
  for name in named:
    assert summary[f"{name}_after"] is not None and summary[f"{name}_before"] is not None


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"policy": "somewhere"}, "--policy, a model of yours, needs pairs: --data=FILE.jsonl"),
    ({"data": "pairs.jsonl"}, "need a model of yours to start from: --policy=DIR"),
    ({"policy": "p", "data": "d", "num_pairs": 7}, "--num_pairs is set, but nothing reads it"),
    ({"max_len": 9}, "--max_len is set, but nothing reads it"),
    ({"loss": "hope"}, "must be one of dpo, ipo"),
    ({"beta": 0.0}, "--beta=0.0"),
    ({"label_smoothing": 0.6}, "--label_smoothing=0.6"),
  ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    dpo.Config(**settings)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"prompt": "01+02=", "chosen": "03"}\n', "no text column 'rejected'"),
    ('{"prompt": "1", "chosen": "3", "rejected": "4"}\n', "a single row"),
    ('{"prompt": "1", "chosen": "%s", "rejected": "4"}\n' % ("1" * 60) * 3, "6. tokens"),
  ],
)
def test_files_that_cannot_be_used_are_refused(own, text, message, tmp_path):
  (tmp_path / "pairs.jsonl").write_text(text)
  config = {**own, "data": str(tmp_path / "pairs.jsonl"), "workdir": str(tmp_path / "run")}
  with pytest.raises(UserError, match=message):
    dpo.main(dpo.Config(**config))
  assert not (tmp_path / "run").exists()


def test_pairs_that_are_too_long_are_left_out_where_that_is_asked_for(own, tmp_path):
  path = tmp_path / "pairs.jsonl"
  path.write_text(
    '{"prompt": "1+", "chosen": "3", "rejected": "456"}\n'
    '{"prompt": "1+", "chosen": "111111", "rejected": "4"}\n'
    '{"prompt": "1+", "chosen": "789", "rejected": "5"}\n'
  )
  config = dpo.Config(**{**own, "data": str(path)}, max_len=7)
  start = dpo_pairs.own_start(config)
  both = np.concatenate([start.training.tokens, start.held_out.tokens])
  mask = np.concatenate([start.training.completion_mask, start.held_out.completion_mask])
  assert both.shape == (2, 2, 7)
  lengths = mask.sum(axis=-1).tolist()  # with the end-of-sequence, chosen first
  assert sorted(lengths) == [[2, 4], [4, 2]]
  assert start.prompts.records == [{"prompt": "1+"}]
  np.testing.assert_allclose(
    start.training.ref_log_probs,
    dpo_pairs.completion_log_probs(start.policy, unread.read(start.params), *start.training[:3]),
    rtol=1e-5,
  )


def test_a_batch_that_the_devices_cannot_split_is_refused(own, tmp_path):
  with pytest.raises(UserError, match="cannot be split over 3"):
    dpo.main(dpo.Config(**{**own, "mesh": "data=3"}, workdir=str(tmp_path / "run")))
