"""Adapters in PEFT's layout: what peft computes with them, and what is refused of them."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from hf_test import (
  LLAMA,
  QWEN2,
  adapted,
  edit_config,
  logits,
  peer_of,
  random_params,
  saved,
  tiny_tokenizer,
)

from klrl.errors import UserError
from klrl.models import add_lora, hf, hub, join, load_tokenizer, peft, policy_model, scalar_model

# Of the two libraries' own.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = np.random.default_rng(1).integers(0, 11, (2, 9))
MODULE = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = (f"{MODULE}.lora_{kind}.weight" for kind in "AB")


def write_adapters(directory, base, tensors=None, **fields):
  """Writes adapters of rank 2 of one map, the query's of the second layer of LLAMA."""
  rng = np.random.default_rng(2)
  factors = {A: rng.normal(size=(2, 12)), B: rng.normal(size=(16, 2))}
  factors = {name: x.astype(np.float32) for name, x in factors.items()} | (tensors or {})
  directory.mkdir()
  safetensors.numpy.save_file(factors, directory / "adapter_model.safetensors")
  config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 6}
  (directory / "adapter_config.json").write_text(json.dumps(config | fields))
  return factors


def test_adapters_stand_for_their_model_with_them(tmp_path):
  params = saved(tmp_path / "base")
  factors = write_adapters(tmp_path / "adapters", tmp_path / "base")
  config, merged = hf.load_policy(tmp_path / "adapters")
  assert config == LLAMA
  layers = params["decoder"]["layers"]["attention"]["query"]["kernel"]
  layers[1] += 3.0 * (factors[B] @ factors[A]).T
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, params)
  # Of several shards each adds its part.
  opened = hf.open_policy(tmp_path / "adapters")[1]
  part = opened["decoder"]["layers"]["attention"]["query"]["kernel"]
  part = part.read((slice(1, 2), slice(3, 7), slice(4, 8)))
  np.testing.assert_allclose(part, layers[1:2, 3:7, 4:8], atol=1e-6)
  assert load_tokenizer(tmp_path / "adapters").eos_id == 2


@pytest.mark.parametrize(
  ("fields", "scale"),
  [
    ({"use_rslora": True}, 6 / 2**0.5),
    ({"alpha_pattern": {"self_attn.q_proj": 8}}, 4.0),
    ({"alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 10}}, 5.0),
    ({"alpha_pattern": {"layers.0.self_attn.q_proj": 8}}, 3.0),
  ],
)
def test_the_scale_is_that_of_peft(fields, scale, tmp_path):
  params = saved(tmp_path / "base")
  factors = write_adapters(tmp_path / "adapters", tmp_path / "base", **fields)
  merged = hf.load_policy(tmp_path / "adapters")[1]
  kernels = (x["decoder"]["layers"]["attention"]["query"]["kernel"][1] for x in (merged, params))
  expected = scale * (factors[B] @ factors[A]).T
  np.testing.assert_allclose(np.subtract(*kernels), expected, atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "tensors", "message"),
  [
    ({"peft_type": "IA3"}, {}, "peft_type 'IA3' is not supported"),
    ({"use_dora": True}, {}, "use_dora=True is not supported"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa' is not supported"),
    ({"layer_replication": [[0, 1]]}, {}, "layer_replication"),
    ({"target_parameters": ["mlp.experts"]}, {}, "target_parameters"),
    ({"lora_alpha": "6"}, {}, "lora_alpha is"),
    ({"alpha_pattern": {"(a|b)+": 3}}, {}, "the pattern .* is not supported"),
    ({"base_model_name_or_path": "nowhere/at/all"}, {}, "base_model_name_or_path 'nowhere/at/all'"),
    ({"base_model_name_or_path": 3}, {}, "base_model_name_or_path is"),
    ({}, {A: np.ones((2, 11), np.float32)}, "do not make .*q_proj.weight of shape"),
    ({}, {A: np.ones((3, 12), np.float32)}, "do not make"),
    ({}, {A: np.ones(12, np.float32)}, "not two axes"),
    ({}, {A: np.full((2, 12), np.nan, np.float32)}, "q_proj.weight holds NaN"),
    ({}, {A: np.ones((2, 12), np.int32)}, "holds I32"),
    ({}, {f"{MODULE}.lora_magnitude_vector": np.ones(16, np.float32)}, "kind of adapter"),
    ({}, {f"{MODULE}x.lora_B.weight": np.ones((2, 2), np.float32)}, "no lora_A beside it"),
    ({}, {f"{MODULE}x.lora_A.weight": np.ones((2, 2), np.float32)}, "no lora_B beside it"),
    ({}, {"base_model.model.lm_head.weight": np.ones((11, 12), np.float32)}, "lm_head"),
    ({}, {"model.norm.weight": np.ones(12, np.float32)}, "is not the adapter of a module"),
  ],
)
def test_adapters_that_are_not_computed_are_refused_by_name(fields, tensors, message, tmp_path):
  saved(tmp_path / "base")
  write_adapters(tmp_path / "adapters", tmp_path / "base", tensors, **fields)
  if message == "lm_head":  # Where embeddings are tied, another matrix is taken, with a message.
    config, _ = hf.load_policy(tmp_path / "adapters")
    assert not config.tie_embeddings
    return
  with pytest.raises(UserError, match=message):
    hf.load_policy(tmp_path / "adapters")


def test_adapters_of_adapters_and_pickles_are_refused(tmp_path):
  saved(tmp_path / "base")
  write_adapters(tmp_path / "adapters", tmp_path / "base")
  write_adapters(tmp_path / "more", tmp_path / "adapters")
  with pytest.raises(UserError, match="that holds adapters itself"):
    hf.load_policy(tmp_path / "more")
  write_adapters(tmp_path / "self", tmp_path / "self")
  with pytest.raises(UserError, match="that holds adapters itself"):
    hf.load_policy(tmp_path / "self")
  assert peft.base_name(str(tmp_path / "adapters")) == ""
  (tmp_path / "adapters" / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
  with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; a pickle"):
    hf.load_policy(tmp_path / "adapters")


def test_saved_adapters_are_read_again_as_the_merged_model(tmp_path):
  saved(tmp_path / "base")
  config, params = adapted(policy_model(LLAMA))
  folder = tmp_path / "model"
  hf.save_policy(folder, config, params, tiny_tokenizer(), base=str(tmp_path / "base"))
  written = json.loads((folder / "adapters" / "adapter_config.json").read_text())
  assert written["base_model_name_or_path"] == str(tmp_path / "base")
  merged, again = (hf.load_policy(path)[1] for path in (folder, folder / "adapters"))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), again, merged)


def test_adapters_of_a_reward_model_bring_its_head(tmp_path):
  saved(tmp_path / "base")
  base = random_params(policy_model(LLAMA))
  config, params = adapted(scalar_model(LLAMA))
  params["decoder"]["embed"] = base["decoder"]["embed"]
  folder = tmp_path / "model"
  hf.save_scalar(folder, config, params, tiny_tokenizer(), base=str(tmp_path / "base"))
  merged, again = (hf.load_scalar(path)[1] for path in (folder, folder / "adapters"))
  np.testing.assert_array_equal(again["head"], params["head"])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), again, merged)
  library, torch = (pytest.importorskip(name) for name in ("peft", "torch"))
  transformers = pytest.importorskip("transformers")
  edit_config(tmp_path / "base", pad_token_id=0)
  peer = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "base", num_labels=1
  )
  peer = library.PeftModel.from_pretrained(peer, folder / "adapters").eval()
  tokens = np.array([[5, 3, 7, 4, 9], [6, 8, 3, 0, 0]])
  with torch.no_grad():
    expected = peer(torch.tensor(tokens), attention_mask=torch.tensor(tokens != 0)).logits[:, 0]
  scores = jax.jit(scalar_model(LLAMA).scores)(again, tokens, tokens != 0)
  np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_peft_opens_saved_adapters_with_equal_logits(config, tmp_path):
  library, torch = (pytest.importorskip(name) for name in ("peft", "torch"))
  transformers = pytest.importorskip("transformers")
  saved(tmp_path / "base", config)
  lora_config, params = adapted(policy_model(config))
  hf.save_policy(tmp_path / "m", lora_config, params, tiny_tokenizer(), base=str(tmp_path / "base"))
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  peer = library.PeftModel.from_pretrained(peer, tmp_path / "m" / "adapters").eval()
  with torch.no_grad():
    expected = peer(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(logits(lora_config, params, TOKENS), expected, atol=1e-4)


TARGETS = {"gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}


@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_of_fused_maps_are_those_of_peft_both_ways(kind, tmp_path):
  library, torch = (pytest.importorskip(name) for name in ("peft", "torch"))
  transformers = pytest.importorskip("transformers")
  model = peer_of(kind)
  model.save_pretrained(tmp_path / "base")
  tiny_tokenizer(12).tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
  settings = library.LoraConfig(
    r=3, lora_alpha=5, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
  )
  settings.init_lora_weights = False
  peer = library.get_peft_model(model, settings).eval()
  peer.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
  peer.save_pretrained(tmp_path / "theirs")
  with torch.no_grad():
    expected = peer(torch.tensor(TOKENS)).logits.numpy()
  config, params = hf.load_policy(tmp_path / "theirs")
  np.testing.assert_allclose(logits(config, params, TOKENS), expected, atol=1e-4)

  config, params = hf.load_policy(tmp_path / "base")
  config, trainable, frozen = add_lora(config, params, jax.random.key(0), rank=3)
  rng = np.random.default_rng(3)
  trainable = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), trainable)
  hf.save_policy(
    tmp_path / "ours",
    config,
    join(frozen, trainable),
    load_tokenizer(tmp_path / "base"),
    base=str(tmp_path / "base"),
  )
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  peer = library.PeftModel.from_pretrained(peer, tmp_path / "ours" / "adapters").eval()
  with torch.no_grad():
    expected = peer(torch.tensor(TOKENS)).logits.numpy()
  found = logits(config, join(frozen, trainable), TOKENS)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_file_without_adapters_is_refused(tmp_path):
  saved(tmp_path / "base")
  write_adapters(tmp_path / "adapters", tmp_path / "base")
  safetensors.numpy.save_file({}, tmp_path / "adapters" / "adapter_model.safetensors")
  with pytest.raises(UserError, match=r"adapter_model\.safetensors holds no adapters"):
    hf.load_policy(tmp_path / "adapters")


def test_the_revision_of_a_base_on_the_hub_is_taken(tmp_path, monkeypatch):
  saved(tmp_path / "base")
  asked = []
  monkeypatch.setattr(hub, "snapshot", lambda name: asked.append(name) or tmp_path / "base")
  write_adapters(tmp_path / "adapters", "owner/base", revision="v2")
  hf.load_policy(tmp_path / "adapters")
  assert set(asked) == {"owner/base@v2"}
