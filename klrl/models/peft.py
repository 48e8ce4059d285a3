"""Adapters in the layout of PEFT: merged into the model that they adapt, and written.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. For each linear map it has
the factors A [rank, in] and B [out, rank] of a module, and `W + scale * B A` is the merged map,
rounded to the dtype of W, as by PEFT's `merge_and_unload` (`scale` is `lora_alpha / r`, or
`lora_alpha / sqrt(r)` with `use_rslora`).
"""

import functools
import math
import pathlib
import re
from typing import Any

import numpy as np
from flax import traverse_util

from klrl import schema
from klrl.devices import parallel, processes
from klrl.errors import UserError
from klrl.models import hub
from klrl.models.blocks import LORA_ALPHA, DecoderConfig
from klrl.models.decoder import Params
from klrl.models.directory import ADAPTERS, CONFIG, adapters_dir, model_dir, write_json
from klrl.models.families import FAMILIES, Family, family_of
from klrl.models.weights import Delta, Planned, Tensors, write_tensors
from klrl.run import progress

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ALPHA = schema.number(1e-9, 1e9)
_ALPHAS = schema.optional(schema.object_of(_ALPHA))
_RULES = {
  "peft_type": schema.text(100),
  "lora_alpha": _ALPHA,
  "alpha_pattern": _ALPHAS,
  "use_rslora": schema.optional(schema.boolean()),
}
# The values, besides null, at which a field changes nothing.
_NEUTRAL = {
  "use_dora": (False,),
  "use_qalora": (False,),
  "use_bdlora": (),
  "layer_replication": ([],),
  "alora_invocation_tokens": ([],),
  "arrow_config": (),
  "trainable_token_indices": ([],),
  "target_parameters": ([],),
  # These change the model that is adapted, and not only what adapters start from.
  "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_HARMLESS = """
  auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
  exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config
  lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save peft_version
  qalora_group_size r rank_pattern revision runtime_config target_modules task_type velora_config
"""


def add_adapters(directory: pathlib.Path, tensors: Tensors, family: Family) -> None:
  """Adds the adapters in a directory to the tensors of the model that they adapt.

  A tensor that is saved whole beside them, such as a score head, takes the place of the model's.

  Raises:
    UserError: a file is missing or broken, or it holds something that is not computed.
  """
  file = directory / ADAPTERS
  raw = schema.check(schema.read(file), _RULES, file, required=("peft_type", "lora_alpha"))
  if raw["peft_type"] != "LORA":
    raise UserError(f"{file}: peft_type {raw['peft_type']!r} is not supported; LORA is.")
  for name, allowed in _NEUTRAL.items():
    value = raw.get(name)
    if value is not None and not any(value is x or value == x != 0 for x in allowed):
      raise UserError(f"{file}: {name}={repr(value)[:100]} is not supported.")
  known = {*_RULES, *_NEUTRAL, *_HARMLESS.split()}
  if unknown := sorted(name for name in raw.keys() - known if raw[name] is not None):
    progress.warn_once(f"{file}: {', '.join(unknown)[:200]}: not known to klrl, and left aside.")
  if not (directory / WEIGHTS).is_file():
    raise UserError(f"{directory} has no {WEIGHTS}; a pickle in its place is not read.")
  adapters = Tensors.of_file(directory / WEIGHTS)
  if not adapters.names:
    raise UserError(f"{directory / WEIGHTS} holds no adapters.")
  for name in sorted(adapters.names):
    where = adapters.where(name)
    if not name.startswith(_PREFIX):
      raise UserError(f"{where} is not the adapter of a module; its name has no {_PREFIX!r}.")
    module = name.removeprefix(_PREFIX)
    if match := re.fullmatch(r"(.*)\.lora_A\.weight", module):
      factors = name, name.replace(".lora_A.", ".lora_B.")
      target = family.known_as(f"{match[1]}.weight")
      if factors[1] not in adapters.names or target not in tensors.names:
        raise UserError(f"{where} has no lora_B beside it, or adapts what the model does not have.")
      tensors.add(target, _delta(adapters, factors, match[1], raw, family, tensors, target))
    elif re.fullmatch(r".*\.lora_B\.weight", module):
      if name.replace(".lora_B.", ".lora_A.") not in adapters.names:
        raise UserError(f"{where} has no lora_A beside it.")
    elif ".lora_" in module:
      raise UserError(f"{where} is of a kind of adapter that is not supported.")
    else:
      known_as = family.known_as(module)
      if known_as is not None:
        tensors.take(known_as, adapters, name)


def _delta(adapters, factors, module, raw, family, tensors, target) -> Delta:
  for name in factors:
    adapters.dtype(name)
    if len(adapters.shape(name)) != 2:
      raise UserError(f"{adapters.where(name)} has shape {adapters.shape(name)}, not two axes.")
  lora_a, lora_b = (adapters.whole(name) for name in factors)
  rank = lora_a.shape[0]
  alpha = _of_module(raw.get("alpha_pattern") or {}, module, raw["lora_alpha"])
  scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
  left, right = np.float32(scale) * lora_b, lora_a
  if not family.out_in and target.startswith(family.layers.split("{}")[0]):
    left, right = right.T, left.T
  if left.shape[1] != right.shape[0] or (len(left), right.shape[1]) != tensors.shape(target):
    raise UserError(
      f"{adapters.where(factors[0])} and its lora_B have shapes {lora_a.shape} and {lora_b.shape},"
      f" which do not make {tensors.where(target)} of shape {tensors.shape(target)}."
    )
  return Delta(left, right)


def _of_module(patterns: dict[str, Any], module: str, default):
  """Returns the value for a module: of its own name, or the end of it, as PEFT finds it."""
  for pattern, value in patterns.items():
    # PEFT takes patterns for regular expressions; those that it writes are names.
    name = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    if not re.fullmatch(r"[\w.]{1,300}", name):
      raise UserError(f"the pattern {pattern[:100]!r} of adapters is not supported; write a name.")
    if module == name or (module.endswith(f".{name}") and not pattern.startswith("^")):
      return value
  return default


def _a_of(config, family, parts, layer, shape) -> list[np.ndarray]:
  """Returns the factor A of a module in a layer: those of its maps, one below the other."""
  del config, family, shape
  return [_factor(lora_a, layer) for _, lora_a, _ in parts]


def _b_of(config, family, parts, layer, shape) -> list[np.ndarray]:
  """Returns the factor B of a module in a layer: each map's at its outputs and its ranks."""
  whole = np.zeros(shape, np.float32)
  for i, (path, _, lora_b) in enumerate(parts):
    rows = family.tensors[path].rows
    ranks = slice(i * config.lora_rank, (i + 1) * config.lora_rank)
    whole[slice(None) if rows is None else rows(config), ranks] = _factor(lora_b, layer)
  return [whole]


def _factor(leaf, layer) -> np.ndarray:
  return np.asarray(parallel.fetch_layer(leaf, layer), np.float32).T


def base_name(path: str) -> str:
  """Returns what adapters of the model at `path` call it: its name on the hub, or where it is.

  It is "" if there can be no adapters of that model in PEFT: it has adapters itself, or other parts
  beside its language model, whose layers are called otherwise there.
  """
  if adapters_dir(path) is not None:
    return ""
  directory = model_dir(path)
  if schema.read(directory / CONFIG)["model_type"] not in FAMILIES:
    return ""
  return path if hub.is_name(path) else str(directory.absolute())


def save_adapters(
  directory: pathlib.Path, config: DecoderConfig, params: Params, *, base: str
) -> None:
  """Writes the adapters among `params` as PEFT's `PeftModel.from_pretrained` opens them.

  All processes call it, outside of `on_writer`. The head of a scalar model is saved whole. Where
  several of our maps are one in the files, the adapter of that has the sum of their ranks.

  Args:
    directory: where to.
    config: of the model with its adapters.
    params: trained parameters, wherever they are.
    base: what `base_name` returned.
  """
  family = family_of(config)[1]
  leaves = traverse_util.flatten_dict(params)
  modules: dict[str, list] = {}
  for path, leaf in leaves.items():
    if path[-1] == "lora_a":
      kernel = (*path[:-2], "kernel")
      pair = leaf, leaves[*path[:-1], "lora_b"]
      modules.setdefault(family.tensors[kernel].name, []).append((kernel, *pair))
  planned, ranks = [], {}
  for name, parts in modules.items():
    module, num_parts = name.removesuffix(".weight"), len(parts)
    ranks[module] = num_parts * config.lora_rank
    num_layers, num_inputs, _ = parts[0][1].shape
    num_outputs = sum(lora_b.shape[-1] for *_, lora_b in parts)
    for layer in range(num_layers):
      prefix = f"{_PREFIX}{family.layers.format(layer)}{module}"
      shapes = (ranks[module], num_inputs), (num_outputs, ranks[module])
      for kind, shape, make in zip("AB", shapes, (_a_of, _b_of), strict=True):
        planned.append(
          Planned(
            f"{prefix}.lora_{kind}.weight",
            shape,
            np.dtype(np.float32),
            functools.partial(make, config, family, parts, layer, shape),
          )
        )
  head = [path for path in leaves if path == ("head",)]
  for path in head:
    leaf = leaves[path]
    planned.append(
      Planned(
        _PREFIX + family.tensors[path].name,
        leaf.shape[::-1],
        np.dtype(np.float32),
        lambda leaf=leaf: [np.asarray(parallel.fetch(leaf), np.float32).T],
      )
    )
  several = {module: rank for module, rank in ranks.items() if rank != config.lora_rank}
  fields = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": config.lora_rank,
    "lora_alpha": LORA_ALPHA,
    "rank_pattern": several,
    "alpha_pattern": {
      module: LORA_ALPHA * rank / config.lora_rank for module, rank in several.items()
    },
    "target_modules": sorted(ranks),
    "modules_to_save": ["score"] if head else None,
    "fan_in_fan_out": not family.out_in,
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  processes.on_writer(directory.mkdir)(parents=True, exist_ok=True)
  write_tensors(directory / WEIGHTS, planned)
  processes.on_writer(write_json)(directory / ADAPTERS, fields)
