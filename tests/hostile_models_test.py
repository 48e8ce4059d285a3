"""Model directories that are broken on purpose: each ends in one UserError with file and field."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from hf_test import LLAMA, edit_config, edit_tensors, saved

from klrl.errors import UserError
from klrl.models import check_tokenizer, hf, load_tokenizer

NUMBERS = ["512", [1], {"a": 1}, 512.5, 0, -1, 10**19, float("nan"), float("inf"), True]
TWICE = '{"a": 1, "b": {}, "a": 2}'
DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  saved(directory)
  return directory


@pytest.fixture
def model(whole, tmp_path):
  return pathlib.Path(shutil.copytree(whole, tmp_path / "model"))


def load(directory):
  config, _ = hf.load_policy(directory)
  check_tokenizer(load_tokenizer(directory), config)


def refusal(directory, *words):
  """Returns the message of the one error, which holds all `words` and can be read at a glance."""
  with pytest.raises(UserError) as found:
    load(directory)
  message = str(found.value)
  assert len(message) < 1000
  for word in words:
    assert word in message
  return message


@pytest.mark.parametrize(
  "field",
  [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
  ],
)
def test_a_size_that_is_no_size_is_refused_by_its_name(field, model):
  config = json.loads((model / "config.json").read_text())
  for value in NUMBERS:
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    refusal(model, "config.json", field)
  if field not in ("num_key_value_heads", "head_dim"):
    (model / "config.json").write_text(json.dumps(config | {field: None}))
    refusal(model, "config.json", field)


@pytest.mark.parametrize(
  ("field", "values"),
  [
    ("rms_norm_eps", ["1e-5", None, -1, [1], float("nan"), True]),
    ("rope_theta", ["1e4", 0, -1, [1], float("inf"), False]),
    ("rope_parameters", ["default", [1], 3, {"rope_theta": "1"}, {"rope_type": 3}]),
    ("rope_scaling", ["linear", [1], {"type": ["linear"]}, {"factor": 2.0}]),
    ("tie_word_embeddings", ["false", 0, None, [True]]),
    ("eos_token_id", ["2", [], {}, 2.0, -1, 11, [2, 11], [2, "3"], True, 10**30]),
    ("bos_token_id", ["1", [1], -2, 11, 1.5]),
    ("pad_token_id", ["1", [1], -2, 11, 1.5]),
    ("model_type", [None, 3, ["llama"], "x" * 10**5]),
    ("hidden_act", [3, ["silu"], {"silu": 1}]),
    ("num_hidden_layers", [10**9, 9999]),
    ("max_position_embeddings", [10**9]),
    ("attention_bias", ["false", 1]),
  ],
)
def test_a_field_of_another_type_is_refused_by_its_name(field, values, model):
  config = json.loads((model / "config.json").read_text())
  for value in values:
    (model / "config.json").write_text(json.dumps(config | {field: value}))
    refusal(model, "config.json", field)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("partial_rotary_factor", 0.5),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("rope_scaling", {"type": "default", "mrope_section": [1, 2]}),
    ("sliding_window", 16),
    ("layer_types", ["sliding_attention", "full_attention"]),
    ("final_logit_softcapping", 30.0),
    ("logits_scaling", 8.0),
    ("embedding_multiplier", 12.0),
    ("quantization_config", {"quant_method": "gptq"}),
    ("num_local_experts", 8),
    ("qk_norm", True),
    ("is_causal", False),
  ],
)
def test_what_would_change_the_logits_and_is_not_computed_is_refused(field, value, model):
  edit_config(model, **{field: value})
  refusal(model, field, "not supported")


def test_fields_that_change_nothing_pass_and_unknown_ones_are_named_once(model, capsys):
  neutral = {"partial_rotary_factor": 1.0, "sliding_window": None, "use_cache": True, "mlp_bias": 0}
  edit_config(model, **neutral | {"mlp_bias": False, "my_metadata": {"a": 1}})
  load(model)
  load(model)
  assert capsys.readouterr().out.count("my_metadata") == 1


@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
  ],
)
def test_a_json_file_that_is_none_is_named(name, model):
  (model / "model.safetensors").rename(model / "other.safetensors")
  index = {"weight_map": {"lm_head.weight": "other.safetensors"}}
  (model / "model.safetensors.index.json").write_text(json.dumps(index))
  load(model)
  for content in (
    "",
    "{",
    "[]",
    "3",
    "null",
    TWICE,
    DEEP,
    f'{{"a": {DEEP}}}',
    '{"a": "\\ud800"}',
    "\xff",
  ):
    (model / name).write_bytes(content.encode("latin-1"))
    refusal(model, name)


@pytest.mark.parametrize(
  "weight_map",
  [
    *(None, [], "x", {}, {"a": None}, {"a": 3}, {"a": "x" * 10**5}, {"a": ".."}),
    *({"a": "/etc/passwd"}, {"a": "../x.safetensors"}, {"a": "a/../x.safetensors"}),
    {"a": "x\0.safetensors"},
  ],
)
def test_an_index_that_names_no_shards_of_the_folder_is_refused(weight_map, model):
  (model / "model.safetensors").rename(model / "other.safetensors")
  index = {} if weight_map == {} else {"weight_map": weight_map}
  (model / "model.safetensors.index.json").write_text(json.dumps(index))
  refusal(model, "model.safetensors.index.json", "weight_map")


NORM = "model.norm.weight"


def test_a_tensor_that_is_in_two_shards_is_refused_by_its_name(model):
  tensors = safetensors.numpy.load_file(model / "model.safetensors")
  (model / "model.safetensors").unlink()
  safetensors.numpy.save_file(tensors, model / "a.safetensors")
  safetensors.numpy.save_file({NORM: 2 * tensors[NORM]}, model / "b.safetensors")
  shards = dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}
  (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
  refusal(model, "b.safetensors", NORM, "in another shard too")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, bool, np.complex64])
def test_a_tensor_that_holds_no_floats_is_refused_by_its_name(dtype, model):
  edit_tensors(model, lambda tensors: tensors.update({NORM: np.ones(12, dtype)}))
  refusal(model, NORM, "must hold one of")


def test_a_tensor_in_float8_is_refused_by_its_name(model):
  file = model / "model.safetensors"
  raw = file.read_bytes()
  length = int.from_bytes(raw[:8], "little")
  header = json.loads(raw[8 : 8 + length])
  start = header[NORM]["data_offsets"][0]
  # The layout must have no gaps, so a tensor of as many bytes is put there.
  header[NORM] = {"dtype": "F8_E4M3", "shape": [12 * 4], "data_offsets": [start, start + 48]}
  packed = json.dumps(header).encode()
  file.write_bytes(len(packed).to_bytes(8, "little") + packed + raw[8 + length :])
  refusal(model, NORM)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_a_tensor_that_is_not_finite_in_float32_is_refused_by_its_name(number, model):
  array = np.ones(12)
  array[7] = number
  edit_tensors(model, lambda tensors: tensors.update({NORM: array}))
  refusal(model, NORM, "NaN, infinity, or numbers beyond float32")


@pytest.mark.parametrize("token", [3, ["</s>"], {"content": 3}, {"a": 1}, "", "\ud800", True])
def test_a_special_token_that_is_no_text_is_refused(token, model):
  for name, field in (
    ("tokenizer_config.json", "eos_token"),
    ("tokenizer_config.json", "mask_token"),
    ("special_tokens_map.json", "pad_token"),
  ):
    before = (model / name).read_bytes() if (model / name).is_file() else b"{}"
    (model / name).write_text(json.dumps(json.loads(before) | {field: token}))
    refusal(model, name)
    (model / name).write_bytes(before)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("added_tokens_decoder", {"x": {"content": "a"}}),
    ("added_tokens_decoder", {"1" * 5000: {"content": "a"}}),
    ("added_tokens_decoder", {"1": {"content": "a", "lstrip": "no"}}),
    ("added_tokens_decoder", [1]),
    ("extra_special_tokens", 3),
    ("additional_special_tokens", [3]),
    ("tokenizer_class", 3),
  ],
)
def test_a_field_of_the_tokenizer_of_another_type_is_refused(field, value, model):
  (model / "tokenizer_config.json").write_text(json.dumps({field: value}))
  refusal(model, "tokenizer_config.json", field)


@pytest.mark.parametrize(
  "changes",
  [
    {"model": None},
    {"model": {"type": "WordLevel", "vocab": [1]}},
    {"model": {"type": "Nothing"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
    {"added_tokens": [{"id": 11, "content": "new", "special": "x"}]},
    {"added_tokens": 3},
    {"post_processor": {"type": "TemplateProcessing", "single": 3}},
    {
      "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "absent", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
      }
    },
  ],
)
def test_a_tokenizer_that_does_not_work_is_named(changes, model):
  content = json.loads((model / "tokenizer.json").read_text()) | changes
  (model / "tokenizer.json").write_text(json.dumps(content))
  refusal(model, "tokenizer.json")


def test_an_added_token_without_a_row_is_refused(model):
  content = json.loads((model / "tokenizer.json").read_text())
  token = {"id": 11, "content": "new", "special": True}
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  content["added_tokens"] = [token | flags]
  (model / "tokenizer.json").write_text(json.dumps(content))
  refusal(model, "ids go up to 11", "vocab_size=11")


def test_a_token_around_every_text_that_has_no_row_is_refused(model):
  content = json.loads((model / "tokenizer.json").read_text())
  special = {"id": "x", "ids": [77], "tokens": ["w5"]}
  content["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [
      {"SpecialToken": {"id": "x", "type_id": 0}},
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"x": special},
  }
  (model / "tokenizer.json").write_text(json.dumps(content))
  refusal(model, "ids go up to 77", "vocab_size=11")


def test_a_word_that_a_vocabulary_cannot_say_is_refused_where_it_occurs(model):
  content = json.loads((model / "tokenizer.json").read_text())
  content["model"]["unk_token"] = "nowhere"
  (model / "tokenizer.json").write_text(json.dumps(content))
  info = load_tokenizer(model)
  assert info.encode("w5 w3") == [5, 3]
  for text in ("new", "\ud800"):
    with pytest.raises(UserError, match=r"cannot encode text 2, '(new|.{1,6}d800)'"):
      info.encode_batch(["w5", text, "w3"])


def test_a_folder_that_is_none_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in ("x" * 5000, f"{tmp_path}/{'x' * 5000}", "a\0b"):
    refusal(path, "model directory")
  refusal("gpt2", "does not exist", "OWNER/NAME")
  assert "OWNER/NAME" not in refusal(tmp_path / "nowhere", "does not exist")
  (tmp_path / "loop").symlink_to("loop")
  refusal("loop", "loop")
  for name, file, word in (
    ("adapter", "adapter_config.json", "base_model_name_or_path"),
    ("raw", "consolidated.safetensors", "consolidated"),
    ("models--a--b", "snapshots/1f/config.json", "models--a--b/snapshots/1f"),
  ):
    (tmp_path / name / file).parent.mkdir(parents=True)
    (tmp_path / name / file).write_text("{}")
    refusal(tmp_path / name, word)
  refusal(tmp_path, "models--a--b/snapshots/1f")


def test_no_message_holds_a_traceback_of_the_library(model):
  (model / "model.safetensors").write_bytes(b"\xff" * 100)
  assert not re.search(r"File \"|Traceback", refusal(model, "model.safetensors"))
  header = json.dumps({"a": {"dtype": "F32", "shape": ["x" * 10**5]}}).encode()
  (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
  refusal(model, "model.safetensors")
  safetensors.numpy.save_file({}, model / "model.safetensors")
  refusal(model, "num_hidden_layers is 2")
  assert isinstance(tokenizers.__version__, str) and LLAMA.num_layers == 2
