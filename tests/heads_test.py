"""Heads of published reward models: what they compute, how they are saved, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_test import (
  LLAMA,
  assert_trees_equal,
  edit_config,
  edit_tensors,
  random_params,
  saved,
  tiny_tokenizer,
)

from klrl.devices import parallel
from klrl.errors import UserError
from klrl.models import add_lora, hf, join, load_scalar, save_scalar, scalar_model

TOKENS = np.array([[5, 3, 7, 4, 9], [6, 8, 3, 0, 0]])
WIDTH, NUM_HIDDEN = LLAMA.width, 5


def head_tensors(*shapes_by_name):
  rng = np.random.default_rng(4)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes_by_name}


def saved_head(directory, tensors):
  """Saves a model with these tensors as its head, and returns its params with a plain one."""
  params = random_params(scalar_model(LLAMA))
  save_scalar(directory, LLAMA, params, tiny_tokenizer())

  def change(stored):
    del stored["score.weight"]
    stored |= tensors

  edit_tensors(directory, change)
  return params


def hidden_states(params, tokens=TOKENS, mask=None):
  """Returns the hidden states of the last real tokens, one unit by the other, from plain heads."""
  mask = tokens != 0 if mask is None else mask
  units = []
  scores = jax.jit(scalar_model(LLAMA).scores)
  for i in range(WIDTH):
    head = np.zeros((WIDTH, 1), np.float32)
    head[i] = 1.0
    units.append(scores(params | {"head": head}, tokens, mask))
  return np.stack(units, axis=-1)


@pytest.mark.parametrize(
  "name", ["value_head", "v_head.summary", "v_head", "classifier", "rm_head"]
)
def test_a_map_without_a_bias_is_the_plain_head_whatever_its_name(name, tmp_path):
  tensors = head_tensors((f"{name}.weight", (1, WIDTH)))
  params = saved_head(tmp_path, tensors)
  config, loaded = load_scalar(tmp_path)
  assert config == LLAMA
  assert_trees_equal(loaded, params | {"head": tensors[f"{name}.weight"].T})
  save_scalar(tmp_path / "again", config, loaded, tiny_tokenizer())
  written = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
  np.testing.assert_array_equal(written["score.weight"], tensors[f"{name}.weight"])


KINDS = {
  "bias": (("v_head.summary.weight", (1, WIDTH)), ("v_head.summary.bias", (1,))),
  "relu": (
    ("score.0.weight", (NUM_HIDDEN, WIDTH)),
    ("score.0.bias", (NUM_HIDDEN,)),
    ("score.2.weight", (1, NUM_HIDDEN)),
    ("score.2.bias", (1,)),
  ),
  "tanh": (
    ("classifier.dense.weight", (NUM_HIDDEN, WIDTH)),
    ("classifier.out_proj.weight", (1, NUM_HIDDEN)),
  ),
}


def expected_scores(kind, tensors, hidden):
  if kind == "bias":
    weight, bias = tensors.values()
    return hidden @ weight[0] + bias[0]
  if kind == "relu":
    first, first_bias, last, last_bias = tensors.values()
    return np.maximum(hidden @ first.T + first_bias, 0) @ last[0] + last_bias[0]
  first, last = tensors.values()
  return np.tanh(hidden @ first.T) @ last[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_kind_is_computed_and_keeps_its_names(kind, tmp_path):
  tensors = head_tensors(*KINDS[kind])
  params = saved_head(tmp_path, tensors)
  edit_config(tmp_path, architectures=["LlamaForRewardModel"])
  edit_tensors(tmp_path, lambda stored: stored.update({"lm_head.weight": np.ones((11, WIDTH))}))
  config, loaded = load_scalar(tmp_path)
  model = scalar_model(config)
  scores = jax.jit(model.scores)(loaded, TOKENS, TOKENS != 0)
  expected = expected_scores(kind, tensors, hidden_states(params))
  np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
  # Padding on the left changes nothing.
  left = np.array([[5, 3, 7, 4, 9], [0, 0, 6, 8, 3]])
  np.testing.assert_allclose(jax.jit(model.scores)(loaded, left, left != 0), scores, atol=1e-5)
  placed = parallel.put_own(parallel.make_mesh("fsdp=2"), hf.open_scalar(tmp_path)[1])
  save_scalar(tmp_path / "again", config, placed, tiny_tokenizer())
  written = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
  for name, array in tensors.items():
    np.testing.assert_array_equal(written[name], array)
  assert "score.weight" not in written and "lm_head.weight" not in written
  fields = json.loads((tmp_path / "again" / "config.json").read_text())
  assert fields["architectures"] == ["LlamaForRewardModel"]
  again_config, again = load_scalar(tmp_path / "again")
  assert again_config == config
  assert_trees_equal(again, loaded)


def test_adapters_of_a_model_with_two_maps_train_both(tmp_path):
  saved_head(tmp_path, head_tensors(*KINDS["relu"]))
  config, params = load_scalar(tmp_path)
  lora_config, trainable, frozen = add_lora(config, params, jax.random.key(0), rank=2)
  assert trainable["head"] is params["head"] and "head" not in frozen
  scores = jax.jit(scalar_model(lora_config).scores)(join(frozen, trainable), TOKENS, TOKENS != 0)
  expected = jax.jit(scalar_model(config).scores)(params, TOKENS, TOKENS != 0)
  np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({}, "no score.weight and no other head that is known"),
    ({"other_head.weight": (1, WIDTH)}, "no score.weight and no other head that is known"),
    ({"score.weight": (2, WIDTH)}, r"score\.weight has shape \(2, 12\), not \(1, 12\)"),
    ({"score.weight": (1, WIDTH), "v_head.weight": (1, WIDTH)}, r"unexpected.*v_head\.weight"),
    ({"score.weight": (1, WIDTH), "score.scale": (1,)}, r"unexpected.*score\.scale"),
    ({"score.0.weight": (5, WIDTH), "score.2.weight": (2, 5)}, r"\(2, 5\), not \(1, 5\)"),
    ({"score.0.weight": (5, 3), "score.2.weight": (1, 5)}, r"\(5, 3\), not \(5, 12\)"),
    ({"score.0.weight": (5,), "score.2.weight": (1, 5)}, r"\(5,\), not \(5, 12\)"),
  ],
)
def test_a_head_that_is_not_known_is_refused_by_name(change, message, tmp_path):
  saved_head(tmp_path, head_tensors(*change.items()))
  with pytest.raises(UserError, match=message):
    load_scalar(tmp_path)


def test_a_plain_model_has_no_kind_of_head(tmp_path):
  saved(tmp_path)
  assert hf.load_policy(tmp_path)[0].head is None
  assert dataclasses.replace(LLAMA, lora_rank=1).head is None
