"""Low-rank adapters: a few trainable leaves beside a frozen base.

Every linear map of the layers computes `x W + (16 / rank) * (x A) B`; `blocks.py` has the module
and its source. In the params the factors stand beside the "kernel" [L, in, out] of the map, as
"lora": {"lora_a": A [L, in, rank], "lora_b": B [L, rank, out]}. Trainable and frozen params are two
trees with disjoint leaves, so that only the trainable ones have gradients and optimizer state:

    config, trainable, frozen = add_lora(config, params, key, rank=8)
    loss = lambda trainable: ...policy_model(config).hidden(join(frozen, trainable), ...)

The frozen tree of a language model is that model before training: with `lora_rank=0` it is the
reference of a KL penalty, in the same memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util

from klrl.models.blocks import LORA_ALPHA, DecoderConfig
from klrl.models.decoder import Params, policy_model


def add_lora(
  config: DecoderConfig, params: Params, key: jax.Array, *, rank: int
) -> tuple[DecoderConfig, Params, Params]:
  """Returns (config with adapters, trainable params, frozen params).

  Trainable are the fresh adapters, in `config.param_dtype`, and the `head` of a scalar model; all
  other params are frozen. Nothing of `params` (numpy or JAX arrays) is copied, so donating the
  trainable params of a scalar model deletes its head. Fresh adapters change no output. Rank 0
  returns (config, params, {}): everything is trained.

  Raises:
    ValueError: `rank` is negative, or `params` have adapters already.
  """
  if config.lora_rank:
    raise ValueError(f"lora_rank={config.lora_rank}: these params have adapters; merge_lora first.")
  adapted = dataclasses.replace(config, lora_rank=rank)
  if rank == 0:
    return config, params, {}

  # It is compiled, so that the rest of a fresh model is never made.
  @jax.jit
  def fresh(key):
    leaves = traverse_util.flatten_dict(policy_model(adapted).init(key))
    return traverse_util.unflatten_dict({k: leaf for k, leaf in leaves.items() if "lora" in k})

  heads = {name: value for name, value in params.items() if name == "head"}
  frozen = {name: value for name, value in params.items() if name != "head"}
  return adapted, fresh(key) | heads, frozen


def join(frozen: Params, trainable: Params) -> Params:
  """Returns the union of two nested dicts, the same arrays; `join({}, params)` is `params`.

  Raises:
    ValueError: a leaf is in both.
  """
  if not frozen:
    return trainable
  joined = dict(frozen)
  for name, value in trainable.items():
    if name not in frozen:
      joined[name] = value
    elif isinstance(value, dict) and isinstance(frozen[name], dict):
      joined[name] = join(frozen[name], value)
    else:
      raise ValueError(f"{name!r} is in both the frozen and the trainable params.")
  return joined


def merge_lora(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
  """Returns (config, params) of the same model without adapters: `W + (16 / rank) * A B`.

  The sum is taken in at least float32 and then rounded to the dtype of the kernel. At rank 0 both
  are returned as they are.
  """
  if not config.lora_rank:
    return config, params

  def merged(node):
    if not isinstance(node, dict):
      return node
    rest = {name: merged(child) for name, child in node.items() if name != "lora"}
    if "lora" in node:
      rest["kernel"] = merged_kernel(rest["kernel"], **node["lora"], rank=config.lora_rank)
    return rest

  return dataclasses.replace(config, lora_rank=0), merged(params)


def merged_kernel(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, *, rank: int):
  """Returns the kernel of a linear map with its adapter merged into it; see `merge_lora`."""
  dtype = jnp.promote_types(kernel.dtype, jnp.float32)
  # A TPU would otherwise multiply in bfloat16.
  product = jnp.matmul(lora_a, lora_b, precision="highest", preferred_element_type=dtype)
  return (kernel.astype(dtype) + LORA_ALPHA / rank * product).astype(kernel.dtype)
