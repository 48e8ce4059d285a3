"""The reward model's loss by hand, what has gradient, calibration, and what it runs on."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import reward_model
from klrl.algorithm.gradients import scalar
from klrl.errors import UserError
from klrl.models import DecoderConfig, load_scalar, policy_model, save_policy, scalar_model
from klrl.supervised import init_supervised_state, make_supervised_step
from klrl.tasks import arithmetic, data

TOKENIZER = arithmetic.make_tokenizer()
TINY = DecoderConfig(
  vocab_size=TOKENIZER.tokenizer.get_vocab_size(),
  width=8,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=8,
  max_len=16,
)
PLAIN = {"margin": 0.0, "label_smoothing": 0.0, "centring_coef": 0.0}


def loss(chosen, rejected, margins=1.0, **changes):
  arrays = (jnp.float32([x]) for x in (chosen, rejected, margins))
  return float(reward_model.preference_loss(*arrays, **{**PLAIN, **changes})[0])


def test_losses_by_hand():
  # sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4.
  log3 = math.log(3)
  np.testing.assert_allclose(loss(log3 + 5, 5), math.log(4 / 3), rtol=1e-6)
  np.testing.assert_allclose(loss(5, log3 + 5), math.log(4), rtol=1e-6)
  # A margin of 2 log 3 turns a lead of log 3 into a lag; half of it, twice, is the same.
  np.testing.assert_allclose(loss(log3, 0, margin=2 * log3), math.log(4), rtol=1e-6)
  np.testing.assert_allclose(loss(log3, 0, 2 * log3, margin=1.0), math.log(4), rtol=1e-6)
  # One label in ten swapped: 0.9 log(4/3) + 0.1 log 4.
  np.testing.assert_allclose(
    loss(log3, 0, label_smoothing=0.1), 0.9 * math.log(4 / 3) + 0.1 * math.log(4), rtol=1e-6
  )
  # The swapped pair has the margin too: its lead is -log 3 - log 3, and 1 + e^(2 log 3) = 10.
  np.testing.assert_allclose(
    loss(log3, 0, margin=log3, label_smoothing=0.25),
    0.75 * math.log(2) + 0.25 * math.log(10),
    rtol=1e-6,
  )
  # 0.5 * (1 + 2)^2 = 4.5.
  np.testing.assert_allclose(loss(1, 2, centring_coef=0.5), math.log(1 + math.e) + 4.5, rtol=1e-6)


def test_smoothed_loss_is_least_where_the_confidence_is_that_of_the_labels():
  gradient = jax.grad(lambda d: loss_of_difference(d, label_smoothing=0.2))
  np.testing.assert_allclose(gradient(math.log(4.0)), 0, atol=1e-6)  # sigmoid(log 4) = 0.8
  assert gradient(math.log(4.0) - 0.1) < 0 < gradient(math.log(4.0) + 0.1)


def loss_of_difference(difference, **changes):
  scores = jnp.stack([difference / 2, -difference / 2])[:, None]
  return reward_model.preference_loss(*scores, jnp.ones(1), **{**PLAIN, **changes})[0]


def test_only_centring_sees_what_preferences_leave_open():
  def gradient_of_shift(**changes):
    def shifted(shift):
      scores = jnp.float32([1.0]) + shift, jnp.float32([-0.5]) + shift
      return reward_model.preference_loss(*scores, jnp.ones(1), **{**PLAIN, **changes})[0]

    return float(jax.grad(shifted)(0.0))

  for changes in ({}, {"margin": 0.7}, {"label_smoothing": 0.3}):
    np.testing.assert_allclose(gradient_of_shift(**changes), 0, atol=1e-7)
  # d/ds 0.1 (0.5 + 2 s)^2 = 0.1 * 2 * 0.5 * 2.
  np.testing.assert_allclose(gradient_of_shift(centring_coef=0.1), 0.2, rtol=1e-6)


def test_far_apart_scores_have_a_finite_loss_and_gradient():
  for sign in (1.0, -1.0):
    value, gradient = jax.value_and_grad(loss_of_difference)(jnp.float32(sign * 1e4))
    assert np.isfinite(value) and np.isfinite(gradient)


def test_calibration_error_by_hand():
  # Confidence 0.75 in four pairs of which three are right: none.
  lead = math.log(3)
  assert reward_model.calibration_error(np.array([lead, lead, lead, -lead])) < 1e-9
  # All right: 0.25 too modest. All wrong: 0.75 too sure.
  np.testing.assert_allclose(reward_model.calibration_error(np.full(4, lead)), 0.25)
  np.testing.assert_allclose(reward_model.calibration_error(np.full(4, -lead)), 0.75)
  # Two bins: (2 * |0.5 - 0.75| + 2 * |0.5 - 0.95|) / 4; in one bin the gaps' sum is the same.
  sure = math.log(19)
  differences = np.array([lead, -lead, sure, -sure])
  np.testing.assert_allclose(reward_model.calibration_error(differences), 0.35)
  # Errors that cancel in one bin do not in two: gaps -0.5 + 0.1 and 0.5 - ... by bin.
  mixed = np.array([lead, lead, sure, -sure])
  np.testing.assert_allclose(reward_model.calibration_error(mixed), (2 * 0.25 + 2 * 0.45) / 4)
  np.testing.assert_allclose(
    reward_model.calibration_error(mixed, num_bins=1), abs(2 * 0.25 - 2 * 0.45) / 4
  )
  # Ties are right by half, which is what they claim; and nothing overflows.
  assert reward_model.calibration_error(np.zeros(3)) == 0
  assert reward_model.calibration_error(np.array([1e4, 1e4])) < 1e-9


def test_calibration_error_of_labels_that_follow_the_scores_is_small():
  rng = np.random.default_rng(0)
  leads = rng.normal(size=20_000) * 2
  signs = np.where(rng.random(20_000) < 1 / (1 + np.exp(-leads)), 1, -1)
  # 10 bins of about 2,000 pairs each: noise of about 0.4 / sqrt(2000).
  assert reward_model.calibration_error(leads * signs) < 0.02
  assert reward_model.calibration_error(3 * leads * signs) > 0.1


@functools.cache
def model_and_params():
  model = scalar_model(TINY)
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return model, jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes)


@functools.cache
def compiled():
  loss_fn = reward_model.make_preference_fn(model_and_params()[0])
  return jax.jit(jax.value_and_grad(scalar(loss_fn), has_aux=True))


def pairs_of(num):
  pairs = arithmetic.preferences(0, num, label_noise=0.0)
  texts = [(prompt, text) for prompt, c, r in pairs for text in (c, r + "7")]
  both = data.encode_examples(texts, TOKENIZER, max_len=16)
  margins = np.linspace(0, 2, num, dtype=np.float32)
  tokens, mask = (x.reshape(num, 2, -1) for x in (both.tokens, both.mask))
  return reward_model.Pairs(tokens, mask, margins)


SOME = {"margin": 0.5, "label_smoothing": 0.1, "centring_coef": 0.05}


def test_loss_is_invariant_to_padding_permutation_and_micro_batches():
  _, params = model_and_params()
  batch = pairs_of(8)

  def close(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), left, right)

  (value, metrics), gradient = compiled()(params, batch, **SOME)
  wide = [np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=9 if x.dtype == np.int32 else False)
          for x in batch[:2]]  # fmt: skip
  (wide_value, wide_metrics), wide_gradient = compiled()(
    params, reward_model.Pairs(*wide, batch.margins), **SOME
  )
  close((wide_value, wide_metrics, wide_gradient), (value, metrics, gradient))
  turned = compiled()(params, data.take(batch, np.arange(8)[::-1]), **SOME)
  close(turned, ((value, metrics), gradient))
  halves = [compiled()(params, data.take(batch, rows), **SOME) for rows in (slice(4), slice(4, 8))]
  close(jax.tree.map(lambda x, y: (x + y) / 2, halves[0][1], halves[1][1]), gradient)
  close(jax.tree.map(lambda x, y: x + y, halves[0][0][1], halves[1][0][1]), metrics)


def test_metrics_are_those_of_the_scores():
  model, params = model_and_params()
  batch = pairs_of(8)
  (value, metrics), _ = compiled()(params, batch, **SOME)
  chosen, rejected = (
    np.asarray(model.scores(params, batch.tokens[:, i], batch.mask[:, i]), np.float64)
    for i in range(2)
  )
  d, m = chosen - rejected, 0.5 * batch.margins
  expected = 0.9 * np.log1p(np.exp(m - d)) + 0.1 * np.log1p(np.exp(m + d))
  expected += 0.05 * (chosen + rejected) ** 2
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)
  found = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
  np.testing.assert_allclose(found["loss/total"], expected.mean(), rtol=1e-5)
  np.testing.assert_allclose(found["loss/bradley_terry"], np.log1p(np.exp(-d)).mean(), rtol=1e-5)
  np.testing.assert_allclose(found["loss/accuracy"], (d > 0).mean())
  np.testing.assert_allclose(found["loss/mean_score"], (chosen + rejected).mean() / 2, rtol=1e-5)


def test_coefficients_are_traced():
  """One program for all of them, and each changes where the step goes."""
  model, params = model_and_params()
  of_pairs = make_supervised_step(reward_model.make_preference_fn(model), reward_model.Config())
  traces, ends = [], []

  @jax.jit
  def step(*arguments):
    traces.append(arguments)
    return of_pairs(*arguments)

  for changes in ({}, {"margin": 1.0}, {"label_smoothing": 0.2}, {"centring_coef": 0.5}):
    config = reward_model.Config(**changes)
    state = init_supervised_state(params, config, {name: getattr(config, name) for name in PLAIN})
    ends.append(float(step(state, {}, pairs_of(8))[1]["gradient/norm"][0]))
  assert len(set(ends)) == 4
  assert len(traces) == 1


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A folder with a policy and pairs in both formats; the test runs in it."""
  monkeypatch.chdir(tmp_path)
  params = policy_model(TINY).init(jax.random.key(0))
  save_policy(pathlib.Path("policy"), TINY, params, TOKENIZER)
  with open("pairs.jsonl", "w") as file:
    for i, (prompt, chosen, rejected) in enumerate(arithmetic.preferences(0, 40, label_noise=0.0)):
      line = {"prompt": prompt, "chosen": chosen, "rejected": rejected + "0" * (i % 3)}
      file.write(json.dumps({**line, "margin": i / 40}) + "\n")
  return {
    "policy": "policy", "data": "pairs.jsonl", "num_iterations": 2, "batch_size": 4,
    "mesh": "data=1",
  }  # fmt: skip


def test_run_on_pairs_of_ones_own(own, capsys):
  workdir = reward_model.main(reward_model.Config(**own, max_len=11, margin=1.0, **{
    name: value for name, value in SOME.items() if name != "margin"
  }))  # fmt: skip
  load_scalar(workdir)
  summary = json.loads((workdir / "summary.json").read_text())
  for name in ("accuracy", "loss", "calibration_error", "mean_score"):
    assert math.isfinite(summary[f"held_out_{name}"]), name
  assert "Calibration error" in (workdir / "report.html").read_text()
  # A prompt of seven tokens, two digits, the end-of-sequence: 12 with two noughts more.
  assert "Reward model: 27 of 40 pairs are short enough" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"max_len": 17}, "--max_len=17: give 2 to 16 tokens"),
    ({"max_len": 5}, "--max_len=5: every example is longer"),
    ({"label_smoothing": 0.6}, r"--label_smoothing=0\.6: must be at most 0\.5"),
    ({"margin": -1.0}, "--margin=-1.0: must be at least 0"),
    ({"policy": ""}, "--data needs --policy"),
    ({"data": "long.jsonl"}, "Example 1 has 31 tokens, and the model's context holds 16"),
  ],
)
def test_wrong_use_says_what_to_do(own, changes, message):
  line = {"prompt": "1", "chosen": "2" * 28, "rejected": "3"}
  pathlib.Path("long.jsonl").write_text(json.dumps(line) + "\n")
  with pytest.raises(UserError, match=message):
    reward_model.main(reward_model.Config(**{**own, **changes}, workdir="wrong"))
  assert not pathlib.Path("wrong").exists()
