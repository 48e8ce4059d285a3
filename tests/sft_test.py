"""Packing changes no gradient, the forward KL of the demonstrations, and what SFT runs on."""

import collections
import dataclasses
import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sft
from klrl.algorithm.gradients import scalar
from klrl.devices import unread
from klrl.errors import UserError
from klrl.models import DecoderConfig, load_policy, policy_model, save_policy
from klrl.tasks import arithmetic, data, demonstrations, packing

TOKENIZER = arithmetic.make_tokenizer()
PAD = TOKENIZER.pad_id
TINY = DecoderConfig(
  vocab_size=TOKENIZER.tokenizer.get_vocab_size(),
  width=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=16,
  max_len=24,
)
POLICY = policy_model(TINY)
EXACT = policy_model(dataclasses.replace(TINY, dtype="float64"))


@functools.cache
def noisy_params():
  """Returns params of which every part of the model shows."""
  rng = np.random.default_rng(4)
  shapes = jax.eval_shape(POLICY.init, jax.random.key(0))
  return jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes)


@functools.cache
def compiled_gradient():
  return jax.jit(jax.value_and_grad(scalar(sft.make_cross_entropy_fn(EXACT)), has_aux=True))


def gradient(batch):
  """Returns ((loss, metrics), gradient) in float64, but for softmax, which attention does not."""
  with jax.enable_x64(True):
    found = compiled_gradient()(jax.tree.map(np.float64, noisy_params()), batch)
    return jax.tree.map(np.asarray, found)


def texts_of_many_lengths(num, *, with_prompts=True):
  rng = np.random.default_rng(0)

  def digits(most):
    return "".join(rng.choice(list("0123456789"), rng.integers(1, most)))

  return [(digits(8) + "=" if with_prompts else "", digits(12)) for _ in range(num)]


def assert_gradients_equal(left, right):
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-7)


@pytest.mark.parametrize("with_prompts", [True, False], ids=["completion", "all"])
def test_packing_changes_no_gradient(with_prompts):
  encoded = data.encode_texts(texts_of_many_lengths(16, with_prompts=with_prompts), TOKENIZER)
  apart, packed = (
    data.examples_of(encoded, PAD),
    packing.pack(encoded, PAD, row_len=TINY.max_len),
  )
  assert len(packed.tokens) < len(apart.tokens)
  (loss, metrics), grads = gradient(apart)
  (packed_loss, packed_metrics), packed_grads = gradient(packed)
  np.testing.assert_allclose(packed_loss, loss, rtol=1e-7)
  assert packed_metrics["loss/cross_entropy"][1] == metrics["loss/cross_entropy"][1]
  assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) > 0.05
  assert_gradients_equal(packed_grads, grads)


def test_hidden_states_of_a_packed_text_are_those_of_the_text_alone():
  rng = np.random.default_rng(1)
  first, second = rng.integers(3, 13, 5), rng.integers(3, 13, 7)
  tokens = np.concatenate([first, second, [PAD]])[None]
  segment_ids = np.array([[1] * 5 + [2] * 7 + [0]])
  hidden = POLICY.hidden(noisy_params(), tokens, segment_ids > 0, segment_ids)[0]
  for row, where in ((first, slice(0, 5)), (second, slice(5, 12))):
    alone = POLICY.hidden(noisy_params(), row[None], np.ones((1, len(row)), bool))[0]
    np.testing.assert_allclose(hidden[where], alone, atol=1e-5)
  assert np.all(np.isfinite(hidden))
  blurred = POLICY.hidden(noisy_params(), tokens, segment_ids > 0)[0]
  assert np.abs(blurred - hidden)[5:12].max() > 1e-2


def test_loss_is_invariant_to_padding_and_to_the_split_into_micro_batches():
  encoded = data.encode_texts(texts_of_many_lengths(16), TOKENIZER)
  batch = data.examples_of(encoded, PAD)
  wider = data.Examples(
    np.pad(batch.tokens, ((0, 0), (0, 3)), constant_values=5),
    *(np.pad(array, ((0, 0), (0, 3))) for array in batch[1:]),
  )
  (_, metrics), grads = gradient(batch)
  total, count = metrics["loss/cross_entropy"]
  (_, wide_metrics), wide_grads = gradient(wider)
  np.testing.assert_allclose(wide_metrics["loss/cross_entropy"], (total, count), rtol=1e-6)
  assert_gradients_equal(wide_grads, grads)
  halves = [gradient(data.take(batch, rows)) for rows in (slice(0, 8), slice(8, 16))]
  sums, counts = zip(*(half[0][1]["loss/cross_entropy"] for half in halves), strict=True)
  np.testing.assert_allclose((sum(sums), sum(counts)), (total, count), rtol=1e-6)
  merged = jax.tree.map(
    lambda x, y: (counts[0] * x + counts[1] * y) / count, halves[0][1], halves[1][1]
  )
  assert_gradients_equal(merged, grads)


def test_cross_entropy_by_hand():
  """A policy of known probabilities: (log 2 + log 4 + log 5) / 3 on the completion's tokens."""
  logits = np.log(np.float32([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.4, 0.4, 0.2]]))

  class Table:
    @staticmethod
    def hidden(params, tokens, mask, segment_ids):
      return params[tokens]

    @staticmethod
    def unembedding(params):
      return jnp.eye(3)

  # 1 -> 0 is the prompt's; then 0 -> 0 (1/2), 0 -> 2 (1/4), 2 -> 2 (1/5); padding.
  batch = data.Examples(
    np.array([[1, 0, 0, 2, 2, 0]]),
    np.array([[1, 1, 1, 1, 1, 0]], bool),
    np.array([[0, 0, 1, 1, 1, 0]], bool),
    np.array([[1, 1, 1, 1, 1, 0]]),
  )
  loss, metrics = scalar(sft.make_cross_entropy_fn(Table))(jnp.asarray(logits), batch)
  np.testing.assert_allclose(loss, np.log(2 * 4 * 5) / 3, rtol=1e-6)
  assert metrics["loss/cross_entropy"][1] == 3


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_demonstrations_come_from_the_distribution_that_is_claimed(quality):
  texts = arithmetic.demonstrations(3, 30_000, quality=quality)
  expected, counts = collections.Counter(), collections.Counter(texts)
  for prompt, number in collections.Counter(prompt for prompt, _ in texts).items():
    probs = demonstrations.completion_probs(prompt, quality=quality)
    np.testing.assert_allclose(sum(probs.values()), 1)
    expected.update({(prompt, completion): number * p for completion, p in probs.items()})
  assert set(counts) <= set(expected)  # Nothing is written that the claim rules out.
  # By kind of mistake, over all prompts: a count is within five standard deviations.
  kinds, claimed = collections.Counter(), collections.Counter()
  for target, source in ((kinds, counts), (claimed, expected)):
    for (prompt, completion), number in source.items():
      a, b = (int(x) for x in prompt[:-1].split("+"))
      target[int(completion) - a - b] += number
  for kind, mean in claimed.items():
    assert abs(kinds[kind] - mean) <= 5 * np.sqrt(mean) + 1e-6, kind


def test_completion_probs_by_hand():
  """12+29=41: carry forgotten 31; 40, 42; tens read as 0-9 and ones read as 0-9, one each right.

  Of the weight 3, two misreadings of 1/20 each give 41 and are drawn again: 2.9 is left.
  """
  probs = demonstrations.completion_probs("12+29=", quality=0.6)
  assert len(probs) == 19
  expected = {"41": 0.6, "31": 0.4 * 1.05 / 2.9, "40": 0.4 * 0.55 / 2.9, "01": 0.4 * 0.05 / 2.9}
  for completion, p in expected.items():
    np.testing.assert_allclose(probs[completion], p, rtol=1e-12)
  assert demonstrations.completion_probs("12+29=", quality=1.0) == {"41": 1.0}


@pytest.mark.parametrize("whole", [False, True], ids=["completion", "all"])
def test_forward_kl_is_cross_entropy_minus_entropy(whole):
  """The cross-entropy of many sampled demonstrations is the exact KL plus H, within its noise."""
  texts = arithmetic.demonstrations(5, 3000, quality=0.5)
  figures = demonstrations.make_forward_kl_fn(
    POLICY, TOKENIZER, [p for p, _ in texts[:600]], quality=0.5, with_prompt=whole
  )(noisy_params())
  texts = [("", p + c) if whole else (p, c) for p, c in texts]
  examples = data.encode_examples(texts, TOKENIZER, max_len=TINY.max_len)
  (loss, _), _ = gradient(examples)
  # The prompts differ too, so the band is wide: 0.25 against a KL of several nats.
  found = figures["held_out_entropy"] + figures["held_out_forward_kl"]
  np.testing.assert_allclose(found, loss, atol=0.25)
  assert figures["held_out_forward_kl"] > 1
  conditional = np.mean(
    [
      -sum(p * np.log(p) for p in demonstrations.completion_probs(prompt, quality=0.5).values())
      for prompt, _ in arithmetic.demonstrations(5, 600, quality=0.5)
    ]
  )
  entropy = (conditional + np.log(2250)) / 9 if whole else conditional / 3
  np.testing.assert_allclose(figures["held_out_entropy"], entropy, rtol=1e-6)


def test_forward_kl_of_the_distribution_itself_is_zero(monkeypatch):
  """A table in place of the model: it says of each text what the demonstrations do."""
  prompt = "12+29="
  probs = demonstrations.completion_probs(prompt, quality=0.5)

  def log_probs(hidden, unembedding, tokens):
    result = np.zeros(tokens.shape, np.float32)
    for row, (_, p) in zip(result, probs.items(), strict=True):
      row[-1] = np.log(p)
    return jnp.asarray(result)

  monkeypatch.setattr(demonstrations.ops, "token_log_probs_from_hidden", log_probs)
  figures = demonstrations.make_forward_kl_fn(
    POLICY, TOKENIZER, [prompt], quality=0.5, with_prompt=False
  )(noisy_params())
  np.testing.assert_allclose(figures["held_out_forward_kl"], 0, atol=1e-6)
  entropy = -sum(p * np.log(p) for p in probs.values()) / 3
  np.testing.assert_allclose(figures["held_out_entropy"], entropy, rtol=1e-6)


RUN = {"num_iterations": 2, "batch_size": 4, "mesh": "data=1", "save_every": 2}


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A folder with a policy, demonstrations and two text files; the test runs in it."""
  monkeypatch.chdir(tmp_path)
  save_policy(pathlib.Path("policy"), TINY, noisy_params(), TOKENIZER)
  with open("demonstrations.jsonl", "w") as file:
    for prompt, completion in texts_of_many_lengths(60):
      file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
  documents = [str(i) * (i % 40 + 1) for i in range(80)]
  pathlib.Path("blank.txt").write_text("\n\n".join(documents))
  with gzip.open("marked.txt.gz", "wt") as file:
    file.write("<|endoftext|>\n".join(documents))
  return {**RUN, "policy": "policy"}


def summary_of(workdir):
  return json.loads((workdir / "summary.json").read_text())


def loss_of_untrained(monkeypatch, config):
  """Returns the held-out loss of the policy as it is, of the rows that a run would use."""
  losses = []

  def train(config, workdir, loss_fn, params, training, held_out, **others):
    del config, workdir, training, others  # The loss alone compiles fast.
    losses.append(float(jax.jit(scalar(loss_fn))(unread.read(params), held_out)[0]))
    return dict.fromkeys(("held_out_cross_entropy", "held_out_cross_entropy_before"), losses[-1])

  with monkeypatch.context() as patch:
    patch.setattr(sft, "train", train)
    sft.main(config)
  return losses[0]


def test_what_flags_change_of_the_held_out_loss(own, monkeypatch, capsys):
  def loss(**changes):
    return loss_of_untrained(monkeypatch, sft.Config(**own, **changes))

  plain = loss(data="demonstrations.jsonl")
  np.testing.assert_allclose(loss(data="demonstrations.jsonl", packing=True), plain, rtol=1e-5)
  others = [
    loss(data="demonstrations.jsonl", **changes) for changes in ({"loss_on": "all"}, {"max_len": 9})
  ]
  assert len({plain, *others}) == 3
  short = sum(
    len(text.tokens) <= 9 for text in data.encode_texts(texts_of_many_lengths(60), TOKENIZER)
  )
  assert f"SFT: {short} of 60 examples are short enough" in capsys.readouterr().out
  # The same documents, however they are separated.
  blank, marked = (loss(data=name, packing=True) for name in ("blank.txt", "marked.txt.gz"))
  np.testing.assert_allclose(blank, marked, rtol=1e-5)
  # Cut into shorter pieces they lose context.
  assert abs(loss(data="blank.txt", max_len=9) - blank) > 1e-3


def test_packed_run_on_text_leaves_a_model(own):
  workdir = sft.main(sft.Config(**own, data="blank.txt", packing=True))
  load_policy(workdir)
  summary = summary_of(workdir)
  assert summary["held_out_cross_entropy"] > 0
  assert "held_out_forward_kl" not in summary


def test_embedded_run_has_the_forward_kl_in_its_summary(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = sft.Config(**RUN, packing=True, width=8, num_layers=1, num_demonstrations=100)
  summary = summary_of(sft.main(config))
  assert 0 < summary["held_out_entropy"] < summary["held_out_cross_entropy"]
  assert summary["held_out_forward_kl"] > 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": "blank.txt", "loss_on": "all"}, "--loss_on is set, but plain text has no prompts"),
    ({"data": "blank.txt", "max_len": 1}, "--max_len=1: give 2 to 24 tokens"),
    ({"data": "demonstrations.jsonl", "max_len": 25}, "--max_len=25: give 2 to 24 tokens"),
    ({"data": "demonstrations.jsonl", "max_len": 2}, "--max_len=2: every example is longer"),
    ({"data": "nowhere.txt"}, r"no file nowhere\.txt; expected plain text"),
    ({"data": "empty.txt"}, r"empty\.txt is empty; expected plain text"),
    ({"data": "latin.txt"}, r"latin\.txt is not UTF-8"),
    ({"data": "torn.txt.gz"}, r"torn\.txt\.gz cannot be read"),
    ({"data": ""}, "--policy, a model of yours, needs texts: --data"),
  ],
)
def test_wrong_use_says_what_to_do(own, changes, message):
  pathlib.Path("empty.txt").write_text("\n \n")
  pathlib.Path("latin.txt").write_bytes("\xe9".encode("latin-1"))
  pathlib.Path("torn.txt.gz").write_bytes(pathlib.Path("marked.txt.gz").read_bytes()[:30])
  with pytest.raises(UserError, match=message):
    sft.main(sft.Config(**own, **changes, workdir="wrong"))
  assert not pathlib.Path("wrong").exists()
