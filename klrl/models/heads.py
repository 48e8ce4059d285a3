"""The heads of published reward models: a linear map, or two with an activation between them.

A file names its head in its own way. The plain one, a map without a bias, is known as `score` and
saved so, as `transformers` has it. A head with a bias or with two maps keeps the names of its
tensors and its model's class, since `transformers` has no such class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Names of a head, of which the first that is there is taken. `v_head.summary` is TRL's, `v_head`
# InternLM2's, `value_head` OpenRLHF's.
_NAMES = ("score", "value_head", "v_head.summary", "v_head", "classifier", "rm_head", "reward_head")
# Names of the two maps behind that of the head, and what is between them: that of Qwen2.5's reward
# models, and that of the classification heads of `transformers`.
_PAIRS = (("0", "2", "relu"), ("dense", "out_proj", "tanh"))
_ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


class Head(NamedTuple):
  """A head that is not the plain one: the names of its maps, and what is between them."""

  output: str
  hidden: str = ""
  activation: str = ""

  def tensors(self) -> dict[tuple[str, ...], str]:
    """Returns the names of the tensors that there may be, by their paths in the params."""
    maps = {"output": self.output} | ({"hidden": self.hidden} if self.hidden else {})
    kinds = {"kernel": "weight", "bias": "bias"}
    return {
      ("head", part, ours): f"{name}.{theirs}"
      for part, name in maps.items()
      for ours, theirs in kinds.items()
    }


def find(names) -> Head | None:
  """Returns the head among the names of a model's tensors; None if there is none."""
  for name in _NAMES:
    if f"{name}.weight" in names:
      return Head(name)
    for first, last, activation in _PAIRS:
      if {f"{name}.{first}.weight", f"{name}.{last}.weight"} <= set(names):
        return Head(f"{name}.{last}", f"{name}.{first}", activation)
  return None


def apply(head: Head | None, params, hidden: jax.Array) -> jax.Array:
  """Returns a number [...] for each of the hidden states [..., D], in at least float32."""
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  x = hidden.astype(dtype)
  if head is None:
    return (x @ params.astype(dtype))[..., 0]

  def linear(part, x):
    y = x @ part["kernel"].astype(dtype)
    if "bias" not in part:
      return y
    return y + jnp.broadcast_to(part["bias"].astype(dtype), y.shape)

  if head.hidden:
    x = _ACTIVATIONS[head.activation](linear(params["hidden"], x))
  return linear(params["output"], x)[..., 0]
